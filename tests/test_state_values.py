"""What state may be made of: each recomputation sees it as its forward pass did, and leaves it as that left it."""

import copy
import gc
import pickle
import random
import sys
import tracemalloc
import weakref
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from states import Normalizer, Record, Steps, alive_after, kept, picture
from twins import EXACT, by_context, drop_in, drop_in_reentrant, non_reentrant, plainly, reentrant

LARGE = 1 << 16  # bytes: larger tensors and arrays are copied once, as long as they stand still
PLAIN = {drop_in_reentrant: reentrant}


def described(value, known=None):
    """Give a value in plain terms: all that is in it, and what in it is one and the same object."""
    known = [] if known is None else known
    same = [place for place, each in enumerate(known) if each is value]
    if same:
        return "the same as", same[0]
    own = {} if isinstance(value, torch.Tensor) and value.is_nested else getattr(value, "__dict__", {})
    kind = (
        type(value).__name__,
        sorted(own.items()),
        *(getattr(value, name, 0) for name in ("maxlen", "default_factory")),
    )
    if isinstance(value, torch.Tensor):
        known.append(value)
        dense = value.to_dense() if value.is_sparse else value.dequantize() if value.is_quantized else value
        rows = dense.unbind() if dense.is_nested else [dense]
        numbers = None if value.is_meta else [row.tolist() for row in rows]
        return *kind, value.dtype, value.layout, value.device, value.requires_grad, value.is_leaf, numbers
    if isinstance(value, dict):
        known.append(value)
        return *kind, [(key, described(item, known)) for key, item in value.items()]
    if isinstance(value, (list, tuple, deque)):
        known.append(value)
        return *kind, [described(item, known) for item in value]
    if isinstance(value, (set, frozenset)):
        return *kind, sorted(str(described(item)) for item in value)
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, nn.Module):
        return picture(value)
    if isinstance(value, random.SystemRandom):
        return "no state"
    return pickle.dumps(value)


class Keeps(nn.Module):
    """Keeps a value, as buffers if these are wanted, moves it, and notes how it was before and after."""

    def __init__(self, value, move, note, as_buffers=False):
        super().__init__()
        self.move, self.note, self.as_buffers = move, note, as_buffers
        if as_buffers:
            for number, tensor in enumerate(value):
                self.register_buffer(f"tensor {number}", tensor)
        else:
            self.value = value

    def held(self):
        return [*self._buffers.values()] if self.as_buffers else self.value

    def forward(self, x):
        before = described(self.held())
        self.move(self.held())
        self.note((before, described(self.held())))
        return x.sin()


def passes(value, move, ckpt, **options):
    """Give how each pass of two batches found and left a value, and how it is at last."""
    noted = []
    keeps, x = Keeps(value, move, noted.append, **options), torch.ones(1, requires_grad=True)
    sum(ckpt(keeps, x) for _ in range(2)).backward()
    return noted, described(keeps.held())


def assert_preserved(make, move, **options):
    """Compare with the run without checkpointing. Backward takes the last batch first."""
    noted, last = passes(make(), move, plainly, **options)
    expected = [*noted, *reversed(noted)], last
    for ckpt in EXACT.values():
        assert passes(make(), move, ckpt, **options) == expected
        assert passes(make(), move, PLAIN.get(ckpt, non_reentrant), **options) != expected


def tensors_in(value):
    """Give the tensors in containers, each once."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    items = items if isinstance(items, (list, tuple, deque, set, frozenset, type({}.values()))) else ()
    return [*dict.fromkeys(tensor for item in items for tensor in tensors_in(item))]


def add(value):
    for tensor in tensors_in(value):
        tensor += 1


# Containers.


class Pair(NamedTuple):
    first: object
    second: object


class Tracker(list):
    """A list of a user's own."""


class OfTwo(tuple):
    def __new__(cls, one, other):
        return super().__new__(cls, (one, other))


class Names(set):
    pass


CONTAINERS = {
    "list": lambda t: [t, 1],
    "dict": lambda t: {"t": t, "n": 1},
    "OrderedDict": lambda t: OrderedDict(t=t),
    "defaultdict": lambda t: defaultdict(int, t=t),
    "deque": lambda t: deque([t], maxlen=4),
    "tuple": lambda t: (t, 1),
    "named tuple": lambda t: Pair(t, [t]),
    "what torch.max gives": lambda t: t.max(0),
    "tuple of another class": lambda t: OfTwo(t, 1),
    "set": lambda t: {t, 1},
    "frozenset": lambda t: frozenset([t]),
    "list of another class": lambda t: Tracker([t]),
    "dictionary of another class": lambda t: Record({0: t}),
    "nested": lambda t: {"a": [(Pair([t], {"b": deque([t])}),)]},
    "with the structure that Python itself has": lambda t: [t, sys.version_info],
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_what_is_in_a_container_is_preserved(container):
    assert_preserved(lambda: container(torch.zeros(3)), add)


def count(counts):
    counts["a"] += 1
    counts[len(counts)] = [len(counts)]


@pytest.mark.parametrize("kind", [dict, OrderedDict, Counter, Record, lambda **_: defaultdict(int, a=1)])
def test_what_is_put_into_a_dictionary_is_not_there_in_the_recomputation(kind):
    assert_preserved(lambda: kind(a=1), count)


@pytest.mark.parametrize("kind", [list, Tracker, lambda items: deque(items, maxlen=3)])
def test_what_is_put_into_a_list_is_not_there_in_the_recomputation(kind):
    assert_preserved(lambda: kind([1, 2]), lambda items: items.append(len(items)))


@pytest.mark.parametrize("kind", [set, Names])
def test_what_is_put_into_a_set_is_not_there_in_the_recomputation(kind):
    assert_preserved(lambda: kind([0]), lambda names: names.add(len(names)))


@pytest.mark.parametrize("kind", [Tracker, Record])
def test_what_is_set_on_a_container_of_another_class_is_preserved(kind):
    def make():
        made = kind()
        made.unit = 0
        return made

    def set_unit(value):
        value.unit += 1

    assert_preserved(make, set_unit)


def with_itself(items, put):
    put(items, items)
    return items


@pytest.mark.parametrize(
    "make",
    [
        lambda: with_itself([torch.zeros(3)], list.append),
        lambda: with_itself({"t": torch.zeros(3)}, lambda held, itself: held.update(itself=itself)),
        lambda: with_itself([(), torch.zeros(3)], lambda held, itself: held.append((itself,))),
        lambda: with_itself(Record({0: torch.zeros(3)}), lambda held, itself: held.update(itself=itself)),
        lambda: with_itself(deque([torch.zeros(3)]), deque.append),
    ],
    ids=["list", "dictionary", "in a tuple", "of another class", "deque"],
)
def test_a_container_may_have_itself_in_it(make):
    def move(value):
        (tensor,) = [each for each in (value.values() if isinstance(value, dict) else value) if torch.is_tensor(each)]
        tensor += 1

    assert_preserved(make, move)


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("where", [lambda steps: [steps], lambda steps: {"a": [(steps,)]}])
def test_modules_in_containers_are_preserved(where, ckpt):
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = Steps()
            self.held = where(self._modules.pop("steps"))

        def forward(self, x):
            held = self.held[0] if isinstance(self.held, list) else self.held["a"][0][0]
            held.steps += 1  # before it is called
            return held(x).sin()

    gradients = []
    for by in (plainly, ckpt, non_reentrant):
        module, x = Holds(), torch.ones(1, requires_grad=True)
        sum(by(module, x) for _ in range(2)).backward()
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])


# What cannot be written to.


class Frozen(dict):
    """A configuration that refuses to be written to, as frozendict and a frozen python-box do."""

    def __setitem__(self, key, value):
        raise TypeError("this dictionary is read-only")


class Sealed(list):
    """One that cannot be copied either."""

    def __setitem__(self, place, value):
        raise AttributeError("sealed")

    def __copy__(self):
        raise NotImplementedError("there is but one")

    __reduce_ex__ = __copy__


class ReadOnlyNames(set):
    def __copy__(self):
        raise NotImplementedError("there is but one")

    __reduce_ex__ = __copy__


READ_ONLY = {
    "a dictionary with a list": lambda of: Frozen(sizes=[3, of], name="a"),
    "a dictionary in a dictionary": lambda of: Frozen(inner=Frozen(sizes=[3, of])),
    "in a plain one": lambda of: {"config": [Frozen(sizes=[of])]},
    "torch's own": lambda of: immutable_dict(sizes=immutable_list([[1], of])),
    "a list": lambda of: Sealed([[1], of]),
}


@pytest.mark.parametrize("make", READ_ONLY.values(), ids=READ_ONLY)
def test_a_read_only_container_with_containers_in_it_is_let_be(make):
    for ckpt in EXACT.values():
        module, config = nn.Sequential(Steps(), nn.Tanh()), make([1])
        module.config = config
        sum(ckpt(module, torch.ones(1, requires_grad=True)) for _ in range(2)).backward()
        assert module.config is config
        assert described(config) == described(make([1]))
        assert module[0].steps == 2


@pytest.mark.parametrize("make", READ_ONLY.values(), ids=READ_ONLY)
def test_a_read_only_container_with_a_tensor_in_it_is_named(make):
    what = (
        r"(?s)a (Frozen|Sealed|immutable_list) on a module holds a tensor and cannot be copied .*: keep it in a buffer"
    )
    with pytest.warns(UserWarning, match=what):
        passes(make(torch.zeros(3)), lambda _: None, by_context)


def test_a_set_that_cannot_be_copied_is_let_be():
    noted, last = passes(ReadOnlyNames([1]), lambda _: None, by_context)
    assert len({str(each) for each in (*sum(noted, ()), last)}) == 1


# What is no container.


class Color(Enum):
    RED = 1
    BLUE = 2
    GREEN = 3


COLORS = list(Color)


class Size(IntEnum):
    SMALL = 1
    BIG = 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: [np.float64(1)],
        lambda: {"n": np.int32(1), "b": np.bool_(True)},
        lambda: [np.str_("a"), np.datetime64("2020-01-01"), np.void(b"a")],
        lambda: [Color.RED, {Size.SMALL: Color.BLUE}, {Color.RED}],
        lambda: [1 + 2j, b"a", None, ..., range(3), slice(1), torch.float32, torch.Size([1])],
    ],
    ids=["NumPy number", "NumPy numbers", "NumPy words", "enumerations", "others"],
)
def test_numpy_scalars_enumerations_and_pythons_own_values_are_preserved(make):
    def move(value):
        if isinstance(value, list):
            value[0] = COLORS[(COLORS.index(value[0]) + 1) % 3] if isinstance(value[0], Color) else value[0] + value[0]
        else:
            value["n"] += value["n"]

    assert_preserved(make, move)


@pytest.mark.parametrize(
    "make",
    [
        SimpleNamespace,
        nn.Identity,
        lambda: nn.Parameter(torch.ones(2)),
        lambda: [].append,
        lambda: random.SystemRandom(),
    ],
    ids=["object", "module", "trained parameter", "method", "generator without a state"],
)
def test_what_is_of_another_class_stands_for_itself(make):
    value, found = make(), []
    passes([value, (1, value)], lambda held: found.extend((held[0], held[1][1])), by_context)
    assert len(found) == 8
    assert all(each is value for each in found)


@pytest.mark.parametrize(
    ("kind", "draw"),
    [
        (lambda: torch.Generator().manual_seed(0), lambda held: torch.rand(3, generator=held)),
        (lambda: np.random.default_rng(0), lambda held: held.random()),
        (lambda: np.random.RandomState(0), lambda held: held.random()),
        (lambda: random.Random(0), lambda held: held.random()),
        (lambda: np.random.PCG64(0), lambda held: np.random.Generator(held).random()),
        (lambda: np.arange(3), lambda held: held.__iadd__(1)),
        (lambda: np.array([[1], "a", None], dtype=object), lambda held: held[0].append(1)),
        (lambda: np.ma.masked_array([1.0, 2.0], [True, False]), lambda held: held.__iadd__(1)),
        (lambda: np.rec.array([(1, 2.0)], names=["n", "x"]), lambda held: held.n.__iadd__(1)),
        (lambda: array("d", [0.5]), lambda held: held.append(1.0)),
        (lambda: bytearray(b"1"), lambda held: held.append(2)),
    ],
    ids=[
        *(
            "torch",
            "NumPy",
            "NumPy, old",
            "Python",
            "NumPy, bits",
            "array",
            "array of objects",
            "masked array",
            "record array",
        ),
        *("Python's array", "bytes"),
    ],
)
@pytest.mark.parametrize("where", [lambda held: held, lambda held: [held]])
def test_generators_of_random_numbers_and_arrays_are_preserved(where, kind, draw):
    assert_preserved(lambda: where(kind()), lambda held: draw(held[0] if isinstance(held, list) else held))


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_torchs_own_generator_stays_the_one_that_dropout_draws_from(ckpt):
    class Draws(nn.Module):
        def __init__(self, generator):
            super().__init__()
            self.generator = generator

        def forward(self, x):
            return nn.functional.dropout(x, 0.5) * torch.rand(9, generator=self.generator)

    def gradient(generator, ckpt):
        torch.manual_seed(0)
        x = torch.ones(9, requires_grad=True)
        ckpt(Draws(generator), x).square().sum().backward()
        return x.grad

    assert torch.equal(gradient(torch.default_generator, ckpt), gradient(torch.default_generator, plainly))
    true, wrong = (gradient(torch.Generator().manual_seed(0), by) for by in (plainly, PLAIN.get(ckpt, non_reentrant)))
    assert not torch.equal(wrong, true)


class DrawsTwice(nn.Module):
    """Draws from one stream by two generators."""

    def __init__(self):
        super().__init__()
        stream = np.random.PCG64(0)
        self.one, self.other = np.random.Generator(stream), np.random.Generator(stream)

    def forward(self, x):
        return (x * self.one.random() * self.other.random()).sin()


class CountsByWeight(nn.Module):
    """Keeps a number for each weight, frozen or not, in a dictionary that has the weights as keys."""

    def __init__(self):
        super().__init__()
        self.layer, self.frozen = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)
        self.counts = dict.fromkeys(self.parameters(), 0)

    def forward(self, x):
        for each in self.parameters():
            self.counts[each] += 1
        return (self.frozen(self.layer(x)) * sum(self.counts.values())).sin()


class ScaledBuffer(nn.Module):
    """Writes to an attribute of a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.ones(3))
        self.table.scale = torch.ones(3)

    def forward(self, x):
        self.table.scale.mul_(1.1)
        return (x * self.table * self.table.scale.clone()).sin()


class Remembers(nn.Module):
    """Looks up what it has computed for a tensor that it was given, in a dictionary with attributes in a circle."""

    def __init__(self):
        super().__init__()
        self.layer, self.table, self.steps = nn.Linear(3, 3), {}, 0
        self.register_buffer("one", torch.ones(3))
        self.register_buffer("other", torch.ones(3))
        self.one.other, self.other.one = self.other, self.one

    def forward(self, x):
        if POSITIONS in self.table:
            self.steps += 1
        self.table[POSITIONS] = self.table.get(POSITIONS, 0) + 1
        self.one.other += 1
        return (self.layer(x) * self.table[POSITIONS] * (1 + self.steps) + self.other).sin()


POSITIONS = torch.arange(3)


class RegistersAgain(nn.Module):
    """Takes a buffer and a weight away, and gives them back at the end, which a recomputation does not reach."""

    def __init__(self):
        super().__init__()
        self.weight, self.steps = nn.Parameter(torch.ones(3)), 0
        self.register_buffer("cache", torch.ones(3), persistent=False)

    def forward(self, x):
        weight, cache = self.weight, self.cache
        del self.weight, self.cache
        self.steps += 1
        y = (x * weight * self.steps).tanh() + cache
        self.weight = weight
        self.register_buffer("cache", cache + 1, persistent=False)
        return y


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("make", [DrawsTwice, CountsByWeight, ScaledBuffer, Remembers, RegistersAgain])
def test_rare_kinds_of_state_are_preserved(make, ckpt):
    def trained(ckpt):
        torch.manual_seed(0)
        module, x = make().double(), torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
        for _ in range(2):
            ckpt(module, x).square().sum().backward()
        return x.grad, [*module.state_dict()], sorted(dict(module.named_parameters())), sorted(vars(module))

    true = trained(plainly)
    mine = trained(ckpt)
    assert torch.equal(mine[0], true[0])
    assert mine[1:] == true[1:]
    if make is RegistersAgain:
        with pytest.raises(AttributeError, match="has no attribute 'weight'"):
            trained(non_reentrant)
    else:
        assert not torch.equal(trained(non_reentrant)[0], true[0])


def test_a_large_buffer_that_is_expanded_stays_so():
    layer, found = nn.Linear(3, 3), []
    layer.register_buffer("table", torch.ones(20_000, 1).expand(20_000, 3))

    def function(x):
        found.append(layer.table.stride())
        return layer(x).sin()

    by_context(function, torch.rand(4, 3, requires_grad=True)).sum().backward()
    assert found == [(1, 0)] * 2


def test_the_function_may_have_an_argument_of_any_name():
    x = torch.ones(3, requires_grad=True)
    drop_in(lambda x, engine: x * engine, x, engine=2).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]


# Tensors and the memory that they share.


def add_to_first(tensors):
    tensors[0] += 1


def add_at_the_end(tensors):
    """Add where the others have no part: they are read where they were, but memory need not be shared."""
    max(tensors, key=len)[-1] += 1


def rows_of(base):
    return [base[1], base, base[:, 1]]


def with_row(tensor):
    return [tensor, tensor.detach()[1]]


def with_part(dtype):
    whole = torch.arange(6).to(dtype)
    return [whole, whole[2:4].detach()]


def conjugate(of):
    whole = torch.complex(torch.arange(3.0), torch.arange(3.0) + 1)
    return [whole, of(whole[1:].conj()).detach()]


def halves(memory):
    return [memory.detach()[:3], memory.detach()[2:]]


def offset(row):
    return [row, row[2:5]]


def at_one_address():
    array = np.arange(6.0)
    return [torch.from_numpy(array), torch.from_numpy(array[:3])]


MEMORY = {
    "rows and columns": lambda: rows_of(torch.arange(6.0).reshape(2, 3)),
    "a transposed copy and a row": lambda: with_row(torch.arange(6.0).reshape(2, 3).t().clone()),
    "with gaps and a row": lambda: with_row(torch.empty_strided((2, 3), (6, 1)).copy_(torch.arange(6.0).view(2, 3))),
    "parts of float32": lambda: with_part(torch.float32),
    "parts of int8": lambda: with_part(torch.int8),
    "parts of complex64": lambda: with_part(torch.complex64),
    "a conjugate view": lambda: conjugate(lambda view: view),
    "a negative view": lambda: conjugate(lambda view: view.imag),
    "bytes of an odd number": lambda: halves(torch.arange(5).to(torch.uint8)),
    "one twice": lambda: [torch.ones(3)] * 2,
    "empty": lambda: [torch.ones(3), torch.zeros(0), torch.zeros(0)],
    "a part of something much larger": lambda: [torch.zeros(LARGE)[3:5]],
    "a part of something much larger, and that": lambda: offset(torch.zeros(LARGE)),
}


@pytest.mark.parametrize("as_buffers", [False, True], ids=["attributes", "buffers"])
@pytest.mark.parametrize("make", MEMORY.values(), ids=MEMORY)
def test_what_shares_memory_does_so_in_the_recomputation(make, as_buffers):
    assert_preserved(make, add_to_first, as_buffers=as_buffers)


APART = {  # as docs/limits.md says
    "a part of a part": lambda: offset(torch.arange(30000.0)[100:130].data),
    "a part of a large part": lambda: offset(torch.arange(60000.0)[10000:40000].data),
    "two sizes at one address": at_one_address,
    "two sizes at one address, the smaller first": lambda: at_one_address()[::-1],
}


@pytest.mark.parametrize("as_buffers", [False, True], ids=["attributes", "buffers"])
@pytest.mark.parametrize("make", APART.values(), ids=APART)
def test_what_need_not_share_memory_in_the_recomputation_has_its_value_all_the_same(make, as_buffers):
    assert_preserved(make, add_at_the_end, as_buffers=as_buffers)


def test_a_large_view_of_small_memory_shares_it_in_the_recomputation():
    def make():
        small = torch.arange(4.0)
        return [small.expand(LARGE // 8, 4), small]

    assert_preserved(make, lambda tensors: tensors[1].add_(1))


def test_views_of_any_kind_are_views_in_the_recomputation():
    def make():
        table = torch.complex(torch.arange(6.0), torch.ones(6)).reshape(2, 3)
        return [table, table.mH, table.conj()[1], table.imag, table.conj().imag, table.T, table[1, 1:], table.data[1]]

    def move(tensors):
        tensors[0] *= 1 + 2j

    assert_preserved(make, move)


def test_state_is_put_back_as_often_as_there_is_a_backward_pass():
    def make():
        whole, other = torch.ones(3), torch.ones(2, 2)
        return [whole, other, torch.zeros(0), torch.ones(4), whole, other.detach()[1], whole[1:]]

    noted = []
    keeps, x = Keeps(make(), add, noted.append), torch.ones(1, requires_grad=True)
    loss = by_context(keeps, x)
    for again in range(3):
        loss.backward(retain_graph=again < 2)
    assert len(noted) == 4
    assert all(each == noted[0] for each in noted)
    assert described(keeps.value) == noted[0][1]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel and other quantized")
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("as_buffers", [False, True], ids=["attributes", "buffers"])
@pytest.mark.parametrize(
    ("make", "move"),
    [
        (lambda: torch.eye(3).to_sparse().coalesce(), lambda tensor: tensor.mul_(2)),
        (lambda: torch.eye(3).to_sparse().coalesce().values(), lambda tensor: tensor.mul_(2)),
        (lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]), lambda tensor: tensor.mul_(2)),
        (
            lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged),
            lambda tensor: tensor.mul_(2),
        ),
        (
            lambda: torch.quantize_per_tensor(torch.ones(3).float(), 0.1, 0, torch.quint8),
            lambda tensor: tensor.copy_(tensor.dequantize() + 1),
        ),
        (lambda: torch.zeros(LARGE, dtype=torch.complex64).to(torch.complex32), lambda tensor: tensor[:1].add_(1)),
    ],
    ids=["sparse", "values of a sparse one", "nested", "jagged", "quantized", "large, of a type without comparison"],
)
def test_odd_tensors_are_preserved(make, move, as_buffers):
    assert_preserved(lambda: [make()], lambda tensors: move(tensors[0]), as_buffers=as_buffers)


@pytest.mark.parametrize("table", [torch.zeros(3, device="meta"), torch.zeros(LARGE, device="meta")])
def test_a_tensor_without_values_does_no_harm(table):
    noted, last = passes([table], lambda _: None, by_context, as_buffers=True)
    assert noted == [(last, last)] * 4


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
        return x * (self.read[0] if isinstance(self.read, (list, tuple)) else self.read)[:3].clone()


def frozen():
    return nn.Parameter(torch.ones(3), requires_grad=False)


def aliased(tensor, of):
    return Two(written=tensor, read=of(tensor))


def reversed_alias(tensor, of):
    return Two(read=of(tensor), written=tensor)


def unregistered(tensor):
    layer = Two(written=tensor)
    vars(layer)["read"] = tensor  # past nn.Module
    return layer


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
    "a frozen parameter and a tuple": lambda: aliased(frozen(), lambda p: (p,)),
    "a frozen parameter that is an attribute too": lambda: unregistered(frozen()),
    "a negative view": lambda: reversed_alias(torch.ones(3), lambda t: torch._neg_view(t.detach()).detach()),
}


def gradient_of(layer, ckpt, batches=2):
    """Give the gradient of the input after several batches."""
    x = torch.ones(3, requires_grad=True)
    sum(ckpt(layer, x).square().sum() for _ in range(batches)).backward()
    return x.grad


def assert_exact(make, ckpt):
    """Compare the gradient with that of the run without checkpointing, and with that of torch's checkpoint."""
    true, mine, wrong = (gradient_of(make(), each) for each in (plainly, ckpt, PLAIN.get(ckpt, non_reentrant)))
    assert torch.equal(mine, true)
    assert not torch.equal(wrong, true)


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
def test_what_is_read_by_another_name_is_exact(make, ckpt):
    assert_exact(make, ckpt)


class Scaled(nn.Module):
    """Has numbers on its tensors."""

    def __init__(self, tensor):
        super().__init__()
        self.tensor = tensor
        self.tensor.scale = 1

    def forward(self, x):
        self.tensor.scale += 1
        return (x * self.tensor.scale).sin()


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Buffer(torch.ones(3)),
        lambda: nn.Buffer(torch.ones(LARGE)),
        lambda: torch.ones(3),
        lambda: torch.ones(LARGE),
        lambda: nn.Parameter(torch.ones(LARGE // 8), requires_grad=False),  # larger ones are not preserved
    ],
    ids=["buffer", "large buffer", "attribute", "large attribute", "frozen parameter"],
)
def test_what_is_set_on_a_tensor_is_preserved(make, ckpt):
    assert_exact(lambda: Scaled(make()), ckpt)


def test_what_leads_from_a_large_tensor_to_its_module_does_not_keep_it():
    layer = nn.Linear(3, 3)
    layer.register_buffer("mask", torch.ones(LARGE))
    layer.mask.owner = layer
    by_context(nn.Sequential(layer), torch.ones(2, 3, requires_grad=True)).sum().backward()
    reference = weakref.ref(layer)
    del layer
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("size", [4, 100, 1000, 8000])
@pytest.mark.parametrize("resized", [False, True], ids=["replaced", "resized"])
def test_memory_that_was_copied_is_not_mixed_up_with_what_comes_into_its_place(resized, size):
    def give_back(held):
        if resized:
            held[0].resize_(9 * size).fill_(1.0)
        else:
            held[0].data = torch.ones(size)

    noted, made = [], []  # of modules that nobody knows before the first one has given its memory back
    first = Keeps([torch.zeros(size)], give_back, lambda _: None, True)

    def function(x):
        y = first(x)
        if not made:
            later = [Keeps([torch.full((size,), 7.0)], add, noted.append, True) for _ in range(9)]
            made.append(SimpleNamespace(later=later))
        return sum(keeps(y) for keeps in made[0].later)

    by_context(function, torch.ones(1, requires_grad=True)).backward()
    assert len(noted) == 18
    assert noted[:9] == noted[9:]


def test_a_part_of_a_weight_that_is_out_of_its_graph_is_written_to_once():
    keeps = Keeps([], add, lambda _: None)
    keeps.weight = nn.Parameter(torch.ones(3, 2))
    keeps.value.append(keeps.weight.detach()[0])
    loss = by_context(keeps, torch.ones(1, requires_grad=True))
    with pytest.warns(UserWarning, match="a parameter of shape"):
        loss.backward()
    assert keeps.weight.tolist() == [[2, 2], [1, 1], [1, 1]]


def test_a_value_in_a_graph_is_copied_out_of_it_and_a_leaf_stands_for_itself():
    leaf, found = torch.ones(2, requires_grad=True), []
    inner = leaf * 2
    passes([leaf, inner], lambda held: found.append(tuple(held)), by_context)
    (_, first), _, _, (same, copied) = found
    assert same is leaf
    assert first is inner is not copied
    assert copied.requires_grad
    assert torch.autograd.grad(copied.sum(), leaf, allow_unused=True) == (None,)
    found.clear()
    passes([leaf, inner], lambda held: found.append(tuple(held)), drop_in_reentrant)
    assert found[-1][1] is inner  # the reentrant engine has no other way back into the graph


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


def test_what_a_forward_puts_on_a_module_is_not_there_in_the_recomputation():
    found = []

    class Puts(nn.Module):
        def forward(self, x):
            found.append(hasattr(self, "new"))
            self.new = 1
            return x.sin()

    module = Puts()
    by_context(module, torch.ones(1, requires_grad=True)).backward()
    assert found == [False, False]
    assert module.new == 1


class Marks(nn.Module):
    """Moves what it has put on a module of torch's."""

    def __init__(self, layer, value):
        super().__init__()
        self.layer = layer
        self.layer.history = value

    def forward(self, x):
        self.layer.history += 1
        return self.layer(x) * (self.layer.history + torch.zeros(()))


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("layer", [nn.Identity, lambda: nn.Sequential(nn.Tanh()), lambda: nn.BatchNorm1d(3)])
def test_what_anybody_has_put_on_torchs_own_modules_is_preserved(layer, ckpt):
    def of_four(marks):
        return lambda x: marks(x * torch.arange(4.0)[:, None])

    for value in (1, torch.ones(())):
        assert_exact(lambda value=value: of_four(Marks(layer(), copy.deepcopy(value))), ckpt)


class HasAMean(nn.Module):
    """Keeps a running mean on a layer of torch's that is no norm, and moves it outside of the checkpoint."""

    def __init__(self, **more):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.layer.register_buffer("running_mean", torch.zeros(3))
        vars(self.layer).update(more)

    def forward(self, x, ckpt):
        y = ckpt(self.layer, x)
        self.layer.running_mean.lerp_(y.detach().mean(0), 0.1)
        return y - self.layer.running_mean.clone()


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("more", [{}, {"momentum": 0.1}], ids=["", "with a momentum"])
def test_a_layer_that_is_no_norm_may_have_a_running_mean(more, ckpt):
    found = []
    for by in (plainly, ckpt):
        torch.manual_seed(0)
        model, x = HasAMean(**more), torch.rand(4, 3, requires_grad=True)
        model(x, by).square().sum().backward()
        found.append((model.layer.running_mean.tolist(), x.grad.tolist(), model.layer.weight.grad.tolist()))
    assert found[0] == found[1]


# Modules whose hash and equality follow their state.


class Metric(nn.Module):
    """The mean of what it has seen, which its hash follows; what says that it is equal is a module too."""

    def __init__(self):
        super().__init__()
        self.total, self.number = torch.zeros(()), 0

    def __hash__(self):
        return hash((id(self), float(self.total), self.number))

    def __eq__(self, other):
        return nn.Identity()

    def forward(self, value):
        self.total = self.total + value
        self.number += 1
        return self.total / self.number


class ComparesTensors(Metric):
    """One that tells in which numbers it is equal, which is no truth value."""

    __hash__ = Metric.__hash__

    def __eq__(self, other):
        return torch.ones(3) == 1


class NormalizesBySize(nn.Module):
    """Divides by the mean size of what it has seen."""

    def __init__(self, metric):
        super().__init__()
        self.size, self.other = metric(), metric()

    def forward(self, x):
        for metric in (self.size, self.size, self.other):
            x = (x / metric(x.detach().abs().mean())).tanh() * 3
        return x


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("metric", [Metric, ComparesTensors])
def test_modules_are_told_apart_by_identity_and_not_by_hash_or_equality(metric, ckpt):
    assert_exact(lambda: NormalizesBySize(metric), ckpt)
    assert_exact(lambda: nn.Sequential(nn.Tanh(), NormalizesBySize(metric), NormalizesBySize(metric)), ckpt)


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
def test_modules_that_say_they_are_equal_are_told_apart(ckpt):
    class Equal(Steps):
        def __hash__(self):
            return 1

        def __eq__(self, other):
            return True

    first, second = Equal(), Equal()
    x = torch.ones(1, requires_grad=True)
    ckpt(lambda y: second(second(first(y))).sin(), x).backward()
    assert (first.steps, second.steps) == (1, 2)


class Tally(Steps):
    """What a metric is without its own equality."""

    def __init__(self):
        super().__init__()
        self.total = torch.zeros(())


class ReplacesAChild(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.steps, self.child = kind, 0, kind()

    def forward(self, x):
        self.steps += 1
        self.child = self.kind()
        self.child.total += self.steps
        return (x * self.child.total).sin()


@pytest.mark.parametrize("ckpt", [by_context, drop_in])
@pytest.mark.parametrize("kind", [Tally, Metric, ComparesTensors])
def test_a_child_that_the_forward_replaces_is_the_forwards_at_last(kind, ckpt):
    for by, last in ((plainly, 2), (ckpt, 2), (non_reentrant, 3)):
        module, x = ReplacesAChild(kind), torch.ones(1, requires_grad=True)
        losses = [by(module, x) for _ in range(2)]
        child = module.child
        losses[1].backward()
        assert float(module.child.total) == last
        assert (module.child is child) == (by is not non_reentrant)


# Large tensors and arrays that stand still.


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


def images():
    return torch.ones(2, 3, 2, 2).cumsum(0).requires_grad_()


def same_as_plainly(layer, ckpt=by_context):
    """Run a step with a layer and with its twin, and tell whether state and gradients are equal."""
    twin = copy.deepcopy(layer)
    x, y = images(), images()
    ckpt(layer, x).square().sum().backward()
    twin(y).square().sum().backward()
    return torch.equal(x.grad, y.grad) and picture(layer) == picture(twin)


def test_of_a_part_of_something_much_larger_that_part_is_kept_and_no_more():
    class Partial(nn.BatchNorm1d):
        """A class of a user's, so that what is on it is copied."""

    layer = Partial(3)
    layer.part = torch.zeros(LARGE)[3:5]
    small = sum(buffer.nbytes for buffer in layer.buffers()) + layer.part.nbytes
    assert kept(layer, torch.rand(2, 3, requires_grad=True)) == (small, 0)


def test_a_large_tensor_that_stands_still_is_copied_once():
    layer = Masked()
    small = layer.mean.nbytes + layer.var.nbytes
    assert kept(layer, images()) == (small, layer.table.nbytes)
    assert kept(layer, images()) == (small, 0)  # it is there
    layer.moves = visibly
    assert kept(layer, images()) == (small + layer.table.nbytes, 0)
    assert kept(copy.deepcopy(layer).eval(), images()) == (0, 0)


def test_the_copy_of_a_large_tensor_goes_with_the_tensor():
    def step(stays):
        layer = Masked()
        by_context(layer, images()).sum().backward()
        return layer if stays else None

    table = 128 * 128 * 8
    (_, held), (_, left) = (alive_after(lambda stays=stays: step(stays)) for stays in (True, False))
    assert held // table == 2  # and its copy
    assert left // table == 0


@pytest.mark.parametrize("ckpt", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("still", [0, 3, 70])
@pytest.mark.parametrize("moves", [visibly, replacing])
def test_a_large_tensor_may_move_at_any_time_where_autograd_sees_it(moves, still, ckpt):
    layer = Masked()
    for _ in range(still):
        ckpt(layer, images())
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
    layer, found = Masked(), []
    layer.moves = lambda layer: found.append(layer.table.dtype)
    for dtype in (torch.int64, torch.float64):
        for _ in range(70):
            by_context(layer, images())
        layer.table.data = layer.table.data.to(dtype)
        found.clear()
        by_context(layer, images()).sum().backward()
        assert found == [dtype, dtype]


def test_a_large_tensor_that_moves_unseen_after_all_is_found():
    layer = Masked()
    for _ in range(70):
        by_context(layer, images())
    layer.table.data.add_(1)
    layer.moves = unseen
    for _ in range(3):
        assert same_as_plainly(layer)


def test_a_recomputation_does_not_write_to_the_copy_that_all_share():
    layer, found, moving = Masked(), [], []

    def in_recomputations(layer):
        if moving:
            found.append(float(layer.table.sum()))
            layer.table.add_(1)

    layer.moves = in_recomputations
    losses = [by_context(layer, images()).sum() for _ in range(3)]
    moving.append(True)
    for loss in losses:
        loss.backward()
    assert found == [0, 0, 0]
    assert layer.table.eq(0).all()


@pytest.mark.parametrize(
    "table",
    [torch.zeros(128, 128).to_sparse(), nn.Parameter(torch.zeros(128, 128), requires_grad=False)],
    ids=["sparse", "parameter"],
)
def test_a_large_tensor_of_another_sort_is_copied_or_stands_for_itself(table):
    found = []
    passes([table], lambda held: found.append(held[0]), by_context)
    assert (found[-1] is table) == isinstance(table, nn.Parameter)
    assert found[-1].shape == table.shape


def test_a_large_tensor_made_in_inference_mode_is_copied():
    with torch.inference_mode():
        table = torch.zeros(128, 128)
    found = []
    passes([table], lambda held: found.append(held[0]), by_context)
    assert found[0] is table
    assert found[-1] is not table


def large(make=np.zeros):
    return make((128, 128))


def on_disk(folder, mode="w+"):
    array = np.memmap(folder / "array", dtype=np.float64, mode="w+", shape=(128, 128))
    if mode == "w+":
        return array
    array[:] = 0
    array.flush()
    return np.memmap(folder / "array", dtype=np.float64, mode=mode, shape=(128, 128))


def read_only():
    array = large()
    array.flags.writeable = False
    return array


def grown_by(work):
    """Give the result of some work, and how many bytes of arrays it has left."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        result = work()
        return result, tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("where", [lambda array: array, lambda array: {"a": [array]}], ids=["itself", "in a container"])
@pytest.mark.parametrize(
    ("make", "copies"),
    [
        (lambda _: large(), 1),
        (on_disk, 1),
        (lambda folder: on_disk(folder, "c"), 1),
        (lambda folder: on_disk(folder, "r"), 0),
        (lambda _: read_only(), 0),
        (lambda _: np.zeros(128 * 128, dtype=[("a", float)]), 1),
    ],
    ids=["in memory", "on disk", "copied on write", "on disk, read-only", "read-only", "structured"],
)
def test_a_large_array_that_stands_still_is_copied_once_and_never_if_it_is_read_only(tmp_path, make, copies, where):
    array = make(tmp_path)
    module, x = Keeps(where(array), lambda _: None, lambda _: None), torch.ones(1, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "described", lambda _: None)  # it makes lists of all values
        losses, held = grown_by(lambda: [by_context(module, x) for _ in range(4)])
        sum(losses).backward()
    assert held // array.nbytes == copies


@pytest.mark.parametrize(
    "make",
    [
        large,
        lambda: np.ma.masked_array(large(np.ones), large(np.ones)),
        lambda: np.rec.array(np.zeros(16000, dtype=[("a", float)])),
        lambda: np.full(16000, None),
        lambda: np.full(16000, np.datetime64("nat")),
        lambda: np.full(16000, np.nan),
    ],
    ids=["numbers", "masked", "records", "objects", "dates", "NaN"],
)
@pytest.mark.parametrize("still", [0, 3])
def test_a_large_array_may_move_at_any_time(make, still):
    def move(held):
        array, calls = held
        held[1] += 1
        if calls >= still:
            array[calls] = np.ones(1).astype(array.dtype)[0]

    def noted_by(ckpt):
        noted = []
        module, x = Keeps([make(), 0], move, noted.append), torch.ones(1, requires_grad=True)
        for _ in range(still):
            ckpt(module, x)
        noted.clear()
        sum(ckpt(module, x) for _ in range(2)).backward()
        return noted

    true = noted_by(plainly)
    for ckpt in EXACT.values():
        assert noted_by(ckpt) == [*true, *reversed(true)]
    assert noted_by(non_reentrant) != [*true, *reversed(true)]
