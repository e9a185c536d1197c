"""Whether every model and data set can be had: files complete, the hub reachable or not needed, tokens for gated models."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from kvpipe.config import Config, FileData, HubData, HubModel, LocalModel
from kvpipe.doctor.finding import FAIL, OK, WARNING, Finding, inside_a_job
from kvpipe.experiment.paths import MANIFEST, SPLITS, Paths
from kvpipe.experiment.plan import Dag
from kvpipe.models.headers import bad_tokenizer, lacking, misfit, no_cache, no_language_model, read_config
from kvpipe.models.hub import HubError, absent, candidates, hub_models, missing_bytes, token

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def examine_sources(config: Config, paths: Paths) -> list[Finding]:
    """Findings on the configured models and data; nothing is downloaded."""
    out: list[Finding] = []
    hub = hub_models(config)  # those that `kvpipe lock` asks for: what no cell needs fails nothing
    recorded = Dag(config).recorded_models
    for name, model in config.models.items():
        if isinstance(model, LocalModel):
            out += _local(name, model, name in recorded)
        elif isinstance(model, HubModel) and name in hub:
            out += _hub(name, model, paths.model(name), copy_of(model, config), name in recorded)
    if hub:
        fix = "correct `libraries`, or leave it out"
        out += [Finding("libraries", WARNING, line, fix) for line in absent(config.libraries)]
        out += [_lock([name for name, model in hub.items() if model.pin not in config.lock]), *_cache()]
    return out if all(paths.data(split).is_file() for split in SPLITS) else [*out, *_data(config)]


def _lock(unlocked: list[str]) -> Finding:
    if not unlocked:
        return Finding("lock", OK, "every model of the hub is pinned to a commit")
    detail = f"{', '.join(unlocked)} not pinned to a commit, without which nothing is downloaded"
    return Finding("lock", FAIL, detail, "on a machine with a network: kvpipe lock")


# ---------------------------------------------------------------- folders
def unusable(folder: Path, recorded: bool) -> list[str]:
    """What is wrong with a model folder: files, a config that no teacher or student has, tensors that do not fit it.

    Args:
        folder: the model's.
        recorded: whether keys and values of the model are recorded.
    """
    if found := lacking(folder):
        return found
    try:
        values = read_config(folder)
        kinds = no_language_model(values) or (no_cache(values) if recorded else None)
        return [problem for problem in (kinds or misfit(folder), bad_tokenizer(folder)) if problem]
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # fields of another type than they have
        return [str(error)]


def _local(name: str, model: LocalModel, recorded: bool) -> Iterator[Finding]:
    folder = Path(model.path)
    missing = unusable(folder, recorded)
    if not missing:
        yield Finding(f"model {name}", OK, f"{folder} is complete")
        return
    if not lacking(folder):  # the problem says what to do
        yield Finding(f"model {name}", FAIL, f"{folder}: {'; '.join(missing)}", f"or correct models.{name}.path")
        return
    fix = "set source: pretrain" if model.recipe else f"correct models.{name}.path"
    if any("cut off" in problem or "-of-" in problem for problem in missing):
        fix = f"the copy or download was not finished: fetch these files into {folder} again"
    yield Finding(f"model {name}", FAIL, f"{folder}: {', '.join(missing)}", fix)


# ---------------------------------------------------------------- data
def data_files(source: FileData) -> dict[str, Path]:
    """Split → the file that it is read from."""
    named = {split: getattr(source, split) for split in SPLITS}
    return {split: source.parted(spec)[0] for split, spec in named.items() if spec is not None}


def _data(config: Config) -> Iterator[Finding]:
    """What the data step would not find."""
    for source in config.data.sources:
        label = f"data {source.task}"
        if isinstance(source, FileData):
            gone = {split: file for split, file in data_files(source).items() if not file.is_file()}
            if gone:
                detail = ", ".join(f"{split} file {file} does not exist" for split, file in gone.items())
                yield Finding(label, FAIL, detail, f"correct data.sources ({source.task}), or put the file there")
        elif isinstance(source, HubData) and source.is_folder:
            if not Path(source.repo).is_dir():
                yield Finding(
                    label, FAIL, f"{source.repo} is not a folder", f"correct data.sources ({source.task}): repo"
                )
        elif isinstance(source, HubData):
            offline = forbidden("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")
            if offline and not inside_a_job() and not _cached(source.repo):
                detail = f"{source.repo} is not downloaded, and {offline}=1 forbids it"
                fix = f"unset {offline}, or on a machine with a network and the same HF_HOME: kvpipe data"
                yield Finding(label, FAIL, detail, fix)


def _cached(repo: str) -> bool:
    """Whether the `datasets` library, whose import takes seconds, has prepared a data set here: its folder is named after
    the data set, in a spelling of its own (`owner___some_name` of `owner/SomeName`)."""

    def plain(name: str) -> str:
        return name.replace("_", "").lower()

    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")).expanduser()
    found = (folder for folder in cache.glob("*/") if plain(folder.name) == plain(repo.replace("/", "")))
    # configuration, version, fingerprint
    return any(next(folder.glob("*/*/*/"), None) for folder in found)


def forbidden(*names: str) -> str | None:
    """The first of these variables that forbids downloads."""
    return next((name for name in names if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), None)


# ---------------------------------------------------------------- hub
def copy_of(model: HubModel, config: Config) -> Path | None:
    """A complete copy of a locked model in a library or the machine's cache, by the sizes of its files: reading them takes
    minutes, and `kvpipe models` does."""
    pinned = config.lock.get(model.pin)
    if pinned is None:
        return None
    folders = candidates(model.repo, pinned, config.libraries)
    try:
        return next((folder for folder in folders if not missing_bytes(folder, pinned.files)), None)
    except ModuleNotFoundError:  # only huggingface_hub, which a login node may lack, knows where the machine's cache is
        return None


def _hub(
    name: str, model: HubModel, folder: Path, copy: Path | None = None, recorded: bool = False
) -> Iterator[Finding]:
    label, where = f"model {name}", f"{model.repo} at {model.revision}"
    step = f"on a machine with a network: kvpipe models --name {name}"
    if (folder / MANIFEST).is_file():
        if lacking(folder):
            yield Finding(label, FAIL, f"{folder}: {', '.join(lacking(folder))}", f"rm -r {folder}; {step}")
        elif missing := unusable(folder, recorded):
            yield Finding(label, FAIL, f"{folder}: {'; '.join(missing)}", f"or correct models.{name}.repo")
        else:
            yield Finding(label, OK, f"{where} is complete in {folder}")
        return
    if copy is not None and (missing := unusable(copy, recorded)):
        yield Finding(label, FAIL, f"{copy}: {'; '.join(missing)}", f"or correct models.{name}.repo")
        return
    if copy is not None:
        yield Finding(label, OK, f"{where} is in {copy}: nothing to download")
        return
    if inside_a_job():
        yield Finding(label, OK, f"{where}, examined from the login node only")
        return
    offline = forbidden(*OFFLINE)
    if offline:
        yield Finding(
            label, FAIL, f"{where} is not downloaded, and {offline}=1 forbids it", f"unset {offline}, or {step}"
        )
    elif importlib.util.find_spec("huggingface_hub") is None:
        yield Finding(label, WARNING, f"{where}: huggingface_hub is not installed here, so it was not asked", step)
    else:
        try:
            yield from _online(label, model, where, step)
        except HubError as error:
            yield Finding(label, FAIL, str(error), "export HF_TOKEN=…, without spaces or line breaks, or unset it")


def _online(label: str, model: HubModel, where: str, step: str) -> Iterator[Finding]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # the HTTP library's own error, whichever library this generation of the hub's uses
    errors: tuple[type[Exception], ...] = (HfHubHTTPError, HfHubHTTPError.__mro__[1], OSError)  # type: ignore[assignment]

    known = "a token is set" if token() else "no token is set"
    set_token = "export HF_TOKEN=… (a token of yours that may read it)"
    try:
        api = HfApi(token=token())  # that of `kvpipe lock`, which takes none from a file
        info = api.model_info(model.repo, revision=model.revision, timeout=10)
        if info.gated:
            api.auth_check(model.repo)
    except HFValidationError as error:
        yield Finding(
            label, FAIL, f"{model.repo} is not a repository's name: {error}", "correct models: repo, owner/name"
        )
    except GatedRepoError:
        fix = f"ask for access on the model's page, then {set_token}"
        yield Finding(label, FAIL, f"{model.repo} is gated and not open to you; {known}", fix)
    except RevisionNotFoundError:
        yield Finding(label, FAIL, f"{model.repo} has no revision {model.revision!r}", "correct models: revision")
    except RepositoryNotFoundError:
        fix = f"correct models: repo; if it is private, {set_token}"
        yield Finding(label, FAIL, f"there is no {model.repo}, or it is private; {known}", fix)
    except errors as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield Finding(label, FAIL, f"{where}: the hub cannot be reached from here: {said}", step)
    else:
        names = [file.rfilename for file in info.siblings or []]
        if not any(file.endswith(".safetensors") for file in names):
            fix = "choose a revision with safetensors, or convert it and use source: local"
            yield Finding(label, FAIL, f"{where} has no safetensors: pickles are not loaded", fix)
        elif "tokenizer.json" not in names:
            fix = "save the fast tokenizer with transformers and use source: local"
            yield Finding(label, WARNING, f"{where} has no tokenizer.json, which byte spans come from", fix)
        else:
            yield Finding(
                label, OK, f"{where} can be downloaded ({info.sha}){', gated: open to you' if info.gated else ''}"
            )


def _cache() -> Iterator[Finding]:
    """HF_HOME is written to even by downloads into another folder."""
    folder = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(nearest, os.W_OK):
        fix = "export HF_HOME=<a folder of yours on scratch>; HF_HUB_CACHE may stay shared and read-only"
        yield Finding("HF_HOME", WARNING, f"{folder} cannot be written", fix)
