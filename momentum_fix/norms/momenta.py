"""Which momenta are corrected ones, and of what: so that nothing is corrected twice, and everything can be undone.

`correct` and `calibrate` leave a mark on a layer, which is copied and pickled with it. A layer that `norm_layer` has
built, or `SyncBatchNorm.convert_sync_batchnorm` anew, has no mark: it is known by its number, and so is a root that was
written by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from momentum_fix.formula import corrected_momentum, effective_momentum

_MARK = "_momentum_fix"  # (the uncorrected momentum, the one that the layer had, the corrected one)
_ROUNDING = 2.0**-52  # what `1 - 0.9 ** 0.5` and the like can be off by
_BY_HAND = range(2, 9)  # passes for which people have written the root by hand, and a few more
_made: dict[float, float] = {}  # the corrected momenta of this process, with the uncorrected ones


def uncorrected(layer: Any) -> Any:
    """Give the momentum that a layer's corrected one was made from, or its momentum if that is not corrected."""
    mark = _mark(layer)
    if mark is not None:
        return mark[0]
    by_hand = corrected_by_hand(layer.momentum)
    return layer.momentum if by_hand is None else by_hand


def is_corrected(layer: Any) -> bool:
    """Tell whether a layer's momentum is a corrected one, whoever corrected it."""
    plain, momentum = uncorrected(layer), layer.momentum
    return plain is not momentum and bool(plain != momentum)


def before(layer: Any) -> Any:
    """Give the momentum that a layer had before this package corrected it, or its momentum if it did not."""
    mark = _mark(layer)
    return layer.momentum if mark is None else mark[1]


def is_marked(layer: Any) -> bool:
    """Tell whether this package has set the layer's momentum, and nobody else since."""
    return _mark(layer) is not None


def _mark(layer: Any) -> tuple[Any, Any, Any] | None:
    mark: tuple[Any, Any, Any] | None = vars(layer).get(_MARK)
    momentum = getattr(layer, "momentum", None)
    if mark is not None and mark[2] == momentum:
        return mark
    made = _made.get(momentum) if type(momentum) is float else None
    return None if made is None else (made, made, momentum)


def made(corrected: float | None, plain: float | None) -> float | None:
    """Remember a corrected momentum by its number, and give it; one of four digits could be anybody's."""
    if corrected is not None and plain is not None and corrected != plain and not _is_short(corrected):
        _made.setdefault(corrected, float(plain))
    return corrected


def set_momenta(momenta: Mapping[Any, Any], plain: Mapping[Any, Any] | None = None) -> None:
    """Set layers' momenta, corrected ones of `plain` momenta if that is given: all, or, if a class refuses, none."""
    old = [(layer, layer.momentum, before(layer)) for layer in momenta]
    try:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
    except Exception:
        for layer, momentum, _ in old:
            if layer.momentum is not momentum:
                layer.momentum = momentum
        raise
    if plain is None:
        return
    for layer, _, first in old:
        vars(layer).pop(_MARK, None)
        if layer.momentum != first:
            vars(layer)[_MARK] = (plain[layer], first, made(layer.momentum, plain[layer]))


def corrected_by_hand(momentum: Any) -> float | None:
    """Give m if the momentum is 1 - (1 - m)**(1/k) for an m of at most four digits, as in `1 - 0.9 ** 0.5`; else None.

    Models carry that number in their source, and other packages set it. A momentum of four digits is never taken
    for one (0.05 would be the root of 0.0975).
    """
    if type(momentum) is not float or not 0 < momentum < 1 or _is_short(momentum):
        return None
    for passes in _BY_HAND:
        m = round(effective_momentum(momentum, passes), 4)
        if abs(momentum - corrected_momentum(m, passes)) <= _ROUNDING:
            return m
    return None


def _is_short(momentum: float) -> bool:
    return abs(momentum - round(momentum, 4)) <= _ROUNDING
