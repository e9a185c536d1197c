"""Repositories of the Hugging Face hub: pinned once, found in shared libraries or downloaded, checked file by file.

`kvpipe lock` asks the hub what a revision stands for and writes commit, sizes and checksums into the lock. From then on a
model is that commit. Its files are looked for in the libraries and in the machine's own cache, which needs no network,
and only what is nowhere is downloaded. No torch: this runs on a login node.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from kvpipe.config import Config, HubModel, LockedFile, LockedRepo
from kvpipe.experiment.files import GB, digest_of, write_text
from kvpipe.experiment.paths import MANIFEST, Paths
from kvpipe.experiment.plan import Dag

PATTERNS = ("*.json", "*.txt", "*.jinja", "tokenizer.model", "model*.safetensors")
"""Files of a repository's top folder that a model is made of: never pickles, and not a second copy of the weights."""
CODE_FILES = "*.py"
"""Downloaded too where `trust_remote_code` says so."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""One of them must be there: transformers makes a fast tokenizer of any."""
TOKENIZER_SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "config.json",
)
"""Read beside it."""
NETWORK = "on a machine that reaches the hub (a login node), without HF_HUB_OFFLINE"


class HubError(RuntimeError):
    """A repository that cannot be had; the message says why and what to do."""


def token() -> str | bool:
    """The token of the environment, never one from a file; False sends none.

    Raises:
        HubError: one that cannot be sent. It is not shown.
    """
    found = os.environ.get("HF_TOKEN", "").strip()  # a token read from a file ends with a line break
    if not (found.isascii() and found.isprintable()) or " " in found:
        raise HubError("HF_TOKEN holds characters that no token has (spaces, line breaks, accents); copy it again")
    return found or False


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network, as on compute nodes."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


@contextmanager
def hub_errors(what: str, repo: str, revision: str) -> Iterator[None]:
    """Turn what the hub's client raises into one message; `what` is where the configuration names the repository."""
    from huggingface_hub import errors

    name = f"{what}: {repo}"
    try:
        yield
    except errors.GatedRepoError as error:
        asked = "is refused to the account of HF_TOKEN" if token() else "needs an account, and HF_TOKEN is not set"
        raise HubError(
            f"{name} is gated and {asked}. Accept its terms on the hub with your account, then set HF_TOKEN to a token of it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{name} has no revision {revision!r}; correct it") from error
    except errors.RepositoryNotFoundError as error:
        seen = "" if token() else " (HF_TOKEN is not set)"
        raise HubError(f"{name} does not exist, or is private{seen}; correct its name or set HF_TOKEN") from error
    except errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 401:
            raise HubError(f"{name}: the hub refuses the token in HF_TOKEN; make a new one or unset it") from error
        raise HubError(f"{name}: the hub answers {error}") from error
    except errors.HFValidationError as error:
        raise HubError(f"{name}: not a repository's name, which is owner/name: {error}") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.HTTPError) as error:
        raise HubError(
            f"{name}: no connection to {os.environ.get('HF_ENDPOINT', 'the hub')} ({type(error).__name__}). Run this "
            f"{NETWORK}, or put the model into one of `libraries`"
        ) from error


# ---------------------------------------------------------------- locking
def is_model_file(name: str, code: bool = False) -> bool:
    """Whether a file of a repository is part of the model."""
    if name == MANIFEST:  # kvpipe's own, which it writes beside the files
        return False
    return "/" not in name and any(fnmatch(name, pattern) for pattern in (*PATTERNS, *([CODE_FILES] if code else [])))


def missing_shards(names: Iterable[str]) -> list[str]:
    """The files that the others' names, `model-00001-of-00002.safetensors`, say there are."""
    parts = [found for name in names if (found := re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.safetensors)", name))]
    said = {
        f"{head}{number:0{len(digits)}}{of}{total}{end}"
        for head, digits, of, total, end in (part.groups() for part in parts)
        for number in range(1, int(total) + 1)
    }
    return sorted(said - {part[0] for part in parts})


def resolve(what: str, model: HubModel) -> LockedRepo:
    """Ask the hub which commit a revision is, whether we may read it, and which files it has.

    Raises:
        HubError: missing, gated, private, wrong token, no network, or nothing there that kvpipe can load.
    """
    from huggingface_hub import HfApi

    if offline():
        raise HubError(f"{what}: HF_HUB_OFFLINE is set. Run `kvpipe lock` {NETWORK}")
    api = HfApi(token=token())
    with hub_errors(what, model.repo, model.revision):
        info = api.model_info(model.repo, revision=model.revision, files_metadata=True, timeout=30)
        api.auth_check(model.repo)  # the card of a gated repository is public, its files are not
    files = {}
    for entry in info.siblings or []:
        if is_model_file(entry.rfilename, model.trust_remote_code):
            digest = f"sha256:{entry.lfs.sha256}" if entry.lfs is not None else f"git:{entry.blob_id}"
            files[entry.rfilename] = LockedFile(size=entry.size or 0, digest=digest)
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        has = ", ".join(sorted(entry.rfilename for entry in info.siblings or [])[:12])
        raise HubError(
            f"{what}: {model.repo} has no config.json or no model*.safetensors (only {has}); pickled weights are not loaded"
        )
    if not any(name in files for name in TOKENIZERS):
        raise HubError(
            f"{what}: {model.repo} has no tokenizer ({', '.join(TOKENIZERS)}); choose another repository or revision, or "
            "save model and tokenizer into one folder and use source: local"
        )
    if missing := missing_shards(files):
        raise HubError(
            f"{what}: {model.repo} lacks {', '.join(missing[:3])}{' …' if missing[3:] else ''}: its upload was not "
            "finished. Choose another revision"
        )
    licence = getattr(info.card_data, "license", None)
    return LockedRepo(commit=str(info.sha), license=licence, files=files)


def hub_models(config: Config) -> dict[str, HubModel]:
    """The models of the hub that some cell needs, by name."""
    dag = Dag(config)
    needed = {name for user in (config.student, *dag.teachers) for name in (user, *dag.model_needs(user))}
    return {name: m for name, m in config.models.items() if name in needed and isinstance(m, HubModel)}


def lock(config: Config, update: bool = False) -> dict[str, LockedRepo]:
    """Every hub model's revision resolved (those that are locked: only with `update`), or one message with all that is
    wrong.

    Raises:
        HubError: as `resolve`, one line for each model.
    """
    found: dict[str, LockedRepo] = {}
    problems = []
    for name, model in hub_models(config).items():
        if model.pin in config.lock and not update:
            found[model.pin] = config.lock[model.pin]
            continue
        try:
            found[model.pin] = resolve(f"models.{name}", model)
        except HubError as error:
            problems.append(str(error))
    if problems:
        raise HubError("\n".join(dict.fromkeys(problems)))  # a bad token is every model's
    return found


def lock_into(path: Path, config: Config, paths: Paths, update: bool = False, log=print) -> None:
    """Write the lock file of a configuration, and say what is locked and what of it is still to be downloaded.

    Raises:
        HubError: as `lock`; or, once the file is written, no room for the downloads.
    """
    found = lock(config, update)
    if not found:
        log("nothing to lock: no cell needs a model of the hub (source: hub)")
        return
    write_lock(path, found)
    missing = to_download(config.model_copy(update={"lock": found}), paths)
    for name, model in hub_models(config).items():
        pinned = found[model.pin]
        size = sum(file.size for file in pinned.files.values())
        log(
            f"{name}: {model.pin} is {pinned.commit}, licence {pinned.license or 'not stated'}, "
            f"{size / GB:.2f} GB, {missing.get(name, 0) / GB:.2f} GB of them to download"
        )
    for line in missing_libraries(config.libraries):
        log(line)
    log(f"written to {path}")
    check_room(missing, paths.root)


def write_lock(path: Path, found: dict[str, LockedRepo]) -> None:
    """Write a lock file; entries of other configurations that share it are kept."""
    kept = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    entries = ((kept or {}).get("lock") or {}) | {pin: repo.model_dump() for pin, repo in found.items()}
    head = (
        "# Written by `kvpipe lock`, read with the configuration beside it. `kvpipe lock --update` follows revisions.\n"
    )
    text = yaml.safe_dump({"lock": dict(sorted(entries.items()))}, sort_keys=False)
    write_text(path, head + text)


def check_room(missing: dict[str, int], folder: Path) -> None:
    """Refuse to begin downloads that cannot end.

    Args:
        missing: model → bytes.
        folder: where they will lie; need not exist yet.

    Raises:
        HubError: the disk has less room.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    need, free = sum(missing.values()), shutil.disk_usage(existing).free
    if need > free:
        parts = ", ".join(f"{name} {size / GB:.1f}" for name, size in missing.items())
        raise HubError(
            f"models: {need / GB:.1f} GB are to be downloaded ({parts}), {existing} has {free / GB:.1f} GB free. Free some "
            "space, choose another --results folder, or name a shared copy in `libraries`"
        )


# ---------------------------------------------------------------- finding
def wrong_files(folder: Path, files: dict[str, LockedFile]) -> dict[str, str]:
    """Files that are missing or not the locked ones → what is wrong."""
    out = {}
    for name, file in files.items():
        path = folder / name
        if not path.is_file():
            out[name] = "missing"
        elif (size := path.stat().st_size) != file.size:
            out[name] = f"{size} bytes of {file.size}"
        elif (digest := digest_of(path, file.digest.split(":")[0])) != file.digest:
            out[name] = f"is {digest}, locked is {file.digest}"
    return out


def _listed(wrong: dict[str, str]) -> str:
    return "; ".join(f"{name}: {problem}" for name, problem in list(wrong.items())[:3])


def own_cache() -> Path:
    """The machine's Hugging Face cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def missing_libraries(libraries: list[str]) -> list[str]:
    """A line for every library that is not there, which is searched in vain."""
    return [
        f"libraries: {library} is no folder on this machine, so nothing is found in it; correct it or leave it out"
        for library in libraries
        if not Path(library).is_dir()
    ]


def candidates(repo: str, pinned: LockedRepo, libraries: list[str]) -> Iterator[Path]:
    """Folders of the libraries, and last of the machine's cache, that may hold a locked repository."""

    def inside(library: Path) -> Iterator[Path]:
        cached = library / f"models--{repo.replace('/', '--')}" / "snapshots" / pinned.commit
        return (folder for folder in (cached, library / repo) if folder.is_dir())

    for library in libraries:
        yield from inside(Path(library))
    yield from inside(own_cache())


def locate(repo: str, pinned: LockedRepo, libraries: list[str], log=print) -> Path | None:
    """The first candidate that holds the locked files, bit by bit; None if none does. Others are named in the log,
    and libraries that are not there."""
    for line in missing_libraries(libraries):
        log(line)
    for folder in candidates(repo, pinned, libraries):
        wrong = wrong_files(folder, pinned.files)
        if not wrong:
            return folder
        log(f"{folder}: not taken for {repo} at {pinned.commit[:12]}: {_listed(wrong)}")
    return None


def missing_bytes(folder: Path, files: dict[str, LockedFile]) -> int:
    """What is still to be downloaded into a folder, by the sizes of what is there."""
    return sum(f.size for n, f in files.items() if not (folder / n).is_file() or (folder / n).stat().st_size != f.size)


def to_download(config: Config, paths: Paths) -> dict[str, int]:
    """Model → bytes that no library and no results folder has, for the models that are locked."""
    out = {}
    for name, model in hub_models(config).items():
        pinned = config.lock.get(model.pin)
        if pinned is not None:
            places = [paths.model(name), *candidates(model.repo, pinned, config.libraries)]
            out[name] = min(missing_bytes(place, pinned.files) for place in places)
    return {name: size for name, size in out.items() if size}


# ---------------------------------------------------------------- fetching
def source_of(model: HubModel, config: Config) -> dict[str, Any]:
    """What the manifest says of a locked model: the same wherever its files were found."""
    pinned = config.lock[model.pin]
    source = model.model_dump(include={"source", "repo", "revision"})
    return source | {"commit": pinned.commit, "license": pinned.license}


def fetch(name: str, model: HubModel, config: Config, out: Path, log=print) -> Path:
    """The folder that holds the locked files of a model: a library's, or `out`, into which they are downloaded.

    Downloads are resumable: a connection that breaks within a run is taken up where it broke, and files that are
    complete in `out` are not downloaded again by a later run. Every file is checked against the lock.

    Raises:
        HubError: not locked, not reachable, no room, or a file that is not what the lock says.
    """
    what = f"models.{name}"
    if model.pin not in config.lock:
        raise HubError(f"{what}: {model.pin} is not locked to a commit. Run `kvpipe lock` {NETWORK}")
    pinned = config.lock[model.pin]
    if not missing_bytes(out, pinned.files) and not wrong_files(out, pinned.files):
        return out
    found = locate(model.repo, pinned, config.libraries, log)
    if found is not None:
        log(f"{name}: {found}")
        return found
    if offline():
        searched = ", ".join([*config.libraries, str(own_cache())])
        raise HubError(
            f"{what}: {model.repo} at {pinned.commit} is in none of {searched}, and HF_HUB_OFFLINE is set. Run "
            f"`kvpipe models --name {name}` {NETWORK}"
        )
    _download(what, model.repo, pinned, out, log)
    return out


def _download(what: str, repo: str, pinned: LockedRepo, out: Path, log) -> None:
    from huggingface_hub import snapshot_download

    check_room({repo: missing_bytes(out, pinned.files)}, out)
    wrong: dict[str, str] = {}
    for attempt in range(2):
        with hub_errors(what, repo, pinned.commit):
            snapshot_download(
                repo,
                revision=pinned.commit,
                local_dir=out,
                cache_dir=out / ".cache" / "hub",  # not the machine's own, whose copy may be the damaged one
                allow_patterns=list(pinned.files),
                token=token(),
            )
        wrong = wrong_files(out, pinned.files)
        if not wrong:
            shutil.rmtree(out / ".cache", ignore_errors=True)  # the client's notes on unfinished downloads
            return
        log(f"{what}: {_listed(wrong)}" + ("; downloading again" if attempt == 0 else ""))
        for name in wrong:
            (out / name).unlink(missing_ok=True)
    raise HubError(
        f"{what}: {repo} at {pinned.commit} comes damaged, twice: {_listed(wrong)}. Try again later, or run `kvpipe "
        "lock` again if the repository was rewritten"
    )


def tokenizer_folder(given: str) -> Path:
    """A folder as it is; of a hub id the tokenizer alone, downloaded into the machine's cache where it is not there.

    Raises:
        HubError: neither a folder nor a hub id, or not to be had.
    """
    if Path(given).is_dir():
        return Path(given)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        raise HubError(f"{given} is neither a folder with tokenizer.json nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    with hub_errors("no folder of this name, so a hub id", given, "main"):
        return Path(snapshot_download(given, allow_patterns=[*TOKENIZERS, *TOKENIZER_SETTINGS], token=token()))
