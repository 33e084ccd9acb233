"""Norm layers: which of them track running statistics, and how to read and put back what they track."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import nn

COUNTER = "num_batches_tracked"
Buffers: TypeAlias = dict[str, torch.Tensor]
NormLayer: TypeAlias = Any  # an nn.Module with a `momentum`, for which torch has no type


def tracks(module: nn.Module) -> bool:
    """Tell whether a training-mode forward pass moves running statistics of this module with its momentum.

    True for torch's norm layers with `track_running_stats` and for any class of a user's own that has a
    momentum and a running_mean or running_var buffer.
    """
    return (
        hasattr(module, "momentum")
        and getattr(module, "track_running_stats", True)
        and (module._buffers.get("running_mean") is not None or module._buffers.get("running_var") is not None)
    )


def tracked_layers(model: nn.Module) -> dict[NormLayer, list[str]]:
    """Give the layers that track running statistics, each with its names; a shared layer has several.

    Raises:
        TypeError: model is no module, or TorchScript, where momentum is part of the code.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}, but must be an nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is TorchScript, where momentum is part of the code: do this before scripting or tracing")
    layers: dict[NormLayer, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if tracks(module):
            layers.setdefault(module, []).append(name)
    return layers


def buffers(layer: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the layer's own buffers that hold values; a lazy layer's do not before its first batch."""
    for name, buffer in layer._buffers.items():
        if buffer is not None and not nn.parameter.is_lazy(buffer):
            yield name, buffer


def snapshot(layer: nn.Module) -> Buffers:
    """Copy the layer's buffers."""
    return {name: buffer.detach().clone() for name, buffer in buffers(layer)}


def put_back(layer: nn.Module, saved: Buffers) -> None:
    """Write a snapshot into the layer's buffers, unseen by autograd.

    A graph that is still to be run backward may have saved the running statistics of a training-mode
    forward, whose gradient does not use their values. So the copy must not count as a modification.
    """
    for name, buffer in buffers(layer):
        if name in saved:
            buffer.data.copy_(saved[name])


def moved(now: Buffers, then: Buffers) -> bool:
    """Tell whether two snapshots of a layer differ."""
    return any(name not in then or not torch.equal(now[name], then[name]) for name in now)


def batches_counted(layer: nn.Module) -> int:
    """Read the layer's own count of updates, 0 if it keeps none (InstanceNorm has the buffer, but does not count)."""
    count = layer._buffers.get(COUNTER)
    return 0 if count is None else int(count)


def updates_once(layer: nn.Module) -> bool:
    """Tell whether `update_once` covers the layer: it gives it a `forward` of its own."""
    return getattr(getattr(vars(layer).get("forward"), "func", None), "__module__", None) == "momentum_fix.once"


def refuse_updating_once(layer: nn.Module, names: list[str]) -> None:
    """Raise if `update_once` covers the layer: a corrected momentum would then be wrong."""
    if updates_once(layer):
        raise ValueError(
            f"layer {names[0]!r} moves its statistics once per batch, by update_once, so there is nothing to correct: "
            "call remove() on the handle that update_once gave you first"
        )
