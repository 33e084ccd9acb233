"""Am I affected? Watch a training step: are gradients right, which state does recomputation move, what to use."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from html import escape
from math import inf, isclose, isfinite
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError

from momentum_fix import _torch
from momentum_fix._tables import aligned, html
from momentum_fix.diagnosis.observing import ITSELF, Judgement, Moved, Region, Watch, judge
from momentum_fix.formula import corrected_momentum
from momentum_fix.norms.layers import at_gradients, join_names, only_writes, tracks
from momentum_fix.norms.momenta import is_corrected, uncorrected
from momentum_fix.state.preserve import is_compiled
from momentum_fix.state.snapshot import LARGE, mark, pieces

_PRESERVE, _ONCE, _RESTORE = "preserve_state", "update_once", "restore"
_BUFFER = "a buffer instead of this parameter, and preserve_state"
_REACH = "keep it on a module that runs in the checkpoint: preserve_state did not reach it"
_ENGINE = "torch's checkpoint and preserve_state: another engine has recomputed here"
_RANDOM = {
    "torch": "preserve_rng_state=True, as the forward pass draws random numbers",
    "Python": "torch's random numbers instead of Python's; or draw them outside, and pass them as arguments",
    "NumPy": "torch's random numbers instead of NumPy's; or draw them outside, and pass them as arguments",
}
_WEIGHTS = (
    "the same weights in backward: call functional_call inside of the checkpoint; let the optimizer step after backward"
)
_OFF = mark(False)
_MANY = 8  # modules of which the same is to be said, from which on that is said once
_MODE = "the same mode in backward: call train() or eval() before the forward pass, or after the backward pass"
_ELSEWHERE = (
    "make what the function reads from elsewhere (a global, an object of your own, a closure) a buffer or a plain "
    "attribute of a module in the checkpoint; keep contexts and hooks on in backward; pass a copy of an argument "
    "that changes"
)


@dataclass(frozen=True)
class Finding:
    """A piece of state that recomputation has moved again, or that moves with a corrected momentum."""

    module: str
    attribute: str
    module_class: str
    times: int | Fraction | None  # how often it moves for one batch; None where that is not known
    remedy: str  # what to use; "" where nothing has to be done
    note: str

    @property
    def name(self) -> str:
        """The name of module and attribute, as in a state dict."""
        return f"{self.module}.{self.attribute}".strip(".")


@dataclass(frozen=True)
class Difference:
    """Where a recomputation began to give autograd something else than its forward pass did."""

    module: str  # whose values are the first to differ; "the function itself" where it is none
    checkpoint: str  # the name of the checkpointed function
    size: float  # of the first difference, relative to the values
    moved: tuple[str, ...]  # the state that was another than in the forward pass
    remedy: str


class Diagnosis(dict[str, Finding]):
    """What `diagnose` observed: a dict from the name of a piece of state to its `Finding`; a verdict, and tables."""

    verdict = "Nothing is known: the block has not ended."
    gradients_right: bool | None = None  # None: not all of them could be observed
    rounding = 0.0  # the largest relative difference that is one of rounding; 0.0 if all is equal to the bit
    differences: tuple[Difference, ...] = ()
    fixes: tuple[str, ...] = ()  # what to paste
    in_training = False

    @property
    def ok(self) -> bool:
        """Whether gradients were observed to be right, in training mode, and no state needs fixing."""
        return self.gradients_right is True and self.in_training and not any(each.remedy for each in self.values())

    def __repr__(self) -> str:
        return f"<Diagnosis: {self.verdict}>"

    def __str__(self) -> str:
        return "\n\n".join([self.verdict, *map(aligned, self._tables()), *filter(None, ["\n".join(self._advice())])])

    def _repr_html_(self) -> str:
        first, *others = self._tables() or [[]]
        advice = [f"<p>{escape(line)}</p>" for line in self._advice()]
        return "\n".join([html(first, self.verdict), *(html(each, "") for each in others), *advice])

    def _tables(self) -> list[list[tuple[str, ...]]]:
        differences = [
            (
                each.module,
                each.checkpoint,
                f"{each.size:.2g}" if isfinite(each.size) else "other code",
                join_names(each.moved),
            )
            for each in self.differences
        ]
        modules: dict[tuple[str, ...], list[str]] = {}
        for each in self.values():
            times, use = "?" if each.times is None else str(each.times), each.remedy or "nothing"
            row = each.module or "(the model)", each.module_class, times, use, each.note
            modules.setdefault(row, []).append(each.attribute)
        alike: dict[tuple[str, ...], list[str]] = {}  # but for their names
        for (name, kind, *others), state in modules.items():
            alike.setdefault((kind, ", ".join(state), *others), []).append(name)
        states = [
            (name, *row)
            for row, names in alike.items()
            for name in ([join_names(names)] if len(names) > _MANY else names)
        ]
        tables: list[list[tuple[str, ...]]] = [
            [("differs from", "in the checkpoint of", "by", "state that was another"), *differences],
            [("module", "class", "state", "times", "use", "note"), *states],
        ]
        return [table for table in tables if len(table) > 1]

    def _advice(self) -> list[str]:
        remedies: dict[str, list[str]] = {}
        for each in self.differences:
            remedies.setdefault(each.remedy, []).append(each.module)
        where = {
            remedy: f" in {join_names(modules)}" if len(remedies) > 1 else "" for remedy, modules in remedies.items()
        }
        return [*(f"Use{where[each]}: {each}." for each in remedies), *(f"Fix: {each}" for each in self.fixes)]


def diagnose(model: nn.Module) -> AbstractContextManager[Diagnosis]:
    """Observe whether the recomputations of a training step repeat their forward pass, and which state they move again.

    Put one ordinary training step inside the block, backward pass included. Gradients are those of the run without
    checkpointing if what each recomputation gives autograd is, to the bit, what the forward pass gave it. These are
    the tensors that torch's checkpoint compares by their shapes; `diagnose` keeps a fingerprint of each (88 bytes)
    and compares values. It also compares the state of the model before and after each recomputation. Nothing runs
    again, and the model and the results of the step are the same as without this, bit for bit.

    `report.gradients_right` is True, False, or None where not all could be observed: another engine than torch's
    checkpoint, or compiled code. A difference of rounding, which kernels make that are not deterministic, is told
    from a real one, and is not called wrong. If gradients are wrong, the report says in which module the difference
    starts, how large it is, which state was another one there than in the forward pass, and what to use.

    Exact for: torch's non-reentrant engine. With the reentrant engine, where autograd saves nothing in the forward
    pass, what modules and the function give is compared; what is computed between them is seen as far as it changes
    these.

    Not for: state in objects of your own, in globals and in TorchScript (that it makes gradients wrong is seen, but not
    that it moves twice). "Right" is true of this step: put a second one into the block if the first one of a model is
    special, as that of an observer. In a distributed run, each rank has a report of its own.

    Args:
        model: any module. Calls of torch's checkpoint outside of it are observed too.

    Returns:
        A context manager that gives a `Diagnosis`, which is filled when the block ends. Its `ok` is True only if
        gradients were observed to be right, in training mode, and no state needs fixing.

    Raises:
        TypeError: model is not a module, or is TorchScript.
        RuntimeError: this version of torch does not tell of its checkpoints.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> with diagnose(model) as report:
        ...     checkpoint(model, torch.rand(8, 3), use_reentrant=False).sum().backward()
        >>> print(report)
        Gradients are right, but recomputation moves state again (3 pieces).
        <BLANKLINE>
        module  class        state                                           times  use          note
        1       BatchNorm1d  running_mean, running_var, num_batches_tracked  2      update_once
        <BLANKLINE>
        Fix: update_once(model)
        >>> report.gradients_right, report.ok
        (True, False)

    Source: the question of pytorch/pytorch#96136 (2023): which modules does checkpointing break?
    """
    return _diagnosing(model)


@contextmanager
def _diagnosing(model: nn.Module) -> Iterator[Diagnosis]:
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model is of type {type(model).__name__}, but must be an nn.Module, and not TorchScript")
    _torch.check_recomputation()
    watch, report, raised = Watch(model), Diagnosis(), None
    ends = [_torch.listen(watch.begin, outermost=True)]
    try:
        _torch.hear_entering(watch.enter, 1)
        ends += [functools.partial(_torch.hear_entering, watch.enter, -1), _torch.hear_leaving(watch.leave)]
        ends += [hook.remove for hook in at_gradients(model, watch.in_backward)]
        with warnings.catch_warnings():  # what torch says of hooks does not go for these, which only look
            warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are global hooks")
            yield report
    except BaseException as error:
        raised = error
        raise
    finally:
        for end in ends:
            end()
        _fill(report, model, watch, raised)


def _fill(report: Diagnosis, model: nn.Module, watch: Watch, raised: BaseException | None) -> None:
    """Say what was observed."""
    judged = judge(watch.regions)
    if isinstance(raised, CheckpointError) and watch.latest is not None:  # torch has seen a difference itself
        last = watch.latest.recomputations[-1]
        if not any(each.starts_in for _, each in judged if each.recomputation is last):
            judged = [(region, each) for region, each in judged if each.recomputation is not last]
            judged.append((watch.latest, Judgement(last, ITSELF, inf, True)))
    wrong = [(region, each) for region, each in judged if each.starts_in]
    seen = {key for region in watch.regions for key in region.parts}
    compiled = [name for key, (part, name, _) in watch.parts.items() if is_compiled(part) and key not in seen]
    unknown = [region for region, each in judged if not each.is_known]
    report.in_training = any(watch.ran) if watch.ran else model.training
    if wrong or (judged and not (raised or unknown or watch.elsewhere or compiled or watch.compiles)):
        report.gradients_right = not wrong
    report.rounding = max((each.size for _, each in judged if not each.starts_in), default=0.0)
    report.differences = tuple(_merged(_difference(region, each, watch) for region, each in wrong))
    report.update((each.name, each) for each in _findings(model, watch, {id(region) for region, _ in wrong}))
    report.fixes = tuple(_fixes(report, watch))
    bad = [each for each in report.values() if each.remedy]
    again = "recomputation moves state again"
    if bad and all(each.remedy == _RESTORE for each in bad):
        again = "a momentum is corrected for passes that this step did not make"
    again += f" ({_count(len(bad), 'piece')})"
    exactly = f"up to rounding ({report.rounding:.1g})" if report.rounding else "to the bit"
    if wrong:
        report.verdict = (
            f"Gradients are wrong: {len(wrong)} of {_count(len(judged), 'recomputation')} gave autograd something "
            "else than "
            "the forward pass."
        )
    elif not report.in_training:
        report.verdict = "Not observed: the model ran in evaluation mode. Call model.train(), and run a training step."
    elif report.gradients_right is None:
        why = f"the step raised {type(raised).__name__}." if raised else _why(watch, unknown, compiled)
        report.verdict = f"Not observed: {why}" + (f" And {again}." if bad else "")
    elif not bad:
        report.verdict = (
            f"Clean: {_count(len(judged), 'recomputation')} gave autograd the same as the forward pass, {exactly}, "
            "and moved "
            "no state again."
        )
    else:
        report.verdict = f"Gradients are right{f' {exactly}' if report.rounding else ''}, but {again}."


def _why(watch: Watch, unknown: list[Region], compiled: list[str]) -> str:
    """Say why it is not known whether gradients are right, and what to do."""
    if watch.elsewhere:
        return (
            f"{join_names([*watch.elsewhere])} ran in the backward pass, but not in a checkpoint of torch's that began "
            "in this block. What another engine recomputes cannot be compared with its forward pass: run a step with "
            "torch's."
        )
    if compiled or watch.compiles:
        what = f"nobody sees what compiled code recomputes ({join_names(compiled or ['a checkpoint inside'])})"
        return f"{what}: run a step without torch.compile."
    if unknown:
        return f"what the checkpoint of {unknown[0].function} handed to autograd could not be compared."
    if not watch.backward:
        return "no backward pass was seen inside the block. Put a whole training step into it."
    return (
        "no recomputation was seen. Is checkpointing on? Only torch's checkpoint is seen, and not inside compiled "
        "code: "
        "run a step without torch.compile."
    )


def _merged(differences: Iterable[Difference]) -> list[Difference]:
    """Say once what goes for several calls of a checkpoint, with the largest size."""
    largest: dict[Any, Difference] = {}
    for each in differences:
        key = each.module, each.checkpoint, frozenset(each.moved), each.remedy
        if key not in largest or each.size > largest[key].size:
            largest[key] = each
    return [*largest.values()]


def _difference(region: Region, judgement: Judgement, watch: Watch) -> Difference:
    """Say where a difference starts, and what to do about it."""
    recomputation, where = judgement.recomputation, judgement.starts_in
    moved = [(region.parts[key], name) for key, name in recomputation.found_moved]
    weights = [(part, name) for part, name in moved if _is_unpreserved(part.module, name)]
    statistics = [(part, name) for part, name in moved if tracks(part.module) and only_writes(part.module)]
    others = [each for each in moved if each not in weights and each not in statistics]
    buffer = _BUFFER.partition(",")[0] if recomputation.preserved or others else _BUFFER
    drawn = region.drew - ({"torch"} if region.keeps_random_numbers else set())
    remedies = [_RANDOM[name] for name in _RANDOM if name in drawn]
    if weights:
        by_itself = any((id(part.module), name) in watch.moved for part, name in weights)
        trained = any(part.module._parameters[name].requires_grad for part, name in weights) and not by_itself
        remedies.append(_WEIGHTS if trained else buffer)
    evaluated = [
        key for key, name in recomputation.found_moved if name == "training" and region.state[key][name] == _OFF
    ]
    if evaluated:
        remedies.append(_MODE)
        others = [(part, name) for part, name in others if name != "training"]
    if others and not recomputation.preserved:
        remedies.append(_PRESERVE)
    elif statistics and not (remedies or recomputation.preserved):
        readers = [part.name for part, _ in statistics if where == ITSELF or part.name.startswith(f"{where}.")]
        remedies += [f"{_PRESERVE}, if the statistics of {readers[0]} are read"] if readers else []
    if remedies == [] or remedies[-1].startswith(f"{_PRESERVE},"):
        remedies.append(_ELSEWHERE)
    hinted = statistics if remedies[0].startswith(f"{_PRESERVE},") else []
    names = tuple(f"{part.name}.{name}".strip(".") for part, name in others + weights or hinted)
    return Difference(where, region.function, judgement.size, names, "; or ".join(remedies))


def _findings(model: nn.Module, watch: Watch, wrong: set[int]) -> Iterator[Finding]:
    """Give what is to be said of each piece of state that recomputation has moved, or whose momentum is corrected."""
    for name, script in model.named_modules():
        if isinstance(script, torch.jit.ScriptModule) and script.training:
            yield Finding(
                name, "", type(script).__name__, None, "a step without TorchScript", "its state is not looked at"
            )
    parts = dict(watch.parts)
    for region in watch.regions:
        parts |= {key: part for key, part in region.parts.items() if key not in parts}
    for key, part in parts.items():
        layer: Any = part.module
        moved = {name: each for (owner, name), each in watch.moved.items() if owner == key}
        passes = {name: count for (owner, name), count in watch.passes.items() if owner == key}
        if (watch.backward or watch.regions) and tracks(layer) and is_corrected(layer):
            moved |= {name: Moved() for name in passes if name in layer._buffers and name not in moved}
        times = {name: each.for_one_batch(passes.get(name, 0)) for name, each in moved.items()}
        for name in sorted(moved, key=[*pieces(layer), *moved].index):
            regions = moved[name].regions
            unread = only_writes(layer) or not wrong.intersection(map(id, regions))
            if tracks(layer) and name in layer._buffers and unread:
                remedy, note = _of_statistics(layer, max(times.values()))
            elif _is_unpreserved(layer, name):
                remedy, note = _BUFFER, ""
            elif None in regions:
                remedy, note = _ENGINE, ""
            else:
                preserved = any(each.preserved for region in regions if region for each in region.recomputations)
                remedy, note = _REACH if preserved else _PRESERVE, ""
            if part.in_a_list and remedy == _ONCE:
                remedy, note = (
                    _PRESERVE,
                    "in a plain list, where update_once does not reach it: an nn.ModuleList would do",
                )
            yield Finding(part.name, name, type(layer).__name__, times[name], remedy, note)


def _of_statistics(layer: Any, times: int | Fraction) -> tuple[str, str]:
    """Say what to use for statistics that outputs do not read, and what there is to note."""
    plain = uncorrected(layer)
    if times == int(times):
        right = (
            plain is None if plain is layer.momentum else isclose(corrected_momentum(plain, int(times)), layer.momentum)
        )
        if right:
            return "", "its momentum makes up for it"
    if times == 1:
        return _RESTORE, "its momentum is corrected, but it moves once"
    return _ONCE, "" if plain is layer.momentum else "its momentum is corrected for another number of passes"


def _fixes(report: Diagnosis, watch: Watch) -> Iterator[str]:
    """Give the lines to paste."""
    remedies = [each.remedy for each in report.values()] + [each.remedy for each in report.differences]
    if _ONCE in remedies:
        yield "update_once(model)"
    if _PRESERVE in remedies or any(
        f" {_PRESERVE}" in each for each in remedies if each not in (_BUFFER, _REACH, _ENGINE)
    ):
        if any(region.by_library for region in watch.regions):
            yield "preserve_everywhere()"
        elif any(region.reentrant for region in watch.regions):
            yield "momentum_fix.checkpoint(...) instead of torch's"
        else:
            yield "checkpoint(..., context_fn=preserve_state)"
    if _RESTORE in remedies:
        yield "restore(model)"


def _is_unpreserved(module: nn.Module, name: str) -> bool:
    """Tell whether a piece of state is a parameter that is not preserved: one that is trained, or large."""
    parameter = module._parameters.get(name)
    return parameter is not None and (parameter.requires_grad or parameter.nbytes > LARGE)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
