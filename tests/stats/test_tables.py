"""Tables against brute force and statsmodels; what is missing is shown, what does not fit is refused."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.multitest import multipletests
from tiny import config

from kvpipe.config import StatsConfig
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.plan import Dag
from kvpipe.stats import tables
from kvpipe.stats.bootstrap import crossed_bootstrap, effect_size, item_variance
from kvpipe.stats.dunnett import minimum_detectable, welch_dunnett
from kvpipe.stats.metrics import METRICS, area_under, tokens_to
from kvpipe.stats.scores import CELL, UNTRAINED, Scores, cell_of, stratified

SEEDS = [4, 2, 9]
MEASURED = [name for name, metric in METRICS.items() if metric.per == "item" and not metric.column]
ARMS = {
    "control": {"role": "control"},
    "exp1": {
        "base": "control",
        "role": "experiment",
        "set": {"teachers": ["alpha"], "loss": {"keys": {}, "values": {}}},
    },
    "exp3": {"base": "exp1", "role": "experiment", "set": {"layer.kind": "cka"}},
    "full": {"base": "exp1", "role": "experiment", "set": {"time.kind": "segment"}},
    "null-shuffled": {"base": "full", "role": "null", "set": {"shuffle_teacher": True}},
}
ITEMS = {"math": [f"m{i}" for i in range(7)], "code": [f"c{i}" for i in range(3)]}
CONTRACT_ARMS = ["arm", "metric", "task", "mean", "low", "high", "n_seeds", "n_items"]
CONTRACT_CONTRASTS = [
    "arm", "reference", "metric", "task", "estimate", "low", "high", "p", "p_bonferroni", "p_holm", "effect_size",
    "n_seeds", "n_items",
]  # fmt: skip


def items(rng, shift: float = 0.0) -> pd.DataFrame:
    """Scores of one cell, in an order of its own."""
    ids = [(i, task) for task, names in ITEMS.items() for i in names]
    n = len(ids)
    rows = pd.DataFrame(
        {
            "id": [i for i, _ in ids],
            "task": [task for _, task in ids],
            "nll": rng.gamma(3.0, 2.0, n) + 5 + shift,
            "nll_all": rng.gamma(3.0, 4.0, n) + 9 + shift,
            "tokens": 11 + np.arange(n) % 4,
            "tokens_all": 31 + np.arange(n) % 5,
            "bytes": 23 + np.arange(n) % 6,
            "bytes_all": 71 + np.arange(n) % 7,
            "correct": rng.random(n) < 0.5,
            "prediction": "7",
        }
    )
    return rows.sample(frac=1, random_state=rng.integers(1000)).reset_index(drop=True)


def write_cell(paths: Paths, arm: str, seed: int, rng, shift: float) -> None:
    paths.items(arm, seed).parent.mkdir(parents=True, exist_ok=True)
    items(rng, shift).to_parquet(paths.items(arm, seed), index=False)
    folder = paths.cell(arm, seed)
    folder.mkdir(parents=True)
    losses = [5.0, 4.0 + shift / 10, 3.2 + shift / 10, 3.0 + shift / 10]
    lines = [{"step": s, "tokens": 100 * s, "validation_loss": x} for s, x in zip((0, 3, 6, 10), losses, strict=True)]
    lines.insert(1, {"step": 2, "tokens": 200, "ce": 4.5})
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cost = {"steps": 10, "tokens": 1000, "train_seconds": 3.0 + seed + shift, "peak_memory_bytes": 10**8 + seed}
    (folder / "cost.json").write_text(json.dumps(cost))


@pytest.fixture
def finished(tmp_path):
    """(dag, paths): every cell with made-up scores."""
    settings = config(tmp_path, {"arms": ARMS, "seeds": SEEDS, "stats.resamples": 200})
    dag, paths = Dag(settings), Paths(tmp_path / "results")
    rng = np.random.default_rng(5)
    for number, arm in enumerate(ARMS):
        for seed in SEEDS:
            write_cell(paths, arm, seed, rng, shift=-0.5 * number)
    return dag, paths


def brute(paths: Paths, arm: str, metric: str, task: str, seed: int) -> float:
    """A metric of a cell from its definition, in plain Python."""
    if task == "all":
        return sum(brute(paths, arm, metric, one, seed) for one in ITEMS) / len(ITEMS)
    rows = [row for row in pd.read_parquet(paths.items(arm, seed)).to_dict("records") if row["task"] == task]
    tail = "_all" if metric.endswith("_all_text") else ""

    def total(name):
        return sum(float(row[name]) for row in rows)

    match metric.removesuffix("_all_text"):
        case "bits_per_byte":
            return total("nll" + tail) / total("bytes" + tail) / math.log(2)
        case "log_perplexity":
            return total("nll" + tail) / total("tokens" + tail)
        case "accuracy":
            return total("correct") / len(rows)
    raise AssertionError(metric)


def arms(scores: Scores, config, untrained: pd.DataFrame | None = None) -> pd.DataFrame:
    if untrained is not None:
        scores.add_untrained(untrained)
    return tables.arms_table(scores, scores.measures(measured=False), config)


def means(scores: Scores, arm: str, metric: str, task: str) -> np.ndarray:
    """The metric of each seed."""
    return stratified(scores.parts(arm, metric, task)).mean(1)


# ---------------------------------------------------------------- arms
def test_arms_are_ratios_of_sums_averaged_over_seeds_and_tasks(finished):
    dag, paths = finished
    table = arms(Scores(dag, paths), dag.config.stats)
    assert list(table.columns)[: len(CONTRACT_ARMS)] == CONTRACT_ARMS
    assert not table.duplicated(["arm", "metric", "task"]).any()
    for metric in MEASURED:
        for task in ("math", "code", "all"):
            for arm in ARMS:
                row = table[(table.arm == arm) & (table.metric == metric) & (table.task == task)].iloc[0]
                cells = [brute(paths, arm, metric, task, seed) for seed in SEEDS]
                assert row["mean"] == pytest.approx(np.mean(cells)), (arm, metric, task)
                assert row.low < row["mean"] < row.high
                assert (row.n_seeds, row.missing_seeds) == (3, 0)
                assert row.n_items == sum(len(v) for k, v in ITEMS.items() if task in (k, "all"))


def test_the_macro_average_weighs_tasks_not_items(finished):
    """Seven items of math and three of code: both count one half."""
    dag, paths = finished
    scores = Scores(dag, paths)
    for metric in MEASURED:
        per_task = [means(scores, "full", metric, task) for task in ITEMS]
        np.testing.assert_allclose(means(scores, "full", metric, "all"), np.mean(per_task, 0))


def test_items_are_matched_by_id_not_by_row(finished):
    """Every cell has an order of its own; a column is one item."""
    dag, paths = finished
    scores = Scores(dag, paths)
    order = pd.read_parquet(paths.items("control", SEEDS[0])).query("task == 'code'").id
    for arm in ARMS:
        for row, seed in enumerate(SEEDS):
            by_id = pd.read_parquet(paths.items(arm, seed)).set_index("id").loc[order]
            np.testing.assert_array_equal(scores.matrices[arm, "accuracy", "code"][row], by_id.correct)
            ratio = by_id.nll.sum() / by_id.tokens.sum()
            own = scores.matrices[arm, "log_perplexity", "code"][row]
            np.testing.assert_allclose((own - ratio) * by_id.tokens.mean(), by_id.nll - ratio * by_id.tokens)
            assert own.mean() == pytest.approx(ratio)


def test_items_vary_as_the_ratio_of_sums_does(finished):
    """The spread of what each item adds is that of the ratio, as a bootstrap of numerator and denominator has it."""
    rng = np.random.default_rng(3)
    bytes_ = rng.integers(20, 90, 400).astype(float)
    table = pd.DataFrame({"nll": 0.4 * bytes_ + rng.normal(0, 1, 400), "bytes": bytes_})
    values = METRICS["bits_per_byte"].measure(table)
    drawn = [table.iloc[rng.integers(400, size=400)] for _ in range(3000)]
    ratios = [d.nll.sum() / math.log(2) / d.bytes.sum() for d in drawn]
    assert values.std() / 20 == pytest.approx(np.std(ratios), rel=0.05)
    naive = table.nll / math.log(2) / table.bytes.mean()
    assert naive.std() > 5 * values.std(), "as long items are longer, not worse"


def test_one_arm_over_its_seeds(finished):
    dag, paths = finished
    table = tables.arm_table(dag, paths, "exp3")
    assert list(zip(table.seed, table.task, strict=True)) == [(s, t) for s in SEEDS for t in ("code", "math", "all")]
    for _, row in table.iterrows():
        for metric in MEASURED:
            assert row[metric] == pytest.approx(brute(paths, "exp3", metric, row.task, row.seed))
        assert row.final_validation_loss == pytest.approx(3.0 - 0.1)
        assert (row.steps, row.tokens) == (10, 1000)


def test_one_arm_names_the_cell_that_is_missing(finished):
    dag, paths = finished
    paths.items("exp3", SEEDS[1]).unlink()
    with pytest.raises(FileNotFoundError, match=str(paths.items("exp3", SEEDS[1]))):
        tables.arm_table(dag, paths, "exp3")


def test_the_untrained_student_is_a_row_of_every_item_metric(finished):
    dag, paths = finished
    base = items(np.random.default_rng(8))
    table = arms(Scores(dag, paths), dag.config.stats, base)
    own = table[table.arm == "untrained"].set_index(["metric", "task"])
    assert len(own) == len(MEASURED) * 3
    per_task = [
        float(base[base.task == t].nll.sum() / base[base.task == t].bytes.sum() / math.log(2)) for t in ("code", "math")
    ]
    for task, expected in zip(("code", "math", "all"), (*per_task, sum(per_task) / 2), strict=True):
        assert own.loc["bits_per_byte", task]["mean"] == pytest.approx(expected)
    assert set(own.n_seeds) == {1}


# ---------------------------------------------------------------- learning curves
def curve(*points):
    return pd.DataFrame(points, columns=["tokens", "validation_loss"])


def test_tokens_to_interpolates_between_evaluations():
    falling = curve((0, 5.0), (300, 4.0), (600, 3.2), (1000, 3.0))
    assert tokens_to(falling, 4.5) == pytest.approx(150)
    assert tokens_to(falling, 3.6) == pytest.approx(450)
    assert tokens_to(falling, 3.2) == pytest.approx(600)
    assert tokens_to(falling, 6.0) == 0
    assert math.isnan(tokens_to(falling, 2.9))
    for target in np.linspace(3.0, 5.0, 23):
        expected = np.interp(-target, -falling.validation_loss, falling.tokens)
        assert tokens_to(falling, target) == pytest.approx(expected)
    bumpy = curve((0, 5.0), (100, 3.0), (200, 4.0), (300, 2.0))
    assert tokens_to(bumpy, 3.5) == pytest.approx(75), "the first time counts"


def test_area_is_the_mean_loss_over_tokens():
    assert area_under(curve((100, 3.0), (300, 3.0), (1000, 3.0))) == pytest.approx(3.0)
    assert area_under(curve((0, 4.0), (100, 2.0), (400, 2.0))) == pytest.approx((300 + 600) / 400)


def test_tokens_until_controls_final_loss(finished):
    dag, paths = finished
    scores = Scores(dag, paths)
    for number, arm in enumerate(ARMS):
        found = stratified(scores.parts(arm, "tokens_to_control", "all"))
        # losses 3.2 − s and 3.0 − s at 600 and 1000 tokens, where control ends at 3.0
        shift = 0.05 * number
        losses = [5.0, 4.0 - shift, 3.2 - shift, 3.0 - shift]
        expected = np.interp(-3.0, -np.array(losses), [0, 300, 600, 1000])
        np.testing.assert_allclose(found, np.full((3, 1), expected))
    assert means(scores, "control", "tokens_to_control", "all")[0] == 1000


# ---------------------------------------------------------------- contrasts
def contrasts(finished) -> tuple[pd.DataFrame, tables.Scores]:
    dag, paths = finished
    scores = Scores(dag, paths)
    measures = [(m, t) for m in MEASURED for t in ("math", "code", "all")]
    return tables.contrasts_table(tables.families(dag.config), measures, scores.parts, dag.config.stats), scores


def test_families_are_every_arm_against_control_and_components_against_exp1(finished):
    table, _ = contrasts(finished)
    assert list(table.columns)[: len(CONTRACT_CONTRASTS)] == CONTRACT_CONTRASTS
    expected = {(arm, "control") for arm in list(ARMS)[1:]} | {("exp3", "exp1"), ("full", "exp1")}
    for _, block in table.groupby(["metric", "task"]):
        assert set(zip(block.arm, block.reference, strict=True)) == expected and len(block) == len(expected)
        for name, family in block.groupby("family"):
            assert set(family.family_size) == {len(family)}
            assert len(set(family.reference)) == 1, name  # one question


EVERY_ROLE = {
    "control": {"role": "control"},
    "exp1": {
        "base": "control",
        "role": "experiment",
        "set": {"teachers": ["alpha"], "loss": {"keys": {}, "values": {}}},
    },
    "exp2": {"base": "exp1", "role": "experiment"},
    "null": {"base": "exp2", "role": "null"},
    "mine": {"base": "exp1"},
    "kd": {"base": "exp1", "role": "baseline"},
    "exp3": {"base": "exp2", "role": "experiment"},
    "other": {"base": "exp1", "role": "baseline"},
    "longer": {"base": "control", "set": {"step_factor": 2}},
    "wider": {"base": "kd"},
    "alone": {"role": "ablation"},
}


@pytest.mark.parametrize("headline", [None, "exp2"])
def test_a_family_is_one_role_with_one_reference(tmp_path, headline):
    stats = {"stats.headline": headline, "stats.contrasts": [["exp3", "exp1"], ["mine", "kd"], ["exp2", "exp1"]]}
    found = tables.families(config(tmp_path, {"arms": EVERY_ROLE, **stats}))
    first = headline or "exp3"
    assert found == {
        "experiments against control": [(arm, "control") for arm in ("exp1", "exp2", "exp3")],
        "nulls against control": [("null", "control")],
        "baselines against control": [("kd", "control"), ("other", "control")],
        "against exp1": [("exp2", "exp1"), ("exp3", "exp1")],
        "against exp2": [("exp3", "exp2")],
        "ablations of exp1": [("mine", "exp1")],
        "ablations against control": [("longer", "control")],
        "ablations of kd": [("wider", "kd"), ("mine", "kd")],
        f"{first} against baselines": [(first, "kd"), (first, "other")],
    }


def test_other_names_give_the_same_numbers(finished, tmp_path):
    """What an arm is called plays no part: only its role, its base and `stats`."""
    dag, paths = finished
    tables.write_stats(dag, paths, None)
    names = {old: f"arm-{i}" for i, old in enumerate(sorted(ARMS, reverse=True))}
    arms = {names[a]: {**entry, "base": names.get(entry.get("base"))} for a, entry in ARMS.items()}
    other = Dag(config(tmp_path / "other", {"arms": arms, "seeds": SEEDS, "stats.resamples": 200}))
    root = Paths(tmp_path / "renamed")
    for old, new in names.items():
        for seed in SEEDS:
            for before, after in ((paths.items, root.items), (paths.cell, root.cell)):
                after(new, seed).parent.mkdir(parents=True, exist_ok=True)
                before(old, seed).rename(after(new, seed))
    tables.write_stats(other, root, None)
    back = {new: old for old, new in names.items()}
    for before, after in ((paths.stats, root.stats), (paths.costs, root.costs)):
        for name in ("arms.csv", "contrasts.csv"):
            text = (after / name).read_text()
            for new, old in back.items():
                text = text.replace(new, old)
            assert text == (before / name).read_text()


def test_estimates_are_differences_of_the_arms_means(finished):
    table, _ = contrasts(finished)
    _, paths = finished
    for _, row in table.iterrows():
        cells = [
            brute(paths, row.arm, row.metric, row.task, seed) - brute(paths, row.reference, row.metric, row.task, seed)
            for seed in SEEDS
        ]
        assert row.estimate == pytest.approx(np.mean(cells), abs=1e-12), (row.arm, row.metric, row.task)


def test_the_columns_of_the_bootstrap_are_the_bootstraps_and_corrections_statsmodels(finished):
    table, scores = contrasts(finished)
    stats = finished[0].config.stats
    for (metric, task, _), family in table[table.task != "math"].groupby(["metric", "task", "family"]):
        most = METRICS[metric].largest
        for _, row in family.iterrows():
            sides = (stratified(scores.parts(arm, metric, task)) for arm in (row.arm, row.reference))
            difference = np.subtract(*sides)
            plain, wide = (
                crossed_bootstrap(difference, stats.resamples, confidence, stats.seed)
                for confidence in (0.95, 1 - 0.05 / len(family))
            )
            assert (row.low, row.high, row.p) == pytest.approx((max(plain.low, -most), min(plain.high, most), plain.p))
            assert (row.low_corrected, row.high_corrected) == pytest.approx(
                (max(wide.low, -most), min(wide.high, most))
            )
            assert row.low_corrected <= row.low <= row.high <= row.high_corrected
            assert row.effect_size == pytest.approx(effect_size(difference))
        for name in ("bonferroni", "holm"):
            np.testing.assert_allclose(family[f"p_{name}"], multipletests(family.p, method=name)[1])


def test_the_primary_columns_are_welch_dunnett_on_the_metrics_scale(finished):
    """Every formula of docs/statistics.md, from the cells."""
    table, scores = contrasts(finished)
    for (name, task, _), family in table.groupby(["metric", "task", "family"]):
        metric, count = METRICS[name], len(family)
        reference = family.reference.iloc[0]
        cells = {arm: means(scores, arm, name, task) for arm in ARMS}
        scale = {"log": np.log, "arcsine": lambda x: np.arcsin(np.sqrt(x)), "logged": lambda x: x}[metric.scale]
        slope = {"log": lambda m: m, "arcsine": lambda m: 2 * np.sqrt(m * (1 - m)), "logged": lambda m: 1.0}[
            metric.scale
        ]
        y = {arm: scale(cells[arm]) for arm in ARMS}
        m = {arm: cells[arm].mean() for arm in ARMS}

        def items(arm, f, g, reference=reference, name=name, task=task):
            sides = zip(scores.parts(arm, name, task), scores.parts(reference, name, task), strict=True)
            return item_variance([f * a - g * r for a, r in sides])

        added = [items(arm, 1 / slope(m[arm]), 1 / slope(m[reference])) for arm in family.arm]
        found = welch_dunnett(y[reference], [y[arm] for arm in family.arm], added)
        pooled = np.mean([y[arm].var(ddof=1) for arm in ARMS])
        detectable = [minimum_detectable(pooled + 3 * more / 2, 3, count) for more in added]
        assert set(family.scale) == {metric.scale}
        for i, (_, row) in enumerate(family.iterrows()):
            shift = y[row.arm].mean() - y[reference].mean()
            assert row.df == pytest.approx(found.df[i]) and row.p_welch == pytest.approx(found.p(family=False)[i])
            assert row.p_dunnett == pytest.approx(found.p()[i])
            spread = np.sqrt((y[row.arm].var(ddof=1) + y[reference].var(ddof=1)) / 2)
            assert row.effect_size_seeds == pytest.approx(shift / spread)
            raw = sum(slope(m[arm]) ** 2 * y[arm].var(ddof=1) / 3 for arm in (row.arm, reference)) + items(
                row.arm, 1.0, 1.0
            )
            for end, critical in (("", found.critical(0.05)[i]), ("_plain", found.critical(0.05, family=False)[i])):
                bounds = np.array([-1, 1]) * critical
                wanted = np.clip(row.estimate + bounds * np.sqrt(raw), -metric.largest, metric.largest)
                assert (row[f"difference_low{end}"], row[f"difference_high{end}"]) == pytest.approx(tuple(wanted))
                if metric.scale != "arcsine":
                    ratios = np.exp(shift + bounds * found.error[i])
                    assert (row[f"ratio_low{end}"], row[f"ratio_high{end}"]) == pytest.approx(tuple(ratios))
            least = detectable[i]
            if metric.scale == "arcsine":
                top = scale(m[reference])
                expected = np.sin(top + least) ** 2 - m[reference] if top + least <= np.pi / 2 else math.nan
                assert row.mde == pytest.approx(expected, nan_ok=True) and math.isnan(row.ratio)
            else:
                assert row.ratio == pytest.approx(np.exp(shift)) and row.mde_ratio == pytest.approx(np.exp(-least))
            better = (shift > 0) == (metric.scale == "arcsine")
            assert row.verdict == (("better" if better else "worse") if row.p_dunnett < 0.05 else "undecided")
            alone = row.ratio_low <= 1 <= row.ratio_high if metric.is_ratio else row.verdict == "undecided"
            assert (row.verdict == "undecided") == alone, "the interval and the verdict are one"


def test_the_headline_against_baselines_is_one_family_that_shares_its_arm(finished, tmp_path):
    """The arm that all contrasts have in common is the arm here, not the reference; only signs differ."""
    dag, paths = finished
    scores = Scores(dag, paths)
    measures, stats = [("bits_per_byte", "all")], dag.config.stats
    one = tables.contrasts_table({"a": [("full", "exp1"), ("full", "exp3")]}, measures, scores.parts, stats)
    other = tables.contrasts_table({"a": [("exp1", "full"), ("exp3", "full")]}, measures, scores.parts, stats)
    pd.testing.assert_series_equal(one.p_dunnett, other.p_dunnett)
    np.testing.assert_allclose(one.ratio, 1 / other.ratio)
    np.testing.assert_allclose(one.difference_low, -other.difference_high)


def test_seeds_that_do_not_vary_are_said(finished):
    """0% in every seed of both arms: no test, whatever the items do."""
    _, paths = finished
    for arm in ("control", "exp1"):
        for seed in SEEDS:
            rewritten(paths, arm, seed, lambda d: d.assign(correct=False))
    table, _ = contrasts(finished)
    row = table[(table.metric == "accuracy") & (table.task == "all")].set_index(["arm", "reference"])
    constant = row.loc["exp1", "control"]
    assert constant.verdict == "constant" and constant.estimate == 0
    assert constant[["p_welch", "p_dunnett", "df", "difference_low", "effect_size_seeds"]].isna().all()
    other = row.loc["exp3", "control"]
    assert (
        other.verdict != "constant" and np.isfinite(other[["p_dunnett", "difference_low", "mde"]].astype(float)).all()
    )


def test_a_difference_that_is_there_is_found_with_its_sign(finished):
    """Shifts of nll by −0.5 per arm: bits per byte fall, and an arm against itself differs by nothing."""
    _, paths = finished
    shutil.rmtree(paths.root / "evaluate")
    for arm, shift in zip(ARMS, (0.0, -2.0, -2.0, -4.0, 0.0), strict=True):
        for seed in SEEDS:
            paths.items(arm, seed).parent.mkdir(parents=True, exist_ok=True)
            items(np.random.default_rng(seed), shift).to_parquet(paths.items(arm, seed), index=False)
    table, _ = contrasts(finished)
    math_bits = table[(table.metric == "bits_per_byte") & (table.task == "math")].set_index(["arm", "reference"])
    sizes = pd.read_parquet(paths.items("control", SEEDS[0])).query("task == 'math'").bytes
    for pair, shift in ((("exp1", "control"), -2.0), (("full", "control"), -4.0), (("full", "exp1"), -2.0)):
        assert math_bits.loc[pair].estimate == pytest.approx(shift / math.log(2) / sizes.mean())
        assert math_bits.loc[pair].high_corrected < 0
        assert math_bits.loc[pair].p_holm < 0.1
        assert math_bits.loc[pair].ratio < 1
    assert math_bits.loc["null-shuffled", "control"].estimate == 0
    assert math_bits.loc["null-shuffled", "control"].p == 1


# ---------------------------------------------------------------- what is missing, what does not fit
def test_missing_cells_are_shown_and_leave_the_family_of_those_that_are_there(finished):
    dag, paths = finished
    paths.items("exp3", SEEDS[1]).unlink()
    for seed in SEEDS:
        paths.items("full", seed).unlink()
    table, scores = contrasts(finished)
    found = arms(scores, dag.config.stats)
    own = found[found.metric == "accuracy"].set_index(["arm", "task"])
    assert tuple(own.loc["exp3", "math"][["n_seeds", "missing_seeds"]]) == (2, 1)
    assert tuple(own.loc["full", "math"][["n_seeds", "missing_seeds"]]) == (0, 3)
    assert math.isnan(own.loc["full", "all"]["mean"])
    family = table[(table.metric == "accuracy") & (table.task == "all")].set_index(["arm", "reference"])
    assert len(family) == 6, "no contrast is dropped"
    sizes = family.groupby("family").family_size.unique().map(list).to_dict()  # those that could be computed
    assert sizes == {"experiments against control": [1], "nulls against control": [1]}
    for pair, seeds in ((("exp1", "control"), 3), (("exp3", "exp1"), 2), (("full", "exp1"), 0)):
        assert (family.loc[pair].n_seeds, family.loc[pair].missing_seeds) == (seeds, 3 - seeds)
        assert family.loc[pair].n_items == 10
        for column in ("p", "p_holm", "p_bonferroni", "low", "low_corrected", "p_dunnett", "difference_low"):
            assert math.isnan(family.loc[pair, column]) == (seeds < 3), column
        assert (family.loc[pair].family_size, pd.isna(family.loc[pair].family)) == (
            (1, False) if seeds == 3 else (0, True)
        )
    cells = [brute(paths, "exp3", "accuracy", "all", s) - brute(paths, "exp1", "accuracy", "all", s) for s in (4, 9)]
    assert family.loc["exp3", "exp1"].estimate == pytest.approx(np.mean(cells))


def test_one_seed_is_no_test(finished):
    """Items alone gave p 0.0004 and a verdict."""
    _, paths = finished
    for seed in SEEDS[1:]:
        paths.items("exp1", seed).unlink()
    table, _ = contrasts(finished)
    one = table[(table.arm == "exp1") & (table.reference == "control")]
    assert set(one.n_seeds) == {1} and one.estimate.notna().all() and one.family.isna().all()
    assert one[["p", "p_holm", "p_bonferroni", "low", "high", "low_corrected", "high_corrected"]].isna().all(axis=None)


def test_a_metric_that_failures_leave_is_described_and_not_tested(finished):
    dag, paths = finished
    lines = (paths.cell("exp3", SEEDS[0]) / "history.jsonl").read_text().splitlines()
    worse = [line.replace('"validation_loss": ', '"validation_loss": 1') for line in lines]
    (paths.cell("exp3", SEEDS[0]) / "history.jsonl").write_text("\n".join(worse))
    tables.write_stats(dag, paths, None)
    found = pd.read_csv(paths.stats / "contrasts.csv").set_index(["metric", "arm", "reference"])
    reach = found.loc["tokens_to_control"]
    assert reach[["p", "p_holm", "low", "low_corrected"]].isna().all(axis=None) and (reach.family_size == 0).all()
    assert reach.loc[("exp1", "control")].estimate < 0
    assert tuple(reach.loc[("exp3", "control"), ["n_seeds", "missing_seeds"]]) == (2, 1)
    assert math.isnan(reach.loc[("exp3", "control")].estimate), "a mean of those that got there leaves the failure out"
    assert found.loc[("validation_area", "exp3", "control")].p_holm <= 1
    arms = pd.read_csv(paths.stats / "arms.csv").set_index(["metric", "arm"])
    assert arms.loc[("tokens_to_control", "exp3")].missing_seeds == 1


def test_bounds_stay_where_the_metric_can_be(finished):
    """Three wild seeds: the interval of an accuracy's difference reached beyond 100 points, one of nats below 0."""
    _, paths = finished
    for seed, right in zip(SEEDS, (0.0, 1.0, 1.0), strict=True):
        rewritten(
            paths, "exp1", seed, lambda d, right=right: d.assign(correct=bool(right), nll=d.nll * (0.01 + 9 * right))
        )
        rewritten(paths, "control", seed, lambda d: d.assign(correct=False))
    table, scores = contrasts(finished)
    shares = table[table.metric == "accuracy"]
    bounds = shares[["low", "high", "low_corrected", "high_corrected", "mde"]]
    assert (bounds.abs() <= 1).where(bounds.notna(), True).all(axis=None)
    row = shares[(shares.arm == "exp1") & (shares.reference == "control") & (shares.task == "all")].iloc[0]
    assert (
        row.estimate == pytest.approx(2 / 3)
        and row.high_corrected == 1
        and row.low_corrected < 0
        and math.isnan(row.mde)
    )
    assert (arms(scores, finished[0].config.stats).low >= 0).all()


# ---------------------------------------------------------------- whose scores they are
def stamped(paths: Paths, arm: str, seed: int, cell) -> None:
    table = pd.read_parquet(paths.items(arm, seed))
    table.attrs[CELL] = cell
    table.to_parquet(paths.items(arm, seed), index=False)


def test_the_scores_of_another_cell_are_refused(finished):
    dag, paths = finished
    for arm in ARMS:
        for seed in SEEDS:
            stamped(paths, arm, seed, {"arm": arm, "seed": seed})
    Scores(dag, paths)
    one, two = paths.items("exp1", SEEDS[0]), paths.items("exp3", SEEDS[0])
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(ValueError, match=rf"{one}: these are the scores of arm exp3, seed {SEEDS[0]}, not of arm exp1"):
        Scores(dag, paths)
    one.write_bytes(paths.items("exp1", SEEDS[1]).read_bytes())
    with pytest.raises(ValueError, match=rf"arm exp1, seed {SEEDS[1]}, not of arm exp1, seed {SEEDS[0]}"):
        tables.arm_table(dag, paths, "exp1")
    stamped(paths, "exp1", SEEDS[0], None)
    with pytest.raises(ValueError, match="scores of a model that is no cell"):
        Scores(dag, paths)


def test_answers_are_judged_by_one(finished):
    dag, paths = finished
    judged(paths, dag.cells, "math-verify 1")
    assert Scores(dag, paths).judges == {"math": "math-verify 1"}
    judged(paths, [("exp1", SEEDS[0])], "math-verify 2")
    with pytest.raises(ValueError, match="answers of math were judged by math-verify 1 and by math-verify 2"):
        Scores(dag, paths)


def judged(paths: Paths, cells, judge: str) -> None:
    for cell in cells:
        table = pd.read_parquet(paths.items(*cell))
        table.attrs["judges"] = {"math": judge}
        table.to_parquet(paths.items(*cell), index=False)


def test_the_cost_of_another_cell_is_refused(finished):
    dag, paths = finished
    path = paths.cell("exp1", SEEDS[0]) / "cost.json"
    own = json.loads(path.read_text())
    path.write_text(json.dumps(own | {"provenance": {"arm": "exp1", "seed": SEEDS[0]}}))
    assert cell_of(path.parent / "model") == {"arm": "exp1", "seed": SEEDS[0]}
    tables.write_stats(dag, paths, None)
    path.write_text(json.dumps(own | {"provenance": {"arm": "exp1", "seed": SEEDS[1]}}))
    with pytest.raises(ValueError, match=rf"{path}: this is the cell of arm exp1, seed {SEEDS[1]}"):
        tables.write_stats(dag, paths, None)
    path.write_text("")
    with pytest.raises(ValueError, match=rf"{path} is damaged .*: train the cell again"):
        tables.write_stats(dag, paths, None)


def rewritten(paths: Paths, arm: str, seed: int, change) -> None:
    path = paths.items(arm, seed)
    change(pd.read_parquet(path)).to_parquet(path, index=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d[d.id != "m3"],
        lambda d: d.assign(id=d.id.replace("m3", "m33")),
        lambda d: d[d.task != "code"],
        lambda d: pd.concat([d, d[d.id == "c1"].assign(id="x0", task="other")]),
        lambda d: pd.concat([d, d[d.id == "c1"]]),
        lambda d: d.assign(task=d.task.where(d.id != "c1", "math")),
    ],
    ids=["fewer", "renamed", "task gone", "task more", "twice", "other task"],
)
@pytest.mark.parametrize("arm", ["control", "exp3"])
def test_other_items_in_a_cell_are_refused(finished, arm, change):
    """A pair of scores is one of the same item, or no pair: also where the cell is the first that is read."""
    dag, paths = finished
    rewritten(paths, arm, SEEDS[1], change)
    with pytest.raises(ValueError, match=r"items differ"):
        Scores(dag, paths)


def test_a_score_that_is_not_a_number_is_no_missing_cell(finished):
    dag, paths = finished
    rewritten(paths, "exp1", SEEDS[2], lambda d: d.assign(nll=d.nll.where(d.id != "m2")))
    with pytest.raises(ValueError, match=r"exp1.*seed9.*nll.*m2"):
        Scores(dag, paths)


def test_nothing_evaluated_is_an_error_that_says_where(tmp_path):
    dag = Dag(config(tmp_path))
    with pytest.raises(FileNotFoundError, match="evaluate"):
        Scores(dag, Paths(tmp_path / "results"))


# ---------------------------------------------------------------- the step
def test_files_of_the_step_and_that_they_repeat(finished, tmp_path):
    dag, paths = finished
    base = tmp_path / "untrained.parquet"
    items(np.random.default_rng(8)).to_parquet(base, index=False)
    contents = []
    for _ in range(2):
        shutil.rmtree(paths.stats, ignore_errors=True)
        tables.write_stats(dag, paths, base)
        contents.append({p.name: p.read_bytes() for p in sorted(paths.stats.iterdir())})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"arms.csv", "contrasts.csv", "pairs.csv"}
    arms, pairs = (pd.read_csv(paths.stats / name) for name in ("arms.csv", "contrasts.csv"))
    assert list(arms.columns)[: len(CONTRACT_ARMS)] == CONTRACT_ARMS
    assert list(pairs.columns)[: len(CONTRACT_CONTRASTS)] == CONTRACT_CONTRASTS
    assert {"bits_per_byte", "log_perplexity", "accuracy", "tokens_to_control"} <= set(arms.metric) & set(pairs.metric)
    # measured time and memory differ between runs and are kept apart
    cost = pd.read_csv(paths.costs / "arms.csv").set_index(["arm", "metric"])
    assert set(cost.index.get_level_values("metric")) == {"train_seconds", "peak_memory_bytes"}
    assert cost.loc["exp1", "train_seconds"]["mean"] == pytest.approx(3.0 + np.mean(SEEDS) - 0.5)
    contrast = pd.read_csv(paths.costs / "contrasts.csv").set_index(["arm", "reference", "metric"])
    assert contrast.loc["full", "control", "train_seconds"].estimate == pytest.approx(-1.5)
    assert list(contrast.reset_index().columns)[0:3] == ["arm", "reference", "metric"]


def test_another_seed_of_the_bootstrap_moves_intervals_not_estimates(finished):
    dag, paths = finished
    scores = Scores(dag, paths)
    one, two = (arms(scores, StatsConfig(resamples=200, seed=seed)) for seed in (0, 1))
    pd.testing.assert_series_equal(one["mean"], two["mean"])
    assert (one.low != two.low).any()


# ---------------------------------------------------------------- tasks that are not scored
def test_a_task_without_scored_answers_has_no_accuracy(finished):
    """Plain text among the tasks: accuracy is that of the others, everything else counts it."""
    dag, paths = finished
    for arm in ARMS:
        for seed in SEEDS:
            table = pd.read_parquet(paths.items(arm, seed))
            table["correct"] = table["correct"].astype(object).where(table["task"] == "math", None)
            table.to_parquet(paths.items(arm, seed), index=False)
    scores = Scores(dag, paths)
    assert scores.measured["accuracy"] == ["math"] and scores.measured["bits_per_byte"] == ["code", "math"]
    untrained = pd.read_parquet(paths.items("control", SEEDS[0]))
    table = arms(scores, dag.config.stats, untrained).set_index(["arm", "metric", "task"])
    assert ("full", "accuracy", "code") not in table.index and ("full", "bits_per_byte", "code") in table.index
    for arm in ("full", UNTRAINED):
        assert table.loc[(arm, "accuracy", "all"), "mean"] == table.loc[(arm, "accuracy", "math"), "mean"]
    assert table.loc[("full", "accuracy", "all"), "n_seeds"] == 3
    one = tables.arm_table(dag, paths, "full").set_index(["seed", "task"])
    assert (one.xs("all", level="task").accuracy == one.xs("math", level="task").accuracy).all()
    assert one.xs("code", level="task").accuracy.isna().all()
    tables.write_stats(dag, paths, None)
    found = pd.read_csv(paths.stats / "contrasts.csv")
    assert set(found[found.metric == "accuracy"].task) == {"math", "all"} and found.estimate.notna().all()
