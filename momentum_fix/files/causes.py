"""Why layers may have counted more batches than there were steps: what speaks for and against each cause."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

_MOST = 16  # runs of a layer per step: no checkpoints are nested deeper


def recomputed(batches: int, steps: int) -> int | None:
    """Tell how often each step ran a layer, if it was recomputed in every step: a small whole number, or else None."""
    times = round(batches / steps)
    return times if 1 <= times <= _MOST and nearly(batches, times, steps) else None


def nearly(batches: int, times: int | Fraction, steps: int) -> bool:
    """Tell whether a layer that runs so many times per step counts so many batches, but for one step or 1 % of them."""
    return abs(batches - float(times) * steps) < float(times) * max(1, steps / 100)


def causes(counts: Mapping[str, int], steps: int, inferred: bool, ordered: bool) -> list[str]:
    """Give each cause, and below it what speaks for it (+) and against it (-), as lines.

    Args:
        counts: the batches that each layer of a state dict has counted, one at least more than `steps`.
        steps: batches trained on.
        inferred: whether the steps are what the layer that counted least has counted.
        ordered: whether the layers stand in the order of the model.
    """
    more = {layer for layer, count in counts.items() if count > steps}
    numbers = sorted({counts[layer] for layer in more})
    whole = all((recomputed(number, steps) or 0) > 1 for number in numbers)
    same = len(numbers) == 1
    said = ", ".join(f"{number / steps:.6g}" for number in numbers[:4]) + ", ..." * (len(numbers) > 4)
    several = "a real and a generated batch, two views" if said == "2" else "feature levels, views"
    first, part = next(iter(counts)), _part(counts, more)
    begins = f"the first layer, {first}, has {'them' if first in more else 'none'}"
    unequal = "" if same else "- not equally many in each layer"
    points = {
        "recomputation (activation checkpointing)": [
            f"{'+' if whole else '- not'} small whole numbers of updates per step: {said}",
            f"{'-' if first in more else '+'} {begins}: few models recompute it" * ordered,
        ],
        "a part that runs several times per step (a head shared by feature levels, a discriminator)": [
            "- not the layers of one part" if part is None else f"+ all layers of {part or 'the model'}, and no others",
            f"+ {said} updates per step in each: {several} or accumulated batches?" if same and whole else unequal,
        ],
        "an earlier training, from which the model was fine-tuned": [
            unequal or f"+ {numbers[0] - steps} batches more than steps in each layer",
            "- small whole numbers of updates per step would be chance" if whole else "+ not small whole numbers",
            f"{'+' if first in more else '-'} {begins}" * ordered,
        ],
        "layers that are dropped at random (LayerDrop, stochastic depth)": [
            f"{'-' if whole else '+ not'} small whole numbers",
            "- more than 2 updates per step: few would drop so many" if numbers[-1] > 2 * steps else "",
            "" if inferred else "- dropped layers count fewer batches than steps, not more",
        ],
    }
    return [line for cause, found in points.items() for line in (f"  {cause}", *(f"    {p}" for p in found if p))]


def _part(layers: Mapping[str, object], more: set[str]) -> str | None:
    """Name the largest part of the model that holds all of these layers and no others; the whole model is ""."""
    names = next(iter(more)).split(".")
    parts = ["".join(f"{name}." for name in names[:depth]) for depth in range(len(names) + 1)]
    return next((part[:-1] for part in parts if {each for each in layers if f"{each}.".startswith(part)} == more), None)
