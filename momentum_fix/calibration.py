"""Count the passes in place of assuming them: one training step finds, repairs and corrects."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from momentum_fix.engine import watch_backward
from momentum_fix.layers import (
    Buffers,
    NormLayer,
    batches_counted,
    moved,
    put_back,
    refuse_updating_once,
    snapshot,
    tracked_layers,
)
from momentum_fix.model import Passes, correct, corrected_for, uncorrected_momentum
from momentum_fix.tables import aligned, number


@dataclass(frozen=True)
class Row:
    """What one layer did in the calibrated step; passes is None where they could not be counted."""

    name: str
    layer_class: str
    passes: Passes | None
    note: str
    momentum: float | None
    corrected: float | None

    def cells(self) -> tuple[str, ...]:
        """Give the row's text: layer, class, passes, momentum, corrected momentum, note."""
        passes = "?" if self.passes is None else str(self.passes)
        momenta = number(self.momentum), number(self.corrected)
        return self.name or "(the model)", self.layer_class, passes, *momenta, self.note


@dataclass(eq=False)
class Report(Mapping[str, Passes]):
    """What `calibrate` found: `rows`, one a layer; a mapping from layer to passes, for `correct`; a table in print.

    A layer whose passes are unknown has a row, but is not in the mapping.
    """

    rows: tuple[Row, ...] = ()

    @property
    def passes(self) -> dict[str, Passes]:
        """The mapping as a dictionary, to keep beside a state dict."""
        return {row.name: row.passes for row in self.rows if row.passes is not None}

    def __getitem__(self, name: str) -> Passes:
        return self.passes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def __str__(self) -> str:
        if not self.rows:
            return "no layer with running statistics has been calibrated"
        header = ("layer", "class", "passes", "momentum", "corrected", "note")
        return aligned([header, *(row.cells() for row in self.rows)])


@contextmanager
def calibrate(model: nn.Module) -> Iterator[Report]:
    """Count each layer's passes in one training step, undo what they spoilt, and set each momentum.

        m' = 1 - (1 - m)**(1 / k),  k = updates of the layer's running statistics per batch

    Put one ordinary training step inside the block: forward and backward, as many micro-batches as you like,
    the optimizer's step inside or after. An update outside a backward pass is a batch; an update inside one is
    a recomputation. Recomputations are counted and then undone, to the bit, so the step leaves the statistics
    of a step without checkpointing. On leaving the block each layer's momentum is corrected for its own k.

    Exact for: layers whose k updates for one batch follow one another, with the same k in every step; then
    running_mean and running_var stay those of the uncheckpointed run to rounding. Not for: passes of several
    batches in turn (two forwards before one backward, a layer called twice), or k that differs from batch to
    batch: there the old value decays as it should (k is their mean), the shares of the batches differ, and a
    warning names the layers. `num_batches_tracked` goes on counting passes after the calibrated step. A
    training-mode forward that you run yourself inside a backward hook counts as a recomputation.

    Layers with one pass per batch, without running statistics, in evaluation mode or with `momentum=None` are
    left alone; a layer that did not run is reported and left alone. Calibrate again when the model, its
    checkpointing or its compilation changes. Momentum is not in a state dict: keep `report.passes` and hand it to
    `correct` when you rebuild the model. In a distributed run every rank has to calibrate, and the same step: ranks
    whose models have the same layers exchange what they have counted, and set the same momentum.

    Args:
        model: any module; every layer below it that tracks running statistics is watched.

    Yields:
        A `Report`, filled on leaving the block.

    Raises:
        ValueError: a layer's momentum is outside 0 to 1, or `update_once` covers the layer (on entry; the model
            is left as it was).
        RuntimeError: the ranks of a distributed run have counted different passes (on leaving the block; no
            momentum is changed).

    Warns:
        UserWarning: only the decay could be corrected, or passes could not be counted.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> with calibrate(model) as report:
        ...     checkpoint(model, torch.rand(8, 3), use_reentrant=False).sum().backward()
        >>> print(report)
        layer  class        passes  momentum  corrected  note
        1      BatchNorm1d  2       0.1       0.0513167

    Source: the closed form for two passes, discuss.pytorch.org/t/17738 (2018).
    """
    names = tracked_layers(model)
    before = {layer: layer.momentum for layer in names}
    momenta = {layer: uncorrected_momentum(model, layer, aliases) for layer, aliases in names.items()}
    for layer, momentum in momenta.items():
        refuse_updating_once(layer, names[layer])
        corrected_for(names[layer][0], momentum, 2)  # refuse what cannot be corrected before anything is changed
    counts = {layer: _Count(layer) for layer in names}
    report = Report()
    backwards = 0

    def forward_ended() -> None:
        for count in counts.values():
            count.forward_ended()

    def backward_ended() -> None:
        nonlocal backwards
        backwards += 1
        for count in counts.values():
            count.backward_ended()

    hooks = [layer.register_forward_hook(counts[layer].called) for layer in names if not _counts_itself(layer)]
    for layer, momentum in momenta.items():
        layer.momentum = momentum  # so that the forward updates of an already corrected layer are right as well
    try:
        with watch_backward(forward_ended, backward_ended):
            yield report
        forward_ended()
    finally:
        for hook in hooks:
            hook.remove()
        for layer, momentum in momenta.items():
            if layer.momentum is momentum:
                layer.momentum = before[layer]

    found = _agreed({names[layer][0]: count.finding(backwards > 0) for layer, count in counts.items()})
    _warn({name: note for name, (_, note) in found.items()})
    uncorrected = {names[layer][0]: uncorrected_momentum(model, layer, names[layer]) for layer in names}
    correct(model, {name: passes for name, (passes, _) in found.items() if passes is not None})
    report.rows = tuple(
        Row(name, type(layer).__name__, *found[name], uncorrected[name], layer.momentum)
        for name, layer in ((aliases[0], layer) for layer, aliases in names.items())
    )


Findings: TypeAlias = dict[str, tuple[Passes | None, str]]  # by layer: passes, and what there is to say about them


def _agreed(found: Findings) -> Findings:
    """In a distributed run, give the passes that any rank has counted; raise if ranks have counted differently.

    Ranks whose layers have other names hold other models (stages of a pipeline) and have nothing to agree on.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return found
    everyone: list[Findings] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    alike = {rank: its for rank, its in enumerate(everyone) if its.keys() == found.keys()}
    agreed = {}
    for name, mine in found.items():
        by_rank = {rank: its[name][0] for rank, its in alike.items() if its[name][0] is not None}
        if len(set(by_rank.values())) > 1:
            counted = ", ".join(f"{passes} on rank {rank}" for rank, passes in by_rank.items())
            raise RuntimeError(
                f"the ranks have counted different passes in layer {name!r}: {counted}. No momentum is right for all: "
                "run the same checkpointing on every rank, or use update_once(model)"
            )
        agreed[name] = mine if mine[0] is not None or not by_rank else (next(iter(by_rank.values())), _OTHER_RANK)
    return agreed


_OTHER_RANK = "as counted on another rank"
_NOT_CONSECUTIVE = "only the decay is right: the passes of a batch do not follow one another, or their number varies"
_UNCOUNTED = "not corrected: updated in compiled code that counts neither batches nor calls"
_EXACT = "; exact: `restore(model)`, then `update_once(model)`"
_FORWARD_OUTSIDE = "not corrected: recomputed, but its forward pass ran outside the block"
_NO_BACKWARD = "not corrected: no backward pass ran in the block, so recomputations could not be counted"
_CUMULATIVE = "left alone: equal passes do not change a cumulative average"
_EVALUATION = "left alone: in evaluation mode"
_IDLE = "left alone: did not run"


class _Count:
    """The updates of one layer in the order in which they came."""

    def __init__(self, layer: NormLayer) -> None:
        self.layer = layer
        self.groups: list[list[int]] = []  # [forward updates, recomputations that came after them], in turn
        self.countable = True
        self.look()

    def look(self) -> None:
        """Take the present state as the one to count from and to go back to."""
        self.calls, self.counted, self.saved = 0, batches_counted(self.layer), snapshot(self.layer)

    def called(self, module: nn.Module, *_: Any) -> None:
        if module.training and not torch.compiler.is_compiling():
            self.calls += 1

    def updates(self) -> int | None:
        """Count the updates since the last look; None if compiled code made some and nothing has counted them."""
        counted = batches_counted(self.layer) - self.counted or self.calls
        return counted if counted or _counts_itself(self.layer) or not moved(self.layer, self.saved) else None

    def forward_ended(self) -> None:
        updates = self.updates()
        if updates != 0:
            self.groups.append([updates or 1, 0])  # `_replays` finds out whether 1 is true
            self.start = self.saved
        self.look()

    def backward_ended(self) -> None:
        cumulative = self.layer.momentum is None  # equal passes leave it right, its count included
        updates = self.updates() if cumulative or moved(self.layer, self.saved) else 0
        if updates is None:
            updates = _replays(self.start, self.saved, snapshot(self.layer), self.layer.momentum) if self.groups else 0
            self.countable = self.countable and updates > 0
        if updates:
            self.groups = self.groups or [[0, 0]]
            self.groups[-1][1] += updates
        if not cumulative:
            put_back(self.layer, self.saved)
        self.look()

    def finding(self, backward_ran: bool) -> tuple[Passes | None, str]:
        """Give the passes per batch, None where they are not known, and what there is to say about it."""
        forward, again = (sum(column) for column in zip([0, 0], *self.groups, strict=True))
        if not forward and not again:
            return None, _IDLE if self.layer.training else _EVALUATION
        if not backward_ran:
            return None, _NO_BACKWARD
        if not forward:
            return None, _FORWARD_OUTSIDE
        if not self.countable:
            return None, _UNCOUNTED
        mean = Fraction(forward + again, forward)
        passes = int(mean) if mean.denominator == 1 else mean
        if self.layer.momentum is None:
            return passes, _CUMULATIVE
        consecutive = not again or self.groups == [[1, again // forward]] * forward
        return passes, "" if consecutive else _NOT_CONSECUTIVE


def _counts_itself(layer: nn.Module) -> bool:
    """Tell whether the layer's forward keeps num_batches_tracked, in compiled code too, as torch's BatchNorm does."""
    return type(layer).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def _replays(start: Buffers, forward: Buffers, after: Buffers, momentum: float | None) -> int:
    """Work out how many updates lie between `forward` and `after` if one batch made them all; 0 if it did not.

    One update from `start` to `forward` gives away the batch's statistics b; r more of the same batch bring the
    buffers to b + (1 - m)**r * (forward - b).
    """
    if momentum is None or not 0 < momentum < 1 or start.keys() != forward.keys():
        return 0
    x0, x1, x2 = (
        torch.cat([buffers[name].double().flatten() for name in forward if name.startswith("running_")])
        for buffers in (start, forward, after)
    )
    batch = x0 + (x1 - x0) / momentum
    distance = (x1 - batch).norm()
    ratio = float((x2 - batch) @ (x1 - batch) / distance**2)
    replays = round(math.log(ratio) / math.log1p(-momentum)) if 0 < ratio < 1 else 0
    misfit = (x2 - batch - (1 - momentum) ** replays * (x1 - batch)).norm()
    return replays if misfit < 0.01 * momentum * distance else 0


def _warn(notes: dict[str, str]) -> None:
    for note in (_NOT_CONSECUTIVE, _UNCOUNTED, _FORWARD_OUTSIDE, _NO_BACKWARD):
        names = [name or "(the model)" for name, of_layer in notes.items() if of_layer == note]
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            remedy = _EXACT if note in (_NOT_CONSECUTIVE, _UNCOUNTED) else ""
            warnings.warn(f"{note}{remedy}. Layers: {shown}.", UserWarning, stacklevel=4)
