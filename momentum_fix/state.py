"""The state of a module itself: what is on it but parameters, submodules and hooks. Copy it, and put it back."""

from __future__ import annotations

import warnings
from collections import deque
from copy import copy
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

_SKELETON = vars(nn.Module()).keys() - {"_buffers"}  # parameters, submodules, hooks, and whether it is in training
_FIXED = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size))
FILLED = (list, deque, dict)
LARGE = 1 << 16  # bytes; what is not larger is copied without asking whether it ever moves
_COMPARED = 64  # so many times a large tensor is compared with its copy before it is expected to stand still


def keep(module: nn.Module, copier: Copier) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give all that is on a module, with copies of what can be written to; and these copies alone, by name."""
    own = vars(module)
    copied = {
        name: copier.copy(value)
        for name, value in own.items()
        if name not in _SKELETON and type(value) not in _FIXED and not _is_fixed_tuple(value)
    }
    return own | copied, copied


def put(module: nn.Module, everything: dict[str, Any]) -> None:
    """Let a module have this on it, and nothing else."""
    own = vars(module)
    own.update(everything)
    if len(own) > len(everything):
        for name in own.keys() - everything.keys():
            del own[name]


class Copier:
    """Copies values, each of them once: what was one value in two places, or a view of another, still is.

    Copied are tensors, and lists, tuples, dictionaries, sets and deques, all the way down. Anything
    else stands for itself: numbers and parameters, objects of other classes, and modules, which are gathered.

    Args:
        share: whether copies of a large tensor that stands still may be one tensor; then nobody may write to it.
        detach: whether a tensor that is part of a graph is copied out of it, or stands for itself too.
    """

    def __init__(self, *, share: bool, detach: bool) -> None:
        self.share, self.detach = share, detach
        self.modules: list[nn.Module] = []
        self._storages: dict[tuple[torch.device, int], torch.Tensor] = {}  # copies of whole ones, by where they are
        self._copies: dict[int, tuple[Any, Any]] = {}  # by the value's id; with the value, lest another one gets its id

    def copy(self, value: Any) -> Any:
        """Give the copy of a value."""
        kind = type(value)
        if kind in _FIXED or _is_fixed_tuple(value):
            return value
        if id(value) in self._copies:
            return self._copies[id(value)][1]
        copied = value
        if isinstance(value, FILLED):
            copied = copy(value)
            self._copies[id(value)] = value, copied  # now, as it may have itself in it
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                copied[key] = self.copy(item)
        elif isinstance(value, torch.Tensor):
            copied = self._tensor(value)
        elif kind in (tuple, set, frozenset):
            copied = kind(map(self.copy, value))
        elif isinstance(value, tuple) and hasattr(value, "_make"):
            copied = value._make(map(self.copy, value))
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
        if tensor.requires_grad and not tensor.is_leaf and self.detach:
            with torch.enable_grad():
                return tensor.detach().requires_grad_().clone()  # no leaf, which could not be written to
        if tensor.requires_grad or (type(tensor) is not torch.Tensor and isinstance(tensor, nn.Parameter)):
            return tensor
        return _shared_copy(tensor) if self.share and _can_be_shared(tensor) else self._stored(tensor)

    def _stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor with its storage, for others may share that without being views of the tensor (`detach`)."""
        plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_quantized
        if not plain or tensor.is_meta or tensor.numel() == 0 or tensor.is_conj() or tensor.is_neg():
            return tensor.clone()
        storage = tensor.untyped_storage()
        place, size = (tensor.device, storage.data_ptr()), storage.nbytes()
        if place not in self._storages:
            if size == tensor.nbytes and tensor.is_contiguous():
                self._storages[place] = copied = tensor.clone()
                return copied
            if size > max(tensor.nbytes, LARGE):
                return tensor.clone()
            self._storages[place] = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage).clone()
        twin, whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device), self._storages[place].untyped_storage()
        return twin.set_(whole, tensor.storage_offset(), tensor.size(), tensor.stride())

    def _is_worth_a_copy(self, base: torch.Tensor, view: torch.Tensor) -> bool:
        return id(base) in self._copies or base.numel() <= max(view.numel(), LARGE // base.element_size())


def _is_fixed_tuple(value: Any) -> bool:
    return type(value) is tuple and _FIXED.issuperset(map(type, value))


# Masks and tables are large and stand still. Then all copies of one are one tensor.

_shared: Any = WeakTensorKeyDictionary()  # by tensor: its copy, what it was then, and how often it was asked for


def _can_be_shared(tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.nbytes <= LARGE:
        return False
    return type(tensor) is torch.Tensor and not (tensor.is_meta or tensor.is_inference())


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
