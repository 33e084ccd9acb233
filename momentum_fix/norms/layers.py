"""Norm layers: which classes are known, which layers of a model track running statistics, and what they are called."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Buffers: TypeAlias = dict[str, Any]  # tensors, or None
NormLayer: TypeAlias = Any  # an nn.Module with a `momentum`, for which torch has no type


class Norm(NamedTuple):
    """What is known of the forward of a class of norm layers, and of the classes that inherit it."""

    defined_in: type[nn.Module] | str  # the class, or its module and name where its library may not be installed
    statistics: tuple[str, ...] = ("running_mean", "running_var")  # the buffers that a training-mode forward updates
    reads_them: bool = False  # whether the output of that forward depends on them
    needs_counter: bool = False  # whether it needs num_batches_tracked


NORMS = (
    Norm(nn.BatchNorm1d),  # which shares its forward with BatchNorm2d, 3d and the lazy ones
    Norm(nn.InstanceNorm1d),
    Norm(nn.SyncBatchNorm, needs_counter=True),
    Norm("timm.layers.norm_act.BatchNormAct2d"),
    Norm("timm.layers.norm_act.SyncBatchNormAct", needs_counter=True),
)
_BY_FORWARD = {f"{n.defined_in}.forward" if isinstance(n.defined_in, str) else n.defined_in.forward: n for n in NORMS}
_ANY = Norm(nn.Module, reads_them=True)  # what is not known may read them
_CONTAINERS = (list, tuple, dict)


def norm_of(layer: nn.Module) -> Norm:
    """Give what is known of a layer's class."""
    forward: Any = type(layer).forward
    if forward in _BY_FORWARD:
        return _BY_FORWARD[forward]
    return _BY_FORWARD.get(f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}", _ANY)


def only_writes(layer: nn.Module) -> bool:
    """Tell whether a layer's class is known not to read its statistics for its output in training."""
    return not norm_of(layer).reads_them


def tracks(module: nn.Module) -> bool:
    """Tell whether a training-mode forward pass moves running statistics of this module with its momentum.

    True for torch's norm layers with `track_running_stats` and for any class of a user's own that has a
    momentum and a running_mean or running_var buffer.
    """
    return (
        any(module._buffers.get(name) is not None for name in norm_of(module).statistics)
        and hasattr(module, "momentum")
        and getattr(module, "track_running_stats", True)
    )


def is_statistic(module: nn.Module, name: str) -> bool:
    """Tell whether a piece of a module's state is a running statistic of it, or their counter."""
    return tracks(module) and name in (*norm_of(module).statistics, "num_batches_tracked") and name in module._buffers


def is_unread_statistic(module: nn.Module, name: str) -> bool:
    """Tell whether it is one that no output in training mode depends on."""
    return is_statistic(module, name) and only_writes(module)


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


def warn_of_none(layers: Collection[NormLayer], what: str, stacklevel: int = 3) -> None:
    """Warn if a model has no layer for what is asked for."""
    if not layers:
        said = f"the model has no layer with running statistics, so there is nothing {what}"
        warnings.warn(said, stacklevel=stacklevel)


def in_plain_lists(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Give the modules in a module's plain lists and dicts, where torch does not find them, each with its place."""
    # A weak proxy is none of these; `isinstance` would ask what it stands for.
    own = {name: value for name, value in vars(module).items() if name != "_modules"}
    waiting = [(name, value) for name, value in own.items() if issubclass(type(value), _CONTAINERS)]
    seen = {id(value) for _, value in waiting}
    for place, value in waiting:
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            if issubclass(type(each), nn.Module):
                yield f"{place}[{key!r}]", each
            elif issubclass(type(each), _CONTAINERS) and id(each) not in seen:
                seen.add(id(each))
                waiting.append((f"{place}[{key!r}]", each))


def warn_of_hidden(model: nn.Module) -> None:
    """Warn of layers that are in plain lists or dicts of the model's modules alone."""
    registered = {id(module) for module in model.modules()}
    hidden = [
        f"{name}.{place}".lstrip(".")
        for name, module in model.named_modules()
        for place, each in in_plain_lists(module)
        if id(each) not in registered and any(map(tracks, each.modules()))
    ]
    if hidden:
        said = f"{join_names(hidden)}: in a plain list or dict, so update_once does not reach it: use an nn.ModuleList"
        warnings.warn(said, stacklevel=3)


def at_gradients(model: nn.Module, hook: Callable[[torch.Tensor], None]) -> list[RemovableHandle]:
    """Have a hook called whenever a backward pass reaches a parameter; none for a model that is frozen."""
    return [p.register_hook(hook) for p in trained(model)]  # type: ignore[no-untyped-call]


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Give the parameters that gradients train and that hooks can be put on."""
    return [p for p in model.parameters() if p.requires_grad and not nn.parameter.is_lazy(p)]


def describe_layer(name: str) -> str:
    """Write one layer's name for a sentence."""
    return f"layer {name!r}" if name else "the model itself"


def join_names(layers: Sequence[str]) -> str:
    """Write a list of layers' names for a sentence: five of them at most."""
    shown = ", ".join(name or "(the model)" for name in layers[:5])
    return shown + (f" and {len(layers) - 5} more" if len(layers) > 5 else "")
