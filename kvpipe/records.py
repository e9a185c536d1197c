"""A record: one example with its three segments, its text, and Parquet in and out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from kvpipe.config import Template
from kvpipe.segments import Segmented

SPLITS = ("train", "validation", "test")
Reading = Literal["student", "own"]


@dataclass(frozen=True)
class Record:
    """One example. `teacher_reasoning` is the teacher's own, longer working for the same answer, or None."""

    id: str
    task: str
    prompt: str
    reasoning: str
    answer: str
    teacher_reasoning: str | None = None

    def content_hash(self) -> str:
        """Hash of what the example asks and answers, whatever its id."""
        return sha256("\x1f".join((self.task, self.prompt, self.answer)).encode()).hexdigest()


def render(record: Record, template: Template, reading: Reading = "student") -> Segmented:
    """Apply the template; `own` puts the teacher's longer reasoning in the place of the student's.

    Raises:
        ValueError: the record has no `teacher_reasoning` and `reading` is `own`.
    """
    reasoning = record.reasoning
    if reading == "own":
        if record.teacher_reasoning is None:
            raise ValueError(
                f"record {record.id!r} has no teacher_reasoning, which time.text: own needs; "
                "add the column or set time.text: student"
            )
        reasoning = record.teacher_reasoning
    return Segmented(
        prompt=template.prompt.format(prompt=record.prompt),
        reasoning=template.reasoning.format(reasoning=reasoning) if reasoning else "",
        answer=template.answer.format(answer=record.answer),
    )


SCHEMA = pa.schema([pa.field(f.name, pa.string(), nullable=f.name == "teacher_reasoning") for f in fields(Record)])


def write_records(path: Path, records: list[Record]) -> None:
    """Write records to one Parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([asdict(r) for r in records], schema=SCHEMA), path)


def read_records(path: Path) -> list[Record]:
    """Read records from a Parquet file written by `write_records`.

    Raises:
        ValueError: a column is missing; names the file and the column.
    """
    table = pq.read_table(path)
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise ValueError(f"{path}: column(s) {missing} missing (has {table.column_names})")
    return [Record(**row) for row in table.select(SCHEMA.names).to_pylist()]
