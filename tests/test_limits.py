"""docs/limits.md: what comes of what no checkpoint preserves, and what diagnose says of it; scenes.py has more."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import CheckpointError

import momentum_fix
from momentum_fix import diagnose, preserve_everywhere
from momentum_fix.state.fingerprint import fingerprint
from pages import DOCS, rows
from recipes import hand_written
from scenes import (
    ENGINES,
    WIDTH,
    FromNorm,
    Net,
    data,
    non_reentrant,
    norm,
    once,
    plainly,
    preserving,
    same_gradients,
)
from twins import counters, tells_of_compilation

EVERY = {
    f"{engine}, {how}": ckpt
    for engine, both in ENGINES.items()
    for how, ckpt in zip(("plain", "kept"), both, strict=True)
}
NON_REENTRANT = {name: ckpt for name, ckpt in EVERY.items() if name.startswith("non-reentrant")}
REENTRANT = {name: ckpt for name, ckpt in EVERY.items() if name.startswith("reentrant")}


def among(ckpts):
    return pytest.mark.parametrize("ckpt", ckpts.values(), ids=ckpts)


def beside_its_twin(block, step, ckpt):
    """Give whether gradients are those of the uncheckpointed twin, the report, and what was raised, if anything was."""
    torch.manual_seed(0)
    net, raised = Net(block()), None
    truth = copy.deepcopy(net)
    with contextlib.suppress(ZeroDivisionError):
        step(truth, plainly)
    try:
        with diagnose(net) as report:
            step(net, ckpt)
    except (CheckpointError, ZeroDivisionError) as error:
        raised = error
    return same_gradients(net, truth), report, raised


# Trackers.

TRACKED = []


class Tracks(nn.Module):
    """Puts what it is given on a list of the process."""

    def forward(self, x):
        TRACKED.append(float(x.detach().mean()))
        return x.tanh()


@among(EVERY)
def test_what_is_written_to_a_global_and_not_read_is_there_twice_and_diagnose_does_not_see_it(ckpt):
    def step(net, ckpt):
        TRACKED.clear()
        ckpt(net.body, net.stem(data()[0])).square().mean().backward()

    same, report, _ = beside_its_twin(Tracks, step, ckpt)
    assert len(TRACKED) == 2
    assert TRACKED[0] == TRACKED[1]
    assert same
    assert report.ok


# `requires_grad`.


def changing(before, after):
    """Give a step between whose forward and backward pass something is done to the first layer of the checkpoint."""

    def step(net, ckpt):
        before(net.body)
        y = ckpt(net.body, net.stem(data()[0]))
        after(net.body)
        y.square().mean().backward()

    return step


def freeze(body):
    body[0].requires_grad_(False)


def thaw(body):
    body[0].requires_grad_(True)


@among(NON_REENTRANT)
def test_torch_refuses_what_is_frozen_after_the_forward_pass_and_the_report_says_that_gradients_are_wrong(ckpt):
    _, report, raised = beside_its_twin(nn.Tanh, changing(thaw, freeze), ckpt)
    assert "A different number of tensors was saved" in str(raised)
    assert report.gradients_right is False


@among(REENTRANT)
def test_what_is_frozen_after_the_forward_pass_is_right_with_the_reentrant_engine(ckpt):
    same, report, _ = beside_its_twin(nn.Tanh, changing(thaw, freeze), ckpt)
    assert same
    assert report.gradients_right is True


def test_torch_refuses_what_is_no_longer_frozen_and_the_report_says_that_gradients_are_wrong():
    _, report, raised = beside_its_twin(nn.Tanh, changing(freeze, thaw), non_reentrant)
    assert "different metadata than during the forward pass" in str(raised)
    assert report.gradients_right is False


@among({"kept": preserving, "kept, reentrant": REENTRANT["reentrant, kept"]})
def test_a_small_frozen_parameter_is_frozen_in_the_recomputation_too_if_state_is_preserved(ckpt):
    same, report, _ = beside_its_twin(nn.Tanh, changing(freeze, thaw), ckpt)
    assert same
    assert report.ok


def test_what_is_no_longer_frozen_gets_a_gradient_with_the_reentrant_engine_and_the_report_says_so():
    same, report, _ = beside_its_twin(nn.Tanh, changing(freeze, thaw), REENTRANT["reentrant, plain"])
    assert not same
    assert report.gradients_right is False


# What goes around a checkpoint in the forward pass.


def in_a_cache(net, ckpt):
    with parametrize.cached():
        y = ckpt(net.body, net.stem(data()[0])) + ckpt(net.body, net.stem(data()[1]))
    y.square().mean().backward()


def orthogonal():
    return parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH))


@among(REENTRANT)
def test_what_the_forward_pass_takes_from_a_cache_around_the_checkpoint_is_called_wrong_though_it_is_not(ckpt):
    same, report, _ = beside_its_twin(orthogonal, in_a_cache, ckpt)
    assert same
    assert report.gradients_right is False


@among(NON_REENTRANT)
def test_torch_refuses_a_cache_around_the_checkpoint_and_the_report_says_that_gradients_are_wrong(ckpt):
    _, report, raised = beside_its_twin(orthogonal, in_a_cache, ckpt)
    assert isinstance(raised, CheckpointError)
    assert report.gradients_right is False


# Compiled together with the model.


class Compiled(nn.Module):
    def __init__(self, block, ckpt):
        super().__init__()
        self.net, self.ckpt = Net(block()), ckpt

    def forward(self, x):
        return self.ckpt(self.net.body, self.net.stem(x))


def compiled_beside_its_twin(block, ckpt):
    torch.manual_seed(0)
    model = Compiled(block, ckpt)
    truth = copy.deepcopy(model)
    truth.ckpt = plainly
    truth(data()[0]).square().mean().backward()
    torch.compile(model, backend="aot_eager")(data()[0]).square().mean().backward()
    return model, truth


@tells_of_compilation
@pytest.mark.parametrize(("block", "right"), [(norm, True), (FromNorm, False)], ids=["only written", "read"])
def test_preserve_everywhere_does_nothing_in_code_that_is_compiled_with_its_checkpoint_and_says_so(block, right):
    with preserve_everywhere(), pytest.warns(UserWarning, match="preserve_everywhere does nothing"):
        model, truth = compiled_beside_its_twin(block, non_reentrant)
    assert counters(model) == counters(truth)  # BatchNorm is right there by itself
    assert same_gradients(model, truth) is right


@pytest.mark.parametrize("block", [norm, FromNorm], ids=["only written", "read"])
def test_the_drop_in_stays_out_of_the_compiled_code_and_is_right(block):
    def drop_in(function, x):
        return momentum_fix.checkpoint(function, x, use_reentrant=False)

    model, truth = compiled_beside_its_twin(block, drop_in)
    assert counters(model) == counters(truth)
    assert same_gradients(model, truth)


# What the page about diagnose says.


def compiled(net, ckpt):
    run = torch.compile(lambda x: ckpt(net.body, net.stem(x)), backend="aot_eager")
    run(data()[0]).square().mean().backward()


def in_evaluation_mode(net, ckpt):
    net.eval()
    once(net, ckpt)


def failing(net, ckpt):
    once(net, ckpt)
    raise ZeroDivisionError


def sparsely(net, ckpt):
    ckpt(lambda y: torch.sparse.mm(torch.eye(len(y)).to_sparse(), y), net.stem(data()[0])).square().mean().backward()


def given_data(net, _):
    net.body(REENTRANT["reentrant, plain"](net.stem, data()[0])).square().mean().backward()


def hooking(net, ckpt):
    def function(y):
        y.register_hook(lambda gradient: gradient * 0.1)
        return net.body(y)

    ckpt(function, net.stem(data()[0])).square().mean().backward()


NOT_OBSERVED = [
    (lambda net, _: once(net, plainly), "no recomputation was seen"),
    (lambda net, ckpt: ckpt(net.body, net.stem(data()[0])), "no backward pass was seen"),
    (in_evaluation_mode, "evaluation mode"),
    (lambda net, _: once(net, hand_written), "ran in the backward pass, but not in a checkpoint of torch's"),
    (compiled, "nobody sees what compiled code recomputes"),
    (failing, "the step raised"),
    (given_data, "a reentrant checkpoint was given no tensor that requires gradients"),
    (hooking, "the function puts a hook on a tensor from outside"),
    (sparsely, "could not be compared"),
]


@pytest.mark.parametrize(
    ("step", "said"),
    [pytest.param(*each, id=each[1], marks=[tells_of_compilation] * (each[0] is compiled)) for each in NOT_OBSERVED],
)
def test_what_could_not_be_observed_is_said_as_the_page_has_it(step, said):
    _, report, _ = beside_its_twin(norm, step, non_reentrant)
    assert report.verdict.startswith("Not observed: ")
    assert said in report.verdict
    assert not report.ok


def test_the_page_has_a_row_for_each_reason_and_no_other():
    table = rows("diagnose.md", "| the verdict says | what to do |")
    assert [says.strip(". ") for says, _ in table] == [said for _, said in NOT_OBSERVED]


def test_the_page_says_how_many_bytes_a_fingerprint_has():
    assert f"keeps {fingerprint(torch.ones(3)).nbytes} bytes" in (DOCS / "diagnose.md").read_text(encoding="utf-8")
