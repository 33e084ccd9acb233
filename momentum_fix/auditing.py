"""`audit`: which layers of a model, a state dict or a saved file were updated more than once per training step."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat, SupportsIndex

from momentum_fix.files.reading import COUNTER, UnreadableError, search
from momentum_fix.files.verdict import Audit, Layer, LayerAudit, audit_files, check_numbers, judge, with_momentum

if TYPE_CHECKING:
    from torch import nn


def audit(
    source: nn.Module | Mapping[str, Any] | str | PathLike[str],
    steps: SupportsIndex | None = None,
    momentum: SupportsFloat | None = 0.1,
) -> Audit:
    """Tell which layers of a model, a state dict or a saved file were updated more than once per training step.

        passes = num_batches_tracked / steps

    Each layer counts its updates in `num_batches_tracked`, which is saved with the model. The counter does not say
    why a layer was updated more than once: recomputation is one cause of several, and the result lists what speaks
    for and against each. Exact for: layers that took part in every step. Not for: layers that do not count
    (InstanceNorm), counters that were copied or averaged (a moving average of the weights), or several batches per
    step, unless `steps` counts batches.

    Files are read as data: nothing in them is executed, and only the counters are read from their tensors, so
    torch does not even have to be imported.

    Args:
        source: a model; a state dict, or a checkpoint that holds state dicts or models at any depth; a file (.pt,
            .pth, .bin, .ckpt, .safetensors), a sharded index (.index.json), or a directory of these (what is in
            directories inside of it is not looked at).
        steps: batches trained on, which with gradient accumulation are more than optimizer steps. With None, the
            layer with the lowest count in each state dict is assumed to have been updated once per step; this is
            an inference, and marked as one.
        momentum: the momentum that the model was built with; 0 to 1, or None. For a model, its layers' own
            momentum is used instead, and the result says whether it is corrected for these passes.

    Returns:
        An `Audit`. If a file in a directory cannot be read, it is listed in `errors`; the others are still read.

    Raises:
        UnreadableError: (a ValueError) the file or directory cannot be read, or holds no checkpoint.
        ValueError: steps is below 1, or momentum, or that of a layer of the model, is outside 0 to 1.
        TypeError: steps is not an integer, momentum is not a number, or source is none of the above.

    Example:
        >>> audit({"bn.num_batches_tracked": 100, "deep.num_batches_tracked": 300}).repeated[0].passes
        Fraction(3, 1)
    """
    steps = check_numbers(steps, momentum)
    if isinstance(source, (str, PathLike)):
        result = audit_files([Path(source)], steps, momentum)
        if error := result.errors.get(str(Path(source))):
            raise UnreadableError(error)
        return result

    torch = sys.modules.get("torch")  # if it is not there, there is no model either
    models: tuple[type, ...] = (torch.nn.Module,) if torch else ()
    if not isinstance(source, (Mapping, *models)):
        raise TypeError(f"source is a {type(source).__name__}, but must be a model, a state dict or a path")
    rows: list[LayerAudit] = []
    for prefix, found in search(source, models=models):
        layers = _layers(found, prefix) if isinstance(found, models) else with_momentum(found, momentum)
        rows += judge("", prefix, layers, steps)
    return Audit(tuple(rows))


def _layers(model: Any, prefix: str) -> dict[str, Layer]:
    """Give what is known of a model's layers."""
    from momentum_fix.norms.correct import corrected_for
    from momentum_fix.norms.layers import tracked_layers
    from momentum_fix.norms.momenta import uncorrected, uncounted

    layers = {}
    for layer, (name, *_) in tracked_layers(model).items():
        momentum = corrected_for(prefix + name, layer.momentum, 1)  # as a float
        plain = corrected_for(prefix + name, uncorrected(layer), 1)
        layers[name] = Layer(layer._buffers.get(COUNTER), momentum, plain, uncounted(layer))
    return layers
