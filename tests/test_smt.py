"""A second checker, of another make: z3 decides the claims that are polynomials in letters and in powers of decays."""

import contextlib
import random

import pytest
import sympy as sp
import z3

from evaluated import counterexample, mutants
from momentum_fix import symbolic
from momentum_fix.symbolic.letters import k, m, p, q
from momentum_fix.symbolic.proof import ProofError, goals, range_of
from momentum_fix.weights import batch_weights

CLAIMS = {
    f"{theorem.name}-{number}": claim
    for theorem in symbolic.theorems()
    for number, claim in enumerate(theorem.claims, start=1)
}
# What is no polynomial: limits, sums of statistics and roots.
BEYOND = """Whole trajectory-2, Cumulative average-3, Order-1, Size of the effect-2, Size of the effect-5,
Size of the effect-8, Size of the effect-9, Size of the effect-12, Small momentum-3, Small momentum-4, Small momentum-6,
Small momentum-8, Gradients-2""".replace("\n", " ").split(", ")
WITHIN = [name for name in CLAIMS if name not in BEYOND]


class Real:
    """Formulas as z3 reads them: each letter, and each power of a decay, is a variable that lies where it lies."""

    def __init__(self):
        self.variables, self.bounds = {}, []

    def variable(self, formula, ends):
        if formula not in self.variables:
            found = self.variables[formula] = z3.Real(str(formula))
            (low, above), (high, below) = ends
            if low.is_finite:
                self.bounds.append(found > self.read(low) if above else found >= self.read(low))
            if high.is_finite:
                self.bounds.append(found < self.read(high) if below else found <= self.read(high))
        return self.variables[formula]

    def read(self, formula):
        if formula.is_Rational:
            return z3.Q(formula.p, formula.q)
        if formula.is_Symbol:
            return self.variable(formula, range_of(formula))
        if formula.is_Add or formula.is_Mul:
            return (z3.Sum if formula.is_Add else z3.Product)([self.read(part) for part in formula.args])
        if not (formula.is_Pow or isinstance(formula, sp.exp)):
            raise TypeError(f"{formula} is no polynomial")
        base, exponent = (sp.exp(-1), -formula.exp) if isinstance(formula, sp.exp) else formula.args
        found = z3.Q(1, 1)
        for term in sp.Add.make_args(sp.expand(exponent)):  # q**(2*n - 1) is q**n * q**n / q
            number, rest = term.as_coeff_Mul() if term.as_coeff_Mul()[0].is_Integer else (sp.Integer(1), term)
            power = self.read(base) if rest == 1 else self.variable(base**rest, range_of(base**rest))
            several = z3.Product([power] * abs(number))
            found = found * several if number > 0 else found / several
        return found


def numbers(*facts, but=()):
    """Give numbers for which all of `facts` are so and not all of `but`, or None if z3 proves that there are none.

    Each is (start, end): start equals end, or is positive where the end is None.
    """
    reals = Real()

    def read(start, end):
        found = reals.read(sp.sympify(start).doit())
        return found > 0 if end is None else found == reals.read(sp.sympify(end).doit())

    facts, but = ([read(*goal) for goal in goals] for goals in (facts, but))
    solver = z3.SolverFor("QF_NRA")
    solver.set("timeout", 20_000)
    solver.add(*reals.bounds)
    assert solver.check() == z3.sat  # else it proves anything
    solver.add(*facts, *([z3.Not(z3.And(but))] if but else []))
    for seed in range(3):  # it may give up, on a busy machine above all
        solver.set("random_seed", seed)
        answer = solver.check()
        if answer != z3.unknown:
            break
    assert answer != z3.unknown, (facts, but)
    return solver.model() if answer == z3.sat else None


@pytest.mark.parametrize("name", WITHIN)
def test_z3_proves_what_sympy_has_proved(name):
    claim = CLAIMS[name]
    assert not any(part.has(sp.Limit) for goal in goals(claim) for part in goal if part is not None)
    assert numbers(but=goals(claim)) is None


@pytest.mark.parametrize("name", BEYOND)
def test_what_is_left_to_sympy_is_beyond_z3(name):
    found = goals(CLAIMS[name])
    if not any(part.has(sp.Limit) for goal in found for part in goal if part is not None):
        with contextlib.suppress(TypeError):
            assert numbers(but=found) is not None


@pytest.mark.parametrize("name", WITHIN)
def test_z3_finds_numbers_for_which_a_false_version_fails(name):
    *versions, swapped = mutants(CLAIMS[name])
    versions = [swapped, *random.Random(1).sample(versions, min(6, len(versions)))]
    found = []
    for claim in (version for version in versions if counterexample(version) is not None):
        with contextlib.suppress(ProofError):  # not even defined
            found.append(goals(claim))
    assert found
    assert all(numbers(but=goal) is not None for goal in found)


def test_half_of_what_a_b_b_a_errs_by_is_more_than_a_b_a_b_does():
    siamese, pipeline = (batch_weights(order, 1 - q).batches for order in ("ABBA", "ABAB"))
    right = batch_weights("AABB", 1 - q).batches
    for batch, sign in (("A", 1), ("B", -1)):
        errors = [sign * (found[batch] - right[batch]) for found in (siamese, pipeline)]
        assert numbers(but=[(errors[1], None), (errors[0] / 2 - errors[1], None)]) is None
        assert numbers(but=[(errors[0] / 3 - errors[1], None)]) is not None


VARIANCE = "variance", lambda power: (1 + q) * (1 - power) / ((1 - q) * (1 + power)), 1
LAG = "lag", lambda power: q * (1 - power) / ((1 - q) * power), -1


@pytest.mark.parametrize(("name", "ratio", "sign"), [VARIANCE, LAG], ids=["variance", "lag"])
def test_for_one_pass_more_a_ratio_stays_on_its_side_of_k(name, ratio, sign):
    passes, more = sp.Symbol("passes", positive=True), sp.Symbol("more", nonnegative=True)
    claimed = {"variance": symbolic.noise_ratio(q, k), "lag": symbolic.mean_age(q) / symbolic.mean_age(q**k)}[name]
    assert numbers(but=[(claimed, ratio(q**k))]) is None  # the ratio that the theorems are about
    assert numbers(but=[(ratio(q), 1)]) is None
    power = m  # q**k, which lies in (0, 1), is any such number
    inside = (power, None), (1 - power, None)
    before, after = sign * (passes - ratio(power)), sign * (passes + 1 - ratio(power * q))
    assert numbers((before, more), *inside, but=[(after, None)]) is None
    assert numbers(*inside, but=[(after, None)]) is not None
    assert numbers((before, more), *inside, but=[(after - sp.Rational(1, 10), None)]) is not None


def test_no_momentum_mends_the_order():
    for order in ("ABBA", "ABAB"):
        found = batch_weights(order, p).batches
        both = (found["A"], (1 - q) * q), (found["B"], 1 - q)  # where 1 - m is q
        assert numbers(*both) is None
        assert all(numbers(one) is not None for one in both)


def test_no_momentum_mends_the_recomputation():
    output, gradient = (1 - p, q), ((1 - p) ** 3, q**2)
    assert numbers(output, gradient) is None
    assert numbers(output) is not None
    assert numbers(gradient) is not None


@pytest.mark.parametrize("passes", [2, 3, 4, 5, 8])
def test_the_corrected_momentum_lies_between_m_over_k_and_m(passes):
    corrected, uncorrected = 1 - q, 1 - q**passes  # q is the decay of one pass
    assert numbers(but=[(corrected - uncorrected / passes, None), (uncorrected - corrected, None)]) is None
    assert numbers(but=[(corrected - uncorrected / (passes - 1), None)]) is not None
