"""The number, judged against 1,400-digit arithmetic, exact cases, and wrong input."""

import decimal
import math
import random
import struct
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from momentum_fix import corrected_momentum, effective_momentum

SMALLEST, BELOW_ONE = 5e-324, 1 - 2**-53
EDGES = [SMALLEST, 2.3e-308, 1e-300, 1e-100, 1e-17, 2**-53, 1e-8, 0.01, 0.1, 0.5, 0.9, 0.99, BELOW_ONE]
DOUBLE_TENSOR = torch.tensor(0.1, dtype=torch.float64)
PASSES = [2, 3, 4, 5, 7, 10, 1000, 999_983, 1_000_000]

doubles = st.floats(0.0, 1.0, allow_subnormal=True)
near_one = st.integers(1, 2**40).map(lambda steps: 1 - steps * 2**-53)
momenta = st.one_of(doubles, near_one)
passes_ = st.integers(1, 1_000_000)


def textbook(momentum, passes):
    return 1 - (1 - momentum) ** (1 / passes)


def true_value(momentum, exponent):
    """1 - (1-m)**exponent for a rational exponent, to far more digits than a double has."""
    with mpmath.workdps(1400):
        power = mpmath.mpf(exponent.numerator) / exponent.denominator
        return 1 - (1 - mpmath.mpf(momentum)) ** power


def error_in_ulp(value, true):
    with mpmath.workdps(1400):
        return float(abs(mpmath.mpf(value) - true) / mpmath.mpf(math.ulp(float(true))))


def sample_of_doubles(count):
    rng = random.Random(20180503)
    for _ in range(count):
        yield rng.random()
        yield struct.unpack("d", struct.pack("Q", rng.randrange(1, 0x3FF0000000000000)))[0]  # every exponent alike
        yield 1 - rng.randrange(1, 2**30) * 2**-53


def worst_ulp(function, exponent_of):
    rng = random.Random(7)
    worst = 0.0
    for momentum in [*EDGES, *sample_of_doubles(150)]:
        for passes in [2, rng.choice(PASSES), rng.randrange(2, 1_000_000)]:
            true = true_value(momentum, exponent_of(passes))
            worst = max(worst, error_in_ulp(function(momentum, passes), true))
    return worst


def test_the_textbook_number():
    assert corrected_momentum(0.1, passes=2) == pytest.approx(0.0513167, abs=5e-8)
    assert corrected_momentum(0.1) == pytest.approx(1 - math.sqrt(0.9), rel=1e-15)
    assert effective_momentum(0.1) == pytest.approx(0.19, rel=1e-15)


def test_corrected_momentum_is_the_nearest_double():
    assert worst_ulp(corrected_momentum, lambda k: Fraction(1, k)) <= 0.5000001


def test_effective_momentum_is_the_nearest_double():
    assert worst_ulp(effective_momentum, lambda k: Fraction(k)) <= 0.5000001


def nearest_double(true):
    """The nearest double to a fraction in 0 to 1, and whether two are equally near; the even one then."""
    guess = float(true)
    near = sorted(
        {math.nextafter(guess, -1.0), guess, math.nextafter(guess, 2.0)}, key=lambda d: abs(Fraction(d) - true)
    )
    halfway = abs(Fraction(near[0]) - true) == abs(Fraction(near[1]) - true)
    even = [d for d in near[:2] if Fraction(d) / Fraction(math.ulp(min(near[:2]))) % 2 == 0]
    return (even[0] if halfway else near[0]), halfway


def test_an_effective_momentum_halfway_between_two_doubles_goes_to_the_even_one():
    ties = 0
    for bits in range(1, 9):
        for odd in range(1, 2**bits, 2):
            for passes in range(1, 61):
                momentum = odd / 2**bits
                expected, halfway = nearest_double(1 - (1 - Fraction(momentum)) ** passes)
                assert effective_momentum(momentum, passes) == expected
                ties += halfway
    assert ties == 42  # so the rule is needed
    assert effective_momentum(0.625, 18) == 0.9999999784938427


def test_a_corrected_momentum_is_never_halfway_between_two_doubles():
    """A halfway value is 1 - d with 54 bits; m = 1 - d**k would have more than 53, and be no double."""
    rng = random.Random(54)
    for passes in (2, 3, 5):
        for _ in range(200):
            bits = rng.randrange(54, 70)
            halfway = Fraction(rng.randrange(2**53, 2**54) | 1, 2**bits)
            momentum = 1 - (1 - halfway) ** passes
            assert Fraction(float(momentum)) != momentum


@pytest.mark.parametrize("passes", [10**20, 10**30])
@pytest.mark.parametrize("momentum", [1e-300, 1e-17, 0.1, BELOW_ONE])
def test_the_digits_suffice_for_any_number_of_passes(momentum, passes):
    assert error_in_ulp(corrected_momentum(momentum, passes), true_value(momentum, Fraction(1, passes))) <= 0.5000001
    tiny = momentum / passes
    assert error_in_ulp(effective_momentum(tiny, passes), true_value(tiny, Fraction(passes))) <= 0.5000001


def test_the_textbook_expression_loses_every_digit_for_small_momentum():
    true = true_value(1e-17, Fraction(1, 2))
    assert error_in_ulp(textbook(1e-17, 2), true) > 1e15
    assert error_in_ulp(corrected_momentum(1e-17, 2), true) <= 0.5


@given(momenta, passes_)
def test_both_are_nondecreasing_in_momentum(momentum, passes):
    above = math.nextafter(momentum, 1.0)
    assert corrected_momentum(momentum, passes) <= corrected_momentum(above, passes)
    assert effective_momentum(momentum, passes) <= effective_momentum(above, passes)


@given(momenta, passes_)
def test_the_correction_only_ever_lowers_and_stays_in_range(momentum, passes):
    corrected = corrected_momentum(momentum, passes)
    assert 0 <= corrected <= momentum <= effective_momentum(momentum, passes) <= 1
    assert corrected >= momentum / passes * (1 - 2**-52)


@given(momenta, st.integers(1, 1000), st.integers(1, 1000))
@example(SMALLEST, 1000, 1000)
@example(BELOW_ONE, 2, 3)
def test_correcting_for_a_then_for_b_passes_is_correcting_for_a_times_b(momentum, a, b):
    between = corrected_momentum(momentum, a)
    twice = corrected_momentum(between, b)
    slope = (1 - between) ** (1 / b - 1) / b if between < 1 else 0.0  # what rounding `between` costs
    once = corrected_momentum(momentum, a * b)
    assert twice == pytest.approx(once, rel=3e-16, abs=slope * math.ulp(between) + SMALLEST)


@given(momenta, passes_)
@example(0.1, 2)
@example(BELOW_ONE, 1_000_000)
def test_effective_brings_corrected_back(momentum, passes):
    corrected = corrected_momentum(momentum, passes)
    if corrected >= 2.3e-308:  # a subnormal has too few bits left to come back from
        assert effective_momentum(corrected, passes) == pytest.approx(momentum, rel=4e-16)


@given(st.floats(0.0, 0.5), st.integers(1, 20))
def test_corrected_brings_effective_back_while_it_is_below_one(momentum, passes):
    effective = effective_momentum(momentum, passes)
    lost = 1e-15 / (1 - effective)  # what rounding near 1 costs on the way back
    assert corrected_momentum(effective, passes) == pytest.approx(momentum, rel=1e-15 + lost)


@pytest.mark.parametrize("passes", [1, *PASSES, 10**30, 10**400])
def test_zero_and_one_are_exact(passes):
    for function in (corrected_momentum, effective_momentum):
        assert function(0, passes) == 0.0
        assert function(-0.0, passes) == 0.0
        assert function(1, passes) == 1.0


def test_a_half_is_gone_after_any_number_of_passes():
    assert effective_momentum(0.5, 10**30) == 1.0


@given(doubles)
def test_one_pass_returns_the_number_unchanged(momentum):
    assert corrected_momentum(momentum, passes=1) == momentum
    assert effective_momentum(momentum, passes=1) == momentum


def test_a_cumulative_average_needs_no_correction():
    assert corrected_momentum(None, passes=3) is None
    assert effective_momentum(None) is None


def test_the_result_does_not_depend_on_the_callers_decimal_context():
    with decimal.localcontext(decimal.Context(prec=3, Emin=-5, Emax=5)):
        assert corrected_momentum(0.1, passes=2) == 0.051316701949486204
        assert corrected_momentum(1e-300, passes=2) == 5e-301
    with decimal.localcontext(decimal.Context(traps=[decimal.Inexact, decimal.FloatOperation, decimal.Underflow])):
        assert corrected_momentum(0.1, passes=2) == 0.051316701949486204
        assert effective_momentum(BELOW_ONE, passes=10**9) == 1


def test_the_result_does_not_depend_on_the_context_that_others_are_made_from(monkeypatch):
    monkeypatch.setitem(decimal.DefaultContext.traps, decimal.Inexact, True)
    with pytest.raises(decimal.Inexact):
        decimal.Context().divide(decimal.Decimal(1), decimal.Decimal(3))
    assert corrected_momentum(0.1, passes=2) == 0.051316701949486204


@pytest.mark.parametrize(
    "momentum",
    [np.float64(0.1), np.array(0.1), DOUBLE_TENSOR, DOUBLE_TENSOR.clone().requires_grad_(), Fraction(0.1)],
    ids=repr,
)
@pytest.mark.parametrize("passes", [3, np.int8(3), np.uint64(3), np.array(3), torch.tensor(3)], ids=repr)
def test_numpy_and_torch_scalars_are_accepted(momentum, passes):
    for function in (corrected_momentum, effective_momentum):
        result = function(momentum, passes)
        assert type(result) is float
        assert result == function(0.1, 3)


def test_a_number_may_have_an_item_that_is_something_else():
    class Priced(float):
        item = "a momentum"

    assert corrected_momentum(Priced(0.1)) == corrected_momentum(0.1)


def test_a_masked_array_without_a_masked_value_is_its_number():
    assert corrected_momentum(np.ma.array(0.1), np.ma.array(3)) == corrected_momentum(0.1, 3)


@pytest.mark.parametrize("single", [np.float32(0.1), torch.tensor(0.1, dtype=torch.float32)], ids=repr)
def test_a_float32_stands_for_its_own_value(single):
    assert corrected_momentum(single) == corrected_momentum(float(np.float32(0.1))) != corrected_momentum(0.1)


@pytest.mark.parametrize(
    "momentum",
    [
        -1e-300,
        math.nextafter(1, 2),
        1.5,
        -0.1,
        math.nan,
        math.inf,
        -math.inf,
        10**400,
        torch.tensor(2.0),
        Fraction(10**20 + 1, 10**20),  # as a float it would be 1
        Fraction(-1, 10**400),  # as a float it would be 0
        decimal.Decimal("1.00000000000000000001"),
        decimal.Decimal("NaN"),
        decimal.Decimal("sNaN"),
    ],
)
@pytest.mark.parametrize("function", [corrected_momentum, effective_momentum])
def test_momentum_out_of_range_is_refused_with_value_range_and_remedy(function, momentum):
    with pytest.raises(ValueError, match=r"must lie in 0 to 1.*pass 1 - d") as caught:
        function(momentum)
    assert f"momentum is {momentum!r}, but" in str(caught.value)


@pytest.mark.parametrize(
    "momentum",
    [
        *(True, np.True_, "0.1", b"0.1", 1j, [0.1], np.array([0.1]), torch.tensor([0.1]), torch.tensor(True)),
        *(
            torch.empty((), device="meta"),
            np.ma.masked,
            np.timedelta64(0),
            np.timedelta64(0, "s"),
            np.datetime64("NaT"),
        ),
    ],
)
def test_momentum_that_is_no_real_number_is_a_type_error(momentum):
    with pytest.raises(TypeError, match="must be one real number in 0 to 1, or None for a cumulative") as caught:
        corrected_momentum(momentum)
    assert f"momentum is {momentum!r}, but" in str(caught.value)


@pytest.mark.parametrize("passes", [0, -1, -(10**30), np.int64(0), torch.tensor(0)])
@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
def test_fewer_than_one_pass_is_refused(momentum, passes):
    with pytest.raises(ValueError, match=r"must be an integer of at least 1.*2 for one checkpoint") as caught:
        corrected_momentum(momentum, passes)
    assert f"passes is {passes!r}, but" in str(caught.value)


@pytest.mark.parametrize(
    "passes",
    [
        *(2.0, True, np.True_, "2", None, math.nan, Fraction(2), np.float64(2), torch.tensor(2.0), torch.tensor([2])),
        *(torch.empty((), dtype=torch.long, device="meta"), np.ma.masked, np.timedelta64(2)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_passes_that_are_no_integer_are_a_type_error(momentum, passes):
    with pytest.raises(TypeError, match="must be an integer of at least 1") as caught:
        effective_momentum(momentum, passes)
    assert f"passes is {passes!r}, but" in str(caught.value)


def test_numbers_that_python_does_not_write_are_numbers_like_any_others():
    assert corrected_momentum(0.1, 10**5000) == corrected_momentum(0.1, 10**4000) == 0
    assert effective_momentum(0.1, 10**5000) == 1
    with pytest.raises(
        ValueError, match="passes is a number of thousands of digits, but must be an integer of at least 1"
    ):
        corrected_momentum(0.1, -(10**5000))
    with pytest.raises(ValueError, match="momentum is a number of thousands of digits, but must lie in 0 to 1"):
        effective_momentum(10**5000)
