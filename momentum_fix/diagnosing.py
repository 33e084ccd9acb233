"""Am I affected? One training step tells which state recomputation has moved, and whether outputs read it."""

from __future__ import annotations

import pickle
import random
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, is_dataclass
from fractions import Fraction
from functools import partial
from math import isclose
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.lazy import LazyModuleMixin

from momentum_fix.corrected import is_corrected, uncorrected
from momentum_fix.formula import corrected_momentum
from momentum_fix.layers import at_gradients, tracks
from momentum_fix.preserving import is_compiled
from momentum_fix.replay import replaying, unseen
from momentum_fix.state import FILLED, KINDS, SKELETON, WHOLE, Copier
from momentum_fix.tables import aligned, html

# A module's own state: what it has, a copy of that, and whether two values are the same.

_NUMBERS = (bool, int, float, complex, str, type(None))
_STATE = (*KINDS, *_NUMBERS)
_NOT_WATCHED = (torch.jit.ScriptModule, nn.parallel.DistributedDataParallel)
_ABSENT, _UNSET = object(), object()  # not there; a buffer of a lazy module before its first batch

State: TypeAlias = dict[str, Any]
States: TypeAlias = dict[nn.Module, State]


def own_state(module: nn.Module) -> State:
    """Give the buffers and the plain attributes that a module itself has."""
    own = vars(module)
    state: State = {name: value for name, value in own.items() if name not in SKELETON and isinstance(value, _STATE)}
    for name, value in own["_buffers"].items():
        state[name] = _UNSET if nn.parameter.is_lazy(value) else value
    for name, value in own["_parameters"].items():  # a teacher's, or a codebook
        if type(value) is nn.Parameter and not value.requires_grad:
            state[name] = value.detach()
    return state


def copied(value: Any) -> Any:
    """Copy tensors, and what holds them; parameters and other objects stand for themselves."""
    return Copier(share=False, detach=True).copy(value)


def same(one: Any, other: Any) -> bool:
    """Tell whether two values are equal, to the last bit; a NaN equals a NaN."""
    if one is other or type(one) is not type(other):
        return one is other
    if isinstance(one, torch.Tensor):
        if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
            return False
        if type(one) is not torch.Tensor or one.is_meta or one.layout is not torch.strided:  # nothing to compare
            return True
        return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(item, other[place]) for place, item in one.items())
    if isinstance(one, (tuple, *FILLED)):
        return len(one) == len(other) and all(map(same, one, other))
    if is_dataclass(one) or isinstance(one, torch.distributions.Distribution):  # what a module may give
        return same(vars(one), vars(other))
    if isinstance(one, torch.Generator):
        return torch.equal(one.get_state(), other.get_state())
    if isinstance(one, WHOLE):
        return pickle.dumps(one) == pickle.dumps(other)
    return isinstance(one, (set, frozenset, *_NUMBERS)) and bool(one == other or (one != one and other != other))


# What is found.

_HEADER = ("state", "class", "times", "read", "use", "note")
_VERDICTS = {  # by whether outputs read it
    True: "Gradients are wrong: outputs read state that has moved before the recomputation ({}).",
    None: "Gradients may be wrong: could not find out whether outputs read the state that moves ({}).",
    False: "Gradients are right, but recomputation moves state again ({}).",
}
_OVERCORRECTED = "Gradients are right, but a momentum is corrected for passes that this step did not make ({})."
_CLEAN = "Clean: recomputation leaves the state of this model as it should be."
_NO_REPLAY = "Nothing found, but no recomputation was seen: is checkpointing on, and did backward run inside the block?"


@dataclass(frozen=True)
class Finding:
    """One piece of state that a replay has moved, or has found moved and read."""

    module: str
    attribute: str
    module_class: str
    times: int | Fraction | None  # how often it moves for one batch; None where that is not known
    read: bool | None  # whether outputs are others for it; None where that could not be found out
    remedy: str  # what to use; "" where nothing has to be done
    note: str

    @property
    def name(self) -> str:
        """The name of module and attribute, as in a state dict."""
        return f"{self.module}.{self.attribute}".strip(".")

    def cells(self) -> tuple[str, ...]:
        """Give the row's text."""
        times, read = "?" if self.times is None else str(self.times), {True: "yes", False: "no", None: "?"}[self.read]
        return self.name, self.module_class, times, read, self.remedy or "nothing", self.note


class Diagnosis(dict[str, Finding]):
    """What `diagnose` found: a dict from the name of a piece of state to its `Finding`; `ok`; a verdict and a table."""

    verdict = "Nothing is known: the block has not ended."
    complete = False  # whether a backward pass was seen

    @property
    def ok(self) -> bool:
        """Whether everything could be seen, and nothing needs fixing."""
        return self.complete and not any(finding.remedy for finding in self.values())

    def __repr__(self) -> str:
        return f"<Diagnosis: {self.verdict}>"

    def __str__(self) -> str:
        return "\n\n".join([self.verdict, *([aligned(self._table())] if self else [])])

    def _repr_html_(self) -> str:
        return html(self._table(), self.verdict)

    def _table(self) -> list[tuple[str, ...]]:
        return [_HEADER, *(finding.cells() for finding in self.values())]


def diagnose(model: nn.Module) -> AbstractContextManager[Diagnosis]:
    """Tell which state of a model recomputation moves, whether that makes gradients wrong, and what to use.

    Put one ordinary training step inside the block, backward pass included. State is what a training-mode forward
    changes on a module: buffers, and plain attributes (tensors, numbers, strings, NumPy arrays, generators of random
    numbers; lists, tuples, dictionaries, sets and deques of them). The report names each piece that a replay (a forward
    that runs inside the backward pass) moved, and how often it moves per batch. The model and the results of the step
    are the same as without this, bit for bit, including random numbers.

    To find out whether outputs read a piece of state, `diagnose` tries it. Wherever a replay starts from different
    state than its forward pass did, it runs the module again with each of the two states, on copies of state,
    parameters and inputs, and compares the outputs. "yes" is certain. "no" is certain for this step only: state that
    is read only now and then, or that a fresh model sets up in its first step, needs several steps in the block. Only
    the outputs of modules are compared: what a checkpointed function itself reads from a module is not seen.

    If outputs read the state, use `preserve_state`. If they do not, gradients are right: `update_once` or `calibrate`
    makes the running statistics of norm layers right, and `preserve_state` works for any state. A momentum that is
    corrected for exactly this number of passes needs nothing.

    Not for: compiled code and TorchScript (the report says that it could not look inside); state inside objects other
    than those above; modules that are neither in the model nor in a list on it. Modules run again with all their
    hooks, so what a forward or a hook changes elsewhere (a file, a list) changes more often in the block. What you
    change between forward and backward is attributed to a replay. On several ranks nothing runs again. Do not put
    `calibrate` around the same step, and copy the model before or after the block.

    Args:
        model: any module; all modules below it are watched.

    Returns:
        A context manager that gives a `Diagnosis`, which is filled when the block ends. Its `ok` is True if nothing
        needs fixing and nothing was hidden; without a backward pass in the block it is False.

    Raises:
        TypeError: model is not a module, or is TorchScript.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> with diagnose(model) as report:
        ...     checkpoint(model, torch.rand(8, 3), use_reentrant=False).sum().backward()
        >>> print(report)
        Gradients are right, but recomputation moves state again (3 pieces).
        <BLANKLINE>
        state                  class        times  read  use          note
        1.running_mean         BatchNorm1d  2      no    update_once
        1.running_var          BatchNorm1d  2      no    update_once
        1.num_batches_tracked  BatchNorm1d  2      no    update_once
        >>> report.ok
        False

    Source: the question of pytorch/pytorch#96136 (2023): which modules does checkpointing break?
    """
    return _diagnosing(model)


@contextmanager
def _diagnosing(model: nn.Module) -> Iterator[Diagnosis]:
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model is of type {type(model).__name__}, but must be an nn.Module, and not TorchScript")
    watch, report, hooks = _Watch(model), Diagnosis(), []
    try:
        for module in watch.names:
            first = not isinstance(module, LazyModuleMixin)  # a hook of its own gives it its parameters and buffers
            hooks.append(module.register_forward_pre_hook(watch.enter, with_kwargs=True, prepend=first))
            hooks.append(module.register_forward_hook(watch.leave, always_call=True))
        hooks += at_gradients(model, watch.in_backward)
        yield report
    finally:
        for hook in hooks:
            hook.remove()
    watch.look(watch.names)
    report.update({finding.name: finding for finding in watch.findings(model)})
    harmful = [finding.read for finding in report.values() if finding.remedy]
    moved_again = any(finding.times != 1 for finding in report.values() if finding.remedy)
    report.complete = watch.backward or bool(watch.replayed)
    report.verdict = _CLEAN if watch.replayed else _NO_REPLAY
    for read in (False, None, True):
        if count := harmful.count(read):
            verdict = _VERDICTS[read] if moved_again or read is not False else _OVERCORRECTED
            report.verdict = verdict.format(f"{count} piece{'s' * (count > 1)}")


# How it is found.


@dataclass
class _Moves:
    """How often one piece of state has moved, and whether outputs read it, or why that is not known."""

    passes: int = 0
    replays: int = 0
    between: int = 0  # two calls, where nobody knows what it was
    read: set[bool | str] = field(default_factory=set)
    before: list[Any] = field(default_factory=list)  # each value that it has had in this backward pass, before it moved

    @property
    def times(self) -> Fraction:
        """How often it moves for one batch."""
        return 1 + Fraction(self.replays, self.passes or self.between or 1)


class _Watch:
    """Looks at the state of modules whenever one of them is entered or left."""

    def __init__(self, model: nn.Module) -> None:
        self.names = _parts(model)
        self.below = {module: [part for part in _parts(module) if part in self.names] for module in self.names}
        self.last = {module: copied(own_state(module)) for module in self.names}  # replaced when it moves
        self.moves: dict[nn.Module, dict[str, _Moves]] = defaultdict(lambda: defaultdict(_Moves))
        self.starts: dict[nn.Module, list[States]] = defaultdict(list)  # of the calls in forward passes
        self.running: list[tuple[nn.Module, tuple[Any, ...]]] = []  # with what `try_out` needs
        self.pending: list[tuple[nn.Module, str]] = []  # what has moved in this backward pass
        self.called, self.replayed = set[nn.Module](), set[nn.Module]()
        self.backward = self.unchecked = self.trying = False

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.trying or torch.compiler.is_compiling() or module not in self.names:  # a copy of a module has the hook
            return
        with unseen():
            self.look(self.below[module] if self.running or (self.unchecked and replaying()) else self.names)
            start: States = {part: self.last[part] for part in self.below[module]}
            trial: tuple[Any, ...] = ()
            if not replaying():
                self.starts[module].append(start)
            elif self.starts[module]:
                # Of several forward passes, it is taken for a replay of one that began with the most equal state.
                origin = min(self.starts[module], key=lambda origin: len(_differing(origin, start)))
                trial = (origin, start, copied((args, kwargs))) if _differing(origin, start) else ()
                self.replayed.update(start)
            self.called.add(module)
            self.running.append((module, trial))

    def leave(self, module: nn.Module, *_: Any) -> None:
        if self.trying or torch.compiler.is_compiling() or module not in dict(self.running):
            return
        with unseen():
            self.look(self.below[module])
            trial, self.unchecked = dict(self.running)[module], True
            while self.running.pop()[0] is not module:
                pass
            if trial:
                self.try_out(module, *trial)

    def in_backward(self, _: torch.Tensor) -> None:
        """See what a replay has moved after its last call."""
        self.backward = True
        if self.unchecked and not torch.compiler.is_compiling():
            self.unchecked = False
            with unseen():
                self.look(self.names)

    def __deepcopy__(self, _: Any) -> _Watch:
        """Let the hooks on a copy of the model, which nobody takes off, find modules that are not watched."""
        return self

    def look(self, modules: Iterable[nn.Module]) -> None:
        """Find what has moved since the last look."""
        replay = replaying()
        for module in modules:
            known, now = self.last[module], own_state(module)
            moved = [name for name, value in now.items() if known.get(name, _ABSENT) is not value]
            moved = [name for name in moved if not same(known.get(name, _ABSENT), now[name])]
            moved += known.keys() - now.keys()
            if moved:
                self.last[module] = {name: copied(now[name]) if name in moved else known[name] for name in now}
            for name in moved if all(value is not _UNSET for value in known.values()) else ():
                moves = self.moves[module][name]
                if replay:
                    moves.before.append(known.get(name, _ABSENT))
                    self.pending.append((module, name))
                elif self.running:
                    moves.passes += 1
                elif not moves.before:
                    moves.between += 1
        if not replay:
            for module, name in self.pending:
                moves = self.moves[module][name]
                if moves.before and not same(moves.before[0], self.last[module].get(name, _ABSENT)):
                    moves.replays += len(moves.before)  # otherwise something has put it back
                moves.before.clear()
            self.pending.clear()

    def try_out(self, module: nn.Module, origin: States, start: States, inputs: Any) -> None:
        """Find what outputs read: run the module with the state of its replay, and with that of its forward pass."""
        keys = [(part, name) for part, name in _differing(origin, start) if True not in self.moves[part][name].read]

        def outputs(keys: Iterable[tuple[nn.Module, str]] = ()) -> Any:
            changed = {part: dict(state) for part, state in start.items()}
            for part, name in keys:
                changed[part][name] = origin[part].get(name, _ABSENT)
            return _outputs(module, changed, inputs)

        def reading(keys: list[tuple[nn.Module, str]]) -> list[tuple[nn.Module, str]]:
            if not keys or same(outputs(keys), unchanged):
                return []
            half = len(keys) // 2
            return keys if half == 0 else reading(keys[:half]) + reading(keys[half:]) or keys

        found, why = [], ""
        self.trying = True
        try:
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                why = "not tried on several ranks: run the step in one process"
            elif keys and same(unchanged := outputs(), outputs()):
                found = reading(keys)
            else:
                why = "the output varies on its own"
        except Exception as error:
            why = f"the module does not run again ({type(error).__name__}: {error})"
        finally:
            self.trying = False
            for part in start:  # what was written to from elsewhere than the module
                for name, value in own_state(part).items():
                    if isinstance(value, torch.Tensor) and not same(self.last[part][name], value):
                        value.data.copy_(self.last[part][name])
        for part, name in keys:
            self.moves[part][name].read.add((part, name) in found or why)

    def findings(self, model: nn.Module) -> Iterator[Finding]:
        """Give what is to be said of each piece of state that replays have moved, or found moved and read."""
        for name, part in model.named_modules():
            if isinstance(part, torch.jit.ScriptModule) and part.training:
                yield Finding(name, "", type(part).__name__, None, None, "a step without TorchScript", "not looked at")
        compiled = any(map(is_compiled, self.names))
        for module, name in self.names.items():
            row = partial(Finding, name, module_class=type(module).__name__)
            known: dict[str, tuple[_Moves, bool | None, str]] = {}
            corrected = (self.backward or self.replayed) and tracks(module) and is_corrected(module)
            for attribute, moves in self.moves[module].items():
                note = "; ".join(sorted(map(str, filter(None, moves.read - {True}))))
                unknown = note or (moves.replays and module not in self.replayed)
                read = True in moves.read or (None if unknown else False)
                if moves.replays or read or note or (corrected and moves.passes):
                    known[attribute] = moves, read, note
                elif module not in self.called and (compiled or moves.between):
                    yield row(
                        attribute, times=None, read=None, remedy="a step without torch.compile", note="moved unseen"
                    )
            unread = all(read is False for _, read, _ in known.values())
            most = max(
                (moves.times for moves, *_ in known.values()), default=Fraction(1)
            )  # a first batch may move less
            for attribute, (moves, read, note) in known.items():
                times: int | Fraction | None = int(moves.times) if moves.times.denominator == 1 else moves.times
                remedy = "preserve_state"
                if moves.replays and not (moves.passes or moves.between):
                    times, remedy, note = None, remedy if read is None else "", "moved in recomputations only"
                elif unread and attribute in module._buffers and tracks(module):
                    remedy, note = _of_norms(module, most)
                elif read is None:
                    note = note or "did not move in a call of its module, so not tried"
                yield row(attribute, times=times, read=read, remedy=remedy, note=note)


def _parts(model: nn.Module) -> dict[nn.Module, str]:
    """Name the modules of a model, and those in its lists, which are not registered.

    Not TorchScript; nor DDP, which has but lists of what others have, and sends buffers around before each forward.
    """
    names = {part: name for name, part in model.named_modules() if not isinstance(part, _NOT_WATCHED)}
    waiting = list(names)
    for part in waiting:
        for attribute, value in vars(part).items():
            for place, each in enumerate(value if isinstance(value, (list, tuple)) else ()):
                if isinstance(each, nn.Module) and each not in names:
                    names[each] = f"{names[part]}.{attribute}[{place}]".strip(".")
                    waiting.append(each)
    return names


def _of_norms(layer: Any, times: Fraction) -> tuple[str, str]:
    """Say what to use for statistics that outputs do not read, and what there is to note."""
    plain = uncorrected(layer)
    right = plain is None if plain is layer.momentum else isclose(corrected_momentum(plain, int(times)), layer.momentum)
    if right and times == int(times):
        return "", "its momentum makes up for it"
    if times == 1:
        return "restore", "its momentum is corrected, but it moves once"
    return "update_once", "" if plain is layer.momentum else "its momentum is corrected for another number of passes"


def _differing(origin: States, start: States) -> list[tuple[nn.Module, str]]:
    return [
        (part, name)
        for part, state in start.items()
        if origin[part] is not state
        for name in {**origin[part], **state}
        if origin[part].get(name) is not _UNSET and not same(origin[part].get(name, _ABSENT), state.get(name, _ABSENT))
    ]


def _outputs(module: nn.Module, states: States, inputs: Any) -> Any:
    """Run a module on copies of state, parameters and inputs; give copies of what comes out, and put all back."""
    before, put_back = {part: vars(part).copy() for part in states}, _random_numbers()
    children = {part: part._modules.copy() for part in states}  # a first call may register some
    try:
        for part, state in states.items():
            own = vars(part)
            values = {name: copied(value) for name, value in state.items() if value is not _ABSENT}
            for name in own_state(part).keys() & own.keys():
                del own[name]
            own["_buffers"] = {name: values.pop(name) for name in own["_buffers"] if name in values}
            own["_parameters"] = {
                name: nn.Parameter(values.pop(name), requires_grad=False) if name in values else _twin(value)
                for name, value in own["_parameters"].items()
            }
            own.update(values)
        with saved_tensors_hooks(lambda saved: saved, lambda saved: saved), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args, kwargs = copied(inputs)
            output = module(*args, **kwargs)
        left = [value for part in states for value in own_state(part).values() if isinstance(value, torch.Tensor)]
        return copied((output, [value for value in left if value.requires_grad]))
    finally:
        put_back()
        for part, own in before.items():
            vars(part).clear()
            vars(part).update(own)
            part._modules.clear()
            part._modules.update(children[part])


def _twin(parameter: Any) -> Any:
    plain = type(parameter) is nn.Parameter
    return nn.Parameter(parameter.detach().clone(), parameter.requires_grad) if plain else parameter


def _random_numbers() -> Callable[[], None]:
    """Remember where each stream of random numbers is, and give what sets them back to that."""
    streams: list[tuple[Any, Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (random.setstate, random.getstate()),
    ]
    if torch.accelerator.is_available():
        device = torch.get_device_module()
        kind = "rng_state_all" if hasattr(device, "get_rng_state_all") else "rng_state"
        streams.append((getattr(device, f"set_{kind}"), getattr(device, f"get_{kind}")()))
    if "numpy" in sys.modules:
        numbers = sys.modules["numpy"].random
        streams.append((numbers.set_state, numbers.get_state()))

    def set_back() -> None:
        for put, state in streams:
            put(state)

    return set_back
