"""Files of texts."""

import json

import pandas as pd
import pytest

from kvpipe.data.texts import read_texts


def test_lines_of_text_keep_their_blanks_and_blank_lines_are_no_texts(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff one \r\n\n \ntwo\u2028half\n".encode())
    assert read_texts(path) == [(f"{path}, line 1", " one "), (f"{path}, line 4", "two\u2028half")]


def test_rows_have_a_text_or_a_records_fields(tmp_path):
    rows = [{"text": "a", "prompt": "not this"}, {"prompt": "p", "answer": "x"}, {"answer": "only"}]
    jsonl, parquet = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pd.DataFrame(rows).to_parquet(parquet)
    for path in (jsonl, parquet):
        assert [text for _, text in read_texts(path)] == ["a", "p\nx", "only"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b" \n\n", "holds no text"),
        ("a.txt", b"a\n\xff\n", "line 2: not UTF-8"),
        ("a.csv", b"a\n", "are read from .txt"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1: no column text.*has body.*rename"),
        ("a.jsonl", b'{"text": 7}\n', "line 1: text is int, expected text"),
        ("a.jsonl", b"{\n", "line 1: not valid JSON"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{words}"):
        read_texts(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.txt: no such file of texts"):
        read_texts(tmp_path / "none.txt")
