"""What `calibrate` has to say of a layer: each note is a member here, and is found in `counting` (or `calibrate`)."""

from __future__ import annotations

from enum import Enum

_DECAY = "only the decay is right:"
_EXACT = "; exact: `restore(model)`, then `update_once(model)`"


class Note(Enum):
    """A text; whether it is a warning, too; and the remedy that the warning names."""

    NOT_CONSECUTIVE = f"{_DECAY} the passes of a batch do not follow one another, or their number varies", True, _EXACT
    OTHER_DATA = f"{_DECAY} a recomputation saw different data than its forward pass (random state?)", True, _EXACT
    SET_BY_STEP = "the step itself sets the momentum (a schedule, SAM), so a corrected one does not last", True, _EXACT
    UNEQUAL = "not corrected: a cumulative average of batches with different numbers of passes", True, _EXACT
    PERHAPS_UNEQUAL = "left alone: a cumulative average, right only if batches have equally many passes", True, _EXACT
    UNSEEN = "not corrected: its statistics moved, but its forward did not run (F.batch_norm on its buffers?)", True
    NO_BACKWARD = "not corrected: no backward pass was seen in the block, so recomputations are not known", True
    ONLY_BACKWARD = "left alone: updated only inside a backward pass, so its batches are not known", True
    RANKS_DIFFER = "each rank keeps its own count: they differ (another model under the same names, or a mistake)", True
    OTHER_RANK = "as counted on another rank"
    MAY_READ = "if its output reads its statistics, gradients are wrong: `diagnose(model)` tells you"
    CUMULATIVE = "left alone: equal passes do not change a cumulative average"
    EVALUATION = "left alone: in evaluation mode"
    IDLE = "left alone: did not run"
    UNTRACKED = "left alone: no longer tracks running statistics"

    def __init__(self, text: str, warns: bool = False, remedy: str = "") -> None:
        self.text, self.warns, self.remedy = text, warns, remedy
