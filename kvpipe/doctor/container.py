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

from kvpipe import launch
from kvpipe.dag import Paths
from kvpipe.doctor.asked import Asked
from kvpipe.doctor.finding import FAIL, OK, WARNING, Answer, Finding, ask, inside_a_job
from kvpipe.provenance import PACKAGE

IMAGE = "containers/kvpipe.sif"
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


def examine_container(asked: Asked, paths: Paths) -> list[Finding]:
    """Findings on Apptainer and the image; none where jobs run without."""
    if inside_a_job() or not (asked.containers and shutil.which("sbatch")):
        return []
    program = next((name for name in ("apptainer", "singularity") if shutil.which(name)), None)
    if program is None:
        detail = "apptainer is not on the PATH; Snakemake needs it on the login node too, even for a dry run"
        return [Finding("apptainer", FAIL, detail, "module load apptainer")]
    return [*_version(program), *_image(program, image_path(), asked, paths), *_paths()]


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


def _image(program: str, image: Path, asked: Asked, paths: Paths) -> Iterator[Finding]:
    if not image.exists():
        yield Finding("image", FAIL, f"{image} does not exist", BUILD)
        return
    started = ask(program, "exec", str(image), "bash", "-c", "true", patience=START)
    if started is None or started.code:
        yield Finding("image", FAIL, f"{image} does not start: {started.said if started else 'absent'}", cure(started))
        return
    yield Finding("image", OK, f"{image} starts")
    yield from _lock(program, image)
    options = str(asked.settings.get("apptainer-args", "")).strip()
    cache = os.environ.get("HF_HOME")
    for name, folder in (("HF_HOME", cache and Path(cache).expanduser()), ("results", paths.root)):
        if folder:
            yield from _seen(name, folder.resolve(), program, image, options)


def _seen(name: str, folder: Path, program: str, image: Path, options: str) -> Iterator[Finding]:
    """Whether a folder outside the working directory is the same one in the image: asked of the image, since a site's own
    configuration may bind more than the profile does."""
    here = Path.cwd()
    if folder.is_relative_to(here):
        return
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    # as Snakemake starts it; --home takes the place of the user's home
    start = ("exec", "--home", str(here), *shlex.split(options), str(image))
    answer = ask(program, *start, "stat", "-c", "%d:%i", str(nearest), patience=START)
    known = nearest.stat()
    if answer is None or answer.out.strip() != f"{known.st_dev}:{known.st_ino}":
        make = "" if folder.exists() else f"mkdir -p {folder}; "
        fix = f'{make}in the profile: apptainer-args: "{f"{options} --bind {folder}".strip()}"'
        yield Finding(f"{name} in the image", WARNING, f"jobs do not see {folder}", fix)


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
    if answer is None or answer.code or not lock.is_file():
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
