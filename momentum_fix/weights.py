"""How much each batch weighs in today's running value, for any order of updates."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

from momentum_fix.formula import _momentum, _passes


class Weights(NamedTuple):
    """What a running value consists of: `initial` of its first value and `batches[b]` of batch b's statistic."""

    initial: Any
    batches: dict[Hashable, Any]


def batch_weights(order: Iterable[Hashable], momentum: Any, passes: int = 1) -> Weights:
    """Give the weight of every batch, and of the initial value, after a run of updates.

        weight of update t = m_t * (1 - m_{t+1}) * ... * (1 - m_T);   a batch weighs the sum of its updates

    All weights together are 1. Exact for: every order, repetition included. Fractions and SymPy symbols are
    computed exactly, floats as floats.

    Args:
        order: which batch each update saw, oldest first ("ABBA": A, then B, then B, then A again).
        momentum: the momentum that every single update uses (PyTorch's convention, dimensionless, 0 to 1), as
            it stands in the layer: corrected or not. None is PyTorch's cumulative average, m_t = 1/t.
        passes: how many updates stand for each entry of `order`, one after the other.

    Returns:
        Weights(initial, batches): dimensionless; `batches` maps each batch of `order` to its weight, in the
        order in which they first came.

    Raises:
        ValueError: momentum is outside 0 to 1, or passes is below 1.
        TypeError: momentum is not a real number (or a symbol), or passes is not an integer.

    Example:
        >>> from fractions import Fraction
        >>> batch_weights("AB", Fraction(1, 10), passes=2).batches["B"]
        Fraction(19, 100)
        >>> batch_weights("ABBA", Fraction(1, 10)).initial
        Fraction(6561, 10000)

    Source: "Checkpoint with BatchNorm running averages", discuss.pytorch.org/t/17738 (2018), unrolled.
    """
    repeats = range(_passes(passes))
    if momentum is not None and not getattr(momentum, "free_symbols", None):
        _momentum(momentum)
    updates = [batch for batch in order for _ in repeats]
    batches: dict[Hashable, Any] = dict.fromkeys(updates, 0)
    kept: Any = 1  # what the updates after this one leave of it
    for number in range(len(updates), 0, -1):
        share = 1 / number if momentum is None else momentum
        batches[updates[number - 1]] += kept * share
        kept *= 1 - share
    return Weights(kept, batches)
