"""What the study found: docs/study.md and its figures, every number of it from benchmarks/study.json.

`python benchmarks/study_page.py` writes them anew, and the answer in a few sentences into README and paper.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from scipy import stats
from statsmodels.stats.multitest import multipletests

from study import AFTER, CHECKPOINTS, MOMENTA, PRECISE, SMALL, VARIANTS, WINDOW, Condition, K, step_weights, theory
from study_tasks import TASKS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import pages  # noqa: E402

DATA = ROOT / "benchmarks" / "study.json"
QUOTES = (ROOT / "README.md", ROOT / "paper.md")
UNCORRECTED = [name for name in K if name != "k = 1"]
INTERLEAVED = [name for name in VARIANTS if name.startswith(("A B", "8 in"))]
COLORS = {"k = 2": "#0072B2", "k = 3": "#009E73", "k = 5": "#D55E00", "nested": "#CC79A7"}
ORDERS = {"shuffled": "shuffled data", "runs": "data in runs of one kind", "change": "a change of domain midway"}
LEVEL = 0.05


def load(file: Path = DATA) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


class Difference(NamedTuple):
    """A mean over seeds with its 95 % interval."""

    mean: float
    low: float
    high: float

    def text(self, digits: int = 2) -> str:
        return f"{self.mean:+.{digits}f} ({self.low:+.{digits}f} to {self.high:+.{digits}f})"

    def sign(self) -> int:
        """Give 1 if the interval is above 0, -1 if below, 0 if it contains 0."""
        return (self.low > 0) - (self.high < 0)


def paired(mine: list[float], other: list[float]) -> tuple[Difference, float]:
    """Give the mean paired difference with its t interval, and the p value."""
    apart = np.subtract(mine, other)
    if np.ptp(apart) < 1e-9:  # no spread, so no t
        only = round(float(apart[0]), 9)
        return Difference(only, only, only), float(only == 0)
    test = stats.ttest_rel(mine, other)
    return Difference(float(apart.mean()), *map(float, test.confidence_interval(1 - LEVEL))), float(test.pvalue)


def difference(cell: dict, name: str, what: str = "final error", base: str = "k = 1") -> Difference:
    return paired(cell["variants"][name][what], cell["variants"][base][what])[0]


def percent(group: list[dict], name: str) -> Difference:
    """Give by how many percent the final loss is above that with k = 1, in the geometric mean over conditions.

    With its interval over seeds: t on the logarithms.
    """
    mine, other = (
        np.mean([np.log(cell["variants"][one]["final loss"]) for cell in group], axis=0) for one in (name, "k = 1")
    )
    return Difference(*(100 * float(np.expm1(end)) for end in paired(mine, other)[0]))


def cells(data: dict, **wanted: object) -> Iterator[tuple[Condition, dict]]:
    """Give the conditions that have these values, with their data; the annealed first, then by batch size."""
    parsed = []
    for name, cell in data["conditions"].items():
        task, batch, schedule, order = name.split(", ")
        parsed.append((Condition(task, int(batch.split()[1]), schedule, order), cell))
    for condition, cell in sorted(parsed, key=lambda one: (one[0].schedule, one[0].batch)):
        if all(getattr(condition, key) == value for key, value in wanted.items()):
            yield condition, cell


class Test(NamedTuple):
    condition: Condition
    name: str
    difference: Difference
    p: float  # after Holm's correction


def primary(data: dict) -> list[Test]:
    """Give the planned comparisons."""
    found = [
        (condition, name, *paired(*(cell["variants"][one]["final error"] for one in (name, "k = 1"))))
        for condition, cell in cells(data, schedule="annealed", order="shuffled")
        if condition.batch in (2, 32)
        for name in ("k = 2", "k = 5")
    ]
    corrected = multipletests([p for *_, p in found], method="holm")[1]
    return [Test(*row, float(p)) for (*row, _), p in zip(found, corrected, strict=True)]


class Effect(NamedTuple):
    condition: Condition
    name: str
    difference: Difference


def excess(cell: dict, name: str) -> np.ndarray:
    """Give the final loss beyond that under the statistics of a full pass, by seed."""
    return np.subtract(*(cell["variants"][one]["final loss"] for one in (name, PRECISE)))


def mean(cell: dict, name: str, what: str) -> float:
    return statistics.fmean(cell["variants"][name][what])


def advice(cell: dict) -> str:
    """Say what to do, by the rule of the design."""
    found = two, five = difference(cell, "k = 2"), difference(cell, "k = 5")
    signs = {two.sign(), five.sign()}
    if signs >= {1, -1}:
        return "worse and better"
    if -1 in signs:
        return "better as it is"
    if 1 in signs:
        return "correct it" if two.sign() else "correct it from k = 5 on"
    if max(abs(end) for one in found for end in one[1:]) <= SMALL:
        return "do not bother"
    return "not told apart"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


WHERE = ["task", "batch", "rate"]


def where(condition: Condition) -> list[str]:
    return [condition.task, str(condition.batch), condition.schedule]


def to_decide_from(data: dict) -> str:
    rows = [
        [
            *where(condition),
            f"{mean(cell, 'k = 1', 'final error'):.2f}",
            *(difference(cell, name).text() for name in ("k = 2", "k = 5", "nested")),
            advice(cell),
        ]
        for condition, cell in cells(data, order="shuffled")
    ]
    return table([*WHERE, "error, k = 1", "k = 2", "k = 5", "nested", "what to do"], rows)


def spread(values: list[float], sign: str = "") -> str:
    """Give the median, the smallest and the largest."""
    if not values:
        return "none"
    return f"{statistics.median(values):{sign}.2f} ({min(values):{sign}.2f} to {max(values):{sign}.2f})"


def verdicts(found: list[Difference]) -> str:
    """Count the intervals above and below 0."""
    above, below = (sum(d.sign() == sign for d in found) for sign in (1, -1))
    return f"{above} worse, {below} better, of {len(found)}"


SO = {1: "correct it", 0: "nothing to be seen", -1: "better as it is"}


def in_short(data: dict) -> str:
    groups: dict[tuple[str, int], list[dict]] = {}
    for condition, cell in cells(data, order="shuffled"):
        if condition.task == NO_TEST:
            continue
        groups.setdefault((condition.schedule, condition.batch), []).append(cell)
    rows = []
    for (schedule, batch), group in groups.items():
        row = [schedule, str(batch)]
        for name in ("k = 2", "k = 5"):
            found = [difference(cell, name) for cell in group]
            row += [spread([d.mean for d in found], "+"), verdicts(found), percent(group, name).text(1)]
        so = [f"{name}: {SO[percent(group, name).sign()]}" for name in ("k = 2", "k = 5")]
        rows.append([*row, ", ".join(so)])
    texts = ("points of error", "intervals", "loss, %")
    return table(
        ["rate", "batch", *(f"{name}: {text}" for name in ("k = 2", "k = 5") for text in texts), "verdict"], rows
    )


def planned(data: dict) -> str:
    rows = [
        [test.condition.task, str(test.condition.batch), test.name, test.difference.text(), f"{test.p:.2g}"]
        for test in primary(data)
    ]
    return table(["task", "batch", "passes", "points of error", "p, by Holm"], rows)


def losses(data: dict) -> str:
    rows = [
        [
            *where(condition),
            f"{mean(cell, 'k = 1', 'final loss'):.3f}",
            *(percent([cell], name).text(1) for name in ("k = 2", "k = 5", "nested")),
        ]
        for condition, cell in cells(data, order="shuffled")
    ]
    return table([*WHERE, "loss, k = 1", "k = 2, %", "k = 5, %", "nested, %"], rows)


def variation(data: dict) -> str:
    rows = []
    for condition, cell in cells(data, order="shuffled"):
        one, five = (cell["variants"][name] for name in ("k = 1", "k = 5"))
        other = sum(a != b for a, b in zip(one["best step"], five["best step"], strict=True))
        rows.append(
            [
                *where(condition),
                f"{statistics.fmean(one['step-to-step error']):.2f}",
                *(difference(cell, name, "step-to-step error").text() for name in ("k = 2", "k = 5")),
                f"{other} of {len(one['best step'])}",
                difference(cell, "k = 5", "best error").text(),
                difference(cell, "k = 5", "best error, k = 1").text(),
            ]
        )
    header = [
        "from step to step, k = 1",
        "k = 2",
        "k = 5",
        "another choice, k = 5",
        "as shipped",
        "by the choice alone",
    ]
    return table([*WHERE, *header], rows)


def full_pass(data: dict) -> str:
    beside = ["k = 1", "k = 2", "k = 5", "k = 1, m = 0.01"]
    rows = [
        [
            *where(condition),
            f"{mean(cell, PRECISE, 'final error'):.2f}",
            *(difference(cell, name, base=PRECISE).text() for name in beside),
        ]
        for condition, cell in cells(data, order="shuffled")
    ]
    return table([*WHERE, "error, full pass", *beside], rows)


def what_was_trained() -> str:
    rows = [
        [name, task.title, task.metric, str(task.epochs), ", ".join(map(str, task.batches)), f"{task.rate:g}"]
        for name, task in TASKS.items()
    ]
    return table(["task", "data and network", "metric", "epochs", "batch sizes", "learning rate at batch 32"], rows)


def at_momentum(name: str, momentum: float) -> str:
    return name if momentum == 0.1 else f"{name}, m = {momentum}"


def momenta(data: dict, point: str) -> str:
    rows = [
        [
            *where(condition),
            *(
                text
                for m in MOMENTA
                for text in (
                    f"{mean(cell, at_momentum('k = 1', m), f'{point} error'):.2f}",
                    difference(cell, at_momentum("k = 5", m), f"{point} error", at_momentum("k = 1", m)).text(),
                )
            ),
        ]
        for condition, cell in cells(data, order="shuffled")
    ]
    return table([*WHERE, *(text for m in MOMENTA for text in (f"m = {m}, k = 1", "k = 5"))], rows)


def orders(data: dict) -> str:
    rows = []
    for condition, cell in cells(data):
        if condition.order == "shuffled":
            continue
        points = ["early", *(f"{after} after" for after in AFTER), "final"]
        for point in points:
            what = f"{point} error"
            if what in cell["variants"]["k = 1"]:
                rows.append(
                    [
                        condition.order,
                        condition.task,
                        point,
                        f"{mean(cell, 'k = 1', what):.2f}",
                        *(difference(cell, name, what).text() for name in ("k = 2", "k = 5", "k = 1, m = 0.01")),
                    ]
                )
    return table(["order", "task", "when", "error, k = 1", "k = 2", "k = 5", "k = 1, m = 0.01"], rows)


def interleaved(data: dict) -> str:
    chosen = list(cells(data, batch=2, schedule="annealed", order="shuffled"))
    base = theory(VARIANTS["k = 1"])
    rows = []
    for name in ["k = 2", *INTERLEAVED]:
        predicted = theory(VARIANTS[name])
        rows.append(
            [
                name,
                f"{predicted.variance / base.variance:.2f}",
                f"{predicted.age:.1f}",
                *(difference(cell, name).text() for _, cell in chosen),
            ]
        )
    return table(["updates", "variance", "mean age", *(condition.task for condition, _ in chosen)], rows)


def theory_rows(data: dict) -> list[tuple[str, float, list[float], list[float]]]:
    """Give, by variant, the predicted ratio of variances and the measured ratios: square distance, excess loss."""
    base = theory(VARIANTS["k = 1"]).variance
    found = []
    for name, variant in VARIANTS.items():
        if variant.order == "nested" or name == "k = 1":
            continue
        far, lost = [], []
        for _, cell in cells(data, schedule="annealed", order="shuffled"):
            far.append(mean(cell, name, "final distance") / mean(cell, "k = 1", "final distance"))
            if paired(*(cell["variants"][one]["final loss"] for one in ("k = 1", PRECISE)))[0].sign() > 0:
                lost.append(float(excess(cell, name).mean() / excess(cell, "k = 1").mean()))
        found.append((name, theory(variant).variance / base, far, lost))
    return sorted(found, key=lambda row: row[1])


def predictions(data: dict) -> str:
    rows = [
        [name, f"{predicted:.2f}", spread(far), spread(lost), f"{theory(VARIANTS[name]).age:.1f}"]
        for name, predicted, far, lost in theory_rows(data)
    ]
    return table(["variant", "predicted", "square distance", "loss beyond the full pass", "mean age, batches"], rows)


Moment = tuple[str, float, Effect]  # when, and at which momentum


def at_all_times(data: dict) -> list[Moment]:
    """Compare uncorrected passes with k = 1 at the same momentum, at each time, in each condition."""
    times = ["early", *(f"{after} after" for after in AFTER), "final"]
    return [
        (time, m, Effect(condition, name, difference(cell, at_momentum(name, m), what, at_momentum("k = 1", m))))
        for condition, cell in cells(data)
        for time in times
        for what in [f"{time} error"]
        if what in cell["variants"]["k = 1"]
        for m in MOMENTA
        for name in UNCORRECTED
    ]


def tally(found: list[Moment]) -> str:
    rows = []
    for time in dict.fromkeys(time for time, _, _ in found):
        row = [[e.difference for t, m, e in found if (t, m) == (time, wanted)] for wanted in MOMENTA]
        rows.append([f"{time} the change" if "after" in time else time, *map(verdicts, row)])
    return table(["when", *(f"m = {m}" for m in MOMENTA)], rows)


def better(found: list[Moment], final: bool, most: int = 10) -> str:
    """Give what is better uncorrected at momentum 0.1, at the end or before, the largest first."""
    chosen = [(t, e) for t, m, e in found if m == 0.1 and e.difference.sign() < 0 and (t == "final") == final]
    chosen.sort(key=lambda row: row[1].difference.mean)
    rows = [[*where(e.condition), e.condition.order, time, e.name, e.difference.text()] for time, e in chosen[:most]]
    return table([*WHERE, "order", "when", "passes", "points of error"], rows)


def effect_figure(data: dict) -> Figure:
    """Draw what passes change in the final error, by batch size: a column a task, a row a schedule."""
    names = list(TASKS)
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axes = figure.subplots(2, len(names), sharex=True, sharey="col", squeeze=False)
    for row, schedule in zip(axes, ("annealed", "constant"), strict=True):
        for ax, task in zip(row, names, strict=True):
            chosen = list(cells(data, task=task, schedule=schedule, order="shuffled"))
            for shift, (name, color) in enumerate(COLORS.items()):
                at = [condition.batch * 1.09 ** (shift - 1.5) for condition, _ in chosen]
                found = [difference(cell, name) for _, cell in chosen]
                errors = [[d.mean - d.low for d in found], [d.high - d.mean for d in found]]
                marker = "os^D"[shift]
                ax.errorbar(at, [d.mean for d in found], errors, fmt=marker, color=color, capsize=2, ms=5, label=name)
            ax.axhline(0, color="black", linewidth=0.8)
            ax.set_yscale("symlog", linthresh=0.5)
            ax.yaxis.set_major_locator(FixedLocator([-10, -3, -1, -0.5, 0, 0.5, 1, 3, 10]))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.set_xscale("log", base=2)
            ax.set_xticks([1, 2, 4, 8, 32], ["1", "2", "4", "8", "32"])
            ax.minorticks_off()
            ax.set_xlim(0.75, 45)
            ax.grid(axis="y", color="0.9")
            ax.spines[["top", "right"]].set_visible(False)
            ax.set_title(f"{task}, {schedule}", fontsize="medium")
    for ax in axes[-1]:
        ax.set_xlabel("batch size")
    figure.supylabel("points of error more than with k = 1")
    lines, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def theory_figure(data: dict) -> Figure:
    """Draw measured ratios over the predicted ratio of variances."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = theory_rows(data)
    for ax, number, title in (
        (left, 2, "square distance from a full pass's statistics"),
        (right, 3, "loss beyond that with a full pass's statistics"),
    ):
        for row in rows:
            values = row[number]
            color = next((c for name, c in COLORS.items() if row[0] == name), "0.55")
            order = 3 if row[0] in COLORS else 2
            ax.scatter([row[1]] * len(values), values, s=16, color=color, alpha=0.8, zorder=order, edgecolors="none")
        ends = [min(row[1] for row in rows), max(row[1] for row in rows)]
        ax.plot(ends, ends, color="black", linewidth=0.9)
        ax.annotate("as predicted", ends[1:] * 2, (-6, 8), textcoords="offset points", ha="right", fontsize="small")
        ax.set_xscale("log")
        positive = min(min(row[number], default=1) for row in rows) > 0
        if positive:
            ax.set_yscale("log")
        else:
            ax.set_yscale("symlog", linthresh=0.1)
            ax.yaxis.set_major_locator(FixedLocator([-0.1, 0, 0.1, 1, 10, 100]))
        ax.grid(color="0.92")
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xlabel("predicted: variance relative to k = 1, m = 0.1")
        ax.set_ylabel("measured, relative to k = 1, m = 0.1")
        ax.set_title(title, fontsize="medium")
    for name in ("k = 2", "k = 3", "k = 5"):
        left.scatter([], [], s=16, color=COLORS[name], label=f"{name}, m = 0.1")
    left.scatter([], [], s=16, color="0.55", label="other momenta and orders")
    left.legend(frameon=False, loc="upper right")
    return figure


def change_figure(data: dict) -> Figure:
    """Draw the errors after a change of domain."""
    chosen = list(cells(data, order="change"))
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, len(chosen), squeeze=False)[0]
    points = [f"{after} after" for after in AFTER]
    styles = {
        "k = 1": ("black", "o"),
        "k = 2": (COLORS["k = 2"], "s"),
        "k = 5": (COLORS["k = 5"], "^"),
        "k = 1, m = 0.01": ("0.6", "o"),
        "k = 5, m = 0.01": ("0.6", "^"),
    }
    for ax, (condition, cell) in zip(axes, chosen, strict=True):
        for name, (color, marker) in styles.items():
            there = [point for point in [*points, "final"] if f"{point} error" in cell["variants"][name]]
            values = [mean(cell, name, f"{point} error") for point in there]
            dashes = "--" if "0.01" in name else "-"
            ax.plot(there, values, dashes, color=color, marker=marker, ms=5, label=name)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
        ax.tick_params(which="both", labelsize="small")
        ax.grid(axis="y", which="both", color="0.92")
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_title(f"{condition.task}, batch {condition.batch}", fontsize="medium")
        ax.set_xlabel("steps after the change")
        ax.set_xticks(range(len(there)), [point.removesuffix(" after") for point in there])
    axes[0].set_ylabel("error in percent")
    axes[-1].legend(frameon=False, fontsize="small")
    return figure


FIGURES = {"effect": effect_figure, "theory": theory_figure, "change": change_figure}


NO_TEST = "brain"  # the template is mirror-symmetric: its held-out half is the training half, mirrored


def change(data: dict, schedule: str, batch: int, name: str) -> Difference:
    """Give by how many percent passes change the loss, over the tasks with independent test data."""
    found = cells(data, schedule=schedule, batch=batch, order="shuffled")
    return percent([cell for condition, cell in found if condition.task != NO_TEST], name)


def brief(data: dict) -> str:
    """Give the answer as README's first screen has it."""
    said = {
        (schedule, batch, name): f"{change(data, schedule, batch, name).mean:+.0f} %"
        for schedule, batch in (("annealed", 2), ("annealed", 32), ("constant", 32))
        for name in ("k = 2", "k = 5")
    }
    return (
        "In small tasks with an annealed learning rate, the uncorrected updates changed the evaluation loss by "
        f"{said['annealed', 2, 'k = 2']} (two passes per batch) and {said['annealed', 2, 'k = 5']} (five) at batch "
        f"size 2, and by {said['annealed', 32, 'k = 2']} and {said['annealed', 32, 'k = 5']} at batch size 32. With a "
        f"constant rate at batch size 32 they changed it by {said['constant', 32, 'k = 2']} and "
        f"{said['constant', 32, 'k = 5']}: there the configured momentum is too small, and more updates hide it."
    )


def sentences(data: dict) -> list[str]:
    """Give the answer in two sentences, as paper and page say it."""
    said = {
        (schedule, batch, name): change(data, schedule, batch, name).text(1)
        for schedule, batch in (("annealed", 2), ("annealed", 32), ("constant", 2), ("constant", 32))
        for name in ("k = 2", "k = 5")
    }
    tested = [condition.task for condition, _ in cells(data, schedule="constant", batch=32)]
    seeds = {len(cell["seeds"]) for _, cell in cells(data)}
    return [
        f"In {len(tested)} small tasks ({', '.join(tested)}), {min(seeds)} seeds each, with an annealed learning "
        f"rate, leaving the passes uncorrected changes the evaluation loss by {said['annealed', 2, 'k = 2']} % with "
        f"k = 2 and {said['annealed', 2, 'k = 5']} % with k = 5 at batch 2, and by {said['annealed', 32, 'k = 2']} % and "
        f"{said['annealed', 32, 'k = 5']} % at batch 32.",
        f"With a constant rate it is {said['constant', 2, 'k = 2']} % and {said['constant', 2, 'k = 5']} % at batch 2, "
        f"but {said['constant', 32, 'k = 2']} % and {said['constant', 32, 'k = 5']} % at batch 32, where the weights "
        "still move and fresher statistics are better.",
    ]


def quoting(text: str, data: dict) -> str:
    """Put the answer into a document, between the comments that mark its place."""
    for mark, answer in (("study", " ".join(sentences(data))), ("study in brief", brief(data))):
        text = pages.quoting(text, mark, pages.wrapped(answer, 110))
    return text


def page(data: dict) -> str:
    """Write docs/study.md."""
    everything = list(cells(data))
    seeds = min(len(cell["seeds"]) for _, cell in everything)
    runs = sum(len(cell["seeds"]) for _, cell in everything)
    shuffled = [cell for _, cell in cells(data, order="shuffled")]
    best = [
        a != b
        for cell in shuffled
        for a, b in zip(*(cell["variants"][name]["best step"] for name in ("k = 1", "k = 5")), strict=True)
    ]
    shipped = [difference(cell, "k = 5", "best error") for cell in shuffled]
    chosen = [difference(cell, "k = 5", "best error, k = 1") for cell in shuffled]
    steadier = [difference(cell, "k = 5", "step-to-step error") for cell in shuffled]
    gain = [difference(cell, "k = 1", base=PRECISE) for cell in shuffled]
    gain_five = [difference(cell, "k = 5", base=PRECISE) for cell in shuffled]
    early = {
        m: [difference(cell, at_momentum("k = 5", m), "early error", at_momentum("k = 1", m)) for cell in shuffled]
        for m in MOMENTA
    }
    rooted, plain = (
        [difference(cell, name) for cell in shuffled for name in INTERLEAVED if name.endswith("root") == root]
        for root in (True, False)
    )
    left = {name: step_weights(K[name].order, K[name].momentum, AFTER[0])[0] for name in ("k = 1", "k = 5")}
    compared = at_all_times(data)
    early_counts, slow_counts = (
        verdicts([e.difference for t, m, e in compared if (t, m) == wanted])
        for wanted in (("early", 0.1), ("final", 0.01))
    )
    constant = list(cells(data, schedule="constant", order="shuffled"))
    moving = max(condition.batch for condition, _ in constant)
    moved = [cell for condition, cell in constant if condition.batch == moving]
    drift = (moving, *(percent(moved, name).text(1) for name in ("k = 2", "k = 5")))
    outlier = min(
        ((condition, cell["steps"], cell) for condition, cell in cells(data, schedule="annealed", order="shuffled")),
        key=lambda one: mean(one[2], "k = 5", "final distance") / mean(one[2], "k = 1", "final distance"),
    )
    single = [
        f"{condition.task} {mean(cell, PRECISE, 'final error'):.1f} %" for condition, cell in cells(data, batch=1)
    ]
    rule = {name: (predicted, lost) for name, predicted, _, lost in theory_rows(data)}

    return f"""\
# Is it negligible?

Made by `make study` from [its data file](../benchmarks/study.json): {runs} training runs, {len(everything)} conditions,
{seeds} seeds each, {data["minutes"]:.0f} minutes of one core, torch {data["torch"].split("+")[0]}. The tests rebuild
this page and compare.

**{sentences(data)[0]} {sentences(data)[1]}**

k is how often a layer's running statistics are updated for one batch, with an uncorrected momentum of 0.1 unless
another is named; k = 1 is training without checkpoints, or with them corrected. *Nested* is the mixed k of MONAI's
nested `CheckpointUNet`, 2 to 5 by depth. *Error* is the share of misclassified test examples in percent, for the
brain 100 (1 - Dice). A difference is in points of that, from k = 1 on the same weights, with its 95 % interval over
seeds; above 0 the uncorrected run is worse. "Annealed" is a cosine to 0, "constant" a constant learning rate.

## A table to decide with

The brain is no test of what is held out: its template is mirror-symmetric, so the held-out half is the training half,
mirrored, and two thresholds on the brightness do better than the network. It counts for nothing in the answer above and
in the next table. The planned comparisons have it still.

Over the other tasks: the median of their differences, the smallest and the largest; how many of their intervals lie
above 0 (worse) or below (better); and the change of the loss, in the geometric mean over the tasks, with its interval,
which decides the verdict.

{in_short(data)}

Task by task:

{to_decide_from(data)}

- *correct it*: the interval of k = 2 lies above 0; *correct it from k = 5 on*: only that of k = 5 does
- *do not bother*: both intervals lie within {SMALL} points
- *better as it is*: an interval lies below 0
- *not told apart*: none of these; {seeds} seeds do not tell

![what uncorrected passes change, by task, schedule and batch size](study-effect.png)

A rule for your own network: evaluate it once as it is and once after `torch.optim.swa_utils.update_bn`. What the
loss gains by that with k = 1 is what the noise of the running statistics costs; k passes multiply it, by
{rule["k = 2"][0]:.2f} (k = 2) and {rule["k = 5"][0]:.2f} (k = 5) according to the theory at momentum 0.1, and by
{spread(rule["k = 2"][1])} and {spread(rule["k = 5"][1])} here: the median, the smallest and the largest of the
{len(rule["k = 2"][1])} annealed conditions in which that gain is told apart from 0.

## The planned comparisons

Written down before the runs; two-sided paired t tests, corrected by Holm's method for all {len(primary(data))}.
All else on this page is exploration: its intervals are not corrected for their number.

{planned(data)}

## The loss

The loss tells more than the error, which counts only what crosses a border. In percent of the loss with k = 1:

{losses(data)}

## From step to step, and the choice of the best checkpoint

*From step to step* is the standard deviation of the error over the last {WINDOW} steps, and the difference of that from
k = 1: {verdicts(steadier)} for k = 5. The best of {CHECKPOINTS} checkpoints by validation loss is another one with
k = 5 than with k = 1 in {sum(best)} of {len(best)} runs. *As shipped* compares the test errors of the two choices,
each with its own statistics ({verdicts(shipped)}); *by choice alone* gives both the right statistics
({verdicts(chosen)}).

{variation(data)}

## Does recomputing the statistics make this moot?

A full pass over the training data with the weights standing still (PreciseBN; `torch.optim.swa_utils.update_bn` does
it) does not depend on k, so with it nothing is left to correct. Compared with it, k = 1: {verdicts(gain)};
k = 5: {verdicts(gain_five)}. The pass costs the forward half of one epoch, each time that the model is evaluated.

{full_pass(data)}

## Early in training, and other momenta

After 5 % of the steps, k = 5 beside k = 1: at momentum 0.01 {verdicts(early[0.01])}; at 0.1 {verdicts(early[0.1])};
at 0.3 {verdicts(early[0.3])}. More passes forget the initial statistics sooner.

{momenta(data, "early")}

At the end:

{momenta(data, "final")}

## Data in another order

*runs*: stretches of 32 examples of one class (for the brain, of one height). *change*: in mid-training the contrast
is inverted and halved, for the held-out data too. {AFTER[0]} steps after it, {left["k = 1"]:.0%} of a running value is
still from before with k = 1, and {left["k = 5"]:.1%} with k = 5.

{orders(data)}

![errors after a change of domain](study-change.png)

## Updates of several batches in turn

Siamese inputs and a layer called twice give A B B A, torch's GPipe schedule A B A B; *8 in flight* is GPipe with 8
micro-batches. *Root*: with the corrected momentum of k = 2, which is not exact here. With the root, {verdicts(rooted)};
without it, {verdicts(plain)}. Variance and mean age (in batches) are the theory's, variance relative to k = 1. Batch 2,
annealed, in points of error:

{interleaved(data)}

## What the theory says, and where it stops

For independent batches the weights of the batches predict the variance of a running value. Beside it, annealed and
shuffled: its square distance from the statistics of the full pass, and the loss beyond that with these statistics,
both relative to k = 1 at momentum 0.1; the median over conditions, the smallest and the largest. The loss counts where
k = 1 loses at all, that is, where the interval of its loss beyond the full pass lies above 0.

{predictions(data)}

It stops where it must: with momentum 0.01, when too few batches have come for the initial statistics to be forgotten,
and where the weights still move as fast as the average follows (the smallest ratio of k = 5 is that of
{outlier[0].task}, batch {outlier[0].batch}, with {outlier[1]} steps). Far out the loss grows faster than the variance.

![predicted and measured ratios](study-theory.png)

## Where the uncorrected run is better

Every comparison of k = 2, 3, 5 and nested with k = 1 at the same momentum, in all conditions. Of {len(compared)}
intervals, {len(compared) * LEVEL / 2:.0f} would lie below 0 by chance if nothing had any effect, and as many above;
they are not independent of each other.

{tally(compared)}

Three cases:

- Early, at momentum 0.1: {early_counts}, because more passes forget the initial statistics sooner. At momentum 0.01
  this lasts to the end ({slow_counts}): these trainings are short beside its mean age of
  {theory(VARIANTS["k = 1, m = 0.01"]).age:.0f} batches.
- With a constant learning rate at batch {drift[0]}, where the weights still move: the loss changes by
  {drift[1]} % with k = 2 and {drift[2]} % with k = 5, in the mean over the tasks.
- Just after a change of domain, for the digits; for the vowels and the brain it is the other way round.

At momentum 0.1, in the final error:

{better(compared, final=True)}

Before the end, the largest 10:

{better(compared, final=False)}

## How it was done

The weights' path does not depend on the running statistics, so one training run carries every variant: each layer's
batch statistics are recorded step by step, and the running statistics for any momentum, k and order are computed from
the record, put into the buffers, and evaluated. The tests compare this with torch's own updates. The design stands,
as it was written down before the runs, at the head of [study.py](../benchmarks/study.py): tasks, factors, seeds,
planned comparisons, and what counts as final, early and small. Conditions were cut after a pilot had shown a result:
the constant rate at batch 32, where a pilot on the digits had seen no effect for the worse any more. It has the
largest effect for the better. It was run when all the rest was known, and the page's first answer, that the
uncorrected run is hardly ever better, came from leaving it out. The rule for *better as it is* was moved before the
others after results had been seen, and a bootstrap was replaced by t intervals. Chosen afterwards, with part of the
seeds seen: the summary over the tasks by the loss, the rule for a network of your own, and which numbers the answer
gives.

{what_was_trained()}

SGD with momentum 0.9 and weight decay 0.0005; the learning rate is in proportion to the batch size. Intervals are
paired t intervals over seeds (SciPy), the correction is statsmodels'.

## Limits

- Small networks on small data, trained for minutes: nothing here speaks of ImageNet.
- {seeds} seeds: an interval that contains 0 does not prove that there is no effect.
- At batch 1 a layer is trained on the statistics of one example and evaluated on those of many: the error is high even
  with a full pass ({", ".join(single) or "not run"}), so do not read the effects there as those of a network in use.
- Interleaved orders use batches of consecutive steps, between which the weights move a little; in a pipeline or a
  siamese network they do not.
- The nested passes are counted in MONAI's network and spread over the depth of the other three.
- Training that reads its running statistics (Batch Renormalization, a frozen BatchNorm later) is another matter.
"""


def write(data: dict, folder: Path) -> Path:
    """Write the page and its figures; give the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw(data).savefig(folder / f"study-{name}.png", dpi=110)
    file = folder / "study.md"
    file.write_text(page(data), encoding="utf-8")
    return file


if __name__ == "__main__":
    print(write(load(), ROOT / "docs"))
    for quotes in QUOTES:
        quotes.write_text(quoting(quotes.read_text(encoding="utf-8"), load()), encoding="utf-8")
