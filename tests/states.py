"""Modules that change themselves during training, times what can be done about it: the one table of what is preserved.

Each kind of state is a layer of three channels. `python tests/states.py` runs every cell and writes docs/states.md; the
tests assert every cell.
"""

import functools
import gc
import pickle
import re
import warnings
from collections import deque
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

import recipes
from conformance import compared, grid
from momentum_fix import update_once
from twins import ROUNDING, batches, by_context, drop_in, drop_in_reentrant, non_reentrant, plainly, reentrant, train

DOCUMENT = Path(__file__).parent.parent / "docs" / "states.md"
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


class OwnNoise(nn.Module):
    """Multiplies by random numbers of its own, which a checkpoint does not preserve as it does torch's."""

    def __init__(self):
        super().__init__()
        self.random = torch.Generator().manual_seed(0)

    def forward(self, x):
        return x * torch.randn(x.shape, generator=self.random)


class CountsInAnArray(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen, self.draws, self.unread = np.zeros(2), np.random.default_rng(0), np.random.RandomState(0)

    def forward(self, x):
        self.seen[0] += 1
        self.unread.random()
        return x * (self.seen[0] + self.draws.random())


class Taught(nn.Module):
    """Follows its own weights with those of a teacher, which no gradient trains and which is in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = (nn.Conv2d(CHANNELS, CHANNELS, 1) for _ in range(2))
        self.teacher.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, x):
        with torch.no_grad():
            for mine, own in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.mul_(0.5).add_(own, alpha=0.5)
            target = self.teacher(x).sigmoid()
        return self.student(x) * target


class ReplacesAParameter(nn.Module):
    """Keeps a running mean in a parameter that it makes anew, as some codebooks do."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x):
        self.mean = nn.Parameter(torch.lerp(self.mean, x.detach().mean(), 0.1), requires_grad=False)
        return x * (1 + self.mean)


class Record(dict):
    """A dictionary of somebody's own class."""


class InARecord(nn.Module):
    """Keeps its state in a dictionary of somebody's own class."""

    def __init__(self):
        super().__init__()
        self.record = Record(mean=torch.zeros(()), steps=0)

    def forward(self, x):
        self.record["steps"] += 1
        self.record["mean"].lerp_(x.detach().mean(), 0.1)
        return x * (self.record["steps"] + self.record["mean"])


class SharesMemory(nn.Module):
    """Writes to a buffer through another tensor, which is no view of it, and a complex one through its real part."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("phase", torch.zeros(2, dtype=torch.complex128))
        self.same, self.real = self.mean.detach(), self.phase.real

    def forward(self, x):
        self.same.lerp_(x.detach().mean(), 0.1)
        self.real.add_(x.detach().mean())
        return x * (1 + self.mean.sum() + self.phase.real.sum())


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
    "a generator of random numbers": OwnNoise,
    "a NumPy array": CountsInAnArray,
    "a parent moves its child's": MovesItsChild,
    "a parent reads its child's": ReadsItsChild,
    "kept in another module": KeepsItElsewhere,
    "a value in the graph": Penalized,
    "lazy normalizer": LazyNormalizer,
    "a teacher's weights": Taught,
    "a parameter that is replaced": ReplacesAParameter,
    "a dictionary of another class": InARecord,
    "shared memory": SharesMemory,
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


def _is_trained(parameter):
    return parameter is None or nn.parameter.is_lazy(parameter) or parameter.requires_grad


def picture(model, parameters=True):
    """Give everything that the modules of a model have, in an order of its own, as plain Python values."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return str(value.dtype), tuple(value.shape), value.detach().flatten().tolist()
        if isinstance(value, dict):
            return [(key, plain(item)) for key, item in value.items()]
        if isinstance(value, (list, tuple, deque)):
            return [plain(item) for item in value]
        if isinstance(value, torch.Generator):
            return value.get_state().tolist()
        if isinstance(value, (np.ndarray, np.random.Generator, np.random.RandomState)):
            return pickle.dumps(value)
        return picture(value) if isinstance(value, nn.Module) else value

    ignored = vars(nn.Module()).keys() | {"ckpt", "seen", "move", "_compiled_call_impl", "_is_torch_compile"}
    ignored |= {"forward", "_momentum_fix_wrapper"}  # what update_once puts on
    ignored.add("_compile_kwargs")  # Lightning, once imported, notes it on what is compiled
    pictures = {}
    for name, module in model.named_modules():
        own = vars(module)
        pictures[name] = {
            "buffers": plain(own["_buffers"]),
            "parameters": plain({k: p for k, p in own["_parameters"].items() if parameters or not _is_trained(p)}),
            "plain": {key: plain(value) for key, value in sorted(own.items()) if key not in ignored},
        }
    return pictures


# The columns: what can be done about it.


def unchanged(net):
    return net


TOOLS = {  # the checkpoint function, and what is done to the model before
    "nothing": (non_reentrant, unchanged),
    "nothing, reentrant": (reentrant, unchanged),
    "`update_once`": (non_reentrant, update_once),
    "`preserve_state`": (by_context, unchanged),
    "`checkpoint`": (drop_in, unchanged),
    "`checkpoint`, reentrant": (drop_in_reentrant, unchanged),
}
WAYS = [recipes.one, recipes.siamese, recipes.nested, recipes.two_backwards, recipes.accumulating(recipes.one)]
COMPILED = {
    "`checkpoint(torch.compile(block), x)`": lambda net, ckpt: functools.partial(ckpt, compiled(net)),
    "after `block.compile()`": lambda net, ckpt: functools.partial(ckpt, compiled_in_place(net)),
    "inside `torch.compile(model)`": lambda net, ckpt: compiled(lambda x: ckpt(net, x) * 1),
}
COMPILED_TOOLS = ("nothing", "`preserve_state`", "`checkpoint`")
COMPILED_KINDS = ("Batch Renormalization", "a buffer that is replaced", "step counter", "BatchNorm")


def compiled(function):
    return torch.compile(function, backend="aot_eager")


def compiled_in_place(net):
    net.compile(backend="aot_eager")
    return net


def asserted():
    """Give the first table that the tests assert: an outcome by kind of state and tool."""
    table = {}
    for kind in KINDS:
        plain = "state and gradients" if kind in READ else "state" if kind in ONLY_WRITTEN else "exact"
        reads = kind in ("Batch Renormalization", "a parent reads its child's")
        once = "gradients" if reads else "exact" if "Norm" in kind else plain
        summed = "equal" if kind.startswith("spectral norm") else "exact"
        tools = (plain, plain, once, "exact", "exact", summed)
        table[kind] = dict(zip(TOOLS, tools, strict=True))
    return table


def asserted_of_compiled():
    """Give the second table that the tests assert: an outcome by kind of state, how it is compiled, and tool."""
    both, columns = "state and gradients", [f"{how}: {tool}" for how in COMPILED for tool in COMPILED_TOOLS]
    plainly_wrong = {  # where a recomputation of compiled code stops early, what it did to plain attributes is dropped
        "Batch Renormalization": (both, both, both),
        "a buffer that is replaced": ("gradients", both, both),
        "step counter": ("gradients", both, both),
        "BatchNorm": ("state", "state", "exact"),
    }
    return {
        kind: dict.fromkeys(columns, "exact")
        | dict(zip(columns[::3], plainly_wrong[kind], strict=True))
        | ({columns[-2]: "refused"} if kind == "BatchNorm" else {})
        for kind in COMPILED_KINDS
    }


OUTCOMES = {
    "exact": "state and gradients are those of the run without checkpointing, bit for bit",
    "equal": "the same, but some gradients are equal to rounding (float64, 1e-12): their sum has another order",
    "state": "the state is wrong",
    "gradients": "the gradients are wrong",
    "refused": "an exception, of this package or of torch",
}


# Running a cell.


def gradients(net):
    return [parameter.grad for parameter in net.parameters()]


def same_gradients(net, truth, tolerance=0.0):
    pairs = list(zip(gradients(net), gradients(truth), strict=True))
    return all(
        (mine is None) == (true is None) and (mine is None or torch.allclose(mine, true, rtol=0, atol=tolerance))
        for mine, true in pairs
    )


def net_of(kind, make=recipes.Net):
    torch.manual_seed(0)
    return make(lambda _: KINDS[kind]())


def run(kind, way, ckpt, prepare=unchanged, count=3):
    net = net_of(kind)
    prepare(net)
    return train(net, way, batches(count, 4, 3, 4, 4), ckpt)


def wrong(net, truth):
    """Tell what is wrong with a net after one step: later ones would mix up state and gradients."""
    found = set()
    if picture(net, parameters=False) != picture(truth, parameters=False):
        found.add("state")
    if not same_gradients(net, truth):
        found.add("equal" if same_gradients(net, truth, ROUNDING) else "gradients")
    return found


def in_a_word(found):
    return " and ".join(sorted(found - {"equal"}, reverse=True)) or ("equal" if found else "exact")


def outcomes(kind):
    """Run the cells of a kind of state; what is wrong in any of the ways to recompute is wrong in the cell."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truths = [run(kind, way, plainly, count=1) for way in WAYS]
        for tool, how in TOOLS.items():
            pairs = zip(WAYS, truths, strict=True)
            found[tool] = in_a_word(set().union(*(wrong(run(kind, way, *how, count=1), truth) for way, truth in pairs)))
    return found


def outcomes_of_compiled(kind):
    """Run the cells of a kind of state with a block that is compiled, itself or with all around it."""
    return {
        f"{how}: {tool}": _outcome_of_compiled(kind, COMPILED[how], TOOLS[tool][0])
        for how in COMPILED
        for tool in COMPILED_TOOLS
    }


def _outcome_of_compiled(kind, how, ckpt):
    truth, net = (net_of(kind, recipes.block) for _ in range(2))
    x, y = (batches(1, 4, 3, 4, 4)[0].requires_grad_() for _ in range(2))
    truth(x).sum().backward()
    torch.compiler.reset()
    try:
        how(net, ckpt)(y).sum().backward()
    except Exception as error:
        if not re.search("use momentum_fix.checkpoint|generate a tuple of two `TorchDispatchMode`s", str(error)):
            raise
        return "refused"
    finally:
        torch.compiler.reset()
    return in_a_word(wrong(net, truth))


# What is kept.


class Block(nn.Sequential):
    """A forward of a user's own: what it reads is not known."""

    def forward(self, x):
        return super().forward(x)


class WithMask(Block):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.register_buffer("mask", torch.ones(1024, 1024, dtype=torch.bool))


BLOCKS = {
    "torch's own modules alone: convolution, BatchNorm of 256 channels": nn.Sequential,
    "the same with a forward of a user's own": Block,
    "that with a mask of 1024 by 1024": WithMask,
}


def alive_after(work):
    """Run something, and give the bytes of what tensors made since then hold while its result is alive."""
    gc.freeze()  # what is there already does not count
    try:
        result = work()
        gc.collect()
        made = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
        held = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in made}
    finally:
        gc.unfreeze()
    return result, sum(held.values())


def kept(block, *inputs, by=by_context, plain=non_reentrant):
    """Give the bytes that each live checkpoint keeps beyond those of torch's, and those that all of them share."""
    calls = [alive_after(functools.partial(ckpt, block, *inputs)) for ckpt in (plain, by, by)]
    torchs, first, later = (held for _, held in calls)
    return later - torchs, first - later


def memory():
    x = torch.rand(1, 256, 2, 2, dtype=torch.float32, requires_grad=True)
    blocks = {name: make(nn.Conv2d(256, 256, 1), nn.BatchNorm2d(256)).float() for name, make in BLOCKS.items()}
    return {name: (sum(each.nbytes for each in block.buffers()), *kept(block, x)) for name, block in blocks.items()}


# The document.


def document(table, of_compiled):
    """Write the page: the tables, and what their words mean."""
    lines = [
        "# Which state is preserved",
        "",
        "Made by `python tests/states.py`; the tests assert every cell. Each cell compares a training step in float64",
        "with the same step without checkpointing, for three blocks with one layer of that kind each. It says what is",
        "wrong in any of five ways to recompute: one checkpoint, siamese inputs, nested checkpoints, two backward",
        "passes through one graph, and gradient accumulation.",
        "",
        *(f"- **{word}**: {meaning}" for word, meaning in OUTCOMES.items()),
        "",
        *grid("kind of state", table),
        "",
        "If the output reads the state, plain checkpointing gives wrong gradients. Keeping the state right, as",
        "`update_once` does, is not enough: the recomputation has to see the state that its forward saw.",
        "",
        "## With `torch.compile`",
        "",
        "One block, the non-reentrant engine and the backend `aot_eager`. If torch compiles a checkpoint together with",
        "the model around it, it does not accept a `context_fn` like `preserve_state`. It then refuses, or it leaves",
        "the checkpoint out of the compiled code, as it does if it cannot compile what the block does to its state.",
        "`checkpoint` always stays outside.",
        "",
        *grid("kind of state", of_compiled),
        "",
        "## Memory",
        "",
        "The copies of a block's state that `preserve_state` and `checkpoint` keep, in bytes. A checkpoint lives from",
        "its forward to its backward. For a block of torch's own modules they keep nothing, because its output reads",
        "no state. A tensor above 64 KiB that does not change is kept once for all checkpoints.",
        "",
        "| block | its state | for each live checkpoint | for all checkpoints, for good |",
        "| --- | --- | --- | --- |",
        *(f"| {name} | " + " | ".join(f"{size:,}" for size in sizes) + " |" for name, sizes in memory().items()),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    tables = compared(asserted(), outcomes), compared(asserted_of_compiled(), outcomes_of_compiled)
    DOCUMENT.write_text(document(*tables), encoding="utf-8")
