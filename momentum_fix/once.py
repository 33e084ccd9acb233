"""The exact alternative: only a forward pass moves the running statistics, a replay moves a copy of them."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from momentum_fix.corrected import uncorrected
from momentum_fix.covering import ONLY_WRITES, Covering, cover, covering, refuse_foreign_forward, uncover
from momentum_fix.layers import named, the, tracked_layers, warn_of_none
from momentum_fix.tables import number


class Once(Covering):
    """Covers a layer for `update_once`."""

    def begin(self) -> None:
        if uncorrected(self.layer) != self.layer.momentum:
            warnings.warn(
                f"{the(self.name)} has got a corrected momentum since update_once ({_for_plain(self.layer)}; "
                "pytorch-pfn-extras' checkpoint sets one on its first call), which is wrong for statistics that move "
                "once per batch. Use torch.utils.checkpoint instead, or restore(model) and rely on that",
                stacklevel=2,
            )

    def left_alone(self, *args: Any, **kwargs: Any) -> Any:
        warnings.warn(
            f"{the(self.name)} does not track statistics in the forward pass, but does in the backward pass, and "
            "update_once lets that update happen. With fairscale's checkpoint_wrapper, which works like this, use "
            "torch.utils.checkpoint instead, or restore(model) and rely on the wrapper. If you switch tracking off for "
            "an extra forward pass (virtual adversarial training), keep it off until its backward pass is done",
            stacklevel=2,
        )
        return self.run(*args, **kwargs)


class Handle:
    """What `update_once` gives: `remove()`, or leaving a `with` block, undoes what that one call has done.

    It removes what its own call has added: after a second `update_once(model)`, which finds nothing to add, the
    second handle removes nothing and the first one everything. Copy or pickle model and handle together,
    `copy.deepcopy((model, handle))`, to have a handle of the copy. `restore(model)` needs no handle.
    """

    def __init__(self, coverings: list[Covering]) -> None:
        self._coverings = coverings

    def remove(self) -> None:
        """Let every pass move the running statistics again; a second time, do nothing.

        Raises:
            ValueError: something else has wrapped a layer's `forward` since; nothing is removed.
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
    """Let a norm layer's running statistics move on a forward pass and never on a replay.

    A forward that runs while a backward pass is running is a replay: it works on copies of the layer's buffers, which
    are dropped afterwards. `running_mean`, `running_var` and `num_batches_tracked` are then bit for bit those of the
    run without checkpointing, under every checkpoint, in every order, however often a batch is recomputed, in
    compiled code too. You need to know and calibrate nothing.

    Each layer keeps its class, its state dict and its momentum, and carries one more attribute: a `forward` of its
    own. It survives `copy.deepcopy` and pickling of the whole model. A model built anew, and layers made anew by
    `SyncBatchNorm.convert_sync_batchnorm` or fused for quantization, do not have it: call this afterwards, as often as
    you like.

    Not for: a training-mode forward of a new batch that you run inside a backward hook, which is taken for a replay
    (call `handle.remove()` before it and `update_once(model)` after it); the reverse, recomputing outside of a
    backward pass by reading saved tensors from a graph by hand, which counts as a batch; a parent that calls
    `F.batch_norm` on the layer's buffers itself; `nn.DataParallel` with several devices and `copy.copy`, whose copies
    share the attribute (use DDP and `copy.deepcopy`); one layer in two threads at once; `torch.jit.script`.

    Gradients are those of the run without checkpointing for torch's own layers, whose training-mode output does not
    read the running statistics. A class whose output reads them (Batch Renormalization, say) gets wrong gradients from
    any recomputation, with this function and without.

    Args:
        model: any module; every layer below it that tracks running statistics is covered.

    Returns:
        A `Handle`; `restore(model)` takes everything off too.

    Raises:
        ValueError: the momentum of a layer is corrected, which would now be wrong (`restore(model)` first), or a
            layer has a `forward` of its own already. The model is left as it was.
        TypeError: model is no module, or a part of it with running statistics is TorchScript.

    Warns:
        UserWarning: no layer tracks running statistics; a layer's class has a forward of its own, whose output may
            read them; or, in training, a layer is updated in the backward pass only.

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
        if uncorrected(layer) != layer.momentum:
            raise ValueError(
                f"{the(name)} has a corrected momentum ({_for_plain(layer)}), which is wrong for statistics that move "
                "once per batch: call restore(model) first, or, where the root was written by hand, set the layer's "
                f"momentum to {number(uncorrected(layer))}"
            )
        refuse_foreign_forward(layer, name)
        refuse_calibrated(layer, name)
        if covering(layer) is None:
            added.append(Once(layer, name))
    cover(added)
    warn_of_none(layers, "to update once")
    own = [once.name for once in added if type(once.layer).forward not in ONLY_WRITES]
    if own:
        warnings.warn(
            f"{named(own)}: the class has a forward of its own. Its statistics will move once per batch. But if its "
            "output reads them in training, as that of torch's layers does not, every recomputation computes something "
            "else than the forward pass did, and gradients are wrong. momentum_fix.checkpoint is exact there",
            stacklevel=2,
        )
    return Handle(added)


def refuse_covered(layer: nn.Module, name: str) -> None:
    """Raise if something covers the layer: `update_once`, with which a corrected momentum is wrong, or `calibrate`."""
    if isinstance(covering(layer), Once):
        raise ValueError(
            f"{the(name)} moves its statistics once per batch, by update_once, so there is nothing to correct: "
            "call restore(model), or remove() on the handle that update_once gave you, first"
        )
    refuse_calibrated(layer, name)


def refuse_calibrated(layer: nn.Module, name: str) -> None:
    """Raise if something else than `update_once` covers the layer: a block of `calibrate`, which has to end first."""
    if covering(layer) is not None and not isinstance(covering(layer), Once):
        raise ValueError(f"{the(name)} is being calibrated: leave the `with calibrate(...)` block first")


def _for_plain(layer: nn.Module) -> str:
    return f"{number(layer.momentum)} for {number(uncorrected(layer))}"  # type: ignore[arg-type]
