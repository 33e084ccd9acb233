"""preserve_state and checkpoint: state and gradients are those of the run without checkpointing, whatever is state."""

import contextlib
import copy
import functools
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.modules import module as torchs_module

import recipes
from momentum_fix import preserve_everywhere
from recipes import StoppedError, pipeline, siamese, twice_in_a_region
from states import (
    KINDS,
    ONLY_WRITTEN,
    READ,
    UNHARMED,
    Block,
    Normalizer,
    Steps,
    alive_after,
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
    plainly,
    reentrant,
    train,
)

pytestmark = TORCHS_WARNINGS


def pipeline_backwards(net, x, ckpt):
    losses = [ckpt(net, micro).sum() for micro in x.requires_grad_().chunk(2)]
    for loss in reversed(losses):
        loss.backward(retain_graph=True)


def bound_method(net, x, ckpt):
    ckpt(net.forward, x.requires_grad_()).sum().backward()


def partial_function(net, x, ckpt):
    ckpt(functools.partial(lambda parts, y: parts.c(parts.b(parts.a(y))), net), x.requires_grad_()).sum().backward()


def methods_of_layers(net, x, ckpt):
    y = x.requires_grad_()
    for first, layer, last in (net.a, net.b, net.c):
        y = last(ckpt(layer.forward, first(y)))
    y.sum().backward()


def copied_in_between(net, x, ckpt):
    loss = ckpt(net, x.requires_grad_()).sum()
    with contextlib.suppress(RuntimeError):  # torch copies no tensors that are part of a graph
        copy.deepcopy(net)(x)
    loss.backward()


NO_REENTRANT = (recipes.gradient_penalty, recipes.autograd_grad)
NEED_INPUT_GRADIENT = (recipes.inside_the_model, recipes.frozen)  # with the reentrant engine
WAYS = [
    recipes.one,
    siamese,
    pipeline,
    pipeline_backwards,
    twice_in_a_region,
    recipes.inside_the_model,
    recipes.forward_only_no_grad,
    recipes.forward_only,
    recipes.two_backwards,
    recipes.backward_in_another_thread,
    recipes.gradient_penalty,
    recipes.autograd_grad,
    recipes.nested,
    recipes.nested_directly,
    recipes.never_stopping_early,
    recipes.accumulating(recipes.one),
    recipes.failing_forward,
    recipes.failing_recomputation,
    recipes.ending_in_a_norm,
    bound_method,
    partial_function,
    methods_of_layers,
    copied_in_between,
]


# Another order of a sum, which the reentrant engine has without this package too.
ROUNDED = {
    ("spectral norm, hook", siamese),
    ("spectral norm, hook", recipes.backward_in_another_thread),
    ("spectral norm, parametrization", siamese),
    ("spectral norm, parametrization", recipes.backward_in_another_thread),
    ("codebook", methods_of_layers),
}
LAZY = ("lazy normalizer", "lazy BatchNorm")  # whose forward cannot be called directly at first


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_state_and_gradients_are_those_of_the_run_without_checkpointing(kind, way):
    if kind in LAZY and way is methods_of_layers:
        pytest.skip("a lazy layer has no state before it has been called")
    truth = run(kind, way, plainly, count=2)
    true = picture(truth)
    for ckpt in EXACT.values():
        if ckpt is drop_in_reentrant and way in (*NO_REENTRANT, *NEED_INPUT_GRADIENT):
            continue
        net = run(kind, way, ckpt, count=2)
        if ckpt is drop_in_reentrant and (kind, way) in ROUNDED:
            assert same_gradients(net, truth, tolerance=1e-12)
        else:
            assert picture(net) == true
            assert same_gradients(net, truth)


@pytest.mark.parametrize("ckpt", [non_reentrant, reentrant])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_checkpointing_is_wrong_in_the_gradients_where_the_output_reads_the_state_and_else_in_the_state(
    kind, ckpt
):
    # In a region that ends in what backward needs, all is recomputed; one batch: no weight differs yet.
    net, truth = (run(kind, siamese, each, count=1) for each in (ckpt, plainly))
    assert same_gradients(net, truth, tolerance=1e-9) == (kind not in READ)
    assert kind in UNHARMED or picture(net) != picture(truth)
    assert len(READ) + len(ONLY_WRITTEN) + len(UNHARMED) == len(KINDS)


class MovesTheLast(nn.Module):
    """Moves the state of its last child before it calls it."""

    def __init__(self, *children):
        super().__init__()
        self.parts = nn.ModuleList(children)

    def forward(self, x):
        *_, last = self.parts
        last.steps += 1
        return last(x).square()


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize(
    "before", [lambda shared: shared, lambda _: torch.jit.script(nn.Tanh())], ids=["met", "scripted"]
)
def test_a_child_behind_one_that_is_passed_over_is_copied_too(ckpt, before):
    gradients, nets = [], []
    for way in (plainly, ckpt, non_reentrant):
        shared = nn.Tanh()
        net = nn.Sequential(shared, MovesTheLast(before(shared), Steps()))
        x = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
        way(net, x).sum().backward()
        gradients.append(x.grad)
        nets.append(net[1].parts[1].steps)
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])
    assert nets[0] == nets[1] != nets[2]


# What it leaves behind: nothing.


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_nothing_stays_on_the_model_and_no_hook_stays_anywhere(ckpt):
    net = net_of("running normalizer")
    before = {name: (list(vars(module)), module._buffers) for name, module in net.named_modules()}
    buffers = list(net.buffers())
    recipes.failing_forward(net, batches(1, 4, 3, 4, 4)[0], ckpt)
    recipes.failing_recomputation(net, batches(1, 4, 3, 4, 4)[0], ckpt)
    after = {name: (list(vars(module)), module._buffers) for name, module in net.named_modules()}
    assert all(after[name][0] == names and after[name][1] is held for name, (names, held) in before.items())
    assert all(mine is old for mine, old in zip(net.buffers(), buffers, strict=True))
    assert not torchs_module._global_forward_pre_hooks


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_what_is_called_after_a_checkpoint_inside_is_preserved_too(ckpt):
    def gradient(ckpt):
        owner = SimpleNamespace(first=Steps(), second=Steps())  # which nobody looks into

        def outer(x):
            return owner.second(ckpt(owner.first, x)).sin()

        x = torch.ones(1, requires_grad=True)
        sum(ckpt(outer, x) for _ in range(2)).backward()
        return owner.first.steps, owner.second.steps, float(x.grad)

    true, mine, wrong = (gradient(each) for each in (plainly, ckpt, non_reentrant))
    assert true == mine
    assert true[:2] == (2, 2)
    assert wrong != true


class Grows(nn.Module):
    """Registers something at every call."""

    def __init__(self, register, what):
        super().__init__()
        self.register, self.what = register, what

    def forward(self, x):
        grown = len([*self.children(), *self.parameters()])
        self.register(self, f"part {grown}", self.what())
        return x.tanh()


@pytest.mark.parametrize("ckpt", [by_context, drop_in])
@pytest.mark.parametrize(
    ("register", "what"),
    [
        (nn.Module.add_module, nn.Tanh),
        (nn.Module.register_parameter, lambda: nn.Parameter(torch.ones(()), requires_grad=False)),
    ],
    ids=["a child", "a parameter"],
)
def test_what_a_recomputation_registers_is_taken_off(register, what, ckpt):
    def step(net, x, ckpt):
        ckpt(net, x.requires_grad_()).sum().backward()

    for by, calls in ((plainly, 3), (ckpt, 3), (non_reentrant, 6)):
        net = train(Grows(register, what), step, batches(3, 2, 2), by)
        assert len([*net.children(), *net.parameters()]) == calls


def test_an_error_elsewhere_in_backward_leaves_the_model_as_the_forward_left_it():
    net = net_of("step counter")

    def fails(_):
        raise StoppedError

    middle = by_context(net.a, torch.rand(4, 3, 4, 4, requires_grad=True))
    middle.register_hook(fails)
    before = picture(net)
    loss = by_context(net.b, middle).sum()
    before = picture(net)
    with pytest.raises(StoppedError):
        loss.backward()
    assert picture(net) == before


def test_a_checkpoint_keeps_its_copies_only_as_long_as_its_graph_lives():
    layer, x = Normalizer(), torch.ones(2, 3, 2, 2).cumsum(0).requires_grad_()

    def step(live):
        losses = [by_context(layer, x, preserve_rng_state=False).sum() for _ in range(4)]
        losses.pop().backward()
        x.grad = None
        return [each.grad_fn for each in losses[:live]]

    held = [alive_after(lambda live=live: step(live))[1] for live in range(4)]
    state = layer.mean.nbytes + layer.var.nbytes
    assert [size - held[0] for size in held] == [0, state, 2 * state, 3 * state]


ALIVE = weakref.WeakSet()


class Tracked(list):
    """A list of which it is known how many are alive."""

    __hash__ = object.__hash__

    def __new__(cls, *_):
        made = super().__new__(cls)
        ALIVE.add(made)
        return made


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_copies_go_as_soon_as_nobody_needs_them_and_do_not_wait_for_the_garbage_collector(ckpt, everywhere):
    layer, x = Steps(), torch.ones(1, requires_grad=True)
    layer.kept = Tracked([0])
    gc.collect()
    gc.disable()
    assert len(ALIVE) == 1
    try:
        with preserve_everywhere() if everywhere else contextlib.nullcontext():
            losses = [ckpt(nn.Sequential(layer, nn.Tanh()), x) for _ in range(3)]
            assert len(ALIVE) > 3
            losses.pop().backward()
            losses.clear()
        assert len(ALIVE) == 1
    finally:
        gc.enable()


def test_values_in_graphs_do_not_keep_the_graphs_of_former_batches():
    net = net_of("a value in the graph")
    graphs = []
    for x in batches(4, 4, 3, 4, 4):
        recipes.one(net, x, by_context)
        graphs.append(weakref.ref(net.a[1].penalty))
    gc.collect()
    assert sum(graph() is not None for graph in graphs) == 1


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_evaluation_mode_is_left_alone(ckpt):
    blocks = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), Block(nn.BatchNorm1d(3), Steps(), nn.Tanh())
    for block in blocks:
        plain = reentrant if ckpt is drop_in_reentrant else non_reentrant
        x = torch.rand(2, 3, requires_grad=True)
        assert kept(block.eval(), x, by=ckpt, plain=plain) == (0, 0)
    ckpt(blocks[1], x).sum().backward()
    assert blocks[1][1].steps == 5  # three forward passes, and two more passes


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_a_part_in_training_mode_is_preserved_wherever_it_is(ckpt):
    block, x = nn.Sequential(Steps(), nn.Sequential(Steps(), nn.Tanh())).eval(), torch.ones(1, requires_grad=True)
    block[1][0].train()
    ckpt(block, x).backward()
    assert (block[0].steps, block[1][0].steps) == (2, 1)


class Distills(nn.Module):
    """Moves a teacher in evaluation mode, one of its own or one that it is given."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Linear(3, 3), Steps().eval()

    def forward(self, x, teacher=None):
        teacher = teacher or self.teacher
        teacher.steps += 1
        return (self.student(x) * teacher.steps).sin()


def in_a_closure(net, x, ckpt):
    student, teacher = net.student, net.teacher

    def function(x):
        teacher.steps += 1
        return (student(x) * teacher.steps).sin()

    return ckpt(function, x)


def by_its_name(net, x, ckpt):
    def function(x):
        net.teacher.steps += 1
        return (net.student(x) * net.teacher.steps).sin()

    return ckpt(function, x)


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize(
    "call",
    [in_a_closure, by_its_name, lambda net, x, ckpt: ckpt(net, x, Distills().teacher)],
    ids=["in a closure", "by its name", "given to a module"],
)
def test_what_trains_may_move_a_module_in_evaluation_mode(call, ckpt):
    def gradient(ckpt):
        torch.manual_seed(0)
        net, x = Distills(), torch.ones(2, 3, requires_grad=True)
        call(net, x, ckpt).sum().backward()
        return net.teacher.steps, x.grad

    (steps, true), (counted, mine), (_, wrong) = map(gradient, (plainly, ckpt, non_reentrant))
    assert steps == counted
    assert torch.equal(mine, true)
    assert not torch.equal(wrong, true)


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_a_module_in_evaluation_mode_may_put_a_part_of_it_into_training_mode_for_a_call(ckpt):
    class Adapts(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            y = self.norm.train()(x)
            self.norm.eval()
            return y.tanh()

    counted = []
    for engine in (ckpt, non_reentrant):
        net = Adapts().eval()
        engine(net, torch.rand(4, 3, requires_grad=True)).sum().backward()
        counted.append(int(net.norm.num_batches_tracked))
    assert counted == [1, 2]


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_what_a_function_moves_before_it_calls_a_module_is_as_before_in_the_recomputation(ckpt):
    def gradient(ckpt):
        root, x = Steps(), torch.ones(1, requires_grad=True)

        def function(x):
            root.steps += 5
            return root(root(x)).sin()

        sum(ckpt(function, x) for _ in range(2)).backward()
        return root.steps, float(x.grad)

    true, mine, wrong = (gradient(each) for each in (plainly, ckpt, non_reentrant))
    assert true == mine
    assert true[0] == 14
    assert wrong != true


def test_the_recomputation_runs_in_the_mode_of_its_forward():
    net = net_of("running normalizer")
    truth = copy.deepcopy(net)
    for each, ckpt in ((net, by_context), (truth, plainly)):
        loss = ckpt(each, torch.ones(4, 3, 4, 4).cumsum(0).requires_grad_()).sum()
        each.eval()
        loss.backward()
    assert same_gradients(net, truth)


def test_the_reentrant_engine_finds_the_way_back_into_a_graph_from_outside():
    layer, gradients = nn.Identity(), []
    for ckpt in (plainly, drop_in_reentrant):
        weight = torch.full((3,), 2.0, requires_grad=True)
        layer.outer = weight * 3
        ckpt(lambda x: layer(x) * layer.outer, torch.ones(3, requires_grad=True)).sum().backward()
        gradients.append(weight.grad)
    assert torch.equal(*gradients)
    assert gradients[0].eq(3).all()


def test_a_checkpoint_does_not_keep_what_its_forward_has_replaced():
    layer = KINDS["a buffer that is replaced"]()
    before = weakref.ref(layer.mean)
    loss = by_context(layer, torch.ones(2, 3, 2, 2).cumsum(0).requires_grad_()).sum()
    gc.collect()
    assert before() is None
    loss.backward()


def test_outputs_that_a_module_keeps_do_not_keep_each_other():
    class Keeps(nn.Linear):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    layer, outputs = Keeps(3, 3), []
    for _ in range(4):
        y = drop_in_reentrant(layer, torch.rand(2, 3, requires_grad=True))
        outputs.append(weakref.ref(y.grad_fn))
        y.sum().backward()
        del y
    gc.collect()
    assert [output() is not None for output in outputs] == [False, False, False, True]


def test_a_lazy_layer_may_get_its_first_batch_by_name():
    class Names(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LazyLinear(3)

        def forward(self, x):
            return self.layer(input=x).tanh()

    net = Names()
    by_context(net, torch.rand(2, 3, requires_grad=True)).sum().backward()
    assert net.layer.weight.grad is not None
