"""A corrected momentum knows the momentum that it was made from, so that nothing is corrected twice."""

from __future__ import annotations

from typing import Any, SupportsFloat

from momentum_fix.formula import corrected_momentum, effective_momentum

_ROUNDING = 2.0**-52  # what `1 - 0.9 ** 0.5` and the like can be off by
_BY_HAND = range(2, 9)  # passes for which people have written the root by hand, and a few more


class Corrected(float):
    """A momentum that a layer has got from this package: a float in every respect, which also knows two others.

    It travels with the layer: through `copy.deepcopy`, pickling and `SyncBatchNorm.convert_sync_batchnorm`. Whatever
    is computed from it is a plain float again, so a momentum that you set yourself is never taken for a corrected one.
    """

    uncorrected: float  # what one update per batch would use
    before: float  # what the layer had before this package changed it

    def __new__(cls, value: float, uncorrected: float, before: float) -> Corrected:
        self = super().__new__(cls, value)
        self.uncorrected, self.before = uncorrected, before
        return self

    def __getnewargs__(self) -> tuple[float, float, float]:  # type: ignore[override]
        return float(self), self.uncorrected, self.before


def marked(value: float | None, uncorrected: float | None, before: float | None) -> float | None:
    """Give a layer's new momentum, which knows the other two, unless it is the one that the layer had."""
    if value is None or uncorrected is None or before is None or value == before:
        return before
    return Corrected(value, uncorrected, before)


def uncorrected(momentum: Any) -> Any:
    """Give the momentum that a corrected one was made from, and any other momentum as it is."""
    if isinstance(momentum, Corrected):
        return momentum.uncorrected
    by_hand = corrected_by_hand(momentum)
    return momentum if by_hand is None else by_hand


def unmarked(momentum: Any) -> Any:
    """Give the momentum that a layer had before this package corrected it, and any other momentum as it is."""
    return momentum.before if isinstance(momentum, Corrected) else momentum


def corrected_by_hand(momentum: SupportsFloat | None) -> float | None:
    """Give m if the momentum is 1 - (1 - m)**(1/k) for an m of at most four digits, as in `1 - 0.9 ** 0.5`; else None.

    Models carry that number in their source, and other packages set it. A momentum of four digits is never taken
    for one (0.05 would be the root of 0.0975).
    """
    if type(momentum) is not float or not 0 < momentum < 1 or _close(momentum, round(momentum, 4)):
        return None
    for passes in _BY_HAND:
        m = round(effective_momentum(momentum, passes), 4)
        if 0 < m < 1 and _close(momentum, corrected_momentum(m, passes)):
            return m
    return None


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= _ROUNDING
