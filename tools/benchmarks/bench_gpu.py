"""What a GPU gives at the sizes of real models: `make bench-gpu`, to docs/figures/gpu.csv.

`bench_gpu.py [--out FOLDER] [--rehearse]`. Random weights of Qwen2-7B and Llama-3-8B as teachers, of TinyLlama-1.1B as
student, in bf16, texts of 2,048 and of 32,768 tokens: tokens per second and model FLOPs utilisation of the bare forward, the
teacher pass against it, a store's writing against the disk, and of training control, `full` and what `full` costs more.
Seconds are the clock's. `--rehearse` runs all of it at toy size on a CPU, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_teacher import bare, equal_texts, store_of
from sized import QWEN2, TINY, Architecture, Cell, Sizes, made, opened
from transformers import AutoConfig, AutoModelForCausalLM

from kvpipe.experiment.device import resolve_device
from kvpipe.experiment.sizes import shape
from kvpipe.steps.train import prepare
from kvpipe.train.trainer import peak_memory

OUT = Path(__file__).parents[2] / "docs" / "figures"
FIELDS = ("model", "tokens", "what", "value", "unit")
LLAMA3: Architecture = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rope_theta": 500000.0,
}  # fmt: skip
TINYLLAMA: Architecture = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 32768,
}  # fmt: skip
FULL = {
    "fuse": {"kind": "attention"},
    "projector": {"kind": "elastic"},
    "fit": {"method": "reconstruct", "examples": 2, "steps": 20},
    "loss": {"keys": {}, "values": {}},
}
"""Two teachers, attention fusion and the elastic bottleneck: the dearest of what hpc.yaml compares."""


@dataclass(frozen=True)
class Bench:
    """What is measured."""

    student: Architecture
    teachers: dict[str, Architecture]
    lengths: tuple[int, ...]
    batch: int
    """Texts of the shortest length at once; of a longer one as many fewer."""
    steps: int
    product: int
    """Side of the matrices whose product is the device's rate."""


REAL = Bench(TINYLLAMA, {"qwen2-7b": QWEN2, "llama-3-8b": LLAMA3}, (2048, 32768), 16, 5, 8192)
REHEARSAL = Bench(
    TINY, {"qwen2": {**TINY, "model_type": "qwen2"}, "llama": {**TINY, "num_hidden_layers": 4}}, (48, 96), 4, 2, 256
)


def timed(function: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Least seconds of a call, after one that warms up."""

    def once() -> float:
        begun = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    once()
    return min(once() for _ in range(repeats))


def peak_rate(size: int, device: torch.device) -> float:
    """Operations a second of a matrix product in bf16: what utilisation is a share of."""
    x = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    return 2 * size**3 / timed(lambda: x @ x, device, 5)


def disk_rate(folder: Path, size: int) -> float:
    """Bytes a second that the disk takes, flushed."""
    content = os.urandom(size)

    def write() -> None:
        with (folder / "disk").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    rate = size / timed(write, torch.device("cpu"))
    (folder / "disk").unlink()
    return rate


def forward_flops(model: Architecture, parameters: int, tokens: int) -> float:
    """Operations of a token's forward in a text of so many: two for each weight but the embeddings', and causal attention."""
    found = shape(model, parameters=parameters)
    assert found is not None
    heads = (found.heads or found.hidden // found.head_dim) * found.head_dim
    return 2 * (parameters - found.vocab * found.hidden) + 4 * found.layers * heads * tokens / 2


# ---------------------------------------------------------------- teachers
def of_teacher(bench: Bench, name: str, device: torch.device, rate: float, root: Path) -> Iterator[dict[str, Any]]:
    """The bare forward, and the pass that stores every layer with nats and likeliest tokens."""
    options = dict(bench.teachers[name])
    with torch.device(device):
        config = AutoConfig.for_model(options.pop("model_type"), **options)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    parameters, layers = model.num_parameters(), tuple(range(model.config.num_hidden_layers))
    disk = disk_rate(root, 1 << 28 if device.type == "cuda" else 1 << 22)
    for tokens in bench.lengths:
        count = max(1, bench.batch * bench.lengths[0] // tokens)
        texts, total = equal_texts(count, tokens, model.config.vocab_size), count * tokens

        def line(what: str, value: float, unit: str, tokens: int = tokens) -> dict[str, Any]:
            return {"model": name, "tokens": tokens, "what": what, "value": value, "unit": unit}

        plain = timed(lambda texts=texts: bare(model, texts, head=False), device)
        passed = timed(lambda texts=texts: store_of(model, texts, root, layers, 16, True), device)
        size = sum(path.stat().st_size for path in root.glob("shard-*"))
        yield line("bare forward", total / plain, "tokens/s")
        yield line("utilisation", forward_flops(bench.teachers[name], parameters, tokens) * total / plain / rate, "")
        yield line("teacher pass", total / passed, "tokens/s")
        yield line("teacher pass against bare forward", plain / passed, "")
        yield line("store written", size / passed, "bytes/s")
        yield line("store against disk", size / passed / disk, "")
        yield line("peak memory", peak_memory(device), "bytes")


# ---------------------------------------------------------------- the student
def of_student(bench: Bench, device: torch.device, rate: float, root: Path) -> Iterator[dict[str, Any]]:
    """A step of control and of `full` with stored teachers."""
    teachers = list(bench.teachers.values())
    arm = {
        "base": "control",
        "role": "experiment",
        "set": {"teachers": [f"t{n}" for n in range(len(teachers))], **FULL},
    }
    for tokens in bench.lengths:
        count = max(1, bench.batch * bench.lengths[0] // tokens)
        settings = {
            "train.batch_size": count,
            "train.accumulate": max(1, count // 2),
            "train.gradient_checkpointing": True,
            "train.hold_targets_gb": 0,
            "store.batch_size": max(1, count // 2),
            "store.dtype": "int8",
        }
        place = root / str(tokens)
        made(place, Sizes(bench.student, teachers, tokens, max(2, count), {"full": arm}, settings))
        seconds: dict[str, float] = {}
        for name in ("control", "full"):
            prepare(opened(place), name, log=lambda *_: None)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            cell = Cell(opened(place), name)
            seconds[name] = timed(lambda cell=cell: cell.steps(1), device, bench.steps)
            read = cell.tokens[1] / cell.step
            # the backward pass is two forwards, and checkpointing one more
            parameters = sum(p.numel() for p in cell.run.cell.student.parameters())
            work = 4 * forward_flops(bench.student, parameters, tokens) * read

            def line(what: str, value: float, unit: str, name: str = name, tokens: int = tokens) -> dict[str, Any]:
                return {"model": f"student, {name}", "tokens": tokens, "what": what, "value": value, "unit": unit}

            yield line("training", read / seconds[name], "tokens/s")
            yield line("utilisation", work / seconds[name] / rate, "")
            yield line("peak memory", peak_memory(device), "bytes")
        yield line("full against control, time", seconds["full"] / seconds["control"], "")


def run_bench(bench: Bench, device: torch.device, out: Path) -> list[dict[str, Any]]:
    """Measure everything, a line of the file as each is known."""
    out.parent.mkdir(parents=True, exist_ok=True)
    rate, lines = peak_rate(bench.product, device), []
    with tempfile.TemporaryDirectory() as folder, out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        parts = [of_teacher(bench, name, device, rate, Path(folder)) for name in bench.teachers]
        first = {
            "model": str(device),
            "tokens": 0,
            "what": "matrix product, bf16",
            "value": rate,
            "unit": "operations/s",
        }
        for part in ([first], *parts, of_student(bench, device, rate, Path(folder))):
            for line in part:
                writer.writerow(line | {"value": f"{line['value']:.6g}"})
                file.flush()
                print(f"{line['model']}, {line['tokens']} tokens, {line['what']}: {line['value']:.4g} {line['unit']}")
                lines.append(line)
    return lines


def main() -> None:
    """On the GPU, or as a rehearsal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT / "gpu.csv")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on a CPU")
    given = parser.parse_args()
    if not given.rehearse and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --rehearse runs everything at toy size on the CPU (give --out as well)")
    device = torch.device("cpu" if given.rehearse else resolve_device("cuda"))
    run_bench(REHEARSAL if given.rehearse else REAL, device, given.out)


if __name__ == "__main__":
    main()
