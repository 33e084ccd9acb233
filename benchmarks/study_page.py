"""What the study found: docs/study.md and its figures, every number of it from benchmarks/study.json.

`python benchmarks/study_page.py` writes them anew; `sentences` is what README and paper say.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats
from statsmodels.stats.multitest import multipletests
from study import AFTER, CHECKPOINTS, K, MOMENTA, PRECISE, SMALL, VARIANTS, WINDOW, Condition, theory
from study_tasks import TASKS

ROOT = Path(__file__).parent.parent
DATA = ROOT / "benchmarks" / "study.json"
UNCORRECTED = [name for name in K if name != "k = 1"]
COLORS = {"k = 2": "#0072B2", "k = 3": "#009E73", "k = 5": "#D55E00", "nested": "#CC79A7"}
FIGURES = ("study-effect.png", "study-theory.png", "study-change.png")


class Difference(NamedTuple):
    """A mean paired difference over seeds, with its 95 % t interval."""

    mean: float
    low: float
    high: float

    def text(self, digits: int = 2) -> str:
        return f"{self.mean:+.{digits}f} ({self.low:+.{digits}f} to {self.high:+.{digits}f})"

    def sign(self) -> int:
        """Give 1 or -1 if the interval is above or below 0, else 0."""
        return (self.low > 0) - (self.high < 0)


def difference(cell: dict, name: str, what: str, base: str = "k = 1") -> Difference:
    mine, other = np.array(cell["variants"][name][what]), np.array(cell["variants"][base][what])
    if np.ptp(mine - other) == 0:  # nothing varies, which no t test takes
        return Difference(*[float((mine - other)[0])] * 3)
    test = stats.ttest_rel(mine, other)
    return Difference(float((mine - other).mean()), *map(float, test.confidence_interval(0.95)))


def ratio(above: np.ndarray, below: np.ndarray) -> Difference:
    """Give the ratio of two means over seeds, with its 95 % bootstrap interval."""
    found = stats.bootstrap(
        (above, below),
        lambda a, b, axis=-1: a.mean(axis) / b.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=2000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Difference(float(above.mean() / below.mean()), float(found.low), float(found.high))


def cells(data: dict, **wanted: object) -> Iterator[tuple[Condition, dict]]:
    """Give the conditions that have these values, with their data."""
    for name, cell in data["conditions"].items():
        task, batch, schedule, order = name.split(", ")
        condition = Condition(task, int(batch.split()[1]), schedule, order)
        if all(getattr(condition, key) == value for key, value in wanted.items()):
            yield condition, cell


class Test(NamedTuple):
    condition: Condition
    name: str
    difference: Difference
    p: float  # after Holm's correction


def primary(data: dict) -> list[Test]:
    """Give the planned comparisons."""
    rows = [
        (condition, name, cell)
        for condition, cell in cells(data, schedule="annealed", order="shuffled")
        if condition.batch in (2, 32)
        for name in ("k = 2", "k = 5")
    ]
    found = [difference(cell, name, "final error") for _, name, cell in rows]
    raw = []
    for _, name, cell in rows:
        mine, other = cell["variants"][name]["final error"], cell["variants"]["k = 1"]["final error"]
        raw.append(1.0 if mine == other else float(stats.ttest_rel(mine, other).pvalue))
    corrected = multipletests(raw, method="holm")[1]
    return [
        Test(condition, name, d, float(p)) for (condition, name, _), d, p in zip(rows, found, corrected, strict=True)
    ]


class Effect(NamedTuple):
    condition: Condition
    name: str
    difference: Difference


def effects(data: dict, **wanted: object) -> list[Effect]:
    """Give what uncorrected passes change in the final error at momentum 0.1, smallest first."""
    found = [
        Effect(condition, name, difference(cell, name, "final error"))
        for condition, cell in cells(data, **{"order": "shuffled", **wanted})
        for name in UNCORRECTED
    ]
    return sorted(found, key=lambda effect: effect.difference.mean)


def median(found: list[Effect]) -> float:
    return statistics.median(effect.difference.mean for effect in found)


def advice(cell: dict) -> str:
    """Say what to do, by the rule of the design."""
    two, five = (difference(cell, name, "final error") for name in ("k = 2", "k = 5"))
    if two.sign() > 0:
        return "correct"
    if five.sign() > 0:
        return "correct from k = 5"
    if max(abs(end) for d in (two, five) for end in d[1:]) <= SMALL:
        return "do not bother"
    if five.sign() < 0 or two.sign() < 0:
        return "better uncorrected"
    return "not told apart"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def mean(cell: dict, name: str, what: str) -> float:
    return statistics.fmean(cell["variants"][name][what])


def excess(cell: dict, name: str) -> np.ndarray:
    """Give the final loss beyond that under PreciseBN's statistics, by seed."""
    return np.array(cell["variants"][name]["final loss"]) - np.array(cell["variants"][PRECISE]["final loss"])


def by_label(condition: Condition) -> list[str]:
    return [condition.task, str(condition.batch), condition.schedule]
