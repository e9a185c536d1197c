"""One example of which a teacher reads another text than the student: both texts, and what each student token reads."""

from __future__ import annotations

from dataclasses import dataclass

from kvpipe.align.timemap import build_time_map
from kvpipe.config import Arm, Reading
from kvpipe.data.encoding import Encoding, encode_records
from kvpipe.data.records import Record, read_as, read_records
from kvpipe.report.collect import Results
from kvpipe.tokens.segments import NAMES, Segmented
from kvpipe.tokens.show import visible

MOST = 2
"""Teachers that are shown."""
OWN: tuple[Reading, ...] = ("written", "own", "student")
"""What a teacher reads otherwise than the student, the most telling first."""


@dataclass(frozen=True)
class ReadExample:
    """A record under one student and some teachers."""

    record: str
    texts: list[tuple[str, Segmented]]
    """Whose, and the text; the student's first."""
    teachers: list[str]
    rows: list[tuple[str, str, list[str]]]
    """Student token, its segment, and of each teacher what it reads."""


def read_example(results: Results) -> ReadExample | None:
    """A training record of which teachers of some arms, as many as can be, read another text than their student."""
    alike: dict[tuple[Reading, Reading], dict[str, Arm]] = {}
    for arm in results.dag.arms.values():
        if arm.time.text != arm.reading:
            alike.setdefault((arm.time.text, arm.reading), {}).update(dict.fromkeys(arm.teachers, arm))
    found = sorted(alike.items(), key=lambda pair: (-min(MOST, len(pair[1])), OWN.index(pair[0][0])))
    if not found or not found[0][1] or not results.records("train"):
        return None
    (reading, own_reading), teachers = found[0]
    pairs = list(teachers.items())[:MOST]
    student = read_as(results.records("train"), own_reading, results.config.data.short)
    read: dict[str, list[Record]] = {}
    for teacher, _ in pairs:
        path = results.paths.records(teacher, "train", reading)
        if not path.is_file() or not (results.paths.model(teacher) / "tokenizer.json").is_file():
            return None
        read[teacher] = read_as(read_records(path), "student" if reading == "written" else reading)
    differing = [sum(r.reasoning != own[i].reasoning for own in read.values()) for i, r in enumerate(student)]
    number = max(range(len(student)), key=differing.__getitem__)
    if not differing[number]:
        return None
    dst = _encoded(results, student[number], results.config.student)
    sources = {teacher: _encoded(results, own[number], teacher) for teacher, own in read.items()}
    columns = [_read(arm, sources[teacher], dst) for teacher, arm in pairs]
    pieces = _pieces(dst)
    segments = [next(n for n, (a, b) in zip(NAMES, dst.segments[0], strict=True) if a <= i < b) for i in pieces]
    return ReadExample(
        student[number].id,
        [("student", dst.texts[0]), *((teacher, src.texts[0]) for teacher, src in sources.items())],
        list(read),
        [(pieces[i], name, [c[i] for c in columns]) for i, name in zip(pieces, segments, strict=True)],
    )


def _encoded(results: Results, record: Record, model: str) -> Encoding:
    return encode_records([record], results.tokenizer(model), results.config.data.template)


def _pieces(encoding: Encoding) -> dict[int, str]:
    """Token → its piece of the text, of those that have one."""
    data = encoding.texts[0].text.encode()
    spans = enumerate(encoding.spans.tolist())
    return {i: visible(data[a:b].decode(errors="replace")) for i, (a, b) in spans if b > a}


def _read(arm: Arm, src: Encoding, dst: Encoding) -> list[str]:
    """For each student token the teacher tokens that it reads, with their weights where there are several."""
    time, pieces, out = build_time_map(arm.time, src, dst), _pieces(src), []
    for index, weight in zip(time.index.tolist(), time.weight.tolist(), strict=True):
        entries = [(i, w) for i, w in zip(index, weight, strict=True) if w > 0]
        several = len(entries) > 1
        words = (f"{pieces.get(i, '(no text)')} @{i}" + (f" {w:.2f}" if several else "") for i, w in entries)
        out.append("   ".join(words) or "none: masked")
    return out
