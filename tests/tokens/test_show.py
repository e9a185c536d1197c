"""The printed and the machine-readable alignment."""

import io
import json
import re

import pytest
from rich.console import Console
from tokenizer_zoo import build

from kvpipe.tokens.matrix import encode, overlap
from kvpipe.tokens.show import alignment_rows, show_alignment, visible

TEXT = "Zoë has 12\r\n日本 "


def printed(renderable) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


@pytest.mark.parametrize("mode", ["iou", "causal", "position"])
def test_json_is_the_overlap_matrix(mode):
    src, dst = build("llama2"), build("llama3")
    rows = json.loads(show_alignment(src, dst, TEXT, mode, as_json=True))
    matrix = overlap(encode(src, TEXT).spans, encode(dst, TEXT).spans, mode).to_dense()
    assert len(rows) == matrix.shape[0]
    for i, row in enumerate(rows):
        assert row["position"] == i
        shown = {source["position"]: source["weight"] for source in row["sources"]}
        expected = {j: w for j, w in enumerate(matrix[i].tolist()) if w}
        assert shown == pytest.approx(expected, abs=1e-6)


def test_json_pieces_join_to_the_text():
    rows = alignment_rows(build("llama2"), build("llama3"), TEXT)
    joined = re.sub(rb"<0x(..)>", lambda m: bytes.fromhex(m[1].decode()), "".join(r["text"] for r in rows).encode())
    assert joined.decode() == TEXT
    assert [row["id"] for row in rows] == encode(build("llama3"), TEXT).ids.tolist()
    assert rows[0]["token"] == "<|begin_of_text|>" and rows[0]["sources"] == []


def test_table_makes_whitespace_and_masking_visible():
    out = printed(show_alignment(build("llama2"), build("llama3"), TEXT, "causal"))
    assert "␍⏎" in out and "·" in out and "<|begin_of_text|> (no bytes)" in out and "none: masked" in out
    assert "<0xC3>" in out and "日" in out


def test_table_does_not_read_tokens_as_markup():
    out = printed(show_alignment(build("gpt2"), build("gpt2"), "[red]x[/red] [/]"))
    assert out.count("[") == out.count("]") == 6  # three of each, as destination and as source


def test_empty_text_gives_an_empty_table():
    assert json.loads(show_alignment(build("gpt2"), build("gpt2"), "", as_json=True)) == []
    assert show_alignment(build("gpt2"), build("gpt2"), "").row_count == 0


def test_visible_signs():
    assert visible(" \n\t\0\u200d\u200b") == "·⏎⇥␀‹ZWJ›‹U+200B›"
