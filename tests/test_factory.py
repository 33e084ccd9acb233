"""The layer factory: a partial of the plain class, keywords only."""

import abc
import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from momentum_fix import corrected_momentum, norm_layer

WITH_MOMENTUM = [
    *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"),
    *("LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d"),
    *("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"),
    *("LazyInstanceNorm1d", "LazyInstanceNorm2d", "LazyInstanceNorm3d"),
]


class HandsOn(nn.BatchNorm2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class OwnForward(_BatchNorm):
    def forward(self, x):
        return x


class NotOfTorch(nn.Module):
    def __init__(self, channels, momentum=0.5):
        super().__init__()
        self.momentum = momentum


class FixedMomentum(nn.BatchNorm2d):
    def __init__(self, num_features):
        super().__init__(num_features, momentum=0.2)


class Unfinished(_BatchNorm):
    pass


class AlsoUnfinished(nn.BatchNorm2d, abc.ABC):
    @abc.abstractmethod
    def more(self): ...


@pytest.mark.parametrize("name", WITH_MOMENTUM)
def test_every_norm_layer_of_torch_with_a_momentum_is_built_corrected(name):
    cls = getattr(nn, name)
    for norm in (name, cls):
        layer = norm_layer(norm, momentum=0.2, passes=3)(*([] if name.startswith("Lazy") else [8]))
        assert type(layer) is cls
        assert layer.momentum == corrected_momentum(0.2, 3)


def test_the_default_is_a_batchnorm2d_for_two_passes():
    layer = norm_layer()(8)
    assert type(layer) is nn.BatchNorm2d
    assert layer.momentum == corrected_momentum(0.1, 2)
    assert layer.state_dict().keys() == nn.BatchNorm2d(8).state_dict().keys()


def test_the_partial_holds_the_plain_class_and_keywords_only():
    made = norm_layer("BatchNorm3d", momentum=0.3, passes=2, eps=1e-3, affine=False)
    assert type(made) is functools.partial
    assert made.func is nn.BatchNorm3d
    assert made.args == ()
    assert made.keywords == {"momentum": corrected_momentum(0.3, 2), "eps": 1e-3, "affine": False}
    assert made(4, device="cpu", dtype=torch.float32).eps == 1e-3
    assert repr(made) == (
        "functools.partial(<class 'torch.nn.modules.batchnorm.BatchNorm3d'>, "
        f"momentum={corrected_momentum(0.3, 2)}, eps=0.001, affine=False)"
    )


def test_the_partial_pickles_and_deep_copies():
    made = norm_layer(HandsOn, passes=4)
    for twin in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert (twin.func, twin.keywords) == (made.func, made.keywords)


def test_a_cumulative_average_stays_one():
    assert norm_layer(momentum=None)(8).momentum is None


@pytest.mark.parametrize("cls", [HandsOn, OwnForward, NotOfTorch])
def test_a_users_own_class_works(cls):
    layer = norm_layer(cls)(8)
    assert type(layer) is cls
    assert layer.momentum == corrected_momentum(0.1, 2)


@pytest.mark.parametrize("norm", ["LayerNorm", "GroupNorm", nn.LayerNorm, nn.Identity, "Conv2d", FixedMomentum])
def test_a_class_without_a_momentum_argument_is_refused(norm):
    name = norm if isinstance(norm, str) else norm.__name__
    with pytest.raises(ValueError, match=f"{name} has no momentum argument.*such as BatchNorm2d"):
        norm_layer(norm)


@pytest.mark.parametrize("norm", [_BatchNorm, nn.modules.instancenorm._InstanceNorm, Unfinished, AlsoUnfinished])
def test_an_abstract_class_is_refused(norm):
    with pytest.raises(ValueError, match=f"{norm.__name__} is an abstract base class.*such as BatchNorm2d"):
        norm_layer(norm)


@pytest.mark.parametrize("name", ["batchnorm2d", "BatchNorm2D", "BatchNrom2d"])
def test_an_unknown_name_is_refused_with_the_nearest(name):
    with pytest.raises(ValueError, match=f"torch.nn has no class '{name}'; did you mean 'BatchNorm2d'") as caught:
        norm_layer(name)
    assert set(WITH_MOMENTUM) <= set(str(caught.value).partition("Known: ")[2].split(", "))


def test_an_unknown_name_is_compared_in_whatever_case_and_all_that_are_equally_near_are_given():
    with pytest.raises(ValueError, match=r"did you mean 'SyncBatchNorm'\?"):
        norm_layer("syncbatchnorm")
    nearest = "'BatchNorm1d' or 'BatchNorm2d' or 'BatchNorm3d'"
    with pytest.raises(ValueError, match=rf"did you mean {nearest}\?"):
        norm_layer("BatchNorm")


@pytest.mark.parametrize("name", ["", "BN", "functional"])
def test_any_other_name_is_refused_too(name):
    with pytest.raises(ValueError, match=f"torch.nn has no class '{name}'; did you mean"):
        norm_layer(name)


@pytest.mark.parametrize("norm", [None, 3, nn.BatchNorm2d(4), functools.partial(nn.BatchNorm2d), int, "Parameter"])
def test_what_is_no_norm_layer_class_is_a_type_error(norm):
    with pytest.raises(TypeError, match=r"must be a norm layer class or the name of one in torch\.nn"):
        norm_layer(norm)


def test_wrong_numbers_are_refused_when_the_config_is_read():
    with pytest.raises(ValueError, match=r"momentum is 1\.5"):
        norm_layer(momentum=1.5)
    with pytest.raises(TypeError, match=r"passes is 2\.0"):
        norm_layer(passes=2.0)
    with pytest.raises(TypeError, match="positional"):
        norm_layer("BatchNorm2d", 0.1)


def test_only_the_momentum_argument_is_keyword_only_for_the_built_layer():
    assert norm_layer("BatchNorm2d")(num_features=3).num_features == 3
