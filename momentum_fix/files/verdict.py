"""What the counters of norm layers tell: a row per layer, a verdict, and the possible causes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat, SupportsIndex

from momentum_fix._tables import aligned, html, presentable
from momentum_fix.files.causes import causes, nearly, recomputed
from momentum_fix.files.reading import INDEX, NotANumber, UnreadableError, checkpoint_files, read
from momentum_fix.formula import corrected_momentum, effective_momentum, positive_integer

_MOST_BATCHES = 10**12  # batches: a thousand a second for thirty years
_TOO_SMALL = 1e-300  # a momentum that is corrected for more updates than there can be
_MOST_BATCHES_OF_A_MEAN = 1000  # of which `calibrate` gives a layer the mean number of updates
_MOST_EXPLAINED = 5  # of a file for which causes are listed
_ENOUGH, _TOO_LITTLE, _TOO_MUCH = "corrected already", "not corrected enough", "corrected too much"
_SAYS = {  # of so many layers
    _TOO_MUCH: "Corrected too much: {}. Their momentum is for more updates per step.",
    _TOO_LITTLE: "Not corrected enough: {}. Their momentum is for fewer updates per step.",
    "": "Updated more than once per step: {}. The counters do not say why; `diagnose` around one training step can.",
    _ENOUGH: "Corrected already: {}. Their momentum makes up for the updates per step.",
}


class Layer(NamedTuple):
    """What is known of a layer before it is judged."""

    counter: Any
    momentum: float | None
    plain: float | None  # what the momentum was corrected from
    uncounted: int = 0  # updates that the counter lacks, though the momentum makes up for them too


@dataclass(frozen=True, kw_only=True)
class LayerAudit:
    """What one layer's counter tells; numbers are None where it tells nothing, and `note` says why."""

    source: str  # the file, or "" for a model or a state dict
    state_dict: str  # the keys that lead to it in the source, as "model/"
    layer: str  # its name, after these keys
    batches: int | None  # as the layer counted them
    steps: int | None
    inferred: bool  # whether `steps` was read off the counters
    passes: Fraction | None = None  # updates per step
    effective_momentum: float | None = None  # what these updates amount to if they were recomputations
    variance_ratio: float | None = None  # of the running value, against one update per step, for independent batches
    corrected: float | None = None  # the momentum that would make up for recomputations
    correction: str = ""  # how the momentum compares with `passes`, if it is a corrected one, which only a model knows
    note: str = ""

    @property
    def repeated(self) -> bool:
        """Whether the layer was updated more than once per step."""
        return self.passes is not None and self.passes > 1

    def cells(self) -> tuple[str, ...]:
        """Give the row's text."""
        layer = self.layer or "(the model)"
        if self.passes is None:
            return layer, *"-----", self.note
        shown = self.repeated or self.correction
        forms = (self.effective_momentum, ".6g"), (self.variance_ratio, ".2f"), (self.corrected, ".6g")
        numbers = (format(value, form) if shown and value is not None else "-" for value, form in forms)
        return layer, str(self.batches), f"{float(self.passes):.6g}", *numbers, self.note


@dataclass(frozen=True, repr=False)
class Audit:
    """What `audit` found: a row per layer, an error per file that could not be read. Prints as a verdict and tables."""

    rows: tuple[LayerAudit, ...]
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def repeated(self) -> tuple[LayerAudit, ...]:
        """The layers that were updated more than once per step."""
        return tuple(row for row in self.rows if row.repeated)

    def as_json(self) -> dict[str, Any]:
        """Give plain lists, dictionaries and numbers; passes are floats."""
        rows = [{**vars(row), "passes": None if row.passes is None else float(row.passes)} for row in self.rows]
        found = {"verdict": self.verdict, "repeated": len(self.repeated), "causes": list(_causes(self.rows))}
        return {**found, "layers": rows, "errors": self.errors}

    def __repr__(self) -> str:
        return f"<Audit: {self.verdict}>"

    def __str__(self) -> str:
        tables = ("\n".join(filter(None, [above, aligned(cells)])) for above, cells in self.tables())
        return "\n\n".join([self.verdict, *tables, "\n".join(self.errors.values())]).rstrip()

    def _repr_html_(self) -> str:
        parts = [f"<p>{escape(self.verdict)}</p>"]
        parts += [f"<pre>{escape(above)}</pre>\n{html(cells, '')}" for above, cells in self.tables()]
        return "\n".join([*parts, *(f"<p>{escape(error)}</p>" for error in self.errors.values())])

    def tables(self) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
        """Give each source with its possible causes, and the cells of its table, the header in the first row."""
        header = ("layer", "batches", "per step", "if recomputed: effective momentum", "variance ratio")
        for source, found in groupby(self.rows, key=lambda row: row.source):
            rows = list(found)
            cells = [(*header, "corrected momentum", "note"), *(row.cells() for row in rows)]
            yield "\n".join([presentable(source)] * bool(source) + list(_causes(rows))), cells

    @property
    def verdict(self) -> str:
        """What was found, in a sentence or two."""
        counted = [row for row in self.rows if row.passes is not None]
        found = [row.correction for row in counted if row.correction or row.repeated]
        inferred = any(row.inferred for row in counted)
        said = [_SAYS[kind].format(f"{found.count(kind)} of {len(counted)} layers") for kind in _SAYS if kind in found]
        if said:
            return " ".join([*said, *["The steps are inferred from the counters; pass `steps` to be sure."] * inferred])
        if self.errors and not self.rows:
            return "Nothing read: no file with norm layers could be read."
        if not counted:
            return "Nothing to judge: no layer with running statistics has counted a batch."
        if inferred:
            none = f"Nothing found: none of {len(counted)} layers has counted more than another of its state dict."
            return f"{none} If all were updated equally often, only the number of steps can tell: pass `steps`."
        return f"Clean: none of {len(counted)} layers was updated more than once per step."


def _causes(rows: Iterable[LayerAudit]) -> Iterator[str]:
    """Give the possible causes as lines, for each state dict with updates that no corrected momentum makes up for."""
    shown = 0
    for (source, prefix, steps), found in groupby(rows, key=lambda row: (row.source, row.state_dict, row.steps)):
        group = list(found)
        unexplained = any(row.repeated and row.correction in ("", _TOO_LITTLE) for row in group)
        if steps and unexplained and shown < _MOST_EXPLAINED:
            shown += 1
            where = f" in {prefix}" if prefix else ""
            yield f"Possible causes of the extra updates{where}, and what speaks for (+) and against (-) each:"
            counts = {row.layer.removeprefix(prefix) or "(the model)": row.batches for row in group if row.batches}
            ordered = not source.endswith((".safetensors", INDEX))  # where layers stand by name
            yield from [*causes(counts, steps, group[0].inferred, ordered), ""]


def audit_files(paths: Iterable[Path], steps: SupportsIndex | None, momentum: SupportsFloat | None) -> Audit:
    """Audit files and directories; what cannot be read is listed in `errors`, and the others are read."""
    steps = check_numbers(steps, momentum)
    rows: list[LayerAudit] = []
    errors = {}
    for path in paths:
        try:
            for file in checkpoint_files(path):
                try:
                    rows += _judge_file(file, steps, momentum)
                except UnreadableError as error:
                    errors[str(file)] = str(error)
        except UnreadableError as error:
            errors[str(path)] = str(error)
    return Audit(tuple(rows), errors)


def check_numbers(steps: SupportsIndex | None, momentum: SupportsFloat | None) -> int | None:
    """Refuse wrong numbers before any file is opened."""
    corrected_momentum(momentum)
    return None if steps is None else positive_integer("steps", steps, "the batches trained on, or None to infer them")


def _judge_file(path: Path, steps: int | None, momentum: SupportsFloat | None) -> list[LayerAudit]:
    """Judge the layers of a file, which does not hold their momentum."""
    found = ((prefix, with_momentum(counters, momentum)) for prefix, counters in read(path))
    return [row for prefix, layers in found for row in judge(str(path), prefix, layers, steps)]


def with_momentum(counters: Mapping[str, Any], momentum: SupportsFloat | None) -> dict[str, Layer]:
    """Give layers that count like this and were built with this momentum."""
    momentum = corrected_momentum(momentum, 1)  # as a float
    return {name: Layer(counter, momentum, momentum) for name, counter in counters.items()}


def judge(source: str, prefix: str, layers: Mapping[str, Layer], steps: int | None) -> Iterator[LayerAudit]:
    """Judge the layers of one state dict or model."""
    counts = {name: _read_counter(layer.counter) for name, layer in layers.items()}
    corrected_for = {name: _corrected_for(layer.momentum, layer.plain) for name, layer in layers.items()}
    updates = {name: count + layers[name].uncounted for name, (count, _) in counts.items() if count}
    assumed = steps or _infer_steps(updates, corrected_for)
    for name, (batches, note) in counts.items():
        found: dict[str, Any] = {"batches": batches, "steps": assumed, "inferred": steps is None, "note": note}
        if batches and assumed:
            found["passes"] = passes = Fraction(batches, assumed)
            if times := recomputed(batches, assumed):
                found |= _effect(layers[name].momentum, layers[name].plain, times)
            if corrected_for[name] != 1:
                wrong = _TOO_LITTLE if updates[name] > corrected_for[name] * assumed else _TOO_MUCH
                # The counter may have been set back since the updates that it lacks.
                is_enough = any(nearly(each, corrected_for[name], assumed) for each in (batches, updates[name]))
                found["correction"] = how = _ENOUGH if is_enough else wrong
                found["note"] = f"{how}: for {float(corrected_for[name]):.6g} updates per step"
            elif passes < 1:
                found["note"] = "updated in fewer steps than were given"
        yield LayerAudit(source=source, state_dict=prefix, layer=prefix + name, **found)


def _corrected_for(momentum: Any, plain: Any) -> Fraction:
    """Tell for how many updates per step a momentum is corrected: for 1 if it is not, or is too small to tell."""
    if plain == momentum or momentum < _TOO_SMALL:
        return Fraction(1)
    return Fraction(math.log1p(-plain) / math.log1p(-momentum)).limit_denominator(_MOST_BATCHES_OF_A_MEAN)


def _infer_steps(counts: Mapping[str, int], corrected_for: Mapping[str, Fraction]) -> int | None:
    """Infer the steps: those for which all corrected momenta are right, if there are such, else the lowest count."""
    corrected = any(corrected_for[name] != 1 for name in counts)
    steps = max((math.ceil(count / corrected_for[name]) for name, count in counts.items()), default=1)
    if corrected and all(nearly(count, corrected_for[name], steps) for name, count in counts.items()):
        return steps
    return min(counts.values(), default=None)


@lru_cache
def _effect(momentum: float | None, plain: float | None, passes: int) -> dict[str, float | None]:
    """Give what recomputed passes amount to with a momentum, and what would make up for them."""
    effective, ratio = effective_momentum(momentum, passes), None
    if plain and effective is not None:
        ratio = effective / (2 - effective) * (2 - plain) / plain
    return {"effective_momentum": effective, "variance_ratio": ratio, "corrected": corrected_momentum(plain, passes)}


def _read_counter(value: Any) -> tuple[int | None, str]:
    """Read a counter: the number, or None and the reason."""
    if value is None:
        return None, "no counter"
    if hasattr(value, "item"):  # a tensor or an array, of which there are many kinds, and any may refuse any of this
        try:
            if any(length != 1 for length in value.shape):
                return None, f"counter has shape {tuple(value.shape)}"
            value = NotANumber("has no value") if getattr(value, "is_meta", False) else value.item()
        except Exception:
            value = NotANumber(f"is of type {getattr(value, 'dtype', type(value).__name__)}, not a whole number")
    if isinstance(value, NotANumber):
        return None, f"counter {value.what}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None, f"counter is of type {type(value).__name__}, not a whole number"
    if value % 1 != 0:
        return None, f"counter is {value}, not a whole number"
    if not 0 <= value <= _MOST_BATCHES:
        digits = int(value) if abs(value) < 10**30 else "a number of more than 30 digits"
        return None, f"counter is {digits}, which no training can have counted"
    if value == 0:
        return None, "counter is 0: never updated, or a layer that does not count (InstanceNorm)"
    return int(value), ""
