"""recomputing: what nobody could tell is declared, and update_once and calibrate are right there too."""

import contextlib
import copy
import threading
import warnings
from fractions import Fraction

import pytest
import torch

from momentum_fix import calibrate, diagnose, recomputing, update_once
from momentum_fix.recomputation import is_recomputation
from recipes import Net, data
from twins import counters, deviation, non_reentrant, plainly, train


def undeclared(*_):
    return contextlib.nullcontext()


DECLARED = {"declared": recomputing, "not declared": undeclared}


def outside_of_a_backward_pass(net, x, ckpt, declare, run):
    """Recompute as an engine does that reads what was saved before the backward pass."""
    y = ckpt(run, x.requires_grad_()).sin()
    if ckpt is not plainly:
        with declare():
            last = y.grad_fn.next_functions[0][0]
            _ = last.saved_tensors if run is not net else last.next_functions[0][0]._saved_result
    y.sum().backward()


class InAThread(torch.autograd.Function):
    """An engine that recomputes in a thread of its own."""

    @staticmethod
    def forward(ctx, run, x, declare):
        ctx.run, ctx.declare = run, declare
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors

        def recompute():
            nonlocal x
            with torch.enable_grad(), ctx.declare():
                x = x.detach().requires_grad_()
                torch.autograd.backward(ctx.run(x), gradient)

        thread = threading.Thread(target=recompute)
        thread.start()
        thread.join()
        return None, x.grad, None


def in_a_thread(net, x, ckpt, declare, run):
    y = run(x.requires_grad_()) if ckpt is plainly else InAThread.apply(run, x.requires_grad_(), declare)
    y.square().mean().backward()


def new_batch_in_a_hook(net, x, ckpt, declare, run):
    def hook(_):
        with declare(False):
            run(x.detach() + 1)

    y = ckpt(run, x.requires_grad_())
    y.register_hook(hook)
    y.sum().backward()


STEPS = [outside_of_a_backward_pass, in_a_thread, new_batch_in_a_hook]


def runs(step, declare, compiled):
    """Give a step that runs the net as it is, or, with a checkpoint, compiled."""

    def run(net, x, ckpt):
        whole = torch.compile(net, backend="aot_eager") if compiled and ckpt is not plainly else net
        step(net, x, ckpt, declare, whole)

    return run


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("declare", DECLARED.values(), ids=DECLARED)
@pytest.mark.parametrize("step", STEPS)
def test_update_once_is_exact_where_it_is_declared_and_only_there(step, declare, compiled):
    net = Net()
    truth = train(copy.deepcopy(net), runs(step, declare, False), data(3), plainly)
    update_once(net)
    train(net, runs(step, declare, compiled), data(3), non_reentrant)
    assert (deviation(net, truth) == 0) is (counters(net) == counters(truth)) is (declare is recomputing)


PASSES = {  # declared, and not
    outside_of_a_backward_pass: (3, Fraction(3, 2)),
    in_a_thread: (2, 1),
    new_batch_in_a_hook: (Fraction(3, 2), 3),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("declare", DECLARED.values(), ids=DECLARED)
@pytest.mark.parametrize("step", STEPS)
def test_calibrate_counts_it_where_it_is_declared_and_only_there(step, declare, compiled):
    net = Net()
    truth = train(copy.deepcopy(net), runs(step, declare, False), data(1), plainly)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "only the decay is right|not corrected")
        with calibrate(net) as report:
            train(net, runs(step, declare, compiled), data(1), non_reentrant)
    assert (deviation(net, truth) == 0) is (declare is recomputing)
    passes = report.rows[0].passes
    if compiled and step is outside_of_a_backward_pass:  # which recomputes for each tensor that is read
        assert isinstance(passes, int) is (declare is recomputing)
    else:
        assert passes == PASSES[step][declare is undeclared]


def test_the_innermost_block_counts_and_each_restores_what_was_before():
    assert not is_recomputation()
    with recomputing():
        assert is_recomputation()
        with recomputing(False):
            assert not is_recomputation()
            with recomputing(True):
                assert is_recomputation()
            assert not is_recomputation()
        with pytest.raises(ZeroDivisionError), recomputing(False):
            raise ZeroDivisionError
        assert is_recomputation()
    assert not is_recomputation()


def test_it_holds_in_the_thread_that_enters_it_and_in_no_other():
    seen = []
    with recomputing():
        thread = threading.Thread(target=lambda: seen.append(is_recomputation()))
        thread.start()
        thread.join()
    assert seen == [False]


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_block_that_is_compiled_itself_is_refused_or_runs_uncompiled(fullgraph):
    net = Net()
    truth = copy.deepcopy(net)
    update_once(net)

    def recomputed(x):
        with recomputing():
            return net(x)

    run = torch.compile(recomputed, backend="aot_eager", fullgraph=fullgraph)
    said = "recomputing cannot be part of compiled code: put the block around the call of that code"
    with pytest.raises(Exception, match=said) if fullgraph else contextlib.nullcontext():
        run(data(1)[0])
    assert counters(net) == counters(truth)
    run = torch.compile(net, backend="aot_eager", fullgraph=True)
    run(data(1)[0])
    with recomputing():
        run(data(1)[0])
    assert set(counters(net).values()) == {1}


def test_diagnose_sees_what_is_declared():
    def step(net, declare):
        net(data(1)[0]).sum().backward()
        with declare():
            net(data(1)[0])

    with diagnose(net := Net()) as report:
        step(net, undeclared)
    assert not report
    with diagnose(net := Net()) as report:
        step(net, recomputing)
    assert {each.attribute for each in report.values()} == {"running_mean", "running_var", "num_batches_tracked"}
    assert {each.times for each in report.values()} == {2}
