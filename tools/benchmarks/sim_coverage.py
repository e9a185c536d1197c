"""Coverage of the intervals and family-wise error of the corrections, by simulation (spec 8).

    python tools/benchmarks/sim_coverage.py [--datasets 2000] [--resamples 1000]

Differences follow the crossed random-effects model ``d[s, i] = μ + seed[s] + item[i] + rest[s, i]`` with item sd 0.5 and
rest sd 1 (the unit), several seed sds, normal or skewed items. The seed sd is what matters: 0.05 is a student whose runs
differ little, 0.3 one where the seed is worth a third of an item.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from kvpipe.stats.bootstrap import Interval, adjust, crossed_bootstrap_many

ITEM_SD, REST_SD = 0.5, 1.0


def simulate(
    rng: np.random.Generator, datasets: int, seeds: int, items: int, seed_sd: float, skewed: bool = False
) -> NDArray[np.float64]:
    """Differences ``(dataset, seed, item)`` whose true mean is 0."""
    size = (datasets, 1, items)
    item = rng.exponential(size=size) - 1 if skewed else rng.standard_normal(size)
    seed = seed_sd * rng.standard_normal((datasets, seeds, 1))
    return seed + ITEM_SD * item + REST_SD * rng.standard_normal((datasets, seeds, items))


def family(
    rng: np.random.Generator, families: int, arms: int, seeds: int, items: int, seed_sd: float
) -> NDArray[np.float64]:
    """Null differences ``(family, arm, seed, item)`` of arms against one shared control, hence correlated."""
    cells = simulate(rng, families * (arms + 1), seeds, items, seed_sd).reshape(families, arms + 1, seeds, items)
    return (cells[:, 1:] - cells[:, :1]) / np.sqrt(2)


def covers(interval: Interval) -> bool:
    """Whether the interval holds the true mean of `simulate`."""
    return interval.low <= 0 <= interval.high


def coverage(datasets: NDArray[np.float64], n_resamples: int, method: str, confidence: float = 0.95) -> float:
    """Share of the datasets whose interval covers 0."""
    parts = np.array_split(datasets, -(-len(datasets) // 250))  # each part with resamples of its own
    return float(
        np.mean(
            [
                covers(interval)
                for number, part in enumerate(parts)
                for interval in crossed_bootstrap_many(part, n_resamples, confidence, number, method)
            ]
        )
    )


def family_wise_error(families: NDArray[np.float64], n_resamples: int, seed: int = 0) -> dict[str, float]:
    """Share of the null families with any rejection at 0.05, uncorrected and under both corrections."""
    count, arms = families.shape[:2]
    flat = families.reshape(count * arms, *families.shape[2:])
    p = np.array([i.p for i in crossed_bootstrap_many(flat, n_resamples, seed=seed)]).reshape(count, arms)
    rates = {"uncorrected": float((p < 0.05).any(1).mean())}
    for method in ("bonferroni", "holm"):
        rates[method] = float(np.mean([(adjust(row, method) < 0.05).any() for row in p]))
    return rates


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=1000)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    error = np.sqrt(0.95 * 0.05 / arguments.datasets)
    print(f"Coverage of nominal 95% intervals, {arguments.datasets} datasets (Monte Carlo sd {error:.3f})\n")
    print("| seeds | items | seed sd | items' shape | calibrated | percentile | basic |")
    print("|---|---|---|---|---|---|---|")
    for seeds in (1, 3, 5, 10):
        for items in (50, 300):
            for seed_sd in (0.0, 0.05, 0.1, 0.3, 1.0):
                for skewed in (False, True):
                    data = simulate(rng, arguments.datasets, seeds, items, seed_sd, skewed)
                    rates = [coverage(data, arguments.resamples, m) for m in ("calibrated", "percentile", "basic")]
                    cells = " | ".join(f"{rate:.3f}" for rate in rates)
                    print(
                        f"| {seeds} | {items} | {seed_sd} | {'skewed' if skewed else 'normal'} | {cells} |", flush=True
                    )
    families = arguments.datasets
    print(f"\nFamily-wise error under the null at 0.05, 12 arms against one control, {families} families\n")
    print("| seeds | items | seed sd | uncorrected | Bonferroni | Holm |")
    print("|---|---|---|---|---|---|")
    for seeds in (3, 5, 10):
        for items in (50, 300):
            for seed_sd in (0.0, 0.1, 0.3):
                parts = [
                    family_wise_error(family(rng, 50, 12, seeds, items, seed_sd), arguments.resamples, number)
                    for number in range(families // 50)
                ]
                means = [np.mean([part[name] for part in parts]) for name in ("uncorrected", "bonferroni", "holm")]
                print(
                    f"| {seeds} | {items} | {seed_sd} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
