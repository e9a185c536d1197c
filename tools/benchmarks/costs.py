"""Cost curves: docs/figures/costs.csv and costs.svg, a line and a panel for what grows.

`costs.py [--out FOLDER] [--only CURVE]`; into docs/figures, the section of docs/benchmarks.md is written too. Step time and
memory over the length of texts, the number of teachers, the layers matched and the vocabulary; size and time of a store over
its tokens. Models have random weights and the embedded student's width, texts are random letters; time and memory depend on
sizes alone. Every point is a process forked for it; seconds are the processor's, of one thread, memory is the process's peak
while it takes steps, Python and torch among it. Points that the file has are not measured again.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from bench_teacher import store_of, texts
from matplotlib import pyplot as plt
from measure import alone, high_water, spent
from sized import TINY, Cell, Sizes, made, opened
from transformers import AutoConfig, AutoModelForCausalLM

from kvpipe.experiment.device import resolve_device
from kvpipe.experiment.files import GB
from kvpipe.steps.train import prepare

OUT = Path(__file__).parents[2] / "docs" / "figures"
FIELDS = ("curve", "x", "arm", "seconds", "peak_bytes", "tokens", "file_bytes")
TITLES = {
    "length": "tokens of a text, one a step",
    "teachers": "teachers",
    "layers": "layers matched, of 12",
    "vocabulary": "words of the vocabulary",
    "store": "tokens of a store",
}


class Point(NamedTuple):
    """A point of a curve, and what is to be measured for it."""

    curve: str
    x: int
    arm: str
    sizes: Sizes | None = None
    """None: a store."""
    steps: int = 3


def matched(teachers: int = 1, **terms: Any) -> dict[str, Any]:
    """An arm that matches keys and values."""
    names = [f"t{number}" for number in range(teachers)]
    loss = {"keys": terms, "values": terms}
    fit = {"method": "pca" if teachers == 1 else "joint_pca", "examples": 4}
    return {"base": "control", "role": "experiment", "set": {"teachers": names, "loss": loss, "fit": fit}}


def grid(small: bool = False) -> Iterator[Point]:
    """All points; with `small` two of each curve, of sizes that take a moment."""
    teacher = {**TINY, "num_hidden_layers": 4, "num_key_value_heads": 4}
    for length in (64, 128) if small else (512, 2048, 8192, 32768):
        # a batch of one text; the stores of few
        settings = {"train.batch_size": 1, "train.accumulate": 1, "train.hold_targets_gb": 0}
        sizes = Sizes(TINY, [teacher], length, 2 if length > 4000 else 8, {"matched": matched()}, settings)
        for arm in ("control", "matched"):
            yield Point("length", length, arm, sizes, 2 if length > 4000 else 5)
    for teachers in (1, 2) if small else (1, 2, 3, 4, 5):
        sizes = Sizes(TINY, [teacher] * teachers, 64 if small else 256, 16, {"matched": matched(teachers)})
        yield Point("teachers", teachers, "matched", sizes, 5)
    deep = {**TINY, "num_hidden_layers": 12}
    for layers in (1, 2) if small else (1, 3, 6, 9, 12):
        arms = {"matched": matched(layers=list(range(layers)))}
        yield Point("layers", layers, "matched", Sizes(deep, [deep], 64 if small else 256, 16, arms), 5)
    for words in (384, 1024) if small else (1024, 4096, 16384, 65536, 262144):
        sizes = Sizes({**TINY, "vocab_size": words}, [], 64 if small else 256, 16)
        yield Point("vocabulary", words, "control", sizes, 5)
    for tokens in (500, 1000) if small else (4000, 16000, 64000):
        for kind in ("bf16", "int8"):
            yield Point("store", tokens, kind)


# ---------------------------------------------------------------- a point
def measured(point: Point, root: Path) -> dict[str, float]:
    """Seconds, peak and sizes of a point, each in a process of its own."""
    if point.sizes is None:
        return alone(store, point, root)
    alone(make, root, point)
    return alone(steps, root, point)


def make(root: Path, point: Point) -> None:
    """The experiment of a point, as far as its cell reads it."""
    assert point.sizes is not None
    prepare(made(root, point.sizes), point.arm, log=lambda *_: None)


def steps(root: Path, point: Point) -> dict[str, float]:
    """A cell's steps."""
    torch.set_num_threads(1)
    cell = Cell(opened(root), point.arm)
    cell.steps(1)
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    seconds = [spent(lambda: cell.steps(1)) for _ in range(point.steps)]
    return {"seconds": float(np.median(seconds)), "peak_bytes": high_water(), "tokens": cell.tokens[1] / cell.step}


def store(point: Point, root: Path) -> dict[str, float]:
    """A teacher's store: all layers, nats and likeliest tokens."""
    torch.set_num_threads(1)
    root.mkdir(parents=True, exist_ok=True)
    options = {key: value for key, value in TINY.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(TINY["model_type"], **options)).eval()
    encoding = texts(point.x, TINY["vocab_size"])
    found: list[Path] = []
    layers = tuple(range(TINY["num_hidden_layers"]))
    seconds = spent(lambda: found.append(store_of(model, encoding, root, layers, 32, True, point.arm)))
    size = found[0].stat().st_size
    return {"seconds": seconds, "peak_bytes": high_water(), "tokens": len(encoding.ids), "file_bytes": size}


# ---------------------------------------------------------------- the file and the figure
def read(path: Path) -> list[dict[str, str]]:
    """The lines that are there."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def fill(path: Path, points: list[Point]) -> None:
    """Measure the points that the file lacks, a line for each as it is known."""
    there = {(line["curve"], line["x"], line["arm"]) for line in read(path)}
    for point in points:
        if (point.curve, str(point.x), point.arm) in there:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = measured(point, Path(folder) / "point")
        begins = not path.is_file()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            if begins:
                writer.writeheader()
            line = {"curve": point.curve, "x": point.x, "arm": point.arm}
            writer.writerow(line | {name: f"{value:.6g}" for name, value in found.items()})
        print(
            f"{point.curve} {point.x} {point.arm}: {found['seconds']:.3g} s, {found['peak_bytes'] / GB:.2f} GB",
            flush=True,
        )


def draw(lines: list[dict[str, str]], out: Path) -> None:
    """A column for each curve: time above, memory (of a store its size) below."""
    matplotlib.rcParams["svg.hashsalt"] = "kvpipe"
    figure, axes = plt.subplots(2, len(TITLES), figsize=(3.1 * len(TITLES), 5.2), layout="constrained")
    for column, (curve, title) in enumerate(TITLES.items()):
        of = [line for line in lines if line["curve"] == curve]
        below = "file_bytes" if curve == "store" else "peak_bytes"
        for arm in dict.fromkeys(line["arm"] for line in of):
            chosen = sorted((line for line in of if line["arm"] == arm), key=lambda line: int(line["x"]))
            x = [int(line["x"]) for line in chosen]
            for row, (field, unit) in enumerate((("seconds", 1.0), (below, GB))):
                axes[row, column].plot(x, [float(line[field]) / unit for line in chosen], "o-", ms=3, lw=1, label=arm)
        for row in (0, 1):
            if curve not in ("teachers", "layers"):
                axes[row, column].set_xscale("log", base=2)
            axes[row, column].set_ylim(bottom=0)
        axes[1, column].set_xlabel(title)
        axes[0, column].set_title(curve, fontsize=9)
        axes[0, column].legend(fontsize=7, frameon=False)
        axes[1, column].set_ylabel("size, GB" if curve == "store" else "peak memory, GB")
        axes[0, column].set_ylabel("seconds" if curve == "store" else "seconds a step")
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


# ---------------------------------------------------------------- the section of docs/benchmarks.md
PAGE = OUT.parent / "benchmarks.md"
BEGIN, END = "## Cost curves\n", "Measured elsewhere:"


def section(folder: Path = OUT) -> str:
    """What the files say, in Markdown; nothing before anything is measured."""
    if not read(folder / "costs.csv"):
        return ""
    parts = [
        BEGIN,
        "Written by `make bench-costs` (`tools/benchmarks/costs.py`): random weights of the embedded student's width, random",
        "letters as texts, processor seconds of one thread; memory is the whole process's, 0.4 GB of Python and torch in it.",
        "",
        "![Step time and memory over lengths, teachers, layers and words; a store's time and size](figures/costs.svg)",
        "",
    ]
    if lines := read(folder / "context32k.csv"):
        parts += [
            "A cell of `config/recipes/context32k.yaml` at 32,768 tokens, trained to its end (`tools/benchmarks/context.py`):",
            "tiny models with random weights, arm `full` with two teachers, 3 steps of 2 texts, one thread.",
            "",
            "| teachers | step | of | processor seconds | peak memory |",
            "| --- | --- | --- | --- | --- |",
            *(
                f"| {line['mode']} | {line['step']} | {line['of']} | {float(line['seconds']):.0f} | "
                f"{float(line['peak_bytes']) / GB:.2f} GB |"
                for line in lines
            ),
            "",
        ]
    if lines := read(folder / "peaks.csv"):
        parts += [
            "Memory that `kvpipe doctor` announces for a rule, and what its job used (`tools/benchmarks/peaks.py`).",
            "",
            "| models of the sizes of | rule | used | announced |",
            "| --- | --- | --- | --- |",
            *(
                f"| {line['geometry']} | {line['rule']} | {float(line['measured']) / GB:.2f} GB | "
                f"{float(line['announced']) / GB:.2f} GB, {float(line['announced']) / float(line['measured']):.2f}× |"
                for line in lines
            ),
            "",
        ]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Measures what is missing and draws all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", choices=tuple(TITLES))
    parser.add_argument("--small", action="store_true", help="two points of each curve, of sizes that take a moment")
    given = parser.parse_args()
    torch.set_num_threads(1)
    resolve_device("cpu")
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "costs.csv"
    fill(path, [point for point in grid(given.small) if given.only in (None, point.curve)])
    draw(read(path), given.out / "costs.svg")
    if given.out == OUT:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN, 1) if BEGIN in page else page.split(END, 1)
        after = END + (rest.split(END, 1)[1] if BEGIN in page else rest)
        PAGE.write_text(before + section() + after, encoding="utf-8")


if __name__ == "__main__":
    main()
