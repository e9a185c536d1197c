"""Rows: slices of local files and folders, and the hub with the real client: first with network, then from the cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import data_zoo
import dataset_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from kvpipe.config import FileData, HubData
from kvpipe.data.rows import read

ROOT = Path(__file__).parents[2]


def jsonl(path, count):
    path.write_text("".join(json.dumps({"n": i}) + "\n" for i in range(count)), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "part, numbers",
    [
        ("", range(41)),
        ("[:95%]", range(39)),
        ("[95%:]", range(39, 41)),
        ("[3:7]", range(3, 7)),
        ("[-2:]", range(39, 41)),
    ],
)
def test_slices_of_a_file(tmp_path, part, numbers):
    path = jsonl(tmp_path / "rows.jsonl", 41)
    found = read(FileData(task="t", train=f"{path}{part}"), "train")
    assert [row["n"] for row in found.rows] == list(numbers)
    assert found.origin["file"] == path.as_posix() and found.origin["rows_in_file"] == 41
    assert read(FileData(task="t", train=f"{path}{part}"), "test").rows == []


def test_a_line_that_is_no_object(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n[2]\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: expected an object"):
        read(FileData(task="t", test=str(path)), "test")


def test_lines_end_where_the_file_says(tmp_path):
    """A line separator within a string is text, blank lines are none, and an error counts the file's lines."""
    path = tmp_path / "rows.jsonl"
    texts = ["one\u2028line", "another\x85one\u2029"]
    lines = [json.dumps({"a": text}, ensure_ascii=False) for text in texts]
    path.write_text(f"{lines[0]}\r\n\r\n{lines[1]}\n\n  \n", encoding="utf-8", newline="")
    assert [row["a"] for row in read(FileData(task="t", test=str(path)), "test").rows] == texts
    path.write_text(f"{lines[0]}\n\n{{\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3: not valid JSON"):
        read(FileData(task="t", test=str(path)), "test")


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "é"}\n', encoding="utf-8-sig")
    assert read(FileData(task="t", test=str(path)), "test").rows == [{"a": "é"}]


@pytest.mark.parametrize(
    "name, content, part, said",
    [
        ("r.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "", r"r\.jsonl, line 2: not UTF-8: .*; save the file as UTF-8"),
        ("r.jsonl", b"", "", r"data\.sources \(t\): test .*r\.jsonl has no rows; .* set test: null"),
        ("r.jsonl", b'{"a": 1}\n', "[:0]", r"data\.sources \(t\): test .*r\.jsonl\[:0\] has no rows"),
        ("r.jsonl", b'{"a": 1}\n', "[:x%]", r"data\.sources \(t\): test .*r\.jsonl\[:x%\]: .*; slices are \[:95%\]"),
        ("r.csv", b"a\n1\n", "", r"test file .*r\.csv: only \.jsonl \(one JSON object a line\) and \.parquet are read"),
        ("r.json", b'[{"a": 1}]', "", r"r\.json: only \.jsonl"),
        ("r.parquet", b"no table", "", r"r\.parquet: cannot be read as Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, part, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read(FileData(task="t", test=f"{tmp_path / name}{part}"), "test")


def test_a_column_that_only_some_rows_have(tmp_path):
    """None in the others, within the part and beyond it, as in a Parquet file."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2, "b": "x"}\n{"a": 3, "c": "y"}\n', encoding="utf-8")
    found = read(FileData(task="t", train=f"{path}[:2]"), "train").rows
    assert found == [{"a": 1, "b": None, "c": None}, {"a": 2, "b": "x", "c": None}]


@pytest.mark.parametrize("preset", list(data_zoo.ROWS))
def test_a_local_folder_is_read_like_its_repository(tmp_path, preset):
    folder = data_zoo.write(tmp_path / preset, preset)
    # the invented repository has not all subjects
    more = {"name": ["algebra", "geometry"]} if preset == "math" else {}
    source = HubData(task="t", preset=preset, repo=str(folder), **more)
    found = read(source, "test").rows
    expected = data_zoo.rows(preset, "test") + (data_zoo.rows(preset, "test", 1000) if preset == "math" else [])
    assert found == expected


def test_slices_of_a_split_part_it(tmp_path):
    source = HubData(task="t", preset="gsm8k", repo=str(data_zoo.write(tmp_path / "g", "gsm8k")))
    train, validation = read(source, "train"), read(source, "validation")
    assert train.rows + validation.rows == data_zoo.rows("gsm8k", "train")
    assert (len(train.rows), len(validation.rows)) == (38, 2)
    assert train.origin["part"] == "train[:95%]" and train.origin["rows"] == 38


def test_rows_of_a_repository_are_counted_in_the_whole_split(tmp_path):
    gsm8k = HubData(task="t", preset="gsm8k", repo=str(data_zoo.write(tmp_path / "g", "gsm8k")))
    places = read(gsm8k, "validation").places
    assert places == [f"{gsm8k.repo} (main), train, row {n}" for n in (39, 40)]
    repo = str(data_zoo.write(tmp_path / "m", "math"))
    names = ["algebra", "geometry"]
    both = HubData(task="t", preset="math", repo=repo, name=names, test="train[-1:]+test[:2]")
    found = read(both, "test")
    last = len(data_zoo.rows("math", "train"))
    counted = [f"train, row {last}", "test, row 1", "test, row 2"]
    assert found.places == [f"{repo} ({name}), {place}" for name in names for place in counted]


def test_a_folder_of_the_same_name_is_not_taken_for_another(tmp_path):
    """`datasets` names its cache after the folder alone: it would answer with the first one's rows."""
    for number, offset in enumerate((0, 500)):
        folder = data_zoo.write(tmp_path / str(number) / "same", "chat")
        path = next(folder.rglob("test-*"))
        pq.write_table(pa.Table.from_pylist(data_zoo.rows("chat", "test", offset)), path)
        found = read(HubData(task="t", preset="chat", repo=str(folder)), "test").rows
        assert found == data_zoo.rows("chat", "test", offset)


@pytest.mark.parametrize(
    "more, said",
    [
        ({"repo": "./none"}, r"data\.sources \(t\): \./none is not a folder"),
        ({"test": "tests"}, r"data\.sources \(t\): .*Unknown split \"tests\"\. Should be one of \['train', 'test'\]"),
        ({"name": "mian"}, r"data\.sources \(t\): .*'mian' not found\. Available: \['main', 'socratic'\]"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, more, said):
    repo = str(data_zoo.write(tmp_path / "g", "gsm8k"))
    with pytest.raises((FileNotFoundError, ValueError), match=said):
        read(HubData(**{"task": "t", "preset": "gsm8k", "repo": repo, **more}), "test")


# ---------------------------------------------------------------- the hub, in processes of their own
EXPERIMENT = {
    "student": "s",
    "models": {"s": {"source": "scratch", "architecture": {"model_type": "llama"}}},
    "arms": {"control": {}},
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """run(endpoint, offline, **source) → the finished process of `kvpipe data`; its folder; the served repository."""
    folder = tmp_path_factory.mktemp("hub")
    repo = data_zoo.write(folder / "repo", "gsm8k")

    (folder / "home").mkdir()
    (folder / "home" / "token").write_text("hf_from_a_file")

    def run(endpoint, offline, token=None, **more):
        source = {"kind": "hub", "preset": "gsm8k", "task": "math", "repo": "invented/gsm", "revision": dataset_hub.TAG}
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump({**EXPERIMENT, "data": {"sources": [source | more]}}), encoding="utf-8")
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **({"HF_TOKEN": token} if token else {}),
        }
        command = [
            sys.executable,
            "-m",
            "kvpipe",
            "data",
            "--config",
            str(config),
            "--results",
            str(folder / "results"),
        ]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    return run, folder, repo


def test_downloaded_once_then_read_offline(hub):
    run, folder, repo = hub
    commit = dataset_hub.commit_of(repo)
    with dataset_hub.serve({"invented/gsm": repo}) as (endpoint, requests):
        done = run(endpoint, offline=False)
        assert done.returncode == 0, done.stderr
        downloads = [r for r in requests if r.startswith("GET") and r.endswith(".parquet")]
        assert len(downloads) == 2 and all(commit in r for r in downloads), "each file of the one configuration, once"
        assert not any(r.startswith("Bearer") for r in requests), "a token from a file is not used"
        failed = run(endpoint, offline=False, revision="v2", token="hf_mine")
        assert {r for r in requests if r.startswith("Bearer")} == {"Bearer hf_mine"}
        assert failed.returncode == 1 and "Revision 'v2' doesn't exist" in failed.stderr
        assert "Traceback" not in failed.stderr
    written = (folder / "results" / "data" / "train.parquet").read_bytes()
    found = json.loads((folder / "results" / "data" / "sources.json").read_text())["sources"]
    assert {entry["commit"] for entry in found} == {commit} and [e["records"] for e in found] == [38, 2, 7]

    (folder / "results" / "data" / "train.parquet").unlink()
    again = run(endpoint, offline=True)  # nobody listens there any more
    assert again.returncode == 0, again.stderr
    assert (folder / "results" / "data" / "train.parquet").read_bytes() == written
    other = run(endpoint, offline=True, revision="a" * 40)
    assert other.returncode == 1 and f"the cache holds commit {commit}" in other.stderr
    absent = run(endpoint, offline=True, repo="invented/other")
    assert absent.returncode == 1 and "run `kvpipe data` once on a machine with network" in absent.stderr


@pytest.mark.parametrize("line", ['{"answer": ' + "9" * 6000 + "}", '{"answer": ' + "[" * 100_000])
def test_a_line_that_no_parser_takes_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"answer": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: (cannot be read|not valid JSON)"):
        read(FileData(task="t", train=str(path)), "train")


def test_texts_of_csv_stay_as_they_are_written(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text("prompt,answer\nq,007\nq,12\nq,5.10\n")
    found = read(HubData(task="t", repo=str(tmp_path / "set"), validation=None, test=None), "train")
    assert [row["answer"] for row in found.rows] == ["007", "12", "5.10"]


def test_an_integer_of_more_than_64_bits_is_refused_where_the_library_rounds_it(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"answer": 12345678901234567890123}\n')
    with pytest.raises(ValueError, match="answer holds an integer of more than 64 bits"):
        read(HubData(task="t", repo=str(tmp_path / "set"), validation=None, test=None), "train")


def test_a_loading_script_says_what_to_do(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text("import datasets\n")
    with pytest.raises((ValueError, FileNotFoundError), match=r"refs/convert/parquet|data\.sources"):
        read(HubData(task="t", repo=str(tmp_path / "set"), validation=None, test=None), "train")
