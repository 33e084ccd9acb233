"""The layer factory for model configs: BatchNorm, or any norm with a momentum, built with the corrected one."""

from __future__ import annotations

import difflib
import functools
import inspect
from typing import Any, SupportsFloat, SupportsIndex

from torch import nn

from momentum_fix._torch import is_abstract_norm
from momentum_fix.formula import corrected_momentum


def norm_layer(
    norm: str | type[nn.Module] = "BatchNorm2d",
    *,
    momentum: SupportsFloat | None = 0.1,
    passes: SupportsIndex = 2,
    **kwargs: Any,
) -> functools.partial[nn.Module]:
    """Return a norm layer constructor with the corrected momentum, for a model config.

        partial(norm, momentum=corrected_momentum(momentum, passes), **kwargs)

    The partial holds the plain class and keywords only, so you can use it wherever a model accepts a `norm_layer`,
    and it builds ordinary torch layers. `correct` and `calibrate` recognize the momentum of such a layer as corrected
    by its number, if `momentum` has at most four digits and `passes` is 2 to 8, and start from the uncorrected one;
    `restore` sets the uncorrected one. (0.19 for four passes is the same number as 0.1 for two, and counts as that.)

    Exact for: layers updated `passes` times in a row for each batch. Not for: a model whose layers differ in
    passes (see `calibrate`), or alternating passes of several batches.

    Args:
        norm: a class with a `momentum` argument, or the name of one in `torch.nn`: BatchNorm1d/2d/3d,
            SyncBatchNorm, LazyBatchNorm1d/2d/3d, InstanceNorm1d/2d/3d (these track statistics only with
            `track_running_stats=True`), or your own class.
        momentum: the uncorrected momentum, PyTorch's convention (weight of the new value); 0 to 1, or None.
        passes: updates per batch, an integer of at least 1.
        **kwargs: further arguments of the layer, for example `eps=1e-3`.

    Returns:
        A `functools.partial` of the class, with keywords only. It pickles, deep-copies and prints.

    Raises:
        ValueError: no such class in `torch.nn`; or the class has no `momentum` or is abstract; or momentum or
            passes is out of range.
        TypeError: norm is neither a class nor a name; or momentum or passes is of the wrong type.

    Example:
        >>> layer = norm_layer("BatchNorm3d", eps=1e-3)(16)
        >>> type(layer).__name__, layer.eps, layer.momentum
        ('BatchNorm3d', 0.001, 0.051316701949486204)
    """
    cls = _norm_class(norm)
    return functools.partial(cls, momentum=corrected_momentum(momentum, passes), **kwargs)


def _norm_class(norm: str | type[nn.Module]) -> type[nn.Module]:
    cls = getattr(nn, norm, None) if isinstance(norm, str) else norm
    if isinstance(norm, str) and not isinstance(cls, type):
        names = [name for name, value in vars(nn).items() if isinstance(value, type) and _takes_momentum(value)]
        likeness = {name: difflib.SequenceMatcher(None, norm.lower(), name.lower()).ratio() for name in names}
        nearest = " or ".join(repr(name) for name in names if likeness[name] == max(likeness.values()))
        raise ValueError(f"torch.nn has no class {norm!r}; did you mean {nearest}? Known: {', '.join(names)}")
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"norm is {norm!r}, but must be a norm layer class or the name of one in torch.nn")
    if not _takes_momentum(cls):
        raise ValueError(
            f"{cls.__name__} has no momentum argument, so there is nothing to correct: use it as it is, or give a norm "
            "layer that keeps running statistics, such as BatchNorm2d"
        )
    if inspect.isabstract(cls) or is_abstract_norm(cls):
        raise ValueError(f"{cls.__name__} is an abstract base class: give one that can be used, such as BatchNorm2d")
    return cls


def _takes_momentum(cls: type) -> bool:
    """Look for the argument in the constructor and, as far as that hands on `**kwargs`, in the bases'."""
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            if any(parameter.name == "momentum" for parameter in parameters):
                return True
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                return False
    return False
