"""A student sharded over two processes (FSDP) trains as one process trains it, and goes on where it was stopped."""

import json
from pathlib import Path

import pytest
import torch
from processes import together
from safetensors.torch import load_file
from test_whole_batch import SCRIPT, SETTINGS, trained
from tiny import STUDENT, build, config

from kvpipe.config import ConfigError
from kvpipe.steps.train import prepare
from kvpipe.train import trainer as training


def quiet(*_):
    """Says nothing."""


# tied: embeddings and head are one weight in one unit. `joint` trains projectors beside the student, `attention` reads its
# queries, `states` its hidden and final states, and `logit` its head alone
ARMS = ("control", "joint", "attention", "states", "logit")
STATES = {
    "base": "control",
    "role": "experiment",
    "set": {"teachers": ["alpha"], "loss": {"hidden": {"layers": [0, -1]}, "final_state": {"distance": "mse"}}},
}
CHANGED = SETTINGS | {
    "train.steps": 4,
    "train.batch_size": 6,
    "train.checkpoint_every": 2,
    "arms.states": STATES,
    "models.student.architecture": {**STUDENT, "tie_word_embeddings": True},
}
SHARDED = CHANGED | {"train.shard": True, "train.accumulate": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An experiment whose arms are prepared."""
    folder = tmp_path_factory.mktemp("shard")
    work = build(folder, CHANGED)
    for arm in ARMS:
        prepare(work, arm, log=quiet)
    return folder


def history(out: Path) -> list[dict]:
    """What a cell has logged."""
    return [json.loads(line) for line in (out / "history.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Of a trained student."""
    return load_file(out / "model" / "model.safetensors")


@pytest.mark.slow
def test_two_processes_with_half_of_the_student_each_train_as_one(folder, tmp_path):
    """Losses, gradients of every term and weights, over micro-batches, in float64: nothing is left to rounding."""
    trained(1, folder, tmp_path / "one", CHANGED, ARMS, True)
    trained(2, folder, tmp_path / "two", SHARDED, ARMS, True)
    for arm in ARMS:
        one, two = history(tmp_path / "one" / arm), history(tmp_path / "two" / arm)
        assert len(one) == 7, "4 steps, and validation losses before, between and after"
        for a, b in zip(one, two, strict=True):
            ratios = {name for name in a if name.startswith("grad_ratio")}  # norms are summed in float32
            assert {n: b[n] for n in b if n not in ratios} == pytest.approx(
                {n: a[n] for n in a if n not in ratios}, rel=1e-9, abs=1e-11
            ), arm
            assert [b[n] for n in ratios] == pytest.approx([a[n] for n in ratios], rel=1e-6), arm
        found = weights(tmp_path / "two" / arm)
        for name, tensor in weights(tmp_path / "one" / arm).items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_a_sharded_student_goes_on_where_it_was_stopped(folder, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")

    def run(out: str, kill: int) -> list:
        given = {
            "folder": str(folder),
            "out": str(tmp_path / out),
            "overrides": SHARDED,
            "arms": ["joint"],
            "kill": kill,
        }
        return together(2, str(tmp_path / "script.py"), str(Path(__file__).parent), json.dumps(given))

    whole, stopped, again = run("whole", -1), run("parts", 2), run("parts", -1)
    assert [p.returncode for p in whole] == [0, 0], whole[0].stderr
    assert [p.returncode for p in stopped] == [training.EXIT_INTERRUPTED] * 2, stopped[0].stderr
    assert [p.returncode for p in again] == [0, 0], again[0].stderr
    begun = [[json.loads(p.stdout.splitlines()[-1])["begun"] for p in done] for done in (whole, stopped, again)]
    assert begun == [[[0, 1, 2, 3]] * 2, [[0, 1, 2]] * 2, [[3]] * 2]
    one, two = tmp_path / "whole" / "joint", tmp_path / "parts" / "joint"
    assert history(one) == history(two)
    assert (one / "model" / "model.safetensors").read_bytes() == (two / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"train.lora": {}}, "shard: does not go together with lora"),
        ({"train.precision": "fp16"}, r"shard: does not go together with precision: fp16 \(bf16 does\)"),
    ],
)
def test_what_cannot_be_sharded_is_refused(tmp_path, changed, words):
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, {"train.shard": True, **changed})
