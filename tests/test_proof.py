"""The checker accepts what is true, and refuses what is false, what is not defined, and what it cannot tell."""

import random
import re
from dataclasses import replace

import pytest
import sympy as sp
from sympy import Derivative, Integral, Limit, Subs, Sum, exp, log, oo, sqrt

from evaluated import counterexample, letters, mutants, numbers_for, value
from momentum_fix import symbolic
from momentum_fix.symbolic import proof
from momentum_fix.symbolic.letters import LETTERS, alpha, b, delta, h, j, k, m, n, old, p, q, s, t, w, x, x0
from momentum_fix.symbolic.proof import Growth, Induction, ProofError, Step, Theorem, equal, greater, range_of
from momentum_fix.symbolic.theorems import correction, effective, theorems

one, half = sp.Integer(1), sp.Rational(1, 2)
few, many = exp(-h / (n + 1)), exp(-h)  # 1 minus the corrected momentum of n + 1 passes, and 1 - m
y, z = sp.symbols("y z", real=True)
u = sp.Symbol("u", positive=True)
f = sp.Function("f", real=True)(w)


def of(claim, *steps, words=""):
    """A theorem of one claim; each step is (left side, right side)."""
    return Theorem("Claimed", words, (claim,), tuple(Step(lhs, rhs, "it is so") for lhs, rhs in steps))


class Lax(Step):
    """A step that proves itself."""

    def prove(self):
        pass


def at_once(claim):
    """A theorem whose only steps are what the claim needs."""
    goals = [(start, one if end is None else end) for start, end in proof.goals(claim)]
    return of(claim, *(goal for goal in goals if goal[0] != goal[1]))


def by(claim, positive):
    """A theorem that something is greater, by something positive."""
    return of(claim, (claim.lhs - claim.rhs, positive))


def same(lhs, rhs):
    """A theorem of one equation, by one step."""
    return of(equal(lhs, rhs), (lhs, rhs))


TRUE = {
    "a square": lambda: same((m + b) ** 2, m**2 + 2 * m * b + b**2),
    "plain numbers": lambda: same(Sum(j, (j, 1, 3)), 6),
    "a root": lambda: same(Subs(effective(p, k), p, correction(m, k)), m),
    "division by what is positive": lambda: same((h**2 + h) / h, h + 1),
    "division by what is negative": lambda: same((q**2 - 1) / (q - 1) ** 3, (q + 1) / (q - 1) ** 2),
    "a limit at the end of [0, 1]": lambda: same(Limit((1 - m**k) / (1 - m), m, 1, "-"), k),
    "a limit at infinity": lambda: same(Limit(n / (n + h), n, oo), 1),
    "a limit at the ends of other letters": lambda: same(Limit((m + s) * (w + s) / (1 + m + s), s, 0), m * w / (1 + m)),
    "a limit of a power": lambda: same(Limit(s**k + b, s, 0), b),
    "a limit of what vanishes faster": lambda: same(Limit(n**3 * exp(-h * n) * x0 + b, n, oo), b),
    "a limit beside what vanishes": lambda: same(Limit(m * s / (s + exp(-h / s)), s, 0), m),
    "a slope of a root": lambda: same(Limit((sqrt(h + s) - sqrt(h)) / s, s, 0), 1 / (2 * sqrt(h))),
    "a limit of a limit": lambda: same(Limit(Limit((t + b) / (1 + s), s, 0), t, 0), b),
    "a derivative of what is a limit": lambda: same(Derivative(h**2 * Limit(h / (h + s), s, 0), h), 2 * h),
    "a limit at a place": lambda: same(Subs(h * Limit(h / (h + s), s, 0), h, 1 / k), 1 / k),
    "a limit in a sum": lambda: same(Sum(Limit((1 + j * b) / (1 + s), s, 0), (j, 1, 2)), 2 + 3 * b),
    "what is positive": lambda: by(greater(1, exp(-h)), (1 - exp(-2 * h)) / (1 + exp(-h))),
    "what is positive in a letter of its own": lambda: by(greater(m + 1, 0), (exp(h) + exp(h) * m) * exp(-h)),
    "a square of what may be negative": lambda: by(greater(b**2 + 2 * b * x0 + x0**2 + 1, 0), (b + x0) ** 2 + 1),
    "an odd power of what may be negative": lambda: same((b - 1) ** 3, b**3 - 3 * b**2 + 3 * b - 1),
    "an odd power of what is below -1": lambda: by(greater(8, (q - 2) ** 3), 8 + (2 - q) ** 3),
    "a sum that may be empty": lambda: same(Sum(b, (j, 1, n - 1)), b * (n - 1)),
    "a derivative": lambda: same(Derivative(z**2 * b, z), 2 * z * b),
    "a sum of numbers": lambda: at_once(Induction(n * (n + 1) / 2, old + n + 1, count=n, initial=0)),
    "a sum by k": lambda: at_once(Induction(k**2, old + 2 * k + 1, count=k, initial=0)),
    "a sum of statistics": lambda: at_once(Induction(x0 + Sum(x[j], (j, 1, n)), old + x[n + 1], count=n)),
    "growth": lambda: of(Growth(2**n, n, n), (1, Sum(1, (j, 1, 1))), (2 ** (n + 1) - 2**n - 1, 2**n - 1)),
}

LEFT = Integral(u**u, (u, 1, 2))  # which SymPy does not work out

# What is false, not defined, or no claim: how it might be proved, and why that is refused.
RELATION = "no equation, > or induction"
DEFINED = "may divide by 0"
LEAVES = "leaves the numbers that it stands for"
UNKNOWN = "no formula that can be checked"
NO_LIMIT = "may have no limit or another one"
NO_NUMBER = "not a real number or an integer"
NO_STEP = "no step leads on"
WRONG = "does not hold"
ROOT = effective(correction(m, k), k), m
REFUSED = {
    # relations that are no equation and no >, or that say nothing
    "the corrected momentum is no solution": (lambda: of(sp.Ne(m, p, evaluate=False), (m, p)), RELATION),
    "less, read as equal": (lambda: of(sp.Lt(m, p, evaluate=False), (m, p)), RELATION),
    "at most, read as equal": (lambda: of(sp.Le(m, p, evaluate=False), (m, p)), RELATION),
    "at least, read as greater": (lambda: by(sp.Ge(h, -h, evaluate=False), 2 * h), RELATION),
    "less by what is positive": (lambda: by(sp.Lt(h, -h, evaluate=False), Integral(2, (u, 0, h))), RELATION),
    "a chained relation": (lambda: of(sp.And(sp.Gt(h, b), sp.Gt(b, x0)), (h - b, 1)), RELATION),
    "not an equation": (lambda: of(sp.Not(sp.Gt(h, b)), (h - b, 1)), RELATION),
    "either of two": (lambda: of(sp.Or(sp.Gt(h, b), sp.Lt(h, b)), (h - b, 1)), RELATION),
    "true": (lambda: of(sp.true), RELATION),
    "True": (lambda: of(True), RELATION),
    "nothing": (lambda: of(None), RELATION),
    "words": (lambda: of("h > 0"), RELATION),
    "a formula": (lambda: of(h, (h, 1)), RELATION),
    "an equation that SymPy has decided": (lambda: of(sp.Eq(1, 1)), RELATION),
    "an equation of truths": (lambda: of(sp.Eq(sp.true, sp.true, evaluate=False)), "not all formulas"),
    "an equation of relations": (lambda: of(sp.Eq(sp.Gt(h, b), sp.Gt(h, b), evaluate=False)), "not all formulas"),
    "an equation of tuples": (lambda: of(sp.Eq(sp.Tuple(1), sp.Tuple(1), evaluate=False)), "not all formulas"),
    "a step between truths": (lambda: of(equal(m, p), (m, True), (True, p)), "not all formulas"),
    "a step between words": (lambda: of(equal(m, p), (m, "p"), ("p", p)), "cannot be worked out"),
    "a matrix": (lambda: same(sp.MatrixSymbol("M", 1, 1), sp.MatrixSymbol("M", 1, 1) * 2), UNKNOWN),
    # greater
    "0 is greater than 3/2": (lambda: by(greater(0, 3 * half), Integral(u, (u, -2, -1))), UNKNOWN),
    "a negative square is positive": (lambda: by(greater(-4 * h**2, 0), Integral(u, (u, -3 * h, -h))), UNKNOWN),
    "the corrected momentum is larger than m": (
        lambda: by(greater(1 - few, 1 - many), Integral(2 * u * exp(-s) / 3, (s, h / (n + 1), h), (u, -2, -1))),
        UNKNOWN,
    ),
    "an integral that runs backwards": (lambda: by(greater(-h, 0), Integral(1, (u, h, 0))), UNKNOWN),
    "an integral that may run backwards": (lambda: by(greater(t - s, 0), Integral(1, (u, s, t))), UNKNOWN),
    "an integral that may be over nothing": (lambda: by(greater(m, 0), Integral(1, (u, 0, m))), UNKNOWN),
    "an integral of what may be 0": (lambda: by(greater(m, 0), Integral(m, (u, 0, 1))), UNKNOWN),
    "an inner integral that may run backwards": (
        lambda: by(greater(-half, 0), Integral(1, (s, 1, t), (t, 0, 1))),
        UNKNOWN,
    ),
    "an integral that leaves [0, 1]": (lambda: by(greater(3 * half, 0), Integral(1 - m, (m, 2, 3))), UNKNOWN),
    "a square is positive": (lambda: by(greater(b**2 + 2 * b * m + m**2, 0), (b + m) ** 2), NO_STEP),
    "1 is greater than 1": (lambda: of(greater(1, 1)), NO_STEP),
    "1 or more is greater than 1": (lambda: of(greater(n**2 + n, 2), (n**2 + n - 2, (n - 1) * (n + 2))), NO_STEP),
    "one pass does more than one": (lambda: by(greater(q, q**k), q * (1 - q ** (k - 1))), NO_STEP),
    "at both ends of [0, 1]": (lambda: by(greater(m, m**2), m * (1 - m)), NO_STEP),
    "what may be negative": (lambda: by(greater(b, x0), (b**2 - x0**2) / (b + x0)), DEFINED),
    "a step that only looks so": (lambda: by(greater(exp(-h), 1), 1 - exp(-h)), WRONG),
    "swapped": (lambda: by(greater(exp(-h), 1), (exp(-2 * h) - 1) / (1 + exp(-h))), NO_STEP),
    "what may be 0": (lambda: by(greater(m**2 + m, 0), m * (m + 1)), NO_STEP),
    "what is 0 at an end": (lambda: by(greater(n * (n + 1), 2), (n - 1) * (n + 2)), NO_STEP),
    "what is negative": (lambda: by(greater(-(m**2) - m - 1, 0), -m * (m + 1) - 1), NO_STEP),
    "a negative odd power is positive": (lambda: by(greater((q - 2) ** 3, 0), -((2 - q) ** 3)), NO_STEP),
    "an odd power over 0 is positive": (lambda: by(greater(b**3 + 1, 0), b * b**2 + Sum(1, (j, 1, 1))), NO_STEP),
    "an odd power of 1/0": (lambda: same((b**2 + b) / b**2 / b, (b + 1) / b**2), DEFINED),
    "a place below [0, 1]": (lambda: by(greater(3 * half, 0), Subs(1 - m, m, -half)), LEAVES),
    "what an infinite limit leaves": (
        lambda: by(greater(exp(-Limit(1 / m, m, 0)), 0), 2 * exp(-Limit(1 / m, m, 0))),
        NO_LIMIT,
    ),
    "what an infinite integral leaves": (
        lambda: by(greater(exp(-Integral(1 / u, (u, 0, 1))), 0), 2 * exp(-Integral(1 / u, (u, 0, 1)))),
        UNKNOWN,
    ),
    # where formulas are not defined, or mean another thing
    "a quotient at 0": (lambda: same((m**2 + m) / m, m + 1), DEFINED),
    "a quotient at 1": (lambda: same((1 - alpha**2) / (1 - alpha), 1 + alpha), DEFINED),
    "a quotient at x": (lambda: same((b**2 - x0**2) / (b - x0), b + x0), DEFINED),
    "a quotient of 0": (lambda: same(sp.Mul(m, 1 / m, evaluate=False), 1), DEFINED),
    "a quotient by 0": (lambda: same(sp.Mul(0, sp.Pow(0, -1, evaluate=False), evaluate=False), 1), DEFINED),
    "a quotient on both sides": (lambda: same(1 / m + b, b + 1 / m + m - m**2 / sqrt(m**2)), DEFINED),
    "a negative power at 0": (lambda: same(alpha ** (n - j) * alpha**j, alpha**n), DEFINED),
    "a root of what may be negative": (lambda: same(sqrt(b) * sqrt(b - 1), sqrt(b * (b - 1))), DEFINED),
    "a function": (lambda: same((f + 1) ** 2, f**2 + 2 * f + 1), UNKNOWN),
    "a power of -1": (lambda: same((-1) ** k * (-1) ** (k + 1), 1), DEFINED),
    "a logarithm of 0": (lambda: same(log(m) * 2, log(m**2)), UNKNOWN),
    "a geometric sum at 1": (lambda: same(Sum(alpha**j, (j, 0, n)), (1 - alpha ** (n + 1)) / (1 - alpha)), DEFINED),
    "a sum with a case distinction": (
        lambda: same((1 + b) * Sum(q**j, (j, 0, n)), Sum(q**j, (j, 0, n)) + b * Sum(q**j, (j, 0, n))),
        UNKNOWN,
    ),
    "a derivative at 0": (lambda: same(Derivative(sqrt(m), m), Derivative(sqrt(m) + 1, m)), DEFINED),
    "infinity": (lambda: same(oo, oo + m), UNKNOWN),
    "infinite limits": (lambda: same(Limit(1 / m, m, 0), Limit(1 / m + 1, m, 0) - 1), NO_LIMIT),
    "a limit that is infinity": (lambda: same(Limit(1 / m, m, 0) + 1, Limit(1 / m, m, 0)), NO_LIMIT),
    # limits that are right for almost all that other letters stand for
    "a limit without m = 0": (lambda: same(Limit(m / (m + s), s, 0), 1), NO_LIMIT),
    "a limit without m = 1": (lambda: same(Limit((1 - m) / (1 - m + s), s, 0), 1), NO_LIMIT),
    "a limit without j = 0": (lambda: same(Limit(j / (j + s), s, 0), 1), NO_LIMIT),
    "a limit without k = 2": (lambda: same(Limit((k - 2) ** 2 / ((k - 2) ** 2 + s), s, 0), 1), NO_LIMIT),
    "a limit without m = p": (lambda: same(Limit((m - p) ** 2 / ((m - p) ** 2 + s), s, 0), 1), NO_LIMIT),
    "a limit without m = 0 or p = 0": (lambda: same(Limit(m * p / (m * p + s), s, 0), 1), NO_LIMIT),
    "a limit without m = p = 0": (lambda: same(Limit((m + p) / (m + p + s), s, 0), 1), NO_LIMIT),
    "a limit without w = 0": (lambda: same(Limit(n * w**2 / (n * w**2 + 1), n, oo), 1), NO_LIMIT),
    "a limit without a statistic of 0": (lambda: same(Limit(x[1] ** 2 / (x[1] ** 2 + s), s, 0), 1), NO_LIMIT),
    "a limit of a sum without m = 0": (lambda: same(Limit(Sum(m / (m + j * s), (j, 1, 2)), s, 0), 2), NO_LIMIT),
    "a sum of limits without j = 0": (lambda: same(Sum(Limit(j / (j + s), s, 0), (j, 0, 2)), 3), NO_LIMIT),
    "a limit of limits without m = 0": (lambda: same(Limit(Limit(m / (m + s), s, 0), m, 0), 1), NO_LIMIT),
    "a limit at one place": (lambda: same(Subs(Limit(m / (m + s), s, 0), m, 0), 1), NO_LIMIT),
    "a derivative of a limit": (lambda: same(Derivative(Limit(m / (m + s), s, 0), m), 0), NO_LIMIT),
    "a limit of a derivative": (lambda: same(Limit(Derivative(m / (m + s), m), s, 0), 0), NO_LIMIT),
    "a limit above 1/2": (lambda: by(greater(Limit(m / (m + s), s, 0), half), half), NO_LIMIT),
    "a limit beside what vanishes faster": (lambda: same(Limit(s / (m * s + exp(-h / s)), s, 0) * m, 1), NO_LIMIT),
    "a power that tends to 0**0": (lambda: same(Limit(m**s, s, 0), 1), DEFINED),
    "a root that tends to 0**0": (lambda: same(Limit(m ** (1 / n), n, oo), 1), DEFINED),
    "a root of what vanishes": (lambda: same(Limit((exp(-h * n) + exp(-2 * h * n)) ** (1 / n), n, oo), 0), DEFINED),
    "a decay that may be none": (lambda: same(Limit(exp(-m * n) + b, n, oo), b), DEFINED),
    "a slope of a root at 0": (lambda: same(Limit((sqrt(m + s) - sqrt(m)) / sqrt(s), s, 0), 0), DEFINED),
    "nan": (lambda: same(sp.nan, 1), UNKNOWN),
    "complex infinity": (lambda: same(sp.zoo, 1), UNKNOWN),
    "an infinite integral": (lambda: same(Integral(exp(-h * u), (u, 0, oo)), 1 / h), UNKNOWN),
    "an integral that diverges": (lambda: same(Integral(1 / u, (u, 0, 1)), Integral(2 / u, (u, 0, 1))), UNKNOWN),
    "an integral across a pole": (lambda: same(Integral(1 / z**2, (z, -1, 1)), -2), UNKNOWN),
    "an infinite sum": (lambda: same(Sum(exp(-h * j), (j, 0, oo)), 1 / (1 - exp(-h))), UNKNOWN),
    "an integral without ends": (lambda: same(Integral(2 * u, u), h**2), UNKNOWN),
    "an integral with one end": (lambda: same(Integral(2 * u, (u, h)), h**2), UNKNOWN),
    "a sum that runs backwards": (lambda: same(Sum(j, (j, 5, 3)), -4), "run backwards"),
    "a sum that may run backwards": (
        lambda: same(Sum(j, (j, n, k)), Sum(j, (j, 0, k)) - Sum(j, (j, 0, n - 1))),
        "run back",
    ),
    "a sum from a pole on": (lambda: same(Sum(1 / (j - 1), (j, 1, 3)), 3 * half), DEFINED),
    "a sum from below 0": (lambda: same(Sum(j, (j, -1, 1)), 0), LEAVES),
    "a sum over real numbers": (lambda: same(Sum(u, (u, 1, 3)), 6), "sums run over integers"),
    "a sum to a real number": (lambda: same(Sum(j, (j, 1, h + 1)), (h + 1) * (h + 2) / 2), "does not stay an integer"),
    "an integral over integers": (lambda: same(Integral(k, (k, 1, 3)), 4), UNKNOWN),
    "a limit from the left of 0": (lambda: same(Limit(sqrt(m**2) / m, m, 0, "-"), 1), "comes near 0"),
    "a limit from the right of 1": (lambda: same(Limit(m, m, 1, "+"), 1), "comes near 1"),
    "a limit from both sides": (lambda: same(Limit(h, h, 1, "+-"), 1), "comes near 1"),
    "a limit of [0, 1] at infinity": (lambda: same(Limit(m / (1 + m), m, oo), 1), LEAVES),
    "a limit of integers at 1": (lambda: same(Limit(n, n, 1), 1), "does not stay an integer"),
    "a limit at a letter": (lambda: same(Limit(t, t, h), h), "comes near h"),
    "a limit that SymPy cannot tell": (lambda: same(Limit(h**s / s, s, oo), 0), DEFINED),
    "an integral that SymPy leaves": (lambda: same(LEFT + (1 + b) ** 2, LEFT + 1 + 2 * b + b**2), UNKNOWN),
    "a place that is negative": (lambda: same(Subs(sqrt(u**2), u, -2), -2), LEAVES),
    "a place at the end of (0, 1)": (lambda: same(Subs(q * b + 1, q, m), m * b + 1), LEAVES),
    "a place outside of [0, 1]": (lambda: same(Subs(1 - m, m, 1 + h), -h), LEAVES),
    "a place that may be outside": (lambda: same(Subs(sqrt(m**2), m, p - delta), p - delta), LEAVES),
    "a place between integers": (lambda: same(Subs(h + k, k, half), h + half), LEAVES),
    "an integer that is halved": (lambda: same(Subs(h**k, k, n * half + 1), h ** (n / 2 + 1)), "does not stay"),
    "a derivative by an integer": (lambda: same(Derivative(k**2, k), 2 * k), "derivative by an integer"),
    "a captured letter": (lambda: same(Subs(Derivative(y * b, b), y, b), 2 * b), WRONG),
    "a letter that is bound and free": (lambda: same(Subs(m * b, b, m) + b, m**2 + b), "bound in one place"),
    "a sum over its own end": (lambda: same(Sum(n, (n, 1, n)), n * (n + 1) / 2), "bound in one place"),
    "a letter that is bound twice": (lambda: same(Sum(Sum(j, (j, 1, 2)) * j, (j, 1, 2)), 9), "bound twice"),
    "a float": (lambda: same(sp.Float("0.1") + m, m + sp.Rational(1, 10)), UNKNOWN),
    "a float for a number": (lambda: same(0.5 * m, m / 2), UNKNOWN),
    "pi": (lambda: same(sp.pi + m, m + 3), UNKNOWN),
    "an imaginary number": (lambda: same(sp.I * m, m), UNKNOWN),
    "an absolute value": (lambda: same(sp.Abs(b), b), UNKNOWN),
    "a sign": (lambda: same(sp.sign(b), 1), UNKNOWN),
    "a floor": (lambda: same(sp.floor(b), b), UNKNOWN),
    "a maximum": (lambda: same(sp.Max(b, x0), b), UNKNOWN),
    "a step function": (lambda: same(sp.Heaviside(b), 1), UNKNOWN),
    "a case distinction": (lambda: same(sp.Piecewise((m, m > 0), (m + 1, True)), m), UNKNOWN),
    "a sine": (lambda: same(sp.sin(b) ** 2 + sp.cos(b) ** 2, 1), UNKNOWN),
    "a big O": (lambda: same(m + sp.O(m**2), sp.O(m**2) + m + m**2 / 2), UNKNOWN),
    "what is held back": (lambda: same(sp.UnevaluatedExpr(m) + 1, m + 1), UNKNOWN),
    "a statistic at half": (lambda: same(x[half] + m, m + x[half] * 2), UNKNOWN),
    "a statistic at what is rounded": (lambda: same(x[sp.floor(b)] + m, m + x[sp.floor(b)] * 2), UNKNOWN),
    "a statistic of a letter": (lambda: same(x[b], x[b] * 2), UNKNOWN),
    "statistics of another": (lambda: same(sp.IndexedBase("z")[1], sp.IndexedBase("z")[1] * 2), UNKNOWN),
    "a function of a formula": (lambda: same(f.func(w + 1), f.func(w + 1) * 2), UNKNOWN),
    "a function of what it may be": (lambda: same(sp.Function("F")(w), sp.Function("F")(w) * 2), UNKNOWN),
    # letters
    "another m": (lambda: same(sp.Symbol("m", real=True), m), "is not the m"),
    "an m that is negative": (lambda: by(greater(-sp.Symbol("m", negative=True), 0), 1), "is not the m"),
    "a function called m": (lambda: same(sp.Function("m", real=True)(w), m), UNKNOWN),
    "a dummy": (lambda: same(sp.Dummy("o", real=True), m), NO_NUMBER),
    "a dummy called m": (lambda: same(sp.Dummy("m", real=True), m), "is not the _m"),
    "two letters called z": (lambda: same(z, sp.Symbol("z", positive=True)), "is not the z"),
    "two letters called z in two claims": (
        lambda: Theorem(
            "Two",
            "",
            *(
                tuple(
                    getattr(same((v + m) ** 2, v**2 + 2 * v * m + m**2), part)[0]
                    for v in (z, sp.Symbol("z", positive=True))
                )
                for part in ("claims", "steps")
            ),
        ),
        "is not the z",
    ),
    "a letter that is 0": (lambda: same(sp.Symbol("o", zero=True), 0), NO_NUMBER),
    "a letter below 0": (lambda: by(greater(0, sp.Symbol("o", negative=True)), 1), NO_NUMBER),
    "a complex letter": (lambda: same(sp.Symbol("o") * 2, 3 * sp.Symbol("o")), NO_NUMBER),
    "an even letter": (lambda: same((-1) ** sp.Symbol("o", even=True), sp.Symbol("o", even=True)), NO_NUMBER),
    "letters that do not commute": (lambda: same(*(sp.Symbol("o", commutative=False) * v for v in (1, 2))), NO_NUMBER),
    # inductions
    "a wrong base": (lambda: at_once(Induction(n**2 + 1, old + 2 * n + 1, n, 0)), WRONG),
    "a wrong step": (lambda: at_once(Induction(n**2, old + n + 1, n, 0)), WRONG),
    "an initial value that changes": (lambda: at_once(Induction(2 * n, old + 2, n, n * 0 + 2 * n)), "changes with n"),
    "an initial value that hides the count": (lambda: at_once(Induction(n + 1, old + 1, n, n)), "changes with n"),
    "an initial value of the value": (lambda: at_once(Induction(n, old + 1, n, old - old + 0 * n + old)), "outside"),
    "a closed form of the value": (lambda: at_once(Induction(old + n, old + 1, n, x0)), "outside of what is renewed"),
    "nothing renewed": (lambda: at_once(Induction(n, n + 1, n, 0)), "does not say what becomes of R"),
    "a value that is bound": (lambda: at_once(Induction(n, Subs(old, old, n) + 1, n, 0)), "does not say"),
    "a value that is bound and free": (lambda: at_once(Induction(n, old + Subs(old, old, 1), n, 0)), "bound in one"),
    "a real count": (lambda: at_once(Induction(z**2, old + 2 * z + 1, z, 0)), "an induction over z"),
    "a positive count": (lambda: at_once(Induction(h**2, old + 2 * h + 1, h, 0)), "an induction over h"),
    "a count from 0 on": (lambda: at_once(Induction(j**2, old + 2 * j + 1, j, 0)), "an induction over j"),
    "a count of all integers": (
        lambda: at_once(Induction(*(v.subs(k, sp.Symbol("i", integer=True)) for v in (k**2, old + 2 * k + 1, k)), 0)),
        "an induction over i",
    ),
    "a count of even integers": (
        lambda: at_once(Induction(*(v.subs(k, sp.Symbol("i", even=True, positive=True)) for v in (k, old + 1, k)), 0)),
        NO_NUMBER,
    ),
    "a count that is no letter": (lambda: at_once(Induction(n + 1, old + 1, n + 1, 0)), NO_NUMBER),
    "a count that is a number": (lambda: at_once(Induction(one, old + 1, one, 0)), NO_NUMBER),
    "a count that a sum binds": (lambda: at_once(Induction(n, old + Sum(1, (n, 1, 1)), n, 0)), "bound in one place"),
    "a count that a limit binds": (lambda: at_once(Induction(0, old + Limit(1 / n, n, oo), n, 0)), "bound in one"),
    "not defined at 0": (lambda: at_once(Induction(Sum(1 / j, (j, 1, n)), old + 1 / n, n, 0)), UNKNOWN),
    "not defined at 1": (lambda: at_once(Induction(x0, old * (k**2 - 1) / (k - 1) / (k + 1), k, x0)), DEFINED),
    "a derivative of the value": (
        lambda: at_once(Induction(2 * b, Derivative(old * b, b) * (2 - 1 / (k + 1)), k, b)),
        WRONG,
    ),
    "growth from below": (
        lambda: of(Growth(2 * n, n + 1, n), (sp.Integer(0), 0), (one, Sum(1, (j, 1, 1)))),
        "nothing",
    ),
    "growth that stops": (lambda: of(Growth(2 - q**n, 1, n), (1 - q, (1 - q**2) / (1 + q))), NO_STEP),
    "growth downwards": (
        lambda: of(Growth(4 - n, 1, n), (2, Sum(1, (j, 1, 2))), (-one, Sum(-1, (j, 1, 1)))),
        NO_STEP,
    ),
    "growth of a real number": (lambda: of(Growth(z + 1, z, z), (1, Sum(1, (j, 1, 1)))), "an induction over z"),
    # proofs
    "no claim": (lambda: Theorem("Empty", "", (), ()), "prove nothing that is claimed"),
    "no claim, but a step": (lambda: Theorem("Empty", "", (), (Step(m + m * b, m * (1 + b), ""),)), "prove nothing"),
    "no step": (lambda: of(equal((m + b) ** 2, m**2 + 2 * m * b + b**2)), NO_STEP),
    "no step to what is seen": (lambda: of(greater(1, exp(-h))), NO_STEP),
    "a claim that says nothing": (lambda: of(equal(m, m)), "says nothing"),
    "an induction that says nothing": (lambda: of(Induction(x0, old, n)), "says nothing"),
    "two steps where one is needed": (
        lambda: of(
            equal((m + 1) ** 2, m**2 + 2 * m + 1), ((m + 1) ** 2, m * (m + 2) + 1), (m * (m + 2) + 1, m**2 + 2 * m + 1)
        ),
        NO_STEP,
    ),
    "a step from elsewhere": (lambda: of(equal(m, (b + 1) ** 2), (b**2 + 2 * b + 1, (b + 1) ** 2)), NO_STEP),
    "a step about what else is positive": (lambda: of(greater(-h, 0), ((h + 1) ** 2, h**2 + 2 * h + 1)), NO_STEP),
    "a sum as small as one term": (
        lambda: by(greater(1, Sum(q**j, (j, 1, 2))), 1 - Sum(q ** (j + 1), (j, 0, 1))),
        NO_STEP,
    ),
    "a step that says nothing": (lambda: of(equal(m, p), (m, m), (m, p)), "says nothing"),
    "a step with other sides": (lambda: of(equal(m, p), ((m + b) ** 2, m**2 + 2 * m * b + b**2)), NO_STEP),
    "a step backwards": (lambda: of(equal((h**2 + h) / h, h + 1), (h + 1, (h**2 + h) / h)), NO_STEP),
    "a step too many": (
        lambda: of(equal((h**2 + h) / h, h + 1), ((h**2 + h) / h, h + 1), (h + 1, (h**2 + h) / h)),
        "prove nothing",
    ),
    "a step that ends elsewhere": (lambda: of(equal((h**2 + h) / h, h + 2), ((h**2 + h) / h, h + 1)), NO_STEP),
    "a step that does not hold": (lambda: same(m, p), WRONG),
    "a step that proves itself": (lambda: Theorem("Lax", "", (equal(m, p),), (Lax(m, p, ""),)), WRONG),
    "two steps whose errors cancel": (
        lambda: of(equal((h**2 + h) / h, h + 1), ((h**2 + h) / h, h), (h, h + 1)),
        WRONG,
    ),
    "an equation in words": (lambda: of(*TRUE["a square"]().claims, words="m' = sqrt(m)"), "make it a claim"),
    "an error of 1e-9": (lambda: same(m * b, m * b + sp.Rational(1, 10**9) * b), WRONG),
    "an error beyond all digits": (lambda: same(m * b, m * b + sp.Rational(1, 10**60) * b), WRONG),
    "right but at an end": (lambda: same(0 ** (k - 1) + h, h), DEFINED),
    "right but at the other end": (lambda: same(b * (1 - m) ** (k - 1) * 0 ** (1 - m), 0), DEFINED),
}


@pytest.mark.parametrize("make", TRUE.values(), ids=TRUE)
def test_what_is_true_is_accepted(make):
    make().prove()


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_false_not_defined_or_not_proved_is_refused_with_the_reason(make, reason):
    with pytest.raises(ProofError, match=re.escape(reason)):
        make().prove()


FALSE = same((m + b) ** 2, m**2 + m * b + b**2), same(Limit((1 - m**k) / (1 - m), m, 1, "-"), k + 1)


@pytest.fixture
def nothing_known():
    """Forget which steps hold, before and after."""
    proof._is_zero.cache_clear()
    yield proof._is_zero.cache_clear
    proof._is_zero.cache_clear()


@pytest.mark.parametrize("theorem", FALSE, ids=["a square", "a limit"])
def test_numbers_object_where_sympy_is_wrong(theorem, monkeypatch, nothing_known):
    monkeypatch.setattr(sp, "simplify", lambda formula: sp.Integer(0))
    monkeypatch.setattr(proof, "_limit", lambda *_: k + 1)
    with pytest.raises(ProofError, match=WRONG):
        theorem.prove()
    nothing_known()
    monkeypatch.setattr(proof, "_is_zero_in_numbers", lambda difference: True)
    theorem.prove()


@pytest.mark.parametrize("theorem", FALSE, ids=["a square", "a limit"])
def test_sympy_objects_where_numbers_are_wrong(theorem, monkeypatch, nothing_known):
    monkeypatch.setattr(proof, "_is_zero_in_numbers", lambda difference: True)
    with pytest.raises(ProofError, match=WRONG):
        theorem.prove()


def test_a_sum_is_split_after_n_alone_and_only_upwards(monkeypatch, nothing_known):
    monkeypatch.setattr(proof, "_is_zero_in_numbers", lambda difference: True)
    upto = [Sum(x[j], (j, 1, last)) for last in (n - 1, n, n + 2, n + k)]
    same(upto[2], upto[1] + x[n + 1] + x[n + 2]).prove()
    for different in ((upto[1], upto[0]), (upto[2], upto[1]), (upto[3], upto[1])):
        with pytest.raises(ProofError, match=WRONG):
            same(*different).prove()


CLAIMS = [(theorem, number) for theorem in theorems() for number in range(len(theorem.claims))]


@pytest.mark.parametrize(("theorem", "number"), CLAIMS, ids=lambda part: getattr(part, "name", part))
def test_a_claim_with_a_wrong_number_sign_exponent_or_relation_is_refused(theorem, number):
    claim = theorem.claims[number]
    *versions, swapped = mutants(claim)
    assert counterexample(claim) is None
    assert counterexample(swapped) is not None
    sample = random.Random(1).sample(versions, min(6, len(versions)))
    wrong = [version for version in sample if counterexample(version) is not None]
    for version in (swapped, *wrong):
        claims = (*theorem.claims[:number], version, *theorem.claims[number + 1 :])
        with pytest.raises(ProofError):
            replace(theorem, claims=claims).prove()
        with pytest.raises(ProofError):
            at_once(version).prove()


def made_up(rng, depth):
    """A formula made at random."""
    if depth == 0:
        return rng.choice([m, p, q, h, k, n, j, b, sp.Integer(0), one, sp.Integer(2), -one, half])
    first, second = made_up(rng, depth - 1), made_up(rng, rng.randrange(depth))
    kinds = [
        lambda: first + second,
        lambda: first * second,
        lambda: 1 - first,
        lambda: first / second,
        lambda: first ** rng.choice([2, 3, -1, -2, half, k, 1 / k, -n, j, h, q]),
        lambda: exp(-first),
        lambda: Sum(first + j * b, (j, 1, n)),
        lambda: Subs(first, m, rng.choice([p * q, 1 - q, p / 2, exp(-h)])),
        lambda: Limit(first, m, 0),
        lambda: Derivative(first, q),
    ]
    return rng.choice(kinds)()


@pytest.mark.parametrize("seed", range(4))
def test_a_formula_has_a_real_value_in_its_range_whatever_its_letters_stand_for(seed):
    rng, refused, ranges = random.Random(seed), 0, set()
    for _ in range(300):
        formula = made_up(rng, rng.randrange(1, 5))
        try:
            low, high = range_of(formula)
        except ProofError:
            refused += 1
            continue
        ranges.add((low, high))
        near = 1e-6 if formula.has(Limit) else 1e-25
        for _ in range(4):
            found = +value(formula, numbers_for(letters(formula), rng))
            for (end, side), sign in ((low, 1), (high, -1)):
                if end.is_finite:
                    beyond = sign * (found - value(end, {}))
                    assert beyond > -near * (1 + abs(found)), formula
                    assert beyond != 0 or side == 0 or end != 0, formula  # elsewhere, digits end
    assert refused > 30
    assert len(ranges) > 30


def test_a_letter_stands_for_what_its_page_says():
    inside, positive = ((sp.Integer(0), 1), (one, -1)), ((sp.Integer(0), 1), proof.REAL[1])
    said = {
        "m, p, alpha, delta and tau lie in [0, 1]": (proof.ZERO, proof.ONE),
        "q in (0, 1)": inside,
        "h, s, t and epsilon are positive": positive,
        "V, V' and v are not negative": (proof.ZERO, proof.REAL[1]),
        "k and n are 1, 2, and so on": (proof.ONE, proof.REAL[1]),
        "j and N may also be 0": (proof.ZERO, proof.REAL[1]),
    }
    page = " ".join(symbolic.letters.__doc__.split())
    assert all(phrase in page for phrase in said)
    assert page.endswith("all others are real numbers.")
    ranges = {name: ends for phrase, ends in said.items() for name in re.findall(r"[\w']+", phrase)}
    used = set(LETTERS) | letters(
        *(side for theorem in theorems() for step in theorem.steps for side in (step.lhs, step.rhs))
    )
    for letter in used - {x.label}:
        assert proof.domain(letter) == ranges.get(letter.name, proof.REAL)
        assert letter.is_integer is (True if letter.name in "knjN" else None)
