"""What uncorrected passes do to networks that are really trained: the runs of benchmarks/study_plan.md.

    python benchmarks/study.py            every run that is missing in benchmarks/study.jsonl (make study)
    python benchmarks/study.py --small    the same in small, into build/study-small (make study-small)
    python benchmarks/study.py --workers 2

Stopped, it goes on where it was: the data file is written anew, atomically, after each run. `study_page.py` makes the
page of it.

The data file. Its first line says what it was made with, and of which plan. Each other line is a run: its condition and
seed, how many steps and seconds it took, and `scores`: for each variant of the running statistics and each time, the
test loss (cross-entropy in nats) and the test error in percent (`study_tasks.py` says which). Variants are "k = 2,
m = 0.1" and the like, and "full pass": statistics of a pass over the training data, the weights standing still. Times
are "final" (the mean over the last 3 % of the steps), "last" (the last step), and "8 after" and the like: steps after a
change of domain. A run "baseline" holds what simple methods reach on the same data.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from momentum_fix import effective_momentum
from momentum_fix.norms.layers import tracked_layers
from study_tasks import TASKS, Data, Scores, Task

ROOT = Path(__file__).parent.parent
PLAN = ROOT / "benchmarks" / "study_plan.md"
DATA = ROOT / "benchmarks" / "study.jsonl"
SMALL = ROOT / "build" / "study-small" / "study.jsonl"
SEEDS = 24
STEPS = {2: 2000, 8: 800, 32: 400, 64: 400}  # by batch size
SCHEDULES = ("annealed", "constant")
FINAL = 0.03  # of the steps
POINTS = 4  # evaluations among the final steps
AFTER = (8, 24, 64)  # steps after the change of domain
FULL_PASS = "full pass"


class Variant(NamedTuple):
    k: int
    momentum: float

    def __str__(self) -> str:
        return f"k = {self.k}, m = {self.momentum}"


VARIANTS = [*(Variant(k, 0.1) for k in (1, 2, 5)), *(Variant(k, m) for m in (0.01, 0.3) for k in (1, 5))]


class Condition(NamedTuple):
    task: str
    batch: int
    schedule: str
    special: str = ""  # "change": of domain, midway; "float64": instead of float32; "baseline": no network

    def __str__(self) -> str:
        return ", ".join([self.task, f"batch {self.batch}", self.schedule, *([self.special] if self.special else [])])


GRID = [Condition(task, batch, schedule) for task in TASKS for batch in STEPS for schedule in SCHEDULES]
CHANGES = [Condition(task, 2, "annealed", "change") for task in TASKS]
DOUBLE = [Condition("digits", batch, schedule, "float64") for batch in (2, 64) for schedule in SCHEDULES]
BASELINES = [Condition(task, 0, "none", "baseline") for task in TASKS]
CONDITIONS = [*BASELINES, *GRID, *CHANGES, *DOUBLE]


class Running:
    """The running statistics of every variant, in one training run.

    At a momentum of 1 a layer's running statistics are those of its last batch. So it is set here; after each step
    they are read, and each variant's own average moves. k updates with one batch are one with the effective momentum.
    Training never reads what stands in the buffers.
    """

    def __init__(self, net: nn.Module, variants: list[Variant]):
        self.layers = list(tracked_layers(net))
        for layer in self.layers:
            layer.momentum = 1.0
        momenta = [effective_momentum(v.momentum, passes=v.k) for v in variants]
        self.momenta = torch.tensor(momenta, dtype=torch.float64)[:, None]
        self.values = self.read().double().repeat(len(variants), 1)

    def read(self) -> torch.Tensor:
        """Give what stands in the buffers."""
        return torch.cat([buffer for layer in self.layers for buffer in (layer.running_mean, layer.running_var)])

    def update(self) -> None:
        """Move every variant by the batch that the buffers hold."""
        self.values += self.momenta * (self.read() - self.values)

    def put(self, values: torch.Tensor) -> None:
        """Write running statistics into the buffers."""
        buffers = [buffer for layer in self.layers for buffer in (layer.running_mean, layer.running_var)]
        for buffer, part in zip(buffers, values.split([len(b) for b in buffers]), strict=True):
            buffer.copy_(part)


def full_pass(net: nn.Module, running: Running, x: torch.Tensor, batch: int) -> torch.Tensor:
    """Give the mean of the batch statistics over the training data (Wu and Johnson 2021: PreciseBN)."""
    net.train()
    found = []
    with torch.no_grad():
        for part in x.split(batch)[: len(x) // batch]:
            net(part)
            found.append(running.read().double())
    return torch.stack(found).mean(0)


def evaluate(net: nn.Module, task: Task, x: torch.Tensor, y: torch.Tensor) -> Scores:
    net.eval()
    with torch.no_grad():
        output = torch.cat([net(part) for part in x.split(500)])
    return Scores(float(nn.functional.cross_entropy(output, y)), task.error(output.argmax(1), y))


def stream(length: int, needed: int, generator: torch.Generator) -> torch.Tensor:
    """Give the numbers of the examples in the order in which training sees them: epoch after epoch, each shuffled."""
    epochs = math.ceil(needed / length)
    return torch.cat([torch.randperm(length, generator=generator) for _ in range(epochs)])[:needed]


def changed(x: torch.Tensor) -> torch.Tensor:
    """Invert and halve the contrast."""
    return 0.5 - x / 2


@functools.lru_cache(maxsize=len(TASKS))
def load(task: str, seed: int) -> Data:
    return TASKS[task].load(seed)


def times(steps: int, change: int | None) -> dict[int, list[str]]:
    """Give the steps after which the variants are evaluated, and what each evaluation counts for."""
    back = [round(FINAL * steps * i / POINTS) for i in range(POINTS)]
    found: dict[int, list[str]] = {}
    for step in {steps - b for b in back}:
        found.setdefault(step, []).append("final")
    found[steps].append("last")
    for after in AFTER if change is not None else ():
        found.setdefault(change + after, []).append(f"{after} after")
    return found


def train(condition: Condition, seed: int, data: Data, steps: int) -> dict:
    """Train once; give every variant's scores."""
    task = TASKS[condition.task]
    torch.manual_seed(seed)
    net = task.network()
    if condition.special == "float64":  # of the same initial weights
        net, data = net.double(), Data(data.x.double(), data.y, data.test_x.double(), data.test_y)
    running = Running(net, VARIANTS)
    order = stream(len(data.x), steps * condition.batch, torch.Generator().manual_seed(seed))
    rate = task.rate * min(1, condition.batch / 32)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    change = steps // 2 if condition.special == "change" else None
    due = times(steps, change)
    found: dict[str, dict[str, list[Scores]]] = {}

    for step in range(1, steps + 1):
        after_change = change is not None and step > change
        net.train()
        if condition.schedule == "annealed":
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        rows = order[(step - 1) * condition.batch : step * condition.batch]
        x = changed(data.x[rows]) if after_change else data.x[rows]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), data.y[rows]).backward()
        optimizer.step()
        running.update()
        if step in due:
            test_x = changed(data.test_x) if after_change else data.test_x
            for variant, values in zip(VARIANTS, running.values, strict=True):
                running.put(values)
                scores = evaluate(net, task, test_x, data.test_y)
                for name in due[step]:
                    found.setdefault(str(variant), {}).setdefault(name, []).append(scores)
    running.put(full_pass(net, running, changed(data.x) if change else data.x, condition.batch))
    found[FULL_PASS] = {"last": [evaluate(net, task, test_x, data.test_y)]}
    return {variant: {name: _mean(scores) for name, scores in by.items()} for variant, by in found.items()}


def _mean(scores: list[Scores]) -> list[float]:
    return [short(sum(values) / len(values)) for values in zip(*scores, strict=True)]


def short(value: float) -> float:
    return float(f"{value:.5g}")


def one_run(condition: Condition, seed: int, small: bool) -> dict:
    """Give one line of the data file."""
    torch.set_num_threads(1)
    started = time.process_time()
    data = load(condition.task, seed)
    steps = 0
    if small:
        data = Data(data.x[:128], data.y[:128], data.test_x[:32], data.test_y[:32])
    if condition.special == "baseline":
        found = TASKS[condition.task].baselines(data)
        scores = {name: {"last": [value and short(value) for value in values]} for name, values in found.items()}
    else:
        steps = 160 if small else STEPS[condition.batch]
        scores = train(condition, seed, data, steps)
    seconds = round(time.process_time() - started, 2)
    return {"condition": str(condition), "seed": seed, "steps": steps, "seconds": seconds, "scores": scores}


def runs(seeds: int) -> Iterator[tuple[Condition, int]]:
    """List every run, seed after seed, so that an unfinished study has as much of every condition."""
    return ((condition, seed) for seed in range(seeds) for condition in CONDITIONS)


def plan_hash() -> str:
    return hashlib.sha256(PLAN.read_bytes()).hexdigest()


def read(file: Path) -> tuple[dict, dict[tuple[str, int], dict]]:
    """Give the data file's first line, and the runs by condition and seed."""
    head, *lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return head, {(line["condition"], line["seed"]): line for line in lines}


def write(file: Path, head: dict, done: dict[tuple[str, int], dict]) -> None:
    """Replace the data file at once, the runs in their order, so that it is complete whenever it is looked at."""
    rank = {str(condition): number for number, condition in enumerate(CONDITIONS)}
    lines = [head, *(done[key] for key in sorted(done, key=lambda key: (key[1], rank[key[0]])))]
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    unfinished.replace(file)


def run_all(file: Path, seeds: int, small: bool, workers: int) -> int:
    """Run what is missing in the data file; give how many runs that were."""
    head, done = {"torch": torch.__version__, "plan": plan_hash()}, {}
    if file.exists():
        there, done = read(file)
        if there != head:
            raise ValueError(f"{file} was begun as {there}, and this is {head}: move it away, or go back to that")
    file.parent.mkdir(parents=True, exist_ok=True)
    missing = [run for run in runs(seeds) if (str(run[0]), run[1]) not in done]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(one_run, *run, small) for run in missing]
        for future in tqdm(as_completed(futures), total=len(futures), desc="training", mininterval=10):
            line = future.result()
            done[line["condition"], line["seed"]] = line
            write(file, head, done)
    return len(missing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="everything in small, in two minutes")
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    arguments = parser.parse_args()
    file, seeds = (SMALL, 2) if arguments.small else (DATA, SEEDS)
    run_all(file, seeds, arguments.small, arguments.workers)


if __name__ == "__main__":
    main()
