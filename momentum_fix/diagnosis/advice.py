"""What to do about wrong gradients, and about state that recomputation moves again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from fractions import Fraction
from math import inf, isclose
from typing import Any

import torch
from torch import nn

from momentum_fix._tables import number
from momentum_fix.diagnosis.report import Diagnosis, Difference, Finding
from momentum_fix.diagnosis.watch import ITSELF, Judgement, Moved, Region, Watch
from momentum_fix.formula import corrected_momentum
from momentum_fix.norms.layers import is_statistic, is_unread_statistic, join_names, only_writes, tracks
from momentum_fix.norms.momenta import is_corrected, is_undone_by_restore, uncorrected
from momentum_fix.norms.wrapping import wrapper_of
from momentum_fix.state.compare import mark
from momentum_fix.state.snapshot import LARGE, pieces

_PRESERVE, _ONCE, _RESTORE = "preserve_state", "update_once", "restore"
_BUFFER = "a buffer instead of this parameter"
_BUFFER_AND = f"{_BUFFER}, and {_PRESERVE}"
_REACH = "keep it on a module that runs in the checkpoint: preserve_state did not reach it"
_ENGINE = "torch's checkpoint and preserve_state: another engine has recomputed here"
_INSTEAD = "torch's random numbers instead of {}'s; or draw them outside, and pass them as arguments"
_RANDOM = {
    "torch": "preserve_rng_state=True, as the forward pass draws random numbers",
    "Python": _INSTEAD.format("Python"),
    "NumPy": _INSTEAD.format("NumPy"),
}
_WEIGHTS = (
    "the same weights in backward: call functional_call inside of the checkpoint; let the optimizer step after "
    "backward; where the forward itself writes to them, keep them in a buffer"
)
_LAZY = "one batch under torch.no_grad() before training, as lazy modules draw their weights in their first call"
_MODE = "the same mode in backward: call train() or eval() before the forward pass, or after the backward pass"
_ELSEWHERE = (
    "make what the function reads from elsewhere (a global, an object of your own, a closure) a buffer or a plain "
    "attribute of a module in the checkpoint; keep contexts and hooks on in backward; pass a copy of an argument that "
    "changes"
)
_BACKWARD = (
    "a backward pass outside of the checkpoint: each recomputation runs this one again, which adds gradients again"
)
_OFF = mark(False)


def differences_of(wrong: Iterable[tuple[Region, Judgement]], watch: Watch) -> tuple[Difference, ...]:
    """Say where gradients begin to be wrong, once for all calls of a checkpoint, with the largest size."""
    largest: dict[Any, Difference] = {}
    for each in (_difference(region, judgement, watch) for region, judgement in wrong):
        key = each.module, each.checkpoint, frozenset(each.moved), each.remedy
        largest[key] = max(each, largest.get(key, each), key=lambda difference: difference.size)
    return tuple(largest.values())


def _difference(region: Region, judgement: Judgement, watch: Watch) -> Difference:
    """Say where a difference starts, and what to do about it."""
    recomputation, where = judgement.recomputation, judgement.starts_in
    if recomputation.adds_gradients:
        return Difference(where, region.function, judgement.size, (), _BACKWARD)
    moved = [(region.parts[key], name) for key, name in recomputation.found_moved]
    lazy = {part.name for part, name in moved if name == "_initialize_hook"}  # which is gone after the first call
    weights = [(part, name) for part, name in moved if _is_unpreserved(part.module, name) and part.name not in lazy]
    statistics = [(part, name) for part, name in moved if is_unread_statistic(part.module, name)]
    others = [each for each in moved if each not in weights and each not in statistics]
    drawn = region.drew - ({"torch"} if region.keeps_random_numbers else set())
    remedies = [remedy for name, remedy in _RANDOM.items() if name in drawn] + [_LAZY] * bool(lazy)
    if weights:
        by_itself = any((id(part.module), name) in watch.moved for part, name in weights)
        trained = any(part.module._parameters[name].requires_grad for part, name in weights) and not by_itself
        remedies.append(_WEIGHTS if trained else _BUFFER if recomputation.preserved or others else _BUFFER_AND)
    if any(name == "training" and region.state[key][name] == _OFF for key, name in recomputation.found_moved):
        remedies.append(_MODE)
        others = [(part, name) for part, name in others if name != "training"]
    if others and not recomputation.preserved:
        remedies.append(_PRESERVE)
    elif statistics and not (remedies or recomputation.preserved):
        readers = [part.name for part, _ in statistics if where == ITSELF or part.name.startswith(f"{where}.")]
        remedies += [f"{_PRESERVE}, if the statistics of {readers[0]} are read"] if readers else []
    hinted = statistics if remedies and remedies[0].startswith(f"{_PRESERVE},") else []
    if hinted or not remedies:
        remedies.append(_ELSEWHERE)
        if region.reentrant and judgement.size == inf:
            remedies.append("use_reentrant=False, if it asks whether gradients are on")
    names = tuple(part.piece(name) for part, name in others + weights or hinted)
    return Difference(where, region.function, judgement.size, names, "; or ".join(remedies))


def findings_of(model: nn.Module, watch: Watch, wrong: set[int]) -> Iterator[Finding]:
    """Give what is to be said of each piece of state that recomputation has moved, or whose momentum is corrected."""
    for name, script in model.named_modules():
        if isinstance(script, torch.jit.ScriptModule) and script.training:
            remedy, note = "a step without TorchScript", "its state is not looked at"
            yield Finding(name, "", type(script).__name__, None, remedy, note)
    moved_of, passes_of = defaultdict[int, dict[str, Moved]](dict), defaultdict[int, dict[str, int]](dict)
    for (key, name), each in watch.moved.items():
        moved_of[key][name] = each
    for (key, name), count in watch.passes.items():
        passes_of[key][name] = count
    for key, part in watch.all_parts().items():
        layer: Any = part.module
        moved, passes = moved_of[key], passes_of[key]
        if (watch.backward or watch.regions) and tracks(layer) and is_corrected(layer):
            moved |= {
                name: Moved(name, is_read=False) for name in passes if name in layer._buffers and name not in moved
            }
        times = {name: each.for_one_batch(passes.get(name, 0)) for name, each in moved.items()}
        for name in sorted(moved, key=[*pieces(layer), *moved].index):
            regions = moved[name].regions
            unread, note = only_writes(layer) or not wrong.intersection(map(id, regions)), ""
            if is_statistic(layer, name) and unread:
                remedy, note = _of_statistics(layer, max(times.values()), part.in_a_list)
            elif _is_unpreserved(layer, name):
                remedy = _BUFFER_AND
            elif None in regions:
                remedy = _ENGINE
            elif moved[name].by_calls and not passes.get(name) and all(each and each.reentrant for each in regions):
                times[name] = times[name] - 1
                remedy, note = "", "moves in recomputations only, as code does that asks whether gradients are on"
            else:
                preserved = any(each.preserved for region in regions if region for each in region.recomputations)
                remedy = _REACH if preserved else _PRESERVE
            if remedy == _ONCE and part.in_a_list:
                remedy = _PRESERVE
                note = (
                    "not registered (in a plain list or dict?), so update_once does not reach it: use an nn.ModuleList"
                )
            elif remedy == _ONCE and key not in watch.parts:
                note = "not in the model that was given: call update_once on it too"
            elif remedy == _ONCE and wrapper_of(layer) is not None:
                remedy, note = _ENGINE if None in regions else _PRESERVE, "moves again although update_once is on it"
            yield Finding(part.name, name, type(layer).__name__, times[name], remedy, note)


def _of_statistics(layer: Any, times: int | Fraction, in_a_list: bool) -> tuple[str, str]:
    """Say what to use for statistics that outputs do not read, and what there is to note."""
    plain, momentum = uncorrected(layer), layer.momentum
    if plain is momentum:
        makes_up = plain is None and times == int(times)
    else:
        makes_up = times == int(times) and isclose(corrected_momentum(plain, int(times)), momentum)
    if makes_up:
        return "", "its momentum makes up for it" if plain is not None else "equal passes do not change its plain mean"
    if times == 1:
        remedy = _RESTORE if is_undone_by_restore(layer) and not in_a_list else f"momentum={number(plain)}"
        return remedy, "its momentum is corrected, but it moves once"
    return _ONCE, "" if plain is momentum else "its momentum is corrected for another number of passes"


def fixes_of(report: Diagnosis, watch: Watch) -> Iterator[str]:
    """Give the lines to paste."""
    remedies = {each.remedy for each in report.values()} | {each.remedy for each in report.differences}
    preserves = any(_PRESERVE in remedy for remedy in remedies - {_BUFFER_AND, _REACH, _ENGINE})
    yield from _fixes_of_statistics(report, watch, preserves)
    if preserves:
        if any(region.by_library for region in watch.regions):
            yield "preserve_everywhere()"
        elif any(region.reentrant for region in watch.regions):
            yield "momentum_fix.checkpoint(...) instead of torch's"
        else:
            yield "checkpoint(..., context_fn=preserve_state)"


def _fixes_of_statistics(report: Diagnosis, watch: Watch, preserves: bool) -> Iterator[str]:
    """Give the lines after which running statistics move once, and no momentum is corrected for more."""
    again = {each.module for each in report.values() if each.remedy == _ONCE}
    once = {each.module for each in report.values() if each.remedy and each.times == 1}
    layers = {part.name: part.module for part in watch.parts.values() if not part.in_a_list}
    corrected = {name for name, layer in layers.items() if tracks(layer) and is_corrected(layer)}
    plain = "model"
    if corrected and (again or once or preserves):
        undone = all(is_undone_by_restore(layers[name]) for name in corrected)
        covered = any(wrapper_of(layer) is not None for layer in layers.values())  # by update_once, which is to stay
        plain = "restore(model)" if undone and not covered else "correct(model, passes=1)"
    if again & layers.keys() or (plain != "model" and corrected - once):
        yield f"{_ONCE}({plain})"
    elif plain != "model":
        yield plain
    unknown = again - layers.keys()
    if outside := [part for part in watch.all_parts().values() if part.name in unknown]:
        what = "restore(...)" if any(is_corrected(part.module) for part in outside) else "..."
        roots = sorted({part.name.partition(".")[0] for part in outside})
        yield f"{_ONCE}({what}) on the model that has {join_names(roots)}"


def _is_unpreserved(module: nn.Module, name: str) -> bool:
    """Tell whether a piece of state is a parameter that is not preserved: one that is trained, or large."""
    parameter = module._parameters.get(name)
    return parameter is not None and (parameter.requires_grad or parameter.nbytes > LARGE)
