"""Rows of local files and of data sets on the hub, as dictionaries, and where they come from."""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from kvpipe.config import FileData, HubData

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Rows:
    """Rows of one split, the words that name them in an error, and where they come from."""

    rows: list[dict[str, Any]]
    name: str
    origin: dict[str, Any] = field(default_factory=dict)


def read(source: FileData | HubData, split: str) -> Rows:
    """The rows of a source for `train`, `validation` or `test`; none where it has no such split.

    Raises:
        FileNotFoundError: no such file, data set or split, or (offline) nothing of it in the cache.
        ValueError: a line is not valid JSON (names it), or the cache holds another commit than the one asked for.
    """
    spec = getattr(source, split)
    if spec is None:
        return Rows([], f"{source.task}, {split}")
    return _file(source, split, spec) if isinstance(source, FileData) else _hub(source, spec)


# ---------------------------------------------------------------- files
def _file(source: FileData, split: str, spec: str) -> Rows:
    match = re.fullmatch(r"(.*?)(\[[^\[\]]*\])?", spec)
    assert match is not None
    path, part = Path(match[1]), match[2]
    if not path.is_file():
        raise FileNotFoundError(f"data.sources ({source.task}): {split} file {path} does not exist")
    rows = pq.read_table(path).to_pylist() if path.suffix == ".parquet" else _lines(path)
    origin: dict[str, Any] = {"file": path.as_posix(), "rows_in_file": len(rows)}
    if part is not None:
        start, stop = _bounds(part, len(rows))
        rows, origin["part"] = rows[start:stop], part
    return Rows(rows, str(path), origin)


def _lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    # line by line: str.splitlines would also break at U+2028, which JSON has within strings
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected an object with columns, got {line.strip()[:60]}")
            rows.append(row)
    # a table, as Parquet is one: what only some rows have is None in the others
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in columns} for row in rows]


def _bounds(part: str, count: int) -> tuple[int, int]:
    """First and last row + 1 of a slice such as `[:95%]`, as `datasets` counts them."""
    from datasets import ReadInstruction

    (found,) = ReadInstruction.from_spec(f"all{part}").to_absolute({"all": count})
    return found.from_ or 0, count if found.to is None else found.to


# ---------------------------------------------------------------- hub
def _hub(source: HubData, split: str) -> Rows:
    # the library takes seconds to import: only those who need it pay
    import datasets

    datasets.disable_progress_bars()
    origin: dict[str, Any] = {"repo": source.repo, "name": source.name, "part": split}
    rows: list[dict[str, Any]] = []
    for name in source.name if isinstance(source.name, list) else [source.name]:
        try:
            if _is_folder(source):
                rows += _folder(datasets, source, name, split)
            else:
                # never one from a file, as for models
                token = os.environ.get("HF_TOKEN") or False
                builder = datasets.load_dataset_builder(source.repo, name, revision=source.revision, token=token)
                _check_commit(source, builder.hash)
                rows += _prepared(builder, split)
                origin |= {"revision": source.revision, "commit": builder.hash}
        except (OSError, datasets.exceptions.DatasetsError) as error:
            raise FileNotFoundError(_advice(source, error, datasets.config.HF_HUB_OFFLINE)) from error
        except ValueError as error:
            raise ValueError(f"data.sources ({source.task}): {source.repo}: {error}") from None
    return Rows(rows, f"{source.repo}, {split}", {**origin, "rows": len(rows)})


def _is_folder(source: HubData) -> bool:
    return source.repo.startswith((".", "/"))


def _folder(datasets, source: HubData, name: str | None, split: str) -> list[dict[str, Any]]:
    """Rows of a local folder. The library names its cache after the folder's last name and not after what is in it: a
    cache of its own, for this once, cannot be that of another folder or of yesterday's files."""
    if not Path(source.repo).is_dir():
        raise FileNotFoundError(f"{source.repo} is not a folder")
    with tempfile.TemporaryDirectory(prefix="kvpipe-datasets-") as cache:
        return _prepared(datasets.load_dataset_builder(source.repo, name, cache_dir=cache), split)


def _prepared(builder, split: str) -> list[dict[str, Any]]:
    builder.download_and_prepare()
    return builder.as_dataset(split=split).to_list()


def _check_commit(source: HubData, commit: str | None) -> None:
    """Offline the library takes what is in its cache, whatever revision was asked for."""
    if COMMIT.fullmatch(source.revision) and commit != source.revision:
        raise ValueError(
            f"the cache holds commit {commit}, the configuration asks for {source.revision}: run `kvpipe data` once "
            "with network, or name the commit that is there"
        )


def _advice(source: HubData, error: Exception, offline: bool) -> str:
    if _is_folder(source):
        return f"data.sources ({source.task}): {error}"
    said = f"data.sources ({source.task}): {source.repo} at {source.revision}: {error}"
    if offline:
        return (
            f"{said}; offline (HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set) only data sets in the cache can be read: "
            "run `kvpipe data` once on a machine with network and the same HF_HOME"
        )
    return f"{said}; a gated or private data set needs a token in HF_TOKEN"
