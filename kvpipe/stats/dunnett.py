"""Many arms against one: Welch's comparison with Dunnett's correction. No resampling; docs/statistics.md has the formulas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

# what all contrasts share is normal, what the variances are estimated with is chi-square
_SHARED, _SHARED_WEIGHT = np.polynomial.hermite_e.hermegauss(61)
_SHARED_WEIGHT = _SHARED_WEIGHT / _SHARED_WEIGHT.sum()
_LEGENDRE, _LEGENDRE_WEIGHT = np.polynomial.legendre.leggauss(96)
_UNIFORM, _UNIFORM_WEIGHT = (_LEGENDRE + 1) / 2, _LEGENDRE_WEIGHT / 2
LARGEST_CORRELATION = 0.995


def exceedance(
    t: ArrayLike | float, count: int, df: ArrayLike | float, correlation: ArrayLike | float
) -> NDArray[np.float64]:
    """P(the largest of `count` |T| exceeds `t`), T multivariate t with equal correlations: Dunnett's two-sided tail.

    Args:
        t: any number of values, each 0 or more.
        count: contrasts; of one this is the tail of Student's t.
        df: degrees of freedom, for each t.
        correlation: of any two contrasts, 0 to `LARGEST_CORRELATION`, for each t.
    """
    t, df, correlation = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (t, df, correlation)))
    if count == 1:
        return np.asarray(2 * stats.t.sf(t, df))
    spread = np.sqrt(2 * special.gammaincinv(df[..., None] / 2, _UNIFORM) / df[..., None])  # chi-square's quantiles
    correlation = correlation[..., None, None]
    shared, own = np.sqrt(correlation) * _SHARED[:, None], np.sqrt(1 - correlation)
    reach = (t[..., None] * spread)[..., None, :]
    inside = special.ndtr((shared + reach) / own) - special.ndtr((shared - reach) / own)
    below = np.einsum("...zu,z,u->...", inside**count, _SHARED_WEIGHT, _UNIFORM_WEIGHT)
    return np.asarray(np.clip(1 - below, 0, 1))


def critical_value(alpha: float, count: int, df: float, correlation: float) -> float:
    """The t at which `exceedance` is `alpha`; NaN where `df` is."""
    if count <= 1 or not np.isfinite(df):
        return float(stats.t.ppf(1 - alpha / 2, df))
    # between the two that bound it: one contrast alone, and Bonferroni's correction
    low, high = (float(stats.t.ppf(1 - alpha / 2 / n, df)) for n in (1, count))
    return float(optimize.brentq(lambda t: exceedance(t, count, df, correlation) - alpha, 0.99 * low, 1.01 * high))


@dataclass(frozen=True)
class Comparison:
    """Contrasts of one family on the scale of the comparison, arrays ``(..., contrast)``.

    Where neither arm varies over the seeds nothing is known of other seeds: degrees of freedom, p and critical values are
    NaN, and the contrast does not count in the family.
    """

    estimate: NDArray[np.float64]
    variance: NDArray[np.float64]
    """Of the estimate, over seeds and items."""
    df: NDArray[np.float64]
    correlation: NDArray[np.float64]
    """Of any two contrasts, ``(...)``."""

    @property
    def size(self) -> int:
        """Contrasts of the family, the same for all families."""
        return int(np.isfinite(self.df).sum(-1).max(initial=0))

    @property
    def error(self) -> NDArray[np.float64]:
        """Standard error of each contrast."""
        return np.sqrt(self.variance)

    def p(self, truth: float = 0.0, family: bool = True) -> NDArray[np.float64]:
        """p-value of each contrast against a true difference, corrected for the family or alone: below `alpha` exactly
        where the interval leaves it out."""
        known = np.isfinite(self.df)
        t = np.divide(np.abs(self.estimate - truth), self.error, out=np.zeros_like(self.error), where=known)
        df = np.where(known, self.df, 1)
        p = exceedance(t, max(self.size, 1) if family else 1, df, self.correlation[..., None])
        return np.where(known, p, np.nan)

    def critical(self, alpha: float, family: bool = True) -> NDArray[np.float64]:
        """Half the width of each interval in standard errors ``(contrast,)``; of one family."""
        size = self.size if family else 1
        return np.array([critical_value(alpha, size, df, float(self.correlation)) for df in self.df])


def welch_dunnett(shared: ArrayLike, others: ArrayLike, item_variance: ArrayLike | float = 0.0) -> Comparison:
    """Each of several arms minus the one that they share, each with a variance of its own.

    Args:
        shared: cells ``(..., seed)`` of the arm that all contrasts have in common, on a scale on which they are about
            normal.
        others: cells ``(..., contrast, seed)`` of the other arms.
        item_variance: variance ``(..., contrast)`` that the choice of the items adds to each difference.

    Degrees of freedom are Welch's, of the seeds alone: with the items in them they are too many. All correlations are
    taken as one, the median of what the shared arm contributes to the variance of the seeds. A family of one is Welch's t
    test.
    """
    shared, others = np.asarray(shared, dtype=np.float64), np.asarray(others, dtype=np.float64)
    seeds = shared.shape[-1]
    estimate = others.mean(-1) - shared.mean(-1)[..., None]
    common, own = shared.var(-1, ddof=1)[..., None] / seeds, others.var(-1, ddof=1) / seeds
    varies = common + own > 1e-24 * (1 + estimate**2)  # less is rounding
    total = np.where(varies, common + own, np.nan)
    df = total**2 * (seeds - 1) / (common**2 + own**2 + (~varies))
    share = np.where(varies.any(-1, keepdims=True), common / total, 0)
    correlation = np.asarray(np.minimum(np.nanmedian(share, axis=-1), LARGEST_CORRELATION))
    return Comparison(estimate, common + own + np.asarray(item_variance, dtype=np.float64), df, correlation)


def minimum_detectable(variance: float, seeds: int, count: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """The true difference that a contrast of a family would find with probability `power`, on the scale of the comparison.

    Args:
        variance: of one cell over seeds, pooled over arms.
        seeds: of each arm.
        count: contrasts of the family.
        alpha: of the family.
        power: probability of finding it.

    By the noncentral t: the plan is of arms with equal variances, which has 2 (seeds − 1) degrees of freedom and
    correlations of one half. NaN without variance.
    """
    if not variance > 0:
        return float("nan")
    df = 2.0 * (seeds - 1)
    critical = critical_value(alpha, count, df, 0.5)
    reach = critical * np.sqrt(stats.chi2.ppf(_UNIFORM, df) / df)

    def missing(shift: float) -> float:
        found = special.ndtr(shift - reach) + special.ndtr(-shift - reach)  # noncentral t, given the variance
        return float(found @ _UNIFORM_WEIGHT) - power

    high = 2 * critical
    while missing(high) < 0:
        high *= 2
    return float(optimize.brentq(missing, 0, high) * np.sqrt(2 * variance / seeds))
