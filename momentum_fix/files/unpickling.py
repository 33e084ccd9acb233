"""Pickles as data: what a file of torch's says, without doing what it asks for.

A pickle is a program. torch's own reader runs it with a list of functions that it may call; this one calls none, looks
no name up, and hashes nothing (a nested tuple can be made to take for ever to hash, or to crash the process). What it
makes in memory has a bound. It is quick, too, for it builds no tensors.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


class RefusedError(Exception):  # never leaves this package
    """What is wrong with a file, to follow its name."""


def refuse_if(wrong: Any, reason: str) -> None:
    """Refuse a file in which something is wrong."""
    if wrong:
        raise RefusedError(reason)


def refuse_damaged(wrong: Any, how: str) -> None:
    """Refuse a file that contradicts itself."""
    refuse_if(wrong, f"is damaged or no checkpoint ({how})")


class Name(str):
    """A class or function that a pickle names, and what it would make. It is never looked up."""

    __slots__ = ()


class Dictionary(list[Any]):
    """A pickled dictionary, as keys and values in turn."""

    __slots__ = ()

    def items(self) -> Iterator[tuple[Any, Any]]:
        """Give the pairs of keys and values."""
        parts = iter(self)
        return zip(parts, parts, strict=True)


@dataclass(slots=True)
class Tensor:
    """A tensor as the file describes it; nothing of it has been checked."""

    storage: Any  # ("storage", type, key, device, elements)
    offset: Any
    shape: Any
    kind: Any = None  # its type, where the storage has none


_CONTAINER = 96  # bytes that a container takes at most while it is empty, or a tensor

# The operations that torch.save writes, by their codes (the standard library's pickletools explains each).
_PUT, _GET, _MARK, _TEXT, _TUPLE, _CALL, _STORAGE, _COUNT, _GLOBAL, _STOP = b"qh(XtRQKc."
_NEGATIVE, _FLOAT, _LONG, _ADD, _SET, _ADD_ALL, _SET_ALL, _BUILD, _NEW, _PROTOCOL = b"JG\x8aaseub\x81\x80"
_MEMOIZE, _STACK_GLOBAL = b"\x94\x93"  # of protocol 4 and 5, which torch.save writes if it is told to
# Those that differ in the size of their argument, or in what does not matter here: a set is read as a list.
_ALIKE = bytes.maketrans(b"rjUT\x8cCBM\x8b\x95\x8f\x90\x91", b"qhXXXXXK\x8a\x80]et")
_BYTES = b"UTCB"  # texts of Python 2, which may be any bytes, and bytes
_CONSTANTS = dict(zip(b"N\x88\x89)", (None, True, False, ()), strict=True))
_EMPTY: dict[int, type[list[Any]]] = dict(zip(b"]}", (list, Dictionary), strict=True))
_TUPLES = dict(zip(b"\x85\x86\x87", (1, 2, 3), strict=True))


def _by_code(numbers: dict[int, bytes]) -> list[int]:
    """Give the number that each operation stands beside, or 0."""
    return [sum(number for number, codes in numbers.items() if code in codes) for code in range(256)]


_SIZES = _by_code({1: b"qhKUC\x80\x8a\x8c", 2: b"M", 4: b"rjJXTB\x8b", 8: b"G\x95"})  # bytes of the argument
# bytes of what it makes
_COSTS = _by_code({_CONTAINER: b"tR\x85\x86\x87]}", 2 * _CONTAINER: b"c\x93", _CONTAINER // 2: b"JG\x8a"})

STEPS = range(8_000_000)  # one an operation; a tensor of a state dict is 30
_MAX_MEMORY = 120 * 2**20  # bytes that the rest may make; a tensor makes 600
_MAX_DEPTH = 10_000  # dictionaries in dictionaries
_MAX_NAME = 400  # characters of the name of a class

OBJECTS = (
    "holds objects but no running statistics outside of them, or is not a checkpoint; nothing in it was executed. "
    "Save `model.state_dict()` and audit that"
)
TOO_MUCH = "holds more than any network's state dict. Save `model.state_dict()` and audit that"


def unpickle(
    data: bytes, at: int = 0, budget: int = _MAX_MEMORY, steps: Iterable[int] = STEPS
) -> tuple[Any, int, bool, list[Any]]:
    """Read one pickle; give it, where it ends, whether it holds objects, and the storages that it names.

    The pickles of one file share their steps by an iterator.

    Raises:
        RefusedError: it is no pickle of torch's, or holds more than a state dict can.
        Exception: nearly any, if it is damaged.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []
    memo: list[Any] = [None]  # Python 2 counts from 1
    storages: list[Any] = []
    made: Any
    objects = False
    left, number, from_bytes = budget, 0, int.from_bytes
    for _ in steps:
        code = data[at]
        at += 1
        size = _SIZES[code]
        if size:
            number = data[at] if size == 1 else from_bytes(data[at : at + size], "little")
            at += size
        op = _ALIKE[code]
        left -= _COSTS[op]
        if op == _PUT:
            if number == len(memo):
                memo.append(stack[-1])
            else:
                memo[number] = stack[-1]
        elif op == _GET:
            stack.append(memo[number])
        elif op == _MARK:
            below.append(stack)
            stack = []
            refuse_if(len(below) > _MAX_DEPTH, TOO_MUCH)
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op == _TEXT:
            text = data[at : at + number].decode("utf-8", "backslashreplace" if code in _BYTES else "surrogatepass")
            at += number
            left -= sys.getsizeof(text)
            stack.append(text)
        elif op == _TUPLE:
            made = tuple(stack)
            stack = below.pop()
            stack.append(made)
        elif op == _CALL:
            arguments = stack.pop()
            stack[-1] = made = _call_result(stack[-1], arguments)
            objects = objects or isinstance(made, Name)
            left -= 16 * len(made) if isinstance(made, Dictionary) else 0
        elif op == _STORAGE:
            if isinstance(stack[-1], tuple) and stack[-1][:1] == ("module",):  # a class, with its source
                stack[-1] = stack[-1][1]
            else:
                storages.append(stack[-1])
        elif op == _COUNT:
            left -= _CONTAINER // 2 * (number > 255)
            stack.append(number)
        elif op in _TUPLES:
            stack[-_TUPLES[op] :] = [tuple(stack[-_TUPLES[op] :])]
        elif op in (_ADD_ALL, _SET_ALL):
            items = stack
            stack = below.pop()
            _fill(stack[-1], items, op == _SET_ALL)
        elif op in (_ADD, _SET):
            items = stack[-1 if op == _ADD else -2 :]
            del stack[-len(items) :]
            _fill(stack[-1], items, op == _SET)
        elif op in _EMPTY:
            stack.append(_EMPTY[op]())
        elif op == _GLOBAL:
            end = data.index(b"\n", data.index(b"\n", at, at + _MAX_NAME) + 1, at + _MAX_NAME)
            stack.append(Name(data[at:end].decode().replace("\n", ".")))
            at = end + 1
        elif op == _STACK_GLOBAL:
            name = stack.pop()
            texts = isinstance(name, str) and isinstance(stack[-1], str) and len(name) + len(stack[-1]) <= _MAX_NAME
            refuse_damaged(not texts, "a name is no text")
            stack[-1] = Name(f"{stack[-1]}.{name}")
        elif op == _MEMOIZE:
            if memo == [None]:
                memo.clear()
            memo.append(stack[-1])
        elif op == _NEGATIVE:
            stack.append(number - (number >> 31 << 32))
        elif op == _FLOAT:
            stack.append(struct.unpack(">d", data[at - 8 : at])[0])
        elif op == _LONG:
            left -= number
            stack.append(int.from_bytes(data[at : at + number], "little", signed=True))
            at += number
        elif op in (_NEW, _BUILD):
            stack.pop()  # what an object is made from or would become, or an OrderedDict's `_metadata`
            objects = objects or op == _NEW
        elif op == _STOP:
            return stack.pop(), at, objects, storages
        elif op != _PROTOCOL:
            raise RefusedError(OBJECTS)
        if left < 0:
            break
    raise RefusedError(TOO_MUCH)


def _fill(container: Any, items: Any, pairs: bool) -> None:
    """Put items into a list, or keys and values into a dictionary; what an object would hold is passed over."""
    if isinstance(container, list) and isinstance(container, Dictionary) == pairs:
        container += items
    else:
        refuse_damaged(not isinstance(container, Name), "it fills what is no container")


def _call_result(function: Any, arguments: Any) -> Any:
    """Give what a call would make, if that is a tensor or a dictionary; else its name."""
    callable_ = isinstance(function, Name) and isinstance(arguments, tuple)
    refuse_damaged(not callable_, "it calls what is no function")
    if function == "torch._utils._rebuild_tensor_v2" or function == "torch._utils._rebuild_tensor":
        changed = arguments[6:] and arguments[6]  # it is the negative, say, of what is stored
        return function if changed else Tensor(*arguments[:3])
    if function == "collections.OrderedDict":
        return Dictionary(part for key, value in arguments[0] for part in (key, value)) if arguments else Dictionary()
    if function in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return arguments[0]
    if function == "torch._utils._rebuild_tensor_v3":
        return Tensor(arguments[0], arguments[1], arguments[2], arguments[6])
    if function == "torch._tensor._rebuild_from_type_v2":
        return _call_result(arguments[0], arguments[2])
    return function
