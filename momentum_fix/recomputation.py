"""The one place that knows whether a forward is a replay: it is, if it runs while a backward pass is running.

And whether what a replay changes is dropped afterwards, as `preserve_state` does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode
from torch.utils.module_tracker import ModuleTracker

_tracker = ModuleTracker()


class _Preserved(threading.local):
    """The recomputations that are running in this thread and drop what they change."""

    def __init__(self) -> None:
        self.regions: list[Any] = []
        self.begun = 0

    def begin(self, region: Any) -> None:
        """Hear that one has begun, and what is asked whether it `holds` a module."""
        self.regions.append(region)
        self.begun += 1

    def end(self) -> None:
        """Hear that the last one has ended."""
        self.regions.pop()


preserved = _Preserved()


def replaying() -> bool:
    """Tell whether a backward pass is running in this thread."""
    replay: bool = _tracker.is_bw
    return replay


def is_preserved(module: nn.Module) -> bool:
    """Tell whether a replay is running that drops what this module changes."""
    return any(region.holds(module) for region in preserved.regions)


# Compiled code is traced before anybody knows what it will be part of, so it asks at run time, by an operator. Where
# several calls of a layer are in one graph, each depends on the buffer as the one before has left it, so that they
# cannot be merged into one.


def _replaying(buffer: torch.Tensor, dropped: bool = True) -> torch.Tensor:
    return torch.full((), replaying() and (dropped or not preserved.regions), device=buffer.device)


def _fake_replaying(buffer: torch.Tensor, dropped: bool = True) -> torch.Tensor:
    return torch.empty((), dtype=torch.bool, device=buffer.device)


if not hasattr(torch.ops.momentum_fix, "replaying"):  # it is there if this module is imported anew
    signature = "(Tensor buffer, bool dropped=True) -> Tensor"  # also of replays whose changes are dropped
    torch.library.define("momentum_fix::replaying", signature, tags=torch.Tag.cudagraph_unsafe)
    torch.library.impl("momentum_fix::replaying", "CompositeExplicitAutograd", _replaying)
    torch.library.register_fake("momentum_fix::replaying", _fake_replaying)


def selective() -> bool:
    """Tell whether a mode such as that of selective checkpointing sees every operation."""
    return is_in_torch_dispatch_mode(include_infra_modes=False)


@contextmanager
def unseen() -> Iterator[None]:
    """Run operations of this package's own, which selective checkpointing does not know from the forward.

    Fake and proxy modes stay: they decide what a tensor is.
    """
    with _disable_current_modes() as modes, ExitStack() as kept:
        for mode in modes:
            if mode.is_infra_mode():
                kept.enter_context(mode)
        yield
