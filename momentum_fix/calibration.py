"""Count the passes in place of assuming them: one training step finds, repairs and corrects."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch.distributed as dist
from torch import nn

from momentum_fix.counting import (
    NO_BACKWARD,
    NOT_CONSECUTIVE,
    ONLY_BACKWARD,
    OTHER_RANK,
    UNCOUNTED,
    UNEQUAL,
    Count,
    counts_itself,
)
from momentum_fix.engine import watch_backward
from momentum_fix.layers import NormLayer, refuse_updating_once, tracked_layers
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
    passes: dict[str, Passes] = field(default_factory=dict)  # the mapping, to keep beside a state dict

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


_under_way: set[NormLayer] = set()  # the layers that a block is calibrating


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
        ValueError: a layer's momentum is outside 0 to 1, `update_once` covers the layer, or another block is
            calibrating it (on entry; the model is left as it was).
        TypeError: model is no module, or TorchScript (likewise).
        RuntimeError: the ranks of a distributed run have counted different passes (on leaving the block; no
            momentum is changed).

    Warns:
        UserWarning: only the decay could be corrected, or passes could not be counted.

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
    names = tracked_layers(model)
    before = {layer: layer.momentum for layer in names}
    momenta = {layer: uncorrected_momentum(model, layer, aliases) for layer, aliases in names.items()}
    for layer, momentum in momenta.items():
        if layer in _under_way:
            raise ValueError(f"layer {names[layer][0]!r} is being calibrated already: calibrate it in one block only")
        refuse_updating_once(layer, names[layer])
        corrected_for(names[layer][0], momentum, 2)  # refuse what cannot be corrected before anything is changed
    counts = {layer: Count(layer) for layer in names}
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

    hooks = []
    _under_way.update(names)
    try:
        for layer, momentum in momenta.items():
            layer.momentum = momentum  # so that the forward updates of an already corrected layer are right as well
            if not counts_itself(layer):
                hooks.append(layer.register_forward_hook(counts[layer].called))
        with watch_backward(forward_ended, backward_ended):
            yield report
        forward_ended()
    finally:
        _under_way.difference_update(names)
        for hook in hooks:
            hook.remove()
        for layer, momentum in momenta.items():
            if layer.momentum is momentum and before[layer] is not momentum:  # `is`: the step has not set it
                layer.momentum = before[layer]

    found = _agreed({names[layer][0]: count.finding(backwards > 0) for layer, count in counts.items()})
    _warn({name: note for name, (_, note) in found.items()})
    uncorrected = {names[layer][0]: uncorrected_momentum(model, layer, names[layer]) for layer in names}
    passes = {name: passes for name, (passes, _) in found.items() if passes is not None}
    correct(model, passes)
    report.passes = passes
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
        agreed[name] = mine if mine[0] is not None or not by_rank else (next(iter(by_rank.values())), OTHER_RANK)
    return agreed


_EXACT = "; exact: `restore(model)`, then `update_once(model)`"
_WARNED = {NOT_CONSECUTIVE: _EXACT, UNCOUNTED: _EXACT, UNEQUAL: _EXACT, ONLY_BACKWARD: "", NO_BACKWARD: ""}


def _warn(notes: dict[str, str]) -> None:
    for note, remedy in _WARNED.items():
        names = [name or "(the model)" for name, of_layer in notes.items() if of_layer == note]
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            warnings.warn(f"{note}{remedy}. Layers: {shown}.", UserWarning, stacklevel=4)
