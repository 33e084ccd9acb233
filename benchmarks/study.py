"""Is it negligible? What uncorrected passes do to networks that are really trained: the runs.

    python benchmarks/study.py          every run, then study.json and docs/study.md with its figures (make study)
    python benchmarks/study.py --small  the same in small, all in build/study-small (make study-small)

Stopped, it goes on where it was: each finished run is a file in build/study, assembled in the end.

The design, written down before the runs, but not before every result: a pilot on the digits had shown the effect of k,
and because of it the constant rate was not run at batch 32. That cell was run afterwards, but for the brain. (Learning
rates were chosen before that, on a seed of their own, by the error at one pass alone.)

Method. Training mode never reads running statistics, so the path of the weights does not depend on them. Each run
records every layer's batch statistics, step by step; the running statistics of every variant (momentum, passes, order
of updates) are computed from this record, put into the buffers, and evaluated on the same weights. So two variants
differ in nothing but their buffers, and differences are paired within a seed. A seed draws the split, the initial
weights and the batches.

Seeds. 8 (`Task.seeds`). A paired t test at 5 % then finds a mean difference of 1.16 of its standard deviation with a
probability of 80 %. In a pilot with 4 seeds on the digits all 4 differences at batch 2 had the same sign. Runs are done
seed after seed; if time runs out, the seeds that are finished in every condition are the study, whatever they say.

Primary comparisons, the only ones that are tests: the final error of k = 2 and of k = 5 minus that of k = 1, at
momentum 0.1, annealed, shuffled, batch 2 and batch 32, in each of the four tasks: 16 paired t tests, two-sided,
corrected by Holm's method at 5 %. All the rest is exploration: 95 % t intervals of the paired differences, uncorrected.
In the table to decide from, "do not bother" needs the whole interval of k = 2 and k = 5 within 0.1 points of error
(`SMALL`), and "correct it" an interval above 0.

Final. The mean over four evaluations, 24, 16, 8 and 0 steps before the end: one evaluation would be one draw of the
noise that is to be measured. Early: one evaluation after 5 % of the steps. Step to step: the standard deviation over
the last 12 steps. Best checkpoint: the lowest validation loss of 12 evenly spaced ones, each under the variant's
own buffers.

Crossings. Momentum 0.01, 0.1, 0.3 and k = 1, 2, 3, 5 and nested stand in every run (they cost no training), interleaved
updates at momentum 0.1 alone. Annealed runs have every batch size of `Task.batches`, runs with a constant rate 2 and 8
(in a pilot the effect for the worse was gone there from 8 on; 32 was run afterwards); other data orders run at batch 2,
annealed. For time, MNIST has no batch 1 and 4 and no other data orders, the vowels and the brain no batch 4. The vowels
have no batch 1: in the search for a learning rate, at one pass, they did not train there with any of four rates.

Data orders. "shuffled"; "runs": stretches of 32 examples of one class (one height of the brain), the stretches
shuffled; "change": shuffled, and from the middle of training on all data, the held-out data included, is
x -> 0.5 - x / 2 (contrast inverted and halved, and shifted), evaluated also 8, 24 and 64 steps after the change.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from monai.networks.nets.unet import CheckpointUNet
from torch import nn
from tqdm import tqdm

from momentum_fix import calibrate, corrected_momentum
from momentum_fix.layers import tracked_layers
from momentum_fix.weights import batch_weights
from study_tasks import EDGE, TASKS, UNET, Data, Task

ROOT = Path(__file__).parent.parent
MOMENTA = (0.01, 0.1, 0.3)
PASSES = (1, 2, 3, 5)
CHECKPOINTS = 12
WINDOW = 12  # consecutive last steps
FINAL = (24, 16, 8, 0)  # steps before the last one
AFTER = (8, 24, 64)  # steps after the change of domain
GROUP = 8  # micro-batches in flight in the longer pipeline; every evaluation of all variants stands at a multiple
PRECISE_BATCHES = 1000  # at most, for a full pass
SMALL = 0.1  # points of error


@dataclass(frozen=True)
class Variant:
    """Which updates, with which momentum, move the running statistics: `order` as in `batch_weights`.

    An order without letters, "nested", stands for as many passes as the layer has in a nested checkpoint.
    """

    momentum: float
    order: str

    def orders(self, nested: list[int]) -> list[str]:
        """Give the order for each layer."""
        return ["A" * passes for passes in nested] if self.order == "nested" else [self.order] * len(nested)


def passes(k: int, momentum: float = 0.1) -> Variant:
    return Variant(momentum, "A" * k)


PIPELINE = "ABCDEFGH"
assert len(PIPELINE) == GROUP
INTERLEAVED = {"A B B A": "ABBA", "A B A B": "ABAB", "8 in flight": 2 * PIPELINE}
K = {f"k = {k}": passes(k) for k in PASSES} | {"nested": Variant(0.1, "nested")}
VARIANTS = {
    **K,
    **{f"{name}, m = {m}": replace(variant, momentum=m) for m in MOMENTA if m != 0.1 for name, variant in K.items()},
    **{name: Variant(0.1, order) for name, order in INTERLEAVED.items()},
    **{f"{name}, root": Variant(corrected_momentum(0.1, passes=2), order) for name, order in INTERLEAVED.items()},
}
PRECISE = "PreciseBN"  # statistics of a full pass, the weights standing still


class Condition(NamedTuple):
    task: str
    batch: int
    schedule: str
    order: str

    def __str__(self) -> str:
        return f"{self.task}, batch {self.batch}, {self.schedule}, {self.order}"


def step_weights(order: str, momentum: float, steps: int) -> tuple[float, np.ndarray]:
    """Give the weights, in today's running value, of the initial one and of each step's batch."""
    group = batch_weights(order, momentum)
    groups, rest = divmod(steps, len(group.batches))
    if rest:
        raise ValueError(f"steps is {steps}, but must be a multiple of {len(group.batches)} for the order {order!r}")
    decays = group.initial ** np.arange(groups, -1, -1.0)
    return float(decays[0]), np.outer(decays[1:], list(group.batches.values())).ravel()


class Theory(NamedTuple):
    variance: float  # of the running value, in variances of a batch statistic, for independent batches
    age: float  # mean age of the batches in it, in steps


def theory(variant: Variant, steps: int = 4000) -> Theory:
    """Give what the weights predict, after many steps."""
    _, weights = step_weights(variant.order, variant.momentum, steps)
    return Theory(float((weights**2).sum()), float(weights @ np.arange(steps - 1, -1, -1)))


class Record:
    """Every layer's batch statistics, step by step.

    At a momentum of 1 a layer's running statistics are those of its last batch. So it is set here, and after each step
    the buffers are the record's next row. Training does not read them.
    """

    def __init__(self, net: nn.Module, steps: int):
        self.layers = list(tracked_layers(net))
        for layer in self.layers:
            layer.momentum = 1.0
        self.widths = [layer.num_features for layer in self.layers]
        like = self.layers[0].running_mean
        self.rows = torch.empty(steps, 2 * sum(self.widths), dtype=like.dtype)
        self.initial = self._read()
        self.length = 0

    def _read(self) -> torch.Tensor:
        return torch.cat([buffer for layer in self.layers for buffer in (layer.running_mean, layer.running_var)])

    def add(self) -> None:
        """Read the buffers after a step."""
        self.rows[self.length] = self._read()
        self.length += 1

    def replay(self, variant: Variant, nested: list[int]) -> torch.Tensor:
        """Give the running statistics of a variant after the steps so far."""
        rows, columns = self.rows[: self.length], [2 * width for width in self.widths]
        parts = []
        for order, start, part in zip(
            variant.orders(nested), self.initial.split(columns), rows.split(columns, dim=1), strict=True
        ):
            initial, weights = _weights(order, variant.momentum, self.length)
            parts.append(initial * start + torch.from_numpy(weights).to(part) @ part)
        return torch.cat(parts)

    def put(self, values: torch.Tensor) -> None:
        """Write running statistics into the buffers."""
        for layer, part in zip(self.layers, values.split([2 * width for width in self.widths]), strict=True):
            mean, variance = part.chunk(2)
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance)


_weights = functools.lru_cache(maxsize=256)(step_weights)


def distance(values: torch.Tensor, reference: torch.Tensor, widths: list[int]) -> float:
    """Give the mean square distance, over layers and channels, from the reference.

    Of the mean in standard deviations and of the variance relative to it.
    """
    found = []
    for mine, true in zip(*(v.split([2 * w for w in widths]) for v in (values, reference)), strict=True):
        (mean, variance), (true_mean, true_variance) = mine.chunk(2), true.chunk(2)
        squares = (mean - true_mean) ** 2 / true_variance + ((variance - true_variance) / true_variance) ** 2
        found.append(float(squares.mean()))
    return sum(found) / len(found)


@functools.cache
def nested_passes() -> list[int]:
    """Count the passes of each layer in MONAI's CheckpointUNet, the study's nested model."""
    with torch.random.fork_rng(devices=[]):
        net = CheckpointUNet(3, 1, 3, **UNET)
        with calibrate(net) as report:
            net(torch.rand(1, 1, EDGE, EDGE, EDGE)).mean().backward()
    return [row.passes for row in report.rows]


def nested_for(layers: int) -> list[int]:
    """Spread the passes of the nested model's way down, 2 to 5, over another network's layers."""
    low, high = min(nested_passes()), max(nested_passes())
    return [low + round((high - low) * i / (layers - 1)) for i in range(layers)]


def example_order(data: Data, order: str, epochs: int, generator: torch.Generator) -> torch.Tensor:
    """Give the numbers of the examples in the order in which training sees them."""

    def epoch():
        shuffled = torch.randperm(len(data.x), generator=generator)
        if order != "runs":
            return shuffled
        stretches = shuffled[data.key[shuffled].argsort(stable=True)].split(32)
        return torch.cat([stretches[i] for i in torch.randperm(len(stretches), generator=generator)])

    return torch.cat([epoch() for _ in range(epochs)])


def changed(x: torch.Tensor) -> torch.Tensor:
    return 0.5 - x / 2


def unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def rounded(step: float) -> int:
    return max(GROUP, round(step / GROUP) * GROUP)


def full_pass(net: nn.Module, x: torch.Tensor, batch: int) -> torch.Tensor:
    """Give the mean of the batch statistics over the training data (Wu and Johnson 2021: PreciseBN)."""
    record = Record(net, min(len(x) // batch, PRECISE_BATCHES))
    net.train()
    with torch.no_grad():
        for number in range(len(record.rows)):
            net(x[number * batch : (number + 1) * batch])
            record.add()
    return record.rows.mean(0)


class Scores(NamedTuple):
    """What an evaluation gives; errors in percent."""

    validation_loss: float
    loss: float
    error: float


def evaluate(net: nn.Module, data: Data, x: torch.Tensor, task: Task) -> Scores:
    net.eval()
    with torch.no_grad():
        output = torch.cat([net(part) for part in x.split(500)])
    cut = data.validation
    loss = nn.functional.cross_entropy
    return Scores(
        float(loss(output[:cut], data.held_y[:cut])),
        float(loss(output[cut:], data.held_y[cut:])),
        task.error(output[cut:], data.held_y[cut:]),
    )


def one_run(condition: Condition, seed: int, task: Task) -> dict:
    """Train once and give every variant's outcomes."""
    started = time.process_time()
    data = task.load(seed)
    torch.manual_seed(seed)
    net = task.network()
    layers = len(tracked_layers(net))
    nested = nested_passes() if condition.task == "brain" else nested_for(layers)
    generator = torch.Generator().manual_seed(seed)
    stream = example_order(data, condition.order, task.epochs, generator)
    steps = len(stream) // condition.batch // GROUP * GROUP
    record = Record(net, steps)
    rate = task.rate * condition.batch / 32
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)

    middle = rounded(steps / 2)
    points = [(rounded(0.05 * steps), "early"), *((steps - back, "final") for back in FINAL)]
    if condition.order == "change":
        points += [(middle + after, f"{after} after") for after in AFTER]
    checkpoints = [rounded(steps * (i + 1) / CHECKPOINTS) for i in range(CHECKPOINTS)]
    found = {name: {} for name in (*VARIANTS, PRECISE)}
    path = {name: {} for name in K}  # scores by step

    def scores(values, x):
        record.put(values)
        return evaluate(net, data, x, task)

    for step in range(1, steps + 1):
        net.train()
        if condition.schedule == "annealed":
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        rows = stream[(step - 1) * condition.batch : step * condition.batch]
        turn = changed if condition.order == "change" and step > middle else unchanged
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(turn(data.x[rows])), data.y[rows]).backward()
        optimizer.step()
        record.add()

        due = [point for at, point in points if at == step]
        if step in checkpoints or step > steps - WINDOW or due:
            for name, variant in K.items():
                path[name][step] = scores(record.replay(variant, nested), turn(data.held_x))
        if due:
            reference = full_pass(net, turn(data.x), condition.batch)
            for name in found:
                values = reference if name == PRECISE else record.replay(VARIANTS[name], nested)
                here = path[name][step] if name in K else scores(values, turn(data.held_x))
                outcome = (here.loss, here.error, distance(values, reference, record.widths))
                for point in due:
                    found[name].setdefault(point, []).append(outcome)

    outcomes = {}
    for name, by_point in found.items():
        outcome = outcomes[name] = {}
        for point, evaluations in by_point.items():
            for what, values in zip(("loss", "error", "distance"), zip(*evaluations, strict=True), strict=True):
                outcome[f"{point} {what}"] = sum(values) / len(values)
    for name, by_step in path.items():
        window = [by_step[step] for step in range(steps - WINDOW + 1, steps + 1)]
        best = min(checkpoints, key=lambda step: by_step[step].validation_loss)
        outcomes[name] |= {
            "step-to-step loss": float(np.std([s.loss for s in window], ddof=1)),
            "step-to-step error": float(np.std([s.error for s in window], ddof=1)),
            "best step": best,
            "best error": by_step[best].error,  # as shipped: these weights, this variant's buffers
            "best error, k = 1": path["k = 1"][best].error,  # these weights, the right buffers
        }
    return {"steps": steps, "seconds": time.process_time() - started, "outcomes": outcomes}


def small(task: Task) -> Task:
    """Shrink a task to seconds."""
    return replace(task, epochs=1, seeds=2, batches=(2, 4), load=_few(task.load))


def _few(load: Callable[[int], Data]) -> Callable[[int], Data]:
    def fewer(seed: int) -> Data:
        data = load(seed)
        held = slice(data.validation - 2, data.validation + 2)
        return Data(data.x[:96], data.y[:96], data.key[:96], data.held_x[held], data.held_y[held], 2)

    return fewer


def tasks(is_small: bool) -> dict[str, Task]:
    return {name: small(task) if is_small else task for name, task in TASKS.items()}


def conditions(task_name: str, task: Task) -> Iterator[Condition]:
    for batch in task.batches:
        yield Condition(task_name, batch, "annealed", "shuffled")
        if batch in (2, 8) or (batch == 32 and task_name != "brain"):  # 32 was cut at first, and run in the end
            yield Condition(task_name, batch, "constant", "shuffled")
    if task.rearranged:
        for order in ("runs", "change"):
            yield Condition(task_name, 2, "annealed", order)


def plan(is_small: bool) -> list[tuple[Condition, int]]:
    """List every run, seed after seed, so that an unfinished study has something of every condition."""
    chosen = tasks(is_small)
    seeds = max(task.seeds for task in chosen.values())
    return [
        (condition, seed)
        for seed in range(seeds)
        for name, task in chosen.items()
        if seed < task.seeds
        for condition in conditions(name, task)
    ]


def run_file(folder: Path, condition: Condition, seed: int) -> Path:
    return folder / f"{'-'.join(map(str, condition))}-{seed}.json"


def keep_one_run(folder: Path, condition: Condition, seed: int, is_small: bool) -> None:
    """Run, and leave a file only when it is complete."""
    torch.set_num_threads(1)
    file = run_file(folder, condition, seed)
    result = one_run(condition, seed, tasks(is_small)[condition.task])
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(result), encoding="utf-8")
    unfinished.replace(file)


def run_all(folder: Path, is_small: bool, workers: int) -> int:
    """Run what is not there yet; give how many runs that were."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [one for one in plan(is_small) if not run_file(folder, *one).exists()]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(keep_one_run, folder, *one, is_small) for one in missing]
        for future in tqdm(as_completed(futures), total=len(futures), desc="training", mininterval=5):
            future.result()
    return len(missing)


def short(value: float) -> float:
    return float(f"{value:.4g}")


def assemble(folder: Path, is_small: bool) -> dict:
    """Gather the runs: for each condition and variant, each outcome's values over the seeds.

    Only seeds that are finished in every condition count.
    """
    runs = plan(is_small)
    unfinished = {seed for condition, seed in runs if not run_file(folder, condition, seed).exists()}
    gathered = {}
    seconds = 0.0
    for condition, seed in runs:
        if seed in unfinished:
            continue
        run = json.loads(run_file(folder, condition, seed).read_text(encoding="utf-8"))
        seconds += run["seconds"]
        cell = gathered.setdefault(str(condition), {"steps": run["steps"], "seeds": [], "variants": {}})
        cell["seeds"].append(seed)
        for name, outcomes in run["outcomes"].items():
            variant = cell["variants"].setdefault(name, {})
            for what, value in outcomes.items():
                variant.setdefault(what, []).append(short(value))
    return {"torch": torch.__version__, "minutes": short(seconds / 60), "conditions": gathered}


def dump(data: dict) -> str:
    """Write the data file, a line a variant."""
    head = {key: value for key, value in data.items() if key != "conditions"}
    lines = [json.dumps(head)[:-1] + ', "conditions": {']
    for number, (name, cell) in enumerate(data["conditions"].items()):
        rest = {key: value for key, value in cell.items() if key != "variants"}
        lines.append(("," if number else "") + json.dumps(name) + ": " + json.dumps(rest)[:-1] + ', "variants": {')
        rows = [f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in cell["variants"].items()]
        lines.append(",\n".join(rows) + "}}")
    return "\n".join([*lines, "}}"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="everything in small, in two minutes")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    arguments = parser.parse_args()
    folder = ROOT / "build" / ("study-small" if arguments.small else "study")
    run_all(folder, arguments.small, arguments.workers)
    data = assemble(folder, arguments.small)
    (folder if arguments.small else ROOT / "benchmarks").joinpath("study.json").write_text(dump(data), encoding="utf-8")
    from study_page import write  # it draws, and training needs no Matplotlib

    print(write(data, folder if arguments.small else ROOT / "docs"))


if __name__ == "__main__":
    main()
