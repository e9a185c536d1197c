"""The data step: embedded and file sources, with row numbers in errors."""

import json

import pytest

from kvpipe.config import DataConfig
from kvpipe.data import build
from kvpipe.records import SPLITS, read_records

ROW = {"prompt": "p", "reasoning": "", "answer": "a"}


def file_source(tmp_path, rows, **more):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) if isinstance(row, dict) else row for row in rows), encoding="utf-8")
    split = {name: str(path) for name in SPLITS}
    return DataConfig(sources=[{"kind": "files", "task": "qa", **split, **more}])


def test_embedded_splits_are_deterministic(tmp_path):
    config = DataConfig(sources=[{"kind": "embedded", "task": "math", "train": 9, "validation": 5, "test": 7}])
    for out in ("one", "two"):
        build(config, tmp_path / out)
    for split, count in zip(SPLITS, (9, 5, 7), strict=True):
        first, second = (read_records(tmp_path / out / f"{split}.parquet") for out in ("one", "two"))
        assert first == second and len(first) == count


def test_columns_are_mapped(tmp_path):
    columns = {"prompt": "question", "answer": "label", "reasoning": "why"}
    config = file_source(tmp_path, [{"question": "q", "label": 4, "why": None}], columns=columns)
    build(config, tmp_path / "out")
    (record,) = read_records(tmp_path / "out" / "test.parquet")
    assert (record.prompt, record.reasoning, record.answer, record.id) == ("q", "", "4", "qa-test-00000")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"prompt": '], "line 1: not valid JSON"),
        ([{"prompt": "p", "reasoning": ""}], "row 1: no column 'answer'"),
        ([ROW, ROW | {"prompt": " "}], "row 2: prompt is empty"),
        ([ROW | {"id": "1"}] * 2, "id '1' occurs twice"),
    ],
)  # fmt: skip
def test_errors_name_file_and_row(tmp_path, rows, message):
    columns = {"prompt": "prompt", "reasoning": "reasoning", "answer": "answer"}
    if "id" in str(rows):
        columns["id"] = "id"
    with pytest.raises(ValueError, match=message):
        build(file_source(tmp_path, rows, columns=columns), tmp_path / "out")


def test_missing_file_is_named(tmp_path):
    split = {name: str(tmp_path / "absent.jsonl") for name in SPLITS}
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl does not exist"):
        build(DataConfig(sources=[{"kind": "files", "task": "qa", **split}]), tmp_path)
