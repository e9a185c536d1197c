"""The page of two tokenizers: its numbers are the comparison's, and nothing in a text or a name is markup."""

import re

import pytest
from tokenizer_zoo import build
from typer.testing import CliRunner

from kvpipe.cli import app as cli
from kvpipe.report.pair import percent, write_pair
from kvpipe.tokens.compare import compare_tokenizers

TEXTS = [
    ("line 1", "def f(x):\n\treturn x <b>&amp; 12"),
    ("line 2", "<script>alert(1)</script> {{ 7 * 7 }} Zoë 日本 🙂"),
    ("line 3", "the cat " * 200),
    ("line 4", " \n "),
]


def write(out) -> str:
    return write_pair(("<i>teacher</i>", "o/student"), (build("bert_cased"), build("llama3")), TEXTS, out)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "deeper" / "page.html"
    return write(out), out.read_text("utf-8")


def test_the_page_states_the_comparison(written):
    said, page = written
    found = compare_tokenizers(build("bert_cased"), build("llama3"), TEXTS)
    total = found.total("causal")
    assert said in page
    assert f"{100 * total.targets / total.tokens:.1f}% of the student’s {total.tokens:,} tokens have a target" in said
    assert f"{100 * found.same / total.tokens:.1f}% of them are one teacher token" in said
    body = re.search(r"<caption>The 3 texts whose tokens overlap least.*?<tbody>(.*?)</tbody>", page, re.DOTALL)[1]
    assert re.findall(r'scope="row">(line \d)', body) == [text.place for text in found.worst(9)]
    assert "nothing of it is left for the teacher" in page
    assert 20 < body.count("the·cat") < 40, "a long text is shortened"


def test_nothing_is_markup_or_loaded(written):
    _, page = written
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    assert "<i>teacher" not in page and "&lt;i&gt;teacher&lt;/i&gt;" in page
    assert "{{·7·*·7·}}" in page
    assert not re.search(r'(src|href)="(?!#)', page) and "@import" not in page and "url(http" not in page
    assert page.count("<svg") == 1 and "prefers-color-scheme: dark" in page


def test_the_same_inputs_give_the_same_bytes(written, tmp_path):
    write(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text("utf-8") == written[1]


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(0, 9, "0.0%"), (9, 9, "100.0%"), (1, 9999, "< 0.1%"), (9998, 9999, "> 99.9%"), (1, 3, "33.3%"), (0, 0, "0.0%")],
)
def test_a_share_is_not_rounded_to_all_or_nothing(part, whole, text):
    assert percent(part, whole) == text


def align(*arguments: str):
    return CliRunner().invoke(cli.app, ["align", *arguments])


def test_the_command(tiny, tmp_path):
    texts, out = tmp_path / "texts.txt", tmp_path / "page.html"
    texts.write_text("1 + 2 = 3\nZoë\n")
    pair = [word for name in ("alpha", "student") for word in ("--tokenizer", str(tiny.paths.model(name)))]
    done = align("--report", str(out), *pair, str(texts))
    assert done.exit_code == 0, done.output
    assert f"page: {out}" in done.output.replace("\n", "") and done.output.startswith("Under causal, ")
    assert out.is_file()
    iou = align("--report", str(out), "--mode", "iou", *pair, str(texts))
    assert iou.output.startswith("Under iou, 100.0%")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokenizer", "a", "--text", "x"], "give two tokenizers"),
        (["--tokenizer", "a", "--tokenizer", "b", "--tokenizer", "c", "--text", "x"], "give two tokenizers"),
        (["--tokenizer", "a", "--tokenizer", "b"], "give either --text TEXT, or --report"),
        (["--tokenizer", "a", "--tokenizer", "b", "texts.txt"], "give either --text TEXT, or --report"),
        (["--tokenizer", "a", "--tokenizer", "b", "--report", "x.html"], "give either --text TEXT, or --report"),
    ],
)
def test_half_a_command_says_what_is_missing(arguments, words):
    done = align(*arguments)
    assert done.exit_code == 2 and words in " ".join(done.output.replace("│", "").split())
