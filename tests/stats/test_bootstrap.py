"""Statistics against scipy, statsmodels, exact enumeration and simulation."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests
from validate_stats import bootstrap_coverage, simulate_items

from kvpipe.stats.bootstrap import (
    Bootstrap,
    adjust,
    crossed_bootstrap,
    effect_size,
    item_variance,
    mean_squares,
    resampled_means,
)

SEEDS, ITEMS = 3, 47


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def test_the_estimate_is_the_mean_and_lies_inside(rng):
    d = rng.normal(0.3, 1, (SEEDS, ITEMS))
    interval = crossed_bootstrap(d)
    assert interval.estimate == pytest.approx(d.mean())
    assert interval.low < interval.estimate < interval.high


def test_one_seed_is_scipys_percentile_bootstrap(rng):
    a, b = rng.exponential(size=200), rng.exponential(size=200)
    ours = crossed_bootstrap((a - b)[None], n_resamples=20_000, seed=1)
    theirs = scipy_stats.bootstrap(
        (a, b), lambda x, y, axis: (x - y).mean(axis), paired=True, n_resamples=20_000, method="percentile", rng=rng
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.02 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.02 * width)


def test_one_item_stretches_scipys_bootstrap_of_the_seeds_to_students_t(rng):
    d = rng.exponential(size=60)
    theirs = scipy_stats.bootstrap((d,), np.mean, n_resamples=20_000, method="percentile", rng=rng).confidence_interval
    calibrated = crossed_bootstrap(d[:, None], n_resamples=20_000)
    stretch = scipy_stats.t.ppf(0.975, 59) / scipy_stats.norm.ppf(0.975) * np.sqrt(60 / 59)
    assert calibrated.high - calibrated.low == pytest.approx(stretch * (theirs.high - theirs.low), rel=0.02)


def test_many_contrasts_share_the_resamples_and_equal_one_by_one(rng):
    d = rng.normal(size=(4, SEEDS, ITEMS))
    together = Bootstrap(d, n_resamples=1500, seed=3)
    alone = [crossed_bootstrap(one, n_resamples=1500, seed=3) for one in d]
    np.testing.assert_allclose(together.interval(0.95), [[i.low for i in alone], [i.high for i in alone]])
    np.testing.assert_allclose(together.p(), [i.p for i in alone])
    assert crossed_bootstrap(d[0], seed=1) != crossed_bootstrap(d[0], seed=2)


def test_one_bootstrap_is_read_at_any_confidence(rng):
    d = rng.normal(size=(SEEDS, ITEMS))
    one = Bootstrap(d[None])
    for confidence in (0.5, 0.95, 0.995):
        found = crossed_bootstrap(d, confidence=confidence)
        assert [float(x[0]) for x in one.interval(confidence)] == [found.low, found.high]
    widths = [np.ptp(one.interval(c)) for c in (0.5, 0.95, 0.995)]
    assert widths == sorted(widths) and len(set(widths)) == 3


def test_mean_squares_are_statsmodels(rng):
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    d = simulate_items(rng, 1, 5, 9, 1.0)[0]
    table = pd.DataFrame({"d": d.ravel(), "s": np.repeat(range(5), 9), "i": np.tile(range(9), 5)})
    squares = anova_lm(ols("d ~ C(s) + C(i)", table).fit())["mean_sq"]
    found, df = mean_squares(d[None])
    np.testing.assert_allclose(found[:, 0], squares[["C(s)", "C(i)", "Residual"]])
    assert df.tolist() == [4, 8, 32]


def test_item_variance_is_what_the_items_add(rng):
    """Two tasks of unlike size: each counts a half, their own difference is no spread, and the seeds are left out."""
    sds, sizes = (0.5, 1.5), (31, 83)
    truth = sum((sd**2 / n) / 4 for sd, n in zip(sds, sizes, strict=True))
    found = []
    for _ in range(1500):
        parts = [
            hard + rng.normal(0, 3, (5, 1)) + rng.normal(0, sd, (1, n)) + rng.normal(0, 0.3, (5, n))
            for hard, sd, n in zip((0.0, 7.0), sds, sizes, strict=True)
        ]
        found.append(item_variance(parts))
    assert np.mean(found) == pytest.approx(truth, rel=0.03)
    assert item_variance([np.ones((5, 9)), np.zeros((5, 1))]) == 0


def test_resampled_means_have_the_exact_distribution():
    """All 2² × 3³ crossed resamples of a 2 × 3 table, enumerated."""
    d = np.array([[1.0, 5.0, -2.0], [0.5, 3.0, 9.0]])
    every = [d[np.ix_(s, i)].mean() for s in product(range(2), repeat=2) for i in product(range(3), repeat=3)]
    drawn = resampled_means(d[None], 40_000)[0]
    assert set(np.round(drawn, 9)) <= set(np.round(every, 9))
    grid = np.linspace(0.05, 0.95, 7)
    np.testing.assert_allclose(drawn.mean(), np.mean(every), atol=0.03)
    np.testing.assert_allclose(drawn.std(), np.std(every), rtol=0.02)
    shares = [(drawn <= np.quantile(every, q) + 1e-9).mean() for q in grid]
    exact = [(np.array(every) <= np.quantile(every, q) + 1e-9).mean() for q in grid]
    np.testing.assert_allclose(shares, exact, atol=0.01)


def test_laws_under_shift_scale_sign_and_order(rng):
    d = rng.normal(0.1, 1, (SEEDS, ITEMS))
    base = crossed_bootstrap(d, n_resamples=4000)
    scaled = crossed_bootstrap(7 * d, n_resamples=4000)
    assert (scaled.low, scaled.high, scaled.p) == pytest.approx((7 * base.low, 7 * base.high, base.p))
    shifted = crossed_bootstrap(d + 2, n_resamples=4000)
    assert (shifted.low, shifted.high) == pytest.approx((base.low + 2, base.high + 2))
    flipped = crossed_bootstrap(-d, n_resamples=4000)
    assert (-flipped.high, -flipped.low, flipped.p) == pytest.approx((base.low, base.high, base.p), rel=1e-6)
    mixed = crossed_bootstrap(d[[2, 0, 1]][:, rng.permutation(ITEMS)], n_resamples=4000)
    assert mixed.high - mixed.low == pytest.approx(base.high - base.low, rel=0.1)


@pytest.mark.parametrize("seeds", [1, 3, 10])
def test_p_inverts_the_interval(rng, seeds):
    for shift in np.linspace(-0.5, 0.5, 11):
        d = rng.normal(shift, 1, (seeds, ITEMS))
        p = crossed_bootstrap(d, n_resamples=500).p
        assert 2 / 501 <= p <= 1
        if 2 / 501 < p < 0.99:
            inside = crossed_bootstrap(d, n_resamples=500, confidence=1 - p * 0.98)
            outside = crossed_bootstrap(d, n_resamples=500, confidence=1 - p * 1.02)
            assert inside.low <= 0 <= inside.high
            assert outside.low > 0 or outside.high < 0


def test_without_variance_the_interval_is_a_point():
    assert crossed_bootstrap(np.zeros((SEEDS, ITEMS))).p == 1
    interval = crossed_bootstrap(np.full((SEEDS, ITEMS), 0.5), n_resamples=999)
    assert (interval.low, interval.high, interval.p) == (0.5, 0.5, 2 / 1000)


def test_bad_differences_are_counted_and_named(rng):
    d = rng.normal(size=(SEEDS, ITEMS))
    d[1, 4], d[2, 9], d[0, 0] = np.nan, np.nan, np.inf
    with pytest.raises(ValueError, match="3 of 141 differences are NaN"):
        crossed_bootstrap(d)
    with pytest.raises(ValueError, match=r"\(seed, item\); got 1 axes"):
        crossed_bootstrap(d[0])
    with pytest.raises(ValueError, match="not empty"):
        crossed_bootstrap(np.zeros((SEEDS, 0)))
    with pytest.raises(ValueError, match="0 < confidence < 1"):
        crossed_bootstrap(np.zeros((SEEDS, ITEMS)), confidence=95.0)


def corrected(p, method):
    """From the definitions: n · p; and Holm's, the largest of what all that are no larger have been multiplied by."""
    if method == "bonferroni":
        return [min(1.0, len(p) * x) for x in p]
    ranked = sorted(p)
    steps = [(len(p) - rank) * x for rank, x in enumerate(ranked)]
    return [min(1.0, max(step for step, other in zip(steps, ranked, strict=True) if other <= x)) for x in p]


@pytest.mark.parametrize("method", ["bonferroni", "holm"])
def test_corrections_are_their_definitions_and_statsmodels(rng, method):
    for size in (1, 2, 13):
        p = rng.uniform(size=size) ** 3
        p[: size // 3] = p[0]  # ties
        np.testing.assert_allclose(adjust(p, method), corrected(p.tolist(), method))
        np.testing.assert_allclose(adjust(p, method), multipletests(p, method=method)[1])


@pytest.mark.parametrize("method", ["bonferroni", "holm"])
def test_adjust_leaves_missing_contrasts_out_of_the_family(method):
    p = [0.01, np.nan, 0.04, 0.02]
    adjusted = adjust(p, method)
    assert np.isnan(adjusted[1])
    np.testing.assert_allclose(adjusted[[0, 2, 3]], corrected([0.01, 0.04, 0.02], method))
    assert adjust([np.nan], method).shape == (1,) and adjust([], method).shape == (0,)
    with pytest.raises(ValueError, match=r"between 0 and 1; got \[1.2\]"):
        adjust([0.1, 1.2], method)


def test_effect_size_is_cohens_dz_over_items(rng):
    d = rng.normal(0.4, 1, (SEEDS, ITEMS))
    items = d.mean(0)
    t = scipy_stats.ttest_1samp(items, 0).statistic
    assert effect_size(d) == pytest.approx(t / np.sqrt(ITEMS))
    assert effect_size(-3 * d) == pytest.approx(-effect_size(d))
    assert effect_size(np.zeros((2, 3))) == 0 and effect_size(np.full((2, 3), -0.1)) == -np.inf
    assert np.isnan(effect_size([[0.3]]))


@pytest.mark.parametrize(
    "seeds,items,seed_sd", [(1, 300, 0.0), (3, 50, 0.5), (3, 300, 0.3), (5, 50, 0.5), (10, 50, 0.0), (10, 300, 0.1)]
)
def test_coverage_is_near_nominal(rng, seeds, items, seed_sd):
    rate = bootstrap_coverage(simulate_items(rng, 800, seeds, items, seed_sd), 500)
    assert 0.93 - 0.01 <= rate <= 0.97 + 0.01  # 93–97% and Monte Carlo error


@pytest.mark.parametrize("seeds", [3, 5])
def test_few_seeds_that_hardly_differ_cost_width_not_coverage(rng, seeds):
    assert 0.95 <= bootstrap_coverage(simulate_items(rng, 800, seeds, 50, 0.0), 500) <= 0.995


def test_one_seed_says_nothing_of_other_seeds(rng):
    assert bootstrap_coverage(simulate_items(rng, 800, 1, 300, 0.3), 500) < 0.6, "as documented"


def test_family_wise_error_is_controlled(rng):
    """Also where the seeds' variance dominates and there are three of them, which is hardest."""
    families, arms = 300, 8
    cells = simulate_items(rng, families * (arms + 1), 3, 300, 0.3).reshape(families, arms + 1, 3, 300)
    differences = (cells[:, 1:] - cells[:, :1]) / np.sqrt(2)
    p = np.array([Bootstrap(family, 1000, seed).p() for seed, family in enumerate(differences)])
    rate = {m: np.mean([(adjust(row, m) < 0.05).any() for row in p]) for m in ("bonferroni", "holm")}
    assert (p < 0.05).any(1).mean() > 0.10
    assert rate["holm"] <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / families)
    assert rate["bonferroni"] <= rate["holm"]
