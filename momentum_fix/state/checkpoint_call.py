"""One call of a checkpoint: the state that its modules were entered with, put back around each recomputation."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from momentum_fix import _torch
from momentum_fix._torch import is_compiled, version
from momentum_fix.recomputation import this_thread
from momentum_fix.state.compare import is_equal, is_odd, mark
from momentum_fix.state.reachable import modules_of
from momentum_fix.state.snapshot import LARGE, Copier, hooks_of, keep, pieces, put, put_hooks, reads_no_buffer, scratch

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)  # what a function names of them is what it calls


class _Parameter(NamedTuple):
    """A parameter as it was: one that no gradient trains may be state, a teacher's weights or a codebook."""

    module: nn.Module
    name: str
    parameter: nn.Parameter
    version: int
    value: torch.Tensor | None  # a copy, if it is small and no gradient trains it


class _Present(NamedTuple):
    """What a module has when a recomputation begins."""

    module: nn.Module
    everything: dict[str, Any]
    hooks: dict[str, dict[int, Any]]
    children: dict[str, nn.Module | None]
    parameters: dict[str, nn.Parameter | None]


class _Recomputation(NamedTuple):
    """What a recomputation has replaced, by what."""

    present: list[_Present]
    values: list[tuple[nn.Parameter, torch.Tensor]]
    buffers: dict[int, dict[str, torch.Tensor | None]]  # that it has put on each module, by its id


def begin(function: Any = None, args: tuple[Any, ...] = (), kwargs: Any = None) -> Region | RegionOfTorchs:
    """Begin a call of a checkpoint; its function is None if that is not known."""
    if isinstance(function, nn.Module) and reads_no_buffer(function) and not _torch.others_hear_modules():
        modules = [function]
        for each in modules:
            modules += [child for child in each._modules.values() if child is not None]
        parameters = [each for module in modules for each in _parameters(module).values() if each is not None]
        if all(map(reads_no_buffer, modules[1:])) and all(p.requires_grad and _is_plain(p) for p in parameters):
            return RegionOfTorchs(modules, parameters)
    return Region(function, args, kwargs)


class RegionOfTorchs(_torch.Listener):
    """A call of a checkpoint around torch's own modules alone. What they compute reads no buffer, so none is copied.

    A process may hold thousands of these, so each is few objects. Python's garbage collector goes through all objects
    again and again; that is why a checkpoint costs more the more of them there are, a plain one of torch's too.
    """

    __slots__ = ("everything", "hooks", "modules", "parameters", "present", "versions")

    def __init__(self, modules: list[nn.Module], parameters: list[nn.Parameter]) -> None:
        self.modules, self.everything = modules, [vars(each).copy() for each in modules]
        for own in self.everything:
            for name in ("_buffers", "_parameters"):
                if own[name]:
                    own[name] = own[name].copy()  # one may be replaced, or removed
        self.parameters, self.versions = parameters, tuple(map(version, parameters))

    def holds(self, module: nn.Module) -> bool:
        """Tell whether recomputations drop what they change on a module."""
        return any(each is module for each in self.modules)

    def recomputation(self) -> AbstractContextManager[None]:
        """Give the context of a recomputation."""
        return self

    def __enter__(self) -> None:
        """Let the modules write to memory of which nobody reads the values."""
        for parameter, then in zip(self.parameters, self.versions, strict=True):
            _warn_of_write(parameter, then)
        self.present = [vars(each).copy() for each in self.modules]  # no checkpoint recomputes while it recomputes
        self.hooks = [hooks_of(each) for each in self.modules]  # which the forward pass had none of
        this_thread.begin_preserving(self)
        with _torch.hidden_from_modes():
            for module, everything in zip(self.modules, self.everything, strict=True):
                put(module, everything)
                put_hooks(module, {})
                if everything["_buffers"]:
                    vars(module)["_buffers"] = scratch(module)

    def __exit__(self, *error: Any) -> None:
        """Put back what they have now."""
        this_thread.end_preserving()
        for module, own, hooks in zip(self.modules, self.present, self.hooks, strict=True):
            put(module, own)
            put_hooks(module, hooks)
        del self.present, self.hooks


class Region(_torch.Listener):
    """A call of a checkpoint: the state that each module in it was entered with. The context of its recomputations."""

    def __init__(self, function: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        self.inputs: Any = function, args, kwargs
        # By id, as a module's own hash may follow its state: the module, all that is on it, and what of that is copied.
        self.states: dict[int, tuple[nn.Module, dict[str, Any], dict[str, Any]]] = {}
        self.hooks: dict[int, dict[str, dict[int, Any]]] = {}
        self.parameters: list[_Parameter] = []
        # Whether the hook is on in recomputations too, where it does nothing: code that is compiled inside of the
        # checkpoint would be compiled again without it.
        self.hears = False
        self.changes = False  # whether the forward pass has changed any state but the statistics of torch's own norms
        self.running: list[_Recomputation] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Copy the state of each module that is entered."""
        # The reentrant engine runs the forward without gradients; the only way back into a graph is the tensor itself.
        self.detach = torch.is_grad_enabled()
        function, *inputs = self.inputs
        del self.inputs  # the engine has them
        self.copier, self.entered = Copier(share=True, detach=self.detach), dict[int, nn.Module]()
        self.marks, names = list[tuple[nn.Module, Any]](), set[str]()
        if isinstance(function, nn.Module):
            self.enter(function)
        else:
            inputs = [function, *inputs]
        found = list(modules_of(inputs, names=names))
        moves = bool(self.states) or any(module.training for module, _ in found)  # what trains may move all of them
        for module, whole in found:
            self.hears |= whole
            self.enter(module, whole, moves)
            for name, child in module._modules.items():  # the function may move one that it names before it calls it
                if name in names and child is not None:
                    is_list = type(child) in _CONTAINERS  # of which the function may call other methods than `__call__`
                    for each in child.children() if is_list else [child]:
                        if not is_list or any(_is_own_method(each, method) for method in names):
                            self.enter(each, moves=moves)
        outer, hears = _running.regions, not is_compiled(function)  # such code calls no hook
        _running.regions = (*outer, self)
        _torch.hear_entering(_entered, hears)
        try:
            yield
        finally:
            _torch.hear_entering(_entered, -hears)
            self.hears &= hears
            _running.regions = outer
            self.changes = any(mark(_guards(module), by_value=False) != before for module, before in self.marks)
            del self.copier, self.entered, self.marks

    def enter(self, module: nn.Module, whole: bool = True, moves: bool = False) -> None:
        """Copy the state of a module, and of all below it: a parent may move a child's before it calls it."""
        if not whole and id(module) in self.states:
            return
        below, moves, seen = [module], moves or module.training, set[int]()
        with _torch.hidden_from_modes():
            while below:
                each = below.pop()
                if id(each) in self.entered or id(each) in seen or _is_uninitialized(each):
                    continue
                seen.add(id(each))
                if isinstance(each, torch.jit.ScriptModule):
                    _refuse_state(each)
                    continue
                self.hears |= is_compiled(each)
                if whole:
                    if moves or each.training:  # its parent may put it into training mode later
                        self.entered[id(each)] = each
                    below += [child for child in each._modules.values() if child is not None]
                hooks = hooks_of(each)
                if (moves or each.training) and id(each) not in self.states:
                    self.states[id(each)] = each, *keep(each, self.copier)
                    if "_initialize_hook" not in vars(each):  # which a lazy module removes in its first call
                        self.hooks[id(each)] = hooks
                    self._keep_parameters(each)
                    if not reads_no_buffer(each):
                        self.marks.append((each, mark(_guards(each), by_value=False)))
                below += self.copier.modules + ([module for module, _ in modules_of(hooks)] if hooks else [])
                self.copier.modules = []

    def _keep_parameters(self, module: nn.Module) -> None:
        for name, each in _parameters(module).items():
            if each is not None and _is_plain(each):
                value = None
                if not each.requires_grad and each.layout is torch.strided and each.nbytes <= LARGE:
                    value = self.copier.copy(each.detach())
                    vars(value).update(vars(each))
                self.parameters.append(_Parameter(module, name, each, version(each), value))

    def holds(self, module: nn.Module) -> bool:
        """Tell whether recomputations drop what they change on a module, with the buffers that it has now."""
        put = self.running[-1].buffers.get(id(module))
        if put and all(module._buffers.get(name) is each for name, each in put.items()):
            put.clear()  # from now on it is the module that replaces them
        return put == {}

    def recomputation(self) -> AbstractContextManager[None]:
        """Give the context of a recomputation."""
        return self

    def __enter__(self) -> None:
        """Let the modules work on copies of what they had."""
        with _torch.hidden_from_modes():
            copier = Copier(share=False, detach=self.detach)
            parameters = [_copied(kept, copier) for kept in self.parameters]  # first, as lists may have them too
            copies = [
                {name: copier.copy(value) for name, value in copied.items()} for *_, copied in self.states.values()
            ]
            guarded = parameters if self.changes and _torch.has_values() else []
            trained = {id(each): each for each in guarded if each.requires_grad and not is_odd(each)}
            values = [(each, each.detach().clone()) for each in trained.values()]
        present = [
            _Present(each, vars(each).copy(), hooks_of(each), each._modules.copy(), each._parameters.copy())
            for each, *_ in self.states.values()
        ]
        buffers = {id(each.module): copied["_buffers"].copy() for each, copied in zip(present, copies, strict=True)}
        self.running.append(_Recomputation(present, values, buffers))
        this_thread.begin_preserving(self)
        if self.hears:
            _torch.hear_entering(_entered, 1)
        for (module, everything, _), copied in zip(self.states.values(), copies, strict=True):
            put(module, everything)
            vars(module).update(copied)
            if id(module) in self.hooks:
                put_hooks(module, self.hooks[id(module)])
        for kept, parameter in zip(self.parameters, parameters, strict=True):
            _put_parameter(kept.module, kept.name, parameter)

    def __exit__(self, *error: Any) -> None:
        """Put back what they have now."""
        this_thread.end_preserving()
        present, values, _ = self.running.pop()
        for module, everything, hooks, children, parameters in present:
            put(module, everything)
            put_hooks(module, hooks)
            if self.detach:  # the recomputation's are not what the forward pass has
                _drop(module._parameters, parameters)
                _drop(module._modules, children)
                module._modules.update(children)
            for name, parameter in parameters.items():
                _put_parameter(module, name, parameter)
        if self.hears:
            _torch.hear_entering(_entered, -1)
        with _torch.hidden_from_modes():
            _refuse_writes(values)


def _parameters(module: Any) -> dict[str, nn.Parameter | None]:
    """Give a module's parameters, but not a weight that an embedding renormalizes: to do so twice is to do so once."""
    renormalizes = type(module) in (nn.Embedding, nn.EmbeddingBag) and module.max_norm is not None
    return {} if renormalizes else module._parameters


def _copied(kept: _Parameter, copier: Copier) -> nn.Parameter:
    """Give a parameter with the value that it had; it itself if that is not kept, with a warning if it has changed."""
    if kept.value is not None:
        return copier.parameter(kept.parameter, kept.value)
    _warn_of_write(kept.parameter, kept.version)
    return kept.parameter


def _warn_of_write(parameter: nn.Parameter, then: int) -> None:
    """Warn if a parameter, which is not preserved, has another version than then."""
    if version(parameter) != then:
        warnings.warn(
            f"a parameter of shape {tuple(parameter.shape)} was written to after the forward pass of its "
            "checkpoint had begun, and is not preserved, so gradients may be wrong: keep such state in a buffer",
            stacklevel=2,
        )


def _guards(module: nn.Module) -> dict[str, Any]:
    """Give what may tell a forward whether it has written to a parameter before: the state that is preserved."""
    return {
        name: value
        for name, value in pieces(module).items()
        if not (isinstance(value, nn.Parameter) and (value.requires_grad or value.nbytes > LARGE))
    }


def _refuse_writes(values: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
    """Raise if a recomputation has written to parameters that gradients train, and undo that."""
    written = [(parameter, value) for parameter, value in values if not is_equal(parameter.data, value)]
    for parameter, value in written:
        parameter.data.copy_(value)
    if written:
        raise RuntimeError(
            "a recomputation wrote to parameters that its forward pass had written to: the state that tells whether "
            "this is still to be done was put back. They are as the forward pass left them. Write to them outside of "
            "the checkpoint, or use torch's here"
        )


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
    """Remove what was not registered before."""
    if len(registered) > len(before):
        for name in registered.keys() - before.keys():
            del registered[name]


def _is_plain(parameter: Any) -> bool:
    """Tell whether this is a parameter of torch's own class: others, as FSDP's, come and go by themselves."""
    return type(parameter) is nn.Parameter and not parameter.is_meta


def _is_own_method(module: nn.Module, name: str) -> bool:
    """Tell whether this is a method of the module's class, and not one that all modules have."""
    return name == "forward" or (callable(getattr(type(module), name, None)) and not hasattr(nn.Module, name))


def _is_uninitialized(module: Any) -> bool:
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()  # type: ignore[misc]


class _Running(threading.local):
    regions: tuple[Region, ...] = ()  # whose forward is running in this thread


_running = _Running()


def _entered(module: Any, args: Any) -> None:
    for region in _running.regions:
        if id(module) not in region.entered:
            if _is_uninitialized(module):
                if not args:  # they came by name, and the hook is not told
                    continue
                module.initialize_parameters(*args)
            region.enter(module)
