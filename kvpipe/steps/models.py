"""Models step: one model folder and its manifest."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from kvpipe.config import Config, HubModel, LocalModel, PretrainModel, PrunedModel, RandomModel, ScratchModel
from kvpipe.data.records import read_records
from kvpipe.experiment.paths import MANIFEST
from kvpipe.models import hub
from kvpipe.models.headers import file_problems, misfit, no_cache, no_language_model, read_config
from kvpipe.models.manifest import fetch_local, link_folder, write_manifest
from kvpipe.steps.make import Work, run


def make_hub_models(inputs: Work) -> None:
    """All models of the hub that some cell needs, if the disk has room for what is still to be downloaded."""
    hub.check_room(hub.to_download(inputs.config, inputs.paths), inputs.paths.root)
    for name in hub.hub_models(inputs.config):
        run(inputs, "model", model=name)


def make_model(inputs: Work, model: str) -> None:
    """One model folder and its manifest."""
    config, paths = inputs.config, inputs.paths
    entry, out = config.models[model], paths.model(model)
    if not isinstance(entry, HubModel):  # whose complete files are not downloaded again
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)  # it stands for a complete folder
    how: dict[str, Any] = {}
    if isinstance(entry, HubModel):  # whose files are checked against the lock, and by `load_model`
        source = _fetch_hub(config, model, entry, out)
        write_manifest(out, source, load=entry.load.model_dump(), trust_remote_code=entry.trust_remote_code)
        return
    # torch and transformers take seconds to import
    from kvpipe.models.folders import build_model, load_tokenizer, randomise, recorded
    from kvpipe.models.pretrain import pretrain, student_tokenizer
    from kvpipe.models.pruned import prune
    from kvpipe.models.tokenizers import fingerprint

    match entry:
        case LocalModel():
            source = fetch_local(Path(entry.path), out)
            how = {"load": entry.load.model_dump()}
        case PretrainModel():
            source = pretrain(entry.recipe, config.data, out)
        case RandomModel():
            like = paths.model(entry.like)
            source = randomise(like, out, entry.seed, config.trusts(model))
            how = {k: v for k, v in recorded(like).items() if k in ("load", "trust_remote_code")}
        case PrunedModel():
            texts = read_records(paths.data("train")) if entry.reads_texts else []
            source = prune(entry, paths.model(entry.of), texts, config, out)
            how = {k: v for k, v in recorded(paths.model(entry.of)).items() if k == "trust_remote_code"}
        case ScratchModel():
            tokenizer = student_tokenizer(entry.tokenizer, read_records(paths.data("train")), config.data)
            tokenizer.save_pretrained(out)
            build_model(entry.architecture, tokenizer, seed=0).config.save_pretrained(out)
            source = entry.model_dump()
    _check(inputs, model, out)
    how["tokenizer"] = fingerprint(load_tokenizer(out, config.trusts(model)))
    write_manifest(out, source, **how)


def _check(inputs: Work, name: str, folder: Path) -> None:
    """Refuse, before anything is computed with it, a model that cannot be loaded as it is or has no cache to record."""
    values = read_config(folder)
    problem = no_language_model(values) or (no_cache(values) if name in inputs.dag.recorded_models else None)
    if problem is None and not isinstance(inputs.config.models[name], ScratchModel):
        problem = "; ".join(file_problems(folder, ("config.json",))) or misfit(folder)
    if problem is not None:
        raise ValueError(f"models.{name}: {problem}")


def _fetch_hub(config: Config, name: str, model: HubModel, out: Path) -> dict[str, Any]:
    folder = hub.fetch(name, model, config, out)
    files = config.lock[model.pin].files
    if folder != out:
        shutil.rmtree(out)
        out.mkdir()
        link_folder([folder / file for file in files], out)
    for path in out.iterdir():  # of another revision
        if path.name not in files:
            path.unlink()
    return hub.source_of(model, config)
