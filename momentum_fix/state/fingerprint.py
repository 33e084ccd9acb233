"""A tensor's values in 232 bytes: enough to tell whether another tensor is equal to the bit and, if not, how far it is.

    hash(x) = sum_r u_r sum_c v_c x_rc  modulo 2**64, of the bits of x in words of at most 32 bits
    |x - y|**2 is the mean of (p_j(x) - p_j(y))**2, where p_j(x) = sum_i s_ij x_i for eight fixed vectors s_j

The weights u and v are fixed and look random, so tensors that differ have one hash with a probability of about
2**-32. (An exclusive or of all words would not see values that change places.) The s_ij are signs, with sizes around 1:
signs alone would not tell if two values change places where all of them agree. The distance is right to some 40 %. It
is measured three times, and the largest one counts: with the values, with their logarithms, as little would be seen
beside coordinates of a thousand, and with the logarithms of what is beyond 8192, which the others leave out, as nothing
else would be seen beside a mask of -1e9 or -inf. A tensor is read on its own device, in slices: nothing as large as it
is copied, unless it has gaps or another order in memory.

Source: multilinear hashing, Lemire and Kaser 2014, "Strongly universal string hashing is fast"; random projections,
Johnson and Lindenstrauss 1984, with the signs of Achlioptas 2003.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Sequence

import torch

from momentum_fix._torch import hidden_from_function_modes, hidden_from_modes, is_in_transform

_COLUMNS, _PROJECTIONS = 4096, 8  # values in a row
_STARTS = (2, 3 + _PROJECTIONS, 4 + 2 * _PROJECTIONS)
_LARGE, _NAN = 8192.0, math.e**650  # a NaN counts as a number that no other is
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # by the bytes of a value
_HALF = 0xFFFFFFFF
_PACKED = (getattr(torch, "float4_e2m1fn_x2", None),)  # dtypes of two values, which torch does not read
_OPERATIONS = 64  # the roundings of so many may add up within a block


def fingerprint(tensor: torch.Tensor) -> torch.Tensor | None:
    """Give 29 numbers of float64 on the tensor's device.

    The hash in two halves; and three times the squared norm and the projections: of the values that are not large, of
    their logarithms, and of the logarithms of those that are.

    None if there are no values to read: a tensor on the meta device, a fake or a sparse one.

    Example:
        >>> one, three = (fingerprint(torch.full((4,), value)).tolist() for value in (1.0, 3.0))
        >>> difference(one, one), difference(one, three) > 0.1
        (None, True)
    """
    with torch.no_grad(), hidden_from_modes(), hidden_from_function_modes():
        parts = [_of_memory(part) for part in _parts(tensor)]
        known = [each for each in parts if each is not None]
        if not known or len(known) < len(parts):
            return None
        hashed, numbers = functools.reduce(_joined, known)
        halves = torch.stack([(hashed >> 32) & _HALF, hashed & _HALF]).double()
        return torch.cat([halves, numbers])


def difference(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Give how far two tensors are from each other, relative to the larger norm; None if they are equal to the bit."""
    if one[:2] == other[:2]:
        return None
    (values, size), (logarithms, of_logarithms), (large, of_large) = (
        _distance(one[start : start + 1 + _PROJECTIONS], other[start : start + 1 + _PROJECTIONS]) for start in _STARTS
    )
    # Rounding is as large as the values ask for, also where one of them is so small that its logarithm shows it.
    ratios = values / (size or 1), logarithms / (of_logarithms + size / 2 or 1), large / (of_large or 1)
    return max(*ratios, sys.float_info.min)  # for it may be too small beside the others to be told


def _distance(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Give the distance of two tensors, and the norm of the larger one."""
    squares = sum((p - q) ** 2 for p, q in zip(one[1:], other[1:], strict=True)) / _PROJECTIONS
    return math.sqrt(squares), math.sqrt(max(one[0], other[0]))


def rounding(dtype: torch.dtype) -> float:
    """Give the relative difference up to which two tensors are equal but for rounding.

    That of 64 operations, and of one where the numbers have few digits, so that it stays below one percent.
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    epsilon = torch.finfo(dtype).eps
    return epsilon * _OPERATIONS if epsilon * _OPERATIONS < 0.01 else min(epsilon, 0.01)


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Give the plain tensors that a tensor is made of: itself, if it is no wrapper of others (DTensor is one)."""
    if hasattr(tensor, "__tensor_flatten__"):
        inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]  # a DTensor's mesh is one of them
        return [part for each in inner if isinstance(each, torch.Tensor) for part in _parts(each)]
    if isinstance(tensor, torch.masked.MaskedTensor):
        return []
    return [tensor if type(tensor) is torch.Tensor else tensor.as_subclass(torch.Tensor)]


def _of_memory(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    has_values = tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)
    if not has_values or is_in_transform() or (tensor.numel() and not tensor.data_ptr()):
        return None
    once = tuple(
        slice(1) if stride == 0 else slice(None) for stride in tensor.stride()
    )  # what is expanded is one value
    flat = tensor.resolve_conj().resolve_neg()[once]
    flat = (torch.view_as_real(flat) if flat.is_complex() else flat).reshape(-1)
    flat = flat if flat.stride() == (1,) else flat.clone(memory_format=torch.contiguous_format)
    flat = flat.view(torch.uint8) if flat.dtype in _PACKED else flat
    hashed = torch.zeros((), dtype=torch.int64, device=flat.device)
    numbers = torch.zeros(3, 1 + _PROJECTIONS, dtype=torch.float64, device=flat.device)
    weights, signs = _of_columns(flat.device)
    for block, (factors, _) in _blocks(flat.view(_WORDS[flat.itemsize])):
        hashed += ((block * weights[: block.shape[1]]).sum(1) * factors[: len(block)]).sum()
    for block, (_, flips) in _blocks(flat):
        values = block.double().nan_to_num(nan=_NAN)
        beyond = (values.abs() / _LARGE).clamp(min=1)
        small = values / beyond / beyond  # which goes on from 8192 downwards, so that a last bit makes no leap
        large = beyond.log()
        parts = (small, small.abs().log1p().copysign(values), large.copysign(values))
        sizes = (small.square(), parts[1].square(), (2 + large).square() * (beyond > 1))
        for row, part, size in zip(numbers, parts, sizes, strict=True):
            row[0] += size.sum()
            row[1:] += (part @ signs[: block.shape[1]] * flips[: len(block)]).sum(0)
    return hashed, numbers.reshape(-1)


def _blocks(flat: torch.Tensor) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]]:
    """Give a vector in blocks of rows, what is left in a shorter row of its own; each block with what its rows have."""
    whole = len(flat) - len(flat) % _COLUMNS
    size = _COLUMNS * _rows_of(flat.device)
    starts = range(0, whole, size)
    for number, start in enumerate(starts):
        block = flat[start : min(start + size, whole)]
        yield block.reshape(-1, _COLUMNS), _of_rows(flat.device, number)
    if whole < len(flat):
        yield flat[whole:].reshape(1, -1), _of_rows(flat.device, len(starts))


@functools.cache
def _of_columns(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Give what each place in a row has: a weight, and a sign for each projection."""
    return _random(_COLUMNS, 1, device)


@functools.cache
def _of_rows(device: torch.device, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give what each row of a block has: a factor, and a sign for each projection."""
    return _random(_rows_of(device), 2 + block, device)


def _rows_of(device: torch.device) -> int:
    """Give how many rows a slice has: few enough for a CPU's cache; elsewhere the number of slices takes the time."""
    return 16 if device.type == "cpu" else 256


def _random(count: int, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Give odd numbers of 64 bits, and signs with sizes."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator, dtype=torch.int64, device="cpu") | 1
    signs = torch.randint(0, 2, (count, _PROJECTIONS), generator=generator, dtype=torch.float64, device="cpu") * 2 - 1
    sizes = torch.rand((count, _PROJECTIONS), generator=generator, dtype=torch.float64, device="cpu") / 2 + 0.75
    return numbers.to(device), (signs * sizes).to(device)


def _joined(
    one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    return one[0] * 0x1E3779B97F4A7C15 + other[0], one[1] + other[1]
