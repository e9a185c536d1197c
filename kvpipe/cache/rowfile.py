"""A safetensors file written row by row, in any order, that appears whole or not at all."""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from kvpipe.experiment.files import lock_file

STORED_AS = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8", torch.int32: "I32",
}  # fmt: skip
"""Storage types as the format calls them."""
RESERVED = 256
"""Bytes of the header for what is known at the end alone."""


class RowFile:
    """Columns of known size; rows go to the disk as they come, and no memory holds them.

    Written by position and not through a memory map, whose pages would count as this process's memory.
    """

    def __init__(self, path: Path):
        self.path, self.partial = path, path.with_name(f"{path.name}.partial")
        self._columns: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
        self._metadata: dict[str, str] = {}
        self._data = 0

    def __enter__(self) -> RowFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            ours = lock_file(self._file) and self.partial.stat().st_ino == os.fstat(self._file).st_ino
        except FileNotFoundError:
            ours = False
        if not ours:  # what was opened is another process's, which may have finished since
            os.close(self._file)
            raise BlockingIOError(f"another process is building it ({self.partial.name} is locked)")
        os.ftruncate(self._file, 0)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            self.partial.unlink(missing_ok=True)
        os.close(self._file)

    def begin(self, columns: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]) -> None:
        """Storage type and shape, rows first, of every column, and what is known already beside them."""
        at, self._metadata = 0, metadata
        # wide types first, so that each begins at a multiple of its size
        for name, (dtype, shape) in sorted(columns.items(), key=lambda column: -column[1][0].itemsize):
            self._columns[name] = dtype, shape, at
            at += prod(shape) * dtype.itemsize
        self._data = 8 * -(-(len(self._header()) + RESERVED) // 8) + 8

    def _header(self) -> bytes:
        header: dict[str, object] = {"__metadata__": self._metadata}
        for name, (dtype, shape, begin) in self._columns.items():
            ends = [begin, begin + prod(shape) * dtype.itemsize]
            header[name] = {"dtype": STORED_AS[dtype], "shape": shape, "data_offsets": ends}
        return json.dumps(header).encode()

    def write(self, name: str, row: int, rows: Tensor) -> None:
        """Rows of a column from `row` on."""
        dtype, shape, begin = self._columns[name]
        flat = rows.to(dtype).contiguous().flatten().view(torch.uint8)
        self._put(flat.numpy().data, self._data + begin + row * prod(shape[1:]) * dtype.itemsize)

    def _put(self, left: memoryview | bytes, at: int) -> None:
        while left:
            count = os.pwrite(self._file, left, at)
            left, at = left[count:], at + count

    def finish(self, metadata: dict[str, str]) -> None:
        """The header, and the file under its name."""
        self._metadata = {**self._metadata, **metadata}
        header, room = self._header(), self._data - 8
        self._put(room.to_bytes(8, "little") + header.ljust(room), 0)
        self.partial.replace(self.path)
