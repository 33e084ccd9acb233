"""Which momenta are corrected, and from which value: so that nothing is corrected twice, and everything can be undone.

`correct` and `calibrate` leave a mark on a layer, which is copied and pickled with it. A layer without a mark (built by
`norm_layer`, rebuilt by `SyncBatchNorm.convert_sync_batchnorm`, or with a root that was written by hand) is known by
its number, if that has more than four digits and the uncorrected one has at most four.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from momentum_fix.formula import corrected_momentum, effective_momentum

_MARK = "_momentum_fix"  # (the uncorrected momentum, the one that the layer had, the corrected one, what is uncounted)
_ROUNDING = 2.0**-52  # what `1 - 0.9 ** 0.5` and the like can be off by
_BY_HAND = range(2, 9)  # passes for which people have written the root by hand, and a few more


def uncorrected(layer: Any) -> Any:
    """Give the momentum that a layer's corrected one was made from, or its momentum if that is not corrected."""
    return _known(layer)[0]


def original_momentum(layer: Any) -> Any:
    """Give the momentum that a layer had before this package corrected it, or its momentum if it did not."""
    return _known(layer)[1]


def is_corrected(layer: Any) -> bool:
    """Tell whether a layer's momentum is a corrected one, whoever corrected it."""
    return differ(uncorrected(layer), layer.momentum)


def uncounted(layer: Any) -> int:
    """Give how many recomputations `calibrate` has run on copies of a layer's buffers, its counter among them."""
    mark = _mark_of(layer)
    return int(mark[3]) if mark is not None and len(mark) > 3 else 0  # an older one has three


def note_uncounted(layer: Any, updates: int) -> None:
    """Note that the counter of a layer, if that is corrected, lacks so many updates more."""
    if (mark := _mark_of(layer)) is not None:
        vars(layer)[_MARK] = *mark[:3], uncounted(layer) + updates


def is_undone_by_restore(layer: Any) -> bool:
    """Tell whether `restore` sets the uncorrected momentum, and not a root that was written by hand."""
    return not differ(original_momentum(layer), uncorrected(layer))


def is_changed(module: Any) -> bool:
    """Tell whether this package has set a module's momentum, and nobody else since."""
    return differ(original_momentum(module), getattr(module, "momentum", None))


def _mark_of(module: Any) -> tuple[Any, ...] | None:
    """Give a layer's mark, if nobody has set its momentum since."""
    mark: tuple[Any, ...] | None = vars(module).get(_MARK)
    return None if mark is None or differ(mark[2], getattr(module, "momentum", None)) else mark


def _known(module: Any) -> tuple[Any, Any]:
    if (mark := _mark_of(module)) is not None:
        return mark[0], mark[1]
    momentum = getattr(module, "momentum", None)
    root = corrected_by_hand(momentum)
    if root is None:
        return momentum, momentum
    return root, root if any(momentum == corrected_momentum(root, passes) for passes in _BY_HAND) else momentum


def differ(one: Any, other: Any) -> bool:
    """Tell whether two momenta differ; an array, which is no momentum, differs from each."""
    try:
        return one is not other and bool(one != other)
    except (RuntimeError, ValueError):
        return True


def set_momenta(momenta: Mapping[Any, Any]) -> None:
    """Set layers' momenta: all, or, if a class refuses, none."""
    with ExitStack() as undo:
        for layer, momentum in momenta.items():
            old, layer.momentum = layer.momentum, momentum
            undo.callback(setattr, layer, "momentum", old)
        undo.pop_all()


def set_corrected(momenta: Mapping[Any, Any], plain: Mapping[Any, Any]) -> None:
    """Set layers' momenta, corrected from `plain`, and mark the layers; all or none."""
    before = {layer: (original_momentum(layer), uncounted(layer)) for layer in momenta}
    set_momenta(momenta)
    for layer, (original, updates) in before.items():
        vars(layer).pop(_MARK, None)
        if layer.momentum != original:
            vars(layer)[_MARK] = plain[layer], original, layer.momentum, updates


def corrected_by_hand(momentum: Any) -> float | None:
    """Give m if the momentum is 1 - (1 - m)**(1/k) for an m of at most four digits, as in `1 - 0.9 ** 0.5`; else None.

    Models carry that number in their source, and other packages set it. Of several such m, the one with the smallest k
    counts (0.1 for two passes is 0.19 for four). A momentum of four digits is never taken for one (0.05 would be the
    root of 0.0975).
    """
    if type(momentum) is not float or not 0 < momentum < 1 or abs(momentum - round(momentum, 4)) <= _ROUNDING:
        return None
    for passes in _BY_HAND:
        m = round(effective_momentum(momentum, passes), 4)
        if abs(momentum - corrected_momentum(m, passes)) <= _ROUNDING:
            return m
    return None
