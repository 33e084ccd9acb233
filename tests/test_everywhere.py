"""preserve_everywhere: every call of torch's checkpoint preserves state, whoever makes it, until it is removed."""

import contextlib
import functools
import math
import threading
import warnings

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import recipes
from momentum_fix import calibrate, diagnose, preserve_everywhere, update_once
from recipes import StoppedError
from states import KINDS, READ, Block, Normalizer, Steps, kept, net_of, picture, run, same_gradients
from twins import (
    ROUNDING,
    batches,
    by_context,
    counters,
    drop_in,
    drop_in_reentrant,
    non_reentrant,
    plainly,
    reentrant,
    statistics,
    tells_of_compilation,
    torchs_checkpoint,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated"),
]
ENGINES = {"non-reentrant": non_reentrant, "reentrant": reentrant}
WAYS = [
    recipes.one,
    recipes.siamese,
    recipes.pipeline,
    recipes.twice_in_a_region,
    recipes.each_its_own,
    recipes.nested,
    recipes.nested_directly,
    recipes.two_backwards,
    recipes.backward_in_another_thread,
    recipes.accumulating(recipes.one),
    recipes.failing_forward,
    recipes.failing_recomputation,
    recipes.ending_in_a_norm,
]
NON_REENTRANT_WAYS = [recipes.gradient_penalty, recipes.autograd_grad, recipes.inside_the_model, recipes.frozen]
FEW = ["running normalizer", "a buffer that is replaced", "step counter", "a teacher's weights", "BatchNorm"]


def assert_exact(net, truth, rounding=0.0):
    """To the bit, unless the reentrant engine adds up in another order."""
    if not rounding:
        assert picture(net) == picture(truth)
    assert same_gradients(net, truth, rounding)


def assert_wrong(net, truth):
    assert picture(net) != picture(truth) or not same_gradients(net, truth, ROUNDING)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_state_is_preserved_and_none_without_this(kind, engine):
    truth = run(kind, recipes.siamese, plainly)
    with preserve_everywhere():
        net = run(kind, recipes.siamese, engine)
    assert_exact(net, truth, ROUNDING * (engine is reentrant and kind.startswith("spectral norm")))
    if kind != "ActNorm":
        assert_wrong(run(kind, recipes.siamese, engine), truth)


@pytest.mark.parametrize("way", [*WAYS, *NON_REENTRANT_WAYS], ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", FEW)
def test_it_is_exact_in_every_order_of_forwards_and_backwards(kind, way):
    truth = run(kind, way, plainly)
    for engine in ENGINES.values():
        if engine is non_reentrant or way in WAYS:
            with preserve_everywhere():
                assert_exact(run(kind, way, engine), truth)
    assert_wrong(run(kind, way, non_reentrant), truth)


# Whoever calls it.

OUTER = {
    **ENGINES,
    "by context_fn": by_context,
    "drop-in": drop_in,
    "drop-in, reentrant": drop_in_reentrant,
}


@pytest.mark.parametrize("inner", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("outer", OUTER.values(), ids=OUTER)
@pytest.mark.parametrize("kind", FEW)
def test_a_librarys_checkpoint_inside_of_another_is_exact(kind, outer, inner):
    def step(net, x, ckpt):
        inside, outside = (plainly, plainly) if ckpt is plainly else (inner, outer)
        outside(lambda y: net.c(inside(net.b, net.a(y))), x.requires_grad_()).sum().backward()

    truth = run(kind, step, plainly)
    with preserve_everywhere():
        assert_exact(run(kind, step, inner), truth)
    assert_wrong(run(kind, step, inner), truth)


def test_a_batch_norm_in_a_librarys_checkpoint_within_ours_moves_once():
    class Library(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()) for _ in range(2))

        def forward(self, x):
            for block in self.blocks:
                x = non_reentrant(block, x)
            return x

    for on, times in ((True, 1), (False, 2)):
        model = Library()
        with preserve_everywhere() if on else contextlib.nullcontext():
            drop_in(model, torch.rand(8, 6, requires_grad=True)).sum().backward()
        assert set(counters(model).values()) == {times}


def sequential(engine):
    def step(net, x, _):
        parts = [*net.a, *net.b, *net.c]
        checkpoint_sequential(parts, 3, x.requires_grad_(), use_reentrant=engine is reentrant).sum().backward()

    return step


def wrapped(engine, **options):
    which = CheckpointImpl.REENTRANT if engine is reentrant else CheckpointImpl.NO_REENTRANT

    def step(net, x, _):
        if not hasattr(net.a[1], "_checkpoint_wrapped_module"):
            wrap = functools.partial(checkpoint_wrapper, checkpoint_impl=which, **options)
            apply_activation_checkpointing(net, wrap, lambda module: type(module) in kinds)
        net(x.requires_grad_()).sum().backward()

    kinds = (nn.Sequential, type(KINDS["running normalizer"]()), type(KINDS["step counter"]()), nn.BatchNorm2d)
    return step


def by_its_full_name(engine):
    def step(net, x, _):
        y = torch.utils.checkpoint.checkpoint(net, x.requires_grad_(), use_reentrant=engine is reentrant)
        y.sum().backward()

    return step


def as_a_partial(engine):
    ckpt = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=engine is reentrant)
    return lambda net, x, _: ckpt(net, x.requires_grad_()).sum().backward()


CALLERS = {
    "checkpoint_sequential": sequential,
    "torch's wrapper, one within another": wrapped,
    "torch's wrapper with a function of its own": lambda engine: wrapped(
        engine, checkpoint_fn=functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=engine is reentrant)
    ),
    "by its full name": by_its_full_name,
    "a partial made before": as_a_partial,
}


class ReadsTheNew(nn.Module):
    """Reads the statistics that its layer has just updated."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        y = self.norm(self.linear(x))
        return (y * self.norm.running_var.clone()).tanh()


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("prepare", [lambda model: contextlib.nullcontext(), update_once, calibrate])
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_a_parent_that_reads_what_a_layer_has_updated_is_exact(compiled, prepare, engine):
    found = []
    for ckpt, preserving in ((plainly, False), (engine, True), (engine, False)):
        torch.manual_seed(0)
        model, x = ReadsTheNew(), torch.rand(8, 3).requires_grad_()
        with contextlib.ExitStack() as on:
            if preserving:
                on.enter_context(prepare(model))
                on.enter_context(preserve_everywhere())
            if compiled:
                model.compile(backend="aot_eager")
            ckpt(model, x).square().sum().backward()
        found.append((x.grad, model.linear.weight.grad, model.norm.running_var.clone()))
    true, mine, wrong = found
    assert all(torch.allclose(one, other, rtol=1e-12, atol=0) for one, other in zip(mine, true, strict=True))
    assert not torch.allclose(wrong[1], true[1])


@pytest.mark.filterwarnings("ignore:Please specify CheckpointImpl.NO_REENTRANT")
@pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("kind", ["running normalizer", "step counter", "BatchNorm"])
def test_it_does_not_matter_how_the_checkpoint_was_imported(kind, engine, caller):
    step = caller(engine)
    truth = run(kind, recipes.one, plainly)
    with preserve_everywhere():
        net = run(kind, step, plainly)
    wrong = run(kind, step, plainly)
    assert [p.tolist() for p in net.parameters()] == [p.tolist() for p in truth.parameters()]
    assert [b.tolist() for b in net.buffers()] == [b.tolist() for b in truth.buffers()]
    assert same_gradients(net, truth)
    assert [b.tolist() for b in wrong.buffers()] != [b.tolist() for b in truth.buffers()] or not same_gradients(
        wrong, truth
    )


# Together with others.


def selective(policy):
    def decide(_, operation, *args, **kwargs):
        chosen = operation in (torch.ops.aten.tanh.default, torch.ops.aten.convolution.default)
        return policy if chosen else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, decide)


@pytest.mark.parametrize("kind", [*READ, "BatchNorm"])
def test_it_composes_with_selective_checkpointing(kind):
    def step(net, x, ckpt):
        chosen = {} if ckpt is plainly else {"context_fn": selective(CheckpointPolicy.MUST_SAVE)}
        ckpt(net, x.requires_grad_(), **chosen).sum().backward()

    truth = run(kind, step, plainly)
    with preserve_everywhere():
        assert_exact(run(kind, step, non_reentrant), truth)
    assert_wrong(run(kind, recipes.one, non_reentrant), truth)


@pytest.mark.parametrize("kind", FEW)
def test_contexts_of_the_callers_own_are_entered_as_without_this(kind):
    entered = []

    @contextlib.contextmanager
    def noting(what):
        entered.append(what)
        yield
        entered.append(f"end of {what}")

    def contexts():
        return noting("forward"), noting("recomputation")

    def step(net, x, ckpt):
        ckpt(net, x.requires_grad_(), context_fn=contexts).sum().backward()

    run(kind, step, non_reentrant, count=1)
    torchs = entered.copy()
    entered.clear()
    with preserve_everywhere():
        net = run(kind, step, non_reentrant, count=1)
    assert entered == torchs
    assert "recomputation" in entered
    assert_exact(net, run(kind, recipes.one, plainly, count=1))


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("ckpt", [by_context, drop_in, drop_in_reentrant])
def test_what_preserves_state_anyway_stays_exact(ckpt, kind):
    truth = run(kind, recipes.nested, plainly)
    with preserve_everywhere():
        assert_exact(run(kind, recipes.nested, ckpt), truth)


@pytest.mark.parametrize("options", [{}, {"debug": True}, {"determinism_check": "none"}, {"early_stop": False}])
def test_the_options_of_torchs_checkpoint_do_what_they_do(options):
    def ran(on, changes):
        calls, layer, x = [], Steps(), torch.ones(2, requires_grad=True)

        def function(x):
            calls.append("begun")
            y = (layer(x) * torch.ones(2 if changes and len(calls) > 2 else 1)).sin()
            calls.append("ended")
            return y + 1

        with preserve_everywhere() if on else contextlib.nullcontext():
            loss = non_reentrant(function, x, **options).sum()
            try:
                loss.backward()
            except RuntimeError as error:
                return calls, type(error), str(error).splitlines()[0]
        return calls, layer.steps if on else 1, x.grad.tolist() if on else [math.cos(1)] * 2

    assert ran(True, False) == ran(False, False)
    assert ran(True, True) == ran(False, True)
    assert ran(True, False)[0] == ["begun", "ended", "begun", "ended"][: 3 if options.get("early_stop", True) else 4]
    refused = ran(True, True)[1] is torch.utils.checkpoint.CheckpointError
    assert refused == (options != {"determinism_check": "none"})


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("recomputes", [True, False])
def test_random_numbers_are_those_of_the_forward_pass_as_without_this(engine, recomputes):
    def gradient(ckpt):
        torch.manual_seed(0)
        x = torch.ones(100, requires_grad=True)
        ckpt(nn.Sequential(nn.Dropout(), Steps(), nn.Tanh()), x).sum().backward()
        return x.grad

    options = {} if recomputes else {"preserve_rng_state": False}
    with preserve_everywhere():
        mine = gradient(functools.partial(engine, **options))
    assert torch.equal(mine, gradient(plainly)) == recomputes


def test_a_model_in_evaluation_mode_and_one_without_gradients_are_left_alone():
    net, x = net_of("step counter"), batches(1, 4, 3, 4, 4)[0].requires_grad_()
    with preserve_everywhere():
        assert kept(Block(nn.BatchNorm2d(3)).eval(), x, by=non_reentrant, plain=plainly)[1] == 0
        non_reentrant(net.eval(), x).sum().backward()
        assert net.c[1].steps == 2
        net.train()
        with torch.no_grad():
            non_reentrant(net, x)
    assert net.c[1].steps == 3


class Batches(nn.Module):
    def __init__(self, norm=nn.BatchNorm1d):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 4), norm(4), nn.Tanh())
        self.outer, self.inner = (nn.Sequential(nn.Linear(4, 4), norm(4), nn.Tanh()) for _ in range(2))

    def forward(self, x, ckpt):
        return ckpt(lambda y: ckpt(self.inner, self.outer(y)).tanh(), self.stem(x))


def trained(prepare, engine):
    torch.manual_seed(0)
    model = Batches()
    with contextlib.ExitStack() as stack:
        model.reports = {each: stack.enter_context(each(model)) for each in prepare}
        model(batches(1, 8, 4)[0], engine).sum().backward()
    return model


def everywhere(_):
    return preserve_everywhere()


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize(
    "prepare",
    [
        (everywhere,),
        (everywhere, update_once),
        (update_once, everywhere),
        (everywhere, calibrate),
        (calibrate, everywhere),
    ],
    ids=["alone", "update_once inside", "update_once outside", "calibrate inside", "calibrate outside"],
)
def test_statistics_are_exact_together_with_update_once_and_calibrate(prepare, engine):
    truth, model = trained((), plainly), trained(prepare, engine)
    assert all(torch.equal(each, statistics(truth)[name]) for name, each in statistics(model).items())
    assert counters(model) == counters(truth) == dict.fromkeys(counters(truth), 1)
    if calibrate in prepare:
        assert model.reports[calibrate].passes == {"stem.1": 1, "outer.1": 1, "inner.1": 1}
    assert counters(trained((), engine)) != counters(truth)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_buffers_that_functional_call_is_given_are_no_state_of_a_module_and_move_once_with_update_once(engine):
    def counted(*prepare):
        model, x = nn.Module(), torch.rand(8, 3, requires_grad=True)
        model.norm = nn.BatchNorm1d(3)
        given = {name: buffer.clone() for name, buffer in model.norm.named_buffers()}
        with contextlib.ExitStack() as stack:
            for each in prepare:
                stack.enter_context(each(model))
            engine(lambda y: torch.func.functional_call(model.norm, given, y).tanh(), x).sum().backward()
        return int(given["num_batches_tracked"]), int(model.norm.num_batches_tracked)

    assert counted() == counted(everywhere) == (2, 0)
    assert counted(update_once) == counted(everywhere, update_once) == counted(update_once, everywhere) == (1, 0)


class Replacing(nn.BatchNorm1d):
    """Reads its statistics, and assigns new ones."""

    def forward(self, x):
        self.running_mean = self.running_mean + x.mean(0).detach()
        return (x * self.running_mean).sin()


@pytest.mark.filterwarnings("ignore:.*the class has a forward of its own")
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_a_layer_may_replace_its_buffers_though_update_once_is_on_it(engine):
    gradients = []
    for ckpt, prepare in ((plainly, []), (engine, [everywhere, update_once]), (engine, [update_once])):
        model, x = nn.Sequential(Replacing(3)), torch.ones(2, 3, requires_grad=True)
        with contextlib.ExitStack() as stack:
            for each in prepare:
                stack.enter_context(each(model))
            ckpt(lambda y, model=model: model(model(model(y))), x).sum().backward()
        gradients.append(x.grad)
    true, mine, wrong = gradients
    assert torch.equal(mine, true)
    assert not torch.equal(wrong, true)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("kind", ["running normalizer", "step counter", "BatchNorm"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["diagnose inside", "diagnose outside"])
def test_diagnose_finds_nothing_to_fix(order, kind, engine):
    for on in (preserve_everywhere, contextlib.nullcontext):
        net = net_of(kind)
        tools = on, lambda net=net: diagnose(net)
        with tools[order[0]]() as first, tools[order[1]]() as second:
            recipes.siamese(net, *batches(1, 4, 3, 4, 4), engine)
        report = (first, second)[order.index(1)]
        assert report.ok == (on is preserve_everywhere)
        assert report.gradients_right == (report.ok or kind == "BatchNorm")


# On and off.


def is_on():
    """Tell whether checkpoints preserve state now."""
    layer = Steps()
    for engine in ENGINES.values():
        engine(nn.Sequential(layer, nn.Tanh()), torch.ones(1, requires_grad=True)).backward()
    assert layer.steps in (2, 4)
    return layer.steps == 2


def test_torch_is_as_it_was_when_all_are_removed():
    before = torchs_checkpoint()
    assert not is_on()
    with preserve_everywhere() as handle:
        assert is_on()
        assert torchs_checkpoint() != before
        assert repr(handle) == "<preserve_everywhere, on>"
    assert repr(handle) == "<preserve_everywhere, removed>"
    assert torchs_checkpoint() == before
    assert not is_on()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_it_may_be_put_on_twice_and_removed_in_either_order(order):
    before = torchs_checkpoint()
    handles = preserve_everywhere(), preserve_everywhere()
    first, second = (handles[each] for each in order)
    assert is_on()
    first.remove()
    assert is_on()
    first.remove()  # which does nothing
    assert is_on()
    second.remove()
    assert torchs_checkpoint() == before
    assert not is_on()


def test_twice_costs_what_once_costs():
    layer, x = Normalizer(), batches(1, 4, 3, 4, 4)[0].requires_grad_()

    def held(*handles):
        with contextlib.ExitStack() as stack:
            for each in handles:
                stack.enter_context(each())
            return kept(layer, x, by=drop_in, plain=non_reentrant)

    state = layer.mean.nbytes + layer.var.nbytes
    assert held() == (state, 0)
    assert held(preserve_everywhere) == (0, 0)  # torch's keeps as much then
    assert held(preserve_everywhere, preserve_everywhere) == (0, 0)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_what_has_begun_is_preserved_to_its_end_and_what_had_begun_before_is_not(engine):
    def gradient(begin, end):
        layer, x = Steps(), torch.ones(1, requires_grad=True)
        with begin():
            loss = sum(engine(nn.Sequential(layer, nn.Tanh()), x) for _ in range(2))
        with end():
            loss.backward()
        return layer.steps, float(x.grad)

    exact, nothing = gradient(preserve_everywhere, preserve_everywhere), contextlib.nullcontext
    assert gradient(preserve_everywhere, nothing) == exact
    assert gradient(nothing, preserve_everywhere) == gradient(nothing, nothing) != exact


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("fails_in", ["forward", "recomputation", "backward"])
def test_an_exception_leaves_the_model_as_the_forward_left_it_and_torch_as_it_was(fails_in, engine):
    before, runs = torchs_checkpoint(), []
    net = net_of("step counter")

    def function(x):
        runs.append(fails_in)
        y = net.a(x)
        if runs == ["forward"] or runs == ["recomputation"] * 2:
            raise StoppedError
        return net.b(y)

    def fails(_):
        raise StoppedError

    def step():
        with preserve_everywhere():
            y = engine(net.c, engine(function, batches(1, 4, 3, 4, 4)[0].requires_grad_()))
            if fails_in == "backward":
                y.grad_fn.register_prehook(fails)
            y.sum().backward()

    with pytest.raises(StoppedError):
        step()
    assert torchs_checkpoint() == before
    assert [part[1].steps for part in (net.a, net.b, net.c)] == ([1, 0, 0] if fails_in == "forward" else [1, 1, 1])
    assert not is_on()


def test_every_thread_is_seen_and_any_thread_may_remove_it():
    layers, handle = [Steps() for _ in range(4)], preserve_everywhere()
    barrier, failed = threading.Barrier(len(layers)), []

    def work(layer):
        try:
            losses = []
            for _ in range(3):
                barrier.wait(10)
                losses.append(non_reentrant(nn.Sequential(layer, nn.Tanh()), torch.ones(1, requires_grad=True)))
            barrier.wait(10)
            sum(losses).backward()
            barrier.wait(10)
            handle.remove()
        except Exception as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=work, args=(layer,)) for layer in layers]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failed
    assert [layer.steps for layer in layers] == [3] * len(layers)
    assert not is_on()


# Compiled code.


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@tells_of_compilation
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("kind", ["BatchNorm", "running normalizer"])
def test_in_a_model_compiled_with_its_checkpoint_nothing_is_preserved_and_a_warning_says_so(kind):
    def stepped(on):
        torch.compiler.reset()
        net = recipes.block(lambda _: KINDS[kind]())
        torch.manual_seed(0)
        net[0].reset_parameters()
        step = torch.compile(lambda x: non_reentrant(net, x), backend="aot_eager")
        x = batches(1, 4, 3, 4, 4)[0].requires_grad_()
        with preserve_everywhere() if on else contextlib.nullcontext():
            step(x).sum().backward()
        return net

    with pytest.warns(
        UserWarning, match=r"compiled together with its model.*does nothing.*momentum_fix.checkpoint instead"
    ):
        net = stepped(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = stepped(False)
    assert_exact(net, plain)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks")
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_a_compiled_block_inside_is_exact(engine):
    def step(net, x, ckpt):
        net.a.compile(backend="aot_eager")
        ckpt(net, x.requires_grad_()).sum().backward()

    truth = run("running normalizer", recipes.one, plainly, count=2)
    with preserve_everywhere():
        assert_exact(run("running normalizer", step, engine, count=2), truth)
