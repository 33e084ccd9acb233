"""Norm layers: which of them track running statistics, and what their names are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Buffers: TypeAlias = dict[str, Any]  # tensors, or None
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
        TypeError: model is no module, or TorchScript, or a part of it with running statistics is.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}, but must be an nn.Module")
    layers: dict[NormLayer, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, torch.jit.ScriptModule):
            if not name or any("running_" in buffer for buffer, _ in module.named_buffers()):
                part = f"the part {name!r} of the model" if name else "model"
                raise TypeError(
                    f"{part} is TorchScript, where momentum is part of the code: do this before scripting or tracing"
                )
        elif tracks(module):
            layers.setdefault(module, []).append(name)
    return layers


def at_gradients(model: nn.Module, hook: Callable[[torch.Tensor], None]) -> list[RemovableHandle]:
    """Have a hook called whenever a backward pass reaches a parameter; none for a model that is frozen."""
    reached = [p for p in model.parameters() if p.requires_grad and not nn.parameter.is_lazy(p)]
    return [p.register_hook(hook) for p in reached]  # type: ignore[no-untyped-call]


def warn_of_none(layers: Collection[NormLayer], what: str, stacklevel: int = 3) -> None:
    """Warn if a model has no layer for what is asked for."""
    if not layers:
        said = f"the model has no layer with running statistics, so there is nothing {what}"
        warnings.warn(said, stacklevel=stacklevel)


def the(name: str) -> str:
    """Write one layer's name for a sentence."""
    return f"layer {name!r}" if name else "the model itself"


def named(layers: Sequence[str]) -> str:
    """Write a list of layers' names for a sentence: five of them at most."""
    shown = ", ".join(name or "(the model)" for name in layers[:5])
    return shown + (f" and {len(layers) - 5} more" if len(layers) > 5 else "")
