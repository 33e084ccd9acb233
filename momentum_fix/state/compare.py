"""Compare states: each value has a mark. Equal values have equal marks, to the bit, and no mark holds a large copy."""

from __future__ import annotations

import functools
import hashlib
import types
import weakref
from array import array
from collections import deque
from dataclasses import fields, is_dataclass
from enum import Enum
from numbers import Number
from random import Random, SystemRandom
from typing import Any

import numpy as np
import torch
from torch import nn

from momentum_fix._torch import hidden_from_function_modes, version
from momentum_fix.state.fingerprint import fingerprint

FIXED: frozenset[type] = frozenset(
    (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
)
_EXACT = FIXED - {float, complex}  # equal by `==` if they are to the bit
_HASHED = 1 << 16  # bytes; larger tensors have a fingerprint, which is read where they are
_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a value
_STATES: dict[type, Any] = {
    torch.Generator: torch.Generator.get_state,
    np.random.Generator: lambda generator: generator.bit_generator.state,
    np.random.BitGenerator: lambda generator: generator.state,
    np.random.RandomState: np.random.RandomState.get_state,
    Random: Random.getstate,
}


def mark(value: Any, *, by_value: bool = True, within: tuple[int, ...] = ()) -> Any:
    """Give what is equal for equal values only. Objects of other classes are not looked into.

    Args:
        by_value: whether tensors are read; otherwise two marks of one tensor are equal as long as autograd has seen no
            write to it.
        within: the ids of the containers that this value is in.
    """
    if type(value) in _EXACT:
        return type(value), value
    if type(value) in weakref.ProxyTypes or isinstance(value, type):  # a proxy may stand for nothing that is there
        return type(value), id(value)
    if id(value) in within:
        return "itself", within.index(id(value))
    down = functools.partial(mark, by_value=by_value, within=(*within, id(value)))
    what: Any = None
    if isinstance(value, torch.Tensor):
        with hidden_from_function_modes():
            what = _of_tensor(value) if by_value or nn.parameter.is_lazy(value) else (id(value), version(value))
        if type(value) is not torch.Tensor and isinstance(value, nn.Parameter):
            what = what, value.requires_grad
    elif isinstance(value, np.ndarray):
        what = value.shape, value.dtype.str, down(value.tolist()) if value.dtype.hasobject else _digest(value)
    elif isinstance(value, dict):
        what = tuple((down(key), down(item)) for key, item in value.items())
    elif isinstance(value, (list, tuple, deque)):
        what = tuple(map(down, value))
    elif isinstance(value, (set, frozenset)):
        what = frozenset(map(down, value))
    elif isinstance(value, (np.generic, array)):
        what = value.tobytes()
    elif isinstance(value, bytearray):
        what = bytes(value)
    elif isinstance(value, (float, complex)):
        what = repr(value)  # a NaN is equal to a NaN, and a negative zero is not zero
    elif isinstance(value, (Enum, Number, range, *FIXED)):
        what = value
    elif isinstance(value, slice):
        what = down((value.start, value.stop, value.step))
    elif isinstance(value, weakref.ref):
        what = down(value())
    elif isinstance(value, functools.partial):
        what = down((value.func, value.args, value.keywords))
    elif is_dataclass(value) and not isinstance(value, type) and getattr(type(value), "__dataclass_params__").frozen:  # noqa: B009
        what = down([getattr(value, each.name, None) for each in fields(value)])
    elif isinstance(value, tuple(_STATES)) and not isinstance(value, SystemRandom):
        what = down(next(read(value) for kind, read in _STATES.items() if isinstance(value, kind)))
    elif isinstance(value, types.MethodType):
        what = id(value.__self__), id(value.__func__)
    elif isinstance(value, types.FunctionType) and not value.__closure__:  # one that is made anew is the same
        what = id(value.__code__), down([value.__defaults__, value.__kwdefaults__])
    elif isinstance(value, nn.Module) or callable(value):
        what = id(value)
    return type(value), what


def is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors of one type and device are equal to the bit. torch does not compare all types."""
    bits = _BITS.get(one.itemsize, one.dtype)
    return torch.equal(one.view(bits), other.view(bits))


def is_odd(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is more or less than one piece of memory."""
    return tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized


def _of_tensor(tensor: torch.Tensor) -> Any:
    if nn.parameter.is_lazy(tensor):
        return "not initialized"
    if tensor.is_nested:
        return tuple(map(_of_tensor, tensor.detach().unbind()))
    seen = tensor.shape, tensor.dtype, tensor.device
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    elif tensor.is_mkldnn:
        tensor = tensor.to_dense()
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and not is_odd(tensor)
    if plain and tensor.nbytes <= _HASHED and not tensor.is_meta:
        with torch.no_grad():
            copied = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        # NumPy is given a copy, as nobody may resize memory that it has been given, which FSDP does.
        return *seen, _digest(copied.reshape(-1).view(torch.uint8).cpu().numpy())
    if tensor.layout in _SPARSE:
        sparse = tensor.detach().to_sparse_coo().coalesce()  # type: ignore[no-untyped-call]
        return *seen, tensor.layout, _of_tensor(sparse.indices()), _of_tensor(sparse.values())
    values = fingerprint(tensor.detach())
    return *seen, None if values is None else tuple(values.tolist())


def _digest(array: np.ndarray) -> bytes:
    memory = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return hashlib.blake2b(memory.data if memory.size else b"", digest_size=16).digest()
