"""Files: written whole or not at all, readable as far as the umask lets others, known by their hashes. No torch."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from hashlib import sha1, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpipe.experiment.paths import MANIFEST

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

GB = 1e9
"""Bytes."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which takes the place of `path` when all is written; its folder is made.

    Without the old file's mode and links: a link to another's file is replaced, not written through.

    Raises:
        OSError: the disk is full or refuses; names the file.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:  # of a library, which may not say which file, or says the partial one
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        if partial.is_file() or partial.is_symlink():
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8; an older file stays until the new one is complete."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any, **options: Any) -> None:
    """Write indented JSON; `options` are those of `json.dumps`."""
    write_text(path, json.dumps(document, **{"indent": 2, **options}) + "\n")


def read_json(path: Path, fix: str, keys: Iterable[str] = ()) -> dict[str, Any]:
    """A JSON object that a step has written.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it cannot be read as one, or lacks one of `keys`; names the file and what to do.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: {fix}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {fix}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (no JSON object): {fix}")
    if absent := [key for key in keys if key not in found]:
        raise ValueError(f"{path} is damaged (no {', '.join(absent)}): {fix}")
    return found


def read_table(path: Path, fix: str, columns: Iterable[str] = ()) -> pd.DataFrame:
    """A table that a step has written, Parquet or (by `pandas.read_csv`) CSV.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it cannot be read as one, or lacks one of `columns`; names the file and what to do.
    """
    import pandas as pd

    try:
        found = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: {fix}") from None
    except (ValueError, OSError) as error:  # pyarrow's own errors are among them
        raise ValueError(f"{path} is damaged ({error}): {fix}") from None
    if absent := [column for column in columns if column not in found]:
        raise ValueError(f"{path}: column(s) {absent} missing (has {list(found.columns)}): {fix}")
    return found


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; an older file stays until the new one is complete. The same content gives the same bytes.

    Raises:
        OSError: the disk is full or refuses; names the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as partial:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
        except SafetensorError as error:  # the library's own for a full disk
            raise OSError(str(error)) from error
        if metadata and len(metadata) > 1:
            _sort_metadata(partial)
        set_mode(partial)


def _sort_metadata(path: Path) -> None:
    """The library writes metadata in an order that differs from process to process."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # a character that the library escapes otherwise may take more
            file.seek(8)
            file.write(text.ljust(length))


def set_mode(*paths: Path) -> None:
    """Give files the mode that a new file has under the umask: safetensors makes its files for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in paths:
        path.chmod(0o666 & ~mask)


# ---------------------------------------------------------------- one process at a time
def lock_file(handle: int, wait: bool = False) -> bool:
    """Take the lock of an open file, which ends with the process; False where another process has it.

    A file system that has no locks (Lustre mounted without `flock`) lets everyone in.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    return True


@contextmanager
def alone(path: Path, taken: str, log: Callable[[str], object] | None = None) -> Iterator[None]:
    """Hold a lock file, which stays there.

    Args:
        path: the file; its folder is made.
        taken: what it means that another process holds it.
        log: takes that line, and the other process is waited for; without, it is an error.

    Raises:
        OSError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        if not lock_file(file.fileno()):
            if log is None:
                raise OSError(f"{taken} ({path} is locked): wait for it, or stop it and run the same command again")
            log(f"{taken}; waiting for it")
            lock_file(file.fileno(), wait=True)
        yield


# ---------------------------------------------------------------- hashes
def digest_of(path: Path, kind: str) -> str:
    """`kind:hex` of a file's content, `sha256` or `git` (SHA-1 of a git blob)."""
    found = sha256() if kind == "sha256" else sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            found.update(block)
    return f"{kind}:{found.hexdigest()}"


def content_digest(path: Path) -> str:
    """SHA-256 of a file in hex; read once in a process, and again only after the file has changed."""
    found = path.stat()
    # ctime too: no program can set it, so that a file written anew with its old size and mtime is seen
    return _content(path.resolve(), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@cache
def _content(path: Path, *state: int) -> str:
    return digest_of(path, "sha256").removeprefix("sha256:")


def verify(path: Path, expected: str, said_by: Path, fix: str) -> None:
    """Refuse a file that is not the one whose SHA-256 was written down.

    Args:
        path: the file.
        expected: SHA-256 in hex.
        said_by: where that stands.
        fix: what to do, for the message.

    Raises:
        ValueError: the file is missing, damaged, or another one.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing, which {said_by} lists: {fix}")
    if content_digest(path) != expected:
        raise ValueError(f"{path} is damaged or was replaced: its checksum is not the one in {said_by}; {fix}")


def folder_digest(folder: Path) -> str:
    """Hash of a model folder, 16 digits: weights, config, tokenizer and whatever else, but for the card and hidden files."""
    found = sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in ("README.md", MANIFEST) and not path.name.startswith("."):
            found.update(f"{path.name} {digest_of(path, 'sha256')}\n".encode())
    return found.hexdigest()[:16]
