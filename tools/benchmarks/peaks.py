"""Memory announced against memory used at the sizes of real models: docs/figures/peaks.csv.

`peaks.py [--out FOLDER] [--only NAME] [--small]`. A geometry is an experiment with random weights, of which every step runs
in a process forked for it: its peak resident bytes stand beside what `kvpipe doctor` announces for the rule before anything
is made. The Qwen2 of two layers reads as a teacher alone. Lines that the file has are not measured again.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measure import alone, high_water
from sized import GEMMA3, QWEN2_WIDE, SMOLLM2, TINY, Architecture, Cell, Sizes, made, opened

from kvpipe.doctor.memory import needs
from kvpipe.doctor.workload import Workload
from kvpipe.experiment.device import resolve_device
from kvpipe.experiment.files import GB
from kvpipe.experiment.sizes import SCORED
from kvpipe.steps.evaluate import score_untrained
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.make import make, run

OUT = Path(__file__).parents[2] / "docs" / "figures"
FIELDS = ("geometry", "rule", "measured", "announced")
GEOMETRIES: dict[str, tuple[Architecture, Architecture]] = {
    "smollm2": (SMOLLM2, SMOLLM2),
    "gemma3": (GEMMA3, GEMMA3),
    "qwen2-wide": (TINY, QWEN2_WIDE),
}
"""Name → student and teacher."""
ARM = {
    "base": "control",
    "role": "experiment",
    "set": {"teachers": ["t0"], "loss": {"keys": {}, "values": {}}, "fit": {"method": "pca", "examples": 4}},
}


def announced(root: Path) -> dict[str, float]:
    """Rule → bytes of the host, by the doctor."""
    work = opened(root)
    return {need.rule: need.host for need in needs(Workload(work.config, work.paths), lambda rule: 0)}


def experiment(root: Path, student: Architecture, teacher: Architecture) -> Inputs:
    """Models and texts: enough of them to score that a batch is full."""
    settings = {"train.batch_size": 8, "train.hold_targets_gb": 0, "train.precision": "auto"}
    return made(root, Sizes(student, [teacher], 144, 24, {"matched": ARM}, settings, test=SCORED // 144))


def build(root: Path, student: Architecture, teacher: Architecture) -> None:
    """The experiment, and its tokens."""
    work = experiment(root, student, teacher)
    files = [path for name in ("data", "model", "encode") for path in work.steps[name].files()]
    make(work, files, log=lambda *_: None)


def peak(root: Path, rule: str) -> int:
    """Peak resident bytes of a rule's job in this process."""
    torch.set_num_threads(1)
    work = opened(root)
    if rule == "teacher_kv":
        run(work, "teacher_kv", teacher="t0", reading="student")
    elif rule == "fit":
        (job,) = work.steps["fit"].jobs()
        run(work, "fit", **job)
    elif rule == "train":
        cell = Cell(work, "matched")
        cell.run.evaluate(0)
        cell.steps(2)
    else:
        score_untrained(work, work.paths.untrained)
    return high_water()


def lines(
    name: str, student: Architecture, teacher: Architecture, there: set[tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    """The lines of a geometry that are missing, in the order in which rules need each other."""
    rules = ["teacher_kv", *(["fit", "train", "untrained"] if student == teacher else [])]
    if all((name, rule) in there for rule in rules):
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / name
        alone(build, root, student, teacher)
        said = alone(announced, root)
        for rule in rules:
            found = alone(peak, root, rule)
            if (name, rule) not in there:
                yield {"geometry": name, "rule": rule, "measured": found, "announced": round(said[rule])}


def fill(path: Path, geometries: dict[str, tuple[Architecture, Architecture]]) -> list[dict[str, str]]:
    """Measure what the file lacks; all its lines."""
    rows = list(csv.DictReader(path.open(newline="", encoding="utf-8"))) if path.is_file() else []
    there = {(row["geometry"], row["rule"]) for row in rows}
    for name, pair in geometries.items():
        for line in lines(name, *pair, there):
            begins = not path.is_file()
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, FIELDS)
                if begins:
                    writer.writeheader()
                writer.writerow(line)
            share = line["announced"] / line["measured"]
            print(
                f"{name} {line['rule']}: {line['measured'] / GB:.2f} GB used, {share:.2f} of it announced", flush=True
            )
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Measures what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", choices=tuple(GEOMETRIES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    resolve_device("cpu")
    given.out.mkdir(parents=True, exist_ok=True)
    fill(given.out / "peaks.csv", {name: pair for name, pair in GEOMETRIES.items() if given.only in (None, name)})


if __name__ == "__main__":
    main()
