"""What is not seen, or not seen in full, is not called right; and what is harmless beside it still is."""

import logging
import threading
import warnings
from itertools import count, repeat
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction, checkpoint
from torch.utils.flop_counter import FlopCounterMode

import momentum_fix
from momentum_fix import diagnose, update_once
from momentum_fix.state.fingerprint import difference, fingerprint, rounding
from scenes import WIDTH, LastDigits, Net, Scene, data, linearly, once, run, same_gradients
from twins import non_reentrant, plainly, reentrant

BOTH = (non_reentrant, reentrant)
OUTSIDE = SimpleNamespace(tensors=[], other=None)  # what is on no module


class Numbered(nn.Module):
    """Gives a function a number: the next one in each call, or always the same."""

    def __init__(self, function, moves):
        super().__init__()
        self.layer, self.function = nn.Linear(WIDTH, WIDTH), function
        self.__dict__["numbers"] = count(1) if moves else repeat(1)  # of a class that nobody looks into

    def forward(self, x):
        return self.function(self, self.layer(x.sin()), next(self.numbers))


# Hooks.


def alone(net, ckpt):
    net.body[2:](ckpt(net.body[1], net.body[0](net.stem(data()[0])))).square().mean().backward()


class HooksItsInput(nn.Module):
    def __init__(self, moves):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.moves = moves

    def forward(self, x):
        x = x if self.moves else x * 1  # a new tensor, which the recomputation has another one of
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * 0.1)
        return self.layer(x)


class HooksItsWeight(HooksItsInput):
    def forward(self, x):
        if self.moves:
            self.layer.weight.register_hook(lambda gradient: gradient * 0.1)
        return self.layer(x)


def shrink(weight):
    weight.grad *= 0.1


class HooksItsGradient(HooksItsInput):
    def forward(self, x):
        if self.moves:
            self.layer.weight.register_post_accumulate_grad_hook(shrink)
        return self.layer(x)


class HooksBackward(HooksItsInput):
    def forward(self, x):
        if self.moves:
            self.layer.register_full_backward_hook(lambda _, given, __: (given[0] * 0.1,))
        return self.layer(x)


def reversing(net, x, n):
    if x.requires_grad:
        x.register_hook(lambda gradient: -n * gradient)
    return x


# The reentrant engine.


def inside(net, x, n):
    return reentrant(lambda y: (y + n).tanh(), x)


def after_one_inside(net, x, n):
    return (reentrant(torch.sin, x) + n).tanh()


def inside_the_other_engines(net, x, n):
    return non_reentrant(lambda y: (y + n).tanh(), x)


def sliced(net, x, n):
    place = torch.tensor(n)
    return x + net.layer.weight[:, place : place + 1].T


def chosen(net, x, n):
    return x + OUTSIDE.tensors[n % 2]


def scripted(net, x, n):
    return SCALED(x, float(n))


@torch.jit.script
def SCALED(x: torch.Tensor, by: float) -> torch.Tensor:  # noqa: N802
    return torch.tanh(x) * by


@torch.library.custom_op("momentum_fix_tests::scaled", mutates_args=())
def operator(x: torch.Tensor, by: float) -> torch.Tensor:
    return x * by


operator.register_autograd(
    lambda ctx, gradient: (gradient * ctx.by, None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "by", OUTSIDE.by),
)


def operated(net, x, n):
    OUTSIDE.by = float(n)
    return operator(x, 1.0)


class WithACompiledPart(Numbered):
    """Adds something that is zero at first, as a low-rank adapter."""

    def __init__(self, moves):
        super().__init__(lambda net, x, n: net.tanh(x) + x * n @ net.zero, moves)
        self.tanh, self.zero = nn.Tanh(), nn.Parameter(torch.zeros(WIDTH, WIDTH))
        self.tanh.compile(backend="eager")


def with_outside(net, ckpt):
    OUTSIDE.tensors = [(net.stem.weight[:, :1] * factor).T for factor in (1, 2)]
    linearly(net, ckpt)


class KeepsTheWhole(HooksItsInput):
    """Returns a part of what it keeps for the loss."""

    def forward(self, x):
        both = torch.stack([self.layer(x), x], 1).tanh()
        if self.moves:
            self.kept = both
        return both[:, 0]


class WritesThroughAView(HooksItsInput):
    """Writes to a part of a tensor from outside, which the loss has."""

    def forward(self, x):
        y = self.layer(x).tanh()
        self.kept[:, 0].copy_(y if self.moves else y.detach())
        return y.sin()


def with_what_it_keeps(net, ckpt):
    block = net.body[1]
    if isinstance(block, WritesThroughAView):
        block.kept = torch.zeros(6, 2, WIDTH)
    y = ckpt(block, net.body[0](net.stem(data()[0])))
    (net.body[2:](y).square().mean() + getattr(block, "kept", torch.zeros(())).square().mean()).backward()


class AddsFromOutside(HooksItsInput):
    def forward(self, x):
        return self.layer(x + OUTSIDE.other).tanh()


def in_parts(net, ckpt):
    OUTSIDE.other = net.stem.weight[:, 0] + 1  # which saves nothing, so that backward may come twice
    if net.body[1].moves:
        OUTSIDE.other.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    y = net.stem(data()[0])
    for _ in range(2):
        y = ckpt(net.body[1], y)
    net.body[2:](y).square().mean().backward()


def masked(net, x, n):
    return x + (net.layer.weight * OUTSIDE.tensors[n % 2]).sum(0)


def with_masks(net, ckpt):
    mask = torch.arange(float(WIDTH))
    OUTSIDE.tensors = [mask.view(1, -1), mask.view(-1, 1)]
    linearly(net, ckpt)


def with_expanded_masks(net, ckpt):
    mask = torch.arange(float(WIDTH))
    OUTSIDE.tensors = [mask.view(each).expand(WIDTH, WIDTH) for each in ((1, -1), (-1, 1))]
    linearly(net, ckpt)


def of(function):
    return lambda moves: Numbered(function, moves)


KINDS = {  # with the step, and what is said of each engine if the number moves, and if it does not
    "a hook on the input": (HooksItsInput, alone, {non_reentrant: (None, True), reentrant: (None, None)}),
    "a hook on a weight": (HooksItsWeight, once, dict.fromkeys(BOTH, (None, True))),
    "a hook on a gradient": (HooksItsGradient, once, dict.fromkeys(BOTH, (None, True))),
    "a backward hook": (HooksBackward, once, {reentrant: (None, True)}),
    "a hook on a result": (of(reversing), once, {reentrant: (None, None)}),
    "a checkpoint inside": (of(inside), linearly, {reentrant: (None, True)}),
    "after a checkpoint inside": (of(after_one_inside), linearly, {reentrant: (False, True)}),
    "a checkpoint of the other engine's inside": (of(inside_the_other_engines), linearly, {reentrant: (False, True)}),
    "a slice by tensors": (of(sliced), linearly, {reentrant: (False, True)}),
    "a tensor from outside": (of(chosen), with_outside, {reentrant: (None, True)}),
    "TorchScript": (of(scripted), linearly, {reentrant: (None, None)}),
    "an operator of a user's": (of(operated), linearly, {reentrant: (None, None)}),
    "a compiled part": (WithACompiledPart, once, {reentrant: (None, None)}),
    "the whole of what is returned is kept": (KeepsTheWhole, with_what_it_keeps, {reentrant: (None, True)}),
    "a write through a view": (WritesThroughAView, with_what_it_keeps, {reentrant: (None, True)}),
    "a hook on a tensor from outside": (AddsFromOutside, in_parts, {reentrant: (None, True)}),
    "a mask of another shape": (of(masked), with_masks, {reentrant: (False, True)}),
    "a mask that is expanded in another way": (of(masked), with_expanded_masks, dict.fromkeys(BOTH, (False, True))),
}


def stepped(make, step, ckpt, moves, watched=False):
    return run(Scene(lambda: make(moves), gradients=not moves, step=step), ckpt, watched)


@pytest.mark.parametrize(("name", "ckpt"), [(name, ckpt) for name, kind in KINDS.items() for ckpt in kind[2]])
def test_what_cannot_be_compared_is_not_called_right(name, ckpt):
    make, step, said = KINDS[name]
    for moves, right in zip((True, False), said[ckpt], strict=True):
        truth, plain = (stepped(make, step, each, moves)[0] for each in (plainly, ckpt))
        watched, report = stepped(make, step, ckpt, moves, watched=True)
        assert same_gradients(plain, truth) is not moves
        assert same_gradients(watched, plain)
        assert report.gradients_right is right
        assert report.ok is (right is True)


def test_a_hook_that_runs_twice_is_said_to():
    _, report = stepped(HooksItsInput, alone, non_reentrant, True, watched=True)
    assert "puts a hook on a tensor from outside (in the checkpoint of body.1), and each recomputation" in str(report)


def test_torchscript_in_a_reentrant_checkpoint_that_gets_no_gradient_is_not_called_right():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x):
            return SCALED(self.weight, 2.0) + x

    net = nn.Sequential(First(), nn.Linear(WIDTH, WIDTH))
    with diagnose(net) as report:
        reentrant(net[1], reentrant(net[0], torch.ones(2, WIDTH)) + net[1].bias).sum().backward()
    assert net[0].weight.grad is None
    assert report.gradients_right is None
    assert "a reentrant checkpoint was given no tensor that requires gradients (0)" in report.verdict


def test_a_weight_that_a_function_knows_gets_no_gradient_either_if_no_input_requires_one():
    model = nn.Linear(3, 3)
    with diagnose(model) as report:
        first = reentrant(lambda x: x @ model.weight, torch.rand(2, 3))
        reentrant(torch.tanh, model(torch.rand(2, 3)) + first).sum().backward()
    assert report.gradients_right is None


@pytest.mark.parametrize("ckpt", BOTH)
def test_norms_without_statistics_are_right(ckpt):
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.InstanceNorm1d(3, affine=True), nn.Tanh())
    with diagnose(model) as report:
        ckpt(model, torch.rand(2, 3, 5, requires_grad=True)).sum().backward()
    assert report.ok


def test_random_numbers_inside_a_function_of_torchs_are_not_called_right_where_they_are_not_kept():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
            nn.init.zeros_(self.attention.out_proj.weight)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0] + x

    for keeps, right in ((True, True), (False, None)):
        with diagnose(net := Attends()) as report:
            x = torch.rand(2, 3, 4).requires_grad_()
            checkpoint(net, x, use_reentrant=True, preserve_rng_state=keeps).sum().backward()
        assert report.gradients_right is right


# Both engines.


@pytest.mark.parametrize("ckpt", BOTH)
def test_a_backward_pass_inside_may_be_anybodys(ckpt):
    def step(net, ckpt):
        def function(x):
            with torch.enable_grad():
                net.stem(data()[0]).sum().backward()
            return net.body(x)

        ckpt(function, torch.ones(2, WIDTH, requires_grad=True)).sum().backward()

    truth, plain = (stepped(lambda _: nn.Tanh(), step, each, True)[0] for each in (plainly, ckpt))
    _, report = stepped(lambda _: nn.Tanh(), step, ckpt, True, watched=True)
    assert not same_gradients(plain, truth)
    assert report.gradients_right is False
    assert report.differences[0].remedy.startswith("a backward pass outside of the checkpoint")


@pytest.mark.parametrize("moves", [True, False])
def test_the_weight_of_an_instance_norm_is_not_taken_for_its_variance(moves):
    class Weighs(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
            self.weights = iter([1.0, 2.0 if moves else 1.0])

        def forward(self, x):
            norm = self.norm
            weight = norm.weight * next(self.weights)
            return functional.instance_norm(x, norm.running_mean, norm.running_var, weight, norm.bias)

    x = torch.rand(2, 3, 5, requires_grad=True)
    with diagnose(model := Weighs()) as report:
        non_reentrant(model, x).square().sum().backward()
    assert report.gradients_right is not moves


def test_in_float32_a_difference_beside_coordinates_is_none_of_rounding():
    class Joins(Numbered):
        def forward(self, x):
            scaled = x.float() * (1 + next(self.numbers) / 100)
            return torch.cat([scaled, torch.full((len(x), WIDTH), 1024.0)], 1).tanh().double() @ OUTSIDE.mixing

    OUTSIDE.mixing = torch.ones(2 * WIDTH, WIDTH, dtype=torch.float64)
    for moves in (True, False):
        net = Net(Joins(None, moves)).double()
        with diagnose(net) as report:
            non_reentrant(net.body, net.stem(data()[0].double())).sum().backward()
        assert report.gradients_right is not moves


class Floors(nn.Module):
    """Takes logarithms of values that are large or zero, above a floor that becomes smaller."""

    def __init__(self, moves):
        super().__init__()
        self.weight, self.moves = nn.Parameter(torch.ones(WIDTH)), moves
        self.register_buffer("floor", torch.tensor(1e-6))

    def forward(self, x):
        self.floor.mul_(0.5 if self.moves else 1)
        return ((x * self.weight).square() + self.floor).log()


@pytest.mark.parametrize("ckpt", BOTH)
def test_a_difference_of_the_size_of_rounding_is_not_taken_for_it_where_state_has_changed(ckpt):
    x = torch.tensor([[30.0, 0.0, 30.0, 0.0, 30.0]]) + 1e-4
    for moves in (True, False):
        gradients = []
        for engine in (plainly, ckpt):
            block = Floors(moves).float()
            with diagnose(block) as report:
                engine(block, x.float().requires_grad_()).sum().backward()
            gradients.append(block.weight.grad)
        assert torch.allclose(*gradients, rtol=1e-3) is not moves
        assert report.gradients_right is (None if moves else True)
        assert ("That may be rounding, or the state that had changed since" in str(report)) is moves


@pytest.mark.parametrize("ckpt", BOTH)
def test_statistics_that_move_do_not_make_rounding_suspicious(ckpt):
    block = nn.Sequential(nn.Linear(3, 3), LastDigits(), nn.BatchNorm1d(3), nn.Tanh()).double()
    with diagnose(block) as report:
        ckpt(block, torch.rand(6, 3, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert report.gradients_right
    assert 0 < report.rounding < rounding(torch.float64)


def test_values_that_change_places_are_no_rounding():
    values = torch.zeros(3000)
    values[7] = 1
    first = fingerprint(values).tolist()
    for place in range(8, 3000):
        others = torch.zeros(3000)
        others[place] = 1
        assert difference(first, fingerprint(others).tolist()) > rounding(torch.float32)


@pytest.mark.parametrize("repair", [None, update_once])
@pytest.mark.parametrize("ckpt", BOTH)
def test_a_forward_pass_in_evaluation_mode_after_a_recomputation_may_have_read_what_it_moved(repair, ckpt):
    def trained(ckpt):
        torch.manual_seed(0)
        net = Net(nn.BatchNorm1d(WIDTH))
        handle = repair(net) if repair else None
        with diagnose(net) as report:
            for x in data():
                net.eval()
                target = net.body(net.stem(x)).detach()
                net.train()
                (ckpt(net.body, net.stem(x + 0.1)) - target).square().mean().backward()
        if handle:
            handle.remove()
        return report, net

    (report, net), (_, truth) = trained(ckpt), trained(plainly)
    assert same_gradients(net, truth) is (repair is not None)
    assert report.gradients_right is (True if repair else None)
    assert ("before another forward pass, which may have read it" in str(report)) is (repair is None)


class AddsALoss(Numbered):
    def forward(self, x):
        y = self.layer(x).softmax(-1)
        OUTSIDE.tensors.append(y.square().sum())
        return y


@pytest.mark.parametrize("batches", [1, 2])
def test_a_loss_that_a_recomputation_has_added_for_the_next_batch_is_not_called_right(batches):
    def trained(ckpt):
        torch.manual_seed(0)
        net, OUTSIDE.tensors = Net(AddsALoss(None, False)), []
        net.stem.requires_grad_(False)
        with diagnose(net) as report:
            for x in data()[:batches]:
                loss = ckpt(net.body, net.stem(x).requires_grad_()).square().mean() + sum(OUTSIDE.tensors)
                OUTSIDE.tensors.clear()
                loss.backward()
        return report.gradients_right, net

    (right, net), (_, truth) = trained(non_reentrant), trained(plainly)
    assert same_gradients(net, truth) is (batches == 1)
    assert right is (True if batches == 1 else None)


def test_a_gradient_inside_of_a_checkpoint_is_no_use_of_its_graph():
    layer = nn.Linear(3, 3)

    def function(x):
        y = layer(x).sin()
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True) if x.requires_grad else (x,)
        return y * slope

    with diagnose(layer) as report:
        non_reentrant(function, torch.rand(2, 3, requires_grad=True)).sum().backward()
    assert report.gradients_right


def test_a_validation_at_the_end_changes_nothing_that_was_observed():
    with diagnose(net := Net(nn.BatchNorm1d(WIDTH))) as report:
        once(net, non_reentrant)
        net.eval()
        with torch.no_grad():
            net.body(net.stem(data()[0]))
    assert report.gradients_right


class SavesSeeds(torch.autograd.Function):
    """Saves memory that nobody has filled, as attention on a GPU does where nothing is dropped."""

    @staticmethod
    def forward(ctx, x, kinds):
        seeds = [torch.full(shape, next(OUTSIDE.numbers)).to(dtype) for dtype, shape in kinds]
        ctx.save_for_backward(x, *seeds)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos(), None


@pytest.mark.parametrize(
    ("kinds", "has_accelerator", "right"),
    [
        ([(torch.int64, ())] * 2, True, True),
        ([(torch.int64, ())], True, False),  # the place of a maximum, say
        ([(torch.int64, (2,))] * 2, True, False),  # the places of two rows
        ([(torch.uint64, (2,)), (torch.uint64, ())], True, True),
        ([(torch.int64, ())] * 2, False, False),
    ],
)
def test_seeds_that_an_attention_kernel_has_not_drawn_are_no_difference(kinds, has_accelerator, right, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_accelerator)
    monkeypatch.setattr("momentum_fix.diagnosis.watch._random_numbers", dict)
    OUTSIDE.numbers = count(1)
    layer = nn.Linear(3, 3)
    with diagnose(layer) as report:
        non_reentrant(lambda x: SavesSeeds.apply(layer(x), kinds), torch.rand(2, 3)).sum().backward()
    assert report.gradients_right is right


class SetsAnew(nn.Module):
    """Sets attributes to the same in each forward pass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.strided = torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)])
        if hasattr(torch, "float4_e2m1fn_x2"):
            self.packed = torch.zeros(70_000, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)

    def forward(self, x):
        self.jagged = torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)], layout=torch.jagged)
        self.method, self.function = self.layer.forward, lambda y: y.sin()
        return self.function(self.method(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("ckpt", BOTH)
def test_what_is_set_to_the_same_again_has_not_moved(ckpt):
    with diagnose(block := SetsAnew()) as report:
        ckpt(block, torch.rand(2, 3, requires_grad=True)).sum().backward()
    assert report.ok


@pytest.mark.parametrize("scale", [1000.0, 8192.0, 1e5])
def test_the_last_bit_of_a_large_value_is_rounding(scale):
    values = torch.linspace(0.5, 1.0, 1000).mul(scale).bfloat16()
    other = torch.nextafter(values, torch.tensor(torch.inf).bfloat16())
    size = difference(fingerprint(values).tolist(), fingerprint(other).tolist())
    assert 0 < size <= rounding(torch.bfloat16)


class Grows(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList()

    def forward(self, x):
        self.layers.append(nn.Tanh())
        return x.tanh()


@pytest.mark.parametrize("ckpt", BOTH)
def test_modules_that_are_added_are_state(ckpt):
    with diagnose(model := Grows()) as report:
        ckpt(model, torch.rand(3, requires_grad=True)).sum().backward()
    assert len(model.layers) == 2
    assert [*report] == ["layers.1"]
    assert not report.ok


def test_a_module_that_runs_in_the_recomputation_alone_has_not_moved():
    extra, passes = nn.BatchNorm1d(3, track_running_stats=False), count()

    def function(x):
        return x.tanh() + (extra(x) * 0 if next(passes) else 0)

    model = nn.Linear(3, 3)
    with diagnose(model) as report:
        reentrant(function, model(torch.rand(4, 3))).sum().backward()
    assert not report


# The step is the same.


ORDINARY = {
    "a dropout that drops nothing": nn.Dropout(0.0),
    "a dropout in evaluation mode": nn.Dropout().eval(),
    "an operation that gives its input": torch.atleast_1d,
    "a switch": lambda x: x.requires_grad_() if x.requires_grad else x,
    "an inner checkpoint that gives its input": lambda x: reentrant(lambda y: y, x),
    "empty memory in a checkpoint inside": lambda x: reentrant(lambda y: y * y.new_empty(1).fill_(2), x),
    "a leaky ReLU of evaluation mode": nn.RReLU().eval(),
}


@pytest.mark.parametrize("ckpt", BOTH)
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_operations_are_right(name, ckpt):
    model = nn.Linear(3, 3)
    with diagnose(model) as report:
        ckpt(lambda x: ORDINARY[name](x).tanh(), model(torch.rand(4, 3))).sum().backward()
    assert report.gradients_right is not False
    assert report.ok or (ckpt, name) in {(reentrant, each) for each in SAID_TO_BE_UNKNOWN}


SAID_TO_BE_UNKNOWN = ("a switch", "an inner checkpoint that gives its input")


@pytest.mark.parametrize("ckpt", BOTH)
def test_a_gradient_that_is_computed_and_not_added_makes_nothing_wrong(ckpt):
    model = nn.Linear(3, 3)

    def function(x):
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(model.weight.square().sum(), model.weight)
        return x @ gradient

    with diagnose(model) as report:
        ckpt(function, model(torch.rand(4, 3))).sum().backward()
    assert report.ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ckpt", BOTH)
def test_memory_of_ctc_that_is_never_filled_makes_nothing_wrong(ckpt, dtype):
    def loss(x):
        lengths = torch.tensor([9, 4, 6])
        return functional.ctc_loss(
            x.log_softmax(-1), torch.ones(3, 2, dtype=torch.long), lengths, torch.tensor([2, 1, 2])
        )

    junk = [torch.rand(3, 9, 5, dtype=dtype) for _ in range(50)]
    model = nn.Linear(5, 5).to(dtype)
    with diagnose(model) as report:
        x = model(torch.rand(9, 3, 5, dtype=dtype))
        junk.clear()
        ckpt(loss, x).backward()
    assert report.ok


@pytest.mark.parametrize("ckpt", BOTH)
@pytest.mark.parametrize("convert", [torch.flatten, torch.Tensor.float])
def test_what_is_kept_of_an_input_that_was_converted_has_no_graph(convert, ckpt):
    model = nn.Linear(3, 3).double()
    with diagnose(model) as report:
        output, kept = [], []

        def function(x):
            kept.append(convert(x))
            return x.tanh()

        output = ckpt(function, model(torch.rand(2, 3).double()))
        (output.sum() + kept[0].sum()).backward()
    assert report.gradients_right is (None if ckpt is reentrant else True)


def test_weights_that_only_a_transform_sees_get_no_gradient_either():
    model = nn.Linear(3, 3)
    with diagnose(model) as report:
        first = reentrant(lambda x: torch.vmap(lambda row: x @ row)(model.weight).sum(0), torch.rand(2, 3))
        reentrant(torch.tanh, model(torch.rand(2, 3)) + first.sum()).sum().backward()
    assert report.gradients_right is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_difference_beside_infinities_is_none_of_rounding(dtype):
    mask = torch.ones(16, 16).triu(1).bool()
    values = torch.rand(16, 16).to(dtype)
    one, other = (fingerprint(each.masked_fill(mask, -torch.inf)).tolist() for each in (values, values * 1.5))
    assert difference(one, other) > 0.05
    finite, low = (fingerprint(values.masked_fill(mask, each)).tolist() for each in (-1e9, -2e9))
    assert difference(one, finite) > difference(finite, low) > 0.01


def test_a_hook_is_heard_of_in_any_thread():
    model, given = nn.Linear(3, 3), []
    for _ in range(20):
        model(torch.rand(2, 3))  # nodes that this thread has made, and the other one has not

    def function(x):
        given[0].register_hook(lambda gradient: gradient * 0.1)
        return (x * given[0]).tanh()

    with diagnose(model) as report:
        given.append(model(torch.rand(2, 3)).sin())
        loss = non_reentrant(function, torch.rand(2, 3, requires_grad=True)).sum()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert report.gradients_right is None


def test_a_child_that_is_made_in_each_forward_pass_has_not_moved():
    class Makes(nn.Module):
        def forward(self, x):
            self.activation = nn.GELU()
            return self.activation(x)

    with diagnose(model := nn.Sequential(Makes(), nn.Linear(3, 3))) as report:
        reentrant(model, torch.rand(2, 3, requires_grad=True)).sum().backward()
    assert report.ok


@pytest.mark.parametrize("ckpt", BOTH)
def test_tools_that_look_on_are_no_difference(ckpt):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    with diagnose(model) as report, FlopCounterMode(display=False):
        ckpt(model, model(torch.rand(2, 3))).sum().backward()
    assert report.ok


class RefusesNames(nn.Module):
    """Looks up what it does not have in a dictionary, whose error is another one."""

    def __init__(self):
        super().__init__()
        self.config = {}
        self.table = np.zeros(2, dtype=[("name", "O"), ("number", "i4")])

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return vars(self)["config"][name]

    def forward(self, x):
        return x.tanh()


@pytest.mark.parametrize("ckpt", BOTH)
def test_modules_with_errors_of_their_own_do_no_harm(ckpt):
    with diagnose(nn.Sequential(nn.Linear(3, 3), RefusesNames())) as report:
        ckpt(RefusesNames(), torch.rand(2, 3, requires_grad=True)).sum().backward()
    assert report.ok


def test_what_others_put_in_the_same_places_stays(monkeypatch):
    with diagnose(nn.Linear(1, 1)):
        pass
    theirs = torch.Tensor.register_hook
    monkeypatch.setattr(torch.Tensor, "register_hook", lambda tensor, hook: theirs(tensor, hook))
    mine = torch.Tensor.register_hook
    with diagnose(nn.Linear(1, 1)):
        torch.ones(1, requires_grad=True).register_hook(print)
    assert torch.Tensor.register_hook is mine
    with diagnose(nn.Linear(1, 1)):
        monkeypatch.setattr(torch.Tensor, "register_hook", mine)
    assert torch.Tensor.register_hook is mine


def test_an_operation_of_torchs_may_be_the_function():
    model = nn.Linear(3, 3)
    with diagnose(model) as report:
        reentrant(torch.tanh, model(torch.rand(4, 3))).sum().backward()
    assert report.ok


def test_a_function_may_be_called_with_its_input_by_name():
    model = nn.Linear(3, 3)
    with diagnose(model) as report:
        reentrant(lambda x: torch.flatten(input=x, start_dim=0).tanh(), model(torch.rand(4, 3))).sum().backward()
    assert report.ok


class Twice(CheckpointFunction):
    @staticmethod
    def forward(ctx, run_function, preserve_rng_state, *args):
        return 2 * CheckpointFunction.forward(ctx, run_function, preserve_rng_state, *args)


@pytest.mark.parametrize("tool", [lambda: diagnose(nn.Linear(1, 1)), momentum_fix.preserve_everywhere])
def test_a_class_that_derives_from_torchs_engine_keeps_its_own_forward(tool):
    x = torch.rand(3, requires_grad=True)
    with tool():
        assert torch.equal(Twice.apply(torch.sin, True, x), 2 * x.sin())


def test_where_hooks_on_saved_tensors_are_not_allowed_none_is_used():
    def function(x):
        with disable_saved_tensors_hooks("not here"):
            return x.sin().tanh()

    model = nn.Linear(3, 3)
    with diagnose(model) as report:
        reentrant(function, model(torch.rand(4, 3))).sum().backward()
    assert report.gradients_right is None


class Noisy(TorchFunctionMode):
    """Counts and changes products, as somebody may who tries what noise does."""

    products = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm):
            self.products += 1
            output = output + torch.rand_like(output)
        return output


@pytest.mark.parametrize("ckpt", BOTH)
def test_a_function_mode_of_a_users_sees_no_operation_of_diagnose(ckpt):
    products = []
    for watched in (True, False):
        with Noisy() as mode:
            stepped(lambda _: nn.Tanh(), once, ckpt, True, watched)
        products.append((mode.products, torch.rand(1).item()))
    assert products[0] == products[1]


def test_filters_of_warnings_and_their_log_stay_as_the_block_leaves_them():
    before = warnings.showwarning
    with warnings.catch_warnings():
        with diagnose(nn.Linear(1, 1)):
            warnings.filterwarnings("ignore", "mine")
            warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are global hooks")
            logging.captureWarnings(True)
        patterns = [pattern.pattern for _, pattern, *_ in warnings.filters if pattern]
        assert patterns[0].endswith("global hooks")
        assert patterns[1] == "mine"
        assert sum("global hooks" in pattern for pattern in patterns) == 1
        assert warnings.showwarning is not before
        logging.captureWarnings(False)


def test_a_block_in_a_block_observes_the_same():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    with diagnose(model) as outer, diagnose(model) as inner:
        reentrant(model, torch.rand(2, 3, requires_grad=True)).sum().backward()
    assert outer.ok
    assert inner.ok
