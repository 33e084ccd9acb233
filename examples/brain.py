"""The demonstration: a real checkpointed 3-D network on a real brain, beside its uncheckpointed twin.

`make demo` runs it; `python examples/brain.py --help` tells its options.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from monai.networks.nets.unet import CheckpointUNet, UNet
from nilearn.datasets import load_mni152_brain_mask, load_mni152_template
from rich.console import Console
from rich.progress import track
from torch import nn

from momentum_fix import calibrate, corrected_momentum
from momentum_fix._tables import number, show

_BATCH = 2
_MOMENTUM = 0.1  # torch's own


@dataclass(frozen=True)
class Outcome:
    """What the runs came to: differences from the uncheckpointed run, 0 where they are equal bit for bit."""

    steps: int
    layers: tuple[str, ...]  # named as in the uncheckpointed network
    passes: tuple[int, ...]  # what `calibrate` counted, layer by layer
    uncorrected: tuple[float, ...]  # deviation of the running statistics, layer by layer
    calibrated: tuple[float, ...]
    same_path: bool  # gradients and weights bit-for-bit equal in all runs after every step
    output_uncorrected: float  # largest difference of a predicted probability in evaluation mode
    output_calibrated: float


def train(steps: int = 40, size: int = 48, channels: tuple[int, ...] = (16, 32, 64, 128, 256)) -> Outcome:
    """Train MONAI's UNet and, twice, its CheckpointUNet from one seed on the same batches, in float64.

    The task: which voxels of the MNI152 template belong to the brain. One of the two checkpointed networks is
    calibrated in its first step.

    Args:
        steps: training steps, at least 1.
        size: edge of the cubic patches in voxels of 2 mm, a multiple of 2**(len(channels) - 1), at most 95.
        channels: feature channels by level, from the top.

    Raises:
        ValueError: steps is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, but must be at least 1: the first one calibrates")
    truth, uncorrected, calibrated = networks = [
        _network(cls, channels) for cls in (UNet, CheckpointUNet, CheckpointUNet)
    ]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in networks]
    patches = _patches(size)
    same_path = True

    def step(net: UNet, optimizer: torch.optim.Optimizer, scan: torch.Tensor, brain: torch.Tensor) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.binary_cross_entropy_with_logits(net(scan), brain))
        optimizer.step()

    for number_of_step in track(range(steps), "training three networks", console=Console(stderr=True)):
        scan, brain = next(patches)
        for net, optimizer in zip(networks, optimizers, strict=True):
            if net is calibrated and number_of_step == 0:
                with calibrate(net) as report:
                    step(net, optimizer, scan, brain)
            else:
                step(net, optimizer, scan, brain)
        same_path = same_path and _same_path(uncorrected, truth) and _same_path(calibrated, truth)

    scan, _ = next(patches)
    with torch.no_grad():
        target, *outputs = (net.eval()(scan).sigmoid() for net in networks)
    return Outcome(
        steps,
        tuple(name for name, module in truth.named_modules() if isinstance(module, nn.BatchNorm3d)),
        tuple(map(int, report.passes.values())),
        _deviations(uncorrected, truth),
        _deviations(calibrated, truth),
        same_path,
        *(float((output - target).abs().max()) for output in outputs),
    )


def heading(outcome: Outcome) -> str:
    """Say what was run."""
    return f"MONAI CheckpointUNet beside UNet, {outcome.steps} steps on the MNI152 brain, float64:\n"


def table(outcome: Outcome) -> list[tuple[str, ...]]:
    """Give the cells of the table, a row a layer, the header first."""
    header = ("layer", "passes", "momentum", "corrected", "uncorrected off by", "calibrated off by")
    columns = zip(outcome.layers, outcome.passes, outcome.uncorrected, outcome.calibrated, strict=True)
    return [
        header,
        *(
            (layer, str(k), number(_MOMENTUM), number(corrected_momentum(_MOMENTUM, k)), f"{wrong:.1e}", f"{right:.1e}")
            for layer, k, wrong, right in columns
        ),
    ]


def conclusion(outcome: Outcome) -> str:
    """Say what the columns mean, and what is equal and what is not."""
    path = "bit-for-bit equal" if outcome.same_path else "NOT equal, so the comparison says nothing"
    return (
        "\nOff by: the running statistics' largest deviation from the uncheckpointed run over a layer's channels,\n"
        "of the mean in standard deviations, of the variance relative to it.\n"
        f"Gradients and weights of the three runs, compared after every step: {path}.\n"
        "Only the buffers differ, and with them what the network says in evaluation mode: a voxel's probability is\n"
        f"off by up to {outcome.output_uncorrected:.1e} uncorrected, {outcome.output_calibrated:.1e} calibrated."
    )


def picture(outcome: Outcome, file: Path) -> None:
    """Draw the deviations, a row a layer; the ending of the file's name gives the format."""
    figure = Figure(figsize=(10, 0.4 * len(outcome.layers) + 2), layout="constrained")
    ax = figure.subplots()
    heights = range(len(outcome.layers))
    for values, color, marker, label in (
        (outcome.calibrated, "#0072B2", "D", "calibrated"),
        (outcome.uncorrected, "#D55E00", "o", "uncorrected"),
    ):
        shown = [max(value, 1e-16) for value in values]  # the logarithmic axis has no 0
        ax.scatter(shown, heights, color=color, marker=marker, zorder=3)
        ax.annotate(label, (shown[0], 0), (0, 10), textcoords="offset points", ha="center", color=color, weight="bold")
    ax.set_xscale("log")
    ax.set_xlim(1e-17, 1e2)
    ax.set_ylim(len(outcome.layers) - 0.5, -1)
    names = (f"{layer}   k = {k}" for layer, k in zip(outcome.layers, outcome.passes, strict=True))
    ax.set_yticks(heights, list(names), fontsize="small")
    ax.grid(axis="both", color="0.9")
    ax.set_xlabel(
        "largest deviation of the running statistics from the uncheckpointed run\n"
        "(mean in standard deviations, variance relative; float64 resolves 2.2e-16)"
    )
    figure.suptitle(f"MONAI CheckpointUNet after {outcome.steps} steps: calibrating brings the running statistics back")
    figure.savefig(file, dpi=150)


def _network(cls: type[UNet], channels: tuple[int, ...]) -> UNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = cls(3, 1, 1, channels, strides=(2,) * (len(channels) - 1), norm="batch")
    return net.double()


def _patches(size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Give random patches of the brain volume and of its mask, (batch, 1, size, size, size) each."""
    scan = torch.from_numpy(load_mni152_template(resolution=2).get_fdata())
    brain = torch.from_numpy(load_mni152_brain_mask(resolution=2).get_fdata())
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

    norms = ([module for module in model.modules() if isinstance(module, nn.BatchNorm3d)] for model in (net, truth))
    return tuple(map(deviation, *norms))


def main() -> int:
    """Train, print and draw; give status 0, or 1 if the runs took different paths."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=40, help="training steps (default: %(default)s)")
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
        picture(outcome, arguments.output)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    print(f"Picture: {arguments.output}")
    return 0 if outcome.same_path else 1


if __name__ == "__main__":
    sys.exit(main())
