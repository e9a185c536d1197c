"""Tensor files that appear whole or not at all, and that others may read as far as the umask lets them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; its folder is made, and an older file stays until the new one is complete.

    Raises:
        OSError: the disk is full or refuses; names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
    except (OSError, SafetensorError) as error:  # the library has an error of its own for a full disk; it names no file
        if partial.is_file():
            partial.unlink()
        raise OSError(f"{path} could not be written: {error}") from error
    set_mode(partial)
    partial.replace(path)


def set_mode(*paths: Path) -> None:
    """Give files the mode that a new file has under the umask: safetensors makes its files for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in paths:
        path.chmod(0o666 & ~mask)
