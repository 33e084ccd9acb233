"""Checkpointing for modules that change themselves: a recomputation sees the state that its forward pass saw."""

from __future__ import annotations

import functools
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.checkpoint import checkpoint as torchs_checkpoint

from momentum_fix import _torch
from momentum_fix.recomputation import this_thread
from momentum_fix.state.snapshot import LARGE, Copier, keep, mark, pieces, put, reads_no_buffer, scratch, version


def preserve_state(*mistaken: Any) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Let a recomputation see the state that its forward pass saw, and leave no trace: a `context_fn`.

        checkpoint(block, x, use_reentrant=False, context_fn=preserve_state)

    Use it if a module changes itself during training and its output depends on what it changed: spectral
    normalization, Batch Renormalization, codebooks, quantization-aware training, spiking neurons, step counters.
    State is what a module keeps in buffers, in plain attributes (numbers, tensors, NumPy arrays, generators of random
    numbers; lists, tuples, dictionaries, sets and deques of them) and in parameters of up to 64 KiB that no gradient
    trains. You name none of it: it is preserved for every module that runs in the checkpoint in training mode, and
    for all modules below it.

    Exact for: state, gradients and all values, bit for bit, in any order of forwards and backwards, if the forward is
    deterministic. Not for: state inside objects of your own, on classes or in globals; random numbers of Python and
    NumPy; modules that the function reaches in another way than by calling them or by its closure, defaults, globals
    and arguments; a checkpoint inside this one that is called by torch's own function (use `preserve_everywhere`); a
    checkpoint that is compiled together with its model (use `checkpoint`). docs/limits.md has the whole list.

    Memory: a copy of the state for each checkpoint whose backward pass is still to come, but none for blocks of
    torch's own modules without hooks, whose outputs read no state. What is larger than 64 KiB and does not change is
    copied once.

    Returns:
        The contexts of the forward pass and of its recomputations, as torch's checkpoint wants them.

    Raises:
        TypeError: it is called with a model or used in `with`, which is not how it is used; or a module in the
            checkpoint is TorchScript, is in training mode and has buffers.
        RuntimeError: the checkpoint is being compiled together with its model; or, in the backward pass, a
            recomputation wrote to a parameter for a second time, because the state that guards this was put back.

    Warns:
        UserWarning: a parameter was written to between the start of the forward pass and the recomputation, other than
            a small one that is not trained; or a container that holds tensors cannot be copied.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> layer = nn.BatchNorm1d(3)
        >>> x = torch.rand(8, 3, requires_grad=True)
        >>> checkpoint(layer, x, use_reentrant=False, context_fn=preserve_state).sum().backward()
        >>> layer.num_batches_tracked
        tensor(1)

    Source: pytorch/pytorch#96136 has asked for this since 2023.
    """
    if mistaken:
        _refuse_use(f"called with {type(mistaken[0]).__name__}")
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "context_fn=preserve_state cannot be compiled together with its checkpoint: use momentum_fix.checkpoint, "
            "which stays out of the compiled code, or compile the blocks inside the checkpoints"
        )
    region = _region(*_torch.checkpoint_in_the_making())
    return _Contexts((region.forward(), region))


class _Contexts(tuple[AbstractContextManager[None], AbstractContextManager[None]]):
    """Two contexts that are none themselves."""

    __slots__ = ()

    def __call__(self) -> NoReturn:
        _refuse_use("called")

    def __enter__(self) -> NoReturn:
        _refuse_use("used in a `with` statement")

    def __exit__(self, *_: object) -> None:
        """Make Python look at `__enter__` first."""


def _refuse_use(how: str) -> NoReturn:
    raise TypeError(
        f"preserve_state was {how}, but it is a context_fn, to be given to a checkpoint as it is: "
        "checkpoint(block, x, use_reentrant=False, context_fn=preserve_state). For all checkpoints of a process, "
        "a library's too, call preserve_everywhere()"
    )


def checkpoint(function: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
    """Do what `torch.utils.checkpoint.checkpoint` does, but recompute from the state that the forward pass saw.

    See `preserve_state` for when to use it. This one works with both engines (`use_reentrant=True` too), together
    with any `context_fn`, and in a model that is compiled as a whole: it breaks the graph, so compiled code ends
    before it and goes on after it. Blocks that are compiled themselves stay compiled. Instead of
    `checkpoint_sequential`, which has no `context_fn`, run each segment yourself, or call `preserve_everywhere`.

    Exact for, Not for, Memory: as `preserve_state`. The reentrant engine may add up gradients in another order than the
    run without checkpointing, with or without this package.

    Args:
        function: anything that can be called. Without it, what torch 2.14 and newer give too: a decorator.
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
    if function is None and not args:
        decorate = torchs_checkpoint(**kwargs)  # a TypeError before torch 2.14

        def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def call(*args: Any, **kwargs: Any) -> Any:
                return _outside_of_compiled_code(
                    lambda run, *args, **kwargs: decorate(run)(*args, **kwargs), function, *args, **kwargs
                )

            return call

        return decorated
    return _outside_of_compiled_code(torchs_checkpoint, function, *args, **kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outside_of_compiled_code(engine: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return engine(function, *args, **kwargs)
    contexts = _in_turn(lambda: _region(function, args, kwargs))

    def run(*args: Any, **kwargs: Any) -> Any:
        with next(contexts):
            return function(*args, **kwargs)

    run.preserves_state = function  # type: ignore[attr-defined]
    return engine(run, *args, **kwargs)


def _in_turn(begin: Callable[[], _Region | _OfTorchs]) -> Iterator[AbstractContextManager[None]]:
    """Give the context of the forward pass, then that of each recomputation."""
    region = begin()
    yield region.forward()
    while True:
        yield region


class Everywhere:
    """What `preserve_everywhere` returns: `remove()`, or the end of a `with` block, ends it."""

    def __init__(self) -> None:
        self._stop: Callable[[], None] | None = _torch.listen(_preserving)

    def remove(self) -> None:
        """Let checkpoints recompute as torch does; a second call does nothing. Those that have begun are preserved."""
        if self._stop is not None:
            self._stop()
        self._stop = None

    def __enter__(self) -> Everywhere:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<preserve_everywhere, {'removed' if self._stop is None else 'on'}>"


def preserve_everywhere() -> Everywhere:
    """Let every call of torch's checkpoint in this process preserve state, as `preserve_state` does for one.

    That is every call from now on, by either engine, in any thread, whoever makes it and however it was imported: those
    inside timm, MONAI, Hugging Face or mmseg, those inside another checkpoint, and `checkpoint_sequential`. It works
    together with a `context_fn` of the caller's, and with `update_once` and `calibrate` on the same model.

    Exact for: what `preserve_state` is exact for. Not for: a checkpoint that torch compiles together with its model,
    where nothing of this runs: BatchNorm is right there by itself, and for modules whose output reads their state
    keep the checkpoint out of the compiled code (`momentum_fix.checkpoint` does). Not for engines other than torch's.

    Returns:
        An `Everywhere`; call `remove()` on it, or use it in `with`. After a second call, both have to be removed.

    Raises:
        RuntimeError: this version of torch does not tell of its checkpoints.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> layer = nn.BatchNorm1d(3)
        >>> with preserve_everywhere():
        ...     checkpoint(layer, torch.rand(8, 3, requires_grad=True), use_reentrant=False).sum().backward()
        >>> layer.num_batches_tracked
        tensor(1)

    Source: as `preserve_state`.
    """
    return Everywhere()


def _preserving(call: _torch.Call) -> _Preserving | None:
    if call.in_compilation:
        warnings.warn(
            "a checkpoint is being compiled together with its model, where preserve_everywhere does nothing. "
            "BatchNorm is "
            "right there. For modules whose output reads their state use momentum_fix.checkpoint instead, which "
            "stays out "
            "of the compiled code",
            stacklevel=2,
        )
        return None
    is_ours = hasattr(call.function, "preserves_state")
    return None if is_ours else _Preserving(_region(call.function, call.args, call.kwargs))


class _Preserving(_torch.Listener):
    """Preserves the state of one call of torch's checkpoint."""

    def __init__(self, region: _Region | _OfTorchs) -> None:
        self.region = region

    def forward(self) -> AbstractContextManager[None]:
        return self.region.forward()

    def recomputation(self) -> AbstractContextManager[None]:
        return self.region


def _region(function: Any = None, args: tuple[Any, ...] = (), kwargs: Any = None) -> _Region | _OfTorchs:
    """Begin a call of a checkpoint; its function is None if that is not known."""
    if isinstance(function, nn.Module) and reads_no_buffer(function) and not _torch.others_hear_modules():
        modules = [function]
        for each in modules:
            modules += [child for child in each._modules.values() if child is not None]
        parameters = [p for each in modules for p in each._parameters.values() if p is not None]
        if all(map(reads_no_buffer, modules[1:])) and all(p.requires_grad and _is_plain(p) for p in parameters):
            return _OfTorchs(modules, parameters)
    return _Region(function, args, kwargs or {})


class _OfTorchs(AbstractContextManager[None]):
    """A call of a checkpoint around torch's own modules. What they compute depends on no buffer, so none is copied.

    A process may hold thousands of these, so each is few objects: Python's garbage collector goes through all that
    there are, again and again. That is why every checkpoint costs more the more of them there are, torch's own ones
    too.
    """

    __slots__ = ("everything", "modules", "parameters", "present", "versions")

    def __init__(self, modules: list[nn.Module], parameters: list[nn.Parameter]) -> None:
        self.modules, self.everything = modules, [vars(each).copy() for each in modules]
        for own in self.everything:
            if own["_buffers"]:
                own["_buffers"] = own["_buffers"].copy()  # a buffer may be replaced, or taken away
        self.parameters, self.versions = parameters, tuple(map(version, parameters))

    def forward(self) -> AbstractContextManager[None]:
        """Give the context of the forward pass, for which there is nothing to do."""
        return _NO_CONTEXT

    def holds(self, module: nn.Module) -> bool:
        """Tell whether this drops what a recomputation changes on a module."""
        return any(each is module for each in self.modules)

    def __enter__(self) -> None:
        """Let the modules write to memory of which nobody reads the values."""
        if self.versions != tuple(map(version, self.parameters)):
            _warn_of_writes(zip(self.parameters, self.versions, strict=True))
        self.present = [vars(each).copy() for each in self.modules]  # no checkpoint recomputes while it recomputes
        this_thread.begin_preserving(self)
        with _own_operations():
            for module, everything in zip(self.modules, self.everything, strict=True):
                vars(module).update(everything)
                if everything["_buffers"]:
                    vars(module)["_buffers"] = scratch(module)

    def __exit__(self, *error: Any) -> None:
        """Give them back what they had."""
        this_thread.end_preserving()
        for module, own in zip(self.modules, self.present, strict=True):
            vars(module).update(own)
        del self.present


_NO_CONTEXT = nullcontext()


class _Region(AbstractContextManager[None]):
    """A call of a checkpoint: what each module in it had when it was entered. The context of its recomputations."""

    def __init__(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs = function, args, kwargs
        # By id, as a module's own hash may follow its state: the module, all that is on it, and what of that is copied.
        self.state: dict[int, tuple[nn.Module, dict[str, Any], dict[str, Any]]] = {}
        self.parameters: list[_Parameter] = []
        self.alone: list[torch.Tensor] = []  # of the copies those that share no memory
        # Whether recomputations meet the hook too. It does nothing then, but code compiled with it would be compiled
        # anew without it.
        self.hears_recomputations = False
        self.changes = False  # whether the forward pass has changed any state but the statistics of torch's own norms
        self.written: set[int] = set()  # the ids of the parameters that it has written to, as far as autograd has seen
        # For each recomputation that is running: what the modules have, with their submodules and parameters; the
        # parameters that it may write to, with their values.
        self.present: list[tuple[list[tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]], Any]] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Copy the state of each module that is entered."""
        # The reentrant engine runs the forward without gradients; the only way back into a graph is the tensor itself.
        self.detach = torch.is_grad_enabled()
        function, *inputs = self.inputs
        del self.inputs  # the engine has them
        self.copier, self.entered, self.marks = (
            Copier(share=True, detach=self.detach),
            dict[int, nn.Module](),
            list[Any](),
        )
        if isinstance(function, nn.Module):
            self.enter(function)
        else:
            inputs = [function, *inputs]
        names = set[str]()
        for module, whole in list(_known(inputs, False, set(), names)):  # which gathers the names
            self.hears_recomputations |= whole
            self.enter(module, whole)
            for name, child in module._modules.items():  # the function may move one that it names before it calls it
                if name in names and child is not None and type(child) not in _CONTAINERS:
                    self.enter(child)
        outer = _running.regions
        _running.regions = (*outer, self)
        hears = not is_compiled(function)  # such code calls no hook
        _torch.hear_entering(_entered, hears)
        try:
            yield
        finally:
            _torch.hear_entering(_entered, -hears)
            self.hears_recomputations &= hears
            _running.regions = outer
            self.alone = list(self.copier.alone.values())
            self.changes = any(mark(_guards(module), by_value=False) != before for module, before in self.marks)
            self.written = {id(each.parameter) for each in self.parameters if each.version != version(each.parameter)}
            del self.copier, self.entered, self.marks

    def holds(self, module: nn.Module) -> bool:
        """Tell whether this drops what a recomputation changes on a module."""
        return id(module) in self.state

    def __enter__(self) -> None:
        """Let the modules work on copies of what they had."""
        with _own_operations():
            copier = Copier(share=False, detach=self.detach, alone=self.alone)
            parameters = [kept.made(copier) for kept in self.parameters]  # first, as lists may have them too
            copies = [
                {name: copier.copy(value) for name, value in copied.items()} for *_, copied in self.state.values()
            ]
            written = {id(p): p for p, kept in zip(parameters, self.parameters, strict=True) if kept.value is None}
            traced = is_in_torch_dispatch_mode(include_infra_modes=True)  # where nothing has a value
            guarded = [*written.values()] if self.changes and not traced else []
            values = [(each, each.detach().clone()) for each in guarded if id(each) in self.written]
            guard = values, guarded, _sums(guarded)
        present = [
            (each, vars(each).copy(), each._modules.copy(), each._parameters.copy()) for each, *_ in self.state.values()
        ]
        self.present.append((present, guard))
        this_thread.begin_preserving(self)
        _torch.hear_entering(_entered, self.hears_recomputations)
        for (module, everything, _), copied in zip(self.state.values(), copies, strict=True):
            put(module, everything)
            vars(module).update(copied)
        for kept, parameter in zip(self.parameters, parameters, strict=True):
            _put_parameter(kept.module, kept.name, parameter)

    def __exit__(self, *error: Any) -> None:
        """Put back what they have now."""
        this_thread.end_preserving()
        present, guard = self.present.pop()
        for module, everything, children, parameters in present:
            put(module, everything)
            if self.detach:  # the recomputation's are not what the forward pass has
                _drop(module._parameters, parameters)
                _drop(module._modules, children)
                module._modules.update(children)
            for name, parameter in parameters.items():
                _put_parameter(module, name, parameter)
        _torch.hear_entering(_entered, -self.hears_recomputations)
        with _own_operations():
            _refuse_writes(*guard)

    def enter(self, module: nn.Module, whole: bool = True) -> None:
        """Copy the state of a module, and of all below it: a parent may move a child's before it calls it."""
        below, moves = [module], module.training
        while below:
            fresh = dict[int, nn.Module]()
            for each in below:
                if id(each) in self.entered or _is_uninitialized(each):
                    continue
                if isinstance(each, torch.jit.ScriptModule):
                    _refuse_state(each)
                    continue
                if (moves or each.training) and id(each) not in self.state:
                    fresh[id(each)] = each
                self.hears_recomputations |= is_compiled(each)
                if whole:
                    self.entered[id(each)] = each
                    below += [child for child in each._modules.values() if child is not None]
            with _own_operations():
                self.copier.together(buffer for each in fresh.values() for buffer in each._buffers.values())
                for each in fresh.values():
                    self.state[id(each)] = each, *keep(each, self.copier)
                    self.parameters += _parameters(each, self.copier)
                    if not reads_no_buffer(each):
                        self.marks.append((each, mark(_guards(each), by_value=False)))
            below, self.copier.modules = self.copier.modules, []


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)  # what a function names of them is what it calls


class _Parameter:
    """A parameter as it was: one that no gradient trains may be state, a teacher's weights or a codebook."""

    __slots__ = ("module", "name", "parameter", "value", "version")

    def __init__(self, module: nn.Module, name: str, parameter: Any, copier: Copier) -> None:
        self.module, self.name, self.parameter = module, name, parameter
        self.version, self.value = version(parameter), None
        if not parameter.requires_grad and parameter.layout is torch.strided and parameter.nbytes <= LARGE:
            self.value = copier.copy(parameter.detach())
            vars(self.value).update(vars(parameter))

    def made(self, copier: Copier) -> nn.Parameter:
        """Give it, or a copy of what it was; one for all modules that share it."""
        if self.value is not None:
            return copier.parameter(self.parameter, self.value)
        _warn_of_writes([(self.parameter, self.version)])
        return self.parameter  # type: ignore[no-any-return]


def _parameters(module: nn.Module, copier: Copier) -> list[_Parameter]:
    return [_Parameter(module, name, each, copier) for name, each in module._parameters.items() if _is_plain(each)]


def _warn_of_writes(parameters: Iterable[tuple[Any, int]]) -> None:
    for parameter, then in parameters:
        if version(parameter) != then:
            warnings.warn(
                f"a parameter of shape {tuple(parameter.shape)} was written to after the forward pass of its "
                "checkpoint had begun, and is not preserved, so gradients may be wrong: keep such state in a buffer",
                stacklevel=2,
            )


def _guards(module: nn.Module) -> dict[str, Any]:
    """Give what may tell a forward whether it has written to a parameter before: the state that is preserved."""
    state = pieces(module).items()
    return {
        name: value
        for name, value in state
        if not (isinstance(value, nn.Parameter) and (value.requires_grad or value.nbytes > LARGE))
    }


def _sums(parameters: Iterable[nn.Parameter]) -> list[str]:
    """Give what tells whether parameters were written to, where autograd does not see it either."""
    return [repr(each.detach().sum().item()) for each in parameters]


def _refuse_writes(values: list[tuple[nn.Parameter, torch.Tensor]], parameters: list[nn.Parameter], sums: Any) -> None:
    """Raise if a recomputation has written to parameters that are not preserved, and undo what can be undone."""
    written = [(parameter, value) for parameter, value in values if not _is_equal(parameter, value)]
    for parameter, value in written:
        parameter.data.copy_(value)
    if written or _sums(parameters) != sums:
        left = "They are as the forward pass left them" if written else "They are written to twice now: load them again"
        raise RuntimeError(
            "a recomputation wrote to parameters that its forward pass had written to: the state that tells whether "
            "this "
            f"is still to be done was put back. {left}. Write to them outside of the checkpoint, or use torch's here"
        )


def _is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())


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


def _is_plain(parameter: Any) -> bool:
    """Tell whether this is a parameter of torch's own class: others, as FSDP's, come and go by themselves."""
    return type(parameter) is nn.Parameter and not parameter.is_meta


def reached(function: Any, *inputs: Any) -> list[nn.Module]:
    """Give the modules that a checkpointed function is, has, or is given, as far as that can be seen before it runs."""
    return [module for module, _ in _known((function, *inputs), False, set(), set())]


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
    return _torch.hidden_from_modes() if _torch.is_watched_by_mode() else nullcontext()


class _Running(threading.local):
    regions: tuple[_Region, ...] = ()  # whose forward is running in this thread


_running = _Running()


def _entered(module: Any, args: Any) -> None:
    for region in _running.regions:
        if id(module) not in region.entered:
            if _is_uninitialized(module):
                if not args:  # they came by name, and the hook is not told
                    continue
                module.initialize_parameters(*args)
            region.enter(module)
