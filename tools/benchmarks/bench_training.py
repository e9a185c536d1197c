"""Training steps: `full` against `control` and a plain logit loop, control against `Trainer`, the recorder (spec 9).

Parts of `run.py`. By itself, `bench_training.py RESULTS ARM STEPS` prints the peak memory of a fresh process that takes some
steps of an arm: with its setup, and of the steps alone.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.state import AcceleratorState
from measure import Row, high_water, spent
from sized import SMOLLM2, Cell, Sizes, made, measured
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from kvpipe.cache.capture import Recorder
from kvpipe.config import load
from kvpipe.data.corpus import generate
from kvpipe.experiment.files import GB
from kvpipe.experiment.paths import SPLITS, Paths
from kvpipe.experiment.sizes import cpu_has_bf16
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.train import prepare

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config" / "config.yaml"


def full_against_control(work: Inputs, repeats: int, block: int) -> tuple[list[Row], float, float]:
    """Rows, and control's seconds and tokens per step."""
    cells = {arm: Cell(work, arm) for arm in ("control", "full")}
    times = in_turn(cells, repeats, block)
    memory = {arm: memory_of(work, arm, 2 * block) for arm in cells}
    (control_all, control_steps), (full_all, full_steps) = memory["control"], memory["full"]
    rows = [
        compared("`full` training step, stored KV, against `control`: time", times, "full", "control", 1.20),
        Row(
            "… peak resident memory while it trains (the process: Python and torch are some 470 MiB of it)",
            f"{full_steps / control_steps:.2f}× ({full_steps / 2**20:,.0f} MiB against {control_steps / 2**20:,.0f} MiB)",
            "≤ 1.15×",
            full_steps <= 1.15 * control_steps,
        ),
        Row(
            "… the same with the setup before the first step, where targets are projected",
            f"{full_all / control_all:.2f}× ({full_all / 2**20:,.0f} MiB against {control_all / 2**20:,.0f} MiB)",
        ),
    ]
    return rows, statistics.median(times["control"]), cells["control"].tokens[1] / cells["control"].step


class LogitLoop:
    """What one would write without kvpipe: a teacher with the student's tokenizer reads every batch too, and the student
    matches all of its next tokens beside the text's."""

    def __init__(self, student: nn.Module, teacher: nn.Module, ids: Tensor, bf16: bool):
        self.student, self.teacher, self.ids, self.bf16 = student.train(), teacher.eval(), ids, bf16
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)

    def steps(self, number: int) -> None:
        """Takes the next steps."""
        torch.use_deterministic_algorithms(False)
        for _ in range(number):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                with torch.no_grad():
                    theirs = self.teacher(input_ids=self.ids, use_cache=False).logits.float().log_softmax(-1)
                found = self.student(input_ids=self.ids, labels=self.ids, use_cache=False)
            ours = found.logits.float().log_softmax(-1)
            divergence = F.kl_div(ours, theirs, log_target=True, reduction="sum") / self.ids.numel()
            (found.loss + divergence).backward()
            nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


def in_turn(loops: dict[str, Any], repeats: int, block: int) -> dict[str, list[float]]:
    """Seconds a step of each, measured one after the other, so often."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop.steps(block)  # warm-up
    for _ in range(repeats):
        for name, loop in loops.items():
            times[name].append(spent(lambda x=loop: x.steps(block)) / block)
    return times


def compared(what: str, times: dict[str, list[float]], one: str, other: str, bar: float | None = None) -> Row:
    """A row of two loops' steps."""
    ratio = statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))
    ours, theirs = (statistics.median(times[name]) * 1e3 for name in (one, other))
    said = f"{ratio:.2f}× ({ours:,.0f} ms against {theirs:,.0f} ms)"
    return Row(what, said, f"≤ {bar:.2f}×" if bar else "–", ratio <= bar if bar else None)


def against_logits(work: Inputs, repeats: int, block: int) -> list[Row]:
    """`full` with two stored teachers against a plain loop with one live teacher, of the size of `code`."""
    lengths, student = work.student_encoding("train").lengths, work.student(0)
    size = AutoConfig.from_pretrained(work.paths.model("code"), vocab_size=student.config.vocab_size)
    ids = torch.randint(3, size.vocab_size, (work.config.train.batch_size, round(float(lengths.mean()))))
    loop = LogitLoop(student, AutoModelForCausalLM.from_config(size), ids, bf16=False)
    times = in_turn({"full": Cell(work, "full"), "logits": loop}, repeats, block)
    what = "`full` training step, two stored teachers, against a plain loop with the logits of one live teacher: time"
    return [compared(what, times, "full", "logits")]


def at_smollm2_size(root: Path, repeats: int) -> list[Row]:
    """Half of SmolLM2-135M's layers learn the stored keys and values of the whole, in batches of 8 × 144 tokens."""
    arm = {"base": "control", "role": "experiment", "set": {"teachers": ["t0"], "loss": {"keys": {}, "values": {}}}}
    half = {**SMOLLM2, "num_hidden_layers": SMOLLM2["num_hidden_layers"] // 2}
    work = made(root, Sizes(half, [SMOLLM2], texts=80, arms={"matched": arm}))
    for name in ("control", "matched"):
        prepare(work, name, log=lambda _: None)
    teacher, ids = AutoModelForCausalLM.from_pretrained(root / "t0"), torch.randint(3, 250, (8, 144))
    loop = LogitLoop(work.student(0), teacher.float(), ids, bf16=cpu_has_bf16())
    AcceleratorState._reset_state(reset_partial_state=True)  # these cells have a precision of their own
    cells = {name: Cell(work, name) for name in ("control", "matched")}
    times = in_turn({**cells, "logits": loop}, repeats, 1)
    AcceleratorState._reset_state(reset_partial_state=True)
    memory = {name: measured(root, name, 2)["peak"] for name in cells}
    of = "training step at SmolLM2's size, stored keys and values,"
    return [
        compared(f"{of} against `control`: time", times, "matched", "control", 1.10),
        Row(
            "… peak resident memory while it trains",
            f"{memory['matched'] / memory['control']:.2f}× ({memory['matched'] / GB:.2f} GB against "
            f"{memory['control'] / GB:.2f} GB)",
            "≤ 1.15×",
            memory["matched"] <= 1.15 * memory["control"],
        ),
        compared(f"{of} against a plain loop with the logits of the live teacher: time", times, "matched", "logits"),
    ]


def print_memory(work: Inputs, arm: str, steps: int) -> None:
    """Peak resident bytes of this process with its setup, and of the steps alone where the system can tell."""
    cell = Cell(work, arm)
    cell.steps(5)
    setup, reset = high_water(), Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    cell.steps(steps)
    print(max(setup, high_water()), high_water())


def memory_of(work: Inputs, arm: str, steps: int) -> tuple[int, int]:
    """`print_memory` of a fresh process."""
    command = [sys.executable, __file__, str(work.paths.root), arm, str(steps)]
    last = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    whole, steps_alone = map(int, last.split())
    return whole, steps_alone


def mixed_lengths(root: Path) -> Inputs:
    """Control's experiment on problems of 1 to 6 operations, so that texts differ in length as those of GSM8K do."""
    files = {split: str(root / f"{split}.jsonl") for split in SPLITS}
    source = {"kind": "files", "task": "math", **files}
    alone = ["arms={control: {role: control}}", "stats={}", f"data.sources={json.dumps([source])}"]
    work = Inputs(load(CONFIG, alone), Paths(root / "results"))
    root.mkdir(parents=True)
    for split, count in zip(SPLITS, (300, 10, 10), strict=True):
        records = [r for difficulty in range(1, 7) for r in generate("math", split, count, difficulty, 0)]
        lines = [{"prompt": r.prompt, "reasoning": r.reasoning, "answer": r.answer} for r in records]
        Path(files[split]).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    prepare(work, "control", log=lambda _: None)
    return work


def against_trainer(work: Inputs, texts: str, repeats: int, block: int) -> list[Row]:
    """Control's loop against the Trainer of transformers: same student, examples, batch size and optimizer.

    The Trainer logs, saves and evaluates nothing meanwhile; control's own loop logs as in a run.
    """
    ours: list[tuple[float, float]] = []
    theirs: dict[str, list[tuple[float, float]]] = {"random": [], "group_by_length": []}
    cell = Cell(work, "control")
    cell.steps(block)
    for _ in range(repeats):
        before = cell.tokens
        seconds = spent(lambda: cell.steps(block))
        ours.append(((cell.tokens[1] - before[1]) / seconds, (cell.tokens[0] - before[0]) / seconds))
        for sampling, rates in theirs.items():
            rates.append(trainer_rates(work, sampling, block))
    lengths = work.student_encoding("train").lengths
    rows = [Row(f"texts of {texts}: tokens, mean ± deviation", f"{lengths.mean():.0f} ± {lengths.std():.0f}")]
    for sampling, rates in theirs.items():
        name = "its default random order" if sampling == "random" else "its `group_by_length`"
        for axis, tokens, bar in ((0, "all tokens", 1.0), (1, "useful (non-padding) tokens", 1.3)):
            ratio = statistics.median(a[axis] / b[axis] for a, b in zip(ours, rates, strict=True))
            barred = sampling == "random"
            rows.append(
                Row(
                    f"control against `Trainer` with {name}, texts of {texts}: {tokens} per second",
                    f"{ratio:.2f}× ({statistics.median(a[axis] for a in ours):,.0f} against "
                    f"{statistics.median(b[axis] for b in rates):,.0f})",
                    f"≥ {bar}×" if barred else "–",
                    ratio >= bar if barred else None,
                )
            )
    return rows


def trainer_rates(work: Inputs, sampling: str, steps: int) -> tuple[float, float]:
    """All and useful tokens per second of `Trainer`, without its first steps."""
    torch.use_deterministic_algorithms(False)
    config, encoding, skipped = work.config.train, work.student_encoding("train"), 5
    examples = [{"input_ids": encoding.ids[encoding.rows(i)].tolist()} for i in range(len(encoding.lengths))]
    ends: list[float] = []
    seen: list[tuple[int, int]] = []
    pad = transformers.DataCollatorForLanguageModeling(work.student_tokenizer, mlm=False)

    def collate(batch: list[dict]) -> dict[str, Tensor]:
        padded = pad(batch)
        seen.append((padded["input_ids"].numel(), int(padded["attention_mask"].sum())))
        return padded

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_args, **_kwargs) -> None:
            ends.append(time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=steps + skipped, per_device_train_batch_size=config.batch_size, use_cpu=True,
            learning_rate=config.learning_rate, lr_scheduler_type="cosine", weight_decay=config.weight_decay,
            adam_beta2=0.99, optim="adamw_torch_fused", max_grad_norm=config.max_grad_norm, report_to=[], seed=0,
            save_strategy="no", logging_strategy="no", disable_tqdm=True, train_sampling_strategy=sampling,
        )  # fmt: skip
        trainer = transformers.Trainer(
            work.student(0).train(), arguments, train_dataset=examples, data_collator=collate, callbacks=[Clock()]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    counted = np.array(seen[skipped : skipped + steps]).sum(0) / (ends[-1] - ends[skipped - 1])
    return float(counted[0]), float(counted[1])


def recorder_overhead(work: Inputs, repeats: int, block: int) -> list[Row]:
    """The student's forward and backward with and without a recorder that gives its cache to a loss."""
    model = work.student(0).train()
    ids = torch.randint(3, model.config.vocab_size, (work.config.train.batch_size, 96))

    def plain() -> None:
        for _ in range(block):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def recorded() -> None:
        with Recorder(model) as recorder:
            for _ in range(block):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                kv = recorder.kv()
                (loss + kv.keys.mean() + kv.values.mean()).backward()

    plain()
    ratio = statistics.median(spent(recorded) / spent(plain) for _ in range(repeats))
    return [Row("student's forward and backward, recorded against plain", f"{ratio:.2f}×")]


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(ROOT)  # the configuration's paths are relative to it
    print_memory(Inputs(load(CONFIG), Paths(Path(sys.argv[1]))), sys.argv[2], int(sys.argv[3]))
