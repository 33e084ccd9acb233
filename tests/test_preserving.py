"""preserve_state and checkpoint: state and gradients are those of the run without checkpointing, whatever is state."""

import contextlib
import copy
import functools
import gc
import inspect
import pickle
import random
import sys
import threading
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.utils.checkpoint
from torch import nn
from torch._dynamo.utils import counters as compiler_counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.modules import module as torchs_module
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import CheckpointPolicy, checkpoint_sequential, create_selective_checkpoint_contexts

import momentum_fix
import recipes
from conformance import WRAPPERS
from momentum_fix import preserve_state, preserving, state
from recipes import StoppedError, pipeline, siamese, twice_in_a_region
from states import (
    KINDS,
    ONLY_WRITTEN,
    READ,
    UNHARMED,
    Block,
    Normalizer,
    Record,
    Steps,
    gradients,
    net_of,
    picture,
    run,
    same_gradients,
)
from twins import EXACT, batches, by_context, drop_in, drop_in_reentrant, non_reentrant, plainly, reentrant, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated"),
]


def pipeline_backwards(net, x, ckpt):
    losses = [ckpt(net, micro).sum() for micro in x.requires_grad_().chunk(2)]
    for loss in reversed(losses):
        loss.backward(retain_graph=True)


def bound_method(net, x, ckpt):
    ckpt(net.forward, x.requires_grad_()).sum().backward()


def partial_function(net, x, ckpt):
    ckpt(functools.partial(lambda parts, y: parts.c(parts.b(parts.a(y))), net), x.requires_grad_()).sum().backward()


def methods_of_layers(net, x, ckpt):
    y = x.requires_grad_()
    for first, layer, last in (net.a, net.b, net.c):
        y = last(ckpt(layer.forward, first(y)))
    y.sum().backward()


def copied_in_between(net, x, ckpt):
    loss = ckpt(net, x.requires_grad_()).sum()
    with contextlib.suppress(RuntimeError):  # torch copies no tensors that are part of a graph
        copy.deepcopy(net)(x)
    loss.backward()


NO_REENTRANT = (recipes.gradient_penalty, recipes.autograd_grad)
NEED_INPUT_GRADIENT = (recipes.inside_the_model, recipes.frozen)  # with the reentrant engine
WAYS = [
    recipes.one,
    siamese,
    pipeline,
    pipeline_backwards,
    twice_in_a_region,
    recipes.inside_the_model,
    recipes.forward_only_no_grad,
    recipes.forward_only,
    recipes.two_backwards,
    recipes.gradient_penalty,
    recipes.autograd_grad,
    recipes.nested,
    recipes.nested_directly,
    recipes.never_stopping_early,
    recipes.accumulating(recipes.one),
    recipes.failing_forward,
    recipes.failing_recomputation,
    recipes.ending_in_a_norm,
    bound_method,
    partial_function,
    methods_of_layers,
    copied_in_between,
]


# Another order of a sum, which the reentrant engine has without this package too.
ROUNDED = {
    ("spectral norm, hook", siamese),
    ("spectral norm, parametrization", siamese),
    ("codebook", methods_of_layers),
}
LAZY = ("lazy normalizer", "lazy BatchNorm")  # whose forward cannot be called directly at first


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_state_and_gradients_are_those_of_the_run_without_checkpointing(kind, way):
    if kind in LAZY and way is methods_of_layers:
        pytest.skip("a lazy layer has no state before it has been called")
    truth = run(kind, way, plainly)
    for ckpt in EXACT.values():
        if ckpt is drop_in_reentrant and way in (*NO_REENTRANT, *NEED_INPUT_GRADIENT):
            continue
        net = run(kind, way, ckpt)
        if ckpt is drop_in_reentrant and (kind, way) in ROUNDED:
            assert same_gradients(net, truth, tolerance=1e-12)
        else:
            assert picture(net) == picture(truth)
            assert same_gradients(net, truth)


@pytest.mark.parametrize("ckpt", [non_reentrant, reentrant])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_checkpointing_is_wrong_in_the_gradients_where_the_output_reads_the_state_and_else_in_the_state(
    kind, ckpt
):
    # In a region that ends in what backward needs, all is recomputed; one batch: no weight differs yet.
    net, truth = (run(kind, siamese, each, count=1) for each in (ckpt, plainly))
    assert same_gradients(net, truth, tolerance=1e-9) == (kind not in READ)
    assert kind in UNHARMED or picture(net) != picture(truth)
    assert len(READ) + len(ONLY_WRITTEN) + len(UNHARMED) == len(KINDS)


# What state is made of.


class Pair(NamedTuple):
    first: object
    second: object


class Tracker(list):
    """A container of a user's own."""


CONTAINERS = {
    "list": lambda t: [t, 1],
    "dict": lambda t: {"t": t, "n": 1},
    "OrderedDict": lambda t: OrderedDict(t=t),
    "defaultdict": lambda t: defaultdict(int, t=t),
    "Counter": lambda t: Counter(t=1),
    "deque": lambda t: deque([t], maxlen=4),
    "tuple": lambda t: (t, 1),
    "named tuple": lambda t: Pair(t, [t]),
    "set": lambda t: {t, 1},
    "frozenset": lambda t: frozenset([t]),
    "nested": lambda t: {"a": [(Pair([t], {"b": deque([t])}),)]},
}


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, Iterable) else ()
    return [tensor for item in items if not isinstance(item, str) for tensor in tensors_in(item)]


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_containers_are_copied_with_all_that_is_in_them(container):
    value = container(torch.zeros(3))
    copied = state.Copier(share=True, detach=True).copy(value)
    assert type(copied) is type(value)
    assert copied is not value
    assert len(copied) == len(value)
    assert getattr(copied, "maxlen", None) == getattr(value, "maxlen", None)
    assert getattr(copied, "default_factory", None) == getattr(value, "default_factory", None)
    mine, true = tensors_in(copied), tensors_in(value)
    assert len(mine) == len(true)
    assert all(one is not other and torch.equal(one, other) for one, other in zip(mine, true, strict=True))
    assert len(set(map(id, mine))) == len(set(map(id, true)))  # the same tensor twice is one in the copy too


@pytest.mark.parametrize("value", [Tracker([1]), (1, (2,).__len__), nn.Identity(), nn.Parameter(torch.ones(2)), 1, "a"])
def test_what_is_no_container_of_pythons_own_stands_for_itself(value):
    copied = state.Copier(share=True, detach=True).copy(value)
    assert copied is value or copied == value


def test_a_container_may_have_itself_in_it():
    value = [torch.zeros(3)]
    value.append(value)
    copied = state.Copier(share=True, detach=True).copy(value)
    assert copied[1] is copied is not value


def test_modules_in_containers_are_gathered():
    copier, layer = state.Copier(share=True, detach=True), nn.Linear(1, 1)
    assert copier.copy({"a": [(layer,)]})["a"][0][0] is layer
    assert copier.modules == [layer]


def test_views_of_one_tensor_are_views_of_one_copy():
    base = torch.arange(6.0).reshape(2, 3)  # a view too
    row, copied, column = state.Copier(share=True, detach=True).copy([base[1], base, base[:, 1]])
    copied += 1
    assert torch.equal(row, base[1] + 1)
    assert torch.equal(column, base[:, 1] + 1)
    row += 1
    assert torch.equal(copied[1], base[1] + 2)
    dense = torch.arange(6.0).reshape(2, 3).t().clone(memory_format=torch.preserve_format)
    copied, row = state.Copier(share=True, detach=True).copy([dense, dense[1]])
    assert torch.equal(copied, dense)
    copied += 1
    assert torch.equal(row, dense[1] + 1)
    gaps = torch.empty_strided((2, 3), (6, 1)).copy_(base)  # its copy has none
    copied, row = state.Copier(share=True, detach=True).copy([gaps, gaps[1]])
    assert torch.equal(copied, gaps)
    assert torch.equal(row, gaps[1])


@pytest.mark.parametrize("kept", [Tracker([torch.ones(2)]), Record({0: torch.ones(2)})])
def test_lists_and_dictionaries_of_ones_own_class_stay_so_with_what_is_on_them(kept):
    kept.unit = "mm"
    copied = state.Copier(share=True, detach=True).copy(kept)
    assert type(copied) is type(kept)
    assert copied.unit == "mm"
    copied[0] += 1
    assert torch.equal(kept[0], torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.bool, torch.complex64])
def test_what_shares_memory_without_being_a_view_still_does_whatever_its_type(dtype):
    whole = torch.arange(6).to(dtype)
    part = whole[2:4].detach()
    assert part._base is None
    copied, other = state.Copier(share=True, detach=True).copy([whole, part])
    assert torch.equal(other, part)
    copied[2] = 0
    assert torch.equal(other, torch.tensor([0, 3]).to(dtype))
    assert torch.equal(part, torch.tensor([2, 3]).to(dtype))


def test_what_shares_memory_and_is_conjugate_or_negative_keeps_its_value():
    whole = torch.complex(torch.arange(3.0), torch.arange(3.0) + 1)
    for part in (whole[1:].conj().detach(), whole[1:].conj().imag.detach()):
        assert part.is_conj() != part.is_neg()
        _, other = state.Copier(share=True, detach=True).copy([whole, part])
        assert torch.equal(other, part)


def test_a_view_of_something_much_larger_is_copied_alone_unless_that_is_state_too():
    def memory(tensor):
        return tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()

    base = torch.zeros(state.LARGE)
    assert memory(state.Copier(share=True, detach=True).copy(base[3:4]))[1] == base.element_size()
    for whole, part in ((base, base[3:4]), (base.reshape(2, -1), base[3:4]), (base, base.detach())):
        copied, view = state.Copier(share=True, detach=True).copy([whole, part])
        assert memory(view) == memory(copied) != memory(base)
        assert (view.shape, view.storage_offset()) == (part.shape, part.storage_offset())


def test_views_of_any_kind_are_views_of_the_copy():
    table = torch.complex(torch.arange(6.0), torch.ones(6)).reshape(2, 3)
    copier = state.Copier(share=False, detach=True)
    views = [table.mH, table.conj()[1], table.imag, table.conj().imag, table.T, table[1, 1:], table.data[1]]
    copied, *copies = copier.copy([table, *views])
    assert all(torch.equal(mine, true) for mine, true in zip(copies, views, strict=True))
    table *= 1 + 2j
    copied *= 1 + 2j
    assert all(torch.equal(mine, true) for mine, true in zip(copies, views, strict=True))
    table.zero_()
    assert all(mine.ne(0).any() for mine in copies)


def test_a_part_of_what_is_itself_a_part_is_where_it_was():
    rows = copy.deepcopy(list(torch.arange(30000.0).reshape(3, 10000)))  # each has an offset in memory of its own
    rows.append(torch.arange(60000.0)[10000:40000].data)
    for row in rows:
        copied, part = state.Copier(share=True, detach=True).copy([row, row[2:5]])
        assert torch.equal(copied, row)
        assert torch.equal(part, row[2:5])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel and other quantized")
@pytest.mark.parametrize("odd", ["sparse", "values", "nested", "jagged", "quantized", "empty", "meta"])
def test_odd_tensors_can_be_copied_too(odd):
    sparse = torch.eye(3).to_sparse().coalesce()
    tensor = {
        "sparse": sparse,
        "values": sparse.values(),
        "nested": torch.nested.nested_tensor([torch.rand(3), torch.rand(2)]),
        "jagged": torch.nested.nested_tensor([torch.rand(3), torch.rand(2)], layout=torch.jagged),
        "quantized": torch.quantize_per_tensor(torch.rand(3).float(), 0.1, 0, torch.quint8),
        "empty": torch.zeros(0),
        "meta": torch.zeros(3, device="meta"),
    }[odd]
    copier = state.Copier(share=True, detach=True)
    copier.together([tensor])
    copied = copier.copy([tensor, tensor.detach()])[0]
    assert copied is not tensor
    assert (copied.layout, copied.dtype, copied.device) == (tensor.layout, tensor.dtype, tensor.device)


class Two(nn.Module):
    """Writes to one name, and reads another one of the same memory."""

    def __init__(self, **tensors):
        super().__init__()
        for name, value in tensors.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x):
        with torch.no_grad():
            self.written *= 2
        return x * (self.read[0] if isinstance(self.read, list) else self.read)[:3].clone()


def frozen():
    return nn.Parameter(torch.ones(3), requires_grad=False)


def aliased(tensor, of):
    return Two(written=tensor, read=of(tensor))


def reversed_alias(tensor, of):
    return Two(read=of(tensor), written=tensor)


SHARED = {
    "a transposed large buffer and a row": lambda: aliased(torch.ones(200, 200).t(), lambda t: t[0]),
    "a large buffer with channels last": lambda: aliased(
        torch.ones(1, 64, 32, 32).to(memory_format=torch.channels_last), lambda t: t.detach()[0, :3, 0, 0]
    ),
    "a tensor and before it what it was expanded to": lambda: reversed_alias(
        torch.ones(1), lambda t: [t.expand(20000)]
    ),
    "a large buffer and the same out of its graph": lambda: aliased(torch.ones(10**4), lambda t: t.detach()),
    "the same, the other one first": lambda: reversed_alias(torch.ones(10**4), lambda t: t.data),
    "a frozen parameter and a buffer": lambda: aliased(frozen(), lambda p: p.data),
    "a frozen parameter and a list": lambda: aliased(frozen(), lambda p: [p]),
    "a negative view": lambda: reversed_alias(torch.ones(3), lambda t: torch._neg_view(t.detach()).detach()),
}


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
def test_what_shares_memory_shares_it_in_the_replay(make, ckpt):
    gradients = []
    for by in (plainly, ckpt, non_reentrant):
        layer, x = make(), torch.ones(3, requires_grad=True)
        losses = [by(layer, x).square().sum() for _ in range(2)]
        sum(losses).backward()
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])


def test_what_is_set_on_a_tensor_is_on_its_copy():
    layer, gradients = Scaled(), []
    for by in (plainly, by_context):
        x = torch.ones(3, requires_grad=True)
        by(layer, x).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("kind", "size"), [(nn.Buffer, 3), (nn.Buffer, state.LARGE), (lambda t: nn.Parameter(t, requires_grad=False), 3)]
)
def test_what_is_counted_on_a_tensor_is_the_forwards_in_the_replay(kind, size):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.tensor = kind(torch.ones(size))
            self.tensor.steps = 0

        def forward(self, x):
            self.tensor.steps += 1
            return x * self.tensor.steps

    layer, x = Counts(), torch.ones(1, requires_grad=True)
    sum(drop_in_reentrant(layer, x) for _ in range(3)).backward()
    assert x.grad == 1 + 2 + 3
    assert layer.tensor.steps == 3


def test_what_leads_from_a_large_tensor_to_its_module_does_not_keep_it():
    layer = nn.Linear(3, 3)
    layer.register_buffer("mask", torch.ones(state.LARGE))
    layer.mask.owner = layer
    by_context(nn.Sequential(layer), torch.ones(2, 3, requires_grad=True)).sum().backward()
    reference = weakref.ref(layer)
    del layer
    gc.collect()
    assert reference() is None


def test_tensors_at_one_address_are_told_apart_by_their_size():
    array = np.arange(6.0)
    whole, part = torch.from_numpy(array), torch.from_numpy(array[:3])
    for tensors in ([whole, part], [part, whole]):
        copier = state.Copier(share=True, detach=True)
        copier.together(tensors)
        for tensor, copied in zip(tensors, copier.copy(tensors), strict=True):
            assert torch.equal(copied, tensor)


def test_memory_that_was_copied_is_not_taken_by_something_else():
    for size in (4, 100, 1000, 8000):
        for _ in range(20):
            copier, buffer = state.Copier(share=True, detach=True), torch.zeros(size)
            copier.together([buffer])
            buffer.data = torch.ones(size)
            others = [torch.full((size,), 7.0) for _ in range(20)]
            assert all(torch.equal(copier.copy(other), other) for other in others)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_a_large_tensor_that_cannot_be_compared_is_copied_each_time():
    tensor = torch.zeros(20000, dtype=torch.complex64).to(torch.complex32)
    copies = [state.Copier(share=True, detach=True).copy(tensor) for _ in range(2)]
    assert copies[0] is not copies[1]


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("buffer", torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.plain = torch.ones(3)
        self.buffer.scale = self.frozen.scale = self.plain.scale = 2.0

    def forward(self, x):
        return (x * self.buffer.scale * self.frozen.scale * self.plain.scale).sin()


def test_tensors_in_a_graph_are_copied_out_of_it_or_stand_for_themselves():
    leaf = torch.ones(2, requires_grad=True)
    inner = leaf * 2
    copied = state.Copier(share=True, detach=True).copy([leaf, inner])
    assert copied[0] is leaf
    assert copied[1].requires_grad
    assert not copied[1].is_leaf
    assert torch.equal(copied[1], inner)
    assert torch.autograd.grad(copied[1].sum(), leaf, allow_unused=True) == (None,)
    assert state.Copier(share=True, detach=False).copy(inner) is inner


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.Sequential, nn.Dropout, nn.Upsample])
def test_what_torchs_own_modules_are_made_with_is_not_copied(kind):
    needs = {nn.Conv2d: (3, 3, 3), nn.BatchNorm2d: (3,), nn.Linear: (3, 3)}
    layer = kind(*needs.get(kind, ()))
    everything, copied = state.keep(layer, state.Copier(share=True, detach=True))
    assert list(copied) == ["_buffers"]
    assert everything.keys() == vars(layer).keys()
    assert everything["_buffers"] is copied["_buffers"] is not layer._buffers


@pytest.mark.parametrize("name", ["p", "history"])
def test_what_anybody_else_has_put_on_torchs_own_modules_is_copied(name):
    layer = nn.Dropout()
    setattr(layer, name, torch.tensor(0.5))
    everything, copied = state.keep(layer, state.Copier(share=True, detach=True))
    assert everything[name] is copied[name] is not vars(layer)[name]
    assert torch.equal(copied[name], vars(layer)[name])


def test_what_is_copied_again_is_what_was_copied():
    tensors = {"whole": torch.rand(3), "other": torch.rand(2, 2), "empty": torch.zeros(0)}
    tensors |= {
        "alone": torch.rand(4),
        "same": tensors["whole"],
        "in its memory": tensors["other"].detach()[1],
        "view": tensors["whole"][1:],
    }
    first = state.Copier(share=True, detach=True)
    kept = first.copy(tensors)
    assert [kept["alone"]] == list(first.alone.values())  # the others have memory in common
    again = state.Copier(share=False, detach=True, alone=[*first.alone.values()]).copy(kept)
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor)
        assert again[name] is not kept[name]
    assert again["same"] is again["whole"]
    again["whole"] += 1
    again["other"] += 1
    assert torch.equal(again["view"], tensors["view"] + 1)
    assert torch.equal(again["in its memory"], tensors["in its memory"] + 1)
    assert all(torch.equal(kept[name], tensor) for name, tensor in tensors.items())


def test_the_small_buffers_of_a_block_are_copied_in_one_call(monkeypatch):
    calls, clones = [], state._clones
    monkeypatch.setattr(state, "_clones", lambda tensors: calls.append(len(tensors)) or clones(tensors))
    monkeypatch.delattr(state.Copier, "_tensor")  # which copies one by one
    block = Block(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    region = preserving._Region()
    with region.forward(block):
        pass
    for _ in range(2):
        with region:
            assert {id(buffer) for buffer in block.buffers()}.isdisjoint(map(id, region.alone))
    assert calls == [6, 6, 6]


def test_of_a_users_module_what_can_be_written_to_is_copied_and_nothing_else():
    layer = Steps()
    layer.history, layer.size, layer.name = [1], (3, 3), "a"
    _, copied = state.keep(layer, state.Copier(share=True, detach=True))
    assert copied == {"_buffers": {}, "history": [1], "size": (3, 3)}
    assert copied["history"] is not layer.history


@pytest.mark.parametrize(
    "kind", [torch.Generator, np.random.default_rng, np.random.RandomState, random.Random, lambda: np.arange(3)]
)
def test_generators_and_arrays_are_copied_whole(kind):
    value = kind()
    copied = state.Copier(share=False, detach=True).copy([value])[0]
    before = pickle.dumps(draw(kind()) if isinstance(value, np.ndarray) else draw(copy.deepcopy(value)))
    draw(value)
    assert copied is not value
    assert pickle.dumps(draw(copied)) == before


def draw(value):
    """Move a generator or an array, and give what comes of it."""
    if isinstance(value, np.ndarray):
        value += 1
        return value
    return torch.rand(3, generator=value).tolist() if isinstance(value, torch.Generator) else value.random()


def test_memory_of_an_odd_size_is_copied_to_its_last_byte():
    memory = torch.arange(5, dtype=torch.uint8)
    first, last = state.Copier(share=False, detach=True).copy([memory.detach()[:3], memory.detach()[2:]])
    assert (first.tolist(), last.tolist()) == ([0, 1, 2], [2, 3, 4])


def test_a_part_of_a_weight_that_is_out_of_its_graph_is_copied_out_of_its_memory():
    weight = nn.Parameter(torch.ones(3, 2))
    row = weight.detach()[0]
    copied = state.Copier(share=False, detach=True).copy(row)
    copied += 1
    assert weight.eq(1).all()


def test_a_tuple_with_names_is_copied_as_one():
    largest = torch.arange(3.0).max(0)  # a torch.return_types.max
    copied = state.Copier(share=False, detach=True).copy(largest)
    assert type(copied) is type(largest)
    assert copied.values is not largest.values
    assert torch.equal(copied.indices, largest.indices)


def test_tuples_and_sets_of_another_class_are_copied_as_such():
    class Pair(tuple):
        def __new__(cls, one, other):
            return super().__new__(cls, (one, other))

    class Names(set):
        pass

    pair, names = Pair(torch.ones(1), 2), Names("ab")
    copied, others = state.Copier(share=False, detach=True).copy([pair, names])
    assert (type(copied), type(others)) == (Pair, Names)
    assert copied[0] is not pair[0]
    assert copied[1] == 2
    assert others == names
    assert others is not names
    assert state.Copier(share=False, detach=True).copy(sys.version_info) is sys.version_info


def test_a_list_that_refuses_to_be_written_to_is_let_be():
    sizes = torch.fx.immutable_collections.immutable_list([1, 2])
    assert state.Copier(share=False, detach=True).copy(sizes) == sizes


def test_a_generator_without_a_state_stands_for_itself():
    generator = random.SystemRandom()
    assert state.Copier(share=False, detach=True).copy(generator) is generator


class MovesTheLast(nn.Module):
    """Moves the state of its last child before it calls it."""

    def __init__(self, *children):
        super().__init__()
        self.parts = nn.ModuleList(children)

    def forward(self, x):
        *_, last = self.parts
        last.steps += 1
        return last(x).square()


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize(
    "before", [lambda shared: shared, lambda _: torch.jit.script(nn.Tanh())], ids=["met", "scripted"]
)
def test_a_child_behind_one_that_is_passed_over_is_copied_too(ckpt, before):
    gradients, nets = [], []
    for way in (plainly, ckpt, non_reentrant):
        shared = nn.Tanh()
        net = nn.Sequential(shared, MovesTheLast(before(shared), Steps()))
        x = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
        way(net, x).sum().backward()
        gradients.append(x.grad)
        nets.append(net[1].parts[1].steps)
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])
    assert nets[0] == nets[1] != nets[2]


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("size", [3, 20_000])
def test_a_parameter_made_in_inference_mode_has_no_version_and_is_let_be(ckpt, size):
    with torch.inference_mode():
        table = nn.Parameter(torch.ones(size), requires_grad=False)

    class Holds(Steps):
        def __init__(self):
            super().__init__()
            self.table = table

    net, x = Holds(), torch.rand(3, requires_grad=True)
    ckpt(net, x).square().sum().backward()
    assert net.steps == 1
    assert net.table is table


def test_put_takes_away_what_is_new():
    layer = nn.Linear(1, 1)
    before = vars(layer).copy()
    layer.new, layer.training = 1, False
    state.put(layer, before)
    assert vars(layer) == before


# What it leaves behind: nothing.


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_nothing_stays_on_the_model_and_no_hook_stays_anywhere(ckpt):
    net = net_of("running normalizer")
    before = {name: (list(vars(module)), module._buffers) for name, module in net.named_modules()}
    buffers = list(net.buffers())
    recipes.failing_forward(net, batches(1, 4, 3, 4, 4)[0], ckpt)
    recipes.failing_recomputation(net, batches(1, 4, 3, 4, 4)[0], ckpt)
    after = {name: (list(vars(module)), module._buffers) for name, module in net.named_modules()}
    assert all(after[name][0] == names and after[name][1] is held for name, (names, held) in before.items())
    assert all(mine is old for mine, old in zip(net.buffers(), buffers, strict=True))
    assert not torchs_module._global_forward_pre_hooks


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_the_hook_is_on_until_the_outermost_forward_ends(ckpt):
    layer, hooks = Steps(), []

    def outer(x):
        y = ckpt(layer, x)
        hooks.append(len(torchs_module._global_forward_pre_hooks))
        return y

    ckpt(outer, torch.rand(1, requires_grad=True))
    assert hooks == [1]
    assert not torchs_module._global_forward_pre_hooks


def test_a_replay_without_compiled_code_meets_no_hook():
    hooks = []

    class Noting(nn.Module):
        def forward(self, x):
            hooks.append(len(torchs_module._global_forward_pre_hooks))
            return x * x

    by_context(Noting(), torch.rand(1, requires_grad=True)).backward()
    assert hooks == [1, 0]


class Grows(nn.Module):
    """Registers something at every call."""

    def __init__(self, register, what):
        super().__init__()
        self.register, self.what = register, what

    def forward(self, x):
        grown = len([*self.children(), *self.parameters()])
        self.register(self, f"part {grown}", self.what())
        return x.tanh()


@pytest.mark.parametrize("ckpt", [by_context, drop_in])
@pytest.mark.parametrize(
    ("register", "what"),
    [
        (nn.Module.add_module, nn.Tanh),
        (nn.Module.register_parameter, lambda: nn.Parameter(torch.ones(()), requires_grad=False)),
    ],
    ids=["a child", "a parameter"],
)
def test_what_a_replay_registers_is_taken_off(register, what, ckpt):
    def step(net, x, ckpt):
        ckpt(net, x.requires_grad_()).sum().backward()

    for by, calls in ((plainly, 3), (ckpt, 3), (non_reentrant, 6)):
        net = train(Grows(register, what), step, batches(3, 2, 2), by)
        assert len([*net.children(), *net.parameters()]) == calls


def test_an_error_elsewhere_in_backward_leaves_the_model_as_the_forward_left_it():
    net = net_of("step counter")

    def fails(_):
        raise StoppedError

    middle = by_context(net.a, torch.rand(4, 3, 4, 4, requires_grad=True))
    middle.register_hook(fails)
    before = picture(net)
    loss = by_context(net.b, middle).sum()
    before = picture(net)
    with pytest.raises(StoppedError):
        loss.backward()
    assert picture(net) == before


def test_a_checkpoint_keeps_its_copies_only_as_long_as_its_graph_lives():
    layer = Normalizer()
    regions = weakref.WeakSet()

    class Noted(preserving._Region):
        def __init__(self, *args):
            super().__init__(*args)
            regions.add(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preserving, "_Region", Noted)
        losses = [by_context(layer, torch.rand(2, 3, 2, 2, requires_grad=True)).sum() for _ in range(3)]
        assert len(regions) == 3
        losses.pop()
        losses.pop().backward()
        gc.collect()
        assert len(regions) == 1


def test_values_in_graphs_do_not_keep_the_graphs_of_former_batches():
    net = net_of("a value in the graph")
    graphs = []
    for x in batches(4, 4, 3, 4, 4):
        recipes.one(net, x, by_context)
        graphs.append(weakref.ref(net.a[1].penalty))
    gc.collect()
    assert sum(graph() is not None for graph in graphs) == 1


def test_evaluation_mode_is_left_alone():
    layer = Steps().eval()
    region = preserving._Region()
    with region.forward(layer):
        layer(torch.rand(1))
    assert not region.state


def test_evaluation_mode_is_left_alone_in_a_block_of_torchs_own_modules_too():
    block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    region = preserving._Region()
    with region.forward(block):
        block(torch.rand(2, 3))
    assert not region.state


def test_what_a_layer_had_when_it_was_first_entered_is_what_a_replay_sees():
    known = Root()
    region = preserving._Region()
    with region.forward(lambda x: known.count(known(x))):  # known from the closure, then entered as a module
        known.steps = 5
        region.enter(known)
    assert region.state[known][0]["steps"] == 0


def test_the_modules_among_the_arguments_are_known():
    torch.manual_seed(0)
    root = Root()
    truth = copy.deepcopy(root)

    def function(x, known, among):
        return among["it"][0].count(known.count(x))

    for each, ckpt in ((root, by_context), (truth, plainly)):
        x = torch.ones(2, 3, requires_grad=True)
        ckpt(function, x, each, {"it": [each]}).sum().backward()
    assert root.steps == truth.steps == 2
    assert same_gradients(root, truth)


def test_the_replay_runs_in_the_mode_of_its_forward():
    net = net_of("running normalizer")
    truth = copy.deepcopy(net)
    for each, ckpt in ((net, by_context), (truth, plainly)):
        loss = ckpt(each, torch.ones(4, 3, 4, 4).cumsum(0).requires_grad_()).sum()
        each.eval()
        loss.backward()
    assert same_gradients(net, truth)


# What a function reaches without calling it as a module.


class Root(nn.Module):
    """Moves a number of its own, and a child's statistics, in a method that is not its forward."""

    def __init__(self):
        super().__init__()
        self.linear, self.child, self.steps = nn.Linear(3, 3), Normalizer(), 0

    def method(self, x):
        self.steps += 1
        self.child.mean += 1
        return (self.linear(x) * self.steps + self.child.mean).tanh()

    def count(self, x):
        self.steps += 1
        return (self.linear(x) * self.steps).tanh()

    def step(self, x, ckpt, how):
        ckpt(how(self), x).sum().backward()


def stepped(how, ckpt):
    """Give three equal roots after a step: with the checkpoint, without one, and with torch's."""
    torch.manual_seed(0)
    root = Root()
    roots = root, copy.deepcopy(root), copy.deepcopy(root)
    for each, by in zip(roots, (ckpt, plainly, non_reentrant), strict=True):
        each.step(torch.ones(2, 3, requires_grad=True), by, how)
    return roots


REACHED = {
    "bound method": lambda root: root.method,
    "partial of a bound method": lambda root: functools.partial(root.method),
    "lambda of a bound method": lambda root: (lambda method: lambda x: method(x))(root.method),
}


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("how", REACHED.values(), ids=REACHED)
def test_a_method_may_move_its_module_and_the_modules_below_it(how, ckpt):
    root, truth, wrong = stepped(how, ckpt)
    assert picture(root) == picture(truth)
    assert same_gradients(root, truth)
    assert not same_gradients(wrong, truth)


class Owner:
    """An object that is no module, cannot be called, and has one."""

    def __init__(self, root):
        self.root = root

    def count(self, x):
        return self.root.count(x)


class Owners(list):
    """One that has modules as a list has them."""

    def count(self, x):
        return self[0].count(x)


COUNTED = {
    "closure": lambda root: lambda x: root.count(x),
    "default": lambda root: lambda x, root=root: root.count(x),
    "function in a closure": lambda root: (lambda inner: lambda x: inner(x))(lambda x: root.count(x)),
    "argument": lambda root: functools.partial(lambda known, x: known.count(x), root),
    "keyword": lambda root: functools.partial(lambda x, known: known.count(x), known=root),
    "dictionary": lambda root: (lambda known: lambda x: known["root"].count(x))({"root": root}),
    "global": lambda root: eval("lambda x: root.count(x)", {"root": root}),
    "an object whose method it is": lambda root: Owner(root).count,
    "a list whose method it is": lambda root: Owners([root]).count,
    "a function that knows itself": lambda root: calling_itself(root),
    "a function with an empty cell": lambda root: with_an_empty_cell(root),
}


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_an_object_without_a_dictionary_may_have_the_method(ckpt):
    class Slotted:
        __slots__ = ("layer",)

        def run(self, x):
            return self.layer(x).tanh()

    owner = Slotted()
    owner.layer = nn.BatchNorm1d(3)
    ckpt(owner.run, torch.rand(2, 3, requires_grad=True)).sum().backward()
    assert owner.layer.num_batches_tracked == 1


def calling_itself(root):
    def function(x, times=1):
        return root.count(x) if times == 0 else function(x, times - 1)

    return function


def with_an_empty_cell(root):
    def function(x):
        return root.count(x) if x is not None else later(x)

    if root is None:
        later = None
    return function


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("how", COUNTED.values(), ids=COUNTED)
def test_a_function_may_move_what_the_modules_that_it_knows_have_themselves(how, ckpt):
    root, truth, wrong = stepped(how, ckpt)
    assert root.steps == truth.steps == 1
    assert same_gradients(root, truth)
    assert not same_gradients(wrong, truth)


def test_a_function_may_call_the_forward_of_what_keeps_its_state_elsewhere():
    keeper = KINDS["kept in another module"]()
    twin = copy.deepcopy(keeper)
    x, y = (torch.ones(2, 3, 2, 2).cumsum(0).requires_grad_() for _ in range(2))
    by_context(lambda x: keeper.forward(x), x).square().sum().backward()
    twin(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert picture(keeper) == picture(twin)


def test_the_reentrant_engine_finds_the_way_back_into_a_graph_from_outside():
    layer, gradients = nn.Identity(), []
    for ckpt in (plainly, drop_in_reentrant):
        weight = torch.full((3,), 2.0, requires_grad=True)
        layer.outer = weight * 3
        ckpt(lambda x: layer(x) * layer.outer, torch.ones(3, requires_grad=True)).sum().backward()
        gradients.append(weight.grad)
    assert torch.equal(*gradients)
    assert gradients[0].eq(3).all()


def test_a_checkpoint_does_not_keep_what_its_forward_has_replaced():
    layer = KINDS["a buffer that is replaced"]()
    before = weakref.ref(layer.mean)
    loss = by_context(layer, torch.ones(2, 3, 2, 2).cumsum(0).requires_grad_()).sum()
    gc.collect()
    assert before() is None
    loss.backward()


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
    "a class that makes a block of torch's": (lambda: OnlyMade(OnlyMade(nn.BatchNorm1d(3))), False),
    "a class of a user's": (lambda: Block(nn.BatchNorm1d(3)), True),
    "a class of a user's below": (lambda: nn.Sequential(Block(nn.BatchNorm1d(3))), True),
    "a method of a user's": (lambda: Iterated(nn.BatchNorm1d(3)), True),
    "a property of a user's": (lambda: Looked(nn.BatchNorm1d(3)), True),
    "a hook": (lambda: hooked(nn.Sequential(nn.BatchNorm1d(3))), True),
    "a hook before": (lambda: nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3)), True),
    "a parametrization": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 3))), True),
    "another forward": (lambda: patched(nn.Sequential(nn.BatchNorm1d(3))), True),
}


@pytest.mark.parametrize(("block", "copies"), BLOCKS.values(), ids=BLOCKS)
def test_buffers_are_copied_in_the_forward_if_anything_but_torchs_own_modules_is_there(block, copies):
    block = block()
    region = preserving._Region()
    with region.forward(block):
        pass
    own = {id(buffer) for buffer in block.buffers()}
    kept = {id(buffer) for _, copied in region.state.values() for buffer in copied["_buffers"].values()}
    assert len(kept) == len(own) > 0
    assert kept.isdisjoint(own) == copies
    assert (kept == own) == (not copies)


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
def test_what_is_set_on_torchs_own_modules_after_a_forward_is_not_seen_in_its_replay(moves, ckpt):
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


def test_a_global_hook_of_somebody_elses_may_read_buffers():
    block, region = nn.Sequential(nn.BatchNorm1d(3)), preserving._Region()
    with_hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    with region.forward(block):
        pass
    with_hook.remove()
    assert region.state[block[0]][1]["_buffers"]["running_mean"] is not block[0].running_mean


def test_a_class_that_gets_a_forward_of_its_own_is_no_longer_torchs():
    class Sub(nn.BatchNorm1d):
        pass

    assert state.reads_no_buffer(Sub(3))
    Sub.forward = lambda self, x: x * self.running_mean
    assert not state.reads_no_buffer(Sub(3))
    Sub.forward = functools.partialmethod(nn.BatchNorm1d.forward)
    assert not state.reads_no_buffer(Sub(3))


def test_outputs_that_a_module_keeps_do_not_keep_each_other():
    class Keeps(nn.Linear):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    layer, outputs = Keeps(3, 3), []
    for _ in range(4):
        y = drop_in_reentrant(layer, torch.rand(2, 3, requires_grad=True))
        outputs.append(weakref.ref(y.grad_fn))
        y.sum().backward()
        del y
    gc.collect()
    assert [output() is not None for output in outputs] == [False, False, False, True]


def test_a_lazy_layer_may_get_its_first_batch_by_name():
    class Names(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LazyLinear(3)

        def forward(self, x):
            return self.layer(input=x).tanh()

    net = Names()
    by_context(net, torch.rand(2, 3, requires_grad=True)).sum().backward()
    assert net.layer.weight.grad is not None


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


# Large tensors that stand still.


class Masked(Normalizer):
    """Has a large table, and moves it when it is told to."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(128, 128))
        self.moves = None

    def forward(self, x):
        if self.moves is not None:
            self.moves(self)
        return super().forward(x) * (1 + self.table[0, 0])


def visibly(layer):
    layer.table.add_(1)


def unseen(layer):
    layer.table.data.add_(1)


def replacing(layer):
    layer.table = layer.table + 1


def in_other_memory(layer):
    layer.table.data = layer.table.data + 1


def copy_of_table(layer):
    region = preserving._Region()
    with region.forward(layer):
        pass
    return region.state[layer][1]["_buffers"]["table"]


def same_as_plainly(layer, ckpt=by_context):
    """Run a step with a layer and with its twin, and tell whether state and gradients are equal."""
    twin = copy.deepcopy(layer)
    x, y = (torch.ones(2, 3, 2, 2).cumsum(0).requires_grad_() for _ in range(2))
    ckpt(layer, x).square().sum().backward()
    twin(y).square().sum().backward()
    return torch.equal(x.grad, y.grad) and picture(layer) == picture(twin)


def test_a_large_tensor_that_stands_still_is_copied_once():
    layer = Masked()
    assert layer.table.nbytes > state.LARGE
    copies = [copy_of_table(layer) for _ in range(3 * state._COMPARED)]
    assert len(set(map(id, copies))) == 1
    assert copies[0] is not layer.table
    assert copy_of_table(copy.deepcopy(layer)) is not copies[0]


def test_the_copy_of_a_large_tensor_goes_with_the_tensor():
    layer = Masked()
    copied = weakref.ref(copy_of_table(layer))
    gc.collect()
    assert copied() is not None
    del layer
    gc.collect()
    assert copied() is None


def test_a_large_tensor_is_compared_with_its_copy_ever_more_rarely(monkeypatch):
    compared, asked = [], 0
    monkeypatch.setattr(torch, "equal", lambda *_: compared.append(asked) or True)
    layer = Masked()
    for asked in range(300):  # noqa: B007
        copy_of_table(layer)
    assert compared == [*range(1, 65), 128, 256]


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("still", [0, 3, 70])
@pytest.mark.parametrize("moves", [visibly, replacing])
def test_a_large_tensor_may_move_at_any_time_where_autograd_sees_it(moves, still, ckpt):
    layer = Masked()
    for _ in range(still):
        assert same_as_plainly(layer, ckpt)
    layer.moves = moves
    for _ in range(3):
        assert same_as_plainly(layer, ckpt)
    layer.moves = None
    assert same_as_plainly(layer, ckpt)
    assert not same_as_plainly(layer, non_reentrant)


@pytest.mark.parametrize("moves", [unseen, in_other_memory])
def test_a_large_tensor_may_move_unseen_in_the_first_checkpoints(moves):
    layer = Masked()
    for each in (None, moves, moves, None, None, moves):
        layer.moves = each
        assert same_as_plainly(layer)


def test_a_large_tensor_may_become_one_of_another_type():
    layer = Masked()
    for dtype in (torch.int64, torch.float64):
        for _ in range(state._COMPARED + 3):  # no longer compared each time
            copy_of_table(layer)
        layer.table.data = layer.table.data.to(dtype)
        assert copy_of_table(layer).dtype == dtype


def test_a_large_tensor_that_moves_unseen_after_all_is_found_later_and_warned_of():
    layer = Masked()
    while state._shared.get(layer.table, (0, 0, 0))[2] != 2 * state._COMPARED - 1:
        copy_of_table(layer)
    layer.table.data.add_(1)
    assert not same_as_plainly(layer)
    with pytest.warns(UserWarning, match=r"a torch.float64 tensor of shape \(128, 128\) .* not changed in 64"):
        assert same_as_plainly(layer)
    layer.moves = unseen
    for _ in range(3):
        assert same_as_plainly(layer)


def test_a_replay_does_not_write_to_the_copy_that_all_share():
    layer = Masked()
    x = torch.ones(2, 3, 2, 2).cumsum(0).requires_grad_()
    loss = by_context(layer, x).sum()
    copied = copy_of_table(layer)
    known = len(state._shared)
    layer.moves = visibly  # in the replay alone: what it does not know from its forward, it has not got
    loss.backward()
    assert copied.eq(0).all()
    assert len(state._shared) == known
    assert layer.table.eq(0).all()


@pytest.mark.parametrize(
    "table",
    [
        torch.zeros(128, 128, device="meta"),
        torch.zeros(128, 128).to_sparse(),
        nn.Parameter(torch.zeros(128, 128), requires_grad=False),
    ],
    ids=["meta", "sparse", "parameter"],
)
def test_a_large_tensor_of_another_sort_is_copied_or_stands_for_itself(table):
    layer = Masked()
    layer.table, layer.other = None, [table]
    for _ in range(2):
        region = preserving._Region()
        with region.forward(layer):
            pass
        copied = region.state[layer][1]["other"][0]
        assert copied.shape == table.shape
        assert (copied is table) == isinstance(table, nn.Parameter)


def test_a_large_tensor_made_in_inference_mode_is_copied():
    with torch.inference_mode():
        table = torch.zeros(128, 128)
    copier = state.Copier(share=True, detach=True)
    assert copier.copy(table) is not table


# Where else it goes.


def test_the_drop_in_has_torchs_signature_and_hands_its_keywords_on():
    ours = inspect.signature(momentum_fix.checkpoint).parameters
    assert list(ours) == ["function", "args", "kwargs"]
    with pytest.raises(ValueError, match="determinism_check"):
        drop_in(nn.Linear(1, 1), torch.rand(1, requires_grad=True), determinism_check="unheard of")
    net = net_of("step counter")
    x = batches(1, 4, 3, 4, 4)[0].requires_grad_()
    known = inspect.signature(torch.utils.checkpoint.checkpoint).parameters.keys() & {"early_stop"}  # since torch 2.9
    drop_in(net, x, debug=True, preserve_rng_state=False, **dict.fromkeys(known, False)).sum().backward()
    with torch.no_grad():
        drop_in(net, x)
    assert net.a[1].steps == 2


def test_without_gradients_the_drop_in_keeps_nothing(monkeypatch):
    monkeypatch.setattr(preserving, "_Region", None)
    with torch.no_grad():
        assert drop_in(Steps(), torch.ones(1)) == 1


def selective(policy):
    def decide(_, operation, *args, **kwargs):
        chosen = operation in (torch.ops.aten.tanh.default, torch.ops.aten.convolution.default)
        return policy if chosen or operation is torch.ops.aten.clone.default else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, decide)


@pytest.mark.parametrize("kind", [*READ, "BatchNorm"])
def test_the_drop_in_composes_with_selective_checkpointing(kind):
    def step(net, x, ckpt):
        chosen = {} if ckpt is plainly else {"context_fn": selective(CheckpointPolicy.MUST_SAVE)}
        ckpt(net, x.requires_grad_(), **chosen).sum().backward()

    truth, net = run(kind, step, plainly), run(kind, step, drop_in)
    assert picture(net) == picture(truth)
    assert same_gradients(net, truth)


WRAPPED = {
    "context_fn": {"checkpoint_impl": CheckpointImpl.NO_REENTRANT, "context_fn": preserve_state},
    "checkpoint_fn": {"checkpoint_impl": CheckpointImpl.NO_REENTRANT, "checkpoint_fn": drop_in},
    "checkpoint_fn, reentrant": {"checkpoint_impl": CheckpointImpl.REENTRANT, "checkpoint_fn": drop_in_reentrant},
}


@pytest.mark.filterwarnings("ignore:Please specify CheckpointImpl.NO_REENTRANT")
@pytest.mark.parametrize("how", [*WRAPPED, "nothing"])
def test_torchs_wrapper_takes_either(how):
    def wrapped(net, x, _):
        net(x.requires_grad_()).sum().backward()

    net = net_of("running normalizer")
    options = WRAPPED.get(how, {"checkpoint_impl": CheckpointImpl.NO_REENTRANT})
    wrap = functools.partial(checkpoint_wrapper, **options)
    apply_activation_checkpointing(net, checkpoint_wrapper_fn=wrap, check_fn=lambda m: isinstance(m, nn.Sequential))
    train(net, wrapped, batches(3, 4, 3, 4, 4), plainly)
    truth = run("running normalizer", recipes.one, plainly)
    assert same_gradients(net, truth) == (how != "nothing")


@pytest.mark.parametrize("reentrancy", [False, True])
def test_checkpoint_sequential_takes_no_context_but_can_be_given_the_drop_in(monkeypatch, reentrancy):
    def segments(net, x, ckpt):
        layers = [*net.a, *net.b, *net.c]
        checkpoint_sequential(layers, 3, x.requires_grad_(), use_reentrant=reentrancy).sum().backward()

    truth = run("running normalizer", recipes.one, plainly)
    assert not same_gradients(run("running normalizer", segments, plainly), truth)
    with pytest.raises(ValueError, match="Unexpected keyword arguments: context_fn"):
        checkpoint_sequential([nn.Linear(1, 1)], 1, torch.rand(1), use_reentrant=False, context_fn=preserve_state)
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", momentum_fix.checkpoint)
    assert same_gradients(run("running normalizer", segments, plainly), truth)


def test_a_loop_over_segments_does_what_checkpoint_sequential_does_and_is_exact():
    def segments(net, x, ckpt):
        x.requires_grad_()
        for segment in (net.a, net.b, net.c):
            x = ckpt(segment, x)
        x.sum().backward()

    truth = run("running normalizer", recipes.one, plainly)
    for ckpt in EXACT.values():
        assert same_gradients(run("running normalizer", segments, ckpt), truth)
    assert not same_gradients(run("running normalizer", segments, non_reentrant), truth)


def test_threads_do_not_see_each_others_modules():
    inside, outside = threading.Event(), threading.Event()
    layer, other = Steps(), Steps()
    region = preserving._Region()

    def elsewhere():
        inside.wait(10)
        other(torch.rand(1))
        outside.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    with region.forward(lambda: None):
        inside.set()
        assert outside.wait(10)
        layer(torch.rand(1))
    thread.join()
    assert list(region.state) == [layer]


# Compiled code.


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    compiler_counters.clear()
    yield
    torch.compiler.reset()


def compiled_module(net):
    return torch.compile(net, backend="aot_eager")


def module_compiled_in_place(net):
    net.compile(backend="aot_eager")
    return net


def compiled_function(net):
    return torch.compile(lambda x: net.c(net.b(net.a(x))), backend="aot_eager")


def lambda_of_compiled_modules(net):
    first, *rest = (torch.compile(part, backend="aot_eager") for part in (net.a, net.b, net.c))
    return lambda x: rest[1](rest[0](first(x)))


def lambda_of_parts_compiled_in_place(net):
    for part in (net.a, net.b, net.c):
        part.compile(backend="aot_eager")
    return lambda x: net.c(net.b(net.a(x)))


def block_with_a_compiled_part(net):
    return nn.Sequential(net.a, torch.compile(net.b, backend="aot_eager"), net.c)


def block_with_a_part_compiled_in_place(net):
    net.b.compile(backend="aot_eager")
    return nn.Sequential(net.a, net.b, net.c)


COMPILED = [
    compiled_module,
    module_compiled_in_place,
    compiled_function,
    lambda_of_compiled_modules,
    lambda_of_parts_compiled_in_place,
    block_with_a_compiled_part,
    block_with_a_part_compiled_in_place,
]


def compiled_step(prepare):
    known = []

    def step(net, x, ckpt):
        known[:] = known or [prepare(net)]
        ckpt(known[0], x.requires_grad_()).sum().backward()
        graphs.append(compiler_counters["stats"]["unique_graphs"])

    graphs = step.graphs = []
    return step


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks")
@pytest.mark.parametrize("prepare", COMPILED, ids=lambda prepare: prepare.__name__)
@pytest.mark.parametrize("kind", ["running normalizer", "a buffer that is replaced", "BatchNorm"])
def test_compiled_modules_and_functions_inside_are_exact_and_are_not_compiled_again(kind, prepare):
    def compiled(ckpt):
        torch.compiler.reset()
        compiler_counters.clear()
        step = compiled_step(prepare)
        return run(kind, step, ckpt, count=4), step.graphs

    truth = run(kind, recipes.one, plainly, count=4)
    torchs = {each: compiled(each) for each in (non_reentrant, reentrant)}
    for ckpt in EXACT.values():
        net, graphs = compiled(ckpt)
        wrong, graphs_of_torchs = torchs[reentrant if ckpt is drop_in_reentrant else non_reentrant]
        assert same_gradients(net, truth)
        assert same_gradients(wrong, truth) == (kind not in READ)
        assert graphs == graphs_of_torchs
        assert len(set(graphs)) == 1


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("ckpt", [drop_in, drop_in_reentrant])
@pytest.mark.parametrize("kind", READ)
def test_a_model_compiled_together_with_the_drop_in_is_exact(kind, ckpt):
    def prepare(net):
        return torch.compile(lambda x: ckpt(net, x) * 1, backend="aot_eager")

    truth = run(kind, recipes.one, plainly)
    net = run(kind, compiled_step(prepare), lambda function, x: function(x))
    assert picture(net) == picture(truth)
    assert same_gradients(net, truth)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_model_compiled_together_with_a_context_is_refused():
    net = net_of("running normalizer")
    compiled = torch.compile(lambda x: by_context(net, x), backend="aot_eager")
    # torch 2.8 refuses before this package is asked
    with pytest.raises(Exception, match=r"use momentum_fix.checkpoint|generate a tuple of two `TorchDispatchMode`s"):
        compiled(torch.rand(4, 3, 4, 4, requires_grad=True))


# Two ranks.


def _ranks(rank, folder):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for wrap in ("DDP", "FSDP2"):
        for kind in ("running normalizer", "spectral norm, parametrization", "step counter", "BatchNorm"):
            found = []
            for ckpt in (plainly, by_context, drop_in, non_reentrant):
                net = WRAPPERS[wrap](net_of(kind))
                data = batches(3, 4, 3, 4, 4, seed=1 + rank)
                train(net, recipes.inside_the_model, data, ckpt)
                local = [getattr(grad, "_local_tensor", grad) for grad in gradients(net)]
                found.append((local, [buffer.clone() for buffer in net.buffers()]))
            truth, *exact, plain = found
            same = [
                all(
                    torch.equal(mine, true)
                    for each in (0, 1)
                    for mine, true in zip(one[each], truth[each], strict=True)
                )
                for one in (*exact, plain)
            ]
            assert same == [True, True, False], (wrap, kind, same)
    dist.destroy_process_group()


def test_two_ranks_of_ddp_and_of_fsdp2_are_exact(tmp_path):
    mp.spawn(_ranks, args=(tmp_path,), nprocs=2)


# What functions name, and what modules make of themselves.


class Counts(nn.Module):
    """Has a method that moves it, and a state that its output reads."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, x):
        return x / self.steps

    def stepped(self, x):
        self.steps += 1
        return self(x)


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.child, self.last = Counts(), nn.Tanh()


class Runs:
    """An object that is called, and not a function."""

    def __init__(self, part):
        self.part = part

    def __call__(self, x):
        return self.part.stepped(x)


def moves_a_child(net):
    def function(x):
        net.child.steps += 1
        return net.child(x)

    return function


NAMING = {
    "moves a child": moves_a_child,
    "calls a child's method": lambda net: lambda x: net.child.stepped(x),
    "is an object": lambda net: Runs(net.child),
    "is in a dictionary": lambda net: functools.partial(lambda parts, x: parts["a"].stepped(x), {"a": net.child}),
}


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("named", NAMING.values(), ids=NAMING)
def test_a_function_may_move_a_child_of_what_it_knows(named, ckpt):
    def gradient(ckpt):
        net, x = Holds(), torch.ones(2, requires_grad=True)
        net.last(ckpt(lambda y: named(net)(y) * y, ckpt(named(net), x))).sum().backward()
        return net.child.steps, x.grad

    (steps, true), (counted, mine), (_, wrong) = map(gradient, (plainly, ckpt, non_reentrant))
    assert steps == counted == 2
    assert torch.equal(mine, true)
    assert not torch.equal(wrong, true)


class BuildsItself(nn.Module):
    """Makes its parts when it meets its first batch, and notes that it has."""

    def __init__(self):
        super().__init__()
        self.built, self.first = False, nn.Linear(2, 2)

    def forward(self, x):
        if not self.built:
            self.layer, self.scale, self.built = nn.Linear(2, 2), nn.Parameter(torch.ones(2)), True
        return self.layer(self.first(x)) * self.scale


@pytest.mark.parametrize("ckpt", [by_context, drop_in])
def test_a_module_that_builds_itself_keeps_what_the_forward_has_built(ckpt):
    def trained(ckpt):
        torch.manual_seed(0)
        module = BuildsItself()
        for _ in range(2):
            ckpt(module, torch.ones(3, 2, requires_grad=True)).square().sum().backward()
        return {name: parameter.grad for name, parameter in module.named_parameters()}

    mine, true = trained(ckpt), trained(plainly)
    assert mine.keys() == true.keys()
    assert all(torch.equal(mine[name], true[name]) for name in true)


class Decays(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(0.5)
        return x * self.weight


def test_a_trained_parameter_that_the_forward_writes_to_is_warned_of():
    module = nn.Sequential(nn.Linear(2, 2), Decays())
    with pytest.warns(UserWarning, match=r"a parameter of shape \(2,\) was written to.*keep such state in a buffer"):
        by_context(module, torch.ones(3, 2, requires_grad=True)).sum().backward()


def test_torchscript_with_buffers_is_refused_in_training_and_left_alone_otherwise():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    module, x = nn.Sequential(Counts(), scripted), torch.ones(3, 2, requires_grad=True)
    with pytest.raises(TypeError, match="TorchScript with buffers, whose state cannot be preserved"):
        drop_in(module, x)
    scripted.eval()
    drop_in_reentrant(lambda y: scripted(module[0].stepped(y)), x).sum().backward()  # torch stops no script early
    assert module[0].steps == 1
