"""Why the formula holds and where it stops: theorems whose claims and steps are checked by computer algebra."""

from momentum_fix.symbolic.letters import *  # noqa: F403
from momentum_fix.symbolic.proof import *  # noqa: F403
from momentum_fix.symbolic.theorems import *  # noqa: F403

__all__ = ["Growth", "Induction", "ProofError", "Step", "Theorem", "equal", "greater", "theorems"]  # noqa: F405
