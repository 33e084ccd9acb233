"""What the study's runs say: outcomes by seed, and what uncorrected passes change in them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

import study_statistics as statistics
from momentum_fix import effective_momentum
from study import CONDITIONS, DATA, FULL_PASS, GRID, STEPS, Condition, Variant, read
from study_statistics import Coverage, Estimate, bootstrap_t
from study_tasks import TASKS

ONE, TWO, FIVE = (Variant(k, 0.1) for k in (1, 2, 5))
LOSS, ERROR = 0, 1
BATCHES = sorted(STEPS)

Runs = dict[tuple[str, int], dict]


class Study(NamedTuple):
    """The runs of the seeds that are finished in every condition."""

    torch: str
    seeds: list[int]
    runs: Runs


def load(file: Path = DATA) -> Study:
    head, runs = read(file)
    wanted = [str(condition) for condition in CONDITIONS]
    seeds = [seed for seed in sorted({seed for _, seed in runs}) if all((name, seed) in runs for name in wanted)]
    return Study(head["torch"].split("+")[0], seeds, {key: run for key, run in runs.items() if key[1] in seeds})


def values(study: Study, condition: Condition, variant: object, time: str = "final", what: int = LOSS) -> np.ndarray:
    """Give an outcome by seed."""
    runs = (study.runs[str(condition), seed] for seed in study.seeds)
    return np.array([run["scores"][str(variant)][time][what] for run in runs])


def logs(study: Study, condition: Condition, variant: Variant, base: Variant = ONE, time: str = "final") -> np.ndarray:
    """Give by how much the logarithm of the loss is above that of another variant, by seed."""
    return np.log(values(study, condition, variant, time)) - np.log(values(study, condition, base, time))


def points(study: Study, condition: Condition, variant: Variant, time: str = "final") -> np.ndarray:
    """Give by how many points the error is above that with k = 1, by seed."""
    found = (values(study, condition, one, time, ERROR) for one in (variant, Variant(1, variant.momentum)))
    return np.subtract(*found)


def percent(found: Estimate) -> Estimate:
    """Turn an estimate of a logarithm into percent."""
    return Estimate(*(100 * float(np.expm1(one)) for one in found[:3]), found.p)


def over(study: Study, schedule: str, batch: int, variant: Variant, base: Variant = ONE) -> tuple[Estimate, Estimate]:
    """Give the change of the loss over the tasks, in percent: for these tasks, and for tasks like them."""
    by_task = [logs(study, Condition(task, batch, schedule), variant, base) for task in TASKS]
    means = [float(one.mean()) for one in by_task]
    return percent(bootstrap_t(np.mean(by_task, axis=0))), percent(statistics.over_tasks(means))


class Test(NamedTuple):
    condition: Condition
    variant: Variant
    change: Estimate  # of the loss, in percent
    p: float  # after Holm's correction

    def verdict(self) -> int:
        return (1 if self.change.mean > 0 else -1) * (self.p < statistics.LEVEL)


def primary(study: Study, instead: dict[Condition, Condition] | None = None) -> list[Test]:
    """Give the planned comparisons; `instead` names conditions that take the place of others."""
    planned = [(condition, variant) for condition in GRID for variant in (TWO, FIVE)]
    found = [bootstrap_t(logs(study, (instead or {}).get(c, c), variant)) for c, variant in planned]
    corrected = statistics.holm([one.p for one in found])
    return [Test(*one, percent(e), p) for one, e, p in zip(planned, found, corrected, strict=True)]


def in_spreads(study: Study, condition: Condition, variant: Variant) -> float:
    """Give the change of the log loss in standard deviations of k = 1 over seeds."""
    spread = np.log(values(study, condition, ONE)).std(ddof=1)
    return float(logs(study, condition, variant).mean() / spread)


def variance(variant: Variant) -> float:
    """Give the variance of a running value, for independent batches, in variances of a batch statistic."""
    effective = effective_momentum(variant.momentum, passes=variant.k)
    return effective / (2 - effective)


class Rule(NamedTuple):
    predicted: float
    ratios: list[float]  # by condition in which a full pass gains at k = 1


def rule_of_thumb(study: Study, schedule: str, variant: Variant) -> Rule:
    """Compare what a variant loses to a full pass with what k = 1 loses, at the last step."""
    ratios = []
    for condition in GRID:
        best, one, mine = (values(study, condition, v, "last") for v in (FULL_PASS, ONE, variant))
        if condition.schedule == schedule and bootstrap_t(one - best).sign() > 0:
            ratios.append(float((mine - best).mean() / (one - best).mean()))
    return Rule(variance(variant) / variance(ONE), ratios)


def coverages(study: Study) -> dict[str, Coverage]:
    """Simulate how often the intervals contain the truth, for populations and for the study's own differences."""
    random = np.random.default_rng(0)
    found = [logs(study, condition, variant) for condition in GRID for variant in (TWO, FIVE)]
    scaled = [(one - one.mean()) / one.std() for one in found if np.ptp(one) > 1e-12]
    skewed = max(scaled, key=lambda one: abs((one**3).mean()))
    populations = {
        "normal": random.standard_normal(100_000),
        "exponential": random.exponential(size=100_000),
        "log-normal": random.lognormal(size=100_000),
        "all differences of the primary family, each scaled to its own spread": np.concatenate(scaled),
        "the most skewed of them": skewed,
    }
    return {name: statistics.coverage(one, len(study.seeds)) for name, one in populations.items()}
