"""torch_remat: what its recomputed and its saved regions do to state, and which of our tools are for it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError

import momentum_fix
from momentum_fix import calibrate, correct, diagnose, preserve_everywhere, preserve_state, update_once
from pages import blocks, definitions
from twins import ROUNDING, batches, counters, non_reentrant, plainly, statistics, train

remat = pytest.importorskip("torch_remat", reason="it needs torch 2.10")
PAGE = {}
for _, code, _ in blocks("remat.md"):
    definitions(code, "remat.md", PAGE)
Buffers = PAGE["Buffers"]  # the hook that the page gives


class Normalizer(nn.Module):
    """Divides by an average that it has just moved."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_square", torch.ones(4))

    def forward(self, x):
        self.running_square.lerp_(x.detach().square().mean(0), 0.1)
        return x / self.running_square.sqrt()


class Block(nn.Module):
    def __init__(self, layer=nn.BatchNorm1d, sizes=(4,)):
        super().__init__()
        self.recomputed = nn.Sequential(nn.Linear(4, 4), layer(*sizes), nn.Tanh())
        self.saved = nn.Sequential(nn.Linear(4, 4), layer(*sizes), nn.Tanh())

    def forward(self, x):
        y = remat.region(self.saved, "saved", recompute=False)(self.recomputed(x))
        remat.recompute_needs_tensor(y)
        return y * y


class OneLayerInBoth(nn.Module):
    """Runs one layer in a saved region, and then recomputes it."""

    def __init__(self):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(4, 4), Normalizer(), nn.Linear(4, 4)

    def forward(self, x):
        y = remat.region(self.layer, "layer", recompute=False)(self.first(x))
        remat.recompute_needs_tensor(y)
        return self.last(self.layer(y).tanh()).tanh()


def once(model, x, ckpt):
    ckpt(model, x.requires_grad_()).square().sum().backward()


def twice(model, x, ckpt):
    loss = ckpt(model, x.requires_grad_()).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()


def remats(function, *args):
    return remat.checkpoint()(function)(*args)


def go(model, ckpt, data=None, step=once):
    return train(model, step, batches(4, 8, 4) if data is None else data, ckpt)


def wrong(model, truth):
    """Give the largest relative deviation of the statistics in the recomputed and in the saved region."""
    found = {"recomputed": 0.0, "saved": 0.0}
    true = statistics(truth)
    for name, mine in statistics(model).items():
        part = name.split(".")[0]
        found[part] = max(found[part], float((mine - true[name]).abs().max() / true[name].abs().max()))
    return found["recomputed"], found["saved"]


@pytest.fixture
def block_and_truth():
    block = Block()
    return block, go(copy.deepcopy(block), plainly)


def test_with_nothing_a_recomputed_region_is_wrong_and_a_saved_one_is_right(block_and_truth):
    block, truth = block_and_truth
    recomputed, saved = wrong(go(block, remats), truth)
    assert recomputed > 1e-2
    assert saved == 0


def test_update_once_is_exact_in_both(block_and_truth):
    block, truth = block_and_truth
    with update_once(block):
        go(block, remats)
    assert wrong(block, truth) == (0, 0)
    assert counters(block) == counters(truth)


def test_calibrate_counts_two_and_one_and_is_equal(block_and_truth):
    block, truth = block_and_truth
    data = batches(4, 8, 4)
    with calibrate(block) as report:
        go(block, remats, data[:1])
    go(block, remats, data[1:])
    assert report.passes == {"recomputed.1": 2, "saved.1": 1}
    assert max(wrong(block, truth)) < ROUNDING


def test_one_root_for_all_makes_the_saved_region_wrong(block_and_truth):
    block, truth = block_and_truth
    each = correct(copy.deepcopy(block), {"recomputed.1": 2, "saved.1": 1})
    recomputed, saved = wrong(go(correct(block, passes=2), remats), truth)
    assert recomputed < ROUNDING
    assert saved > 1e-2
    assert max(wrong(go(each, remats), truth)) < ROUNDING


# Layers that read what they change.


def with_hook(model, *args):
    return remat.checkpoint(recompute_state_hooks=(Buffers(model),))(model)(*args)


def around(model, *args):
    return momentum_fix.checkpoint(remats, model, *args, use_reentrant=False)


def context_around(model, *args):
    return non_reentrant(remats, model, *args, context_fn=preserve_state)


def inside(model, *args):
    return remats(lambda *inner: momentum_fix.checkpoint(model, *inner, use_reentrant=False), *args)


def equal(model, truth):
    mine, true = ([*each.buffers(), *(parameter.grad for parameter in each.parameters())] for each in (model, truth))
    return all(map(torch.equal, mine, true))


def everywhere(model, *args):
    with preserve_everywhere():
        return remats(model, *args)


READ = [lambda: Block(Normalizer, ()), OneLayerInBoth]


@pytest.mark.parametrize("step", [once, twice])
@pytest.mark.parametrize("made", READ, ids=["one layer in each", "one layer in both"])
def test_its_own_hook_is_exact(made, step):
    model = made()
    truth = go(copy.deepcopy(model), plainly, step=step)
    assert not equal(go(copy.deepcopy(model), remats, step=step), truth)
    assert equal(go(model, with_hook, step=step), truth)


@pytest.mark.parametrize("made", READ, ids=["one layer in each", "one layer in both"])
@pytest.mark.parametrize("ckpt", [around, context_around])
def test_around_its_checkpoint_preserve_state_and_the_drop_in_are_of_no_use(made, ckpt):
    model = made()
    truth = go(copy.deepcopy(model), plainly)
    assert not equal(go(model, ckpt), truth)


@pytest.mark.parametrize("made", READ, ids=["one layer in each", "one layer in both"])
def test_inside_of_it_torch_notices_that_other_tensors_are_recomputed(made):
    with pytest.raises(CheckpointError, match="different metadata than during the forward pass"):
        go(made(), inside)


@pytest.mark.parametrize("step", [once, twice])
def test_preserve_everywhere_is_exact_unless_a_layer_is_in_both_regions(step):
    for made in READ:
        model = made()
        truth = go(copy.deepcopy(model), plainly, step=step)
        assert equal(go(model, everywhere, step=step), truth) is (made is not OneLayerInBoth)


@pytest.mark.parametrize("ckpt", [remats, with_hook, everywhere])
@pytest.mark.parametrize("made", [Block, *READ], ids=["BatchNorm", "one layer in each", "one layer in both"])
def test_diagnose_says_of_its_recomputations_what_the_uncheckpointed_run_says(made, ckpt):
    model = made()
    truth, (x,) = copy.deepcopy(model), batches(1, 8, 4)
    once(truth, x.clone(), plainly)
    with diagnose(model) as report:
        once(model, x.clone(), ckpt)
    gradients, true = ([parameter.grad for parameter in each.parameters()] for each in (model, truth))
    assert report.gradients_right is all(map(torch.equal, gradients, true))
    assert report.ok is equal(model, truth)


def test_its_checkpoint_takes_no_context_fn():
    with pytest.raises(TypeError, match="unexpected keyword argument 'context_fn'"):
        remat.checkpoint(context_fn=preserve_state)
