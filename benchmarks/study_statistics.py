"""The study's statistics: intervals over seeds that hold for skewed differences, and how well they hold."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

LEVEL = 0.05
RESAMPLES = 9_999


class Estimate(NamedTuple):
    """A mean with its 95 % interval, and the two-sided p value of no effect."""

    mean: float
    low: float
    high: float
    p: float

    def sign(self) -> int:
        """Give 1 if the interval is above 0, -1 if below, 0 if it contains 0."""
        return (self.low > 0) - (self.high < 0)


@functools.cache
def _draws(length: int, resamples: int) -> np.ndarray:
    return np.random.default_rng(0).integers(length, size=(resamples, length))


def studentized(values: np.ndarray, around: float = 0.0) -> np.ndarray:
    """Give (mean - around) / standard error along the last axis; 0 / 0 is 0."""
    deviation = values.mean(-1) - around
    error = values.std(-1, ddof=1) / np.sqrt(values.shape[-1])
    error = np.where(error < 1e-12, 0.0, error)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.abs(deviation) < 1e-12, 0.0, deviation / error)


def bootstrap_t(values: np.ndarray, resamples: int = RESAMPLES) -> Estimate:
    """Give the mean with its bootstrap-t interval, and p by the same distribution.

        mean - t*(97.5 %) * error  to  mean - t*(2.5 %) * error,  t* = (mean* - mean) / error*

    where the stars are samples drawn from the values with replacement. The t interval takes t* from a normal
    population, and misses too often on one side where the values are skewed.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 12.5.
    """
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if np.ptp(values) < 1e-12:  # no spread, so no t
        return Estimate(mean, mean, mean, float(abs(mean) < 1e-12))
    error = float(values.std(ddof=1)) / len(values) ** 0.5
    t = studentized(values[_draws(len(values), resamples)], mean)
    low, high = map(float, np.quantile(t, (LEVEL / 2, 1 - LEVEL / 2), method="inverted_cdf"))
    seen = mean / error
    tail = 1 + min((t >= seen).sum(), (t <= seen).sum())
    return Estimate(mean, mean - high * error, mean - low * error, float(min(1, 2 * tail / (resamples + 1))))


def over_tasks(means: list[float]) -> Estimate:
    """Give the mean over tasks with the t interval that treats them as a sample of tasks."""
    found = stats.ttest_1samp(means, 0)
    return Estimate(float(np.mean(means)), *map(float, found.confidence_interval(1 - LEVEL)), float(found.pvalue))


def holm(p: list[float]) -> list[float]:
    return [float(one) for one in multipletests(p, method="holm")[1]]


class Coverage(NamedTuple):
    """How often 95 % intervals contain the mean of the population, in percent."""

    skewness: float
    t: float
    bootstrap_t: float


def coverage(population: np.ndarray, seeds: int, samples: int = 2_000, resamples: int = 499) -> Coverage:
    """Draw samples from a population (many numbers) and count how often each interval contains its mean."""
    random = np.random.default_rng(1)
    mean = population.mean()
    drawn = random.choice(population, (samples, seeds))
    plain = np.abs(studentized(drawn, mean)) <= stats.t.ppf(1 - LEVEL / 2, seeds - 1)
    kept = 0
    for values in drawn:
        again = studentized(values[random.integers(seeds, size=(resamples, seeds))], values.mean())
        low, high = np.quantile(again, (LEVEL / 2, 1 - LEVEL / 2), method="inverted_cdf")
        kept += bool(low <= studentized(values, mean) <= high)
    return Coverage(float(stats.skew(population)), 100 * float(plain.mean()), 100 * kept / samples)
