"""The trained student becomes a plain model folder, which is loaded and scored again before anything relies on it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvpipe.config import Template
from kvpipe.data.batches import spread
from kvpipe.data.encoding import Encoding, encode_records
from kvpipe.data.records import Record
from kvpipe.experiment.files import folder_digest
from kvpipe.models.folders import load_model, load_tokenizer, save_model, weights_dtype
from kvpipe.models.likelihood import score, scoring_batches
from kvpipe.train.cell import Cell

RECORDS = 8
"""Validation records that the saved folder is scored on."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Nats per token by which the saved folder may differ from the model in memory, by the type of its weights."""


class SavedStudentDiffers(RuntimeError):
    """The folder that was written is not the model that was trained."""


def export(
    cell: Cell, model, source: Path, folder: Path, records: list[Record], template: Template, trust: bool, log=print
) -> dict[str, Any]:
    """Write the trained student to `folder`, which is there only once its content scores as the model in memory does.

    Adapters are merged. Weights are written in the type that the student's own folder has (float32 for one from scratch)
    and the files beside them, tokenizer first, as they lie there. The model is of no use afterwards.

    Args:
        cell: gives the validation split as tokens.
        model: as trained, without wrappers of devices and precision.
        source: the student's own folder.
        folder: where to; what is there is replaced.
        records: of the validation split.
        template: record → text.
        trust: run code that lies in the folder.
        log: where plain lines go.

    Returns:
        What `cost.json` keeps: `dtype`, `digest` of the folder, nats per token of both, seconds that the check took.

    Raises:
        SavedStudentDiffers: names both scores; the folder is kept as `<folder>.unchecked`.
    """
    device, dtype = next(model.parameters()).device, weights_dtype(source)
    begun = time.perf_counter()
    encoding = cell.validation
    examples = spread(len(encoding), RECORDS)
    in_memory = _nats(cell, model, encoding, examples)
    spent = time.perf_counter() - begun
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    unchecked = folder.with_name(f"{folder.name}.unchecked")
    shutil.rmtree(unchecked, ignore_errors=True)
    save_model(model.eval().to(dtype), source, unchecked)
    model.to("cpu")  # makes room on the device for the one that is loaded now

    begun = time.perf_counter()
    records = [records[i] for i in examples]
    again = encode_records(records, load_tokenizer(unchecked, trust), template, end=True)
    kept = np.concatenate([encoding.ids[encoding.rows(i)] for i in examples])
    if not np.array_equal(again.ids, kept):
        raise SavedStudentDiffers(f"{unchecked}: its tokenizer gives other ids than the student's own in {source}")
    try:
        loaded = load_model(unchecked, torch.float32, str(device), trust)
    except ValueError as error:
        raise SavedStudentDiffers(f"{error}. The cell does not count as done and its checkpoints stay") from error
    saved = _nats(cell, loaded, again)
    spent += time.perf_counter() - begun
    if not abs(saved - in_memory) <= TOLERANCE[dtype]:  # NaN fits no tolerance
        raise SavedStudentDiffers(
            f"{unchecked}: the saved student has {saved:.4f} nats per token on {len(records)} validation records, the one "
            f"in memory {in_memory:.4f}; {TOLERANCE[dtype]:g} is allowed for weights in {_name(dtype)}. The cell does "
            "not count as done and its checkpoints stay: look for what is not saved with the model (tied weights, "
            "adapters, buffers), or for weights that its type cannot hold"
        )
    log(f"saved in {_name(dtype)}: {saved:.4f} nats per token on {len(records)} validation records ({spent:.1f} s)")
    shutil.rmtree(folder, ignore_errors=True)
    unchecked.rename(folder)
    return {
        "dtype": _name(dtype),
        "digest": folder_digest(folder),
        "nats_in_memory": in_memory,
        "nats_saved": saved,
        "check_seconds": spent,
    }


def _nats(cell: Cell, model, encoding: Encoding, examples: np.ndarray | None = None) -> float:
    """Nats per token of the whole text of some examples."""
    batches = scoring_batches(encoding, cell.pad_id, cell.scoring.batch_size, examples)
    scores = score(model, encoding, batches)
    return float(scores.nll_all.sum() / scores.tokens_all.sum())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
