"""docs/limits.md: what comes of what no checkpoint preserves, and what diagnose says of it; scenes.py has more."""

import contextlib
import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import CheckpointError

import momentum_fix
from momentum_fix import diagnose, preserve_everywhere, update_once
from momentum_fix.state.fingerprint import fingerprint
from pages import DOCS, rows
from recipes import hand_written
from scenes import (
    ENGINES,
    WIDTH,
    FromNorm,
    Net,
    data,
    non_reentrant,
    norm,
    once,
    plainly,
    preserving,
    same_gradients,
)
from twins import counters, tells_of_compilation

EVERY = {
    f"{engine}, {how}": ckpt
    for engine, both in ENGINES.items()
    for how, ckpt in zip(("plain", "kept"), both, strict=True)
}
NON_REENTRANT = {name: ckpt for name, ckpt in EVERY.items() if name.startswith("non-reentrant")}
REENTRANT = {name: ckpt for name, ckpt in EVERY.items() if name.startswith("reentrant")}


def among(ckpts):
    return pytest.mark.parametrize("ckpt", ckpts.values(), ids=ckpts)


def beside_its_twin(block, step, ckpt):
    """Give whether gradients are those of the uncheckpointed twin, the report, and what was raised, if anything was."""
    torch.manual_seed(0)
    net, raised = Net(block()), None
    truth = copy.deepcopy(net)
    with contextlib.suppress(ZeroDivisionError):
        step(truth, plainly)
    try:
        with diagnose(net) as report:
            step(net, ckpt)
    except (CheckpointError, ZeroDivisionError) as error:
        raised = error
    return same_gradients(net, truth), report, raised


# Trackers.

TRACKED = []


class Tracks(nn.Module):
    """Puts what it is given on a list of the process."""

    def forward(self, x):
        TRACKED.append(float(x.detach().mean()))
        return x.tanh()


@among(EVERY)
def test_what_is_written_to_a_global_and_not_read_is_there_twice_and_diagnose_does_not_see_it(ckpt):
    def step(net, ckpt):
        TRACKED.clear()
        ckpt(net.body, net.stem(data()[0])).square().mean().backward()

    same, report, _ = beside_its_twin(Tracks, step, ckpt)
    assert len(TRACKED) == 2
    assert TRACKED[0] == TRACKED[1]
    assert same
    assert report.ok


# `requires_grad`.


def changing(before, after):
    """Give a step between whose forward and backward pass something is done to the first layer of the checkpoint."""

    def step(net, ckpt):
        before(net.body)
        y = ckpt(net.body, net.stem(data()[0]))
        after(net.body)
        y.square().mean().backward()

    return step


def freeze(body):
    body[0].requires_grad_(False)


def thaw(body):
    body[0].requires_grad_(True)


@among(NON_REENTRANT)
def test_torch_refuses_what_is_frozen_after_the_forward_pass_and_the_report_says_that_gradients_are_wrong(ckpt):
    _, report, raised = beside_its_twin(nn.Tanh, changing(thaw, freeze), ckpt)
    assert "A different number of tensors was saved" in str(raised)
    assert report.gradients_right is False


@among(REENTRANT)
def test_what_is_frozen_after_the_forward_pass_is_right_with_the_reentrant_engine(ckpt):
    same, report, _ = beside_its_twin(nn.Tanh, changing(thaw, freeze), ckpt)
    assert same
    assert report.gradients_right is True


def test_torch_refuses_what_is_no_longer_frozen_and_the_report_says_that_gradients_are_wrong():
    _, report, raised = beside_its_twin(nn.Tanh, changing(freeze, thaw), non_reentrant)
    assert "different metadata than during the forward pass" in str(raised)
    assert report.gradients_right is False


@among({"kept": preserving, "kept, reentrant": REENTRANT["reentrant, kept"]})
def test_a_small_frozen_parameter_is_frozen_in_the_recomputation_too_if_state_is_preserved(ckpt):
    same, report, _ = beside_its_twin(nn.Tanh, changing(freeze, thaw), ckpt)
    assert same
    assert report.ok


def test_what_is_no_longer_frozen_gets_a_gradient_with_the_reentrant_engine_and_the_report_says_so():
    same, report, _ = beside_its_twin(nn.Tanh, changing(freeze, thaw), REENTRANT["reentrant, plain"])
    assert not same
    assert report.gradients_right is False


# What goes around a checkpoint in the forward pass.


def in_a_cache(net, ckpt):
    with parametrize.cached():
        y = ckpt(net.body, net.stem(data()[0])) + ckpt(net.body, net.stem(data()[1]))
    y.square().mean().backward()


def orthogonal():
    return parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH))


@among(REENTRANT)
def test_what_the_forward_pass_takes_from_a_cache_around_the_checkpoint_is_called_wrong_though_it_is_not(ckpt):
    same, report, _ = beside_its_twin(orthogonal, in_a_cache, ckpt)
    assert same
    assert report.gradients_right is False


@among(NON_REENTRANT)
def test_torch_refuses_a_cache_around_the_checkpoint_and_the_report_says_that_gradients_are_wrong(ckpt):
    _, report, raised = beside_its_twin(orthogonal, in_a_cache, ckpt)
    assert isinstance(raised, CheckpointError)
    assert report.gradients_right is False


# State that the backward pass moves.


class CountsBackward(torch.autograd.Function):
    """Counts, in a tensor, the backward passes through it, and has got that tensor in one of two ways."""

    @staticmethod
    def forward(ctx, x, count, is_saved):
        if is_saved:
            ctx.save_for_backward(count)
        ctx.count = None if is_saved else count
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        count = ctx.saved_tensors[0] if ctx.count is None else ctx.count
        count += 1
        return gradient, None, None


class Counted(nn.BatchNorm1d):
    """Keeps such a tensor as a buffer, or in an object of its own."""

    def __init__(self, where, is_saved=False):
        super().__init__(WIDTH)
        self.register_buffer("count", torch.zeros(()))
        self.own, self.where, self.is_saved = SimpleNamespace(count=torch.zeros(())), where, is_saved

    def forward(self, x):
        return CountsBackward.apply(super().forward(x), self.held(), self.is_saved)

    def held(self):
        return self.count if self.where == "a buffer" else self.own.count


def counted_backward(ckpt, *how, prepare=lambda net: None):
    net = Net(Counted(*how))
    prepare(net)
    once(net, ckpt)
    return net.body[1].held().item()


@among(EVERY)
@pytest.mark.parametrize("is_saved", [False, True], ids=["captured", "saved"])
def test_what_the_backward_pass_writes_to_a_buffer_goes_to_the_copy_that_the_recomputation_gave_it(is_saved, ckpt):
    engine, how = next(name for name, each in EVERY.items() if each is ckpt).split(", ")
    is_lost = how == "kept" and (is_saved or engine == "reentrant")
    assert counted_backward(ckpt, "a buffer", is_saved) == (0 if is_lost else 1)
    assert counted_backward(ckpt, "an object", is_saved) == 1


@pytest.mark.filterwarnings("ignore:.*the class has a forward of its own")
@pytest.mark.parametrize("engine", ENGINES)
def test_with_update_once_too_if_the_engine_is_the_reentrant_one(engine):
    ckpt, _ = ENGINES[engine]
    assert counted_backward(ckpt, "a buffer", prepare=update_once) == (engine == "non-reentrant")
    assert counted_backward(ckpt, "an object", prepare=update_once) == counted_backward(ckpt, "a buffer") == 1


# What the forward pass makes.


class Makes(nn.Module):
    """Makes a parameter in its first call."""

    def __init__(self):
        super().__init__()
        self.scale, self.ready = None, False

    def forward(self, x):
        if not self.ready:
            self.scale, self.ready = nn.Parameter(x.detach().mean(0)), True
        return x * self.scale


@among(EVERY)
def test_a_parameter_that_the_forward_pass_makes_gets_no_gradient_if_it_is_preserved_in_the_reentrant_engine(ckpt):
    net = Net(Makes())
    once(net, ckpt)
    assert (net.body[1].scale.grad is None) == (ckpt is REENTRANT["reentrant, kept"])
    once(net, ckpt)  # as after a batch without gradients
    assert net.body[1].scale.grad is not None


class Appends(nn.Module):
    """Appends a layer in every second call."""

    def __init__(self):
        super().__init__()
        self.layers, self.calls = nn.ModuleList(), 0

    def forward(self, x):
        self.calls += 1
        if self.calls % 2:
            self.layers.append(nn.Tanh())
        return x * sum(layer(x) for layer in self.layers)


@among(REENTRANT)
def test_layers_that_the_forward_pass_appends_are_there_in_the_recomputation(ckpt):
    same, report, _ = beside_its_twin(Appends, once, ckpt)
    assert same is (ckpt is REENTRANT["reentrant, plain"])  # whose recomputation is the second call
    assert report.gradients_right is same


@among(EVERY)
def test_a_lazy_layer_before_a_random_one_draws_in_the_first_forward_pass_alone(ckpt):
    def block():
        return nn.Sequential(nn.LazyLinear(WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def step(net, ckpt):
        torch.manual_seed(1)
        once(net, ckpt)

    def second(net, ckpt):
        torch.manual_seed(2)
        with torch.no_grad():
            net.body(net.stem(data()[0]))
        step(net, ckpt)

    same, report, _ = beside_its_twin(block, step, ckpt)
    assert not same
    assert report.gradients_right is False
    same, report, _ = beside_its_twin(block, second, ckpt)
    assert same
    assert report.gradients_right is True


# Compiled together with the model.


class Compiled(nn.Module):
    def __init__(self, block, ckpt):
        super().__init__()
        self.net, self.ckpt = Net(block()), ckpt

    def forward(self, x):
        return self.ckpt(self.net.body, self.net.stem(x))


def compiled_beside_its_twin(block, ckpt):
    torch.manual_seed(0)
    model = Compiled(block, ckpt)
    truth = copy.deepcopy(model)
    truth.ckpt = plainly
    truth(data()[0]).square().mean().backward()
    torch.compile(model, backend="aot_eager")(data()[0]).square().mean().backward()
    return model, truth


@tells_of_compilation
@pytest.mark.parametrize(("block", "right"), [(norm, True), (FromNorm, False)], ids=["only written", "read"])
def test_preserve_everywhere_does_nothing_in_code_that_is_compiled_with_its_checkpoint_and_says_so(block, right):
    with preserve_everywhere(), pytest.warns(UserWarning, match="preserve_everywhere does nothing"):
        model, truth = compiled_beside_its_twin(block, non_reentrant)
    assert counters(model) == counters(truth)  # BatchNorm is right there by itself
    assert same_gradients(model, truth) is right


@pytest.mark.parametrize("block", [norm, FromNorm], ids=["only written", "read"])
def test_the_drop_in_stays_out_of_the_compiled_code_and_is_right(block):
    def drop_in(function, x):
        return momentum_fix.checkpoint(function, x, use_reentrant=False)

    model, truth = compiled_beside_its_twin(block, drop_in)
    assert counters(model) == counters(truth)
    assert same_gradients(model, truth)


# What the page about diagnose says.


def compiled(net, ckpt):
    run = torch.compile(lambda x: ckpt(net.body, net.stem(x)), backend="aot_eager")
    run(data()[0]).square().mean().backward()


def in_evaluation_mode(net, ckpt):
    net.eval()
    once(net, ckpt)


def failing(net, ckpt):
    once(net, ckpt)
    raise ZeroDivisionError


def sparsely(net, ckpt):
    ckpt(lambda y: torch.sparse.mm(torch.eye(len(y)).to_sparse(), y), net.stem(data()[0])).square().mean().backward()


def given_data(net, _):
    net.body(REENTRANT["reentrant, plain"](net.stem, data()[0])).square().mean().backward()


def hooking(net, ckpt):
    def function(y):
        y.register_hook(lambda gradient: gradient * 0.1)
        return net.body(y)

    ckpt(function, net.stem(data()[0])).square().mean().backward()


def evaluated_in_between(net, ckpt):
    once(net, ckpt)
    in_evaluation_mode(net, ckpt)
    net.train()


def with_a_hook_of_its_own(net, ckpt):
    def function(y):
        net.body.seen += 1
        y = y * 1
        y.register_hook(lambda gradient: gradient)
        return net.body(y)

    net.body.seen = 0
    ckpt(function, net.stem(data()[0])).square().mean().backward()


def in_the_last_digits(net, ckpt):
    numbers = itertools.count(1)
    net.body.seen = 0
    loss = ckpt(lambda y: net.body(y * (1 + next(numbers) * 2.0**-50)), net.stem(data()[0])).square().mean()
    net.body.seen = 1
    loss.backward()


NOT_OBSERVED = [
    (lambda net, _: once(net, plainly), "no recomputation was seen"),
    (lambda net, ckpt: ckpt(net.body, net.stem(data()[0])), "no backward pass was seen"),
    (in_evaluation_mode, "evaluation mode"),
    (lambda net, _: once(net, hand_written), "ran in the backward pass, but not in a checkpoint of torch's"),
    (compiled, "nobody sees what compiled code recomputes"),
    (failing, "the step raised"),
    (given_data, "a reentrant checkpoint was given no tensor that requires gradients"),
    (hooking, "the function puts a hook on a tensor from outside"),
    (
        evaluated_in_between,
        "recomputation had moved ... again before another forward pass, which may have read it",
    ),
    (in_the_last_digits, "differs by ... That may be rounding, or the state that had changed"),
    (sparsely, "could not be compared"),
    (with_a_hook_of_its_own, "a hook or an autograd.Function of your own runs in the backward pass"),
]


@pytest.mark.parametrize(
    ("step", "said"),
    [pytest.param(*each, id=each[1], marks=[tells_of_compilation] * (each[0] is compiled)) for each in NOT_OBSERVED],
)
def test_what_could_not_be_observed_is_said_as_the_page_has_it(step, said):
    _, report, _ = beside_its_twin(norm, step, non_reentrant)
    assert report.verdict.startswith("Not observed: ")
    assert all(part in report.verdict for part in said.split("..."))
    assert not report.ok


def test_the_page_has_a_row_for_each_reason_and_no_other():
    table = rows("diagnose.md", "| the verdict says | what to do |")
    assert [says.strip(". ") for says, _ in table] == [said for _, said in NOT_OBSERVED]


def test_the_page_says_how_many_bytes_a_fingerprint_has():
    assert f"keeps {fingerprint(torch.ones(3)).nbytes} bytes" in (DOCS / "diagnose.md").read_text(encoding="utf-8")
