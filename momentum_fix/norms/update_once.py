"""The exact alternative: only a forward pass moves the running statistics, a replay moves a copy of them."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from momentum_fix._tables import number
from momentum_fix.norms.layers import named, the, tracked_layers, warn_of_none
from momentum_fix.norms.momenta import is_corrected, uncorrected
from momentum_fix.norms.wrapping import Covering, cover, covering, only_writes, refuse_foreign_forward, uncover


class Once(Covering):
    """Covers a layer for `update_once`."""

    def begin(self) -> None:
        if is_corrected(self.layer):
            warnings.warn(
                f"{the(self.name)} got a corrected momentum after update_once ({_for_plain(self.layer)}; "
                "pytorch-pfn-extras' checkpoint sets one on its first call), which is wrong for statistics that move "
                "once per batch. Use torch.utils.checkpoint instead, or call restore(model) and rely on the correction",
                stacklevel=2,
            )

    def left_alone(self, *args: Any, **kwargs: Any) -> Any:
        warnings.warn(
            f"{the(self.name)} does not track statistics in the forward pass, but does in the backward pass, and "
            "update_once lets that update happen. With fairscale's checkpoint_wrapper, which works like this, use "
            "torch.utils.checkpoint instead, or call restore(model) and rely on the wrapper. If you switch tracking "
            "off for an extra forward pass (virtual adversarial training), keep it off until its backward pass is done",
            stacklevel=2,
        )
        return self.run(*args, **kwargs)


class Handle:
    """What `update_once` returns: `remove()`, or the end of a `with` block, undoes what that one call has done.

    It removes only what its own call has added: after a second `update_once(model)`, which finds nothing to add, the
    second handle removes nothing and the first one removes everything. To get a handle for a copy, copy or pickle
    model and handle together: `copy.deepcopy((model, handle))`. `restore(model)` needs no handle.
    """

    def __init__(self, coverings: list[Covering]) -> None:
        self._coverings = coverings

    def remove(self) -> None:
        """Let every pass move the running statistics again; a second call does nothing.

        Raises:
            ValueError: something else has wrapped a layer's `forward` since then; nothing is removed.
        """
        uncover(self._coverings)
        self._coverings = []

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<update_once on {len(self._coverings)} layers>"


def update_once(model: nn.Module) -> Handle:
    """Let the forward pass move a norm layer's running statistics, and never a replay.

    A forward that runs during a backward pass is a replay: it works on copies of the layer's buffers, which are
    dropped afterwards. `running_mean`, `running_var` and `num_batches_tracked` are then the same as without
    checkpointing, bit for bit, with any checkpoint, in any order, no matter how often a batch is recomputed, and in
    compiled code too. You don't have to know the number of passes or calibrate anything.

    Each layer keeps its class, its state dict and its momentum. It gets its own `forward` as an attribute, and a
    second attribute that remembers this. Both survive `copy.deepcopy` and pickling of the whole model. A rebuilt model
    does not have them, nor do layers rebuilt by `SyncBatchNorm.convert_sync_batchnorm` or fused for quantization: call
    `update_once` again afterwards, as often as you like.

    Not for: a training-mode forward of a new batch that you run inside a backward hook, which counts as a replay
    (call `handle.remove()` before it and `update_once(model)` after it); the reverse, recomputing outside of a
    backward pass by reading saved tensors from a graph directly, which counts as a batch; a parent that calls
    `F.batch_norm` on the layer's buffers itself; `nn.DataParallel` with several devices and `copy.copy`, whose copies
    share the attribute (use DDP and `copy.deepcopy`); one layer in two threads at once; `torch.jit.script`.

    For torch's own layers, gradients are those of the run without checkpointing, because their training-mode output
    does not read the running statistics. A class whose output reads them (Batch Renormalization, for example) gets
    wrong gradients from any recomputation, with or without this function: use `checkpoint` or `preserve_state`.

    Args:
        model: any module; every layer below it that tracks running statistics is covered.

    Returns:
        A `Handle`; `restore(model)` removes everything too.

    Raises:
        ValueError: the momentum of a layer is corrected, which would now be wrong (call `restore(model)` first), or a
            layer already has its own `forward`. The model is left as it was.
        TypeError: model is not a module, or a part of it with running statistics is TorchScript.

    Warns:
        UserWarning: no layer tracks running statistics; a layer's class has its own forward, whose output may
            read them (timm's `BatchNormAct2d` is known not to); or, in training, a layer is updated in the backward
            pass only.

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
    added: list[Covering] = []
    for layer, (name, *_) in (layers := tracked_layers(model)).items():
        if is_corrected(layer):
            raise ValueError(
                f"{the(name)} has a corrected momentum ({_for_plain(layer)}), which is wrong for statistics that move "
                "once per batch: call restore(model) first, or, if it was corrected by hand, set the layer's momentum "
                f"to {number(uncorrected(layer))}"
            )
        refuse_foreign_forward(layer, name)
        refuse_calibrated(layer, name)
        if covering(layer) is None:
            added.append(Once(layer, name))
    cover(added)
    warn_of_none(layers, "to update once")
    own = [once.name for once in added if not only_writes(once.layer)]
    if own:
        warnings.warn(
            f"{named(own)}: the class has a forward of its own. Its statistics will move once per batch. But if its "
            "output reads them in training (the output of torch's layers does not), every recomputation computes "
            "something different from the forward pass, and gradients are wrong. diagnose(model) tells you whether it "
            "does, and momentum_fix.checkpoint is exact there",
            stacklevel=2,
        )
    return Handle(added)


def refuse_covered(layer: nn.Module, name: str) -> None:
    """Raise if something covers the layer: `update_once`, with which a corrected momentum is wrong, or `calibrate`."""
    if isinstance(covering(layer), Once):
        raise ValueError(
            f"{the(name)} moves its statistics once per batch, by update_once, so there is nothing to correct: "
            "first call restore(model), or remove() on the handle from update_once"
        )
    refuse_calibrated(layer, name)


def refuse_calibrated(layer: nn.Module, name: str) -> None:
    """Raise if something else than `update_once` covers the layer: a block of `calibrate`, which has to end first."""
    if covering(layer) is not None and not isinstance(covering(layer), Once):
        raise ValueError(f"{the(name)} is being calibrated: leave the `with calibrate(...)` block first")


def _for_plain(layer: nn.Module) -> str:
    return f"{number(layer.momentum)} for {number(uncorrected(layer))}"  # type: ignore[arg-type]
