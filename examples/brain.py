"""The demonstration: a real checkpointed 3-D network on a real brain, beside its uncheckpointed twin.

`make demo` runs it; `python examples/brain.py --help` tells its options.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from monai.networks.nets.unet import CheckpointUNet, UNet
from nilearn.datasets import load_mni152_brain_mask, load_mni152_template
from torch import nn

from momentum_fix import Report, calibrate, corrected_momentum, update_once
from momentum_fix._tables import number, show

STEPS = 40
_TRUTH, _NOTHING, _CALIBRATE, _UPDATE_ONCE = RUNS = (
    "without checkpointing",
    "with checkpointing",
    "with calibrate",
    "with update_once",
)
_BRAIN, _WRONG = (0.6, 0.8, 1.0), (1.0, 0.1, 0.1)  # colours of the voxels
_COLORS = {_NOTHING: "#D55E00", _CALIBRATE: "#0072B2", _UPDATE_ONCE: "#009E73"}
_SIDES = {_NOTHING: "center", _CALIBRATE: "left", _UPDATE_ONCE: "right"}
_MARKERS = {_NOTHING: "o", _CALIBRATE: "D", _UPDATE_ONCE: "s"}
_BATCH = 2
_MOMENTUM = 0.1  # torch's own
_SLAB = (96, 112, 32)  # voxels in the middle of the brain, on which the networks are evaluated
_SLICE = 16  # the slice of these that is drawn


@dataclass(frozen=True)
class Run:
    """What one network came to."""

    deviations: tuple[float, ...]  # of the running statistics from the uncheckpointed run's, layer by layer
    brain: torch.Tensor  # the probability of each voxel of the slab to belong to the brain, in evaluation mode
    wrong: torch.Tensor  # whether it is on the wrong side of 0.5


@dataclass(frozen=True)
class Outcome:
    """What the runs came to."""

    steps: int
    layers: tuple[str, ...]  # named as in the uncheckpointed network
    passes: tuple[int, ...]  # what `calibrate` counted, layer by layer
    runs: dict[str, Run]
    scan: torch.Tensor  # the slab
    same_path: bool  # gradients and weights bit-for-bit equal in all runs after every step


def train(steps: int = STEPS, size: int = 32, channels: tuple[int, ...] = (8, 16, 32, 64, 128)) -> Outcome:
    """Train MONAI's UNet and, three times, its CheckpointUNet from one seed on the same batches, in float64.

    The task: which voxels of the MNI152 template belong to the brain. Of the checkpointed networks one gets no
    correction, one is calibrated in its first step, and one trains with `update_once`. The learning rate falls to 0.

    Args:
        steps: training steps, at least 1.
        size: edge of the cubic patches in voxels of 2 mm, a multiple of 2**(len(channels) - 1), at most 95.
        channels: feature channels by level, from the top; at most 5 levels.

    Raises:
        ValueError: steps is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, but must be at least 1: the first one calibrates")
    networks = {run: _network(UNet if run == _TRUTH else CheckpointUNet, channels) for run in RUNS}
    optimizers = {run: torch.optim.SGD(net.parameters(), momentum=0.9) for run, net in networks.items()}
    truth = networks[_TRUTH]
    update_once(networks[_UPDATE_ONCE])
    patches = _patches(size)
    same_path, report = True, Report()

    for step in range(steps):
        scan, brain = next(patches)
        for run, net in networks.items():
            optimizers[run].param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / steps))
            optimizers[run].zero_grad()
            calibrating = run == _CALIBRATE and step == 0
            with calibrate(net) if calibrating else nullcontext(report) as report:
                loss = nn.functional.binary_cross_entropy_with_logits(net(scan), brain)
                torch.autograd.backward(loss)
            optimizers[run].step()
        same_path = same_path and all(_same_path(net, truth) for net in networks.values())
        if (step + 1) % math.ceil(steps / 10) == 0 or step + 1 == steps:  # lines, which a log file holds too
            print(f"step {step + 1} of {steps}, four networks: loss {loss:.3f}", file=sys.stderr, flush=True)

    scan, brain = _slab()
    with torch.no_grad():
        outputs = {run: net.eval()(scan[None, None]).sigmoid()[0, 0] for run, net in networks.items()}
    return Outcome(
        steps,
        tuple(name for name, module in truth.named_modules() if isinstance(module, nn.BatchNorm3d)),
        tuple(map(int, report.passes.values())),
        {
            run: Run(_deviations(net, truth), outputs[run], (outputs[run] > 0.5) != (brain > 0.5))
            for run, net in networks.items()
        },
        scan,
        same_path,
    )


def heading(outcome: Outcome) -> str:
    """Say what was run."""
    return f"MONAI CheckpointUNet beside UNet, {outcome.steps} steps on the MNI152 brain, float64:\n"


def table(outcome: Outcome) -> list[tuple[str, ...]]:
    """Give the cells of the table, a row a layer, the header first."""
    header = ("layer", "passes", "corrected momentum", *(f"{run} off by" for run in RUNS[1:]))
    columns = zip(*(outcome.runs[run].deviations for run in RUNS[1:]), strict=True)
    return [
        header,
        *(
            (layer, str(k), number(corrected_momentum(_MOMENTUM, k)), *(f"{each:.1e}" for each in off))
            for layer, k, off in zip(outcome.layers, outcome.passes, columns, strict=True)
        ),
    ]


def evaluation(outcome: Outcome) -> list[tuple[str, ...]]:
    """Give the cells of the second table: what each network says in evaluation mode."""
    rows: list[tuple[str, ...]] = [("evaluated", "a probability differs by up to", "voxels wrong")]
    for run, each in outcome.runs.items():
        off = float((each.brain - outcome.runs[_TRUTH].brain).abs().max())
        rows.append((run, f"{off:.1e}" if run != _TRUTH else "", _percent(each)))
    return rows


def conclusion(outcome: Outcome) -> str:
    """Say what the columns mean, and what is equal and what is not."""
    path = "bit-for-bit equal" if outcome.same_path else "NOT equal, so the comparison says nothing"
    return (
        "\nOff by: the running statistics' largest deviation from the run without checkpointing over a layer's\n"
        "channels, of the mean in standard deviations, of the variance relative to it.\n"
        f"Gradients and weights of the four runs, compared after every step: {path}.\n"
        "Only the buffers differ, and with them what the network says in evaluation mode. By how much differs from\n"
        "training to training, and it can be for the better: see docs/study.md.\n"
    )


def picture(outcome: Outcome, file: Path) -> None:
    """Draw what each network sees in one slice, and the deviations; the ending of the file's name gives the format."""
    figure = Figure(figsize=(11, 12), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(3, 2))
    above, below = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    title = f"Which voxels are brain? MONAI CheckpointUNet after {outcome.steps} steps, in evaluation mode"
    above.suptitle(f"{title}\nblue: called brain; red: called wrong")
    upper, lower = above.subplots(2, 4)
    scan = outcome.scan[..., _SLICE].T
    shown = {run: each.brain[..., _SLICE].T for run, each in outcome.runs.items()}
    off = {run: (shown[run] - shown[_TRUTH]).abs().numpy() for run in RUNS[1:]}
    for place, (run, each) in enumerate(outcome.runs.items()):
        colored = torch.stack([scan] * 3, -1)
        colored[shown[run] > 0.5] *= torch.tensor(_BRAIN).to(scan)
        colored[each.wrong[..., _SLICE].T] = torch.tensor(_WRONG).to(scan)
        upper[place].imshow(colored.numpy(), origin="lower")
        upper[place].set_title(f"{run}\n{_percent(each)} of the voxels wrong", fontsize="medium")
        if run != _TRUTH:
            colors = lower[place].imshow(off[run], "inferno", origin="lower", vmin=0, vmax=off[_NOTHING].max())
            lower[place].set_title("probability: difference", fontsize="medium")
    lower[0].imshow(scan.numpy(), "gray", origin="lower")
    lower[0].set_title("the scan", fontsize="medium")
    for ax in (*upper, *lower):
        ax.set_axis_off()
    label = "difference from the probability without checkpointing"
    above.colorbar(colors, ax=list(lower), location="bottom", shrink=0.5, label=label)
    _draw_deviations(outcome, below.subplots())
    figure.savefig(file, dpi=150)


def _percent(run: Run) -> str:
    return f"{100 * float(run.wrong.double().mean()):.2f} %"


def _draw_deviations(outcome: Outcome, ax: Axes) -> None:
    heights = range(len(outcome.layers))
    for run, color in _COLORS.items():
        shown = [max(value, 1e-17) for value in outcome.runs[run].deviations]  # the logarithmic axis has no 0
        ax.scatter(shown, heights, color=color, marker=_MARKERS[run], zorder=3)
        ax.annotate(run, (shown[0], 0), (0, 10), textcoords="offset points", ha=_SIDES[run], color=color, weight="bold")
    ax.set_xscale("log")
    ax.set_xlim(1e-23, 1e2)
    ax.set_ylim(len(outcome.layers) - 0.5, -1)
    names = (f"{layer}   k = {k}" for layer, k in zip(outcome.layers, outcome.passes, strict=True))
    ax.set_yticks(heights, list(names), fontsize="small")
    ax.grid(axis="both", color="0.9")
    ax.set_xlabel(
        "running statistics: largest deviation from the run without checkpointing\n"
        "(mean in standard deviations, variance relative; 0 is drawn at 1e-17)"
    )


def _network(cls: type[UNet], channels: tuple[int, ...]) -> UNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = cls(3, 1, 1, channels, strides=(2,) * (len(channels) - 1), norm="batch")
    return net.double()


def _volumes() -> tuple[torch.Tensor, torch.Tensor]:
    """Give the brain volume and its mask."""
    scan, brain = load_mni152_template(resolution=2), load_mni152_brain_mask(resolution=2)
    return torch.from_numpy(scan.get_fdata()), torch.from_numpy(brain.get_fdata())


def _slab() -> tuple[torch.Tensor, torch.Tensor]:
    """Give the middle of both."""
    scan, brain = _volumes()
    cut = tuple(slice((room - size) // 2, (room + size) // 2) for room, size in zip(scan.shape, _SLAB, strict=True))
    return scan[cut], brain[cut]


def _patches(size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Give random patches of the brain volume and of its mask, (batch, 1, size, size, size) each."""
    scan, brain = _volumes()
    generator = torch.Generator().manual_seed(0)
    room = torch.tensor(scan.shape) - size + 1
    while True:
        corners = (torch.rand(_BATCH, 3, generator=generator) * room).long().tolist()
        cuts = [tuple(slice(start, start + size) for start in corner) for corner in corners]
        yield torch.stack([scan[cut][None] for cut in cuts]), torch.stack([brain[cut][None] for cut in cuts])


def _same_path(net: nn.Module, truth: nn.Module) -> bool:
    pairs = list(zip(net.parameters(), truth.parameters(), strict=True))
    return all(torch.equal(mine, true) and torch.equal(_grad(mine), _grad(true)) for mine, true in pairs)


def _grad(parameter: nn.Parameter) -> torch.Tensor:
    return torch.empty(0) if parameter.grad is None else parameter.grad


def _deviations(net: nn.Module, truth: nn.Module) -> tuple[float, ...]:
    def deviation(mine: nn.Module, true: nn.Module) -> float:
        (mean, variance), (true_mean, true_variance) = (list(layer.buffers())[:2] for layer in (mine, true))
        off = torch.maximum((mean - true_mean).abs() / true_variance.sqrt(), (variance / true_variance - 1).abs())
        return float(off.max())

    return tuple(map(deviation, _norms(net), _norms(truth)))


def _norms(net: nn.Module) -> list[nn.BatchNorm3d]:
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm3d)]


def main() -> int:
    """Train, print and draw; give status 0, or 1 if the runs took different paths."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (default: %(default)s)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("momentum_fix_demo.png"),
        metavar="FILE",
        help="the picture to write (default: %(default)s)",
    )
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"steps is {arguments.steps}, but must be at least 1: the first one calibrates")
    if not arguments.output.parent.is_dir():
        parser.error(f"the picture cannot be written to {str(arguments.output)!r}: there is no such folder")
    try:
        outcome = train(arguments.steps)
        print(heading(outcome))
        show(table(outcome))
        print(conclusion(outcome))
        show(evaluation(outcome))
        picture(outcome, arguments.output)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    print(f"\nPicture: {arguments.output}")
    return 0 if outcome.same_path else 1


if __name__ == "__main__":
    sys.exit(main())
