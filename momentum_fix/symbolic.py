"""Why the formula holds and where it stops: theorems whose every step SymPy checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy as sp
from sympy import Derivative, Integral, Limit, Product, Subs, Sum, exp, log, sqrt
from sympy.core.function import AppliedUndef

from momentum_fix.weights import batch_weights

# m and alpha reach both ends of [0, 1] (alpha is 1 - m, q is 1 - m of a single pass); h = -log(1 - m) covers the
# inside of it, and makes every power of the decay an exponential, whose sign SymPy knows.
m, p, alpha, q, delta = sp.symbols("m p alpha q delta", nonnegative=True)
h, s, t, u = sp.symbols("h s t u", positive=True)
k, n = sp.symbols("k n", integer=True, positive=True)
j, N = sp.symbols("j N", integer=True, nonnegative=True)
x0, b, c = sp.symbols("x_0 b c", real=True)
one = sp.Integer(1)
x = sp.IndexedBase("x")  # x[1], x[2], ...: the statistics of the batches, whatever they are

Proof = Iterator[tuple[Any, Any, str]]  # the steps, as (lhs, rhs, reason)
_THEOREMS: list[Callable[[], Theorem]] = []


class ProofError(ArithmeticError):
    """A step of a proof does not hold."""


@dataclass(frozen=True)
class Step:
    """One line of a proof: two sides that SymPy must find equal, and why they are.

    A sum, limit, derivative or integral stands unevaluated on its side and is worked out by `Theorem.prove`; an
    inequality is the equation `sign(...) = 1`.
    """

    lhs: Any
    rhs: Any
    reason: str


@dataclass(frozen=True)
class Theorem:
    """A statement, plain and in LaTeX, with the steps that prove it."""

    name: str
    statement: str
    latex: str
    steps: tuple[Step, ...]

    def prove(self) -> None:
        """Check every step on its own: the two sides differ as written, and their difference simplifies to 0.

        Raises:
            ProofError: a step does not hold (the message names the first), or there is none.

        Example:
            >>> theorems()[0].prove()
        """
        if not self.steps:
            raise ProofError(f"{self.name}: there are no steps, so nothing is proved")
        for number, step in enumerate(self.steps, start=1):
            where = f"{self.name}, step {number}: {step.lhs} = {step.rhs}"
            if sp.sympify(step.lhs) == sp.sympify(step.rhs):
                raise ProofError(f"{where} says nothing: both sides are the same expression")
            if not _is_zero(sp.sympify(step.lhs) - sp.sympify(step.rhs)):
                raise ProofError(f"{where} does not hold ({step.reason})")


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


def positive(expression: Any) -> Any:
    """Give `sign(expression)`, unevaluated: equal to 1 exactly where the expression is positive."""
    return sp.sign(expression, evaluate=False)


def update(old: Any, batch: Any, momentum: Any) -> Any:
    """Give BatchNorm's update of one running statistic: (1 - momentum) * old + momentum * batch."""
    return (1 - momentum) * old + momentum * batch


def after_passes(old: Any, batch: Any, decay: Any, passes: Any) -> Any:
    """Give the running value after equal updates: decay**passes * old + (1 - decay**passes) * batch."""
    return decay**passes * old + (1 - decay**passes) * batch


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


def mean_age(decay: Any) -> Any:
    """Give the mean age, in batches, of what the running value is made of."""
    return decay / (1 - decay)


def _theorem(name: str, statement: str, latex: str) -> Callable[[Callable[[], Proof]], None]:
    """Declare a theorem: its statement, and below it the generator of (lhs, rhs, reason) that proves it."""

    def declare(proof: Callable[[], Proof]) -> None:
        _THEOREMS.append(lambda: Theorem(name, statement, latex, tuple(Step(*step) for step in proof())))

    return declare


@_theorem(
    "Double update",
    "Two updates with momentum m for one batch leave (1-m)^2 of the old value and 1-(1-m)^2 = m(2-m) of the batch.",
    r"x_2 = \alpha^2 x_0 + (1-\alpha^2)\,b, \qquad \alpha = 1-m",
)
def _() -> Proof:
    old, unfolded = update(x0, b, 1 - alpha), alpha**2 * x0 + alpha * (1 - alpha) * b + (1 - alpha) * b
    yield update(old, b, 1 - alpha), unfolded, "The second update acts on the result of the first."
    yield unfolded, alpha**2 * x0 + (1 - alpha**2) * b, "The two shares of the batch add up to 1 - alpha^2."
    yield Subs(1 - alpha**2, alpha, 1 - m), m * (2 - m), "In terms of m: nearly twice as much as m."


@_theorem(
    "k passes",
    "k equal updates for one batch leave (1-m)^k of the old value and 1-(1-m)^k of the batch.",
    r"x_k = \alpha^k x_0 + (1-\alpha^k)\,b, \qquad \alpha = 1-m",
)
def _() -> Proof:
    run, closed = sp.Function("R"), after_passes(x0, b, alpha, k)
    solution = sp.rsolve(run(j + 1) - update(run(j), b, 1 - alpha), run(j), {run(0): x0})
    yield update(x0, b, 1 - alpha) - b, alpha * (x0 - b), "One update shrinks the distance to the batch by alpha."
    yield solution.subs(j, k), closed, "Solving this recurrence (by SymPy) gives the closed form."
    yield Subs(after_passes(x0, b, alpha, j), j, 0), x0, "Induction base: no pass leaves the old value."
    yield update(closed, b, 1 - alpha), after_passes(x0, b, alpha, k + 1), "Induction step: one more update."


@_theorem(
    "Correction",
    "m' = 1-(1-m)^(1/k) is the only momentum in [0, 1] with which k passes equal one update with m.",
    r"1-(1-m')^k = m \iff m' = 1-(1-m)^{1/k}",
)
def _() -> Proof:
    yield Subs(effective(p, k), p, correction(m, k)), m, "k passes with m' weigh the batch by m, as one update does."
    yield Subs((1 - p) ** k, p, 0), one, "At momentum 0, k passes keep all of the old value."
    yield Subs(effective(p, k), p, 1), one, "At momentum 1, k passes take all of the batch."
    yield Derivative(effective(p, k), p), k * (1 - p) ** (k - 1), "The slope of the batch's weight in the momentum p."
    yield positive(k * u ** (k - 1)), one, "Positive for u = 1 - p > 0: the weight takes each value in [0, 1] once."
    directly = Subs(correction(m, k), m, effective(1 - delta, k))
    yield directly, 1 - delta, "And directly: if k passes with p = 1 - delta weigh the batch by m, then m' is p."


@_theorem(
    "Whole trajectory",
    "With m', after any number of batches with any statistics, the running value is that of the run without "
    "checkpointing.",
    r"x_n = \alpha^n x_0 + (1-\alpha)\sum_{j=1}^{n}\alpha^{n-j}x_j \quad\text{for both runs}, \qquad \alpha = 1-m",
)
def _() -> Proof:
    run = running_value(q**k, n)
    yield running_value(q**k, 0), x0, "k passes of decay q per batch, induction base: no batch, the initial value."
    yield (
        after_passes(run, x[n + 1], q, k),
        running_value(q**k, n + 1),
        "Induction step: k passes with batch n + 1, whatever its statistic (theorem 2).",
    )
    yield Subs(run, (k, q), (1, alpha)), running_value(alpha, n), "One pass, q = 1 - m: the run without checkpointing."
    yield Subs(run, q, alpha ** (1 / k)), running_value(alpha, n), "k passes, q = 1 - m' (theorem 3): the same value."


@_theorem(
    "Cumulative average",
    "With momentum=None (update t has momentum 1/t), k equal passes per batch give the plain mean of the batches, "
    "as one pass does: nothing has to be corrected.",
    r"\prod_{j=1}^{k}\Bigl(1-\frac{1}{kn+j}\Bigr) = 1-\frac{1}{n+1}, \qquad x_n = \frac1n\sum_{j=1}^{n}x_j",
)
def _() -> Proof:
    kept, mean, next_kept = N / (N + j), Sum(x[j], (j, 1, n)) / n, 1 - 1 / (n + 1)
    yield Subs(update(x0, b, 1 / t), t, 1), b, "The first update of all replaces the initial value."
    yield Subs(kept, j, 0), one, "Passes on one batch after N > 0 updates, induction base: none keeps everything."
    yield (1 - 1 / (N + j + 1)) * kept, kept.subs(j, j + 1), "Induction step: pass j + 1, which is update N + j + 1."
    yield Subs(kept, (N, j), (k * n, k)), next_kept, "After k n updates, k passes keep what one keeps after n."
    yield Product(1 - 1 / (k * n + j), (j, 1, k)), next_kept, "The same by SymPy's product: it telescopes."
    yield Sum(x[j], (j, 1, 1)), x[1], "So the running value is the mean of the batches, base: the first batch."
    yield update(mean, x[n + 1], 1 / (n + 1)), Sum(x[j], (j, 1, n + 1)) / (n + 1), "And step: batch n + 1."


@_theorem(
    "Order",
    "In any order of updates the old value keeps q^N after N of them and the batches share 1-q^N. The shares of the "
    "single batches are right only if the k passes of each are consecutive: A B B A gives A too much and B too little "
    "by m m'.",
    r"w_A - m(1-m) = m - w_B = m\,m' \ \text{for A B B A}; \qquad "
    r"w_j = m'\,(q^{2n-j} + q^{j-1}) \ \text{for n batches and back}, \quad q = 1-m'",
)
def _() -> Proof:
    def total(updates: Any) -> Any:
        return q**updates + (1 - q) * Sum(q ** (updates - j), (j, 1, updates))

    one_more = update(running_value(q, n), x[n + 1], 1 - q)
    yield one_more, running_value(q, n + 1), "Whatever x_j update j saw: x_0 keeps q^n after n updates, by induction."
    yield total(0), one, "The weights of the old value and of all updates sum to 1, base: no update."
    yield q * total(n) + 1 - q, total(n + 1), "Step: an update scales them by q and adds 1 - q, whichever its batch."
    weights, m_both = batch_weights("ABBA", 1 - q).batches, 1 - q**2
    yield weights["A"] - m_both * (1 - m_both), m_both * (1 - q), "A B B A, where m = 1 - q^2: A has m m' too much."
    yield weights["B"] - m_both, -m_both * (1 - q), "And B, the newer batch, m m' too little."
    there_and_back, right = (1 - q) * (q ** (2 * n - j) + q ** (j - 1)), (1 - q**2) * q ** (2 * (n - j))
    yield (
        there_and_back - right,
        (1 - q) * (q ** (2 * n - j) - q ** (2 * n - 2 * j) + q ** (j - 1) - q ** (2 * n - 2 * j + 1)),
        "n batches forward, then in reverse: the exact difference for batch j.",
    )
    oldest, newest = Subs(there_and_back - right, j, 1), Subs(there_and_back - right, j, n)
    yield oldest, (1 - q) * (1 - q ** (2 * n - 2)), "The oldest of several batches weighs too much."
    yield newest, -(1 - q**2) * (1 - q ** (n - 1)), "The newest of several batches weighs too little."
    before, after = q ** (k * (n - j)), q ** (k * (n + 1 - j))
    yield before * (1 - q**k), before - after, "Consecutive passes: what updates after them leave of their 1 - q^k."
    consecutive = Subs(before * (1 - q**k), q, alpha ** (1 / k))
    yield consecutive, (1 - alpha) * alpha ** (n - j), "With q = 1 - m' that is the right weight of batch j."
    yield (
        exp(-h * j) - exp(-h * (j + n)),
        Integral(h * exp(-h * u), (u, j, j + n)),
        "Only then: by this much an update weighs less if it lies n > 0 places before place j from the end.",
    )
    yield (
        positive(h * exp(-h * u)),
        one,
        "That is positive, so the last batch is right only if its passes come last; then the one before, and so on.",
    )


@_theorem(
    "Repair",
    "From the running value x_0 before and x_1 after k equal passes, the value after one pass is "
    "x_0 + (x_1-x_0) m/(1-(1-m)^k), for m > 0.",
    r"x_0 + (x_1-x_0)\,\frac{m}{1-(1-m)^k} = (1-m)\,x_0 + m\,b",
)
def _() -> Proof:
    moved, factor = after_passes(x0, b, 1 - m, k) - x0, m / effective(m, k)
    yield moved, effective(m, k) * (b - x0), "k passes move the value by 1-(1-m)^k of its distance to the batch."
    yield x0 + moved * factor, update(x0, b, m), "Scaled by m/(1-(1-m)^k), that is the move of one pass."
    yield Limit(factor, m, 0, "+"), 1 / k, "For small m the factor is 1/k; at m = 0 nothing moves or needs repair."


@_theorem(
    "Size of the effect",
    "For independent batch statistics the running value has m/(2-m) of a batch's variance in the long run; k "
    "uncorrected passes multiply it by (2-m)(1-(1-m)^k) / (m(1+(1-m)^k)), which is k for small m. They also divide the "
    "mean age (1-m)/m and the lag behind a drift by k for small m, and the half-life by k for every m.",
    r"\frac{V_\infty}{V_b} = \frac{m}{2-m}, \qquad \lim_{m\to0}\frac{V_\infty^{(k)}}{V_\infty} = k, \qquad "
    r"\bar a = \frac{1-m}{m}, \qquad \text{lag} = c\,\bar a",
)
def _() -> Proof:
    variance, start = stationary_variance(alpha), sp.Symbol("V", real=True)
    next_variance, ratio = alpha**2 * start + (1 - alpha) ** 2, Subs(variance, alpha, alpha**k) / variance
    yield Subs(variance, alpha, 1 - m), m / (2 - m), "The stationary variance, for batches of variance 1."
    yield next_variance.subs(start, variance), variance, "It is stationary: variances of independent parts add up."
    yield next_variance - variance, alpha**2 * (start - variance), "It is reached: any other comes nearer by alpha^2."
    exact = (1 + alpha) * (1 - alpha**k) / ((1 - alpha) * (1 + alpha**k))
    yield ratio, exact, "k uncorrected passes replace alpha by alpha^k: the exact ratio of the variances."
    yield Limit(exact.subs(alpha, 1 - m), m, 0, "+"), k, "For small m that ratio is k."

    age = alpha * (1 - alpha**n) / (1 - alpha) - n * alpha ** (n + 1)
    older = (1 - alpha) * (n + 1) * alpha ** (n + 1)
    yield Subs(age, n, 1), (1 - alpha) * alpha, "Mean age, the sum of j m (1-m)^j for j up to n, base: n = 1."
    yield age + older, age.subs(n, n + 1), "Mean age, step: the term of age n + 1."
    yield Limit(age.subs(alpha, exp(-h)), n, sp.oo), mean_age(exp(-h)), "Mean age over all ages: (1-m)/m batches."
    ages = mean_age((1 - m) ** k) / mean_age(1 - m)
    yield Limit(ages, m, 0, "+"), 1 / k, "k uncorrected passes divide it, and the lag below, by k for small m."
    half = sp.Rational(1, 2)
    yield Subs(exp(-h * t), t, log(2) / h), half, "Half-life: weights halve in log 2 / -log(1-m) batches."
    yield Subs(exp(-h * k * t), t, log(2) / (h * k)), half, "Under k uncorrected passes it is k times shorter."

    behind, drifting = c * n - c * mean_age(alpha), c * (n + 1)
    ahead = behind.subs(n, n + 1)
    yield update(behind, drifting, 1 - alpha), ahead, "Statistics that drift by c per batch: a lag of c (1-m)/m stays."
    nearer = alpha * (start - behind)
    yield update(start, drifting, 1 - alpha) - ahead, nearer, "It is reached: any other lag comes nearer by alpha."


@_theorem(
    "Small momentum",
    "m/k <= m' <= m: for k > 1 the lower bound is met at m = 0 alone, the upper at m = 0 and m = 1. "
    "m' = m/k + (k-1)m^2/(2k^2) + ... Rounding 1-m costs the textbook expression a relative error 1/m times as large; "
    "with log1p and expm1 no rounding error grows.",
    r"\frac mk \le m' \le m, \qquad m' = \frac mk + \frac{k-1}{2k^2}m^2 + \frac{(k-1)(2k-1)}{6k^3}m^3 + \dots",
)
def _() -> Proof:
    corrected, integrand = correction(m, k), exp(-t / k) - exp(-t)
    gap = (1 - exp(-h / k)) - (1 - exp(-h)) / k
    yield gap, Integral(integrand / k, (t, 0, h)), "m' - m/k as an integral, where 0 < m < 1 and 1 - m = exp(-h)."
    yield integrand, Integral(exp(-s), (s, t / k, t)), "Its integrand, at t = h also m - m', is an integral too."
    yield (t - t / k).subs(k, n + 1), t * n / (n + 1), "For k = n + 1 > 1 that goes over this length."
    yield positive(t * n / (n + 1) * exp(-s)), one, "Length and integrand are positive: m/k < m' < m inside."
    yield Subs(1 - corrected, m, 0), one, "At m = 0 also m' = 0: both bounds are met."
    yield Subs(corrected, m, 1), one, "At m = 1 also m' = 1: the upper bound is met, the lower, 1/k, is not."

    def term(power: int) -> Any:
        return Subs(Derivative(corrected, (m, power)), m, 0) / sp.factorial(power)

    yield term(1), 1 / k, "The series of m', first coefficient."
    yield term(2), (k - 1) / (2 * k**2), "The series of m', second coefficient."
    yield term(3), (k - 1) * (2 * k - 1) / (6 * k**3), "The series of m', third coefficient."

    textbook = Subs(Derivative(1 - ((1 - m) * (1 + p)) ** (1 / k), p), p, 0) / corrected
    noise = -((1 - m) ** (1 / k)) / (k * corrected)
    yield textbook, noise, "Textbook expression: relative error per relative error p of the rounded 1 - m."
    yield Limit(m * noise, m, 0, "+"), -one, "That is about -1/m for small m: every digit is lost below 1e-16."
    stable = Subs(Derivative(log(1 - exp(-s * (1 + p))), p), p, 0)
    yield stable, s / (exp(s) - 1), "-expm1(-s), s = -log1p(-m)/k: the same per relative error p of the logarithm."
    yield exp(s) - 1 - s, Integral(exp(u), (u, 0, t), (t, 0, s)), "Its denominator less its numerator, as an integral."
    yield positive(exp(u)), one, "That is positive: an error in the logarithm is multiplied by less than 1."


@_theorem(
    "Gradients",
    "In training mode the output is normalized by the batch's own statistics: neither it nor a derivative of it "
    "contains the running statistics, so a recomputation with other running statistics gives the same gradients.",
    r"y = \gamma\,\frac{x-\mu}{\sqrt{v+\varepsilon}}+\beta \ \text{in training mode}, \qquad "
    r"\frac{\partial y}{\partial R} = \frac{\partial y}{\partial V} = 0",
)
def _() -> Proof:
    w, mode, gain, shift, eps, *buffers = sp.symbols("w tau gamma beta epsilon R V R' V'", real=True)
    value, mean, var = (sp.Function(name)(w) for name in ("x", "mu", "v"))

    def normalized(by_mean: Any, by_var: Any) -> Any:
        return gain * (value - by_mean) / sqrt(by_var + eps) + shift

    r, big_v, *others = buffers
    used_mean, used_var = mode * mean + (1 - mode) * r, mode * var + (1 - mode) * big_v
    output, training = normalized(used_mean, used_var), normalized(mean, var)
    replay, deviation = ((mode, r, big_v), (1, *others)), sqrt(used_var + eps)
    slope = -(1 - mode) * gain / deviation
    yield Derivative(output, r), slope, "Slope in the running mean: 0 in training (tau = 1), not in evaluation (0)."
    slope *= (value - used_mean) / (2 * deviation**2)
    yield Derivative(output, big_v), slope, "So is the slope in the running variance."
    yield Subs(output, *replay), training, "A recomputation that finds other running statistics gives the same output."
    written = gain * (value.diff(w) - mean.diff(w)) / sqrt(var + eps)
    written -= gain * (value - mean) * var.diff(w) / (2 * sqrt(var + eps) ** 3)
    yield Subs(Derivative(output, w), *replay), written, "And the same derivative by any w that the batch depends on."


def theorems() -> tuple[Theorem, ...]:
    """Give the theorems in order, each with its statement and its steps; `Theorem.prove` checks one.

    Example:
        >>> [theorem.name for theorem in theorems()][:3]
        ['Double update', 'k passes', 'Correction']
    """
    return tuple(build() for build in _THEOREMS)
