"""Whether every model and data set can be had: files complete, the hub reachable or not needed, tokens for gated models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from kvpipe.config import FileData, HubData, HubModel, LocalModel
from kvpipe.doctor.finding import FAIL, OK, WARNING, Finding
from kvpipe.doctor.workload import Workload, data_files
from kvpipe.experiment.launch import in_job
from kvpipe.experiment.paths import MANIFEST, SPLITS
from kvpipe.models.headers import (
    bad_tokenizer,
    file_problems,
    misfit,
    no_cache,
    no_language_model,
    read_config,
    unembedded,
)
from kvpipe.models.hub import HubError, hub_models, missing_libraries, resolve

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
DAMAGED = (ValueError, KeyError, TypeError, AttributeError)
"""What reading a config or a tokenizer raises whose fields are of another type than they have."""


def check_sources(work: Workload) -> Iterator[Finding]:
    """Findings on the configured models and data; nothing is downloaded."""
    hub = hub_models(work.config)  # those that `kvpipe lock` asks for: what no cell needs fails nothing
    for name, model in work.config.models.items():
        if isinstance(model, LocalModel):
            yield from _local(work, name, model)
        elif name in hub:
            yield from _hub(work, name, hub[name])
    if hub:
        for line in missing_libraries(work.config.libraries):
            yield Finding("libraries", WARNING, line, "correct `libraries`, or leave it out")
        unlocked = ", ".join(name for name, model in hub.items() if model.pin not in work.config.lock)
        if unlocked:
            detail = f"{unlocked} not pinned to a commit, without which nothing is downloaded"
            yield Finding("lock", FAIL, detail, "on a machine with a network: kvpipe lock")
        else:
            yield Finding("lock", OK, "every model of the hub is pinned to a commit")
        yield from _cache()
    if not all(work.paths.data(split).is_file() for split in SPLITS):
        yield from _data(work)


# ---------------------------------------------------------------- model folders
def _folder(work: Workload, name: str, folder: Path, whole: str, again: str, key: str) -> Iterator[Finding]:
    """Files, config, tensors and tokens of a folder.

    Args:
        whole: what is said of one without a fault.
        again: how to have its files again.
        key: of the configuration, that names it.
    """
    label, broken = f"model {name}", file_problems(folder)
    if broken:
        yield Finding(label, FAIL, f"{folder}: {', '.join(broken)}", again)
        return
    try:
        values = read_config(folder)
        kind = no_language_model(values) or (no_cache(values) if name in work.dag.recorded_models else None)
        unfit = [problem for problem in (kind or misfit(folder), bad_tokenizer(folder)) if problem]
    except DAMAGED as error:
        unfit = [str(error)]
    if unfit:
        yield Finding(label, FAIL, f"{folder}: {'; '.join(unfit)}", f"or correct {key}")
        return
    yield Finding(label, OK, whole)
    try:
        beyond = unembedded(folder)
    except DAMAGED:  # not the layout that is known
        beyond = None
    if beyond is not None:  # a text with one of them is an error, and so is every batch where it pads
        fix = "use the tokenizer that the model was trained with, or resize the embedding"
        yield Finding(f"tokens of {name}", FAIL if beyond[1] else WARNING, beyond[0], fix)


def _local(work: Workload, name: str, model: LocalModel) -> Iterator[Finding]:
    folder, key = Path(model.path), f"models.{name}.path"
    again = "set source: pretrain" if model.recipe else f"correct {key}"
    if any("cut off" in problem or "-of-" in problem for problem in file_problems(folder)):
        again = f"the copy or download was not finished: fetch these files into {folder} again"
    yield from _folder(work, name, folder, f"{folder} is complete", again, key)


# ---------------------------------------------------------------- hub
def _hub(work: Workload, name: str, model: HubModel) -> Iterator[Finding]:
    label, where, made = f"model {name}", f"{model.repo} at {model.revision}", work.paths.model(name)
    step = f"on a machine with a network: kvpipe models --name {name}"
    made_here = (made / MANIFEST).is_file()
    folder = made if made_here else work.copy_of(model)
    offline = forbidden(*OFFLINE)
    if folder is not None:
        whole = f"{where} is complete in {folder}: nothing to download"
        again = f"rm -r {folder}; {step}" if made_here else step
        yield from _folder(work, name, folder, whole, again, f"models.{name}.repo")
    elif in_job():
        yield Finding(label, OK, f"{where}, examined from the login node only")
    elif offline:
        detail = f"{where} is not downloaded, and {offline}=1 forbids it"
        yield Finding(label, FAIL, detail, f"unset {offline}, or {step}")
    else:
        yield online(name, model)


def online(name: str, model: HubModel) -> Finding:
    """Whether the hub gives a model, as `kvpipe lock` asks it."""
    label, where = f"model {name}", f"{model.repo} at {model.revision}"
    try:
        found = resolve(f"models.{name}", model)
    except ModuleNotFoundError:
        return Finding(label, WARNING, f"{where}: huggingface_hub is not installed here, so it was not asked")
    except HubError as error:
        return Finding(label, FAIL, str(error), "then kvpipe lock")
    if "tokenizer.json" not in found.files:
        fix = "save the fast tokenizer with transformers and use source: local"
        return Finding(label, WARNING, f"{where} has no tokenizer.json, which byte spans come from", fix)
    return Finding(label, OK, f"{where} can be downloaded ({found.commit})")


def _cache() -> Iterator[Finding]:
    """HF_HOME is written to even by downloads into another folder."""
    folder = _hf_home()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(nearest, os.W_OK):
        fix = "export HF_HOME=<a folder of yours on scratch>; HF_HUB_CACHE may stay shared and read-only"
        yield Finding("HF_HOME", WARNING, f"{folder} cannot be written", fix)


def _hf_home() -> Path:
    return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()


def forbidden(*names: str) -> str | None:
    """The first of these variables that forbids downloads."""
    return next((name for name in names if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), None)


# ---------------------------------------------------------------- data
def _data(work: Workload) -> Iterator[Finding]:
    """What the data step would not find."""
    for source in work.config.data.sources:
        label, key = f"data {source.task}", f"correct data.sources ({source.task})"
        if isinstance(source, FileData):
            gone = {split: file for split, file in data_files(source).items() if not file.is_file()}
            if gone:
                detail = ", ".join(f"{split} file {file} does not exist" for split, file in gone.items())
                yield Finding(label, FAIL, detail, f"{key}, or put the file there")
        elif isinstance(source, HubData) and source.is_folder:
            if not Path(source.repo).is_dir():
                yield Finding(label, FAIL, f"{source.repo} is not a folder", f"{key}: repo")
        elif isinstance(source, HubData):
            offline = forbidden("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")
            if offline and not in_job() and not _prepared(source.repo):
                detail = f"{source.repo} is not downloaded, and {offline}=1 forbids it"
                fix = f"unset {offline}, or on a machine with a network and the same HF_HOME: kvpipe data"
                yield Finding(label, FAIL, detail, fix)


def _prepared(repo: str) -> bool:
    """Whether the `datasets` library, whose import takes seconds, has prepared a data set here: its folder is named after
    the data set, in a spelling of its own (`owner___some_name` of `owner/SomeName`)."""

    def plain(name: str) -> str:
        return name.replace("_", "").lower()

    cache = Path(os.environ.get("HF_DATASETS_CACHE", _hf_home() / "datasets")).expanduser()
    found = (folder for folder in cache.glob("*/") if plain(folder.name) == plain(repo.replace("/", "")))
    # configuration, version, fingerprint
    return any(next(folder.glob("*/*/*/"), None) for folder in found)
