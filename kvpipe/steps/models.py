"""Models step: one model folder and its manifest."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from kvpipe.config import HubModel, LocalModel, PretrainModel, RandomModel, ScratchModel
from kvpipe.distill.build import Workspace
from kvpipe.experiment import made
from kvpipe.experiment.paths import MANIFEST
from kvpipe.models import hub
from kvpipe.models.folders import fetch_local, link_folder, load_tokenizer, randomise, recorded, write_manifest
from kvpipe.models.headers import file_problems, misfit, no_cache, no_language_model, read_config
from kvpipe.models.pretrain import pretrain, student_tokenizer
from kvpipe.models.tokenizers import fingerprint


def make_hub_models(work: Workspace) -> None:
    """All models of the hub that some cell needs, if the disk has room for what is still to be downloaded."""
    hub.check_room(hub.to_download(work.config, work.paths), work.paths.root)
    for name in hub.hub_models(work.config):
        make_model(work, name)


def make_model(work: Workspace, name: str) -> None:
    """One model folder and its manifest."""
    model = work.config.models[name]
    out = work.paths.model(name)
    if not isinstance(model, HubModel):  # whose complete files are not downloaded again
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)  # it stands for a complete folder
    how: dict[str, Any] = {}
    match model:
        case LocalModel():
            source = fetch_local(Path(model.path), out)
            how = {"load": model.load.model_dump()}
        case PretrainModel():
            source = pretrain(model.recipe, work.config.data, out)
        case HubModel():
            source = _fetch_hub(work, name, model, out)
            how = {"load": model.load.model_dump(), "trust_remote_code": model.trust_remote_code}
        case RandomModel():
            like = work.paths.model(model.like)
            source = randomise(like, out, model.seed, work.trusts(name))
            how = {k: v for k, v in recorded(like).items() if k in ("load", "trust_remote_code")}
        case ScratchModel():
            tokenizer = student_tokenizer(model.tokenizer, work.records("train"), work.config.data)
            tokenizer.save_pretrained(out)
            work.student(seed=0).config.save_pretrained(out)
            source = model.model_dump()
    if not isinstance(model, HubModel):  # whose files are checked against the lock, and by `load_model`
        _check(work, name, out)
        how["tokenizer"] = fingerprint(load_tokenizer(out, work.trusts(name)))
    write_manifest(out, source, **how)
    made.note(work.dag, work.paths, "models", name)


def _check(work: Workspace, name: str, folder: Path) -> None:
    """Refuse, before anything is computed with it, a model that cannot be loaded as it is or has no cache to record."""
    values = read_config(folder)
    problem = no_language_model(values) or (no_cache(values) if name in work.dag.recorded_models else None)
    if problem is None and not isinstance(work.config.models[name], ScratchModel):
        problem = "; ".join(file_problems(folder, ("config.json",))) or misfit(folder)
    if problem is not None:
        raise ValueError(f"models.{name}: {problem}")


def _fetch_hub(work: Workspace, name: str, model: HubModel, out: Path) -> dict[str, Any]:
    folder = hub.fetch(name, model, work.config, out)
    files = work.config.lock[model.pin].files
    if folder != out:
        shutil.rmtree(out)
        out.mkdir()
        link_folder([folder / file for file in files], out)
    for path in out.iterdir():  # of another revision
        if path.name not in files:
            path.unlink()
    return hub.source_of(model, work.config)
