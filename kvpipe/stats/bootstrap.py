"""Crossed bootstrap over seeds × items, and corrections of p-values: they stand beside the primary method (`dunnett`).

Everything works on ``differences``, an array ``(seed, item)`` of one metric, arm minus reference, for the same items
and seeds. Both axes are samples: a new training run and a new test item would both have come out differently, so both
are resampled (crossed, or "pigeonhole", bootstrap: Owen 2007, doi:10.1214/07-AOAS122).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLE_BLOCK = 1000
"""Resamples drawn at a time: bounds memory at RESAMPLE_BLOCK · (items + contrasts · seeds) numbers."""


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval, the mean difference, and the p-value that inverts the interval."""

    low: float
    high: float
    estimate: float
    p: float


def crossed_bootstrap(
    differences: ArrayLike, n_resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Interval and p-value of the mean of `differences` ``(seed, item)``, seeds and items resampled independently.

    The resampled deviations are each rescaled to a draw of the variance of the mean under the crossed random-effects
    model: every mean square times ``df / χ²(df)``, its fiducial distribution (a generalised confidence interval,
    Weerahandi 1993). As Student's t does for the normal, it pays for variances known from few seeds. With one seed there
    is nothing to calibrate on: it is the percentile interval, and covers the items only, not the seeds.

    By simulation (50 and 300 items, normal and skewed) the 95% interval covers 94–97%
    at 10 seeds whatever the seeds' variance, and 94–97% at 3 and 5 seeds where that variance counts; where it is
    negligible beside the items', 3 and 5 seeds cost width (97–99%). A single seed covers 93–95% if seeds do not differ,
    and as little as 10% if they do.

    p is the smallest 1 − confidence at which the interval excludes 0, so p < 0.05 exactly when the 95% interval does;
    it cannot go below ``2 / (n_resamples + 1)``.

    Raises `ValueError` for NaN or infinite entries, saying how many, and for anything that is not ``(seed, item)``.
    """
    differences = np.asarray(differences, dtype=np.float64)
    if differences.ndim != 2:
        raise ValueError(f"differences must be (seed, item); got {differences.ndim} axes, shape {differences.shape}")
    bootstrap = Bootstrap(differences[None], n_resamples, seed)
    low, high = bootstrap.interval(confidence)
    return Interval(float(low[0]), float(high[0]), float(bootstrap.estimates[0]), float(bootstrap.p()[0]))


class Bootstrap:
    """`crossed_bootstrap` of many contrasts ``(contrast, seed, item)`` on the same resamples: intervals at any confidence,
    and the p that inverts them."""

    def __init__(self, differences: ArrayLike, n_resamples: int = 1000, seed: int = 0):
        differences = _checked(differences)
        if n_resamples < 1:
            raise ValueError(f"need n_resamples >= 1; got {n_resamples}")
        self.estimates = differences.mean(axis=(1, 2))
        deviations = resampled_means(differences, n_resamples, seed) - self.estimates[:, None]
        if differences.shape[1] > 1:
            deviations = deviations * _rescaling(differences, deviations, seed)
        self.deviations = np.sort(deviations, axis=1)

    def interval(self, confidence: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Low and high of every contrast, quantiles linear between order statistics."""
        if not 0 < confidence < 1:
            raise ValueError(f"need 0 < confidence < 1; got {confidence}")
        tail = (1 - confidence) / 2
        low, high = np.quantile(self.deviations, [tail, 1 - tail], axis=1)
        return self.estimates + low, self.estimates + high

    def p(self) -> NDArray[np.float64]:
        """The smallest 1 − confidence at which each interval excludes 0."""
        last = self.deviations.shape[1] - 1
        shares = []
        for estimate, deviations in zip(self.estimates, self.deviations, strict=True):
            # where 0 lies among the deviations; equal ones have the same quantile
            low = np.searchsorted(deviations, -estimate)
            high = np.searchsorted(deviations, -estimate, side="right") - 1
            if low > high:
                low = high = np.interp(-estimate, deviations, np.arange(last + 1))
            shares.append(2 * min(high, last - low) / max(last, 1))
        return np.clip(shares, 2 / (last + 2), 1)


def resampled_means(differences: NDArray[np.float64], n_resamples: int, seed: int = 0) -> NDArray[np.float64]:
    """Means ``(contrast, resample)`` of `differences` ``(contrast, seed, item)`` under crossed resampling, the same for
    all contrasts.

    A resample is a vector of counts for the seeds and one for the items; its mean is ``cₛᵀ D cᵢ / (seeds · items)``,
    a matrix product over all contrasts.
    """
    contrasts, seeds, items = differences.shape
    seed_rng, item_rng = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2))
    columns = differences.reshape(contrasts * seeds, items).T
    means = np.empty((contrasts, n_resamples))
    for start in range(0, n_resamples, RESAMPLE_BLOCK):
        size = min(RESAMPLE_BLOCK, n_resamples - start)
        over_items = (_counts(item_rng, size, items) @ columns).reshape(size, contrasts, seeds)
        means[:, start : start + size] = np.einsum("rcs,rs->cr", over_items, _counts(seed_rng, size, seeds))
    return means / (seeds * items)


def _counts(rng: np.random.Generator, n_resamples: int, n: int) -> NDArray[np.float64]:
    """How often each of `n` units is drawn in each resample ``(resample, unit)``."""
    draws = rng.integers(n, size=(n_resamples, n)) + n * np.arange(n_resamples)[:, None]
    return np.bincount(draws.ravel(), minlength=n_resamples * n).reshape(n_resamples, n).astype(np.float64)


def mean_squares(differences: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean squares of seeds, items and rest ``(3, contrast)`` of ``(contrast, seed, item)``, and their degrees of freedom
    ``(3,)``.

    Two-way layout without replication, ``d = μ + seed + item + seed×item``. What a single seed or item leaves without
    degrees of freedom is 0; the other axis is then a plain sample variance.
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


def item_variance(parts: list[NDArray[np.float64]]) -> float:
    """Variance that the choice of the items adds to the mean of the parts' means; each part ``(seed, item)``.

    Tasks are strata: they are what they are, and their items are drawn. What varies with the seeds too is no part of it.
    """
    total = 0.0
    for part in parts:
        squares, _ = mean_squares(part[None])
        total += max(float(squares[1, 0] - squares[2, 0]), 0.0) / part.size
    return total / len(parts) ** 2


def _rescaling(differences: NDArray[np.float64], deviations: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Factors ``(contrast, resample)`` from the bootstrap's own spread to draws of the standard error."""
    squares, df = mean_squares(differences)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2,)))
    draws = np.stack([d / rng.chisquare(d, deviations.shape[1]) if d else np.zeros(deviations.shape[1]) for d in df])
    seeds, items, rest = squares[:, :, None] * draws[:, None, :]
    total = np.maximum(seeds + items - rest, np.maximum(seeds, items))  # no component below 0
    spread = deviations.std(axis=1, keepdims=True)
    errors = np.sqrt(total / (differences.shape[1] * differences.shape[2]))
    return np.divide(errors, spread, out=np.ones_like(errors), where=spread > 0)


def _checked(differences: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(differences, dtype=np.float64)
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"differences must be (contrast, seed, item) and not empty; got shape {array.shape}")
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {array.size} differences are NaN or infinite: every item needs a score from every seed of both arms"
        )
    return array


def adjust(p_values: ArrayLike, method: Literal["bonferroni", "holm"]) -> NDArray[np.float64]:
    """p-values corrected for the size of their family; NaN stays NaN and does not count in it."""
    # by hand: statsmodels' multipletests collects garbage in every call, which costs the step ten seconds
    p = np.array(p_values, dtype=np.float64)
    wrong = p[(p < 0) | (p > 1)]
    if wrong.size:
        raise ValueError(f"p-values must be between 0 and 1; got {wrong.tolist()}")
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    left = np.arange(len(order), 0, -1) if method == "holm" else np.full(len(order), len(order))
    p[order] = np.minimum(np.maximum.accumulate(p[order] * left), 1)
    return p


def effect_size(differences: ArrayLike) -> float:
    """Cohen's d_z of the items: mean over items of the seed-averaged difference ``(seed, item)``, over its standard
    deviation (ddof 1). It holds no variance of the seeds.

    0 when all differences are 0, ±inf when they are all equal to something else, NaN for a single item.
    """
    items = np.asarray(differences, dtype=np.float64).mean(axis=0)
    if items.size < 2:
        return float("nan")
    mean, sd = items.mean(), items.std(ddof=1)
    if sd <= 1e-12 * abs(mean):
        return 0.0 if mean == 0 else float(np.copysign(np.inf, mean))
    return float(mean / sd)
