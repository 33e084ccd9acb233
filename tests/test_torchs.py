"""What is private in torch is checked before it is used: where torch has changed, that is said, and the rest works."""

import inspect
import re
import sys
import threading

import pytest
import torch
import torch.utils.checkpoint as torchs
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from twins import batches, counters, torchs_checkpoint

NEED_IT = "diagnose and preserve_everywhere"


@pytest.fixture
def anew():
    """Give a function that imports the package anew, as in a process where torch was never another one."""
    here = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "momentum_fix"}

    def imported():
        for name in here:
            sys.modules.pop(name, None)
        import momentum_fix

        return momentum_fix

    yield imported
    for name in [name for name in sys.modules if name.partition(".")[0] == "momentum_fix"]:
        del sys.modules[name]
    sys.modules.update(here)


def rewritten(name, pattern, replacement):
    """Give a function of torch's checkpoint as a torch would have it in which this text is another one."""
    source, found = re.subn(pattern, replacement, inspect.getsource(getattr(torchs, name)))
    assert found
    made = {}
    exec(source, vars(torchs), made)
    return made[name]


def generator():
    """Give the name of the function that makes the frame of a non-reentrant checkpoint; torch 2.14 has two of them."""
    name = "_checkpoint_without_reentrant_generator"
    return f"{name}_impl" if hasattr(torchs, f"{name}_impl") else name


def frame_renamed(patch):
    patch.setattr(torchs, "_CallOfCheckpoint", torchs._CheckpointFrame, raising=False)
    patch.setattr(torchs, generator(), rewritten(generator(), "_CheckpointFrame", "_CallOfCheckpoint"))
    patch.delattr(torchs, "_CheckpointFrame")


def frame_not_used(patch):
    patch.setattr(torchs, "_CallOfCheckpoint", torchs._CheckpointFrame, raising=False)
    patch.setattr(torchs, generator(), rewritten(generator(), "_CheckpointFrame", "_CallOfCheckpoint"))


def frame_with_another_argument(patch):
    class Frame(torchs._CheckpointFrame):
        def __init__(self, function, options):
            super().__init__(function, *options)

    patch.setattr(torchs, "_CheckpointFrame", Frame)
    call = r"_CheckpointFrame\(\s*(\w+),(.*?metadata_fn)\s*\)"
    patch.setattr(torchs, generator(), rewritten(generator(), f"(?s){call}", r"_CheckpointFrame(\1, (\2))"))


def variable_renamed(patch):
    patch.setattr(torchs, generator(), rewritten(generator(), r"\bfn\b", "function_to_run"))


def random_numbers_renamed(patch):
    renamed = rewritten(generator(), r"\bpreserve_rng_state\b", "keeps_random_numbers")

    def called(*args, **kwargs):
        return renamed(
            *args, **{name.replace("preserve_rng_state", "keeps_random_numbers"): kwargs[name] for name in kwargs}
        )

    patch.setattr(torchs, generator(), called)


def hook_not_used(patch):
    patch.setattr(torchs, "_hook_of_forward", torchs._checkpoint_hook, raising=False)
    patch.setattr(torchs, generator(), rewritten(generator(), r"\b_checkpoint_hook\b", "_hook_of_forward"))


def hook_renamed(patch):
    hook_not_used(patch)
    patch.delattr(torchs, "_checkpoint_hook")


def values_not_compared(patch):
    frame = torchs._CheckpointFrame

    class Frame(frame):
        def check_recomputed_tensors_match(self, gid):
            pass

    patch.setattr(torchs, "_CheckpointFrame", Frame)


def another_reentrant_function(patch):
    class Function(torch.autograd.Function):
        forward, backward = (
            staticmethod(torchs.CheckpointFunction.forward),
            staticmethod(torchs.CheckpointFunction.backward),
        )

    def checkpoint(function, *args, use_reentrant, **kwargs):
        return (
            Function.apply(function, True, *args)
            if use_reentrant
            else plain(function, *args, use_reentrant=False, **kwargs)
        )

    plain = torchs.checkpoint
    patch.setattr(torchs, "checkpoint", checkpoint)


def reentrant_function_with_other_arguments(patch):
    class Function(torchs.CheckpointFunction):
        @staticmethod
        def forward(ctx, options, function, *args):
            return theirs(ctx, function, options["preserve_rng_state"], *args)

        @staticmethod
        def backward(ctx, *gradients):
            return torchs_own.backward(ctx, *gradients)

        @classmethod
        def apply(cls, function, preserve, *args):
            return super().apply({"preserve_rng_state": preserve}, function, *args)

    torchs_own, theirs = torchs.CheckpointFunction, torchs.CheckpointFunction.forward
    patch.setattr(torchs, "CheckpointFunction", Function)


CHANGES = [
    frame_renamed,
    frame_not_used,
    frame_with_another_argument,
    variable_renamed,
    random_numbers_renamed,
    hook_not_used,
    hook_renamed,
    values_not_compared,
    another_reentrant_function,
    reentrant_function_with_other_arguments,
]


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, x):
        self.steps += 1
        return (x * self.steps).tanh()


def stepped(by, *prepare):
    """Train a net for a step by this checkpoint; give what was counted."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Steps())
    for each in prepare:
        each(net)
    x = batches(1, 4, 3)[0].requires_grad_()
    by(net, x).square().sum().backward()
    return set(counters(net).values()) | {net[2].steps}, x.grad


@pytest.mark.parametrize("change", CHANGES)
def test_where_torch_has_changed_what_needs_it_says_so_and_the_rest_works(change, anew, monkeypatch):
    true = stepped(lambda net, x: net(x))
    change(monkeypatch)
    changed = torchs_checkpoint()
    package = anew()
    what = f"torch {re.escape(torch.__version__)} .*{NEED_IT} cannot work with it.* update_once, calibrate, correct and"
    for _ in range(2):  # not only the first time
        with pytest.raises(RuntimeError, match=what), package.diagnose(nn.Linear(1, 1)):
            pass
        with pytest.raises(RuntimeError, match=what):
            package.preserve_everywhere()
    assert torchs_checkpoint() == changed

    def by_context(net, x):
        return torchs.checkpoint(net, x, use_reentrant=False, context_fn=package.preserve_state)

    for by in (
        by_context,
        lambda net, x: package.checkpoint(net, x, use_reentrant=False),
        lambda net, x: package.checkpoint(net, x, use_reentrant=True),
    ):
        counted, gradient = stepped(by)
        assert counted == {1}
        assert torch.equal(gradient, true[1])
    net = package.correct(nn.Sequential(nn.BatchNorm1d(3)), 2)
    assert net[0].momentum == package.corrected_momentum(0.1, 2)
    for use_reentrant in (False, True):
        counted, _ = stepped(
            lambda *args, r=use_reentrant: torchs.checkpoint(*args, use_reentrant=r), package.update_once
        )
        assert counted == {1, 2}  # BatchNorm once; the steps are no business of it
    with package.calibrate(net := nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))) as report:
        torchs.checkpoint(net, *batches(1, 4, 3), use_reentrant=False).sum().backward()
    assert report.passes == {"1": 2}


def test_where_torch_is_as_it_was_nothing_is_said(anew):
    package = anew()
    with package.preserve_everywhere():
        assert stepped(lambda net, x: torchs.checkpoint(net, x, use_reentrant=False))[0] == {1}


MODES = {
    "inference": torch.inference_mode,
    "without gradients": torch.no_grad,
    "another device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "fake tensors": FakeTensorMode,
    "counting operations": lambda: FlopCounterMode(display=False),
    "without early stop": lambda: torchs.set_checkpoint_early_stop(False),
    "debugging": lambda: torchs.set_checkpoint_debug_enabled(True),
    "saved tensors elsewhere": torch.autograd.graph.save_on_cpu,
    "anomaly detection": lambda: torch.autograd.detect_anomaly(check_nan=False),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_the_check_does_not_mind_where_it_is_done_first(mode, anew):
    package = anew()
    with mode():
        package.preserve_everywhere().remove()


def test_what_is_checked_is_not_seen_by_others(anew):
    seen, package = [], anew()
    hook = nn.modules.module.register_module_forward_hook(lambda *_: seen.append("a module"))
    state = torch.get_rng_state()
    try:
        package.preserve_everywhere().remove()
    finally:
        hook.remove()
    assert not seen
    assert torch.equal(torch.get_rng_state(), state)


# Whether a backward pass is running, which decides what is a recomputation.


def always(answer):
    return lambda patch: patch.setattr(ModuleTracker, "is_bw", property(lambda _: answer))


def without_the_tracker(patch):
    patch.delattr(torch.utils.module_tracker, "ModuleTracker")


def without_the_answer(patch):
    patch.delattr(ModuleTracker, "is_bw")


UNTRUE = {
    "never": always(False),
    "always": always(True),
    "no tracker": without_the_tracker,
    "no answer": without_the_answer,
}


def entered(block):
    with block:
        pytest.fail("it must not be entered")


NEED_A_BACKWARD_PASS = {
    "update_once": lambda package, net: package.update_once(net),
    "calibrate": lambda package, net: entered(package.calibrate(net)),
    "diagnose": lambda package, net: entered(package.diagnose(net)),
}


@pytest.mark.parametrize("tool", NEED_A_BACKWARD_PASS.values(), ids=NEED_A_BACKWARD_PASS)
@pytest.mark.parametrize("change", UNTRUE.values(), ids=UNTRUE)
def test_where_torch_no_longer_tells_a_recomputation_what_needs_it_says_so_and_the_rest_works(
    change, tool, anew, monkeypatch
):
    package = anew()
    net = nn.Sequential(nn.BatchNorm1d(3))
    own = [set(vars(module)) for module in net.modules()]
    change(monkeypatch)
    what = rf"torch {re.escape(torch.__version__)} does not tell a recomputation.*update_once, calibrate and diagnose"
    for _ in range(2):  # not only the first time
        with pytest.raises(RuntimeError, match=what):
            tool(package, net)
    assert [set(vars(module)) for module in net.modules()] == own
    assert package.correct(net)[0].momentum == package.norm_layer()(3).momentum == package.corrected_momentum(0.1)
    assert package.restore(net)[0].momentum == 0.1
    assert not package.audit(net).repeated
    for reentrant in (False, True):
        counted, _ = stepped(lambda *args, r=reentrant: package.checkpoint(*args, use_reentrant=r))
        assert counted == {1}
    monkeypatch.undo()
    package.update_once(net).remove()


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_recomputation_is_told_in_whatever_mode_it_is_first_asked_for(mode, anew):
    package, net = anew(), nn.Sequential(nn.BatchNorm1d(3))
    grad, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), threading.active_count()
    with mode():
        package.update_once(net).remove()
    assert (torch.is_grad_enabled(), torch.get_default_dtype(), threading.active_count()) == (grad, dtype, threads)


def test_trying_it_out_is_seen_by_nobody(anew):
    seen, package, net, idle = [], anew(), nn.Sequential(nn.BatchNorm1d(3)), nn.Linear(1, 1)
    hook = nn.modules.module.register_module_forward_hook(lambda *_: seen.append("a module"))
    state = torch.get_rng_state()
    pack = torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append("a tensor"), lambda _: None)
    try:
        with pack:
            package.update_once(net)
        with package.diagnose(idle) as report:
            pass
    finally:
        hook.remove()
    assert not seen
    assert "no backward pass was seen" in report.verdict
    assert torch.equal(torch.get_rng_state(), state)


def test_correct_works_though_names_that_others_need_are_gone(anew, monkeypatch):
    monkeypatch.delattr(torch.utils._python_dispatch, "_get_current_dispatch_mode_stack")
    without_the_tracker(monkeypatch)
    frame_renamed(monkeypatch)
    package = anew()
    assert package.correct(nn.BatchNorm1d(3)).momentum == package.corrected_momentum(0.1)
