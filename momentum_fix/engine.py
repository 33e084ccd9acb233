"""When a backward pass starts and ends: what runs in between recomputes, what runs outside does not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._guards import TracingContext
from torch.autograd import Variable


@contextmanager
def watch_backward(on_start: Callable[[], None], on_end: Callable[[], None]) -> Iterator[None]:
    """Call back at the start and the end of each backward pass that this thread runs inside the block.

    `backward`, `autograd.grad` and whatever else runs gradients all go through torch's one engine object,
    which is stood in for as long as the block lasts. A backward pass inside a backward pass (the reentrant
    checkpoint runs one) belongs to the outer one, and the trial run in which torch.compile traces a graph is
    none at all.
    """
    engine, thread = Variable._execution_engine, threading.get_ident()

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def run_backward(self, *args: Any, **kwargs: Any) -> Any:
            nested = torch._C._current_graph_task_id() != -1
            tracing = TracingContext.try_get() is not None
            if nested or tracing or threading.get_ident() != thread:
                return engine.run_backward(*args, **kwargs)
            on_start()
            try:
                return engine.run_backward(*args, **kwargs)
            finally:
                on_end()

    Variable._execution_engine = Watched()  # type: ignore[assignment]
    try:
        yield
    finally:
        Variable._execution_engine = engine
