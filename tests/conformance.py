"""Ways in which people recompute, times what can be done about it: the one table of what is right.

`python tests/conformance.py` runs every cell and prints the table as Markdown; docs/conformance.md is its output.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from momentum_fix import calibrate, correct, update_once
from twins import (
    batches,
    counters,
    deviation,
    non_reentrant,
    pipeline,
    plainly,
    reentrant,
    same_path,
    siamese,
    statistics,
    train,
    twice_in_a_region,
)

ROUNDING = 1e-12  # relative, in float64
STEPS, MIDWAY = 6, 3


class Kink(nn.Module):
    """Something that backward needs, so that a replay does not stop early before it."""

    def forward(self, x):
        return x.tanh() + x / 2


def block(norm):
    return nn.Sequential(nn.Conv2d(3, 3, 1), norm(3), Kink())


class Net(nn.Module):
    """Three blocks in a row; a recipe says how they are run, `ckpt` with what."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.a, self.b, self.c = block(norm), block(norm), block(norm)
        self.seen = 0
        self.ckpt = plainly

    def forward(self, x):
        return self.ckpt(lambda y: self.c(self.b(self.a(y))), x)


# One training step each: forward and backward. The truth is the same step with `plainly` in place of a checkpoint.


def one(net, x, ckpt):
    ckpt(net, x.requires_grad_()).sum().backward()


def inside_the_model(net, x, ckpt):
    getattr(net, "module", net).ckpt = ckpt
    net(x).sum().backward()


def forward_only_no_grad(net, x, ckpt):
    one(net, x, ckpt)
    with torch.no_grad():
        ckpt(net, x.detach() + 1)


def forward_only(net, x, ckpt):
    one(net, x, ckpt)
    ckpt(net, x.detach().requires_grad_() + 1)


def two_backwards(net, x, ckpt):
    loss = ckpt(net, x.requires_grad_()).sum()
    loss.backward(retain_graph=True)
    loss.backward()


def gradient_penalty(net, x, ckpt):
    loss = ckpt(net, x.requires_grad_()).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + gradient.square().sum()).backward()


def autograd_grad(net, x, ckpt):
    parameters = list(net.parameters())
    gradients = torch.autograd.grad(ckpt(net, x.requires_grad_()).sum(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def nested(net, x, ckpt):
    ckpt(lambda y: net.c(ckpt(net.b, net.a(y))), x.requires_grad_()).sum().backward()


def nested_directly(net, x, ckpt):
    ckpt(lambda y: ckpt(net, y), x.requires_grad_()).sum().backward()


def never_stopping_early(net, x, ckpt):
    with set_checkpoint_early_stop(False):
        nested_directly(net, x, ckpt)


def debugging(net, x, ckpt):
    one(net, x, ckpt if ckpt is plainly else functools.partial(ckpt, debug=True))


def sequential(net, x, ckpt):
    x.requires_grad_()
    if ckpt is not plainly:
        x = checkpoint_sequential([net.a, net.b, net.c], 3, x, use_reentrant=ckpt is reentrant)
    (net(x) if ckpt is plainly else x).sum().backward()


def frozen(net, x, ckpt):
    net.a.requires_grad_(False)
    ckpt(net.c, ckpt(net.b, ckpt(net.a, x))).sum().backward()


def ending_in_a_norm(net, x, ckpt):
    ckpt(lambda y: net.c[1](net.b(net.a(y))), x.requires_grad_()).sum().backward()


def accumulation(net, x, ckpt):
    for micro in x.split(2):
        one(net, micro.detach(), ckpt)


def switched_off_midway(net, x, ckpt):
    one(net, x, ckpt if net.seen < MIDWAY else plainly)


def momentum_schedule(net, x, ckpt):
    if net.seen == MIDWAY:
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 0.02
    one(net, x, ckpt)


def evaluated_in_between(net, x, ckpt):
    one(net, x, ckpt)
    net.eval()
    ckpt(net, x.detach().requires_grad_())  # without backward: in evaluation mode gradients do depend on the statistics
    net.train()


class StoppedError(Exception):
    """Raised on purpose."""


def failing_forward(net, x, ckpt):
    def fails(y):
        net.a(y)
        raise StoppedError

    with contextlib.suppress(StoppedError):
        ckpt(fails, 2 * x.detach().requires_grad_())
    one(net, x, ckpt)


def failing_recomputation(net, x, ckpt):
    runs = []

    def fails_in_the_replay(y):
        runs.append(y)
        y = net.a(y)
        if len(runs) > 1:
            raise StoppedError
        return net.c(net.b(y))

    with contextlib.suppress(StoppedError):
        loss = ckpt(fails_in_the_replay, 2 * x.detach().requires_grad_()).sum()
        if ckpt is not plainly:
            loss.backward()
    net.zero_grad()
    one(net, x.detach(), ckpt)


class HandWritten(torch.autograd.Function):
    """Recomputation as a memory-saving layer writes it for itself."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        torch.autograd.backward(y, gradient)
        return None, x.grad


def hand_written(function, x):
    return HandWritten.apply(function, x)


def compiled_whole(backend):
    def step(net, x, ckpt):
        forward = torch.compile(lambda y: ckpt(net, y), backend=backend, fullgraph=True)
        forward(x.requires_grad_()).sum().backward()

    return step


def compiled_block(backend):
    def step(net, x, ckpt):
        ckpt(torch.compile(net, backend=backend, fullgraph=True), x.requires_grad_()).sum().backward()

    return step


def wrapped(net, x, ckpt):
    x.requires_grad_()
    for part in (net.a, net.b, net.c):
        x = part(x) if ckpt is plainly else checkpoint_wrapper(part, CheckpointImpl.NO_REENTRANT)(x)
    x.sum().backward()


def selective(policy_for_norm):
    norms = {torch.ops.aten.native_batch_norm.default, torch.ops.aten.cudnn_batch_norm.default}

    def policy(_, operation, *args, **kwargs):
        return policy_for_norm if operation in norms else CheckpointPolicy.PREFER_RECOMPUTE

    context = functools.partial(create_selective_checkpoint_contexts, policy)

    def step(net, x, ckpt):
        one(net, x, ckpt if ckpt is plainly else functools.partial(ckpt, context_fn=context))

    return step


def forward_in_a_backward_hook(net, x, ckpt):
    y = ckpt(net, x.requires_grad_())
    y.register_hook(lambda _: net(x.detach() + 1) * 0 + 1)
    y.sum().backward()


def saved_tensors_read_by_hand(net, x, ckpt):
    y = ckpt(net, x.requires_grad_()).sin()
    _ = y.grad_fn._saved_self  # of sin, whose input the checkpoint made: nothing is recomputed for this
    if ckpt is not plainly:
        _ = y.grad_fn.next_functions[0][0].next_functions[0][0]._saved_result
    y.sum().backward()


def unchanged(net):
    return net


def converted(net):
    return nn.SyncBatchNorm.convert_sync_batchnorm(net)


def pickled(net):
    return pickle.loads(pickle.dumps(net))


# What can be done about it. A method is given the model before training and says how it is to be trained.


def go(net, row, data, ckpt):
    for x in data:
        if net.seen == MIDWAY:
            net = row.midway(net)
        train(net, row.step, [x.clone()], ckpt)
        net.seen += 1
    return net


def nothing(net, row, data):
    return go(net, row, data, row.ckpt)


def by_root(net, row, data):
    return go(correct(net, row.passes), row, data, row.ckpt)


def by_calibration(net, row, data):
    with calibrate(net):
        net = go(net, row, data[:1], row.ckpt)
    return go(net, row, data[1:], row.ckpt)


def by_update_once(net, row, data):
    update_once(net)
    return go(net, row, data, row.ckpt)


def recomputing(*_):
    return torch._C._current_graph_task_id() != -1


def norms(net):
    return [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]


def save_statistics(layer, _):
    if recomputing():
        layer.saved = {name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)}


def put_statistics_back(layer, *_):
    if recomputing():
        for name, buffer in layer.named_buffers(recurse=False):
            buffer.data.copy_(layer.saved[name])


def flag_with_saved_statistics(net, row, data):
    """The thread's flag: in a backward pass, save the statistics before the layer and copy them back after it."""
    for layer in norms(net):
        layer.register_forward_pre_hook(save_statistics)
        layer.register_forward_hook(put_statistics_back)
    return go(net, row, data, row.ckpt)


def lay_stand_ins(layer, _):
    if recomputing():
        layer.own = dict(layer.named_buffers(recurse=False))
        for name, buffer in layer.own.items():
            setattr(layer, name, buffer.clone())


def take_stand_ins_away(layer, *_):
    if recomputing():
        for name, buffer in layer.own.items():
            setattr(layer, name, buffer)


def stand_in_buffers(net, row, data):
    """The layer gets other buffers before a recomputation and its own ones after it."""
    for layer in norms(net):
        layer.register_forward_pre_hook(lay_stand_ins)
        layer.register_forward_hook(take_stand_ins_away)
    return go(net, row, data, row.ckpt)


def track_with_grad(layer, _):
    layer.track_running_stats = torch.is_grad_enabled()


def track_always(layer, *_):
    layer.track_running_stats = True


def only_in_the_backward_pass(net, row, data):
    """Statistics are tracked where gradients are: of a reentrant checkpoint, in the recomputation alone."""
    for layer in norms(net):
        layer.register_forward_pre_hook(track_with_grad)
        layer.register_forward_hook(track_always)
    return go(net, row, data, row.ckpt)


METHODS: dict[str, Callable] = {
    "nothing": nothing,
    "`correct`": by_root,
    "`calibrate`": by_calibration,
    "`update_once`": by_update_once,
    "flag, saved statistics": flag_with_saved_statistics,
    "stand-in buffers": stand_in_buffers,
    "only in backward": only_in_the_backward_pass,
}
OUTCOMES = {
    "exact": "running_mean, running_var and num_batches_tracked are those of the uncheckpointed run, bit for bit",
    "equal": "running_mean and running_var are equal to rounding (float64, 1e-12); num_batches_tracked counts passes",
    "decay": "the old value keeps the right weight, the batches share the rest differently",
    "wrong": "neither",
    "fails": "an exception",
    "(said)": "and a warning of momentum_fix says so",
}


@dataclass(frozen=True)
class Row:
    """One way to recompute: a step, an engine, the passes that `correct` is told, and what is asserted a method."""

    step: Callable
    ckpt: Callable
    passes: int | Mapping[str, int]
    expected: str
    norm: Callable = nn.BatchNorm2d
    midway: Callable = unchanged
    wrap: str = ""

    def outcomes(self) -> dict[str, str]:
        """Give the asserted outcome of each method."""
        letters = dict(zip("EQDWF", OUTCOMES, strict=False))
        codes = self.expected.split()
        said = [letters[code[0]] + " (said)" * code.endswith("!") for code in codes]
        return dict(zip(METHODS, said, strict=True))


def outcome(row: Row, method: Callable, device: str = "cpu") -> str:
    """Run one cell beside the uncheckpointed run and tell what came of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = _outcome(row, method, device)
        except Exception:
            found = "fails"
        finally:
            torch.compiler.reset()
    said = any(str(warning.message).startswith(("only the decay", "not corrected")) for warning in caught)
    return found + " (said)" * said


def _outcome(row: Row, method: Callable, device: str) -> str:
    truth, mine = _pair(row, method, device, 0.0)
    apart = deviation(mine, truth)
    moved = _pair(row, method, device, 1.0) if apart >= ROUNDING or row.wrap else None  # from another old value
    if not same_path(mine, truth):
        return "other gradients"
    if apart < ROUNDING:
        return "exact" if apart == 0 and counters(mine) == counters(truth) else "equal"
    return "decay" if _decays_alike((truth, moved[0]), (mine, moved[1])) else "wrong"


def _pair(row: Row, method: Callable, device: str, old: float) -> tuple[nn.Module, nn.Module]:
    rank = dist.get_rank() if row.wrap else 0
    data = [x.to(device) for x in batches(STEPS, 4, 3, 4, 4, seed=1 + rank)]
    nets = []
    for run in (lambda net: go(net, row, data, plainly), lambda net: method(net, row, data)):
        torch.manual_seed(0)
        torch.compiler.reset()
        net = Net(row.norm).to(device)
        for name, buffer in net.named_buffers():
            if "running" in name and not nn.parameter.is_lazy(buffer):
                buffer += old
        nets.append(run(WRAPPERS[row.wrap](net)))
    return nets[0], nets[1]


def _decays_alike(truths, mine) -> bool:
    true_old, true_moved, old, moved = (statistics(net) for net in (*truths, *mine))
    return all(
        torch.allclose(moved[name] - old[name], true_moved[name] - true_old[name], rtol=0, atol=ROUNDING)
        for name in old
    ) and any(not torch.equal(true_old[name], true_moved[name]) for name in old)


def distributed_data_parallel(net):
    wrapped = DistributedDataParallel(net)
    wrapped.seen = 0
    return wrapped


WRAPPERS: dict[str, Callable[[Any], Any]] = {"": unchanged, "DDP": distributed_data_parallel, "FSDP2": fully_shard}


def instance_norm(channels):
    return nn.InstanceNorm2d(channels, track_running_stats=True)


def lazy(_):
    return nn.LazyBatchNorm2d()


def cumulative(channels):
    return nn.BatchNorm2d(channels, momentum=None)


class OwnForward(nn.BatchNorm2d):
    """A user's class that assigns new buffers in place of writing to the old ones."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3))
        self.running_mean = torch.lerp(self.running_mean, mean.detach(), self.momentum)
        self.running_var = torch.lerp(self.running_var, variance.detach(), self.momentum)
        self.num_batches_tracked = self.num_batches_tracked + 1
        return (x - mean[:, None, None]) / (variance[:, None, None] + self.eps).sqrt()


LAST = {"a": 2, "b": 2, "c": 1}
INNER = {"a": 2, "b": 3, "c": 2}

# E exact, Q equal, D decay, W wrong, F fails; "!" with a warning. The columns are METHODS.
ROWS = {
    "no checkpoint": Row(one, plainly, 1, "E E E E E E E"),
    "one checkpoint, reentrant": Row(one, reentrant, 2, "W Q Q E E E E"),
    "one checkpoint": Row(one, non_reentrant, 2, "W Q Q E E E W"),
    "with debug=True": Row(debugging, non_reentrant, 2, "W Q Q E E E W"),
    "torch's checkpoint_wrapper": Row(wrapped, non_reentrant, 2, "W Q Q E E E W"),
    "checkpoint_sequential, reentrant": Row(sequential, reentrant, LAST, "W Q Q E E E E"),
    "checkpoint_sequential": Row(sequential, non_reentrant, LAST, "W Q Q E E E W"),
    "nested, reentrant": Row(nested, reentrant, INNER, "W Q Q E E E E"),
    "nested": Row(nested, non_reentrant, INNER, "W Q Q E E E W"),
    "nested directly, reentrant": Row(nested_directly, reentrant, 3, "W Q Q E E E E"),
    "nested directly": Row(nested_directly, non_reentrant, 2, "W Q Q E E E W"),
    "nested directly, early stop off": Row(never_stopping_early, non_reentrant, 3, "W Q Q E E E W"),
    "a norm as the last operation": Row(ending_in_a_norm, non_reentrant, 2, "W Q Q E W W W"),
    "recomputation written by hand": Row(one, hand_written, 2, "W Q Q E E E E"),
    "several backwards, reentrant": Row(two_backwards, reentrant, 3, "W Q Q E E E W"),
    "several backwards": Row(two_backwards, non_reentrant, 3, "W Q Q E E E W"),
    "gradient penalty (create_graph)": Row(gradient_penalty, non_reentrant, 3, "W Q Q E E E W"),
    "autograd.grad": Row(autograd_grad, non_reentrant, 2, "W Q Q E E E W"),
    "gradient accumulation, reentrant": Row(accumulation, reentrant, 2, "W Q Q E E E E"),
    "gradient accumulation": Row(accumulation, non_reentrant, 2, "W Q Q E E E W"),
    "a frozen block": Row(frozen, non_reentrant, {"a": 1, "b": 2, "c": 2}, "W Q Q E E E W"),
    "siamese inputs, reentrant": Row(siamese, reentrant, 2, "W D D! E E E D"),
    "siamese inputs": Row(siamese, non_reentrant, 2, "W D D! E E E W"),
    "pipeline order": Row(pipeline, non_reentrant, 2, "W D D! E E E W"),
    "a layer twice in a region": Row(twice_in_a_region, non_reentrant, 2, "W D D! E E E W"),
    "batches without backward": Row(forward_only, non_reentrant, 2, "W W D! E E E W"),
    "batches under no_grad": Row(forward_only_no_grad, non_reentrant, 2, "W W D! E E E D"),
    "switched off midway": Row(switched_off_midway, non_reentrant, 2, "W W W E E E W"),
    "a momentum schedule": Row(momentum_schedule, non_reentrant, 2, "W W W E E E W"),
    "evaluation in between": Row(evaluated_in_between, non_reentrant, 2, "W Q Q E E E W"),
    "an exception in a forward": Row(failing_forward, non_reentrant, 2, "W W D! E E E W"),
    "an exception in a recomputation": Row(failing_recomputation, non_reentrant, 2, "W W D! E E E W"),
    "deep-copied midway": Row(one, non_reentrant, 2, "W Q Q E E E W", midway=copy.deepcopy),
    "pickled midway": Row(one, non_reentrant, 2, "W Q Q E E E W", midway=pickled),
    "converted to SyncBatchNorm midway": Row(one, non_reentrant, 2, "W Q Q W W W W", midway=converted),
    "SyncBatchNorm (one process)": Row(one, non_reentrant, 2, "W Q Q E E E W", norm=nn.SyncBatchNorm),
    "InstanceNorm, reentrant": Row(one, reentrant, 2, "W Q Q E E E W", norm=instance_norm),
    "InstanceNorm": Row(one, non_reentrant, 2, "W Q Q E E E W", norm=instance_norm),
    "InstanceNorm as the last operation": Row(
        ending_in_a_norm, non_reentrant, LAST, "W Q Q E E E W", norm=instance_norm
    ),
    "lazy layers": Row(one, non_reentrant, 2, "W Q Q E E E W", norm=lazy),
    "a class of one's own": Row(one, non_reentrant, 2, "W Q Q E E E W", norm=OwnForward),
    "momentum=None": Row(one, non_reentrant, 2, "Q Q Q E E E Q", norm=cumulative),
    "momentum=None, siamese inputs": Row(siamese, non_reentrant, 2, "Q Q Q E E E Q", norm=cumulative),
    "selective: norms recomputed": Row(selective(CheckpointPolicy.MUST_RECOMPUTE), non_reentrant, 2, "W Q Q E F F W"),
    "selective: norms saved": Row(selective(CheckpointPolicy.MUST_SAVE), non_reentrant, 1, "Q Q Q E F F Q"),
    "compiled with the checkpoint": Row(compiled_whole("aot_eager"), non_reentrant, 1, "E E E E F F E"),
    "compiled with the checkpoint, inductor": Row(compiled_whole("inductor"), non_reentrant, 1, "E E E E F F E"),
    "compiled block, reentrant": Row(compiled_block("aot_eager"), reentrant, 2, "W Q Q E F F E"),
    "compiled block": Row(compiled_block("aot_eager"), non_reentrant, 2, "W Q Q E F F W"),
    "compiled block, inductor": Row(compiled_block("inductor"), non_reentrant, 2, "W Q Q E F F W"),
    "compiled block, backend eager": Row(compiled_block("eager"), non_reentrant, 2, "W Q Q E F F W"),
    "compiled block, InstanceNorm": Row(
        compiled_block("aot_eager"), non_reentrant, 2, "W Q Q E F F W", norm=instance_norm
    ),
    "DDP, two ranks": Row(inside_the_model, non_reentrant, 2, "W Q Q E E E W", wrap="DDP"),
    "FSDP2, two ranks": Row(inside_the_model, non_reentrant, 2, "W Q Q E E E W", wrap="FSDP2"),
    "a new batch in a backward hook": Row(forward_in_a_backward_hook, non_reentrant, 2, "W W W W W W D"),
    "saved tensors read by hand": Row(saved_tensors_read_by_hand, non_reentrant, 3, "W Q W! W W W W"),
}


@functools.cache
def distributed_outcomes() -> dict[str, dict[str, str]]:
    """Run the cells of all rows with two processes; an outcome counts if both ranks have it."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_distributed_worker, args=(folder,), nprocs=2)
        first, second = (json.loads(Path(folder, str(rank)).read_text()) for rank in range(2))
    return {
        name: {method: found if found == second[name][method] else "ranks differ" for method, found in cells.items()}
        for name, cells in first.items()
    }


def _distributed_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {
        name: {method: outcome(row, function) for method, function in METHODS.items()}
        for name, row in ROWS.items()
        if row.wrap
    }
    Path(folder, str(rank)).write_text(json.dumps(found))
    dist.destroy_process_group()


def row_outcomes(name: str) -> dict[str, str]:
    """Run a row's cells."""
    if ROWS[name].wrap:
        return distributed_outcomes()[name]
    return {method: outcome(ROWS[name], function) for method, function in METHODS.items()}


def markdown(table: Mapping[str, Mapping[str, str]]) -> str:
    """Lay the table out, with what its words mean and how often each method is right."""
    right = {method: sum(cells[method] in ("exact", "equal") for cells in table.values()) for method in METHODS}
    lines = [
        "# What is right where",
        "",
        "Made by `python tests/conformance.py`; the tests assert every cell. Each is six training steps in float64,",
        "beside the same steps without checkpointing. `correct` is told the right passes, `calibrate` sees the first",
        "step alone.",
        "Where no engine is named, it is the non-reentrant one, torch's default.",
        "",
        *(f"- **{word}**: {meaning}" for word, meaning in OUTCOMES.items()),
        "",
        "| recomputed how | " + " | ".join(METHODS) + " |",
        "| --- |" + " --- |" * len(METHODS),
        *(f"| {name} | " + " | ".join(cells.values()) + " |" for name, cells in table.items()),
        f"| **exact or equal, of {len(table)}** | " + " | ".join(map(str, right.values())) + " |",
        "",
        "The last three are what one finds in discussions: in a backward pass, saving and restoring the statistics",
        "around the layer, or giving it other buffers, by two hooks; and tracking only where gradients are recorded.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    table = {}
    for name in ROWS:
        table[name] = row_outcomes(name)
        print(f"{name}: {', '.join(table[name].values())}", file=sys.stderr)
    print(markdown(table), end="")
