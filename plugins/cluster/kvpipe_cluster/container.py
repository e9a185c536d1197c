"""Whether the image is there, starts, and is the one that belongs to the lock file."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from kvpipe.config import Config, FileData, HubData, HubModel, LocalModel
from kvpipe.doctor import FAIL, OK, WARNING, Finding, Workload
from kvpipe.doctor.finding import Answer, ask, last_line
from kvpipe.doctor.workload import data_files
from kvpipe.experiment import launch
from kvpipe.experiment.provenance import PACKAGE
from kvpipe_cluster.jobs import on_login_node
from kvpipe_cluster.profile import profile_of

IMAGE = "containers/kvpipe.sif"
CACHES = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")
LABEL = "kvpipe.lock-sha256"
"""The image's label that holds the hash of the lock that it was built from."""
LEAST = (1, 1)
"""Before Apptainer 1.1 images start only where it is installed setuid."""
START = 60.0
"""Seconds for an image to start: the first time it comes over the network."""
BUILD = "make image   (or make image-offline; KVPIPE_IMAGE names one elsewhere)"
SYMPTOMS = (
    (
        r"user namespace|newuidmap|unprivileged_userns|max_user_namespaces",
        "ask the site to allow user namespaces (sysctl user.max_user_namespaces > 0, "
        "kernel.unprivileged_userns_clone=1) or to install apptainer-suid",
    ),
    (
        r"fuse|squashfuse",
        "ask the site for squashfuse and a readable /dev/fuse on login and compute nodes; until then: "
        "apptainer build --sandbox kvpipe-image containers/kvpipe.sif && export KVPIPE_IMAGE=kvpipe-image",
    ),
    (r"no space left|disk quota", "export APPTAINER_TMPDIR and APPTAINER_CACHEDIR to a folder on scratch"),
    (r"exec format error|architecture", "build the image on a machine with the compute nodes' processor"),
    (r"not a valid|unknown image format|corrupt|unexpected EOF", f"the file is no whole image: {BUILD}"),
)
"""What Apptainer says where an image does not start → the fix."""


LOOK = """
[ -z "$PYTHONPATH" ] || echo "PYTHONPATH=$PYTHONPATH"
[ -z "$TMPDIR" ] || [ -w "$TMPDIR" ] || echo "TMPDIR=$TMPDIR"
"""
"""Run in the image: variables of the login node that do harm there."""


def image_path() -> Path:
    """The image that jobs run in."""
    return Path(os.environ.get("KVPIPE_IMAGE", IMAGE))


def program() -> str | None:
    """The command that starts images."""
    return next((name for name in ("apptainer", "singularity") if shutil.which(name)), None)


def check_container(work: Workload) -> Iterator[Finding]:
    """Findings on Apptainer and the image; none where jobs run without."""
    profile = profile_of(work)
    if not (on_login_node() and profile.containers):
        return
    command, image = program(), image_path()
    if command is None:
        detail = "apptainer is not on the PATH; Snakemake needs it on the login node too, even for a dry run"
        yield Finding("apptainer", FAIL, detail, "module load apptainer")
        return
    yield _version(command)
    if image.exists():
        yield from _image(work, command, image, str(profile.settings.get("apptainer-args", "")).strip())
    else:
        yield Finding("image", FAIL, f"{image} does not exist", BUILD)
    # Snakemake hands both to Apptainer unquoted; the image followed one link, as the Snakefile does
    for name, path in (("image", launch.image_path(str(image))), ("working directory", str(Path.cwd()))):
        if re.search(r"\s", path):
            detail = f"the {name} {path!r} has a space: Snakemake passes it to Apptainer unquoted"
            yield Finding(name, FAIL, detail, "move it to a path without spaces (the image: KVPIPE_IMAGE)")


def _version(command: str) -> Finding:
    answer = ask(command, "--version")
    said = answer.stdout.strip() if answer.returncode == 0 else ""
    found = re.search(r"(\d+)\.(\d+)", said)
    if not found:
        return Finding("apptainer", FAIL, f"{command} --version: {last_line(answer)}", "module load apptainer")
    if said.startswith("apptainer") and (int(found[1]), int(found[2])) < LEAST:
        return Finding("apptainer", WARNING, f"{said} is older than 1.1", "module load a newer apptainer")
    return Finding("apptainer", OK, said)


def _image(work: Workload, command: str, image: Path, options: str) -> Iterator[Finding]:
    # as Snakemake starts it; --home takes the place of the user's home
    start = (command, "exec", "--home", str(Path.cwd()), *shlex.split(options), str(image))
    started = ask(*start, "bash", "-c", LOOK, patience=START)
    if started.returncode:
        yield Finding("image", FAIL, f"{image} does not start: {last_line(started)}", cure(started))
        return
    yield Finding("image", OK, f"{image} starts")
    if "PYTHONPATH=" in started.stdout:
        detail = "PYTHONPATH is set in the image: packages of a module come before the image's own"
        yield Finding("PYTHONPATH in the image", WARNING, detail, f"unset PYTHONPATH, or build the image anew: {BUILD}")
    if "TMPDIR=" in started.stdout:
        detail = f"TMPDIR={os.environ.get('TMPDIR', '')} is no folder that can be written in the image"
        fix = "bind it by apptainer-args: --bind in the profile, or unset TMPDIR"
        yield Finding("TMPDIR in the image", WARNING, detail, fix)
    yield from _lock(command, image)
    yield from _seen(places(work), start, options)
    yield from _home(work.config)


def places(work: Workload) -> dict[str, Path]:
    """What jobs read and write → its folder, links followed: of models and data those that are there."""
    config = work.config
    there = {f"library {library}": Path(library) for library in config.libraries}
    there |= {f"model {name}": Path(m.path) for name, m in config.models.items() if isinstance(m, LocalModel)}
    for source in config.data.sources:
        if isinstance(source, FileData):
            # the folder of the file itself, which may be a link to another place
            there |= {f"data {source.task}, {s}": file.resolve().parent for s, file in data_files(source).items()}
        elif isinstance(source, HubData) and source.is_folder:
            there[f"data {source.task}"] = Path(source.repo)
    written = {key: Path(os.environ[key]).expanduser() for key in CACHES if os.environ.get(key)}
    written["results"] = work.paths.root
    found = written | {name: folder for name, folder in there.items() if folder.exists()}
    return {name: folder.resolve() for name, folder in found.items()}


def _seen(folders: dict[str, Path], start: tuple[str, ...], options: str) -> Iterator[Finding]:
    """Whether folders outside the working directory are the same ones in the image: asked of the image, since a site's own
    configuration may bind more than the profile does."""
    outside = dict.fromkeys(folder for folder in folders.values() if not folder.is_relative_to(Path.cwd()))
    nearest = {folder: next(p for p in (folder, *folder.parents) if p.exists()) for folder in outside}
    if not nearest:
        return
    answer = ask(*start, "stat", "-c", "%d:%i %n", *map(str, dict.fromkeys(nearest.values())), patience=START)
    said = set(answer.stdout.splitlines())
    unseen = [f for f, path in nearest.items() if f"{path.stat().st_dev}:{path.stat().st_ino} {path}" not in said]
    # one line for all of them: a second one would take the place of the first
    line = " ".join([*filter(None, [options]), *(f"--bind {folder}" for folder in unseen)])
    make = "".join(f"mkdir -p {folder}; " for folder in unseen if not folder.exists())
    fix = f'{make}in the profile: apptainer-args: "{line}"'
    for folder in unseen:
        names = ", ".join(name for name, place in folders.items() if place == folder)
        yield Finding(f"{names} in the image", WARNING, f"jobs do not see {folder}", fix)


def _home(config: Config) -> Iterator[Finding]:
    """Snakemake starts the image with the working directory as home: the cache in the user's own is not there."""
    models = any(isinstance(model, HubModel) for model in config.models.values())
    data = any(isinstance(source, HubData) and not source.is_folder for source in config.data.sources)
    used = {"HF_HUB_CACHE": models, "HF_DATASETS_CACHE": data}
    if "HF_HOME" not in os.environ and any(key not in os.environ for key in used if used[key]):
        detail = "not set: jobs have the working directory as home and see nothing of ~/.cache/huggingface"
        fix = "export HF_HOME=<a folder on scratch>   (or ~/.cache/huggingface), then the doctor again"
        yield Finding("HF_HOME in the image", WARNING, detail, fix)


def cure(answer: Answer) -> str:
    """What to do about an image that does not start, by what Apptainer said."""
    for symptom, fix in SYMPTOMS:
        if re.search(symptom, answer.stderr + answer.stdout, flags=re.IGNORECASE):
            return fix
    return "run it by hand: apptainer --debug exec containers/kvpipe.sif true"


def _lock(command: str, image: Path) -> Iterator[Finding]:
    lock, name = PACKAGE.parent / "containers" / "image.lock", "image and lock"
    if not lock.is_file():
        return
    answer = ask(command, "inspect", "--json", "--labels", str(image))
    if answer.returncode:
        detail = f"{command} inspect does not tell the image's labels: {last_line(answer)}"
        yield Finding(name, WARNING, detail, BUILD)
        return
    try:
        labels = json.loads(answer.stdout)["data"]["attributes"]["labels"] or {}
    except (ValueError, KeyError, TypeError):
        labels = {}
    built, wanted = labels.get(LABEL), sha256(lock.read_bytes()).hexdigest()
    if built == wanted:
        yield Finding(name, OK, f"built from {lock.name} ({wanted[:12]})")
    elif built is None:
        yield Finding(name, WARNING, f"the image has no label {LABEL}: it was not built here", BUILD)
    else:
        yield Finding(name, FAIL, f"built from another {lock.name} ({built[:12]}, now {wanted[:12]})", BUILD)
