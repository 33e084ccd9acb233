"""correct and restore: in place, once, and never twice."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from momentum_fix import correct, corrected_momentum, effective_momentum, restore
from recipes import pickled, saved
from twins import batches, deviation, momenta, non_reentrant, plainly, reentrant, same_path, three, train

M2, M3 = corrected_momentum(0.1, 2), corrected_momentum(0.1, 3)


def network():
    encoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    decoder = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, momentum=0.3), nn.GroupNorm(2, 4))
    return nn.ModuleDict({"encoder": encoder, "decoder": decoder})


def step(model, x, ckpt):
    hidden = ckpt(model["encoder"], x.requires_grad_())
    ckpt(model["decoder"], hidden).square().sum().backward()


@pytest.mark.parametrize("ckpt", [reentrant, non_reentrant])
def test_the_textbook_case_is_exact_and_uncorrected_is_not(ckpt):
    data = batches(6, 4, 3, 5, 5)
    truth, uncorrected, fixed = three(network(), step, data, ckpt, lambda model, *run: train(correct(model), *run))
    assert same_path(uncorrected, truth)
    assert same_path(fixed, truth)
    assert deviation(uncorrected, truth) > 0.01
    assert deviation(fixed, truth) < 1e-12


class DenseFunction(nn.Module):
    """The thread's own case: concatenate the features so far, then BatchNorm3d, ReLU, Conv3d."""

    def __init__(self, channels, growth):
        super().__init__()
        self.norm = nn.BatchNorm3d(channels)
        self.conv = nn.Conv3d(channels, growth, 3, padding=1)

    def forward(self, *features):
        return self.conv(torch.relu(self.norm(torch.cat(features, dim=1))))


def dense_step(model, x, ckpt):
    features = [x.requires_grad_()]
    for layer in model:
        features.append(ckpt(layer, *features))
    torch.cat(features, dim=1).square().mean().backward()


@pytest.mark.parametrize("ckpt", [reentrant, non_reentrant])
def test_the_threads_three_claims_hold_on_a_checkpointed_3d_densenet(ckpt):
    model = nn.ModuleList([DenseFunction(2 + 2 * i, 2) for i in range(3)])
    data = batches(4, 2, 2, 4, 4, 4)
    truth, uncorrected, fixed = three(model, dense_step, data, ckpt, lambda model, *run: train(correct(model), *run))
    assert same_path(uncorrected, truth)  # gradients are unaffected
    for mine, true in zip(uncorrected, truth, strict=True):  # the running statistics are updated twice
        assert int(mine.norm.num_batches_tracked) == 2 * int(true.norm.num_batches_tracked) == 8
    assert deviation(uncorrected, truth) > 0.01
    assert [layer.norm.momentum for layer in fixed] == [pytest.approx(1 - 0.9**0.5, rel=1e-15)] * 3
    assert deviation(fixed, truth) < 1e-12  # 1 - sqrt(0.9) brings them back


def test_uncorrected_passes_amount_to_the_effective_momentum():
    data = batches(3, 4, 3, 5, 5)
    model = network()
    twin = copy.deepcopy(model)
    for layer in (twin["encoder"][1], twin["decoder"][1]):
        layer.momentum = effective_momentum(layer.momentum, 2)
    train(model, step, data, non_reentrant)
    assert deviation(train(twin, step, data, plainly), model) < 1e-12


def test_it_works_in_place_and_returns_the_model():
    model = network()
    assert correct(model) is model
    assert momenta(model) == {"encoder.1": M2, "decoder.1": corrected_momentum(0.3, 2)}
    assert restore(model) is model
    assert momenta(model) == {"encoder.1": 0.1, "decoder.1": 0.3}


def test_a_model_comes_back_from_restore_as_it_was():
    model = network()
    before = [vars(module).keys() for module in model.modules()]
    restore(correct(model))
    assert [vars(module).keys() for module in model.modules()] == before


def test_correcting_twice_changes_nothing():
    assert momenta(correct(correct(network()))) == momenta(correct(network()))


def test_other_passes_start_again_from_the_uncorrected_momentum():
    model = correct(correct(network(), 2), 3)
    assert momenta(model) == momenta(correct(network(), 3))
    assert momenta(correct(model, 1)) == momenta(network())
    assert momenta(restore(correct(model, 5))) == momenta(network())


def test_a_momentum_set_since_counts_as_the_new_uncorrected_one():
    model = correct(network())
    model["encoder"][1].momentum = 0.2
    correct(model)
    assert model["encoder"][1].momentum == corrected_momentum(0.2, 2)
    model["encoder"][1].momentum = 0.4
    assert restore(model)["encoder"][1].momentum == 0.4


def test_a_mapping_corrects_what_it_names_and_leaves_the_rest():
    assert momenta(correct(network(), {"encoder.1": 3})) == {"encoder.1": M3, "decoder.1": 0.3}


def test_a_parents_name_covers_what_is_below_and_the_deepest_name_counts():
    model = nn.Sequential(network(), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    correct(model, {"": 2, "0": 3, "0.encoder": 4, "0.encoder.1": 5, "2": 1})
    assert momenta(model) == {
        "0.encoder.1": corrected_momentum(0.1, 5),
        "0.decoder.1": corrected_momentum(0.3, 3),
        "1": M2,
        "2": 0.1,
    }
    assert momenta(correct(model, {"0.encoder": 2}))["0.encoder.1"] == M2


def test_a_name_is_no_prefix_of_its_neighbours():
    model = nn.Sequential(*(nn.BatchNorm1d(1) for _ in range(12)))
    correct(model, {"1": 2})
    assert [layer.momentum for layer in model] == [0.1, M2] + [0.1] * 10


@pytest.mark.parametrize("name", ["encoder.11", "encodr.1", "enc", "en", 3])
def test_an_unknown_name_is_refused_with_the_nearest_and_nothing_changes(name):
    model = network()
    with pytest.raises(ValueError, match="no module named") as caught:
        correct(model, {"decoder": 2, name: 2})
    assert repr(name) in str(caught.value)
    if isinstance(name, str):
        assert "'encoder" in str(caught.value)
    assert momenta(model) == momenta(network())


def test_the_messages_of_unknown_names_read_well():
    with pytest.raises(ValueError, match="no module") as caught:
        correct(network(), {"encoder.x": 2})
    nearest = "'encoder.2', 'encoder.1', 'encoder.0'"
    assert str(caught.value) == f"the model has no module named 'encoder.x'; the nearest names are {nearest}"
    with pytest.raises(ValueError, match="no module") as caught:
        correct(network(), {"zzz": 2})
    assert str(caught.value) == "the model has no module named 'zzz'"


def test_a_name_that_covers_no_layer_with_statistics_is_refused():
    with pytest.raises(ValueError, match=r"'decoder.2' is not a layer with running .*'encoder.1', 'decoder.1'"):
        correct(network(), {"decoder.2": 2})
    with pytest.raises(ValueError, match="none in this model"):
        correct(nn.Linear(1, 1), {"": 2})


@pytest.mark.parametrize(
    ("passes", "error"),
    [
        (0, ValueError),
        (2.0, TypeError),
        (True, TypeError),
        ("2", TypeError),
        (None, TypeError),
        (Fraction(1, 2), TypeError),
        ({"encoder": 2, "decoder": 0}, ValueError),
        ({"": 2, "encoder": 1.5}, TypeError),
    ],
)
def test_wrong_passes_are_refused_and_nothing_changes(passes, error):
    for model in (network(), nn.ModuleDict({"encoder": nn.Identity(), "decoder": nn.Identity()})):
        before = momenta(model)
        with pytest.raises(error, match="at least 1"):
            correct(model, passes)
        assert momenta(model) == before


def test_a_layer_with_an_impossible_momentum_is_named_and_nothing_changes():
    model = network()
    model["decoder"][1].momentum = 1.5
    with pytest.raises(ValueError, match=r"layer 'decoder\.1': momentum is 1\.5"):
        correct(model)
    assert momenta(model) == {"encoder.1": 0.1, "decoder.1": 1.5}


def test_numpy_and_torch_integers_are_passes_too():
    assert momenta(correct(network(), np.int64(3))) == momenta(correct(network(), {"": torch.tensor(3)}))


def test_a_fraction_is_the_mean_of_passes_that_differ():
    layer = correct(nn.BatchNorm1d(1), Fraction(3, 2))
    assert (1 - layer.momentum) ** 3 == pytest.approx(0.9**2, rel=1e-15)  # three updates for two batches
    assert momenta(correct(network(), Fraction(2))) == momenta(correct(network(), 2))
    assert momenta(correct(network(), Fraction(1))) == momenta(network())


def test_a_shared_layer_is_corrected_once_under_any_of_its_names():
    shared = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(nn.Linear(3, 3), shared)})
    assert correct(model)["a"][0].momentum == M2
    assert correct(model, {"b.1": 3})["a"][0].momentum == M3
    assert correct(model, {"a": 3, "b": 3})["a"][0].momentum == M3
    with pytest.raises(ValueError, match=r"'b' asks for 3 passes and 'a' for 2.*shared layer 'a\.0'"):
        correct(model, {"a": 2, "b": 3})
    assert correct(model, {"a": 2, "b": 4, "b.1": 3})["a"][0].momentum == M3
    assert correct(model, {"a.0": 3, "b": 2})["a"][0].momentum == M3
    assert restore(model)["b"][1].momentum == 0.1


class Own(nn.Module):
    """A norm layer of a user's own, not derived from torch's."""

    def __init__(self, tracked):
        super().__init__()
        self.momentum = 0.1
        self.register_buffer(tracked, torch.ones(2))


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(2, track_running_stats=False), nn.InstanceNorm1d(2), nn.LayerNorm(2), Own("window")]
)
def test_layers_without_running_statistics_are_left_alone(layer):
    before = dict(vars(layer))
    with pytest.warns(UserWarning, match="no layer with running statistics"):
        correct(layer)
    assert vars(layer) == before


def test_tracking_switched_off_by_hand_counts_as_untracked():
    layer = nn.BatchNorm1d(2)
    layer.track_running_stats = False
    with pytest.warns(UserWarning, match="no layer with running statistics"):
        assert correct(layer).momentum == 0.1


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(2),
        nn.SyncBatchNorm(2),
        nn.LazyBatchNorm3d(),
        nn.InstanceNorm2d(2, track_running_stats=True),
        Own("running_mean"),
        Own("running_var"),
    ],
)
def test_every_kind_of_layer_with_running_statistics_is_corrected(layer):
    assert correct(layer).momentum == M2
    assert correct(layer).momentum == M2
    assert restore(layer).momentum == 0.1


@pytest.mark.parametrize("momentum", [None, 0, 1, 0.0, 1.0])
def test_what_needs_no_correction_is_left_as_it_is(momentum):
    layer = nn.BatchNorm1d(2, momentum=momentum)
    before = dict(vars(layer))
    assert correct(layer).momentum is momentum
    assert vars(layer) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_the_marks_survive_copies(copied):
    twin = copied(correct(network()))
    assert momenta(correct(twin)) == momenta(correct(network()))
    assert momenta(restore(twin)) == momenta(network())


def test_a_restored_copy_leaves_the_original_corrected():
    model = correct(network())
    restore(copy.copy(model))  # a shallow copy shares the layers
    correct(model)
    restore(copy.deepcopy(model))
    assert momenta(correct(model)) == momenta(correct(network()))


def test_the_marks_do_not_enter_the_state_dict():
    assert correct(network()).state_dict().keys() == network().state_dict().keys()


def test_the_marks_survive_conversion_to_syncbatchnorm():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(correct(network(), 2))
    assert type(model["encoder"][1]) is nn.SyncBatchNorm
    assert momenta(correct(model, 3)) == momenta(correct(network(), 3))
    assert momenta(restore(model)) == momenta(network())


def test_the_marks_of_several_layers_deep_in_a_model_survive_conversion_layer_by_layer():
    norms = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model = nn.Sequential(nn.Sequential(norms))
    correct(model, {"0.0.0": 2, "0.0.1": 3, "0.0.2": 4})
    correct(model, {"0.0.1": 5})
    correct(model, {"0.0.2": 1})
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert list(momenta(model).values()) == [M2, corrected_momentum(0.1, 5), 0.1]
    assert list(momenta(correct(model, {"0.0.0": 3})).values()) == [M3, corrected_momentum(0.1, 5), 0.1]
    assert list(momenta(restore(model)).values()) == [0.1] * 3


def test_a_layer_corrected_on_its_own_is_not_corrected_again_within_its_model():
    model = network()
    correct(model["encoder"][1])
    correct(model["decoder"])
    assert momenta(correct(model)) == momenta(correct(network()))
    assert momenta(restore(model)) == momenta(network())
    correct(model)
    restore(model["encoder"][1])
    assert momenta(correct(model, {"encoder": 3}))["encoder.1"] == M3


def test_a_layer_stays_a_plain_torch_layer():
    layer = correct(nn.BatchNorm2d(3))
    assert type(layer) is nn.BatchNorm2d
    assert "forward" not in vars(layer)
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    fused = torch.nn.utils.fuse_conv_bn_eval(nn.Conv2d(3, 3, 1).eval(), layer.eval())
    assert type(fused) is nn.Conv2d
