"""Scenes: causes that make a recomputation differ from its forward pass or move state, and some that do not.

A scene is a block and a step. Each step runs once with a checkpoint, under `diagnose`, and once without: the twin,
which tells whether gradients and state are right.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import itertools
import random
import types
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import momentum_fix
from momentum_fix import diagnose, preserve_state, update_once
from recipes import Kink
from twins import ROUNDING, plainly

WIDTH = 5


def non_reentrant(function, *args, **kwargs):
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


def reentrant(function, *args, **kwargs):
    return checkpoint(function, *args, use_reentrant=True, **kwargs)


def preserving(function, *args, **kwargs):
    return non_reentrant(function, *args, context_fn=preserve_state, **kwargs)


def preserving_reentrant(function, *args, **kwargs):
    return momentum_fix.checkpoint(function, *args, use_reentrant=True, **kwargs)


ENGINES = {"non-reentrant": (non_reentrant, preserving), "reentrant": (reentrant, preserving_reentrant)}


@dataclass
class Scene:
    """What the twin says of a plain checkpoint, and whether `preserve_state` makes it right."""

    block: Callable[[], nn.Module]
    gradients: bool  # whether they are right
    state: bool = True  # whether state is
    preserved: bool = True  # whether both are with preserve_state
    use: str = "preserve_state"  # what the report recommends where gradients are wrong
    step: Callable | None = None
    options: dict = field(default_factory=dict)  # of the checkpoint
    prepare: Callable = lambda net: None
    engines: tuple[str, ...] = tuple(ENGINES)
    fine: bool | None = None  # whether the report is "ok", if that is not just whether both are right


class Own(nn.Module):
    """A layer that scales by a number of its own."""

    def scale(self):
        raise NotImplementedError

    def forward(self, x):
        return x * self.scale()


def own(scale, **attributes):
    """Give a class of layers that have these attributes, and whose scale is given by a function of the layer."""

    def make():
        layer = type("Layer", (Own,), {"scale": scale})()
        for name, value in attributes.items():
            value = copy.deepcopy(value)
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                layer.register_buffer(name, value)
            else:
                setattr(layer, name, value)
        return layer

    return make


def counted(self):
    self.steps += 1
    return self.steps


def unread(self):
    self.steps += 1
    return 2


def in_a_list(self):
    self.steps.append(1)
    return len(self.steps)


def of_generator(self):
    return float(self.draws.random()) + 0.5


def of_torchs_generator(self):
    return float(torch.rand((), generator=self.draws)) + 0.5


class Mode(enum.Enum):
    ONE = 1
    TWO = 2


def toggled(self):
    self.mode = Mode.TWO if self.mode is Mode.ONE else Mode.ONE
    return self.mode.value


def of_scalar(self):
    self.steps = np.float64(self.steps + 1)
    return float(self.steps)


def in_an_array(self):
    self.steps[0] += 1
    return float(self.steps[0])


def of_object(self):
    self.tracker.steps += 1
    return self.tracker.steps


def of_data(self):
    self.steps.data += 1
    return self.steps


def of_class(self):
    type(self).total = getattr(type(self), "total", 0) + 1
    return type(self).total


GLOBAL = {"steps": 0}


def of_global(_):
    GLOBAL["steps"] += 1
    return GLOBAL["steps"]


class Closure(nn.Module):
    def __init__(self):
        super().__init__()
        steps = 0

        def count():
            nonlocal steps
            steps += 1
            return steps

        self.count = count

    def forward(self, x):
        return x * self.count()

    def __deepcopy__(self, _):
        return Closure()


class Weak(nn.Module):
    """Reaches a module by a weak reference."""

    def __init__(self):
        super().__init__()
        self.keeper = [Counter()]
        self.it = weakref.ref(self.keeper[0])

    def forward(self, x):
        self.it().steps += 1
        return x * self.it().steps

    def __deepcopy__(self, _):
        return Weak()


class Counter(nn.Module):
    steps = 0


class Slots:
    __slots__ = ("steps",)

    def __init__(self):
        self.steps = 0


class Hashed(nn.Module):
    """A module whose hash follows its state, as a metric's does."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def __hash__(self):
        return hash(self.steps)

    def __eq__(self, other):
        return type(other) is type(self) and self.steps == other.steps

    def forward(self, x):
        self.steps += 1
        return x * self.steps


class Twice(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(self.layer(x).tanh())


class Reader(nn.Module):
    """Reads its child's running statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return self.norm(x) * (1 + self.norm.running_mean)


class Teacher(nn.Module):
    """Moves frozen weights and reads them."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, WIDTH), requires_grad=False)

    def forward(self, x):
        with torch.no_grad():
            self.weight *= 1.5
        return x * self.weight.mean()


class Hidden(nn.Module):
    """Adds something of which gradients are zero in the input, and not in the factor."""

    def __init__(self):
        super().__init__()
        self.factor, self.steps = nn.Parameter(torch.zeros(())), 0

    def forward(self, x):
        self.steps += 1
        return x + self.factor * torch.tanh(x * self.steps)


class Shift(nn.Module):
    """Subtracts what moves, on which no gradient depends."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x):
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


class FromNorm(nn.BatchNorm1d):
    """Reads the statistics that it moves."""

    def __init__(self):
        super().__init__(WIDTH)

    def forward(self, x):
        return super().forward(x) / (1 + self.running_var.clone())


class ByHand(nn.Module):
    """Calls torch's function on statistics of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(WIDTH))
        self.register_buffer("running_var", torch.ones(WIDTH))

    def forward(self, x):
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, training=True)


class Noise(nn.Module):
    """Adds noise of a relative size, another one each time, as a kernel does that is not deterministic."""

    def __init__(self, size):
        super().__init__()
        self.size, self.noise = size, [torch.Generator().manual_seed(0)]

    def forward(self, x):
        noise = torch.randn(x.shape, generator=NOISE)
        return x * (1 + self.size * noise)


NOISE = torch.Generator()


class Adapters(nn.Module):
    """Uses the one of two layers that was chosen from outside."""

    def __init__(self, kind=lambda: nn.Linear(WIDTH, WIDTH)):
        super().__init__()
        self.layers, self.active = nn.ModuleList([kind(), kind()]), 0

    def forward(self, x):
        return self.layers[self.active](x)


class Power(nn.Module):
    """Gives an operation a number that it counts up."""

    def __init__(self, operation):
        super().__init__()
        self.operation, self.steps = operation, 0

    def forward(self, x):
        self.steps += 1
        return self.operation(x, self.steps)


def concatenated(x, n):
    return torch.cat([x.sin(), x.cos()][:: 1 if n % 2 else -1], 1)[:, :WIDTH]


def subtracted(x, n):
    one, other = x.sin(), x.cos()
    return one - other if n % 2 else other - one


def negated_once(x, n):
    return -x.sin() if n == 1 else x.sin()


def written_in_another_row(x, n):
    y = x.sin()
    y[n % 2] = x.cos()[0]
    return y


def taken_apart(x, n):
    return torch.stack(x.sin().unbind(1)[:: 1 if n % 2 else -1], 1)


def detached(x, n):
    return (x.sin() if n % 2 else x.sin().detach()) + x


WIRED = (concatenated, subtracted, negated_once, written_in_another_row, taken_apart, detached)
WIRINGS = {each.__name__: each for each in WIRED}


class Either(nn.Module):
    """Adds two parameters in turn."""

    def __init__(self):
        super().__init__()
        self.biases, self.steps = nn.ParameterList([torch.zeros(WIDTH), torch.zeros(WIDTH)]), 0

    def forward(self, x):
        self.steps += 1
        return x.sin() + self.biases[self.steps % 2]


class Frozen(nn.Module):
    """Trains a parameter in every second call."""

    def __init__(self):
        super().__init__()
        self.bias, self.steps = nn.Parameter(torch.zeros(WIDTH)), 0

    def forward(self, x):
        self.steps += 1
        self.bias.requires_grad_(self.steps % 2 == 1)
        return x.sin() + self.bias


class OwnLoss(nn.Module):
    """Has a loss of its own, with a backward pass of its own."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        with torch.enable_grad():
            self.head(x.detach()).square().mean().backward()
        return x.sin()


class Images(nn.Module):
    """Runs a layer on two channels."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.unflatten(0, (-1, 2))).flatten(0, 1)


class SparseTensor:
    def __init__(self, features):
        self.features = features


class Sparse(nn.Module):
    """Gives an object of a class of its own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return SparseTensor(self.norm(x))


class Features(nn.Module):
    def forward(self, x):
        return x.features


class Counts(nn.Module):
    """Counts its calls, and computes what may depend on that."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(WIDTH, WIDTH), 0

    def forward(self, x):
        self.seen += 1
        return self.compute(self.layer(x), self.seen)

    def compute(self, x, n):
        return x.sin()


class LastDigits(nn.Module):
    """Stands for a kernel whose last digits are not always the same."""

    def __init__(self):
        super().__init__()
        self.__dict__["numbers"] = itertools.count()  # of a class that nobody looks into

    def forward(self, x):
        return x.sin() * torch.tensor(1 + next(self.numbers) * 2.0**-50, dtype=x.dtype)


class Net(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.stem = nn.Linear(4, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), block, Kink(), nn.Linear(WIDTH, WIDTH), Kink())


def data(count=2):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(6, 4, generator=generator) for _ in range(count)]


# Steps.


def once(net, ckpt):
    ckpt(net.body, net.stem(data()[0])).square().mean().backward()


def siamese(net, ckpt):
    outputs = [ckpt(net.body, net.stem(x)) for x in data()]
    sum(y.square().mean() for y in outputs).backward()


def chosen_between(net, ckpt):
    loss = 0
    for active, x in enumerate(data()):
        net.body[1].active = active
        loss = loss + ckpt(net.body, net.stem(x)).square().mean()
    loss.backward()


def by_a_lambda(net, ckpt):
    ckpt(lambda y: net.body(y) * 2, net.stem(data()[0])).square().mean().backward()


def weights_moved_between(net, ckpt):
    y = ckpt(net.body, net.stem(data()[0]))
    kept = [parameter.detach().clone() for parameter in net.body.parameters()]
    for parameter in net.body.parameters():
        parameter.data = parameter.data * 1.5
    y.square().mean().backward()
    for parameter, value in zip(net.body.parameters(), kept, strict=True):
        parameter.data = value


def functionally(net, ckpt):
    net.ckpt = ckpt
    weights = {f"body.{name}": each.detach().clone().requires_grad_() for name, each in net.body.named_parameters()}
    weights = {name: each * 1.5 for name, each in weights.items()}

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net.body

        def forward(self, y):
            return ckpt(self.body, y)

    torch.func.functional_call(Whole(), weights, (net.stem(data()[0]),)).square().mean().backward()


def input_changed(net, ckpt):
    x = net.stem(data()[0]).detach().requires_grad_()
    y = ckpt(net.body, x)
    with torch.no_grad():
        kept = x.clone()
    x.data.mul_(3)
    (y.square().mean()).backward()
    x.data.copy_(kept)


def cache_filled(net, ckpt):
    cache = []

    def run(y, cache):
        cache.append(1)
        return net.body(y * len(cache))

    ckpt(run, net.stem(data()[0]), cache).square().mean().backward()


def cache_returned(net, ckpt):
    cache = []

    def run(y, cache):
        return net.body(y * (1 + len(cache))), 1

    y, new = ckpt(run, net.stem(data()[0]), tuple(cache))
    cache.append(new)
    y.square().mean().backward()


def hooked_in_the_forward(net, ckpt):
    handle = net.body[0].register_forward_hook(lambda *given: given[-1] * 2)
    y = ckpt(net.body, net.stem(data()[0]))
    handle.remove()
    y.square().mean().backward()


@contextlib.contextmanager
def tripled():
    GLOBAL["factor"] = 3
    yield
    del GLOBAL["factor"]


def context_of_the_forward(net, ckpt):
    with tripled():
        y = ckpt(net.body, net.stem(data()[0]))
    y.square().mean().backward()


def context_of_both(net, ckpt):
    with tripled():
        ckpt(net.body, net.stem(data()[0])).square().mean().backward()


def in_two_modes(net, ckpt):
    net.body.eval()
    y = ckpt(net.body, net.stem(data()[0]))
    net.body.train()
    y.square().mean().backward()


def under_autocast(net, ckpt):
    net.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = ckpt(net.body, net.stem(data()[0].float()))
    y.float().square().mean().backward()


def linearly(net, ckpt):
    net.body[2:](ckpt(lambda y: net.body[1](net.body[0](y)), net.stem(data()[0]))).square().mean().backward()


def from_data(net, ckpt):
    net.body(ckpt(net.stem, data()[0])).square().mean().backward()


def nested(net, ckpt):
    def inner(y):
        return ckpt(net.body[1], net.body[0](y))

    net.body[2:](ckpt(lambda y: net.body[2](inner(y)), net.stem(data()[0]))).square().mean().backward()


def twice_backward(net, ckpt):
    y = ckpt(net.body, net.stem(data()[0])).square().mean()
    y.backward(retain_graph=True)
    y.backward()


def own_class(net, ckpt):
    y = ckpt(net.body[:2], net.stem(data()[0])).features
    net.body[3](y).square().mean().backward()


STEPS_OF_BATCHNORM = {"once": once, "siamese": siamese, "a lambda": by_a_lambda, "two backwards": twice_backward}


def norm():
    return nn.BatchNorm1d(WIDTH)


def apart():
    """Give a norm that is not equal to the one made before."""
    layer = norm()
    nn.init.normal_(layer.weight)
    return layer


SCENES = {
    "nothing that changes": Scene(nn.Tanh, True),
    **{f"BatchNorm, {name}": Scene(norm, True, False, step=step) for name, step in STEPS_OF_BATCHNORM.items()},
    "BatchNorm, update_once": Scene(norm, True, prepare=lambda net: update_once(net)),
    "BatchNorm, nested": Scene(norm, True, False, step=nested),
    "batch_norm by hand": Scene(ByHand, True, False),
    "a norm that reads its statistics": Scene(FromNorm, False, False),
    "a parent that reads them": Scene(Reader, False, False, use="preserve_state, if the statistics of body.1.norm"),
    "an object of a class of its own": Scene(Sparse, True, False, step=own_class, engines=("non-reentrant",)),
    "a buffer that is read": Scene(own(counted, steps=torch.tensor(0.0)), False, False),
    "a buffer that is not read": Scene(own(unread, steps=torch.tensor(0.0)), True, False),
    "a buffer written unseen": Scene(own(of_data, steps=torch.tensor(0.0)), False, False),
    "a number that is read": Scene(own(counted, steps=0), False, False),
    "a number that is not read": Scene(own(unread, steps=0), True, False),
    "a number, siamese": Scene(own(counted, steps=0), False, False, step=siamese),
    "a list": Scene(own(in_a_list, steps=[]), False, False),
    "a deque": Scene(own(in_a_list, steps=deque()), False, False),
    "a NumPy array": Scene(own(in_an_array, steps=np.zeros(1)), False, False),
    "a NumPy scalar": Scene(own(of_scalar, steps=np.float64(0)), False, False),
    "an enum": Scene(own(toggled, mode=Mode.ONE), False, False),
    "a generator of NumPy's": Scene(own(of_generator, draws=np.random.default_rng(0)), False, False),
    "a hash that follows the state": Scene(lambda: Twice(Hashed()), False, False),
    "spectral norm": Scene(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)), False, False),
    "a small frozen parameter": Scene(lambda: Teacher(1), False, False),
    "a large frozen parameter": Scene(lambda: Teacher(4000), False, False, preserved=False, use="a buffer"),
    "an object of one's own": Scene(
        own(of_object, tracker=types.SimpleNamespace(steps=0)),
        False,
        preserved=False,
        use="make what the function reads from elsewhere",
    ),
    "an object with slots": Scene(
        own(of_object, tracker=Slots()), False, preserved=False, use="make what the function reads from elsewhere"
    ),
    "an attribute of the class": Scene(
        own(of_class), False, preserved=False, use="make what the function reads from elsewhere"
    ),
    "a global": Scene(own(of_global), False, preserved=False, use="make what the function reads from elsewhere"),
    "a closure": Scene(Closure, False, preserved=False, use="make what the function reads from elsewhere"),
    "a weak reference": Scene(Weak, False, False),
    "dropout": Scene(lambda: nn.Dropout(0.4), True),
    "dropout whose random numbers are not kept": Scene(
        lambda: nn.Dropout(0.4),
        False,
        preserved=False,
        options={"preserve_rng_state": False},
        use="preserve_rng_state=True",
    ),
    "random numbers of Python": Scene(
        own(lambda _: random.random() + 0.5), False, preserved=False, use="torch's random numbers instead of Python's"
    ),
    "random numbers of NumPy": Scene(
        own(lambda _: float(np.random.rand()) + 0.5),
        False,
        preserved=False,
        use="torch's random numbers instead of NumPy's",
    ),
    "a generator of torch's": Scene(own(of_torchs_generator, draws=torch.Generator()), False, False),
    "set between two forwards": Scene(Adapters, False, step=chosen_between),
    "a norm chosen between two forwards": Scene(lambda: Adapters(apart), False, False, step=chosen_between),
    "weights moved between": Scene(
        nn.Tanh, False, preserved=False, step=weights_moved_between, use="the same weights in backward"
    ),
    "other weights by functional_call": Scene(
        nn.Tanh, False, preserved=False, step=functionally, use="the same weights in backward"
    ),
    "an argument that changes": Scene(
        nn.Tanh, False, preserved=False, step=cache_filled, use="make what the function reads from elsewhere"
    ),
    "an input that changes": Scene(
        nn.Tanh, False, preserved=False, step=input_changed, use="make what the function reads from elsewhere"
    ),
    "a hook of the forward alone": Scene(nn.Tanh, False, step=hooked_in_the_forward),
    "a difference that hides in the output": Scene(Hidden, False, False),
    "a shift that no gradient depends on": Scene(Shift, True, True, step=linearly, engines=("non-reentrant",)),
    "a shift that no gradient depends on, moved again": Scene(
        Shift, True, False, step=linearly, engines=("reentrant",)
    ),
    "a power that changes": Scene(lambda: Power(lambda x, n: torch.special.expit(x) ** n), False, False),
    "a slope that changes": Scene(lambda: Power(lambda x, n: nn.functional.leaky_relu(x, 0.1 * n)), False, False),
    "a slice that moves": Scene(lambda: Power(lambda x, n: x.roll(n, 1) + x[:, n : n + 1]), False, False),
    "a lazy module and a dropout": Scene(
        lambda: nn.Sequential(nn.LazyLinear(WIDTH), nn.Dropout(0.4)),
        False,
        preserved=False,
        use="one batch under torch.no_grad() before training",
    ),
    "RReLU, whose slopes are saved before they are drawn": Scene(nn.RReLU, True),
    "a backward pass of its own": Scene(
        OwnLoss, False, preserved=False, use="a backward pass outside of the checkpoint", engines=("non-reentrant",)
    ),
    "a backward pass of its own, last": Scene(
        OwnLoss, False, preserved=False, step=linearly, use="a backward pass outside of the checkpoint"
    ),
    "an input without gradients, non-reentrant": Scene(nn.Tanh, True, step=from_data, engines=("non-reentrant",)),
    # What is saved is the same. Under the reentrant engine, the graph is that of the recomputation, wiring included.
    **{
        f"another wiring: {name}, {engine}": Scene(
            made, engine == "non-reentrant", False, step=linearly, engines=(engine,)
        )
        for engine in ENGINES
        for name, made in {
            **{each: functools.partial(Power, f) for each, f in WIRINGS.items()},
            "either": Either,
            "frozen": Frozen,
        }.items()
    },
    "cumulative BatchNorm": Scene(lambda: nn.BatchNorm1d(WIDTH, momentum=None), True, False, fine=True),
    "InstanceNorm": Scene(lambda: Images(nn.InstanceNorm1d(2, track_running_stats=True)), True, False),
    "a copy of what changes as the argument": Scene(nn.Tanh, True, step=cache_returned),
    "a context of both passes": Scene(own(lambda _: GLOBAL.get("factor", 1)), True, step=context_of_both),
    "a context of the forward alone": Scene(
        own(lambda _: GLOBAL.get("factor", 1)),
        False,
        preserved=False,
        step=context_of_the_forward,
        use="make what the function reads from elsewhere",
    ),
    "another mode in backward": Scene(
        own(lambda layer: 1 + layer.training),
        False,
        preserved=False,
        step=in_two_modes,
        use="the same mode in backward",
    ),
    "autocast in the forward alone": Scene(nn.Tanh, True, step=under_autocast),
    "noise of rounding": Scene(lambda: Noise(1e-16), True, preserved=True),
    "noise that is larger": Scene(
        lambda: Noise(1e-3), False, preserved=False, use="make what the function reads from elsewhere"
    ),
}


def seed():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    NOISE.manual_seed(1)
    GLOBAL["steps"] = 0


def made(scene):
    torch.manual_seed(0)
    return Net(scene.block())


def run(scene, ckpt, watched=False):
    """Run the step of a scene on a new net; give the net, and the report if it is watched."""
    net = made(scene)
    for module in net.modules():
        if "total" in vars(type(module)):
            del type(module).total
    if ckpt is not plainly:
        scene.prepare(net)
    seed()
    step = scene.step or once

    def engine(function, *args):
        return ckpt(function, *args, **({} if ckpt is plainly else scene.options))

    if not watched:
        step(net, engine)
        return net, None
    with diagnose(net) as report:
        step(net, engine)
    return net, report


def plain_state(net):
    """Give what is on the modules of a net: buffers, numbers and containers, frozen parameters."""
    from momentum_fix.state.compare import mark
    from momentum_fix.state.snapshot import pieces

    def kept(module):
        state = pieces(module).items()
        return {name: value for name, value in state if not getattr(value, "requires_grad", isinstance(value, type))}

    listed = [each for module in net.modules() for each in vars(module).get("keeper", ())]
    state = [{name: mark(value) for name, value in kept(module).items()} for module in [*net.modules(), *listed]]
    return [
        {
            name: value
            for name, value in each.items()
            if name not in ("forward", "count", "it", "ckpt", "keeper", "operation") and "momentum_fix" not in name
        }
        for each in state
    ]


def same_gradients(net, truth):
    """Tell whether gradients are equal but for the order of a sum."""
    pairs = zip(net.parameters(), truth.parameters(), strict=True)
    return all(
        (mine.grad is None) == (true.grad is None)
        and (
            mine.grad is None
            or torch.allclose(mine.grad, true.grad, rtol=ROUNDING, atol=ROUNDING * float(true.grad.abs().max()))
        )
        for mine, true in pairs
    )
