"""What each way of keeping the statistics right costs, measured beside plain checkpointing in one run.

`python benchmarks/run.py` writes docs/benchmarks.md and docs/benchmarks.png; with a GPU it measures there, under
autocast and in channels_last. It needs the extras `benchmarks` and `test`.
"""

from __future__ import annotations

import argparse
import functools
import gc
import platform
import random
import statistics as stats
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from fairscale.nn.checkpoint import checkpoint_wrapper  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from monai.networks.blocks.activation_checkpointing import ActivationCheckpointWrapper  # noqa: E402
from monai.networks.nets.unet import CheckpointUNet  # noqa: E402
from pytorch_pfn_extras.utils.checkpoint import checkpoint as pfn_checkpoint  # noqa: E402

import conformance  # noqa: E402
import rivals  # noqa: E402
from momentum_fix import correct, diagnose, preserve_everywhere, update_once  # noqa: E402
from twins import by_context, drop_in, drop_in_reentrant, non_reentrant, plainly, reentrant  # noqa: E402


class Checkpointed(nn.Module):
    """Run a module under a checkpoint function."""

    def __init__(self, module, ckpt):
        super().__init__()
        self.module, self.ckpt = module, ckpt

    def forward(self, x):
        return self.ckpt(self.module, x)


@dataclass(frozen=True)
class Contestant:
    """A checkpoint around each block and what is done to the model; `beside` names the plain one to compare with."""

    wrap: Callable
    prepare: Callable
    beside: str
    method: str | None = None  # of the conformance table; None: the checkpoint itself is the method


def under(ckpt):
    return functools.partial(Checkpointed, ckpt=ckpt)


def region(ckpt):
    return lambda module: Checkpointed(module, rivals.around_the_region(module, ckpt))


PLAIN, PLAIN_REENTRANT = "plain checkpoint", "plain checkpoint, reentrant"
CONTESTANTS = {
    PLAIN: Contestant(under(non_reentrant), lambda net: None, PLAIN, "nothing"),
    "`correct`": Contestant(under(non_reentrant), correct, PLAIN, "`correct`"),
    "`update_once`": Contestant(under(non_reentrant), update_once, PLAIN, "`update_once`"),
    "`preserve_state`": Contestant(under(by_context), lambda net: None, PLAIN, "`preserve_state`"),
    "`checkpoint`": Contestant(under(drop_in), lambda net: None, PLAIN, "`checkpoint`"),
    "flag by hand": Contestant(under(non_reentrant), rivals.flag, PLAIN, "flag, saved statistics"),
    "stand-in buffers by hand": Contestant(under(non_reentrant), rivals.stand_ins, PLAIN, "stand-in buffers"),
    "around the region by hand": Contestant(region(non_reentrant), lambda net: None, PLAIN, "around the region"),
    PLAIN_REENTRANT: Contestant(under(reentrant), lambda net: None, PLAIN_REENTRANT, "nothing"),
    "`correct`, reentrant": Contestant(under(reentrant), correct, PLAIN_REENTRANT, "`correct`"),
    "`update_once`, reentrant": Contestant(under(reentrant), update_once, PLAIN_REENTRANT, "`update_once`"),
    "`checkpoint`, reentrant": Contestant(under(drop_in_reentrant), lambda net: None, PLAIN_REENTRANT, "`checkpoint`"),
    "flag by hand, reentrant": Contestant(under(reentrant), rivals.flag, PLAIN_REENTRANT, "flag, saved statistics"),
    "stand-in buffers by hand, reentrant": Contestant(
        under(reentrant), rivals.stand_ins, PLAIN_REENTRANT, "stand-in buffers"
    ),
    "around the region by hand, reentrant": Contestant(
        region(reentrant), lambda net: None, PLAIN_REENTRANT, "around the region"
    ),
    "pytorch-pfn-extras": Contestant(under(pfn_checkpoint), lambda net: None, PLAIN_REENTRANT),
    "fairscale": Contestant(checkpoint_wrapper, lambda net: None, PLAIN_REENTRANT),
}
LAYERS = 100


def overhead_only(wrap):
    return nn.Sequential(wrap(nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(LAYERS))))), (2, 2)


class Pointwise(nn.Sequential):
    """A forward of a user's own, so that `preserve_state` copies what is in it."""

    def forward(self, x):
        return super().forward(x)


def pointwise_net(wrap, block=nn.Sequential):
    layers = (nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)) for _ in range(20))
    return nn.Sequential(wrap(block(*layers))), (8, 16, 16, 16)


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x):
        return torch.relu(x + self.body(x))


def residual_net(wrap):
    return nn.Sequential(nn.Conv2d(3, 32, 3), *(wrap(Residual(32)) for _ in range(6))), (8, 3, 64, 64)


def checkpoint_unet(wrap):
    net = CheckpointUNet(3, 1, 1, channels=(16, 32, 64), strides=(2, 2), num_res_units=2, norm="batch")
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ActivationCheckpointWrapper):
                parent.add_module(name, wrap(child.module))
    return net, (2, 1, 48, 48, 48)


NETWORKS = {
    "overhead-only network": (overhead_only, 200),
    "BatchNorm and 1 by 1 convolutions": (pointwise_net, 300),
    "the same in a class of one's own": (functools.partial(pointwise_net, block=Pointwise), 300),
    "MONAI CheckpointUNet": (checkpoint_unet, 20),
    "ResNet-like 2-D net": (residual_net, 20),
}


MANY = {100: 100, 1000: 20, 4000: 8}  # checkpoints in a network, and rounds


def many_checkpoints(wrap, count):
    blocks = (wrap(nn.Sequential(nn.BatchNorm1d(8), nn.Tanh())) for _ in range(count))
    return nn.Sequential(*blocks), (16, 8)


def step_of(build, contestant, device):
    torch.manual_seed(0)
    net, shape = build(contestant.wrap)
    net.to(device)
    x = torch.rand(shape, device=device)
    real = build is not overhead_only
    if device == "cuda" and real:
        layout = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
        net, x = net.to(memory_format=layout), x.to(memory_format=layout)
    x.requires_grad_()
    contestant.prepare(net)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda" and real):
            loss = net(x).float().sum()
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()

    step.net = net
    return step


def seconds(steps, rounds, label, clock, collect=False):
    """Time the steps in turn, each round in another order; a step that raises has no times.

    Python's garbage collector does not run meanwhile, unless its work is to be measured too.
    """
    times = {name: [] for name in steps}
    for name, step in list(steps.items()):
        try:
            for _ in range(3):
                step()
        except Exception as error:
            print(f"{label}, {name}: {error}", file=sys.stderr)
            del steps[name], times[name]
    order, shuffle = list(steps), random.Random(0).shuffle
    if not collect:
        gc.disable()
    for _ in tqdm(range(rounds), desc=label, mininterval=10):
        shuffle(order)  # whoever runs after the same neighbour each time inherits its caches
        for name in order:
            start = clock()
            steps[name]()
            times[name].append(clock() - start)
        gc.collect(0)
    gc.enable()
    return times


def peak_memory(step, device):
    """Give the most bytes that were allocated at once in a step, beyond what was before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    now = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def quartiles(values, digits):
    low, middle, high = stats.quantiles(values, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def right(contestant):
    """Count the rows of the conformance table, those with one process, in which the statistics come out right."""
    rows = {name: row for name, row in conformance.ROWS.items() if not row.wrap}
    if contestant.method:
        outcomes = conformance.METHODS[contestant.method].outcomes()
        return sum(outcomes[name] in ("exact", "equal") for name in rows)
    wrapped = {}

    def ckpt(function, *args):
        if contestant.wrap is checkpoint_wrapper:
            if id(function) not in wrapped:
                wrapped[id(function)] = checkpoint_wrapper(function)
            return wrapped[id(function)](*args)
        return pfn_checkpoint(function, *args)

    def method(net, row, data):
        wrapped.clear()
        return conformance.go(net, row, data, row.ckpt if row.ckpt is plainly else ckpt)

    torch.set_default_dtype(torch.float64)
    found = [conformance.outcome(row, method) for row in tqdm(rows.values(), desc="conformance", mininterval=10)]
    torch.set_default_dtype(torch.float32)
    return sum(cell in ("exact", "equal") for cell in found)


def measure(device, rounds_by):
    """Give a row of text by contestant, and the times of the overhead-only network."""
    clock = time.perf_counter if device == "cuda" else time.thread_time  # the CPU's is less disturbed
    cells = {name: [] for name in CONTESTANTS}
    drawn = {}
    for label, (build, rounds) in NETWORKS.items():
        steps = {name: step_of(build, contestant, device) for name, contestant in CONTESTANTS.items()}
        times = seconds(steps, max(4, round(rounds * rounds_by)), label, clock)
        for name, contestant in CONTESTANTS.items():
            plain = times[contestant.beside]
            if name not in times:
                cells[name] += ["fails"] * (1 if build is overhead_only else 2)
            elif build is overhead_only:
                extra = [(mine - other) * 1e6 / (2 * LAYERS) for mine, other in zip(times[name], plain, strict=True)]
                drawn[name] = extra
                cells[name].append("" if name == contestant.beside else quartiles(extra, 1))
            else:
                ratio = [mine / other for mine, other in zip(times[name], plain, strict=True)]
                cells[name].append(
                    f"{stats.median(plain) * 1e3:.1f} ms" if name == contestant.beside else quartiles(ratio, 3)
                )
                cells[name].append(f"{peak_memory(steps[name], device) / 2**20:.2f}")
        plain_call = stats.median(times[PLAIN]) * 1e6 / (2 * LAYERS)
        if build is overhead_only:
            for name in (PLAIN, PLAIN_REENTRANT):
                cells[name][0] = f"0 (of {stats.median(times[name]) * 1e6 / (2 * LAYERS):.0f})"
            print(f"plain: {plain_call:.1f} us per call", file=sys.stderr)
    for name, contestant in CONTESTANTS.items():
        cells[name].append(str(right(contestant)))
    return cells, drawn


def measure_many(device, rounds_by):
    """Give a row of text by contestant: what a step costs with many small checkpoints, beside the plain one."""
    clock = time.perf_counter if device == "cuda" else time.thread_time
    names = [PLAIN, "`update_once`", "`preserve_state`", "`checkpoint`", "`preserve_everywhere`"]
    contestants = {name: CONTESTANTS.get(name, CONTESTANTS[PLAIN]) for name in names}
    cells = {name: [] for name in names}
    for count, rounds in MANY.items():
        build = functools.partial(many_checkpoints, count=count)
        steps = {name: step_of(build, contestant, device) for name, contestant in contestants.items()}
        steps[names[-1]] = within(preserve_everywhere, steps[names[-1]])
        times = seconds(steps, max(4, round(rounds * rounds_by)), f"{count} checkpoints", clock, collect=True)
        for name in names:
            ratio = [mine / plain for mine, plain in zip(times[name], times[PLAIN], strict=True)]
            plain = f"{stats.median(times[PLAIN]) * 1e6 / count:.0f} us each"
            cells[name].append(plain if name == PLAIN else quartiles(ratio, 2))
    return cells


def measure_diagnose(device, rounds_by):
    """Give a row of text by network: what a step costs in a block of `diagnose`, in time and memory."""
    clock = time.perf_counter if device == "cuda" else time.thread_time
    cells = {}
    for label in ("BatchNorm and 1 by 1 convolutions", "MONAI CheckpointUNet", "ResNet-like 2-D net"):
        build, rounds = NETWORKS[label]
        row = []
        for name in (PLAIN, PLAIN_REENTRANT):
            plain = step_of(build, CONTESTANTS[name], device)
            steps = {"plain": plain, "diagnose": within(functools.partial(diagnose, plain.net), plain)}
            times = seconds(steps, max(4, round(rounds * rounds_by / 5)), f"diagnose, {label}", clock)
            ratio = [mine / plain for mine, plain in zip(times["diagnose"], times["plain"], strict=True)]
            more = peak_memory(steps["diagnose"], device) - peak_memory(plain, device)
            row += [quartiles(ratio, 1), f"{more / 2**20:+.2f}"]
        cells[label] = row
    return cells


def within(context, step):
    def inside():
        with context():
            step()

    return inside


def markdown(cells, many, diagnosed, machine):
    single = sum(not row.wrap for row in conformance.ROWS.values())
    header = [
        "what",
        "microseconds per BatchNorm call",
        *(text for label in list(NETWORKS)[1:] for text in (label, "peak MiB")),
        f"right in, of {single} ways to recompute",
    ]
    lines = [
        "# What it costs",
        "",
        f"Made by `python benchmarks/run.py` on {machine}.",
        "",
        "All contestants run in turn, each round in another order, in one process; each number is the median of the",
        "differences from (or ratios to) plain checkpointing with the same engine in the same round, with quartiles;",
        "on a CPU, of the thread's CPU time. `correct` changes a number and nothing else: what it seems to cost is",
        "the error of the measurement. The first column is a network of 100 BatchNorm layers on a batch of 2 by 2,",
        "so it shows the overhead alone. A call is a forward pass or a recomputation, averaged; in brackets stands the",
        "whole time of a plain call. The last column is the table in [conformance.md](conformance.md), without the two",
        "distributed rows; pytorch-pfn-extras and fairscale stand there instead of the row's checkpoint.",
        "",
        "`preserve_state` and `checkpoint` keep no copies for a block of torch's own modules, as in the first two",
        "columns. In the third, they do: the same modules are in a class with a forward of its own, which may read",
        "what is in them. What they add depends on the number of modules alone, so it weighs less the more the modules",
        "have to do. The last two networks work on 48 by 48 by 48 voxels and on 64 by 64 pixels.",
        "",
        "![microseconds per BatchNorm call](benchmarks.png)",
        "",
        "| " + " | ".join(header) + " |",
        "|" + " --- |" * len(header),
        *(f"| {name} | " + " | ".join(row) + " |" for name, row in cells.items()),
        "",
        "## Many small checkpoints",
        "",
        "One BatchNorm and a Tanh in each of many checkpoints, beside plain checkpointing, median with quartiles.",
        "Here Python's garbage collector is on, as in a training loop. It goes through all objects that are alive,",
        "again and again, and a checkpoint whose backward pass is still to come is some objects, torch's own too. So",
        "each checkpoint costs more the more of them there are, a plain one as well.",
        "",
        "| what | " + " | ".join(f"{count:,} checkpoints" for count in MANY) + " |",
        "|" + " --- |" * (len(MANY) + 1),
        *(f"| {name} | " + " | ".join(row) + " |" for name, row in many.items()),
        "",
        "## `diagnose`",
        "",
        "A step in a block of `diagnose`, beside the same step without it. `diagnose` reads each tensor that autograd",
        "saves twice, in the forward pass and in the recomputation, and keeps 232 bytes of each. What it needs beyond",
        "these is for the piece of a tensor that it reads at a time. It is for one step, not for a whole training.",
        "",
        "| network | times as long | more MiB | times as long, reentrant | more MiB, reentrant |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {name} | " + " | ".join(row) + " |" for name, row in diagnosed.items()),
        "",
    ]
    return "\n".join(lines)


def picture(drawn, path):
    names = [name for name in drawn if name not in (PLAIN, PLAIN_REENTRANT)][::-1]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    quarts = [stats.quantiles(drawn[name], n=4) for name in names]
    middles = [middle for _, middle, _ in quarts]
    spread = [[m - low for low, m, _ in quarts], [high - m for _, m, high in quarts]]
    colors = ["tab:blue" if name.startswith("`") else "tab:gray" for name in names]
    axes.barh([name.replace("`", "") for name in names], middles, xerr=spread, color=colors, capsize=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("microseconds per BatchNorm call beyond plain checkpointing\n(median, quartiles)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=float, default=1.0, help="how many times the usual number of rounds")
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"one core of a {platform.machine()} CPU"
    cells, drawn = measure(device, arguments.rounds)
    machine = f"{where}, torch {torch.__version__}, {platform.system()}"
    many = measure_many(device, arguments.rounds)
    text = markdown(cells, many, measure_diagnose(device, arguments.rounds), machine)
    (arguments.output / "benchmarks.md").write_text(text, encoding="utf-8")
    picture(drawn, arguments.output / "benchmarks.png")
    print(text)


if __name__ == "__main__":
    main()
