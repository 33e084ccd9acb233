"""Checkpointing for modules that change themselves: a replay starts from the state that its forward started from."""

from __future__ import annotations

import functools
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torchs_module
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils.checkpoint import checkpoint as torchs_checkpoint

from momentum_fix.replay import preserved, selective, unseen
from momentum_fix.state import LARGE, Copier, keep, put, reads_no_buffer


def preserve_state() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Let a replay start from the state that its forward started from, and leave no trace: a `context_fn`.

        checkpoint(block, x, use_reentrant=False, context_fn=preserve_state)

    Use it if a module changes itself during training and its output depends on what it changed: spectral normalization,
    Batch Renormalization, codebooks, quantization-aware training, spiking neurons, step counters. State is whatever a
    module keeps in buffers and plain attributes: numbers, tensors, NumPy arrays, generators of random numbers, and
    lists, tuples, dictionaries, sets and deques of them. It is preserved for every module that is called under the
    checkpoint while it is in training mode, and for all modules below it. You don't name any of it, and nothing stays
    on the model.

    Exact for: the state, the gradients and the values in the replay, which are the same as without checkpointing, bit
    for bit, if the forward is deterministic. The order of forwards and backwards doesn't matter. Compiled modules
    and functions inside the checkpoint are fine.

    Parameters that no gradient trains count as state up to 64 KiB each: a teacher's weights, a codebook.

    Not for: state inside other objects (a tracker class of your own), in `__slots__` or on the class itself; larger or
    trained parameters that the forward writes to (a warning says so where autograd sees the write); modules that the
    function neither calls as modules nor finds in its closure, defaults, globals or arguments; a forward in evaluation
    mode whose backward comes after `train()`; a module that changes itself in the replay only, on purpose; a checkpoint
    that is compiled together with its model (use `checkpoint`); CUDA graphs, which expect buffers to stay where they
    are.

    Memory: a copy of the state for each checkpoint whose backward is still to come. A tensor above 64 KiB that doesn't
    change, like a mask or a table, is copied once for all of them, and that copy stays; a replay has another one while
    it runs. To see whether it changed, its values are compared in the first 64 checkpoints, and later only now and then
    (and whenever autograd knows of a change). So if it is written to through `.data` after that, replays may see its
    old values for a while; a warning tells you. A block that consists of torch's own modules, without hooks, keeps no
    copies of running statistics, because its output doesn't depend on them; nor does a class that adds only an
    `__init__` to one of torch's.

    To combine it with another `context_fn`, such as selective checkpointing, use `momentum_fix.checkpoint` and pass
    that one to it. `checkpoint_sequential` has no `context_fn`: see `checkpoint` for what to do instead.

    Returns:
        The contexts for the forward and for its replays, as torch's checkpoint wants them.

    Raises:
        RuntimeError: the checkpoint is being compiled together with its model.
        TypeError: a module under the checkpoint is TorchScript, is in training mode and has buffers.

    Warns:
        UserWarning: a parameter was written to between the start of the forward pass and the replay, other than a
            small one that is not trained.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> layer = nn.BatchNorm1d(3)
        >>> x = torch.rand(8, 3, requires_grad=True)
        >>> checkpoint(layer, x, use_reentrant=False, context_fn=preserve_state).sum().backward()
        >>> layer.num_batches_tracked
        tensor(1)

    Source: pytorch/pytorch#96136 has asked for this since 2023.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "context_fn=preserve_state cannot be compiled together with its checkpoint: use momentum_fix.checkpoint, "
            "which stays out of the compiled code, or compile the blocks inside the checkpoints"
        )
    region = _Region()
    return region.forward(*_checkpointed()), region


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Do what `torch.utils.checkpoint.checkpoint` does, but replay from the state that the forward started from.

    See `preserve_state` for when to use this. This one works with both engines (`use_reentrant=True` too), together
    with any `context_fn`, and in a model that is compiled as a whole: it breaks the graph, so compiled code ends before
    it and continues after it. Blocks that are compiled themselves stay compiled.

    Instead of `checkpoint_sequential(layers, segments, x)`, which has no `context_fn`, run each segment yourself:

        for segment in segments:
            x = checkpoint(segment, x, use_reentrant=False)

    Exact for, Not for, Memory: as `preserve_state`. The reentrant engine may add up gradients in a different order than
    the run without checkpointing, with or without this package.

    Args:
        function: anything that can be called.
        args: passed on to it.
        kwargs: passed on, along with all the keywords of torch's function.

    Returns:
        What the function returns.

    Raises:
        What torch's checkpoint raises, and what the function raises.

    Example:
        >>> layer = nn.BatchNorm1d(3)
        >>> checkpoint(layer, torch.rand(8, 3, requires_grad=True), use_reentrant=True).sum().backward()
        >>> layer.num_batches_tracked
        tensor(1)

    Source: as `preserve_state`.
    """
    return _outside_of_compiled_code(function, *args, **kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outside_of_compiled_code(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return torchs_checkpoint(function, *args, **kwargs)
    region = _Region()
    forward = iter([region.forward(function, args, kwargs)])

    def run(*args: Any, **kwargs: Any) -> Any:
        with next(forward, region):
            return function(*args, **kwargs)

    return torchs_checkpoint(run, *args, **kwargs)


class _Region(AbstractContextManager[None]):
    """A call of a checkpoint: the state that each module in it had when it was entered. The context of its replays."""

    def __init__(self) -> None:
        self.state: dict[nn.Module, tuple[dict[str, Any], dict[str, Any]]] = {}  # all that is on it, what is copied
        self.parameters: list[_Parameter] = []
        self.alone: list[torch.Tensor] = []  # of the copies those that share no memory
        # Whether replays meet the hook too. It does nothing then, but compiled code is compiled again without it.
        self.watches_replays = False
        # For each replay that is running, what the modules have, with their submodules and their parameters.
        self.present: list[list[tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]]] = []

    @contextmanager
    def forward(self, function: Any = None, *inputs: Any) -> Iterator[None]:
        """Copy the state of each module that is entered."""
        # The reentrant engine runs the forward without gradients; the only way back into a graph is the tensor itself.
        self.detach = torch.is_grad_enabled()
        modules = [*function.modules()] if isinstance(function, nn.Module) and reads_no_buffer(function) else []
        if modules and all(map(reads_no_buffer, modules)) and not _others_watch():
            copier = Copier(share=True, detach=self.detach)
            with _own_operations():
                for each in modules:  # a replay may have any copies of the buffers: those of that time
                    self.state[each] = vars(each).copy(), {"_buffers": each._buffers.copy()}
                    self.parameters += _parameters(each, copier)
            buffers = (buffer for each in self.state for buffer in each._buffers.values())
            self.alone = [each for each in buffers if type(each) is torch.Tensor and not each.requires_grad]
            yield
            return
        watches = not is_compiled(function)  # such code calls no hook
        self.copier, self.entered = Copier(share=True, detach=self.detach), set[nn.Module]()
        if isinstance(function, nn.Module):
            self.enter(function)
        else:
            inputs = (function, *inputs)
        names = set[str]()
        for module, whole in list(_known(inputs, False, set(), names)):  # which gathers the names
            self.watches_replays |= whole
            self.enter(module, whole)
            for name, child in module._modules.items():  # the function may move one that it names before it calls it
                if name in names and child is not None and not isinstance(child, _CONTAINERS):
                    self.enter(child)
        outer = _running.regions
        _running.regions = (*outer, self)
        _watch(watches)
        try:
            yield
        finally:
            _watch(-watches)
            self.watches_replays &= watches
            _running.regions = outer
            self.alone = list(self.copier.alone.values())
            del self.copier, self.entered

    def __enter__(self) -> None:
        """Let the modules work on copies of what they had."""
        with _own_operations():
            copier = Copier(share=False, detach=self.detach, alone=self.alone)
            parameters = [kept.made(copier) for kept in self.parameters]  # first, as lists may have them too
            copies = [{name: copier.copy(value) for name, value in copied.items()} for _, copied in self.state.values()]
        present = [(each, vars(each).copy(), each._modules.copy(), each._parameters.copy()) for each in self.state]
        self.present.append(present)
        preserved.modules = (*preserved.modules, self.state)
        _watch(self.watches_replays)
        for (module, (everything, _)), copied in zip(self.state.items(), copies, strict=True):
            put(module, everything)
            vars(module).update(copied)
        for kept, parameter in zip(self.parameters, parameters, strict=True):
            _put_parameter(kept.module, kept.name, parameter)

    def __exit__(self, *error: Any) -> None:
        """Put back what they have now."""
        preserved.modules = preserved.modules[:-1]
        for module, everything, children, parameters in self.present.pop():
            put(module, everything)
            if self.detach:  # the replay's are not what the forward pass has
                _drop(module._parameters, parameters)
                if module._modules != children:
                    _drop(module._modules, children)
                    module._modules.update(children)
            for name, parameter in parameters.items():
                _put_parameter(module, name, parameter)
        _watch(-self.watches_replays)

    def enter(self, module: nn.Module, whole: bool = True) -> None:
        """Copy the state of a module, and of all below it: a parent may move a child's before it calls it."""
        below, moves = [module], module.training
        while below:
            fresh = dict[nn.Module, None]()
            for each in below:
                if each in self.entered or _is_uninitialized(each):
                    continue
                if isinstance(each, torch.jit.ScriptModule):
                    _refuse_state(each)
                    continue
                if (moves or each.training) and each not in self.state:
                    fresh[each] = None
                self.watches_replays |= is_compiled(each)
                if whole:
                    self.entered.add(each)
                    below += filter(None, each._modules.values())
            with _own_operations():
                self.copier.together(buffer for each in fresh for buffer in each._buffers.values())
                for each in fresh:
                    self.state[each] = keep(each, self.copier)
                    self.parameters += _parameters(each, self.copier)
            below, self.copier.modules = self.copier.modules, []


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)  # what a function names of them is what it calls


class _Parameter:
    """A parameter as it was: one that no gradient trains may be state, a teacher's weights or a codebook."""

    __slots__ = ("module", "name", "parameter", "value", "version")

    def __init__(self, module: nn.Module, name: str, parameter: Any, copier: Copier) -> None:
        self.module, self.name, self.parameter = module, name, parameter
        self.version, self.value = _version(parameter), None
        if not parameter.requires_grad and parameter.layout is torch.strided and parameter.nbytes <= LARGE:
            self.value = copier.copy(parameter.detach())
            vars(self.value).update(vars(parameter))

    def made(self, copier: Copier) -> nn.Parameter:
        """Give it, or a copy of what it was; one for all modules that share it."""
        if self.value is not None:
            return copier.parameter(self.parameter, self.value)
        if self.version != _version(self.parameter):
            warnings.warn(
                f"a parameter of shape {tuple(self.parameter.shape)} was written to after the forward pass of its "
                "checkpoint had begun, and is not preserved, so gradients may be wrong: keep such state in a buffer",
                stacklevel=2,
            )
        return self.parameter  # type: ignore[no-any-return]


def _parameters(module: nn.Module, copier: Copier) -> list[_Parameter]:
    return [_Parameter(module, name, each, copier) for name, each in module._parameters.items() if _is_plain(each)]


def _refuse_state(scripted: torch.jit.ScriptModule) -> None:
    """Raise if a module in TorchScript can move buffers: nothing can be swapped there."""
    if scripted.training and any(True for _ in scripted.buffers()):
        raise TypeError(
            "a module under the checkpoint is TorchScript with buffers, whose state cannot be preserved: use the "
            "module that it was made from, or put it into evaluation mode"
        )


def _put_parameter(module: nn.Module, name: str, parameter: Any) -> None:
    """Let a module have this parameter, if both it and the one that it has are plain ones."""
    present = module._parameters.get(name)
    if present is not parameter and _is_plain(parameter) and _is_plain(present):
        module._parameters[name] = parameter


def _drop(registered: dict[str, Any], before: dict[str, Any]) -> None:
    """Take off what was not registered before."""
    if len(registered) > len(before):
        for name in registered.keys() - before.keys():
            del registered[name]


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _is_plain(parameter: Any) -> bool:
    """Tell whether this is a parameter of torch's own class: others, as FSDP's, come and go by themselves."""
    return type(parameter) is nn.Parameter and not parameter.is_meta


def _known(value: Any, whole: bool, seen: set[int], names: set[str]) -> Iterator[tuple[nn.Module, bool]]:
    """Give the modules that a function can move without calling them as modules, and so without calling a hook.

    Each with whether that goes for all below it too: where its method is called, or where it is compiled, as such code
    calls no hook.
    """
    if id(value) in seen:
        return
    seen.add(id(value))
    whole = whole or is_compiled(value)
    parts: list[Any] = []
    if isinstance(value, nn.Module):
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
        names.update(_names(value.__code__))
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # it is empty
                parts.append(cell.cell_contents)
        by_name = (value.__globals__.get(name) for name in value.__code__.co_names)
        parts += [each for each in by_name if isinstance(each, nn.Module) or is_compiled(each)]
    elif not isinstance(value, type) and callable(value) and hasattr(value, "__dict__"):
        parts = [vars(value)]  # an object of a class of one's own, with what its `__call__` may use
    for part in parts:
        yield from _known(part, whole, seen, names)


def _names(code: types.CodeType) -> Iterator[str]:
    """Give the names in a function, and in the functions that it makes."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def is_compiled(value: Any) -> bool:
    """Tell whether a module or a function is compiled by itself."""
    own = getattr(value, "__dict__", {})
    if isinstance(value, nn.Module):
        return "_compiled_call_impl" in own or "_orig_mod" in own["_modules"]
    return "_torchdynamo_orig_callable" in own and not own.get("_torchdynamo_disable")


def _is_uninitialized(module: Any) -> bool:
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()  # type: ignore[misc]


def _own_operations() -> AbstractContextManager[None]:
    return unseen() if selective() else nullcontext()


class _Running(threading.local):
    regions: tuple[_Region, ...] = ()  # whose forward is running in this thread


_running, _lock, _users = _Running(), threading.Lock(), 0


def _watch(users: int) -> None:
    """Put the hook on with its first user, in whichever thread, and take it off with the last.

    Always the same one, under the same id: compiled code that meets another one is compiled again.
    """
    global _users
    if not users:
        return
    with _lock:
        _users += users
        handle = _handle()
        if _users:
            handle.hooks_dict_ref()[handle.id] = _entered
        else:
            handle.remove()


@functools.cache
def _handle() -> Any:
    return torchs_module.register_module_forward_pre_hook(_entered)


def _entered(module: Any, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for region in _running.regions:
        if module not in region.entered:
            if _is_uninitialized(module):
                if not args:  # they came by name, and the hook is not told
                    continue
                module.initialize_parameters(*args)
            region.enter(module)


def _others_watch() -> bool:
    """Tell whether somebody else has a global hook on, which may do anything with a module."""
    hooks = (torchs_module._global_forward_pre_hooks, torchs_module._global_forward_hooks)
    return any(hook is not _entered for each in hooks for hook in each.values())


def _checkpointed() -> tuple[Any, ...]:
    """Give the function and the arguments of the running call of torch's checkpoint; nothing, if that is not found.

    A `context_fn` is called without them, and there is no public way to ask for them. So they are read where torch's
    checkpoint has them, in its frame. Without them the hook still finds every module that is called as a module, but
    none whose method is called, and none in compiled code.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == torch.utils.checkpoint.__name__:
            return tuple(frame.f_locals.get(name) for name in ("fn", "args", "kwargs"))
        frame = frame.f_back
    return ()
