"""The updates of one layer in the order in which they came: batches, and recomputations of them."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from momentum_fix.layers import COUNTER, Buffers, NormLayer, batches_counted, moved, put_back, snapshot
from momentum_fix.model import Passes

OTHER_RANK = "as counted on another rank"
NOT_CONSECUTIVE = "only the decay is right: the passes of a batch do not follow one another, or their number varies"
UNCOUNTED = "not corrected: nothing has counted its updates, and they are not of one batch"
UNEQUAL = "not corrected: a cumulative average of batches with different numbers of passes"
ONLY_BACKWARD = "left alone: updated only inside a backward pass, so its batches are not known"
NO_BACKWARD = "not corrected: no backward pass ran in the block, so recomputations could not be counted"
CUMULATIVE = "left alone: equal passes do not change a cumulative average"
EVALUATION = "left alone: in evaluation mode"
IDLE = "left alone: did not run"


class Count:
    """Counts one layer's updates, if told when a run of forward passes and when a backward pass has ended.

    After a backward pass it puts the layer back to where the forward passes had brought it.
    """

    def __init__(self, layer: NormLayer) -> None:
        self.layer = layer
        self.groups: list[list[int]] = []  # [forward updates, recomputations that came after them], in turn
        self.countable = True
        self.look()
        self.start = self.saved  # before the last forward updates

    def look(self) -> None:
        """Take the present state as the one to count from and to go back to."""
        self.calls, self.counted, self.saved = 0, batches_counted(self.layer), snapshot(self.layer)

    def called(self, module: nn.Module, *_: Any) -> None:
        """Count a call, as a forward hook, for a layer that does not count itself."""
        if module.training and not torch.compiler.is_compiling():
            self.calls += 1

    def updates(self) -> int | None:
        """Count the updates since the last look; None if there were some that nothing has counted."""
        counted = batches_counted(self.layer) - self.counted or self.calls
        if counted > 0:
            return counted
        return None if moved(snapshot(self.layer), self.saved) else 0

    def forward_ended(self) -> None:
        updates = self.updates()
        if updates != 0:
            self.groups.append([updates or 1, 0])  # `replays` finds out whether 1 is true
            self.start = self.saved
        self.look()

    def backward_ended(self) -> None:
        updates = self.updates()
        if self.groups and self.layer.momentum is not None:
            seen = replays(self.start, self.saved, snapshot(self.layer), self.layer.momentum, self.groups[-1][0])
            updates = updates if seen is None else seen
        if updates is None:
            self.countable = False
        elif updates:
            self.groups = self.groups or [[0, 0]]
            self.groups[-1][1] += updates
        if self.groups and self.groups[0][0] and self.layer.momentum is not None:  # equal passes keep an average right
            put_back(self.layer, self.saved)
        self.look()

    def finding(self, backward_ran: bool) -> tuple[Passes | None, str]:
        """Give the passes per batch, None where they are not known, and what there is to say about it."""
        forward, again = (sum(column) for column in zip([0, 0], *self.groups, strict=True))
        if not self.countable:
            return None, UNCOUNTED if forward else ONLY_BACKWARD
        if not forward and not again:
            return None, IDLE if self.layer.training else EVALUATION
        if not forward:
            return None, ONLY_BACKWARD
        if not backward_ran:
            return None, NO_BACKWARD
        mean = Fraction(forward + again, forward)
        passes = int(mean) if mean.denominator == 1 else mean
        if self.layer.momentum is None:
            return passes, CUMULATIVE if mean.denominator == 1 else UNEQUAL
        consecutive = not again or self.groups == [[1, again // forward]] * forward
        return passes, "" if consecutive else NOT_CONSECUTIVE


def counts_itself(layer: nn.Module) -> bool:
    """Tell whether the layer's forward keeps num_batches_tracked, in compiled code too, as torch's BatchNorm does."""
    own = type(layer).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return own and layer._buffers.get(COUNTER) is not None


def replays(start: Buffers, forward: Buffers, after: Buffers, momentum: float, batches: int) -> int | None:
    """Read from the statistics how many recomputations lie between `forward` and `after`; None if that cannot be read.

    A counter can miss: InstanceNorm's does not count, and selective checkpointing can replay a forward, counter
    included, with the saved result of the operation that moves the statistics. But one update from `start` to
    `forward` gives away the statistics b of its batch, and r more of the same batch bring the buffers to
    b + (1 - m)**r * (forward - b).

    It cannot be read if several batches were involved, or if the next update would move too little to be seen.
    """
    if not 0 < momentum < 1 or start.keys() != forward.keys():
        return None
    names = [name for name in forward if name.startswith("running_")]
    x0, x1, x2 = (
        torch.cat([buffers[name].double().flatten() for name in names]) for buffers in (start, forward, after)
    )
    noise = 10 * max(torch.finfo(forward[name].dtype).eps for name in names) * x1.norm()
    if torch.equal(x1, x2):
        return 0 if (1 - momentum) * (x1 - x0).norm() > noise else None
    if batches != 1:
        return None
    batch = x0 + (x1 - x0) / momentum
    distance = (x1 - batch).norm()
    ratio = float((x2 - batch) @ (x1 - batch) / distance**2)
    if not 0 < ratio < 1:
        return None
    count = round(math.log(ratio) / math.log1p(-momentum))
    left = (1 - momentum) ** count
    misfit = (x2 - batch - left * (x1 - batch)).norm()
    next_move = momentum * left * distance  # one recomputation more would be off by this
    return count if count and misfit < 0.01 * next_move else None
