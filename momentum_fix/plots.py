"""The curves: what uncorrected passes do to the running statistics, and what the correction undoes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from momentum_fix.formula import corrected_momentum, effective_momentum
from momentum_fix.weights import batch_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Okabe and Ito's palette, told apart with every kind of colour vision, without what is too light for a thin line on
# white, and a brown. Each number of passes, from 1 to 25, has one colour and kind of line in every picture, and what is
# corrected, and nothing else, is green.
GREEN = "#009E73"
BY_PASSES = ("#000000", "#0072B2", "#D55E00", "#8B4513", "#CC79A7")
LINES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), ":")
_CORRECTED = {"color": GREEN, "linewidth": 7, "alpha": 0.35, "zorder": 1}  # a band, under the line of one pass
_OTHERS: dict[str, dict[str, Any]] = {  # what is not told by its passes
    "one after the other": {"color": GREEN, "marker": "o"},
    "forward, then again": {"color": "#00664B", "marker": "^"},
    "forward, then in reverse": {"color": "#003324", "marker": "s"},
    "batch mean": {"color": "0.5", "linestyle": "", "marker": "o", "markersize": 3},
    "true mean": {"color": "0.4", "linewidth": 1},
}
_MARKED = {"color": "0", "linestyle": "", "marker": "o", "markersize": 7, "markerfacecolor": "none"}

Curves = dict[str, tuple[list[float], list[float]]]
Passes = int | Sequence[int]  # of one run, or of several


def decay_data(momentum: float = 0.1, passes: Passes = (2, 3, 5), batches: int = 40) -> Curves:
    """Give, per run, the ages (batches ago) and the weight that a batch of that age has in the running value.

    The runs are "1 pass", then "k passes" uncorrected for each k, then "k passes, corrected" for the largest.

    Example:
        >>> ages, weights = decay_data(batches=2)["2 passes"]
        >>> ages, [round(weight, 4) for weight in weights]
        ([0.0, 1.0], [0.19, 0.1539])
    """
    ages = list(map(float, range(batches)))
    return {
        label: (ages, list(batch_weights(ages, used, k).batches.values())[::-1])  # from the newest batch on
        for label, (used, k) in _runs(momentum, passes).items()
    }


def cumulative_data(momentum: float = 0.1, passes: Passes = (2, 3, 5), batches: int = 40) -> Curves:
    """Give, per run of `decay_data`, numbers of batches and the weight that so many newest batches have together.

    Example:
        >>> round(cumulative_data(batches=3)["1 pass"][1][-1], 3) == round(1 - 0.9**3, 3)
        True
    """
    curves = decay_data(momentum, passes, batches)
    return {label: ([age + 1 for age in ages], list(accumulate(weights))) for label, (ages, weights) in curves.items()}


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
    there, used = list(map(float, range(1, batches + 1))), corrected_momentum(momentum, 2)
    orders = {
        "one after the other": sorted(there * 2),
        "forward, then again": there * 2,
        "forward, then in reverse": there + there[::-1],
    }
    return {label: (there, list(batch_weights(order, used).batches.values())) for label, order in orders.items()}


def signal_data(momentum: float = 0.1, passes: Passes = 5, batches: int = 160, seed: int = 0) -> Curves:
    """Give batch means (unit noise; at rest, then drifting) and the running means that several runs make of them.

    The runs are those of `decay_data`. "true mean" is what they estimate.

    Example:
        >>> data = signal_data(passes=2)
        >>> max(abs(a - b) for a, b in zip(data["1 pass"][1], data["2 passes, corrected"][1])) < 1e-12
        True
    """
    noise, numbers = random.Random(seed), list(map(float, range(1, batches + 1)))
    truth = [max(0.0, 0.1 * (number - batches / 2)) for number in numbers]
    means = [value + noise.gauss(0.0, 1.0) for value in truth]
    curves: Curves = {"batch mean": (numbers, means), "true mean": (numbers, truth)}
    for label, (used, k) in _runs(momentum, passes).items():
        value, values = 0.0, []
        for mean in means:
            for _ in range(k):
                value += used * (mean - value)
            values.append(value)
        curves[label] = (numbers, values)
    return curves


def decay(momentum: float = 0.1, passes: Passes = (2, 3, 5), batches: int = 31, *, ax: Axes | None = None) -> Axes:
    """Draw the weight of a batch by its age: `decay_data` on `ax`, or on a new figure's axes; return the axes."""
    ax = _axes(ax, "Uncorrected passes forget faster, corrected ones do not", "age of the batch (batches)")
    curves = decay_data(momentum, passes, batches)
    newest = [weights[0] for _, weights in curves.values() if weights and weights[0]]
    bottom, top = max(min([1e-2, *newest]) / 10, 1e-300), 0.6 if max([0.0, *newest]) < 0.6 else 1.2
    ax.set(ylabel="weight in the running value", yscale="log", ylim=(bottom, top))
    return _draw(ax, curves, f"configured momentum {momentum:g}")


def cumulative(momentum: float = 0.1, passes: Passes = (2, 3, 5), batches: int = 30, *, ax: Axes | None = None) -> Axes:
    """Draw the weight of the newest batches together: `cumulative_data`, on `ax` or new axes; return the axes."""
    ax = _axes(ax, "With uncorrected passes fewer batches count", "newest batches (batches)")
    ax.set(ylabel="their weight together", ylim=(0, 1.05))
    return _draw(ax, cumulative_data(momentum, passes, batches), f"configured momentum {momentum:g}")


def effective(passes: Sequence[int] = (1, 2, 3, 5), *, momentum: float = 0.1, ax: Axes | None = None) -> Axes:
    """Draw effective momentum against momentum, `momentum` marked: `effective_data`, on `ax` or new axes."""
    ax = _axes(
        ax, "k passes act like one pass with a larger momentum", "momentum of the layer (weight of the new value)"
    )
    ax.set(ylabel="effective momentum", ylim=(0, 1.05))
    return _draw(ax, effective_data(passes, momentum=momentum), "passes per batch")


def shares(momentum: float = 0.1, batches: int = 8, *, ax: Axes | None = None) -> Axes:
    """Draw the weights of single batches by order of passes: `shares_data`, on `ax` or new axes; return the axes."""
    ax = _axes(ax, "Interleaved, the newest batches weigh too little", "batch, oldest to newest (batches)")
    _draw(ax, shares_data(momentum, batches), f"2 passes, corrected for momentum {momentum:g}", "lower right")
    ax.set(ylabel="weight in the running value", ylim=(0, None))
    return ax


def signal(
    momentum: float = 0.1, passes: Passes = 5, batches: int = 160, seed: int = 0, *, ax: Axes | None = None
) -> Axes:
    """Draw running means of a simulated signal: `signal_data`, on `ax` or new axes; return the axes."""
    ax = _axes(ax, "Uncorrected passes lag less and carry more noise", "time (batches)")
    ax.set(ylabel="running mean (σ of one batch mean)")
    return _draw(ax, signal_data(momentum, passes, batches, seed), f"configured momentum {momentum:g}")


PLOTS: dict[str, Callable[..., Axes]] = {plot.__name__: plot for plot in (decay, cumulative, effective, shares, signal)}


def figure(momentum: float = 0.1) -> Figure:
    """Draw all the curves on one new figure and return it.

    Example:
        >>> len(figure().axes)
        5
    """
    from matplotlib.figure import Figure

    page = Figure(figsize=(11, 12), layout="constrained")
    axes = page.subplot_mosaic([["decay", "cumulative"], ["effective", "shares"], ["signal", "signal"]])
    for name, draw in PLOTS.items():
        draw(momentum=momentum, ax=axes[name])
    return page


def save(path: str | Path, page: Figure | SubFigure | None = None) -> None:
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
        drawn: Any = page or figure()
        drawn.savefig(path, dpi=120, metadata=undated)


def _runs(momentum: float, passes: Passes) -> dict[str, tuple[float, int]]:
    """Name the runs to compare, each with the momentum of its layer and its number of passes."""
    several = [*passes] if isinstance(passes, Iterable) else [passes]
    if not several:
        raise ValueError(f"passes is {passes!r}, but must be a number of passes or several: 2, or (2, 3, 5)")
    runs = {_count(k): (momentum, k) for k in (1, *several)}
    return runs | {f"{_count(most := max(several))}, corrected": (corrected_momentum(momentum, most), most)}


def _count(passes: int) -> str:
    return "1 pass" if passes == 1 else f"{passes} passes"


def _axes(ax: Axes | None, title: str, xlabel: str) -> Axes:
    from matplotlib.figure import Figure

    if ax is None:
        ax = Figure(figsize=(6.4, 4.2), layout="constrained").subplots()
    ax.set(title=title, xlabel=xlabel)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _draw(ax: Axes, curves: Curves, title: str, place: Any = "best") -> Axes:
    for label, (xs, ys) in curves.items():
        ax.plot(xs, ys, label=label, **_style(label))
    ax.legend(loc=place, title=title, fontsize=9, title_fontsize=9, frameon=False, alignment="left")
    return ax


def _style(label: str) -> dict[str, Any]:
    if label.endswith("corrected"):
        return _CORRECTED
    if not label.endswith(("pass", "passes")):
        return _OTHERS.get(label, _MARKED)
    again, at = divmod(int(label.split()[0]) - 1, len(BY_PASSES))
    return {"color": BY_PASSES[at], "linestyle": LINES[(at + again) % len(LINES)], "linewidth": 1.8}
