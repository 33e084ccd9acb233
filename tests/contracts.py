"""Stand-ins for libraries that the test set-up cannot install: what each does with a norm layer or a checkpoint.

Written from what their sources say (torchvision 0.28, timm 1.0.31, segmentation-models-pytorch 0.6, detectron2's main
branch, which is in no package index, nnU-Net 2 and DeepSpeed).
"""

import functools
import itertools
import types
from collections import OrderedDict

from torch import nn
from torch.utils.checkpoint import checkpoint

from recipes import hand_written


def named(**parts):
    return nn.Sequential(OrderedDict(parts))


def torchvision():
    def mobilenet_v3_small(norm_layer=None):
        """Call norm_layer with the number of channels alone; without one, use settings of the model's own."""
        norm_layer = norm_layer or functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
        model = nn.Module()
        model.features = nn.Sequential(nn.Sequential(nn.Conv2d(3, 16, 3), norm_layer(16), nn.Hardswish()))
        model.forward = model.features.forward
        return model

    return {"torchvision": {}, "torchvision.models": {"mobilenet_v3_small": mobilenet_v3_small}}


def timm():
    class BatchNormAct2d(nn.BatchNorm2d):
        def __init__(self, channels, *, act_layer, **kwargs):
            super().__init__(channels, **kwargs)
            self.act = act_layer()

        def forward(self, x):
            return self.act(super().forward(x))

    def unbound(norm_layer):
        """Accept a class, a function or a partial, of which only function and keywords are kept."""
        assert isinstance(norm_layer, (type, types.FunctionType, functools.partial))
        is_partial = isinstance(norm_layer, functools.partial)
        return (norm_layer.func, norm_layer.keywords) if is_partial else (norm_layer, {})

    def norm_act_layer(norm_layer):
        """Look for norm and activation in one by the class's name; trust a plain function to make both."""
        function, keywords = unbound(norm_layer)
        if isinstance(function, types.FunctionType):
            return functools.partial(function, **keywords)
        assert function.__name__.lower() in ("batchnorm", "batchnorm2d"), "no equivalent with an activation"
        return functools.partial(BatchNormAct2d, act_layer=nn.ReLU, **keywords)

    class ResNet(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.conv1, self.bn1, self.act1 = nn.Conv2d(3, 8, 3), norm(8), nn.ReLU()
            self.layer1 = nn.Sequential(nn.Conv2d(8, 8, 3), norm(8), nn.ReLU())
            self.grad_checkpointing = False

        def set_grad_checkpointing(self, enable=True):
            self.grad_checkpointing = enable

        def forward(self, x):
            x = self.act1(self.bn1(self.conv1(x)))
            return checkpoint(self.layer1, x, use_reentrant=False) if self.grad_checkpointing else self.layer1(x)

    def create_model(name, norm_layer=nn.BatchNorm2d):
        if name == "resnet18":
            function, keywords = unbound(norm_layer)
            return ResNet(functools.partial(function, **keywords))
        return named(stem=named(conv=nn.Conv2d(3, 8, 3), bn=norm_act_layer(norm_layer)(8)))

    return {"timm": {"create_model": create_model}}


def detectron2():
    names = {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm}

    def get_norm(norm, out_channels):
        """Look a name up; call anything else with the number of channels alone."""
        return (names[norm] if isinstance(norm, str) else norm)(out_channels)

    class Conv2d(nn.Conv2d):
        def __init__(self, *args, norm, **kwargs):
            super().__init__(*args, **kwargs)
            self.norm = norm

        def forward(self, x):
            return self.norm(super().forward(x))

    class BasicStem(nn.Module):
        def __init__(self, in_channels=3, out_channels=64, norm="BN"):
            super().__init__()
            self.conv1 = Conv2d(in_channels, out_channels, 7, norm=get_norm(norm, out_channels))

        def forward(self, x):
            return self.conv1(x).relu()

    resnet = "detectron2.modeling.backbone.resnet"
    return {
        "detectron2": {},
        "detectron2.modeling": {},
        "detectron2.modeling.backbone": {},
        resnet: {"BasicStem": BasicStem},
    }


def segmentation_models_pytorch():
    def norm_of(use_norm, channels):
        """Take a type's name, or a dictionary of one and of arguments for the layer."""
        options = dict(use_norm) if isinstance(use_norm, dict) else {"type": use_norm}
        return {"batchnorm": nn.BatchNorm2d, "identity": nn.Identity}[options.pop("type")](channels, **options)

    def unet(encoder_name, encoder_weights, decoder_use_norm="batchnorm"):
        encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        decoder = nn.Sequential(nn.Conv2d(8, 8, 3), norm_of(decoder_use_norm, 8), nn.ReLU())
        return named(encoder=encoder, decoder=decoder)

    return {"segmentation_models_pytorch": {"Unet": unet}}


def nnunetv2():
    class TrainerBN:
        def initialize(self):
            """Build the network, and convert it as on several GPUs."""
            network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(network)

    folder = "nnunetv2.training.nnUNetTrainer.variants.network_architecture"
    packages = itertools.accumulate(folder.split("."), "{}.{}".format)
    return {name: {} for name in packages} | {f"{folder}.nnUNetTrainerBN": {"nnUNetTrainerBN": TrainerBN}}


def deepspeed():
    """Its checkpoint is an autograd function of its own, which runs the function again in its backward pass."""
    return {"deepspeed": {"checkpointing": types.SimpleNamespace(checkpoint=hand_written)}}


def modules(library):
    """Give a library's stand-in as modules by name, for sys.modules."""
    made = {}
    for name, members in globals()[library]().items():
        made[name] = types.ModuleType(name)
        vars(made[name]).update(members)
    return made
