"""calibrate where the root is not exact or k cannot be known: it warns, names the layers, and does what can be done."""

import copy
from contextlib import nullcontext
from fractions import Fraction

import pytest
import torch
from torch import nn

import recipes as by
import rivals
from momentum_fix import calibrate
from recipes import Net, block, data, instance_norm, one, same, siamese
from twins import ROUNDING, calibrating, counters, deviation, momenta, non_reentrant, plainly, reentrant, three, train

PASSES = {
    siamese: 2,
    by.pipeline: 2,
    by.twice_in_a_region: 2,
    by.once_inside_once_outside: Fraction(3, 2),
    by.forward_only: Fraction(3, 2),
}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, by.Uncounted, by.instance_norm])
@pytest.mark.parametrize("ckpt", by.ENGINES.values(), ids=by.ENGINES)
@pytest.mark.parametrize(("step", "k"), PASSES.items(), ids=[step.__name__ for step in PASSES])
def test_where_passes_interleave_the_step_is_repaired_the_decay_is_right_and_a_warning_says_so(step, k, ckpt, norm):
    model = Net(norm)
    with pytest.warns(UserWarning, match=r"only the decay is right.*Layers: a\.1, b\.1, c\.1"):
        truth, uncorrected, calibrated = three(model, step, data(3), ckpt, calibrating)
    assert set(calibrated.found.passes.values()) == {k}
    assert all("only the decay" in row.note for row in calibrated.found.rows)
    assert deviation(uncorrected, truth) > deviation(calibrated, truth) > ROUNDING

    # The old value's share: one more step of two batches, from two old values, ends 0.9**2 as far apart.
    ends = []
    for start in (0.0, 1.0):
        twin = copy.deepcopy(calibrated)
        twin.b[1].running_mean.fill_(start)
        ends.append(train(twin, step, data(1), ckpt).b[1].running_mean)
    torch.testing.assert_close(ends[1] - ends[0], torch.full((3,), 0.9**2), rtol=1e-12, atol=0)


def test_layers_whose_passes_are_consecutive_are_not_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.head = block(), block()

    def step(net, x, ckpt):
        left, right = x.requires_grad_().chunk(2)
        ckpt(net.head, ckpt(net.shared, left) - ckpt(net.shared, right)).sum().backward()

    model = Half()
    with pytest.warns(UserWarning, match=r"Layers: shared\.1\.$"), calibrate(model) as report:
        train(model, step, data(1), non_reentrant)
    assert report.passes == {"shared.1": 2, "head.1": 2}


def test_the_last_batch_is_not_taken_for_the_one_that_is_recomputed():
    model = Net()
    with pytest.warns(UserWarning, match="do not follow one another") as caught, calibrate(model):
        siamese(model, *data(1), non_reentrant)
    assert len(caught) == 1


def test_the_warning_points_at_the_users_own_line():
    model = Net()
    with pytest.warns(UserWarning, match="only the decay") as caught, calibrate(model):
        siamese(model, *data(1), non_reentrant)
    assert caught[0].category is UserWarning
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("count", "listed"), [(5, r"0\.1, 1\.1, 2\.1, 3\.1, 4\.1\."), (7, r"0\.1, .* 4\.1 and 2 more\.")]
)
def test_a_list_of_more_than_five_layers_is_cut_short(count, listed):
    model = nn.Sequential(*(block() for _ in range(count)))
    with pytest.warns(UserWarning, match=rf"Layers: {listed}$"), calibrate(model):
        train(model, siamese, data(1), non_reentrant)


def test_a_model_that_is_the_layer_is_called_so():
    layer = nn.BatchNorm2d(3)
    with pytest.warns(UserWarning, match=r"Layers: \(the model\)\.$"), calibrate(layer):
        siamese(lambda y: layer(y).tanh(), *data(1), non_reentrant)


def test_a_warning_turned_into_an_error_leaves_momentum_untouched():
    model = Net()
    with pytest.raises(UserWarning, match="only the decay"), calibrate(model):  # pytest makes errors of warnings
        siamese(model, *data(1), non_reentrant)
    assert set(momenta(model).values()) == {0.1}


def test_unequal_passes_of_a_cumulative_average_are_warned_of():
    model = Net()
    for layer in by.norms(model):
        layer.momentum = None
    with pytest.warns(UserWarning, match="a cumulative average of batches with different numbers"), calibrate(model):
        train(model, by.once_inside_once_outside, data(1), non_reentrant)


def nested_beside_plain(net, x, ckpt):
    """One batch with one pass, one with three: their mean is a whole number."""
    net(x)
    ckpt(lambda y: ckpt(net, y).tanh(), x.square().requires_grad_()).sum().backward()


@pytest.mark.parametrize(
    ("step", "right"),
    [(nested_beside_plain, False), (siamese, True), (one, True), (by.accumulating(by.nested), True)],
    ids=["1 and 3 passes", "two in turn", "one", "one after the other"],
)
def test_passes_of_a_cumulative_average_that_may_be_unequal_are_warned_of_though_their_mean_is_whole(step, right):
    truth, batches = Net(by.cumulative), data(4)
    model = copy.deepcopy(truth)
    train(truth, step, batches, plainly)
    told = "left alone: a cumulative average, right only if batches have equally many passes; exact: `restore"
    warned = step in (nested_beside_plain, siamese)
    with pytest.warns(UserWarning, match=told) if warned else nullcontext(), calibrate(model):
        train(model, step, batches[:1], non_reentrant)
    train(model, step, batches[1:], non_reentrant)
    assert (deviation(model, truth) < ROUNDING) == right


def test_a_step_without_backward_is_warned_of_and_changes_nothing():
    model = Net()
    truth = copy.deepcopy(model)
    truth(*data(1))
    with (
        pytest.warns(UserWarning, match=r"no backward pass was seen in the block.*Layers: a\.1"),
        calibrate(model) as report,
    ):
        non_reentrant(model, *data(1))
    assert report.passes == {}
    assert momenta(model) == momenta(truth)
    assert deviation(model, truth) == 0


def test_a_layer_that_is_updated_in_backward_passes_only_is_warned_of_and_left_alone():
    model = Net()
    truth = copy.deepcopy(model)
    loss, expected = (non_reentrant(net, data(1)[0].requires_grad_()).sum() for net in (model, truth))
    with pytest.warns(UserWarning, match="updated only inside a backward pass"), calibrate(model) as report:
        loss.backward()
    expected.backward()
    assert report.passes == {}
    assert set(momenta(model).values()) == {0.1}
    assert counters(model) == counters(truth)
    assert deviation(model, truth) == 0


def test_a_wrapper_that_updates_in_the_recomputation_alone_keeps_its_statistics():
    model = Net()
    truth = train(copy.deepcopy(model), by.one, data(1), plainly)
    rivals.only_in_backward(model)
    with pytest.warns(UserWarning, match="updated only inside a backward pass"), calibrate(model):
        train(model, by.one, data(1), reentrant)
    assert deviation(model, truth) == 0


def test_recomputations_of_a_batch_from_before_the_block_do_not_count():
    model = Net()
    earlier = non_reentrant(model, *data(1)).sum()
    with calibrate(model) as report:
        earlier.backward()
        one(model, *data(1), non_reentrant)
    assert report.passes == same(2)


# A recomputation of other data.


def dropping(net, x, ckpt):
    """Draw other random numbers in the recomputation."""
    ckpt(lambda y: net(nn.functional.dropout(y, 0.5)), x.requires_grad_(), preserve_rng_state=False).sum().backward()


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, instance_norm])
def test_a_recomputation_of_other_data_than_the_forward_pass_saw_is_noticed(norm):
    model, same_data = Net(norm), Net(norm)
    said = r"only the decay is right: a recomputation saw different data.*update_once.*Layers: a\.1, b\.1, c\.1\."
    with pytest.warns(UserWarning, match=said), calibrate(model) as report:
        dropping(model, *data(1), non_reentrant)
    assert report.passes == same(2)
    with calibrate(same_data):
        one(same_data, *data(1), non_reentrant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.001, 0.1, 0.9])
def test_recomputations_of_the_same_data_are_not_taken_for_others_in_any_precision(dtype, momentum):
    model = Net().to(dtype)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = momentum
            layer.running_mean += 3
    with calibrate(model) as report:
        for x in data(3):
            one(model, x.to(dtype), non_reentrant)
    assert report.passes == same(2)
    assert {row.note for row in report.rows} == {""}
