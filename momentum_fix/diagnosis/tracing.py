"""What a reentrant checkpoint computes: autograd saves nothing in its forward pass, so operations are compared."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
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

_NORMS = (functional.batch_norm, functional.instance_norm)
_UNREAD = ("running_mean", "running_var", "momentum")  # what backward does not read of what these were given
_DETACHING = (torch.Tensor.detach, torch.Tensor.detach_, torch.Tensor.data.__get__)  # type: ignore[attr-defined]
_SWITCHES = (torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
_GIVE_NOTHING = (torch.Tensor.__setitem__, _SWITCHES[1])  # and change what they are given
_ADDITIONS = ("AddBackward", "SubBackward", "RsubBackward")  # where it does not read numbers


class Value(NamedTuple):
    """What is kept of a tensor."""

    numbers: torch.Tensor | None  # its fingerprint
    dtype: torch.dtype
    where: str  # the module that it was computed in
    matters: bool  # whether gradients depend on it


class Origin(NamedTuple):
    """Where a tensor comes from."""

    made_by: tuple[int, int] | None  # the number of the operation, and which of its results; None if it is from outside
    parameter: int | None  # its id, if it is a parameter that gets a gradient
    requires_grad: bool


class Operation(NamedTuple):
    """What is kept of an operation, or of what the function returns in the end."""

    name: tuple[str, str]  # the module that it ran in, and its own
    values: list[Value]  # what it was given and what it gave
    origins: list[Origin]  # of each of the values
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
        self.hides = False  # whether there is something whose gradients nobody sees
        self.kept = set[Any]()  # the origins of what modules keep with a graph
        self.made_by: Any = WeakIdKeyDictionary()  # tensors, each with the operation that gave it

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and keep what gradients may depend on."""
        kwargs = kwargs or {}
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("momentum_fix."):
            return func(*args, **kwargs)
        if func is torch.Tensor.view_as and caller == "torch.autograd.function":  # for a full backward hook, for one
            output = func(*args, **kwargs)
            if args[0] in self.made_by:
                self.made_by[output] = self.made_by[args[0]]
            return output
        if _torch.is_in_transform():
            self.hides = True
            return func(*args, **kwargs)
        kept = set[Any]()
        with _torch.noting_saved(lambda tensor: kept.add(_place(tensor))) if torch.is_grad_enabled() else nullcontext():
            output = func(*args, **kwargs)
        given = [args, kwargs]
        if func in _NORMS:
            bound = inspect.signature(func).bind(*args, **kwargs).arguments
            given = [value for name, value in bound.items() if name not in _UNREAD]
        outputs = [*tensors_in(args[0] if func in _GIVE_NOTHING else output)]
        if any(each.is_floating_point() or each.is_complex() for each in outputs):
            tensors = [*tensors_in(given), *outputs]
            places = [*map(_place, tensors)]
            all_matter = bool(kept.difference(places))  # autograd keeps something else, computed from all of them
            graph = [type(each.grad_fn).__name__ for each in outputs if each.requires_grad]
            reads_options = "alpha" in kwargs or any(not name.startswith(_ADDITIONS) for name in graph)
            reads_options |= func in _SWITCHES
            matter = [all_matter or place in kept for place in places]
            name = getattr(func, "__name__", str(func))
            self._keep(name, tensors, matter, _options(given), reads_options, func in _DETACHING)
            number = len(self.operations) - 1
            self.made_by.update((each, (number, place)) for place, each in enumerate(outputs))
        return output

    def returned(self, output: Any, *, is_all: bool) -> None:
        """Keep what the function returns; `is_all` if nothing else is seen of it."""
        tensors = [*tensors_in(output)]
        self._keep("return", tensors, [is_all and each.requires_grad for each in tensors])
        # The reentrant engine gives back a graph for these alone.
        passed_on = {id(each) for each in (output if isinstance(output, tuple) else [output])}
        self.hides |= any(each.requires_grad and id(each) not in passed_on for each in tensors)
        used = {origin.made_by for each in self.operations for origin in each.origins}
        self.hides |= not self.kept <= used  # that is probably for the loss

    def left(self, state: Iterable[Any]) -> None:
        """Look at the state of a module that is left: what it keeps with a graph has none in the forward pass."""
        made = (
            self.made_by[each] for each in tensors_in([*state]) if each.grad_fn is not None and each in self.made_by
        )
        self.kept.update(made)

    def _keep(self, name: str, tensors: list[torch.Tensor], matter: list[bool], *options: Any) -> None:
        where, values, origins = self.where(), [], []
        for tensor, matters in zip(tensors, matter, strict=True):
            made_by, trains = self.made_by.get(tensor), tensor.requires_grad
            parameter = id(tensor) if trains and isinstance(tensor, nn.Parameter) else None
            origins.append(Origin(made_by, parameter, trains))
            is_input = trains and tensor.is_leaf and parameter is None and made_by is None
            values.append(value_of(tensor, where, matters or is_input))
        self.operations.append(Operation((where, name), values, origins, *options))


def compared(forward: list[Operation], recomputed: list[Operation]) -> Iterator[tuple[Value, Value | None]]:
    """Give the values that gradients depend on, with those of the forward pass; None where other code ran.

    What only the forward pass has computed, as the first one of a lazy module does, is passed over.
    """
    names = [[each.name for each in trace] for trace in (forward, recomputed)]
    if names[0] == names[1]:
        partner = {place: place for place in range(len(forward))}
    else:
        blocks = SequenceMatcher(None, names[0], names[1], False).get_matching_blocks()
        partner = {there + i: here + i for here, there, length in blocks for i in range(length)}
    flows = _flows(forward)
    for place, now in enumerate(recomputed):
        if place not in partner:
            if now.options_matter or any(each.matters for each in now.values):
                yield now.values[-1], None
            continue
        then = forward[partner[place]]
        rewired = [_is_rewired(*pair, partner, flows) for pair in zip(then.origins, now.origins, strict=False)]
        if True in rewired or (now.options_matter and now.options != then.options):
            yield now.values[-1], None
            continue
        if None in rewired:
            yield now.values[-1]._replace(numbers=None), now.values[-1]  # which cannot be compared
        yield from (pair for pair in zip(then.values, now.values, strict=False) if pair[1].matters)


def _flows(operations: list[Operation]) -> list[bool]:
    """Tell of each operation of a forward pass whether gradients flow through it, as far as that can be seen."""
    flows: list[bool] = []
    for each in operations:
        sources = (flows[o.made_by[0]] if o.made_by else o.requires_grad for o in each.origins)
        flows.append(not each.detaches and any(sources))
    return flows


def _is_rewired(old: Origin, new: Origin, partner: dict[int, int], flows: list[bool]) -> bool | None:
    """Tell whether gradients flow to something else than where the value of the forward pass came from.

    None where that is not known: what the forward pass has computed may have been computed without gradients there.
    """
    if new.parameter is not None or old.parameter is not None:  # one that is frozen by now gets none without this, too
        return new.parameter not in (None, old.parameter)
    made_by = new.made_by and (partner.get(new.made_by[0], -1), new.made_by[1])
    if made_by == old.made_by:
        return False
    if not new.requires_grad and old.made_by and flows[old.made_by[0]]:
        return True if new.made_by else None
    return new.requires_grad


def _place(tensor: torch.Tensor) -> Any:
    """Give what is the same for a tensor and a view of all of it."""
    return (tensor.data_ptr() if tensor.layout is torch.strided else id(tensor)), tensor.shape


def value_of(tensor: torch.Tensor, where: str, matters: bool) -> Value:
    """Keep of a tensor what is needed to compare it."""
    return Value(fingerprint(tensor), tensor.dtype, where, matters)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Give the tensors in lists, tuples and dictionaries, but not those of lazy modules."""
    if isinstance(value, torch.Tensor):
        if not nn.parameter.is_lazy(value):
            yield value
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
    return None if isinstance(value, torch.Tensor) else mark(value)
