"""A record: one example with its three segments, its text, and Parquet in and out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kvpipe.config import Reading, Template
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


def render(record: Record, template: Template, reading: Reading = "student") -> Segmented:
    """Apply the template; `own` puts the teacher's longer reasoning in the place of the student's.

    Raises:
        ValueError: the record has no `teacher_reasoning` and `reading` is `own`.
    """
    reasoning, template_of = record.reasoning, template.of(record.task)
    if reading == "own":
        if record.teacher_reasoning is None:
            raise ValueError(f"record {record.id!r} has no teacher_reasoning: add the column or set time.text: student")
        reasoning = record.teacher_reasoning
    return Segmented(
        prompt=template_of.prompt.format(prompt=record.prompt),
        reasoning=template_of.reasoning.format(reasoning=reasoning) if reasoning else "",
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
    except pa.ArrowException as error:
        raise ValueError(f"{path} is damaged ({error}): run `kvpipe data`") from None
    missing = [name for name in SCHEMA.names if name not in (*table.column_names, *OPTIONAL)]
    if missing:
        raise ValueError(f"{path}: column(s) {missing} missing (has {table.column_names})")
    rows = table.select([name for name in SCHEMA.names if name in table.column_names]).to_pylist()
    for row in rows:
        row["choices"] = tuple(row["choices"]) if row.get("choices") else None
        row["messages"] = tuple((role, text) for role, text in row["messages"]) if row.get("messages") else None
    return [Record(**row) for row in rows]
