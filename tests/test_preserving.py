"""preserve_state and checkpoint: state and gradients are those of the run without checkpointing, whatever is state."""

import contextlib
import copy
import functools
import gc
import inspect
import threading
import weakref
from collections import OrderedDict
from fractions import Fraction
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.utils.checkpoint
from torch import nn
from torch._dynamo.utils import counters as compiler_counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module as torchs_module
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import (
    CheckpointError,
    CheckpointPolicy,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import momentum_fix
import recipes
from conformance import WRAPPERS
from momentum_fix import calibrate, diagnose, preserve_everywhere, preserve_state, update_once
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
    gradients,
    kept,
    net_of,
    picture,
    run,
    same_gradients,
)
from twins import (
    EXACT,
    batches,
    by_context,
    counters,
    drop_in,
    drop_in_reentrant,
    non_reentrant,
    plainly,
    reentrant,
    train,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated"),
]


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


def test_the_modules_among_the_arguments_are_known():
    torch.manual_seed(0)
    root = Root()
    truth = copy.deepcopy(root)

    def function(x, known, among):
        return among["it"][0].count(known.count(x))

    for each, ckpt in ((root, by_context), (truth, plainly)):
        x = torch.ones(2, 3, requires_grad=True)
        ckpt(function, x, each, {"it": [each]}).sum().backward()
    assert root.steps == truth.steps == 2
    assert same_gradients(root, truth)


def test_the_recomputation_runs_in_the_mode_of_its_forward():
    net = net_of("running normalizer")
    truth = copy.deepcopy(net)
    for each, ckpt in ((net, by_context), (truth, plainly)):
        loss = ckpt(each, torch.ones(4, 3, 4, 4).cumsum(0).requires_grad_()).sum()
        each.eval()
        loss.backward()
    assert same_gradients(net, truth)


class Noting(nn.Module):
    """Notes by which name a framework says that it runs it."""

    def __init__(self, note):
        super().__init__()
        self.note, self.name = note, "a"

    def forward(self, x):
        self.note((getattr(self, "_current_fx_name", "none"), getattr(self, "name", "none")))
        return x.sin()


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_the_name_by_which_lightning_tells_what_is_running_is_not_state(ckpt):
    noted = []
    module, x = nn.Sequential(Noting(noted.append)), torch.ones(1, requires_grad=True)
    module[0]._current_fx_name = "training_step"
    losses = [ckpt(module, x)]
    del module[0]._current_fx_name
    losses.append(ckpt(module, x))
    module[0]._current_fx_name, module[0].name = None, "b"
    sum(losses).backward()
    assert noted == [("training_step", "a"), ("none", "a"), (None, "a"), (None, "a")]
    assert (module[0]._current_fx_name, module[0].name) == (None, "b")


# What a function reaches without calling it as a module.


class Root(nn.Module):
    """Moves a number of its own, and a child's statistics, in a method that is not its forward."""

    def __init__(self):
        super().__init__()
        self.linear, self.child, self.steps = nn.Linear(3, 3), Normalizer(), 0

    def method(self, x):
        self.steps += 1
        self.child.mean += 1
        return (self.linear(x) * self.steps + self.child.mean).tanh()

    def count(self, x):
        self.steps += 1
        return (self.linear(x) * self.steps).tanh()

    def step(self, x, ckpt, how):
        ckpt(how(self), x).sum().backward()


def stepped(how, ckpt):
    """Give three equal roots after a step: with the checkpoint, without one, and with torch's."""
    torch.manual_seed(0)
    root = Root()
    roots = root, copy.deepcopy(root), copy.deepcopy(root)
    for each, by in zip(roots, (ckpt, plainly, non_reentrant), strict=True):
        each.step(torch.ones(2, 3, requires_grad=True), by, how)
    return roots


REACHED = {
    "bound method": lambda root: root.method,
    "partial of a bound method": lambda root: functools.partial(root.method),
    "lambda of a bound method": lambda root: (lambda method: lambda x: method(x))(root.method),
}


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("how", REACHED.values(), ids=REACHED)
def test_a_method_may_move_its_module_and_the_modules_below_it(how, ckpt):
    root, truth, wrong = stepped(how, ckpt)
    assert picture(root) == picture(truth)
    assert same_gradients(root, truth)
    assert not same_gradients(wrong, truth)


class Owner:
    """An object that is no module, cannot be called, and has one."""

    def __init__(self, root):
        self.root = root

    def count(self, x):
        return self.root.count(x)


class Owners(list):
    """One that has modules as a list has them."""

    def count(self, x):
        return self[0].count(x)


COUNTED = {
    "closure": lambda root: lambda x: root.count(x),
    "default": lambda root: lambda x, root=root: root.count(x),
    "function in a closure": lambda root: (lambda inner: lambda x: inner(x))(lambda x: root.count(x)),
    "argument": lambda root: functools.partial(lambda known, x: known.count(x), root),
    "keyword": lambda root: functools.partial(lambda x, known: known.count(x), known=root),
    "dictionary": lambda root: (lambda known: lambda x: known["root"].count(x))({"root": root}),
    "global": lambda root: eval("lambda x: root.count(x)", {"root": root}),
    "an object whose method it is": lambda root: Owner(root).count,
    "a list whose method it is": lambda root: Owners([root]).count,
    "a function that knows itself": lambda root: calling_itself(root),
    "a function with an empty cell": lambda root: with_an_empty_cell(root),
}


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_an_object_without_a_dictionary_may_have_the_method(ckpt):
    class Slotted:
        __slots__ = ("layer",)

        def run(self, x):
            return self.layer(x).tanh()

    owner = Slotted()
    owner.layer = nn.BatchNorm1d(3)
    ckpt(owner.run, torch.rand(2, 3, requires_grad=True)).sum().backward()
    assert owner.layer.num_batches_tracked == 1


def calling_itself(root):
    def function(x, times=1):
        return root.count(x) if times == 0 else function(x, times - 1)

    return function


def with_an_empty_cell(root):
    def function(x):
        return root.count(x) if x is not None else later(x)

    if root is None:
        later = None
    return function


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("how", COUNTED.values(), ids=COUNTED)
def test_a_function_may_move_what_the_modules_that_it_knows_have_themselves(how, ckpt):
    root, truth, wrong = stepped(how, ckpt)
    assert root.steps == truth.steps == 1
    assert same_gradients(root, truth)
    assert not same_gradients(wrong, truth)


def test_a_function_may_call_the_forward_of_what_keeps_its_state_elsewhere():
    keeper = KINDS["kept in another module"]()
    twin = copy.deepcopy(keeper)
    x, y = (torch.ones(2, 3, 2, 2).cumsum(0).requires_grad_() for _ in range(2))
    by_context(lambda x: keeper.forward(x), x).square().sum().backward()
    twin(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert picture(keeper) == picture(twin)


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


# Blocks of torch's own modules.


class Reader(nn.Module):
    """Reads the statistics of another layer by a name that its code does not have."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x).tanh() * (1 + next(self.norm.buffers()).clone())


class Iterated(nn.Sequential):
    def __iter__(self):
        return super().__iter__()


class Looked(nn.Sequential):
    @property
    def size(self):
        return len(self)


class OnlyMade(nn.Sequential):
    """A block of a library, as most are."""

    channels: int

    def __init__(self, *layers):
        super().__init__(*layers)
        self.channels = 3


def hooked(block):
    block[0].register_forward_hook(lambda *_: None)
    return block


def patched(block):
    block[0].forward = block[0].forward
    return block


BLOCKS = {
    "torch's own": (lambda: nn.Sequential(nn.BatchNorm1d(3)), False),
    "a norm alone": (lambda: nn.BatchNorm1d(3), False),
    "a class that makes a block of torch's": (lambda: OnlyMade(OnlyMade(nn.BatchNorm1d(3))), True),
    "a class of a user's": (lambda: Block(nn.BatchNorm1d(3)), True),
    "a class of a user's below": (lambda: nn.Sequential(Block(nn.BatchNorm1d(3))), True),
    "a method of a user's": (lambda: Iterated(nn.BatchNorm1d(3)), True),
    "a property of a user's": (lambda: Looked(nn.BatchNorm1d(3)), True),
    "a hook": (lambda: hooked(nn.Sequential(nn.BatchNorm1d(3))), True),
    "a hook before": (lambda: nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3)), True),
    "a parametrization": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 3))), True),
    "another forward": (lambda: patched(nn.Sequential(nn.BatchNorm1d(3))), True),
}


@pytest.mark.parametrize(("make", "copies"), BLOCKS.values(), ids=BLOCKS)
def test_buffers_are_copied_if_anything_but_torchs_own_modules_is_there_and_only_then(make, copies):
    block = make()
    held, for_good = kept(block, torch.rand(2, 3, requires_grad=True))
    assert for_good == 0
    assert held >= sum(each.nbytes for each in block.buffers()) > 0 if copies else held == 0


def steeper(block, slope):
    block[0].negative_slope = slope


def shifted(block, by):
    block[1].bias.data += by


def replaced(block, factor):
    block[1].weight = nn.Parameter(block[1].weight * factor, requires_grad=False)


def thawed(block, slope):
    block[2].train()


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("moves", [steeper, shifted, replaced, thawed])
def test_what_is_set_on_torchs_own_modules_after_a_forward_is_not_seen_in_its_recomputation(moves, ckpt):
    gradients, pictures = [], []
    for by in (plainly, ckpt, non_reentrant):
        torch.manual_seed(0)
        layers = nn.Linear(3, 3).requires_grad_(False), nn.BatchNorm1d(3, momentum=0.0).train(moves is not thawed)
        block, losses = nn.Sequential(nn.LeakyReLU(0.5), *layers, nn.Sigmoid()), []
        x = torch.arange(-6.0, 6.0).reshape(4, 3).requires_grad_()
        for value in (0.25, 0.125):  # a schedule, or a teacher
            losses.append(by(block, x).square().sum())
            moves(block, value)
        with contextlib.suppress(torch.utils.checkpoint.CheckpointError if by is non_reentrant else ()):
            sum(losses).backward()
        gradients.append(x.grad if x.grad is not None else torch.zeros(0))
        pictures.append(picture(block))
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_a_loss_may_get_other_weights_after_the_forward(ckpt):
    gradients = []
    for by in (plainly, ckpt, non_reentrant):
        loss, losses = nn.CrossEntropyLoss(weight=torch.ones(3)), []
        x = torch.arange(12.0).sin().reshape(4, 3).requires_grad_()
        for weight in (1.0, 2.0):
            loss.weight = torch.tensor([weight, 2, 3])
            losses.append(by(loss, x, torch.tensor([0, 1, 2, 0])))
        sum(losses).backward()
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_a_norm_may_lose_its_statistics_after_the_forward(ckpt):
    gradients = []
    for by in (plainly, ckpt):
        layer = nn.BatchNorm1d(3)
        x = torch.arange(12.0).sin().reshape(4, 3).requires_grad_()
        loss = by(layer, x).square().sum()
        layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        loss.backward()
        assert all(buffer is None for buffer in layer._buffers.values())
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def gradient_of_three(block, ckpt):
    """Give the gradient of three batches, all of which run forward before one backward pass."""
    x = torch.arange(12.0).sin().reshape(4, 3).requires_grad_()
    sum(ckpt(block, x).square().sum() for _ in range(3)).backward()
    return x.grad


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_a_global_hook_of_somebody_elses_may_read_buffers(ckpt):
    def reads(module, _, output):
        return output.tanh() * (1 + module.running_mean) if hasattr(module, "running_mean") else None

    hook = torchs_module.register_module_forward_hook(reads)
    try:
        true, mine, wrong = (
            gradient_of_three(nn.Sequential(nn.BatchNorm1d(3)), each) for each in (plainly, ckpt, non_reentrant)
        )
    finally:
        hook.remove()
    assert torch.equal(mine, true)
    assert not torch.equal(wrong, true)


def reading(self, x):
    return nn.BatchNorm1d.forward(self, x).tanh() * (1 + self.running_mean.clone())


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_a_class_that_gets_a_forward_of_its_own_is_no_longer_torchs(ckpt):
    class Sub(nn.BatchNorm1d):
        pass

    for forward in (None, reading, functools.partialmethod(reading), nn.BatchNorm1d.forward):
        if forward is not None:
            Sub.forward = forward
        true, mine, wrong = (gradient_of_three(Sub(3), each) for each in (plainly, ckpt, non_reentrant))
        assert torch.equal(mine, true)
        assert torch.equal(wrong, true) == (forward in (None, nn.BatchNorm1d.forward))


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


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_whoever_reads_the_statistics_of_a_norm_layer_reads_what_the_forward_read(ckpt):
    reader = Reader(nn.BatchNorm1d(3))
    truth, wrong = copy.deepcopy(reader), copy.deepcopy(reader)
    gradients = []
    for each, by in ((truth, plainly), (reader, ckpt), (wrong, non_reentrant)):
        x = torch.arange(12.0).reshape(4, 3).requires_grad_()
        by(each, x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])
    assert picture(reader) == picture(truth)


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
        found.append(elsewhere.layer.steps)
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


def _ranks(rank, folder):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
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
    dist.destroy_process_group()


def test_two_ranks_of_ddp_and_of_fsdp2_are_exact(tmp_path):
    mp.spawn(_ranks, args=(tmp_path,), nprocs=2)


# What functions name, and what modules make of themselves.


class Counts(nn.Module):
    """Has a method that moves it, and a state that its output reads."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, x):
        return x / self.steps

    def stepped(self, x):
        self.steps += 1
        return self(x)


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.child, self.last = Counts(), nn.Tanh()


class Runs:
    """An object that is called, and not a function."""

    def __init__(self, part):
        self.part = part

    def __call__(self, x):
        return self.part.stepped(x)


def moves_a_child(net):
    def function(x):
        net.child.steps += 1
        return net.child(x)

    return function


NAMING = {
    "moves a child": moves_a_child,
    "calls a child's method": lambda net: lambda x: net.child.stepped(x),
    "is an object": lambda net: Runs(net.child),
    "is in a dictionary": lambda net: functools.partial(lambda parts, x: parts["a"].stepped(x), {"a": net.child}),
}


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("named", NAMING.values(), ids=NAMING)
def test_a_function_may_move_a_child_of_what_it_knows(named, ckpt):
    def gradient(ckpt):
        net, x = Holds(), torch.ones(2, requires_grad=True)
        net.last(ckpt(lambda y: named(net)(y) * y, ckpt(named(net), x))).sum().backward()
        return net.child.steps, x.grad

    (steps, true), (counted, mine), (_, wrong) = map(gradient, (plainly, ckpt, non_reentrant))
    assert steps == counted == 2
    assert torch.equal(mine, true)
    assert not torch.equal(wrong, true)


class OwnMethod:
    """What a class of a user's adds to a container of torch's."""

    steps = 0

    def stepped(self, x):
        self.steps += 1
        return x / self.steps


class OwnList(OwnMethod, nn.ModuleList):
    pass


class OwnDict(OwnMethod, nn.ModuleDict):
    pass


class OwnSequential(OwnMethod, nn.Sequential):
    pass


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize(
    "make",
    [OwnList, OwnDict, OwnSequential, lambda: OwnList([nn.Tanh()]), lambda: OwnSequential(nn.Tanh())],
    ids=["list", "dictionary", "sequence", "list of one", "sequence of one"],
)
def test_a_child_may_be_a_container_of_a_users_own_class(make, ckpt):
    def gradient(ckpt, reach):
        net, x = nn.Module(), torch.ones(2, requires_grad=True)
        net.child = make()
        function = (lambda y: net.child.stepped(y).sin()) if reach == "by its name" else Parent(net.child)
        sum(ckpt(function, x) for _ in range(2)).sum().backward()
        return net.child.steps, x.grad

    for reach in ("by its name", "from above"):
        (steps, true), (counted, mine), (_, wrong) = (gradient(by, reach) for by in (plainly, ckpt, non_reentrant))
        assert steps == counted == 2
        assert torch.equal(mine, true)
        assert not torch.equal(wrong, true)


class Parent(nn.Module):
    def __init__(self, child):
        super().__init__()
        self.child = child

    def forward(self, x):
        return self.child.stepped(x).sin()


class BuildsItself(nn.Module):
    """Makes its parts when it meets its first batch, and notes that it has."""

    def __init__(self):
        super().__init__()
        self.built, self.first = False, nn.Linear(2, 2)

    def forward(self, x):
        if not self.built:
            self.layer, self.scale, self.built = nn.Linear(2, 2), nn.Parameter(torch.ones(2)), True
        return self.layer(self.first(x)) * self.scale


@pytest.mark.parametrize("ckpt", [by_context, drop_in])
def test_a_module_that_builds_itself_keeps_what_the_forward_has_built(ckpt):
    def trained(ckpt):
        torch.manual_seed(0)
        module = BuildsItself()
        for _ in range(2):
            ckpt(module, torch.ones(3, 2, requires_grad=True)).square().sum().backward()
        return {name: parameter.grad for name, parameter in module.named_parameters()}

    mine, true = trained(ckpt), trained(plainly)
    assert mine.keys() == true.keys()
    assert all(torch.equal(mine[name], true[name]) for name in true)


class HasAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = [nn.BatchNorm1d(6), nn.BatchNorm1d(6)]

    def forward(self, x):
        return self.norms[0](x)


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_norms_in_a_plain_list_are_preserved_and_diagnose_says_that_update_once_does_not_reach_them(ckpt):
    def counted(ckpt, prepare):
        block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), HasAList(), nn.Tanh())
        prepare(block)
        with diagnose(block) as report:
            ckpt(block, torch.rand(8, 6, requires_grad=True)).sum().backward()
        counters = [int(norm.num_batches_tracked) for norm in (block[1], block[2].norms[0])]
        return counters, {name.rpartition(".")[0]: each for name, each in report.items()}

    assert counted(ckpt, lambda block: None) == ([1, 1], {})
    with pytest.warns(UserWarning, match=r"2\.norms\[0\].*in a plain list or dict, so update_once does not reach it"):
        counters, found = counted(non_reentrant, update_once)
    assert counters == [1, 2]
    assert [*found] == ["2.norms[0]"]
    assert found["2.norms[0]"].remedy == "preserve_state"
    assert "not registered (in a plain list or dict?), so update_once does not reach it" in found["2.norms[0]"].note


# Trained parameters that the forward writes to.


def visibly(parameter, value):
    with torch.no_grad():
        parameter.copy_(value)


def by_data(parameter, value):
    parameter.data.copy_(value)


def in_a_buffer(module):
    module.register_buffer("done", torch.tensor(False))
    return lambda: not module.done and bool(module.done.fill_(True))


def in_a_buffer_unseen(module):
    module.register_buffer("done", torch.tensor(False))
    return lambda: not module.done and bool(module.done.data.fill_(True))


def in_a_frozen_parameter(module):
    module.done = nn.Parameter(torch.zeros(()), requires_grad=False)
    return lambda: not module.done and bool(module.done.fill_(1))


def in_an_array(module):
    module.done = np.zeros(1)
    return lambda: not module.done[0] and not module.done.fill(1)


def in_another_module(module):
    module.norm = nn.BatchNorm1d(1)
    return lambda: not module.norm.num_batches_tracked and bool(module.norm.num_batches_tracked.fill_(1))


def in_a_number(module):
    module.done = False
    return lambda: not module.done and not setattr(module, "done", True)


def in_a_list(module):
    module.done = [[]]
    return lambda: not module.done[0] and not module.done[0].append(1)


class TransformedOnce(nn.Module):
    """Transforms a weight before its first use, and notes that it has."""

    def __init__(self, guard, write):
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)
        self.is_due, self.write = guard(self), write

    def forward(self, x):
        if self.is_due():
            self.write(self.weight, self.weight.detach() * 0.5)
        return (self.linear(x) * self.weight).tanh()


WRITES = [visibly, by_data]
GUARDS = [
    in_a_buffer,
    in_a_buffer_unseen,
    in_a_frozen_parameter,
    in_an_array,
    in_another_module,
    in_a_number,
    in_a_list,
]


UNSEEN_GUARDS = (in_a_buffer_unseen, in_another_module)  # nothing tells of a write that autograd has not seen either


def values_and_gradients(module):
    return [(each.tolist(), None if each.grad is None else each.grad.tolist()) for each in module.parameters()]


@pytest.mark.filterwarnings("ignore:a parameter of shape")
@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("guard", GUARDS)
def test_a_recomputation_that_transforms_a_weight_again_is_refused_and_undone(guard, write, ckpt):
    def made():
        torch.manual_seed(0)
        return TransformedOnce(guard, write), torch.ones(2, 3, requires_grad=True)

    (truth, y), (plain, z), (module, x) = made(), made(), made()
    truth(y).sum().backward()
    non_reentrant(plain, z).sum().backward()
    assert values_and_gradients(plain) == values_and_gradients(truth)  # so it is preserving that has to refuse
    loss = ckpt(module, x).sum()
    if guard in UNSEEN_GUARDS:
        loss.backward()
        return  # docs/limits.md says so
    with pytest.raises(RuntimeError, match="wrote to parameters that its forward pass had written to") as error:
        loss.backward()
    assert truth.weight.tolist() == [0.5] * 3
    assert module.weight.tolist() == [0.5] * 3
    assert "They are as the forward pass left them" in str(error.value)
    assert not module.is_due()


class Clamps(nn.Module):
    """Keeps its weight in a range, in each forward, and counts."""

    def __init__(self, write):
        super().__init__()
        self.weight, self.steps, self.write = nn.Parameter(torch.arange(3.0)), 0, write

    def forward(self, x):
        self.write(self.weight, self.weight.detach().clamp(max=1))
        self.steps += 1
        return (x * self.weight / self.steps).sin()


@pytest.mark.filterwarnings("ignore:a parameter of shape")
@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_changes_nothing_the_second_time_is_not_refused(write, ckpt):
    modules = [Clamps(write) for _ in range(3)]
    for module, by in zip(modules, (plainly, ckpt, non_reentrant), strict=True):
        for _ in range(2):
            by(module, torch.ones(3, requires_grad=True)).sum().backward()
    true, mine, wrong = map(values_and_gradients, modules)
    assert mine == true
    assert wrong != true


class Decays(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(0.5)
        return x * self.weight


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_a_trained_parameter_that_the_forward_writes_to_is_warned_of(ckpt):
    module, x = nn.Sequential(nn.Linear(2, 2), Decays()), torch.ones(3, 2, requires_grad=True)
    with pytest.warns(UserWarning, match=r"a parameter of shape \(2,\) was written to.*keep such state in a buffer"):
        ckpt(module, x).sum().backward()
    assert module[1].weight.eq(0.25).all()  # as torch's checkpoint does: no state tells that it has been written to


def test_torchscript_with_buffers_is_refused_in_training_and_left_alone_otherwise():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    module, x = nn.Sequential(Counts(), scripted), torch.ones(3, 2, requires_grad=True)
    with pytest.raises(TypeError, match="TorchScript with buffers, whose state cannot be preserved"):
        drop_in(module, x)
    scripted.eval()
    drop_in_reentrant(lambda y: scripted(module[0].stepped(y)), x).sum().backward()  # torch stops no script early
    assert module[0].steps == 1


# What is changed by hand between the forward and its recomputation, and modules that are found by names.


def another_weight(block):
    block[0].weight = nn.Parameter(block[0].weight.detach() * 2)


def another_forward(block):
    block[2].forward = lambda x: x.sin().sin()


class OfAUsers(nn.Sequential):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("kind", [nn.Sequential, OfAUsers])
@pytest.mark.parametrize("change", [another_weight, another_forward])
def test_what_is_put_on_a_block_after_its_forward_is_not_recomputed(change, kind, ckpt):
    found = []
    for by in (plainly, ckpt, non_reentrant):
        torch.manual_seed(0)
        block, x = kind(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()), torch.rand(8, 3).requires_grad_()
        loss, weight = by(block, x).square().sum(), block[0].weight
        change(block)
        present = block[0].weight, vars(block[2]).get("forward")
        try:
            loss.backward()
        except CheckpointError:
            found.append(None)
            continue
        assert (block[0].weight, vars(block[2]).get("forward")) == present
        found.append((x.grad, weight.grad))
    true, mine, wrong = found
    assert all(map(torch.equal, mine, true))
    assert wrong is None or wrong[1] is None or not all(map(torch.equal, wrong, true))


class EncodesByMethods(nn.Module):
    """A layer that calls methods of its parts, and not the parts."""

    def __init__(self):
        super().__init__()
        self.linear, self.steps = nn.Linear(3, 3), Steps()

    def encode(self, x):
        return self.linear(self.quantized(self.linear(x)))

    def quantized(self, x):
        return Steps.forward(self.steps, x)


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("kind", ["a method in a lambda", "an activation"])
def test_modules_that_only_names_and_attributes_lead_to_are_preserved(kind, ckpt):
    found = []
    for by in (plainly, ckpt, non_reentrant):
        torch.manual_seed(0)
        if kind == "an activation":
            steps = Steps()
            block = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, activation=lambda x, steps=steps: steps(x).relu())
            function, x = block, torch.rand(2, 3, 4).requires_grad_()
        else:
            block = EncodesByMethods()
            steps, x = block.steps, torch.rand(2, 3).requires_grad_()

            def function(x, block=block):
                return block.encode(x)

        by(function, x).square().sum().backward()
        found.append((x.grad, picture(steps)))
    true, mine, wrong = found
    assert torch.equal(mine[0], true[0])
    assert mine[1] == true[1] != wrong[1]


# Hooks, and modules that no call leads to.


class SetsAHook(nn.Module):
    """Puts a hook on its layer in the first forward pass, as a flag says."""

    def __init__(self):
        super().__init__()
        self.layer, self.done = nn.Linear(3, 3), False

    def forward(self, x):
        if not self.done:
            self.layer.register_forward_hook(lambda module, args, output: output * 1.5)
            self.done = True
        return self.layer(x).sin()


class Keeper(nn.Module):
    steps = 1

    def scale(self, module, args, output):
        self.steps += 1
        return (output * self.steps).sin()


def hooked_by_another():
    layer, keeper = nn.Linear(3, 3), Keeper()
    layer.register_forward_hook(keeper.scale)
    return layer


class CallsMethods(nn.Module):
    """Runs methods of its blocks other than `__call__`."""

    def __init__(self, method):
        super().__init__()
        self.blocks, self.method = nn.ModuleList([Scales(), Scales()]), method

    def forward(self, x, ckpt):
        def by_forward(x):
            for block in self.blocks:
                x = block.forward(x)
            return x

        def by_name(x):
            for block in self.blocks:
                x = block.scaled(x)
            return x

        return ckpt(by_forward if self.method == "forward" else by_name, x)


class Scales(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.steps = nn.Linear(3, 3), 1

    def scaled(self, x):
        self.steps += 1
        return (self.layer(x) * self.steps).sin()

    forward = scaled


def run_by(make, ckpt):
    torch.manual_seed(0)
    model, x = make(), torch.rand(4, 3, requires_grad=True)
    for _ in range(2):
        (model(x, ckpt) if isinstance(model, CallsMethods) else ckpt(model, x)).sum().backward()
    return [each.grad for each in model.parameters()], [len(each._forward_hooks) for each in model.modules()]


OUT_OF_REACH = {
    "a hook that the forward puts on": SetsAHook,
    "a hook that is a method of another module": hooked_by_another,
    "blocks whose forward is called": lambda: CallsMethods("forward"),
    "blocks of which another method is called": lambda: CallsMethods("scaled"),
}


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("make", OUT_OF_REACH.values(), ids=OUT_OF_REACH)
def test_hooks_and_what_they_and_other_methods_move_are_preserved(make, ckpt):
    mine, true = run_by(make, ckpt), run_by(make, plainly)
    assert all(map(torch.equal, mine[0], true[0]))
    assert mine[1] == true[1]
    wrong = [not all(map(torch.equal, run_by(make, engine)[0], true[0])) for engine in (non_reentrant, reentrant)]
    assert wrong == [make is not SetsAHook] * 2


def test_of_a_large_array_the_sign_of_zero_is_preserved():
    class Signs(nn.Module):
        def __init__(self):
            super().__init__()
            self.values = np.zeros(20_000)

        def forward(self, x):
            y = (x * float(np.copysign(1.0, self.values[0]))).exp()
            self.values[0] = -self.values[0]
            return y

    for ckpt, right in ((by_context, True), (non_reentrant, False)):
        gradients = []
        for engine in (ckpt, plainly):
            model, x = Signs(), torch.ones(3, requires_grad=True)
            for _ in range(2):
                engine(model, x).sum().backward()
            gradients.append(x.grad)
        assert torch.equal(*gradients) is right


@pytest.mark.parametrize("block", [lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Tanh()), lambda: SetsAHook()])
@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_what_has_been_preserved_is_so_no_longer(block, ckpt):
    model = nn.Sequential(block(), nn.BatchNorm1d(3), nn.Tanh())
    for engine in (ckpt, non_reentrant):  # the second one relies on update_once
        ckpt(model, torch.rand(4, 3, requires_grad=True)).sum().backward()
        with update_once(model):
            engine(model, torch.rand(4, 3, requires_grad=True)).sum().backward()
    assert set(counters(model).values()) == {4}


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("put_on", ["register_forward_pre_hook", "register_forward_hook"])
def test_a_hook_on_a_layer_of_torchs_may_read_its_statistics(put_on, ckpt):
    def gradient(ckpt):
        torch.manual_seed(0)
        layer, x = nn.BatchNorm1d(3), torch.rand(4, 3, requires_grad=True)
        getattr(layer, put_on)(lambda module, given, *output: (output or given)[0] * (1 + module.running_var.clone()))
        ckpt(nn.Sequential(layer, nn.Tanh()), x).square().sum().backward()
        return layer.weight.grad

    true = gradient(plainly)
    assert torch.equal(gradient(ckpt), true)
    assert not torch.equal(gradient(non_reentrant), true)


@pytest.mark.filterwarnings("ignore:only the decay is right")
@pytest.mark.parametrize(
    ("ckpt", "passes"), [(by_context, 3), (drop_in, 3), (drop_in_reentrant, 3), (non_reentrant, 4)]
)
def test_in_compiled_code_calibrate_does_not_count_what_is_preserved(ckpt, passes):
    torch.compiler.reset()
    block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh())
    compiled = torch.compile(block, backend="aot_eager")
    with calibrate(block) as report:
        for engine in (non_reentrant, ckpt):
            engine(compiled, torch.rand(4, 3, requires_grad=True)).sum().backward()
    assert report.passes == {"1": Fraction(passes, 2)}


def registers_itself_again(layer):
    def hook(module, args, output):
        module.handle.remove()
        module.handle = module.register_forward_hook(hook)
        return output * 2

    layer.handle = layer.register_forward_hook(hook)


def removes_itself(layer):
    def hook(module, args, kwargs, output):
        handle.remove()
        return output * 2

    handle = layer.register_forward_hook(hook, with_kwargs=True)


class Own(nn.Module):
    def forward(self, x):
        return x.tanh()


@pytest.mark.parametrize("layer", [nn.Tanh, Own])
@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("put_on", [registers_itself_again, removes_itself])
def test_a_hook_that_removes_itself_is_there_in_the_recomputation_and_gone_afterwards(put_on, ckpt, layer):
    def trained(ckpt):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), layer(), nn.Linear(3, 3), nn.Tanh())
        put_on(model[1])
        for _ in range(2):
            ckpt(model, torch.rand(4, 3, requires_grad=True)).sum().backward()
        return model[0].weight.grad, len(model[1]._forward_hooks), len(model[1]._forward_hooks_with_kwargs)

    (mine, *hooks), (true, *there) = trained(ckpt), trained(plainly)
    assert torch.equal(mine, true)
    assert hooks == there
    assert put_on is registers_itself_again or not torch.equal(trained(non_reentrant)[0], true)


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_a_hook_that_comes_after_the_forward_pass_is_none_of_the_recomputation(ckpt):
    def gradient(ckpt):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh())
        loss = ckpt(model, torch.rand(4, 3, requires_grad=True)).sum()
        handle = model[1].register_forward_hook(lambda module, args, output: output * 2)
        loss.backward()
        assert len(model[1]._forward_hooks) == 1
        handle.remove()
        assert not model[1]._forward_hooks
        return model[0].weight.grad

    assert torch.equal(gradient(ckpt), gradient(plainly))
    assert not torch.equal(gradient(reentrant), gradient(plainly))
