"""Train step: one cell, in its folder."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError

from kvpipe.config import Arm
from kvpipe.data.batches import collate, spread
from kvpipe.distill.closed_form import START_EXAMPLES, start_from
from kvpipe.distill.objective import Objective
from kvpipe.experiment import attempts
from kvpipe.experiment.device import resolve_device, resolve_precision
from kvpipe.experiment.files import alone, content_digest, write_json, write_text
from kvpipe.experiment.launch import group_size
from kvpipe.experiment.outofmemory import explained
from kvpipe.experiment.paths import COST, HISTORY, STUDENT
from kvpipe.experiment.plan import digest
from kvpipe.experiment.provenance import describe
from kvpipe.models.folders import manifest_hash
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.make import make
from kvpipe.steps.objective import load_objective, load_on_policy
from kvpipe.train.card import write_card
from kvpipe.train.cell import Cell, budget, freeze
from kvpipe.train.export import export
from kvpipe.train.lora import adapted, check_lora
from kvpipe.train.trainer import Trained, check_settings, forget_peak, peak_memory, set_up, stoppable, train


def make_cell(
    inputs: Inputs,
    arm: str,
    seed: int,
    out: Path | None = None,
    checkpoints: Path | None = None,
    made: bool = False,
    log=print,
) -> None:
    """Train one cell, and first make what it reads where that is missing or stale.

    Args:
        inputs: the loaders.
        arm: the arm's name.
        seed: of the cell.
        out: the cell's folder; the results' own by default.
        checkpoints: their folder; by default beside `out`, or the results' own.
        made: all that the cell reads is there; nothing is looked at.
        log: takes lines for people.
    """
    check_settings(inputs.config.train, log=lambda *_: None)  # its notes come when the cell begins
    if not made:
        prepare(inputs, arm, log)
    folder = out or inputs.paths.cell(arm, seed)
    if checkpoints is None:
        checkpoints = folder.with_name(f"{folder.name}.checkpoints") if out else inputs.paths.checkpoints(arm, seed)
    train_cell(inputs, arm, seed, folder, checkpoints, log)


def prepare(inputs: Inputs, arm: str, log=print) -> None:
    """Make what the cells of an arm read, where it is missing or stale; settings are checked before any teacher reads.

    Raises:
        ConfigError: the arm asks for what its models do not have.
    """
    config = inputs.config
    needs = inputs.steps["train"].needs(arm=arm, seed="0")
    texts = [path for name in ("data", "model", "encode") for path in inputs.steps[name].files()]
    make(inputs, [path for path in needs if path in texts], log)
    inputs.check([arm])
    if config.train.lora is not None:
        check_lora(config.train.lora, inputs.model_config(config.student), config.trusts(config.student))
    make(inputs, needs, log)


def train_cell(inputs: Inputs, arm: str, seed: int, out: Path, checkpoints: Path, log=print) -> None:
    """Train one cell and write `model/`, `history.jsonl` and `cost.json` into its folder.

    Args:
        inputs: the loaders; all that the cell reads is there.
        arm: the arm's name.
        seed: decides weights and data order, the same for every arm.
        out: the cell's folder.
        checkpoints: their folder, which goes when the cell is done.
        log: takes lines for people.

    Raises:
        OSError: the cell could not be written; its checkpoints stay. Or another process is training it.
        SavedStudentDiffers: the folder scores otherwise than the model in memory; the checkpoints stay.
        Interrupted: by SIGTERM, SIGUSR1 or SIGINT; what is done is saved.
        And what `kvpipe.train.trainer.train` raises.
    """
    busy = f"another process is training {arm}, seed {seed}"
    first = os.environ.get("RANK") in (None, "", "0")
    held = checkpoints.with_name(f"{checkpoints.name}.lock")
    with alone(held, busy) if first else nullcontext():
        _train_cell(inputs, arm, seed, out, checkpoints, log)
        if first:
            held.unlink(missing_ok=True)


def _train_cell(inputs: Inputs, arm: str, seed: int, out: Path, checkpoints: Path, log) -> None:
    attempt = attempts.Attempt(checkpoints, resolve_device(inputs.config.train.device), group_size(os.environ))
    forget_peak(torch.device(resolve_device(inputs.config.train.device)))
    with stoppable(log) as stop:
        cell = load_cell(inputs, arm, seed, log)
        trained = train(cell, checkpoints, attempt, stop, log)
    if trained.main:
        try:
            write_cell(inputs, cell, trained, seed, attempt, out, log)
        except BrokenPipeError:  # of the terminal, not of the disk
            raise
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"{out} could not be written: {error}. Free some space and run the same command again: it goes on from "
                f"the last checkpoint in {checkpoints}"
            ) from error
    trained.wait()
    if trained.main:
        shutil.rmtree(checkpoints, ignore_errors=True)
        attempt.file.unlink(missing_ok=True)


def load_cell(inputs: Inputs, arm_name: str, seed: int, log=print) -> Cell:
    """All that the training of a cell reads."""
    config = inputs.config
    arm = inputs.dag.arm(arm_name)
    training, drawn = budget(config.train, arm), seed + arm.seed_offset
    precision = resolve_precision(training.precision, resolve_device(training.device))
    training = training.model_copy(update={"precision": precision})
    set_up(training)
    check_settings(training, log)
    inputs.check([arm_name])
    encoding = inputs.student_encoding("train", arm)
    torch.manual_seed(drawn)  # maps of terms are drawn
    objective = load_objective(inputs, arm, drawn)
    torch.manual_seed(drawn)  # adapters are
    student = inputs.student(drawn, arm.init).train()
    if arm.init == "fit":
        _start(inputs, arm, student, objective)
    if training.lora is not None:
        student = adapted(student, training.lora)
    freeze(student, training.frozen)
    if training.gradient_checkpointing:
        student.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        student.enable_input_require_grads()
    return Cell(
        name=arm_name,
        arm=arm,
        drawn=drawn,
        config=training,
        scoring=config.evaluate,
        student=student,
        objective=objective,
        online=load_on_policy(inputs, arm, objective, drawn),
        train=encoding,
        validation=inputs.student_encoding("validation", arm),
        pad_id=inputs.student_tokenizer.pad_token_id,
        examples=inputs.training_examples(arm),
        made_from={
            "arm": arm_name,
            "seed": seed,
            "precision": precision,
            "depends": inputs.steps["train"].settings(arm=arm_name),
            "data": digest(encoding.ids.tolist(), 16),
            "inputs": _digests(inputs, arm_name),
        },
        seed=seed,
        trackers=inputs.paths.trackers,
    )


def _start(inputs: Inputs, arm: Arm, student, objective: Objective) -> None:
    """Key and value projections in closed form, from some of the texts that the cell trains on."""
    examples = inputs.training_examples(arm)
    examples = examples[spread(len(examples), START_EXAMPLES)]
    batch = collate(inputs.student_encoding("train", arm), examples, inputs.student_tokenizer.pad_token_id)
    start_from(student, batch, objective.resolve(batch, objective.read(batch)).target)


def _digests(inputs: Inputs, arm_name: str) -> dict[str, str]:
    """Of the models and projectors that the cell reads: the configuration only says where they are."""
    paths, dag, arm = inputs.paths, inputs.dag, inputs.dag.arm(arm_name)
    found = {name: manifest_hash(paths.model(name)) for name in (inputs.config.student, *arm.teachers)}
    return found | ({"projector": content_digest(paths.projector(dag.fit_id(arm)))} if dag.needs_fit(arm) else {})


def write_cell(
    inputs: Inputs, cell: Cell, trained: Trained, seed: int, attempt: attempts.Attempt, out: Path, log=print
) -> None:
    """Write a trained cell: its student, its history, what it cost and came from, its card."""
    out.mkdir(parents=True, exist_ok=True)
    config, student = inputs.config, inputs.config.student
    with explained("scoring the saved student", config.evaluate):
        saved = export(
            cell,
            trained.model,
            inputs.paths.model(student),
            out / STUDENT,
            inputs.records("validation", cell.arm.reading),
            config.data.template,
            config.trusts(student),
            log,
        )
    lines = "".join(json.dumps(line) + "\n" for line in trained.history)
    write_text(out / HISTORY, lines)
    counters = trained.counters
    attempt.note(peak_memory(trained.device))
    spent = attempts.total(attempt.file) or {"peak_memory_bytes": peak_memory(trained.device)}
    cost = {
        "train_seconds": counters.seconds,
        **spent,
        "steps": cell.config.steps,
        "tokens": counters.tokens,
        "padding_share": 1 - counters.tokens / max(1, counters.padded_tokens),
        "restarts": counters.restarts,
        "processes": trained.processes,
        **({} if trained.router is None else {"router": trained.router}),
        "precision": cell.config.precision,
        "model": saved,
        "settings": inputs.steps["train"].depends(arm=cell.name),
        "provenance": describe(
            arm=cell.name, seed=seed, config_hash=digest(config.model_dump(), 16), device=str(trained.device)
        ),
    }
    write_json(out / COST, cost)
    write_card(inputs.dag, inputs.paths, cell.name, out)
