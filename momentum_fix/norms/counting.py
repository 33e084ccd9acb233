"""The updates of one layer's running statistics, in the order in which they came: batches and recomputations."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from torch import nn

from momentum_fix._torch import hidden_from_modes, is_watched_by_mode
from momentum_fix.norms.layers import Buffers, NormLayer, norm_of, only_writes, tracks
from momentum_fix.norms.momenta import uncorrected
from momentum_fix.norms.notes import Note
from momentum_fix.norms.wrapping import ForwardWrapper, on_copies, refuse_wrapped
from momentum_fix.recomputation import counts, is_preserved

Finding: TypeAlias = tuple[int | Fraction | None, tuple[Note, ...]]  # passes, and what there is to say about them


class Count:
    """Counts the updates of one set of statistics, which layers may share."""

    def __init__(self, device: torch.device | None) -> None:
        self.recomputations: list[int] = []  # of each batch, until the next one
        self.early = 0  # before the first batch, of one from before the block
        self.other_data = False
        self.added: torch.Tensor | None = None  # what the last batch has added, as far as that can be told
        self.counter = torch.empty(1, dtype=torch.uint8, device=device)
        if has_values(self.counter):
            counts[self.counter.data_ptr()] = self

    def add(self, recomputed: bool, added: torch.Tensor | None = None, noise: float = 0.0) -> None:
        """Count one update."""
        if not recomputed:
            self.recomputations.append(0)
            self.added = added
        elif not self.recomputations:
            self.early += 1
        else:
            self.recomputations[-1] += 1
            if added is not None and self.added is not None:
                self.other_data |= bool((added - self.added).abs().max() > noise)

    @property
    def updates(self) -> int:
        """Give the number of all updates."""
        return len(self.recomputations) + sum(self.recomputations) + self.early

    @property
    def passes(self) -> int | Fraction:
        """Give the mean number of updates per batch."""
        mean = Fraction(self.updates - self.early, len(self.recomputations))
        return int(mean) if mean.denominator == 1 else mean


class CountingForward(ForwardWrapper):
    """The forward of a layer that `calibrate` watches: like that of `update_once`, and it counts."""

    tool = "calibrate"

    def __init__(self, layer: NormLayer, name: str, count: Count) -> None:
        super().__init__(layer, name)
        self.count, self.counter = count, count.counter
        self.updated = False  # until the first pass, recomputations of batches from before the block are let through
        self.copies: list[CountingForward] = []
        self.start, self.momentum, self.uncorrected = values_of(layer), layer.momentum, uncorrected(layer)

    def finding(self, backward_ran: bool) -> Finding:
        """Give the passes per batch, None where they are not known, and what there is to say of the layer."""
        known = tracks(self.layer) and self.count.recomputations and backward_ran
        return self.count.passes if known else None, tuple(self._notes(backward_ran))

    def _notes(self, backward_ran: bool) -> Iterator[Note]:
        layer, count = self.layer, self.count
        if not tracks(layer):
            yield Note.UNTRACKED
        elif not count.updates:
            if have_moved(self.start, layer._buffers):
                yield Note.UNSEEN
            else:
                yield Note.IDLE if layer.training else Note.EVALUATION
        elif not count.recomputations:
            yield Note.ONLY_BACKWARD
        elif not backward_ran:
            yield Note.NO_BACKWARD
        elif layer.momentum is None:
            counter = layer._buffers.get("num_batches_tracked")
            # Selective checkpointing recomputes the counter and not the statistics.
            more = has_values(counter) and bool(counter - self.start["num_batches_tracked"] > count.updates)
            yield Note.UNEQUAL if more or isinstance(count.passes, Fraction) else Note.CUMULATIVE
        else:
            if layer.momentum != self.uncorrected:
                yield Note.SET_BY_STEP
            if len(set(count.recomputations)) > 1:
                yield Note.NOT_CONSECUTIVE
            if count.other_data:
                yield Note.OTHER_DATA
            if count.passes > 1 and not only_writes(layer):
                yield Note.MAY_READ

    def __deepcopy__(self, memo: dict[int, Any]) -> CountingForward:
        """Let a copy of the model that is made in the block be cleaned up with the original."""
        twin = memo[id(self)] = object.__new__(type(self))
        layer, inner = copy.deepcopy((self.layer, self.inner), memo)
        vars(twin).update(vars(self), layer=layer, inner=inner)
        self.copies.append(twin)
        return twin

    def __reduce__(self) -> Any:
        refuse_wrapped(self.layer, self.name, self.tool)  # a model that is pickled now would never be cleaned up

    def in_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, and count that."""
        return self._counted(False, *args, **kwargs)

    def in_recomputation_alone(self, *args: Any, **kwargs: Any) -> Any:
        """Let it update the statistics, unless a layer with the same buffers, or compiled code, had a forward pass."""
        if self.count.recomputations:
            return self.in_recomputation(*args, **kwargs)
        return self._counted(True, *args, **kwargs)

    def in_recomputation(self, *args: Any, **kwargs: Any) -> Any:
        """Run on copies; but in a cumulative average all batches must have equal passes, those in the block too."""
        with nullcontext() if self.layer.momentum is None else on_copies(self.layer):
            return self._counted(True, *args, **kwargs)

    def _counted(self, recomputed: bool, *args: Any, **kwargs: Any) -> Any:
        layer, count = self.layer, self.count
        if not (layer.training and tracks(layer)) or (recomputed and is_preserved(layer)):
            return self.run(*args, **kwargs)
        with hidden_from_modes():
            before, updates, finished = values_of(layer), count.updates, False
        runs = not is_watched_by_mode()  # which may give a norm's saved result and leave its statistics alone
        try:
            output = self.run(*args, **kwargs)
            finished = runs
            return output
        finally:
            with hidden_from_modes():
                # The first recomputation leaves a cumulative average as it is, and may be stopped: the counter tells.
                by_counter = recomputed and runs and only_writes(layer)
                own = count.updates == updates  # not that of a call within this one, by `self.forward`
                if own and (finished or have_moved(before, layer._buffers, by_counter)):
                    count.add(recomputed, *_added(layer, before))


def values_of(layer: nn.Module) -> Buffers:
    """Copy the layer's buffers that hold values; a lazy layer's do not before its first batch."""
    own: Buffers = layer._buffers
    return {name: b.detach().clone() for name, b in own.items() if b is not None and not nn.parameter.is_lazy(b)}


def have_moved(before: Buffers, now: Buffers, by_counter: bool = False) -> bool:
    """Tell whether the statistics have changed; those without values (on the meta device, fake) never do.

    The counter may not tell: it is recomputed also where selective checkpointing gives a norm's saved result.
    """
    held = (k for k, value in before.items() if has_values(value) and (by_counter or k != "num_batches_tracked"))
    return any(now.get(name) is None or not torch.equal(before[name], now[name]) for name in held)


def has_values(buffer: torch.Tensor | None) -> bool:
    """Tell whether a tensor is an ordinary one."""
    return type(buffer) is torch.Tensor and not buffer.is_meta


def _added(layer: NormLayer, before: Buffers) -> tuple[torch.Tensor | None, float]:
    """Give what the last update has added to the statistics, m times those of its batch, and how exact that is.

    None where that cannot be told: for classes with a rule of their own, and momenta that leave nothing to see.
    """
    m, names = float(layer.momentum or 0), norm_of(layer).statistics
    if not m or not only_writes(layer) or not all(has_values(before.get(name)) for name in names):
        return None, 0.0
    old, new = (torch.cat([buffers[name].flatten() for name in names]) for buffers in (before, layer._buffers))
    noise = 64 * torch.finfo(new.dtype).eps * float(torch.maximum(new.abs(), old.abs()).max())
    return new - (1 - m) * old, noise
