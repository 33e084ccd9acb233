"""An existing model: set the corrected momentum of its norm layers in place, ask for it, and put it back."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from fractions import Fraction
from typing import SupportsFloat, SupportsIndex, TypeAlias, TypeVar

from torch import nn

from momentum_fix._tables import number
from momentum_fix.formula import corrected_momentum, power_of_decay
from momentum_fix.norms.layers import NormLayer, describe_layer, tracked_layers, warn_of_none
from momentum_fix.norms.momenta import is_changed, original_momentum, set_corrected, uncorrected
from momentum_fix.norms.wrapping import refuse_wrapped, unwrap, wrapper_of

Model = TypeVar("Model", bound=nn.Module)
Passes: TypeAlias = SupportsIndex | Fraction


def correct(model: Model, passes: Passes | Mapping[str, Passes] = 2) -> Model:
    """Set, in place, the momentum of every norm layer that tracks statistics to the corrected one.

        layer.momentum = 1 - (1 - layer.momentum)**(1 / passes)

    Exact for: layers updated `passes` times in a row for each batch. Not for: alternating passes of several
    batches; there only the decay is right. Layers outside of checkpoints have one pass: a number alone would make them
    wrong, a mapping does not. `calibrate` counts the passes, layer by layer.

    Correcting twice changes nothing. Different `passes` start again from the uncorrected momentum. A momentum
    that you have set since then counts as the new uncorrected one. A layer still counts as corrected after
    `copy.deepcopy` and pickling. One without a mark of this package (built by `norm_layer`, rebuilt by
    `convert_sync_batchnorm`, or with a root written by hand, `1 - 0.9 ** 0.5` for 0.1) counts as corrected if
    it has more than four digits, and is the corrected one of a number of at most four digits for 2 to 8 passes.
    A shared layer is corrected once. The layers stay plain torch layers with the same state dict. Momentum is
    not in a state dict: correct a rebuilt model again.

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
            own momentum is outside 0 to 1; or `update_once` is on the layer, which then has nothing to
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
    layers = tracked_layers(model)
    if isinstance(passes, Mapping):
        wanted = _by_layer(model, passes, layers)
    else:
        corrected_for(None, None, passes)
        wanted = dict.fromkeys(layers, passes)
    plain = {layer: uncorrected(layer) for layer in wanted}
    plan = {}
    for layer, number_of in wanted.items():
        plan[layer] = corrected_for(layers[layer][0], plain[layer], number_of)
        if plan[layer] != plain[layer]:
            refuse_wrapped(layer, layers[layer][0], "update_once", "calibrate")
        else:
            plan[layer] = plain[layer]  # the very number, an integer or NumPy's for one
    set_corrected(plan, plain)
    warn_of_none(layers, "to correct")
    return model


def restore(model: Model) -> Model:
    """Undo, in place, everything that this package has done to a model.

    Each layer gets back the momentum that it had before `correct`, `calibrate` or `norm_layer`, but keeps a momentum
    that you have set since then. The forward that `update_once` installed is removed. If something else has wrapped it
    since then, remove that first. Running statistics stay as they are.

    Args:
        model: any module, changed by this package or not.

    Returns:
        `model` itself.

    Raises:
        ValueError: something else has wrapped the forward that `update_once` installed on a layer, or the model is
            being calibrated. The model is left as it was.

    Example:
        >>> restore(correct(nn.BatchNorm1d(4, momentum=0.3))).momentum
        0.3
    """
    touched = _touched(model)
    for layer, name in touched.items():
        refuse_wrapped(layer, name, "calibrate")
    unwrap(wrapper for layer in touched if (wrapper := wrapper_of(layer)) is not None)
    momenta = {layer: original_momentum(layer) for layer in touched if is_changed(layer)}
    set_corrected(momenta, momenta)
    return model


def applied(model: nn.Module) -> dict[str, str]:
    """List what this package has done to a model: what `restore` would undo, by layer.

    Returns:
        A few words for each layer that has a corrected momentum, has `update_once` on it or is being calibrated;
        empty if this package has changed nothing.

    Example:
        >>> applied(correct(nn.Sequential(nn.BatchNorm1d(4))))
        {'0': 'momentum 0.0513167, corrected from 0.1'}
    """
    return {name: _applied(layer) for layer, name in _touched(model).items()}


def _applied(layer: NormLayer) -> str:
    if (wrapper := wrapper_of(layer)) is not None:
        return wrapper.tool
    return f"momentum {number(layer.momentum)}, corrected from {number(original_momentum(layer))}"


def _touched(model: nn.Module) -> dict[NormLayer, str]:
    """Give the layers that this package has changed, tracking or not, each with its name."""
    tracked_layers(model)  # to refuse what is no model
    return {each: name for name, each in model.named_modules() if is_changed(each) or wrapper_of(each) is not None}


def corrected_for(name: str | None, momentum: SupportsFloat | None, passes: Passes) -> float | None:
    """Correct one layer's momentum; an error names the layer."""
    try:
        if isinstance(passes, Fraction) and passes >= 1:
            return power_of_decay(momentum, 1 / passes)
        return corrected_momentum(momentum, passes)  # type: ignore[arg-type]  # a Fraction below 1 is refused here
    except (TypeError, ValueError) as error:
        raise type(error)(str(error) if name is None else f"{describe_layer(name)}: {error}") from None


def _by_layer(
    model: nn.Module, passes: Mapping[str, Passes], layers: Mapping[NormLayer, list[str]]
) -> dict[NormLayer, Passes]:
    """Give the number of passes of each layer that a name covers: that of the deepest name."""
    known, names = dict(model.named_modules(remove_duplicate=False)), dict[NormLayer, str]()
    for name, number_of in passes.items():
        corrected_for(None, None, number_of)
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=3, cutoff=0.3)
            hint = f"; the nearest names are {', '.join(map(repr, nearest))}" if nearest else ""
            raise ValueError(f"the model has no module named {name!r}{hint}")
    for name in sorted(passes, key=_depth, reverse=True):
        below = [layer for layer in known[name].modules() if layer in layers]
        if not below:
            there = ", ".join(repr(each) for aliases in layers.values() for each in aliases)
            raise ValueError(
                f"{name!r} is not a layer with running statistics and contains none; the layers with running "
                f"statistics are {there or 'none in this model'}"
            )
        for layer in below:
            other = names.setdefault(layer, name)
            if _depth(other) == _depth(name) and passes[other] != passes[name]:
                raise ValueError(
                    f"{name!r} asks for {passes[name]} passes and {other!r} for {passes[other]}, but both cover the "
                    f"shared layer {layers[layer][0]!r}: give it one number"
                )
    return {layer: passes[name] for layer, name in names.items()}


def _depth(name: str) -> int:
    return name.count(".") + bool(name)
