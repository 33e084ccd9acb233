"""The tell-tale in every checkpoint ever saved: recomputed layers have counted more batches than there were steps."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex

import torch
from torch import nn

from momentum_fix.corrected import uncorrected
from momentum_fix.formula import corrected_momentum, positive_integer, power_of_decay
from momentum_fix.layers import COUNTER, tracked_layers
from momentum_fix.tables import aligned, number

_NAMES = (COUNTER, "running_mean", "running_var")
_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_NO_MODELS = (
    "optimizer",
    "random_states",
    "rng_state",
    "scaler",
    "scheduler",
    "training_args",
)  # trainers' other files
_ABSURD = 10**12  # batches: a thousand a second for thirty years


class UnreadableError(ValueError):
    """A file cannot be read; the message names the file, the reason and the remedy."""


@dataclass(frozen=True)
class LayerAudit:
    """What one layer's counter tells; numbers are None where it tells nothing, and `note` says why."""

    source: str  # the file, or "" for a model or a state dict
    layer: str
    batches: int | None  # as the layer counted them
    steps: int | None
    inferred: bool  # whether `steps` is the count of the layer that counted least
    passes: Fraction | None  # updates per step
    effective_momentum: float | None  # what these passes amounted to
    variance_ratio: float | None  # of the running value, against one pass per step, for independent batches
    corrected: float | None  # the momentum to set
    note: str

    def cells(self) -> tuple[str, ...]:
        """Give the row's text."""
        if self.passes is None:
            return self.layer or "(the model)", "-" if self.batches is None else str(self.batches), *"----", self.note
        return (
            self.layer or "(the model)",
            str(self.batches),
            f"{float(self.passes):.6g}",
            number(self.effective_momentum),
            "-" if self.variance_ratio is None else f"{self.variance_ratio:.2f}",
            number(self.corrected),
            self.note,
        )


@dataclass(frozen=True)
class Audit:
    """What `audit` found: a row a layer, and an error a file that could not be read. Printed: a verdict and tables."""

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

    def __str__(self) -> str:
        tables = ("\n".join(filter(None, [source, aligned(cells)])) for source, cells in self.tables())
        return "\n\n".join([self.verdict, *tables, "\n".join(self.errors.values())]).rstrip()

    def tables(self) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
        """Give each source with the cells of its table, the header in the first row."""
        header = ("layer", "batches", "passes", "effective momentum", "variance ratio", "set momentum", "note")
        for source, rows in groupby(self.rows, key=lambda row: row.source):
            yield source, [header, *(row.cells() for row in rows)]

    @property
    def verdict(self) -> str:
        """What was found, in one sentence."""
        counted = [row for row in self.rows if row.passes is not None]
        inferred = any(row.inferred for row in counted)
        if self.recomputed:
            guess = "; the steps are inferred from the layer that counted least" if inferred else ""
            share = f"{len(self.recomputed)} of {len(counted)} layers"
            return f"Recomputation found: {share} were updated more than once per step{guess}."
        if not counted:
            return "Nothing to judge: no layer with running statistics has counted a batch."
        if inferred:
            return (
                f"Nothing found: none of {len(counted)} layers has counted more batches than another. If all were "
                "recomputed alike, only the number of steps can tell: give it."
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

    Files are opened with `weights_only=True` and memory mapping, or lazily with safetensors, so that nothing in
    them is executed and only the counters are read. Files of torch's legacy format (before 1.6) have no such
    way and are loaded whole.

    Args:
        source: a model; a state dict, or a checkpoint that holds some, however deep; a file (.pt, .pth, .bin,
            .ckpt, .safetensors), a sharded index (.index.json), or a directory of these.
        steps: batches trained on. None takes the layer that counted least, in each state dict, for one that was
            never recomputed; an inference, and marked so.
        momentum: the momentum that the model was built with; 0 to 1, or None. Of a model its layers' own is used.

    Returns:
        An `Audit`. A file of a directory that cannot be read is listed in its `errors`; the others are read.

    Raises:
        UnreadableError: (a ValueError) the file cannot be read, or the directory holds no checkpoint.
        ValueError: steps is below 1, or momentum is outside 0 to 1.
        TypeError: steps is not an integer, momentum is no number, or source is none of the above.

    Example:
        >>> audit({"bn.num_batches_tracked": 100, "deep.num_batches_tracked": 300}).recomputed[0].passes
        Fraction(3, 1)
    """
    steps = _checked(steps, momentum)
    if isinstance(source, nn.Module):
        return Audit(tuple(_model_rows(source, steps)))
    if isinstance(source, Mapping):
        return Audit(tuple(_rows("", source, steps, momentum)))
    if not isinstance(source, (str, PathLike)):
        raise TypeError(f"source is a {type(source).__name__}, but must be a model, a state dict or a path")
    path = Path(source)
    if not path.is_dir():
        return Audit(_file_rows(path, steps, momentum))
    return audit_files(checkpoint_files(path), steps, momentum)


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


def checkpoint_files(directory: Path) -> list[Path]:
    """List the checkpoints of a directory; shards stand under their index, and what trainers save beside is left out.

    Raises:
        UnreadableError: there are none.
    """
    try:
        files = sorted(file for file in directory.iterdir() if file.name.endswith((*_ENDINGS, ".index.json")))
        files = [file for file in files if not file.name.startswith(_NO_MODELS)]
    except OSError as error:
        raise UnreadableError(f"{directory}: cannot be read ({error.strerror})") from error
    shards: set[str] = set()
    for index in files:
        if index.name.endswith(".index.json"):
            try:
                shards.update(_weight_map(index).values())
            except UnreadableError:
                continue  # reading the index itself will report it
    files = [file for file in files if file.name not in shards]
    if not files:
        raise UnreadableError(f"{directory}: holds no file that ends in {', '.join(_ENDINGS)} or .index.json")
    return files


def _model_rows(model: nn.Module, steps: int | None) -> Iterator[LayerAudit]:
    layers = tracked_layers(model)
    counts = {aliases[0]: _count(layer._buffers.get(COUNTER)) for layer, aliases in layers.items()}
    taken = _taken(counts, steps)
    for layer, aliases in layers.items():
        yield _row("", aliases[0], counts[aliases[0]], taken, steps is None, layer.momentum, uncorrected(layer))


def _rows(source: str, tree: Any, steps: int | None, momentum: SupportsFloat | None) -> Iterator[LayerAudit]:
    for prefix, values in _state_dicts(tree):
        split = [key.rpartition(".") for key in values if isinstance(key, str)]
        names = dict.fromkeys(name for name, _, kind in split if kind in _NAMES)
        counts = {name: _count(values.get(f"{name}.{COUNTER}" if name else COUNTER)) for name in names}
        taken = _taken(counts, steps)
        for name, count in counts.items():
            yield _row(source, prefix + name, count, taken, steps is None, momentum, momentum)


def _state_dicts(tree: Any) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Find the mappings that hold running statistics or counters, wherever they are, with the way to each."""
    waiting, seen = [("", tree)], set()
    while waiting:  # each container once, however deep, and however often it holds itself
        prefix, node = waiting.pop()
        if id(node) in seen or not isinstance(node, (Mapping, list, tuple)):
            continue
        seen.add(id(node))
        if isinstance(node, Mapping) and any(isinstance(key, str) and key.rpartition(".")[2] in _NAMES for key in node):
            yield prefix, node
        items = node.items() if isinstance(node, Mapping) else enumerate(node)
        waiting += reversed([(f"{prefix}{key}/", value) for key, value in items])


def _count(value: Any) -> tuple[int | None, str]:
    """Read a counter: the number, or None and the reason."""
    if value is None:
        return None, "no counter"
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_meta:
            return None, f"counter has shape {tuple(value.shape)}" if value.numel() != 1 else "counter has no value"
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None, f"counter is of type {type(value).__name__}, not a whole number"
    if value != value or value in (float("inf"), float("-inf")) or value != int(value):
        return None, f"counter is {value}, not a whole number"
    if not 0 <= value <= _ABSURD:
        return None, f"counter is {int(value)}, which no training can have counted"
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
        return LayerAudit(source, name, batches, steps, inferred, None, None, None, None, note)
    passes = Fraction(batches, steps)
    effective = power_of_decay(momentum, passes)
    ratio = (
        None if not uncorrected or effective is None else effective / (2 - effective) * (2 - uncorrected) / uncorrected
    )
    corrected = power_of_decay(uncorrected, 1 / passes) if passes >= 1 else uncorrected
    note = "updated in fewer steps than were given" if passes < 1 else ""
    return LayerAudit(source, name, batches, steps, inferred, passes, effective, ratio, corrected, note)


def _file_rows(path: Path, steps: int | None, momentum: SupportsFloat | None) -> tuple[LayerAudit, ...]:
    """Read one checkpoint.

    Damaged and foreign bytes can raise nearly anything on their way through a reader, so every error becomes
    one sentence here, with the original as its cause.
    """
    try:
        return tuple(_rows(str(path), _read(path), steps, momentum))
    except UnreadableError:
        raise
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read ({error.strerror or error})") from error
    except pickle.UnpicklingError as error:
        raise UnreadableError(
            f"{path}: holds more than tensors and plain containers, or is no checkpoint; nothing in it was executed. "
            "Save `model.state_dict()` and audit that"
        ) from error
    except ImportError as error:
        raise UnreadableError(f"{path}: needs {error.name}: pip install 'momentum-fix[audit]'") from error
    except Exception as error:
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise UnreadableError(f"{path}: is damaged or no checkpoint ({reason})") from error


def _read(path: Path) -> Any:
    """Open a checkpoint without executing anything in it."""
    if path.stat().st_size == 0:
        raise UnreadableError(f"{path}: is empty")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _refuse_bloated(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on pickle protocols and TorchScript; what matters is raised
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _refuse_bloated(path: Path) -> None:
    """Refuse an archive whose table of contents would fill the memory; torch.save never compresses one."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith("data.pkl") and entry.file_size > max(2**26, 10 * entry.compress_size):
                raise UnreadableError(f"{path}: is damaged or no checkpoint (its table of contents is compressed)")


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.rpartition(".")[2] in _NAMES]  # noqa: SIM118  # no mapping
        return {name: file.get_tensor(name) if name.endswith(COUNTER) else None for name in names}


def _read_shards(index: Path) -> dict[str, Any]:
    """Read the shards that hold norm layers as one state dict."""
    needed = {file for name, file in _weight_map(index).items() if name.rpartition(".")[2] in _NAMES}
    merged: dict[str, Any] = {}
    for file in sorted(needed):
        merged.update(_read(index.parent / file))
    return merged


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = dict(json.loads(index.read_bytes())["weight_map"])
        inside = all(Path(file).name == file for file in weight_map.values())
    except OSError as error:
        raise UnreadableError(f"{index}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UnreadableError(f"{index}: is no index of shards, for it has no readable weight_map") from error
    if not inside:
        raise UnreadableError(f"{index}: names shards outside its own directory")
    return weight_map
