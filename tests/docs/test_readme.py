"""The README is true: its Python runs as it is printed, its commands, options and make targets exist, its files are there."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from tiny import ALPHA, BETA, save_teacher
from typer.main import get_command

from kvpipe.cli import app as cli
from kvpipe.models.folders import load_model, load_tokenizer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
LIBRARY = (ROOT / "docs" / "library" / "README.md").read_text("utf-8")
TEXT = "Ann has 12 pens and Bob has 7. Together they have 19 pens. x = 3\nx += 4\nprint(x)\n"


def blocks(page: str, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return [
        block for name, block in re.findall(r"^```(\w*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE) if name == language
    ]


def commands() -> list[list[str]]:
    """Every line of the blocks without a language, without its comment."""
    lines = "\n".join(blocks(README, "")).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split("#")[0].split("&&")]
    return [words for part in parts if (words := shlex.split(part.split(">")[0]))]


def save_pair(folder: Path) -> None:
    """Another tokenizer, depth, number of heads and dimension."""
    save_teacher(folder / "teacher", "beta", BETA, 1)
    save_teacher(folder / "student", "alpha", ALPHA, 0)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_exist(words):
    program, *rest = words
    options = {word.split("=")[0] for word in rest if word.startswith("--") and word != "--"}
    if program == "kvpipe":
        known = {option for parameter in get_command(cli.app).commands[rest[0]].params for option in parameter.opts}
        assert options <= known | ({"ls", "cp"} if rest[0] == "recipes" else set())
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
        assert rest and set(rest) <= targets
    else:
        assert program in {"snakemake", "cp", "mkdir", "."}
    for word in rest:
        if word.startswith(("config/", "docs/")) and "=" not in word:
            assert (ROOT / word).exists(), word


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_loop_distils(tmp_path):
    """Keys, values and top logits of a teacher in another tokenizer; the loss falls."""
    (example,) = blocks(README, "python")
    save_pair(tmp_path)
    student, tokenizer = load_model(tmp_path / "student").train(), load_tokenizer(tmp_path / "student")
    texts = [TEXT.replace("12", str(n)) for n in range(20, 28)]
    batches = [dict(tokenizer(texts[:4], return_tensors="pt", padding=True))] * 6
    for batch in batches:
        batch.pop("token_type_ids", None)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    names = {"student": student, "tokenizer": tokenizer, "folder": tmp_path / "teacher", "texts": texts}
    names |= {"batches": batches, "optimizer": optimizer}
    example = example.replace("optimizer.zero_grad()", "optimizer.zero_grad(); seen.append(loss.item())")
    exec(compile(example, "README.md", "exec"), names | {"seen": (seen := [])})
    assert len(seen) == 6 and seen[-1] < seen[0]


def test_a_teachers_cache_lies_in_the_students_space(tmp_path, monkeypatch):
    """The library page's example by hand; the target is nearer to the student's values than 0 is."""
    example = blocks(LIBRARY, "python")[-1]
    save_pair(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT * 5)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, "docs/library/README.md", "exec"), names)
    target, dst, time = torch.stack(names["target"]), names["dst"].double(), names["time"].to_dense()
    assert target.shape == dst.shape == (ALPHA["num_hidden_layers"], len(names["tokens"]["student"].ids), 24)
    sums = time.sum(1)
    assert (((sums - 1).abs() < 1e-6) | (sums == 0)).all()
    residual = (target - dst).var(1).sum() / dst.var(1).sum()
    assert residual < 0.5, "most of the student's own values follow from the teacher's"
    assert torch.isfinite(target).all()
    assert len(example.splitlines()) <= 15
