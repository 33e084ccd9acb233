"""preserve_state and checkpoint however they are called: by wrappers, in threads, compiled, on several ranks."""

import contextlib
import functools
import inspect
import threading
from collections import OrderedDict
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch._dynamo.utils import counters as compiler_counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import momentum_fix
import recipes
from conformance import WRAPPERS
from momentum_fix import preserve_everywhere, preserve_state
from momentum_fix.state.snapshot import scratch
from states import (
    KINDS,
    READ,
    Normalizer,
    Steps,
    gradients,
    kept,
    net_of,
    picture,
    run,
    same_gradients,
)
from twins import (
    EXACT,
    TORCHS_WARNINGS,
    batches,
    by_context,
    drop_in,
    drop_in_reentrant,
    non_reentrant,
    on_two_ranks,
    plainly,
    reentrant,
    train,
)

pytestmark = TORCHS_WARNINGS


# Where else it goes.


def test_the_drop_in_has_torchs_signature_and_hands_its_keywords_on():
    ours = inspect.signature(momentum_fix.checkpoint).parameters
    assert list(ours) == ["function", "args", "kwargs"]
    with pytest.raises(ValueError, match="determinism_check"):
        drop_in(nn.Linear(1, 1), torch.rand(1, requires_grad=True), determinism_check="unheard of")
    net = net_of("step counter")
    x = batches(1, 4, 3, 4, 4)[0].requires_grad_()
    known = inspect.signature(torch.utils.checkpoint.checkpoint).parameters.keys() & {"early_stop"}  # since torch 2.9
    drop_in(net, x, debug=True, preserve_rng_state=False, **dict.fromkeys(known, False)).sum().backward()
    with torch.no_grad():
        drop_in(net, x)
    assert net.a[1].steps == 2


def test_without_gradients_the_drop_in_keeps_nothing():
    layer, x = Normalizer(), torch.ones(2, 3, 2, 2).cumsum(0).requires_grad_()
    with torch.no_grad():
        assert kept(layer, x, by=drop_in) == (0, 0)
    assert kept(layer, x, by=drop_in)[0] > 0


def test_what_people_try_first_is_answered_with_what_to_write():
    model = nn.Linear(1, 1)
    what = (
        r"but it is a context_fn.*: checkpoint\(block, x, use_reentrant=False, context_fn=preserve_state\). "
        r".*preserve_everywhere\(\)"
    )
    with pytest.raises(TypeError, match=f"preserve_state was called with Linear, {what}"):
        preserve_state(model)
    with pytest.raises(TypeError, match=f"preserve_state was called with function, {what}"):
        preserve_state(plainly)
    with pytest.raises(TypeError, match=f"preserve_state was used in a `with` statement, {what}"), preserve_state():
        pass


def test_a_context_fn_that_was_called_too_early_is_answered_in_the_same_way():
    with pytest.raises(TypeError, match=r"preserve_state was called.*, but it is a context_fn, to be given .*"):
        non_reentrant(nn.Linear(1, 1), torch.ones(1, requires_grad=True), context_fn=preserve_state())


def test_with_the_reentrant_engine_torch_refuses_a_context():
    with pytest.raises(ValueError, match=r"Passing `context_fn`.* is only supported when use_reentrant=False"):
        reentrant(nn.Linear(1, 1), torch.ones(1), context_fn=preserve_state)


HAS_DECORATOR = torch.torch_version.TorchVersion(torch.__version__) >= (2, 14)


def decorated(engine, layer):
    @engine(use_reentrant=False)
    def function(x, *, times):
        "Run the layer several times."
        for _ in range(times):
            x = layer(x)
        return x.sin()

    return lambda x: function(x, times=2)


def decorated_method(engine, layer):
    class Has(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        @engine(use_reentrant=False, preserve_rng_state=False)
        def forward(self, x):
            return self.layer(self.layer(x)).sin()

    return Has()


def decorated_module(engine, layer):
    return engine(use_reentrant=False)(nn.Sequential(layer, layer, nn.Tanh()))


def decorated_reentrantly(engine, layer):
    return engine(use_reentrant=True)(lambda x: layer(layer(x)).sin())


@pytest.mark.skipif(not HAS_DECORATOR, reason="torch's checkpoint is a decorator since torch 2.14")
@pytest.mark.parametrize("how", [decorated, decorated_method, decorated_module, decorated_reentrantly])
def test_the_drop_in_is_a_decorator_where_torchs_is(how):
    def trained(engine):
        layer, x = Steps(), torch.ones(1, requires_grad=True)
        function = how(engine, layer)
        sum(function(x) for _ in range(2)).backward()
        return layer.steps, float(x.grad)

    true, mine, wrong = map(
        trained, (lambda **_: lambda f: f, momentum_fix.checkpoint, torch.utils.checkpoint.checkpoint)
    )
    assert mine == true
    assert wrong != true


@pytest.mark.skipif(not HAS_DECORATOR, reason="torch's checkpoint is a decorator since torch 2.14")
def test_the_decorator_keeps_name_and_text_and_refuses_what_torchs_refuses():
    @momentum_fix.checkpoint(use_reentrant=False)
    def function(x):
        "Say what it does."

    assert (function.__name__, function.__doc__) == ("function", "Say what it does.")
    with pytest.raises(ValueError, match="Unexpected keyword arguments: momentum"):
        momentum_fix.checkpoint(use_reentrant=False, momentum=1)


@pytest.mark.skipif(HAS_DECORATOR, reason="torch's checkpoint needs a function before torch 2.14")
def test_the_drop_in_needs_a_function_where_torchs_does():
    for engine in (torch.utils.checkpoint.checkpoint, momentum_fix.checkpoint):
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'function'"):
            engine(use_reentrant=False)


def selective(policy):
    def decide(_, operation, *args, **kwargs):
        chosen = operation in (torch.ops.aten.tanh.default, torch.ops.aten.convolution.default)
        return policy if chosen or operation is torch.ops.aten.clone.default else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, decide)


@pytest.mark.parametrize("kind", [*READ, "BatchNorm"])
def test_the_drop_in_composes_with_selective_checkpointing(kind):
    def step(net, x, ckpt):
        chosen = {} if ckpt is plainly else {"context_fn": selective(CheckpointPolicy.MUST_SAVE)}
        ckpt(net, x.requires_grad_(), **chosen).sum().backward()

    truth, net = run(kind, step, plainly), run(kind, step, drop_in)
    assert picture(net) == picture(truth)
    assert same_gradients(net, truth)


WRAPPED = {
    "context_fn": {"checkpoint_impl": CheckpointImpl.NO_REENTRANT, "context_fn": preserve_state},
    "checkpoint_fn": {"checkpoint_impl": CheckpointImpl.NO_REENTRANT, "checkpoint_fn": drop_in},
    "checkpoint_fn, reentrant": {"checkpoint_impl": CheckpointImpl.REENTRANT, "checkpoint_fn": drop_in_reentrant},
}


@pytest.mark.filterwarnings("ignore:Please specify CheckpointImpl.NO_REENTRANT")
@pytest.mark.parametrize("how", [*WRAPPED, "nothing"])
def test_torchs_wrapper_takes_either(how):
    def wrapped(net, x, _):
        net(x.requires_grad_()).sum().backward()

    net = net_of("running normalizer")
    options = WRAPPED.get(how, {"checkpoint_impl": CheckpointImpl.NO_REENTRANT})
    wrap = functools.partial(checkpoint_wrapper, **options)
    apply_activation_checkpointing(net, checkpoint_wrapper_fn=wrap, check_fn=lambda m: isinstance(m, nn.Sequential))
    train(net, wrapped, batches(3, 4, 3, 4, 4), plainly)
    truth = run("running normalizer", recipes.one, plainly)
    assert same_gradients(net, truth) == (how != "nothing")


@pytest.mark.parametrize("reentrancy", [False, True])
def test_checkpoint_sequential_takes_no_context_but_can_be_given_the_drop_in(monkeypatch, reentrancy):
    def segments(net, x, ckpt):
        layers = [*net.a, *net.b, *net.c]
        checkpoint_sequential(layers, 3, x.requires_grad_(), use_reentrant=reentrancy).sum().backward()

    truth = run("running normalizer", recipes.one, plainly)
    assert not same_gradients(run("running normalizer", segments, plainly), truth)
    with pytest.raises(ValueError, match="Unexpected keyword arguments: context_fn"):
        checkpoint_sequential([nn.Linear(1, 1)], 1, torch.rand(1), use_reentrant=False, context_fn=preserve_state)
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", momentum_fix.checkpoint)
    assert same_gradients(run("running normalizer", segments, plainly), truth)


def test_a_loop_over_segments_does_what_checkpoint_sequential_does_and_is_exact():
    def segments(net, x, ckpt):
        x.requires_grad_()
        for segment in (net.a, net.b, net.c):
            x = ckpt(segment, x)
        x.sum().backward()

    truth = run("running normalizer", recipes.one, plainly)
    for ckpt in EXACT.values():
        assert same_gradients(run("running normalizer", segments, ckpt), truth)
    assert not same_gradients(run("running normalizer", segments, non_reentrant), truth)


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_threads_do_not_see_each_others_modules(ckpt):
    inside, outside, found = threading.Event(), threading.Event(), []
    layer, elsewhere = Steps(), SimpleNamespace(layer=Steps())

    def other_thread():
        inside.wait(10)
        elsewhere.layer(torch.rand(1))
        outside.set()

    def function(x):
        inside.set()
        assert outside.wait(10)
        found.append(vars(elsewhere)["layer"].steps)  # which is not found by its name
        return layer(x).sin()

    thread = threading.Thread(target=other_thread)
    thread.start()
    loss = ckpt(function, torch.ones(1, requires_grad=True))
    thread.join()
    loss.backward()
    assert (layer.steps, elsewhere.layer.steps) == (1, 1)
    assert found == [1, 1]


# Compiled code.


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    compiler_counters.clear()
    yield
    torch.compiler.reset()


def compiled_module(net):
    return torch.compile(net, backend="aot_eager")


def module_compiled_in_place(net):
    net.compile(backend="aot_eager")
    return net


def compiled_function(net):
    return torch.compile(lambda x: net.c(net.b(net.a(x))), backend="aot_eager")


def lambda_of_compiled_modules(net):
    first, *rest = (torch.compile(part, backend="aot_eager") for part in (net.a, net.b, net.c))
    return lambda x: rest[1](rest[0](first(x)))


def lambda_of_parts_compiled_in_place(net):
    for part in (net.a, net.b, net.c):
        part.compile(backend="aot_eager")
    return lambda x: net.c(net.b(net.a(x)))


def block_with_a_compiled_part(net):
    return nn.Sequential(net.a, torch.compile(net.b, backend="aot_eager"), net.c)


def block_with_a_part_compiled_in_place(net):
    net.b.compile(backend="aot_eager")
    return nn.Sequential(net.a, net.b, net.c)


COMPILED = [
    compiled_module,
    module_compiled_in_place,
    compiled_function,
    lambda_of_compiled_modules,
    lambda_of_parts_compiled_in_place,
    block_with_a_compiled_part,
    block_with_a_part_compiled_in_place,
]


def compiled_step(prepare):
    known = []

    def step(net, x, ckpt):
        known[:] = known or [prepare(net)]
        ckpt(known[0], x.requires_grad_()).sum().backward()
        graphs.append(compiler_counters["stats"]["unique_graphs"])

    graphs = step.graphs = []
    return step


def small(kind):
    """Give a net that is quickly compiled."""
    parts = OrderedDict(a=nn.Conv2d(3, 3, 1), b=KINDS[kind](), c=recipes.Kink())
    torch.manual_seed(0)
    parts["a"].reset_parameters()
    return nn.Sequential(parts)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks")
@pytest.mark.parametrize(
    ("kind", "prepare"),
    [
        *product(("running normalizer", "a buffer that is replaced", "BatchNorm"), COMPILED[:2]),
        *product(("a buffer that is replaced",), COMPILED[2:]),
    ],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_compiled_modules_and_functions_inside_are_exact_and_are_not_compiled_again(kind, prepare):
    def compiled(ckpt):
        torch.compiler.reset()
        compiler_counters.clear()
        step = compiled_step(prepare)
        return train(small(kind), step, batches(4, 4, 3, 4, 4), ckpt), step.graphs

    truth = train(small(kind), recipes.one, batches(4, 4, 3, 4, 4), plainly)
    torchs = {each: compiled(each) for each in (non_reentrant, reentrant)}
    for ckpt in EXACT.values():
        net, graphs = compiled(ckpt)
        wrong, graphs_of_torchs = torchs[reentrant if ckpt is drop_in_reentrant else non_reentrant]
        assert same_gradients(net, truth)
        assert same_gradients(wrong, truth) == (kind not in READ)
        assert graphs == graphs_of_torchs
        assert len(set(graphs)) == 1


class CompiledInside(nn.Module):
    """A block that has a part compiled: a method, a function that is an attribute, or one that is given the module."""

    def __init__(self, how):
        super().__init__()
        self.how, self.layer, self.norm = how, nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.compiled = [torch.compile(self.core, backend="aot_eager")] if how == "in a list" else None

    def core(self, x):
        return self.norm(self.layer(x)).tanh()

    @functools.partial(torch.compile, backend="aot_eager")
    def method(self, x):
        return self.core(x)

    def forward(self, x):
        run = {
            "a method": self.method,
            "in a list": self.compiled and self.compiled[0],
            "a helper": functools.partial(helper, self),
        }
        return run[self.how](x).square()


@functools.partial(torch.compile, backend="aot_eager")
def helper(module, x):
    return module.core(x)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("how", ["a method", "in a list", "a helper"])
def test_a_block_that_has_a_part_compiled_is_exact(how, ckpt):
    def trained(ckpt):
        torch.compiler.reset()
        torch.manual_seed(0)
        block = nn.Sequential(CompiledInside(how))
        for x in batches(3, 6, 3):
            ckpt(lambda x: block[0](x), x.requires_grad_()).sum().backward()
        return [*(each.grad for each in block.parameters()), *block.buffers()]

    true = trained(plainly)
    assert all(map(torch.equal, trained(ckpt), true))
    assert not all(map(torch.equal, trained(non_reentrant), true))


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_a_function_that_names_a_compiled_method_is_looked_at_once(ckpt):
    block, x = CompiledInside("a method"), torch.rand(6, 3, requires_grad=True)
    ckpt(lambda x: block.method(x), x).sum().backward()
    assert int(block.norm.num_batches_tracked) == 1


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("ckpt", [drop_in, drop_in_reentrant])
@pytest.mark.parametrize(
    "kind", ["running normalizer", "a buffer that is replaced", "step counter", "a NumPy array", "a value in the graph"]
)
def test_a_model_compiled_together_with_the_drop_in_is_exact(kind, ckpt):
    def prepare(net):
        return torch.compile(lambda x: ckpt(net, x) * 1, backend="aot_eager")

    truth = run(kind, recipes.one, plainly)
    net = run(kind, compiled_step(prepare), lambda function, x: function(x))
    assert picture(net) == picture(truth)
    assert same_gradients(net, truth)


@pytest.mark.parametrize("kind", ["running normalizer", "a buffer that is replaced", "BatchNorm"])
def test_a_training_step_that_is_traced_is_exact(kind):
    def traced(ckpt):
        net = net_of(kind)

        def step(x):
            return torch.autograd.grad(ckpt(net, x).sum(), [*net.parameters()])

        x = batches(1, 4, 3, 4, 4)[0].requires_grad_()
        return make_fx(step)(x)(x)

    true, mine, wrong = map(traced, (plainly, drop_in, non_reentrant))
    assert all(map(torch.equal, mine, true))
    assert all(map(torch.equal, wrong, true)) == (kind not in READ)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_model_compiled_together_with_a_context_is_refused():
    net = net_of("running normalizer")
    compiled = torch.compile(lambda x: by_context(net, x), backend="aot_eager")
    # torch 2.8 refuses before this package is asked
    with pytest.raises(Exception, match=r"use momentum_fix.checkpoint|generate a tuple of two `TorchDispatchMode`s"):
        compiled(torch.rand(4, 3, 4, 4, requires_grad=True))


# Two ranks.


def on_ranks(rank):
    for wrap in ("DDP", "FSDP2"):
        for kind in ("running normalizer", "spectral norm, parametrization", "step counter", "BatchNorm"):
            found = []
            for ckpt in (plainly, by_context, drop_in, preserve_everywhere, non_reentrant):
                net = WRAPPERS[wrap](net_of(kind))
                data = batches(3, 4, 3, 4, 4, seed=1 + rank)
                with ckpt() if ckpt is preserve_everywhere else contextlib.nullcontext():
                    by = non_reentrant if ckpt is preserve_everywhere else ckpt
                    train(net, recipes.inside_the_model, data, by)
                local = [getattr(grad, "_local_tensor", grad) for grad in gradients(net)]
                found.append((local, [buffer.clone() for buffer in net.buffers()]))
            truth, *exact, plain = found
            same = [
                all(
                    torch.equal(mine, true)
                    for each in (0, 1)
                    for mine, true in zip(one[each], truth[each], strict=True)
                )
                for one in (*exact, plain)
            ]
            assert same == [True, True, True, False], (wrap, kind, same)


def test_two_ranks_of_ddp_and_of_fsdp2_are_exact(tmp_path):
    on_two_ranks(on_ranks, tmp_path)


def on_meta():
    return torch.device("meta")


@pytest.mark.parametrize(("width", "mode"), [(1231, FakeTensorMode), (1233, torch.inference_mode), (1237, on_meta)])
def test_the_memory_that_recomputations_write_to_is_that_of_no_mode(width, mode):
    layer = nn.BatchNorm1d(width)
    with mode():
        memory = scratch(layer)["running_mean"]
    assert type(memory) is torch.Tensor
    assert memory.device == layer.running_mean.device
    assert not memory.is_inference()
    assert memory is scratch(layer)["running_var"]
    assert memory is not scratch(layer.to(torch.bfloat16))["running_mean"]
