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
from torch import nn
from torch.utils.checkpoint import checkpoint

from momentum_fix import corrected_momentum, effective_momentum, symbolic
from momentum_fix.symbolic import Induction, ProofError, Step, Theorem, k, m, n, theorems
from momentum_fix.weights import batch_weights

THEOREMS = theorems()
NAMED = {theorem.name: theorem for theorem in THEOREMS}
STEPS = [(theorem, number) for theorem in THEOREMS for number in range(len(theorem.steps))]
NAMES = [f"{theorem.name}-{number + 1}" for theorem, number in STEPS]
CLAIMS = [(theorem, number) for theorem in THEOREMS for number in range(len(theorem.claims))]
CLAIM_NAMES = [f"{theorem.name}-{number + 1}" for theorem, number in CLAIMS]
INDUCTIONS = [claim for theorem in THEOREMS for claim in theorem.claims if isinstance(claim, Induction)]
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


@every_theorem
def test_every_theorem_proves(theorem):
    theorem.prove()


def test_the_wrong_root_is_no_corrected_momentum():
    correction = NAMED["Correction"]
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
    assert str(caught.value) == f"{wrong} does not hold, as far as can be told ({step.reason})"


@every_step
def test_every_step_fails_with_the_right_side_of_another(theorem, number):
    step = theorem.steps[number]
    for other in theorem.steps:
        if other.rhs != step.rhs and not symbolic.proof._is_zero(sp.sympify(other.rhs), sp.sympify(step.rhs)):
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
    symbolic.proof._is_zero.cache_clear()
    start = time.process_time()
    for theorem in theorems():
        theorem.prove()
    assert time.process_time() - start < 20  # about 3 s on an idle core


def test_theorems_are_frozen_data_in_the_order_of_the_argument():
    assert [theorem.name for theorem in THEOREMS] == [
        "Double update",
        "Several passes",
        "Correction",
        "Whole trajectory",
        "Cumulative average",
        "Order",
        "Size of the effect",
        "Small momentum",
        "Gradients",
        "Recomputation",
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
    passes, variance = NAMED["Several passes"].claims[0], NAMED["Size of the effect"].claims[0]
    assert sp.latex(passes).startswith(r"R_{k} = R_{0} \alpha^{k}")
    assert sp.latex(passes).endswith(r"\quad\text{for}\quad R_{k + 1} = R_{k} \alpha + b \left(1 - \alpha\right)")
    assert sp.latex(variance).endswith(r",\ R_0 = V")
    assert str(passes).endswith(", for R_(k + 1) = R_k*alpha + b*(1 - alpha) and R_0 = R_0")


def rational(rng):
    return sp.Rational(rng.randrange(1, 40), 40)


@pytest.mark.parametrize("claim", INDUCTIONS, ids=str)
def test_every_induction_is_what_updating_gives_in_exact_fractions(claim):
    rng = random.Random(1)
    for _ in range(3):
        names = sp.Tuple(claim.closed, claim.renewed, claim.initial).free_symbols - {claim.count, symbolic.old}
        numbers = {s: rng.randrange(1, 5) if s.is_integer else rational(rng) for s in sorted(names, key=str)}
        numbers.pop(symbolic.x, None), numbers.pop(symbolic.x.label, None)
        numbers |= {symbolic.x[number]: rational(rng) for number in range(1, 7)}
        value = sp.sympify(claim.initial).subs(numbers)
        for count in range(6):
            value = claim.renewed.subs(claim.count, count).subs(numbers).subs(symbolic.old, value)
            assert value.is_Rational
            assert claim.closed.subs(claim.count, count + 1).doit().subs(numbers) == value


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
    weight = sp.lambdify((symbolic.q, n, symbolic.j), NAMED["Order"].claims[5].rhs)
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
        first, second = (float(claim.rhs.subs(k, passes)) for claim in NAMED["Small momentum"].claims[2:4])
        assert corrected_momentum(1e-3, passes) == pytest.approx(first * 1e-3 + second * 1e-6, abs=1e-9)


def test_rounding_costs_the_textbook_expression_what_the_theorem_says():
    noise = sp.lambdify((symbolic.q, k), NAMED["Small momentum"].claims[4].rhs, modules="mpmath")
    momentum = 1e-9
    rounding = ((1 - momentum) - (1 - sp.Rational(momentum))) / (1 - sp.Rational(momentum))
    textbook = 1 - math.sqrt(1 - momentum)
    error = (textbook - corrected_momentum(momentum, 2)) / corrected_momentum(momentum, 2)
    assert error == pytest.approx(float(noise(1 - sp.Rational(momentum), 2)) * float(rounding), abs=2**-53 / momentum)
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
def test_a_recomputation_has_the_gradient_that_the_theorem_says(kind, momentum, reentrant):
    layer, batch = kind(momentum), torch.tensor(2.0, requires_grad=True)
    output = checkpoint(layer, batch, use_reentrant=reentrant)
    (output.square() / 2).backward()
    numbers = {symbolic.w: 0.7, symbolic.b: 2.0, symbolic.x0: 0.3, symbolic.p: momentum, m: 0.1}
    right, left = (float(NAMED["Recomputation"].claims[number].rhs.subs(numbers)) for number in (1, 3))
    found, right_output = layer.weight.grad.item(), 0.7 * 0.9 * (2.0 - 0.3)
    if kind is SameState:
        assert (found == pytest.approx(right)) == (momentum == 0.1)
    else:
        assert found == pytest.approx(left, rel=1e-13)
        assert found != pytest.approx(right) or output.item() != pytest.approx(right_output)
