"""Configs: each recipe of docs/configs.md builds a model that ends with the uncheckpointed statistics."""

import copy
import subprocess
import sys

import pytest
import torch
from mmengine.registry import MODELS
from monai.networks.layers import Norm
from monai.networks.nets import UNet
from torch import nn

import contracts
from momentum_fix import norm_layer
from momentum_fix.norms.layers import tracked_layers
from pages import blocks, run
from twins import batches, deviation, non_reentrant, plainly, train

PAGE = "configs.md"
IMAGES, VOLUMES = (2, 3, 64, 64), (2, 1, 8, 8, 8)
INSTALLED = {"JSON and YAML": VOLUMES, "Hydra and OmegaConf": IMAGES, "MONAI": VOLUMES, "mmengine and mmcv": IMAGES}
ELSEWHERE = {
    "torchvision": "torchvision",
    "timm": "timm",
    "detectron2": "detectron2",
    "segmentation-models-pytorch": "segmentation_models_pytorch",
}
NOT_HERE = {
    "detectron2": "detectron2 is in no package index",
    "torchvision": "torchvision is not in the test set-up: its wheel does not load beside a torch without CUDA",
    "timm": "timm is not in the test set-up: it needs torchvision",
    "segmentation_models_pytorch": "segmentation-models-pytorch is not in the test set-up: it needs torchvision",
}
UNCORRECTED = {"torchvision": 0.01}  # MobileNetV3's own; 0.1 elsewhere


@pytest.fixture
def names():
    """What the page's examples before the section of a test have defined."""
    names = {}
    for language, code, _ in blocks(PAGE):
        if language == "python":
            run(code, PAGE, names)
    return names


def model_of(section, names):
    """Run the section's examples, each of which prints what the page says."""
    for _, code, expected in blocks(PAGE, section):
        assert run(code, PAGE, names) == expected
    return names["model"].double()


def check_statistics(model, shape, uncorrected_momentum=0.1):
    """Train the model as a whole under a checkpoint, beside the one that the config would have built without us."""

    def step(model, x, ckpt):
        ckpt(model, x.requires_grad_()).square().mean().backward()

    def trained(model, ckpt):
        torch.manual_seed(1)
        return train(copy.deepcopy(model).train(), step, batches(4, *shape), ckpt)

    original = copy.deepcopy(model)
    for layer in tracked_layers(original):
        layer.momentum = uncorrected_momentum
    truth, uncorrected, corrected = (
        trained(original, plainly),
        trained(original, non_reentrant),
        trained(model, non_reentrant),
    )
    assert deviation(uncorrected, truth) > 1e-3
    assert deviation(corrected, truth) < 1e-12


# What importing mmcv warns of is torch's own: it has deprecated parts that mmengine imports.
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("section", "shape"), INSTALLED.items(), ids=INSTALLED)
def test_the_recipe_builds_a_model_with_the_uncheckpointed_statistics(section, shape, names):
    check_statistics(model_of(section, names), shape)


@pytest.mark.parametrize(("section", "library"), ELSEWHERE.items(), ids=ELSEWHERE)
def test_the_recipe_fits_the_contract_of_the_librarys_source(section, library, names, monkeypatch):
    for name, module in contracts.modules(library).items():
        monkeypatch.setitem(sys.modules, name, module)
    check_statistics(model_of(section, names), IMAGES, UNCORRECTED.get(section, 0.1))


@pytest.mark.parametrize(("section", "library"), ELSEWHERE.items(), ids=ELSEWHERE)
def test_the_recipe_fits_the_library_itself(section, library, names):
    pytest.importorskip(library, reason=NOT_HERE[library])
    check_statistics(model_of(section, names), IMAGES, UNCORRECTED.get(section, 0.1))


def test_a_mapping_in_the_config_is_right_where_only_a_part_of_the_model_is_recomputed():
    names = {}
    run(blocks(PAGE)[0][1], PAGE, names)
    model = names["model"].double()

    def step(model, x, ckpt):
        ckpt(model.body, model.stem(x)).square().mean().backward()

    data = batches(4, *IMAGES)
    original = copy.deepcopy(model)
    original.body[1].momentum = 0.1
    truth = train(copy.deepcopy(original), step, data, plainly)
    uncorrected = train(copy.deepcopy(original), step, data, non_reentrant)
    everywhere = copy.deepcopy(model)
    everywhere.stem[1].momentum = model.body[1].momentum
    assert deviation(train(model, step, data, non_reentrant), truth) < 1e-12
    assert deviation(uncorrected, truth) > 1e-3
    assert deviation(train(everywhere, step, data, non_reentrant), truth) > 1e-3


# Why the recipes have the form that they have.


def test_a_subclass_or_a_function_in_place_of_the_partial_would_not_do_for_timm():
    class Corrected(nn.BatchNorm2d):
        pass

    def function(channels):
        return norm_layer("BatchNorm2d")(channels)

    create = contracts.modules("timm")["timm"].create_model
    with pytest.raises(AssertionError, match="no equivalent with an activation"):
        create("regnetx_002", norm_layer=Corrected)
    assert not hasattr(create("regnetx_002", norm_layer=function).stem.bn, "act")
    assert hasattr(create("regnetx_002", norm_layer=norm_layer("BatchNorm2d")).stem.bn, "act")


def test_monai_wants_a_name_and_takes_arguments_beside_a_registered_one():
    net = {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": (4, 8), "strides": (2,)}
    with pytest.raises(TypeError, match="cannot unpack"):
        UNet(**net, norm=norm_layer("BatchNorm2d"))
    Norm.add_factory_callable("batch_x3", lambda dim: norm_layer(f"BatchNorm{dim}d", passes=3))
    layer = UNet(**net, norm=("batch_x3", {"eps": 1e-3})).model[0].adn.N
    assert (type(layer), layer.eps) == (nn.BatchNorm2d, 1e-3)
    assert layer.momentum == norm_layer(passes=3).keywords["momentum"]


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
def test_mmcv_wants_a_class_in_the_registry():
    from mmcv.cnn import build_norm_layer

    MODELS.register_module("BN_x3", module=norm_layer("BatchNorm2d", passes=3), force=True)
    with pytest.raises(TypeError, match="class_type must be a type"):
        build_norm_layer({"type": "BN_x3"}, 8)


def test_importing_momentum_fix_registers_nothing():
    program = """
import sys, momentum_fix
momentum_fix.calibrate, momentum_fix.correct, momentum_fix.norm_layer
def with_registries():
    return sys.modules.keys() & {"monai", "mmengine", "mmcv", "hydra", "omegaconf", "timm", "detectron2"}
assert not with_registries()
import omegaconf
assert with_registries() == {"omegaconf"}  # so an import would have been seen
"""
    subprocess.run([sys.executable, "-c", program], check=True)
