"""The forward that a tool puts on a layer: a forward pass updates the layer's buffers, a recomputation others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from momentum_fix._torch import hidden_from_modes, is_watched_by_mode
from momentum_fix.norms.layers import NormLayer, describe_layer, norm_of, tracks
from momentum_fix.recomputation import is_preserved, is_recomputation

_WRAPPER = "_momentum_fix_wrapper"  # on a layer: its wrapper, to be found though something has wrapped its forward
_REFUSALS = {
    "update_once": "moves its statistics once per batch, by update_once, so there is nothing to correct: "
    "first call restore(model), or remove() on the handle from update_once",
    "calibrate": "is being calibrated: leave the `with calibrate(...)` block first",
}


class ForwardWrapper:
    """Wraps one layer's forward. Bound methods of one class let Dynamo compile equal layers once.

    The layer itself runs, so that whatever its forward leaves on it is found there. Only its buffers, and those of the
    modules below it, are others during a recomputation.
    """

    tool = ""  # which has put it on the layer
    ended = False  # whether it does nothing any more, and goes as soon as nothing else is around it

    def __init__(self, layer: NormLayer, name: str) -> None:
        self.layer, self.name = layer, name
        self.inner = layer.forward if has_foreign_forward(layer) else None
        # Whether a forward pass in training mode has updated the statistics since the last recomputation began; None
        # before the first one. Something may switch tracking off in it, and rely on the recomputation to update them.
        self.updated: bool | None = None
        self.recomputed = False  # whether a recomputation has begun since the last forward pass

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer; in a recomputation, on other buffers than its own."""
        if torch.compiler.is_dynamo_compiling():  # torch.export by itself does not: it is given a forward pass
            return self._compiled(*args, **kwargs)
        layer = self.layer
        if self.ended or is_preserved(layer):  # its buffers are copies already, which something else may read
            return self.run(*args, **kwargs)
        if not is_recomputation():
            if layer.training:
                if self.updated is None:
                    self.before_first_pass()
                self.updated, self.recomputed = (self.updated and not self.recomputed) or tracks(layer), False
            return self.in_forward(*args, **kwargs)
        if self.updated is False and tracks(layer):
            return self.in_recomputation_alone(*args, **kwargs)
        self.recomputed = vars(layer).get("track_running_stats", True)
        if not self.recomputed:  # whoever has switched tracking off keeps it off, and does not rely on this
            self.updated = True
        return self.in_recomputation(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run what the layer would run without the wrapper; a lazy layer changes its class at its first batch."""
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.layer).forward(self.layer, *args, **kwargs)

    def before_first_pass(self) -> None:
        """Do what is to be done before the first forward pass in training mode."""

    def log_compiled(self, answer: torch.Tensor) -> None:
        """Note, in compiled code, that the layer runs, and whether that is a recomputation."""

    in_forward = run
    in_recomputation_alone = run  # the update of a layer that the forward pass has not updated

    def in_recomputation(self, *args: Any, **kwargs: Any) -> Any:
        """Run on copies of the buffers, or, where they are only written, on others without values, which is cheaper.

        Their shapes are the same: a checkpoint compares what is saved for backward, and may stop this by an exception.
        """
        layer, own, norm = self.layer, self.layer._buffers, norm_of(self.layer)
        is_torchs = type(layer).__module__.startswith("torch.nn.modules.") and self.inner is None
        unread = is_torchs and layer.training and not (norm.reads_them or norm.needs_counter)
        if not unread or is_watched_by_mode():
            with on_copies(layer):
                return self.run(*args, **kwargs)
        layer.__dict__["_buffers"] = {
            name: torch.empty_like(b) if b is not None and name in norm.statistics else None for name, b in own.items()
        }
        try:
            return self.run(*args, **kwargs)
        finally:
            layer.__dict__["_buffers"] = own

    def _compiled(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the buffers, and undo what has changed in them if that turns out to be a recomputation."""
        if self.ended or not self.layer.training:
            return self.run(*args, **kwargs)
        if self.layer.momentum is None:
            return self._in_eager(*args, **kwargs)
        own = [module._buffers for module in self.layer.modules()]
        before = [(buffers, name, b, b.clone()) for buffers in own for name, b in buffers.items() if b is not None]
        answer = torch.ops.momentum_fix.recomputing(before[0][2])
        undo = answer == 1  # what preserves state has put copies here already
        self.log_compiled(answer)
        output = self.run(*args, **kwargs)
        for buffers, name, buffer, value in before:
            if buffers[name] is buffer:
                # Hidden from autograd, which may have saved the buffer: the gradient does not use its value.
                buffer.data.copy_(torch.where(undo, value, buffer))
            else:  # the class assigns new buffers
                buffers[name] = torch.where(undo, value, buffers[name])
        return output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _in_eager(self, *args: Any, **kwargs: Any) -> Any:
        """Run between two graphs what torch does not compile: a cumulative average, which reads its counter."""
        return self.forward(*args, **kwargs)

    def remove(self) -> None:
        """Give the layer back the forward that it had."""
        del self.layer.__dict__[_WRAPPER]
        if self.inner is None:
            del self.layer.forward
        else:
            self.layer.forward = self.inner


def wrap(wrappers: Sequence[ForwardWrapper]) -> None:
    """Put each on its layer: all, or, if a class refuses the attribute, none."""
    with ExitStack() as undo:
        for each in wrappers:
            each.layer.forward = each.forward
            each.layer.__dict__[_WRAPPER] = each
            undo.callback(each.remove)
        undo.pop_all()


def unwrap(wrappers: Iterable[ForwardWrapper]) -> None:
    """Take each off its layer, or, if something else has wrapped a layer's forward since, none."""
    wrappers = [each for each in wrappers if wrapper_of(each.layer) is each]
    for each in wrappers:
        refuse_foreign_forward(each.layer, each.name)
    for each in wrappers:
        each.remove()


def end(wrappers: Iterable[ForwardWrapper]) -> None:
    """Take each off its layer. If something else has wrapped the layer's forward since, let it do nothing, and raise.

    It is taken off when a tool looks for it after the other one has gone.
    """
    wrappers = [each for each in wrappers if wrapper_of(each.layer) is each]
    for each in wrappers:
        each.ended = True
    unwrap(wrappers)


def wrapper_of(layer: nn.Module) -> ForwardWrapper | None:
    """Give a layer's wrapper. A `copy.copy` shares the attribute of the original, but is not wrapped."""
    wrapper: ForwardWrapper | None = vars(layer).get(_WRAPPER)
    if wrapper is None or wrapper.layer is not layer or "forward" not in vars(layer):
        return None
    if wrapper.ended and not has_foreign_forward(layer):
        wrapper.remove()
        return None
    return wrapper


def refuse_wrapped(layer: nn.Module, name: str, *tools: str) -> None:
    """Raise if one of these tools is on the layer."""
    wrapper = wrapper_of(layer)
    if wrapper is not None and not wrapper.ended and wrapper.tool in tools:
        raise ValueError(f"{describe_layer(name)} {_REFUSALS[wrapper.tool]}")


def has_foreign_forward(layer: nn.Module) -> bool:
    """Tell whether something else has given the layer a forward of its own."""
    forward = vars(layer).get("forward")
    return forward is not None and not isinstance(getattr(forward, "__self__", None), ForwardWrapper)


def refuse_foreign_forward(layer: nn.Module, name: str) -> None:
    """Raise if something else has given the layer a forward of its own."""
    if has_foreign_forward(layer):
        raise ValueError(
            f"{describe_layer(name)} has a forward of its own, {layer.forward!r}, put there by something else: remove "
            "that first, and put it back afterwards"
        )


@contextmanager
def on_copies(layer: nn.Module) -> Iterator[None]:
    """Let the layer, and the modules below it, work on copies of their buffers, written to or replaced."""
    own = [(module, module._buffers) for module in layer.modules()]
    with hidden_from_modes():
        copies = [{name: b if b is None else b.clone() for name, b in buffers.items()} for _, buffers in own]
    for (module, _), buffers in zip(own, copies, strict=True):
        module.__dict__["_buffers"] = buffers
    try:
        yield
    finally:
        for module, buffers in own:
            module.__dict__["_buffers"] = buffers
