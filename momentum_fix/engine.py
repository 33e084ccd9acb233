"""When a backward pass starts and ends: what runs in between recomputes, what runs outside does not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._guards import TracingContext
from torch.autograd import Variable


class _WatchedEngine:
    """Stands in for torch's one autograd engine, as long as there is a watcher."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.watchers: list[tuple[int, Callable[[], None], Callable[[], None]]] = []  # thread, on start, on end

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        nested = torch._C._current_graph_task_id() != -1
        tracing = TracingContext.try_get() is not None
        watchers = [] if nested or tracing else [w for w in self.watchers if w[0] == threading.get_ident()]
        for _, on_start, _ in watchers:
            on_start()
        try:
            return self.engine.run_backward(*args, **kwargs)
        finally:
            for _, _, on_end in watchers:
                on_end()


@contextmanager
def watch_backward(on_start: Callable[[], None], on_end: Callable[[], None]) -> Iterator[None]:
    """Call back at the start and the end of each backward pass that this thread runs inside the block.

    `backward`, `autograd.grad` and whatever else runs gradients all go through torch's one engine object. Torch
    has no public hook for it, and the public `ModuleTracker.is_bw` can be asked only where Python code of the
    layer runs, which compiled code does not. A backward pass inside a backward pass (the reentrant checkpoint
    runs one) belongs to the outer one, and the trial run in which torch.compile traces a graph is none at all.
    """
    variable: Any = Variable
    if not isinstance(variable._execution_engine, _WatchedEngine):
        variable._execution_engine = _WatchedEngine(variable._execution_engine)
    watched = variable._execution_engine
    watcher = (threading.get_ident(), on_start, on_end)
    watched.watchers.append(watcher)
    try:
        yield
    finally:
        watched.watchers.remove(watcher)
        if not watched.watchers and variable._execution_engine is watched:
            variable._execution_engine = watched.engine
