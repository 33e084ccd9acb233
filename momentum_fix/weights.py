"""How much each batch weighs in today's running value, for any order of updates."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from numbers import Rational
from typing import Any, NamedTuple

from momentum_fix.formula import effective_momentum, read_momentum, read_passes


class Weights(NamedTuple):
    """What a running value consists of: `initial` of its first value and `batches[b]` of batch b's statistic."""

    initial: Any
    batches: dict[Hashable, Any]


def batch_weights(order: Iterable[Hashable], momentum: Any, passes: int = 1) -> Weights:
    """Give the weight of every batch, and of the initial value, after a run of updates.

        weight of update t = m_t * (1 - m_{t+1}) * ... * (1 - m_T);   a batch weighs the sum of its updates

        k passes in a row are one update:   m_t = 1 - (1 - momentum)**k

    All weights together are 1. Exact for: every order, repetition included. Integers, fractions and SymPy
    expressions give exact weights, whose digits grow with `passes`; floats give floats, however many passes.

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
    passes, entries = read_passes(passes), list(order)
    if momentum is not None and not getattr(momentum, "free_symbols", None):
        read_momentum(momentum)
    exact = isinstance(momentum, Rational) or hasattr(momentum, "free_symbols")
    share: Any = 1 - (1 - momentum) ** passes if exact else effective_momentum(momentum, passes)
    batches: dict[Hashable, Any] = dict.fromkeys(entries, 0)
    kept: Any = 1  # what the updates after this entry leave of it
    for number in range(len(entries), 0, -1):
        # k passes of a cumulative average keep N/(N+k) of what N gave: with N = k (number - 1) that is 1 - 1/number.
        weight = 1 / number if share is None else share
        batches[entries[number - 1]] += kept * weight
        kept *= 1 - weight
    return Weights(kept, batches)
