"""What a reentrant checkpoint computes: autograd saves nothing in its forward pass, so operations are compared."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from momentum_fix import _torch
from momentum_fix.state.compare import mark
from momentum_fix.state.fingerprint import fingerprint
from momentum_fix.state.reachable import closed_over

_NORMS = (functional.batch_norm, functional.instance_norm)
_UNREAD = ("running_mean", "running_var", "momentum")  # what backward does not read of what these were given
_DETACHING = (torch.Tensor.detach, torch.Tensor.detach_, torch.Tensor.data.__get__)  # type: ignore[attr-defined]
_SWITCHES = (torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
_GIVE_NOTHING = (torch.Tensor.__setitem__, _SWITCHES[1])  # and change what they are given
_UNCHANGED = frozenset(  # operations that give their input itself if that is as it has to be, or else a copy
    ("contiguous", "to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", "flatten")
)
_OF_HOOKS = ("torch.autograd.function", "torch.autograd.graph", "torch.utils.hooks")  # not on without gradients
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_NOTHING: Any = nullcontext()
_GIVEN = -1  # instead of the number of an operation: what the function was given
_ADDITIONS = ("AddBackward", "SubBackward", "RsubBackward")  # where it does not read numbers


class Value(NamedTuple):
    """What is kept of a tensor."""

    numbers: torch.Tensor | None  # its fingerprint
    dtype: torch.dtype
    shape: Any  # and which of its dimensions are expanded
    where: str  # the module that it was computed in
    matters: bool | None  # whether gradients depend on it; None: that is not known


class Origin(NamedTuple):
    """Where a tensor comes from."""

    made_by: tuple[int, int] | None  # the operation, and which of its results; _GIVEN, and which; None: from outside
    parameter: int | None  # its id, if it is a parameter that gets a gradient
    outside: int | None  # its id, if it is another tensor from outside that gets one
    requires_grad: bool


_CONSTANT = Origin(None, None, None, False)  # or what an engine has given back of its input, without a graph


class Operation(NamedTuple):
    """What is kept of an operation, or of what the function returns in the end."""

    name: tuple[str, str]  # the module that it ran in, and its own
    values: list[Value]  # what it was given and what it gave
    origins: list[Origin]  # of each of the values
    results: int = 0  # how many of the values, the last ones, it gave
    options: Any = None  # what else it was given
    options_matter: bool = False
    detaches: bool = False  # whether no gradient flows through it


class Tracing(TorchFunctionMode):
    """Keeps each operation that runs within, and what autograd keeps of it if gradients are on.

    Args:
        where: gives the name of the module that is running.
    """

    def __init__(self, where: Callable[[], str]) -> None:
        super().__init__()
        self.where = where
        self.operations: list[Operation] = []
        self.wraps = False  # whether a tensor is a DTensor, on which torch works in ways of its own
        self.hides = False  # whether there is something whose gradients nobody sees
        self.inside = 0  # how many forward passes of reentrant checkpoints inside of this one are running
        self.nodes = _torch.nodes_so_far()
        self.escaped = set[Any]()  # the origins of what somebody keeps that the function does not return
        self.made_by: Any = WeakIdKeyDictionary()  # tensors, each with the operation that gave it
        self.copied: Any = WeakIdKeyDictionary()  # those with the origin of what they are a copy of, each with its own

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and keep what gradients may depend on."""
        kwargs = kwargs or {}
        frame: Any = sys._getframe(1)
        while frame.f_code is Tracing.__torch_function__.__code__:  # of a checkpoint inside
            frame = frame.f_back
        caller = frame.f_globals.get("__name__", "")
        if caller.startswith("momentum_fix.") and frame.f_code is not _torch.called.__code__:
            return func(*args, **kwargs)
        if func is torch.Tensor.view_as and caller in _OF_HOOKS:
            output = func(*args, **kwargs)
            if args[0] in self.made_by:
                self.made_by[output] = self.made_by[args[0]]
            return output
        self.wraps |= any(hasattr(each, "device_mesh") for each in tensors_in([args, kwargs]))
        if self.wraps or _torch.is_in_transform():
            self.hides = True
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        name = getattr(func, "__self__", func).__name__ if name == "__get__" else name  # the property's
        before = {id(each): _torch.version(each) for each in tensors_in([args, kwargs])}
        kept = set[Any]()
        allowed = _torch.allows_saved_hooks()
        self.hides |= not allowed
        with (
            _torch.noting_saved(lambda each: kept.add(_place(each)))
            if allowed and torch.is_grad_enabled()
            else _NOTHING
        ):
            output = func(*args, **kwargs)
        given = [args, kwargs]
        if func in _NORMS:
            bound = inspect.signature(func).bind(*args, **kwargs).arguments
            given = [value for name, value in bound.items() if name not in _UNREAD]
        outputs = [*tensors_in(args[0] if func in _GIVE_NOTHING else output)]
        if func not in _SWITCHES and name not in _UNCHANGED:  # a dropout that drops nothing gives its input itself
            outputs = [each for each in outputs if before.get(id(each)) != _torch.version(each)]
        if any(each.is_floating_point() or each.is_complex() for each in outputs):
            tensors = [*tensors_in(given), *outputs]
            graph = [type(each.grad_fn).__name__ for each in outputs if each.requires_grad]
            reads_options = "alpha" in kwargs or func in _SWITCHES
            reads_options |= any(not name.startswith(_ADDITIONS) for name in graph)
            reads_options |= bool(kept.difference(map(_place, tensors)))  # of what an operation inside of it has given
            matter: list[bool | None] = [*_matter(tensors, kept, reads_options)]
            if self.inside and name not in _EMPTY:  # its own recomputation will show what autograd keeps, but not here
                matter, reads_options = [None] * len(tensors), True
            options = _options(given), reads_options, func in _DETACHING
            self._keep(name, tensors, matter, len(outputs), *options)
            number = len(self.operations) - 1
            if name in _UNCHANGED and (tensors[0] in self.made_by or outputs[0] is tensors[0]):
                self.made_by.update((each, self.made_by[tensors[0]]) for each in outputs if tensors[0] in self.made_by)
                self.copied.update(
                    (each, (number, place)) for place, each in enumerate(outputs) if id(each) not in before
                )
            else:
                self.made_by.update((each, (number, place)) for place, each in enumerate(outputs))
                bases = [(_torch.base_of(each), place) for place, each in enumerate(outputs) if id(each) in before]
                self.made_by.update((each, (number, place)) for each, place in bases if each is not None)
        return output

    def given(self, args: tuple[Any, ...], first: list[int]) -> list[int]:
        """Note what the function is given, what it is given twice as one; `first` says what is, in a recomputation."""
        tensors = [*tensors_in(args)]
        ids = [*map(id, tensors)]
        first = first or [*map(ids.index, ids)]
        self.made_by.update((each, (_GIVEN, place)) for each, place in zip(tensors, first, strict=False))
        return first

    def returned(self, output: Any, without: set[int], *, is_all: bool) -> None:
        """Keep what the function returns, and what others keep, but for those `without`.

        Args:
            without: ids of tensors that are kept for the function itself.
            is_all: whether nothing else is seen of the function.
        """
        tensors = [*tensors_in(output)]
        self._keep("return", tensors, [is_all and each.requires_grad for each in tensors], 0)
        # The reentrant engine gives back a graph for these alone. (Without gradients, no graph keeps a tensor alive.)
        direct = [
            each for each in (output if isinstance(output, tuple) else [output]) if isinstance(each, torch.Tensor)
        ]
        views = [each for each in direct if not _torch.is_base_kept(each)]
        passed_on = without | {id(each) for each in direct} | {id(_torch.base_of(each)) for each in views}
        alive = [(each, place) for each, place in self.made_by.items() if not isinstance(each, nn.Parameter)]
        places = {self.copied.get(each, place) for each, place in alive if id(each) not in passed_on}
        self.escaped = {place for place in places if place[0] != _GIVEN}

    def _keep(
        self, name: str, tensors: list[torch.Tensor], matter: list[bool | None], results: int, *others: Any
    ) -> None:
        where, values, origins = self.where(), [], []
        for place, (tensor, matters) in enumerate(zip(tensors, matter, strict=True)):
            made_by, trains = self.made_by.get(tensor), tensor.requires_grad
            is_given = made_by is not None and made_by[0] == _GIVEN
            parameter = id(tensor) if trains and isinstance(tensor, nn.Parameter) and not is_given else None
            is_outside = trains and parameter is None and made_by is None and place < len(tensors) - results
            if is_outside and not _torch.is_older(tensor, self.nodes):  # nobody has seen what has made it
                is_outside, self.hides = False, True
            self.hides |= is_outside and bool(tensor._backward_hooks)  # where its gradient comes in parts
            origins.append(Origin(made_by, parameter, id(tensor) if is_outside else None, trains))
            is_input = is_given or (trains and tensor.is_leaf and parameter is None and made_by is None)
            values.append(value_of(tensor, where, True if is_input else matters))
        self.operations.append(Operation((where, name), values, origins, results, *others))


def _matter(tensors: list[torch.Tensor], kept: set[Any], reads_options: bool) -> Iterator[bool]:
    """Tell of each tensor of an operation whether gradients depend on it, by what autograd keeps."""
    places = [*map(_place, tensors)]
    all_matter = bool(kept.difference(places))  # autograd keeps something else, computed from all of them
    for tensor, place in zip(tensors, places, strict=True):
        is_option = reads_options and not (tensor.is_floating_point() or tensor.is_complex())  # of whole numbers
        yield all_matter or place in kept or is_option


def compared(before: Tracing, after: Tracing) -> Iterator[tuple[Value, Value | None]]:
    """Give the values that gradients depend on, with those of the forward pass; None where other code ran.

    What only the forward pass has computed, as the first one of a lazy module does, is passed over.
    """
    forward, recomputed = before.operations, after.operations
    names = [[each.name for each in trace] for trace in (forward, recomputed)]
    if names[0] == names[1]:
        partner = {place: place for place in range(len(forward))}
    else:
        blocks = SequenceMatcher(None, names[0], names[1], False).get_matching_blocks()
        partner = {there + i: here + i for here, there, length in blocks for i in range(length)}
    flows = _flows(forward)
    partner[_GIVEN] = _GIVEN
    for place, now in enumerate(recomputed):
        if place not in partner:
            if now.options_matter or any(each.matters is not False for each in now.values):
                yield _other(now)
            continue
        then = forward[partner[place]]
        inputs = len(now.origins) - now.results
        rewired = [_is_rewired(*pair, partner, flows) for pair in zip(then.origins, now.origins[:inputs], strict=False)]
        if True in rewired or (now.options_matter and now.options != then.options):
            yield _other(now)
            continue
        results = enumerate(now.origins[inputs:])
        lost = any(each.requires_grad and (partner[place], i) in before.escaped for i, each in results)
        if lost or None in rewired:
            yield _unknown(now)
        yield from (pair for pair in zip(then.values, now.values, strict=False) if pair[1].matters is not False)


def _other(now: Operation) -> tuple[Value, Value | None]:
    """Give what stands for an operation that is another one than in the forward pass."""
    return (now.values[-1], None) if now.values[-1].matters is not None else _unknown(now)


def _unknown(now: Operation) -> tuple[Value, Value]:
    """Give what stands for an operation that cannot be compared."""
    return now.values[-1]._replace(numbers=None), now.values[-1]


def _flows(operations: list[Operation]) -> list[bool]:
    """Tell of each operation of a forward pass whether gradients flow through it, as far as that can be seen."""
    flows: list[bool] = []
    for each in operations:
        sources = (
            flows[o.made_by[0]] if o.made_by and o.made_by[0] != _GIVEN else o.requires_grad for o in each.origins
        )
        flows.append(not each.detaches and any(sources))
    return flows


def _is_rewired(old: Origin, new: Origin, partner: dict[int, int], flows: list[bool]) -> bool | None:
    """Tell whether gradients flow to something else than where the value of the forward pass came from.

    None where that is not known: what the forward pass has computed may have been computed without gradients there.
    """
    if new.parameter is not None:
        return new.parameter != old.parameter
    if old.parameter is not None:  # if it is frozen by now, it gets none without this, too
        return new.made_by is not None and not new.requires_grad
    if new.outside != old.outside and new.outside:
        return None
    made_by = new.made_by and (partner.get(new.made_by[0]), new.made_by[1])
    if made_by == old.made_by:
        return False
    if (
        not new.requires_grad
        and old.made_by
        and (old.requires_grad if old.made_by[0] == _GIVEN else flows[old.made_by[0]])
    ):
        return True if new.made_by else None
    is_known = new.outside is not None or (new.made_by is not None and (old != _CONSTANT or new.made_by[0] != _GIVEN))
    return None if new.requires_grad and not is_known else new.requires_grad


def _place(tensor: torch.Tensor) -> Any:
    """Give what is the same for a tensor and a view of all of it."""
    is_plain = tensor.layout is torch.strided and not tensor.is_nested
    return (tensor.data_ptr(), tensor.shape) if is_plain else id(tensor)


def value_of(tensor: torch.Tensor, where: str, matters: bool | None) -> Value:
    """Keep of a tensor what is needed to compare it."""
    shape: Any = None
    if tensor.layout is torch.strided and not tensor.is_nested:
        shape = (
            *tensor.shape,
            *(size > 1 and not step for size, step in zip(tensor.shape, tensor.stride(), strict=True)),
        )
    return Value(fingerprint(tensor), tensor.dtype, shape, where, matters)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Give the tensors in lists, tuples and dictionaries, but not those of lazy modules."""
    if isinstance(value, torch.Tensor):
        if not nn.parameter.is_lazy(value):
            yield value
    elif isinstance(value, slice):
        yield from tensors_in((value.start, value.stop, value.step))
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(each)


def _options(value: Any) -> Any:
    """Give what is no tensor in what an operation was given."""
    if isinstance(value, slice):
        return _options((value.start, value.stop, value.step))
    if isinstance(value, (list, tuple)):
        return tuple(map(_options, value))
    if isinstance(value, dict):
        return tuple((name, _options(each)) for name, each in value.items())
    if isinstance(value, types.FunctionType):  # which may be made anew
        known = (types.FunctionType, torch.Tensor)
        return id(value.__code__), [mark(each) for each in closed_over(value) if not isinstance(each, known)]
    return None if isinstance(value, torch.Tensor) else mark(value)
