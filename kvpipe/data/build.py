"""Data step: the configured sources → one Parquet file per split, validated."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from kvpipe.config import DataConfig, EmbeddedData, FileData, HubData
from kvpipe.data.corpus import generate
from kvpipe.data.leakage import duplicates, leaks
from kvpipe.data.mapping import lookup, to_record
from kvpipe.data.patterns import time_limit
from kvpipe.data.records import Record, write_records
from kvpipe.data.rows import read_rows
from kvpipe.experiment.files import write_json
from kvpipe.experiment.paths import SOURCES, SPLITS


def build(config: DataConfig, out: Path) -> None:
    """Write `train.parquet`, `validation.parquet` and `test.parquet` into `out`, and `sources.json`: where the records
    come from, how many there are, and which were dropped.

    Raises:
        ValueError: a row that cannot become a record (names source and row), an id that occurs twice, or what
            `data.duplicates` and `data.leakage` call errors. No split is written then.
    """
    splits: dict[str, list[Record]] = {}
    origins: list[dict[str, Any]] = []
    for split in SPLITS:
        splits[split] = []
        for source in config.sources:
            records, origin = _records(source, split, config)
            splits[split] += records
            origins.append({"task": source.task, "split": split, **origin, "records": len(records)})
        ids = pd.Series([record.id for record in splits[split]])
        if ids.duplicated().any():
            raise ValueError(f"data.sources: id {ids[ids.duplicated()].iloc[0]!r} occurs twice in split {split}")
    repeated = {split: duplicates(records) for split, records in splits.items()}
    splits = {
        split: _without(split, splits[split], repeated[split], "duplicates", config.duplicates) for split in SPLITS
    }
    # the test split stays as it is: what it has in common with the others is taken out of the others
    shared = {
        split: [
            (leak.train, f"{leak.reason} with {leak.test}")
            for leak in leaks(splits[split], splits["test"], config.ngram)
        ]
        for split in ("train", "validation")
    }
    for split, found in shared.items():
        splits[split] = _without(split, splits[split], found, "leakage", config.leakage)
    for split in SPLITS:
        write_records(out / f"{split}.parquet", splits[split])
    report = {
        "sources": origins,
        "duplicates": {"what": config.duplicates, "found": repeated},
        "leakage": {"what": config.leakage, "ngram": config.ngram, "found": shared},
        "records": {split: dict(Counter(record.task for record in records)) for split, records in splits.items()},
    }
    write_json(out / SOURCES, report)


def _without(split: str, records: list[Record], found: list[tuple[str, str]], key: str, what: str) -> list[Record]:
    """The records without those that were found, if they are to be dropped."""
    shown = ", ".join(f"{name} ({why})" for name, why in found[:3])
    if found and what == "error":
        raise ValueError(
            f"data.{key}: {len(found)} of {len(records)} records in split {split}, e.g. {shown}; correct the sources or "
            f"set data.{key}: drop"
        )
    if what != "drop":
        return records
    dropped = {name for name, _ in found}
    kept = [record for record in records if record.id not in dropped]
    for task in {record.task for record in records} - {record.task for record in kept}:
        raise ValueError(
            f"data.{key}: drop leaves no record of task {task} in split {split} (e.g. {shown}); is there a text that all "
            f"prompts have in common? Put it into data.template"
        )
    return kept


def _records(
    source: EmbeddedData | FileData | HubData, split: str, config: DataConfig
) -> tuple[list[Record], dict[str, Any]]:
    if isinstance(source, EmbeddedData):
        return generate(source.task, split, getattr(source, split), source.difficulty, config.seed), {}
    found = read_rows(source, split)
    records = []
    left_out = []
    for number, (row, place) in enumerate(zip(found.rows, found.places, strict=True)):
        try:
            with time_limit(f"leave_out: {', '.join(source.leave_out)}"):
                values = {column: lookup(row, column, "leave_out") for column in source.leave_out}
                leave = any(
                    re.search(rule, "" if values[column] is None else str(values[column]))
                    for column, rule in source.leave_out.items()
                )
            if leave:
                left_out.append(place)
                continue
            records.append(to_record(row, source, f"{source.task}-{split}-{number:05d}"))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    if left_out and not records:
        raise ValueError(
            f"data.sources ({source.task}): leave_out leaves none of {len(left_out)} rows of {split} ({left_out[0]} is the "
            "first that it takes); make its expressions narrower"
        )
    return records, found.origin | ({"left_out": len(left_out), "rows_left_out": left_out} if left_out else {})
