"""Checkpointing for modules that change themselves: a replay starts from the state that its forward started from."""

from __future__ import annotations

import copy
import functools
import math
import sys
import threading
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.checkpoint import checkpoint as torchs_checkpoint

from momentum_fix.covering import _NEED_NO_COUNTER
from momentum_fix.replay import selective, unseen

_NO_STATE = vars(nn.Module()).keys()  # hooks, parameters, submodules, `training`
_FIXED = frozenset((bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size))
COUNTER = "num_batches_tracked"
_STATISTICS = frozenset(("running_mean", "running_var", COUNTER))
_UNREAD: dict[str, Any] = {}  # stands for buffers that need no copy
_SMALL = 1 << 16  # bytes; what is smaller is copied without asking whether it ever moves
_TRUSTED = 64  # a larger tensor that has stood still for so many checkpoints is no longer copied in each


class _Running(threading.local):
    regions: tuple[_Region, ...] = ()  # whose forward is running in this thread


_running, _lock, _users = _Running(), threading.Lock(), 0
_histories: weakref.WeakKeyDictionary[nn.Module, dict[str, _History]] = weakref.WeakKeyDictionary()


def preserve_state() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Let a replay start from the state that its forward started from, and leave no trace: a `context_fn`.

        checkpoint(block, x, use_reentrant=False, context_fn=preserve_state)

    For modules that change themselves in a training-mode forward and read what they change: spectral normalization,
    Batch Renormalization, codebooks, observers of quantization-aware training, spiking neurons, step counters. State
    is what such modules hold in buffers and plain attributes: tensors, numbers, and lists, tuples, dictionaries, sets
    and deques of them; of every module that runs under the checkpoint in training mode, and of all modules below it.
    You need to name none of it, and nothing stays on the model.

    Exact for: state, gradients and the replay's values, bit for bit those of the run without checkpointing, wherever
    the forward is deterministic; in any order of forwards and replays; around compiled modules and functions.

    Not for: what is inside of other objects (a tracker of your own, a `torch.Generator`); modules that a function
    neither calls as modules nor finds in its closure, defaults, globals or arguments; a module that moves itself in the
    replay alone, on purpose; a checkpoint that is compiled together with its model (use `checkpoint`); CUDA graphs,
    which expect buffers to stay where they are.

    Memory: a copy of the state for each live checkpoint. That of torch's BatchNorm and InstanceNorm is not copied, as
    their output does not read it; it is where other code of the region names it, and what reads it unnoticed, through
    a `getattr` say, gets NaN in a replay. Tensors above 64 KiB that stood still in 64 checkpoints in a row are no
    longer copied in each; should one move after all, a warning says so, and it is copied again.

    With another `context_fn`, as that of selective checkpointing, use `momentum_fix.checkpoint` and hand it that one.

    Returns:
        The contexts of the forward and of its replays, as torch's checkpoint asks for.

    Raises:
        RuntimeError: the checkpoint is being compiled together with its model.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> layer = nn.BatchNorm1d(3)
        >>> x = torch.rand(8, 3, requires_grad=True)
        >>> checkpoint(layer, x, use_reentrant=False, context_fn=preserve_state).sum().backward()
        >>> layer.num_batches_tracked
        tensor(1)

    Source: pytorch/pytorch#96136 (2023) asks for it.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "context_fn=preserve_state cannot be compiled together with its checkpoint: use momentum_fix.checkpoint, "
            "which stays out of the compiled code, or compile the blocks inside of the checkpoints"
        )
    region = _Region(*_checkpointed())
    return _Context(region.forward), _Context(region.replay)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Do what `torch.utils.checkpoint.checkpoint` does, but replay from the state that the forward started from.

    See `preserve_state` for what that is good for. Use this for either engine, and where the model is compiled: it
    breaks the graph, so that compiled code ends before it and begins after it. What is compiled inside stays compiled.

    Exact for, Not for: as `preserve_state`. The reentrant engine may add up gradients in another order than the run
    without checkpointing, as it does without this too.

    Args:
        function: anything callable.
        args: handed on.
        kwargs: handed on, with all the keywords of torch's function.

    Returns:
        What function returns.

    Example:
        >>> layer = nn.BatchNorm1d(3)
        >>> checkpoint(layer, torch.rand(8, 3, requires_grad=True), use_reentrant=True).sum().backward()
        >>> layer.num_batches_tracked
        tensor(1)

    Source: as `preserve_state`.
    """
    if not torch.is_grad_enabled():
        return torchs_checkpoint(function, *args, **kwargs)
    region = _Region(function, args)
    first = iter([region.forward])

    def run(*args: Any, **kwargs: Any) -> Any:
        with next(first, region.replay)():
            return function(*args, **kwargs)

    return torchs_checkpoint(run, *args, **kwargs)


class _Region:
    """One call of a checkpoint: the state that each module which runs in it has when it is entered."""

    def __init__(self, function: Any, args: tuple[Any, ...]) -> None:
        self.called: Any = (function, args)
        self.state: dict[nn.Module, tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]] = {}
        self.entered: set[nn.Module] = set()  # with all below them
        self.reached: set[int] = set()
        self.hooked = self.compiled = self.reading = False
        self.kept: dict[int, tuple[Any, Any]] = {}  # by a value's id; the value too, lest another one gets its id

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Copy the state of each module that is entered."""
        function, args = self.called
        with _own_operations():
            if isinstance(function, nn.Module):
                self.enter(function)
            self.reach(function)
            self.reach(args)
        self.hooked = not _is_compiled(function)  # such code calls no hook
        try:
            with _watching(self) if self.hooked else nullcontext():
                yield
        finally:
            self.called, self.entered, self.kept = None, set(), {}

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Let the modules work on copies of what they had, and put back what they have now."""
        present = []
        try:
            with _own_operations():
                made: dict[Any, Any] = {}
                for module, (fixed, moving, buffers) in self.state.items():
                    own = vars(module)
                    present.append((own, own.copy()))
                    _put(own, fixed, {name: _made(kept, made) for name, kept in moving.items()})
                    if buffers is _UNREAD:
                        own["_buffers"] = _scratch(own["_buffers"], made)
                    elif buffers is not None:
                        own["_buffers"] = {name: _made(kept, made) for name, kept in buffers.items()}
            # Compiled code is compiled once more where it finds no hook, and may then save other tensors.
            with _watching() if self.hooked and self.compiled else nullcontext():
                yield
        finally:
            for own, before in present:
                _put(own, before, {})

    def enter(self, module: nn.Module) -> None:
        """Copy the state of a module and of all below it: a parent may move a child's before it calls it."""
        below, entered = [module], []
        for each in below:
            if each not in self.entered and not _uninitialized(each):
                self.entered.add(each)
                entered.append(each)
                self.compiled = self.compiled or _is_compiled(each)
                self.reading = self.reading or _names_statistics(type(each))  # type: ignore[arg-type]
                below += [child for child in each._modules.values() if child is not None]
        for each in entered:
            for found in self.copy(each):
                self.enter(found)

    def copy(self, module: nn.Module) -> list[nn.Module]:
        """Copy what a module itself has, and give the modules among it, which are not registered."""
        found: list[nn.Module] = []
        if module.training and module not in self.state:
            fixed, moving, buffers = vars(module).copy(), {}, None
            if not (self.reading or self.compiled or selective()) and _only_writes(module):
                buffers = _UNREAD
            elif fixed["_buffers"]:
                buffers = {name: self.keep(value, found, (module, name)) for name, value in fixed["_buffers"].items()}
            for name, value in vars(module).items():
                if type(value) not in _FIXED and name not in _NO_STATE and not _fixed(value):
                    kept = self.keep(value, found, (module, name))
                    if kept is not value:
                        moving[name] = kept
                        del fixed[name]
            self.state[module] = fixed, moving, buffers
        return found

    def keep(self, value: Any, found: list[nn.Module], place: tuple[nn.Module, str] | None = None) -> Any:
        """Give what `_made` makes the value from again; what cannot move, or cannot be copied, stands for itself."""
        if id(value) in self.kept:
            return self.kept[id(value)][1]
        kept = value
        if isinstance(value, torch.Tensor):
            base = value._base
            if base is not None and id(base) in self.kept and base.is_contiguous():
                kept = _View(self.kept[id(base)][1], value)
            elif value.requires_grad:
                kept = value if value.is_leaf else _InGraph(value)
            else:
                kept = value.clone() if value.nbytes <= _SMALL or place is None else _large(value, place)
        elif _fixed(value):
            return value
        elif isinstance(value, (list, tuple, dict, set, deque)):
            kept = _Container(value, lambda item: self.keep(item, found))
        elif isinstance(value, nn.Module):
            found.append(value)
        self.kept[id(value)] = value, kept
        return kept

    def reach(self, value: Any, whole: bool = False) -> None:
        """Copy the state of what a function can move without calling it as a module, and so without calling a hook.

        That is what a module itself has, where the function knows it; all below it, where its method is called, or
        where it is compiled, as such code calls no hook.
        """
        if id(value) in self.reached:
            return
        self.reached.add(id(value))
        self.compiled = self.compiled or _is_compiled(value)
        whole = whole or _is_compiled(value)
        if isinstance(value, types.MethodType):
            self.reach(value.__self__, whole=True)
        elif not isinstance(value, nn.Module):
            if isinstance(value, types.FunctionType):
                self.reading = self.reading or _names_statistics(value)
            for each in _used(value):
                self.reach(each, whole)
        elif whole:
            self.enter(value)
        else:
            below = [value, *self.copy(value)]
            for module in below:
                below += [child for child in module._modules.values() if child is not None]
                if _is_compiled(module):
                    self.enter(module)


class _InGraph:
    """A tensor that is part of a graph, as it was."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # To keep the graph would keep the one before it too, and so on. But to the reentrant engine, which runs the
        # forward without gradients, the tensor itself is the only way back into the graph.
        self.original = weakref.ref(tensor) if torch.is_grad_enabled() else lambda: tensor
        self.version, self.copy = tensor._version, tensor.detach().clone()

    def made(self, _: dict[int, Any]) -> Any:
        original = self.original()
        if original is not None and original._version == self.version:
            return original
        with torch.enable_grad():
            return self.copy.detach().requires_grad_().clone()


class _Large:
    """A large tensor that is expected to stand still."""

    def __init__(self, tensor: torch.Tensor, place: tuple[nn.Module, str]) -> None:
        self.original, self.version, self.place = weakref.ref(tensor), _version(tensor), place

    def made(self, _: dict[int, Any]) -> Any:
        original = self.original()
        if original is not None and _version(original) == self.version:
            return original
        return _lost(self.place)


class _View:
    """A tensor that shares the memory of another one."""

    def __init__(self, base: Any, view: torch.Tensor) -> None:
        self.base, self.layout = base, (view.size(), view.stride(), view.storage_offset())

    def made(self, made: dict[int, Any]) -> Any:
        return _made(self.base, made).as_strided(*self.layout)


class _Container:
    """A list, tuple, dictionary, set or deque as it was."""

    def __init__(self, value: Any, keep: Callable[[Any], Any]) -> None:
        self.flat = type(value) is list and _FIXED.issuperset(map(type, value))
        self.items = value.copy() if self.flat else _rebuilt(value, keep)

    def made(self, made: dict[int, Any]) -> Any:
        return self.items.copy() if self.flat else _rebuilt(self.items, lambda item: _made(item, made))


class _History:
    """How long a large tensor has stood still: masks and tables are not worth a copy in each checkpoint.

    Its identity and its version tell, as long as it is written to where autograd sees it. So values are compared too:
    in the first checkpoints, then in ever fewer.
    """

    def __init__(self) -> None:
        self.still, self.secret = 0, False
        self.seen: tuple[Any, int] = (lambda: None), 0
        self.last: torch.Tensor | None = None

    def copy(self, tensor: torch.Tensor, place: tuple[nn.Module, str]) -> torch.Tensor | None:
        """Give a copy, or None where the tensor is expected to stand still."""
        original, version = self.seen
        new = self.last is None and original() is None
        same = original() is tensor and version == _version(tensor)
        if same and self.last is not None and not torch.equal(self.last, tensor):
            self.secret = True
            if self.still > _TRUSTED:
                _lost(place)
        self.seen = weakref.ref(tensor), _version(tensor)
        self.still = self.still + 1 if same and not self.secret else 0
        copied = tensor.clone() if self.still < _TRUSTED or self.still & (self.still - 1) == 0 else None
        self.last = copied if (same or new) and not self.secret else None
        return copied


def _large(tensor: torch.Tensor, place: tuple[nn.Module, str]) -> torch.Tensor | _Large:
    """Give a copy, or what stands for a tensor that is expected to stand still."""
    if tensor.is_meta or type(tensor) is not torch.Tensor:
        return tensor.clone()
    module, name = place
    copied = _histories.setdefault(module, {}).setdefault(name, _History()).copy(tensor, place)
    return _Large(tensor, place) if copied is None else copied


def _lost(place: tuple[nn.Module, str]) -> Any:
    """Warn that a large tensor has moved after all, and give it as it is now."""
    module, name = place
    _histories[module].pop(name, None)
    warnings.warn(
        f"{name!r} of a {type(module).__name__} had not moved in {_TRUSTED} checkpoints, so that no copy of it was "
        "kept, and has moved now: gradients of this batch may be wrong; from the next batch on they are right",
        stacklevel=2,
    )
    return module._buffers.get(name, vars(module).get(name))


def _only_writes(module: nn.Module) -> bool:
    """Tell whether this is a norm layer of torch's own, which does not read its statistics, and no hook can."""
    if type(module).forward not in _NEED_NO_COUNTER or module._buffers.get("running_mean") is None:
        return False
    return not (module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module))


def _scratch(own: dict[str, Any], made: dict[Any, Any]) -> dict[str, Any]:
    """Give buffers for a layer that only writes to them, cheaper than copies; who reads them all the same gets NaN."""
    mean = own["running_mean"]
    key = mean.shape, mean.dtype, mean.device
    if key not in made:
        made[key] = torch.full_like(mean, math.nan)
    return {**own, "running_mean": made[key], "running_var": made[key], COUNTER: None}


@functools.lru_cache(maxsize=1024)
def _names_statistics(value: Any) -> bool:
    """Tell whether a function, or a class of a user's own, names the statistics of a norm layer, as if to read them."""
    if isinstance(value, type):
        own = [base for base in value.__mro__ if not base.__module__.startswith("torch.nn.")]
        return any(_names_statistics(each) for base in own for each in vars(base).values() if callable(each))
    code = getattr(value, "__code__", None)
    return code is not None and not _STATISTICS.isdisjoint((*code.co_names, *code.co_consts))


def _fixed(value: Any) -> bool:
    return type(value) in _FIXED or (type(value) is tuple and _FIXED.issuperset(map(type, value)))


def _made(kept: Any, made: dict[int, Any]) -> Any:
    if id(kept) in made:
        return made[id(kept)]
    if isinstance(kept, torch.Tensor):
        value = kept if kept.requires_grad else kept.clone()
    elif isinstance(kept, (_Container, _View, _InGraph, _Large)):
        value = kept.made(made)
    else:
        return kept
    made[id(kept)] = value
    return value


def _rebuilt(items: Any, each: Callable[[Any], Any]) -> Any:
    if type(items) is list:
        return [each(item) for item in items]
    if isinstance(items, tuple):
        values = [each(item) for item in items]
        return items._make(values) if hasattr(items, "_make") else tuple(values)
    twin = copy.copy(items)
    if not isinstance(items, set):
        for key, value in items.items() if isinstance(items, dict) else enumerate(items):
            twin[key] = each(value)
    return twin


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _put(own: dict[str, Any], fixed: dict[str, Any], moving: dict[str, Any]) -> None:
    """Let a module have these attributes and no others."""
    own.update(fixed)
    own.update(moving)
    if len(own) > len(fixed) + len(moving):
        for name in own.keys() - fixed.keys() - moving.keys():
            del own[name]


def _used(value: Any) -> Iterator[Any]:
    """Give what a function has in its closure and defaults, and the modules that it knows by name."""
    if isinstance(value, (list, tuple)):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # it is empty
                yield cell.cell_contents
        yield from (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        known = (value.__globals__.get(name) for name in value.__code__.co_names)
        yield from (each for each in known if isinstance(each, nn.Module) or _is_compiled(each))


def _is_compiled(value: Any) -> bool:
    own = getattr(value, "__dict__", {})
    if isinstance(value, nn.Module):
        return "_compiled_call_impl" in own or "_orig_mod" in own["_modules"]
    return "_torchdynamo_orig_callable" in own and not own.get("_torchdynamo_disable")


def _uninitialized(module: Any) -> bool:
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()  # type: ignore[misc]


def _own_operations() -> AbstractContextManager[None]:
    return unseen() if selective() else nullcontext()


@contextmanager
def _watching(*regions: _Region) -> Iterator[None]:
    """Let the regions know of each module that is entered in this thread; otherwise there is no hook."""
    outer = _running.regions
    _running.regions = (*outer, *regions)
    _hook(1)
    try:
        yield
    finally:
        _hook(-1)
        _running.regions = outer


def _hook(users: int) -> None:
    """Put the hook on with its first user, in whichever thread, and take it off with the last.

    Always the same one, under the same id: compiled code that meets another one is compiled again.
    """
    global _users
    with _lock:
        _users += users
        handle = _handle()
        if _users:
            handle.hooks_dict_ref()[handle.id] = _entered
        else:
            handle.remove()


@functools.cache
def _handle() -> Any:
    return register_module_forward_pre_hook(_entered)


def _entered(module: Any, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for region in _running.regions:
        if module not in region.entered:
            if _uninitialized(module):
                module.initialize_parameters(*args)
            with _own_operations():
                region.enter(module)


class _Context(AbstractContextManager[None]):
    """A context that can be entered again: there is a replay for each backward pass."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self.make = make

    def __enter__(self) -> None:
        self.running = self.make()
        self.running.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.running.__exit__(*error)


def _checkpointed() -> tuple[Any, tuple[Any, ...]]:
    """Give the function and the arguments of the running call of torch's checkpoint, which does not pass them on."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == torch.utils.checkpoint.__name__:
            return frame.f_locals.get("fn"), frame.f_locals.get("args", ())
        frame = frame.f_back
    return None, ()
