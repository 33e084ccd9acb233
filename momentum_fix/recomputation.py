"""The one place that knows whether a forward is a recomputation: you say so, or a backward pass is running.

And whether what a recomputation changes is dropped afterwards, as `preserve_state` does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from momentum_fix._torch import is_in_backward


@contextmanager
def recomputing(yes: bool = True) -> Iterator[None]:
    """Declare whether what runs inside, in this thread, is a recomputation, where that cannot be detected.

    Without it, a forward that runs during a backward pass is a recomputation, and any other is not. That is right for
    torch's checkpoint. Use this around a recomputation outside of a backward pass, or by an engine in a thread of its
    own, and `recomputing(False)` around a new batch that you run inside a backward hook. `update_once`, `calibrate` and
    `diagnose` follow it, also in code that was compiled before. Blocks can be nested; the innermost counts.

    Args:
        yes: whether it is a recomputation.

    Raises:
        RuntimeError: the block itself is being compiled, with `fullgraph=True`. Put it around the compiled code.

    Example:
        >>> from momentum_fix import update_once
        >>> layer = nn.BatchNorm1d(3)
        >>> with update_once(layer):
        ...     y = layer(torch.rand(4, 3))
        ...     with recomputing():
        ...         y = layer(torch.rand(4, 3))
        >>> layer.num_batches_tracked
        tensor(1)
    """
    if torch.compiler.is_dynamo_compiling():
        raise RuntimeError(_NOT_COMPILED)
    before, this_thread.declared = this_thread.declared, yes
    try:
        yield
    finally:
        this_thread.declared = before


_NOT_COMPILED = "momentum_fix.recomputing cannot be part of compiled code: put the block around the call of that code"


class _ThisThread(threading.local):
    """What is known in this thread."""

    declared: bool | None = None  # by `recomputing`

    def __init__(self) -> None:
        self.preserving: list[Any] = []  # the recomputations that are running and drop what they change
        self.begun = 0  # how many of them have begun

    def begin_preserving(self, region: Any) -> None:
        """Note that one has begun, and what is asked whether it `holds` a module."""
        self.preserving.append(region)
        self.begun += 1

    def end_preserving(self) -> None:
        """Note that the last one has ended."""
        self.preserving.pop()


this_thread = _ThisThread()


def is_recomputation() -> bool:
    """Tell whether what runs in this thread is a recomputation."""
    declared = this_thread.declared
    return is_in_backward() if declared is None else declared


def is_preserved(module: nn.Module) -> bool:
    """Tell whether a recomputation is running that drops what this module changes."""
    return any(region.holds(module) for region in this_thread.preserving)


# Compiled code is traced before anybody knows what it will be part of, so it asks at run time, by an operator: it gives
# 0 for no recomputation, 1 for one, 2 for one that drops what it changes.


def _ask(buffer: torch.Tensor) -> torch.Tensor:
    answer = is_recomputation() and (2 if this_thread.preserving else 1)
    return torch.full((), int(answer), dtype=torch.long, device=buffer.device)


def _ask_fake(buffer: torch.Tensor) -> torch.Tensor:
    return torch.empty((), dtype=torch.long, device=buffer.device)


if not hasattr(torch.ops.momentum_fix, "recomputing"):  # it is there if this module is imported anew
    torch.library.define("momentum_fix::recomputing", "(Tensor buffer) -> Tensor", tags=torch.Tag.cudagraph_unsafe)
    torch.library.impl("momentum_fix::recomputing", "CompositeExplicitAutograd", _ask)
    torch.library.register_fake("momentum_fix::recomputing", _ask_fake)
