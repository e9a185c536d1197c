"""Measures docs/benchmarks.md: `make bench`, or python tools/benchmarks/run.py [--results DIR] [--quick].

Every figure is a median over repeats, every ratio is of two things that were timed in turn in one process on the same
inputs. Times are processor time on one thread, so that other work on the machine counts little. Cells are those of
config/config.yaml; what `control` and `full` need and --results lacks is made first (minutes), by default in a temporary
folder. With --quick there are few repeats, and the table is only printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from bench_teacher import losses_in_pieces, memory, pass_against_decoder
from bench_training import (
    CONFIG,
    ROOT,
    against_logits,
    against_trainer,
    at_smollm2_size,
    full_against_control,
    mixed_lengths,
    recorder_overhead,
)
from costs import section
from measure import Row, median
from torch import Tensor

from kvpipe.config import load
from kvpipe.data.records import render
from kvpipe.experiment.device import resolve_device
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.provenance import describe
from kvpipe.models.folders import load_tokenizer
from kvpipe.stats.bootstrap import Bootstrap
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.train import prepare
from kvpipe.tokens.matrix import encode, gather_form, overlap

SHORT, LONG = 8192, 32768
BLOCK = 25  # steps timed together: one of them is logged, as in a run
NOTES = """What to know when reading it:

- The embedded texts are nearly of one length, so no batching can save padding there; `mixed length` (problems of 1 to 6
  operations) shows what batching by length saves. The Trainer batches by length too when asked.
- The student is tiny: a step takes some 12 ms, so the costs per step (recorder, gathering targets, two more losses) weigh
  more than in a larger model: see the lines at the size of SmolLM2.
- Memory: `full` holds its projected targets (`train.hold_targets_gb`), here 250 MiB beside a process of 526; with 0 they
  are made batch by batch, which is slower.
- The loss is formed over pieces of the logits, so that they never stand whole. Of a vocabulary of 384 words that is 1 ms of
  a step's 12 for nothing, a good part of what control takes longer than the Trainer; of 49,152 words it takes up to 1.15 times
  the plain loss, and with a second loss on the same logits less than it.
"""


# ------------------------------------------------------------------------------- parts without training


def cka(repeats: int) -> list[Row]:
    """All pairs against the loop that public CKA code has."""
    script = Path(__file__).with_name("bench_cka.py")
    command = [sys.executable, str(script), "--json", "--repeats", str(repeats)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rows = []
    for one in found:
        loop = "Gram matrices" if one["loop"] == "pair_by_gram" else "features"
        barred = one["loop"] == "pair_by_gram"
        rows.append(
            Row(
                f"CKA 28 × 12 layers, 4,096 rows, {one['form']}, against a loop over pairs ({loop})",
                f"{one['ratio']:.1f}× faster ({one['seconds']:.2f} s), largest difference {one['max_difference']:.0e}",
                "≥ 20×, ≤ 1e-6" if barred else "–",
                one["ratio"] >= 20 and one["max_difference"] <= 1e-6 if barred else None,
            )
        )
    return rows


def bootstrap(repeats: int) -> list[Row]:
    """13 arms × 10 seeds × 1,319 items, 10,000 resamples."""
    differences = np.random.default_rng(0).normal(size=(13, 10, 1319))
    seconds = median(lambda: Bootstrap(differences, n_resamples=10_000).p(), repeats)
    return [
        Row(
            "crossed bootstrap, 13 × 10 × 1,319, 10,000 resamples",
            f"{seconds:.1f} s on 1 core",
            "≤ 10 s",
            seconds <= 10,
        )
    ]


def alignment(work: Inputs, step_seconds: float, step_tokens: float, repeats: int) -> list[Row]:
    """Token alignment of one long text, student and teacher `math`: growth with length, and share of a step."""
    student, teacher = work.student_tokenizer, load_tokenizer(work.paths.model("math"))
    text = "".join(render(r, work.config.data.template).text for r in work.records("train"))

    def cut(tokens: int) -> str:
        stop = int(encode(student, text).spans[tokens - 1, 1])
        return text.encode()[:stop].decode(errors="ignore")

    def matrix(src: Tensor, dst: Tensor) -> Tensor:
        return gather_form(overlap(src, dst, "iou"))[1]

    per_token, overlaps = {}, {}
    for size in (SHORT, LONG):
        part = cut(size)
        src, dst = (encode(t, part).spans for t in (teacher, student))
        encoding = median(lambda p=part: (encode(teacher, p), encode(student, p)), repeats)
        overlaps[size] = median(lambda s=src, d=dst: matrix(s, d), repeats)
        per_token[size] = (encoding + overlaps[size]) / len(dst)
    growth = per_token[LONG] / per_token[SHORT]
    step = step_seconds / step_tokens * LONG
    share, both = overlaps[LONG] / step, per_token[LONG] * LONG / step
    examples = len(work.student_encoding("train").lengths)
    passes = work.config.train.steps * work.config.train.batch_size / examples
    return [
        Row(
            f"token alignment, {LONG:,} student tokens: time per token against {SHORT:,}",
            f"{growth:.2f}× ({per_token[LONG] * LONG * 1e3:.0f} ms, of which overlap {overlaps[LONG] * 1e3:.0f} ms)",
            "linear (≤ 1.25×)",
            growth <= 1.25,
        ),
        Row(
            f"… overlap matrix of {LONG:,} tokens against control's step of the embedded student, scaled to as many tokens",
            f"{share:.2%}",
            "≤ 1%",
            share <= 0.01,
        ),
        Row(
            "… with both tokenizers run as well, which is done once per cell, against the cell's whole training: the "
            "student of 0.2 million parameters is the cheapest there is",
            f"{both / passes:.2%} ({passes:.1f} passes over the data; {both:.1%} of one pass)",
            "≤ 1%",
            both / passes <= 0.01,
        ),
    ]


# ---------------------------------------------------------------------------------------------- table


def render_table(rows: list[Row], note: str) -> str:
    """docs/benchmarks.md."""
    marks = {True: "yes", False: "**no**", None: "–"}
    provenance = describe()
    lines = "".join(f"| {r.what} | {r.measured} | {r.bar} | {marks[r.met]} |\n" for r in rows)
    return (
        "# Benchmarks\n\n"
        "Written by `make bench` (`tools/benchmarks/run.py`, which says what each line compares). Medians over repeats; "
        "ratios of things timed in turn in one process on the same inputs; processor time, one thread.\n\n"
        f"Machine: {processor()}, {os.cpu_count()} cores, {platform.system()}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; commit "
        f"{str(provenance['git_commit'])[:12]}.{' ' + note if note else ''}\n\n"
        f"| what | measured | bar | met |\n| --- | --- | --- | --- |\n{lines}\n"
        f"{NOTES}\n{section()}"
        "Measured elsewhere: the whole experiment's time and its effect sizes in the report (`make report`), "
        "architectures, rotary embeddings and tokenizers in [compatibility](method/compatibility.md) (`make compat`), "
        "coverage of the intervals by `make validate-stats`, interrupted runs by `make torture` ([log](log/README.md)).\n"
    )


def processor() -> str:
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    """Runs everything in turn, printing each line as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help="a results folder; what is missing there is made")
    parser.add_argument("--quick", action="store_true", help="few repeats, print only")
    parser.add_argument("--note", default="", help="a remark on the machine for the document")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    resolve_device("cpu")  # as the steps do first
    os.chdir(ROOT)  # the configuration's paths are relative to it
    with tempfile.TemporaryDirectory() as temporary:
        work = Inputs(load(CONFIG), Paths(arguments.results or Path(temporary)))
        rows: list[Row] = []

        def show(more: list[Row]) -> None:
            rows.extend(more)
            for row in more:
                print(f"{row.what}: {row.measured} (bar {row.bar})", flush=True)

        repeats, block = (2, 5) if arguments.quick else (7, BLOCK)
        for arm in ("control", "full"):
            prepare(work, arm)
        training, seconds, tokens = full_against_control(work, repeats, block)
        show(training)
        show(against_logits(work, repeats, block))
        show(at_smollm2_size(Path(temporary) / "smollm2", min(repeats, 5)))
        show(against_trainer(work, "the embedded experiment", repeats, block))
        show(against_trainer(mixed_lengths(Path(temporary) / "mixed"), "mixed length", repeats, block))
        show(recorder_overhead(work, repeats, block))
        show(losses_in_pieces(repeats))
        show(pass_against_decoder(None, min(repeats, 3), 4000))
        show(memory(None, (1500, 4500, 9000)))
        show(alignment(work, seconds, tokens, repeats))
        show(bootstrap(repeats))
        show(cka(1 if arguments.quick else 3))
        if not arguments.quick:
            (ROOT / "docs" / "benchmarks.md").write_text(render_table(rows, arguments.note), encoding="utf-8")


if __name__ == "__main__":
    main()
