"""TRL's GKDTrainer in the place of kvpipe's loop: cells of an outside tool on the same texts, kept as any other.

python tools/outside.py --kept docs/real/cells/a --config config/real/local.yaml --config config/real/a.yaml \\
    --config config/real/outside.yaml --arm gkd --seed 0

Student, texts and their order, optimizer and schedule are those of the arm's own cell. Loss, the teacher's forward and the
loop are TRL's (https://arxiv.org/abs/2306.13649), on the given texts alone (lmbda 0: it writes none).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM
from trl.experimental.gkd import GKDConfig, GKDTrainer

from kvpipe.config import load
from kvpipe.data.batches import collate
from kvpipe.experiment.attempts import Attempt
from kvpipe.experiment.paths import Paths
from kvpipe.steps.cells import KeptCells, keep_cell
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.train import load_cell, prepare, write_cell
from kvpipe.train.trainer import Loop, Trained, learning_rate

BETA = {"gkd": 0.5, "gkd-forward": 0.0}
"""Arm → where the divergence lies between KL(teacher ‖ student), 0, and KL(student ‖ teacher), 1; TRL's default is 0.5."""
PARTS = 2
"""Parts of a batch, whose mean losses are averaged: TRL holds a part's logits several times over, 20.6 GB with two."""


class InOrder(GKDTrainer):
    """TRL's trainer, given the rows in their order."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def train(inputs: Inputs, arm: str, seed: int, log=print) -> None:
    """Train a cell of the arm with TRL and write it where kvpipe would have."""
    prepare(inputs, arm, log)
    cell = load_cell(inputs, arm, seed, log)
    attempt = Attempt(inputs.paths.checkpoints(arm, seed), "cpu", 1)
    loop = Loop(cell, inputs.paths.checkpoints(arm, seed), attempt, log)
    loop.evaluate(0)
    (name,) = cell.arm.teachers
    teacher = AutoModelForCausalLM.from_pretrained(inputs.paths.model(name), dtype=cell.student.dtype)
    config = cell.config
    if config.batch_size % PARTS:
        raise ValueError(f"train.batch_size: {config.batch_size} does not divide into {PARTS} parts; give a multiple")
    args = GKDConfig(
        str(inputs.paths.root / "trl"), lmbda=0.0, beta=BETA[arm], max_steps=config.steps, seed=cell.drawn,
        per_device_train_batch_size=config.batch_size // PARTS, gradient_accumulation_steps=PARTS,
        max_grad_norm=config.max_grad_norm, bf16=config.precision == "bf16",
        logging_steps=config.log_every, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        activation_checkpointing=False,
    )  # fmt: skip

    def batched(rows: list[dict[str, int]]) -> dict[str, Any]:
        batch = collate(cell.train, np.array([row["example"] for row in rows]), cell.pad_id, config.loss_on)
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}

    optimizer = loop.create_optimizer()
    for group in optimizer.param_groups:
        group["lr"] = group["peak"]
    trainer = InOrder(
        cell.student, teacher, args, batched, Dataset.from_dict({"example": np.concatenate(loop.batches)}),
        processing_class=inputs.student_tokenizer,
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: learning_rate(config, step))),
    )  # fmt: skip
    begun = time.perf_counter()
    trainer.train()
    loop.counters.seconds = time.perf_counter() - begun
    lengths = [cell.train.lengths[batch] for batch in loop.batches]
    tokens = np.cumsum([of_batch.sum() for of_batch in lengths])
    loop.counters.tokens = int(tokens[-1])
    loop.counters.padded_tokens = sum(len(of_batch) * int(of_batch.max()) for of_batch in lengths)
    for line in trainer.state.log_history:
        if "loss" in line:
            step = int(line["step"])
            said = {"step": step, "tokens": int(tokens[step - 1]), arm: line["loss"], "grad_norm": line["grad_norm"]}
            loop.history.append(said | {"learning_rate": line["learning_rate"]})
    loop.evaluate(config.steps)
    trained = Trained(
        model=loop.trained(), history=loop.history, counters=loop.counters, router=None, device=loop.accelerator.device,
        processes=1, main=True, wait=loop.accelerator.wait_for_everyone,
    )  # fmt: skip
    write_cell(inputs, cell, trained, seed, attempt, inputs.paths.cell(arm, seed), log)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, action="append", required=True)
    parser.add_argument("--results", type=Path, default=Path("build/real/a"))
    parser.add_argument("--kept", type=Path, required=True)
    parser.add_argument("--arm", choices=sorted(BETA), default="gkd")
    parser.add_argument("--seed", type=int, action="append", required=True)
    parser.add_argument("--no-scored", dest="scored", action="store_false", help="leave it at validation losses")
    given = parser.parse_args()
    inputs = Inputs(load(given.config), Paths(given.results))
    kept = KeptCells(inputs, given.kept)
    for seed in given.seed:
        if kept.differs(given.arm, seed) != []:
            train(inputs, given.arm, seed)
            keep_cell(kept, given.arm, seed, given.scored)


if __name__ == "__main__":
    main()
