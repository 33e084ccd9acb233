"""The forward of a covered layer: a pass moves the layer's buffers, a replay moves copies of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from momentum_fix.norms.layers import Buffers, NormLayer, the, tracks
from momentum_fix.recomputation import replaying, selective, unseen

_NEED_NO_COUNTER = (_BatchNorm.forward, _InstanceNorm.forward)  # SyncBatchNorm insists on num_batches_tracked
_COVERING = "_momentum_fix_covering"  # on a layer: what covers it, to be found though something has wrapped its forward
_ONLY_WRITE = (*_NEED_NO_COUNTER, nn.SyncBatchNorm.forward)
_TIMMS = ("BatchNormAct2d.forward", "SyncBatchNormAct.forward")  # torch's, with an activation; in timm.layers.norm_act


class Covering:
    """Covers one layer. Bound methods of one class let Dynamo compile equal layers once.

    The layer itself runs, so that whatever its forward leaves on it is found there. Only its buffers, and those of the
    modules below it, are others during a replay.
    """

    def __init__(self, layer: NormLayer, name: str) -> None:
        self.layer, self.name = layer, name
        self.inner = layer.forward if has_foreign_forward(layer) else None
        # Whether a training-mode pass since the last replay has moved the statistics; None before there was one.
        # Something may switch tracking off in the forward pass, and count on the replay to move them.
        self.moves: bool | None = None
        self.replays_began = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer; in a replay, on other buffers than its own."""
        if torch.compiler.is_dynamo_compiling():  # torch.export by itself does not: it is given a forward pass
            return self._compiled(*args, **kwargs)
        if not replaying():
            if self.layer.training and (self.replays_began or not self.moves):
                if self.moves is None:
                    self.begin()
                self.moves, self.replays_began = tracks(self.layer), False
            return self.passed(*args, **kwargs)
        if self.moves is False and tracks(self.layer):
            return self.left_alone(*args, **kwargs)
        self.replays_began = vars(self.layer).get("track_running_stats", True)
        if not self.replays_began:  # whoever switches tracking off keeps it off: nobody counts on the replay
            self.moves = True
        return self.replayed(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run what the layer would run if it were not covered; a lazy layer changes its class at its first batch."""
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.layer).forward(self.layer, *args, **kwargs)

    passed = left_alone = run

    def begin(self) -> None:
        """Be told of the first pass in training mode."""

    def replayed(self, *args: Any, **kwargs: Any) -> Any:
        """Run on copies, or, where the buffers are only written, on scratch; of the same shapes either way.

        A checkpoint compares the tensors that are saved for backward; and it can stop a replay by an exception.
        """
        layer, own = self.layer, self.layer._buffers
        scratch_will_do = self.inner is None and type(layer).forward in _NEED_NO_COUNTER and not selective()
        if not scratch_will_do or own.get("running_mean") is None or own.get("running_var") is None:
            with on_copies(layer):
                return self.run(*args, **kwargs)
        if not layer.training:
            return self.run(*args, **kwargs)
        layer.__dict__["_buffers"] = _scratch(own)
        try:
            return self.run(*args, **kwargs)
        finally:
            layer.__dict__["_buffers"] = own

    def _compiled(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the buffers, and take back what has changed in them if that turns out to be a replay."""
        if not self.layer.training:
            return self.run(*args, **kwargs)
        if self.layer.momentum is None:
            return self._in_eager(*args, **kwargs)
        own = [module._buffers for module in self.layer.modules()]
        before = [(buffers, name, b, b.clone()) for buffers in own for name, b in buffers.items() if b is not None]
        undo = torch.ops.momentum_fix.replaying(before[0][2])
        self.compiled(undo)
        output = self.run(*args, **kwargs)
        for buffers, name, buffer, value in before:
            if buffers[name] is buffer:
                # Unseen by autograd, which may have saved the buffer: the gradient does not use its value.
                buffer.data.copy_(torch.where(undo, value, buffer))
            else:  # the class assigns new buffers
                buffers[name] = torch.where(undo, value, buffers[name])
        return output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _in_eager(self, *args: Any, **kwargs: Any) -> Any:
        """Run between two graphs what torch does not compile: a cumulative average, which reads its counter."""
        return self.forward(*args, **kwargs)

    def compiled(self, replay: torch.Tensor) -> None:
        """Hear, in compiled code, of a pass and whether it is a replay; `calibrate` counts it."""

    def take_off(self) -> None:
        """Give the layer back the forward that it had."""
        if self.layer.__dict__.pop(_COVERING, None) is not None:
            if self.inner is None:
                del self.layer.forward
            else:
                self.layer.forward = self.inner


def cover(coverings: Sequence[Covering]) -> None:
    """Put each on its layer: all, or, if a class refuses the attribute, none."""
    try:
        for each in coverings:
            each.layer.forward = each.forward
            each.layer.__dict__[_COVERING] = each
    except Exception:
        for each in coverings:
            each.take_off()
        raise


def uncover(coverings: Iterable[Covering]) -> None:
    """Take each off its layer, or, if something else has wrapped a layer's forward since, none."""
    coverings = [each for each in coverings if covering(each.layer) is each]
    for each in coverings:
        refuse_foreign_forward(each.layer, each.name)
    for each in coverings:
        each.take_off()


def covering(layer: nn.Module) -> Covering | None:
    """Give what covers the layer. A `copy.copy` shares the attribute of the original, but is not covered."""
    each: Covering | None = vars(layer).get(_COVERING)
    return each if each is not None and each.layer is layer and "forward" in vars(layer) else None


def only_writes(layer: nn.Module) -> bool:
    """Tell whether a layer's class is known, torch's own or timm's: its output in training reads no statistics."""
    forward: Any = type(layer).forward
    timms = getattr(forward, "__module__", "") == "timm.layers.norm_act" and forward.__qualname__ in _TIMMS
    return timms or forward in _ONLY_WRITE


def has_foreign_forward(layer: nn.Module) -> bool:
    """Tell whether something else has given the layer a forward of its own."""
    forward = vars(layer).get("forward")
    return forward is not None and not isinstance(getattr(forward, "__self__", None), Covering)


def refuse_foreign_forward(layer: nn.Module, name: str) -> None:
    """Raise if something else has given the layer a forward of its own."""
    if has_foreign_forward(layer):
        raise ValueError(
            f"{the(name)} has a forward of its own, {layer.forward!r}, put there by something else: remove that "
            "first, and put it back afterwards"
        )


@contextmanager
def on_copies(layer: nn.Module) -> Iterator[None]:
    """Let the layer, and the modules below it, work on copies of their buffers, written to or replaced."""
    own = [(module, module._buffers) for module in layer.modules()]
    with unseen():
        copies = [{name: b if b is None else b.clone() for name, b in buffers.items()} for _, buffers in own]
    for (module, _), copied in zip(own, copies, strict=True):
        module.__dict__["_buffers"] = copied
    try:
        yield
    finally:
        for module, buffers in own:
            module.__dict__["_buffers"] = buffers


def _scratch(own: dict[str, Any]) -> Buffers:
    """Give what a forward that only writes needs, which is cheaper than copies: statistics unset, nothing to count."""
    mean, var = torch.empty_like(own["running_mean"]), torch.empty_like(own["running_var"])
    return {**own, "running_mean": mean, "running_var": var, "num_batches_tracked": None}
