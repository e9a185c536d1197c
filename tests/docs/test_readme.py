"""The README is true: its Python example runs as it is printed."""

import re
from pathlib import Path

import torch
from tiny import ALPHA, BETA, save_teacher

(EXAMPLE,) = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text("utf-8"), flags=re.DOTALL
)


def test_the_example_aligns_a_teachers_cache_to_a_students(tmp_path, monkeypatch):
    """Another tokenizer, depth, number of heads and dimension; the target is nearer to the student's values than 0 is."""
    save_teacher(tmp_path / "teacher", "beta", BETA, 1)
    save_teacher(tmp_path / "student", "alpha", ALPHA, 0)
    (tmp_path / "text.txt").write_text(
        "Ann has 12 pens and Bob has 7. Together they have 19 pens. x = 3\nx += 4\nprint(x)\n" * 5
    )
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(EXAMPLE, "README.md", "exec"), names)
    target, dst, time = torch.stack(names["target"]), names["dst"].double(), names["time"].to_dense()
    assert target.shape == dst.shape == (ALPHA["num_hidden_layers"], len(names["tokens"]["student"].ids), 24)
    sums = time.sum(1)
    assert (((sums - 1).abs() < 1e-6) | (sums == 0)).all()
    residual = (target - dst).var(1).sum() / dst.var(1).sum()
    assert residual < 0.5, "most of the student's own values follow from the teacher's"
    assert torch.isfinite(target).all()
    assert len(EXAMPLE.splitlines()) <= 15
