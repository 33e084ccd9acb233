"""Am I affected? Watch a training step: are gradients right, which state does recomputation move, what to use."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from math import inf

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError

from momentum_fix import _torch
from momentum_fix._block import Block
from momentum_fix._torch import is_compiled
from momentum_fix.diagnosis.advice import differences_of, findings_of, fixes_of
from momentum_fix.diagnosis.report import Diagnosis
from momentum_fix.diagnosis.watch import ITSELF, Judgement, Region, Watch, judge
from momentum_fix.norms.layers import at_gradients, join_names, trained


def diagnose(model: nn.Module) -> AbstractContextManager[Diagnosis]:
    """Observe whether the recomputations of a training step repeat their forward pass, and which state they move again.

    Put one ordinary training step inside the block, backward pass included. Gradients are those of the run without
    checkpointing if the tensors that each recomputation gives autograd are, to the bit, those that the forward pass
    gave it. torch's checkpoint compares the shapes of these tensors; `diagnose` keeps a fingerprint of each (232 bytes)
    and compares values. It also compares the state of the model before and after each recomputation. Nothing runs
    again, and the model and the results of the step are the same as without this, bit for bit.

    `report.gradients_right` is True, False, or None where not all could be observed: another engine than torch's
    checkpoint, or compiled code. Some kernels are not deterministic: a difference of rounding is recognized, and does
    not count as wrong. If gradients are wrong, the report says in which module the difference starts, how large it is,
    which state had changed there since the forward pass, and what to use.

    Exact for: torch's non-reentrant engine. With the reentrant engine, where autograd saves nothing in the forward
    pass, operations are compared: what they are given, what they give, and which of them gave it.

    Not for: state in objects of your own, in globals and in TorchScript (that it makes gradients wrong is seen, but not
    that it moves twice). "Right" is true of this step: if the first one of a model is special, as that of an observer,
    train for one step before the block. In a distributed run, each rank has a report of its own.

    Args:
        model: any module. Calls of torch's checkpoint outside of it are observed too.

    Returns:
        A context manager that gives a `Diagnosis`, which is filled when the block ends. Its `ok` is True only if
        gradients were observed to be right, in training mode, and no state needs fixing.

    Raises:
        TypeError: model is not a module, or is TorchScript.
        RuntimeError: this version of torch does not tell of its checkpoints.

    Warns:
        UserWarning: the block was never entered.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> with diagnose(model) as report:
        ...     checkpoint(model, torch.rand(8, 3), use_reentrant=False).sum().backward()
        >>> print(report)
        Gradients are right, but recomputation moves state again (in 1 module).
        <BLANKLINE>
        module  class        state                                           times  use          note
        1       BatchNorm1d  running_mean, running_var, num_batches_tracked  2      update_once
        <BLANKLINE>
        Fix: update_once(model)
        >>> report.gradients_right, report.ok
        (True, False)

    Source: the question of pytorch/pytorch#96136 (2023): which modules does checkpointing break?
    """
    return Block("diagnose", _diagnosing, model)


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
        ends += [p.register_post_accumulate_grad_hook(watch.accumulated).remove for p in trained(model)]  # type: ignore[no-untyped-call]
        ends += [_torch.hear_hooks(watch.hear_hook), _torch.hear_functions(watch.hear_function)]
        with _torch.no_warning_of_hooks():
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
    report.in_training = any(watch.ran) if watch.ran else model.training
    report.rounding = max((each.size for _, each in judged if not each.starts_in), default=0.0)
    report.differences = differences_of(wrong, watch)
    report.update((each.name, each) for each in findings_of(model, watch, {id(region) for region, _ in wrong}))
    unknown = f"the step raised {type(raised).__name__}." if raised else _unknown(report, watch, judged)
    if wrong or not unknown:
        report.gradients_right = not wrong
    report.fixes = tuple(fixes_of(report, watch))
    report.verdict = _verdict(report, unknown, len(wrong), _count(len(judged), "recomputation"))


def _verdict(report: Diagnosis, unknown: str, wrong: int, recomputations: str) -> str:
    """Say in a sentence what was observed."""
    bad = [each for each in report.values() if each.remedy]
    moved = "a momentum is corrected for passes that this step did not make"
    moved = moved if all(each.times == 1 for each in bad) else "recomputation moves state again"
    moved += f" (in {_count(len({each.module for each in bad}), 'module')})"
    exactly = f"up to rounding ({report.rounding:.1g})" if report.rounding else "to the bit"
    if wrong:
        return f"Gradients are wrong: {wrong} of {recomputations} gave autograd something else than the forward pass."
    if not report.in_training:
        return "Not observed: the model ran in evaluation mode. Call model.train(), and run a training step."
    if unknown:
        return f"Not observed: {unknown}" + (f" And {moved}." if bad else "")
    if bad:
        return f"Gradients are right{f' {exactly}' if report.rounding else ''}, but {moved}."
    others = "what moved again does no harm" if report else "moved no state again"
    return f"Clean: {recomputations} gave autograd the same as the forward pass, {exactly}, and {others}."


def _unknown(report: Diagnosis, watch: Watch, judged: list[tuple[Region, Judgement]]) -> str:
    """Say why it is not known whether gradients are right, and what to do; "" if it is known."""
    seen = {key for region in watch.regions for key in region.parts}
    compiled = [name for key, (part, name, _) in watch.parts.items() if is_compiled(part) and key not in seen]
    not_compared = [region for region, each in judged if not each.is_known]
    if watch.elsewhere:
        return (
            f"{join_names([*watch.elsewhere])} ran in the backward pass, but not in a checkpoint of torch's that began "
            "in this block. What another engine recomputes cannot be compared with its forward pass: run a step with "
            "torch's."
        )
    if compiled or watch.compiles:
        names = join_names(compiled or ["a checkpoint inside"]).strip("()")
        what = f"nobody sees what compiled code recomputes ({names})"
        return f"{what}: run a step without torch.compile."
    if watch.lost:
        what = f"a reentrant checkpoint was given no tensor that requires gradients ({watch.lost[0].function})"
        instead = "If it is trained in this step, pass use_reentrant=False, or an input that requires them."
        return f"{what}, so what is in it gets none. {instead}"
    if doubled := [region for region, each in judged if each.recomputation.hooks_again]:
        instead = "Register it outside of the checkpoint, or on a new tensor (`x * 1`)."
        what = f"the function puts a hook on a tensor from outside (in the checkpoint of {doubled[0].function})"
        return f"{what}, and each recomputation puts another one there, so that it runs twice. {instead}"
    if watch.reread:
        return (
            f"recomputation had moved {join_names([*watch.reread])} again before another forward pass, which may have "
            "read it. Make the state right first, or put a single batch into the block."
        )
    if small := [(region, each) for region, each in judged if each.size and each.recomputation.found_read]:
        size = f"{small[0][1].size:.1g}"
        return (
            f"what the checkpoint of {small[0][0].function} handed to autograd differs by {size}. That may be "
            "rounding, or the state that had changed since the forward pass. Make the state right first."
        )
    if not_compared:
        region = not_compared[0]
        instead = ""
        if region.is_compiled:
            instead = " Run a step without torch.compile."
        elif region.reentrant:
            instead = " Train with use_reentrant=False: with True, some of it may get no gradient."
        return f"what the checkpoint of {region.function} handed to autograd could not be compared.{instead}"
    read = {each.name for each in watch.moved.values() if each.is_read}
    may_be_read = [name for name, each in report.items() if name in read and each.remedy]
    if may_be_read and watch.own_backward:
        return (
            f"a hook or an autograd.Function of your own runs in {watch.own_backward}, and may have read what "
            f"recomputation had moved again ({join_names(may_be_read)}). Make the state right first."
        )
    if judged:
        return ""
    if not watch.backward:
        return "no backward pass was seen inside the block. Put a whole training step into it."
    return (
        "no recomputation was seen. Is checkpointing on? Only torch's checkpoint is seen, and not inside compiled "
        "code: run a step without torch.compile."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
