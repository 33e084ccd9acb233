"""What is set, replaced or written to on modules between a forward pass and its recomputation."""

import contextlib
import copy
import functools
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.modules import module as torchs_module
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import (
    CheckpointError,
)

from momentum_fix import calibrate
from states import (
    Block,
    kept,
    picture,
)
from twins import (
    EXACT,
    TORCHS_WARNINGS,
    by_context,
    drop_in,
    drop_in_reentrant,
    non_reentrant,
    plainly,
    reentrant,
)

pytestmark = TORCHS_WARNINGS


# Blocks of torch's own modules.


class Reader(nn.Module):
    """Reads the statistics of another layer by a name that its code does not have."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x).tanh() * (1 + next(self.norm.buffers()).clone())


class Iterated(nn.Sequential):
    def __iter__(self):
        return super().__iter__()


class Looked(nn.Sequential):
    @property
    def size(self):
        return len(self)


class OnlyMade(nn.Sequential):
    """A block of a library, as most are."""

    channels: int

    def __init__(self, *layers):
        super().__init__(*layers)
        self.channels = 3


def hooked(block):
    block[0].register_forward_hook(lambda *_: None)
    return block


def patched(block):
    block[0].forward = block[0].forward
    return block


BLOCKS = {
    "torch's own": (lambda: nn.Sequential(nn.BatchNorm1d(3)), False),
    "a norm alone": (lambda: nn.BatchNorm1d(3), False),
    "a class that makes a block of torch's": (lambda: OnlyMade(OnlyMade(nn.BatchNorm1d(3))), True),
    "a class of a user's": (lambda: Block(nn.BatchNorm1d(3)), True),
    "a class of a user's below": (lambda: nn.Sequential(Block(nn.BatchNorm1d(3))), True),
    "a method of a user's": (lambda: Iterated(nn.BatchNorm1d(3)), True),
    "a property of a user's": (lambda: Looked(nn.BatchNorm1d(3)), True),
    "a hook": (lambda: hooked(nn.Sequential(nn.BatchNorm1d(3))), True),
    "a hook before": (lambda: nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3)), True),
    "a parametrization": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 3))), True),
    "another forward": (lambda: patched(nn.Sequential(nn.BatchNorm1d(3))), True),
}


@pytest.mark.parametrize(("make", "copies"), BLOCKS.values(), ids=BLOCKS)
def test_buffers_are_copied_if_anything_but_torchs_own_modules_is_there_and_only_then(make, copies):
    block = make()
    held, for_good = kept(block, torch.rand(2, 3, requires_grad=True))
    assert for_good == 0
    assert held >= sum(each.nbytes for each in block.buffers()) > 0 if copies else held == 0


def steeper(block, slope):
    block[0].negative_slope = slope


def shifted(block, by):
    block[1].bias.data += by


def replaced(block, factor):
    block[1].weight = nn.Parameter(block[1].weight * factor, requires_grad=False)


def thawed(block, slope):
    block[2].train()


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("moves", [steeper, shifted, replaced, thawed])
def test_what_is_set_on_torchs_own_modules_after_a_forward_is_not_seen_in_its_recomputation(moves, ckpt):
    gradients, pictures = [], []
    for by in (plainly, ckpt, non_reentrant):
        torch.manual_seed(0)
        layers = nn.Linear(3, 3).requires_grad_(False), nn.BatchNorm1d(3, momentum=0.0).train(moves is not thawed)
        block, losses = nn.Sequential(nn.LeakyReLU(0.5), *layers, nn.Sigmoid()), []
        x = torch.arange(-6.0, 6.0).reshape(4, 3).requires_grad_()
        for value in (0.25, 0.125):  # a schedule, or a teacher
            losses.append(by(block, x).square().sum())
            moves(block, value)
        with contextlib.suppress(torch.utils.checkpoint.CheckpointError if by is non_reentrant else ()):
            sum(losses).backward()
        gradients.append(x.grad if x.grad is not None else torch.zeros(0))
        pictures.append(picture(block))
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_a_loss_may_get_other_weights_after_the_forward(ckpt):
    gradients = []
    for by in (plainly, ckpt, non_reentrant):
        loss, losses = nn.CrossEntropyLoss(weight=torch.ones(3)), []
        x = torch.arange(12.0).sin().reshape(4, 3).requires_grad_()
        for weight in (1.0, 2.0):
            loss.weight = torch.tensor([weight, 2, 3])
            losses.append(by(loss, x, torch.tensor([0, 1, 2, 0])))
        sum(losses).backward()
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_a_norm_may_lose_its_statistics_after_the_forward(ckpt):
    gradients = []
    for by in (plainly, ckpt):
        layer = nn.BatchNorm1d(3)
        x = torch.arange(12.0).sin().reshape(4, 3).requires_grad_()
        loss = by(layer, x).square().sum()
        layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        loss.backward()
        assert all(buffer is None for buffer in layer._buffers.values())
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def gradient_of_three(block, ckpt):
    """Give the gradient of three batches, all of which run forward before one backward pass."""
    x = torch.arange(12.0).sin().reshape(4, 3).requires_grad_()
    sum(ckpt(block, x).square().sum() for _ in range(3)).backward()
    return x.grad


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_a_global_hook_of_somebody_elses_may_read_buffers(ckpt):
    def reads(module, _, output):
        return output.tanh() * (1 + module.running_mean) if hasattr(module, "running_mean") else None

    hook = torchs_module.register_module_forward_hook(reads)
    try:
        true, mine, wrong = (
            gradient_of_three(nn.Sequential(nn.BatchNorm1d(3)), each) for each in (plainly, ckpt, non_reentrant)
        )
    finally:
        hook.remove()
    assert torch.equal(mine, true)
    assert not torch.equal(wrong, true)


def reading(self, x):
    return nn.BatchNorm1d.forward(self, x).tanh() * (1 + self.running_mean.clone())


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_a_class_that_gets_a_forward_of_its_own_is_no_longer_torchs(ckpt):
    class Sub(nn.BatchNorm1d):
        pass

    for forward in (None, reading, functools.partialmethod(reading), nn.BatchNorm1d.forward):
        if forward is not None:
            Sub.forward = forward
        true, mine, wrong = (gradient_of_three(Sub(3), each) for each in (plainly, ckpt, non_reentrant))
        assert torch.equal(mine, true)
        assert torch.equal(wrong, true) == (forward in (None, nn.BatchNorm1d.forward))


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_whoever_reads_the_statistics_of_a_norm_layer_reads_what_the_forward_read(ckpt):
    reader = Reader(nn.BatchNorm1d(3))
    truth, wrong = copy.deepcopy(reader), copy.deepcopy(reader)
    gradients = []
    for each, by in ((truth, plainly), (reader, ckpt), (wrong, non_reentrant)):
        x = torch.arange(12.0).reshape(4, 3).requires_grad_()
        by(each, x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])
    assert picture(reader) == picture(truth)


# Trained parameters that the forward writes to.


def visibly(parameter, value):
    with torch.no_grad():
        parameter.copy_(value)


def by_data(parameter, value):
    parameter.data.copy_(value)


def in_a_buffer(module):
    module.register_buffer("done", torch.tensor(False))
    return lambda: not module.done and bool(module.done.fill_(True))


def in_a_buffer_unseen(module):
    module.register_buffer("done", torch.tensor(False))
    return lambda: not module.done and bool(module.done.data.fill_(True))


def in_a_frozen_parameter(module):
    module.done = nn.Parameter(torch.zeros(()), requires_grad=False)
    return lambda: not module.done and bool(module.done.fill_(1))


def in_an_array(module):
    module.done = np.zeros(1)
    return lambda: not module.done[0] and not module.done.fill(1)


def in_another_module(module):
    module.norm = nn.BatchNorm1d(1)
    return lambda: not module.norm.num_batches_tracked and bool(module.norm.num_batches_tracked.fill_(1))


def in_a_number(module):
    module.done = False
    return lambda: not module.done and not setattr(module, "done", True)


def in_a_list(module):
    module.done = [[]]
    return lambda: not module.done[0] and not module.done[0].append(1)


class TransformedOnce(nn.Module):
    """Transforms a weight before its first use, and notes that it has."""

    def __init__(self, guard, write):
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)
        self.is_due, self.write = guard(self), write

    def forward(self, x):
        if self.is_due():
            self.write(self.weight, self.weight.detach() * 0.5)
        return (self.linear(x) * self.weight).tanh()


WRITES = [visibly, by_data]
GUARDS = [
    in_a_buffer,
    in_a_buffer_unseen,
    in_a_frozen_parameter,
    in_an_array,
    in_another_module,
    in_a_number,
    in_a_list,
]


UNSEEN_GUARDS = (in_a_buffer_unseen, in_another_module)  # nothing tells of a write that autograd has not seen either


def values_and_gradients(module):
    return [(each.tolist(), None if each.grad is None else each.grad.tolist()) for each in module.parameters()]


@pytest.mark.filterwarnings("ignore:a parameter of shape")
@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("guard", GUARDS)
def test_a_recomputation_that_transforms_a_weight_again_is_refused_and_undone(guard, write, ckpt):
    def made():
        torch.manual_seed(0)
        return TransformedOnce(guard, write), torch.ones(2, 3, requires_grad=True)

    (truth, y), (plain, z), (module, x) = made(), made(), made()
    truth(y).sum().backward()
    non_reentrant(plain, z).sum().backward()
    assert values_and_gradients(plain) == values_and_gradients(truth)  # so it is preserving that has to refuse
    loss = ckpt(module, x).sum()
    if guard in UNSEEN_GUARDS:
        loss.backward()
        return  # docs/limits.md says so
    with pytest.raises(RuntimeError, match="wrote to parameters that its forward pass had written to") as error:
        loss.backward()
    assert truth.weight.tolist() == [0.5] * 3
    assert module.weight.tolist() == [0.5] * 3
    assert "They are as the forward pass left them" in str(error.value)
    assert not module.is_due()


class Clamps(nn.Module):
    """Keeps its weight in a range, in each forward, and counts."""

    def __init__(self, write):
        super().__init__()
        self.weight, self.steps, self.write = nn.Parameter(torch.arange(3.0)), 0, write

    def forward(self, x):
        self.write(self.weight, self.weight.detach().clamp(max=1))
        self.steps += 1
        return (x * self.weight / self.steps).sin()


@pytest.mark.filterwarnings("ignore:a parameter of shape")
@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_changes_nothing_the_second_time_is_not_refused(write, ckpt):
    modules = [Clamps(write) for _ in range(3)]
    for module, by in zip(modules, (plainly, ckpt, non_reentrant), strict=True):
        for _ in range(2):
            by(module, torch.ones(3, requires_grad=True)).sum().backward()
    true, mine, wrong = map(values_and_gradients, modules)
    assert mine == true
    assert wrong != true


class Decays(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(0.5)
        return x * self.weight


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_a_trained_parameter_that_the_forward_writes_to_is_warned_of(ckpt):
    module, x = nn.Sequential(nn.Linear(2, 2), Decays()), torch.ones(3, 2, requires_grad=True)
    with pytest.warns(UserWarning, match=r"a parameter of shape \(2,\) was written to.*keep such state in a buffer"):
        ckpt(module, x).sum().backward()
    assert module[1].weight.eq(0.25).all()  # as torch's checkpoint does: no state tells that it has been written to


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("within", ["torch's", "a user's"])
def test_the_weight_that_an_embedding_renormalizes_is_not_warned_of(within, kind, ckpt):
    found = []
    for by in (ckpt, plainly):
        torch.manual_seed(0)
        block, x = nn.Sequential(kind(4, 3, max_norm=0.5), nn.Tanh()), torch.ones(3, requires_grad=True)
        index = torch.arange(4)[:, None]
        if within == "torch's":
            loss = by(block, index).sum()
        else:
            loss = (by(lambda x, index=index, block=block: block(index) * x, x)).sum()
        if loss.requires_grad:  # not if the reentrant engine is given an index alone
            loss.backward()
            found.append(block[0].weight.grad)
        assert block[0].weight.norm(dim=1).max() <= 0.5
    assert torch.equal(found[0], found[-1])


# What is changed by hand between the forward and its recomputation, and modules that are found by names.


def another_weight(block):
    block[0].weight = nn.Parameter(block[0].weight.detach() * 2)


def another_forward(block):
    block[2].forward = lambda x: x.sin().sin()


class OfAUsers(nn.Sequential):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("kind", [nn.Sequential, OfAUsers])
@pytest.mark.parametrize("change", [another_weight, another_forward])
def test_what_is_put_on_a_block_after_its_forward_is_not_recomputed(change, kind, ckpt):
    found = []
    for by in (plainly, ckpt, non_reentrant):
        torch.manual_seed(0)
        block, x = kind(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()), torch.rand(8, 3).requires_grad_()
        loss, weight = by(block, x).square().sum(), block[0].weight
        change(block)
        present = block[0].weight, vars(block[2]).get("forward")
        try:
            loss.backward()
        except CheckpointError:
            found.append(None)
            continue
        assert (block[0].weight, vars(block[2]).get("forward")) == present
        found.append((x.grad, weight.grad))
    true, mine, wrong = found
    assert all(map(torch.equal, mine, true))
    assert wrong is None or wrong[1] is None or not all(map(torch.equal, wrong, true))


@pytest.mark.filterwarnings("ignore:only the decay is right")
@pytest.mark.parametrize(
    ("ckpt", "passes"), [(by_context, 3), (drop_in, 3), (drop_in_reentrant, 3), (non_reentrant, 4)]
)
def test_in_compiled_code_calibrate_does_not_count_what_is_preserved(ckpt, passes):
    torch.compiler.reset()
    block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh())
    compiled = torch.compile(block, backend="aot_eager")
    with calibrate(block) as report:
        for engine in (non_reentrant, ckpt):
            engine(compiled, torch.rand(4, 3, requires_grad=True)).sum().backward()
    assert report.passes == {"1": Fraction(passes, 2)}


def registers_itself_again(layer):
    def hook(module, args, output):
        module.handle.remove()
        module.handle = module.register_forward_hook(hook)
        return output * 2

    layer.handle = layer.register_forward_hook(hook)


def removes_itself(layer):
    def hook(module, args, kwargs, output):
        handle.remove()
        return output * 2

    handle = layer.register_forward_hook(hook, with_kwargs=True)


class Own(nn.Module):
    def forward(self, x):
        return x.tanh()


@pytest.mark.parametrize("layer", [nn.Tanh, Own])
@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("put_on", [registers_itself_again, removes_itself])
def test_a_hook_that_removes_itself_is_there_in_the_recomputation_and_gone_afterwards(put_on, ckpt, layer):
    def trained(ckpt):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), layer(), nn.Linear(3, 3), nn.Tanh())
        put_on(model[1])
        for _ in range(2):
            ckpt(model, torch.rand(4, 3, requires_grad=True)).sum().backward()
        return model[0].weight.grad, len(model[1]._forward_hooks), len(model[1]._forward_hooks_with_kwargs)

    (mine, *hooks), (true, *there) = trained(ckpt), trained(plainly)
    assert torch.equal(mine, true)
    assert hooks == there
    assert put_on is registers_itself_again or not torch.equal(trained(non_reentrant)[0], true)


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_a_hook_that_comes_after_the_forward_pass_is_none_of_the_recomputation(ckpt):
    def gradient(ckpt):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh())
        loss = ckpt(model, torch.rand(4, 3, requires_grad=True)).sum()
        handle = model[1].register_forward_hook(lambda module, args, output: output * 2)
        loss.backward()
        assert len(model[1]._forward_hooks) == 1
        handle.remove()
        assert not model[1]._forward_hooks
        return model[0].weight.grad

    assert torch.equal(gradient(ckpt), gradient(plainly))
    assert not torch.equal(gradient(reentrant), gradient(plainly))


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_a_backward_hook_on_a_layer_of_torchs_is_called_once_and_its_gradients_count(ckpt):
    def trained(ckpt):
        torch.manual_seed(0)
        block, x, calls = nn.Sequential(nn.BatchNorm1d(3), nn.Tanh()).double(), torch.rand(4, 3).double(), []
        block[1].register_full_backward_hook(lambda module, given, wanted: calls.append(1) or (given[0] * 2,))
        ckpt(block, x.requires_grad_()).sum().backward()
        return x.grad, block[0].weight.grad, torch.tensor(len(calls))

    assert all(map(torch.equal, trained(ckpt), trained(plainly)))


class WritesToItsLayers(nn.Module):
    """Keeps what it needs to know in lists and options of torch's own layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0), nn.BatchNorm1d(3))
        self.layers[0].seen = []

    def forward(self, x):
        self.layers[0].seen.append(1)
        self.layers[1].p = self.layers[1].p + 0.1
        x = self.layers(x) * len(self.layers[0].seen)
        return x + self.layers[2].running_mean


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_what_a_forward_writes_to_layers_of_torchs_is_preserved(ckpt):
    def trained(ckpt):
        torch.manual_seed(0)
        block = WritesToItsLayers().double()
        for _ in range(2):
            ckpt(block, torch.rand(4, 3).double().requires_grad_()).sum().backward()
        return [*(each.grad for each in block.parameters()), *block.buffers()], block.layers[0].seen, block.layers[1].p

    (mine, *rest), (true, *there), (wrong, *_) = trained(ckpt), trained(plainly), trained(reentrant)
    assert all(map(torch.equal, mine, true))
    assert rest == there
    assert not all(map(torch.equal, wrong, true))


class Twins(nn.Module):
    """Two modules that share all that is on them, of which the forward moves a part."""

    def __init__(self):
        super().__init__()
        self.one = Taught()
        self.other = copy.copy(self.one)
        self.other.__dict__ = self.one.__dict__

    def forward(self, x):
        return self.other(self.one(x))


class Taught(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.steps = nn.Linear(3, 3), 0
        self.teacher = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        self.steps += 1
        with torch.no_grad():
            self.teacher.mul_(1.1)
        return (self.layer(x) * self.teacher.clone() * self.steps).sin()


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_modules_that_share_what_is_on_them_are_preserved_and_have_it_afterwards(ckpt):
    def trained(ckpt):
        torch.manual_seed(0)
        block = Twins().double()
        teacher = block.one.teacher
        for _ in range(2):
            ckpt(block, torch.rand(4, 3).double().requires_grad_()).sum().backward()
        assert block.one.teacher is block.other.teacher is teacher
        return block.one.layer.weight.grad, teacher, torch.tensor(block.other.steps)

    assert all(map(torch.equal, trained(ckpt), trained(plainly)))
    assert not all(map(torch.equal, trained(non_reentrant), trained(plainly)))


def test_trained_weights_are_compared_only_if_the_forward_has_changed_what_may_guard_them(monkeypatch):
    compared = []
    monkeypatch.setattr(
        "momentum_fix.state.checkpoint_call._refuse_writes", lambda values: compared.append(len(values))
    )
    for block in (nn.BatchNorm1d(3).requires_grad_(False), Taught()):
        by_context(nn.Sequential(nn.Linear(3, 3), block), torch.rand(4, 3, requires_grad=True)).sum().backward()
    assert compared == [0, 4]
