"""Rows of local files and of data sets on the hub, as dictionaries, and where they come from."""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kvpipe.config import FileData, HubData

COMMIT = re.compile(r"[0-9a-f]{40}")
EXACT = 2.0**53
"""Integers from here on are not exact in double precision."""
COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ", b"PK\x03\x04")
"""How files of gzip, zstd, bzip2, xz and zip begin."""


@dataclass(frozen=True)
class SourceRows:
    """Rows of one split, the place of each in its file or data set, and where they come from."""

    rows: list[dict[str, Any]]
    places: list[str]
    """`file.jsonl, line 7`, counted in the whole file: what an error about the row begins with."""
    origin: dict[str, Any] = field(default_factory=dict)


def read_rows(source: FileData | HubData, split: str) -> SourceRows:
    """The rows of a source for `train`, `validation` or `test`; none where it has no such split.

    Raises:
        FileNotFoundError: no such file, data set or split, or (offline) nothing of it in the cache.
        ValueError: a file that cannot be read (names the line), no rows, or the cache holds another commit than the one
            asked for.
    """
    spec = getattr(source, split)
    if spec is None:
        return SourceRows([], [])
    found = _file(source, split, spec) if isinstance(source, FileData) else _hub(source, spec)
    if not found.rows:
        raise ValueError(f"{_key(source, split)} {spec} has no rows; name more of it, or set {split}: null")
    return found


def _key(source: FileData | HubData, split: str) -> str:
    return f"data.sources ({source.task}): {split}"


# ---------------------------------------------------------------- files
def _file(source: FileData, split: str, spec: str) -> SourceRows:
    path, part = source.parted(spec)
    if not path.is_file():
        raise FileNotFoundError(f"{_key(source, split)} file {path} does not exist")
    if path.suffix not in READERS:
        raise ValueError(
            f"{_key(source, split)} file {path}: only .jsonl (one JSON object a line) and .parquet are read"
        )
    rows, places = READERS[path.suffix](path)
    origin: dict[str, Any] = {"file": path.as_posix(), "rows_in_file": len(rows)}
    if part is not None:
        try:
            start, stop = _bounds(part, len(rows))
        except ValueError as error:
            raise ValueError(f"{_key(source, split)} {spec}: {error}; slices are [:95%], [95%:], [3:7]") from None
        rows, places, origin["part"] = rows[start:stop], places[start:stop], part
    return SourceRows(rows, places, origin)


def _table(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    try:
        names = pq.read_schema(path).names
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the column {twice[0]!r} stands there twice")
        rows = pq.read_table(path).to_pylist()
    # of a damaged page, as of a disk, an OSError; dates beyond what Python has are an OverflowError
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {error}") from None
    return rows, [f"{path}, row {number}" for number in range(1, len(rows) + 1)]


def _lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    rows, places = [], []
    # line by line: str.splitlines would also break at U+2028, which JSON has within strings
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}, line {number}"
            try:
                # some editors begin a file with a byte order mark
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                row = json.loads(text, object_pairs_hook=_once) if text else None
            except UnicodeDecodeError as error:
                if line.startswith(COMPRESSED) and number == 1:
                    raise ValueError(f"{path} is compressed; unpack it, and name what is in it") from None
                raise ValueError(f"{place}: not UTF-8: {error}; save the file as UTF-8") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not valid JSON: {error.msg} at character {error.colno}") from None
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets without end
                raise ValueError(f"{place}: cannot be read: {error}; leave the line out") from None
            if not text:
                continue
            if not isinstance(row, dict):
                raise ValueError(f"{place}: expected an object with columns, got {text[:60]}")
            rows.append(row)
            places.append(place)
    # a table, as Parquet is one: what only some rows have is None in the others
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in columns} for row in rows], places


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys stand there once: `json` would take the last of two."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {max(names, key=names.count)!r} stands there twice")
    return found


READERS = {".jsonl": _lines, ".parquet": _table}


def _bounds(part: str, count: int) -> tuple[int, int]:
    """First and last row + 1 of a slice such as `[:95%]`, as `datasets` counts them."""
    from datasets import ReadInstruction

    (found,) = ReadInstruction.from_spec(f"all{part}").to_absolute({"all": count})
    return found.from_ or 0, count if found.to is None else found.to


# ---------------------------------------------------------------- hub
def _hub(source: HubData, split: str) -> SourceRows:
    # the library takes seconds to import: only those who need it pay
    import datasets

    datasets.disable_progress_bars()
    origin: dict[str, Any] = {"repo": source.repo, "name": source.name, "part": split}
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    for name in source.name if isinstance(source.name, list) else [source.name]:
        try:
            if source.is_folder:
                found = _folder(datasets, source, name, split)
            else:
                # never one from a file, as for models
                token = os.environ.get("HF_TOKEN") or False
                builder = _builder(datasets, source.repo, name, revision=source.revision, token=token)
                _check_commit(source, builder.hash)
                found = _prepared(builder, split)
                origin |= {"revision": source.revision, "commit": builder.hash}
        except (OSError, datasets.exceptions.DatasetsError) as error:
            raise FileNotFoundError(_advice(source, error, datasets.config.HF_HUB_OFFLINE)) from error
        except ValueError as error:
            raise ValueError(f"data.sources ({source.task}): {source.repo}: {error}") from None
        rows += found[0]
        places += [f"{source.repo}{f' ({name})' if name else ''}, {place}" for place in found[1]]
    return SourceRows(rows, places, {**origin, "rows": len(rows)})


def _folder(datasets, source: HubData, name: str | None, split: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of a local folder. The library names its cache after the folder's last name and not after what is in it: a
    cache of its own, for this once, cannot be that of another folder or of yesterday's files."""
    if not Path(source.repo).is_dir():
        raise FileNotFoundError(f"{source.repo} is not a folder")
    with tempfile.TemporaryDirectory(prefix="kvpipe-datasets-") as cache:
        return _prepared(_builder(datasets, source.repo, name, cache_dir=cache), split)


def _builder(datasets, repo: str, name: str | None, **options: Any):
    """The library's builder of a data set. CSV has texts only: left to itself it would make a 7 of `007`."""
    try:
        builder = datasets.load_dataset_builder(repo, name, **options)
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        raise ValueError(
            f"{error}. A data set of a loading script is not run: name revision: refs/convert/parquet, where the hub has "
            "converted it, or save its rows as JSONL or Parquet and use kind: files"
        ) from None
    if builder.name != "csv":
        return builder
    import pandas as pd

    first = next(iter(builder.config.data_files.values()))[0]
    with datasets.utils.file_utils.xopen(first, "rb") as file:
        columns = pd.read_csv(file, nrows=0, sep=builder.config.sep).columns
    features = datasets.Features(dict.fromkeys(columns, datasets.Value("string")))
    return datasets.load_dataset_builder(repo, name, features=features, **options)


def _prepared(builder, split: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of a split, such as `train[:95%]`, and each one's name and number in the whole of it."""
    from datasets import ReadInstruction

    builder.download_and_prepare()
    rows = builder.as_dataset(split=split).to_list()
    parts = ReadInstruction.from_spec(split).to_absolute({n: s.num_examples for n, s in builder.info.splits.items()})
    places = [
        f"{part.splitname}, row {number + 1}"
        for part in parts
        for number in range(*slice(part.from_, part.to).indices(builder.info.splits[part.splitname].num_examples))
    ]
    assert len(places) == len(rows)
    for row, place in zip(rows, places, strict=True):
        for column, value in row.items():
            if builder.name == "json" and isinstance(value, float) and abs(value) >= EXACT and value.is_integer():
                raise ValueError(
                    f"{place}: {column} holds an integer of more than 64 bits, which the library reads as {value}; write "
                    "the numbers of this column as text, or use kind: files"
                )
    return rows, places


def _check_commit(source: HubData, commit: str | None) -> None:
    """Offline the library takes what is in its cache, whatever revision was asked for."""
    if COMMIT.fullmatch(source.revision) and commit != source.revision:
        raise ValueError(
            f"the cache holds commit {commit}, the configuration asks for {source.revision}: run `kvpipe data` once "
            "with network, or name the commit that is there"
        )


def _advice(source: HubData, error: Exception, offline: bool) -> str:
    if source.is_folder:
        if not Path(source.repo).is_dir():
            return f"data.sources ({source.task}): {error}"
        needed = "expected files of rows (.jsonl, .parquet, .csv), named by their splits"
        return f"data.sources ({source.task}): {source.repo}: {needed}; the library says: {error}"
    said = f"data.sources ({source.task}): {source.repo} at {source.revision}: {error}"
    if offline:
        return (
            f"{said}; offline (HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set) only data sets in the cache can be read: "
            "run `kvpipe data` once on a machine with network and the same HF_HOME"
        )
    return f"{said}; a gated or private data set needs a token in HF_TOKEN"
