"""The weights: against a plain loop, against exact fractions, against symbols, and wrong input."""

import math
import random
from fractions import Fraction

import pytest
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from momentum_fix import corrected_momentum, effective_momentum
from momentum_fix.weights import batch_weights

TENTH = Fraction(1, 10)
orders = st.lists(st.integers(0, 5), max_size=12)
fractions = st.fractions(0, 1, max_denominator=50)


def run(order, momentum, statistics, value, passes=1):
    """The definition: update after update."""
    number = 0
    for batch in order:
        for _ in range(passes):
            number += 1
            share = Fraction(1, number) if momentum is None else momentum
            value = (1 - share) * value + share * statistics[batch]
    return value


@given(orders, fractions, st.integers(1, 4))
def test_the_weighted_sum_is_the_running_value(order, momentum, passes):
    statistics = [Fraction(batch * batch + 3, 7) for batch in range(6)]
    weights = batch_weights(order, momentum, passes)
    weighted = sum(weight * statistics[batch] for batch, weight in weights.batches.items())
    assert weights.initial * Fraction(11, 3) + weighted == run(order, momentum, statistics, Fraction(11, 3), passes)


@given(orders, fractions)
def test_the_weights_sum_to_one_and_the_old_value_does_not_care_about_the_order(order, momentum):
    weights = batch_weights(order, momentum)
    assert weights.initial + sum(weights.batches.values()) == 1
    assert weights.initial == (1 - momentum) ** len(order)


def test_passes_repeat_each_entry_in_its_place():
    assert batch_weights("AB", TENTH, passes=3) == batch_weights("AAABBB", TENTH)
    assert batch_weights("AB", TENTH, passes=3) != batch_weights("ABABAB", TENTH)


@given(orders, fractions, st.integers(1, 4))
def test_passes_in_closed_form_weigh_as_passes_written_out(order, momentum, passes):
    written_out = [batch for batch in order for _ in range(passes)]
    assert batch_weights(order, momentum, passes) == batch_weights(written_out, momentum)
    by_floats = batch_weights(order, float(momentum), passes)
    assert by_floats.batches == pytest.approx(batch_weights(order, momentum, passes).batches, rel=1e-13, abs=1e-15)
    means = batch_weights(order, None, passes).batches
    assert means == pytest.approx(batch_weights(written_out, None).batches, rel=1e-13)


def test_any_number_of_passes_costs_no_memory():
    assert batch_weights("AB", 0.1, passes=10**18) == (0, {"A": 0, "B": 1})
    weights = batch_weights("AB", 1e-18, passes=10**18)
    assert weights.batches["B"] == pytest.approx(1 - math.exp(-1), rel=1e-15)
    assert weights.initial + sum(weights.batches.values()) == pytest.approx(1, rel=1e-15)
    assert batch_weights("AB", None, passes=10**18) == batch_weights("AB", None)
    q = sp.Symbol("q")
    assert batch_weights("A", 1 - q, passes=10**18).initial == q ** (10**18)


def test_two_passes_in_turn_weigh_as_the_thread_of_events_says():
    weights = batch_weights("ABBA", corrected_momentum(0.1, 2))
    assert weights.initial == pytest.approx(0.9**2, rel=1e-15)
    assert weights.batches == pytest.approx({"A": 0.0951, "B": 0.0949}, abs=5e-5)
    assert batch_weights("AABB", corrected_momentum(0.1, 2)).batches == pytest.approx({"A": 0.09, "B": 0.1})


def test_uncorrected_passes_weigh_by_the_effective_momentum():
    for passes in (1, 2, 5):
        weights = batch_weights("ABC", 0.1, passes).batches
        assert weights == pytest.approx(batch_weights("ABC", effective_momentum(0.1, passes)).batches, rel=1e-14)


def test_batches_come_in_the_order_in_which_they_first_came():
    assert list(batch_weights("CABAC", 0.1).batches) == ["C", "A", "B"]
    assert list(batch_weights(iter([("b", 1), ("a", 2)]), 0.1).batches) == [("b", 1), ("a", 2)]


def test_no_update_leaves_the_initial_value():
    assert batch_weights("", 0.1) == (1, {})
    assert batch_weights("", None, passes=4) == (1, {})


def test_the_ends_of_the_range():
    assert batch_weights("AB", 0.0) == (1.0, {"A": 0.0, "B": 0.0})
    assert batch_weights("AB", 1) == (0, {"A": 0, "B": 1})


def test_a_cumulative_average_forgets_the_initial_value_and_weighs_all_batches_alike():
    for passes in (1, 2, 3):
        weights = batch_weights("ABCD", None, passes)
        assert weights.initial == 0
        assert weights.batches == pytest.approx(dict.fromkeys("ABCD", 0.25), rel=1e-15)


def test_a_cumulative_average_in_any_order_weighs_by_the_number_of_updates():
    assert batch_weights("ABBA", None).batches == pytest.approx({"A": 0.5, "B": 0.5})
    assert batch_weights("AAAB", None).batches == pytest.approx({"A": 0.75, "B": 0.25})


def test_symbols_stay_exact():
    q = sp.Symbol("q")
    weights = batch_weights("ABBA", 1 - q)
    assert sp.expand(weights.initial - q**4) == 0
    assert sp.expand(weights.batches["A"] - (1 - q) * (q**3 + 1)) == 0
    exact = batch_weights("A", sp.Rational(1, 3), passes=2)
    assert exact.batches["A"] == sp.Rational(5, 9)
    root = batch_weights("A", 1 - sp.sqrt(sp.Rational(9, 10)), passes=2)
    assert root.batches["A"] == sp.Rational(1, 10)


def test_floats_agree_with_a_float_loop():
    rng = random.Random(1)
    order = [rng.randrange(4) for _ in range(30)]
    statistics = [rng.gauss(0, 1) for _ in range(4)]
    weights = batch_weights(order, 0.07, 2)
    value = sum(weights.batches[batch] * statistics[batch] for batch in range(4)) + 5.0 * weights.initial
    assert value == pytest.approx(run(order, 0.07, statistics, 5.0, 2), rel=1e-12)


@pytest.mark.parametrize(
    "momentum",
    [-0.1, 1.1, float("nan"), Fraction(3, 2), sp.Rational(3, 2), Fraction(10**20 + 1, 10**20), Fraction(-1, 10**400)],
)
def test_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(ValueError, match="must lie in 0 to 1"):
        batch_weights("AB", momentum)


@pytest.mark.parametrize("momentum", ["0.1", True, [0.1]])
def test_momentum_that_is_no_number_is_a_type_error(momentum):
    with pytest.raises(TypeError, match="must be one real number"):
        batch_weights("AB", momentum)


@pytest.mark.parametrize(("passes", "error"), [(0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_fewer_than_one_pass_or_no_integer_is_refused(passes, error):
    with pytest.raises(error, match="must be an integer of at least 1"):
        batch_weights("AB", 0.1, passes)
