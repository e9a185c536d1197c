"""docs/models.md is true: its example runs as it is printed, and its commands are options that exist."""

import re
from pathlib import Path

import torch
from tiny import ALPHA, BETA, save_teacher
from typer.main import get_command

from kvpipe import __main__ as cli

DOC = (Path(__file__).parents[1] / "docs" / "models.md").read_text("utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)


def test_the_example_aligns_a_teachers_cache_to_a_students(tmp_path, monkeypatch):
    """Another tokenizer, depth, number of heads and dimension; the target is nearer to the student's values than 0 is."""
    save_teacher(tmp_path / "teacher", "beta", BETA, 1)
    save_teacher(tmp_path / "student", "alpha", ALPHA, 0)
    (tmp_path / "text.txt").write_text(
        "Ann has 12 pens and Bob has 7. Together they have 19 pens. x = 3\nx += 4\nprint(x)\n" * 5
    )
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(EXAMPLE, "docs/models.md", "exec"), names)
    target, dst, time = names["target"], names["dst"].double(), names["time"].to_dense()
    assert target.shape == dst.shape == (ALPHA["num_hidden_layers"], len(names["tokens"]["student"].ids), 24)
    assert len(names["layers"]) == ALPHA["num_hidden_layers"]
    sums = time.sum(1)
    assert (((sums - 1).abs() < 1e-6) | (sums == 0)).all()
    residual = (target - dst).var(1).sum() / dst.var(1).sum()
    assert residual < 0.5, "most of the student's own values follow from the teacher's"
    assert len([line for line in EXAMPLE.splitlines() if line and not line.startswith(("from", "import"))]) <= 15
    assert torch.isfinite(target).all()


def test_options_in_the_commands_exist():
    commands = get_command(cli.app).commands
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", DOC, flags=re.DOTALL | re.MULTILINE)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    found = [m for line in lines if (m := re.search(r"kvpipe ([a-z-]+)((?: --?[\w-]+.*)?)", line.split("#")[0]))]
    assert {m[1] for m in found} >= {"lock", "models", "train", "publish"}
    for match in found:
        known = {option for parameter in commands[match[1]].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", match[2])) <= known, match[0]
