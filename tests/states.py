"""Modules that change themselves in a training-mode forward: kinds of state, each as a layer of three channels."""

from collections import deque

import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

CHANNELS = 3


def channelwise(x):
    return x.movedim(1, -1).reshape(-1, CHANNELS)


class Normalizer(nn.Module):
    """Divides by statistics that it has just moved; so does what derives from it, in another place for them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("var", torch.ones(CHANNELS))

    def forward(self, x):
        rows = channelwise(x.detach())
        self.move(rows.mean(0), rows.var(0))
        return (x - self.mean[:, None, None]) / (self.var[:, None, None] + 1e-5).sqrt()

    def move(self, mean, var):
        self.mean.lerp_(mean, 0.1)
        self.var.lerp_(var, 0.1)


class Unseen(Normalizer):
    """Writes where autograd does not see it."""

    def move(self, mean, var):
        self.mean.data.lerp_(mean, 0.1)
        self.var.data.lerp_(var, 0.1)


class Replaced(Normalizer):
    def move(self, mean, var):
        self.mean, self.var = self.mean.lerp(mean, 0.1), self.var.lerp(var, 0.1)


class NonPersistent(Normalizer):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", self.mean, persistent=False)


class InADictionary(Normalizer):
    def __init__(self):
        super().__init__()
        self.kept = {"statistics": [self.mean, self.var], "moved": 0}
        del self.mean, self.var

    def move(self, mean, var):
        self.kept["moved"] += 1
        for statistic, value in zip(self.kept["statistics"], (mean, var), strict=True):
            statistic.lerp_(value, 1 / (1 + self.kept["moved"]))

    mean = property(lambda self: self.kept["statistics"][0])
    var = property(lambda self: self.kept["statistics"][1])


class Aliased(Normalizer):
    """Moves its statistics by other names, one of them a part of a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("both", torch.stack([self.mean, self.var]))
        del self._buffers["mean"], self._buffers["var"]
        self.mean, self.var = self.both
        self.again = [self.both]

    def move(self, mean, var):
        self.again[0].lerp_(torch.stack([mean, var]), 0.1)


class BatchRenorm(nn.BatchNorm2d):
    def __init__(self):
        super().__init__(CHANNELS)

    def forward(self, x):
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        std, running = (var + self.eps).sqrt(), (self.running_var + self.eps).sqrt()
        r = (std / running).detach().clamp(0.5, 2)
        d = ((mean - self.running_mean) / running).detach().clamp(-1, 1)
        with torch.no_grad():
            self.running_mean += self.momentum * (mean - self.running_mean)
            self.running_var += self.momentum * (var - self.running_var)
            self.num_batches_tracked += 1
        y = (x - mean[:, None, None]) / std[:, None, None]
        return (y * r[:, None, None] + d[:, None, None]) * self.weight[:, None, None] + self.bias[:, None, None]


class Spectral(nn.Module):
    def __init__(self, normalize):
        super().__init__()
        self.layer = normalize(nn.Conv2d(CHANNELS, CHANNELS, 1))

    def forward(self, x):
        return self.layer(x)


class Codebook(nn.Module):
    """Quantizes to the nearest code; codes are means, over batches, of what was quantized to them."""

    def __init__(self, codes=5):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("codes", torch.randn(codes, CHANNELS, generator=generator))
        self.register_buffer("sums", self.codes.clone())
        self.register_buffer("counts", torch.ones(codes))

    def forward(self, x):
        rows = channelwise(x)
        nearest = torch.cdist(rows, self.codes).argmin(1)
        code = self.codes[nearest]
        with torch.no_grad():
            chosen = nn.functional.one_hot(nearest, len(self.codes)).to(rows)
            self.counts.data.lerp_(chosen.sum(0), 0.2)
            self.sums.data.lerp_(chosen.T @ rows, 0.2)
            self.codes.data.copy_(self.sums / self.counts[:, None])
        pull = rows + 0.5 * (rows - code).tanh()
        return (pull + (code - rows).detach()).reshape(x.movedim(1, -1).shape).movedim(-1, 1)


class FakeQuantized(nn.Module):
    """Quantizes to a range that follows the batches."""

    def __init__(self):
        super().__init__()
        self.register_buffer("low", torch.tensor(float("inf")))
        self.register_buffer("high", torch.tensor(float("-inf")))

    def forward(self, x):
        low, high = x.detach().min(), x.detach().max()
        if self.low == float("inf"):
            self.low.copy_(low)
            self.high.copy_(high)
        self.low.lerp_(low, 0.1)
        self.high.lerp_(high, 0.1)
        scale = (self.high - self.low) / 15
        clamped = torch.clamp(x, self.low.clone(), self.high.clone())
        return clamped + ((clamped / scale).round() * scale - clamped).detach()


class DelayedScale(nn.Module):
    """Scales by the largest value of the batches before, as float8 recipes do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("history", torch.zeros(4))

    def forward(self, x):
        scale = self.history.max() + 1
        self.history.copy_(self.history.roll(1))
        self.history[0] = x.detach().abs().max()
        return (x / scale).tanh()


class Load(nn.Module):
    """Counts what goes to which expert; the output does not read it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("load", torch.zeros(CHANNELS))

    def forward(self, x):
        self.load += torch.bincount(channelwise(x).argmax(1), minlength=CHANNELS)
        return x


class GathersLosses(nn.Module):
    def __init__(self):
        super().__init__()
        self.losses, self.last = [], deque(maxlen=3)

    def forward(self, x):
        self.losses.append(x.square().mean().detach())
        self.last.append(float(x.detach().sum()))
        return x


class Membrane(nn.Module):
    """A spiking neuron: what it has gathered is a plain attribute, and grows with each batch."""

    def __init__(self):
        super().__init__()
        self.potential = 0.0

    def forward(self, x):
        charge = self.potential * 0.5 + x.mean(0, keepdim=True).detach()
        self.potential = charge * (charge < 1)
        return x * torch.sigmoid(charge)


class Steps(nn.Module):
    """Counts in a Python number, which the output reads."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, x):
        self.steps += 1
        return x / self.steps


class ActNorm(nn.Module):
    """Sets its parameters by the first batch."""

    def __init__(self):
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.zeros(CHANNELS)), nn.Parameter(torch.ones(CHANNELS))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x):
        if not self.ready:
            rows = channelwise(x.detach())
            self.shift.data.copy_(rows.mean(0))
            self.scale.data.copy_(1 / rows.std(0))
            self.ready.fill_(True)
        return (x - self.shift[:, None, None]) * self.scale[:, None, None]


class MovesItsChild(nn.Module):
    """Moves a child's statistics before it calls the child, which reads them."""

    def __init__(self):
        super().__init__()
        self.child = Normalizer()
        self.child.move = lambda *_: None

    def forward(self, x):
        rows = channelwise(x.detach())
        Normalizer.move(self.child, rows.mean(0), rows.var(0))
        return self.child(x)


class ReadsItsChild(nn.Module):
    """Renormalizes by statistics that torch's own layer keeps."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x):
        mean = self.norm.running_mean.clone()
        return self.norm(x) + mean[:, None, None] * x


class KeepsItElsewhere(nn.Module):
    """Moves and reads what it has put on a module that is no part of it, and is not called."""

    def __init__(self):
        super().__init__()
        self.store = [Normalizer()]

    def forward(self, x):
        return self.store[0].forward(x)


class Penalized(nn.Module):
    """Leaves a value that is part of the graph on itself, and reads it."""

    def forward(self, x):
        before = torch.as_tensor(getattr(self, "penalty", 0.0)).detach()
        self.penalty = x.square().mean().tanh()
        return x * (1 + self.penalty + before)


class LazyNormalizer(nn.modules.lazy.LazyModuleMixin, Normalizer):
    cls_to_become = Normalizer

    def __init__(self):
        super().__init__()
        self.mean, self.var = nn.UninitializedBuffer(), nn.UninitializedBuffer()

    def initialize_parameters(self, x):
        if self.has_uninitialized_params():
            for buffer, value in ((self.mean, 0.5), (self.var, 2.0)):
                buffer.materialize((x.shape[1],))
                buffer.fill_(value)


# What a module's output reads has wrong gradients under plain checkpointing; the rest is moved twice, no more.
READ = {
    "running normalizer": Normalizer,
    "written unseen by autograd": Unseen,
    "a buffer that is replaced": Replaced,
    "a non-persistent buffer": NonPersistent,
    "a dictionary of lists of tensors": InADictionary,
    "aliases": Aliased,
    "Batch Renormalization": BatchRenorm,
    "spectral norm, hook": lambda: Spectral(spectral_norm),
    "spectral norm, parametrization": lambda: Spectral(parametrizations.spectral_norm),
    "codebook": Codebook,
    "fake quantization": FakeQuantized,
    "delayed scale": DelayedScale,
    "membrane potential": Membrane,
    "step counter": Steps,
    "a parent moves its child's": MovesItsChild,
    "a parent reads its child's": ReadsItsChild,
    "kept in another module": KeepsItElsewhere,
    "a value in the graph": Penalized,
    "lazy normalizer": LazyNormalizer,
}
ONLY_WRITTEN = {
    "BatchNorm": lambda: nn.BatchNorm2d(CHANNELS),
    "InstanceNorm": lambda: nn.InstanceNorm2d(CHANNELS, track_running_stats=True),
    "cumulative BatchNorm": lambda: nn.BatchNorm2d(CHANNELS, momentum=None),
    "lazy BatchNorm": lambda: nn.LazyBatchNorm2d(),
    "load counter": Load,
    "gathered losses": GathersLosses,
}
UNHARMED = {"ActNorm": ActNorm}
KINDS = {**READ, **ONLY_WRITTEN, **UNHARMED}


def picture(model):
    """Give everything that the modules of a model have, in an order of its own, as plain Python values."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return str(value.dtype), tuple(value.shape), value.detach().flatten().tolist()
        if isinstance(value, dict):
            return [(key, plain(item)) for key, item in value.items()]
        if isinstance(value, (list, tuple, deque)):
            return [plain(item) for item in value]
        return picture(value) if isinstance(value, nn.Module) else value

    ignored = vars(nn.Module()).keys() | {"ckpt", "seen", "move", "comp", "_compiled_call_impl", "_is_torch_compile"}
    pictures = {}
    for name, module in model.named_modules():
        own = vars(module)
        pictures[name] = {
            "buffers": plain(own["_buffers"]),
            "parameters": plain(own["_parameters"]),
            "plain": {key: plain(value) for key, value in sorted(own.items()) if key not in ignored},
        }
    return pictures
