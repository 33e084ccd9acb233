"""calibrate counts k under every engine and for every kind of layer, and every later step is right."""

import contextlib
import copy
import functools
from fractions import Fraction

import numpy
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import CheckpointPolicy

import recipes as by
from momentum_fix import calibrate, corrected_momentum, update_once
from recipes import ENGINES, Net, Uncounted, data, instance_norm, same, seeded_pair
from twins import (
    EXACT,
    ROUNDING,
    calibrating,
    deviation,
    momenta,
    non_reentrant,
    plainly,
    reentrant,
    same_path,
    three,
    train,
)

INNER = {"a.1": 2, "b.1": 3, "c.1": 2}
LAST = {"a.1": 2, "b.1": 2, "c.1": 1}


def forward_only_first(net, x, ckpt):
    with torch.no_grad():
        net.c(x)
    ckpt(net.a, x.requires_grad_()).sum().backward()


PASSES = {  # with the reentrant engine, with the other; None: not for this engine
    "one checkpoint": (by.one, same(2), same(2)),
    "each its own": (by.each_its_own, {**same(2), "a.1": 1}, {**same(2), "a.1": 1}),
    "nested": (by.nested, INNER, INNER),
    "nested directly": (by.nested_directly, same(3), same(2)),  # early stop cuts the outer recomputation
    "never stopping early": (by.never_stopping_early, same(3), same(3)),
    "two backwards": (by.two_backwards, same(3), same(3)),
    "accumulation": (by.accumulating(by.nested), INNER, INNER),
    "frozen": (by.frozen, None, {**same(2), "a.1": 1}),
    "ending in a norm": (by.ending_in_a_norm, same(2), same(2)),
    "sequential, reentrant": (by.sequential(True), LAST, None),
    "sequential": (by.sequential(False), None, LAST),
    "gradient penalty": (by.gradient_penalty, None, same(3)),
    "autograd.grad": (by.autograd_grad, None, same(2)),
    "a forward without backward beside": (forward_only_first, *[{"a.1": 2, "b.1": None, "c.1": 1}] * 2),
    "compiled whole": (by.compiled_whole("aot_eager"), None, same(1)),
    "compiled block inside": (by.compiled_block_inside(), *[{**INNER, "c.1": None}] * 2),
    "compiled block inside, full graph": (by.compiled_block_inside(fullgraph=True), None, {**INNER, "c.1": None}),
}
CASES = [
    pytest.param(step, ckpt, passes, id=f"{name}, {engine}")
    for name, (step, *by_engine) in PASSES.items()
    for (engine, ckpt), passes in zip(ENGINES.items(), by_engine, strict=True)
    if passes is not None
]


@pytest.mark.parametrize(("step", "ckpt", "passes"), CASES)
def test_k_is_counted_and_the_statistics_stay_those_of_the_uncheckpointed_run(step, ckpt, passes):
    truth, uncorrected, calibrated = three(Net(), step, data(5), ckpt, calibrating)
    assert {row.name: row.passes for row in calibrated.found.rows} == passes
    assert momenta(calibrated) == {name: corrected_momentum(0.1, k or 1) for name, k in passes.items()}
    assert same_path(uncorrected, truth)
    assert same_path(calibrated, truth)
    assert deviation(calibrated, truth) < ROUNDING
    if any(k not in (None, 1) for k in passes.values()):
        assert deviation(uncorrected, truth) > 1e-3
    else:
        assert deviation(uncorrected, truth) < ROUNDING


class NonCounting(_BatchNorm):
    """A user's own forward, which does not keep num_batches_tracked."""

    def forward(self, x):
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


class FromScratch(nn.Module):
    """A norm layer that is not derived from torch's and has a buffer of its own kind."""

    def __init__(self, channels):
        super().__init__()
        self.momentum = 0.1
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        variance = x.var(dim=(0, 2, 3))
        with torch.no_grad():
            self.running_var.lerp_(variance, self.momentum)
        return x / variance[:, None, None].sqrt()


@pytest.mark.parametrize("norm", [instance_norm, Uncounted, NonCounting, FromScratch])
@pytest.mark.parametrize(
    ("step", "k"), [(by.nested, 3), (by.accumulating(by.nested), 3), (by.two_backwards, 3), (by.one, 2)]
)
@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
def test_every_kind_of_layer_is_counted_whether_it_counts_its_batches_or_not(norm, step, k, ckpt):
    truth, uncorrected, calibrated = three(Net(norm), step, data(), ckpt, calibrating)
    assert calibrated.found.passes["b.1"] == k
    assert deviation(uncorrected, truth) > 1e-3
    assert deviation(calibrated, truth) < ROUNDING


@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("fullgraph", [False, True])
def test_layers_in_a_compiled_block_are_counted_if_they_do_not_count_themselves(ckpt, fullgraph):
    step = by.compiled_block_inside(fullgraph=fullgraph)
    with torch._dynamo.config.patch(recompile_limit=16):  # for four models, each in the modes of three passes
        truth, uncorrected, calibrated = three(Net(instance_norm), step, data(3), ckpt, calibrating)
    assert calibrated.found.passes["b.1"] == 3
    assert deviation(uncorrected, truth) > 1e-3
    assert deviation(calibrated, truth) < ROUNDING


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, instance_norm, by.cumulative], ids=lambda norm: norm.__name__)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_recomputation_that_preserves_the_state_is_no_pass(compiled, norm, ckpt):
    def step(net, x, ckpt):
        run = torch.compile(net.b, backend="aot_eager") if compiled else net.b
        ckpt(run, x.requires_grad_()).sum().backward()

    model = Net(norm)
    uncorrected, truth = copy.deepcopy(model), train(copy.deepcopy(model), step, data(3), plainly)
    with calibrate(model) as report:
        train(model, step, data(3)[:1], ckpt)
    train(model, step, data(3)[1:], ckpt)
    assert report.passes == {"b.1": 1}
    assert model.b[1].momentum == uncorrected.b[1].momentum
    assert deviation(model, truth) == 0
    with calibrate(uncorrected) as report:
        train(uncorrected, step, data(1), non_reentrant)
    assert report.passes == {"b.1": 2}


@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
def test_the_first_recomputation_of_a_cumulative_average_counts_though_it_changes_no_value(ckpt):
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, momentum=None)
    ).double()  # where a recomputation stops early
    with calibrate(model) as report:
        for x in data(2):
            ckpt(model, x.requires_grad_()).sum().backward()
    assert report.passes == {"1": 2}
    assert report.rows[0].note == "left alone: equal passes do not change a cumulative average"


@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
def test_a_batch_that_a_norm_refuses_is_no_batch(ckpt):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), by.Kink()).double()
    with calibrate(model) as report:
        for size in (4, 1, 4):
            with pytest.raises(ValueError, match="more than 1 value") if size == 1 else contextlib.nullcontext():
                ckpt(model, torch.rand(size, 3, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert report.passes == {"1": 2}
    assert report.rows[0].note == ""


@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_cumulative_average_keeps_equal_passes_in_the_block_and_after_it(ckpt, compiled):
    def step(net, x, ckpt):
        run = torch.compile(net.b, backend="aot_eager") if compiled else net.b
        ckpt(run, x.requires_grad_()).sum().backward()

    model = Net(by.cumulative)
    truth = train(copy.deepcopy(model), step, data(3), plainly)
    with calibrate(model) as report:
        train(model, step, data(3)[:1], ckpt)
    train(model, step, data(3)[1:], ckpt)
    assert report.passes == {"b.1": 2}
    assert report.rows[1].note == "left alone: equal passes do not change a cumulative average"
    assert deviation(model, truth) < ROUNDING


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("other", [False, True])
def test_other_data_is_told_from_rounding_at_every_size_of_the_statistics(size, other):
    layer, calls = nn.BatchNorm2d(3), []

    def forward(x):
        calls.append(x)
        return layer(size * (x + 1 + 1e-3 * (other and len(calls) == 2))).tanh()  # the first recomputation

    said = pytest.warns(UserWarning, match="different data") if other else contextlib.nullcontext()
    with said, calibrate(layer) as report:
        for x in data(2):
            non_reentrant(forward, x.requires_grad_()).sum().backward()
    assert report.passes == {"": 2}


class Scaling(nn.BatchNorm2d):
    def forward(self, x, *, scale):
        return super().forward(x) * scale


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_keywords_of_a_forward_reach_the_layer_in_the_block_too(momentum, late):
    layer, gradients = Scaling(3, momentum=momentum), []
    run = functools.partial(layer, scale=2.0)
    for ckpt in (plainly, reentrant):
        x = data(1)[0].requires_grad_()
        before = [ckpt(run, x).sum() for _ in range(late)]
        with calibrate(layer):
            for loss in before:
                loss.backward()
            ckpt(run, x).tanh().sum().backward()
        gradients.append(x.grad)
    assert torch.allclose(*gradients)


def test_a_class_of_ones_own_that_is_updated_once_may_read_what_it_likes():
    layer = Scaling(3)
    with calibrate(layer) as report:
        layer(data(1)[0].requires_grad_(), scale=2.0).sum().backward()
    assert report.passes == {"": 1}
    assert report.rows[0].note == ""


@pytest.mark.parametrize("late", [0, 3])
def test_recomputations_of_batches_from_before_the_block_count_in_a_cumulative_average(late):
    layer = nn.BatchNorm2d(3, momentum=None)
    layer.num_batches_tracked += 100  # pretrained
    before = [reentrant(layer, x.requires_grad_()).sum() for x in data(late)]
    with calibrate(layer) as report:
        for loss in before:
            loss.backward()
        reentrant(layer, data(1)[0].requires_grad_()).sum().backward()
    assert report.passes == {"": 2}
    assert report.rows[0].note == "left alone: equal passes do not change a cumulative average"


@pytest.mark.parametrize("norm", [nn.LazyBatchNorm2d, nn.LazyInstanceNorm2d])
def test_lazy_layers_may_meet_their_first_batch_in_the_block(norm):
    model, truth = seeded_pair(lambda _: norm())
    with calibrate(model) as report:
        train(model, by.one, data(3)[:1], reentrant)
    train(model, by.one, data(3)[1:], reentrant)
    assert report.passes == same(2)
    assert not report.rows[0].layer_class.startswith("Lazy")
    assert deviation(model, train(truth, by.one, data(3), plainly)) < ROUNDING


def test_an_instance_norm_as_the_last_operation_is_not_updated_again():
    truth, uncorrected, calibrated = three(Net(instance_norm), by.ending_in_a_norm, data(3), non_reentrant, calibrating)
    assert calibrated.found.passes == LAST
    assert deviation(uncorrected, truth) > 1e-3
    assert deviation(calibrated, truth) < ROUNDING
    assert torch.equal(uncorrected.c[1].running_mean, truth.c[1].running_mean)


def one_saved_within_another(net, x, ckpt):
    saving = functools.partial(ckpt, context_fn=by.selecting(CheckpointPolicy.MUST_SAVE))
    ckpt(lambda y: net.c(saving(net.b, net.a(y))), x.requires_grad_()).sum().backward()


@pytest.mark.parametrize(
    ("step", "passes"), [(by.selective(CheckpointPolicy.MUST_SAVE), same(1)), (one_saved_within_another, same(2))]
)
def test_a_recomputation_that_moves_no_statistics_is_no_pass(step, passes):
    truth, _, calibrated = three(Net(), step, data(), non_reentrant, calibrating)
    assert calibrated.found.passes == passes
    assert deviation(calibrated, truth) < ROUNDING


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_passes_are_counted_where_the_statistics_have_nowhere_to_move(momentum):
    model = Net()
    for layer in by.norms(model):
        layer.momentum = momentum
    (x,) = data(1)
    with torch.no_grad():
        for _ in range(800):
            model(x)  # to their fixed point
    with calibrate(model) as report:
        by.one(model, x, non_reentrant)
    assert report.passes == same(2)


def test_calls_in_evaluation_mode_are_no_updates():
    model = Net(instance_norm).eval()
    with pytest.warns(UserWarning, match="no layer was updated in the block"), calibrate(model) as report:
        by.one(model, *data(1), non_reentrant)
    assert {row.note for row in report.rows} == {"left alone: in evaluation mode"}
    assert set(momenta(model).values()) == {0.1}


def test_the_optimizers_step_may_be_inside_the_block_and_take_a_closure():
    model = Net()
    (x,) = data(1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = non_reentrant(model, x.requires_grad_()).square().sum()
        loss.backward()
        return loss

    with calibrate(model) as report:
        optimizer.step(closure)
    assert report.passes == same(2)


class ByHand(nn.Module):
    """Calls the function instead of its layer, so that neither the counter nor a hook sees it."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        n = self.norm
        mean, var = n.running_mean, n.running_var
        return nn.functional.batch_norm(x, mean, var, n.weight, n.bias, n.training, n.momentum, n.eps)


def test_statistics_that_move_though_their_layer_does_not_run_are_reported_and_not_guessed():
    model = Net(ByHand)
    said = r"its forward did not run .*Layers: a\.1\.norm, b\.1\.norm, c\.1\.norm"
    with pytest.warns(UserWarning, match=said), calibrate(model) as report:
        by.one(model, *data(1), non_reentrant)
    assert report.passes == {}
    assert set(momenta(model).values()) == {0.1}


def test_a_layer_called_twice_in_a_compiled_graph_is_counted_twice():
    model, truth = Net(instance_norm), Net(instance_norm)
    truth.load_state_dict(model.state_dict())
    inner = torch.compile(lambda y: model.b(model.b(y)), backend="aot_eager", fullgraph=True)
    (x,) = data(1)
    truth.b(truth.b(x))
    with pytest.warns(UserWarning, match=r"only the decay is right.*Layers: b\.1\."), calibrate(model) as report:
        non_reentrant(inner, x.requires_grad_()).sum().backward()
    assert report.passes == {"b.1": 2}
    assert deviation(model, truth) == 0


def test_two_batches_in_turn_through_a_compiled_block_are_told_from_one():
    model, truth = Net(instance_norm), Net(instance_norm)
    truth.load_state_dict(model.state_dict())
    inner = torch.compile(model.b, backend="aot_eager")
    left, right = data(1)[0].requires_grad_().chunk(2)
    truth.b(left), truth.b(right)
    with pytest.warns(UserWarning, match=r"only the decay is right.*Layers: b\.1\."), calibrate(model) as report:
        (non_reentrant(inner, left).sum() + non_reentrant(inner, right).square().sum()).backward()
    assert report.passes == {"b.1": 2}
    assert deviation(model, truth) == 0


def test_more_batches_than_compiled_code_has_slots_for_are_counted_and_their_order_is_given_up(monkeypatch):
    monkeypatch.setattr("momentum_fix.norms.counting._SLOTS", 4)
    model = Net()
    run = torch.compile(model.b, backend="aot_eager")

    def step(net, x, ckpt):
        ckpt(run, x.requires_grad_()).sum().backward()

    with pytest.warns(UserWarning, match="only the decay is right"), calibrate(model) as report:
        train(model, step, data(5), non_reentrant)
    assert report.passes == {"b.1": 2}


def test_a_recomputation_that_moves_the_counter_alone_is_noticed_in_a_cumulative_average():
    model = Net(by.cumulative)
    with (
        pytest.warns(UserWarning, match="not corrected: a cumulative average of batches"),
        calibrate(model) as report,
    ):
        by.selective(CheckpointPolicy.MUST_SAVE)(model, *data(1), non_reentrant)
    assert report.passes["b.1"] == 1


def test_a_momentum_of_numpy_is_a_number_like_any_other():
    model = Net(functools.partial(nn.BatchNorm2d, momentum=numpy.float32(0.1)))
    with calibrate(model) as report:
        by.one(model, *data(1), non_reentrant)
    assert {row.note for row in report.rows} == {""}


def changing(compiled, engine):
    """Give a step whose passes are in compiled code or not, one after another."""

    def step(net, x, ckpt):
        runs, order = {True: torch.compile(net.b, backend="aot_eager"), False: net.b}, iter(compiled)
        ckpt = engine if ckpt is not plainly else plainly
        net.c(ckpt(lambda y: runs[next(order)](y), net.a(x.clone().requires_grad_()))).square().mean().backward()

    return step


PARTLY_COMPILED = [(True, False), (False, True)]


@pytest.mark.parametrize("compiled", PARTLY_COMPILED)
@pytest.mark.parametrize("covered", [calibrate, update_once])
def test_a_pass_in_compiled_code_and_its_recomputation_outside_of_it_are_of_one_batch(covered, compiled):
    step, model = changing(compiled, reentrant), Net()
    truth, wrong = (train(copy.deepcopy(model), step, data(1), ckpt) for ckpt in (plainly, reentrant))
    with covered(model) as found:
        train(model, step, data(1), reentrant)
    assert deviation(model, truth) <= ROUNDING < deviation(wrong, truth)
    if covered is calibrate:
        assert found.passes == {"a.1": 1, "b.1": 2, "c.1": 1}


def test_a_layer_in_a_compiled_and_in_an_eager_region_has_the_passes_of_both():
    def step(net, x, ckpt):
        net.b(ckpt(net.b, ckpt(torch.compile(net.b, backend="aot_eager"), x.clone().requires_grad_()))).sum().backward()

    model = Net()
    with pytest.warns(UserWarning, match=r"only the decay is right.*Layers: b\.1\."), calibrate(model) as report:
        step(model, *data(1), reentrant)
    assert report.passes == {"b.1": Fraction(5, 3)}
