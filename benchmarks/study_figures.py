"""The study's figures: a k has one colour and one line in all of them."""

from __future__ import annotations

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from momentum_fix.plots import BY_PASSES, LINES
from study import AFTER, CHANGES, SCHEDULES, Condition
from study_results import BATCHES, ERROR, FIVE, ONE, TWO, Study, logs, percent, values
from study_statistics import Estimate, bootstrap_t
from study_tasks import TASKS

MARKERS = {1: "o", 2: "s", 5: "^"}


def style(ax: Axes, worse: str) -> None:
    """Say which way is which: above, at this side."""
    ax.grid(axis="y", color="0.9")
    ax.spines[["top", "right"]].set_visible(False)
    at = {"left": 0.02, "right": 0.98}[worse]
    look = {"transform": ax.transAxes, "fontsize": "small", "color": "0.4", "style": "italic"}
    ax.text(at, 0.98, "worse", ha=worse, va="top", **look)
    ax.text(0.02, 0.02, "better", ha="left", va="bottom", **look)


def bars(ax: Axes, at: list[float], found: list[Estimate], k: int, label: str) -> None:
    """Draw means with their intervals, in the colour, line and marker of k."""
    means = [one.mean for one in found]
    errors = [[one.mean - one.low for one in found], [one.high - one.mean for one in found]]
    ax.errorbar(
        at, means, errors, fmt=f"{LINES[k - 1]}{MARKERS[k]}", color=BY_PASSES[k - 1], lw=1, capsize=2, ms=4, label=label
    )


def legend(figure: Figure, ax: Axes) -> Figure:
    """Put what the axes share below them."""
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def effect_figure(study: Study) -> Figure:
    """Draw what uncorrected passes change in the final loss, by batch size: a column a task, a row a schedule."""
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    axes = figure.subplots(len(SCHEDULES), len(TASKS), sharex=True, sharey="row", squeeze=False)
    for row, schedule in zip(axes, SCHEDULES, strict=True):
        for ax, task in zip(row, TASKS, strict=True):
            for variant, shift in ((TWO, 0.95), (FIVE, 1.05)):
                chosen = [Condition(task, batch, schedule) for batch in BATCHES]
                found = [percent(bootstrap_t(logs(study, c, variant))) for c in chosen]
                bars(ax, [batch * shift for batch in BATCHES], found, variant.k, f"k = {variant.k}, uncorrected")
            style(ax, "left")
            ax.axhline(0, color="black", linewidth=0.8)
            ax.set_yscale("symlog", linthresh=5)
            ax.yaxis.set_major_locator(FixedLocator([-50, -20, -5, 0, 5, 20, 50]))
            ax.yaxis.set_major_formatter(lambda x, _: f"{x:+g} %" if x else "0 %")
            ax.set_xscale("log", base=2)
            ax.set_xticks(BATCHES, map(str, BATCHES))
            ax.minorticks_off()
            ax.margins(y=0.12)
            ax.set_title(f"{task}, {schedule}", fontsize="medium")
    for ax in axes[-1]:
        ax.set_xlabel("batch size")
    figure.supylabel("test log loss against k = 1")
    return legend(figure, axes[0, 0])


def chance(task: str) -> float:
    """Give the error of guessing at random with the classes' frequencies."""
    target = TASKS[task].load(0).test_y.flatten()
    guess = target[torch.randperm(len(target), generator=torch.Generator().manual_seed(0))]
    return TASKS[task].error(guess, target)


def change_figure(study: Study) -> Figure:
    """Draw the errors after a change of domain."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots(1, len(CHANGES), squeeze=False)[0]
    times = [*(f"{after} after" for after in AFTER), "final"]
    for ax, condition in zip(axes, CHANGES, strict=True):
        for variant, shift in ((ONE, -0.08), (TWO, 0.0), (FIVE, 0.08)):
            found = [bootstrap_t(values(study, condition, variant, time, ERROR)) for time in times]
            bars(ax, [i + shift for i in range(len(times))], found, variant.k, f"k = {variant.k}")
        guessed = chance(condition.task)
        ax.axhline(guessed, color="0.5", linewidth=0.8)
        ax.text(0.3, guessed, "chance", transform=ax.get_yaxis_transform(), va="bottom", fontsize="small", color="0.4")
        style(ax, "right")
        ax.set_ylim(0, 110)
        ax.set_title(condition.task, fontsize="medium")
        ax.set_xlabel("steps after the change")
        ax.set_xticks(range(len(times)), [time.removesuffix(" after") for time in times])
    axes[0].set_ylabel("error, %")
    return legend(figure, axes[0])


FIGURES = {"effect": effect_figure, "change": change_figure}
