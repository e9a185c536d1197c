"""A small copy of the experiment: training texts of all lengths, some batches of them; models, splits and tokens are its own."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvpipe.config import Config
from kvpipe.data.batches import spread
from kvpipe.data.records import read_as, read_records, write_records
from kvpipe.doctor.workload import Workload
from kvpipe.experiment.paths import SPLITS, Paths
from kvpipe.experiment.plan import Dag
from kvpipe.experiment.steps import in_order, table
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.make import make

VALIDATION, TEST = 16, 16
"""Texts of the copy: validation, items that are scored."""


class Size(NamedTuple):
    """How much there is to read, of the experiment or of its copy."""

    records: dict[str, int]
    """Of each split."""
    tokens: dict[tuple[str, str], int]
    """(Model, reading) → tokens of the training split."""


def smaller(config: Config) -> Config:
    """The copy's configuration: one shard, few texts of what reads a number of them."""
    mapped = {"examples": min(config.layer_map.examples, VALIDATION), "warmup_steps": 0}
    return config.model_copy(
        update={
            "store": config.store.model_copy(update={"shards": 1}),
            "layer_map": config.layer_map.model_copy(update=mapped),
            "teacher_text": config.teacher_text.model_copy(update={"tries": 1}),
        }
    )


def make_copy(config: Config, paths: Paths, copied: Paths, batches: int) -> tuple[Size, Size]:
    """Make what the experiment's texts and tokens are, and the copy's models and splits; how large both are.

    Training texts are those of all lengths, the longest among them: by length as batches are.
    """
    inputs = Inputs(config, paths)
    steps = inputs.steps
    encodings = [job for job in steps["encode"].jobs() if job["reading"] != "written"]
    files = [*steps["data"].files(), *steps["model"].files()]
    files += [path for job in encodings for path in steps["encode"].makes(**job).values()]
    make(inputs, files, log=lambda *_: None)
    copied.root.mkdir(parents=True)
    models = copied.model(config.student).parent
    models.symlink_to(paths.model(config.student).parent.resolve())
    lengths = inputs.student_encoding("train").lengths
    order = np.argsort(lengths, kind="stable")
    kept = {
        "train": np.sort(order[spread(len(order), batches * config.train.batch_size)]),
        "validation": spread(len(inputs.records("validation")), VALIDATION),
        "test": spread(len(inputs.records("test")), TEST),
    }
    for split in SPLITS:
        records = inputs.records(split)
        copied.data(split).parent.mkdir(parents=True, exist_ok=True)
        write_records(copied.data(split), [records[i] for i in kept[split]])
    for teacher in {job["teacher"] for job in steps["teacher_text"].jobs()}:
        copied.teacher_text(teacher).parent.mkdir(parents=True, exist_ok=True)
        write_records(copied.teacher_text(teacher), _stand_in(read_records(copied.data("train"))))
    work = Workload(config, paths)
    tokens = {(job["model"], job["reading"]): inputs.encoding(**job, split="train").lengths for job in encodings}
    whole = {pair: int(found.sum()) for pair, found in tokens.items()}
    small = {pair: int(found[kept["train"]].sum()) for pair, found in tokens.items()}
    for job in steps["encode"].jobs():
        if job["reading"] == "written":  # what is not written yet is as long as the records' own
            whole[job["model"], "written"] = work.tokens(job["model"], "written")
            small[job["model"], "written"] = round(
                whole[job["model"], "written"] * len(kept["train"]) / max(1, len(lengths))
            )
    records_of = {split: len(inputs.records(split)) for split in SPLITS}
    return Size(records_of, whole), Size({split: len(kept[split]) for split in SPLITS}, small)


def _stand_in(records: list) -> list:
    """Records with the reasoning that a teacher would read, where it has written none yet."""
    return [read_as([record], "own" if record.teacher_reasoning else "student")[0] for record in records]


class Copied:
    """What of the copy is measured.

    Args:
        config: the copy's.
        paths: the copy's.
        arms: that are measured.
    """

    def __init__(self, config: Config, paths: Paths, arms: list[str]):
        self.dag = Dag(config)
        self.steps = table(self.dag, paths)
        self.arms = arms
        given = {paths.manifest(name) for name in config.models} | {paths.data(split) for split in SPLITS}
        given |= {paths.teacher_text(job["teacher"]) for job in self.steps["teacher_text"].jobs()}
        needs = [need for arm in arms for need in self.steps["train"].needs(arm=arm, seed="0")]
        self.jobs = in_order(self.steps, needs, given)
        taught = {teacher for arm in arms for teacher in self.dag.arms[arm].teachers}
        texts = [job for job in self.steps["teacher_text"].jobs() if job["teacher"] in taught]
        self.jobs += [("teacher_text", job) for job in texts]
        self.judged = [name for name in self.dag.judged_teachers if name in taught]
