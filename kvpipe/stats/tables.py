"""Scores → tables: the arm over its seeds, intervals per arm, contrasts with corrections, pairs of models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from kvpipe.config import Config, StatsConfig
from kvpipe.experiment.files import replacing
from kvpipe.experiment.paths import ARMS, CONTRASTS, PAIRS, Paths
from kvpipe.experiment.plan import Dag
from kvpipe.experiment.progress import track
from kvpipe.stats.bootstrap import Bootstrap, adjust, crossed_bootstrap, effect_size, item_variance
from kvpipe.stats.dunnett import minimum_detectable, welch_dunnett
from kvpipe.stats.metrics import METRICS, PRIMARY, Metric, area_under
from kvpipe.stats.scores import ALL, ITEM_METRICS, Parts, Scores, read_cost, read_history, read_items, stratified

Pairs = list[tuple[str, str]]
CONTRAST_COLUMNS = [
    "arm", "reference", "metric", "task", "estimate", "low", "high", "p", "p_bonferroni", "p_holm", "effect_size",
    "n_seeds", "n_items", "low_corrected", "high_corrected", "family", "family_size", "missing_seeds",
    "verdict", "scale", "df", "p_welch", "p_dunnett", "ratio", "ratio_low", "ratio_high", "ratio_low_plain",
    "ratio_high_plain", "difference_low", "difference_high", "difference_low_plain", "difference_high_plain",
    "effect_size_seeds", "mde", "mde_ratio",
]  # fmt: skip
"""`estimate` to `high_corrected` are of the plain difference and the crossed bootstrap; those after `verdict` are of the
primary method, on the scale that their names say."""
_TEXTS = {"arm", "reference", "metric", "task", "family", "verdict", "scale"}


# ---------------------------------------------------------------- one arm
def write_arm_table(dag: Dag, paths: Paths, arm: str) -> None:
    """Write `arm_table` where it belongs."""
    dag.arm(arm)
    _write(arm_table(dag, paths, arm), paths.arm_table(arm))


def _write(table: pd.DataFrame, out: Path) -> None:
    with replacing(out) as partial:
        table.to_csv(partial, index=False)


def arm_table(dag: Dag, paths: Paths, arm: str) -> pd.DataFrame:
    """One row per seed and task (and the macro average): the item metrics' means, and the cell's curve and size."""
    rows = []
    for seed in dag.config.seeds:
        items, history = read_items(paths, arm, [seed]), read_history(paths, arm, seed)
        if not len(items) or history is None:
            raise FileNotFoundError(f"{paths.items(arm, seed)} is missing: evaluate the cell first")
        cost, curve = read_cost(paths, arm, seed), history[1]
        measured = {
            task: {name: m.measure(d).mean() for name, m in ITEM_METRICS.items() if m.column in ("", *d)}
            for task, d in items.groupby("task")
        }
        # the mean over the tasks that have the metric: plain text, for one, has no accuracy
        measured[ALL] = pd.DataFrame(measured).T.mean().to_dict()
        for task, values in measured.items():
            row = {"arm": arm, "seed": seed, "model": items.model.iloc[0], "task": task}
            row |= {"n_items": len(items) if task == ALL else int((items.task == task).sum()), **values}
            row |= {"final_validation_loss": curve.validation_loss.iloc[-1], "validation_area": area_under(curve)}
            rows.append(row | {"steps": cost["steps"], "tokens": cost["tokens"]})
    return pd.DataFrame(rows)


# ---------------------------------------------------------------- every arm
def arms_table(scores: Scores, measures: Pairs, config: StatsConfig) -> pd.DataFrame:
    """`arms.csv`: mean and interval of every arm, metric and task over seeds × items."""
    rows: list[dict[str, Any]] = []
    for arm, models in scores.models.items():
        for metric, task in measures:
            if any((arm, metric, one) not in scores.matrices for one in scores.measured.get(metric, [task])):
                continue  # the untrained student has no curve
            matrix = stratified(scores.parts(arm, metric, task))
            kept = matrix[np.isfinite(matrix).all(1)]
            row = {"arm": arm, "metric": metric, "task": task, "mean": np.nan, "low": np.nan, "high": np.nan}
            if len(kept):
                row["mean"] = kept.mean()
            if kept.size > 1:  # a single number has no interval
                interval = crossed_bootstrap(kept, config.resamples, config.confidence, config.seed)
                # nothing here is below 0 and no share above 1, whatever a symmetric interval says
                row["low"], row["high"] = np.clip([interval.low, interval.high], 0, METRICS[metric].largest)
            row |= {"n_seeds": len(kept), "n_items": matrix.shape[1], "missing_seeds": len(matrix) - len(kept)}
            rows.append(row | {"models": models})
    return pd.DataFrame(rows)


# ---------------------------------------------------------------- contrasts
def families(config: Config) -> dict[str, Pairs]:
    """Question → its contrasts (arm, reference), in the order of the configuration; corrections go over a question's.

    Every experiment, null and baseline is compared with control; every experiment that is built on another one, and every
    ablation, with its base; the headline with every baseline; and what `stats.contrasts` adds. A family is all contrasts
    of one role with one reference, and those of the headline with the baselines: one alone is not corrected for any other.
    """
    roles = {name: config.arm(name).role for name in config.arms}
    control, headline = config.control, config.headline
    pairs = [(arm, control) for arm, role in roles.items() if role in ("experiment", "null", "baseline")]
    for arm, role in roles.items():
        base = config.arms[arm].base
        if base and (role == "ablation" or role == roles[base] == "experiment"):
            pairs.append((arm, base))
    pairs += [(headline, arm) for arm, role in roles.items() if headline and role == "baseline" and arm != headline]
    pairs += [(arm, reference) for arm, reference in config.stats.contrasts]
    found: dict[str, Pairs] = {}
    for arm, reference in dict.fromkeys(pairs):
        if arm == headline and roles[reference] == "baseline":
            question = f"{arm} against baselines"
        elif reference == control or roles[arm] not in ("experiment", "ablation"):
            question = f"{roles[arm]}s against {reference}"
        else:
            question = f"ablations of {reference}" if roles[arm] == "ablation" else f"against {reference}"
        found.setdefault(question, []).append((arm, reference))
    return found


def contrasts_table(
    families: dict[str, Pairs], measures: Pairs, parts: Callable[[str, str, str], Parts], config: StatsConfig
) -> pd.DataFrame:
    """`contrasts.csv`: arm minus reference with corrections over their family, of one metric and task.

    A family holds the contrasts that are tested: those of two seeds or more that have all the seeds that were planned, of
    a metric that is tested. Of every other the estimate is given, and no p, interval or family.
    """
    rows = []
    arms = dict.fromkeys(arm for pairs in families.values() for pair in pairs for arm in pair)
    for metric, task in track(measures, "contrasts", "metrics and tasks"):
        scores = {arm: parts(arm, metric, task) for arm in arms}
        for name, pairs in families.items():
            rows += _family(METRICS[metric], task, name, pairs, scores, config)
    table = pd.DataFrame(rows, columns=CONTRAST_COLUMNS)
    return table.astype({c: float for c in CONTRAST_COLUMNS if c not in _TEXTS and not c.startswith("n_")})


def _family(
    metric: Metric, task: str, name: str, pairs: Pairs, scores: dict[str, Parts], config: StatsConfig
) -> list[dict[str, Any]]:
    """Rows of one family."""
    cells = {arm: np.mean([part.mean(axis=1) for part in parts], axis=0) for arm, parts in scores.items()}
    rows: list[dict[str, Any]] = []
    tested = []
    for arm, reference in pairs:
        difference = cells[arm] - cells[reference]
        known, planned = int(np.isfinite(difference).sum()), len(difference)
        row: dict[str, Any] = {"arm": arm, "reference": reference, "metric": metric.name, "task": task}
        row |= {"scale": metric.scale, "verdict": "untested" if known else "missing", "family_size": 0}
        row |= {"n_seeds": known, "n_items": sum(part.shape[1] for part in scores[arm])}
        row |= {"missing_seeds": planned - known}
        if known and (metric.tested or known == planned):
            row["estimate"] = np.nanmean(difference)
        # seeds that are lost may be lost for what they would have shown; one says nothing of others
        comparable = np.isfinite(metric.transform([cells[arm], cells[reference]])).all()
        if metric.tested and known == planned > 1 and comparable:
            tested.append(row)
        rows.append(row)
    if tested:
        kept = [(row["arm"], row["reference"]) for row in tested]
        spreads = [metric.transform(c).var(ddof=1) for c in cells.values() if np.isfinite(metric.transform(c)).all()]
        columns = _primary(metric, kept, cells, scores, float(np.mean(spreads)), config)
        columns |= _bootstrapped(metric, kept, scores, config)
        for row, found in zip(tested, pd.DataFrame(columns).to_dict("records"), strict=True):
            row |= {"family": name, "family_size": len(kept), **found}
    return rows


def _primary(
    metric: Metric,
    pairs: Pairs,
    cells: dict[str, NDArray[np.float64]],
    scores: dict[str, Parts],
    spread: float,
    config: StatsConfig,
) -> dict[str, NDArray]:
    """Welch–Dunnett of one family: columns with an entry for each of its contrasts.

    Args:
        spread: variance of a cell over seeds on the metric's scale, pooled over arms.
    """
    both = np.array([[cells[arm], cells[reference]] for arm, reference in pairs])  # (contrast, side, seed)
    scaled, means, seeds = metric.transform(both), both.mean(-1), both.shape[-1]
    n_items = sum(part.shape[1] for part in scores[pairs[0][0]])
    # d scale / d metric at the two means; of a share, not nearer to 0 or 1 than half an item
    slopes = metric.slope(np.clip(means, 0.5 / n_items, 1 - 0.5 / n_items) if metric.scale == "arcsine" else means)

    def items(factors: NDArray) -> NDArray:
        """What the items add to the variance of each difference, the sides times factors (the delta method)."""
        sides = [(scores[arm], scores[reference]) for arm, reference in pairs]
        return np.array(
            [
                item_variance([f * a - g * r for a, r in zip(arm, reference, strict=True)])
                for (f, g), (arm, reference) in zip(factors, sides, strict=True)
            ]
        )

    # what all of a family share: its reference, or the arm that is compared with several
    side = 1 if len({reference for _, reference in pairs}) == 1 else 0
    of_items = items(1 / slopes)
    found = welch_dunnett(scaled[0, side], scaled[:, 1 - side], of_items)
    shift, alpha = found.estimate * (2 * side - 1), 1 - config.confidence
    p, tested = found.p(), np.isfinite(found.df)
    better = (shift > 0) == metric.higher_is_better
    within = scaled.var(-1, ddof=1)
    columns: dict[str, Any] = {"df": found.df, "p_welch": found.p(family=False), "p_dunnett": p}
    decided = np.where(better, "better", "worse")
    columns["verdict"] = np.where(~tested, "constant", np.where(p < alpha, decided, "undecided"))
    columns["effect_size_seeds"] = shift / np.sqrt(np.where(tested, within.mean(1), np.nan))
    change = means[:, 0] - means[:, 1]
    error = np.sqrt((metric.slope(means) ** 2 * within).sum(1) / seeds + items(np.ones_like(slopes)))
    for end, family in (("", True), ("_plain", False)):
        critical = found.critical(alpha, family)
        for name, sign in (("low", -1), ("high", 1)):
            bound = change + sign * critical * error
            columns[f"difference_{name}{end}"] = np.clip(bound, -metric.largest, metric.largest)
            if metric.is_ratio:
                columns[f"ratio_{name}{end}"] = np.exp(shift + sign * critical * found.error)
    # of two sides, each with half of what the items add; none where seeds do not vary
    each = spread + seeds * of_items / 2 if spread > 0 else np.full(len(pairs), np.nan)
    least = minimum_detectable(1.0, seeds, max(found.size, 1), alpha, config.power) * np.sqrt(each)
    least *= 1 if metric.higher_is_better else -1
    columns["mde"] = np.abs(metric.back(metric.transform(means[:, 1]) + least) - means[:, 1])
    if metric.is_ratio:
        columns |= {"ratio": np.exp(shift), "mde_ratio": np.exp(least)}
    return columns


def _bootstrapped(metric: Metric, pairs: Pairs, scores: dict[str, Parts], config: StatsConfig) -> dict[str, NDArray]:
    """Crossed bootstrap of the plain differences of one family, Bonferroni and Holm, as columns."""
    differences = np.stack([stratified(scores[arm]) - stratified(scores[reference]) for arm, reference in pairs])
    bootstrap = Bootstrap(differences, config.resamples, config.seed)
    p = bootstrap.p()
    bounds = [*bootstrap.interval(config.confidence), *bootstrap.interval(1 - (1 - config.confidence) / len(pairs))]
    columns = dict(zip(("low", "high", "low_corrected", "high_corrected"), bounds, strict=True))
    columns = {key: np.clip(bound, -metric.largest, metric.largest) for key, bound in columns.items()}
    effects = np.array([effect_size(difference) for difference in differences])
    return columns | {
        "p": p,
        "p_bonferroni": adjust(p, "bonferroni"),
        "p_holm": adjust(p, "holm"),
        "effect_size": effects,
    }


# ---------------------------------------------------------------- pairs of models
def pairs_table(scores: Scores, pairs: Pairs, config: StatsConfig) -> pd.DataFrame:
    """`pairs.csv`: one trained model against another of the same seed, on the same items.

    McNemar's exact test of which answers are right, and a bootstrap over items of bits per byte. It says nothing of other
    seeds, and so nothing of arms.
    """
    rows: list[dict[str, Any]] = []
    for arm, reference in pairs:
        for number, seed in enumerate(scores.seeds):
            for task in scores.measured[PRIMARY.name]:
                bits = np.subtract(*(scores.matrices[a, PRIMARY.name, task][number] for a in (arm, reference)))
                if not np.isfinite(bits).all():
                    continue
                interval = crossed_bootstrap(bits[None], config.resamples, config.confidence, config.seed)
                row = {"arm": arm, "reference": reference, "seed": seed, "task": task, "n_items": len(bits)}
                row |= {"bits_per_byte": interval.estimate, "low": interval.low, "high": interval.high}
                right = np.array([scores.matrices[a, "accuracy", task][number] for a in (arm, reference)])
                if np.isfinite(right).all():
                    only = int((right[0] > right[1]).sum()), int((right[0] < right[1]).sum())
                    row |= {"right_only_arm": only[0], "right_only_reference": only[1]}
                    row["p_mcnemar"] = stats.binomtest(only[0], sum(only)).pvalue if sum(only) else 1.0
                rows.append(row)
    columns = ["arm", "reference", "seed", "task", "n_items", "bits_per_byte", "low", "high"]
    return pd.DataFrame(rows, columns=[*columns, "right_only_arm", "right_only_reference", "p_mcnemar"])


# ---------------------------------------------------------------- the step
def write_stats(dag: Dag, paths: Paths, untrained: Path | None) -> None:
    """`stats/` (the same in every run) and `cost/` (measured time and memory)."""
    config, scores = dag.config.stats, Scores(dag, paths)
    if untrained is not None:
        scores.add_untrained(pd.read_parquet(untrained))
    for folder, measured in ((paths.stats, False), (paths.costs, True)):
        measures = scores.measures(measured)
        _write(arms_table(scores, measures, config), folder / ARMS)
        _write(contrasts_table(families(dag.config), measures, scores.parts, config), folder / CONTRASTS)
    named = [(dag.config.headline, dag.config.control)] if dag.config.headline else []
    named += [(arm, reference) for arm, reference in config.contrasts]
    _write(pairs_table(scores, named, config), paths.stats / PAIRS)
