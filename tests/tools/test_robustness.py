"""What `make robustness` says of made-up tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tools.robustness import AS_SHIPPED, KEY, flip_probability, tables


def contrast(arm: str, ratio: float, error: float = 0.1, df: float = 6.0, c: float = 3.0) -> dict:
    """A row of contrasts.csv against control, with the intervals of a logarithm."""
    plain = stats.t.ppf(0.975, df)
    low, high = ratio * np.exp(-c * error), ratio * np.exp(c * error)
    verdict = "better" if high < 1 else "worse" if low > 1 else "undecided"
    row = {"arm": arm, "reference": "control", "metric": "bits_per_byte", "estimate": ratio - 1, "verdict": verdict}
    row |= {"difference_low": low - 1, "difference_high": high - 1, "df": df, "ratio": ratio, "ratio_low": low}
    return row | {"ratio_high": high, "ratio_high_plain": ratio * np.exp(plain * error)}


def one(digest: str, **ratios: float) -> tuple[pd.DataFrame, dict]:
    table = pd.DataFrame([contrast(arm, ratio) for arm, ratio in ratios.items()]).set_index(KEY)
    return table, {("control", "seed101"): digest, ("full", "seed101"): "x" + digest}


def test_a_verdict_that_differs_is_listed_with_its_probability():
    lines, same = tables({AS_SHIPPED: one("a", full=0.4, exp1=0.8), "other": one("b", full=0.45, exp1=0.7)})
    assert same
    assert any("exp1 − control" in line and "undecided | better" in line for line in lines)
    assert not any(line.startswith("| full − control, bits") for line in lines)


def test_another_sign_or_verdict_of_full_fails():
    for ratio in (1.9, 0.95):
        assert not tables({AS_SHIPPED: one("a", full=0.4, exp1=0.8), "other": one("b", full=ratio, exp1=0.8)})[1]


def test_a_setting_that_changes_no_byte_shows_it():
    same = {AS_SHIPPED: one("a", full=0.4, exp1=0.8), "none": one("a", full=0.4, exp1=0.8)}
    lines, decided = tables(same | {"other": one("b", full=0.45, exp1=0.8)})
    assert decided and [line.split("|")[2].split()[0] for line in lines[2:5]] == ["0", "0", "2"]


def test_the_same_bytes_prove_nothing():
    with pytest.raises(SystemExit, match="nothing was tried"):
        tables({AS_SHIPPED: one("a", full=0.4, exp1=0.8), "other": one("a", full=0.4, exp1=0.8)})


def test_the_probability_of_a_flip_is_that_of_simulated_runs():
    draws = np.random.default_rng(0).normal(np.log(0.8), 0.1, 200_000)
    found = np.mean(np.abs(draws) > 3.0 * 0.1)
    row = pd.Series(contrast("exp1", 0.8))
    assert flip_probability(row) == pytest.approx(found, abs=0.005)
    assert flip_probability(pd.Series(contrast("full", 0.5))) < 0.001
    points = {"ratio": np.nan, "estimate": 0.2, "difference_low": -0.1, "difference_high": 0.5, "df": 6.0}
    points["difference_high_plain"] = 0.2 + 0.1 * stats.t.ppf(0.975, 6.0)
    found = np.mean(np.random.default_rng(0).normal(0.2, 0.1, 200_000) > 0.3)
    assert flip_probability(pd.Series(points)) == pytest.approx(found, abs=0.005)
