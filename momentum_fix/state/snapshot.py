"""The state of a module itself, which is all that is on it but submodules: list it, copy it, put it back."""

from __future__ import annotations

import functools
import operator
import warnings
import weakref
from array import array
from collections import deque
from copy import copy, deepcopy
from random import Random, SystemRandom
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from momentum_fix import _torch
from momentum_fix.state.compare import FIXED, is_equal, is_odd

LARGE = 1 << 16  # bytes; larger tensors and arrays are compared with an earlier copy before they are copied again
_SKELETON = frozenset(vars(nn.Module()))  # buffers, parameters, submodules, hooks, and whether it is in training
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OF_HOOKS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_FRAMEWORKS = frozenset(["_current_fx_name"])  # what a trainer (Lightning) sets on a module to know what is running
_WHOLE = (torch.Generator, np.random.Generator, np.random.BitGenerator, np.random.RandomState, Random, bytearray, array)
_TUPLES = ("kernel_size", "stride", "padding", "dilation", "output_padding", "normalized_shape")
_LISTS = (
    "_flat_weights",
    "_flat_weights_names",
    "_flat_weight_refs",
    "_all_weights",
    "_reversed_padding_repeated_twice",
)
_OPTIONS = frozenset(_TUPLES + _LISTS)  # what layers of torch's have in tuples and lists, and do not write to
_STATISTICS, _NONE = frozenset(("running_mean", "running_var", "num_batches_tracked")), frozenset[str]()


def pieces(module: nn.Module) -> dict[str, Any]:
    """List the state of a module by name: buffers, parameters, children, attributes, hooks, and its mode."""
    own = vars(module)
    plain = {name: value for name, value in own.items() if name not in _SKELETON and name not in _FRAMEWORKS}
    # A proxy is told by its id, as it may stand for nothing that is there, and raises then, whatever it is asked.
    plain |= {name: id(value) for name, value in plain.items() if type(value) in weakref.ProxyTypes}
    children = {name: type(child) for name, child in own["_modules"].items()}  # one may be made anew each time
    return {
        "training": module.training,
        **plain,
        **hooks_of(module),
        **children,
        **own["_buffers"],
        **own["_parameters"],
    }


def keep(module: nn.Module, copier: Copier) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give all that is on a module, with copies of what can be written to; and these copies alone, by name."""
    own = vars(module)
    copied = {name: copier.copy(own[name]) for name in ("_buffers", "_non_persistent_buffers_set") if own[name]}
    for name, value in own.items():
        if type(value) not in FIXED and name not in _SKELETON and not _is_constant(value):
            copied[name] = copier.copy(value)
    everything = own | copied
    for name in _FRAMEWORKS:
        everything.pop(name, None)
    return everything, copied


def put(module: nn.Module, everything: dict[str, Any]) -> None:
    """Put back what was on a module, and remove what was not."""
    own = vars(module)
    own.update(everything)
    if len(own) > len(everything):
        for name in own.keys() - everything.keys() - _FRAMEWORKS:
            del own[name]


def has_attributes(module: nn.Module) -> bool:
    """Tell whether a module has more on it than what every module has, such as children."""
    return len(vars(module)) > len(_SKELETON)


def without_attributes(module: nn.Module) -> dict[str, Any]:
    """Give what is on a module that every module has."""
    return {name: value for name, value in vars(module).items() if name in _SKELETON}


def hooks_of(module: nn.Module) -> dict[str, dict[int, Any]]:
    """Give a module's hooks, in copies of the dictionaries that hold any."""
    own = vars(module)
    return {name: dict(own[name]) for name in _HOOKS + _OF_HOOKS if own[name]} if has_hooks(module) else {}


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a module has any hooks."""
    own = vars(module)
    forward = own["_forward_pre_hooks"] or own["_forward_hooks"]
    return bool(forward or own["_backward_pre_hooks"] or own["_backward_hooks"])


def put_hooks(module: nn.Module, hooks: dict[str, dict[int, Any]]) -> None:
    """Put back a module's hooks, into the same dictionaries, as the handles to remove a hook refer to these."""
    own = vars(module)
    if hooks or has_hooks(module):
        for name in _HOOKS + _OF_HOOKS:
            own[name].clear()
            own[name].update(hooks.get(name, ()))


def runs_torchs_code(module: nn.Module) -> bool:
    """Tell whether a call of a module runs code of torch's layers alone, and what its children run."""
    return type(module).__module__.startswith("torch.nn.modules.") and not has_hooks(module)


def reads_no_buffer(module: nn.Module) -> bool:
    """Tell whether a module runs torch's code alone, in training mode, and its output reads none of its buffers."""
    own = vars(module)
    if not runs_torchs_code(module) or not own["training"]:
        return False
    if own["_buffers"].keys() != (_STATISTICS if "momentum" in own else _NONE):
        return False
    if not has_attributes(module):
        return True
    for name in own.keys() - _SKELETON:
        if type(own[name]) not in FIXED and name not in _OPTIONS and not _is_constant(own[name]):
            return False
    return True


def scratch(module: Any) -> dict[str, Any]:
    """Give a norm layer of torch's buffers to write to, of which nobody reads the values."""
    mean, counter = module._buffers["running_mean"], module._buffers["num_batches_tracked"]
    memory = mean
    if mean is not None:
        is_plain = type(mean) is torch.Tensor
        memory = _memory(mean.shape, mean.dtype, mean.device) if is_plain else torch.empty_like(mean)
    counts = module.momentum is None or isinstance(module, nn.SyncBatchNorm)
    counter = counter.clone() if counts and counter is not None else None
    return {"running_mean": memory, "running_var": memory, "num_batches_tracked": counter}


@functools.cache
def _memory(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Give memory for anybody to write to, kept as to ask for it anew would cost each checkpoint microseconds."""
    with _torch.outside_of_modes():
        return torch.empty(shape, dtype=dtype, device=device)


class Copier:
    """Copies values, each of them once: one list under two names, or two views of one memory, are that in the copy too.

    Copied are tensors, arrays, generators of random numbers, and lists, tuples, dictionaries, sets and deques,
    all the way down. Numbers, parameters, modules and objects of other classes are not copied; modules are gathered.

    Args:
        share: whether all copies of a large tensor that does not change may be one; nobody may write to them then.
        detach: whether a tensor that is part of a graph is copied out of it, or not copied either.
    """

    def __init__(self, *, share: bool, detach: bool) -> None:
        self.share, self.detach = share, detach
        self.modules: list[nn.Module] = []
        self._copies: dict[int, Any] = {}  # by the id of the value
        self._storages: dict[Any, tuple[torch.UntypedStorage, torch.Tensor]] = {}  # by where the storage was
        self._memo: dict[int, Any] = {}
        self._held: list[Any] = []  # values, so that no other one gets their ids meanwhile

    def parameter(self, parameter: nn.Parameter, value: torch.Tensor) -> nn.Parameter:
        """Give a parameter with a copy of this value, which from now on is the copy of the one given."""
        if id(parameter) not in self._copies:
            made = nn.Parameter(self.copy(value), requires_grad=False)
            vars(made).update(vars(value))
            self._copies[id(parameter)] = made
            self._held.append(parameter)
        return self._copies[id(parameter)]  # type: ignore[no-any-return]

    def copy(self, value: Any) -> Any:
        """Give the copy of a value."""
        if _is_constant(value):
            return value
        kind = type(value)
        if id(value) in self._copies:
            return self._copies[id(value)]
        copied = value
        self._held.append(value)
        if isinstance(value, torch.Tensor):
            copied = self._tensor(value)
            if copied is not value and vars(value):
                copied = copied.detach() if copied.is_leaf else copied  # it may be shared
                self._copies[id(value)] = copied  # now, as its attributes may lead back to it
                # The copy of a tensor that is made of tensors has copies of these already.
                new = vars(value).keys() - vars(copied).keys()
                vars(copied).update({name: self.copy(vars(value)[name]) for name in new})
        elif isinstance(value, (list, deque, dict, set, frozenset)):
            copied = self._container(value)
        elif isinstance(value, tuple):
            items = [*map(self.copy, value)]
            if any(map(operator.is_not, items, value)):  # the class of what torch.max returns wants them in another way
                copied = kind(items) if hasattr(kind, "n_sequence_fields") else tuple.__new__(kind, items)
        elif isinstance(value, np.ndarray):
            if value.flags.writeable and value.nbytes:
                is_shared = self.share and kind in (np.ndarray, np.memmap) and value.nbytes > LARGE
                copied = _shared_copy(value) if is_shared and not value.dtype.hasobject else deepcopy(value)
        elif isinstance(value, _WHOLE) and kind is not SystemRandom and not _is_torchs_generator(value):
            copied = deepcopy(value, self._memo)  # two NumPy generators may draw from one stream
        elif isinstance(value, nn.Module):
            self.modules.append(value)
        self._copies[id(value)] = copied
        return copied

    def _container(self, value: Any) -> Any:
        """Copy a container, or give it itself if it cannot be written to."""
        kind = type(value)
        try:
            if isinstance(value, (set, frozenset)):
                return kind(map(self.copy, value)) if kind in (set, frozenset) else copy(value)
            copied = value.copy() if kind in (dict, list) else copy(value)
            self._copies[id(value)] = copied  # now, as it may hold itself
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                if (item_copied := self.copy(item)) is not item:
                    copied[key] = item_copied
            if isinstance(value, dict) and any(self._copies.get(id(key), key) is not key for key in value):
                # A tensor is looked up by what it is, in the same order; one from outside stays what it is.
                items = [(self._copies.get(id(key), key), item) for key, item in copied.items()]
                copied.clear()
                copied.update(items)
        except Exception as refusal:  # a frozen configuration: each such class refuses with an exception of its own
            if kind in (dict, list, set, frozenset, deque):
                raise
            if _holds_a_tensor(value, set()):
                warnings.warn(
                    f"a {kind.__name__} on a module holds a tensor and cannot be copied ({type(refusal).__name__}: "
                    f"{refusal}), so it is not preserved. If the forward writes to that tensor, gradients may be "
                    "wrong: keep it in a buffer",
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
            if not _torch.leaves_a_checkpoint(tensor):
                return tensor
            tensor = tensor.detach()  # lest every checkpoint holds the one before it
        if type(tensor) is not torch.Tensor or is_odd(tensor):
            return tensor if isinstance(tensor, nn.Parameter) else tensor.clone()
        return self._with_storage(tensor)

    def _with_storage(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor together with its memory, which others may be views of too."""
        storage = tensor.untyped_storage()
        place = address, size = storage.data_ptr(), storage.nbytes()
        if not address:  # it is empty, or on the meta device
            return tensor.clone()
        held, whole = self._storages.get(place, (None, tensor))
        if held is None or (held.data_ptr(), held.nbytes(), held.device) != (*place, storage.device):  # it has moved
            is_plain = not (tensor.is_conj() or tensor.is_neg() or tensor.is_inference())
            own_size = tensor.nbytes
            is_whole = size == own_size and is_plain and _is_dense(tensor)
            if self.share and LARGE < own_size <= size and is_plain:
                copied: torch.Tensor = _shared_copy(tensor)
            elif is_whole or size > max(own_size, LARGE):
                copied = tensor.clone()
            else:
                memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                self._storages[place] = storage, memory.clone()
                return self._with_storage(tensor)
            if is_whole:
                self._storages[place] = storage, copied
            return copied
        copied = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        copied.set_(whole.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
        copied = copied.conj() if tensor.is_conj() else copied
        return _torch.negated(copied) if tensor.is_neg() else copied


def _is_constant(value: Any) -> bool:
    kind = type(value)
    return kind in FIXED or (kind is tuple and FIXED.issuperset(map(type, value))) or kind in weakref.ProxyTypes


def _is_torchs_generator(value: Any) -> bool:
    """Tell whether this draws torch's own random numbers, which torch's checkpoint rewinds itself."""
    return value is torch.default_generator or any(value is each for each in torch.cuda.default_generators)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has each value once, and so a clone with the same strides."""
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _holds_a_tensor(value: Any, seen: set[int]) -> bool:
    if id(value) in seen:
        return False
    seen.add(id(value))
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, deque)) else ()
    return isinstance(value, torch.Tensor) or any(_holds_a_tensor(part, seen) for part in parts)


_shared_tensors: Any = WeakTensorKeyDictionary()
_shared_arrays: Any = WeakIdKeyDictionary()


def _shared_copy(value: Any) -> Any:
    """Give the last copy of a large tensor or array if it is still equal, as masks and tables are."""
    is_tensor = isinstance(value, torch.Tensor)
    shared = _shared_tensors if is_tensor else _shared_arrays
    copied = shared.get(value)
    alike = copied is not None and copied.dtype == value.dtype and copied.shape == value.shape
    if alike and is_tensor:
        alike = copied.device == value.device and is_equal(copied, value)
    elif alike:
        one, other = (np.ascontiguousarray(each).reshape(-1).view(np.uint8) for each in (copied, value))
        alike = np.array_equal(one, other)
    if not alike:
        copied = shared[value] = value.clone() if is_tensor else value.copy()
    return copied
