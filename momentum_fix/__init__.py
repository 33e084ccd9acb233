"""BatchNorm's running statistics as if activation checkpointing did not exist.

Importing the package loads neither torch nor SymPy nor Matplotlib; each name below brings what it needs on
its first use.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from momentum_fix.formula import corrected_momentum, effective_momentum

if _TYPE_CHECKING:
    from momentum_fix.auditing import audit as audit
    from momentum_fix.calibration import calibrate as calibrate
    from momentum_fix.correction import applied as applied
    from momentum_fix.correction import correct as correct
    from momentum_fix.correction import restore as restore
    from momentum_fix.factory import norm_layer as norm_layer
    from momentum_fix.once import update_once as update_once

__version__ = "0.2.0"

_HOMES = {
    "norm_layer": "factory",
    "correct": "correction",
    "applied": "correction",
    "restore": "correction",
    "calibrate": "calibration",
    "update_once": "once",
    "audit": "auditing",
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
    return sorted([*globals(), *_HOMES, *_MODULES])
