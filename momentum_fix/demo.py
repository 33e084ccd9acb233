"""The demonstration: a real checkpointed 3-D network on a real brain, beside its uncheckpointed twin."""

from __future__ import annotations

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

from momentum_fix.calibration import Row, calibrate
from momentum_fix.layers import NormLayer, tracked_layers
from momentum_fix.tables import number

_BATCH = 2


@dataclass(frozen=True)
class Outcome:
    """What the runs came to: differences from the uncheckpointed run, 0 where they are equal bit for bit."""

    steps: int
    layers: tuple[str, ...]  # named as in the uncheckpointed network
    rows: tuple[Row, ...]  # what `calibrate` found, layer by layer
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
        tuple(aliases[0] for aliases in tracked_layers(truth).values()),
        report.rows,
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
    header = ("passes", "momentum", "corrected", "uncorrected off by", "calibrated off by", "layer")
    columns = zip(outcome.layers, outcome.rows, outcome.uncorrected, outcome.calibrated, strict=True)
    return [
        header,
        *(
            (str(row.passes), number(row.momentum), number(row.corrected), f"{wrong:.1e}", f"{right:.1e}", layer)
            for layer, row, wrong, right in columns
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
    names = (f"{layer}   k = {row.passes}" for layer, row in zip(outcome.layers, outcome.rows, strict=True))
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
    def deviation(mine: NormLayer, true: NormLayer) -> float:
        mean = (mine.running_mean - true.running_mean).abs() / true.running_var.sqrt()
        variance = (mine.running_var - true.running_var).abs() / true.running_var
        return float(torch.maximum(mean, variance).max())

    return tuple(map(deviation, tracked_layers(net), tracked_layers(truth)))
