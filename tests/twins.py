"""Two runs of one model on the same batches: with checkpointing and without."""

import copy
import os
import sys
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.utils.checkpoint
from torch import nn
from torch.utils.checkpoint import checkpoint

import momentum_fix
from momentum_fix import calibrate, preserve_state
from momentum_fix.norms.layers import tracked_layers

TORCHS_WARNINGS = [  # for `pytestmark`: what torch says of what these tests do on purpose
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated"),
]

ROUNDING = 1e-12  # relative, in float64


def plainly(function, *args, **_):
    """Stand in for `torch.utils.checkpoint.checkpoint` in the uncheckpointed run."""
    return function(*args)


def reentrant(function, *args, **kwargs):
    return checkpoint(function, *args, use_reentrant=True, **kwargs)


def non_reentrant(function, *args, **kwargs):
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


def by_context(function, *args, **kwargs):
    return non_reentrant(function, *args, context_fn=preserve_state, **kwargs)


def drop_in(function, *args, **kwargs):
    return momentum_fix.checkpoint(function, *args, use_reentrant=False, **kwargs)


def drop_in_reentrant(function, *args):
    return momentum_fix.checkpoint(function, *args, use_reentrant=True)


tells_of_compilation = pytest.mark.skipif(
    not hasattr(torch.utils.checkpoint._CheckpointFrame, "save_inputs"),
    reason="before torch 2.12 nobody hears of a checkpoint that is compiled with its model",
)
EXACT = {"context_fn": by_context, "drop-in": drop_in, "drop-in, reentrant": drop_in_reentrant}


def torchs_checkpoint():
    """Give all that is in torch's module and in the function of its reentrant engine, to see whether it is changed."""
    module = torch.utils.checkpoint
    return [(name, getattr(owner, name)) for owner in (module, module.CheckpointFunction) for name in vars(owner)]


def batches(count, *shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) * (1 + i % 3) + i % 2 for i in range(count)]


def statistics(model):
    """Give running_mean and running_var of every layer by name."""
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}


def counters(model):
    return {name: int(buffer) for name, buffer in model.named_buffers() if "num_batches" in name}


def momenta(model):
    return {aliases[0]: layer.momentum for layer, aliases in tracked_layers(model).items()}


def deviation(model, truth):
    """Give the largest deviation of the running statistics, relative to the largest value of each buffer."""
    mine, true = statistics(model), statistics(truth)
    assert mine.keys() == true.keys() != set()
    return max(float((mine[name] - true[name]).abs().max() / true[name].abs().max().clamp(min=1e-300)) for name in true)


def same_path(model, truth):
    """Tell whether weights and gradients are equal bit for bit."""
    for mine, true in zip(model.parameters(), truth.parameters(), strict=True):
        if (mine.grad is None) != (true.grad is None) or not torch.equal(mine, true):
            return False
        if mine.grad is not None and not torch.equal(mine.grad, true.grad):
            return False
    return True


def train(model: nn.Module, step: Callable, data, ckpt) -> nn.Module:
    """Run `step(model, x, ckpt)`, which calls backward, and plain SGD over the data; return the model."""
    for x in data:
        model.zero_grad()
        step(model, x, ckpt)
        descend(model)
    return model


def descend(model, rate=0.01):
    """Do one step of plain SGD."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad


def three(model, step, data, ckpt, fixed):
    """Train the truth, an uncorrected and a fixed copy of the model; return them in this order."""
    truth = train(copy.deepcopy(model), step, data, plainly)
    uncorrected = train(copy.deepcopy(model), step, data, ckpt)
    return truth, uncorrected, fixed(copy.deepcopy(model), step, data, ckpt)


def calibrating(model, step, data, ckpt):
    """Calibrate the first step, check that it left no trace but the momentum, and train on; `found` is the report."""
    first = train(copy.deepcopy(model), step, data[:1], plainly)
    with calibrate(model) as report:
        train(model, step, data[:1], ckpt)
    assert same_path(model, first)
    assert all(torch.equal(mine, statistics(first)[name]) for name, mine in statistics(model).items())
    assert counters(model) == counters(first)
    model.found = report
    return train(model, step, data[1:], ckpt)


def on_two_ranks(work, folder):
    """Run `work(rank)` in two processes that know each other; work and what it needs have to be picklable."""
    mp.spawn(_run_rank, args=(work, folder), nprocs=2)


def _run_rank(rank, work, folder):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    work(rank)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torch's threads may not be done yet; under load, an interpreter that ends meanwhile has been aborted
