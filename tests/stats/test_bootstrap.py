"""Statistics against scipy, statsmodels, exact enumeration and simulation."""

import time
from itertools import product

import numpy as np
import pytest
from benchmarks.sim_coverage import coverage, family, family_wise_error, simulate
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests

from kvpipe.stats.bootstrap import (
    adjust,
    adjusted_interval,
    crossed_bootstrap,
    crossed_bootstrap_many,
    effect_size,
    minimum_detectable_effect,
    resampled_means,
    sign_flip_test,
    variance_of_mean,
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


@pytest.mark.parametrize("method", ["calibrated", "percentile"])
def test_one_seed_is_scipys_percentile_bootstrap(rng, method):
    a, b = rng.exponential(size=200), rng.exponential(size=200)
    ours = crossed_bootstrap((a - b)[None], n_resamples=20_000, seed=1, method=method)
    theirs = scipy_stats.bootstrap(
        (a, b), lambda x, y, axis: (x - y).mean(axis), paired=True, n_resamples=20_000, method="percentile", rng=rng
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.02 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.02 * width)


def test_one_item_percentile_resamples_the_seeds_as_scipy(rng):
    d = rng.exponential(size=60)
    ours = crossed_bootstrap(d[:, None], n_resamples=20_000, method="percentile")
    theirs = scipy_stats.bootstrap((d,), np.mean, n_resamples=20_000, method="percentile", rng=rng).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02 * (theirs.high - theirs.low))
    calibrated = crossed_bootstrap(d[:, None], n_resamples=20_000)
    stretch = scipy_stats.t.ppf(0.975, 59) / scipy_stats.norm.ppf(0.975) * np.sqrt(60 / 59)
    assert calibrated.high - calibrated.low == pytest.approx(stretch * (ours.high - ours.low), rel=0.02)


def test_basic_mirrors_percentile_about_the_estimate(rng):
    d = rng.exponential(size=(1, 40))
    plain, basic = (crossed_bootstrap(d, method=method) for method in ("percentile", "basic"))
    assert basic.low == pytest.approx(2 * d.mean() - plain.high) and basic.high == pytest.approx(
        2 * d.mean() - plain.low
    )


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


def test_many_arms_share_the_resamples_and_equal_one_by_one(rng):
    d = rng.normal(size=(4, SEEDS, ITEMS))
    together = crossed_bootstrap_many(d, n_resamples=1500, seed=3)
    assert together == [crossed_bootstrap(arm, n_resamples=1500, seed=3) for arm in d]
    assert crossed_bootstrap(d[0], seed=1) != crossed_bootstrap(d[0], seed=2)


@pytest.mark.parametrize("method", ["calibrated", "percentile", "basic"])
def test_laws_under_shift_scale_sign_and_order(rng, method):
    d = rng.normal(0.1, 1, (SEEDS, ITEMS))
    base = crossed_bootstrap(d, n_resamples=4000, method=method)
    scaled = crossed_bootstrap(7 * d, n_resamples=4000, method=method)
    assert (scaled.low, scaled.high, scaled.p) == pytest.approx((7 * base.low, 7 * base.high, base.p))
    shifted = crossed_bootstrap(d + 2, n_resamples=4000, method=method)
    assert (shifted.low, shifted.high) == pytest.approx((base.low + 2, base.high + 2))
    flipped = crossed_bootstrap(-d, n_resamples=4000, method=method)
    assert (-flipped.high, -flipped.low, flipped.p) == pytest.approx((base.low, base.high, base.p), rel=1e-6)
    mixed = crossed_bootstrap(d[[2, 0, 1]][:, rng.permutation(ITEMS)], n_resamples=4000, method=method)
    assert mixed.high - mixed.low == pytest.approx(base.high - base.low, rel=0.1)


@pytest.mark.parametrize("method", ["calibrated", "percentile", "basic"])
@pytest.mark.parametrize("seeds", [1, 3, 10])
def test_p_inverts_the_interval(rng, method, seeds):
    for shift in np.linspace(-0.5, 0.5, 11):
        d = rng.normal(shift, 1, (seeds, ITEMS))
        p = crossed_bootstrap(d, n_resamples=500, method=method).p
        assert 2 / 501 <= p <= 1
        if 2 / 501 < p < 0.99:
            inside = crossed_bootstrap(d, n_resamples=500, confidence=1 - p * 0.98, method=method)
            outside = crossed_bootstrap(d, n_resamples=500, confidence=1 - p * 1.02, method=method)
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


def test_variance_of_mean_is_unbiased_and_matches_the_one_way_cases(rng):
    seeds, items, seed_sd = 4, 30, 0.3
    data = simulate(rng, 4000, seeds, items, seed_sd)
    truth = seed_sd**2 / seeds + 0.5**2 / items + 1 / (seeds * items)
    assert np.mean([variance_of_mean(d)[0] for d in data]) == pytest.approx(truth, rel=0.04)
    row = rng.normal(size=(1, ITEMS))
    assert variance_of_mean(row) == pytest.approx((scipy_stats.sem(row[0]) ** 2, ITEMS - 1))
    assert variance_of_mean(row.T) == pytest.approx((scipy_stats.sem(row[0]) ** 2, ITEMS - 1))


def test_variance_of_mean_equals_statsmodels_mean_squares(rng):
    import pandas as pd
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    d = simulate(rng, 1, 5, 9, 1.0)[0]
    table = pd.DataFrame({"d": d.ravel(), "s": np.repeat(range(5), 9), "i": np.tile(range(9), 5)})
    squares = anova_lm(ols("d ~ C(s) + C(i)", table).fit())["mean_sq"]
    expected = (squares["C(s)"] + squares["C(i)"] - squares["Residual"]) / d.size
    assert variance_of_mean(d)[0] == pytest.approx(expected)


@pytest.mark.parametrize("method", ["bonferroni", "holm"])
def test_adjust_equals_statsmodels(rng, method):
    for size in (1, 2, 13):
        p = rng.uniform(size=size) ** 3
        p[: size // 3] = p[0]  # ties
        np.testing.assert_allclose(adjust(p, method), multipletests(p, method=method)[1])


@pytest.mark.parametrize("method", ["bonferroni", "holm"])
def test_adjust_leaves_missing_contrasts_out_of_the_family(method):
    p = [0.01, np.nan, 0.04, 0.02]
    adjusted = adjust(p, method)
    assert np.isnan(adjusted[1])
    np.testing.assert_allclose(adjusted[[0, 2, 3]], multipletests([0.01, 0.04, 0.02], method=method)[1])
    assert adjust([np.nan], method).shape == (1,) and adjust([], method).shape == (0,)
    with pytest.raises(ValueError, match=r"between 0 and 1; got \[1.2\]"):
        adjust([0.1, 1.2], method)


def test_adjusted_interval_is_the_wider_interval(rng):
    d = rng.normal(size=(SEEDS, ITEMS))
    assert adjusted_interval(d, 10, n_resamples=5000) == crossed_bootstrap(d, n_resamples=5000, confidence=0.995)
    assert adjusted_interval(d, 1) == crossed_bootstrap(d)
    with pytest.raises(ValueError, match="family_size"):
        adjusted_interval(d, 0)


def test_effect_size_is_cohens_dz_over_items(rng):
    d = rng.normal(0.4, 1, (SEEDS, ITEMS))
    items = d.mean(0)
    t = scipy_stats.ttest_1samp(items, 0).statistic
    assert effect_size(d) == pytest.approx(t / np.sqrt(ITEMS))
    assert effect_size(-3 * d) == pytest.approx(-effect_size(d))
    assert effect_size(np.zeros((2, 3))) == 0 and effect_size(np.full((2, 3), -0.1)) == -np.inf
    assert np.isnan(effect_size([[0.3]]))


def test_minimum_detectable_effect_is_found_with_the_promised_power(rng):
    seeds, items, seed_sd = 10, 100, 0.1
    truth = np.sqrt(seed_sd**2 / seeds + 0.5**2 / items + 1 / (seeds * items))
    data = simulate(rng, 400, seeds, items, seed_sd)
    effects = [minimum_detectable_effect(d) for d in data]
    assert np.mean(effects) == pytest.approx((1.96 + 0.84) * truth, rel=0.05)
    found = [interval.p < 0.05 for interval in crossed_bootstrap_many(data + np.mean(effects), 1000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.06)
    assert np.isnan(minimum_detectable_effect([[1.0]]))


def test_sign_flip_is_exact(rng):
    means = rng.normal(0.5, 1, 7)
    theirs = scipy_stats.permutation_test(
        (means,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip_test(means) == pytest.approx(theirs.pvalue)
    assert sign_flip_test([0.1, 0.2, 0.3]) == 0.25, "three seeds cannot go lower"
    assert sign_flip_test(np.zeros(4)) == 1
    for wrong in ([], np.ones(21), np.ones((2, 2))):
        with pytest.raises(ValueError, match="1 to 20 numbers"):
            sign_flip_test(wrong)
    with pytest.raises(ValueError, match="1 of 2 seed means"):
        sign_flip_test([np.nan, 1.0])


@pytest.mark.parametrize(
    "seeds,items,seed_sd", [(1, 300, 0.0), (3, 50, 0.5), (3, 300, 0.3), (5, 50, 0.5), (10, 50, 0.0), (10, 300, 0.1)]
)
def test_coverage_is_near_nominal(rng, seeds, items, seed_sd):
    rate = coverage(simulate(rng, 800, seeds, items, seed_sd), 500, "calibrated")
    assert 0.93 - 0.01 <= rate <= 0.97 + 0.01  # 93–97% and Monte Carlo error


@pytest.mark.parametrize("seeds", [3, 5])
def test_few_seeds_that_hardly_differ_cost_width_not_coverage(rng, seeds):
    assert 0.95 <= coverage(simulate(rng, 800, seeds, 50, 0.0), 500, "calibrated") <= 0.995


def test_few_seeds_of_large_variance_need_the_calibration(rng):
    data = simulate(rng, 800, 3, 300, 0.3)
    assert coverage(data, 500, "percentile") < 0.85
    assert coverage(data, 500, "calibrated") > 0.90
    alone = simulate(rng, 800, 1, 300, 0.3)
    assert coverage(alone, 500, "calibrated") < 0.6, "one seed says nothing about other seeds, as documented"


def test_family_wise_error_is_controlled(rng):
    """Also where the seeds' variance dominates and there are three of them, which is hardest."""
    rates = family_wise_error(family(rng, 300, 8, 3, 300, 0.3), 1000)
    assert rates["uncorrected"] > 0.10
    assert rates["holm"] <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 300)
    assert rates["bonferroni"] <= rates["holm"]


def test_thirteen_arms_of_ten_seeds_in_time(rng):
    d = rng.normal(size=(13, 10, 1319))
    start = time.perf_counter()
    crossed_bootstrap_many(d, n_resamples=10_000)
    assert time.perf_counter() - start < 10
