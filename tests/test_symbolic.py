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
from momentum_fix.symbolic import ProofError, Step, Theorem, k, m, n, theorems
from momentum_fix.weights import batch_weights

THEOREMS = theorems()
STEPS = [(theorem, number) for theorem in THEOREMS for number in range(len(theorem.steps))]
NAMES = [f"{theorem.name}-{number + 1}" for theorem, number in STEPS]
STRANGER = sp.Symbol("z", positive=True)


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


@pytest.mark.parametrize("theorem", THEOREMS, ids=lambda theorem: theorem.name)
def test_every_theorem_proves(theorem):
    theorem.prove()


@pytest.mark.parametrize(("theorem", "number"), STEPS, ids=NAMES)
def test_every_step_fails_when_it_is_made_wrong(theorem, number):
    for wrong in wrong_versions(theorem.steps[number]):
        with pytest.raises(ProofError):
            replace(theorem, steps=(wrong,)).prove()


@pytest.mark.parametrize(("theorem", "number"), STEPS, ids=NAMES)
def test_a_theorem_with_one_wrong_step_fails_and_names_it(theorem, number):
    step = theorem.steps[number]
    wrong = replace(step, rhs=step.rhs + 1)
    spoilt = replace(theorem, steps=(*theorem.steps[:number], wrong, *theorem.steps[number + 1 :]))
    with pytest.raises(ProofError, match=rf"^{theorem.name}, step {number + 1}: "):
        spoilt.prove()


@pytest.mark.parametrize(("theorem", "number"), STEPS, ids=NAMES)
def test_every_step_fails_with_the_right_side_of_another(theorem, number):
    step = theorem.steps[number]
    for other in theorem.steps:
        if other.rhs != step.rhs and not symbolic._is_zero(other.rhs - step.rhs):
            with pytest.raises(ProofError):
                replace(theorem, steps=(replace(step, rhs=other.rhs),)).prove()


@pytest.mark.parametrize(("theorem", "number"), STEPS, ids=NAMES)
def test_no_step_is_vacuous(theorem, number):
    step = theorem.steps[number]
    assert sp.simplify(step.rhs) != 0  # 2 * 0 would be as true as 0
    for same in (replace(step, rhs=step.lhs), replace(step, lhs=step.rhs)):
        with pytest.raises(ProofError, match="says nothing"):
            replace(theorem, steps=(same,)).prove()


def test_all_proofs_together_take_a_few_seconds():
    start = time.process_time()
    for theorem in theorems():
        theorem.prove()
    assert time.process_time() - start < 20  # about 1.5 s on an idle core


def test_no_steps_prove_nothing():
    with pytest.raises(ProofError, match="nothing is proved"):
        Theorem("Empty", "", "", ()).prove()


def test_the_error_names_the_first_step_that_does_not_hold():
    good, bad = Step((m + 1) ** 2 - m**2, 1 + 2 * m, "true"), Step(m, 2 * m, "because I say so")
    with pytest.raises(ProofError, match=r"^Mine, step 2: m = 2\*m does not hold \(because I say so\)$"):
        Theorem("Mine", "", "", (good, bad, bad)).prove()
    assert issubclass(ProofError, ArithmeticError)


def test_sides_may_be_plain_numbers():
    Theorem("Sum", "", "", (Step(sp.Sum(symbolic.j, (symbolic.j, 1, 3)), 6, ""),)).prove()
    for lhs, rhs in ((sp.Sum(symbolic.j, (symbolic.j, 1, 3)), 7), (1, 2)):
        with pytest.raises(ProofError, match="does not hold"):
            Theorem("Sum", "", "", (Step(lhs, rhs, ""),)).prove()
    with pytest.raises(ProofError, match="says nothing"):
        Theorem("One", "", "", (Step(1, sp.Integer(1), ""),)).prove()


def test_a_sum_that_runs_further_is_not_taken_for_the_shorter_one():
    xs, j = symbolic.x, symbolic.j
    short, longer = (sp.Sum(xs[j], (j, 1, last)) for last in (n, n + 1))
    Theorem("Right", "", "", (Step(longer, short + xs[n + 1], ""),)).prove()
    for wrong in (short, short + xs[n], short + xs[1]):
        with pytest.raises(ProofError):
            Theorem("Wrong", "", "", (Step(longer, wrong, ""),)).prove()


@pytest.mark.parametrize("numbers_first", [True, False])
def test_a_sum_is_split_at_n_alone_and_only_upwards(monkeypatch, numbers_first):
    if not numbers_first:
        monkeypatch.setattr(symbolic, "_is_refuted", lambda difference: False)
    xs, j, i = symbolic.x, symbolic.j, sp.Symbol("i", integer=True)
    upto = [sp.Sum(xs[j], (j, 1, last)) for last in (n - 1, n, n + 2, n + k)]
    single, double = (sp.Sum(xs[i], (i, 1, n + 1), *outer) for outer in ((), ((j, 1, 2),)))
    assert symbolic._is_zero(upto[2] - upto[1] - xs[n + 1] - xs[n + 2])
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
    ]
    for theorem in THEOREMS:
        assert theorem.statement.endswith(".")
        assert theorem.latex
        assert all(step.reason.endswith(".") for step in theorem.steps)
        with pytest.raises(FrozenInstanceError):
            theorem.steps[0].rhs = 0
    assert theorems() == THEOREMS


@pytest.mark.parametrize("name", ["k passes", "Whole trajectory", "Cumulative average", "Order", "Size of the effect"])
def test_induction_is_written_as_base_and_step(name):
    reasons = " ".join(step.reason for theorem in THEOREMS if theorem.name == name for step in theorem.steps).lower()
    assert "base" in reasons
    assert "step" in reasons


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
    order = THEOREMS[5]
    used, there = corrected_momentum(0.1, 2), list(range(1, batches + 1))
    weights = batch_weights(there + there[::-1], used)
    difference = sp.lambdify((symbolic.q, n, symbolic.j), order.steps[5].rhs)
    for batch in there:
        right = 0.1 * 0.9 ** (batches - batch)
        expected = right + difference(1 - used, batches, batch)
        assert weights.batches[batch] == pytest.approx(expected, rel=1e-12)
    means = [float(batch) for batch in there]
    value = sum(weights.batches[batch] * batch for batch in there)
    assert batch_norm(used, means + means[::-1]) == pytest.approx(value, rel=1e-12)


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
        first, second, third = (float(step.rhs.subs(k, passes)) for step in THEOREMS[8].steps[6:9])
        by_series = first * 1e-3 + second * 1e-6 + third * 1e-9
        assert corrected_momentum(1e-3, passes) == pytest.approx(by_series, abs=1e-12)


def test_rounding_costs_the_textbook_expression_what_the_theorem_says():
    noise = sp.lambdify((m, k), THEOREMS[8].steps[9].rhs, modules="mpmath")
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
