"""BatchNorm's running statistics, and all other state, as if activation checkpointing did not exist.

    with diagnose(model) as report:    around one training step: are gradients right, which state moves, what to use
    update_once(model)                 the exact way: statistics move on the forward pass, never on a recomputation
    checkpoint(function, *args)        torch's checkpoint, exact also for modules that read what they change
    preserve_state                     the same as a context_fn: checkpoint(..., context_fn=preserve_state)
    preserve_everywhere()              the same for every call of torch's checkpoint, a library's too
    with calibrate(model) as report:   around one training step: counts each layer's passes, sets its momentum
    with recomputing():                declares a recomputation where nobody could tell; recomputing(False): none
    correct(model, passes=2)           sets the corrected momentum, if you know the passes
    norm_layer("BatchNorm2d")          a norm layer with the corrected momentum, for a model config
    corrected_momentum(0.1, passes=2)  the number alone; effective_momentum is its inverse
    audit(source)                      which layers of a model or a saved file were updated more than once per step
    applied(model), restore(model)     what this package has changed on a model; undo it

`momentum_fix.symbolic` has the theorems and their proofs, `momentum_fix.plots` the curves. Importing the package loads
neither torch nor SymPy nor Matplotlib; each name loads what it needs on its first use.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from momentum_fix.formula import corrected_momentum, effective_momentum

if _TYPE_CHECKING:
    from momentum_fix.auditing import audit as audit
    from momentum_fix.diagnosis.diagnose import diagnose as diagnose
    from momentum_fix.diagnosis.report import Diagnosis as Diagnosis
    from momentum_fix.files.reading import UnreadableError as UnreadableError
    from momentum_fix.files.verdict import Audit as Audit
    from momentum_fix.norms.calibrate import Report as Report
    from momentum_fix.norms.calibrate import calibrate as calibrate
    from momentum_fix.norms.correct import applied as applied
    from momentum_fix.norms.correct import correct as correct
    from momentum_fix.norms.correct import restore as restore
    from momentum_fix.norms.factory import norm_layer as norm_layer
    from momentum_fix.norms.update_once import Handle as Handle
    from momentum_fix.norms.update_once import update_once as update_once
    from momentum_fix.recomputation import recomputing as recomputing
    from momentum_fix.state.preserve import Everywhere as Everywhere
    from momentum_fix.state.preserve import checkpoint as checkpoint
    from momentum_fix.state.preserve import preserve_everywhere as preserve_everywhere
    from momentum_fix.state.preserve import preserve_state as preserve_state

__version__ = "0.2.0"

_HOMES = {
    "norm_layer": "norms.factory",
    "correct": "norms.correct",
    "applied": "norms.correct",
    "restore": "norms.correct",
    "calibrate": "norms.calibrate",
    "Report": "norms.calibrate",
    "diagnose": "diagnosis.diagnose",
    "Diagnosis": "diagnosis.report",
    "update_once": "norms.update_once",
    "Handle": "norms.update_once",
    "recomputing": "recomputation",
    "audit": "auditing",
    "Audit": "files.verdict",
    "UnreadableError": "files.reading",
    "preserve_state": "state.preserve",
    "preserve_everywhere": "state.preserve",
    "Everywhere": "state.preserve",
    "checkpoint": "state.preserve",
}
_MODULES = ("symbolic", "plots")

__all__ = ["corrected_momentum", "effective_momentum", *_HOMES]


def __getattr__(name: str) -> _Any:
    if name in _HOMES:
        return getattr(_import_module(f"momentum_fix.{_HOMES[name]}"), name)
    if name in _MODULES:
        return _import_module(f"momentum_fix.{name}")
    raise AttributeError(f"module 'momentum_fix' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_MODULES]
