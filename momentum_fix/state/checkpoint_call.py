"""One call of a checkpoint: the state that its modules were entered with, put back around each recomputation."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
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
from momentum_fix.state.snapshot import (
    LARGE,
    Copier,
    has_attributes,
    has_hooks,
    hooks_of,
    keep,
    pieces,
    put,
    put_hooks,
    reads_no_buffer,
    scratch,
    without_attributes,
)

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)  # what a function names of them is what it calls


class _Kept(NamedTuple):
    """A module as it was."""

    module: nn.Module
    everything: dict[str, Any]  # on it
    copied: dict[str, Any]  # what of that is a copy
    hooks: dict[str, dict[int, Any]]
    children: dict[str, nn.Module | None]
    parameters: dict[str, nn.Parameter | None]


class _Recomputation(NamedTuple):
    """What a recomputation has replaced, by what."""

    present: list[_Kept]
    values: list[tuple[nn.Parameter, torch.Tensor]]
    trained: list[bool]  # whether each of the versioned parameters was, before
    buffers: dict[int, dict[str, torch.Tensor | None]]  # that it has put on each module, by its id


def begin(function: Any = None, args: tuple[Any, ...] = (), kwargs: Any = None) -> Region | RegionOfTorchs:
    """Begin a call of a checkpoint; its function is None if that is not known."""
    if isinstance(function, nn.Module) and not _torch.others_hear_modules():
        modules = [function]
        for each in modules:
            if not _is_torchs(each):
                return Region(function, args, kwargs)
            modules += [child for child in each._modules.values() if child is not None]
        return RegionOfTorchs(modules)
    return Region(function, args, kwargs)


class RegionOfTorchs(_torch.Listener):
    """A call of a checkpoint around torch's own modules alone. What they compute reads no buffer, so none is copied.

    A process may hold thousands of these, so each is few objects. Python's garbage collector goes through all objects
    again and again; that is why a checkpoint costs more the more of them there are, a plain one of torch's too.
    """

    __slots__ = ("everything", "hooks", "modules", "parameters", "present", "versions")

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.everything = everything = list[dict[str, Any] | None]()
        self.parameters = parameters = list[nn.Parameter]()
        for module in modules:
            own = None
            if has_attributes(module):
                own = vars(module).copy()
                if own["_buffers"]:
                    own["_buffers"] = own["_buffers"].copy()  # one may be replaced, or removed
                if own["_parameters"]:
                    own["_parameters"] = own["_parameters"].copy()
                    parameters += [each for each in _parameters(module, own).values() if each is not None]
            everything.append(own)
        self.versions = tuple(map(version, parameters))

    def holds(self, module: nn.Module) -> bool:
        """Tell whether recomputations drop what they change on a module."""
        return any(each is module for each in self.modules)

    def recomputation(self) -> AbstractContextManager[None]:
        """Give the context of a recomputation."""
        return self

    def __enter__(self) -> None:
        """Let the modules write to memory of which nobody reads the values."""
        _warn_of_writes(self.parameters, self.versions)
        # No checkpoint recomputes while it recomputes. The forward pass had no hooks.
        self.hooks = [(each, hooks_of(each)) for each in self.modules if has_hooks(each)]
        self.present = []
        this_thread.begin_preserving(self)
        for module, _ in self.hooks:
            put_hooks(module, {})
        with _torch.hidden_from_modes():
            for module, everything in zip(self.modules, self.everything, strict=True):
                if everything or has_attributes(module):
                    self.present.append((module, vars(module).copy()))
                    put(module, everything or without_attributes(module))
                    if "running_mean" in module._buffers:
                        vars(module)["_buffers"] = scratch(module)

    def __exit__(self, *error: Any) -> None:
        """Put back what they have now."""
        this_thread.end_preserving()
        for module, own in reversed(self.present):  # a layer may be there twice
            put(module, own)
        for module, hooks in self.hooks:
            put_hooks(module, hooks)
        del self.present, self.hooks


class Region(_torch.Listener):
    """A call of a checkpoint: the state that each module in it was entered with. The context of its recomputations."""

    def __init__(self, function: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        self.inputs: Any = function, args, kwargs
        self.kept = list[_Kept]()  # the modules as the forward pass has entered them
        self.known = set[int]()  # their ids, as a module's own hash may follow its state
        # A parameter that no gradient trains may be state, a teacher's weights or a codebook. It is copied if it is
        # small; of the others, the version is kept.
        self.values: list[tuple[nn.Parameter, torch.Tensor]] = []
        self.parameters, self.versions = list[nn.Parameter](), list[int]()
        # Whether the hook is on in recomputations too, where it does nothing: compiled code inside of the checkpoint
        # would be compiled again without it.
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
        moves = bool(self.known) or any(module.training for module, _ in found)  # what trains may move all of them
        for module, whole in found:
            self.enter(module, whole, moves)
            # The function may move a child that it names before it calls it.
            named = [child for name, child in module._modules.items() if name in names and child is not None]
            for child in [module, *named] if type(module) in _CONTAINERS else named:
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
            self.hears = _torch.has_compiled() and _torch.is_heard(_entered)
            _torch.hear_entering(_entered, -hears)
            _running.regions = outer
            self.values = [each for each in self.values if not each[0].requires_grad]  # by now, it may be trained
            self.changes = any(mark(_guards(module), by_value=False) != before for module, before in self.marks)
            del self.copier, self.entered, self.marks

    def enter(self, module: nn.Module, whole: bool = True, moves: bool = False) -> None:
        """Copy the state of a module, and of all below it: a parent may move a child's before it calls it."""
        if not whole and id(module) in self.known:
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
                own, trains = vars(each), moves or each.training  # its parent may put it into training mode later
                if whole:
                    if trains:
                        self.entered[id(each)] = each
                    below += [child for child in own["_modules"].values() if child is not None]
                is_new = trains and id(each) not in self.known
                if is_new:
                    self.known.add(id(each))
                    if _is_torchs(each):  # a quicker way: only its buffers can be written to
                        copied = {"_buffers": self.copier.copy(own["_buffers"])} if own["_buffers"] else {}
                        self.kept.append(_Kept(each, own.copy(), copied, {}, {}, own["_parameters"].copy()))
                        self._keep_versions(_parameters(each, own).values())
                        continue
                hooks = hooks_of(each)
                if is_new:
                    self.kept.append(_Kept(each, *keep(each, self.copier), hooks, {}, own["_parameters"].copy()))
                    self._keep_parameters(each)
                    if not reads_no_buffer(each):
                        self.marks.append((each, mark(_guards(each), by_value=False)))
                below += self.copier.modules + ([module for module, _ in modules_of(hooks)] if hooks else [])
                self.copier.modules = []

    def _keep_versions(self, parameters: Iterable[nn.Parameter | None]) -> None:
        known = [each for each in parameters if each is not None]
        self.parameters += known
        self.versions += map(version, known)

    def _keep_parameters(self, module: nn.Module) -> None:
        for each in _parameters(module, vars(module)).values():
            if each is None or not _is_plain(each):
                continue
            if each.requires_grad or each.layout is not torch.strided or each.nbytes > LARGE:
                self._keep_versions([each])
            else:
                value = self.copier.copy(each.detach())
                vars(value).update(vars(each))
                self.values.append((each, value))

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
            # These first, as lists may have them too.
            replaced = {id(each): copier.parameter(each, value) for each, value in self.values}
            _warn_of_writes(self.parameters, self.versions)
            copies = [{name: copier.copy(value) for name, value in each.copied.items()} for each in self.kept]
            guarded = self.parameters if self.changes and _torch.has_values() else []
            trained = {id(each): each for each in guarded if each.requires_grad}
            values = [(each, each.detach().clone()) for each in trained.values() if not is_odd(each)]
        present, buffers = list[_Kept](), dict[int, Any]()
        self.running.append(_Recomputation(present, values, [each.requires_grad for each in self.parameters], buffers))
        this_thread.begin_preserving(self)
        if self.hears:
            _torch.hear_entering(_entered, 1)
        for (module, everything, _, hooks, _, parameters), copied in zip(self.kept, copies, strict=True):
            own = vars(module)
            children, present_parameters = own["_modules"].copy(), own["_parameters"].copy()
            present.append(_Kept(module, own.copy(), {}, hooks_of(module), children, present_parameters))
            put(module, everything)
            own["_buffers"] = {}
            own.update(copied)
            buffers[id(module)] = own["_buffers"].copy()
            if "_initialize_hook" not in everything:  # which a lazy module removes in its first call
                put_hooks(module, hooks)
            if replaced:
                parameters = {name: replaced.get(id(each), each) for name, each in parameters.items()}
            _put_parameters(module, parameters)

    def __exit__(self, *error: Any) -> None:
        """Put back what they have now."""
        this_thread.end_preserving()
        present, values, trained, _ = self.running.pop()
        for parameter, requires_grad in zip(self.parameters, trained, strict=True):
            if parameter.requires_grad != requires_grad:  # an early stop came before it was set again
                parameter.requires_grad = requires_grad
        for module, everything, _, hooks, children, parameters in reversed(present):  # some may share what is on them
            put(module, everything)
            put_hooks(module, hooks)
            if self.detach:  # the recomputation's are not what the forward pass has
                _drop(module._parameters, parameters)
                _drop(module._modules, children)
                module._modules.update(children)
            for name, each in parameters.items():  # an early stop came before it was set again
                module._parameters.setdefault(name, each)
            _put_parameters(module, parameters)
        if self.hears:
            _torch.hear_entering(_entered, -1)
        with _torch.hidden_from_modes():
            _refuse_writes(values)


def _is_torchs(module: nn.Module) -> bool:
    """Tell whether a module's output reads no state of its own: it reads no buffer, and its parameters are trained."""
    if not reads_no_buffer(module):
        return False
    for each in module._parameters.values():
        if each is not None and not (each.requires_grad and _is_plain(each)):
            return not _parameters(module, vars(module))
    return True


def _parameters(module: Any, everything: dict[str, Any]) -> dict[str, nn.Parameter | None]:
    """Give the parameters among all that was on a module, but for a weight that an embedding renormalizes.

    To do so twice is to do so once.
    """
    renormalizes = type(module) in (nn.Embedding, nn.EmbeddingBag) and everything.get("max_norm") is not None
    return {} if renormalizes else everything["_parameters"]


def _warn_of_writes(parameters: list[nn.Parameter], versions: Sequence[int]) -> None:
    """Warn of parameters, which are not preserved, that have other versions than then."""
    if tuple(map(version, parameters)) == tuple(versions):
        return
    for parameter, then in zip(parameters, versions, strict=True):
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


def _put_parameters(module: nn.Module, parameters: dict[str, Any]) -> None:
    """Let a module have these parameters instead of others, where both are plain ones."""
    present = module._parameters
    for name, parameter in parameters.items():
        if present.get(name) is not parameter and _is_plain(parameter) and _is_plain(present.get(name)):
            present[name] = parameter


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
