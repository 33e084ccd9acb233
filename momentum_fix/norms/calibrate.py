"""Count the passes instead of assuming them: one training step finds them, and each momentum is set."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch.distributed as dist
from torch import nn

from momentum_fix._block import Block
from momentum_fix._tables import aligned, html, number
from momentum_fix._torch import check_recomputation
from momentum_fix.norms.correct import correct, corrected_for
from momentum_fix.norms.counting import Count, CountingForward, Finding
from momentum_fix.norms.layers import at_gradients, join_names, norm_of, tracked_layers, warn_of_none
from momentum_fix.norms.momenta import differ, note_uncounted, set_momenta, uncorrected
from momentum_fix.norms.notes import Note
from momentum_fix.norms.wrapping import end, refuse_wrapped, wrap

_HEADER = ("layer", "class", "passes", "momentum", "corrected", "note")
_NOT_ENDED = "nothing yet: the block of calibrate has not ended, or an exception has left it"
_NO_ROWS = "no layer with running statistics has been calibrated"


@dataclass(frozen=True)
class Row:
    """What one layer did in the calibrated step; passes is None where they could not be counted."""

    name: str
    layer_class: str
    passes: int | Fraction | None
    notes: tuple[Note, ...]
    momentum: float | None
    corrected: float | None

    @property
    def note(self) -> str:
        """The notes as a text."""
        return "; ".join(note.text for note in self.notes)

    def cells(self) -> tuple[str, ...]:
        """Give the row's text: layer, class, passes, momentum, corrected momentum, note."""
        passes = "?" if self.passes is None else str(self.passes)
        momenta = number(self.momentum), number(self.corrected)
        return self.name or "(the model)", self.layer_class, passes, *momenta, self.note


class Report(dict[str, int | Fraction]):
    """What `calibrate` found: a dict from layer to passes, for `correct`; one of `rows` per layer; prints as a table.

    A layer whose passes are unknown has a row, but is not in the dict.
    """

    rows: tuple[Row, ...] = ()
    _without_rows = _NOT_ENDED

    @property
    def passes(self) -> dict[str, Any]:
        """The passes as a plain dict, to save with a state dict: integers, except for layers with a warning."""
        return dict(self)

    def __repr__(self) -> str:
        return f"<Report on {len(self.rows)} layers, passes of {len(self)} known>"

    def __str__(self) -> str:
        return aligned(self._table()) if self.rows else self._without_rows

    def _repr_html_(self) -> str:
        return html(self._table(), "calibrate" if self.rows else self._without_rows)

    def _table(self) -> list[tuple[str, ...]]:
        return [_HEADER, *(row.cells() for row in self.rows)]


def calibrate(model: nn.Module) -> AbstractContextManager[Report]:
    """Count each layer's passes in one training step, keep that step's statistics right, and set each momentum.

        m' = 1 - (1 - m)**(1 / k),  k = updates of the layer's running statistics per batch

    Put one ordinary training step inside the block: forward and backward, as many micro-batches as you like, the
    optimizer's step inside or after. An update in a forward pass is a batch; one in a recomputation (inside a backward
    pass, or where `recomputing` says so) is another pass of it. Recomputations work on copies in the block, so the
    statistics after the step are those of the step without checkpointing, bit for bit. (With `momentum=None` they do
    update the statistics, because equal passes keep a cumulative average right.) When the block ends, each layer's
    momentum is corrected for its own k.

    Exact for: layers whose k updates for one batch follow one another, with the same k in every step. Then
    running_mean and running_var stay those of the uncheckpointed run, up to rounding. Not for: alternating passes of
    several batches (two forwards before one backward, a layer called twice), k that differs from batch to batch, or
    recomputations that see different data than the forward pass did. There the old value decays as it should (k is the
    mean), but the newest batches are weighted wrongly, and a warning names the layers. Not for a step that sets the
    momentum itself (a schedule, SAM); you get a warning there too. Not for a class whose output reads its statistics:
    its gradients are wrong, and need `checkpoint` or `preserve_state`.

    Layers with one pass per batch, without running statistics, in evaluation mode or with `momentum=None` are left
    alone; a layer that did not run is reported and left alone. Calibrate again when the model, its checkpointing or its
    compilation changes. Momentum is not in a state dict: save `report.passes` and give it to `correct` when you rebuild
    the model. Pickle the model before or after the block. In a distributed run every rank has to calibrate the same
    step: a layer that did not run on one rank gets the passes that the others counted.

    Args:
        model: any module; every layer below it that tracks running statistics is watched.

    Returns:
        A context manager that gives a `Report`, which is filled when the block ends.

    Raises:
        ValueError: a layer's momentum is outside 0 to 1, `update_once` is on the layer, or another block is
            calibrating it.
        TypeError: model is not a module, or a part of it with running statistics is TorchScript.
        RuntimeError: this torch does not tell a recomputation from a forward pass.
            Each of these is raised on entry, and the model is left as it was. On leaving, a ValueError if something
            else has wrapped a layer's `forward` in the block: nothing is corrected. Remove that, and calibrate again.

    Warns:
        UserWarning: only the decay could be corrected, or passes could not be counted; no layer tracks running
            statistics, or none was updated in the block; or the block was never entered.

    Example:
        >>> import torch
        >>> from torch.utils.checkpoint import checkpoint
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> with calibrate(model) as report:
        ...     checkpoint(model, torch.rand(8, 3), use_reentrant=False).sum().backward()
        >>> print(report)
        layer  class        passes  momentum  corrected  note
        1      BatchNorm1d  2       0.1       0.0513167

    Source: the closed form for two passes, discuss.pytorch.org/t/17738 (2018).
    """
    return Block("calibrate", _calibrating, model)


def _calibrating(model: nn.Module) -> Iterator[Report]:
    counts: dict[int, Count] = {}  # by the buffer, which layers may share
    wrappers = []
    for layer, (name, *_) in tracked_layers(model).items():
        refuse_wrapped(layer, name, "update_once", "calibrate")
        corrected_for(name, layer.momentum, 2)  # refuse what cannot be corrected before anything is changed
        buffer = next(b for each in norm_of(layer).statistics if (b := layer._buffers.get(each)) is not None)
        wrappers.append(CountingForward(layer, name, counts.setdefault(id(buffer), Count(buffer.device))))
    check_recomputation()
    warn_of_none(wrappers, "to calibrate", stacklevel=5)
    report, backward = Report(), [False]
    # Uncorrected, so that the forward updates of an already corrected layer are right as well.
    set_momenta({each.layer: each.uncorrected for each in wrappers})
    hooks: list[Any] = []
    try:
        wrap(wrappers)
        hooks += at_gradients(model, lambda _: backward.append(True))
        backward.append(not hooks)  # a frozen model's backward pass cannot be seen
        yield report
    finally:
        for hook in hooks:
            hook.remove()
        # Before anything is found, which may fail: what the block has left on the layers may be of any kind.
        there = [each for each in wrappers if hasattr(each.layer, "momentum")]
        kept = [each for each in there if not differ(each.layer.momentum, each.uncorrected)]
        set_momenta({each.layer: each.momentum for each in kept})
        end(every for each in wrappers for every in (each, *each.copies))
    for each in wrappers:
        each.count.drain()
    backward += [any(each.count.recomputations) for each in wrappers]
    found = _agreed({each.name: each.finding(any(backward), each in kept) for each in wrappers})
    _warn(found)
    momenta = {each.name: uncorrected(each.layer) for each in wrappers}
    report.update({name: passes for name, (passes, _) in found.items() if passes is not None})
    if wrappers:
        correct(model, report)
    for each in wrappers:
        note_uncounted(each.layer, sum(each.count.batches))
    report._without_rows = _NO_ROWS
    report.rows = tuple(
        Row(
            *(each.name, type(each.layer).__name__, *found[each.name]),
            *(momenta[each.name], getattr(each.layer, "momentum", None)),
        )
        for each in wrappers
    )


def _agreed(found: dict[str, Finding]) -> dict[str, Finding]:
    """In a distributed run, give a layer that did not run on this rank the passes that the others have counted.

    Ranks whose layers have other names hold other models (stages of a pipeline) and have nothing to say.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return found
    everyone: list[dict[str, Finding]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    agreed = {}
    for name, (passes, notes) in found.items():
        counted = {its[name][0] for its in everyone if its.keys() == found.keys()} - {None}
        if passes is None and len(counted) == 1:
            passes, notes = counted.pop(), (Note.OTHER_RANK,)
        elif len(counted) > 1:
            notes += (Note.RANKS_DIFFER,)
        agreed[name] = passes, notes
    return agreed


def _warn(found: dict[str, Finding]) -> None:
    for note in Note:
        layers = [name for name, (_, notes) in found.items() if note in notes]
        if layers and note.warns:
            warnings.warn(f"{note.text}{note.remedy}. Layers: {join_names(layers)}.", stacklevel=5)
    if found and all(notes in ((Note.EVALUATION,), (Note.IDLE,)) for _, notes in found.values()):
        usage = "put a training step of this model into it, in training mode"
        warnings.warn(f"no layer was updated in the block, so nothing is corrected: {usage}", stacklevel=5)
