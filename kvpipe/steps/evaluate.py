"""Evaluate steps: scores of a model folder, of the untrained student, and of lm-evaluation-harness."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

from kvpipe.evaluate import dialogue, harness, score
from kvpipe.experiment import device
from kvpipe.experiment.files import replacing, write_json
from kvpipe.experiment.outofmemory import explained
from kvpipe.models.folders import load_model, load_tokenizer
from kvpipe.stats.scores import CELL, cell_of
from kvpipe.steps.inputs import Inputs, trusts_folder
from kvpipe.steps.swap import swapped_nll


def score_folder(inputs: Inputs, folder: Path, split: str, out: Path) -> str:
    """Score a model folder on a split, one row per item; returns the line that says how it did."""
    config, cell = inputs.config, cell_of(folder)
    arm = inputs.dag.arms.get(cell["arm"]) if cell else None
    records = inputs.records(split, "student" if arm is None else arm.reading)
    trust = trusts_folder(config, inputs.paths, folder)
    torch.set_num_threads(config.train.threads)
    with explained("scoring", config.evaluate):
        table = score.evaluate(
            folder,
            records,
            config.data.template,
            config.evaluate,
            device.resolve_device(config.train.device),
            trust=trust,
            context=config.data.context,
        )
    if config.evaluate.cache_swap is not None and cell is not None:
        student = load_model(folder, device=device.resolve_device(config.train.device), trust=trust)
        table = table.assign(**swapped_nll(inputs, config.evaluate.cache_swap, student, records))
    _write(table, cell, out)
    bits, judged = table.nll.sum() / math.log(2) / table.bytes.sum(), table.correct.dropna()
    right = f", {judged.astype(float).mean():.1%} of {len(judged)} answers right" if len(judged) else ""
    return f"{split}: {len(table)} items, {bits:.4f} bits per byte of reasoning and answer{right}"


def score_untrained(inputs: Inputs, out: Path) -> None:
    """Score the student before training (first seed) on the test split."""
    config = inputs.config
    torch.set_num_threads(config.train.threads)
    student = inputs.student(config.seeds[0]).to(device.resolve_device(config.train.device)).eval()
    with explained("scoring", config.evaluate):
        table = score.evaluate_model(
            student,
            inputs.student_tokenizer,
            inputs.records("test"),
            config.data.template,
            config.evaluate,
            context=config.data.context,
        )
    _write(table, None, out)


def answer_questions(inputs: Inputs, folder: Path, questions: Path, out: Path) -> str:
    """Write a model folder's answers to questions of several turns; returns the line that says so."""
    config, trust = inputs.config, trusts_folder(inputs.config, inputs.paths, folder)
    asked = dialogue.read_questions(questions)
    torch.set_num_threads(config.train.threads)
    model = load_model(folder, device=device.resolve_device(config.train.device), trust=trust).eval()
    with explained("answering", config.evaluate):
        said = dialogue.answered(
            model, load_tokenizer(folder, trust), asked, config.evaluate.of(""), config.evaluate.batch_size
        )
    dialogue.write_answers(asked, said, out)
    return f"{out}: {len(asked)} questions, {sum(map(len, said))} turns answered"


def score_tasks(inputs: Inputs, folder: Path, out: Path) -> Iterator[str]:
    """Score a model folder with lm-evaluation-harness; a line for each task."""
    config = inputs.config
    torch.set_num_threads(config.train.threads)
    trust = trusts_folder(config, inputs.paths, folder)
    result = harness.run_tasks(folder, config.evaluate, device.resolve_device(config.train.device), trust)
    write_json(out, result, indent=1, default=str)
    for task, found in result["tasks"].items():
        yield f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in found["metrics"].items())


def _write(table: pd.DataFrame, cell: dict | None, out: Path) -> None:
    table.attrs[CELL] = cell
    with replacing(out) as partial:
        table.to_parquet(partial, index=False)
