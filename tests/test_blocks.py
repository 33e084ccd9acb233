"""The block of calibrate: what it leaves behind, whatever happens in it and beside it, and what it leaves alone."""

import copy
import functools
import threading
import warnings
from contextlib import nullcontext

import numpy
import pytest
import torch
from torch import nn

import recipes as by
from momentum_fix import applied, calibrate, correct, corrected_momentum, diagnose, restore, update_once
from recipes import Net, StoppedError, Stubborn, data, instance_norm, nested, one, same
from twins import ROUNDING, counters, deviation, momenta, non_reentrant, plainly, reentrant, train


def nothing_ran():
    return pytest.warns(UserWarning, match="no layer was updated in the block, so nothing is corrected: put a training")


def one_forward(model):
    return non_reentrant(model, data(1)[0].requires_grad_()).sum()


# Corrected models and users' changes.


@pytest.mark.parametrize("earlier", [2, 3, 5])
def test_a_corrected_model_is_calibrated_from_its_uncorrected_momentum(earlier):
    model = Net()
    truth = train(copy.deepcopy(model), nested, data(), plainly)
    correct(model, earlier)
    with calibrate(model) as report:
        train(model, nested, data()[:1], non_reentrant)
    train(model, nested, data()[1:], non_reentrant)
    assert report.passes == {"a.1": 2, "b.1": 3, "c.1": 2}
    assert {row.momentum for row in report.rows} == {0.1}
    assert deviation(model, truth) < ROUNDING
    assert set(momenta(restore(model)).values()) == {0.1}


def test_a_model_whose_checkpointing_was_switched_off_goes_back_to_its_own_momentum():
    model = correct(Net(), 2)
    with calibrate(model) as report:
        train(model, one, data(1), plainly)
    assert report.passes == same(1)
    assert set(momenta(model).values()) == {0.1}


def test_a_corrected_layer_that_does_not_run_stays_corrected():
    model = correct(Net(), 2)
    with calibrate(model):
        one_forward(model.a).backward()
    assert momenta(model) == same(corrected_momentum(0.1, 2))
    assert set(momenta(restore(model)).values()) == {0.1}


def sets_a_momentum(model):
    one(model, *data(1), non_reentrant)
    model.b[1].momentum = 0.4


def test_a_momentum_that_the_step_sets_is_the_one_that_is_corrected_and_a_warning_says_that_it_will_not_last():
    model = Net()
    said = r"the step itself sets the momentum.*update_once.*Layers: b\.1\."
    with pytest.warns(UserWarning, match=said), calibrate(model) as report:
        sets_a_momentum(model)
    assert momenta(model)["b.1"] == corrected_momentum(0.4, 2)
    assert [row.momentum for row in report.rows] == [0.1, 0.4, 0.1]


def test_untracked_evaluating_cumulative_and_idle_layers_are_left_alone_and_reported():
    net = nn.ModuleDict(
        {
            "untracked": nn.BatchNorm1d(3, track_running_stats=False),
            "evaluating": nn.BatchNorm1d(3).eval(),
            "cumulative": nn.BatchNorm1d(3, momentum=None),
            "idle": nn.BatchNorm1d(3),
            "counted": nn.BatchNorm1d(3),
        }
    )

    def step(net, x, ckpt):
        names = ("untracked", "evaluating", "cumulative", "counted")
        ckpt(lambda y: sum(net[name](y) for name in names).square(), x.requires_grad_()).sum().backward()

    inputs = [x[:, :, 0, 0] for x in data()]
    truth = train(copy.deepcopy(net), step, inputs, plainly)
    with calibrate(net) as report:
        train(net, step, inputs[:1], non_reentrant)
    train(net, step, inputs[1:], non_reentrant)
    assert {row.name: (row.passes, row.note) for row in report.rows} == {
        "evaluating": (None, "left alone: in evaluation mode"),
        "cumulative": (2, "left alone: equal passes do not change a cumulative average"),
        "idle": (None, "left alone: did not run"),
        "counted": (2, ""),
    }
    assert "cumulative  BatchNorm1d  2       None      None       left alone" in str(report)
    assert momenta(net) == {"evaluating": 0.1, "cumulative": None, "idle": 0.1, "counted": corrected_momentum(0.1, 2)}
    assert deviation(net, truth) < ROUNDING


# What it leaves behind.


def test_a_calibrated_model_comes_back_from_restore_as_it_was():
    model = Net(instance_norm)
    keys = [vars(module).keys() for module in model.modules()]
    with calibrate(model):
        one(model, *data(1), non_reentrant)
    assert set(momenta(model).values()) == {corrected_momentum(0.1, 2)}
    assert [vars(module).keys() for module in restore(model).modules()] == keys
    assert set(momenta(model).values()) == {0.1}


def test_the_block_leaves_graphs_that_saved_the_statistics_usable():
    model = Net()
    with calibrate(model) as report:
        loss = one_forward(model)
        loss.backward(retain_graph=True)
    assert report.passes == same(2)
    loss.backward()  # raises if undoing passes counted as a modification of what autograd has saved


def explode(*_):
    raise StoppedError


def exploding_step(model, where):
    x = data(1)[0].requires_grad_()
    y = non_reentrant(model, x)
    if where == "forward":
        explode()
    if where == "backward":
        x.register_hook(explode)
    y.sum().backward()
    explode()


@pytest.mark.parametrize("where", ["forward", "backward", "after"])
@pytest.mark.parametrize("earlier", [1, 2])
def test_an_exception_leaves_momentum_untouched_and_the_next_block_right(where, earlier):
    model = correct(Net(instance_norm), earlier)
    before = momenta(model)
    with pytest.raises(StoppedError), calibrate(model) as report:
        exploding_step(model, where)
    assert momenta(model) == before
    assert report.rows == ()
    with calibrate(model) as report:
        one(model, *data(1), non_reentrant)
    assert report.passes == same(2)
    assert set(momenta(restore(model)).values()) == {0.1}


def test_a_backward_that_fails_has_moved_nothing():
    model = Net()
    truth = copy.deepcopy(model)
    with pytest.raises(StoppedError), calibrate(model):
        exploding_step(model, "backward")
    one_forward(truth)
    assert deviation(model, truth) == 0


# What is refused before anything runs.


def test_an_impossible_momentum_is_refused_before_anything_runs():
    model = Net()
    model.b[1].momentum = -0.5
    with pytest.raises(ValueError, match=r"layer 'b\.1': momentum is -0\.5"), calibrate(model):
        pytest.fail("the block must not be entered")
    assert momenta(model) == {"a.1": 0.1, "b.1": -0.5, "c.1": 0.1}


def test_a_layer_that_refuses_its_momentum_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.BatchNorm2d(3), instance_norm(3), Stubborn(3))
    keys = [vars(layer).keys() for layer in model]
    for change in (correct, lambda model: calibrate(model).__enter__()):
        with pytest.raises(AttributeError, match="momentum is fixed"):
            change(model)
        assert set(momenta(model).values()) == {0.1}
        assert [vars(layer).keys() for layer in model] == keys


@pytest.mark.parametrize("model", [3, {}, nn.BatchNorm2d])
def test_what_is_no_module_is_a_type_error(model):
    for change in (correct, restore, lambda model: calibrate(model).__enter__()):
        with pytest.raises(TypeError, match=rf"model is of type {type(model).__name__}, but must be an nn\.Module"):
            change(model)


def test_torchscript_is_refused():
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3)))
    with pytest.raises(TypeError, match=r"^model is TorchScript, where momentum is part of the code"):
        correct(scripted)


# Blocks within and beside each other, and other threads.


def test_a_layer_is_calibrated_in_one_block_only():
    model = Net()
    with (
        nothing_ran(),
        calibrate(model),
        pytest.raises(
            ValueError, match=r"layer '1' is being calibrated: leave the `with calibrate\(\.\.\.\)` block first"
        ),
        calibrate(model.b),
    ):
        pytest.fail("the block must not be entered")
    with calibrate(model) as report:
        one(model, *data(1), non_reentrant)
    assert report.passes == same(2)


@pytest.mark.parametrize("change", [update_once, restore, correct])
def test_what_else_changes_a_model_waits_for_the_end_of_the_block(change):
    model = Net()
    with calibrate(model) as report:
        with pytest.raises(ValueError, match=r"layer 'a\.1' is being calibrated: leave the"):
            change(model)
        assert set(applied(model).values()) == {"calibrate"}
        one(model, *data(1), non_reentrant)
    assert report.passes == same(2)
    change(model) if change is not update_once else change(restore(model))


def test_a_layer_that_loses_its_statistics_in_the_block_is_left_alone():
    model = Net()
    with calibrate(model) as report:
        one(model, *data(1), non_reentrant)
        model.a[1].running_mean = model.a[1].running_var = None
    assert report.passes == {"b.1": 2, "c.1": 2}
    assert report.rows[0].note == "left alone: no longer tracks running statistics"
    assert model.a[1].momentum == 0.1


def beside(model, change):
    """A block around a step of one part of a model; in it, something is done to the part that does not run."""
    with warnings.catch_warnings(record=True) as caught, calibrate(model) as report:
        warnings.simplefilter("always")
        one_forward(model[0]).backward()
        change(model[1])
    return report.rows[-1].note, [str(each.message) for each in caught]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.to("meta"),
        nn.Module.half,
        lambda layer: setattr(layer, "running_mean", torch.ones(3).to_sparse()),
    ],
    ids=["to the meta device", "to another precision", "to a sparse layout"],
)
@pytest.mark.parametrize("training", [True, False])
def test_statistics_that_go_elsewhere_in_the_block_have_not_moved(change, training):
    model = nn.Sequential(Net(), nn.BatchNorm2d(3, dtype=torch.float64).train(training))
    model[1].running_mean += 0.1
    assert beside(model, change) == ("left alone: did not run" if training else "left alone: in evaluation mode", [])
    assert momenta(model) == {f"0.{name}": corrected_momentum(0.1, 2) for name in same(2)} | {"1": 0.1}
    assert set(momenta(restore(model)).values()) == {0.1}


def test_statistics_that_move_and_go_elsewhere_in_the_block_have_moved():
    note, caught = beside(
        nn.Sequential(Net(), nn.BatchNorm2d(3)), lambda layer: layer.running_mean.add_(1) + layer.half().eps
    )
    assert "its statistics moved, but its forward did not run" in note
    assert "its statistics moved, but its forward did not run" in caught[0]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda layer: delattr(layer, "momentum"), None),
        (lambda layer: setattr(layer, "momentum", torch.tensor([0.1, 0.1])), "must be one real number"),
        (lambda layer: setattr(layer, "momentum", numpy.array([0.1, 0.1])), "must be one real number"),
    ],
    ids=["none", "a tensor", "an array"],
)
@pytest.mark.parametrize("earlier", [1, 2])
def test_a_momentum_of_any_kind_that_the_block_leaves_does_not_keep_the_model_in_it(change, error, earlier):
    model = correct(Net(), earlier)
    with warnings.catch_warnings(), pytest.raises(TypeError, match=error) if error else nullcontext():
        warnings.simplefilter("ignore")
        with calibrate(model) as report:
            one(model, *data(1), non_reentrant)
            change(model.b[1])
    assert "calibrate" not in applied(model).values()
    if error is None:
        assert report.rows[1].note == "left alone: no longer tracks running statistics"
        assert report.passes == {"a.1": 2, "c.1": 2}
    assert model.a[1].momentum == corrected_momentum(0.1, earlier if error else 2)


def test_a_counter_that_a_cumulative_average_gets_in_the_block_tells_nothing():
    model = Net(by.cumulative)
    counter, model.a[1].num_batches_tracked = model.a[1].num_batches_tracked, None
    with calibrate(model) as report:
        one(model, *data(1), non_reentrant)
        model.a[1].num_batches_tracked = counter + 9
    assert report.passes == same(2)


@pytest.mark.parametrize("tool", [calibrate, diagnose])
def test_a_block_runs_once(tool):
    block = tool(nn.Sequential(nn.BatchNorm2d(3)))
    with nothing_ran() if tool is calibrate else nullcontext(), block:
        pass
    with pytest.raises(RuntimeError, match=rf"has run already: call {tool.__name__}\(model\) again"), block:
        pytest.fail("it must not be entered")


def test_a_frozen_model_without_checkpoints_has_one_pass_a_batch():
    model = Net().requires_grad_(False)
    with warnings.catch_warnings(), calibrate(model) as report:
        warnings.simplefilter("error")
        model(data(1)[0])
    assert report.passes == same(1)


def test_blocks_may_end_in_any_order():
    models = [Net(), Net()]
    blocks = [calibrate(model) for model in models]
    reports = [block.__enter__() for block in blocks]
    for model, block in zip(models, blocks, strict=True):  # the second step runs after the first block
        one(model, *data(1), non_reentrant)
        block.__exit__(None, None, None)
    assert [report.passes for report in reports] == [same(2), same(2)]


def test_two_models_can_be_calibrated_in_one_step():
    generator, critic = Net(), Net()
    with calibrate(generator) as first, calibrate(critic) as second:
        non_reentrant(critic, reentrant(generator, data(1)[0].requires_grad_())).sum().backward()
    assert first.passes == second.passes == same(2)


def test_a_backward_pass_in_another_thread_does_not_undo_this_threads_forward():
    model = Net()
    truth = copy.deepcopy(model)
    inside, forward = threading.Event(), threading.Event()

    def elsewhere():
        weight = torch.ones(1, requires_grad=True)
        loss = weight * 2
        weight.register_hook(lambda _: inside.set() or (forward.wait(10) and None))
        loss.backward()

    thread = threading.Thread(target=elsewhere)
    with calibrate(model):
        thread.start()
        assert inside.wait(10)
        loss = one_forward(model)  # falls into the other thread's backward
        forward.set()
        thread.join()
        loss.backward()
    one_forward(truth)
    assert deviation(model, truth) == 0


@pytest.mark.parametrize("tool", [calibrate, diagnose])
def test_a_block_that_is_never_entered_says_so(tool):
    usage = rf"never entered, so it did nothing: write `with {tool.__name__}\(model\) as report:`"
    with pytest.warns(UserWarning, match=usage):
        tool(Net())


def test_a_block_around_a_step_in_evaluation_mode_or_of_another_model_says_so():
    model, other = Net(), Net()
    with nothing_ran() as caught, calibrate(model.eval()):
        one(model, *data(1), non_reentrant)
    assert caught[0].filename == __file__
    with nothing_ran(), calibrate(model.train()) as report:
        one(other, *data(1), non_reentrant)
    assert report.passes == {}
    assert set(momenta(model).values()) == {0.1}
    with calibrate(nn.ModuleList([model, other])):  # of which one runs
        one(other, *data(1), non_reentrant)


def test_a_block_that_is_abandoned_ends_when_it_is_collected():
    model = correct(Net(), 2)
    block = calibrate(model)
    block.__enter__()
    one_forward(model).backward()
    del block
    assert not any("forward" in vars(module) for module in model.modules())
    assert set(momenta(model).values()) == {corrected_momentum(0.1, 2)}


def sharpness_aware(net, x, ckpt):
    """Run a second pass that must not move the statistics, as SAM does: with momentum 0, which it leaves behind."""
    for layer in by.norms(net):
        layer.momentum = getattr(layer, "backup", layer.momentum)
    one(net, x.clone(), ckpt)
    for layer in by.norms(net):
        layer.backup, layer.momentum = layer.momentum, 0
    one(net, x.clone(), ckpt)


def test_a_step_that_leaves_another_momentum_behind_is_warned_of():
    model = Net()
    truth = train(copy.deepcopy(model), sharpness_aware, data(), plainly)
    once = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"the step itself sets the momentum.*then `update_once"), calibrate(model):
        sharpness_aware(model, *data(1), non_reentrant)
    update_once(once)
    assert deviation(train(once, sharpness_aware, data(), non_reentrant), truth) == 0


def test_a_model_is_not_pickled_in_the_block_and_is_after_it():
    model = Net()
    said = r"layer 'a\.1' is being calibrated: leave the `with calibrate\(\.\.\.\)` block first"
    with calibrate(model) as report:
        one(model, *data(1), non_reentrant)
        with pytest.raises(ValueError, match=said):
            by.pickled(model)
    assert report.passes == same(2)
    assert momenta(by.pickled(model)) == momenta(model)


def test_a_copy_made_in_the_block_is_an_uncorrected_model():
    model = correct(Net(), 2)
    with calibrate(model) as report:
        one(model, *data(1), non_reentrant)
        twin = copy.deepcopy(model)
    assert applied(twin) == {}
    assert not any("forward" in vars(module) for module in twin.modules())
    assert momenta(restore(twin)) == dict.fromkeys(same(2), 0.1)
    assert momenta(correct(twin, report)) == momenta(model)


def test_a_layer_with_a_forward_of_somebody_elses_is_counted_and_keeps_it():
    model, calls = Net(), []
    inner = model.b[1].forward

    def forward(x):
        calls.append(x)
        return inner(x)

    model.b[1].forward = forward
    truth = Net()
    truth.load_state_dict(model.state_dict())
    one(truth, *data(1), plainly)
    with calibrate(model) as report:
        one(model, *data(1), non_reentrant)
    assert report.passes == same(2)
    assert model.b[1].forward is forward
    assert len(calls) == 2
    assert deviation(model, truth) == 0


def wrapping_in_the_block(model):
    with calibrate(model):
        model.b[1].forward = functools.partial(model.b[1].forward)
        one(model, *data(1), non_reentrant)


def stuck(model):
    """Leave a block in which something has wrapped the forward of layer b.1; return that layer, and what was there."""
    with pytest.raises(ValueError, match=r"layer 'b\.1' has a forward of its own"):
        wrapping_in_the_block(model)
    return model.b[1], model.b[1].forward.func


def test_a_forward_that_something_else_wraps_in_the_block_keeps_that_layer_alone():
    model = correct(Net(), 2)
    layer, _ = stuck(model)
    assert momenta(model) == same(corrected_momentum(0.1, 2))
    assert [module for module in model.modules() if "forward" in vars(module)] == [layer]
    before = counters(model)
    one(model, *data(1), non_reentrant)  # and what is left there does nothing
    assert {name: count - before[name] for name, count in counters(model).items()} == dict.fromkeys(before, 2)
    with pytest.raises(ValueError, match=r"layer 'b\.1' has a forward of its own"):
        restore(model)


def calibrated(model):
    with calibrate(model) as report:
        one(model, *data(1), non_reentrant)
    assert report.passes == same(2)


@pytest.mark.parametrize("tool", [restore, lambda model: update_once(restore(model)).remove(), correct, calibrated])
def test_when_what_has_wrapped_it_is_gone_every_tool_gets_the_model_out(tool):
    model = correct(Net(), 2)
    layer, inner = stuck(model)
    layer.forward = inner
    tool(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert set(momenta(restore(model)).values()) == {0.1}
    assert applied(model) == {}


@pytest.mark.parametrize("compiled", [False, True])
def test_update_once_may_be_put_on_where_a_block_has_left_something(compiled):
    model = Net()
    layer, inner = stuck(model)
    layer.forward = inner
    update_once(model)
    before = counters(model)
    if compiled:
        model.b = torch.compile(model.b, backend="aot_eager")
    one(model, *data(1), non_reentrant)
    assert {name.replace("_orig_mod.", "") for name in counters(model)} == before.keys()
    assert sum(counters(model).values()) == sum(before.values()) + 3


def test_two_threads_can_calibrate_a_model_each_at_once():
    models, reports, both = [Net(), Net()], {}, threading.Barrier(2, timeout=20)

    def calibrating_one(which):
        with calibrate(models[which]) as reports[which]:
            both.wait()
            (nested if which else one)(models[which], *data(1), non_reentrant)
            both.wait()

    threads = [threading.Thread(target=calibrating_one, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [reports[which].passes for which in (0, 1)] == [same(2), {"a.1": 2, "b.1": 3, "c.1": 2}]
