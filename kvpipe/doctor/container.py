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
from kvpipe.doctor.asked import Asked
from kvpipe.doctor.finding import FAIL, OK, WARNING, Answer, Finding, ask, inside_a_job
from kvpipe.doctor.sources import data_files
from kvpipe.experiment import launch
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.provenance import PACKAGE

IMAGE = "containers/kvpipe.sif"
CACHES = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")
LABEL = "kvpipe.lock-sha256"
"""The image's label that holds the hash of the lock file it was built from."""
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


def image_path() -> Path:
    """The image that jobs run in."""
    return Path(os.environ.get("KVPIPE_IMAGE", IMAGE))


def examine_container(config: Config, paths: Paths, asked: Asked) -> list[Finding]:
    """Findings on Apptainer and the image; none where jobs run without."""
    if inside_a_job() or not (asked.containers and shutil.which("sbatch")):
        return []
    program = next((name for name in ("apptainer", "singularity") if shutil.which(name)), None)
    if program is None:
        detail = "apptainer is not on the PATH; Snakemake needs it on the login node too, even for a dry run"
        return [Finding("apptainer", FAIL, detail, "module load apptainer")]
    return [*_version(program), *_image(program, image_path(), config, paths, asked), *_paths()]


def _version(program: str) -> Iterator[Finding]:
    answer = ask(program, "--version")
    said = answer.out.strip() if answer is not None and answer.code == 0 else ""
    found = re.search(r"(\d+)\.(\d+)", said)
    if not found:
        yield Finding(
            "apptainer", FAIL, f"{program} --version: {answer.said if answer else 'absent'}", "module load apptainer"
        )
    elif said.startswith("apptainer") and (int(found[1]), int(found[2])) < LEAST:
        yield Finding("apptainer", WARNING, f"{said} is older than 1.1", "module load a newer apptainer")
    else:
        yield Finding("apptainer", OK, said)


def _image(program: str, image: Path, config: Config, paths: Paths, asked: Asked) -> Iterator[Finding]:
    if not image.exists():
        yield Finding("image", FAIL, f"{image} does not exist", BUILD)
        return
    started = ask(program, "exec", str(image), "bash", "-c", "true", patience=START)
    if started is None or started.code:
        yield Finding("image", FAIL, f"{image} does not start: {started.said if started else 'absent'}", cure(started))
        return
    yield Finding("image", OK, f"{image} starts")
    yield from _lock(program, image)
    yield from _seen(places(config, paths), program, image, str(asked.settings.get("apptainer-args", "")).strip())
    yield from _home(config)


def places(config: Config, paths: Paths) -> dict[str, Path]:
    """What jobs read and write → its folder, links followed: of models and data those that are there."""
    found = {key: Path(os.environ[key]).expanduser() for key in CACHES if os.environ.get(key)}
    found["results"] = paths.root
    there = {f"library {library}": Path(library) for library in config.libraries}
    there |= {
        f"model {name}": Path(model.path) for name, model in config.models.items() if isinstance(model, LocalModel)
    }
    for source in config.data.sources:
        if isinstance(source, FileData):
            # the folder of the file itself, which may be a link to another place
            there |= {f"data {source.task}, {s}": file.resolve().parent for s, file in data_files(source).items()}
        elif isinstance(source, HubData) and source.is_folder:
            there[f"data {source.task}"] = Path(source.repo)
    found |= {name: folder for name, folder in there.items() if folder.exists()}
    return {name: folder.resolve() for name, folder in found.items()}


def _seen(folders: dict[str, Path], program: str, image: Path, options: str) -> Iterator[Finding]:
    """Whether folders outside the working directory are the same ones in the image: asked of the image, since a site's own
    configuration may bind more than the profile does."""
    here = Path.cwd()
    nearest = {
        folder: next(path for path in (folder, *folder.parents) if path.exists())
        for folder in folders.values()
        if not folder.is_relative_to(here)
    }
    if not nearest:
        return
    # as Snakemake starts it; --home takes the place of the user's home
    start = ("exec", "--home", str(here), *shlex.split(options), str(image))
    answer = ask(program, *start, "stat", "-c", "%d:%i %n", *map(str, dict.fromkeys(nearest.values())), patience=START)
    said = set(answer.out.splitlines()) if answer else set()
    unseen = [
        folder for folder, path in nearest.items() if f"{path.stat().st_dev}:{path.stat().st_ino} {path}" not in said
    ]
    # one line for all of them: a second one would take the place of the first
    line = " ".join([*filter(None, [options]), *(f"--bind {folder}" for folder in unseen)])
    make = "".join(f"mkdir -p {folder}; " for folder in unseen if not folder.exists())
    for folder in unseen:
        names = ", ".join(name for name, place in folders.items() if place == folder)
        yield Finding(
            f"{names} in the image",
            WARNING,
            f"jobs do not see {folder}",
            f'{make}in the profile: apptainer-args: "{line}"',
        )


def _home(config: Config) -> Iterator[Finding]:
    """Snakemake starts the image with the working directory as home: the cache in the user's own is not there."""
    models = any(isinstance(model, HubModel) for model in config.models.values())
    data = any(isinstance(source, HubData) and not source.is_folder for source in config.data.sources)
    lacking = [key for key, used in (("HF_HUB_CACHE", models), ("HF_DATASETS_CACHE", data)) if used]
    if "HF_HOME" not in os.environ and not all(key in os.environ for key in lacking):
        detail = "not set: jobs have the working directory as home and see nothing of ~/.cache/huggingface"
        fix = "export HF_HOME=<a folder on scratch>   (or ~/.cache/huggingface), then the doctor again"
        yield Finding("HF_HOME in the image", WARNING, detail, fix)


def cure(answer: Answer | None) -> str:
    """What to do about an image that does not start, by what Apptainer said."""
    said = "" if answer is None else answer.err + answer.out
    for symptom, fix in SYMPTOMS:
        if re.search(symptom, said, flags=re.IGNORECASE):
            return fix
    return "run it by hand: apptainer --debug exec containers/kvpipe.sif true"


def _lock(program: str, image: Path) -> Iterator[Finding]:
    lock = PACKAGE.parent / "requirements.lock"
    answer = ask(program, "inspect", "--json", "--labels", str(image))
    if not lock.is_file():
        return
    if answer is None or answer.code:
        said = answer.said if answer else "absent"
        yield Finding("image and lock", WARNING, f"{program} inspect does not tell the image's labels: {said}", BUILD)
        return
    try:
        labels = json.loads(answer.out)["data"]["attributes"]["labels"] or {}
    except (ValueError, KeyError, TypeError):
        labels = {}
    built, wanted = labels.get(LABEL), sha256(lock.read_bytes()).hexdigest()
    if built == wanted:
        yield Finding("image and lock", OK, f"built from requirements.lock ({wanted[:12]})")
    elif built is None:
        yield Finding("image and lock", WARNING, f"the image has no label {LABEL}: it was not built here", BUILD)
    else:
        detail = f"built from another requirements.lock ({built[:12]}, now {wanted[:12]})"
        yield Finding("image and lock", FAIL, detail, BUILD)


def _paths() -> Iterator[Finding]:
    """Snakemake hands the working directory to Apptainer unquoted."""
    image = launch.image_path(str(image_path()))  # followed one link, as the Snakefile does
    if re.search(r"\s", image):
        detail = f"the path {image!r} has a space: Snakemake takes no such image"
        yield Finding("image", FAIL, detail, "move it, and export KVPIPE_IMAGE=<a path without spaces>")
    here = Path.cwd()
    if re.search(r"\s", str(here)):
        detail = f"the working directory {str(here)!r} has a space: Snakemake passes it to Apptainer unquoted"
        yield Finding("working directory", FAIL, detail, "move the checkout to a path without spaces")
