"""The state of a module itself: what is on it but parameters, submodules and hooks. Copy it, and put it back."""

from __future__ import annotations

import functools
import warnings
from collections import deque
from collections.abc import Iterable, Set
from copy import copy, deepcopy
from random import Random
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

SKELETON = frozenset(vars(nn.Module()))  # buffers, parameters, submodules, hooks, and whether it is in training
_FIXED = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size))
FILLED = (list, deque, dict)
WHOLE = (np.ndarray, torch.Generator, np.random.Generator, np.random.RandomState, Random)
KINDS = (torch.Tensor, tuple, set, frozenset, *FILLED, *WHOLE)  # what is copied
LARGE = 1 << 16  # bytes; what is not larger is copied without asking whether it ever moves
_OF_OPTIONS = _FIXED | {tuple, list} | set(map(type, vars(nn.Module()).values()))
_COMPARED = 64  # so many times a large tensor is compared with its copy before it is expected to stand still


def keep(module: nn.Module, copier: Copier) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give all that is on a module, with copies of what can be written to; and these copies alone, by name."""
    own = vars(module)
    buffers = own["_buffers"]
    copied = {"_buffers": copier.copy(buffers) if buffers else {}}
    if not _is_as_made(own, type(module)):
        for name, value in own.items():
            if name not in SKELETON and type(value) not in _FIXED:
                copied[name] = copier.copy(value)
    return own | copied, copied


def put(module: nn.Module, everything: dict[str, Any]) -> None:
    """Let a module have this on it, and nothing else."""
    own = vars(module)
    own.update(everything)
    if len(own) > len(everything):
        for name in own.keys() - everything.keys():
            del own[name]


def reads_no_buffer(module: nn.Module) -> bool:
    """Tell whether a module runs no code but torch's, in training mode: then its output depends on no buffer it has."""
    kind: Any = type(module)
    as_it_is = module.training and not (module._forward_hooks or module._forward_pre_hooks)
    return as_it_is and _acts_as_torchs(kind) and _OF_OPTIONS.issuperset(map(type, vars(module).values()))


@functools.lru_cache
def _acts_as_torchs(kind: Any) -> bool:
    """Tell whether a class is one of torch.nn's, or adds nothing to one but an `__init__`."""
    others = (vars(each) for each in kind.__mro__[:-1] if not _is_torchs_own(each))
    added = (name for names in others for name, value in names.items() if name[:2] != "__" or callable(value))
    return {"__init__", "__annotate_func__"}.issuperset(added)  # the second: since Python 3.14


def _is_torchs_own(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.modules.")


def _is_as_made(own: dict[str, Any], kind: Any) -> bool:
    """Tell whether all that is on a module, but buffers, is what one of torch's own classes puts there for good."""
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
    all the way down. Anything else stands for itself: numbers and parameters, objects of other classes, and modules,
    which are gathered.

    Args:
        share: whether copies of a large tensor that stands still may be one tensor; then nobody may write to it.
        detach: whether a tensor that is part of a graph is copied out of it, or stands for itself too.
        alone: tensors that are to be copied and share no memory, which is quicker for all of them at once.
    """

    def __init__(self, *, share: bool, detach: bool, alone: list[torch.Tensor] | None = None) -> None:
        self.share, self.detach = share, detach
        self.modules: list[nn.Module] = []
        self.alone: dict[Any, torch.Tensor] = {}  # copies that share no memory, by where what they are made of is
        self._storages: dict[Any, torch.Tensor] = {}  # copies of whole ones, by where they are
        self._copies: dict[int, tuple[Any, Any]] = {}  # by the value's id; with the value, lest another one gets its id
        if alone:
            self._copies = {id(each): (each, copied) for each, copied in zip(alone, _clones(alone), strict=True)}

    def together(self, tensors: Iterable[Any]) -> None:
        """Copy those of the tensors that share no memory, and are small, all at once, which is quicker."""
        alone = dict[Any, torch.Tensor]()
        for tensor in tensors:
            if type(tensor) is torch.Tensor and tensor._base is None and not tensor.requires_grad:
                place = _place(tensor) if tensor.layout is torch.strided and tensor.nbytes <= LARGE else None
                if place and place not in self._storages:
                    alone[place] = tensor
        clones = dict(zip(alone, _clones([*alone.values()]), strict=True))
        self._storages.update(clones)
        self.alone.update(clones)
        self._copies.update((id(tensor), (tensor, clones[place])) for place, tensor in alone.items())

    def copy(self, value: Any) -> Any:
        """Give the copy of a value."""
        kind = type(value)
        if kind in _FIXED or (kind is tuple and _FIXED.issuperset(map(type, value))):
            return value
        if id(value) in self._copies:
            return self._copies[id(value)][1]
        copied = value
        if kind is torch.Tensor:
            copied = self._tensor(value)
        elif isinstance(value, FILLED):
            copied = value.copy() if kind in (dict, list) else copy(value)
            self._copies[id(value)] = value, copied  # now, as it may have itself in it
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                copied[key] = self.copy(item)
        elif isinstance(value, torch.Tensor):
            copied = self._tensor(value)
        elif kind in (tuple, set, frozenset):
            copied = kind(map(self.copy, value))
        elif isinstance(value, tuple) and hasattr(value, "_make"):
            copied = value._make(map(self.copy, value))
        elif isinstance(value, WHOLE):
            copied = deepcopy(value)
        elif isinstance(value, nn.Module):
            self.modules.append(value)
        self._copies[id(value)] = value, copied
        return copied

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        base = tensor._base
        if base is not None and self._is_worth_a_copy(base, tensor):
            copied = self.copy(base)
            if copied is not base and (copied.stride(), base.dtype) == (base.stride(), tensor.dtype):
                return copied.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())  # type: ignore
        if tensor.requires_grad:
            if tensor.is_leaf or not self.detach:
                return tensor
            with torch.enable_grad():
                return tensor.detach().requires_grad_().clone()  # no leaf, which could not be written to
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
            return tensor if isinstance(tensor, nn.Parameter) else tensor.clone()
        size = tensor.nbytes
        if self.share and size > LARGE and not (tensor.is_meta or tensor.is_inference()):
            return _shared_copy(tensor)
        return self._stored(tensor, size)

    def _stored(self, tensor: torch.Tensor, own_size: int) -> torch.Tensor:
        """Copy a tensor with its storage, for others may share that without being views of the tensor (`detach`)."""
        place = _place(tensor)
        if place and place not in self._storages:
            self._storages[place] = self.alone[place] = copied = tensor.clone()
            return copied
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        place = tensor.device, address
        if not address or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            return tensor.clone()
        if place not in self._storages:
            if size > max(own_size, LARGE):
                return tensor.clone()
            self._storages[place] = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage).clone()
        self.alone.pop(place, None)
        twin, whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device), self._storages[place].untyped_storage()
        return twin.set_(whole, tensor.storage_offset(), tensor.size(), tensor.stride())

    def _is_worth_a_copy(self, base: torch.Tensor, view: torch.Tensor) -> bool:
        return id(base) in self._copies or base.numel() <= max(view.numel(), LARGE // base.element_size())


def _place(tensor: torch.Tensor) -> Any:
    """Tell where a tensor is, if it fills the memory that it is in."""
    storage = tensor.untyped_storage()
    address = storage.data_ptr()
    fills = address and storage.nbytes() == tensor.nbytes and tensor.is_contiguous() and not tensor.is_conj()
    return (tensor.device, address) if fills else None


def _clones(tensors: list[torch.Tensor]) -> Iterable[torch.Tensor]:
    if tensors and hasattr(torch, "_foreach_clone"):  # since torch 2.12
        return torch._foreach_clone(tensors)
    return [tensor.clone() for tensor in tensors]


# Masks and tables are large and stand still. Then all copies of one are one tensor.

_shared: Any = WeakTensorKeyDictionary()  # by tensor: its copy, what it was then, and how often it was asked for


def _shared_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Give the copy that is there already, if the tensor has not moved since then.

    Its version tells, unless it is written to where autograd does not see it. So values are compared too, but later
    only at every power of two.
    """
    copied, then, asked = _shared.get(tensor, (tensor, None, 0))
    now = tensor._version, tensor.dtype, tensor.device
    still = then == now
    if still and (asked < _COMPARED or asked & (asked - 1) == 0):
        still = torch.equal(copied, tensor)
        if not still and asked >= _COMPARED:
            warnings.warn(
                f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)} on a module was written to where autograd "
                f"does not see it (`.data`), after it had not changed in {_COMPARED} checkpoints: replays since then "
                "saw its old values, so their gradients may be wrong. From now on they are right",
                stacklevel=2,
            )
    if not still:
        copied, asked = tensor.clone(), 0
    _shared[tensor] = copied, now, asked + 1
    return copied  # type: ignore[no-any-return]
