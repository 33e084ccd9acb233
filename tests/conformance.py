"""Ways in which people recompute, times what can be done about it: the one table of what is right.

`python tests/conformance.py` runs every cell and writes docs/conformance.md; the tests assert every cell.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import recipes as by
import rivals
import twins
from momentum_fix import calibrate, correct, preserve_everywhere, preserve_state, update_once
from recipes import MIDWAY, Net
from twins import by_context, drop_in, drop_in_reentrant, non_reentrant, plainly, reentrant

DOCUMENT = Path(__file__).parent.parent / "docs" / "conformance.md"
STEPS = 2 * MIDWAY
Table = dict[str, dict[str, str]]  # an outcome by row and column


# The rows: how it is recomputed.


def unchanged(net):
    return net


@dataclass(frozen=True)
class Row:
    """One way to recompute: a step, an engine, and the passes that `correct` is told."""

    step: Callable
    ckpt: Callable
    passes: int | Mapping[str, int]
    norm: Callable = nn.BatchNorm2d
    midway: Callable = unchanged
    wrap: str = ""


LAST = {"a": 2, "b": 2, "c": 1}
INNER = {"a": 2, "b": 3, "c": 2}
ROWS = {
    "no checkpoint": Row(by.one, plainly, 1),
    "one checkpoint, reentrant": Row(by.one, reentrant, 2),
    "one checkpoint": Row(by.one, non_reentrant, 2),
    "with debug=True": Row(by.debugging, non_reentrant, 2),
    "torch's checkpoint_wrapper": Row(by.wrapped, non_reentrant, 2),
    "checkpoint_sequential, reentrant": Row(by.sequential(True), reentrant, LAST),
    "checkpoint_sequential": Row(by.sequential(False), non_reentrant, LAST),
    "nested, reentrant": Row(by.nested, reentrant, INNER),
    "nested": Row(by.nested, non_reentrant, INNER),
    "nested directly, reentrant": Row(by.nested_directly, reentrant, 3),
    "nested directly": Row(by.nested_directly, non_reentrant, 2),
    "nested directly, early stop off": Row(by.never_stopping_early, non_reentrant, 3),
    "a norm as the last operation": Row(by.ending_in_a_norm, non_reentrant, 2),
    "recomputation written by hand": Row(by.one, by.hand_written, 2),
    "several backwards, reentrant": Row(by.two_backwards, reentrant, 3),
    "several backwards": Row(by.two_backwards, non_reentrant, 3),
    "gradient penalty (create_graph)": Row(by.gradient_penalty, non_reentrant, 3),
    "autograd.grad": Row(by.autograd_grad, non_reentrant, 2),
    "gradient accumulation, reentrant": Row(by.accumulating(by.one), reentrant, 2),
    "gradient accumulation": Row(by.accumulating(by.one), non_reentrant, 2),
    "a frozen block": Row(by.frozen, non_reentrant, {"a": 1, "b": 2, "c": 2}),
    "siamese inputs, reentrant": Row(by.siamese, reentrant, 2),
    "siamese inputs": Row(by.siamese, non_reentrant, 2),
    "pipeline order": Row(by.pipeline, non_reentrant, 2),
    "a layer twice in a region": Row(by.twice_in_a_region, non_reentrant, 2),
    "batches without backward": Row(by.forward_only, non_reentrant, 2),
    "batches under no_grad": Row(by.forward_only_no_grad, non_reentrant, 2),
    "switched off midway": Row(by.switched_off_midway, non_reentrant, 2),
    "a momentum schedule": Row(by.one, non_reentrant, 2, midway=by.rescheduled),
    "evaluation in between": Row(by.evaluated_in_between, non_reentrant, 2),
    "an exception in a forward": Row(by.failing_forward, non_reentrant, 2),
    "an exception in a recomputation": Row(by.failing_recomputation, non_reentrant, 2),
    "deep-copied midway": Row(by.one, non_reentrant, 2, midway=copy.deepcopy),
    "pickled midway": Row(by.one, non_reentrant, 2, midway=by.pickled),
    "converted to SyncBatchNorm midway": Row(by.one, non_reentrant, 2, midway=by.converted),
    "SyncBatchNorm (one process)": Row(by.one, non_reentrant, 2, norm=nn.SyncBatchNorm),
    "InstanceNorm, reentrant": Row(by.one, reentrant, 2, norm=by.instance_norm),
    "InstanceNorm": Row(by.one, non_reentrant, 2, norm=by.instance_norm),
    "InstanceNorm as the last operation": Row(by.ending_in_a_norm, non_reentrant, LAST, norm=by.instance_norm),
    "lazy layers": Row(by.one, non_reentrant, 2, norm=by.lazy),
    "a class of one's own": Row(by.one, non_reentrant, 2, norm=by.OwnForward),
    "momentum=None": Row(by.one, non_reentrant, 2, norm=by.cumulative),
    "momentum=None, siamese inputs": Row(by.siamese, non_reentrant, 2, norm=by.cumulative),
    "selective: norms recomputed": Row(by.selective(CheckpointPolicy.MUST_RECOMPUTE), non_reentrant, 2),
    "selective: norms saved": Row(by.selective(CheckpointPolicy.MUST_SAVE), non_reentrant, 1),
    "compiled with the checkpoint": Row(by.compiled_whole("aot_eager"), non_reentrant, 1),
    "compiled with the checkpoint, inductor": Row(by.compiled_whole("inductor"), non_reentrant, 1),
    "compiled block, reentrant": Row(by.compiled_block("aot_eager"), reentrant, 2),
    "compiled block": Row(by.compiled_block("aot_eager"), non_reentrant, 2),
    "compiled block, inductor": Row(by.compiled_block("inductor"), non_reentrant, 2),
    "compiled block, backend eager": Row(by.compiled_block("eager"), non_reentrant, 2),
    "compiled block, InstanceNorm": Row(by.compiled_block("aot_eager"), non_reentrant, 2, norm=by.instance_norm),
    "DDP, two ranks": Row(by.inside_the_model, non_reentrant, INNER, wrap="DDP"),
    "FSDP2, two ranks": Row(by.inside_the_model, non_reentrant, INNER, wrap="FSDP2"),
    "a new batch in a backward hook": Row(by.forward_in_a_backward_hook, non_reentrant, 2),
    "saved tensors read by hand": Row(by.saved_tensors_read_by_hand, non_reentrant, 3),
}


def distributed_data_parallel(net):
    wrapped = DistributedDataParallel(net)
    wrapped.seen = 0
    return wrapped


WRAPPERS: dict[str, Callable[[Any], Any]] = {"": unchanged, "DDP": distributed_data_parallel, "FSDP2": fully_shard}


# The columns: what can be done about it. A method is given a model, a row and the row's data, and trains the model.


def go(net, row, data, ckpt):
    """Train on the data with this checkpoint function; give the model that came of it."""
    for x in data:
        twins.train(net, row.step, [x.clone()], ckpt)
        net.seen += 1
        if net.seen == MIDWAY:
            net = row.midway(net)
    return net


def nothing(net, row, data):
    return go(net, row, data, row.ckpt)


def by_root(net, row, data):
    prefix = "module." if row.wrap == "DDP" else ""
    passes = row.passes if isinstance(row.passes, int) else {prefix + name: k for name, k in row.passes.items()}
    return go(correct(net, passes), row, data, row.ckpt)


def by_calibration(net, row, data):
    with calibrate(net):
        net = go(net, row, data[:1], row.ckpt)
    return go(net, row, data[1:], row.ckpt)


def preparing(prepare):
    """Give the method that prepares the model and trains it as always."""

    def method(net, row, data):
        prepare(net)
        return go(net, row, data, row.ckpt)

    return method


by_update_once = preparing(update_once)


def replacing(ckpts):
    """Give the method that trains as always, but with other checkpoint functions instead of these."""
    return lambda net, row, data: go(net, row, data, ckpts.get(row.ckpt, row.ckpt))


def by_context_reentrant(function, *args):
    return checkpoint(function, *args, use_reentrant=True, context_fn=preserve_state)


def everywhere(net, row, data):
    with preserve_everywhere():
        return go(net, row, data, row.ckpt)


def around_the_region(net, row, data):
    for part in (data[:MIDWAY], data[MIDWAY:]):  # midway it may become another model
        net = go(net, row, part, rivals.around_the_region(net, row.ckpt))
    return net


@dataclass(frozen=True)
class Method:
    """How a model is trained with it, and what comes of it: `mostly`, but for the rows of these names or patterns."""

    run: Callable
    mostly: str
    but: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def outcomes(self) -> dict[str, str]:
        """Give the asserted outcome of each row."""
        others = {row: outcome for outcome, names in self.but.items() for name in names for row in matching(name)}
        return dict.fromkeys(ROWS, self.mostly) | others


def matching(pattern: str) -> list[str]:
    """Give the rows of a name, in which `*` stands for anything."""
    return fnmatch.filter(ROWS, pattern)


# Rows with something in common, by name or pattern.
ONCE = ["no checkpoint", "compiled with the checkpoint*"]
CUMULATIVE = ["momentum=None*", "selective: norms saved"]
ONE_BY_ONE = ["one checkpoint", "checkpoint_sequential", "nested", "nested directly", "gradient accumulation"]
REENTRANT = [f"{way}, reentrant" for way in [*ONE_BY_ONE, "compiled block"]] + ["recomputation written by hand"]
IN_TURN = ["siamese inputs*", "pipeline order", "a layer twice in a region"]
VARYING = ["batches *", "an exception in *"]
CHANGED_LATER = ["switched off midway", "a momentum schedule"]
NEW_BATCH, BY_HAND = "a new batch in a backward hook", "saved tensors read by hand"
UNSEEN = ["converted to SyncBatchNorm midway", NEW_BATCH, BY_HAND]

METHODS = {
    "nothing": Method(nothing, "wrong", {"exact": ONCE, "equal": CUMULATIVE}),
    "`correct`": Method(
        by_root, "equal", {"exact": ONCE, "decay": IN_TURN, "wrong": [*VARYING, *CHANGED_LATER, NEW_BATCH]}
    ),
    "`calibrate`": Method(
        by_calibration,
        "equal",
        {
            "exact": ONCE,
            "decay (said)": [*IN_TURN, *VARYING],
            "wrong": CHANGED_LATER,
            "wrong (said)": [BY_HAND, NEW_BATCH],
        },
    ),
    "`update_once`": Method(by_update_once, "exact", {"wrong": UNSEEN}),
    "`preserve_state`": Method(
        replacing({non_reentrant: by_context, reentrant: by_context_reentrant}),
        "exact",
        {
            "wrong": ["checkpoint_sequential*", "recomputation written by hand"],
            "refused": [
                "[!c]*, reentrant",
                "compiled block, reentrant",
                "with debug=True",
                "selective: *",
                "compiled with the checkpoint*",
            ],
        },
    ),
    "`checkpoint`": Method(
        replacing({non_reentrant: drop_in, reentrant: drop_in_reentrant}),
        "exact",
        {
            "wrong": ["checkpoint_sequential*", "recomputation written by hand"],
            "refused": ["compiled with the checkpoint*"],
        },
    ),
    "`preserve_everywhere`": Method(everywhere, "exact", {"wrong": ["recomputation written by hand"]}),
    "flag, saved statistics": Method(preparing(rivals.flag), "exact", {"wrong": [*UNSEEN, "compiled block*"]}),
    "stand-in buffers": Method(preparing(rivals.stand_ins), "exact", {"wrong": [*UNSEEN, "compiled block*"]}),
    "only in backward": Method(
        preparing(rivals.only_in_backward),
        "wrong",
        {
            "exact": [*ONCE, *REENTRANT],
            "equal": CUMULATIVE,
            "decay": ["siamese inputs, reentrant", "batches under no_grad", NEW_BATCH],
        },
    ),
    "around the region": Method(
        around_the_region, "exact", {"wrong": ["checkpoint_sequential*", "torch's checkpoint_wrapper"]}
    ),
}
OUTCOMES = {
    "exact": "running_mean, running_var and num_batches_tracked are those of the uncheckpointed run, bit for bit",
    "equal": "running_mean and running_var are equal to rounding (float64, 1e-12); num_batches_tracked counts passes",
    "decay": "old batches fade at the right speed, the newest ones are weighted wrongly",
    "wrong": "neither",
    "refused": "an exception, of torch or of this package",
    "(said)": "and a warning of momentum_fix says so",
}


def asserted() -> Table:
    """Give the table that the tests assert."""
    columns = {name: method.outcomes() for name, method in METHODS.items()}
    return {row: {name: outcomes[row] for name, outcomes in columns.items()} for row in ROWS}


# Running a cell.


def outcome(row: Row, method: Callable, device: str = "cpu") -> str:
    """Run one cell beside the uncheckpointed run and tell what came of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = _outcome(row, method, device)
        except Exception:
            found = "refused"
        finally:
            torch.compiler.reset()
    said = any(str(warning.message).startswith(("only the decay", "not corrected")) for warning in caught)
    return found + " (said)" * said


def _outcome(row: Row, method: Callable, device: str) -> str:
    truth, mine = _pair(row, method, device, 0.0)
    apart = twins.deviation(mine, truth)
    moved = _pair(row, method, device, 1.0) if apart >= twins.ROUNDING or row.wrap else None  # from another old value
    if not twins.same_path(mine, truth):
        return "other gradients"
    if apart < twins.ROUNDING:
        return "exact" if apart == 0 and twins.counters(mine) == twins.counters(truth) else "equal"
    return "decay" if _decays_alike((truth, moved[0]), (mine, moved[1])) else "wrong"


def _pair(row: Row, method: Callable, device: str, old: float) -> tuple[nn.Module, nn.Module]:
    rank = dist.get_rank() if row.wrap else 0
    data = [x.to(device) for x in by.data(STEPS, seed=1 + rank)]
    nets = []
    for run in (lambda net: go(net, row, data, plainly), lambda net: method(net, row, data)):
        torch.manual_seed(0)
        torch.compiler.reset()
        net = Net(row.norm).to(device)
        for name, buffer in net.named_buffers():
            if "running" in name and not nn.parameter.is_lazy(buffer):
                buffer += old
        nets.append(run(WRAPPERS[row.wrap](net)))
    return nets[0], nets[1]


def _decays_alike(truths, mine) -> bool:
    true_old, true_moved, old, moved = (twins.statistics(net) for net in (*truths, *mine))
    return all(
        torch.allclose(moved[name] - old[name], true_moved[name] - true_old[name], rtol=0, atol=twins.ROUNDING)
        for name in old
    ) and any(not torch.equal(true_old[name], true_moved[name]) for name in old)


def row_outcomes(name: str) -> dict[str, str]:
    """Run a row's cells."""
    if ROWS[name].wrap:
        return distributed_outcomes()[name]
    return {column: outcome(ROWS[name], method.run) for column, method in METHODS.items()}


@functools.cache
def distributed_outcomes() -> Table:
    """Run the cells of all rows with two processes; an outcome counts if both ranks have it."""
    with tempfile.TemporaryDirectory() as folder:
        twins.on_two_ranks(functools.partial(_write_outcomes, folder), folder)
        first, second = (json.loads(Path(folder, str(rank)).read_text()) for rank in range(2))
    return {
        name: {column: found if found == second[name][column] else "ranks differ" for column, found in cells.items()}
        for name, cells in first.items()
    }


def _write_outcomes(folder: str, rank: int) -> None:
    found = {
        name: {column: outcome(row, method.run) for column, method in METHODS.items()}
        for name, row in ROWS.items()
        if row.wrap
    }
    Path(folder, str(rank)).write_text(json.dumps(found))


# The document.


def grid(corner: str, table: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Lay a table out in Markdown, with a last row that counts how often each column is right."""
    columns = list(next(iter(table.values())))
    right = {column: sum(cells[column] in ("exact", "equal") for cells in table.values()) for column in columns}
    return [
        f"| {corner} | " + " | ".join(columns) + " |",
        "| --- |" + " --- |" * len(columns),
        *(f"| {name} | " + " | ".join(cells.values()) + " |" for name, cells in table.items()),
        f"| **exact or equal, of {len(table)}** | " + " | ".join(map(str, right.values())) + " |",
    ]


def compared(expected: Mapping[str, Mapping[str, str]], measure: Callable[[str], Any]) -> dict[str, Any]:
    """Measure a table row by row, and say which cells are not as asserted."""
    measured = {}
    for name, cells in expected.items():
        measured[name] = measure(name)
        otherwise = [f"{column} is {cell}" for column, cell in measured[name].items() if cell != cells[column]]
        print(f"{name}: {', '.join(otherwise) or 'as asserted'}", file=sys.stderr)
    return measured


def document(table: Mapping[str, Mapping[str, str]]) -> str:
    """Write the page: the table, and what its words mean."""
    lines = [
        "# What is right where",
        "",
        "Made by `python tests/conformance.py`; the tests assert every cell. Each cell compares six training steps in",
        "float64 with the same steps without checkpointing. `correct` is given the right passes, and `calibrate` sees",
        "only the first step. If no engine is named, it is the non-reentrant one (`use_reentrant=False`).",
        "",
        *(f"- **{word}**: {meaning}" for word, meaning in OUTCOMES.items()),
        "",
        *grid("recomputed how", table),
        "",
        "`preserve_state` and `checkpoint` are used where the row itself calls torch's checkpoint. torch refuses a",
        "`context_fn` with the reentrant engine and with `debug=True`, and a second one beside that of selective",
        "checkpointing. The rows that are compiled with the checkpoint require a single graph, which neither of the",
        "two allows. `checkpoint_sequential` calls the checkpoint itself and takes no `context_fn`:",
        "`preserve_everywhere` reaches it. Code that recomputes by hand has no checkpoint to reach. For compiled code",
        "that need not be a single graph, and for state other than running statistics, see",
        "[which state is preserved](states.md).",
        "",
        "The last four are fixes that people write by hand, each as strong as we could make it (`tests/rivals.py`).",
        "Three of them are two hooks on each layer: in a backward pass, they save the statistics before the layer and",
        "copy them back after it, or they give the layer other buffers; or they track only while gradients are",
        "recorded. The fourth wraps the function that you give to the checkpoint: every run of it except the first",
        "saves the statistics of the model and puts them back. This works only if your own code calls the",
        "checkpoint, not a library's.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    measured = compared(asserted(), row_outcomes)
    DOCUMENT.write_text(document(measured), encoding="utf-8")
