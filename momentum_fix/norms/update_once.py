"""The exact alternative: only a forward pass updates the running statistics, a recomputation updates copies."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from momentum_fix._tables import number
from momentum_fix._torch import check_recomputation
from momentum_fix.norms.layers import (
    describe_layer,
    join_names,
    only_writes,
    tracked_layers,
    warn_of_hidden,
    warn_of_none,
)
from momentum_fix.norms.momenta import is_corrected, uncorrected
from momentum_fix.norms.wrapping import ForwardWrapper, refuse_foreign_forward, refuse_wrapped, unwrap, wrap, wrapper_of


class UpdateOnceForward(ForwardWrapper):
    """The forward of a layer on which `update_once` is."""

    tool = "update_once"

    def before_first_pass(self) -> None:
        if is_corrected(self.layer):
            warnings.warn(
                f"{describe_layer(self.name)} got a corrected momentum after update_once ({_for_plain(self.layer)}; "
                "pytorch-pfn-extras' checkpoint sets one on its first call), which is wrong for statistics that move "
                "once per batch. Use torch.utils.checkpoint instead, or call restore(model) and rely on the correction",
                stacklevel=2,
            )

    def in_recomputation_alone(self, *args: Any, **kwargs: Any) -> Any:
        warnings.warn(
            f"{describe_layer(self.name)} does not track statistics in the forward pass, but does in the backward "
            "pass, and update_once lets that update happen. With fairscale's checkpoint_wrapper, which works like "
            "this, use torch.utils.checkpoint instead, or call restore(model) and rely on the wrapper. If you switch "
            "tracking off for an extra forward pass (virtual adversarial training), keep it off until its backward "
            "pass is done",
            stacklevel=2,
        )
        return self.run(*args, **kwargs)


class Handle:
    """What `update_once` returns: `remove()`, or the end of a `with` block, undoes what that one call has done.

    It removes only what its own call has added: after a second `update_once(model)`, which finds nothing to add, the
    second handle removes nothing and the first one removes everything. Its length is the number of layers that this
    call is still on; one that was rebuilt since then does not count. To get a handle for a copy, copy or pickle model
    and handle together: `copy.deepcopy((model, handle))`. `restore(model)` needs no handle.
    """

    def __init__(self, model: nn.Module, wrappers: Sequence[ForwardWrapper]) -> None:
        self._model, self._wrappers = model, wrappers

    def remove(self) -> None:
        """Let every pass move the running statistics again; a second call does nothing.

        Raises:
            ValueError: something else has wrapped a layer's `forward` since then; nothing is removed.
        """
        unwrap(self._wrappers)
        self._wrappers = []

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __len__(self) -> int:
        """Give the number of layers that are still in the model, and have the forward that this call gave them."""
        there = {id(wrapper_of(module)) for module in self._model.modules()}
        return sum(id(each) in there for each in self._wrappers)

    def __repr__(self) -> str:
        return f"<update_once on {len(self)} layers>"


def update_once(model: nn.Module) -> Handle:
    """Let the forward pass move a norm layer's running statistics, and never a recomputation.

    A forward that runs during a backward pass is a recomputation, and so is one inside `with recomputing():`. It works
    on copies of the layer's buffers, which are dropped afterwards. The running statistics and `num_batches_tracked` are
    then the same as without checkpointing, bit for bit, with any checkpoint, in any order, no matter how often a
    batch is recomputed, and in compiled code too. You don't have to know the number of passes or calibrate anything.

    Each layer keeps its class, its state dict and its momentum. It gets its own `forward` as an attribute, and a
    second attribute that remembers this. Both survive `copy.deepcopy` and pickling of the whole model. A rebuilt model
    does not have them, nor do layers rebuilt by `SyncBatchNorm.convert_sync_batchnorm` or fused for quantization: call
    `update_once` again afterwards, as often as you like.

    Not for: a parent that calls `F.batch_norm` on the layer's buffers itself; `nn.DataParallel` with several devices
    and `copy.copy`, whose copies share the attribute (use DDP and `copy.deepcopy`); one layer in two threads at once;
    `torch.jit.script`. Around a new batch that you run inside a backward hook put `recomputing(False)`.

    For torch's own layers, gradients are those of the run without checkpointing, because their training-mode output
    does not read the running statistics. A class whose output reads them (Batch Renormalization, for example) gets
    wrong gradients from any recomputation, with or without this function: use `checkpoint` or `preserve_state`.

    Args:
        model: any module; `update_once` is put on every layer below it that tracks running statistics.

    Returns:
        A `Handle`; `restore(model)` removes everything too.

    Raises:
        ValueError: the momentum of a layer is corrected, which would now be wrong (call `restore(model)` first), or a
            layer already has its own `forward`. The model is left as it was.
        TypeError: model is not a module, or a part of it with running statistics is TorchScript.
        RuntimeError: this torch does not tell a recomputation from a forward pass.

    Warns:
        UserWarning: no layer tracks running statistics; a layer that does is in a plain list or dict, where it is not
            found; a layer's class has its own forward, whose output may read them (timm's `BatchNormAct2d` is known not
            to); or, in training, a layer is updated in the backward pass only.

    Example:
        >>> import torch
        >>> from torch.utils.checkpoint import checkpoint
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> with update_once(model):
        ...     checkpoint(model, torch.rand(8, 3), use_reentrant=False).sum().backward()
        >>> model[1].num_batches_tracked
        tensor(1)

    Source: the question of "Checkpoint with BatchNorm running averages", discuss.pytorch.org/t/17738 (2018).
    """
    check_recomputation()
    added = []
    for layer, (name, *_) in (layers := tracked_layers(model)).items():
        if is_corrected(layer):
            raise ValueError(
                f"{describe_layer(name)} has a corrected momentum ({_for_plain(layer)}), which is wrong for statistics "
                "that move once per batch: call restore(model) first, or, if it was corrected by hand, set the layer's "
                f"momentum to {number(uncorrected(layer))}"
            )
        refuse_foreign_forward(layer, name)
        refuse_wrapped(layer, name, "calibrate")
        if wrapper_of(layer) is None:
            added.append(UpdateOnceForward(layer, name))
    warn_of_none(layers, "to update once")
    warn_of_hidden(model)
    own = [each.name for each in added if not only_writes(each.layer)]
    if own:
        warnings.warn(
            f"{join_names(own)}: the class has a forward of its own. It will move buffers once per batch. But if "
            "its output reads them in training (the output of torch's layers does not), every recomputation computes "
            "something different from the forward pass, and gradients are wrong. diagnose(model) tells you whether it "
            "does, and momentum_fix.checkpoint is exact there",
            stacklevel=2,
        )
    wrap(added)  # after the warnings, which may be errors
    return Handle(model, added)


def _for_plain(layer: nn.Module) -> str:
    return f"{number(layer.momentum)} for {number(uncorrected(layer))}"  # type: ignore[arg-type]
