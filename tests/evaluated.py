"""Claims in numbers, without SymPy: by adding up, by coming close. And false versions of claims."""

import contextlib
import random
from dataclasses import replace

import sympy as sp
from mpmath import MPContext

from momentum_fix.symbolic.letters import b, k, m, n, old, q
from momentum_fix.symbolic.proof import Growth, Induction, domain, equal, greater

mpmath = MPContext()
mpmath.dps = 40
mpf = mpmath.mpf
CLOSE = mpf(10) ** -12


def value(formula, numbers):
    """Give a formula's value, for numbers in the place of its letters."""
    match formula:
        case sp.Rational():
            return mpf(formula.p) / formula.q
        case sp.Symbol():
            return numbers[formula]
        case sp.Add():
            return mpmath.fsum(value(part, numbers) for part in formula.args)
        case sp.Mul():
            return mpmath.fprod(value(part, numbers) for part in formula.args)
        case sp.E:
            return mpmath.e
        case sp.exp():
            return mpmath.exp(value(formula.exp, numbers))
        case sp.Pow():
            return value(formula.base, numbers) ** value(formula.exp, numbers)
        case sp.Indexed():
            return mpmath.cos(7 * value(formula.indices[0], numbers))
        case sp.Sum():
            (symbol, first, last), *outer = formula.limits
            first, last = (int(value(end, numbers)) for end in (first, last))
            assert not outer
            return mpmath.fsum(value(formula.function, {**numbers, symbol: i}) for i in range(first, last + 1))
        case sp.Limit(args=(function, symbol, point, side)):
            near = 1 / CLOSE if point is sp.oo else value(point, numbers) + int(f"{side}1") * CLOSE
            return value(function, {**numbers, symbol: near})
        case sp.Subs():
            points = [value(point, numbers) for point in formula.point]
            return value(formula.expr, {**numbers, **dict(zip(formula.variables, points, strict=True))})
        case sp.Derivative():
            *inner, symbol = formula.variables
            body = sp.Derivative(formula.expr, *inner) if inner else formula.expr
            return mpmath.diff(lambda v: value(body, {**numbers, symbol: v}), numbers.get(symbol, 1))
    raise TypeError(f"{formula} has no value")


def numbers_for(symbols, rng):
    """Give each symbol one of the numbers that it stands for, now and then the first or the last."""
    found = {}
    for symbol in sorted(symbols, key=str):
        (low, _), (high, _) = ends = domain(symbol)
        first = mpf(int(low)) if low.is_finite else mpf(-4)
        span = mpf(int(high)) - first if high.is_finite else 5
        inside = rng.randrange(6) if symbol.is_integer else span * rng.randrange(1, 19) / 19
        reached = [mpf(int(end)) for end, side in ends if end.is_finite and not side]
        found[symbol] = rng.choice(reached) if reached and rng.random() < 0.2 else first + inside
    return found


def letters(*formulas):
    """Give the letters of formulas that numbers may take the place of."""
    return {part for part in sp.Tuple(*formulas).free_symbols if isinstance(part, sp.Symbol) and part.is_real}


def counterexample(claim, tries=8):
    """Give numbers for which a claim is false, or None if none were found."""
    rng = random.Random(1)
    parts = vars(claim).values() if isinstance(claim, Induction | Growth) else claim.args
    for _ in range(tries):
        numbers = numbers_for(letters(*parts), rng)
        if not all(true(claim, numbers)):
            return numbers
    return None


def true(claim, numbers):
    """Tell whether a claim is true of these numbers, for several counts where it is an induction."""
    try:
        if isinstance(claim, Induction):
            reached = value(sp.sympify(claim.initial), numbers)
            for count in range(5):
                reached = value(claim.renewed, {**numbers, claim.count: count, old: reached})
                yield abs(reached - value(claim.closed, {**numbers, claim.count: mpf(count + 1)})) < 1e-9
        elif isinstance(claim, Growth):
            for count in range(1, 6):
                larger, smaller = (
                    value(sp.sympify(part), {**numbers, claim.count: mpf(count)})
                    for part in (claim.larger, claim.smaller)
                )
                yield larger > smaller
        else:
            lhs, rhs = (value(side, numbers) for side in claim.args)
            digits = 9 if claim.has(sp.Limit) else 30
            yield lhs - rhs > mpf(10) ** -digits if isinstance(claim, sp.Gt) else abs(lhs - rhs) < 1e-9
    except (KeyError, OverflowError, TypeError, ValueError, ZeroDivisionError):  # not even defined
        yield False


def variants(formula):
    """The formula with one number, sign or exponent in it changed."""
    if formula.is_Rational:
        yield from (formula + 1, formula - 1, 2 * formula + 3)
    if formula in (m, q, k, n, b):
        yield formula + 1
    if formula.is_Pow or isinstance(formula, sp.exp):
        yield formula**2
        yield formula * (formula.exp if formula.is_Pow else formula.args[0])
    if formula.is_Add:
        yield from (formula - 2 * part for part in formula.args)
    for number, part in enumerate(formula.args):
        if isinstance(part, sp.Basic) and not isinstance(part, sp.IndexedBase):
            for changed in variants(part):
                with contextlib.suppress(TypeError, ValueError, AttributeError):  # what cannot even be written
                    yield formula.func(*formula.args[:number], changed, *formula.args[number + 1 :])


def mutants(claim):
    """The claim with one number, sign or exponent changed, with its sides swapped, or of another kind."""
    if isinstance(claim, Induction | Growth):
        parts = [part for part in vars(claim) if part != "count"]
        for part in parts:
            yield from (replace(claim, **{part: changed}) for changed in variants(sp.sympify(getattr(claim, part))))
        if isinstance(claim, Growth):
            yield Growth(claim.smaller, claim.larger, claim.count)
    else:
        kind = equal if isinstance(claim, sp.Eq) else greater
        yield from (kind(changed, claim.rhs) for changed in variants(claim.lhs))
        yield from (kind(claim.lhs, changed) for changed in variants(claim.rhs))
        yield greater(*claim.args) if kind is equal else greater(claim.rhs, claim.lhs)
