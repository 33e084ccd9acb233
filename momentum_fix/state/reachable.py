"""Which modules a checkpointed function can move, as far as that can be seen before it runs."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import nn

from momentum_fix._torch import is_compiled
from momentum_fix.state.compare import FIXED

_LIBRARIES = sys.stdlib_module_names | {"torch", "momentum_fix"}  # whose functions name no module of a user's
_AROUND_FUNCTIONS = (property, functools.cached_property, classmethod, staticmethod)


def modules_of(value: Any, names: set[str] | None = None) -> Iterator[tuple[nn.Module, bool]]:
    """Give the modules that a function is, has, or is given: those that it can move without a hook being called.

    Each with whether that is true of all below it too: where a method of it is called, or where it is compiled, as such
    code calls no hook. `names` receives the names that the functions use, and the methods that they may call.
    """
    held, seen, waiting = dict[int, Any](), set[tuple[int, bool]](), [(value, False)]
    classes, objects = set[type](), list[dict[str, Any]]()
    looked = done = 0  # how many names there were, and how many objects, when these were last looked into
    while waiting:
        value, whole = waiting.pop()
        held[id(value)] = value
        try:
            whole, is_module, own = whole or is_compiled(value), isinstance(value, nn.Module), _own(value)
        except Exception:  # a proxy, to nothing that is there: each class refuses with an exception of its own
            value, is_module, own = None, False, None
        if (id(value), whole) not in seen:
            seen.add((id(value), whole))
            if is_module:
                yield value, whole
                yield from ((module, True) for module in value.modules() if is_compiled(module))
            waiting += [(part, whole or type(value) is types.MethodType) for part in _parts(value, names)]
            if callable(value) or own is not None:
                classes.add(type(value))
            if own is not None:
                objects.append(own)
        if names is not None and not waiting:
            bases = [vars(base) for each in classes for base in each.__mro__ if not _is_of_library(base)]
            called = [methods[name] for methods in bases for name in {"__call__", *names} & methods.keys()]
            new = objects if len(names) > looked else objects[done:]
            looked, done = len(names), len(objects)
            called += [each[name] for each in new for name in names & each.keys()]
            waiting += [(each, False) for each in called if id(each) not in held]


def _own(value: Any) -> dict[str, Any] | None:
    """Give what is on an object itself."""
    own = getattr(value, "__dict__", None)
    return own if isinstance(own, dict) else None


def _parts(value: Any, names: set[str] | None) -> list[Any]:
    """Give what a function or a container has that may be, or have, a module; add the names that it uses."""
    if isinstance(value, types.MethodType):
        owner = value.__self__
        return [owner] if isinstance(owner, nn.Module) else [owner, getattr(owner, "__dict__", None)]
    if isinstance(value, (list, tuple, dict)):
        items = value.values() if isinstance(value, dict) else value
        return [each for each in items if type(each) not in FIXED]  # there may be millions
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, _AROUND_FUNCTIONS):
        return [getattr(value, name, None) for name in ("fget", "fset", "func", "__func__")]
    if isinstance(value, types.FunctionType):
        parts = [value.__defaults__, value.__kwdefaults__, vars(value)]  # what it wraps is there too
        parts += closed_over(value)
        used = set(_names_in(value.__code__))
        if names is not None and not _is_of_library(value):
            names |= used
        by_name = (value.__globals__.get(name) for name in used)
        return [*parts, *filter(_may_move_modules, by_name)]
    if not isinstance(value, (type, nn.Module)) and callable(value):
        return [getattr(value, "__dict__", None)]  # what its `__call__` may use
    return []


def closed_over(function: types.FunctionType) -> list[Any]:
    """Give what a function has in its closure."""
    found = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it is empty
            found.append(cell.cell_contents)
    return found


def _may_move_modules(value: Any) -> bool:
    is_helper = isinstance(value, types.FunctionType) and not _is_of_library(value)
    return is_helper or isinstance(value, nn.Module) or is_compiled(value)


def _is_of_library(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "").partition(".")[0] in _LIBRARIES


def _names_in(code: types.CodeType) -> Iterator[str]:
    """Give the names in a function, and in the functions that it makes."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)
