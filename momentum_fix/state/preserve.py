"""Checkpointing for modules that change themselves: a recomputation sees the state that its forward pass saw."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch.utils.checkpoint import checkpoint as torchs_checkpoint

from momentum_fix import _torch
from momentum_fix.state.checkpoint_call import Region, RegionOfTorchs, begin


def preserve_state(*mistaken: Any) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Let a recomputation see the state that its forward pass saw, and leave no trace: a `context_fn`.

        checkpoint(block, x, use_reentrant=False, context_fn=preserve_state)

    Use it if a module changes itself during training and its output depends on what it changed: spectral
    normalization, Batch Renormalization, codebooks, quantization-aware training, spiking neurons, step counters.
    State is what modules keep in buffers, in plain attributes (numbers, tensors, arrays, generators of random numbers,
    and containers of these) and in parameters of up to 64 KiB that no gradient trains. All modules that run in the
    checkpoint in training mode are preserved, those below them, and those that the function knows beside them.

    Exact for: state, gradients and all values, bit for bit, in any order of forwards and backwards. Not for: state in
    objects of your own, on classes or in globals; random numbers of Python and NumPy; a checkpoint inside this one that
    is called by torch's own function (use `preserve_everywhere`); a checkpoint that is compiled with its model (use
    `checkpoint`). docs/limits.md has the whole list.

    Memory: a copy of the state for each checkpoint whose backward pass is still to come; none for blocks of torch's own
    modules without hooks. What is larger than 64 KiB and does not change is copied once for all checkpoints.

    Returns:
        The contexts of the forward pass and of its recomputations, as torch's checkpoint wants them.

    Raises:
        TypeError: it is called with a model or used in `with`; or a module in the checkpoint is TorchScript, in
            training mode, and has buffers.
        RuntimeError: the checkpoint is being compiled with its model; or, in the backward pass, a recomputation wrote
            to a trained parameter for a second time. That is undone.

    Warns:
        UserWarning: a trained or large parameter was written to between the start of the forward pass and the
            recomputation; or a container that holds tensors cannot be copied.

    Example:
        >>> from torch import nn
        >>> from torch.utils.checkpoint import checkpoint
        >>> layer = nn.BatchNorm1d(3)
        >>> x = torch.rand(8, 3, requires_grad=True)
        >>> checkpoint(layer, x, use_reentrant=False, context_fn=preserve_state).sum().backward()
        >>> layer.num_batches_tracked
        tensor(1)

    Source: pytorch/pytorch#96136 has asked for this since 2023.
    """
    if mistaken:
        _refuse_use(f"called with {type(mistaken[0]).__name__}")
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "context_fn=preserve_state cannot be compiled together with its checkpoint: use momentum_fix.checkpoint, "
            "which stays out of the compiled code, or compile the blocks inside the checkpoints"
        )
    call = _torch.checkpoint_in_the_making()
    region = begin(call.get("fn"), call.get("args", ()), call.get("kwargs"))
    return _Contexts((region.forward(), region.recomputation()))


class _Contexts(tuple[AbstractContextManager[None], AbstractContextManager[None]]):
    """Two contexts that are none themselves."""

    __slots__ = ()

    def __call__(self) -> NoReturn:
        _refuse_use("called")

    def __enter__(self) -> NoReturn:
        _refuse_use("used in a `with` statement")

    def __exit__(self, *_: object) -> None:
        """Make Python look at `__enter__` first."""


def _refuse_use(how: str) -> NoReturn:
    raise TypeError(
        f"preserve_state was {how}, but it is a context_fn, to be given to a checkpoint as it is: "
        "checkpoint(block, x, use_reentrant=False, context_fn=preserve_state). For all checkpoints of a process, "
        "a library's too, call preserve_everywhere()"
    )


def checkpoint(function: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
    """Do what `torch.utils.checkpoint.checkpoint` does, but recompute from the state that the forward pass saw.

    See `preserve_state` for when to use it. This one works with both engines (`use_reentrant=True` too), together
    with any `context_fn`, and in a model that is compiled as a whole: it breaks the graph, so compiled code ends
    before it and goes on after it. Blocks that are compiled themselves stay compiled. Instead of
    `checkpoint_sequential`, which has no `context_fn`, run each segment yourself, or call `preserve_everywhere`.

    Exact for, Not for, Memory: as `preserve_state`. The reentrant engine may add up gradients in another order than the
    run without checkpointing, with or without this package.

    Args:
        function: anything that can be called. If left out, the result is a decorator, as with torch 2.14 and newer.
        args: passed on to it.
        kwargs: passed on, along with all the keywords of torch's function.

    Returns:
        What the function returns.

    Raises:
        What torch's checkpoint raises, and what the function raises.

    Example:
        >>> from torch import nn
        >>> layer = nn.BatchNorm1d(3)
        >>> checkpoint(layer, torch.rand(8, 3, requires_grad=True), use_reentrant=True).sum().backward()
        >>> layer.num_batches_tracked
        tensor(1)

    Source: as `preserve_state`.
    """
    if function is None and not args:
        decorate = torchs_checkpoint(**kwargs)  # a TypeError before torch 2.14

        def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def call(*args: Any, **kwargs: Any) -> Any:
                return _outside_of_compiled_code(
                    lambda run, *args, **kwargs: decorate(run)(*args, **kwargs), function, *args, **kwargs
                )

            return call

        return decorated
    return _outside_of_compiled_code(torchs_checkpoint, function, *args, **kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outside_of_compiled_code(engine: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return engine(function, *args, **kwargs)
    contexts = _in_turn(lambda: begin(function, args, kwargs))

    def run(*args: Any, **kwargs: Any) -> Any:
        with next(contexts):
            return function(*args, **kwargs)

    run.preserves_state = function  # type: ignore[attr-defined]
    return engine(run, *args, **kwargs)


def _in_turn(begun: Callable[[], Region | RegionOfTorchs]) -> Iterator[AbstractContextManager[None]]:
    """Give the context of the forward pass, then that of each recomputation."""
    region = begun()
    yield region.forward()
    while True:
        yield region.recomputation()


class Everywhere:
    """What `preserve_everywhere` returns: `remove()`, or the end of a `with` block, ends it."""

    def __init__(self) -> None:
        self._stop: Callable[[], None] | None = _torch.listen(_preserving)

    def remove(self) -> None:
        """Let checkpoints recompute as torch does; a second call does nothing. Those that have begun are preserved."""
        if self._stop is not None:
            self._stop()
        self._stop = None

    def __enter__(self) -> Everywhere:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<preserve_everywhere, {'removed' if self._stop is None else 'on'}>"


def preserve_everywhere() -> Everywhere:
    """Let every call of torch's checkpoint in this process preserve state, as `preserve_state` does for one.

    That is every call from now on, by either engine, in any thread, whoever makes it and however it was imported: those
    inside timm, MONAI, Hugging Face or mmseg, those inside another checkpoint, and `checkpoint_sequential`. It works
    together with a `context_fn` of the caller's, and with `update_once` and `calibrate` on the same model.

    Exact for: what `preserve_state` is exact for. Not for: a checkpoint that torch compiles together with its model,
    where it has no effect: BatchNorm is right there by itself, and for modules whose output reads their state
    keep the checkpoint out of the compiled code (`momentum_fix.checkpoint` does). Not for engines other than torch's.

    Returns:
        An `Everywhere`; call `remove()` on it, or use it in `with`. After a second call, both have to be removed.

    Raises:
        RuntimeError: this version of torch does not tell of its checkpoints.

    Example:
        >>> from torch import nn
        >>> from torch.utils.checkpoint import checkpoint
        >>> layer = nn.BatchNorm1d(3)
        >>> with preserve_everywhere():
        ...     checkpoint(layer, torch.rand(8, 3, requires_grad=True), use_reentrant=False).sum().backward()
        >>> layer.num_batches_tracked
        tensor(1)

    Source: as `preserve_state`.
    """
    return Everywhere()


def _preserving(call: _torch.Call) -> Region | RegionOfTorchs | None:
    if call.in_compilation:
        warnings.warn(
            "a checkpoint is being compiled together with its model, where preserve_everywhere does nothing. BatchNorm "
            "is right there. For modules whose output reads their state use momentum_fix.checkpoint instead, which "
            "stays out of the compiled code",
            stacklevel=2,
        )
        return None
    is_ours = hasattr(call.function, "preserves_state")
    return None if is_ours else begin(call.function, call.args, call.kwargs)
