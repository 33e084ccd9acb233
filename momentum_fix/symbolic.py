"""Why the formula holds and where it stops: theorems whose every step SymPy checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy as sp
from sympy import Derivative, Integral, Limit, Product, Subs, Sum, exp, log, sqrt

from momentum_fix.weights import batch_weights

# m and alpha reach both ends of [0, 1] (alpha is 1 - m, q is 1 - m of a single pass); h = -log(1 - m) covers the
# inside of it, and makes every power of the decay an exponential, whose sign SymPy knows.
m, p, alpha, q, delta = sp.symbols("m p alpha q delta", nonnegative=True)
h, s, t, u = sp.symbols("h s t u", positive=True)
k, n = sp.symbols("k n", integer=True, positive=True)
i, j, N = sp.symbols("i j N", integer=True, nonnegative=True)
x0, b, c = sp.symbols("x_0 b c", real=True)
one = sp.Integer(1)
x = sp.IndexedBase("x")  # x[1], x[2], ...: the statistics of the batches, whatever they are


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
    if difference.has(Sum):  # to one common range first, where sums cancel unevaluated, term by term
        difference = sp.simplify(difference.replace(Sum, _split_last))
    return bool(sp.simplify(sp.powsimp(sp.expand(difference.doit()))) == 0)


def _split_last(term: Any, limits: Any) -> Any:
    """Write a sum up to n + 1 as the sum up to n and its last term, as every induction over n needs it."""
    index, first, last = limits
    if last.is_Add and last - 1 == n:
        return Sum(term, (index, first, n)) + term.subs(index, n + 1)
    return Sum(term, limits)


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


def double_update() -> Theorem:
    old, two = update(x0, b, 1 - alpha), (1 - alpha**2)
    return Theorem(
        "Double update",
        "Two updates with momentum m for one batch leave (1-m)^2 of the old value and 1-(1-m)^2 = m(2-m) of the batch.",
        r"x_2 = \alpha^2 x_0 + (1-\alpha^2)\,b, \qquad \alpha = 1-m",
        (
            Step(
                update(old, b, 1 - alpha),
                alpha**2 * x0 + alpha * (1 - alpha) * b + (1 - alpha) * b,
                "The second update acts on the result of the first, with the same batch.",
            ),
            Step(
                alpha**2 * x0 + alpha * (1 - alpha) * b + (1 - alpha) * b,
                alpha**2 * x0 + two * b,
                "The two shares of the batch add up to 1 - alpha^2.",
            ),
            Step(Subs(two, alpha, 1 - m), m * (2 - m), "In terms of m that share is nearly twice as large as m."),
        ),
    )


def k_passes() -> Theorem:
    run = sp.Function("R")
    solution = sp.rsolve(run(j + 1) - update(run(j), b, 1 - alpha), run(j), {run(0): x0})
    closed = after_passes(x0, b, alpha, k)
    return Theorem(
        "k passes",
        "k equal updates for one batch leave (1-m)^k of the old value and 1-(1-m)^k of the batch.",
        r"x_k = \alpha^k x_0 + (1-\alpha^k)\,b, \qquad \alpha = 1-m",
        (
            Step(
                update(x0, b, 1 - alpha) - b,
                alpha * (x0 - b),
                "One update shrinks the distance to the batch by the factor alpha.",
            ),
            Step(solution.subs(j, k), closed, "Solving this recurrence (by SymPy) gives the closed form."),
            Step(Subs(after_passes(x0, b, alpha, j), j, 0), x0, "Induction base: no pass leaves the old value."),
            Step(
                update(closed, b, 1 - alpha),
                after_passes(x0, b, alpha, k + 1),
                "Induction step: one more update turns the closed form for k into that for k + 1.",
            ),
        ),
    )


def the_correction() -> Theorem:
    return Theorem(
        "Correction",
        "m' = 1-(1-m)^(1/k) is the only momentum in [0, 1] with which k passes equal one update with m.",
        r"1-(1-m')^k = m \iff m' = 1-(1-m)^{1/k}",
        (
            Step(
                Subs(effective(p, k), p, correction(m, k)),
                m,
                "k passes with the corrected momentum weigh the batch by m, as one update does.",
            ),
            Step(Subs((1 - p) ** k, p, 0), one, "At momentum 0, k passes keep all of the old value."),
            Step(Subs(effective(p, k), p, 1), one, "At momentum 1, k passes take all of the batch."),
            Step(
                Derivative(effective(p, k), p),
                k * (1 - p) ** (k - 1),
                "How fast the weight of the batch grows with the momentum p.",
            ),
            Step(
                positive(k * u ** (k - 1)),
                one,
                "For p < 1, with u = 1 - p > 0, that slope is positive: the weight takes each value of [0, 1] once.",
            ),
            Step(
                Subs(correction(m, k), m, effective(1 - delta, k)),
                1 - delta,
                "And directly: if k passes with p = 1 - delta weigh the batch by m, then m' = p.",
            ),
        ),
    )


def trajectory() -> Theorem:
    checkpointed = running_value(q**k, n)
    return Theorem(
        "Whole trajectory",
        "With m', after any number of batches with any statistics, the running value is that of the run without "
        "checkpointing.",
        r"x_n = \alpha^n x_0 + (1-\alpha)\sum_{j=1}^{n}\alpha^{n-j}x_j \quad\text{for both runs}, \qquad \alpha = 1-m",
        (
            Step(running_value(alpha, 0), x0, "Without checkpointing, induction base: no batch, the initial value."),
            Step(
                update(running_value(alpha, n), x[n + 1], 1 - alpha),
                running_value(alpha, n + 1),
                "Without checkpointing, induction step: one update with batch n + 1.",
            ),
            Step(running_value(q**k, 0), x0, "With k passes of decay q per batch, induction base."),
            Step(
                after_passes(checkpointed, x[n + 1], q, k),
                running_value(q**k, n + 1),
                "With k passes of decay q per batch, induction step: k passes with batch n + 1 (theorem 2).",
            ),
            Step(Subs((1 - p) ** k, p, correction(m, k)), 1 - m, "With m', the k passes keep 1 - m (theorem 3)."),
            Step(
                Subs(checkpointed, q, alpha ** (1 / k)),
                running_value(alpha, n),
                "So with q = 1 - m' the closed form of the one run is that of the other.",
            ),
        ),
    )


def cumulative_average() -> Theorem:
    kept, mean = N / (N + j), Sum(x[j], (j, 1, n)) / n
    return Theorem(
        "Cumulative average",
        "With momentum=None (update t has momentum 1/t), k equal passes per batch give the plain mean of the batches, "
        "as one pass does: nothing has to be corrected.",
        r"\prod_{j=1}^{k}\Bigl(1-\frac{1}{kn+j}\Bigr) = 1-\frac{1}{n+1}, \qquad x_n = \frac1n\sum_{j=1}^{n}x_j",
        (
            Step(Subs(update(x0, b, 1 / t), t, 1), b, "The first update of all replaces the initial value."),
            Step(Subs(kept, j, 0), one, "After N > 0 updates: no further pass keeps everything (induction base)."),
            Step(
                (1 - 1 / (N + j + 1)) * kept,
                kept.subs(j, j + 1),
                "Induction step: pass j + 1 on the same batch turns the kept share N/(N + j) into N/(N + j + 1).",
            ),
            Step(
                Subs(kept, (N, j), (k * n, k)),
                1 - 1 / (n + 1),
                "After n batches of k passes, k more keep what update n + 1 of a run without checkpointing keeps.",
            ),
            Step(
                Product(1 - 1 / (k * n + j), (j, 1, k)),
                1 - 1 / (n + 1),
                "The same by SymPy's product: it telescopes.",
            ),
            Step(Sum(x[j], (j, 1, 1)), x[1], "So the running value is the mean of the batches: base."),
            Step(
                update(mean, x[n + 1], 1 / (n + 1)),
                Sum(x[j], (j, 1, n + 1)) / (n + 1),
                "So the running value is the mean of the batches: step.",
            ),
        ),
    )


def order() -> Theorem:
    def total(updates: Any) -> Any:
        return q**updates + (1 - q) * Sum(q ** (updates - j), (j, 1, updates))

    weights = batch_weights("ABBA", 1 - q).batches
    there_and_back = (1 - q) * (q ** (2 * n - j) + q ** (j - 1))
    right = (1 - q**2) * q ** (2 * (n - j))
    inner = exp(-h * j) - exp(-h * (j + n))
    return Theorem(
        "Order",
        "In any order of updates the old value keeps q^N after N of them and the batches share 1-q^N. The shares of "
        "the single batches are right only if the k passes of each are consecutive: A B B A gives A too much and B too "
        "little by m m'.",
        r"w_A - m(1-m) = m - w_B = m\,m' \ \text{for A B B A}; \qquad "
        r"w_j = m'\,(q^{2n-j} + q^{j-1}) \ \text{for n batches and back}, \quad q = 1-m'",
        (
            Step(total(0), one, "The weights of the old value and of all updates sum to 1, base: no update."),
            Step(
                q * total(n) + (1 - q),
                total(n + 1),
                "Step: one more update scales all weights by q and adds its own, 1 - q, whichever batch it saw.",
            ),
            Step(
                weights["A"] - (1 - q**2) * q**2,
                (1 - q**2) * (1 - q),
                "A B B A: the excess of A over the right weight m(1-m), where m = 1 - q^2.",
            ),
            Step(
                weights["B"] - (1 - q**2),
                -(1 - q**2) * (1 - q),
                "A B B A: B, the newer batch, lacks just as much of the right weight m.",
            ),
            Step(
                there_and_back - right,
                (1 - q) * (q ** (2 * n - j) - q ** (2 * n - 2 * j) + q ** (j - 1) - q ** (2 * n - 2 * j + 1)),
                "n batches forward and then in reverse: the exact difference for batch j.",
            ),
            Step(
                Subs(there_and_back - right, j, 1),
                (1 - q) * (1 - q ** (2 * n - 2)),
                "The oldest batch, j = 1, weighs too much (exactly right only for n = 1).",
            ),
            Step(
                Subs(there_and_back - right, j, n),
                -(1 - q**2) * (1 - q ** (n - 1)),
                "The newest batch, j = n, weighs too little (exactly right only for n = 1).",
            ),
            Step(
                q ** (k * (n - j)) * (1 - q**k),
                q ** (k * (n - j)) - q ** (k * (n + 1 - j)),
                "Consecutive passes: batch j has what was left before its k passes less what is left after them.",
            ),
            Step(
                Subs(q ** (k * (n - j)) * (1 - q**k), q, alpha ** (1 / k)),
                (1 - alpha) * alpha ** (n - j),
                "With q = 1 - m' that is the right weight: for consecutive passes the difference vanishes.",
            ),
            Step(
                inner,
                Integral(h * exp(-h * u), (u, j, j + n)),
                "Only for them: an update of the last batch that lies n > 0 places before its place j from the end "
                "(0 < q = exp(-h) < 1) loses this share.",
            ),
            Step(
                positive(h * exp(-h * u)),
                one,
                "The loss is positive and no update can gain: the last batch is right only if its k passes are the "
                "last k updates; leave them out, and the same holds for the batch before.",
            ),
        ),
    )


def repair() -> Theorem:
    spoilt = after_passes(x0, b, 1 - m, k)
    return Theorem(
        "Repair",
        "From the running value x_0 before and x_1 after k equal passes, the value after one pass is "
        "x_0 + (x_1-x_0) m/(1-(1-m)^k), for m > 0.",
        r"x_0 + (x_1-x_0)\,\frac{m}{1-(1-m)^k} = (1-m)\,x_0 + m\,b",
        (
            Step(spoilt - x0, effective(m, k) * (b - x0), "k passes move the value by 1-(1-m)^k of its distance to b."),
            Step(
                x0 + (spoilt - x0) * m / effective(m, k),
                update(x0, b, m),
                "Scaling that move by m/(1-(1-m)^k) leaves the move of one pass.",
            ),
            Step(
                Limit(m / effective(m, k), m, 0, "+"),
                1 / k,
                "For small m the factor tends to 1/k; at m = 0 nothing has moved and nothing is to be repaired.",
            ),
        ),
    )


def size_of_the_effect() -> Theorem:
    variance, age = stationary_variance(alpha), mean_age(alpha)
    ratio = (1 + alpha) * (1 - alpha**k) / ((1 - alpha) * (1 + alpha**k))
    age_up_to_n = alpha * (1 - alpha**n) / (1 - alpha) - n * alpha ** (n + 1)
    start = sp.Symbol("V", real=True)
    behind = c * n - c * age
    return Theorem(
        "Size of the effect",
        "For independent batch statistics the running value has m/(2-m) of a batch's variance in the long run; k "
        "uncorrected passes multiply it by (2-m)(1-(1-m)^k) / (m(1+(1-m)^k)), which is k for small m. They also divide "
        "the mean age (1-m)/m and the lag behind a drift by k for small m, and the half-life by k for every m.",
        r"\frac{V_\infty}{V_b} = \frac{m}{2-m}, \qquad \lim_{m\to0}\frac{V_\infty^{(k)}}{V_\infty} = k, \qquad "
        r"\bar a = \frac{1-m}{m}, \qquad \text{lag} = c\,\bar a",
        (
            Step(Subs(variance, alpha, 1 - m), m / (2 - m), "The stationary variance, in terms of m."),
            Step(
                alpha**2 * variance + (1 - alpha) ** 2,
                variance,
                "It is stationary: independent parts add their variances, the old with alpha^2, the batch with m^2.",
            ),
            Step(
                alpha**2 * start + (1 - alpha) ** 2 - variance,
                alpha**2 * (start - variance),
                "It is reached: any other variance V comes nearer by alpha^2 at every batch.",
            ),
            Step(
                Subs(variance, alpha, alpha**k) / variance,
                ratio,
                "k uncorrected passes replace alpha by alpha^k: the exact ratio of the variances.",
            ),
            Step(Limit(ratio.subs(alpha, 1 - m), m, 0, "+"), k, "For small m that ratio is k."),
            Step(
                Subs(age_up_to_n, n, 1),
                (1 - alpha) * alpha,
                "Mean age, the sum of j m (1-m)^j over the ages j up to n: induction base n = 1.",
            ),
            Step(
                age_up_to_n + (1 - alpha) * (n + 1) * alpha ** (n + 1),
                age_up_to_n.subs(n, n + 1),
                "Mean age: induction step, the term of age n + 1.",
            ),
            Step(
                Limit(age_up_to_n.subs(alpha, exp(-h)), n, sp.oo),
                mean_age(exp(-h)),
                "Mean age over all ages, where 1 - m = exp(-h): (1-m)/m batches.",
            ),
            Step(
                Limit(mean_age((1 - m) ** k) / mean_age(1 - m), m, 0, "+"),
                1 / k,
                "k uncorrected passes divide the mean age, and the lag below, by k for small m.",
            ),
            Step(
                Subs(exp(-h * t), t, log(2) / h),
                sp.Rational(1, 2),
                "Half-life: the weight halves in log 2 / -log(1-m) batches.",
            ),
            Step(
                Subs(exp(-h * k * t), t, log(2) / (h * k)),
                sp.Rational(1, 2),
                "Under k uncorrected passes the half-life is exactly k times shorter.",
            ),
            Step(
                update(behind, c * (n + 1), 1 - alpha),
                behind.subs(n, n + 1),
                "Statistics that drift by c per batch: a running value that lags by c (1-m)/m keeps that lag.",
            ),
            Step(
                update(start, c * (n + 1), 1 - alpha) - behind.subs(n, n + 1),
                alpha * (start - behind),
                "And every other value comes nearer to it by the factor 1 - m at every batch.",
            ),
        ),
    )


def small_momentum() -> Theorem:
    corrected = correction(m, k)
    noise = -((1 - m) ** (1 / k)) / (k * corrected)
    return Theorem(
        "Small momentum",
        "m/k <= m' <= m: for k > 1 the lower bound is met at m = 0 alone, the upper at m = 0 and m = 1. "
        "m' = m/k + (k-1)m^2/(2k^2) + ... Rounding 1-m costs the textbook expression a relative error 1/m times as "
        "large; with log1p and expm1 no rounding error grows.",
        r"\frac mk \le m' \le m, \qquad m' = \frac mk + \frac{k-1}{2k^2}m^2 + \frac{(k-1)(2k-1)}{6k^3}m^3 + \dots",
        (
            Step(
                (1 - exp(-h / k)) - (1 - exp(-h)) / k,
                Integral((exp(-t / k) - exp(-t)) / k, (t, 0, h)),
                "m' - m/k as an integral, for 0 < m < 1 and 1 - m = exp(-h).",
            ),
            Step(
                exp(-t / k) - exp(-t),
                Integral(exp(-s), (s, t / k, t)),
                "Its integrand, and at t = h also m - m', is the integral of exp(-s) from t/k to t.",
            ),
            Step((t - t / k).subs(k, n + 1), t * n / (n + 1), "For k = n + 1 > 1 that interval has this length."),
            Step(positive(t * n / (n + 1) * exp(-s)), one, "Length and integrand are positive: m/k < m' < m inside."),
            Step(Subs(1 - corrected, m, 0), one, "At m = 0 also m' = 0: both bounds are met."),
            Step(Subs(corrected, m, 1), one, "At m = 1 also m' = 1: the upper bound is met, the lower, 1/k, is not."),
            Step(Subs(Derivative(corrected, m), m, 0), 1 / k, "The series of m', first coefficient."),
            Step(
                Subs(Derivative(corrected, (m, 2)), m, 0) / 2,
                (k - 1) / (2 * k**2),
                "The series of m', second coefficient.",
            ),
            Step(
                Subs(Derivative(corrected, (m, 3)), m, 0) / 6,
                (k - 1) * (2 * k - 1) / (6 * k**3),
                "The series of m', third coefficient.",
            ),
            Step(
                Subs(Derivative(1 - ((1 - m) * (1 + p)) ** (1 / k), p), p, 0) / corrected,
                noise,
                "Textbook expression: the relative error of the result, per relative error p of the rounded 1 - m.",
            ),
            Step(Limit(m * noise, m, 0, "+"), -one, "That is about -1/m for small m: every digit is lost below 1e-16."),
            Step(
                Subs(Derivative(log(1 - exp(-s * (1 + p))), p), p, 0),
                s / (exp(s) - 1),
                "expm1(log1p(-m)/k) with s = -log(1-m)/k: the same per relative error p of the rounded logarithm.",
            ),
            Step(
                exp(s) - 1 - s,
                Integral(exp(u), (u, 0, t), (t, 0, s)),
                "Its denominator exceeds its numerator by the integral of an integral of exp(u).",
            ),
            Step(positive(exp(u)), one, "Which is positive: that factor lies between 0 and 1 for every m."),
        ),
    )


def gradients() -> Theorem:
    w, mode, gain, shift, eps, old_mean, old_var, new_mean, new_var = sp.symbols(
        "w tau gamma beta epsilon R V R' V'", real=True
    )
    value, mean, var = (sp.Function(name)(w) for name in ("x", "mu", "sigma2"))
    used_mean = mode * mean + (1 - mode) * old_mean
    used_var = mode * var + (1 - mode) * old_var
    output = gain * (value - used_mean) / sqrt(used_var + eps) + shift
    training = gain * (value - mean) / sqrt(var + eps) + shift
    replay = ((mode, old_mean, old_var), (1, new_mean, new_var))
    return Theorem(
        "Gradients",
        "In training mode the output is normalized by the batch's own statistics: neither it nor a derivative of it "
        "contains the running statistics, so a recomputation with other running statistics gives the same gradients.",
        r"y = \gamma\,\frac{x-\mu}{\sqrt{\sigma^2+\varepsilon}}+\beta \ \text{in training mode}, \qquad "
        r"\frac{\partial y}{\partial R} = \frac{\partial y}{\partial V} = 0",
        (
            Step(
                Derivative(output, old_mean),
                -(1 - mode) * gain / sqrt(used_var + eps),
                "Mode tau = 1 is training, 0 evaluation: the slope in the running mean R has the factor 1 - tau.",
            ),
            Step(
                Derivative(output, old_var),
                -(1 - mode) * gain * (value - used_mean) / (2 * (used_var + eps) ** sp.Rational(3, 2)),
                "So has the slope in the running variance V: in training both vanish, in evaluation they do not.",
            ),
            Step(
                Subs(output, *replay),
                training,
                "A recomputation that finds other running statistics R', V' gives the output of the forward pass.",
            ),
            Step(
                Subs(Derivative(output, w), *replay),
                Derivative(training, w),
                "And the same derivative with respect to anything, w, that the input and its statistics depend on.",
            ),
            Step(
                Derivative(training, w),
                gain * (value.diff(w) - mean.diff(w)) / sqrt(var + eps)
                - gain * (value - mean) * var.diff(w) / (2 * (var + eps) ** sp.Rational(3, 2)),
                "Written out: batch mean and batch variance alone appear in it.",
            ),
        ),
    )


def theorems() -> tuple[Theorem, ...]:
    """Give the theorems in order, each with its statement and its steps; `Theorem.prove` checks one.

    Example:
        >>> [theorem.name for theorem in theorems()][:3]
        ['Double update', 'k passes', 'Correction']
        >>> for theorem in theorems():
        ...     theorem.prove()
    """
    return (
        double_update(),
        k_passes(),
        the_correction(),
        trajectory(),
        cumulative_average(),
        order(),
        repair(),
        size_of_the_effect(),
        small_momentum(),
        gradients(),
    )
