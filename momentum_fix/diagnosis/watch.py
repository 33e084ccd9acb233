"""Watch a training step: what each recomputation gives autograd beside its forward pass, and what state it moves."""

from __future__ import annotations

import functools
import itertools
import math
import random
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import nn

from momentum_fix import _torch
from momentum_fix._torch import is_compiled
from momentum_fix.diagnosis.tracing import Tracing, Value, compared, tensors_in, value_of
from momentum_fix.norms.layers import in_plain_lists, is_unread_statistic, join_names
from momentum_fix.recomputation import is_recomputation, this_thread
from momentum_fix.state.compare import mark
from momentum_fix.state.fingerprint import difference, fingerprint, rounding
from momentum_fix.state.reachable import modules_of
from momentum_fix.state.snapshot import hooks_of, pieces, runs_torchs_code

_UNWATCHED = (torch.jit.ScriptModule, nn.parallel.DistributedDataParallel)  # DDP only refers to what others have
ITSELF = "the function itself"
_SOMEWHERE = "the backward pass"
_NOTHING, _FOREIGN = object(), object()  # instead of the mark of what is not there, and of what is not compared

Marks: TypeAlias = dict[str, Any]  # of the state of a module, by the name of the piece
Piece: TypeAlias = tuple[int, str]  # the id of a module, and the name of a piece of its state


class Part(NamedTuple):
    """A module of the model, or one outside of it that a checkpoint runs."""

    module: Any
    name: str
    in_a_list: bool  # or in a dict or an object, so that it is not registered

    def piece(self, name: str) -> str:
        """Give the name of a piece of its state, as in a state dict."""
        return f"{self.name}.{name}".strip(".")


class Moved:
    """How often recomputations have moved a piece of state."""

    def __init__(self, name: str, is_read: bool) -> None:
        self.name, self.is_read = name, is_read  # whether outputs in training mode may depend on it
        self.times = 0
        self.by_calls = False  # whether calls of its module have
        self.regions: list[Region | None] = []  # None: by another engine than torch's checkpoint

    def for_one_batch(self, passes: int) -> int | Fraction:
        """Give how often it moves for one batch, if calls of its module in forward passes have moved it so often."""
        calls = len({id(region) for region in self.regions if region}) + self.regions.count(None)
        times = 1 + Fraction(self.times, passes or calls or 1)
        return int(times) if times.denominator == 1 else times


class _Running(threading.local):
    """What is running in this thread."""

    def __init__(self) -> None:
        self.modules: list[tuple[nn.Module, Marks]] = []  # with the state that they were entered with
        self.regions: list[Region] = []
        self.recomputing: list[Counter[Piece]] = []  # how often calls of modules have moved what, in each recomputation
        # What is inside of a recomputation by another engine, and the state before it.
        self.before: tuple[dict[int, Part], dict[int, Marks]] | None = None
        self.added = 0  # how often a backward pass has added to a gradient of the model


class Watch:
    """Sees each call of torch's checkpoint, and each call of a module."""

    def __init__(self, model: nn.Module) -> None:
        self.parts = parts_of(model)
        self.strangers: dict[int, Part] = {}  # modules outside of the model
        self.regions: list[Region] = []  # the calls of torch's checkpoint that were recomputed
        self.latest: Region | None = None  # the last one of them
        self.passes = Counter[Piece]()  # how often calls of its module have moved a piece of state in forward passes
        self.lost: list[Region] = []  # the calls that pass no gradient on to their parameters
        self.moved: dict[Piece, Moved] = {}
        self.found: dict[str, None] = {}  # what a recomputation had moved before a forward pass that may read it
        self.reread: dict[str, None] = {}  # what of that a backward pass came after
        self.ran: list[bool] = []  # of each call of a module: whether that is in training mode
        self.elsewhere: dict[str, None] = {}  # what has run in a backward pass, but not in a checkpoint that was seen
        self.backward = self.compiles = False  # whether a backward pass was seen, and a checkpoint being compiled
        self.running = _Running()
        self.own_backward = ""  # in which backward pass code of a user's runs, for a hook or an autograd.Function
        if any(_torch.has_backward_hooks(part.module) for part in self.parts.values()):
            self.hear_own_backward()

    def begin(self, call: _torch.Call) -> Region | None:
        """Begin a call of torch's checkpoint."""
        self.compiles |= call.in_compilation
        return None if call.in_compilation else Region(self, call)

    def in_backward(self, _: torch.Tensor) -> None:
        """Hear that a backward pass has reached a parameter."""
        self.backward = True
        self.reread |= self.found

    def accumulated(self, _: torch.Tensor) -> None:
        """Hear that a backward pass has added to the gradient of a parameter."""
        self.running.added += 1

    def hear_hook(self, tensor: torch.Tensor) -> None:
        """Hear that a hook is put on a tensor."""
        self.hear_own_backward()
        for region in self.running.regions:
            region.hear_hook(tensor)

    def hear_function(self) -> None:
        """Hear that an autograd.Function of a user's is applied."""
        self.hear_own_backward()
        for region in self.running.regions:
            region.trace.hides = True  # of the reentrant engine, whose forward pass has no graph for it to be in

    def hear_own_backward(self) -> None:
        """Hear that code of a user's will run in the backward pass."""
        if self.own_backward in ("", _SOMEWHERE):
            inside = next((f" of {region.function}" for region in self.running.regions), "")
            self.own_backward = f"{_SOMEWHERE}{inside}"

    def enter(self, module: nn.Module, _: Any) -> None:
        """Hear that a module is called."""
        running, is_part = self.running, id(module) in self.parts
        with _torch.hidden_from_modes():
            for region in running.regions:
                region.first_module()
                if region.gets_no_gradient:
                    region.trains |= any(each.requires_grad for each in module.parameters(recurse=False))
                if not isinstance(module, _UNWATCHED):  # it may have been found where nobody looks, as in a dictionary
                    region.parts.setdefault(
                        id(module), self.parts.get(id(module), Part(module, self.name(module), True))
                    )
            if torch.is_grad_enabled() and (_torch.has_backward_hooks(module) or _torch.has_saved_hooks()):
                self.hear_own_backward()
            if not is_recomputation():
                self.begins(module)
            elif is_part and not running.recomputing:
                self.elsewhere[self.name(module)] = None
                inside = self.parts_inside(module)
                running.before, running.recomputing = (inside, self.look(inside)), [Counter()]
            self.ran.append(module.training)
            running.modules.append((module, _own_marks(module) if is_part else {}))

    def leave(self, module: nn.Module) -> None:
        """Hear that a module is left."""
        running = self.running
        if not any(each is module for each, _ in running.modules):
            return
        with _torch.hidden_from_modes():
            while (last := running.modules.pop())[0] is not module:  # those that an exception has left
                pass
            if id(module) in self.parts:
                moved = [(id(module), name) for name in differing(last[1], _own_marks(module))]
                (running.recomputing[-1] if running.recomputing else self.passes).update(moved)
            if running.before is not None and not running.modules:
                (inside, before), running.before = running.before, None
                self.count(before, self.look(inside), running.recomputing.pop(), None)

    def begins(self, module: nn.Module) -> None:
        """Hear that a forward pass begins, which may read what recomputations have moved before.

        Statistics are read by their own module, in evaluation mode; of others, nobody knows who reads them. Where a
        module of torch's own calls another, each reads its own alone; anywhere else, there is code of a user's.
        """
        calls = self.running.modules
        reads_its_own_alone = bool(calls) and runs_torchs_code(calls[-1][0]) and runs_torchs_code(module)
        for (key, _), each in self.moved.items():
            is_own = key == id(module)
            if (each.is_read and (is_own or not reads_its_own_alone)) or (is_own and not module.training):
                self.found[each.name] = None

    def look(self, inside: dict[int, Part]) -> dict[int, Marks]:
        """Give the state of the model: of the parts that are inside a checkpoint, tensors by value."""
        return {key: _marks(part.module, key in inside) for key, part in (self.parts | inside).items()}

    def count(
        self, before: dict[int, Marks], after: dict[int, Marks], by_calls: Counter[Piece], region: Region | None
    ) -> None:
        """Count what a recomputation has moved: as often as calls of the module did, or else once."""
        parts = self.parts | (region.parts if region else {})
        for key, marks in after.items():
            for name in differing(before.get(key, marks), marks):
                if (key, name) not in self.moved:
                    part = parts[key]
                    is_read = not is_unread_statistic(part.module, name)
                    self.moved[key, name] = Moved(part.piece(name), is_read)
                moved = self.moved[key, name]
                moved.times += by_calls.get((key, name), 1)
                moved.by_calls |= (key, name) in by_calls
                moved.regions.append(region)

    def name(self, module: nn.Module) -> str:
        """Give a module's name in the model, or that of its class."""
        part = self.parts.get(id(module)) or self.strangers.get(id(module))
        return type(module).__name__ if part is None else part.name or "(the model)"

    def all_parts(self) -> dict[int, Part]:
        """Give the parts of the model, and what checkpoints run besides."""
        return self.parts | {key: part for region in self.regions for key, part in region.parts.items()}

    def parts_inside(self, module: nn.Module) -> dict[int, Part]:
        """Give a module that is checkpointed, and all below it; one outside of the model is named after its class."""
        if id(module) not in self.parts and id(module) not in self.strangers:
            taken = {part.name for part in self.strangers.values()}
            names = itertools.chain(
                [type(module).__name__], (f"{type(module).__name__} {n}" for n in itertools.count(2))
            )
            self.strangers |= parts_of(module, next(name for name in names if name not in taken))
        known = self.strangers | self.parts
        return {key: known.get(key, part) for key, part in parts_of(module).items()}


class Recomputation:
    """A recomputation: what it gave beside what the forward pass gave, and the state that it found."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Value, Value | None]] = []  # None: other code ran
        self.moved_before: list[Piece] = []  # what was another state than when the forward pass began
        self.found_moved: list[Piece] = []  # or than its first module has found; in the end, both, if not preserved
        self.found_read = False  # whether outputs may depend on that
        self.preserved = False  # whether preserve_state had put state back
        self.adds_gradients = False  # whether a backward pass has run in it
        self.hides = False  # whether something ran that nobody sees: torch.func, or an autograd.Function of a user's
        self.hooks_again = False  # whether it has put a hook on a tensor that the forward pass has put one on
        self.given = set[Any]()  # the nodes of what it is given


class Region(_torch.Listener):
    """A call of torch's checkpoint."""

    def __init__(self, watch: Watch, call: _torch.Call) -> None:
        own = getattr(call.function, "__dict__", {})
        function = own.get("preserves_state", call.function)  # what momentum_fix.checkpoint was given
        self.watch, self.function, self.reentrant = watch, _described(function, watch), call.reentrant
        self.keeps_random_numbers, self.by_library = call.keeps_random_numbers, _torch.is_called_by_library()
        # The reentrant engine recomputes only if a tensor that it is given requires gradients.
        inputs = [each for each in call.args if isinstance(each, torch.Tensor)]
        self.gets_no_gradient = call.reentrant and call.gradients and not any(each.requires_grad for each in inputs)
        self.trains = False  # whether there is something to train in it, of one that gets no gradient
        self.parts: dict[int, Part] = {}
        for module, _ in modules_of((function, call.args, call.kwargs)):
            self.parts |= watch.parts_inside(module)
        self.by_hooks = set[int]()  # the ids of those that only hooks know, which may move them
        for part in [*self.parts.values()]:
            for module, _ in modules_of(hooks_of(part.module)):
                if id(module) not in self.parts:
                    self.parts[id(module)] = watch.parts.get(id(module), Part(module, watch.name(module), True))
                    self.by_hooks.add(id(module))
        self.is_compiled = any(is_compiled(part.module) for part in self.parts.values()) or is_compiled(function)
        self.begun_with: dict[int, Marks] = {}  # the state as the forward pass has begun with it
        self.state: dict[int, Marks] = {}  # as the first module of the forward pass has found it
        self.drew: set[str] = set()  # whose random numbers the forward pass has drawn
        self.recomputations: list[Recomputation] = []
        self.trace = self.forward_trace = Tracing(self.where)  # of the reentrant engine
        self.untouched = False  # no module has run yet in the pass that is running
        self.same: list[int] = []  # for each tensor that the function is given, which one is the same
        self.unfilled: list[Any] = []  # saved tensors whose values come later, and what is kept of each
        self.seeds = set[int]()  # the ids of saved values that are seeds
        self.seed: Value | None = None  # the value that was saved last, if it may be one

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Remember what state and random numbers the forward pass starts from."""
        before = _random_numbers()
        with self._running():
            yield
        if self.gets_no_gradient:
            seen = any(each.requires_grad for op in self.trace.operations for each in op.origins)
            if self.trains or seen or self.trace.hides or self.is_compiled:
                self.watch.lost.append(self)
        for value, tensor in self.unfilled:
            value.numbers.copy_(fingerprint(tensor))
        self.unfilled.clear()
        self.drew = {name for name, state in _random_numbers().items() if state != before[name]}

    @contextmanager
    def recomputation(self) -> Iterator[None]:
        """Compare the state before and after, and with that of the forward pass."""
        watch, running = self.watch, self.watch.running
        if not self.recomputations:
            watch.regions.append(self)
        watch.reread |= watch.found
        self.recomputations.append(Recomputation())
        watch.latest = self
        begun, added = this_thread.begun, running.added
        with _torch.hidden_from_modes():
            inside = self.parts.copy()  # more are found when they are called
            before, gradients = watch.look(inside), self._gradients()
        running.recomputing.append(Counter())
        try:
            with self._running():
                yield
        finally:
            self._judge_state(self.recomputations[-1], this_thread.begun > begun)
            self.recomputations[-1].given.clear()
            now = self._gradients()
            adds = running.added > added or any(now.get(key, each) != each for key, each in gradients.items())
            self.recomputations[-1].adds_gradients = adds
            with _torch.hidden_from_modes():
                watch.count(before, watch.look(inside), running.recomputing.pop(), self)

    @contextmanager
    def _running(self) -> Iterator[None]:
        running = self.watch.running
        self.depth = len(running.modules)
        self.untouched = True
        if self.recomputations:
            self.recomputations[-1].moved_before = self._moved_since(self.begun_with)
        else:
            self.begun_with = self.state = self._look()
        outer = [each.trace for each in running.regions if self.reentrant and not self.recomputations]
        running.regions.append(self)
        for trace in outer:
            trace.inside += 1
        try:
            self.trace = Tracing(self.where)
            with self.trace if self.reentrant and not self.is_compiled else nullcontext():
                yield
        finally:
            for trace in outer:
                trace.inside -= 1
            running.regions.remove(self)

    def _gradients(self) -> dict[int, Any]:
        """Give, by parameter, what is another once a backward pass has added to its gradient."""
        parameters = [each for part in self.parts.values() for each in part.module._parameters.values()]
        gradients = {id(each): each.grad for each in parameters if each is not None}
        return {key: each if each is None else (id(each), _torch.version(each)) for key, each in gradients.items()}

    def first_module(self) -> None:
        """Look again when the first module is called: now contexts have put state back, and the function has begun."""
        if self.untouched:
            self.untouched = False
            if self.recomputations:
                self.recomputations[-1].found_moved = self._moved_since(self.state)
            else:
                self.state = self._look()

    def _look(self) -> dict[int, Marks]:
        """Look at the state that it may read now."""
        if not is_recomputation():
            for part in self.parts.values():
                self.watch.begins(part.module)
        with _torch.hidden_from_modes():
            return {key: _marks(part.module, True) for key, part in self.parts.items()}

    def _moved_since(self, then: dict[int, Marks]) -> list[Piece]:
        """Give what is another state than then."""
        state = self._look()
        return [(key, name) for key, marks in state.items() for name in differing(then.get(key, marks), marks)]

    def _judge_state(self, last: Recomputation, preserved: bool) -> None:
        """Say what a recomputation has found moved, and whether outputs may depend on that."""
        last.preserved = preserved
        if not preserved:
            last.found_moved = [*dict.fromkeys(last.moved_before + last.found_moved)]
        found = [(self.parts[key].module, name) for key, name in last.found_moved if key not in self.by_hooks]
        # A tensor in a plain attribute is what the forward pass keeps of itself, more often than not.
        last.found_read = any(
            not (is_unread_statistic(module, name) or isinstance(vars(module).get(name), torch.Tensor))
            for module, name in found
        )

    def where(self) -> str:
        """Name the module of this checkpoint that is running."""
        inside = self.watch.running.modules[self.depth :]
        return self.watch.name(inside[-1][0]) if inside else ITSELF

    def saved(self, tensor: torch.Tensor) -> Value:
        """Keep what is needed to compare a saved tensor."""
        role = _torch.role_of_saved(tensor)
        matters: bool | None = role != "unread"
        if matters and self.is_compiled and self._is_statistic(tensor):
            matters = None
        value = value_of(tensor, self.where(), matters)
        if role == "unfilled":
            self.unfilled.append((value, tensor))
        # Attention on a GPU saves a seed and an offset, in memory that is not filled where nothing is dropped. What
        # they do shows in its output, which is saved too.
        if _torch.may_be_seed(tensor) and not self.recomputations:
            self.seeds |= {id(value), id(self.seed)} if self.seed or tensor.dtype == torch.uint64 else set()
            self.seed = value
        else:
            self.seed = None
        return value

    def _is_statistic(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor that compiled code saves is a running statistic, which it may save and not read."""
        kind = tensor.shape, tensor.dtype, tensor.device
        alike = [
            buffer
            for part in self.parts.values()
            for name, buffer in part.module._buffers.items()
            if buffer is not None
            and (buffer.shape, buffer.dtype, buffer.device) == kind
            and is_unread_statistic(part.module, name)
        ]
        with _torch.hidden_from_modes():
            return any(torch.equal(each, tensor) for each in alike)

    def compare(self, forward: Value, recomputed: Value) -> None:
        """Keep two saved tensors that belong together."""
        if forward.matters is not False and id(forward) not in self.seeds:
            self.recomputations[-1].pairs.append((forward, recomputed))

    def hear_hook(self, tensor: torch.Tensor) -> None:
        """Hear that the function puts a hook on a tensor. On one from outside, each recomputation puts another one."""
        self.trace.hides = True
        if self.recomputations:
            last = self.recomputations[-1]
            last.hooks_again |= tensor.grad_fn in last.given or _torch.is_older(tensor, self.trace.nodes)

    def reused(self) -> None:
        """Hear that the graph of a recomputation gives gradients, as something that was kept of it is in a loss."""
        if self not in self.watch.running.regions:
            self.recomputations[-1].hides = True

    def given(self, args: tuple[Any, ...]) -> None:
        """Note what the function is given."""
        if self.recomputations:
            self.recomputations[-1].given = {each.grad_fn for each in tensors_in(args)}
        if self.reentrant:
            self.same = self.trace.given(args, self.same)

    def returned(self, output: Any) -> None:
        """Compare the operations that led to a result; where compiled code hides them, compare the result."""
        computed = {id(each) for part in self.parts.values() for each in _computed_weights(part.module)}
        self.trace.returned(output, computed, is_all=self.is_compiled)
        if self.recomputations:
            last = self.recomputations[-1]
            last.hides = self.forward_trace.hides or self.trace.hides
            last.hides |= any(name in ("_backward_hooks", "_backward_pre_hooks") for _, name in last.found_moved)
            last.hides |= "torch" in self.drew and not self.keeps_random_numbers
            last.pairs = [] if self.trace.wraps else [*compared(self.forward_trace, self.trace)]
            if len(set(self.same)) < len(self.same):  # recomputations are given more tensors, so other code may run
                last.pairs = [(then, now or then._replace(numbers=None)) for then, now in last.pairs]
            self.trace.operations = []
        else:
            self.forward_trace = self.trace


class Judgement(NamedTuple):
    """What a recomputation gave, beside the forward pass."""

    recomputation: Recomputation
    starts_in: str  # the module whose values are the first to differ by more than rounding; "" if there is none
    size: float  # of that difference, or of the largest that is rounding, relative to the values
    is_known: bool  # whether all values could be compared


def judge(regions: Iterable[Region]) -> list[tuple[Region, Judgement]]:
    """Compare what was kept: now, as numbers on a device are fetched faster all at once."""
    recomputed = [(region, each) for region in regions for each in region.recomputations]
    values = [value for _, each in recomputed for pair in each.pairs for value in pair if value is not None]
    numbers = _numbers([value.numbers for value in values if value.numbers is not None])
    return [(region, _judge(each, numbers)) for region, each in recomputed]


def _judge(recomputation: Recomputation, numbers: dict[int, list[float]]) -> Judgement:
    if recomputation.adds_gradients:
        return Judgement(recomputation, ITSELF, 1.0, True)
    tolerance = largest = 0.0
    known = bool(recomputation.pairs) and not (recomputation.hides or recomputation.hooks_again)
    for forward, recomputed in recomputation.pairs:
        if recomputed is None or (recomputed.dtype, recomputed.shape) != (forward.dtype, forward.shape):
            return Judgement(recomputation, forward.where, math.inf, True)
        if forward.numbers is None or recomputed.numbers is None:
            known = False
            continue
        size = difference(numbers[id(forward.numbers)], numbers[id(recomputed.numbers)])
        if size is None:
            continue
        tolerance = max(tolerance, rounding(forward.dtype))  # what is computed from rounded numbers is rounded too
        if recomputed.matters is None:
            known = False
        elif size > tolerance or not rounding(forward.dtype):
            return Judgement(recomputation, forward.where, size, True)
        largest = max(largest, size)
    return Judgement(recomputation, "", largest, known and not (largest and recomputation.found_read))


def _numbers(tensors: list[torch.Tensor]) -> dict[int, list[float]]:
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for each in tensors:
        by_device.setdefault(each.device, []).append(each)
    return {
        id(each): row
        for there in by_device.values()
        for each, row in zip(there, torch.stack(there).tolist(), strict=True)
    }


def _computed_weights(module: nn.Module) -> Iterator[Any]:
    """Give what the hooks of torch.nn.utils.weight_norm and spectral_norm compute for a module, and keep on it."""
    for name in module._parameters:
        stem, _, kind = name.rpartition("_")
        if kind in ("g", "orig"):
            yield vars(module).get(stem)


def differing(one: Marks, other: Marks) -> list[str]:
    """Give the names of the pieces that are not equal, or that only one has."""
    if one == other:
        return []
    names = [name for name in {**one, **other} if one.get(name, _NOTHING) != other.get(name, _NOTHING)]
    return [name for name in names if _FOREIGN not in (one.get(name), other.get(name))]


def _marks(module: nn.Module, by_value: bool) -> Marks:
    return {
        name: _FOREIGN if isinstance(value, torch.Tensor) and _comes_and_goes(value) else mark(value, by_value=by_value)
        for name, value in pieces(module).items()
    }


def _comes_and_goes(value: Any) -> bool:
    """Tell whether this is a parameter that is spread over ranks (a DTensor), which FSDP replaces itself."""
    return isinstance(value, nn.Parameter) and hasattr(value, "device_mesh")


def _own_marks(module: nn.Module) -> Marks:
    """Give those of all that a call of the module may move. Trained parameters are looked at less often."""
    state = pieces(module).items()
    return {name: mark(value) for name, value in state if not (isinstance(value, nn.Parameter) and value.requires_grad)}


def parts_of(model: nn.Module, name: str = "") -> dict[int, Part]:
    """Give the modules of a model of this name, and those in its lists and attributes, which are not registered.

    Not TorchScript; nor DDP, which has but lists of what others have, and sends buffers around before each forward.
    """
    parts, waiting = dict[int, Part](), [(name, model)]
    for place, root in waiting:
        below = () if id(root) in parts else root.named_modules(prefix=place)
        for path, each in below:
            if id(each) not in parts and not isinstance(each, _UNWATCHED):
                part = parts[id(each)] = Part(each, path, root is not model)
                own = [
                    (attribute, value) for attribute, value in vars(each).items() if issubclass(type(value), nn.Module)
                ]
                waiting += [(part.piece(there), found) for there, found in (*in_plain_lists(each), *own)]
    return parts


def _described(function: Any, watch: Watch) -> str:
    """Name a checkpointed function for a table."""
    if isinstance(function, nn.Module):
        return watch.name(function)
    if isinstance(function, functools.partial):
        return _described(function.func, watch)
    owner = getattr(function, "__self__", None)
    if isinstance(owner, nn.Module):
        method = getattr(function, "__name__", "")
        is_call = not method or getattr(function, "__func__", None) is nn.Module.__call__
        return watch.name(owner) if is_call else f"{watch.name(owner)}.{method}"
    name: str = getattr(function, "__qualname__", None) or type(function).__qualname__
    name = name.rpartition("<locals>.")[2]
    inside = [watch.name(module) for module, _ in modules_of(function)]
    return f"{name} ({join_names(inside).strip('()')})" if inside else name


def _random_numbers() -> dict[str, Any]:
    """Give where each stream of random numbers is."""
    streams = {"Python": random.getstate(), "NumPy": mark(np.random.get_state()), "torch": mark(torch.get_rng_state())}
    if torch.accelerator.is_available():
        device = torch.get_device_module()
        if hasattr(device, "get_rng_state"):
            streams["torch"] = streams["torch"], mark(device.get_rng_state())
    return streams
