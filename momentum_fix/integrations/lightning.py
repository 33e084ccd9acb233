"""A callback for Lightning."""

from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from momentum_fix.norms.update_once import update_once

# `lightning` and `pytorch_lightning` refuse each other's callbacks: this is one for each of them that is installed.
_INSTALLED = [name for name in ("lightning", "pytorch_lightning") if find_spec(name)]
if not _INSTALLED:
    raise ImportError("neither lightning nor pytorch_lightning is installed")


class UpdateOnce(*(import_module(name).Callback for name in _INSTALLED)):  # type: ignore[misc]
    """Put `update_once` on the module when training starts, and take it off when training ends.

    Training starts after Lightning has rebuilt the layers for `sync_batchnorm=True`. A call of `update_once` before
    `fit` would be lost then. It is taken off after an exception too. A resumed run needs nothing else.

    Works with the Trainer of `lightning` and with that of `pytorch_lightning`.

    Raises:
        ValueError: when training starts, for what `update_once` refuses, such as a corrected momentum.
    """

    def __init__(self) -> None:
        super().__init__()
        self._block = ExitStack()

    def on_train_start(self, trainer: object, pl_module: nn.Module) -> None:
        self._block.enter_context(update_once(pl_module))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._block.close()

    on_exception = teardown = on_train_end  # teardown: of a training that a tuner ends early
