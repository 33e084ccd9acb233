"""The updates of one layer's running statistics in the order in which they came: batches, and replays of them."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from momentum_fix.norms.layers import Buffers, NormLayer, tracks
from momentum_fix.norms.momenta import uncorrected
from momentum_fix.norms.update_once import Once
from momentum_fix.norms.wrapping import Covering, on_copies, only_writes
from momentum_fix.recomputation import is_preserved, selective, unseen

_EXACT = "; exact: `restore(model)`, then `update_once(model)`"
NOT_CONSECUTIVE = "only the decay is right: the passes of a batch do not follow one another, or their number varies"
OTHER_DATA = "only the decay is right: a replay saw different data than its forward pass (random state not preserved?)"
SET_BY_STEP = "the step itself sets the momentum (a schedule, SAM), so a corrected one does not last"
UNEQUAL = "not corrected: a cumulative average of batches with different numbers of passes"
UNSEEN = "not corrected: its statistics moved, but its forward did not run (F.batch_norm on its buffers?)"
NO_BACKWARD = "not corrected: no backward pass was seen in the block, so replays could not be counted"
ONLY_BACKWARD = "left alone: updated only inside a backward pass, so its batches are not known"
MAY_READ = "if its output reads its statistics, gradients are wrong: `diagnose(model)` tells you"
CUMULATIVE = "left alone: equal passes do not change a cumulative average"
EVALUATION = "left alone: in evaluation mode"
IDLE = "left alone: did not run"
UNTRACKED = "left alone: no longer tracks running statistics"
WARNED = dict.fromkeys((NOT_CONSECUTIVE, OTHER_DATA, SET_BY_STEP, UNEQUAL), _EXACT) | dict.fromkeys(
    (UNSEEN, NO_BACKWARD, ONLY_BACKWARD), ""
)  # with the remedy

_SLOTS = 1024


class Count:
    """Counts the updates of one set of statistics, which layers may share."""

    def __init__(self, device: torch.device | None) -> None:
        self.heard: list[int] = []  # a number a batch: replays between it and the next batch
        self.early = 0  # replays before the first batch, of one from before the block
        # The same for compiled code, which can count in a tensor only: batches, early replays, then a number a batch.
        self.tally = torch.zeros(_SLOTS, dtype=torch.long, device=device)
        self.other_data = False
        self.added: torch.Tensor | None = None  # what the last batch has added, as far as that can be told

    def hear(self, replay: bool, added: torch.Tensor | None, noise: float) -> None:
        """Count one update."""
        self.drain()
        if not replay:
            self.heard.append(0)
            self.added = added
        elif not self.heard:
            self.early += 1
        else:
            self.heard[-1] += 1
            if added is not None and self.added is not None:
                self.other_data |= bool((added - self.added).abs().max() > noise)

    def drain(self) -> None:
        """Add what compiled code has counted since this was last done."""
        if not has_values(self.tally):
            return
        batches, before_them, *replays = self.tally.tolist()
        if batches:
            self.added = None  # of the last of them that is not known
        if self.heard:
            self.heard[-1] += before_them
        else:
            self.early += before_them
        self.heard += (replays + [0] * batches)[:batches]  # replays of very many batches are in the last slot
        self.tally.zero_()

    @property
    def updates(self) -> int:
        """Give the number of all updates."""
        return len(self.heard) + sum(self.heard) + self.early

    @property
    def passes(self) -> int | Fraction:
        """Give the mean number of updates per batch."""
        mean = Fraction(len(self.heard) + sum(self.heard), len(self.heard))
        return int(mean) if mean.denominator == 1 else mean


class Counted(Covering):
    """The forward of a layer that `calibrate` watches: like that of `update_once`, and it tells a `Count`."""

    def __init__(self, layer: NormLayer, name: str, count: Count) -> None:
        super().__init__(layer, name)
        self.count = count
        self.moves = False  # until the first pass, replays of batches from before the block are let through
        self.copies: list[Counted] = []
        self.start, self.before, self.momentum = copied(layer), layer.momentum, uncorrected(layer)

    def finding(self, backward_ran: bool) -> tuple[int | Fraction | None, str]:
        """Give the passes per batch, None where they are not known, and what there is to say about it."""
        layer, count = self.layer, self.count
        if not tracks(layer):
            return None, UNTRACKED
        if not count.heard and not count.early:
            if moved(self.start, layer._buffers):
                return None, UNSEEN
            return None, IDLE if layer.training else EVALUATION
        if not count.heard:
            return None, ONLY_BACKWARD
        if not backward_ran:
            return None, NO_BACKWARD
        if layer.momentum is None:
            counter = layer._buffers.get("num_batches_tracked")
            if has_values(counter) and counter - self.start["num_batches_tracked"] > count.updates:
                return count.passes, UNEQUAL  # selective checkpointing replays the counter and not the statistics
            return count.passes, CUMULATIVE if isinstance(count.passes, int) else UNEQUAL
        if layer.momentum != self.momentum:
            return count.passes, SET_BY_STEP
        if len(set(count.heard)) > 1:
            return count.passes, NOT_CONSECUTIVE
        if count.other_data:
            return count.passes, OTHER_DATA
        return count.passes, MAY_READ if count.passes > 1 and not only_writes(layer) else ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Counted:
        """Let a copy of the model that is made in the block be cleaned up with the original."""
        twin = memo[id(self)] = object.__new__(type(self))
        layer, inner = copy.deepcopy((self.layer, self.inner), memo)
        vars(twin).update(vars(self), layer=layer, inner=inner)
        self.copies.append(twin)
        return twin

    def __reduce__(self) -> tuple[type[Once], tuple[Any, str]]:
        """Let a model that is pickled in the block be a model that is updated once."""
        return Once, (self.layer, self.name)

    def passed(self, *args: Any, **kwargs: Any) -> Any:
        return self._heard(False, *args, **kwargs)

    def left_alone(self, *args: Any, **kwargs: Any) -> Any:
        with unseen():
            self.count.drain()
        if self.count.heard:  # a pass that ran in compiled code, or one of a layer with the same buffers
            return self.replayed(*args, **kwargs)
        return self._heard(True, *args, **kwargs)

    def replayed(self, *args: Any, **kwargs: Any) -> Any:
        if self.layer.momentum is None:  # in a cumulative average all batches must have equal passes, this one too
            return self._heard(True, *args, **kwargs)
        with on_copies(self.layer):
            return self._heard(True, *args, **kwargs)

    def compiled(self, replay: torch.Tensor) -> None:
        tally = self.count.tally
        again = torch.ops.momentum_fix.replaying(tally, dropped=False).long().reshape(1)
        tally[:1] += 1 - replay.long().reshape(1)
        tally.scatter_add_(0, (tally[:1] + 1).clamp(max=_SLOTS - 1), again)

    def _heard(self, replay: bool, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        if not (layer.training and tracks(layer)) or (replay and is_preserved(layer)):
            return self.run(*args, **kwargs)
        with unseen():
            before, counted, finished = copied(layer), self.count.updates, False
        runs = not selective()  # which may give a norm's saved result and leave its statistics alone
        try:
            output = self.run(*args, **kwargs)
            finished = runs
            return output
        finally:
            with unseen():
                own = self.count.updates == counted  # not that of a call within this one, by `self.forward`
                # The first replay of all leaves a cumulative average as it is, and may be stopped: the counter tells.
                counts = replay and runs and only_writes(layer)
                if own and (finished or moved(before, layer._buffers, counts)):
                    self.count.hear(replay, *_added(layer, before))


def copied(layer: nn.Module) -> Buffers:
    """Copy the layer's buffers that hold values; a lazy layer's do not before its first batch."""
    own: Buffers = layer._buffers
    return {name: b.detach().clone() for name, b in own.items() if b is not None and not nn.parameter.is_lazy(b)}


def moved(before: Buffers, now: Buffers, counts: bool = False) -> bool:
    """Tell whether the statistics have changed; those without values (on the meta device, fake) never do.

    The counter may not tell: it is replayed also where selective checkpointing gives a norm's saved result.
    """
    held = (name for name, value in before.items() if has_values(value) and (counts or name != "num_batches_tracked"))
    return any(now.get(name) is None or not torch.equal(before[name], now[name]) for name in held)


def has_values(buffer: torch.Tensor | None) -> bool:
    return type(buffer) is torch.Tensor and not buffer.is_meta


def _added(layer: NormLayer, before: Buffers) -> tuple[torch.Tensor | None, float]:
    """Give what the last update has added to the statistics, m times those of its batch, and how exact that is.

    None where that cannot be told: for classes with a rule of their own, and momenta that leave nothing to see.
    """
    now, m = layer._buffers, float(layer.momentum or 0)
    names = ("running_mean", "running_var")
    known = only_writes(layer) and all(has_values(before.get(name)) for name in names)
    if not known or not m:
        return None, 0.0
    values = torch.cat([now[name].flatten() for name in names])
    old = torch.cat([before[name].flatten() for name in names])
    noise = 64 * torch.finfo(values.dtype).eps * float(torch.maximum(values.abs(), old.abs()).max())
    return values - (1 - m) * old, noise
