"""A record: one example with its three segments, its text, and Parquet in and out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kvpipe.config import Reading, ShortReasoning, Template
from kvpipe.experiment.files import replacing
from kvpipe.tokens.segments import Segmented

OPTIONAL = ("tests", "choices", "messages")
"""Fields that few data sets have."""


@dataclass(frozen=True)
class Record:
    """One example.

    `teacher_reasoning` is the teacher's own, longer working for the same answer; `tests` is code that a program must
    pass; `choices` are the answers to choose from, `answer` among them; `messages` are the turns (role, text) before the
    answer, where the row is a conversation. Plain text is all `reasoning`.
    """

    id: str
    task: str
    prompt: str
    reasoning: str
    answer: str
    teacher_reasoning: str | None = None
    tests: str | None = None
    choices: tuple[str, ...] | None = None
    messages: tuple[tuple[str, str], ...] | None = None

    def content_hash(self) -> str:
        """Hash of what the example asks and answers (of plain text: of the text), whatever its id."""
        parts = (self.task, self.prompt, self.answer)
        return sha256("\x1f".join(parts if any(parts[1:]) else (*parts, self.reasoning)).encode()).hexdigest()


def read_as(records: Iterable[Record], reading: Reading, short: ShortReasoning | None = None) -> list[Record]:
    """The records with the reasoning that is read in the place of their own.

    Raises:
        ValueError: `own` of a record without `teacher_reasoning`, or nothing is left of a record; names it.
    """
    return (
        list(records)
        if reading == "student"
        else [_read_as(record, reading, short or ShortReasoning()) for record in records]
    )


def _read_as(record: Record, reading: Reading, short: ShortReasoning) -> Record:
    if reading == "own":
        if record.teacher_reasoning is None:
            raise ValueError(
                f"record {record.id!r} has no teacher_reasoning: map the column, or set time.kind: overlap"
            )
        return replace(record, reasoning=record.teacher_reasoning)
    if not record.prompt + record.answer:
        raise ValueError(f"record {record.id!r} is all reasoning: student_reasoning: {reading} leaves nothing of it")
    return replace(record, reasoning=shortened(record.reasoning, short) if reading == "short" else "")


def shortened(reasoning: str, short: ShortReasoning) -> str:
    """The end of a reasoning: its last sentences, or its last words."""
    if short.sentences is not None:
        return " ".join(re.split(r"(?<=[.!?])\s+|\n+", reasoning)[-short.sentences :])
    words = reasoning.split()
    kept = math.ceil(len(words) * (0.5 if short.share is None else short.share))
    return " ".join(words[len(words) - kept :])


def render(record: Record, template: Template) -> Segmented:
    """Apply the template."""
    template_of = template.of(record.task)
    return Segmented(
        prompt=template_of.prompt.format(prompt=record.prompt),
        reasoning=template_of.reasoning.format(reasoning=record.reasoning) if record.reasoning else "",
        answer=template_of.answer.format(answer=record.answer),
    )


TYPES = {"choices": pa.list_(pa.string()), "messages": pa.list_(pa.list_(pa.string()))}
SCHEMA = pa.schema(
    [
        pa.field(f.name, TYPES.get(f.name, pa.string()), nullable=f.name in ("teacher_reasoning", *OPTIONAL))
        for f in fields(Record)
    ]
)


def write_records(path: Path, records: list[Record]) -> None:
    """Write records to one Parquet file; columns of `OPTIONAL` only where a record has them."""
    unused = [name for name in OPTIONAL if all(getattr(record, name) is None for record in records)]
    schema = pa.schema([column for column in SCHEMA if column.name not in unused])
    rows = [{name: value for name, value in asdict(record).items() if name not in unused} for record in records]
    with replacing(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), partial)


def read_records(path: Path) -> list[Record]:
    """Read records from a Parquet file written by `write_records`.

    Raises:
        ValueError: a column is missing; names the file and the column.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: run `kvpipe data`") from None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): run `kvpipe data`") from None
    missing = [name for name in SCHEMA.names if name not in (*table.column_names, *OPTIONAL)]
    if missing:
        raise ValueError(f"{path}: column(s) {missing} missing (has {table.column_names})")
    rows = table.select([name for name in SCHEMA.names if name in table.column_names]).to_pylist()
    for row in rows:
        row["choices"] = tuple(row["choices"]) if row.get("choices") else None
        row["messages"] = tuple((role, text) for role, text in row["messages"]) if row.get("messages") else None
    return [Record(**row) for row in rows]
