"""A callback for the Trainer of Hugging Face."""

from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback

from momentum_fix.norms.update_once import update_once


class UpdateOnce(TrainerCallback):
    """Put `update_once` on the model when training starts, and take it off when training ends.

    A resumed run needs nothing else. The Trainer does not tell its callbacks of an exception: after one, `update_once`
    stays on the model until the Trainer trains again, or until `restore(model)`.

    Raises:
        ValueError: when training starts, for what `update_once` refuses, such as a corrected momentum.
    """

    def __init__(self) -> None:
        self._block = ExitStack()

    def on_train_begin(self, *_: Any, **names: Any) -> None:
        self._block.enter_context(update_once(names["model"]))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._block.close()
