"""The curves: what uncorrected passes do to the running statistics, and what the correction undoes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from momentum_fix.formula import corrected_momentum, effective_momentum
from momentum_fix.weights import batch_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with every kind of colour vision, without what is too light for a thin line on
# white, and a brown: green for corrected runs, the others by passes.
GREEN, BY_PASSES = "#009E73", ("#000000", "#0072B2", "#D55E00", "#8B4513", "#CC79A7")

Curves = dict[str, tuple[list[float], list[float]]]


def decay_data(momentum: float = 0.1, passes: Sequence[int] = (2, 3, 5), batches: int = 40) -> Curves:
    """Give, per run, the ages (batches ago) and the weight that a batch of that age has in the running value.

    The runs are "1 pass", then "k passes" uncorrected for each k, then "k passes, corrected" for the largest.

    Example:
        >>> ages, weights = decay_data(batches=2)["2 passes"]
        >>> ages, [round(weight, 4) for weight in weights]
        ([0.0, 1.0], [0.19, 0.1539])
    """
    ages = list(range(batches))
    curves: Curves = {}
    for label, (used, k) in _runs(momentum, passes).items():
        weights = batch_weights(reversed(ages), used, k).batches  # the oldest batch comes first
        curves[label] = (list(map(float, ages)), [weights[age] for age in ages])
    return curves


def cumulative_data(momentum: float = 0.1, passes: Sequence[int] = (2, 3, 5), batches: int = 40) -> Curves:
    """Give, per run of `decay_data`, numbers of batches and the weight that so many newest batches have together.

    Example:
        >>> round(cumulative_data(batches=3)["1 pass"][1][-1], 3) == round(1 - 0.9**3, 3)
        True
    """
    curves: Curves = {}
    for label, (ages, weights) in decay_data(momentum, passes, batches).items():
        curves[label] = ([age + 1 for age in ages], [sum(weights[: n + 1]) for n in range(batches)])
    return curves


def effective_data(passes: Sequence[int] = (1, 2, 3, 5), points: int = 51, momentum: float = 0.1) -> Curves:
    """Give, per number of passes, momenta from 0 to 1 and the effective momenta that they amount to.

    The last entry is what one `momentum` amounts to with each of these numbers of passes.

    Example:
        >>> data = effective_data(points=11)
        >>> round(data["2 passes"][1][1], 3), [round(value, 3) for value in data["momentum 0.1"][1]]
        (0.19, [0.1, 0.19, 0.271, 0.41])
    """
    momenta = [point / (points - 1) for point in range(points)]
    curves = {_count(k): (momenta, [effective_momentum(value, k) for value in momenta]) for k in passes}
    at_one = [momentum] * len(passes), [effective_momentum(momentum, k) for k in passes]
    return curves | {f"momentum {momentum:g}": at_one}


def shares_data(momentum: float = 0.1, batches: int = 8) -> Curves:
    """Give, per order of two corrected passes a batch, the batches (1 the oldest) and their weights.

    Example:
        >>> data = shares_data(batches=2)
        >>> [round(weight, 4) for weight in data["forward, then in reverse"][1]]  # A B B A
        [0.0951, 0.0949]
        >>> [round(weight, 4) for weight in data["forward, then again"][1]]  # A B A B
        [0.0925, 0.0975]
    """
    there = list(range(1, batches + 1))
    orders = {
        "one after the other": sorted(there * 2),
        "forward, then again": there * 2,
        "forward, then in reverse": there + there[::-1],
    }
    used = corrected_momentum(momentum, 2)
    curves: Curves = {}
    for label, order in orders.items():
        weights = batch_weights(order, used).batches
        curves[label] = (list(map(float, there)), [weights[batch] for batch in there])
    return curves


def signal_data(momentum: float = 0.1, passes: int = 5, batches: int = 160, seed: int = 0) -> Curves:
    """Give batch means (unit noise; at rest, then drifting) and the running means that three runs make of them.

    The runs are "1 pass", "k passes" uncorrected, and "k passes, corrected". "true mean" is what they estimate.

    Example:
        >>> data = signal_data(passes=2)
        >>> max(abs(a - b) for a, b in zip(data["1 pass"][1], data["2 passes, corrected"][1])) < 1e-12
        True
    """
    noise, numbers = random.Random(seed), list(map(float, range(1, batches + 1)))
    truth = [max(0.0, 0.1 * (number - batches / 2)) for number in numbers]
    means = [value + noise.gauss(0.0, 1.0) for value in truth]
    curves: Curves = {"batch mean": (numbers, means), "true mean": (numbers, truth)}
    for label, (used, k) in _runs(momentum, [passes]).items():
        value, values = 0.0, []
        for mean in means:
            for _ in range(k):
                value += used * (mean - value)
            values.append(value)
        curves[label] = (numbers, values)
    return curves


def decay(
    momentum: float = 0.1, passes: Sequence[int] = (2, 3, 5), batches: int = 31, *, ax: Axes | None = None
) -> Axes:
    """Draw the weight of a batch by its age: `decay_data` on `ax`, or on a new figure's axes; return the axes."""
    ax = _axes(ax, "Uncorrected passes forget faster, corrected ones do not")
    ax.set(xlabel="age of the batch (batches)", ylabel="weight in the running value", yscale="log", ylim=(1e-3, 0.6))
    return _draw(ax, decay_data(momentum, passes, batches), _configured(momentum))


def cumulative(
    momentum: float = 0.1, passes: Sequence[int] = (2, 3, 5), batches: int = 30, *, ax: Axes | None = None
) -> Axes:
    """Draw the weight of the newest batches together: `cumulative_data`, on `ax` or new axes; return the axes."""
    ax = _axes(ax, "With uncorrected passes fewer batches count")
    ax.set(xlabel="newest batches (batches)", ylabel="their weight together", ylim=(0, 1.05))
    return _draw(ax, cumulative_data(momentum, passes, batches), _configured(momentum))


def effective(passes: Sequence[int] = (1, 2, 3, 5), *, momentum: float = 0.1, ax: Axes | None = None) -> Axes:
    """Draw effective momentum against momentum, `momentum` marked: `effective_data`, on `ax` or new axes."""
    ax = _axes(ax, "k passes act like one pass with a larger momentum")
    ax.set(xlabel="momentum of the layer (weight of the new value)", ylabel="effective momentum", ylim=(0, 1.05))
    return _draw(ax, effective_data(passes, momentum=momentum), "passes per batch")


def shares(momentum: float = 0.1, batches: int = 8, *, ax: Axes | None = None) -> Axes:
    """Draw the weights of single batches by order of passes: `shares_data`, on `ax` or new axes; return the axes."""
    ax, data = _axes(ax, "Interleaved, the newest batches weigh too little"), shares_data(momentum, batches)
    ax.set(xlabel="batch, oldest to newest (batches)", ylabel="weight in the running value")
    for (label, (numbers, weights)), colour, marker in zip(data.items(), BY_PASSES, "o^s", strict=False):
        ax.plot(numbers, weights, color=colour, marker=marker, label=label)
    ax.set_ylim(bottom=0)
    return _legend(ax, f"2 passes, corrected for momentum {momentum:g}", "lower right")


def signal(
    momentum: float = 0.1, passes: int = 5, batches: int = 160, seed: int = 0, *, ax: Axes | None = None
) -> Axes:
    """Draw running means of a simulated signal: `signal_data`, on `ax` or new axes; return the axes."""
    ax = _axes(ax, "Uncorrected passes lag less and carry more noise")
    ax.set(xlabel="time (batches)", ylabel="running mean (σ of one batch mean)")
    return _draw(ax, signal_data(momentum, passes, batches, seed), _configured(momentum))


def figure() -> Figure:
    """Draw all the curves on one new figure and return it.

    Example:
        >>> len(figure().axes)
        5
    """
    from matplotlib.figure import Figure

    page = Figure(figsize=(11, 12), layout="constrained")
    axes = page.subplot_mosaic([["decay", "cumulative"], ["effective", "shares"], ["signal", "signal"]])
    for name, draw in _PLOTS.items():
        draw(ax=axes[name])
    return page


def save(path: str | Path, page: Figure | None = None) -> None:
    """Write a figure (all the curves, if none is given) as PNG, SVG or PDF, by the name of the file.

    Raises:
        ValueError: the name ends in something else.
        OSError: the file cannot be written.
    """
    from matplotlib import rc_context

    kind = Path(path).suffix.lower()
    if kind not in (".png", ".svg", ".pdf"):
        raise ValueError(f"the file is {str(path)!r}, but its name must end in .png, .svg or .pdf to say what to write")
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(kind)
    with rc_context({"svg.hashsalt": "momentum_fix"}):  # the same curves give the same file
        (page or figure()).savefig(path, dpi=120, metadata=undated)


_PLOTS: dict[str, Callable[..., Axes]] = {
    "decay": decay,
    "cumulative": cumulative,
    "effective": effective,
    "shares": shares,
    "signal": signal,
}


def _runs(momentum: float, passes: Sequence[int]) -> dict[str, tuple[float, int]]:
    """Name the runs to compare, each with the momentum of its layer and its number of passes."""
    runs = {_count(k): (momentum, k) for k in (1, *passes)}
    most = max(passes)
    return runs | {f"{_count(most)}, corrected": (corrected_momentum(momentum, most), most)}


def _count(passes: int) -> str:
    return "1 pass" if passes == 1 else f"{passes} passes"


def _configured(momentum: float) -> str:
    return f"configured momentum {momentum:g}"


def _axes(ax: Axes | None, title: str) -> Axes:
    from matplotlib.figure import Figure

    if ax is None:
        ax = Figure(figsize=(6.4, 4.2), layout="constrained").subplots()
    ax.set_title(title)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _draw(ax: Axes, curves: Curves, title: str) -> Axes:
    """Draw each run by its passes, the corrected one as a band under "1 pass"; dots and dashes are no runs."""
    for label, (xs, ys) in curves.items():
        if label.endswith("corrected"):
            style: dict[str, Any] = {"color": GREEN, "linewidth": 7, "alpha": 0.35, "zorder": 1}
        elif "pass" in label:
            style = {"color": BY_PASSES[(int(label.split()[0]) - 1) % len(BY_PASSES)], "linewidth": 1.5, "zorder": 2}
        elif label == "true mean":
            style = {"color": "0.4", "linewidth": 1, "linestyle": "--"}
        elif label == "batch mean":
            style = {"color": "0.5", "linestyle": "", "marker": "o", "markersize": 3}
        else:
            style = {"color": "0", "linestyle": "", "marker": "o", "markersize": 7, "markerfacecolor": "none"}
        ax.plot(xs, ys, label=label, **style)
    return _legend(ax, title)


def _legend(ax: Axes, title: str, place: Any = "best") -> Axes:
    ax.legend(loc=place, title=title, fontsize=9, title_fontsize=9, frameon=False, alignment="left")
    return ax
