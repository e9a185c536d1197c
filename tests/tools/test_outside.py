"""TRL's trainer in a cell: with the forward divergence it takes the steps of kvpipe's own full KL."""

import json

import outside
import pytest
import torch
from sized import TINY, Sizes, made

from kvpipe.steps.cells import KeptCells, keep_cell, run_cells

STEPS, TOKENS = 3, 24


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """An experiment with kvpipe's full KL and the same arm for TRL, both trained and kept."""
    root = tmp_path_factory.mktemp("outside")
    kl = {
        "base": "control",
        "role": "baseline",
        "set": {"teachers": ["t0"], "loss": {"cross_entropy": {"weight": 0}, "logits": {"candidates": "all"}}},
    }
    steps = {"steps": STEPS, "log_every": 1, "eval_every": STEPS, "precision": "fp32", "learning_rate": 1e-2}
    sizes = Sizes(
        {**TINY, "num_hidden_layers": 1},
        [TINY],
        tokens=TOKENS,
        arms={"kl": kl, "gkd-forward": kl},
        settings={f"train.{key}": value for key, value in steps.items()} | {"models.t0.load.dtype": "fp32"},
    )
    inputs = made(root, sizes)
    cells = KeptCells(inputs, root / "kept")
    run_cells(cells, [("kl", 0)], True, None, lambda *_: None)
    outside.train(inputs, "gkd-forward", 0, lambda *_: None)
    keep_cell(cells, "gkd-forward", 0, True, lambda *_: None)
    return cells


def lines(kept, arm):
    """The logged steps and the validation losses of a cell."""
    found = [json.loads(line) for line in (kept.folder_of(arm, 0) / "history.jsonl").read_text("utf-8").splitlines()]
    return [x for x in found if "validation_loss" not in x], [x for x in found if "validation_loss" in x]


def test_it_is_a_cell_as_any_other(kept):
    assert kept.differs("gkd-forward", 0) == []
    assert (kept.folder_of("gkd-forward", 0) / "items.csv").is_file()


def test_its_forward_divergence_is_the_full_kl(kept):
    (ours, our_losses), (theirs, their_losses) = lines(kept, "kl"), lines(kept, "gkd-forward")
    assert [x["step"] for x in theirs] == [x["step"] for x in ours] == [1, 2, 3]
    # kvpipe divides by all tokens, TRL by those that something predicts: all but the first of each text
    length = TOKENS + 1
    scaled = [x["logits"] * length / (length - 1) for x in ours]
    assert [x["gkd-forward"] for x in theirs] == pytest.approx(scaled, rel=1e-3)
    assert [x["learning_rate"] for x in theirs] == pytest.approx([x["learning_rate"] for x in ours])
    assert their_losses[0]["validation_loss"] == our_losses[0]["validation_loss"]
    moved = their_losses[0]["validation_loss"] - their_losses[-1]["validation_loss"]
    ends = [x[-1]["validation_loss"] for x in (their_losses, our_losses)]
    assert moved > 0 and ends[0] == pytest.approx(ends[1], abs=0.01 * moved)
    assert torch.are_deterministic_algorithms_enabled()
