"""Paired statistics over seeds × items (spec 8).

Everything works on ``differences``, an array ``(seed, item)`` of one metric, arm minus reference, for the same items
and seeds. Both axes are samples: a new training run and a new test item would both have come out differently, so both
are resampled (crossed, or "pigeonhole", bootstrap: Owen 2007, doi:10.1214/07-AOAS122).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Method = Literal["calibrated", "percentile", "basic"]
RESAMPLE_BLOCK = 1000
"""Resamples drawn at a time: bounds memory at RESAMPLE_BLOCK · (items + arms · seeds) numbers."""


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval, the mean difference, and the p-value that inverts the interval."""

    low: float
    high: float
    estimate: float
    p: float


def crossed_bootstrap(
    differences: ArrayLike,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    method: Method = "calibrated",
) -> Interval:
    """Interval and p-value of the mean of `differences` ``(seed, item)``, seeds and items resampled independently.

    `method`:

    - ``percentile``: quantiles of the resampled means, as `scipy.stats.bootstrap`. Far too narrow for few seeds.
    - ``basic``: the same reflected about the estimate.
    - ``calibrated`` (default): the resampled deviations, each rescaled to a draw of the variance of the mean under
      the crossed random-effects model: every mean square of `variance_of_mean` times ``df / χ²(df)``, its fiducial
      distribution (a generalised confidence interval, Weerahandi 1993). As Student's t does for the normal, it pays
      for variances known from few seeds. With one seed there is nothing to calibrate on: it is the percentile
      interval, and covers the items only, not the seeds.

    By simulation (tools/benchmarks/sim_coverage.py; 50 and 300 items, normal and skewed) the calibrated 95% interval
    covers 94–97% at 10 seeds whatever the seeds' variance, and 94–97% at 3 and 5 seeds where that variance counts;
    where it is negligible beside the items', 3 and 5 seeds cost width (97–99%). Family-wise error over 12 arms is
    0–5%; where the seeds' variance dominates, 1,000 resamples are too coarse for levels of 0.05 / 12 (up to 7%) and
    5,000 are enough (3.5%). The percentile interval covers 75–99%. A single seed covers 93–95% if seeds do not
    differ, and as little as 10% if they do.

    p is the smallest 1 − confidence at which the interval excludes 0, so p < 0.05 exactly when the 95% interval does;
    it cannot go below ``2 / (n_resamples + 1)``.

    Raises `ValueError` for NaN or infinite entries, saying how many, and for anything that is not ``(seed, item)``.
    """
    differences = np.asarray(differences, dtype=np.float64)
    if differences.ndim != 2:
        raise ValueError(f"differences must be (seed, item); got {differences.ndim} axes, shape {differences.shape}")
    return crossed_bootstrap_many(differences[None], n_resamples, confidence, seed, method)[0]


def crossed_bootstrap_many(
    differences: ArrayLike,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    method: Method = "calibrated",
) -> list[Interval]:
    """`crossed_bootstrap` of many contrasts ``(arm, seed, item)`` on the same resamples, one interval for each arm."""
    differences = _checked(differences, axes="arm seed item")
    if not 0 < confidence < 1 or n_resamples < 1:
        raise ValueError(f"need 0 < confidence < 1 and n_resamples >= 1; got {confidence} and {n_resamples}")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}; got {method!r}")
    bootstrap = _Bootstrap(differences, n_resamples, seed, method)
    low, high = bootstrap.bounds(np.full(len(differences), 1 - confidence))
    columns = zip(low, high, bootstrap.estimates, bootstrap.p(), strict=True)
    return [Interval(*map(float, column)) for column in columns]


def resampled_means(differences: NDArray[np.float64], n_resamples: int, seed: int = 0) -> NDArray[np.float64]:
    """Means ``(arm, resample)`` of `differences` ``(arm, seed, item)`` under crossed resampling, the same for all
    arms.

    A resample is a vector of counts for the seeds and one for the items; its mean is ``cₛᵀ D cᵢ / (seeds · items)``,
    a matrix product over all arms.
    """
    arms, seeds, items = differences.shape
    seed_rng, item_rng = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2))
    columns = differences.reshape(arms * seeds, items).T
    means = np.empty((arms, n_resamples))
    for start in range(0, n_resamples, RESAMPLE_BLOCK):
        size = min(RESAMPLE_BLOCK, n_resamples - start)
        over_items = (_counts(item_rng, size, items) @ columns).reshape(size, arms, seeds)
        means[:, start : start + size] = np.einsum("ras,rs->ar", over_items, _counts(seed_rng, size, seeds))
    return means / (seeds * items)


def variance_of_mean(differences: ArrayLike) -> tuple[float, float]:
    """Variance of the mean of ``(seed, item)`` differences when both are random, and its degrees of freedom.

    Two-way layout without replication, ``d = μ + seed + item + seed×item``: from the mean squares, the variance is
    ``(MS_seed + MS_item − MS_rest) / (seeds · items)`` with no component below 0, and the degrees of freedom are
    Satterthwaite's. With one seed (item) only the item (seed) variance can be estimated; a single difference has
    none, and gives (NaN, 0).
    """
    differences = _checked(differences, axes="seed item")
    if differences.size == 1:
        return float("nan"), 0.0
    squares, df = _mean_squares(differences[None])
    total, known = _total(squares)[0], df > 0
    spread = (squares[known, 0] ** 2 / df[known]).sum()
    return float(total / differences.size), float(max(total**2 / spread if spread > 0 else 0, df[known].min()))


def adjust(p_values: ArrayLike, method: Literal["bonferroni", "holm"]) -> NDArray[np.float64]:
    """p-values corrected for the size of their family, as statsmodels' `multipletests`.

    NaN (a contrast that could not be computed) stays NaN and is not counted in the family.
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    known = ~np.isnan(p)
    family = p[known]
    if ((family < 0) | (family > 1)).any():
        raise ValueError(f"p-values must be between 0 and 1; got {family[(family < 0) | (family > 1)].tolist()}")
    if method == "bonferroni":
        adjusted[known] = np.minimum(family * family.size, 1)
    elif method == "holm":
        order = np.argsort(family, kind="stable")
        steps = np.maximum.accumulate(family[order] * np.arange(family.size, 0, -1))
        result = np.empty_like(family)
        result[order] = np.minimum(steps, 1)
        adjusted[known] = result
    else:
        raise ValueError(f"method must be 'bonferroni' or 'holm'; got {method!r}")
    return adjusted


def adjusted_interval(
    differences: ArrayLike,
    family_size: int,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    method: Method = "calibrated",
) -> Interval:
    """The interval at confidence ``1 − (1 − confidence) / family_size``: all of a family cover together (Bonferroni).

    The p-value in it is not corrected; `adjust` does that.
    """
    if family_size < 1:
        raise ValueError(f"family_size is the number of contrasts, at least 1; got {family_size}")
    return crossed_bootstrap(differences, n_resamples, 1 - (1 - confidence) / family_size, seed, method)


def effect_size(differences: ArrayLike) -> float:
    """Cohen's d_z of the items: mean over items of the seed-averaged difference, over its standard deviation (ddof
    1).

    0 when all differences are 0, ±inf when they are all equal to something else, NaN for a single item.
    """
    items = _checked(differences, axes="seed item").mean(axis=0)
    if items.size < 2:
        return float("nan")
    mean, sd = items.mean(), items.std(ddof=1)
    if sd <= 1e-12 * abs(mean):
        return 0.0 if mean == 0 else float(np.copysign(np.inf, mean))
    return float(mean / sd)


def minimum_detectable_effect(differences: ArrayLike, alpha: float = 0.05, power: float = 0.8) -> float:
    """The true mean difference that a design with these seeds, items and variances would find with probability
    `power`.

    ``(t_{1−α/2} + t_{power}) · standard error``, both from `variance_of_mean`; a two-sided test at `alpha`. In the
    metric's unit; NaN for a single observation.
    """
    variance, df = variance_of_mean(differences)
    if df <= 0:
        return float("nan")
    return float((stats.t.ppf(1 - alpha / 2, df) + stats.t.ppf(power, df)) * np.sqrt(variance))


def sign_flip_test(seed_means: ArrayLike) -> float:
    """Exact two-sided p of the seeds' mean differences under all 2ⁿ sign flips; never below ``2 / 2ⁿ`` (0.25 for 3)."""
    means = np.asarray(seed_means, dtype=np.float64)
    if means.ndim != 1 or not 1 <= means.size <= 20:
        raise ValueError(f"seed_means must be 1 to 20 numbers, one per seed; got shape {means.shape}")
    if not np.isfinite(means).all():
        raise ValueError(f"{(~np.isfinite(means)).sum()} of {means.size} seed means are NaN or infinite")
    flipped = np.abs(np.array(list(product([1.0, -1.0], repeat=means.size))) @ means)
    return float(np.mean(flipped >= np.abs(means.sum()) * (1 - 1e-12)))


def _checked(differences: ArrayLike, axes: str) -> NDArray[np.float64]:
    array = np.asarray(differences, dtype=np.float64)
    if array.ndim != len(axes.split()) or 0 in array.shape:
        raise ValueError(f"differences must be ({axes.replace(' ', ', ')}) and not empty; got shape {array.shape}")
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {array.size} differences are NaN or infinite: every item needs a score from every seed of both "
            "arms. Rerun the missing cells or restrict both arms to the items they share"
        )
    return array


def _counts(rng: np.random.Generator, n_resamples: int, n: int) -> NDArray[np.float64]:
    """How often each of `n` units is drawn in each resample ``(resample, unit)``."""
    draws = rng.integers(n, size=(n_resamples, n)) + n * np.arange(n_resamples)[:, None]
    return np.bincount(draws.ravel(), minlength=n_resamples * n).reshape(n_resamples, n).astype(np.float64)


def _mean_squares(differences: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean squares of seeds, items and rest ``(3, arm)`` of ``(arm, seed, item)``, and their degrees of freedom.

    What a single seed or item leaves without degrees of freedom is 0; the other axis is then a plain sample variance.
    """
    _, seeds, items = differences.shape
    mean = differences.mean(axis=(1, 2), keepdims=True)
    rows, columns = differences.mean(axis=2, keepdims=True), differences.mean(axis=1, keepdims=True)
    squares = np.stack(
        [
            items * ((rows - mean) ** 2).sum(axis=(1, 2)),
            seeds * ((columns - mean) ** 2).sum(axis=(1, 2)),
            ((differences - rows - columns + mean) ** 2).sum(axis=(1, 2)),
        ]
    )
    df = np.array([seeds - 1.0, items - 1.0, (seeds - 1.0) * (items - 1.0)])
    return squares / np.maximum(df, 1)[:, None], df


def _total(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Variance of the mean times seeds · items, with no component below 0."""
    return np.maximum(squares[0] + squares[1] - squares[2], np.maximum(squares[0], squares[1]))


def _rescaling(differences: NDArray[np.float64], deviations: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Factors ``(arm, resample)`` from the bootstrap's own spread to draws of the standard error."""
    squares, df = _mean_squares(differences)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2,)))
    draws = np.stack([d / rng.chisquare(d, deviations.shape[1]) if d else np.zeros(deviations.shape[1]) for d in df])
    total = _total(squares[:, :, None] * draws[:, None, :])
    spread = deviations.std(axis=1, keepdims=True)
    errors = np.sqrt(total / (differences.shape[1] * differences.shape[2]))
    return np.divide(errors, spread, out=np.ones_like(errors), where=spread > 0)


class _Bootstrap:
    """Resampled deviations of all arms ``(arm, seed, item)``, their interval at any level, and the p that inverts it."""

    def __init__(self, differences: NDArray[np.float64], n_resamples: int, seed: int, method: Method):
        self.estimates = differences.mean(axis=(1, 2))
        deviations = resampled_means(differences, n_resamples, seed) - self.estimates[:, None]
        if method == "basic":
            deviations = -deviations
        if method == "calibrated" and differences.shape[1] > 1:
            deviations = deviations * _rescaling(differences, deviations, seed)
        self.deviations = np.sort(deviations, axis=1)

    def bounds(self, alpha: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Low and high of every arm at confidence 1 − `alpha`, one alpha for each arm."""
        return self.estimates + self._quantiles(alpha / 2), self.estimates + self._quantiles(1 - alpha / 2)

    def p(self) -> NDArray[np.float64]:
        """The smallest alpha at which each interval excludes 0, by bisection: wider levels include more."""
        floor, ceiling = 2 / (self.deviations.shape[1] + 1), 0.999
        inside, outside = np.full(len(self.estimates), floor), np.full(len(self.estimates), ceiling)
        always, ever = self._exclude(inside), self._exclude(outside)
        for _ in range(40):
            middle = np.sqrt(inside * outside)
            excluded = self._exclude(middle)
            inside, outside = np.where(excluded, inside, middle), np.where(excluded, middle, outside)
        return np.where(always, floor, np.where(ever, outside, 1.0))

    def _exclude(self, alpha: NDArray[np.float64]) -> NDArray[np.bool_]:
        low, high = self.bounds(alpha)
        return (low > 0) | (high < 0)

    def _quantiles(self, share: NDArray[np.float64]) -> NDArray[np.float64]:
        """One quantile of each arm's sorted deviations, linear between order statistics as in numpy."""
        position = share * (self.deviations.shape[1] - 1)
        below = np.floor(position).astype(int)
        above = np.minimum(below + 1, self.deviations.shape[1] - 1)
        arms = np.arange(len(self.estimates))
        start, stop = self.deviations[arms, below], self.deviations[arms, above]
        return start + (position - below) * (stop - start)
