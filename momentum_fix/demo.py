"""The demonstration of `python -m momentum_fix demo`: a tiny network, trained with and without checkpointing."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from momentum_fix import calibrate, update_once
from momentum_fix._tables import aligned

RUNS = ("without checkpointing", "with checkpointing", "with calibrate", "with update_once")
STEPS, WIDTH = 8, 40


def demonstrate() -> str:
    """Train the same network in each way, and draw what its layer's running variance has become."""
    variances = [train(run) for run in RUNS]
    rows = [("", f"running variance after {STEPS} steps", "differs by")]
    for run, variance in zip(RUNS, variances, strict=True):
        off = float((variance / variances[0] - 1).abs().max())
        differs = "nothing, to the bit" if off == 0 else "rounding" if off < 1e-12 else f"{100 * off:.0f} %"
        bar = "█" * round(WIDTH * float(variance.mean()))
        rows.append((run, f"{variance.mean():.4f} {bar}", differs if variance is not variances[0] else ""))
    advice = "Run one step of your own training inside `diagnose(model)`; if it finds this, call `update_once(model)`."
    title = "A tiny network with a BatchNorm layer in the part that its checkpoint recomputes:"
    return "\n\n".join([title, aligned(rows), advice])


def train(run: str) -> torch.Tensor:
    """Train a convolution, and a block that is recomputed unless the run is without checkpointing."""
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(4, 4, 3, dtype=torch.float64), nn.BatchNorm2d(4, dtype=torch.float64)
    stem, block = nn.Conv2d(1, 4, 3, dtype=torch.float64), nn.Sequential(convolution, norm, nn.ReLU())
    model = nn.Sequential(stem, block)
    if run == "with update_once":
        update_once(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        images = torch.rand(4, 1, 12, 12, dtype=torch.float64)
        with calibrate(model) if run == "with calibrate" and step == 0 else nullcontext():
            hidden = stem(images)
            output = block(hidden) if run == RUNS[0] else checkpoint(block, hidden, use_reentrant=False)
            output.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return block.get_buffer("1.running_var")
