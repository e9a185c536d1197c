"""Files of a model folder and their manifest, made without torch: a login node brings hub models in a second."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from kvpipe.experiment.files import digest_of, write_json
from kvpipe.experiment.paths import MANIFEST

COPY_LIMIT = 1 << 30
"""Local folders below this many bytes are copied; larger ones are linked."""


def write_manifest(folder: Path, source: dict[str, Any], **how: Any) -> None:
    """`MANIFEST.json`: sha256 of every file and where they came from. The DAG's edge: it changes when a file does.

    Args:
        folder: the model's.
        source: where it came from.
        how: how it is to be held (`load`), as `load_model` reads it; and whether its code runs, which is only noted.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(MANIFEST):
            files[path.relative_to(folder).as_posix()] = digest_of(path, "sha256").removeprefix("sha256:")
    write_json(folder / MANIFEST, {"source": source, "files": files, **how}, sort_keys=True)


def fetch_local(path: Path, out: Path) -> dict[str, Any]:
    """Copy (or, above `COPY_LIMIT`, link) a model folder; returns the manifest's `source`."""
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"models: {path} is not a model folder: it has no config.json")
    link_folder([p for p in sorted(path.iterdir()) if p.is_file() and p.name != MANIFEST], out)
    return {"source": "local", "path": path.as_posix()}


def link_folder(files: list[Path], out: Path) -> None:
    """Copy files into a folder; above `COPY_LIMIT` together they are linked instead."""
    link = sum(p.stat().st_size for p in files) > COPY_LIMIT
    for file in files:
        target = out / file.name
        target.unlink(missing_ok=True)
        if link:
            target.symlink_to(file.resolve())
        else:
            shutil.copyfile(file, target)
