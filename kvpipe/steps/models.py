"""Models step: one model folder and its manifest."""

from __future__ import annotations

import shutil
from pathlib import Path

from kvpipe.cell import Workspace
from kvpipe.config import HubModel, LocalModel, PretrainModel, RandomModel, ScratchModel
from kvpipe.models import fetch_hub, fetch_local, randomise, write_manifest
from kvpipe.pretrain import pretrain, student_tokenizer


def make_model(work: Workspace, name: str) -> None:
    """One model folder and its manifest."""
    model = work.config.models[name]
    out = work.paths.model(name)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    match model:
        case LocalModel():
            source = fetch_local(Path(model.path), out)
        case PretrainModel():
            source = pretrain(model.recipe, work.config.data, out)
        case HubModel():
            source = fetch_hub(model.repo, model.revision, out)
        case RandomModel():
            source = randomise(work.paths.model(model.like), out, model.seed)
        case ScratchModel():
            tokenizer = student_tokenizer(model.tokenizer, work.records("train"), work.config.data)
            tokenizer.save_pretrained(out)
            work.student(seed=0).config.save_pretrained(out)
            source = model.model_dump()
    write_manifest(out, source)
