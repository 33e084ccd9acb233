"""calibrate: k is counted under every engine, the step is repaired, and every later step is right."""

import copy
import functools
import threading
import warnings
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.autograd import Variable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from momentum_fix import calibrate, correct, corrected_momentum, restore
from momentum_fix.counting import replays as read_replays
from twins import (
    batches,
    counters,
    deviation,
    momenta,
    non_reentrant,
    pipeline,
    plainly,
    reentrant,
    same_path,
    siamese,
    statistics,
    three,
    train,
    twice_in_a_region,
)

ENGINES = {"reentrant": reentrant, "non-reentrant": non_reentrant}
ROUNDING = 1e-12
pytestmark = [
    # torch's own words on a reentrant checkpoint within another, and on compiling one that runs in a replay
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


class Scale(nn.Module):
    """Something that backward needs, so that a replay does not stop early before it."""

    def forward(self, x):
        return x.tanh() + x / 2


def block(norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(3, 3, 1), norm(3), Scale())


class Net(nn.Module):
    """Three blocks in a row; a recipe says how they are run."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.a, self.b, self.c = block(norm), block(norm), block(norm)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


# A recipe runs one training step and calls backward; `ckpt` is a checkpoint function or, for the truth, `plainly`.


def one_checkpoint(net, x, ckpt):
    ckpt(net, x.requires_grad_()).sum().backward()


def each_its_own(net, x, ckpt):
    ckpt(net.c, ckpt(net.b, net.a(x.requires_grad_()))).sum().backward()


def nested(net, x, ckpt):
    ckpt(lambda y: net.c(ckpt(net.b, net.a(y))), x.requires_grad_()).sum().backward()


def nested_directly(net, x, ckpt):
    ckpt(lambda y: ckpt(net, y), x.requires_grad_()).sum().backward()


def two_backwards(net, x, ckpt):
    loss = ckpt(net, x.requires_grad_()).sum()
    loss.backward(retain_graph=True)
    loss.backward()


def gradient_penalty(net, x, ckpt):
    loss = ckpt(net, x.requires_grad_()).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + gradient.square().sum()).backward()


def autograd_grad(net, x, ckpt):
    loss = ckpt(net, x.requires_grad_()).sum()
    parameters = list(net.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient


def accumulation(net, x, ckpt):
    for micro in x.split(2):
        nested(net, micro.detach(), ckpt)


def frozen_first_block(net, x, ckpt):
    net.a.requires_grad_(False)
    ckpt(net.b, ckpt(net.a, x)).sum().backward()


def ends_in_a_norm(net, x, ckpt):
    ckpt(lambda y: net.b[1](net.a(y)), x.requires_grad_()).sum().backward()


def never_stops_early(net, x, ckpt):
    with set_checkpoint_early_stop(False):
        nested_directly(net, x, ckpt)


def sequential(use_reentrant):
    def run(net, x, ckpt):
        x.requires_grad_()
        blocks = [net.a, net.b, net.c]
        y = net(x) if ckpt is plainly else checkpoint_sequential(blocks, 3, x, use_reentrant=use_reentrant)
        y.sum().backward()

    return run


def forward_only_first(net, x, ckpt):
    with torch.no_grad():
        net.c(x)
    ckpt(net.a, x.requires_grad_()).sum().backward()


def compiled(run, **options):
    """Compile the whole step's forward pass, checkpoints inside."""

    def step(net, x, ckpt):
        forward = torch.compile(lambda y: run(net, y, ckpt), backend="aot_eager", **options)
        forward(x.requires_grad_()).sum().backward()

    return step


def compiled_blocks_inside(**options):
    def step(net, x, ckpt):
        inner = torch.compile(net.b, backend="aot_eager", **options)
        ckpt(lambda y: ckpt(inner, net.a(y)).tanh(), x.requires_grad_()).sum().backward()

    return step


def same(k):
    return {"a.1": k, "b.1": k, "c.1": k}


EVERYWHERE = {
    "one checkpoint": (one_checkpoint, same(2), same(2)),
    "each its own": (each_its_own, {"a.1": 1, "b.1": 2, "c.1": 2}, {"a.1": 1, "b.1": 2, "c.1": 2}),
    "nested": (nested, {"a.1": 2, "b.1": 3, "c.1": 2}, {"a.1": 2, "b.1": 3, "c.1": 2}),
    "nested directly": (nested_directly, same(3), same(2)),  # early stop cuts the outer replay
    "never stops early": (never_stops_early, same(3), same(3)),
    "two backwards": (two_backwards, same(3), same(3)),
    "accumulation": (accumulation, {"a.1": 2, "b.1": 3, "c.1": 2}, {"a.1": 2, "b.1": 3, "c.1": 2}),
    "frozen first block": (frozen_first_block, None, {"a.1": 1, "b.1": 2, "c.1": None}),
    "ends in a norm": (ends_in_a_norm, {"a.1": 2, "b.1": 2, "c.1": None}, {"a.1": 2, "b.1": 2, "c.1": None}),
    "sequential, reentrant": (sequential(True), {"a.1": 2, "b.1": 2, "c.1": 1}, None),
    "sequential, non-reentrant": (sequential(False), None, {"a.1": 2, "b.1": 2, "c.1": 1}),
    "gradient penalty": (gradient_penalty, None, same(3)),
    "autograd.grad": (autograd_grad, None, same(2)),
    "a forward without backward beside": (
        forward_only_first,
        {"a.1": 2, "b.1": None, "c.1": 1},
        {"a.1": 2, "b.1": None, "c.1": 1},
    ),
    "compiled whole": (
        compiled(lambda net, y, ckpt: ckpt(net.b, net.a(y)), fullgraph=True),
        None,
        {"a.1": 1, "b.1": 1, "c.1": None},
    ),
    "compiled block inside": (
        compiled_blocks_inside(),
        {"a.1": 2, "b.1": 3, "c.1": None},
        {"a.1": 2, "b.1": 3, "c.1": None},
    ),
    "compiled block inside, full graph": (
        compiled_blocks_inside(fullgraph=True),
        None,
        {"a.1": 2, "b.1": 3, "c.1": None},
    ),
}
CASES = [
    pytest.param(recipe, ckpt, passes, id=f"{name}, {engine}")
    for name, (recipe, *by_engine) in EVERYWHERE.items()
    for (engine, ckpt), passes in zip(ENGINES.items(), by_engine, strict=True)
    if passes is not None
]


def train_calibrated(model, recipe, data, ckpt):
    """Calibrate the first step, check that it left no trace, and train on."""
    first = train(copy.deepcopy(model), recipe, data[:1], plainly)
    with calibrate(model) as report:
        train(model, recipe, data[:1], ckpt)
    assert same_path(model, first)
    assert all(torch.equal(mine, statistics(first)[name]) for name, mine in statistics(model).items())
    assert counters(model) == counters(first)
    model.found = report
    return train(model, recipe, data[1:], ckpt)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("recipe", "ckpt", "passes"), CASES)
def test_k_is_counted_and_the_statistics_stay_those_of_the_uncheckpointed_run(recipe, ckpt, passes):
    truth, uncorrected, calibrated = three(Net(), recipe, batches(5, 4, 3, 4, 4), ckpt, train_calibrated)
    assert {row.name: row.passes for row in calibrated.found.rows} == passes
    assert momenta(calibrated) == {name: corrected_momentum(0.1, k or 1) for name, k in passes.items()}
    assert same_path(uncorrected, truth)
    assert same_path(calibrated, truth)
    assert deviation(calibrated, truth) < ROUNDING
    if any(k not in (None, 1) for k in passes.values()):
        assert deviation(uncorrected, truth) > 1e-3
    else:
        assert deviation(uncorrected, truth) < ROUNDING


def instance_norm(channels):
    return nn.InstanceNorm2d(channels, track_running_stats=True)


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


@pytest.mark.parametrize("norm", [instance_norm, NonCounting, FromScratch])
@pytest.mark.parametrize(
    ("recipe", "passes"), [(nested, 3), (accumulation, 3), (two_backwards, 3), (one_checkpoint, 2)]
)
@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
def test_every_kind_of_layer_is_counted_whether_it_counts_its_batches_or_not(norm, recipe, passes, ckpt):
    truth, uncorrected, calibrated = three(Net(norm), recipe, batches(4, 4, 3, 4, 4), ckpt, train_calibrated)
    assert calibrated.found.passes["b.1"] == passes
    assert deviation(uncorrected, truth) > 1e-3
    assert deviation(calibrated, truth) < ROUNDING


@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_block_with_layers_that_do_not_count_is_counted_from_its_statistics(ckpt, fullgraph):
    recipe = compiled_blocks_inside(fullgraph=fullgraph)
    truth, uncorrected, calibrated = three(Net(instance_norm), recipe, batches(3, 4, 3, 4, 4), ckpt, train_calibrated)
    assert calibrated.found.passes["b.1"] == 3
    assert deviation(uncorrected, truth) > 1e-3
    assert deviation(calibrated, truth) < ROUNDING


def test_several_batches_in_a_compiled_block_that_does_not_count_are_not_guessed():
    model = Net(instance_norm)
    before = momenta(model)
    inner = torch.compile(model.b, backend="aot_eager")
    (x,) = batches(1, 4, 3, 4, 4)
    left, right = x.requires_grad_().chunk(2)
    truth = copy.deepcopy(model)
    truth.b(left), truth.b(right)
    with (
        pytest.warns(UserWarning, match=r"nothing has counted its updates.*Layers: b\.1\."),
        calibrate(model) as report,
    ):
        (non_reentrant(inner, left).sum() + non_reentrant(inner, right).square().sum()).backward()
    assert dict(report) == {}
    assert momenta(model) == before
    assert deviation(model, truth) < ROUNDING


def updated(values, batch, momentum, times):
    for _ in range(times):
        values = {name: value + momentum * (batch[name] - value) for name, value in values.items()}
    return values


def some_statistics(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(4, generator=generator, dtype=dtype) for name in ("running_mean", "running_var")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.003, 0.1, 0.5])
@pytest.mark.parametrize("replays", [1, 2, 3, 5])
def test_replays_of_one_batch_are_counted_from_the_statistics_alone(replays, momentum, dtype):
    start, batch, other = (some_statistics(seed, dtype) for seed in range(3))
    forward = updated(start, batch, momentum, 1)
    assert read_replays(start, forward, forward, momentum, 1) == 0
    assert read_replays(start, forward, updated(forward, batch, momentum, replays), momentum, 1) == replays
    assert read_replays(start, forward, updated(forward, batch, momentum, replays), momentum, 2) is None
    assert read_replays(start, forward, updated(forward, other, momentum, replays), momentum, 1) is None
    mixed = updated(updated(forward, batch, momentum, replays), other, momentum, 1)
    assert read_replays(start, forward, mixed, momentum, 1) is None


def test_replays_that_cannot_be_told_from_the_statistics_are_not_guessed():
    start, batch, other = (some_statistics(seed, torch.float64) for seed in range(3))
    for momentum in (0.0, 1.0):
        assert read_replays(start, batch, batch, momentum, 1) is None
    assert read_replays(start, start, start, 0.1, 1) is None  # a batch that equals the running values leaves no trace
    assert read_replays({}, batch, other, 0.1, 1) is None  # a lazy layer had no values before
    forward = updated(start, batch, 0.1, 1)
    assert read_replays(start, forward, start, 0.1, 1) is None  # moved away from the batch
    past = {name: 2 * batch[name] - forward[name] for name in batch}
    assert read_replays(start, forward, past, 0.1, 1) is None


def test_what_single_precision_cannot_resolve_is_not_read_from_the_statistics():
    read = []
    for seed in range(200):  # with so large a momentum every pass ends next to the batch
        start, batch = some_statistics(seed, torch.float32), some_statistics(seed + 1000, torch.float32)
        forward = updated(start, batch, 0.99, 1)
        replays = 1 + seed % 4
        read.append((read_replays(start, forward, updated(forward, batch, 0.99, replays), 0.99, 1), replays))
    assert all(seen in (None, replays) for seen, replays in read)
    assert any(seen is None for seen, _ in read)


def test_lazy_layers_may_meet_their_first_batch_in_the_block():
    def lazy(_):
        return nn.LazyBatchNorm2d()

    def lazy_instance_norm(_):
        return nn.LazyInstanceNorm2d()

    for norm in (lazy, lazy_instance_norm):
        torch.manual_seed(0)
        model = Net(norm)
        torch.manual_seed(0)
        truth = Net(norm)
        data = batches(3, 4, 3, 4, 4)
        with calibrate(model) as report:
            train(model, one_checkpoint, data[:1], reentrant)
        train(model, one_checkpoint, data[1:], reentrant)
        assert report.passes == same(2)
        assert not report.rows[0].layer_class.startswith("Lazy")
        assert deviation(model, train(truth, one_checkpoint, data, plainly)) < ROUNDING


def test_an_instance_norm_as_the_last_operation_is_not_updated_again():
    model = nn.ModuleList([nn.Conv2d(3, 3, 1), instance_norm(3)])

    def recipe(model, x, ckpt):
        ckpt(lambda y: model[1](model[0](y)), x.requires_grad_()).sum().backward()

    truth, uncorrected, calibrated = three(model, recipe, batches(3, 4, 3, 4, 4), non_reentrant, train_calibrated)
    assert calibrated.found.passes == {"1": 1}
    assert deviation(uncorrected, truth) == deviation(calibrated, truth) == 0


# Where the root cannot be exact.


def once_inside_once_outside(net, x, ckpt):
    ckpt(net, net(x.requires_grad_())).sum().backward()


def one_batch_without_backward(net, x, ckpt):
    first, second = x.requires_grad_().chunk(2)
    ckpt(net, first)
    ckpt(net, second).sum().backward()


INEXACT = {
    siamese: (2, 2),
    pipeline: (2, 2),
    twice_in_a_region: (2, 2),
    once_inside_once_outside: (Fraction(3, 2), 2),
    one_batch_without_backward: (Fraction(3, 2), 2),
}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, instance_norm])
@pytest.mark.parametrize("ckpt", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize(("recipe", "passes"), INEXACT.items(), ids=[recipe.__name__ for recipe in INEXACT])
def test_where_passes_interleave_the_step_is_repaired_the_decay_is_right_and_a_warning_says_so(
    recipe, passes, ckpt, norm
):
    k, updates = passes
    data = batches(3, 4, 3, 4, 4)
    model = Net(norm)
    with pytest.warns(UserWarning, match=r"only the decay is right.*Layers: a\.1, b\.1, c\.1"):
        truth, uncorrected, calibrated = three(model, recipe, data, ckpt, train_calibrated)
    assert set(calibrated.found.passes.values()) == {k}
    assert all("only the decay" in row.note for row in calibrated.found.rows)
    assert deviation(uncorrected, truth) > deviation(calibrated, truth) > ROUNDING

    # The old value's share: two runs of one more step that differ in where they start end (1-m)**updates as far apart.
    ends = []
    for start in (0.0, 1.0):
        twin = copy.deepcopy(calibrated)
        twin.b[1].running_mean.fill_(start)
        ends.append(train(twin, recipe, data[:1], ckpt).b[1].running_mean)
    torch.testing.assert_close(ends[1] - ends[0], torch.full((3,), 0.9**updates), rtol=1e-12, atol=0)


def test_layers_whose_passes_are_consecutive_are_not_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.head = block(), block()

    def recipe(net, x, ckpt):
        left, right = x.requires_grad_().chunk(2)
        ckpt(net.head, ckpt(net.shared, left) - ckpt(net.shared, right)).sum().backward()

    model = Half()
    with pytest.warns(UserWarning, match=r"Layers: shared\.1\.$"), calibrate(model) as report:
        train(model, recipe, batches(1, 4, 3, 4, 4), non_reentrant)
    assert report.passes == {"shared.1": 2, "head.1": 2}


def test_the_warning_points_at_the_users_own_line():
    model = Net()
    with pytest.warns(UserWarning, match="only the decay") as caught, calibrate(model):
        siamese(model, batches(1, 4, 3, 4, 4)[0], non_reentrant)
    assert caught[0].category is UserWarning
    assert caught[0].filename == __file__


def test_a_list_of_five_layers_is_whole_and_a_model_that_is_the_layer_is_called_so():
    model = nn.Sequential(*(block() for _ in range(5)))
    with pytest.warns(UserWarning, match=r"Layers: 0\.1, 1\.1, 2\.1, 3\.1, 4\.1\.$"), calibrate(model):
        train(model, siamese, batches(1, 4, 3, 4, 4), non_reentrant)
    layer = nn.BatchNorm2d(3)
    with pytest.warns(UserWarning, match=r"Layers: \(the model\)\.$"), calibrate(layer):
        siamese(lambda y: layer(y).tanh(), batches(1, 4, 3, 4, 4)[0], non_reentrant)


def test_a_long_list_of_layers_is_cut_short_in_the_warning():
    model = nn.Sequential(*(block() for _ in range(7)))
    with pytest.warns(UserWarning, match=r"Layers: 0\.1, 1\.1, 2\.1, 3\.1, 4\.1 and 2 more\.$"), calibrate(model):
        train(model, siamese, batches(1, 4, 3, 4, 4), non_reentrant)


# What is left alone.


def test_untracked_evaluating_cumulative_and_idle_layers_are_left_alone_and_reported():
    net = nn.ModuleDict(
        {
            "untracked": nn.BatchNorm1d(3, track_running_stats=False),
            "evaluating": nn.BatchNorm1d(3).eval(),
            "cumulative": nn.BatchNorm1d(3, momentum=None),
            "idle": nn.BatchNorm1d(3),
            "counted": nn.BatchNorm1d(3),
        }
    )

    def recipe(net, x, ckpt):
        names = ("untracked", "evaluating", "cumulative", "counted")
        ckpt(lambda y: sum(net[name](y) for name in names).square(), x.requires_grad_()).sum().backward()

    data = batches(4, 6, 3)
    truth = train(copy.deepcopy(net), recipe, data, plainly)
    with calibrate(net) as report:
        train(net, recipe, data[:1], non_reentrant)
    train(net, recipe, data[1:], non_reentrant)
    assert {row.name: (row.passes, row.note) for row in report.rows} == {
        "evaluating": (None, "left alone: in evaluation mode"),
        "cumulative": (2, "left alone: equal passes do not change a cumulative average"),
        "idle": (None, "left alone: did not run"),
        "counted": (2, ""),
    }
    assert "cumulative  BatchNorm1d  2       None      None       left alone" in str(report)
    assert momenta(net) == {"evaluating": 0.1, "cumulative": None, "idle": 0.1, "counted": corrected_momentum(0.1, 2)}
    assert deviation(net, truth) < ROUNDING


def test_a_step_without_backward_is_warned_of_and_changes_nothing():
    model, truth = Net(), Net()
    truth.load_state_dict(model.state_dict())
    (x,) = batches(1, 4, 3, 4, 4)
    truth(x)
    with (
        pytest.warns(UserWarning, match=r"no backward pass ran in the block.*Layers: a\.1"),
        calibrate(model) as report,
    ):
        non_reentrant(model, x)
    assert report.passes == {}
    assert momenta(model) == momenta(truth)
    assert deviation(model, truth) == 0


def test_a_layer_that_is_updated_in_backward_passes_only_is_warned_of_and_left_alone():
    model, truth = Net(), Net()
    truth.load_state_dict(model.state_dict())
    loss, expected = one_forward(model), one_forward(truth)
    with pytest.warns(UserWarning, match="updated only inside a backward pass"), calibrate(model) as report:
        loss.backward()
    expected.backward()
    assert report.passes == {}
    assert set(momenta(model).values()) == {0.1}
    assert counters(model) == counters(truth)
    assert deviation(model, truth) == 0


def test_a_wrapper_that_updates_in_the_replay_alone_keeps_its_statistics():
    model = Net()
    for block_ in model.children():
        block_[1].register_forward_pre_hook(
            lambda layer, _: setattr(layer, "track_running_stats", torch.is_grad_enabled())
        )
        block_[1].register_forward_hook(lambda layer, *_: setattr(layer, "track_running_stats", True))
    truth = train(copy.deepcopy(model), one_checkpoint, batches(1, 4, 3, 4, 4), plainly)
    with pytest.warns(UserWarning, match="updated only inside a backward pass"), calibrate(model):
        train(model, one_checkpoint, batches(1, 4, 3, 4, 4), reentrant)
    assert deviation(model, truth) == 0


def test_undoing_passes_leaves_graphs_that_saved_the_statistics_usable():
    model = Net()
    with calibrate(model) as report:
        loss = one_forward(model)
        loss.backward(retain_graph=True)
    assert report.passes == same(2)
    loss.backward()  # raises if the undoing counted as a modification of what autograd has saved


# What a counter does not tell.


def saving_norms(function, *args):
    """Checkpoint selectively, keeping what normalizations gave: their forward is replayed, but moves nothing."""

    def policy(context, operation, *_, **__):
        keep = "batch_norm" in str(operation)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return non_reentrant(function, *args, context_fn=contexts)


def nested_saving(net, x, ckpt):
    outer = plainly if ckpt is plainly else non_reentrant
    outer(lambda y: net.c(ckpt(net.b, net.a(y))), x.requires_grad_()).sum().backward()


@pytest.mark.parametrize(
    ("recipe", "passes"), [(one_checkpoint, same(1)), (nested_saving, {"a.1": 2, "b.1": 2, "c.1": 2})]
)
def test_a_replay_that_moves_no_statistics_is_no_pass(recipe, passes):
    truth, _, calibrated = three(Net(), recipe, batches(4, 4, 3, 4, 4), saving_norms, train_calibrated)
    assert calibrated.found.passes == passes
    assert deviation(calibrated, truth) < ROUNDING


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_passes_are_counted_where_the_statistics_have_nowhere_to_move(momentum):
    model = Net()
    for block_ in model.children():
        block_[1].momentum = momentum
    (x,) = batches(1, 4, 3, 4, 4)
    with torch.no_grad():
        for _ in range(800):
            model(x)  # to their fixed point
    with calibrate(model) as report:
        one_checkpoint(model, x, non_reentrant)
    assert report.passes == same(2)


class ByHand(nn.Module):
    """Calls the function in place of its layer, so that neither the counter nor a hook sees it."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        n = self.norm
        mean, var = n.running_mean, n.running_var
        return nn.functional.batch_norm(x, mean, var, n.weight, n.bias, n.training, n.momentum, n.eps)


class Uncounted(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.num_batches_tracked = None


@pytest.mark.parametrize("norm", [lambda channels: ByHand(nn.BatchNorm2d(channels)), Uncounted])
@pytest.mark.parametrize("recipe", [nested, accumulation])
def test_layers_that_nothing_counts_are_counted_from_their_statistics(recipe, norm):
    truth, uncorrected, calibrated = three(Net(norm), recipe, batches(4, 4, 3, 4, 4), non_reentrant, train_calibrated)
    assert list(calibrated.found.passes.values()) == [2, 3, 2]
    assert deviation(uncorrected, truth) > 1e-3
    assert deviation(calibrated, truth) < ROUNDING


def test_a_batchnorm_without_a_counter_is_counted_by_its_calls():
    model = Net(Uncounted)
    with pytest.warns(UserWarning, match="only the decay"), calibrate(model) as report:
        siamese(model, batches(1, 4, 3, 4, 4)[0], non_reentrant)
    assert report.passes == same(2)


def test_calls_in_evaluation_mode_are_no_updates():
    model = Net(instance_norm).eval()
    with calibrate(model) as report:
        one_checkpoint(model, batches(1, 4, 3, 4, 4)[0], non_reentrant)
    assert {row.note for row in report.rows} == {"left alone: in evaluation mode"}
    assert set(momenta(model).values()) == {0.1}


def test_unequal_passes_of_a_cumulative_average_are_warned_of():
    model = Net()
    for block_ in model.children():
        block_[1].momentum = None
    with pytest.warns(UserWarning, match="a cumulative average of batches with different numbers"), calibrate(model):
        train(model, once_inside_once_outside, batches(1, 4, 3, 4, 4), non_reentrant)


# Blocks within and beside each other.


def test_a_layer_is_calibrated_in_one_block_only():
    model = Net()
    with (
        calibrate(model),
        pytest.raises(ValueError, match=r"layer '1' is being calibrated already"),
        calibrate(model.b),
    ):
        pytest.fail("the block must not be entered")
    with pytest.raises(BoomError), calibrate(model):
        explode()
    with calibrate(model) as report:
        one_checkpoint(model, batches(1, 4, 3, 4, 4)[0], non_reentrant)
    assert report.passes == same(2)


def test_blocks_may_end_in_any_order():
    engine = Variable._execution_engine
    models = [Net(), Net()]
    blocks = [calibrate(model) for model in models]
    reports = [block_.__enter__() for block_ in blocks]
    for model, block_ in zip(models, blocks, strict=True):  # the second step runs after the first block
        one_checkpoint(model, batches(1, 4, 3, 4, 4)[0], non_reentrant)
        block_.__exit__(None, None, None)
    assert [report.passes for report in reports] == [same(2), same(2)]
    assert Variable._execution_engine is engine


class Stubborn(nn.BatchNorm2d):
    """A layer whose momentum cannot be set after it is built."""

    def __setattr__(self, name, value):
        if name == "momentum" and name in vars(self):
            raise AttributeError("momentum is fixed")
        super().__setattr__(name, value)


def test_a_layer_that_refuses_its_momentum_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.BatchNorm2d(3), instance_norm(3), Stubborn(3))
    for change in (correct, lambda model: calibrate(model).__enter__()):
        with pytest.raises(AttributeError, match="momentum is fixed"):
            change(model)
        assert set(momenta(model).values()) == {0.1}
        assert not any(layer._forward_hooks for layer in model)


@pytest.mark.parametrize("model", [3, {}, nn.BatchNorm2d])
def test_what_is_no_module_is_a_type_error(model):
    for change in (correct, restore, lambda model: calibrate(model).__enter__()):
        with pytest.raises(TypeError, match=r"but must be an nn\.Module"):
            change(model)


def test_torchscript_is_refused():
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3)))
    with pytest.raises(TypeError, match="TorchScript, where momentum is part of the code"):
        correct(scripted)


# Corrected models, users' changes, exceptions.


@pytest.mark.parametrize("earlier", [2, 3, 5])
def test_a_corrected_model_is_calibrated_from_its_uncorrected_momentum(earlier):
    data = batches(4, 4, 3, 4, 4)
    model = Net()
    truth = train(copy.deepcopy(model), nested, data, plainly)
    correct(model, earlier)
    with calibrate(model) as report:
        train(model, nested, data[:1], non_reentrant)
    train(model, nested, data[1:], non_reentrant)
    assert report.passes == {"a.1": 2, "b.1": 3, "c.1": 2}
    assert {row.momentum for row in report.rows} == {0.1}
    assert deviation(model, truth) < ROUNDING
    assert set(momenta(restore(model)).values()) == {0.1}


def test_a_model_whose_checkpointing_was_switched_off_goes_back_to_its_own_momentum():
    model = correct(Net(), 2)
    with calibrate(model) as report:
        train(model, one_checkpoint, batches(1, 4, 3, 4, 4), plainly)
    assert report.passes == same(1)
    assert set(momenta(model).values()) == {0.1}


def test_a_corrected_layer_that_does_not_run_stays_corrected():
    model = correct(Net(), 2)
    with calibrate(model):
        non_reentrant(model.a, batches(1, 4, 3, 4, 4)[0].requires_grad_()).sum().backward()
    assert momenta(model) == dict.fromkeys(("a.1", "b.1", "c.1"), corrected_momentum(0.1, 2))
    assert set(momenta(restore(model)).values()) == {0.1}


def test_a_momentum_that_the_step_sets_is_the_one_that_is_corrected():
    model = Net()
    with calibrate(model) as report:
        one_checkpoint(model, batches(1, 4, 3, 4, 4)[0], non_reentrant)
        model.b[1].momentum = 0.4
    assert momenta(model)["b.1"] == corrected_momentum(0.4, 2)
    assert [row.momentum for row in report.rows] == [0.1, 0.4, 0.1]


class BoomError(Exception):
    pass


def explode(*_):
    raise BoomError


def exploding_step(model, where):
    x = batches(1, 4, 3, 4, 4)[0].requires_grad_()
    y = non_reentrant(model, x)
    if where == "forward":
        explode()
    if where == "backward":
        x.register_hook(explode)
    y.sum().backward()
    explode()


@pytest.mark.parametrize("where", ["forward", "backward", "after"])
@pytest.mark.parametrize("earlier", [1, 2])
def test_an_exception_leaves_momentum_untouched_and_removes_every_hook(where, earlier):
    model = correct(Net(instance_norm), earlier)
    before, engine = momenta(model), Variable._execution_engine
    with pytest.raises(BoomError), calibrate(model) as report:
        exploding_step(model, where)
    assert momenta(model) == before
    assert report.rows == ()
    assert Variable._execution_engine is engine
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert set(momenta(restore(model)).values()) == {0.1}


def test_a_backward_that_fails_has_moved_nothing():
    model = Net()
    truth = copy.deepcopy(model)
    with pytest.raises(BoomError), calibrate(model):
        exploding_step(model, "backward")
    one_forward(truth)
    assert deviation(model, truth) == 0


def test_a_warning_turned_into_an_error_leaves_momentum_untouched():
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="only the decay"), calibrate(model):
            siamese(model, batches(1, 4, 3, 4, 4)[0], non_reentrant)
    assert set(momenta(model).values()) == {0.1}


def test_an_impossible_momentum_is_refused_before_anything_runs():
    model = Net()
    model.b[1].momentum = -0.5
    with pytest.raises(ValueError, match=r"layer 'b\.1': momentum is -0\.5"), calibrate(model):
        pytest.fail("the block must not be entered")
    assert momenta(model) == {"a.1": 0.1, "b.1": -0.5, "c.1": 0.1}


def test_afterwards_no_hook_stays_and_the_engine_is_torchs_own():
    model, engine = Net(instance_norm), Variable._execution_engine
    keys = [vars(module).keys() for module in restore(copy.deepcopy(model)).modules()]
    with calibrate(model):
        one_checkpoint(model, batches(1, 4, 3, 4, 4)[0], non_reentrant)
    assert Variable._execution_engine is engine
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [vars(module).keys() for module in restore(model).modules()] == keys


def test_two_models_can_be_calibrated_in_one_step():
    generator, critic = Net(), Net()
    (x,) = batches(1, 4, 3, 4, 4)
    with calibrate(generator) as first, calibrate(critic) as second:
        non_reentrant(critic, reentrant(generator, x.requires_grad_())).sum().backward()
    assert first.passes == second.passes == same(2)


def test_a_backward_pass_in_another_thread_does_not_undo_this_threads_forward():
    model = Net()
    truth = copy.deepcopy(model)
    inside, forward = threading.Event(), threading.Event()

    def elsewhere():
        weight = torch.ones(1, requires_grad=True)
        loss = weight * 2
        weight.register_hook(lambda _: inside.set() or (forward.wait(10) and None))
        loss.backward()

    thread = threading.Thread(target=elsewhere)
    with calibrate(model):
        thread.start()
        assert inside.wait(10)
        loss = one_forward(model)  # falls into the other thread's backward
        forward.set()
        thread.join()
        loss.backward()
    one_forward(truth)
    assert deviation(model, truth) == 0


def one_forward(model):
    return non_reentrant(model, batches(1, 4, 3, 4, 4)[0].requires_grad_()).sum()


def test_the_optimizers_step_may_be_inside_the_block_and_take_a_closure():
    model = Net()
    (x,) = batches(1, 4, 3, 4, 4)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = non_reentrant(model, x.requires_grad_()).square().sum()
        loss.backward()
        return loss

    with calibrate(model) as report:
        optimizer.step(closure)
    assert report.passes == same(2)


# The report.


def test_the_report_prints_as_an_aligned_table_and_is_a_mapping_for_correct():
    model = Net()
    rebuilt = copy.deepcopy(model)
    with calibrate(model) as report:
        assert str(report) == "no layer with running statistics has been calibrated"
        frozen_first_block(model, batches(1, 4, 3, 4, 4)[0], non_reentrant)
    assert str(report).splitlines() == [
        "layer  class        passes  momentum  corrected  note",
        "a.1    BatchNorm2d  1       0.1       0.1",
        "b.1    BatchNorm2d  2       0.1       0.0513167",
        "c.1    BatchNorm2d  ?       0.1       0.1        left alone: did not run",
    ]
    assert report.passes == dict(report) == {"a.1": 1, "b.1": 2}
    assert (len(report), report["b.1"], "c.1" in report) == (2, 2, False)
    assert all(type(passes) is int for passes in report.values())
    assert momenta(correct(rebuilt, report)) == momenta(model)


def test_a_report_with_a_mean_of_passes_is_a_mapping_for_correct_too():
    model = Net()
    rebuilt = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="only the decay"), calibrate(model) as report:
        once_inside_once_outside(model, batches(1, 4, 3, 4, 4)[0], non_reentrant)
    assert "b.1    BatchNorm2d  3/2     0.1       0.0678302  only" in str(report)
    assert momenta(correct(rebuilt, report.passes)) == momenta(model)


def test_a_shared_layer_has_one_row():
    shared = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"left": shared, "right": shared})
    with calibrate(model) as report:
        non_reentrant(lambda y: model["right"](y).square(), batches(1, 4, 3, 4, 4)[0].requires_grad_()).sum().backward()
    assert [(row.name, row.passes) for row in report.rows] == [("left", 2)]


def test_a_model_that_is_one_norm_layer_or_none_at_all_works():
    layer = nn.BatchNorm1d(3)
    with calibrate(layer) as report:
        non_reentrant(lambda y: layer(y).square(), torch.randn(5, 3, requires_grad=True)).sum().backward()
    assert layer.momentum == corrected_momentum(0.1, 2)
    assert "(the model)  BatchNorm1d  2" in str(report)
    with calibrate(nn.Linear(1, 1)) as report:
        pass
    assert report.passes == {}
