"""An existing model: set the corrected momentum of its norm layers in place, and put it back."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, SupportsFloat, SupportsIndex, TypeAlias, TypeVar

from torch import nn

from momentum_fix.formula import corrected_momentum, power_of_decay
from momentum_fix.layers import NormLayer, refuse_updating_once, tracked_layers

Model = TypeVar("Model", bound=nn.Module)
Passes: TypeAlias = SupportsIndex | Fraction

# A corrected layer carries {"": (uncorrected momentum, corrected momentum)} as a plain attribute, and its parents the
# same under its name: `SyncBatchNorm.convert_sync_batchnorm` makes new layers, but keeps their parents.
_MARKS = "_momentum_fix"


def correct(model: Model, passes: Passes | Mapping[str, Passes] = 2) -> Model:
    """Set, in place, the momentum of every norm layer that tracks statistics to the corrected one.

        layer.momentum = 1 - (1 - layer.momentum)**(1 / passes)

    Exact for: layers updated `passes` times in a row for each batch. Not for: passes of several batches in
    turn; there only the decay is right. `calibrate` finds out the passes, layer by layer.

    Correcting twice changes nothing; other `passes` start again from the uncorrected momentum; a momentum
    that you have set since counts as the new uncorrected one. A shared layer is corrected once. The layers
    stay plain torch layers with the same state dict; that they are corrected survives `copy.deepcopy`,
    pickling and `convert_sync_batchnorm`. Momentum is not in a state dict: correct a rebuilt model again.

    Args:
        model: any module.
        passes: updates per batch, an integer of at least 1, for all layers; or a mapping from names as in
            `model.named_modules()` to numbers. A name covers all layers below it; where several names cover a
            layer, the deepest counts; layers that no name covers stay as they are. A `fractions.Fraction` of
            at least 1 is the mean of passes that differ from batch to batch (3 updates for 2 batches): with
            it the old value decays as it should.

    Returns:
        `model` itself.

    Raises:
        ValueError: passes is below 1; a name that the model does not have or that covers no layer with
            running statistics; two equally deep names of one shared layer with different numbers; a layer's
            own momentum is outside 0 to 1; or `update_once` covers the layer, which then has nothing to
            correct. In each case the model is left as it was.
        TypeError: passes is not an integer. The model is left as it was.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        >>> correct(model, passes=2)[1].momentum
        0.051316701949486204
        >>> correct(model, {"1": 3})[1].momentum
        0.034510615394370246
        >>> restore(model)[1].momentum
        0.1
    """
    by_name = passes if isinstance(passes, Mapping) else {"": passes}
    for number in by_name.values():
        _corrected(None, number)
    names = tracked_layers(model)
    if isinstance(passes, Mapping):
        _check_names(model, passes, [name for aliases in names.values() for name in aliases])
    plan = []
    for layer, aliases in names.items():
        wanted = _deepest(by_name, aliases)
        if wanted is not None:
            momentum = uncorrected_momentum(model, layer, aliases)
            corrected = corrected_for(aliases[0], momentum, wanted)
            if corrected != momentum:
                refuse_updating_once(layer, aliases)
            plan.append((layer, aliases, momentum, corrected))
    for layer, aliases, momentum, corrected in plan:
        changed = corrected != momentum
        layer.momentum = corrected if changed else momentum
        _set_mark(model, layer, aliases, (momentum, corrected) if changed else None)
    return model


def restore(model: Model) -> Model:
    """Put back, in place, the momentum of every layer that `correct` or `calibrate` has changed.

    A momentum that you have set since stays.

    Args:
        model: any module, corrected or not.

    Returns:
        `model` itself.

    Example:
        >>> restore(correct(nn.BatchNorm1d(4, momentum=0.3))).momentum
        0.3
    """
    for layer, aliases in tracked_layers(model).items():
        layer.momentum = uncorrected_momentum(model, layer, aliases)
        _set_mark(model, layer, aliases, None)
    return model


def uncorrected_momentum(model: nn.Module, layer: NormLayer, aliases: list[str]) -> Any:
    """Give the momentum of a layer as it is, or as it was before `correct` if nobody has changed it since."""
    for module, key in _places(model, layer, aliases):
        mark = vars(module).get(_MARKS, {}).get(key)
        if mark is not None and mark[1] == layer.momentum:
            return mark[0]
    return layer.momentum


def _set_mark(model: nn.Module, layer: NormLayer, aliases: list[str], mark: tuple[Any, Any] | None) -> None:
    for module, key in _places(model, layer, aliases):
        marks = {other: value for other, value in vars(module).get(_MARKS, {}).items() if other != key}
        if mark is not None:
            marks[key] = mark
        if marks:
            setattr(module, _MARKS, marks)
        else:
            vars(module).pop(_MARKS, None)


def _places(model: nn.Module, layer: NormLayer, aliases: list[str]) -> list[tuple[nn.Module, str]]:
    """Give the modules that remember this layer's correction, and the key under which each does."""
    split = [name.rpartition(".") for name in aliases if name]
    return [(layer, ""), *((model.get_submodule(parent), key) for parent, _, key in split)]


def corrected_for(name: str, momentum: SupportsFloat | None, passes: Passes) -> float | None:
    """Correct one layer's momentum; an error names the layer."""
    try:
        return _corrected(momentum, passes)
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {name!r}: {error}") from None


def _corrected(momentum: SupportsFloat | None, passes: Passes) -> float | None:
    if isinstance(passes, Fraction) and passes >= 1:
        return power_of_decay(momentum, 1 / passes)
    return corrected_momentum(momentum, passes)  # type: ignore[arg-type]  # a Fraction below 1 is refused here


def _check_names(model: nn.Module, passes: Mapping[str, Passes], layer_names: list[str]) -> None:
    known = dict(model.named_modules(remove_duplicate=False))
    for name in passes:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=3, cutoff=0.3)
            hint = f"; the nearest names are {', '.join(map(repr, nearest))}" if nearest else ""
            raise ValueError(f"the model has no module named {name!r}{hint}")
        if not any(_covers(name, layer_name) for layer_name in layer_names):
            raise ValueError(
                f"{name!r} is no layer with running statistics and has none below it; the layers that have are "
                f"{', '.join(map(repr, layer_names)) or 'none in this model'}"
            )


def _covers(name: str, layer_name: str) -> bool:
    return name in ("", layer_name) or layer_name.startswith(f"{name}.")


def _deepest(passes: Mapping[str, Passes], aliases: list[str]) -> Passes | None:
    """Give the number under the deepest name that covers a layer, or None."""
    covering = [name for name in passes if any(_covers(name, alias) for alias in aliases)]
    deepest = [name for name in covering if _depth(name) == max(map(_depth, covering))]
    for name in deepest[1:]:
        if passes[name] != passes[deepest[0]]:
            raise ValueError(
                f"{name!r} asks for {passes[name]} passes and {deepest[0]!r} for {passes[deepest[0]]}, but both cover "
                f"the shared layer {aliases[0]!r}: give it one number"
            )
    return passes[deepest[0]] if deepest else None


def _depth(name: str) -> int:
    return name.count(".") + bool(name)
