"""What each job of the copy takes: run in a process of its own, so that its peak of memory is its own, too."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from kvpipe.config import Config
from kvpipe.data.records import read_records
from kvpipe.experiment.attempts import Attempt
from kvpipe.experiment.device import resolve_device
from kvpipe.experiment.paths import Paths
from kvpipe.models.folders import weights_dtype
from kvpipe.steps.evaluate import score_folder, score_untrained
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.make import run
from kvpipe.steps.train import load_cell
from kvpipe.train.trainer import Loop, Rehearsal, peak_memory

PROMPTS = 8
"""That a teacher writes for."""
_T = TypeVar("_T")


class Measured(NamedTuple):
    """What a job has taken."""

    loading: float
    """Seconds until its models were there."""
    working: float
    """Seconds of the rest, which grow with the texts."""
    peak: int
    """Bytes of the GPU, or of the process on a CPU."""
    written: int = 0


class RehearsedCell(NamedTuple):
    """What the first steps of an arm's cells have taken."""

    loading: float
    peak: int
    student: int
    """Bytes of the trained student's file."""
    checkpoint: int
    seen: Rehearsal


def apart(config: Config, function: Callable[..., _T], *arguments: Any) -> _T:
    """A call in a process of its own, so that its peak of memory is its own, too.

    Raises:
        RuntimeError: the process was killed.
    """
    # what CUDA has begun cannot be forked, and nothing of a torch without CUDA has begun
    kind = "fork" if torch.version.cuda is None and hasattr(os, "fork") else "spawn"
    context, threads = multiprocessing.get_context(kind), (config.train.threads,)
    # said first and once: threads that load weights would find torch's pool of the parent half replaced
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=threads) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            what = " ".join(str(argument) for argument in arguments if isinstance(argument, str | dict))
            raise RuntimeError(
                f"preflight: the process of {function.__name__} {what} was killed; memory ran out as a rule: see what "
                "`kvpipe doctor` announces for it, and run preflight where there is more"
            ) from None


def measure_job(config: Config, paths: Paths, name: str, job: dict[str, str]) -> Measured:
    """Run a job of the copy."""
    device = torch.device(resolve_device(config.train.device))
    if name == "teacher_text":
        prompts = len(read_records(paths.data("train")))
        shards = max(1, prompts // PROMPTS)
        config = config.model_copy(update={"teacher_text": config.teacher_text.model_copy(update={"shards": shards})})
        name, job = "teacher_text_shard", {**job, "shard": "0"}
    inputs, begun = Inputs(config, paths), time.perf_counter()
    if name in ("layer_map", "teacher_kv"):
        inputs.teacher_model(job["teacher"])
    loaded = time.perf_counter()
    run(inputs, name, **job)
    written = sum(path.stat().st_size for path in _written(inputs, name, job) if path.is_file())
    return Measured(loaded - begun, time.perf_counter() - loaded, peak_memory(device), written)


def _written(inputs: Inputs, name: str, job: dict[str, str]) -> list[Path]:
    if name == "teacher_kv":
        return list(inputs.paths.store(job["teacher"], job["reading"]).iterdir())
    return list(inputs.steps[name].makes(**job).values())


def measure_cell(config: Config, paths: Paths, arm: str, seed: int, batches: int) -> RehearsedCell:
    """Take the first steps of a cell of the copy."""
    begun, quiet = time.perf_counter(), lambda *_: None
    cell = load_cell(Inputs(config, paths), arm, seed, quiet)
    unused = paths.checkpoints(arm, seed)
    loop = Loop(cell, unused, Attempt(unused, resolve_device(config.train.device), 1), quiet)
    loading = time.perf_counter() - begun
    seen = loop.rehearse(batches)
    sizes = [parameter.numel() for parameter in cell.student.parameters()]
    learned = [p.numel() for part in (cell.student, cell.objective) for p in part.parameters() if p.requires_grad]
    student = sum(sizes) * weights_dtype(paths.model(config.student)).itemsize
    return RehearsedCell(loading, peak_memory(loop.accelerator.device), student, 12 * sum(learned), seen)


def measure_scoring(config: Config, paths: Paths, name: str) -> Measured:
    """Score the copy's test items with the student before training, or with a teacher."""
    inputs, begun = Inputs(config, paths), time.perf_counter()
    if name == "untrained":
        score_untrained(inputs, paths.untrained)
    else:
        score_folder(inputs, paths.model(name), "test", paths.teacher_quality(name))
    return Measured(0.0, time.perf_counter() - begun, peak_memory(torch.device(resolve_device(config.train.device))))
