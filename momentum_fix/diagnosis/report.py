"""The report of `diagnose`: what was observed, as a verdict, tables, and lines to paste."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from html import escape
from itertools import groupby
from math import isfinite

from momentum_fix._tables import aligned, html
from momentum_fix.norms.layers import join_names

_MANY = 8  # modules of which the same is to be said, from which on that is said once


@dataclass(frozen=True)
class Finding:
    """A piece of state that recomputation has moved again, or that moves with a corrected momentum.

    Attributes:
        module: the name of the module; "" for the model itself.
        attribute: the buffer, parameter or plain attribute.
        module_class: the class of the module.
        times: how often it moves for one batch; None where that is not known.
        remedy: what to use; "" where nothing has to be done.
        note: what else there is to say.
    """

    module: str
    attribute: str
    module_class: str
    times: int | Fraction | None
    remedy: str
    note: str

    @property
    def name(self) -> str:
        """The name of module and attribute, as in a state dict."""
        return f"{self.module}.{self.attribute}".strip(".")

    def cells(self) -> tuple[str, ...]:
        """Give the row's text, but for the name of the attribute."""
        times = "?" if self.times is None else str(self.times)
        return self.module or "(the model)", self.module_class, times, self.remedy or "nothing", self.note


@dataclass(frozen=True)
class Difference:
    """Where a recomputation began to give autograd something else than its forward pass did.

    Attributes:
        module: the module whose values are the first to differ; "the function itself" where it is none.
        checkpoint: the name of the checkpointed function.
        size: of the first difference, relative to the values; infinite where other code ran.
        moved: the state that had changed since the forward pass.
        remedy: what to use, or to change.
    """

    module: str
    checkpoint: str
    size: float
    moved: tuple[str, ...]
    remedy: str

    def cells(self) -> tuple[str, ...]:
        """Give the row's text."""
        size = f"{self.size:.2g}" if isfinite(self.size) else "other code"
        return self.module, self.checkpoint, size, join_names(self.moved)


class Diagnosis(dict[str, Finding]):
    """What `diagnose` observed: a dict from the name of a piece of state to its `Finding`; a verdict, and tables.

    Attributes:
        verdict: what was observed, in a sentence.
        gradients_right: True, False, or None where not all of them could be observed.
        rounding: the largest relative difference that is one of rounding; 0.0 if all is equal to the bit.
        differences: where gradients began to be wrong.
        fixes: the lines to paste.
        in_training: whether a module ran in training mode.
    """

    verdict = "Nothing is known: the block has not ended."
    gradients_right: bool | None = None
    rounding = 0.0
    differences: tuple[Difference, ...] = ()
    fixes: tuple[str, ...] = ()
    in_training = False

    @property
    def ok(self) -> bool:
        """Whether gradients were observed to be right, in training mode, and no state needs fixing."""
        return self.gradients_right is True and self.in_training and not any(each.remedy for each in self.values())

    def __repr__(self) -> str:
        return f"<Diagnosis: {self.verdict}>"

    def __str__(self) -> str:
        return "\n\n".join([self.verdict, *map(aligned, self._tables()), *filter(None, ["\n".join(self._advice())])])

    def _repr_html_(self) -> str:
        first, *others = self._tables() or [[]]
        advice = [f"<p>{escape(line)}</p>" for line in self._advice()]
        return "\n".join([html(first, self.verdict), *(html(each, "") for each in others), *advice])

    def _tables(self) -> list[list[tuple[str, ...]]]:
        alike: dict[tuple[str, ...], list[str]] = {}  # modules of which the same is to be said
        for (name, kind, *others), found in groupby(self.values(), key=Finding.cells):
            alike.setdefault((kind, ", ".join(each.attribute for each in found), *others), []).append(name)
        states = [(name, *row) for row, names in alike.items() for name in _together(names)]
        differences = [each.cells() for each in self.differences]
        tables: list[list[tuple[str, ...]]] = [
            [("differs from", "in the checkpoint of", "by", "state that had changed"), *differences],
            [("module", "class", "state", "times", "use", "note"), *states],
        ]
        return [table for table in tables if len(table) > 1]

    def _advice(self) -> list[str]:
        remedies: dict[str, list[str]] = {}
        for each in self.differences:
            remedies.setdefault(each.remedy, []).append(each.module)
        several = len(remedies) > 1
        uses = (f"Use{f' in {join_names(names)}' * several}: {remedy}." for remedy, names in remedies.items())
        return [*uses, *(f"Fix: {each}" for each in self.fixes)]


def _together(names: list[str]) -> list[str]:
    return [join_names(names)] if len(names) > _MANY else names
