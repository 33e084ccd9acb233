"""The theorems prove; every step that is made wrong fails; and the symbols agree with floats and with torch."""

import copy
import math
import random
import time
from dataclasses import FrozenInstanceError, replace
from itertools import permutations

import pytest
import sympy as sp
import torch
from sympy.core.function import AppliedUndef
from torch import nn
from torch.utils.checkpoint import checkpoint

from momentum_fix import corrected_momentum, effective_momentum, symbolic
from momentum_fix.symbolic import Induction, ProofError, Step, Theorem, equal, greater, k, m, n, theorems, x0
from momentum_fix.weights import batch_weights

THEOREMS = theorems()
STEPS = [(theorem, number) for theorem in THEOREMS for number in range(len(theorem.steps))]
NAMES = [f"{theorem.name}-{number + 1}" for theorem, number in STEPS]
CLAIMS = [(theorem, number) for theorem in THEOREMS for number in range(len(theorem.claims))]
CLAIM_NAMES = [f"{theorem.name}-{number + 1}" for theorem, number in CLAIMS]
INDUCTIONS = [claim for theorem in THEOREMS for claim in theorem.claims if isinstance(claim, Induction)]
EQUATIONS = [claim for theorem in THEOREMS for claim in theorem.claims if isinstance(claim, sp.Eq)]
EQUATIONS = [claim for claim in EQUATIONS if not claim.atoms(AppliedUndef)]  # those torch has a test for
STRANGER = sp.Symbol("z", positive=True)
every_theorem = pytest.mark.parametrize("theorem", THEOREMS, ids=lambda theorem: theorem.name)
every_step = pytest.mark.parametrize(("theorem", "number"), STEPS, ids=NAMES)
every_claim = pytest.mark.parametrize(("theorem", "number"), CLAIMS, ids=CLAIM_NAMES)


def refused(theorem, match=None):
    with pytest.raises(ProofError, match=match):
        theorem.prove()
    return True


def exchanged(items, number, *others):
    return (*items[:number], *others, *items[number + 1 :])


def wrong_versions(step):
    """The step with one side changed to something that is wrong, in every way that comes to mind."""
    for side in ("lhs", "rhs"):
        true = getattr(step, side)
        for wrong in (true + 1, true - 1, 2 * true, -true, true / 2, true**2 + 1, true + STRANGER, true + sp.exp(-k)):
            yield replace(step, **{side: wrong})
    for symbol in step.rhs.atoms(sp.Symbol) & step.rhs.free_symbols - {symbolic.x.label}:
        yield replace(step, rhs=step.rhs.subs(symbol, symbol + 1))
    yield replace(step, lhs=sp.Integer(0))
    yield replace(step, rhs=sp.Integer(0))
    yield replace(step, rhs=sp.nan)
    yield replace(step, rhs=sp.oo)


def wrong_claims(claim):
    """The claim changed to something that is false."""
    if isinstance(claim, Induction):
        forgets_it = claim.initial == x0 and not claim.closed.has(x0)  # a plain mean starts from anything
        for part in ("closed", "renewed") if forgets_it else ("closed", "renewed", "initial"):
            true = getattr(claim, part)
            yield from (replace(claim, **{part: wrong}) for wrong in (true + 1, 2 * true + 1, true + STRANGER))
    elif isinstance(claim, sp.StrictGreaterThan):
        yield greater(claim.rhs, claim.lhs)
        yield greater(claim.lhs, claim.rhs + 1)
        yield greater(claim.lhs, claim.lhs)
    else:
        yield from (equal(claim.lhs, wrong) for wrong in (claim.rhs + 1, 2 * claim.rhs, -claim.rhs, sp.sqrt(m)))
        yield from (equal(wrong, claim.rhs) for wrong in (claim.lhs + 1, 2 * claim.lhs))


@every_theorem
def test_every_theorem_proves(theorem):
    theorem.prove()


@every_claim
def test_a_false_claim_is_refused_with_the_steps_of_the_true_one(theorem, number):
    for wrong in wrong_claims(theorem.claims[number]):
        assert refused(replace(theorem, claims=exchanged(theorem.claims, number, wrong)))


@every_claim
def test_a_false_claim_is_refused_with_steps_made_for_it(theorem, number):
    for wrong in wrong_claims(theorem.claims[number]):
        for positive in (sp.Integer(1), sp.exp(-k)):
            goals = [(start, positive if end is None else end) for start, end in symbolic._goals(wrong)]
            steps = [Step(start, end, "it is so") for start, end in goals]
            assert refused(Theorem("False", "", (wrong,), tuple(step for step in steps if step.lhs != step.rhs)))


def test_the_wrong_root_is_no_corrected_momentum():
    correction = THEOREMS[2]
    root = correction.claims[0].subs(symbolic.correction(m, k), sp.sqrt(m))
    assert root != correction.claims[0]
    assert refused(replace(correction, claims=(root, correction.claims[1])), "no step leads on")
    assert refused(Theorem("Root", "", (root,), (Step(root.lhs, m, "it is so"),)), "does not hold")
    assert refused(replace(correction, statement="m' = sqrt(m)"), "make it a claim")


@pytest.mark.parametrize("other", THEOREMS, ids=lambda theorem: theorem.name)
@every_theorem
def test_the_steps_of_another_theorem_prove_nothing(theorem, other):
    if other != theorem:
        assert refused(replace(theorem, steps=other.steps), "is not proved: no step leads on")
        assert refused(replace(theorem, steps=theorem.steps + other.steps), "prove nothing that is claimed")


@every_step
def test_no_step_can_go_missing_or_come_twice(theorem, number):
    step = theorem.steps[number]
    assert refused(replace(theorem, steps=exchanged(theorem.steps, number)), "no step leads on")
    assert refused(replace(theorem, steps=exchanged(theorem.steps, number, step, step)))


@every_claim
def test_no_claim_can_go_missing(theorem, number):
    assert refused(replace(theorem, claims=exchanged(theorem.claims, number)))


def test_a_theorem_that_claims_nothing_is_refused():
    assert refused(Theorem("Empty", "", (), ()), "prove nothing that is claimed")
    assert refused(Theorem("Same", "", (equal(m, m),), ()), "says nothing")
    constant = Induction(x0, symbolic.old, count=n)
    assert refused(Theorem("Constant", "", (constant,), ()), "says nothing")


def test_an_induction_needs_a_true_base_and_a_true_step():
    """The sum of the first n numbers."""

    def proof(closed, initial=0):
        claim = Induction(closed, symbolic.old + n + 1, count=n, initial=sp.Integer(initial))
        goals = symbolic._goals(claim)
        return Theorem("Sum", "", (claim,), tuple(Step(start, end, "") for start, end in goals if start != end))

    proof(n * (n + 1) / 2).prove()
    assert refused(proof(n * (n + 1) / 2, initial=1), "^2 = 1 does not hold")  # the step alone is true
    assert refused(proof(n**2), "does not hold")  # the base alone is true
    base, step = symbolic._goals(proof(n**2).claims[0])
    assert base == (1, 1)
    assert step == (n**2 + n + 1, (n + 1) ** 2)


@pytest.mark.parametrize(
    ("claim", "positive"),
    [
        (greater(1, sp.exp(-symbolic.h)), sp.Integral(sp.exp(-symbolic.u), (symbolic.u, 0, symbolic.h))),
        (greater(n + 1, n), sp.Integer(1)),
    ],
)
def test_a_greater_claim_needs_something_that_is_seen_to_be_positive(claim, positive):
    start = claim.lhs - claim.rhs
    if start != positive:
        Theorem("True", "", (claim,), (Step(start, positive, ""),)).prove()
    backwards = sp.Integral(-sp.exp(-symbolic.u), (symbolic.u, symbolic.h, 0))
    negative = sp.Integral(-sp.exp(-symbolic.u), (symbolic.u, 0, symbolic.h))
    assert refused(Theorem("Length", "", (claim,), (Step(start, backwards, ""),)))
    assert refused(Theorem("Sign", "", (greater(claim.rhs, claim.lhs),), (Step(-start, negative, ""),)))
    assert not symbolic._is_reached(None, m)  # m may be 0
    assert not symbolic._is_reached(None, sp.Integral(symbolic.q, (symbolic.u, 0, symbolic.h)))
    assert symbolic._is_reached(None, sp.Integral(1, (symbolic.u, 0, symbolic.h)))
    assert not symbolic._is_reached(None, sp.Integral(1, (symbolic.u, symbolic.h, 0)))


@every_step
def test_every_step_fails_when_it_is_made_wrong(theorem, number):
    for wrong in wrong_versions(theorem.steps[number]):
        with pytest.raises(ProofError):
            wrong.prove()


@every_step
def test_a_theorem_with_one_wrong_step_fails_and_names_it(theorem, number):
    step = theorem.steps[number]
    wrong = replace(step, rhs=step.rhs + 1)
    with pytest.raises(ProofError) as caught:
        replace(theorem, steps=exchanged(theorem.steps, number, wrong)).prove()
    assert str(caught.value) == f"{wrong} does not hold ({step.reason})"


@every_step
def test_every_step_fails_with_the_right_side_of_another(theorem, number):
    step = theorem.steps[number]
    for other in theorem.steps:
        if other.rhs != step.rhs and not symbolic._is_zero(other.rhs - step.rhs):
            with pytest.raises(ProofError):
                replace(step, rhs=other.rhs).prove()


@every_step
def test_no_step_is_vacuous(theorem, number):
    step = theorem.steps[number]
    assert sp.simplify(step.rhs) != 0  # 2 * 0 would be as true as 0
    for same in (replace(step, rhs=step.lhs), replace(step, lhs=step.rhs)):
        with pytest.raises(ProofError, match="says nothing"):
            same.prove()


def test_all_proofs_together_take_a_few_seconds():
    symbolic._is_zero.cache_clear()
    start = time.process_time()
    for theorem in theorems():
        theorem.prove()
    assert time.process_time() - start < 20  # about 1.5 s on an idle core


def test_sides_may_be_plain_numbers():
    Step(sp.Sum(symbolic.j, (symbolic.j, 1, 3)), 6, "").prove()
    for lhs, rhs in ((sp.Sum(symbolic.j, (symbolic.j, 1, 3)), 7), (1, 2)):
        with pytest.raises(ProofError, match="does not hold"):
            Step(lhs, rhs, "").prove()
    with pytest.raises(ProofError, match="says nothing"):
        Step(1, sp.Integer(1), "").prove()
    assert issubclass(ProofError, ArithmeticError)


def test_a_sum_that_runs_further_is_not_taken_for_the_shorter_one():
    xs, j = symbolic.x, symbolic.j
    short, longer = (sp.Sum(xs[j], (j, 1, last)) for last in (n, n + 1))
    Step(longer, short + xs[n + 1], "").prove()
    for wrong in (short, short + xs[n], short + xs[1]):
        with pytest.raises(ProofError):
            Step(longer, wrong, "").prove()


@pytest.mark.parametrize("numbers_first", [True, False])
def test_a_sum_is_split_at_n_alone_and_only_upwards(monkeypatch, numbers_first):
    symbolic._is_zero.cache_clear()
    if not numbers_first:
        monkeypatch.setattr(symbolic, "_is_refuted", lambda difference: False)
    xs, j, i = symbolic.x, symbolic.j, sp.Symbol("i", integer=True)
    upto = [sp.Sum(xs[j], (j, 1, last)) for last in (n - 1, n, n + 2, n + k)]
    single, double = (sp.Sum(xs[i], (i, 1, n + 1), *outer) for outer in ((), ((j, 1, 2),)))
    assert symbolic._is_zero(upto[2] - upto[1] - xs[n + 1] - xs[n + 2])
    assert double.replace(sp.Sum, symbolic._split) == double
    for different in (upto[1] - upto[0], upto[2] - upto[1], upto[3] - upto[1], double - single):
        assert not symbolic._is_zero(different)


def test_theorems_are_frozen_data_in_the_order_of_the_argument():
    assert [theorem.name for theorem in THEOREMS] == [
        "Double update",
        "k passes",
        "Correction",
        "Whole trajectory",
        "Cumulative average",
        "Order",
        "Repair",
        "Size of the effect",
        "Small momentum",
        "Gradients",
        "Replay",
    ]
    for theorem in THEOREMS:
        assert theorem.statement.endswith(".")
        assert all(step.reason[-1] in ".,:" for step in theorem.steps)
        with pytest.raises(FrozenInstanceError):
            theorem.steps[0].rhs = 0
    assert theorems() == THEOREMS


@every_theorem
def test_theorems_show_themselves_briefly_and_their_claims_as_formulas(theorem):
    assert repr(theorem) == f"<Theorem {theorem.name!r}: {len(theorem.claims)} claims, {len(theorem.steps)} steps>"
    formulas = theorem._repr_latex_()
    assert formulas.startswith("$$")
    assert formulas.endswith("$$")
    assert all(sp.latex(claim) in formulas for claim in theorem.claims)
    assert formulas.count("{") == formulas.count("}")
    assert "R_{old}" not in formulas


def test_an_induction_is_shown_with_what_it_solves():
    passes, _, order = THEOREMS[1].claims[0], THEOREMS[5].claims, THEOREMS[7].claims[0]
    assert sp.latex(passes).startswith(r"R_{k} = R_{0} \alpha^{k}")
    assert sp.latex(passes).endswith(r"\quad\text{for}\quad R_{k + 1} = R_{k} \alpha + b \left(1 - \alpha\right)")
    assert sp.latex(order).endswith(r",\ R_0 = V")


def rational(rng):
    return sp.Rational(rng.randrange(1, 40), 40)


@pytest.mark.parametrize("claim", INDUCTIONS, ids=str)
def test_every_induction_is_what_updating_gives_in_exact_fractions(claim):
    rng = random.Random(1)
    for _ in range(3):
        names = (claim.closed + claim.renewed + claim.initial).free_symbols - {claim.count, symbolic.old}
        numbers = {s: rng.randrange(1, 5) if s.is_integer else rational(rng) for s in sorted(names, key=str)}
        numbers.pop(symbolic.x, None), numbers.pop(symbolic.x.label, None)
        numbers |= {symbolic.x[number]: rational(rng) for number in range(1, 7)}
        value = claim.initial.subs(numbers)
        for count in range(6):
            value = claim.renewed.subs(claim.count, count).subs(numbers).subs(symbolic.old, value)
            assert value.is_Rational
            assert claim.closed.subs(claim.count, count + 1).doit().subs(numbers) == value


@pytest.mark.parametrize("claim", EQUATIONS, ids=str)
def test_every_equation_holds_for_numbers_taken_at_random(claim):
    rng = random.Random(2)
    for _ in range(3):
        symbols = sorted((claim.lhs.doit() - claim.rhs).free_symbols, key=str)
        numbers = {s: rng.randrange(1, 5) if s.is_integer else rational(rng) for s in symbols}
        difference = (claim.lhs.doit() - claim.rhs).subs(numbers).doit()
        assert abs(sp.N(difference, 30)) < 1e-20 or difference.has(sp.Derivative)


@pytest.mark.parametrize("passes", [1, 2, 3, 7])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 1.0])
def test_the_symbols_give_the_numbers_of_the_formula(momentum, passes):
    correction = sp.lambdify((m, k), symbolic.correction(m, k))
    effective = sp.lambdify((m, k), symbolic.effective(m, k))
    assert correction(momentum, passes) == pytest.approx(corrected_momentum(momentum, passes), rel=1e-14)
    assert effective(momentum, passes) == pytest.approx(effective_momentum(momentum, passes), rel=1e-14)


def batch_norm(momentum, updates):
    """What a real layer's running mean is after updates with these batch means."""
    layer = nn.BatchNorm1d(1, momentum=momentum)
    for mean in updates:
        layer(torch.tensor([[mean - 1.0], [mean + 1.0]]))
    return layer.running_mean.item()


def float_loop(momentum, updates, value=0.0):
    for update in updates:
        value = (1 - momentum) * value + momentum * update
    return value


@pytest.mark.parametrize("passes", [1, 2, 3, 5])
def test_trajectory_symbols_floats_torch_and_weights_agree(passes):
    rng = random.Random(passes)
    means = [rng.gauss(3, 1) for _ in range(6)]
    closed = symbolic.running_value(symbolic.alpha, n).subs({n: 6, symbolic.alpha: 0.9, symbolic.x0: 0}).doit()
    by_symbols = float(closed.subs({symbolic.x[number]: mean for number, mean in enumerate(means, start=1)}))
    updates, used = [mean for mean in means for _ in range(passes)], corrected_momentum(0.1, passes)
    weights = batch_weights(range(6), used, passes)
    assert float_loop(used, updates) == pytest.approx(by_symbols, rel=1e-13)
    assert batch_norm(used, updates) == pytest.approx(by_symbols, rel=1e-13)
    assert sum(weights.batches[b] * means[b] for b in range(6)) == pytest.approx(by_symbols, rel=1e-13)
    if passes > 1:
        assert batch_norm(0.1, updates) != pytest.approx(by_symbols, rel=1e-3)


@pytest.mark.parametrize("passes", [1, 2, 5])
def test_a_cumulative_average_is_the_plain_mean_whatever_the_passes(passes):
    means = [1.0, 4.0, -2.0]
    mean = pytest.approx(1.0, rel=1e-13)
    assert batch_norm(None, [value for value in means for _ in range(passes)]) == mean
    weights = batch_weights("abc", None, passes)
    assert weights.initial == 0
    assert list(weights.batches.values()) == pytest.approx([1 / 3] * 3, rel=1e-13)


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_the_order_theorem_gives_the_weights_of_batches_forward_and_back(batches):
    used, there = corrected_momentum(0.1, 2), list(range(1, batches + 1))
    weights = batch_weights(there + there[::-1], used)
    weight = sp.lambdify((symbolic.q, n, symbolic.j), THEOREMS[5].claims[5].rhs)
    for batch in there:
        assert weights.batches[batch] == pytest.approx(weight(1 - used, batches, batch), rel=1e-12)
    means = [float(batch) for batch in there]
    value = sum(weights.batches[batch] * batch for batch in there)
    assert batch_norm(used, means + means[::-1]) == pytest.approx(value, rel=1e-12)


def test_pipelines_share_the_weights_less_unequally_than_siamese_inputs():
    used = corrected_momentum(0.1, 2)
    for order, right_by in (("ABBA", 0.1 * used), ("ABAB", (1 - used) * used**2)):
        weights = batch_weights(order, used).batches
        assert weights["A"] - 0.09 == pytest.approx(right_by, rel=1e-9)
        assert 0.1 - weights["B"] == pytest.approx(right_by, rel=1e-9)
    assert batch_weights("ABAB", used).batches == pytest.approx({"A": 0.0925, "B": 0.0975}, abs=5e-5)


@pytest.mark.parametrize("passes", [1, 2])
def test_only_consecutive_passes_give_the_right_weights(passes):
    entries = [batch for batch in range(3) for _ in range(passes)]
    used = corrected_momentum(0.3, passes)
    right = [0.3 * 0.7 ** (2 - batch) for batch in range(3)]
    exact = {
        order
        for order in set(permutations(entries))
        if list(map(batch_weights(order, used).batches.get, range(3))) == pytest.approx(right, rel=1e-9)
    }
    assert exact == {tuple(entries)}


@pytest.mark.parametrize("passes", [2, 3, 5])
def test_repair_brings_back_the_value_after_one_pass(passes):
    spoilt, right = batch_norm(0.1, [2.0] + [5.0] * passes), batch_norm(0.1, [2.0, 5.0])
    before = batch_norm(0.1, [2.0])
    assert spoilt != pytest.approx(batch_norm(0.1, [2.0, 5.0]))
    repaired = before + (spoilt - before) * 0.1 / effective_momentum(0.1, passes)
    assert repaired == pytest.approx(right, rel=1e-13)


@pytest.mark.parametrize(("passes", "ratio", "age"), [(1, 1, 9), (2, 1.99, 4.3), (3, 2.98, 2.7), (5, 4.89, 1.4)])
def test_the_stationary_noise_and_age_are_those_of_a_long_run(passes, ratio, age):
    decay = 0.9**passes
    weights = list(batch_weights(range(400), 0.1, passes).batches.values())[::-1]
    variance = sum(weight**2 for weight in weights)
    assert variance == pytest.approx(float(symbolic.stationary_variance(decay)), rel=1e-9)
    assert variance / float(symbolic.stationary_variance(0.9)) == pytest.approx(ratio, abs=0.005)
    assert sum(n * weight for n, weight in enumerate(weights)) == pytest.approx(symbolic.mean_age(decay), rel=1e-9)
    assert symbolic.mean_age(decay) == pytest.approx(age, abs=0.05)


@pytest.mark.parametrize("passes", [1, 2, 5])
def test_the_lag_behind_a_drift_is_drift_times_mean_age(passes):
    used = effective_momentum(0.1, passes)
    value = float_loop(used, [0.5 * number for number in range(2000)])
    assert 0.5 * 1999 - value == pytest.approx(0.5 * symbolic.mean_age(1 - used), rel=1e-9)


def test_the_bounds_and_the_series_of_small_momentum_hold_in_floats():
    for passes in (2, 3, 10):
        for momentum in (1e-3, 0.1, 0.5, 0.999):
            assert momentum / passes < corrected_momentum(momentum, passes) < momentum
        assert corrected_momentum(1.0, passes) == 1 > 1 / passes  # the lower bound is not met at 1
        first, second = (float(claim.rhs.subs(k, passes)) for claim in THEOREMS[8].claims[2:4])
        assert corrected_momentum(1e-3, passes) == pytest.approx(first * 1e-3 + second * 1e-6, abs=1e-9)


def test_rounding_costs_the_textbook_expression_what_the_theorem_says():
    noise = sp.lambdify((m, k), THEOREMS[8].claims[4].rhs, modules="mpmath")
    momentum = 1e-9
    rounding = ((1 - momentum) - (1 - sp.Rational(momentum))) / (1 - sp.Rational(momentum))
    textbook = 1 - math.sqrt(1 - momentum)
    error = (textbook - corrected_momentum(momentum, 2)) / corrected_momentum(momentum, 2)
    assert error == pytest.approx(float(noise(momentum, 2)) * float(rounding), abs=2**-53 / momentum)
    assert abs(error) > 1e-9
    stable = -math.expm1(math.log1p(-momentum) / 2)
    assert stable == pytest.approx(corrected_momentum(momentum, 2), rel=4 * 2**-53)
    assert 1 - math.sqrt(1 - 1e-17) == 0.0


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_do_not_depend_on_the_running_statistics(reentrant):
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    other = copy.deepcopy(plain)
    other[1].running_mean.fill_(7.0)
    other[1].running_var.fill_(0.1)
    batch = torch.randn(8, 3, requires_grad=True)
    plain(batch).square().sum().backward()
    checkpoint(other, batch, use_reentrant=reentrant).square().sum().backward()
    for mine, theirs in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    assert other[1].num_batches_tracked == 2
    assert not torch.equal(plain.eval()(batch), other.eval()(batch))


class Distance(nn.Module):
    """w times the distance of the batch to a running value that it has moved: an output that reads the state."""

    def __init__(self, momentum):
        super().__init__()
        self.weight, self.momentum = nn.Parameter(torch.tensor(0.7)), momentum
        self.register_buffer("state", torch.tensor(0.3))

    def forward(self, batch):
        self.state = self.state + self.momentum * (batch.detach() - self.state)
        return self.weight * (batch - self.state)


class SameState(Distance):
    """The same, started from the state of the forward pass each time."""

    def forward(self, batch):
        self.state = torch.tensor(0.3)
        return super().forward(batch)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", [Distance, SameState])
@pytest.mark.parametrize("momentum", [0.1, corrected_momentum(0.1, 2), 1 - 0.9 ** (2 / 3)])
def test_a_replay_has_the_gradient_that_the_theorem_says(kind, momentum, reentrant):
    layer, batch = kind(momentum), torch.tensor(2.0, requires_grad=True)
    output = checkpoint(layer, batch, use_reentrant=reentrant)
    (output.square() / 2).backward()
    numbers = {symbolic.w: 0.7, symbolic.b: 2.0, symbolic.x0: 0.3, symbolic.p: momentum, m: 0.1}
    right, left = (float(THEOREMS[10].claims[number].rhs.subs(numbers)) for number in (1, 3))
    found, right_output = layer.weight.grad.item(), 0.7 * 0.9 * (2.0 - 0.3)
    if kind is SameState:
        assert (found == pytest.approx(right)) == (momentum == 0.1)
    else:
        assert found == pytest.approx(left, rel=1e-13)
        assert found != pytest.approx(right) or output.item() != pytest.approx(right_output)
