"""What every saved checkpoint gives away: recomputed layers have counted more batches than there were steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from html import escape
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat, SupportsIndex

from momentum_fix.formula import corrected_momentum, positive_integer, power_of_decay
from momentum_fix.reading import COUNTER, Odd, UnreadableError, checkpoint_files, read, search
from momentum_fix.tables import aligned, html, number, presentable

if TYPE_CHECKING:
    from torch import nn

_ABSURD = 10**12  # batches: a thousand a second for thirty years


@dataclass(frozen=True, kw_only=True)
class LayerAudit:
    """What one layer's counter tells; numbers are None where it tells nothing, and `note` says why."""

    source: str  # the file, or "" for a model or a state dict
    layer: str
    batches: int | None  # as the layer counted them
    steps: int | None
    inferred: bool  # whether `steps` is the count of the layer that counted least
    passes: Fraction | None = None  # updates per step
    effective_momentum: float | None = None  # what these passes amounted to
    variance_ratio: float | None = None  # of the running value, against one pass per step, for independent batches
    corrected: float | None = None  # the momentum to set
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """Give the row's text."""
        layer = self.layer or "(the model)"
        if self.passes is None:
            return layer, *"-----", self.note
        return (
            layer,
            str(self.batches),
            f"{float(self.passes):.6g}",
            number(self.effective_momentum),
            "-" if self.variance_ratio is None else f"{self.variance_ratio:.2f}",
            number(self.corrected),
            self.note,
        )


@dataclass(frozen=True, repr=False)
class Audit:
    """What `audit` found: a row per layer, an error per file that could not be read. Prints as a verdict and tables."""

    rows: tuple[LayerAudit, ...]
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def recomputed(self) -> tuple[LayerAudit, ...]:
        """The layers that were updated more than once per step."""
        return tuple(row for row in self.rows if row.passes is not None and row.passes > 1)

    def as_json(self) -> dict[str, Any]:
        """Give plain lists, dictionaries and numbers; passes are floats."""
        rows = [{**vars(row), "passes": None if row.passes is None else float(row.passes)} for row in self.rows]
        return {"verdict": self.verdict, "recomputed": len(self.recomputed), "layers": rows, "errors": self.errors}

    def __repr__(self) -> str:
        return f"<Audit: {self.verdict}>"

    def __str__(self) -> str:
        tables = ("\n".join(filter(None, [source, aligned(cells)])) for source, cells in self.tables())
        return "\n\n".join([self.verdict, *tables, "\n".join(self.errors.values())]).rstrip()

    def _repr_html_(self) -> str:
        parts = [f"<p>{escape(self.verdict)}</p>"]
        parts += [html(rows, source) for source, rows in self.tables()]
        return "\n".join([*parts, *(f"<p>{escape(error)}</p>" for error in self.errors.values())])

    def tables(self) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
        """Give each source, fit to be printed, with the cells of its table, the header in the first row."""
        header = ("layer", "batches", "passes", "effective momentum", "variance ratio", "set momentum", "note")
        for source, rows in groupby(self.rows, key=lambda row: row.source):
            yield presentable(source), [header, *(row.cells() for row in rows)]

    @property
    def verdict(self) -> str:
        """What was found, in one sentence."""
        counted = [row for row in self.rows if row.passes is not None]
        inferred = any(row.inferred for row in counted)
        if recomputed := self.recomputed:
            guess = "; the steps are inferred from the layer that counted least" if inferred else ""
            share = f"{len(recomputed)} of {len(counted)} layers"
            return f"Recomputation found: {share} were updated more than once per step{guess}."
        if self.errors and not self.rows:
            return "Nothing read: no file with norm layers could be read."
        if not counted:
            return "Nothing to judge: no layer with running statistics has counted a batch."
        if inferred:
            return (
                f"Nothing found: none of {len(counted)} layers has counted more batches than another of its state "
                "dict. If all were recomputed equally often, only the number of steps can tell: pass `steps`."
            )
        return f"Clean: none of {len(counted)} layers was updated more than once per step."


def audit(
    source: nn.Module | Mapping[str, Any] | str | PathLike[str],
    steps: SupportsIndex | None = None,
    momentum: SupportsFloat | None = 0.1,
) -> Audit:
    """Tell which layers of a model, a state dict or a saved file were updated more than once per training step.

        passes = num_batches_tracked / steps

    Each layer counts its updates in `num_batches_tracked`, which is saved with the model. Exact for: layers
    that took part in every step. Not for: layers that do not count (InstanceNorm), counters that were copied
    or averaged (a moving average of the weights), or several batches per step, unless `steps` counts batches.

    Files are read as data: nothing in them is executed, and only the counters are read from their tensors, so
    torch does not even have to be imported.

    Args:
        source: a model; a state dict, or a checkpoint that holds state dicts at any depth; a file (.pt, .pth,
            .bin, .ckpt, .safetensors), a sharded index (.index.json), or a directory of these.
        steps: batches trained on. With None, the layer with the lowest count in each state dict is assumed to
            have never been recomputed; this is an inference, and marked as one.
        momentum: the momentum that the model was built with; 0 to 1, or None. For a model, its layers' own
            momentum is used instead.

    Returns:
        An `Audit`. If a file in a directory cannot be read, it is listed in `errors`; the others are still read.

    Raises:
        UnreadableError: (a ValueError) the file or directory cannot be read, or holds no checkpoint.
        ValueError: steps is below 1, or momentum is outside 0 to 1.
        TypeError: steps is not an integer, momentum is not a number, or source is none of the above.

    Example:
        >>> audit({"bn.num_batches_tracked": 100, "deep.num_batches_tracked": 300}).recomputed[0].passes
        Fraction(3, 1)
    """
    steps = _checked(steps, momentum)
    if isinstance(source, (str, PathLike)):
        files = checkpoint_files(path := Path(source))
        return Audit(_file_rows(path, steps, momentum)) if files == [path] else audit_files(files, steps, momentum)

    if isinstance(source, Mapping):
        return Audit(tuple(row for way, layers in search(source) for row in _rows("", way, layers, steps, momentum)))
    from torch import nn

    if not isinstance(source, nn.Module):
        raise TypeError(f"source is a {type(source).__name__}, but must be a model, a state dict or a path")
    return Audit(tuple(_model_rows(source, steps)))


def audit_files(files: Iterable[Path], steps: SupportsIndex | None, momentum: SupportsFloat | None) -> Audit:
    """Audit files one by one; one that cannot be read is listed in `errors`, and the others are read."""
    steps = _checked(steps, momentum)
    rows: list[LayerAudit] = []
    errors = {}
    for file in files:
        try:
            rows += _file_rows(file, steps, momentum)
        except UnreadableError as error:
            errors[str(file)] = str(error)
    return Audit(tuple(rows), errors)


def _checked(steps: SupportsIndex | None, momentum: SupportsFloat | None) -> int | None:
    """Refuse wrong numbers before any file is opened."""
    corrected_momentum(momentum)
    return None if steps is None else positive_integer("steps", steps, "the batches trained on, or None to infer them")


def _file_rows(path: Path, steps: int | None, momentum: SupportsFloat | None) -> tuple[LayerAudit, ...]:
    return tuple(row for way, layers in read(path) for row in _rows(str(path), way, layers, steps, momentum))


def _model_rows(model: nn.Module, steps: int | None) -> Iterator[LayerAudit]:
    from momentum_fix.corrected import uncorrected
    from momentum_fix.layers import tracked_layers

    layers = tracked_layers(model)
    counts = {aliases[0]: _count(layer._buffers.get(COUNTER)) for layer, aliases in layers.items()}
    taken = _taken(counts, steps)
    for layer, aliases in layers.items():
        yield _row("", aliases[0], counts[aliases[0]], taken, steps is None, layer.momentum, uncorrected(layer))


def _rows(
    source: str, way: str, layers: Mapping[str, Any], steps: int | None, momentum: SupportsFloat | None
) -> Iterator[LayerAudit]:
    counts = {name: _count(value) for name, value in layers.items()}
    taken = _taken(counts, steps)
    for name, count in counts.items():
        yield _row(source, way + name, count, taken, steps is None, momentum, momentum)


def _count(value: Any) -> tuple[int | None, str]:
    """Read a counter: the number, or None and the reason."""
    if value is None:
        return None, "no counter"
    if hasattr(value, "item"):  # a tensor or an array, of which there are many kinds, and any may refuse any of this
        try:
            if any(length != 1 for length in value.shape):
                return None, f"counter has shape {tuple(value.shape)}"
            value = Odd("has no value") if getattr(value, "is_meta", False) else value.item()
        except Exception:
            value = Odd(f"is of type {getattr(value, 'dtype', type(value).__name__)}, not a whole number")
    if isinstance(value, Odd):
        return None, f"counter {value.what}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None, f"counter is of type {type(value).__name__}, not a whole number"
    if isinstance(value, float) and not value.is_integer():
        return None, f"counter is {value}, not a whole number"
    if not 0 <= value <= _ABSURD:
        digits = int(value) if abs(value) < 10**30 else "a number of more than 30 digits"
        return None, f"counter is {digits}, which no training can have counted"
    if value == 0:
        return None, "counter is 0: never updated, or a layer that does not count (InstanceNorm)"
    return int(value), ""


def _taken(counts: Mapping[str, tuple[int | None, str]], steps: int | None) -> int | None:
    return steps if steps is not None else min((count for count, _ in counts.values() if count), default=None)


def _row(
    source: str,
    name: str,
    count: tuple[int | None, str],
    steps: int | None,
    inferred: bool,
    momentum: Any,
    uncorrected: Any,
) -> LayerAudit:
    batches, note = count
    if batches is None or steps is None:
        return LayerAudit(source=source, layer=name, batches=batches, steps=steps, inferred=inferred, note=note)
    passes = Fraction(batches, steps)
    effective = _power(momentum, batches, steps)
    ratio = None
    if uncorrected and effective is not None:
        ratio = effective / (2 - effective) * (2 - uncorrected) / uncorrected
    return LayerAudit(
        source=source,
        layer=name,
        batches=batches,
        steps=steps,
        inferred=inferred,
        passes=passes,
        effective_momentum=effective,
        variance_ratio=ratio,
        corrected=_power(uncorrected, steps, batches) if batches > steps else uncorrected,
        note="updated in fewer steps than were given" if batches < steps else "",
    )


def _power(momentum: SupportsFloat | None, passes: int, steps: int) -> float | None:
    """Give 1 - (1 - momentum)**(passes / steps): the nearest double for whole numbers, and within a few units else.

    The nearest takes 0.1 ms, which is long for a file with 100,000 counts, all different.
    """
    m = None if momentum is None else float(momentum)
    whole = (passes % steps == 0 or steps % passes == 0) and max(passes, steps) < 100 * min(passes, steps)
    if m is None or whole or not 0 < m < 1:
        return _nearest(m, passes, steps)
    return -math.expm1(passes / steps * math.log1p(-m))


@lru_cache(maxsize=1000)
def _nearest(momentum: float | None, passes: int, steps: int) -> float | None:
    return power_of_decay(momentum, Fraction(passes, steps))
