"""The exact alternative: only a forward pass moves the running statistics, a recomputation moves a copy of them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import _disable_current_modes

from momentum_fix.layers import NormLayer, tracked_layers, updates_once
from momentum_fix.model import uncorrected_momentum


class Handle:
    """What `update_once` gives: `remove()`, or leaving a `with` block, undoes what that one call has done.

    It removes what its own call has added: after a second `update_once(model)`, which finds nothing to add, the
    second handle removes nothing and the first one everything. Copy or pickle model and handle together,
    `copy.deepcopy((model, handle))`, to have a handle of the copy.
    """

    def __init__(self, layers: dict[NormLayer, list[str]]) -> None:
        self._layers = layers

    def remove(self) -> None:
        """Let every pass move the running statistics again; a second time, do nothing.

        Raises:
            ValueError: something else has wrapped a layer's `forward` since; nothing is removed.
        """
        for layer, names in self._layers.items():
            _refuse_foreign_forward(layer, names)
        for layer in self._layers:
            if updates_once(layer):
                del layer.forward
        self._layers = {}

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def update_once(model: nn.Module) -> Handle:
    """Let a norm layer's running statistics move on a forward pass and never on a recomputation.

    A forward that runs while a backward pass is running is a recomputation: it works on copies of the layer's
    buffers, dropped with the graph that it builds. `running_mean`, `running_var` and `num_batches_tracked` are
    then bit for bit those of the run without checkpointing, under every checkpoint, in every order, however often
    a batch is recomputed, in compiled code too. Nothing need be known or calibrated.

    Each layer keeps its class, its state dict and its momentum, and carries one more attribute: a `forward` of its
    own. It survives `copy.deepcopy` and pickling of the whole model; `del layer.forward` takes it off by hand. A
    model built anew, and layers made anew by `SyncBatchNorm.convert_sync_batchnorm`, do not have it: call this
    afterwards, as often as you like.

    Not for: a training-mode forward of a new batch that you run inside a backward hook, which is taken for a
    recomputation (call `handle.remove()` before it and `update_once(model)` after it); the reverse, recomputing
    outside of a backward pass by reading saved tensors from a graph by hand, which counts as a batch;
    `nn.DataParallel` with several devices, whose replicas share the attribute (use DDP); `torch.jit.script`. What
    else the forward of a class of your own assigns to the layer itself in a recomputation is dropped with the copies;
    so is, in compiled code, what it assigns in any training-mode pass, and where such a class assigns new tensors to
    its buffers, in place of writing to them, the compiled graph breaks (with `fullgraph=True`: an error).

    Args:
        model: any module; every layer below it that tracks running statistics is covered.

    Returns:
        A `Handle`.

    Raises:
        ValueError: the momentum of a layer is corrected, which would now be wrong (`restore(model)` first), or a
            layer has a `forward` of its own already. The model is left as it was.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> with update_once(model):
        ...     checkpoint(model, torch.rand(8, 3), use_reentrant=False).sum().backward()
        >>> model[1].num_batches_tracked
        tensor(1)

    Source: the question of "Checkpoint with BatchNorm running averages", discuss.pytorch.org/t/17738 (2018).
    """
    layers = tracked_layers(model)
    for layer, names in layers.items():
        if uncorrected_momentum(model, layer, names) is not layer.momentum:
            raise ValueError(
                f"layer {names[0]!r} has a corrected momentum ({layer.momentum}), which is wrong for statistics that "
                "move once per batch: call restore(model) first"
            )
        _refuse_foreign_forward(layer, names)
    added = {layer: names for layer, names in layers.items() if not updates_once(layer)}
    for layer in added:
        layer.forward = functools.partial(_forward, layer)
    return Handle(added)


def _refuse_foreign_forward(layer: NormLayer, names: list[str]) -> None:
    if "forward" in vars(layer) and not updates_once(layer):
        raise ValueError(
            f"layer {names[0]!r} has a forward of its own, {layer.forward!r}, put there by something else: take that "
            "off first, and put it back afterwards"
        )


_graph_task = torch._C._current_graph_task_id  # -1 outside of a backward pass; torch.utils.module_tracker reads it too
_modes = torch._C._len_torch_dispatch_stack
_WRITING = (_BatchNorm.forward, _InstanceNorm.forward)  # in training they write the buffers and read none of them


def _forward(layer: NormLayer, *args: Any, **kwargs: Any) -> Any:
    """Run the layer's forward, in a backward pass on a stand-in that shares all but the buffers.

    The stand-in has buffers of the same shapes, so that a checkpoint which compares the tensors saved for backward
    finds no difference; and nothing has to be put back if the checkpoint stops the forward by an exception. Code
    that is being compiled has to find out at run time what it is part of: it takes the stand-in always, and commits.
    """
    cls = type(layer)  # looked up at each call: a lazy layer changes it at its first batch
    compiling = torch.compiler.is_compiling()
    if not layer.training if compiling else _graph_task() == -1:
        return cls.forward(layer, *args, **kwargs)
    stand_in = object.__new__(cls)
    state = stand_in.__dict__
    state.update(layer.__dict__)
    if compiling:
        state["_buffers"] = _copies(layer)
    elif _modes():
        with _disable_current_modes():  # selective checkpointing knows the operations that the forward did, no others
            state["_buffers"] = _copies(layer)
    elif layer.training and cls.forward in _WRITING:
        state["_buffers"] = _scratch(layer)
    else:
        state["_buffers"] = _copies(layer)
    output = cls.forward(stand_in, *args, **kwargs)
    if compiling:
        own = {name: buffer for name, buffer in layer._buffers.items() if buffer is not None}
        torch.ops.momentum_fix.commit(list(own.values()), [state["_buffers"][name] for name in own])
    return output


def _copies(layer: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: buffer if buffer is None else buffer.clone() for name, buffer in layer._buffers.items()}


def _scratch(layer: NormLayer) -> dict[str, torch.Tensor | None]:
    """Give what a forward that only writes needs, which is cheaper than copies: statistics unset, nothing to count."""
    own = layer._buffers
    mean, var = torch.empty_like(own["running_mean"]), torch.empty_like(own["running_var"])
    return {**own, "running_mean": mean, "running_var": var, "num_batches_tracked": None}


def _commit(own: list[torch.Tensor], moved: list[torch.Tensor]) -> None:
    if _graph_task() == -1:
        for buffer, value in zip(own, moved, strict=True):
            buffer.copy_(value)


_library = torch.library.Library("momentum_fix", "DEF")  # type: ignore[no-untyped-call]
_library.define("commit(Tensor(a!)[] own, Tensor[] moved) -> ()", tags=(torch.Tag.cudagraph_unsafe,))  # type: ignore[no-untyped-call]
_library.impl("commit", _commit, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("commit", lambda own, moved: None, "Meta")  # type: ignore[no-untyped-call]
