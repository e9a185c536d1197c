"""Files that appear whole or not at all, and that others may read as far as the umask lets them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

GB = 1e9
"""Bytes."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which takes the place of `path` when all is written; its folder is made.

    Without the old file's mode and links: a link to another's file is replaced, not written through.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        if partial.is_file():
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8; an older file stays until the new one is complete."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any, **options: Any) -> None:
    """Write indented JSON; `options` are those of `json.dumps`."""
    write_text(path, json.dumps(document, **{"indent": 2, **options}) + "\n")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; an older file stays until the new one is complete.

    Raises:
        OSError: the disk is full or refuses; names the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as partial:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
        except (OSError, SafetensorError) as error:  # the library's own error for a full disk names no file
            raise OSError(f"{path} could not be written: {error}") from error
        set_mode(partial)


def set_mode(*paths: Path) -> None:
    """Give files the mode that a new file has under the umask: safetensors makes its files for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in paths:
        path.chmod(0o666 & ~mask)
