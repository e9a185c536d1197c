"""Coverage, family-wise error and power of the statistics, by simulation: the tables of docs/statistics.md.

    python tools/validate_stats.py [--families 5000] [--bootstraps 300] [--out docs/statistics.md]

A family is 7 arms against one, each with so many seeds and items: cell = arm + seed + item + arm × item + rest, on the
scale of the comparison. Its true differences are 0 for coverage and error, and 3 standard deviations of a cell for power.
Two cases are measured as they are in the pipeline: bits per byte of log-normal cells, and answers that are right or wrong;
there the intervals of the difference by the delta method are counted too.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import interpolate, stats

from kvpipe.stats.bootstrap import Bootstrap, crossed_bootstrap, mean_squares
from kvpipe.stats.dunnett import LARGEST_CORRELATION, Comparison, critical_value, welch_dunnett
from kvpipe.stats.metrics import METRICS

ARMS, ITEMS, SEEDS = 7, 60, (3, 5, 8, 10)
SHIFT, CHUNK = 3.0, 250
MARK = re.compile(r"(?<=<!-- simulation -->\n).*?(?=<!-- /simulation -->)", re.DOTALL)


@dataclass(frozen=True)
class Case:
    """How cells vary: sd of the seeds of the shared arm and of the others, of items, and the shape of the seeds."""

    shared: float = 1.0
    others: tuple[float, ...] = (1.0,) * ARMS
    items: float = 0.5
    shape: str = "normal"
    blocks: float = 0.0


CASES = {
    "equal spreads": Case(),
    "control 1.8 times": Case(shared=1.8),
    "control 5 times": Case(shared=5.0),
    "one arm 5 times": Case(others=(5.0, *(1.0,) * (ARMS - 1))),
    "spreads 0.4 to 2.5": Case(others=tuple(np.geomspace(0.4, 2.5, ARMS))),
    "heavy tails (t with 3)": Case(shape="t"),
    "skewed (exponential)": Case(shape="skewed"),
    "items count as much as seeds": Case(items=4.5),
    "no spread but the items'": Case(shared=0.05, others=(0.05,) * ARMS, items=4.5),
    "seeds shared by all arms": Case(blocks=2.5),
}


def simulate(rng: np.random.Generator, case: Case, families: int, seeds: int) -> NDArray[np.float64]:
    """Cells ``(family, arm, seed, item)`` on the scale of the comparison, the shared arm first; all true means are 0."""
    size = (families, ARMS + 1, seeds)
    draws = {"normal": rng.standard_normal, "t": lambda n: rng.standard_t(3, n) / np.sqrt(3)}
    noise = draws.get(case.shape, lambda n: rng.exponential(size=n) - 1)(size)
    noise = noise * np.array([case.shared, *case.others])[:, None] + case.blocks * rng.standard_normal(
        (families, 1, seeds)
    )
    items = rng.standard_normal((families, 1, 1, ITEMS)) + case.items * rng.standard_normal((*size[:2], 1, ITEMS))
    return noise[..., None] + items + 0.5 * rng.standard_normal((*size, ITEMS))


def simulate_items(
    rng: np.random.Generator, datasets: int, seeds: int, items: int, seed_sd: float
) -> NDArray[np.float64]:
    """Differences ``(dataset, seed, item)`` of true mean 0: item sd 0.5, rest sd 1."""
    seed, item = seed_sd * rng.standard_normal((datasets, seeds, 1)), 0.5 * rng.standard_normal((datasets, 1, items))
    return seed + item + rng.standard_normal((datasets, seeds, items))


def bootstrap_coverage(datasets: NDArray[np.float64], n_resamples: int) -> float:
    """Share of the datasets whose crossed bootstrap interval covers 0."""
    found = (crossed_bootstrap(d, n_resamples, seed=number) for number, d in enumerate(datasets))
    return float(np.mean([interval.low <= 0 <= interval.high for interval in found]))


# ---------------------------------------------------------------- one table
def compared(cells: NDArray[np.float64], scaled: NDArray[np.float64], slopes: NDArray[np.float64] | None) -> Comparison:
    """Welch–Dunnett of families of cells ``(family, arm, seed, item)``, with what the items add.

    Args:
        cells: the metric.
        scaled: its means ``(family, arm, seed)`` on the scale of the comparison.
        slopes: d metric / d scale ``(family, arm)`` where that is another scale.
    """
    sides = cells if slopes is None else cells / slopes[..., None, None]
    return welch_dunnett(scaled[:, 0], scaled[:, 1:], item_part(sides))


def item_part(cells: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the items add to the variance of each difference ``(family, contrast)``."""
    differences = cells[:, 1:] - cells[:, :1]
    squares, _ = mean_squares(differences.reshape(-1, *cells.shape[2:]))
    return (np.maximum(squares[1] - squares[2], 0) / cells[0, 0].size).reshape(differences.shape[:2])


class Critical:
    """Half the width of a corrected interval in standard errors, of many families at once: `critical_value` of so many
    seeds on a grid of degrees of freedom and correlations, by splines."""

    def __init__(self, seeds: int):
        df, correlation = np.linspace(seeds - 1, 2 * (seeds - 1), 9), np.linspace(0, LARGEST_CORRELATION, 21)
        grid = [[critical_value(0.05, ARMS, float(x), float(y)) for y in correlation] for x in df]
        self.spline = interpolate.RectBivariateSpline(df, correlation, grid)

    def __call__(self, found: Comparison) -> NDArray[np.float64]:
        """Of each contrast ``(family, contrast)``."""
        return self.spline(found.df, np.broadcast_to(found.correlation[:, None], found.df.shape), grid=False)


def linear(rng: np.random.Generator, case: Case, seeds: int, families: int, bootstraps: int) -> dict[str, float]:
    """Rates of a case whose cells are on the scale of the comparison already."""
    spread = np.sqrt((case.shared**2 + np.square(case.others)) / 2)
    covers, errors, finds, boot = [], [], [], []
    critical = Critical(seeds)
    for start in range(0, families, CHUNK):
        cells = simulate(rng, case, min(CHUNK, families - start), seeds)
        found = compared(cells, cells.mean(-1), None)
        t, widest = np.abs(found.estimate) / found.error, critical(found)
        covers.append((t <= stats.t.ppf(0.975, found.df)).mean(0))
        errors.append((t > widest).any(1))
        finds.append((np.abs(found.estimate + SHIFT * spread) / found.error > widest).mean(0))
        for family in cells[: max(bootstraps - start, 0)]:
            boot.append((Bootstrap(family[1:] - family[:1], 1000, len(boot)).p() < 0.05 / ARMS).any())
    return {
        "coverage": float(np.mean(covers)),
        "worst": float(np.mean(covers, axis=0).min()),
        "error": float(np.concatenate(errors).mean()),
        "power": float(np.mean(finds)),
        "bootstrap": float(np.mean(boot)) if boot else float("nan"),
    }


def measured(rng: np.random.Generator, name: str, seeds: int, families: int) -> dict[str, float]:
    """Rates of a metric as the pipeline measures it: on its scale, and of the difference by the delta method."""
    metric = METRICS[name]
    truth = np.array([0.43, 0.14, 0.18, 0.43, 0.3, 0.2, 0.15, 0.4]) if metric.is_ratio else np.linspace(0.16, 0.72, 8)
    scaled_covers, covers, all_scaled, all_plain = [], [], [], []
    centre, critical = true_means(metric.is_ratio, truth), Critical(seeds)
    for start in range(0, families, CHUNK):
        size = (min(CHUNK, families - start), ARMS + 1, seeds)
        if metric.is_ratio:
            noise = 0.16 * rng.standard_normal(size)[..., None] + 0.3 * rng.standard_normal((size[0], 1, 1, ITEMS))
            noise = noise + 0.3 * rng.standard_normal((*size[:2], 1, ITEMS)) + 0.3 * rng.standard_normal((*size, ITEMS))
            cells = truth[:, None, None] * np.exp(noise)
        else:
            angle = np.arcsin(np.sqrt(truth))[:, None] + 0.07 * rng.standard_normal(size)
            angle = angle[..., None] + 0.25 * rng.standard_normal((size[0], 1, 1, ITEMS))
            cells = (rng.random((*size, ITEMS)) < np.sin(np.clip(angle, 0, np.pi / 2)) ** 2).astype(float)
        means = cells.mean(-1)
        middles = means.mean(-1)
        slopes = metric.slope(middles if metric.is_ratio else np.clip(middles, 0.5 / ITEMS, 1 - 0.5 / ITEMS))
        scaled = metric.transform(means)
        found = compared(cells, scaled, slopes)
        target = metric.transform(centre)
        plain, widest = stats.t.ppf(0.975, found.df), critical(found)
        t = np.abs(found.estimate - (target[1:] - target[0])) / found.error
        scaled_covers.append((t <= plain).mean())
        all_scaled.append((t <= widest).all(1))
        within = metric.slope(middles) ** 2 * scaled.var(-1, ddof=1) / seeds
        error = np.sqrt(within[:, 1:] + within[:, :1] + item_part(cells))
        t = np.abs(middles[:, 1:] - middles[:, :1] - (centre[1:] - centre[0])) / error
        covers.append((t <= plain).mean())
        all_plain.append((t <= widest).all(1))
    return {
        "scale": float(np.mean(scaled_covers)),
        "scale, family": float(np.concatenate(all_scaled).mean()),
        "difference": float(np.mean(covers)),
        "difference, family": float(np.concatenate(all_plain).mean()),
    }


def true_means(ratio: bool, truth: NDArray[np.float64]) -> NDArray[np.float64]:
    """Expected cell of each arm, by a long run of the same draws."""
    if ratio:
        return truth * np.exp((0.16**2 + 3 * 0.3**2) / 2)
    rng = np.random.default_rng(1)
    angle = np.arcsin(np.sqrt(truth)) + np.sqrt(0.07**2 + 0.25**2) * rng.standard_normal((400_000, 1))
    return (np.sin(np.clip(angle, 0, np.pi / 2)) ** 2).mean(0)


def lines(families: int, bootstraps: int) -> Iterator[str]:
    """The tables in Markdown."""
    error = np.sqrt(0.05 * 0.95 / families)
    yield f"{families:,} families of {ARMS} contrasts for each row (Monte Carlo sd {error:.3f} of a rate of 0.05), {ITEMS} items."
    yield ""
    yield "| case | seeds | coverage, mean | worst | family-wise error | power | bootstrap: family-wise error |"
    yield "|---|---|---|---|---|---|---|"
    for number, (name, case) in enumerate(CASES.items()):
        for seeds in SEEDS:
            found = linear(np.random.default_rng([number, seeds]), case, seeds, families, bootstraps)
            yield f"| {name} | {seeds} | " + " | ".join(f"{value:.3f}" for value in found.values()) + " |"
    yield ""
    yield "| metric | seeds | on its scale | all 7 | difference | all 7 |"
    yield "|---|---|---|---|---|---|"
    for number, name in enumerate(("bits_per_byte", "accuracy")):
        for seeds in SEEDS:
            found = measured(np.random.default_rng([100 + number, seeds]), name, seeds, families)
            yield (
                f"| {METRICS[name].label} | {seeds} | " + " | ".join(f"{value:.3f}" for value in found.values()) + " |"
            )


def main() -> None:
    """Print the tables, or write them between the marks of a document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", type=int, default=5000)
    parser.add_argument("--bootstraps", type=int, default=300)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = []
    for line in lines(given.families, given.bootstraps):
        print(line, flush=True)
        found.append(line)
    if given.out:
        text = given.out.read_text(encoding="utf-8")
        given.out.write_text(MARK.sub(lambda _: "\n" + "\n".join(found) + "\n\n", text), encoding="utf-8")


if __name__ == "__main__":
    main()
