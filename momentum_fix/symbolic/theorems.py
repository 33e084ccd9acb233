"""The theorems: each is a function, whose docstring states it and which yields its claims, each with its proof."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import sympy as sp
from sympy import Derivative, Limit, Subs, Sum, exp, sqrt

from momentum_fix.symbolic.letters import N, alpha, b, c, delta, h, j, k, m, n, old, p, q, s, t, tau, w, x, x0
from momentum_fix.symbolic.proof import Growth, Induction, Step, Theorem, equal, goals, greater
from momentum_fix.weights import batch_weights

# A claim, and for each of its goals the reason why an equation holds, or (what is seen to be positive, why it is that).
Proof = Iterator[tuple[Any, ...]]


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


def _double_update() -> Proof:
    """Two updates with one batch square the decay of the old value, and the batch weighs 2 - m times as much."""
    unfolded = alpha**2 * x0 + alpha * (1 - alpha) * b + (1 - alpha) * b
    claim = equal(update(update(x0, b, 1 - alpha), b, 1 - alpha), unfolded)
    yield claim, "The second update acts on the result of the first."
    yield equal(unfolded, after_passes(x0, b, alpha, 2)), "The two shares of the batch add up."
    yield equal(Subs(1 - alpha**2, alpha, 1 - m), m * (2 - m)), "What the batch weighs, by the momentum."


def _several_passes() -> Proof:
    """k equal updates with one batch act as one update whose decay is the k-th power."""
    claim = Induction(after_passes(x0, b, alpha, k), update(old, b, 1 - alpha), count=k)
    yield claim, "One pass is the update itself. Step: one more update after k."


def _correction() -> Proof:
    """With exactly one momentum in [0, 1] k passes amount to one update with m: the corrected momentum."""
    yield equal(Subs(effective(p, k), p, correction(m, k)), m), "k passes with it weigh the batch by m."
    only = equal(Subs(correction(m, k), m, effective(1 - delta, k)), 1 - delta)
    yield only, "And if k passes with any momentum 1 - delta amount to m, correcting m gives that momentum."


def _whole_trajectory() -> Proof:
    """With the corrected momentum the running value is that of the run without checkpointing.

    This is so after any number of batches, and whatever their statistics are.
    """
    passes = Subs(after_passes(old, b, alpha, k), alpha, 1 - correction(m, k))
    yield equal(passes, update(old, b, m)), "k passes with the corrected momentum are one update with m: as a map."
    value = Induction(running_value(q, n), update(old, x[n + 1], 1 - q), count=n)
    yield value, "So both runs have this value. Base: the first batch.", "Step: batch n + 1, whatever its statistic."


def _cumulative_average() -> Proof:
    """With momentum None, k equal passes per batch give the plain mean of the batches, as one pass does.

    There, update number t has momentum 1/t. Nothing has to be corrected.
    """
    passes, mean = (N * x0 + k * b) / (N + k), Sum(x[j], (j, 1, n)) / n
    claim = Induction(passes, update(old, b, 1 / (N + k + 1)), count=k)
    yield claim, "After N updates, some with batch b. Base: the first.", "Step: pass k + 1, which is update N + k + 1."
    claim = equal(Subs(passes, N, k * j), update(x0, b, 1 / (j + 1)))
    yield claim, "After j batches of k passes each, k passes act as one update does after j."
    claim = Induction(mean, update(old, x[n + 1], 1 / (n + 1)), count=n)
    yield claim, "That gives the mean. Base: the first batch replaces the initial value.", "Step: batch n + 1."


def _order() -> Proof:
    """Any order of updates leaves the old value its right weight.

    The batches weigh what they should if the passes of each follow one another. For 0 < m < 1, A B B A gives the older
    batch too much, as do batches forward and then in reverse; A B A B errs by less than half of that; no momentum in
    (0, 1) mends either. An update weighs less the farther it is from the end.
    """
    value = Induction(running_value(q, n), update(old, x[n + 1], 1 - q), count=n)
    yield value, "Whatever batch an update sees. Base: the first.", "Step: update n + 1 scales what was there by q."
    both = 1 - q**2  # the momentum of two passes: A should weigh both * (1 - both), and B both
    excess = {"ABBA": both * (1 - q), "ABAB": q * (1 - q) ** 2}
    weights = {order: batch_weights(order, 1 - q).batches for order in excess}
    for order, weight in weights.items():
        claim = equal(weight["A"], both * (1 - both) + excess[order])
        yield claim, f"{order}: what A should weigh, and so much more."
        yield equal(weight["B"], both - excess[order]), f"{order}: what B should weigh, and as much less."
    place, seen = (1 - q) * q ** (2 * n - c), (1 - q) * (q ** (2 * n - j) + q ** (j - 1))
    claim = equal(Subs(place, c, j) + Subs(place, c, 2 * n + 1 - j), seen)
    yield claim, "Forward and in reverse, batch j is seen by updates j and 2n + 1 - j of 2n."
    claim = equal(seen.subs(j, 1), both * q ** (2 * n - 2) + (1 - q) * (1 - q ** (2 * n - 2)))
    yield claim, "The oldest of several: what it should weigh, and so much more."
    claim = equal(seen.subs(j, n), both - both * (1 - q ** (n - 1)))
    yield claim, "The newest of several: what it should weigh, and so much less."
    in_a_row = Subs(alpha ** (k * (n - j)) * (1 - alpha**k), alpha, q ** (1 / k))
    yield equal(in_a_row, (1 - q) * q ** (n - j)), "Passes in a row: the right weight of batch j of n."
    yield greater(q**j, q ** (j + n)), (q**j * (1 - q**n), "Farther from the end by n updates.")
    claim = greater(excess["ABBA"] / 2, excess["ABAB"])
    yield claim, ((1 - q) ** 3 / 2, "A B A B against half of A B B A.")
    right = exp(-h)  # 1 - m, while 1 - q is any momentum
    for order, factor, gap in (
        ("ABBA", 1 - right - q**2, (right + q**2) * (1 - q) * (1 - q**2)),
        ("ABAB", 1 - right - q, (1 - right) * q**2 * (1 - q)),
    ):
        errors = weights[order]["A"] - right * (1 - right), weights[order]["B"] - (1 - right)
        yield _not_both(*errors, factor, gap, f"{order}: what A and B weigh too much is not 0 for both, whatever q.")


def _not_both(error: Any, other: Any, factor: Any, gap: Any, reason: str) -> tuple[Any, ...]:
    """Give the claim that two errors are never 0 at once, where error + factor * other is a gap that never closes."""
    squares = (gap**2 + (other - factor * error) ** 2) / (1 + factor**2)
    return greater(error**2 + other**2, 0), (squares, reason)


def _size_of_the_effect() -> Proof:
    """Uncorrected passes make the running value noisier, and fresher.

    For 0 < m < 1 and independent batch statistics, k > 1 uncorrected passes multiply the variance of the running value
    in the long run by less than k, and divide its mean age and its lag behind a drift by more. Both factors tend to k
    as m tends to 0. They divide the half-life by k.
    """
    start, decay, stays = sp.Symbol("V", nonnegative=True), exp(-h), stationary_variance
    variance = alpha ** (2 * n) * start + (1 - alpha ** (2 * n)) * stays(alpha)
    claim = Induction(variance, alpha**2 * old + (1 - alpha) ** 2, count=n, initial=start)
    yield claim, "Variances of independent parts add up. Base: one batch of variance 1.", "Step: another one."
    claim = equal(Limit(variance.subs(alpha, decay), n, sp.oo), stays(decay))
    yield claim, "In the long run nothing of the first variance is left."
    yield equal(Subs(stays(alpha), alpha, 1 - m), m / (2 - m)), "The same, by the momentum."
    yield equal(Subs(stays(alpha), alpha, q**k) / stays(q), noise_ratio(q, k)), "The exact ratio."
    yield equal(Limit(noise_ratio(1 - m, k), m, 0, "+"), k), "That ratio for small m."
    later, last = q ** (n + 1), q ** (n + 2)
    below = Growth(n + 1, noise_ratio(q, n + 1), count=n)
    gained = (1 - later) * (1 - last) / ((1 + later) * (1 + last))
    yield below, ((1 - q) ** 2 / (1 + q**2), "k is n + 1. Base: two passes."), (gained, "Step: another pass.")

    age = q * (1 - q**n) / (1 - q) - n * q ** (n + 1)
    claim = Induction(age, old + (n + 1) * (1 - q) * q ** (n + 1), count=n, initial=0)
    yield claim, "The mean age sums ages, each with its weight. Base: age 1.", "Step: age n + 1."
    yield equal(Limit(age.subs(q, decay), n, sp.oo), mean_age(decay)), "Over all ages."
    yield equal(Limit(mean_age((1 - m) ** k) / mean_age(1 - m), m, 0, "+"), 1 / k), "k uncorrected passes, small m."
    above = Growth(mean_age(q) / mean_age(later), n + 1, count=n)
    yield above, ((1 - q) / q, "k is n + 1. Base: two passes."), (1 / later - 1, "Step: another pass.")

    drifting = c * n - c * mean_age(q) + q**n * (x0 + c * mean_age(q))
    claim = Induction(drifting, update(old, c * (n + 1), 1 - q), count=n)
    yield claim, "Statistics that drift by c per batch. Base: the first batch.", "Step: batch n + 1."
    claim = equal(Limit(c * n - drifting.subs(q, decay), n, sp.oo), c * mean_age(decay))
    yield claim, "The lag that stays is drift times mean age."
    claim = equal(Subs(q ** (k * t), t, s / k), q**s)
    yield claim, "k passes keep as much after s/k batches as one pass after s: half of it, for example."


def _small_momentum() -> Proof:
    """For k > 1 and 0 < m < 1 the corrected momentum lies between m/k and m.

    As m tends to 0, its ratio to m tends to 1/k. The textbook expression multiplies a relative rounding error of 1 - m
    by a factor which, times m, tends to -1. expm1 multiplies one of its argument by a factor that tends to 1 as the
    argument tends to 0.
    """
    claim = Growth((n + 1) * (1 - q), 1 - q ** (n + 1), count=n)  # k is n + 1, the corrected momentum 1 - q
    growing = (1 - q) * (1 - q ** (n + 1)), "Step: another pass."
    yield claim, ((1 - q) ** 2, "k times the corrected momentum against m. Base: two passes."), growing
    yield greater(1 - q ** (n + 1), 1 - q), (q * (1 - q**n), "m against the corrected momentum.")
    yield equal(Limit(correction(m, k) / m, m, 0, "+"), 1 / k), "The first term of the series."
    yield equal(Limit((correction(m, k) - m / k) / m**2, m, 0, "+"), (k - 1) / (2 * k**2)), "The second."

    textbook = Subs(Derivative(1 - (q * (1 + p)) ** (1 / k), p), p, 0) / correction(1 - q, k)
    growth = -(q ** (1 / k)) / (k * correction(1 - q, k))
    yield equal(textbook, growth), "Textbook expression: relative error per relative error p of q, the rounded 1 - m."
    yield equal(Limit(m * growth.subs(q, 1 - m), m, 0, "+"), -1), "For small m: every digit is lost below 1e-16."
    stable = Subs(Derivative(1 - exp(-s * (1 + p)), p), p, 0) / (1 - exp(-s))
    yield equal(stable, s / (exp(s) - 1)), "-expm1(-s) with s from log1p: the same per relative error p of s."
    yield equal(Limit(s / (exp(s) - 1), s, 0, "+"), 1), "For small s: no digit is lost."


def _gradients() -> Proof:
    """In training mode the output is normalized by the batch's own statistics: it does not contain the running ones.

    Nor does a derivative of it, so a recomputation with other running statistics gives the same gradients.
    """
    a, mu, gain, shift, r, r_found = sp.symbols("a mu gamma beta R R'", real=True)
    var, v, v_found = sp.symbols("v V V'", nonnegative=True)
    eps = sp.Symbol("epsilon", positive=True)

    def normalized(by_mean: Any, by_var: Any) -> Any:
        return gain * (a - by_mean) / sqrt(by_var + eps) + shift

    used_mean, used_var = tau * mu + (1 - tau) * r, tau * var + (1 - tau) * v
    output, slope = normalized(used_mean, used_var), -(1 - tau) * gain / sqrt(used_var + eps)
    yield equal(Derivative(output, r), slope), "By the running mean: 0 in training (tau is 1), not in evaluation (0)."
    slope *= (a - used_mean) / (2 * (used_var + eps))
    yield equal(Derivative(output, v), slope), "By the running variance: the same."
    claim = equal(Subs(output, (tau, r, v), (1, r_found, v_found)), normalized(mu, var))
    yield claim, "A recomputation that finds other statistics: the same function of what the batch and weights give."


def _recomputation() -> Proof:
    """Where the output reads the state, a recomputation is right if it starts from the state before the forward pass.

    In the smallest example, y is w times the distance of b to a running value that b has moved, and the loss is half of
    y squared. A recomputation from the state after the forward pass has another gradient, and for 0 < m < 1 no momentum
    p in [0, 1] makes both output and gradient right, unless w or the first distance is 0.
    """
    state, y = sp.symbols("S y", real=True)
    output = w * (b - update(state, b, p))  # S is the state before; y is the forward's output, which the loss was given
    forward, right = w * (1 - p) * (b - x0), w * (1 - m) ** 2 * (b - x0) ** 2
    again = y * Derivative(output, w)
    yield equal(Subs(output, state, x0), forward), "The forward pass, with momentum p."
    yield equal(Subs(Derivative(output**2 / 2, w), (state, p), (x0, m)), right), "The right gradient, with m."
    restored = Subs(again, (y, state, p), (forward.subs(p, m), x0, m))
    yield equal(restored, right), "A recomputation from the state that the forward pass started from."
    left = w * (1 - p) ** 3 * (b - x0) ** 2
    claim = equal(Subs(again, (y, state), (forward, update(x0, b, p))), left)
    yield claim, "From the state that it left: for p = m one decay too many."
    errors = q**2 - (1 - p) ** 3, (1 - p) - q  # with q for 1 - m, and without w and the distances
    factor = (1 - p) ** 2 + (1 - p) * q + q**2
    yield _not_both(*errors, factor, q**2 * (1 - q), "Gradient and output minus the right ones: not both are 0.")


def _theorem(proof: Callable[[], Proof]) -> Theorem:
    """Give the theorem that a function states and proves."""
    claims, steps = [], []
    for claim, *reasons in proof():
        claims.append(claim)
        for (start, end), reason in zip(goals(claim), reasons, strict=True):
            steps.append(Step(start, *(reason if end is None else (end, reason))))
    name, statement = proof.__name__.replace("_", " ").strip(), " ".join(str(proof.__doc__).split())
    return Theorem(name.capitalize(), statement, tuple(claims), tuple(steps))


@cache
def theorems() -> tuple[Theorem, ...]:
    """Give the theorems in order; `Theorem.prove` checks one, and a notebook shows its claims as formulas.

    Example:
        >>> [theorem.name for theorem in theorems()][:3]
        ['Double update', 'Several passes', 'Correction']
        >>> theorems()[2]
        <Theorem 'Correction': 2 claims, 2 steps>
    """
    first = _double_update, _several_passes, _correction, _whole_trajectory, _cumulative_average
    return tuple(map(_theorem, (*first, _order, _size_of_the_effect, _small_momentum, _gradients, _recomputation)))
