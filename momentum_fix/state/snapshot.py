"""The state of a module itself: what is on it but submodules and hooks. List it, copy it, put it back, compare it."""

from __future__ import annotations

import functools
import hashlib
import operator
import warnings
from collections import deque
from collections.abc import Iterable, Set
from copy import copy, deepcopy
from enum import Enum
from random import Random, SystemRandom
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from momentum_fix.state.fingerprint import fingerprint

SKELETON = frozenset(vars(nn.Module()))  # buffers, parameters, submodules, hooks, and whether it is in training
_FRAMEWORKS = ("_current_fx_name",)  # what a trainer (Lightning) sets on a module to know what is running
_FIXED = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size))
_NEED_NO_COUNTER = (_BatchNorm.forward, _InstanceNorm.forward)  # SyncBatchNorm insists on it
FILLED = (list, deque, dict)
WHOLE = (np.ndarray, torch.Generator, np.random.Generator, np.random.RandomState, Random)
LARGE = 1 << 16  # bytes; what is not larger is copied without asking whether it ever moves
_OF_OPTIONS = _FIXED | {tuple, list} | set(map(type, vars(nn.Module()).values()))
_TORCHS = "torch.nn.modules."
_LEAVES_A_CHECKPOINT = CheckpointFunction._backward_cls  # the reentrant engine's
_WHOLE_NUMBERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FRACTIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
_COMPARABLE = frozenset((*_WHOLE_NUMBERS, *_FRACTIONS))  # torch.equal knows not all dtypes
_COMPARED = 64  # so many times a large tensor is compared with its copy before it is expected to stand still


def keep(module: nn.Module, copier: Copier) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give all that is on a module, with copies of what can be written to; and these copies alone, by name."""
    own = vars(module)
    buffers = own["_buffers"]
    copied = {"_buffers": copier.copy(buffers) if buffers else {}}
    if not is_as_made(module):
        for name, value in own.items():
            if name not in SKELETON and type(value) not in _FIXED:
                copied[name] = copier.copy(value)
    everything = own | copied
    for name in _FRAMEWORKS:
        everything.pop(name, None)
    return everything, copied


def put(module: nn.Module, everything: dict[str, Any]) -> None:
    """Let a module have this on it, and nothing else."""
    own = vars(module)
    own.update(everything)
    if len(own) > len(everything):
        for name in own.keys() - everything.keys() - set(_FRAMEWORKS):
            del own[name]


def reads_no_buffer(module: nn.Module) -> bool:
    """Tell whether a module runs no code but torch's, in training mode, and its output depends on no buffer it has."""
    own: dict[str, Any] = vars(module)
    kind: Any = type(module)
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or not own.get("training"):
        return False
    if own["_buffers"] and not isinstance(module, _NormBase):
        return False
    return _runs_torchs(kind, kind.forward) and _OF_OPTIONS.issuperset(map(type, own.values()))


def scratch(module: Any) -> dict[str, Any]:
    """Give one of torch's norm layers buffers to write to, of which nobody reads the values."""
    own = module._buffers
    memory = None if own["running_mean"] is None else torch.empty_like(own["running_mean"])
    if module.momentum is not None and type(module).forward in _NEED_NO_COUNTER:
        return {"running_mean": memory, "running_var": memory, "num_batches_tracked": None}
    counter = own["num_batches_tracked"]
    return {
        "running_mean": memory,
        "running_var": memory,
        "num_batches_tracked": None if counter is None else counter.clone(),
    }


class _Made:
    """A class that only says how its objects are made."""

    of: int

    def __init__(self) -> None:
        self.of = 0


@functools.lru_cache
def _runs_torchs(kind: Any, forward: Any) -> bool:
    """Tell whether a class runs torch.nn's code: it is one of torch's, or adds but an `__init__` to one."""
    if not getattr(forward, "__globals__", {}).get("__name__", "").startswith(_TORCHS):
        return False
    others = (vars(each).keys() for each in kind.__mro__[:-1] if not _is_torchs_own(each))
    return all(names <= vars(_Made).keys() | {"__annotations_cache__"} for names in others)


def _is_torchs_own(kind: type) -> bool:
    return kind.__module__.startswith(_TORCHS)


def is_as_made(module: nn.Module) -> bool:
    """Tell whether all that is on a module, but buffers, is what one of torch's own classes puts there for good."""
    own = vars(module)
    kind: Any = type(module)
    return own.keys() <= _options(kind) and _OF_OPTIONS.issuperset(map(type, own.values()))


@functools.lru_cache
def _options(kind: Any) -> Set[str]:
    """Give the names of what one of torch's own classes puts on a module when it is made; of others, none."""
    if not _is_torchs_own(kind):
        return frozenset()
    made = (vars(each).get("__init__") for each in kind.__mro__)
    return SKELETON.union(*(init.__code__.co_names for init in made if isinstance(init, FunctionType)))


class Copier:
    """Copies values, each of them once: what was one value in two places, or a view of another, still is.

    Copied are tensors, NumPy arrays, generators of random numbers, and lists, tuples, dictionaries, sets and deques,
    all the way down. Anything else stands for itself: numbers, parameters unless they were copied by `parameter`,
    objects of other classes, and modules, which are gathered.

    Args:
        share: whether copies of a large tensor that stands still may be one tensor; then nobody may write to it.
        detach: whether a tensor that is part of a graph is copied out of it, or stands for itself too.
        alone: tensors that are to be copied and share no memory, which is quicker for all of them at once.
    """

    def __init__(self, *, share: bool, detach: bool, alone: list[torch.Tensor] | None = None) -> None:
        self.share, self.detach = share, detach
        self.modules: list[nn.Module] = []
        self.alone: dict[Any, torch.Tensor] = {}  # copies that share no memory, by where what they are made of is
        # Copies of whole storages, by where those are; with the storage, lest another one gets its place.
        self._storages: dict[Any, tuple[torch.Tensor, torch.UntypedStorage]] = {}
        self._copies: dict[int, tuple[Any, Any]] = {}  # by the value's id; with the value, lest another one gets its id
        if alone:
            self._copies = {id(each): (each, copied) for each, copied in zip(alone, _clones(alone), strict=True)}

    def together(self, tensors: Iterable[Any]) -> None:
        """Copy those of the tensors that share no memory, and are small, all at once, which is quicker."""
        alone = dict[Any, tuple[torch.Tensor, torch.UntypedStorage]]()
        for tensor in tensors:
            if type(tensor) is torch.Tensor and not (tensor.requires_grad or _is_odd(tensor) or vars(tensor)):
                storage = tensor.untyped_storage()
                place = _place(storage)
                if place not in self._storages and 0 < tensor.nbytes <= LARGE and _fills(tensor, storage):
                    alone[place] = tensor, storage
        copies = _clones([tensor for tensor, _ in alone.values()])
        for (place, (tensor, storage)), copied in zip(alone.items(), copies, strict=True):
            self._copies[id(tensor)] = tensor, copied
            self._storages[place] = copied, storage
            self.alone[place] = copied

    def parameter(self, parameter: nn.Parameter, value: torch.Tensor) -> nn.Parameter:
        """Give one with a copy of this value, which from now on is the copy of the parameter."""
        if id(parameter) not in self._copies:
            made = nn.Parameter(self.copy(value), requires_grad=False)
            vars(made).update(vars(value))
            self._copies[id(parameter)] = parameter, made
        return self._copies[id(parameter)][1]  # type: ignore[no-any-return]

    def copy(self, value: Any) -> Any:
        """Give the copy of a value."""
        kind = type(value)
        if kind in _FIXED or (kind is tuple and _FIXED.issuperset(map(type, value))):
            return value
        if id(value) in self._copies:
            return self._copies[id(value)][1]
        copied = value
        if isinstance(value, torch.Tensor):
            copied = self._tensor(value)
            if copied is not value and vars(value):
                copied = copied.detach() if copied.is_leaf else copied  # it may be shared
                # A tensor that is made of tensors has copies of these by now.
                vars(copied).update({name: each for name, each in vars(value).items() if name not in vars(copied)})
        elif isinstance(value, (set, frozenset, *FILLED)):
            copied = self._container(value)
        elif isinstance(value, tuple):
            items = [*map(self.copy, value)]
            if any(map(operator.is_not, items, value)):  # what torch.max gives is made in another way than tuples are
                copied = kind(items) if hasattr(kind, "n_sequence_fields") else tuple.__new__(kind, items)
        elif isinstance(value, np.ndarray) and not (value.flags.writeable and value.nbytes):
            copied = value
        elif self.share and kind in (np.ndarray, np.memmap) and value.nbytes > LARGE and value.dtype != object:
            copied = _shared_copy(value)
        elif isinstance(value, WHOLE) and kind is not SystemRandom:
            copied = deepcopy(value)
        elif isinstance(value, nn.Module):
            self.modules.append(value)
        self._copies[id(value)] = value, copied
        return copied

    def _container(self, value: Any) -> Any:
        """Copy a container, or give it itself if it cannot be written to."""
        kind = type(value)
        try:
            if isinstance(value, (set, frozenset)):
                return kind(map(self.copy, value)) if kind in (set, frozenset) else copy(value)
            copied = value.copy() if kind in (dict, list) else copy(value)
            self._copies[id(value)] = value, copied  # now, as it may have itself in it
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                twin = self.copy(item)
                if twin is not item:
                    copied[key] = twin
        except Exception as refusal:  # a frozen configuration, each class of which refuses with an exception of its own
            if kind in (dict, list, set, frozenset, deque):
                raise
            if _holds_a_tensor(value, set()):
                warnings.warn(
                    f"a {kind.__name__} on a module holds a tensor and cannot be copied ({type(refusal).__name__}: "
                    f"{refusal}), so it is not preserved. If the forward writes to that tensor, gradients may be "
                    "wrong: "
                    "keep it in a buffer",
                    stacklevel=2,
                )
            return value
        return copied

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.requires_grad:
            if tensor.is_leaf:
                return tensor
            if self.detach:
                with torch.enable_grad():
                    return tensor.detach().requires_grad_().clone()  # no leaf, which could not be written to
            if not isinstance(tensor.grad_fn, _LEAVES_A_CHECKPOINT):
                return tensor
            tensor = tensor.detach()  # lest every checkpoint holds the one before it
        if type(tensor) is not torch.Tensor or _is_odd(tensor):
            return tensor if isinstance(tensor, nn.Parameter) else tensor.clone()
        return self._stored(tensor)

    def _stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor with its storage, which others may share, views of it or not (`detach`)."""
        storage = tensor.untyped_storage()
        place = _, address, size = _place(storage)
        if not address:  # it is empty, or on the meta device
            return tensor.clone()
        if place not in self._storages:
            large = self.share and min(tensor.nbytes, size) > LARGE and _can_be_compared(tensor)
            fills = _fills(tensor, storage)
            if fills or large:
                copied = _shared_copy(tensor) if large else tensor.clone()
                if fills:
                    self._storages[place] = copied, storage
                if fills and not (large or vars(tensor)):
                    self.alone[place] = copied
                return copied
            if size > max(tensor.nbytes, LARGE):
                return tensor.clone()
            memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self._storages[place] = memory.clone(), storage
        self.alone.pop(place, None)
        whole = self._storages[place][0].untyped_storage()
        twin = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        twin.set_(whole, tensor.storage_offset(), tensor.size(), tensor.stride())
        twin = twin.conj() if tensor.is_conj() else twin
        return torch._neg_view(twin) if tensor.is_neg() else twin


def _is_odd(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is more or less than one piece of memory."""
    return tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized


def _place(storage: torch.UntypedStorage) -> tuple[torch.device, int, int]:
    return storage.device, storage.data_ptr(), storage.nbytes()


def _fills(tensor: torch.Tensor, storage: torch.UntypedStorage) -> bool:
    """Tell whether a tensor is all that is in its storage, each value once, and means what is there."""
    if storage.nbytes() != tensor.nbytes or tensor.is_conj() or tensor.is_neg():
        return False
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _can_be_compared(tensor: torch.Tensor) -> bool:
    return tensor.dtype in _COMPARABLE and not tensor.is_inference()


def _clones(tensors: list[torch.Tensor]) -> Iterable[torch.Tensor]:
    if tensors and hasattr(torch, "_foreach_clone"):  # since torch 2.12
        return torch._foreach_clone(tensors)
    return [tensor.clone() for tensor in tensors]


def _holds_a_tensor(value: Any, seen: set[int]) -> bool:
    if id(value) in seen:
        return False
    seen.add(id(value))
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, deque)) else ()
    return isinstance(value, torch.Tensor) or any(_holds_a_tensor(part, seen) for part in parts)


# Masks and tables are large and stand still. Then all copies of one are one.

_shared: Any = WeakTensorKeyDictionary()  # by tensor: its copy, what it was then, and how often it was asked for
_shared_arrays: Any = WeakIdKeyDictionary()


def _shared_copy(value: Any) -> Any:
    """Give the copy of a tensor or an array that is there already, if it has not changed since then.

    A tensor's version tells, unless it is written to where autograd does not see it; an array has none. So values are
    compared too, but later only at every power of two.
    """
    is_tensor = isinstance(value, torch.Tensor)
    shared, kind = (_shared, "tensor") if is_tensor else (_shared_arrays, "array")
    copied, then, asked = shared.get(value, (value, None, 0))
    now = (value._version, value.dtype, value.device) if is_tensor else value.dtype
    still = asked > 0 and then == now
    if still and (asked < _COMPARED or asked & (asked - 1) == 0):
        still = (
            torch.equal(copied, value)
            if is_tensor
            else np.array_equal(copied, value, equal_nan=value.dtype.kind in "fc")
        )
        if not still and asked >= _COMPARED:
            where = " where autograd does not see it (`.data`)" if is_tensor else ""
            warnings.warn(
                f"a {value.dtype} {kind} of shape {tuple(value.shape)} on a module was written to{where}, after it had "
                f"not changed in {_COMPARED} checkpoints: recomputations since then saw its old values, so their "
                "gradients may be wrong. From now on they are right",
                stacklevel=2,
            )
    if not still:
        copied, asked = value.clone() if is_tensor else value.copy(), 0
    shared[value] = copied, now, asked + 1
    return copied


# To compare states, each piece gets a mark. Equal pieces have equal marks, to the bit, and a mark keeps no large copy.


def pieces(module: nn.Module) -> dict[str, Any]:
    """Give what is on a module by name: buffers, parameters, plain attributes, and whether it is in training mode."""
    own = vars(module)
    plain = {name: value for name, value in own.items() if name not in SKELETON and name not in _FRAMEWORKS}
    return {"training": module.training, **plain, **own["_buffers"], **own["_parameters"]}


def mark(value: Any, *, by_value: bool = True, within: tuple[int, ...] = ()) -> Any:
    """Give what is equal for equal values only. What is inside objects of other classes is not looked at.

    Args:
        by_value: whether tensors are read; otherwise two marks of one tensor are equal as long as autograd has seen no
            write to it.
        within: the containers that this value is in.
    """
    kind = type(value)
    if id(value) in within:
        return "itself", within.index(id(value))
    down = functools.partial(mark, by_value=by_value, within=(*within, id(value)))
    if isinstance(value, torch.Tensor):
        what: Any = _of_tensor(value) if by_value or nn.parameter.is_lazy(value) else (id(value), version(value))
    elif isinstance(value, np.ndarray):
        held = value.tolist() if value.dtype == object else None
        what = value.shape, value.dtype.str, down(held) if held is not None else _digest(np.ascontiguousarray(value))
    elif isinstance(value, dict):
        what = tuple((down(key), down(item)) for key, item in value.items())
    elif isinstance(value, (list, tuple, deque)):
        what = tuple(map(down, value))
    elif isinstance(value, (set, frozenset)):
        what = frozenset(map(down, value))
    elif isinstance(value, torch.Generator):
        what = _of_tensor(value.get_state())
    elif isinstance(value, np.random.Generator):
        what = down(value.bit_generator.state)
    elif isinstance(value, np.random.RandomState):
        what = down(value.get_state())
    elif isinstance(value, Random) and kind is not SystemRandom:
        what = value.getstate()
    elif isinstance(value, np.generic):
        what = value.tobytes()
    elif isinstance(value, (float, complex)):
        what = repr(value)  # a NaN is equal to a NaN, and a negative zero is not zero
    elif isinstance(value, Enum) or kind in _FIXED or isinstance(value, (int, str, bytes)):
        what = value
    elif isinstance(value, nn.Module) or callable(value):
        what = id(value)
    else:
        what = None
    return kind, what


def _of_tensor(tensor: torch.Tensor) -> Any:
    if nn.parameter.is_lazy(tensor):
        return "not initialized"
    seen = tensor.shape, tensor.dtype, tensor.device
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and not _is_odd(tensor)
    if plain and tensor.nbytes <= LARGE and not tensor.is_meta:
        with torch.no_grad():
            memory = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        return *seen, _digest(memory.cpu().numpy())
    values = fingerprint(tensor.detach())
    return *seen, None if values is None else tuple(values.tolist())


def _digest(memory: np.ndarray) -> bytes:
    return hashlib.blake2b(memory.view(np.uint8).data if memory.size else b"", digest_size=16).digest()


def version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
