"""Two tests of why matching caches helps, from finished results: how the lead grows, and what goes with it over arms.

python tools/mechanisms.py [--config config/config.yaml] [--results results]

The first table has every arm's lead over control in validation loss, nats per token, at each evaluation, a mean over seeds.
The second has, for every arm that matches caches and is no null, its bits per byte over control's, the cosine of attention
outputs that its fit reports before any step, and the bits per byte of its student from a teacher's cache; then Spearman's
correlations. docs/why.md says what was expected.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from kvpipe.config import load
from kvpipe.experiment.files import read_json
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.plan import Dag
from kvpipe.stats.scores import read_history, read_items

SWAP = "nll_swap"


def leads(dag: Dag, paths: Paths) -> pd.DataFrame:
    """Step × arm: control's validation loss less the arm's, in nats per token; arms of which a seed is missing are left out."""
    curves = {}
    for arm in dag.arms:
        found = [read_history(paths, arm, seed) for seed in dag.config.seeds]
        losses = [one[1].set_index("step").validation_loss for one in found if one is not None]
        if len(losses) == len(dag.config.seeds):
            curves[arm] = pd.concat(losses, axis=1).mean(axis=1)
    control = curves.pop(dag.config.control)
    return pd.DataFrame({arm: control - curve for arm, curve in curves.items()})


def bits(items: pd.DataFrame, column: str = "nll") -> float:
    """Bits per byte of all seeds' items."""
    return float(items[column].sum() / np.log(2) / items.bytes.sum())


def what_goes_with_gain(dag: Dag, paths: Paths) -> pd.DataFrame:
    """Of every arm that matches caches, but for nulls: its ratio to control, its fit's cosine, its student's swap."""
    control = bits(read_items(paths, dag.config.control, dag.config.seeds))
    rows = {}
    for name, arm in dag.arms.items():
        items = read_items(paths, name, dag.config.seeds)
        if arm.role == "null" or not dag.needs_fit(arm) or not len(items):
            continue
        report = read_json(paths.fit_report(dag.fit_id(arm)), "run the fit again")
        cosines = [value for layers in report.get("attention_output_cosine", {}).values() for value in layers]
        swap = bits(items, SWAP) if SWAP in items and items[SWAP].notna().all() else np.nan
        rows[name] = {
            "ratio to control": bits(items) / control,
            "cosine of attention outputs at the fit": np.mean(cosines) if cosines else np.nan,
            "bits per byte from a teacher's cache": swap,
        }
    return pd.DataFrame(rows).T


def show(table: pd.DataFrame, index: str) -> None:
    """As Markdown."""
    print(f"| {index} | " + " | ".join(table.columns) + " |\n|---" + "|---" * len(table.columns) + "|")
    for name, row in table.iterrows():
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row) + " |")


def main() -> None:
    """Prints both tables and the correlations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, action="append")
    parser.add_argument("--results", type=Path, default=Path("results"))
    given = parser.parse_args()
    dag, paths = Dag(load(given.config or [Path("config/config.yaml")])), Paths(given.results)
    show(leads(dag, paths), "step")
    table = what_goes_with_gain(dag, paths)
    print()
    show(table, "arm")
    print()
    gain = -np.log(table["ratio to control"])
    for column in table.columns[1:]:
        known = table[column].notna()
        if known.sum() > 2:
            found = spearmanr(gain[known], table[column][known])
            print(f"gain and {column}: ρ {found.statistic:+.2f} over {known.sum()} arms (p {found.pvalue:.3f})")


if __name__ == "__main__":
    main()
