"""The data step: embedded and file sources, with row numbers in errors."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvpipe.config import DataConfig
from kvpipe.data.build import SOURCES, build
from kvpipe.data.records import read_records
from kvpipe.experiment.paths import SPLITS

ROW = {"prompt": "p", "reasoning": "", "answer": "a"}


def file_source(tmp_path, rows, **more):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) if isinstance(row, dict) else row for row in rows), encoding="utf-8")
    split = {name: str(path) for name in SPLITS}
    # one file for all splits: every record is in all of them
    return DataConfig(leakage="report", sources=[{"kind": "files", "task": "qa", **split, **more}])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


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
        ([{"prompt": "p", "reasoning": ""}], r"rows\.jsonl, line 1: no column 'answer'"),
        ([ROW, ROW | {"prompt": " "}], "line 2: prompt is empty"),
        ([ROW | {"id": "1"}] * 2, "id '1' occurs twice"),
    ],
)  # fmt: skip
def test_errors_name_file_and_row(tmp_path, rows, message):
    columns = {"prompt": "prompt", "reasoning": "reasoning", "answer": "answer"}
    if "id" in str(rows):
        columns["id"] = "id"
    with pytest.raises(ValueError, match=message):
        build(file_source(tmp_path, rows, columns=columns), tmp_path / "out")


def test_an_error_counts_the_whole_file(tmp_path):
    """A slice begins where it begins, and blank lines are lines."""
    rows = [ROW | {"prompt": f"p{i}"} for i in range(40)]
    rows[37] |= {"answer": ""}
    for name, lead, expected in (("rows.jsonl", "\n\n", "line 40"), ("rows.parquet", None, "row 38")):
        path = tmp_path / name
        if lead is None:
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text(lead + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        parts = {"train": f"{path}[:90%]", "validation": f"{path}[90%:95%]", "test": f"{path}[95%:]"}
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}, {expected}: answer is empty$"):
            build(DataConfig(sources=[{"kind": "files", "task": "qa", **parts}]), tmp_path / "out")


def test_missing_file_is_named(tmp_path):
    split = {name: str(tmp_path / "absent.jsonl") for name in SPLITS}
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl does not exist"):
        build(DataConfig(sources=[{"kind": "files", "task": "qa", **split}]), tmp_path)


# ---------------------------------------------------------------- duplicates and leakage
def words(*numbers):
    """A question of 15 words that shares at most 2 of them in a row with another."""
    return [{"prompt": " ".join(f"w{n}-{i}" for i in range(15)), "reasoning": "", "answer": str(n)} for n in numbers]


def config_of(tmp_path, train, test, **more):
    files = {"train": write(tmp_path / "train.jsonl", train), "test": write(tmp_path / "test.jsonl", test)}
    files["validation"] = write(tmp_path / "validation.jsonl", words(100, 101))
    return DataConfig(sources=[{"kind": "files", "task": "qa", **files}], **more)


def prompts(out, split):
    return [record.prompt.split()[0] for record in read_records(out / f"{split}.parquet")]


def test_what_is_in_the_test_split_is_an_error_before_anything_is_written(tmp_path):
    rephrased = {**words(2)[0], "answer": "another"}
    config = config_of(tmp_path, [*words(1), rephrased, *words(3)], words(2, 4))
    with pytest.raises(
        ValueError, match=r"data\.leakage: 1 of 3 records in split train, e\.g\. qa-train-00001 \(shared 13"
    ):
        build(config, tmp_path / "out")
    assert not list(tmp_path.glob("out/*.parquet"))


def test_leaks_are_dropped_from_training_never_from_the_test_split(tmp_path):
    config = config_of(tmp_path, words(1, 2, 3), words(2, 4), leakage="drop")
    build(config, tmp_path)
    assert prompts(tmp_path, "train") == ["w1-0", "w3-0"] and prompts(tmp_path, "test") == ["w2-0", "w4-0"]
    report = json.loads((tmp_path / SOURCES).read_text())
    assert report["leakage"]["found"] == {
        "train": [["qa-train-00001", "same content with qa-test-00000"]],
        "validation": [],
    }
    assert report["records"]["train"] == {"qa": 2}


def test_leaks_are_reported_and_kept(tmp_path):
    build(config_of(tmp_path, words(1, 2), words(2), leakage="report"), tmp_path)
    assert len(prompts(tmp_path, "train")) == 2
    assert json.loads((tmp_path / SOURCES).read_text())["leakage"]["found"]["train"] == [
        ["qa-train-00001", "same content with qa-test-00000"]
    ]


def test_a_text_that_all_prompts_share_does_not_empty_the_training_split(tmp_path):
    rows = [{"prompt": " ".join(["same"] * 20) + f" {i}", "reasoning": "", "answer": str(i)} for i in range(5)]
    with pytest.raises(ValueError, match="drop leaves no record of task qa in split train"):
        build(config_of(tmp_path, rows[:3], rows[3:], leakage="drop"), tmp_path)


@pytest.mark.parametrize(("what", "left"), [("keep", 3), ("drop", 2)])
def test_duplicates_are_kept_or_dropped(tmp_path, what, left):
    build(config_of(tmp_path, words(1, 2, 1), words(9), duplicates=what), tmp_path)
    assert len(prompts(tmp_path, "train")) == left and prompts(tmp_path, "train")[:2] == ["w1-0", "w2-0"]
    assert json.loads((tmp_path / SOURCES).read_text())["duplicates"]["found"]["train"] == [
        ["qa-train-00002", "qa-train-00000"]
    ]


def test_duplicates_may_be_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"data\.duplicates: 1 of 3 records in split train"):
        build(config_of(tmp_path, words(1, 2, 1), words(9), duplicates="error"), tmp_path)


def test_rows_are_left_out_by_a_rule_and_named(tmp_path):
    rows = [ROW, ROW | {"reasoning": r"so \boxed{}"}, ROW | {"reasoning": r"\boxed{} goes \boxed{5}"}]
    config = file_source(tmp_path, rows, leave_out={"reasoning": r"\\boxed\{\s*\}(?!.*boxed)"})
    build(config, tmp_path / "out")
    assert len(read_records(tmp_path / "out" / "train.parquet")) == 2
    source = json.loads((tmp_path / "out" / SOURCES).read_text())["sources"][0]
    assert source["left_out"] == 1 and source["rows_left_out"][0].endswith("rows.jsonl, line 2")


def test_the_preset_of_math_leaves_out_solutions_whose_box_is_empty(tmp_path):
    row = {"problem": "1+1?", "solution": r"It is \boxed{2}."}
    rows = [row, row | {"solution": r"It is \boxed{}."}]
    path = write(tmp_path / "math.jsonl", rows)
    source = {"kind": "files", "task": "math", "preset": "math", **dict.fromkeys(SPLITS, path)}
    build(DataConfig(leakage="report", sources=[source]), tmp_path / "out")
    assert [r.answer for r in read_records(tmp_path / "out" / "train.parquet")] == ["2"]
