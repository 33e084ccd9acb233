"""The number: which momentum makes several updates equal to one."""

from __future__ import annotations

import operator
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any, SupportsFloat, SupportsIndex, overload

_ONE = Decimal(1)
_GUARD_DIGITS = 40  # a double holds 17 digits; the rest keeps every rounding far below its last bit
_SHORT = 1100  # bits: more than a double has after its point (1074), so that one pass is exact as well


@overload
def corrected_momentum(momentum: None, passes: SupportsIndex = 2) -> None: ...
@overload
def corrected_momentum(momentum: SupportsFloat, passes: SupportsIndex = 2) -> float: ...
def corrected_momentum(momentum: SupportsFloat | None, passes: SupportsIndex = 2) -> float | None:
    """Return the momentum for which `passes` equal updates amount to one update with `momentum`.

        m' = 1 - (1 - m)**(1 / passes)

    Exact for: a constant number of passes that follow one another (the forward pass and the recomputations
    of one batch, before the next batch arrives). Not for: alternating passes of several batches; there old batches
    fade at the right speed, but the newest ones are weighted wrongly.

    The result is the double nearest to the true value, on every platform, even where the expression above
    loses all its digits (small m). It is nondecreasing in `momentum`; 0 and 1 are exact.

    Args:
        momentum: PyTorch's convention, the weight of the NEW value; dimensionless, 0 to 1. A Keras or
            TensorFlow momentum of 0.99 is the decay of the OLD value: pass 0.01 for it (0.99 is a legal
            momentum here too, so it is not refused). None is PyTorch's cumulative average. Other numbers are
            accepted, and converted to a double first: NumPy scalars, 0-d tensors (a float32 stands for its own value,
            0.10000000149... for 0.1), fractions, decimals.
        passes: updates per batch, an integer of at least 1.

    Returns:
        The corrected momentum, dimensionless, 0 to 1. None for None, because k equal updates per batch do not
        change a cumulative average. `momentum` itself for one pass.

    Raises:
        ValueError: momentum is outside 0 to 1 or not a number, or passes is below 1.
        TypeError: momentum is not a real number, or passes is not an integer.

    Example:
        >>> corrected_momentum(0.1, passes=2)
        0.051316701949486204
        >>> effective_momentum(0.051316701949486204, passes=2)
        0.1

    Source: for two passes and the decay, P. Goyal's tutorial (2018, prigoyal/pytorch_memonger, pull request 10);
    for PyTorch's momentum, "Checkpoint with BatchNorm running averages", discuss.pytorch.org/t/17738 (2018).
    """
    return power_of_decay(momentum, Fraction(1, read_passes(passes)))


@overload
def effective_momentum(momentum: None, passes: SupportsIndex = 2) -> None: ...
@overload
def effective_momentum(momentum: SupportsFloat, passes: SupportsIndex = 2) -> float: ...
def effective_momentum(momentum: SupportsFloat | None, passes: SupportsIndex = 2) -> float | None:
    """Return the momentum that `passes` equal updates with `momentum` amount to.

        m_eff = 1 - (1 - m)**passes

    This is the inverse of `corrected_momentum`, under the same conditions: the momentum that a model trained with
    uncorrected checkpointing really used. The result is the double nearest to the true value; of two equally near
    ones, the even one. If 1 - m_eff falls below the resolution of a double, the result is 1 and has no inverse.

    Args:
        momentum: PyTorch's convention, the weight of the NEW value; dimensionless, 0 to 1, or None.
        passes: updates per batch, an integer of at least 1.

    Returns:
        The effective momentum, dimensionless, 0 to 1; None for None; `momentum` itself for one pass.

    Raises:
        ValueError: momentum is outside 0 to 1 or not a number, or passes is below 1.
        TypeError: momentum is not a real number, or passes is not an integer.

    Example:
        >>> effective_momentum(0.1, passes=2)
        0.19
        >>> effective_momentum(0.1, passes=5)
        0.40951000000000004

    Source: for two passes and the decay, P. Goyal's tutorial (2018, prigoyal/pytorch_memonger, pull request 10);
    for PyTorch's momentum, "Checkpoint with BatchNorm running averages", discuss.pytorch.org/t/17738 (2018).
    """
    return power_of_decay(momentum, Fraction(read_passes(passes)))


def power_of_decay(momentum: SupportsFloat | None, exponent: Fraction) -> float | None:
    """Return the double nearest to 1 - (1 - momentum)**exponent, for an exponent above 0.

    Where the power has few bits it is computed exactly, so that a result halfway between two doubles goes to the even
    one. That is all such results for a whole exponent k: momentum = a / 2**e with a odd gives more than e * (k - 1)
    significant bits, and halfway means 54. A fractional exponent can have others; they may go to either neighbour.

    Elsewhere every operation is correctly rounded and monotone, and all but the last keep at least 40 digits beyond
    the term in m**2, which decides where the term in m lies halfway between two doubles. The ends take care of
    themselves: ln(1) is 0, ln(0) is -Infinity and exp(-Infinity) is 0.
    """
    if momentum is None:
        return None
    value = read_momentum(momentum)
    exact = Fraction(value)
    if exponent.denominator == 1 and (exact.denominator.bit_length() - 1) * exponent.numerator < _SHORT:
        return float(1 - (1 - exact) ** exponent.numerator)
    m, up, down = Decimal.from_float(value), Decimal(exponent.numerator), Decimal(exponent.denominator)
    digits = _GUARD_DIGITS - 2 * m.adjusted() + up.adjusted() + down.adjusted()
    context = Context(prec=digits, traps=[])
    log_decay = context.ln(context.subtract(_ONE, m))
    log_power = context.divide(context.multiply(log_decay, up), down)
    return float(context.subtract(_ONE, context.exp(log_power)))


def read_momentum(momentum: SupportsFloat) -> float:
    """Read a momentum, or raise an error that says what it is."""
    value = _scalar(momentum)
    try:
        if isinstance(value, (bool, str, bytes, bytearray)):
            raise TypeError
        inside = bool(0 <= value <= 1)  # before converting, which would round what lies just outside
        m = float(value) if inside else 0.0
    except ArithmeticError:  # a NaN of decimal's
        inside = False
    except TypeError:
        raise TypeError(
            f"momentum is {_shown(momentum)}, but must be one real number in 0 to 1, or None for a cumulative average"
        ) from None
    if not inside:
        raise ValueError(
            f"momentum is {_shown(momentum)}, but must lie in 0 to 1: it is the weight of the new value (0.1 by "
            "default in PyTorch; for a Keras or TensorFlow decay d, pass 1 - d)"
        )
    return abs(m)  # -0.0 becomes 0.0


def read_passes(passes: SupportsIndex) -> int:
    """Read a number of passes, or raise an error that says what it is."""
    return positive_integer(
        "passes", passes, "the number of updates per batch (1 without checkpointing, 2 for one checkpoint)"
    )


def positive_integer(name: str, value: SupportsIndex, meaning: str) -> int:
    """Read a count, or raise an error that says what it is."""
    message = f"{name} is {_shown(value)}, but must be an integer of at least 1: {meaning}"
    scalar = _scalar(value)
    try:
        if isinstance(scalar, bool):
            raise TypeError
        count = operator.index(scalar)
    except TypeError:
        raise TypeError(message) from None
    if count < 1:
        raise ValueError(message)
    return count


def _scalar(value: Any) -> Any:
    """Unpack a NumPy scalar or a 0-d array or tensor; give None, which no reader accepts, for what is not one number.

    That is a longer one, one that is masked, a time, or a tensor without a value.
    """
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        is_time = getattr(getattr(value, "dtype", None), "kind", "") in ("m", "M")
        try:
            return None if is_time or getattr(value, "mask", False) else value.item()
        except RuntimeError:
            return None
    return None if getattr(value, "shape", ()) else value


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes no integer of thousands of digits
        return "a number of thousands of digits"
