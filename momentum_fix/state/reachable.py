"""Which modules a checkpointed function can move, as far as that can be seen before it runs."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import nn

from momentum_fix._torch import is_compiled


def modules_of(
    value: Any, whole: bool = False, *, seen: set[int] | None = None, names: set[str] | None = None
) -> Iterator[tuple[nn.Module, bool]]:
    """Give the modules that a function is, has, or is given: those that it can move without a hook being called.

    Each with whether that is true of all below it too: where a method of it is called, or where it is compiled, as such
    code calls no hook. `names` receives the names that the functions use.
    """
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    whole = whole or is_compiled(value)
    parts: list[Any] = []
    if isinstance(value, nn.Module):
        if names is not None:
            names.update(_names_in_methods(type(value), names))
        yield value, whole
        yield from ((module, True) for module in value.modules() if is_compiled(module))
    elif isinstance(value, types.MethodType):
        owner, whole = value.__self__, True
        parts = [owner] if isinstance(owner, nn.Module) else [owner, getattr(owner, "__dict__", None)]
    elif isinstance(value, (list, tuple, dict)):
        parts = [*(value.values() if isinstance(value, dict) else value)]
    elif isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
    elif isinstance(value, types.FunctionType):
        parts = [value.__defaults__, value.__kwdefaults__]
        if names is not None:
            names.update(_names_in(value.__code__))
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # it is empty
                parts.append(cell.cell_contents)
        by_name = (value.__globals__.get(name) for name in value.__code__.co_names)
        parts += [each for each in by_name if isinstance(each, nn.Module) or is_compiled(each)]
    elif not isinstance(value, type) and callable(value) and hasattr(value, "__dict__"):
        parts = [vars(value)]  # an object of a class of one's own, with what its `__call__` may use
    for part in parts:
        yield from modules_of(part, whole, seen=seen, names=names)


def _names_in_methods(kind: type, names: set[str]) -> set[str]:
    """Give the names in those methods of a class that are named, and in those that these name."""
    found = set(names)
    waiting = [*names]
    while waiting:
        method = getattr(kind, waiting.pop(), None)
        if isinstance(method, types.FunctionType) and not method.__module__.startswith("torch."):
            more = set(_names_in(method.__code__)) - found
            found |= more
            waiting += more
    return found


def _names_in(code: types.CodeType) -> Iterator[str]:
    """Give the names in a function, and in the functions that it makes."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)
