"""The checker: where a formula is defined, whether a step holds, and whether the steps prove what is claimed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

import sympy as sp
from sympy import Derivative, Limit, Subs, Sum, exp, oo

from momentum_fix.symbolic.letters import LETTERS, UNIT, n, old, q, x, x0

# An end of a range is a number or an infinity, and 0 if it is reached, 1 or -1 if all else lies above or below it: such
# pairs are ordered as the ends are. SymPy's own intervals forget which ends are reached when they are multiplied.
Range = tuple[tuple[Any, Any], ...]  # the lower end and the upper one
ZERO, ONE, REAL = (sp.Integer(0), 0), (sp.Integer(1), 0), ((-oo, 1), (oo, -1))
FREE: Mapping[Any, Range] = {}  # what bound symbols run through: where none is


class ProofError(ArithmeticError):
    """A step does not hold, the steps do not prove what is claimed, or that cannot be told."""


def _need(condition: Any, reason: str) -> None:
    if not condition:
        raise ProofError(reason)


@contextmanager
def _refusing(what: Any) -> Iterator[None]:
    """Refuse what raises any error: nothing is proved by what cannot be worked out."""
    try:
        yield
    except ProofError:
        raise
    except Exception as error:
        raise ProofError(f"{what} cannot be worked out: {error!r}") from error


def domain(symbol: Any) -> Range:
    """Give the range of a symbol: all real numbers or integers, those from 0 or 1 on, or a part of [0, 1].

    Raises:
        ProofError: it stands for something else.
    """
    kinds = [kind for kind in ("real", "integer", "nonnegative", "positive") if symbol.assumptions0.get(kind)]
    plain = type(symbol) is sp.Symbol and symbol == sp.Symbol(symbol.name, **dict.fromkeys(kinds, True))
    _need(plain and "real" in kinds, f"{symbol} is not a real number or an integer")
    high = ONE if symbol in UNIT else (sp.Integer(1), -1) if symbol == q else REAL[1]
    positive = ONE if "integer" in kinds else (sp.Integer(0), 1)
    return (positive if "positive" in kinds else ZERO if "nonnegative" in kinds else REAL[0]), high


def _plus(one: Range, other: Range) -> Range:
    return tuple((v + w, sp.sign(e + f)) for (v, e), (w, f) in zip(one, other, strict=True))


def _times(one: Range, other: Range) -> Range:
    def product(v: Any, e: Any, w: Any, f: Any) -> tuple[Any, Any]:
        sign, other_sign = sp.sign(v) or e, sp.sign(w) or f
        if v and w:
            return v * w, sp.sign(other_sign * e + sign * f)
        return sp.Integer(0), sign * other_sign  # 0 also times what grows beyond all bounds

    ends = [product(*end, *further) for end in one for further in other]
    return min(ends), max(ends)


def _along(increasing: Callable[[Any], Any], one: Range) -> Range:
    return tuple((increasing(value), side) for value, side in one)


def _log(value: Any) -> Any:
    return sp.log(value) if value else -oo


def _power(formula: Any, base: Range, exponent: Any, known: Mapping[Any, Range]) -> Range:
    if base[0] < ZERO and exponent.is_Integer:
        if exponent % 2:
            return _times(base, _power(formula, base, exponent - 1, known))
        low, high = ((-value, -side) for value, side in base)
        base = max(ZERO, high), max(base[1], low)
    by = range_of(exponent, known)
    defined = base[0] > ZERO or base[0] == ZERO < by[0]
    _need(defined, f"{formula} may divide by 0, be 0**0, or be a power of what is negative")
    found = _along(sp.exp, _times(_along(_log, base), by))
    return tuple(ZERO if end == ZERO else other for end, other in zip(base, found, strict=True))


def _bind(known: Mapping[Any, Range], symbol: Any, run: Range, whole: Any) -> Mapping[Any, Range]:
    """Add what a symbol runs through where a sum, a limit or a substitution binds it."""
    low, high = domain(symbol)
    _need(symbol not in known, f"{symbol} is bound twice")
    _need(low <= run[0] and run[1] <= high, f"{symbol} leaves the numbers that it stands for")
    _need(whole or not symbol.is_integer, f"{symbol} does not stay an integer")
    return {**known, symbol: run}


def range_of(formula: Any, known: Mapping[Any, Range] = FREE) -> Range:
    """Give a range that holds all values of a formula, whatever its symbols stand for.

    Raises:
        ProofError: it is not seen to be defined everywhere, or holds something that is not known here.
    """
    match formula:
        case sp.Symbol():
            return known[formula] if formula in known else domain(formula)
        case sp.Rational() | sp.E:
            return (formula, 0), (formula, 0)
        case sp.Add() | sp.Mul():
            return reduce(_plus if formula.is_Add else _times, (range_of(part, known) for part in formula.args))
        case sp.exp():
            return _along(sp.exp, range_of(formula.exp, known))
        case sp.Pow():
            return _power(formula, range_of(formula.base, known), formula.exp, known)
        case sp.Indexed(args=(base, index)) if base == x and index.is_integer:
            range_of(index, known)
            return REAL
        case Sum(limits=(limits,)):
            symbol, first, last = limits
            length = range_of(last - first + 1, known)
            _need(length[0] >= ZERO, f"{formula} may run backwards")
            _need(symbol.is_integer, f"{symbol}: sums run over integers")
            run = range_of(first, known)[0], range_of(last, known)[1]
            known = _bind(known, symbol, run, first.is_integer and last.is_integer)
            return _times(length, range_of(formula.function, known))
        case Limit(args=(function, symbol, point, side)):
            (low, _), (high, _) = domain(symbol)
            near = ((point, 1), (high, -1)) if str(side) == "+" else ((low, 1), (point, -1))
            numeric = (point.is_Rational or point.is_infinite) and str(side) != "+-"
            _need(numeric and near[0] < near[1], f"{formula}: nothing that {symbol} stands for comes near {point}")
            range_of(function, _bind(known, symbol, near, point.is_infinite))
        case Subs():
            for symbol, point in zip(formula.variables, formula.point, strict=True):
                known = _bind(known, symbol, range_of(point, known), point.is_integer)
            return range_of(formula.expr, known)
        case Derivative():
            range_of(formula.expr, known)
            _need(not any(v.is_integer for v in formula.variables), f"{formula} is a derivative by an integer")
        case _:
            raise ProofError(f"{formula} is no formula that can be checked here")
    return range_of(_worked_out(formula), known)  # what becomes of a limit or a derivative


def _worked_out(formula: Any) -> Any:
    return formula.replace(Limit, _limit).doit()


@cache
def _limit(function: Any, symbol: Any, point: Any, side: Any) -> Any:
    """Give a limit that holds whatever the other letters stand for.

    SymPy's holds for almost all of that: 1 for m/(m + s) as s tends to 0, where m may be 0. Here u is the distance from
    the point, or 1/u the symbol that grows. Numerator and denominator have to be defined at u = 0 as well, so that they
    are continuous there. Where both are 0 for all letters, l'Hospital's rule goes on with their derivatives. exp(-b/u)
    with b > 0 counts as 0: it is smaller than any power of u, and so are its derivatives.
    """
    u = sp.Dummy("u", positive=True)
    place = sp.sign(point) / u if point.is_infinite else point + sp.Integer(f"{side}1") * u
    near = _worked_out(function).subs(symbol, place)
    at = {u: (ZERO, ZERO)}
    flat = {part: sp.Dummy() for part in near.atoms(exp) if range_of(sp.expand(part.exp * u), at)[1] < ZERO}
    top, bottom = sp.fraction(sp.together(near.xreplace(flat)))
    for _ in range(9):
        for part in (top, bottom):
            range_of(part, at | dict.fromkeys(flat.values(), (ZERO, ZERO)))
        top, bottom = (part.xreplace(dict.fromkeys(flat.values(), sp.Integer(0))) for part in (top, bottom))
        ends = [sp.simplify(part.subs(u, 0)) for part in (top, bottom)]
        if any(ends):
            break
        top, bottom = top.diff(u), bottom.diff(u)
    low, high = range_of(ends[1])
    _need(low > ZERO or high < ZERO, f"{function} may have no limit or another one: its denominator tends to {ends[1]}")
    return ends[0] / ends[1]


def _examine(*formulas: Any) -> tuple[Any, ...]:
    """Give the formulas of one claim or step as SymPy's objects; refuse what is not defined or can be misread."""
    formulas = tuple(sp.sympify(formula, strict=True) for formula in formulas)
    _need(all(isinstance(formula, sp.Expr) for formula in formulas), f"{formulas} are not all formulas")
    _refuse_homonyms(formulas)
    whole = sp.Tuple(*formulas)
    bound = {symbol for part in whole.atoms(Sum, Subs) for symbol in part.variables}
    both = whole.free_symbols & (bound | {part.args[1] for part in whole.atoms(Limit)})
    _need(not both, f"{both} are bound in one place and free in another")
    for formula in formulas:
        range_of(formula)
    return formulas


def _refuse_homonyms(formulas: Iterable[Any]) -> None:
    """Refuse two letters of one name, among those of this package as well."""
    names = {letter.name: letter for letter in LETTERS}
    for letter in (letter for formula in formulas for letter in formula.atoms(sp.Symbol)):
        _need(names.setdefault(letter.name, letter) == letter, f"{letter} is not the {letter} of this name")


@dataclass(frozen=True, repr=False)
class Step:
    """One line of a proof: two sides that are equal, and why they are.

    A sum, limit or derivative stands unevaluated on its side and is worked out by `prove`.
    """

    lhs: Any
    rhs: Any
    reason: str

    def prove(self) -> None:
        """Check that the sides are defined, differ as written, and that their difference simplifies to 0.

        Raises:
            ProofError: one is not defined, they are the same expression, or the step does not hold.
        """
        with _refusing(self):
            lhs, rhs = _examine(self.lhs, self.rhs)
            _need(lhs != rhs, f"{self} says nothing: both sides are the same expression")
            _need(_is_zero(lhs, rhs), f"{self} does not hold, as far as can be told ({self.reason})")

    def __repr__(self) -> str:
        return f"{self.lhs} = {self.rhs}"


@dataclass(frozen=True)
class Induction:
    """The claim that what starts as `initial` and becomes `renewed` (a formula in `old`) is `closed` after n times.

    `count` is that n; in `renewed` it is the number of times before. Proved by a base, n = 1, and a step to n + 1.
    """

    closed: Any
    renewed: Any
    count: Any
    initial: Any = x0

    def __str__(self) -> str:
        renewed = self.renewed.subs(old, sp.Symbol(f"R_{self.count}"))
        return f"R_{self.count} = {self.closed}, for R_({self.count} + 1) = {renewed} and R_0 = {self.initial}"

    def _latex(self, printer: Any) -> str:  # what sp.latex asks for
        number, closed, initial = map(printer.doprint, (self.count, self.closed, self.initial))
        renewed = sp.latex(self.renewed, symbol_names={old: f"R_{{{number}}}"})
        start = "" if self.initial == x0 else rf",\ R_0 = {initial}"
        return rf"R_{{{number}}} = {closed} \quad\text{{for}}\quad R_{{{number} + 1}} = {renewed}{start}"


@dataclass(frozen=True)
class Growth:
    """The claim that `larger` > `smaller` for every `count`: their difference is positive at 1, and grows."""

    larger: Any
    smaller: Any
    count: Any

    def __str__(self) -> str:
        return f"{self.larger} > {self.smaller}"

    def _latex(self, printer: Any) -> str:
        return f"{printer.doprint(self.larger)} > {printer.doprint(self.smaller)}"


def goals(claim: Any) -> tuple[tuple[Any, Any], ...]:
    """Give what has to be shown for a claim, as (start, end): an equation, or with None for an end, start > 0.

    Raises:
        ProofError: it is no claim that can be proved here, it is not defined, or it says nothing.
    """
    kind = type(claim)
    _need(kind in (sp.Equality, sp.StrictGreaterThan, Induction, Growth), f"{claim!r}: no equation, > or induction")
    parts = _examine(*(vars(claim).values() if kind in (Induction, Growth) else claim.args))
    found: tuple[tuple[Any, Any], ...]
    if kind is sp.Equality:
        found = (parts,)
    elif kind is sp.StrictGreaterThan:
        found = ((parts[0] - parts[1], None),)
    else:
        count = parts[2]
        _need(domain(count)[0] == ONE, f"an induction over {count}, which is not 1, 2, ...")
        if kind is Growth:
            gap = parts[0] - parts[1]
            found = (gap.subs(count, 1), None), (gap.subs(count, count + 1) - gap, None)
        else:
            closed, renewed, _, initial = parts
            _need(old in renewed.free_symbols, f"{renewed} does not say what becomes of {old}")
            _need(old not in closed.free_symbols | initial.free_symbols, f"{old} stands outside of what is renewed")
            _need(count not in initial.free_symbols, f"{initial}, the initial value, changes with {count}")
            base = renewed.subs(old, initial).subs(count, 0), closed.subs(count, 1)
            found = base, (renewed.subs(old, closed), closed.subs(count, count + 1))
    found = tuple((start, end) for start, end in found if start != end)
    _need(found, f"{claim} says nothing")
    return found


@dataclass(frozen=True, repr=False)
class Theorem:
    """What is claimed, in words and as formulas, with the steps that prove it: one for each of the `goals`, in order.

    A claim is an `Eq`, a `>`, an `Induction` or a `Growth`; formulas stand there alone, so that the words state none
    unchecked. The step for something that is positive leads to a form in which that is seen.
    """

    name: str
    statement: str
    claims: tuple[Any, ...]
    steps: tuple[Step, ...]

    def prove(self) -> None:
        """Check that the steps hold and are what the claims need, with none left over.

        Raises:
            ProofError: a step does not hold, is missing or is too many; a claim says nothing, or nothing is claimed;
                the words contain an equation; or any of this cannot be told.

        Example:
            >>> from momentum_fix.symbolic import theorems
            >>> theorems()[0].prove()
        """
        with _refusing(self.name):
            _need("=" not in self.statement, f"{self.name}: an equation in words is not checked: make it a claim")
            steps = list(self.steps)
            for claim in self.claims:
                for start, end in goals(claim):
                    at = start
                    if steps and steps[0].lhs == start:
                        Step.prove(steps[0])
                        at = sp.sympify(steps.pop(0).rhs)
                    reached = at is not start and (range_of(at)[0] > ZERO if end is None else at == end)
                    _need(reached, f"{self.name}: {claim} is not proved: no step leads on from {at}")
            _need(self.claims and not steps, f"{self.name}: the steps {steps} prove nothing that is claimed")
            _refuse_homonyms(sp.sympify(side) for step in self.steps for side in (step.lhs, step.rhs))

    def __str__(self) -> str:
        claims = (f"{claim.lhs} = {claim.rhs}" if isinstance(claim, sp.Eq) else claim for claim in self.claims)
        return "\n   ".join([self.name, self.statement, *(f"claim: {claim}" for claim in claims)])

    def __repr__(self) -> str:
        return f"<Theorem {self.name!r}: {len(self.claims)} claims, {len(self.steps)} steps>"

    def _repr_latex_(self) -> str:
        claims = r" \\[1ex] ".join(map(sp.latex, self.claims))
        return rf"$$\begin{{gathered}} {claims} \end{{gathered}}$$"


@cache
def _is_zero(lhs: Any, rhs: Any) -> bool:
    """Tell whether SymPy reduces the difference of two sides to 0, under the assumptions on their symbols."""
    if not _is_zero_in_numbers(lhs - rhs):  # quicker than a search for a proof that is not there
        return False
    done = [_worked_out(side) for side in (lhs, rhs)]
    for side in done:
        range_of(side)  # no case distinction
    difference = sp.numer(sp.together((done[0] - done[1]).replace(Sum, _split)))  # over what is not 0: it is defined
    return bool(sp.simplify(sp.powsimp(sp.expand(difference))) == 0)


def _is_zero_in_numbers(difference: Any) -> bool:
    """Tell whether a difference is 0 for some numbers, with a value close to each limit instead of the limit."""
    difference = difference.replace(sp.Indexed, lambda base, index: sp.cos(index)).replace(Limit, _near)
    symbols = sorted(difference.free_symbols, key=str)
    some = {v: 3 + place if v.is_integer else sp.Float(3 + place, 50) / 19 for place, v in enumerate(symbols)}
    return bool(abs(difference.subs(some).doit().evalf()) < 1e-6)


def _near(function: Any, symbol: Any, point: Any, side: Any) -> Any:
    small = sp.Float(f"{side}1e-9", 50)
    return function.subs(symbol, -1 / small if point.is_infinite else point + small)


def _split(term: Any, limits: Any) -> Any:
    """Write a sum up to n + 1, n + 2, ... as the sum up to n and its last terms, as every induction needs it."""
    index, first, last = limits
    further = max(last - n, 0) if (last - n).is_Integer else 0
    return Sum(term, (index, first, last - further)) + sum(
        term.subs(index, n + extra) for extra in range(1, further + 1)
    )


def equal(lhs: Any, rhs: Any) -> Any:
    """Give the claim `lhs = rhs`, as written."""
    return sp.Eq(lhs, rhs, evaluate=False)


def greater(larger: Any, smaller: Any) -> Any:
    """Give the claim `larger > smaller`, as written: its step leads from the difference to something positive."""
    return sp.Gt(larger, smaller, evaluate=False)
