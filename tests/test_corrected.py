"""It is known which momenta are corrected ones, and of what: nothing is corrected twice, everything can be undone."""

import copy
import functools
import json
import math
import pickle
import random
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from momentum_fix import (
    applied,
    calibrate,
    correct,
    corrected_momentum,
    norm_layer,
    restore,
    update_once,
)
from momentum_fix.norms.momenta import corrected_by_hand, is_corrected, uncorrected
from recipes import data, one, pickled, saved
from twins import deviation, momenta, non_reentrant, plainly, train

jit = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")  # with a class that changes from torch to torch


def layer_of(momentum):
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, momentum=momentum), nn.Tanh())


BY_HAND = {
    "by pow": lambda m, k: 1 - (1 - m) ** (1 / k),
    "by expm1": lambda m, k: -math.expm1(math.log1p(-m) / k),
    "by the formula": corrected_momentum,
}


@pytest.mark.parametrize("passes", [2, 3, 4, 5])
@pytest.mark.parametrize("momentum", [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("how", BY_HAND.values(), ids=BY_HAND)
def test_a_root_that_was_written_by_hand_is_recognized(how, momentum, passes):
    assert corrected_by_hand(how(momentum, passes)) == momentum


@pytest.mark.parametrize(
    "momentum",
    [None, 0, 0.0, 1.0, 1e-17, 0.05, 0.1, 1 - 0.9, 1 - 0.99, 1 - 0.9997, 0.0625, 0.03125, 1 / 3, 2 / 3, 0.0513, 0.0975],
)
def test_a_momentum_that_people_mean_as_it_stands_is_not_taken_for_a_root(momentum):
    assert corrected_by_hand(momentum) is None
    layer = nn.BatchNorm2d(3, momentum=momentum)
    assert uncorrected(layer) is momentum


@pytest.mark.parametrize("momentum", [1 - 0.87655**0.5, 1.23456789, -0.123456789, math.inf, math.nan])
def test_neither_is_the_root_of_five_digits_nor_what_is_no_momentum(momentum):
    assert corrected_by_hand(momentum) is None


@pytest.mark.parametrize(
    "momentum", [0.0513167019494862, 1 - 0.9**0.5, corrected_momentum(0.19, 4), corrected_momentum(0.3439, 8)]
)
def test_of_several_readings_of_a_root_the_one_with_the_fewest_passes_counts(momentum):
    layer = nn.BatchNorm2d(3, momentum=momentum)
    assert uncorrected(layer) == 0.1
    ours = momentum == corrected_momentum(0.1, 2)  # if not, it was written by hand, and nobody else may set it
    assert restore(layer).momentum == (0.1 if ours else momentum)
    assert correct(layer, 3).momentum == corrected_momentum(0.1, 3)


def test_a_mark_says_which_it_is():
    layer = correct(nn.BatchNorm2d(3, momentum=0.19), 4)
    assert uncorrected(layer) == 0.19
    assert correct(layer, 2).momentum == corrected_momentum(0.19, 2)
    assert restore(layer).momentum == 0.19


def test_random_momenta_are_not_taken_for_roots():
    generator = random.Random(0)
    for _ in range(2000):
        assert corrected_by_hand(generator.random() ** generator.choice((1, 3))) is None


@pytest.mark.parametrize("build", [lambda: norm_layer("BatchNorm2d", passes=2)(3), lambda: correct(nn.BatchNorm2d(3))])
@pytest.mark.parametrize("again", [lambda layer: correct(layer, 2), lambda layer: correct(correct(layer, 5), 2)])
def test_a_layer_is_corrected_once_whoever_built_it(build, again):
    layer = build()
    assert layer.momentum == again(layer).momentum == corrected_momentum(0.1, 2)
    assert restore(layer).momentum == 0.1
    assert type(layer.momentum) is float


@pytest.mark.parametrize("momentum", [norm_layer(passes=2).keywords["momentum"], 1 - 0.9**0.5])
def test_calibrate_starts_from_the_uncorrected_momentum_of_a_corrected_layer(momentum):
    first, *rest = data()
    truth, net = layer_of(0.1), layer_of(momentum)
    net.load_state_dict(truth.state_dict())
    train(truth, one, data(), plainly)
    with calibrate(net) as report:
        train(net, one, [first], non_reentrant)
    train(net, one, rest, non_reentrant)
    assert (report["1"], report.rows[0].momentum) == (2, 0.1)
    assert net[1].momentum == corrected_momentum(0.1, 2)
    assert deviation(net, truth) < 1e-12
    assert restore(net)[1].momentum == (0.1 if momentum == corrected_momentum(0.1) else momentum)


def test_a_root_by_hand_that_is_corrected_for_other_passes_is_corrected_from_what_it_is_the_root_of():
    layer = correct(nn.BatchNorm2d(3, momentum=1 - 0.9**0.5), 3)
    assert uncorrected(layer) == 0.1
    assert layer.momentum == corrected_momentum(0.1, 3)
    assert correct(layer, 4).momentum == corrected_momentum(0.1, 4)
    assert restore(layer).momentum == 1 - 0.9**0.5


def test_a_root_by_hand_where_nothing_is_recomputed_gives_way_to_the_momentum_itself():
    net = layer_of(1 - 0.9**0.5)
    with calibrate(net):
        train(net, one, data(1), plainly)
    assert net[1].momentum == 0.1
    assert applied(net) == {"1": "momentum 0.1, corrected from 0.0513167"}
    assert restore(net)[1].momentum == 1 - 0.9**0.5


def test_a_momentum_that_is_computed_from_a_corrected_one_counts_as_ones_own():
    layer = correct(nn.BatchNorm2d(3, momentum=0.3), 3)
    layer.momentum *= 0.5
    assert type(layer.momentum) is float
    mine = layer.momentum
    assert restore(layer).momentum == mine
    assert correct(layer, 2).momentum == corrected_momentum(mine, 2)


@pytest.mark.parametrize("travel", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("momentum", [0.1, 0.123456789])
def test_the_knowledge_travels_with_the_layer(travel, momentum):
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=momentum))
    before = correct(model, 3)[0].momentum
    there = travel(model)
    assert correct(there, 3)[0].momentum == before
    assert restore(there)[0].momentum == momentum


@pytest.mark.parametrize(("momentum", "known"), [(0.1, True), (0.1234, True), (0.12345, False), (0.123456789, False)])
@pytest.mark.parametrize("passes", [2, 8])
def test_a_layer_without_a_mark_is_known_by_its_number_if_the_uncorrected_one_has_four_digits(momentum, known, passes):
    corrected = corrected_momentum(momentum, passes)
    rebuilt = nn.SyncBatchNorm.convert_sync_batchnorm(correct(nn.BatchNorm2d(3, momentum=momentum), passes))
    for layer in (norm_layer("BatchNorm2d", momentum=momentum, passes=passes)(3), rebuilt):
        assert vars(layer).keys() == vars(type(layer)(3)).keys()
        assert layer.momentum == corrected
        assert is_corrected(layer) is known
        assert applied(layer) == ({"": f"momentum {corrected:.6g}, corrected from {momentum}"} if known else {})
        assert correct(copy.deepcopy(layer), 3).momentum == corrected_momentum(momentum if known else corrected, 3)
        assert restore(layer).momentum == (momentum if known else corrected)


def test_passes_above_eight_are_not_known_by_the_number():
    assert not is_corrected(norm_layer("BatchNorm2d", passes=9)(3))


@jit
def test_whatever_takes_a_float_takes_it():
    model = correct(layer_of(0.1))
    number = model[1].momentum
    assert isinstance(number, float)
    assert repr(number) == repr(corrected_momentum(0.1)) == json.dumps(number)
    assert f"{number:.4g}" == "0.05132"
    x = torch.rand(4, 3, 4, 4)
    truth = model(x)
    torch.compiler.reset()
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), truth)
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x), truth)
    model.eval()
    assert torch.equal(torch.jit.script(model)(x), model(x))
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])
    assert torch.allclose(fused(x).tanh(), model(x))


def test_compiled_code_of_a_corrected_model_is_compiled_once():
    torch.compiler.reset()
    model = correct(layer_of(0.1))
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    run = torch.compile(model, backend=backend)
    for _ in range(3):
        run(torch.rand(4, 3, 4, 4))
    assert len(graphs) == 1


@pytest.mark.parametrize("change", [correct, lambda model: model.append(norm_layer()(3))])
def test_a_corrected_model_that_is_pickled_whole_loads_without_this_package(change, tmp_path):
    file = tmp_path / "model.pt"
    torch.save(change(layer_of(0.1)), file)
    load = f"import torch; torch.load({str(file)!r}, weights_only=False)"
    code = f"import sys; sys.modules['momentum_fix'] = None; {load}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_corrected_momentum_of_four_digits_is_not_known_by_its_number():
    correct(nn.BatchNorm1d(4, momentum=0.19), 2)
    layer = nn.BatchNorm1d(4, momentum=0.1)  # which 0.19 is corrected to
    assert correct(layer, 2).momentum == corrected_momentum(0.1, 2)


@pytest.mark.parametrize(
    "other",
    [lambda: norm_layer(momentum=0.123456789), lambda: correct(nn.BatchNorm2d(3, momentum=0.123456789))],
)
def test_what_is_done_to_one_model_does_not_change_what_is_said_of_another(other):
    mine = nn.BatchNorm2d(3, momentum=corrected_momentum(0.123456789, 2))
    other()
    assert not is_corrected(mine)
    assert applied(mine) == {}
    update_once(mine)
    assert restore(mine).momentum == corrected_momentum(0.123456789, 2)


def test_restore_takes_update_once_off_a_layer_that_no_longer_tracks():
    layer = nn.BatchNorm2d(3)
    update_once(layer)
    layer.track_running_stats = False
    assert "forward" not in vars(restore(layer))


def test_a_corrected_layer_that_no_longer_tracks_is_shown_and_restored():
    layer = correct(nn.BatchNorm2d(3))
    layer.track_running_stats = False
    assert applied(layer) == {"": "momentum 0.0513167, corrected from 0.1"}
    assert restore(layer).momentum == 0.1


def test_restore_says_so_and_changes_nothing_where_something_has_wrapped_a_covered_forward():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    update_once(model)
    covered = model[1].forward
    model[1].forward = functools.wraps(covered)(lambda x: covered(x))  # as accelerate's hooks do
    with pytest.raises(ValueError, match=r"layer '1' has a forward of its own.*put there by something else"):
        restore(model)
    assert set(applied(model)) == {"0", "1"}
    with pytest.raises(ValueError, match=r"layer '0' moves its statistics once per batch"):
        correct(model)
    model[1].forward = covered
    assert applied(restore(model)) == {}


def test_a_momentum_that_is_no_number_is_not_called_corrected():
    layer = nn.BatchNorm2d(3, momentum=math.nan)
    assert not is_corrected(layer)
    update_once(layer)


def test_a_momentum_that_is_a_fraction_can_be_shown():
    assert applied(correct(nn.BatchNorm2d(3, momentum=Fraction(19, 100)))) == {"": "momentum 0.1, corrected from 0.19"}


@pytest.mark.parametrize("momentum", [np.float32(0.1), torch.tensor(0.1), 0.1], ids=repr)
def test_one_pass_gives_the_very_momentum_back_and_restore_does_so_afterwards(momentum):
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=momentum))
    for passes in (2, 1, 2, 3, 1):
        correct(model, passes)
        assert (model[0].momentum is momentum) == (passes == 1)
    assert restore(correct(model, 2))[0].momentum is momentum


def test_a_momentum_that_cannot_be_hashed_is_corrected_too():
    assert correct(nn.BatchNorm2d(3, momentum=np.array(0.1))).momentum == corrected_momentum(0.1)


def calibrated(model):
    with calibrate(model):
        pass


# What is on a model, and taking it off.


def test_what_is_on_a_model_can_be_asked_for_and_restore_undoes_all_of_it():
    model = nn.ModuleDict({name: nn.BatchNorm2d(3) for name in ("plain", "corrected", "once")})
    keys = {name: set(vars(layer)) for name, layer in model.items()}
    correct(model["corrected"], 3)
    update_once(model["once"])
    assert applied(model) == {"corrected": "momentum 0.0345106, corrected from 0.1", "once": "update_once"}
    restore(model)
    assert applied(model) == {}
    assert set(momenta(model).values()) == {0.1}
    assert {name: set(vars(layer)) for name, layer in model.items()} == keys


@pytest.mark.parametrize("change", [correct, update_once, calibrated])
def test_a_model_without_running_statistics_is_said_to_have_none(change):
    with pytest.warns(UserWarning, match="no layer with running statistics, so there is nothing to") as caught:
        change(nn.Linear(1, 1))
    assert caught[0].filename == __file__


@jit
@pytest.mark.parametrize("change", [correct, update_once, lambda model: calibrate(model).__enter__()])
def test_a_scripted_part_with_running_statistics_is_named_and_nothing_is_changed(change):
    linear = nn.Linear(1, 1)
    linear.register_buffer("window", torch.ones(1))
    part, harmless = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3))), torch.jit.script(linear)
    model = nn.ModuleDict({"plain": nn.BatchNorm2d(3), "part": part, "harmless": harmless})
    with pytest.raises(
        TypeError, match="the part 'part' of the model is TorchScript, where momentum is part of the code"
    ):
        change(model)
    assert vars(model["plain"]).keys() == vars(nn.BatchNorm2d(3)).keys()
    assert model["plain"].momentum == 0.1
    del model["part"]
    restore(correct(model))


def test_a_partial_of_the_factory_is_as_serializable_as_before():
    partial = norm_layer("BatchNorm3d", momentum=0.3, passes=3, eps=1e-3)
    again = pickle.loads(pickle.dumps(partial))
    assert isinstance(again, functools.partial)
    assert json.loads(json.dumps(again.keywords)) == {"momentum": corrected_momentum(0.3, 3), "eps": 1e-3}
    assert restore(again(4)).momentum == 0.3
