"""One cell of config/recipes/context32k.yaml at 32,768 tokens, trained to its end: its time and memory by step.

`context.py ROOT stored|live [--arm full] [--tokens 32768] [--out docs/figures/context32k.csv]`. The recipe lies over
config/hpc.yaml as for the real models; student and teachers are tiny ones with random weights, texts are random letters, a
letter a token. Every step of the workflow is a process forked for it, whose processor seconds and peak resident bytes become
a line of `ROOT/MODE.jsonl`; what is there is not made again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import string
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import alone, high_water
from sized import TINY, save

from kvpipe.config import Config, load
from kvpipe.experiment.device import resolve_device
from kvpipe.experiment.files import GB, read_json
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.steps import in_order
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.make import run
from kvpipe.steps.train import make_cell

ROOT = Path(__file__).parents[2]
RECIPE = [ROOT / "config" / "hpc.yaml", ROOT / "config" / "recipes" / "context32k.yaml"]
MODELS = {
    "tinyllama-32k": TINY,
    "qwen": {**TINY, "model_type": "qwen2", "num_hidden_layers": 4, "num_key_value_heads": 4},
    "llama": {**TINY, "hidden_size": 96, "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 3},
}
TEXTS = 6


def config(folder: Path, mode: str, tokens: int) -> Config:
    """The recipe with tiny models and few steps of two texts; precision as this processor has it."""
    over: dict[str, Any] = {
        **{f"models.{name}": {"source": "local", "path": str(folder / name)} for name in MODELS},
        "data.sources": [
            {"kind": "files", "task": "text", "preset": "text"}
            | {part: f"{folder / 'long.jsonl'}[{cut}]" for part, cut in PARTS.items()}
        ],
        "lock": {},
        "store.mode": mode,
        "store.shards": 1,
        "train.steps": 3,
        "train.batch_size": 2,
        "train.accumulate": 2,
        "train.eval_every": 3,
        "train.log_every": 1,
        "train.max_length": tokens,
        "train.precision": "auto",
        "train.threads": 1,
        "train.device": "cpu",
        "evaluate.sandbox.run_code": False,
    }
    return load(RECIPE, [f"{name}={json.dumps(value)}" for name, value in over.items()])


PARTS = {"train": ":4", "validation": "4:5", "test": "5:"}


def make_models_and_texts(folder: Path, tokens: int) -> None:
    """Folders of the models, and texts that are `tokens` long with the token that ends them."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, architecture) in enumerate(MODELS.items()):
        if not (folder / name).exists():
            save(folder / name, architecture, seed)
    rng, letters = np.random.default_rng(0), list(string.ascii_lowercase)
    texts = ("".join(rng.choice(letters, tokens - 1)) for _ in range(TEXTS))
    (folder / "long.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def one(work: Inputs, step: str, job: dict[str, str]) -> dict[str, float]:
    """Run a step: its processor seconds, seconds by the clock, peak resident bytes."""
    clock, before = time.perf_counter(), time.process_time()
    if step == "train":
        make_cell(work, job["arm"], int(job["seed"]), made=True, log=print)
    else:
        run(work, step, **job)
    spent = {"seconds": time.process_time() - before, "clock": time.perf_counter() - clock}
    return spent | {"peak": high_water()}


def main() -> None:
    """Runs the steps that are missing, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("mode", choices=("stored", "live"))
    parser.add_argument("--arm", default="full")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--out", type=Path, help="CSV file whose lines of this mode are written anew")
    given = parser.parse_args()
    os.chdir(ROOT)  # the configuration's paths are relative to it
    torch.set_num_threads(1)
    resolve_device("cpu")  # as the steps do first
    if not (given.folder / "long.jsonl").exists():
        make_models_and_texts(given.folder, given.tokens)
    work = Inputs(config(given.folder, given.mode, given.tokens), Paths(given.folder / given.mode))
    done = given.folder / f"{given.mode}.jsonl"
    lines = [json.loads(line) for line in done.read_text(encoding="utf-8").splitlines()] if done.exists() else []
    cell = {"arm": given.arm, "seed": "0"}
    for name, job in [*in_order(work.steps, work.steps["train"].needs(**cell)), ("train", cell)]:
        if any((line["step"], line["job"]) == (name, job) for line in lines):
            continue
        line = {"step": name, "job": job, **alone(one, work, name, job)}
        if name == "train":
            line["cost"] = read_json(work.paths.cost(given.arm, 0), "train the cell again")
        with done.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{name} {' '.join(job.values())}: {line['seconds']:.0f} s, {line['peak'] / GB:.2f} GB", flush=True)
    if given.out is not None:
        write(given.out, given.mode, done)


def write(out: Path, mode: str, done: Path) -> None:
    """The steps of a mode that cost something, beside what the file has of the other."""
    lines = [json.loads(line) for line in done.read_text(encoding="utf-8").splitlines()]
    rows = []
    if out.is_file():
        with out.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["mode"] != mode]
    for line in lines:
        if line["step"] not in ("model", "data", "encode"):
            what = line["job"].get("teacher", line["job"].get("arm", ""))
            numbers = {"seconds": f"{line['seconds']:.1f}", "peak_bytes": line["peak"]}
            rows.append({"mode": mode, "step": line["step"], "of": what, **numbers})
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


FIELDS = ("mode", "step", "of", "seconds", "peak_bytes")


if __name__ == "__main__":
    main()
