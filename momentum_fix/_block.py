"""A `with` block around one training step: it says so if it is never entered, or entered twice."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


class Block(AbstractContextManager[Any]):
    """What `calibrate` and `diagnose` return. One that is entered and abandoned ends when it is collected."""

    entered = False

    def __init__(self, tool: str, steps: Callable[[Any], Iterator[Any]], model: Any) -> None:
        self.tool, self.steps = tool, contextmanager(steps)(model)

    def __enter__(self) -> Any:
        if self.entered:
            again = f"call {self.tool}(model) again for another one"
            raise RuntimeError(f"this block of {self.tool} has run already: {again}")
        self.entered = True
        return self.steps.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.steps.__exit__(*exception)

    def __del__(self) -> None:
        if not self.entered:
            usage = f"write `with {self.tool}(model) as report:` around one training step"
            warnings.warn(f"{self.tool}(model) was never entered, so it did nothing: {usage}", stacklevel=2)
