"""Do the verdicts hold under other arithmetic? `make robustness` writes the tables of docs/statistics.md.

    python tools/robustness.py [--folder build/robustness] [--out docs/statistics.md] [--jobs 2]

The arms below are made with the shipped seeds once as they are and once under each setting that can make a processor round
otherwise. Where no student's bytes differ, a setting has tried nothing, as the table shows. `full` − `control` must be
decided with the same sign everywhere. A processor whose own instructions are AVX2 leaves out the two settings that ask for
them. Finished cells are kept and not made again. Half an hour to an hour and a half on two idle cores.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats

from kvpipe.experiment.files import read_json
from kvpipe.experiment.paths import COST
from kvpipe.experiment.provenance import describe

ROOT = Path(__file__).parent.parent
ARMS = ("control", "exp1", "exp6", "full", "null-shuffled", "null-random", "null-control")
METRICS = ("bits_per_byte", "accuracy")
"""Of the page's first screen."""
AS_SHIPPED = "as shipped"
ARITHMETIC: dict[str, dict[str, str]] = {
    AS_SHIPPED: {},
    "ATEN_CPU_CAPABILITY=default": {"ATEN_CPU_CAPABILITY": "default"},
    "ATEN_CPU_CAPABILITY=avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "MKL_CBWR=COMPATIBLE": {"MKL_CBWR": "COMPATIBLE"},
    "ONEDNN_MAX_CPU_ISA=AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "two threads": {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
}
KEY = ["arm", "reference", "metric"]
MARK = re.compile(r"(?<=<!-- robustness -->\n).*?(?=<!-- /robustness -->)", re.DOTALL)


def tried() -> list[str]:
    """The settings that can change anything on this processor."""
    own = torch.backends.cpu.get_cpu_capability() == "AVX2"
    return [name for name in ARITHMETIC if not (own and name.upper().endswith("=AVX2"))]


def folder_of(folder: Path, name: str) -> Path:
    """Where the cells of one arithmetic are."""
    return folder / re.sub(r"\W+", "-", name).lower()


def run(folder: Path, name: str) -> None:
    """Cells, statistics and page of one arithmetic, in processes of its own."""
    place = folder_of(folder, name)
    place.mkdir(parents=True, exist_ok=True)
    # the other arms have no seeds here
    settings = ["--set", "audit.allow=[seeds]", *(["--set", "train.threads=2"] if name == "two threads" else [])]
    command = [sys.executable, "-m", "kvpipe", "cells", "--kept", str(place / "cells"), *settings]
    arms = [word for arm in ARMS for word in ("--arm", arm)]
    environment = {**os.environ, **ARITHMETIC[name], "KVPIPE_RESULTS": str(place / "results")}
    with (place / "log").open("w", encoding="utf-8") as log:
        for more in (arms, ["--out", str(place / "report.html")]):
            subprocess.run([*command, *more], env=environment, cwd=ROOT, stdout=log, stderr=log, check=True)


def read(folder: Path, name: str) -> tuple[pd.DataFrame, dict[tuple[str, str], str]]:
    """The tested contrasts over all tasks, and the digest of every student."""
    place = folder_of(folder, name)
    table = pd.read_csv(place / "results" / "stats" / "contrasts.csv")
    table = table[
        (table.task == "all") & table.metric.isin(METRICS) & table.arm.isin(ARMS) & table.reference.isin(ARMS)
    ]
    students = {
        (cost.parts[-3], cost.parts[-2]): read_json(cost, "make the cell again")["model"]["digest"]
        for cost in sorted((place / "cells").glob(f"*/*/{COST}"))
    }
    return table.set_index(KEY), students


def flip_probability(row: pd.Series) -> float:
    """How often a new run of the same truth, the estimate, would change this verdict: normal, on the scale of the test, of
    accuracy in points."""
    log = np.isfinite(row.ratio)
    names = ["ratio", "ratio_low", "ratio_high", "ratio_high_plain"]
    if not log:
        names = ["estimate", "difference_low", "difference_high", "difference_high_plain"]
    numbers = row[names].to_numpy(dtype=float)
    middle, low, high, plain = np.log(numbers) if log else numbers
    error = (plain - middle) / stats.t.ppf(0.975, row.df)
    found = float(stats.norm.sf((high - middle - abs(middle)) / error))
    return 1 - found if low > 0 or high < 0 else found


def tables(found: dict[str, tuple[pd.DataFrame, dict[tuple[str, str], str]]]) -> tuple[list[str], bool]:
    """Lines of Markdown; and whether full − control is decided with one sign in all."""
    shipped, students = found[AS_SHIPPED]
    lines = [
        "| arithmetic | students that differ | full − control, bits per byte | full / control | "
        "other estimates move by at most | verdicts as shipped |",
        "|---|---|---|---|---|---|",
    ]
    flips, signs, differing = [], set(), []
    for name, (table, weights) in found.items():
        full = table.loc[("full", "control", "bits_per_byte")]
        signs.add((full.verdict, bool(full.ratio < 1)))
        other = sum(weights[cell] != students[cell] for cell in students)
        differing.append(other)
        bits = table.xs("bits_per_byte", level="metric").drop(index=("full", "control"))
        moved = np.abs(bits.ratio / shipped.xs("bits_per_byte", level="metric").ratio.reindex(bits.index) - 1).max()
        changed = table.index[table.verdict != shipped.verdict.reindex(table.index)]
        flips += [(name, key, shipped.loc[key].verdict, table.loc[key].verdict) for key in changed]
        lines.append(
            f"| {name} | {other} of {len(students)} | {full.estimate:+.3f} ({full.difference_low:+.3f} to "
            f"{full.difference_high:+.3f}) | {full.ratio:.2f} ({full.ratio_low:.2f} to {full.ratio_high:.2f}) | "
            f"{moved:.0%} | {len(table) - len(changed)} of {len(table)} |"
        )
    if not any(differing):
        raise SystemExit(f"all {len(students)} students have the same bytes under every arithmetic: nothing was tried")
    lines += [
        "",
        "| verdict that differs | as shipped | there | probability that a new run changes it |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {key[0]} − {key[1]}, {key[2]}: {name} | {was} | {now} | {flip_probability(shipped.loc[key]):.0%} |"
        for name, key, was, now in flips
    ]
    return lines, len(signs) == 1 and all(below for _, below in signs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "robustness")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "statistics.md")
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args()
    with ThreadPoolExecutor(chosen.jobs) as pool:
        list(pool.map(lambda name: run(chosen.folder, name), tried()))
    lines, same = tables({name: read(chosen.folder, name) for name in tried()})
    here = describe()
    lines = [f"As shipped is here: {here['processor']} with {here['cpu_capability']}.", "", *lines]
    print(*lines, sep="\n")
    page = chosen.out.read_text(encoding="utf-8")
    chosen.out.write_text(MARK.sub(lambda _: "\n".join(lines) + "\n", page), encoding="utf-8")
    sys.exit(None if same else "full − control is not decided with one sign under every arithmetic")


if __name__ == "__main__":
    main()
