"""Bad input: files of rows and data sets."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from bad_input_run import Case

GOOD: list[dict[str, Any]] = [
    {"prompt": f"what is {n} and {n + 1} put together", "answer": str(2 * n + 1), "why": "so"} for n in range(100, 140)
]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def rows(
    what: str, says: str, content: str | bytes | list[dict], name: str = "rows.jsonl", test=None, **source
) -> Case:
    """A case of a training file with this content; the other splits are good."""

    def do():
        found = lines(content) if isinstance(content, list) else content
        Path(name).write_bytes(found.encode("utf-8", "surrogatepass") if isinstance(found, str) else found)
        Path("validation.jsonl").write_text(lines(GOOD[20:30]))
        Path("test.jsonl").write_text(lines(GOOD[30:] if test is None else test))

    data = {f"data.{key}": value for key, value in source.pop("data", {}).items()}
    given = {"columns": {"prompt": "prompt", "answer": "answer"}, **source}
    splits = {"train": f"{name}{source.pop('part', '')}", "validation": "validation.jsonl", "test": "test.jsonl"}
    given.pop("part", None)
    found = {"kind": "files", "task": "math", **splits, **given}
    return Case(what, says, "data", {"data.sources": [found], **data}, do=do)


def folder(what: str, says: str, files: dict[str, str | bytes], **source: Any) -> Case:
    """A case of a local folder that is laid out like a data set."""

    def do():
        for name, content in files.items():
            Path("set", name).parent.mkdir(parents=True, exist_ok=True)
            Path("set", name).write_bytes(content.encode() if isinstance(content, str) else content)

    found = {
        "kind": "hub",
        "task": "math",
        "repo": "./set",
        "validation": "train",
        "test": "train",
        "columns": {"prompt": "prompt", "answer": "answer"},
        **source,
    }
    return Case(what, says, "data", {"data.sources": [found]}, do=do)


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def line(text: str) -> str:
    return lines(GOOD[:1]) + text + "\n"


FILES = [
    rows("not UTF-8", r"rows\.jsonl, line 2: not UTF-8: .*; save the file as UTF-8", lines(GOOD[:1]).encode() + b'{"prompt": "\xff"}\n'),
    rows("rows in UTF-16", r"rows\.jsonl, line 1: not UTF-8", lines(GOOD[:2]).encode("utf-16")),
    rows("a line that is cut off", r"rows\.jsonl, line 2: not valid JSON: .* at character", line('{"prompt": "q", "ans')),
    rows("a line that is a list", r"rows\.jsonl, line 2: expected an object with columns, got \[1, 2\]", line("[1, 2]")),
    rows("a line that is a text with escapes", r"rows\.jsonl, line 2: expected an object with columns, got \"\\x9b2J", line('"\x9b2J\u202e"')),
    rows("one list for all rows", r"rows\.jsonl, line 1: expected an object", json.dumps(GOOD[:3])),
    rows("a file of Windows' CR alone", r"rows\.jsonl, line 1: not valid JSON", lines(GOOD[:3]).replace("\n", "\r")),
    rows("6,000 digits", r"rows\.jsonl, line 2: cannot be read: .*; leave the line out", line('{"prompt": "q", "answer": ' + "9" * 6000 + "}")),
    rows("100,000 levels", r"rows\.jsonl, line 2: (cannot be read|not valid JSON)", line('{"prompt": ' + "[" * 100_000)),
    rows("a key twice in a row", r"rows\.jsonl, line 2: .*'answer' stands there twice", line('{"prompt": "q", "answer": "1", "answer": "2"}')),
    rows("NaN as an answer", r"rows\.jsonl, line 2: column 'answer' holds nan", line('{"prompt": "q", "answer": NaN}')),
    rows("half a surrogate", r"rows\.jsonl, line 2: column 'prompt' holds .*no Unicode text", line('{"prompt": "\\ud800", "answer": "1"}')),
    rows("an empty file", r"train rows\.jsonl has no rows", ""),
    rows("a slice of nothing", r"train rows\.jsonl\[:0\] has no rows", GOOD[:3], part="[:0]"),
    rows("a slice that is none", r"rows\.jsonl\[:x%\]: .*slices are \[:95%\]", GOOD[:3], part="[:x%]"),
    rows("a slice beyond the end", r"rows\.jsonl\[90:\].*(has no rows|beyond)", GOOD[:3], part="[90:]"),
    rows("CSV as a file", r"rows\.csv: only \.jsonl .* and \.parquet are read", "prompt,answer\nq,1\n", "rows.csv"),
    rows("compressed", r"rows\.jsonl\.gz: only \.jsonl", b"\x1f\x8b\x08", "rows.jsonl.gz"),
    rows("compressed, under another name", r"rows\.jsonl is compressed; unpack it", gzip.compress(lines(GOOD[:3]).encode())),
    rows("Parquet that is none", r"rows\.parquet: cannot be read as Parquet", b"no table", "rows.parquet"),
    rows("Parquet that is cut off", r"rows\.parquet: cannot be read as Parquet", parquet(pa.table({"prompt": ["q"] * 99}))[:200], "rows.parquet"),
    rows("Parquet with a damaged page", r"rows\.parquet: cannot be read as Parquet: .*(Corrupt|snappy|page)", (lambda b: b[:40] + bytes(x ^ 255 for x in b[40:60]) + b[60:])(parquet(pa.table({"prompt": [f"q{n}" for n in range(99)]}))), "rows.parquet"),
    rows("Parquet with a column twice", r"rows\.parquet: cannot be read as Parquet: the column 'prompt' stands there twice", parquet(pa.table([["q"], ["r"], ["1"]], names=["prompt", "prompt", "answer"])), "rows.parquet"),
    rows("Parquet with a date beyond the year 9999", r"rows\.parquet: cannot be read as Parquet: .*out of range", parquet(pa.table({"prompt": ["q"], "answer": pa.array([2**62], pa.timestamp("us"))})), "rows.parquet"),
    rows("Parquet with bytes", r"rows\.parquet, row 1: column 'prompt' holds bytes", parquet(pa.table({"prompt": [b"q"], "answer": ["1"]})), "rows.parquet"),
    rows("a file that is not there", r"file none\.jsonl does not exist", "", train="none.jsonl"),
    rows("a folder in its place", r"train file \. does not exist|is a folder", "", train="."),
    rows("no column for the answer", r"rows\.jsonl, line 1: no column 'answer' for answer \(has \['solution'\]\)|no column 'prompt'", [{"solution": "x"}]),
    rows("an empty prompt", r"rows\.jsonl, line 1: prompt is empty", [{"prompt": " ", "answer": "1"}]),
    rows("a prompt without width", r"rows\.jsonl, line 1: prompt is empty", [{"prompt": "\u200b\ufeff", "answer": "1"}]),
    rows("leave_out of a column that is not there", r"rows\.jsonl, line 1: no column 'answr' for leave_out", GOOD[:3], leave_out={"answr": "x"}),
    rows("leave_out of all rows", r"leave_out leaves none of 3 rows of train .*make its expressions narrower", GOOD[:3], leave_out={"answer": "."}),
    rows("an answer of null", r"rows\.jsonl, line 2: answer is empty", [GOOD[0], {"prompt": "q", "answer": None}]),
    rows("an object as an answer", r"rows\.jsonl, line 1: column 'answer' holds keys \['b'\]; name one as `answer\.b|key`", [{"prompt": "q", "answer": {"b": 1}}]),
    rows("a column in open braces", r"columns: prompt: '\{prompt'", GOOD[:3], columns={"prompt": "{prompt", "answer": "answer"}),
    rows("an empty pair of braces", r"columns: prompt: .*\{\}.*name in braces", GOOD[:3], columns={"prompt": "{}", "answer": "answer"}),
    rows("a field that no record has", r"columns.*'prmpt'.*'prompt'", GOOD[:3], columns={"prmpt": "prompt", "answer": "answer"}),
    rows("split by no expression", r"split\.answer: .*no regular expression", GOOD[:3], split={"answer": "("}),
    rows("split that does not match", r"rows\.jsonl, line 1: column 'answer' does not match", GOOD[:3], split={"answer": "#### (?P<x>.*)"}),
    rows("split that makes no column", r"split: answer: .*name a group", GOOD[:3], split={"answer": "x"}),
    rows("an expression that finds no end", r"line 1: split: answer: .*no end within", [{"prompt": "q", "answer": "a" * 60}], split={"answer": "^(?P<x>(a+)+)$b"}),
    rows("one choice", r"choices is no list of at least two", [{"prompt": "q", "answer": "1", "c": ["1"]}], columns={"prompt": "prompt", "answer": "answer", "choices": "c"}),
    rows("an empty choice", r"choice 1 of \['1', ''\] is empty", [{"prompt": "q", "answer": "1", "c": ["1", ""]}], columns={"prompt": "prompt", "answer": "answer", "choices": "c"}),
    rows("a choice twice", r"choice '1' stands twice in \['1', '1'\]", [{"prompt": "q", "answer": "1", "c": ["1", "1"]}], columns={"prompt": "prompt", "answer": "answer", "choices": "c"}),
    rows("an answer that is no choice", r"answer '3' is none of the choices", [{"prompt": "q", "answer": "3", "c": ["1", "2"]}], columns={"prompt": "prompt", "answer": "answer", "choices": "c"}),
    rows("a label that names no choice", r"choice 'C' is none of \['A', 'B'\]", [{"prompt": "q", "k": "C", "l": ["A", "B"], "c": ["1", "2"]}], columns={"prompt": "prompt", "choice": "k", "labels": "l", "choices": "c"}),
    rows("messages without an assistant", r"no message of 'assistant'", [{"messages": [{"role": "user", "content": "q"}]}], chat={}, columns={"prompt": "prompt", "answer": "answer"}),
    rows("a role without a turn", r"role\(s\) \['tool'\] have no entry in chat\.turns", [{"messages": [{"role": "tool", "content": "q"}, {"role": "assistant", "content": "a"}]}], chat={}),
    rows("a picture in a message", r"parts of type image_url; only text is read", [{"messages": [{"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "a"}]}], chat={}),
    rows("an id twice", r"id '7' occurs twice in split train", [{**row, "id": 7} for row in GOOD[:2]], columns={"id": "id", "prompt": "prompt", "answer": "answer"}),
    rows("rows twice", r"data\.duplicates: 1 of 3 records in split train", [*GOOD[:2], GOOD[0]], data={"duplicates": "error"}),
    rows("a test question in the training file", r"data\.leakage: 1 of 3 records in split train", [*GOOD[:2], GOOD[35]]),
    rows("a test question in other letters", r"data\.leakage: 1 of 3 records", [*GOOD[:2], {**GOOD[35], "prompt": GOOD[35]["prompt"].upper() + "?!"}]),
    rows("a test question in the reasoning", r"data\.leakage: 1 of 3 records", [*GOOD[:2], {**GOOD[2], "why": f"As in: {GOOD[35]['prompt']}"}], columns={"prompt": "prompt", "answer": "answer", "reasoning": "why"}),
]  # fmt: skip
FOLDERS = [
    folder("no such folder of a data set", r"data\.sources \(math\): \./none is not a folder", {}, repo="./none"),
    folder("a loading script", r"refs/convert/parquet", {"set.py": "import datasets\n"}),
    folder("an empty folder", r"data\.sources \(math\): \./set: expected files of rows", {"notes.md": ""}),
    folder("a split that it does not have", r"Unknown split \"tests\"", {"train.jsonl": lines(GOOD[:3])}, train="tests"),
    folder("an integer of more than 64 bits", r"answer holds an integer of more than 64 bits", {"train.jsonl": '{"prompt": "q", "answer": 12345678901234567890123}\n'}),
    folder("a column of two types", r"train, row 2: column 'answer' holds keys \['a'\]", {"train.jsonl": '{"prompt": "q", "answer": 1}\n{"prompt": "q", "answer": {"a": 1}}\n'}),
    folder("CSV with a short row", r"data\.sources \(math\)|answer is empty", {"train.csv": "prompt,answer\nq\n"}),
    folder("a name that is no repository", r"data\.sources \(math\).*", {}, repo="a/b/c"),
    folder("a repository, offline", r"offline \(HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set\).*run `kvpipe data` once", {}, repo="nobody/nothing"),
]  # fmt: skip
