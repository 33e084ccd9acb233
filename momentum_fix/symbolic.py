"""Why the formula holds and where it stops: theorems whose claims and steps SymPy checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy as sp
from sympy import Derivative, Integral, Limit, Subs, Sum, exp, log, sqrt
from sympy.core.function import AppliedUndef

from momentum_fix.weights import batch_weights

# m and alpha reach both ends of [0, 1] (alpha is 1 - m, q is 1 - m of a single pass); h = -log(1 - m) covers the
# inside of it, and makes every power of the decay an exponential, whose sign SymPy knows.
m, p, alpha, q, delta = sp.symbols("m p alpha q delta", nonnegative=True)
h, s, t, u = sp.symbols("h s t u", positive=True)
k, n = sp.symbols("k n", integer=True, positive=True)
j, N = sp.symbols("j N", integer=True, nonnegative=True)
old, x0, b, c, w = sp.symbols("R R_0 b c w", real=True)
one = sp.Integer(1)
x = sp.IndexedBase("x")  # x[1], x[2], ...: the statistics of the batches, whatever they are

# One claim and what leads to it: a text is the reason for the last step to its end, (expression, text) a step before.
Proof = Iterator[tuple[Any, ...]]
_THEOREMS: list[Callable[[], Theorem]] = []


class ProofError(ArithmeticError):
    """A step does not hold, or the steps do not prove what is claimed."""


@dataclass(frozen=True, repr=False)
class Step:
    """One line of a proof: two sides that SymPy must find equal, and why they are.

    A sum, limit, derivative or integral stands unevaluated on its side and is worked out by `prove`.
    """

    lhs: Any
    rhs: Any
    reason: str

    def prove(self) -> None:
        """Check that the two sides differ as written, and that their difference simplifies to 0.

        Raises:
            ProofError: they are the same expression, or the step does not hold.
        """
        if sp.sympify(self.lhs) == sp.sympify(self.rhs):
            raise ProofError(f"{self} says nothing: both sides are the same expression")
        if not _is_zero(sp.sympify(self.lhs) - sp.sympify(self.rhs)):
            raise ProofError(f"{self} does not hold ({self.reason})")

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

    def _latex(self, printer: Any) -> str:  # what sp.latex asks for
        number, closed, initial = map(printer.doprint, (self.count, self.closed, self.initial))
        renewed = sp.latex(self.renewed, symbol_names={old: f"R_{{{number}}}"})
        start = "" if self.initial == x0 else rf",\ R_0 = {initial}"
        return rf"R_{{{number}}} = {closed} \quad\text{{for}}\quad R_{{{number} + 1}} = {renewed}{start}"


@dataclass(frozen=True, repr=False)
class Theorem:
    """What is claimed, in words and as formulas that a machine reads, with the steps that prove it.

    A claim is an `Eq`, a `>` or an `Induction`; formulas stand there alone, so that the words state none unchecked.
    """

    name: str
    statement: str
    claims: tuple[Any, ...]
    steps: tuple[Step, ...]

    def prove(self) -> None:
        """Check that the steps hold and lead, one from where another ended, through every claim, with none left over.

        Raises:
            ProofError: a step does not hold, is missing or is too many; nothing is claimed; or the words contain an
                equation.

        Example:
            >>> theorems()[0].prove()
        """
        if "=" in self.statement:
            raise ProofError(f"{self.name}: the words contain an equation, which nothing checks: make it a claim")
        steps = list(self.steps)
        for claim in self.claims:
            goals = _goals(claim)
            if all(start == end for start, end in goals):
                raise ProofError(f"{self.name}: {claim} says nothing")
            for reached, end in goals:
                while not _is_reached(end, reached):
                    if not steps or steps[0].lhs != reached:
                        raise ProofError(f"{self.name}: {claim} is not proved: no step leads on from {reached}")
                    steps[0].prove()
                    reached = steps.pop(0).rhs
        if steps or not self.claims:
            raise ProofError(f"{self.name}: the steps {steps} prove nothing that is claimed")

    def __repr__(self) -> str:
        return f"<Theorem {self.name!r}: {len(self.claims)} claims, {len(self.steps)} steps>"

    def _repr_latex_(self) -> str:
        claims = r" \\[1ex] ".join(map(sp.latex, self.claims))
        return rf"$$\begin{{gathered}} {claims} \end{{gathered}}$$"


def _goals(claim: Any) -> tuple[tuple[Any, Any], ...]:
    """Give what steps have to connect to prove a claim, as (start, end); an end of None is anything positive."""
    if isinstance(claim, Induction):
        base = claim.renewed.subs(old, claim.initial).subs(claim.count, 0), claim.closed.subs(claim.count, 1)
        return base, (claim.renewed.subs(old, claim.closed), claim.closed.subs(claim.count, claim.count + 1))
    if isinstance(claim, sp.StrictGreaterThan):
        return ((claim.lhs - claim.rhs, None),)
    return ((claim.lhs, claim.rhs),)


def _is_reached(end: Any, reached: Any) -> bool:
    """Tell whether a chain of steps has come to its end: None stands for what is seen to be positive."""
    if end is not None:
        return bool(reached == end)
    parts = [reached]
    if isinstance(reached, Integral):
        parts = [reached.function, *(sp.factor(last - first) for _, first, last in reached.limits)]
    return all(part.is_positive for part in parts)


@cache
def _is_zero(difference: Any) -> bool:
    """Tell whether SymPy reduces an expression to 0, under the assumptions on its symbols."""
    worked_out = difference.doit()
    if _is_refuted(worked_out):
        return False
    if difference.has(Sum):  # to one common range, where sums cancel unevaluated, term by term
        worked_out = sp.simplify(difference.replace(Sum, _split)).doit()
    return bool(sp.simplify(sp.powsimp(sp.expand(worked_out))) == 0)


def _is_refuted(difference: Any) -> bool:
    """Tell whether one set of numbers already shows a difference: quicker than a search for a proof that is not there.

    Where it shows none, nothing is proved yet.
    """
    unknown = {part: sp.Dummy() for part in difference.atoms(AppliedUndef, Derivative)}
    difference = difference.xreplace(unknown).replace(sp.Indexed, lambda base, index: sp.cos(index))
    symbols = sorted(difference.free_symbols, key=str)
    numbers = [3 + place if s.is_integer else sp.Rational(3 + place, 19) for place, s in enumerate(symbols)]
    value = difference.subs(dict(zip(symbols, numbers, strict=True))).doit().evalf()
    return bool(value.is_number and value is not sp.nan and abs(value) > 1e-9)


def _split(term: Any, limits: Any, *outer: Any) -> Any:
    """Write a sum up to n + 1, n + 2, ... as the sum up to n and its last terms, as every induction needs it."""
    index, first, last = limits
    further = last - n
    if outer or not (further.is_Integer and further > 0):
        return Sum(term, limits, *outer)
    return Sum(term, (index, first, n)) + sum(term.subs(index, n + extra) for extra in range(1, further + 1))


def equal(lhs: Any, rhs: Any) -> Any:
    """Give the claim `lhs = rhs`, as written."""
    return sp.Eq(lhs, rhs, evaluate=False)


def greater(larger: Any, smaller: Any) -> Any:
    """Give the claim `larger > smaller`, as written: its steps lead from the difference to something positive."""
    return sp.Gt(larger, smaller, evaluate=False)


def update(value: Any, batch: Any, momentum: Any) -> Any:
    """Give BatchNorm's update of one running statistic: (1 - momentum) * value + momentum * batch."""
    return (1 - momentum) * value + momentum * batch


def after_passes(value: Any, batch: Any, decay: Any, passes: Any) -> Any:
    """Give the running value after equal updates: decay**passes * value + (1 - decay**passes) * batch."""
    return decay**passes * value + (1 - decay**passes) * batch


def correction(momentum: Any, passes: Any) -> Any:
    """Give the corrected momentum, 1 - (1 - momentum)**(1/passes)."""
    return 1 - (1 - momentum) ** (1 / passes)


def effective(momentum: Any, passes: Any) -> Any:
    """Give the effective momentum, 1 - (1 - momentum)**passes."""
    return 1 - (1 - momentum) ** passes


def running_value(decay: Any, batches: Any) -> Any:
    """Give the running value after some batches x[1], x[2], ..., where each leaves `decay` of the old value."""
    return decay**batches * x0 + (1 - decay) * Sum(decay ** (batches - j) * x[j], (j, 1, batches))


def stationary_variance(decay: Any) -> Any:
    """Give the stationary variance of the running value, in units of the variance of one batch's statistic."""
    return (1 - decay) / (1 + decay)


def noise_ratio(decay: Any, passes: Any) -> Any:
    """Give how many times as large uncorrected passes make the stationary variance."""
    return (1 + decay) * (1 - decay**passes) / ((1 - decay) * (1 + decay**passes))


def mean_age(decay: Any) -> Any:
    """Give the mean age, in batches, of what the running value is made of."""
    return decay / (1 - decay)


def _theorem(name: str, statement: str) -> Callable[[Callable[[], Proof]], None]:
    """Declare a theorem: its words, and below them the generator of its claims with their steps."""

    def build(proof: Callable[[], Proof]) -> Theorem:
        claims, steps = [], []
        for claim, *links in proof():
            claims.append(claim)
            goals = ((start, end) for start, end in _goals(claim) if start != end)
            at, end = next(goals)
            for link in links:
                rhs, reason = (end, link) if isinstance(link, str) else link
                steps.append(Step(at, rhs, reason))
                at, end = next(goals, (rhs, end)) if isinstance(link, str) else (rhs, end)
        return Theorem(name, statement, tuple(claims), tuple(steps))

    return lambda proof: _THEOREMS.append(lambda: build(proof))


@_theorem(
    "Double update",
    "Two updates with one batch keep the square of the decay of the old value: the batch weighs nearly twice as much.",
)
def _() -> Proof:
    first, unfolded = update(x0, b, 1 - alpha), alpha**2 * x0 + alpha * (1 - alpha) * b + (1 - alpha) * b
    second = unfolded, "The second update acts on the result of the first."
    claim = equal(update(first, b, 1 - alpha), after_passes(x0, b, alpha, 2))
    yield claim, second, "The two shares of the batch add up."
    yield equal(Subs(1 - alpha**2, alpha, 1 - m), m * (2 - m)), "What the batch weighs, by the momentum."


@_theorem("k passes", "k equal updates with one batch act as one update whose decay is the k-th power.")
def _() -> Proof:
    claim = Induction(after_passes(x0, b, alpha, k), update(old, b, 1 - alpha), count=k)
    yield claim, "One pass is the update itself. Step: one more update after k."


@_theorem(
    "Correction",
    "There is exactly one momentum with which k passes amount to one update with m: the corrected momentum.",
)
def _() -> Proof:
    yield equal(Subs(effective(p, k), p, correction(m, k)), m), "k passes with it weigh the batch by m."
    only = equal(Subs(correction(m, k), m, effective(1 - delta, k)), 1 - delta)
    yield only, "And if k passes with any momentum 1 - delta amount to m, correcting m gives that momentum."


@_theorem(
    "Whole trajectory",
    "With the corrected momentum the running value is that of the run without checkpointing, after any number of "
    "batches and whatever their statistics are.",
)
def _() -> Proof:
    passes = Subs(after_passes(old, b, q, k), q, 1 - correction(m, k))
    yield equal(passes, update(old, b, m)), "k passes with the corrected momentum are one update with m: as a map."
    value = Induction(running_value(alpha, n), update(old, x[n + 1], 1 - alpha), count=n)
    yield value, "So both runs have this value. Base: the first batch.", "Step: batch n + 1, whatever its statistic."


@_theorem(
    "Cumulative average",
    "With momentum None, where update number t has momentum 1/t, k equal passes per batch give the plain mean of the "
    "batches, as one pass does: nothing has to be corrected.",
)
def _() -> Proof:
    passes, mean = (N * x0 + k * b) / (N + k), Sum(x[j], (j, 1, n)) / n
    claim = Induction(passes, update(old, b, 1 / (N + k + 1)), count=k)
    yield claim, "After N updates, some with batch b. Base: the first.", "Step: pass k + 1, which is update N + k + 1."
    claim = equal(Subs(passes, N, k * N), update(x0, b, 1 / (N + 1)))
    yield claim, "After N batches of k passes each, k passes act as one update does after N."
    claim = Induction(mean, update(old, x[n + 1], 1 / (n + 1)), count=n)
    yield claim, "That gives the mean. Base: the first batch replaces the initial value.", "Step: batch n + 1."


@_theorem(
    "Order",
    "In any order of updates the decay is right. The shares of the batches are right if the passes of each follow one "
    "another, and for 0 < m < 1 only then: A B B A gives the older batch too much, and so do any batches forward and "
    "then in reverse; A B A B does, but less.",
)
def _() -> Proof:
    value = Induction(running_value(q, n), update(old, x[n + 1], 1 - q), count=n)
    yield value, "Whatever batch an update sees. Base: the first.", "Step: update n + 1 scales what was there by q."
    both = 1 - q**2  # the momentum of two passes: A should weigh both * (1 - both), and B both
    for order, excess in (("ABBA", both * (1 - q)), ("ABAB", q * (1 - q) ** 2)):
        weights = batch_weights(order, 1 - q).batches
        yield equal(weights["A"], both * (1 - both) + excess), f"{order}: what A should weigh, and so much more."
        yield equal(weights["B"], both - excess), f"{order}: what B should weigh, and as much less."
    place, seen = (1 - q) * q ** (2 * n - t), (1 - q) * (q ** (2 * n - j) + q ** (j - 1))
    claim = equal(Subs(place, t, j) + Subs(place, t, 2 * n + 1 - j), seen)
    yield claim, "Forward and in reverse, batch j is seen by updates j and 2n + 1 - j of 2n."
    claim = equal(seen.subs(j, 1), both * q ** (2 * n - 2) + (1 - q) * (1 - q ** (2 * n - 2)))
    yield claim, "The oldest of several: what it should weigh, and so much more."
    claim = equal(seen.subs(j, n), both - both * (1 - q ** (n - 1)))
    yield claim, "The newest of several: what it should weigh, and so much less."
    in_a_row = Subs(q ** (k * (n - j)) * (1 - q**k), q, alpha ** (1 / k))
    yield equal(in_a_row, (1 - alpha) * alpha ** (n - j)), "Passes in a row: the right weight of batch j of n."
    reason = (
        "Only then: an update weighs less the farther it lies from the end, so the last batch is right only if its "
        "passes come last; leave them out, and the same holds for the batch before."
    )
    yield greater(exp(-h * j), exp(-h * (j + n))), (Integral(h * exp(-h * u), (u, j, j + n)), reason)


@_theorem("Repair", "For m > 0 the value after one pass follows from the value before and the value after k passes.")
def _() -> Proof:
    moved, factor = after_passes(x0, b, 1 - m, k) - x0, m / effective(m, k)
    scaled = x0 + m * (b - x0), "k passes move the value by their effective momentum times the distance to the batch."
    yield equal(x0 + moved * factor, update(x0, b, m)), scaled, "Scaled, that is the move of one pass."
    yield equal(Limit(factor, m, 0, "+"), 1 / k), "The factor for small m; at 0 nothing moves or needs repair."


@_theorem(
    "Size of the effect",
    "For 0 < m < 1 and independent batch statistics, k uncorrected passes multiply the variance of the running value "
    "in the long run, and divide its mean age and its lag behind a drift, by factors that are k for small m. They "
    "divide the half-life by k.",
)
def _() -> Proof:
    start, decay, stays = sp.Symbol("V", real=True), exp(-h), stationary_variance
    variance = alpha ** (2 * n) * start + (1 - alpha ** (2 * n)) * stays(alpha)
    claim = Induction(variance, alpha**2 * old + (1 - alpha) ** 2, count=n, initial=start)
    yield claim, "Variances of independent parts add up. Base: one batch of variance 1.", "Step: another one."
    claim = equal(Limit(variance.subs(alpha, decay), n, sp.oo), stays(decay))
    yield claim, "In the long run nothing of the first variance is left."
    yield equal(Subs(stays(alpha), alpha, 1 - m), m / (2 - m)), "The same, by the momentum."
    yield equal(Subs(stays(alpha), alpha, alpha**k) / stays(alpha), noise_ratio(alpha, k)), "The exact ratio."
    yield equal(Limit(noise_ratio(1 - m, k), m, 0, "+"), k), "That ratio for small m."

    age = alpha * (1 - alpha**n) / (1 - alpha) - n * alpha ** (n + 1)
    claim = Induction(age, old + (n + 1) * (1 - alpha) * alpha ** (n + 1), count=n, initial=sp.Integer(0))
    yield claim, "The mean age sums ages, each with its weight. Base: age 1.", "Step: age n + 1."
    yield equal(Limit(age.subs(alpha, decay), n, sp.oo), mean_age(decay)), "Over all ages."
    yield equal(Limit(mean_age((1 - m) ** k) / mean_age(1 - m), m, 0, "+"), 1 / k), "k uncorrected passes, small m."

    drifting = c * n - c * mean_age(alpha) + alpha**n * (x0 + c * mean_age(alpha))
    claim = Induction(drifting, update(old, c * (n + 1), 1 - alpha), count=n)
    yield claim, "Statistics that drift by c per batch. Base: the first batch.", "Step: batch n + 1."
    claim = equal(Limit(c * n - drifting.subs(alpha, decay), n, sp.oo), c * mean_age(decay))
    yield claim, "The lag that stays is drift times mean age."
    claim = equal(Subs(exp(-h * k * t), t, log(2) / (h * k)), one / 2)
    yield claim, "k passes halve a weight in 1/k of the batches."


@_theorem(
    "Small momentum",
    "For k > 1 and 0 < m < 1 the corrected momentum lies between m/k and m, near m/k for small m. The textbook "
    "expression makes a rounding error of 1 - m larger, about 1/m times for small m; with log1p and expm1 none grows.",
)
def _() -> Proof:
    few, many = exp(-h / (n + 1)), exp(-h)  # k is n + 1, and 1 - m is exp(-h)
    gap = Integral(exp(-s) / (n + 1), (s, t / (n + 1), t), (t, 0, h))
    yield greater(1 - few, (1 - many) / (n + 1)), (gap, "Lengths and integrand are positive.")
    yield greater(1 - many, 1 - few), (Integral(exp(-s), (s, h / (n + 1), h)), "Length and integrand are positive.")
    yield equal(Limit(correction(m, k) / m, m, 0, "+"), 1 / k), "The first term of the series."
    yield equal(Limit((correction(m, k) - m / k) / m**2, m, 0, "+"), (k - 1) / (2 * k**2)), "The second."

    textbook = Subs(Derivative(1 - ((1 - m) * (1 + p)) ** (1 / k), p), p, 0) / correction(m, k)
    growth = -((1 - m) ** (1 / k)) / (k * correction(m, k))
    yield equal(textbook, growth), "Textbook expression: relative error per relative error p of the rounded 1 - m."
    yield equal(Limit(m * growth, m, 0, "+"), -one), "For small m: every digit is lost below 1e-16."
    stable = Subs(Derivative(log(1 - exp(-s * (1 + p))), p), p, 0)
    yield equal(stable, s / (exp(s) - 1)), "-expm1(-s) with s from log1p: the same per relative error p of s."
    gap = Integral(exp(u), (u, 0, t), (t, 0, s))
    yield greater(exp(s) - 1, s), (gap, "Lengths and integrand are positive: that factor is below 1.")


@_theorem(
    "Gradients",
    "In training mode the output is normalized by the batch's own statistics: neither it nor a derivative of it "
    "contains the running statistics, so a recomputation with other running statistics gives the same gradients.",
)
def _() -> Proof:
    mode, gain, shift, eps, *buffers = sp.symbols("tau gamma beta epsilon R V R' V'", real=True)
    value, mean, var = (sp.Function(name)(w) for name in ("x", "mu", "v"))

    def normalized(by_mean: Any, by_var: Any) -> Any:
        return gain * (value - by_mean) / sqrt(by_var + eps) + shift

    r, big_v, *others = buffers
    used_mean, used_var = mode * mean + (1 - mode) * r, mode * var + (1 - mode) * big_v
    output, replay = normalized(used_mean, used_var), ((mode, r, big_v), (1, *others))
    slope = -(1 - mode) * gain / sqrt(used_var + eps)
    yield equal(Derivative(output, r), slope), "By the running mean: 0 in training (tau is 1), not in evaluation (0)."
    slope *= (value - used_mean) / (2 * (used_var + eps))
    yield equal(Derivative(output, big_v), slope), "By the running variance: the same."
    yield equal(Subs(output, *replay), normalized(mean, var)), "A replay that finds other statistics: same output."
    written = gain * (value.diff(w) - mean.diff(w)) / sqrt(var + eps)
    written -= gain * (value - mean) * var.diff(w) / (2 * sqrt(var + eps) ** 3)
    yield equal(Subs(Derivative(output, w), *replay), written), "And the same derivative by any w that x depends on."


@_theorem(
    "Replay",
    "A replay from the state that the forward pass started from is the same function, with the same gradients. From "
    "the state that the forward pass left it is another one where the output reads the state, and for 0 < m < 1 no "
    "momentum p mends that: with p equal to m alone the output is right, and then the gradient is not. The smallest "
    "example: y is w times the distance of b to a running value that b has moved, and the loss is half of y squared.",
)
def _() -> Proof:
    state, y = sp.symbols("S y", real=True)
    output = w * (b - update(state, b, p))  # S is the state before; y is the forward's output, which the loss was given
    forward, right = w * (1 - p) * (b - x0), w * (1 - m) ** 2 * (b - x0) ** 2
    replay = y * Derivative(output, w)
    yield equal(Subs(output, state, x0), forward), "The forward pass, with momentum p."
    yield equal(Subs(Derivative(output**2 / 2, w), (state, p), (x0, m)), right), "The right gradient, with m."
    restored = Subs(replay, (y, state, p), (forward.subs(p, m), x0, m))
    yield equal(restored, right), "A replay from the state that the forward pass started from."
    left = Subs(replay, (y, state), (forward, update(x0, b, p)))
    yield equal(left, w * (1 - p) ** 3 * (b - x0) ** 2), "From the state that it left: for p = m one decay too many."


def theorems() -> tuple[Theorem, ...]:
    """Give the theorems in order; `Theorem.prove` checks one, and a notebook shows its claims as formulas.

    Example:
        >>> [theorem.name for theorem in theorems()][:3]
        ['Double update', 'k passes', 'Correction']
        >>> theorems()[2]
        <Theorem 'Correction': 2 claims, 2 steps>
    """
    return tuple(build() for build in _THEOREMS)
