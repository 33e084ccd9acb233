"""The updates of one layer's running statistics, in the order in which they came: batches and recomputations."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from fractions import Fraction
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import nn

from momentum_fix._torch import hidden_from_modes, is_watched_by_mode
from momentum_fix.norms.layers import Buffers, NormLayer, norm_of, only_writes, tracks
from momentum_fix.norms.momenta import uncorrected
from momentum_fix.norms.notes import Note
from momentum_fix.norms.wrapping import ForwardWrapper, on_copies, refuse_wrapped

Finding: TypeAlias = tuple[int | Fraction | None, tuple[Note, ...]]  # passes, and what there is to say about them
_SLOTS = 4096


class Count:
    """Counts the updates of one set of statistics, which layers may share."""

    def __init__(self, device: torch.device | None) -> None:
        self.recomputations = [0]  # before the first batch, of one from before the block; and after each batch
        self.other_data = False
        self.added: torch.Tensor | None = None  # what the last batch has added, as far as that can be told
        # What compiled code, which has only tensors, has still to count: how many updates; a 1 or, of a recomputation,
        # a 2 for each of them, and in the last slot the sum of those that there is no slot for.
        self.log = torch.zeros(_SLOTS, dtype=torch.long, device=device)

    def add(self, recomputed: bool, added: torch.Tensor | None = None, noise: float = 0.0) -> None:
        """Count one update, after those of compiled code that came before it."""
        self.drain()
        if recomputed:
            self.recomputations[-1] += 1
            if added is not None and self.added is not None:
                self.other_data |= bool((added - self.added).abs().max() > noise)
        else:
            self.recomputations.append(0)
            self.added = added

    def drain(self) -> None:
        """Count what compiled code has logged."""
        if has_values(self.log) and (updates := int(self.log[0])):
            kinds = self.log[1:].tolist()
            self.log.zero_()
            if (more := updates - len(kinds)) > 0:  # their order is not known
                recomputed = kinds.pop() - more - 1
                kinds += [2] * recomputed + [1] * (more + 1 - recomputed)
            for kind in kinds[:updates]:
                self.add(kind == 2)

    @property
    def batches(self) -> list[int]:
        """Give how often each batch was recomputed."""
        return self.recomputations[1:]

    @property
    def updates(self) -> int:
        """Give the number of all updates."""
        return len(self.batches) + sum(self.recomputations)

    @property
    def passes(self) -> int | Fraction:
        """Give the mean number of updates per batch."""
        mean = 1 + Fraction(sum(self.batches), len(self.batches))
        return int(mean) if mean.denominator == 1 else mean


class CountingForward(ForwardWrapper):
    """The forward of a layer that `calibrate` watches: like that of `update_once`, and it counts."""

    tool = "calibrate"

    def __init__(self, layer: NormLayer, name: str, count: Count) -> None:
        super().__init__(layer, name)
        self.count = count
        self.updated = False  # until the first pass, recomputations of batches from before the block are let through
        self.copies: list[CountingForward] = []
        self.start, self.momentum, self.uncorrected = values_of(layer), layer.momentum, uncorrected(layer)

    def finding(self, backward_ran: bool, kept: bool) -> Finding:
        """Give the passes per batch, None where they are not known, and what there is to say of the layer.

        `kept` tells whether the block has left the layer's momentum as it was.
        """
        layer, count = self.layer, self.count
        if not tracks(layer):
            return None, (Note.UNTRACKED,)
        if not count.updates:
            unseen = have_moved(self.start, layer._buffers)
            return None, (Note.UNSEEN if unseen else Note.IDLE if layer.training else Note.EVALUATION,)
        if not count.batches or not backward_ran:
            return None, (Note.NO_BACKWARD if count.batches else Note.ONLY_BACKWARD,)
        varies = len(set(count.batches)) > 1  # and then, the last batch need not be the one that was recomputed
        if layer.momentum is None:
            first, last = (buffers.get("num_batches_tracked") for buffers in (self.start, layer._buffers))
            # Selective checkpointing recomputes the counter and not the statistics.
            more = has_values(first) and has_values(last) and int(last) - int(first) > count.updates
            equal = Note.PERHAPS_UNEQUAL if varies else Note.CUMULATIVE
            return count.passes, (Note.UNEQUAL if more or isinstance(count.passes, Fraction) else equal,)
        notes = {
            Note.SET_BY_STEP: not kept,
            Note.NOT_CONSECUTIVE: varies,
            Note.OTHER_DATA: count.other_data and not varies,
            Note.MAY_READ: count.passes > 1 and not only_writes(layer),
        }
        return count.passes, tuple(note for note, is_true in notes.items() if is_true)

    def __deepcopy__(self, memo: dict[int, Any]) -> CountingForward:
        """Let a copy of the model that is made in the block be cleaned up with the original."""
        twin = memo[id(self)] = object.__new__(type(self))
        layer, inner = copy.deepcopy((self.layer, self.inner), memo)
        vars(twin).update(vars(self), layer=layer, inner=inner)
        self.copies.append(twin)
        return twin

    def __reduce__(self) -> Any:
        refuse_wrapped(self.layer, self.name, self.tool)  # a model that is pickled now would never be cleaned up

    def log_compiled(self, answer: torch.Tensor) -> None:
        """Log an update for the count, unless it is dropped."""
        log, counts = self.count.log, (answer < 2).long().reshape(1)
        log[:1] += counts
        log.scatter_add_(0, log[:1].clamp(max=_SLOTS - 1), counts * (answer + 1))

    def in_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, and count that."""
        return self._counted(False, *args, **kwargs)

    def in_recomputation_alone(self, *args: Any, **kwargs: Any) -> Any:
        """Let it update the statistics, unless a layer with the same buffers, or compiled code, had a forward pass."""
        with hidden_from_modes():
            self.count.drain()
        if self.count.batches:
            return self.in_recomputation(*args, **kwargs)
        return self._counted(True, *args, **kwargs)

    def in_recomputation(self, *args: Any, **kwargs: Any) -> Any:
        """Run on copies; but in a cumulative average all batches must have equal passes, those in the block too."""
        with nullcontext() if self.layer.momentum is None else on_copies(self.layer):
            return self._counted(True, *args, **kwargs)

    def _counted(self, recomputed: bool, *args: Any, **kwargs: Any) -> Any:
        layer, count = self.layer, self.count
        if not (layer.training and tracks(layer)):
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

    The counter may not tell: it is recomputed also where selective checkpointing gives a norm's saved result. Another
    device or number format is no change.
    """
    pairs = ((b, now.get(name)) for name, b in before.items() if by_counter or name != "num_batches_tracked")
    return any(
        has_values(old) and (new is None or (has_values(new) and not torch.equal(old.to(new), new)))
        for old, new in pairs
    )


def has_values(buffer: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    """Tell whether a tensor is an ordinary one."""
    return type(buffer) is torch.Tensor and not buffer.is_meta and buffer.layout is torch.strided


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
