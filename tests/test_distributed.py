"""Two processes: under every wrapper the statistics are those of the same distributed run without checkpointing."""

import copy
import functools
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

import recipes
import twins
from momentum_fix import calibrate, correct, corrected_momentum, diagnose, preserve_everywhere, update_once
from twins import ROUNDING, batches, deviation, momenta, non_reentrant, plainly, same_path, statistics, train

BOTH = {"outer.1": 2, "inner.1": 3}


class Net(nn.Module):
    """Runs its blocks under the checkpoint function that it is given, one of them in another."""

    def __init__(self):
        super().__init__()
        self.outer = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Tanh())
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Tanh())
        self.ckpt = plainly

    def forward(self, x):
        return self.ckpt(lambda y: self.ckpt(self.inner, self.outer(y)).tanh(), x)


def step(model, x, _):
    model(x).square().sum().backward()


def run_every_method(wrap, rank, prefix=""):
    """Train the wrapped network with each method and compare it with the wrapped, uncheckpointed one."""
    data = batches(4, 4, 3, 4, 4, seed=rank)
    net = Net()

    def made(ckpt):
        wrapped = wrap(copy.deepcopy(net))
        next(module for module in wrapped.modules() if isinstance(module, Net)).ckpt = ckpt
        return wrapped

    def run(model, part=data):
        return train(model, step, part, None)

    truth, uncorrected = run(made(plainly)), run(made(non_reentrant))
    passes = {prefix + name: k for name, k in BOTH.items()}
    corrected = run(correct(made(non_reentrant), passes))
    calibrated = made(non_reentrant)
    with calibrate(calibrated) as report:
        run(calibrated, data[:1])
    run(calibrated, data[1:])
    once = made(non_reentrant)
    update_once(once)
    run(once)
    assert report.passes == passes
    assert momenta(calibrated) == {name: corrected_momentum(0.1, k) for name, k in passes.items()}
    assert deviation(uncorrected, truth) > 1e-3
    assert deviation(corrected, truth) < ROUNDING
    assert deviation(calibrated, truth) < ROUNDING
    assert deviation(once, truth) == 0
    return truth, uncorrected, corrected, calibrated, once


def check_ddp(rank):
    truth, *others = run_every_method(DistributedDataParallel, rank, "module.")
    assert all(same_path(model, truth) for model in others)


def shard(model):
    fully_shard(model.outer)
    fully_shard(model.inner)
    return fully_shard(model)


def check_fsdp2(rank):
    run_every_method(shard, rank)


def check_torchs_own_checkpointing(rank):
    data = batches(4, 4, 3, 4, 4, seed=rank)
    net = recipes.Net()
    wrap = functools.partial(apply_activation_checkpointing, check_fn=lambda module: isinstance(module, nn.Sequential))
    ends = []
    methods = None, calibrate, update_once, preserve_everywhere
    for checkpointed, method in ((False, None), *((True, each) for each in methods)):
        model = copy.deepcopy(net)
        if checkpointed:
            wrap(model)
        model = DistributedDataParallel(model)
        if method is update_once:
            update_once(model)
        if method is calibrate:
            with calibrate(model) as report:
                train(model, step, data[:1], None)
            assert set(report.values()) == {2}
        with preserve_everywhere() if method is preserve_everywhere else nullcontext(), diagnose(model) as report:
            train(model, step, data[1 if method is calibrate else 0 :], None)
        assert report.ok is (method is not None)
        ends.append(list(statistics(model).values()))
    truth, uncorrected, calibrated, once, everywhere = ends
    assert all(not torch.allclose(mine, true, rtol=1e-3) for mine, true in zip(uncorrected, truth, strict=True))
    torch.testing.assert_close(calibrated, truth, rtol=ROUNDING, atol=ROUNDING)
    for exact in (once, everywhere):
        assert all(torch.equal(mine, true) for mine, true in zip(exact, truth, strict=True))


def check_agreement(rank):
    (x,) = batches(1, 4, 3, 4, 4, seed=rank)
    model = Net()
    model.ckpt = non_reentrant if rank == 0 else plainly
    said = r"each rank keeps its own count.*Layers: outer\.1, inner\.1\."  # stages of one class, say, or a mistake
    with pytest.warns(UserWarning, match=said), calibrate(model) as report:
        step(model, x, None)
    assert report.passes == ({"outer.1": 2, "inner.1": 3} if rank == 0 else {"outer.1": 1, "inner.1": 1})
    assert momenta(model) == {name: corrected_momentum(0.1, k) for name, k in report.items()}

    model = Net()  # a layer that only one rank has run
    with calibrate(model) as report:
        non_reentrant(model.outer, x.requires_grad_()).sum().backward()
        if rank == 0:
            non_reentrant(model.inner, x).sum().backward()
    assert report.passes == {"outer.1": 2, "inner.1": 2}
    assert set(momenta(model).values()) == {corrected_momentum(0.1, 2)}
    assert report.rows[1].note == ("" if rank == 0 else "as counted on another rank")

    stage = nn.Sequential(nn.BatchNorm2d(3), nn.Tanh()) if rank == 0 else Net().inner  # parts of a pipeline
    with calibrate(stage) as report:
        (non_reentrant if rank == 0 else plainly)(stage, x).sum().backward()
    assert report.passes == ({"0": 2} if rank == 0 else {"1": 1})


class Stage(nn.Module):
    def __init__(self, ckpt):
        super().__init__()
        self.block, self.ckpt = Net().outer, ckpt

    def forward(self, x):
        return self.ckpt(self.block, x)


def check_pipelines(rank):
    """Two stages, four micro-batches: what their schedules make of the statistics of each stage."""
    data = batches(3, 8, 3, 4, 4)
    found = {}
    for schedule_of in (ScheduleGPipe, Schedule1F1B):
        for name, ckpt in (
            ("truth", plainly),
            ("nothing", non_reentrant),
            ("correct", non_reentrant),
            ("once", non_reentrant),
        ):
            torch.manual_seed(rank)
            module = Stage(ckpt)
            if name == "correct":
                correct(module, 2)
            if name == "once":
                update_once(module)
            part = torch.empty(2, 3, 4, 4, requires_grad=True)  # else a trial forward finds the shapes, and counts
            stage = PipelineStage(module, rank, 2, torch.device("cpu"), input_args=part, output_args=part)
            schedule = schedule_of(stage, n_microbatches=4, loss_fn=lambda y, _: y.square().sum())
            for x in data:
                schedule.step(x) if rank == 0 else schedule.step(target=x)
            found[schedule_of.__name__, name] = module
    for kind in ("ScheduleGPipe", "Schedule1F1B"):
        truth = found[kind, "truth"]
        assert deviation(found[kind, "nothing"], truth) > 1e-3
        assert deviation(found[kind, "once"], truth) == 0
        consecutive = kind == "Schedule1F1B" and rank == 1  # the last stage runs each micro-batch back at once
        assert (deviation(found[kind, "correct"], truth) < ROUNDING) == consecutive


@pytest.mark.parametrize(
    "check", [check_ddp, check_fsdp2, check_torchs_own_checkpointing, check_agreement, check_pipelines]
)
def test_two_ranks(check, tmp_path):
    twins.on_two_ranks(check, tmp_path)
