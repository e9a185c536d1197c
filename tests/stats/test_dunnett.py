"""The primary method against scipy, Student's t, the t distribution by simulation, and its own definition."""

import numpy as np
import pytest
from scipy import stats
from validate_stats import CASES, SEEDS, linear, measured

from kvpipe.stats.dunnett import critical_value, exceedance, minimum_detectable, welch_dunnett


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def test_the_tail_of_one_contrast_is_students(rng):
    t, df = rng.uniform(0, 9, 7), rng.uniform(1, 30, 7)
    np.testing.assert_allclose(exceedance(t, 1, df, 0.5), 2 * stats.t.sf(t, df))
    assert critical_value(0.05, 1, 4.0, 0.3) == pytest.approx(stats.t.ppf(0.975, 4))


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("df", [2.3, 4.0, 16.0])
def test_the_tail_of_many_is_that_of_the_largest_of_correlated_ts(rng, correlation, df):
    count, draws = 7, 400_000
    shared, own = rng.standard_normal((draws, 1)), rng.standard_normal((draws, count))
    normal = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own
    largest = np.abs(normal / np.sqrt(rng.chisquare(df, (draws, 1)) / df)).max(1)
    t = np.quantile(largest, [0.2, 0.5, 0.8, 0.95, 0.99])
    np.testing.assert_allclose(exceedance(t, count, df, correlation), [0.8, 0.5, 0.2, 0.05, 0.01], atol=0.0025)
    assert exceedance(critical_value(0.05, count, df, correlation), count, df, correlation) == pytest.approx(0.05)


def test_dunnetts_tables():
    """Dunnett (1964), two-sided 5%: 2 and 7 comparisons, correlations of one half."""
    for count, df, expected in ((2, 5, 3.03), (2, 20, 2.38), (7, 10, 3.14), (7, 16, 2.92), (7, 30, 2.77)):
        assert critical_value(0.05, count, float(df), 0.5) == pytest.approx(expected, abs=0.012), (count, df)


@pytest.mark.parametrize("contrasts", [2, 7])
def test_equal_variances_are_scipys_dunnett(rng, contrasts):
    """With the same spread in every arm the two differ in the degrees of freedom alone: ours do not pool."""
    seeds = 40
    base = rng.standard_normal(seeds)
    base = (base - base.mean()) / base.std(ddof=1)
    shifts = np.linspace(0.1, 0.6, contrasts)
    arms = [rng.permutation(base) + shift for shift in shifts]
    found = welch_dunnett(base, arms)
    theirs = stats.dunnett(*arms, control=base, rng=rng)
    np.testing.assert_allclose(found.estimate / found.error, theirs.statistic)
    np.testing.assert_allclose(found.p(), theirs.pvalue, atol=0.01)
    assert float(found.correlation) == pytest.approx(0.5) and np.allclose(found.df, 2 * (seeds - 1))
    # with scipy's degrees of freedom the same numbers
    pooled = exceedance(np.abs(theirs.statistic), contrasts, float((contrasts + 1) * (seeds - 1)), 0.5)
    np.testing.assert_allclose(pooled, theirs.pvalue, atol=2e-3)


def test_a_family_of_one_is_welchs_t_test(rng):
    one, other = rng.normal(0, 1, 5), rng.normal(1, 3, 5)
    found, theirs = welch_dunnett(one, [other]), stats.ttest_ind(other, one, equal_var=False)
    assert (float(found.p()[0]), float(found.df[0])) == pytest.approx((theirs.pvalue, theirs.df))
    low, high = (found.estimate[0] + sign * found.critical(0.05)[0] * found.error[0] for sign in (-1, 1))
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_p_inverts_the_interval_alone_and_in_the_family(rng):
    found = welch_dunnett(rng.normal(size=4), rng.normal(0.8, 1.5, (5, 4)), rng.uniform(0, 0.1, 5))
    for family in (True, False):
        for i, p in enumerate(found.p(family=family)):
            half = [found.critical(p * factor, family)[i] * found.error[i] for factor in (0.98, 1.02)]
            assert half[1] < abs(found.estimate[i]) < half[0]
    assert (found.p() >= found.p(family=False)).all()


def test_laws_under_shift_scale_and_order(rng):
    shared, others = rng.normal(size=5), rng.normal(size=(4, 5))
    found = welch_dunnett(shared, others)
    moved = welch_dunnett(7 * shared + 2, 7 * others + 2)
    np.testing.assert_allclose(moved.estimate, 7 * found.estimate)
    for name in ("df", "correlation"):
        np.testing.assert_allclose(getattr(moved, name), getattr(found, name))
    np.testing.assert_allclose(moved.p(), found.p())
    mixed = welch_dunnett(rng.permutation(shared), others[[3, 0, 1, 2]])
    np.testing.assert_allclose(mixed.p(), found.p()[[3, 0, 1, 2]])
    families = welch_dunnett(np.stack([shared, shared + 1]), np.stack([others, others + 1]))
    np.testing.assert_allclose(families.p(), np.stack([found.p(), found.p()]))
    assert (welch_dunnett(shared, others, np.full(4, 0.5)).p() > found.p()).all(), "what the items add widens"


def test_degrees_of_freedom_lie_between_one_arm_and_both(rng):
    for _ in range(50):
        seeds = int(rng.integers(2, 9))
        found = welch_dunnett(rng.normal(size=seeds), rng.normal(size=(3, seeds)) * rng.uniform(0.01, 9, (3, 1)))
        assert (found.df >= seeds - 1 - 1e-9).all() and (found.df <= 2 * (seeds - 1) + 1e-9).all()


def test_arms_that_do_not_vary_are_no_test_and_do_not_count(rng):
    """0% everywhere: 0 / 0 is neither certainty nor doubt."""
    zero, arms = np.zeros(3), np.stack([np.zeros(3), rng.normal(1, 1, 3), np.full(3, 0.1 + 0.2)])
    found = welch_dunnett(zero, arms)
    assert np.isnan(found.p()[[0, 2]]).all() and np.isnan(found.critical(0.05)[[0, 2]]).all() and found.size == 1
    assert found.p()[1] == pytest.approx(stats.ttest_ind(arms[1], zero, equal_var=False).pvalue)
    nothing = welch_dunnett(zero, np.zeros((2, 3)))
    assert np.isnan(nothing.p()).all() and nothing.size == 0
    # one of two that varies is enough
    assert welch_dunnett(rng.normal(size=3), [zero]).df[0] == pytest.approx(2)


@pytest.mark.parametrize("seeds,count", [(3, 1), (3, 7), (5, 7), (10, 3)])
def test_the_detectable_difference_is_found_with_its_probability(rng, seeds, count):
    least = minimum_detectable(4.0, seeds, count, power=0.8)
    families = 4000
    cells = 2 * rng.standard_normal((families, count + 1, seeds))
    cells[:, 1] += least
    df = 2.0 * (seeds - 1)
    # the plan pools nothing and takes the variances as equal: exactly the noncentral t of its degrees of freedom
    t = (cells[:, 1].mean(-1) - cells[:, 0].mean(-1)) / np.sqrt((cells[:, :2].var(-1, ddof=1).sum(-1)) / seeds)
    assert (np.abs(t) > critical_value(0.05, count, df, 0.5)).mean() == pytest.approx(0.8, abs=0.025)
    nct = stats.nct.sf(critical_value(0.05, count, df, 0.5), df, least / np.sqrt(2 * 4.0 / seeds))
    assert np.isnan(nct) or nct == pytest.approx(0.8, abs=1e-3)
    assert np.isnan(minimum_detectable(0.0, seeds, count))


# ---------------------------------------------------------------- simulation; `make validate-stats` has 5,000 families
@pytest.mark.parametrize("name", ["equal spreads", "control 5 times", "one arm 5 times", "skewed (exponential)"])
def test_family_wise_error_and_coverage(name):
    found = linear(np.random.default_rng(3), CASES[name], 5, 500, 0)
    assert found["error"] <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 500)
    assert 0.93 <= found["coverage"] <= 0.995


@pytest.mark.parametrize("metric", ["bits_per_byte", "accuracy"])
def test_intervals_on_the_scale_and_of_the_difference_cover(metric):
    """The formulas of the delta method, as well as the scales themselves."""
    found = measured(np.random.default_rng(3), metric, 5, 500)
    assert set(SEEDS) >= {3, 5}
    for key, rate in found.items():
        assert 0.935 <= rate <= 0.995, (key, rate)
