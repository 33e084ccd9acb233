"""Checkpointing for modules that change themselves: a replay starts from the state that its forward started from."""

from __future__ import annotations

import copy
import functools
import sys
import threading
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import register_module_forward_pre_hook

from momentum_fix.replay import selective, unseen

_NO_STATE = vars(nn.Module()).keys()  # hooks, parameters, submodules, `training`
_FIXED = frozenset((bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size))
_SMALL = 1 << 16  # bytes; what is smaller is copied without asking whether it ever moves
_TRUSTED = 64  # a large tensor that has not moved in so many checkpoints in a row is no longer copied in each


def preserve_state() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Let a replay start from the state that its forward started from, and leave none behind."""
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "context_fn=preserve_state cannot be compiled together with its checkpoint: use momentum_fix.checkpoint, "
            "which keeps the checkpoint out of the compiled code, or compile the blocks inside of the checkpoints"
        )
    region = Region(*_checkpointed())
    return _Context(region.forward), _Context(region.replay)


@torch.compiler.disable
def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Do what `torch.utils.checkpoint.checkpoint` does, but replay from the state that the forward started from."""
    if not torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(function, *args, **kwargs)
    region = Region(function, args)
    begin = iter([region.forward])

    def run(*args: Any, **kwargs: Any) -> Any:
        with next(begin, region.replay)():
            return function(*args, **kwargs)

    return torch.utils.checkpoint.checkpoint(run, *args, **kwargs)


class Region:
    """One call of a checkpoint: the state that each module which runs in it has when it is entered."""

    def __init__(self, function: Any, args: Iterable[Any]) -> None:
        self.reached: Any = (function, args)
        self.state: dict[nn.Module, tuple[dict[str, Any], dict[str, Any]]] = {}  # buffers, plain attributes
        self.entered: set[nn.Module] = set()  # with all below them
        self.looked_into: set[int] = set()
        self.kept: dict[int, tuple[Any, Any]] = {}  # by the id of a value, which is kept too so that its id stays its

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Copy the state of each module that is entered."""
        with _own_operations():
            function, args = self.reached
            self.look_into(args)
            watching = nullcontext() if self.reach(function) else _watching(self)
        try:
            with watching:
                yield
        finally:
            self.reached, self.entered, self.kept = None, set(), {}

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Let the modules work on copies of what they had, and put back what they have now."""
        present = []
        try:
            with _own_operations():
                made: dict[int, Any] = {}
                for module, (buffers, plain) in self.state.items():
                    own = vars(module)
                    present.append((own, own["_buffers"], _plain(own)))
                    if buffers or own["_buffers"]:
                        own["_buffers"] = {name: _made(kept, made) for name, kept in buffers.items()}
                    _put(own, {name: _made(kept, made) for name, kept in plain.items()})
            yield
        finally:
            for own, buffers, plain in present:
                own["_buffers"] = buffers
                _put(own, plain)

    def enter(self, module: nn.Module) -> None:
        """Copy the state of a module and of all below it: a parent may move a child's before it calls it."""
        waiting = [module]
        while waiting:
            module = waiting.pop()
            if module not in self.entered and not uninitialized(module):
                self.entered.add(module)
                waiting += [child for child in module._modules.values() if child is not None]
                waiting += self.copy(module)

    def copy(self, module: nn.Module) -> list[nn.Module]:
        """Copy what a module itself has, and give the modules among it, which are not registered."""
        found: list[nn.Module] = []
        if module.training and module not in self.state:
            own = vars(module)
            self.state[module] = buffers, plain = {}, {}
            for each, values in ((buffers, own["_buffers"]), (plain, _plain(own))):
                for name, value in values.items():
                    each[name] = value if type(value) in _FIXED else self.keep(value, found, (module, name))
        return found

    def keep(self, value: Any, found: list[nn.Module], place: tuple[nn.Module, str] | None = None) -> Any:
        """Give what `_made` makes the value from again; what cannot be copied stands for itself."""
        if type(value) in _FIXED:
            return value
        if id(value) not in self.kept:
            kept = value
            if isinstance(value, nn.Module):
                found.append(value)
            elif isinstance(value, torch.Tensor):
                if not (value.requires_grad and value.is_leaf) and not nn.parameter.is_lazy(value):
                    base = self.kept.get(id(value._base), (None, None))[1]
                    kept = _View(base, value) if isinstance(base, _Tensor) else _Tensor(value, place)
            elif isinstance(value, (list, tuple, dict, set, deque)):
                kept = _Container(value, lambda item: self.keep(item, found))
            self.kept[id(value)] = value, kept
        return self.kept[id(value)][1]

    def reach(self, function: Any, compiled: bool = False) -> bool:
        """Enter the module that is called, or whose method is; of what a function uses, copy what it may move itself.

        Compiled code calls no hook, so all that it uses is entered. Gives whether the function is compiled.
        """
        compiled = compiled or _is_compiled(function)
        if id(function) in self.looked_into:
            return compiled
        self.looked_into.add(id(function))
        if isinstance(function, nn.Module):
            self.enter(function)
        elif isinstance(function, types.MethodType):
            self.reach(function.__self__)
        elif isinstance(function, functools.partial):
            compiled = self.reach(function.func)
            self.look_into((*function.args, *function.keywords.values()), compiled)
        elif isinstance(function, types.FunctionType):
            self.look_into(_used(function), compiled)
        return compiled

    def look_into(self, values: Iterable[Any], compiled: bool = False) -> None:
        for value in values:
            if isinstance(value, (list, tuple)):
                self.look_into(value, compiled)
            elif not isinstance(value, nn.Module):
                self.reach(value, compiled)
            elif compiled:
                self.enter(value)
            else:
                below = [value, *self.copy(value)]
                for module in below:
                    below += [child for child in module._modules.values() if child is not None]
                    if _is_compiled(module):
                        self.enter(module)


class _Tensor:
    """A tensor as it was."""

    def __init__(self, tensor: torch.Tensor, place: tuple[nn.Module, str] | None) -> None:
        in_graph = tensor.requires_grad
        # A graph that is kept here would keep the one before it, and so on; but the reentrant engine, which runs the
        # forward without gradients, hands them on through the very tensor.
        strong = in_graph and not torch.is_grad_enabled()
        self.original = (lambda: tensor) if strong else weakref.ref(tensor)
        self.version, self.in_graph = _version(tensor), in_graph
        self.copy = tensor.detach().clone() if in_graph else _copy(tensor, place)

    def made(self, _: dict[int, Any]) -> Any:
        """Give a tensor that the replay may write to, or that nothing has written to."""
        if self.copy is None or self.in_graph:
            original = self.original()
            if original is not None and _version(original) == self.version:
                return original
        if self.copy is None:
            raise RuntimeError("lost")
        if not self.in_graph:
            return self.copy.clone()
        with torch.enable_grad():
            return self.copy.detach().requires_grad_().clone()


class _View:
    """A tensor that shares the memory of another one."""

    def __init__(self, base: _Tensor, view: torch.Tensor) -> None:
        self.base, self.layout = base, (view.size(), view.stride(), view.storage_offset())

    def made(self, made: dict[int, Any]) -> Any:
        return _made(self.base, made).as_strided(*self.layout)


class _Container:
    """A list, tuple, dictionary, set or deque as it was."""

    def __init__(self, value: Any, keep: Callable[[Any], Any]) -> None:
        self.items = _rebuilt(value, keep)

    def made(self, made: dict[int, Any]) -> Any:
        return _rebuilt(self.items, lambda item: _made(item, made))


def _made(kept: Any, made: dict[int, Any]) -> Any:
    if not isinstance(kept, (_Tensor, _View, _Container)):
        return kept
    if id(kept) not in made:
        made[id(kept)] = kept.made(made)
    return made[id(kept)]


def _rebuilt(items: Any, each: Callable[[Any], Any]) -> Any:
    if isinstance(items, tuple):
        values = [each(item) for item in items]
        return items._make(values) if hasattr(items, "_make") else tuple(values)
    twin = copy.copy(items)
    if isinstance(items, dict):
        for key, value in items.items():
            twin[key] = each(value)
    elif not isinstance(items, set):
        for index, value in enumerate(items):
            twin[index] = each(value)
    return twin


def _copy(tensor, place):
    return tensor.clone()


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _plain(own: dict[str, Any]) -> dict[str, Any]:
    return {name: own[name] for name in own.keys() - _NO_STATE}


def _put(own: dict[str, Any], plain: dict[str, Any]) -> None:
    own.update(plain)
    for name in own.keys() - _NO_STATE - plain.keys():
        del own[name]


def _used(function: types.FunctionType) -> Iterator[Any]:
    """Give what a function has in its closure, and the modules and compiled functions that it knows by name."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty one
            yield cell.cell_contents
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, nn.Module) or _is_compiled(value):
            yield value
    if hasattr(function, "_torchdynamo_orig_callable"):
        yield function._torchdynamo_orig_callable


def _is_compiled(function: Any) -> bool:
    if hasattr(function, "_torchdynamo_orig_callable"):
        return not getattr(function, "_torchdynamo_disable", False)
    return "_compiled_call_impl" in getattr(function, "__dict__", ())


def uninitialized(module: nn.Module) -> bool:
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def _own_operations() -> AbstractContextManager[None]:
    return unseen() if selective() else nullcontext()


_running = threading.local()


@contextmanager
def _watching(region: Region) -> Iterator[None]:
    """Let the region know of each module that is entered in this thread; without a region there is no hook."""
    regions = vars(_running).setdefault("regions", [])
    # The same function each time: compiled code is compiled again where it finds another one.
    handle = None if regions else register_module_forward_pre_hook(_entered)
    regions.append(region)
    try:
        yield
    finally:
        regions.remove(region)
        if handle is not None:
            handle.remove()


def _entered(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for region in getattr(_running, "regions", ()):
        if module not in region.entered:
            if uninitialized(module):
                module.initialize_parameters(*args)
            with _own_operations():
                region.enter(module)


class _Context(AbstractContextManager[None]):
    """A context that can be entered again: there is a replay for each backward pass."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self.make = make
        self.open: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self.open.append(self.make())
        self.open[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self.open.pop().__exit__(*error)


def _checkpointed() -> tuple[Any, tuple[Any, ...]]:
    """Give the function and the arguments of the running call of torch's checkpoint, which does not tell us."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == torch.utils.checkpoint.__name__:
            return frame.f_locals.get("fn"), frame.f_locals.get("args", ())
        frame = frame.f_back
    return None, ()
