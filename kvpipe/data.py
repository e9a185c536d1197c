"""Data step: the configured sources → one Parquet file per split, validated."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from kvpipe.config import DataConfig, EmbeddedData, FileData
from kvpipe.corpus import generate
from kvpipe.records import SPLITS, Record, write_records


def build(config: DataConfig, out: Path) -> None:
    """Write `train.parquet`, `validation.parquet` and `test.parquet` into `out`."""
    for split in SPLITS:
        records = [record for source in config.sources for record in _records(source, split, config)]
        ids = pd.Series([record.id for record in records])
        if ids.duplicated().any():
            raise ValueError(f"data.sources: id {ids[ids.duplicated()].iloc[0]!r} occurs twice in split {split}")
        write_records(out / f"{split}.parquet", records)


def _records(source: EmbeddedData | FileData, split: str, config: DataConfig) -> list[Record]:
    if isinstance(source, EmbeddedData):
        return generate(source.task, split, getattr(source, split), source.difficulty, config.seed)
    return _read_file(source, split)


def _read_file(source: FileData, split: str) -> list[Record]:
    path = Path(getattr(source, split))
    if not path.is_file():
        raise FileNotFoundError(f"data.sources ({source.task}): {split} file {path} does not exist")
    if path.suffix == ".parquet":
        rows = pd.read_parquet(path).to_dict("records")
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from None
    records = []
    for number, row in enumerate(rows, start=1):
        values = {}
        for field, column in source.columns.items():
            if column not in row:
                raise ValueError(f"{path}, row {number}: no column {column!r} for {field} (has {sorted(row)})")
            values[field] = row[column]
        for field in ("prompt", "answer"):
            if not str(values.get(field) or "").strip():
                raise ValueError(f"{path}, row {number}: {field} is empty")
        records.append(
            Record(
                id=str(values.get("id") or f"{source.task}-{split}-{number - 1:05d}"),
                task=source.task,
                prompt=str(values["prompt"]),
                reasoning=str(values.get("reasoning") or ""),
                answer=str(values["answer"]),
                teacher_reasoning=str(values["teacher_reasoning"]) if values.get("teacher_reasoning") else None,
            )
        )
    return records
