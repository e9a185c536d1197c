"""Training: a golden curve, determinism, arms that differ in nothing but the arm, and what a cell leaves behind.

The golden curve is written anew by `KVPIPE_GOLDEN=write python -m pytest tests/train/test_trainer.py -k golden`.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import build, config

from kvpipe.data.batches import schedule
from kvpipe.data.records import render
from kvpipe.distill import terms as distill
from kvpipe.distill.losses import NonFiniteLossError
from kvpipe.models.folders import load_model
from kvpipe.models.likelihood import score, scoring_batches
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.train import prepare, train_cell
from kvpipe.train import step as batch_step
from kvpipe.train import trainer as training

GOLDEN = Path(__file__).parents[1] / "golden" / "loss_curve.json"
EVERY_STEP = {"train.log_every": 1, "train.checkpoint_every": 1000}


def quiet(*_):
    pass


class Cell:
    """A trained cell and what it wrote."""

    def __init__(self, work: Inputs, arm: str, folder: Path, seed: int = 0):
        prepare(work, arm, log=quiet)
        self.work, self.out, self.checkpoints = work, folder / "out", folder / "checkpoints"
        train_cell(work, arm, seed, self.out, self.checkpoints, log=quiet)

    @property
    def history(self) -> list[dict]:
        return [json.loads(line) for line in (self.out / "history.jsonl").read_text().splitlines()]

    @property
    def weights(self) -> bytes:
        return (self.out / "model" / "model.safetensors").read_bytes()

    @property
    def cost(self) -> dict:
        return json.loads((self.out / "cost.json").read_text())

    def curve(self, key: str) -> list[float]:
        return [line[key] for line in self.history if key in line]


@pytest.fixture
def cell(tiny, tmp_path):
    """Train an arm of the shared experiment under other settings of `train` and `arms`."""
    count = iter(range(100))

    def make(arm: str, overrides: dict | None = None, seed: int = 0) -> Cell:
        work = Inputs(config(tiny.paths.root.parent, EVERY_STEP | (overrides or {})), tiny.paths)
        return Cell(work, arm, tmp_path / str(next(count)), seed)

    return make


# ---------------------------------------------------------------- the golden run
def test_golden_curve_of_thirty_steps(cell):
    """A refactor reproduces it, a change of method explains it."""
    found = {}
    for arm in ("control", "task"):
        history = cell(arm, {"train.steps": 30, "train.eval_every": 5}).history
        found[arm] = {
            key: [line[key] for line in history if key in line]
            for key in ("validation_loss", "cross_entropy", "keys", "values")
        }
    if os.environ.get("KVPIPE_GOLDEN") == "write":
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    for arm, curves in golden.items():
        assert len(curves["cross_entropy"]) == 30
        assert len(curves["validation_loss"]) == 7
        for key, curve in curves.items():
            assert found[arm][key] == pytest.approx(curve, rel=1e-4), f"{arm}: {key}"


# ---------------------------------------------------------------- what is logged
@pytest.mark.parametrize("arm", ["attention", "one"])
def test_a_cell_says_how_teachers_were_weighed_example_by_example(cell, arm):
    made = cell(arm, {"train.steps": 2, "train.eval_every": 2})
    assert ("router" in made.cost) == (arm == "attention")
    if arm == "attention":
        router = made.cost["router"]
        weights = np.array(router["weights"])  # example layer teacher
        layers = sum(key.startswith("layer/values/") for key in made.history[-2])
        assert weights.shape == (len(router["examples"]), layers, 2) and router["teachers"] == ["alpha", "beta"]
        assert weights.sum(-1) == pytest.approx(np.ones(weights.shape[:2]), abs=2e-4)
        assert weights[..., 0].std(0).min() > 1e-3, "examples differ"


# ---------------------------------------------------------------- determinism
@pytest.mark.parametrize("arm", ["control", "joint"])
def test_the_same_seed_gives_the_same_bits(cell, arm):
    one, two, other = cell(arm), cell(arm), cell(arm, seed=1)
    assert one.weights == two.weights
    assert one.history == two.history
    assert one.weights != other.weights
    assert one.curve("validation_loss")[0] != other.curve("validation_loss")[0], "the initialisation follows the seed"
    assert one.curve("tokens") != other.curve("tokens"), "so does the order of the data"


def test_cells_of_one_seed_share_all_but_the_arm(cell):
    """Initialisation, order of the data and its amount."""
    cells = [cell(arm) for arm in ("control", "one", "two", "joint", "logit", "relation")]
    assert len({c.curve("validation_loss")[0] for c in cells}) == 1
    assert len({c.curve("cross_entropy")[0] for c in cells}) == 1
    assert len({tuple(c.curve("tokens")) for c in cells}) == 1
    assert len({c.weights for c in cells}) == len(cells), "and each arm trains something else"


def test_null_control_is_control_of_another_seed(cell):
    arms = {"arms.other": {"base": "control", "set": {"seed_offset": 7}}}
    assert cell("other", arms, seed=1).weights == cell("control", seed=8).weights


@pytest.mark.parametrize(
    ("base", "zero"),
    [
        ("two", {"loss": {"keys": {"weight": 1e-12}}}),
        ("joint", {"loss": {"values": {"weight": 1e-12}}}),
        ("logit", {"loss.logits.weight": 1e-12}),
        ("relation", {"loss.relations.weight": 1e-12}),
    ],
)
def test_an_arm_of_weight_zero_is_control(cell, base, zero):
    found, control = cell("zero", {"arms.zero": {"base": base, "set": zero}}), cell("control")
    assert found.curve("validation_loss") == pytest.approx(control.curve("validation_loss"), rel=1e-6)
    own, reference = (load_file(c.out / "model" / "model.safetensors") for c in (found, control))
    for name, tensor in reference.items():
        torch.testing.assert_close(own[name], tensor, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- the same training by other means
def test_two_micro_batches_are_one_batch(cell):
    """Example lengths differ inside a batch, so a mean of the micro-batches' means would be another loss."""
    random = {"train.batching": "random", "train.steps": 12}
    whole, parts = (cell("control", random | {"train.accumulate": n}) for n in (1, 2))
    for key in ("cross_entropy", "validation_loss", "grad_norm"):
        assert parts.curve(key) == pytest.approx(whole.curve(key), rel=1e-5), key
    assert parts.curve("tokens") == whole.curve("tokens")


def test_micro_batches_of_a_distilled_arm_agree(cell):
    """Targets are scaled by their deviation in a micro-batch, hence near equality only where they are scaled."""
    arms = {
        f"arms.{scale}": {"base": "two", "set": {"loss.keys.scale": scale, "loss.values.scale": scale}}
        for scale in ("std", "none")
    }
    settings = arms | {"train.batching": "random", "train.steps": 6}
    for arm, tolerance in (("std", 0.1), ("none", 0.005)):
        whole, parts = (cell(arm, settings | {"train.accumulate": n}) for n in (1, 2))
        for key in ("cross_entropy", "keys", "values", "validation_loss"):
            assert parts.curve(key) == pytest.approx(whole.curve(key), rel=tolerance), key


@pytest.mark.parametrize("arm", ["control", "attention"])
def test_gradient_checkpointing_changes_nothing(cell, arm):
    plain, saved = (cell(arm, {"train.gradient_checkpointing": on}) for on in (False, True))
    for key in ("cross_entropy", "keys", "values", "validation_loss"):
        assert saved.curve(key) == pytest.approx(plain.curve(key), rel=1e-5), key


def test_held_and_gathered_targets_are_the_same(cell):
    held, gathered = (cell("task", {"train.hold_targets_gb": gb}) for gb in (1.0, 0.0))
    for key in ("cross_entropy", "keys", "values", "validation_loss"):
        assert gathered.curve(key) == pytest.approx(held.curve(key), rel=1e-5), key


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 1e-3), ("int8", 2e-2)])
def test_stored_and_live_teachers_teach_the_same(tmp_path, dtype, tolerance):
    work = build(tmp_path, EVERY_STEP | {"store.dtype": dtype})
    stored = Cell(work, "own", tmp_path / "stored")
    live_config = config(tmp_path, EVERY_STEP | {"store.dtype": dtype, "store.mode": "live"})
    live = Cell(Inputs(live_config, work.paths), "own", tmp_path / "live")
    assert live.weights != stored.weights, "the store rounds: equality would mean that live was not live"
    for key in ("cross_entropy", "keys", "values", "validation_loss"):
        assert live.curve(key) == pytest.approx(stored.curve(key), rel=tolerance), key


# ---------------------------------------------------------------- which tokens carry cross-entropy
def test_loss_on_completion_is_the_mean_over_reasoning_answer_and_end(cell):
    """At the first step the student is the untrained one: its nats, summed token by token by hand."""
    settings = {"train.loss_on": "completion", "train.steps": 1, "train.batching": "random"}
    made = cell("control", settings)
    work, encoding = made.work, made.work.student_encoding("train")
    examples = schedule(encoding.lengths, work.config.train.batch_size, 1, 0, False)[0]
    nats = []
    model = work.student(0)
    for example in examples:
        record = work.records("train")[example]
        ids = encoding.ids[encoding.rows(example)]
        prompt = len(render(record, work.config.data.template).prompt.encode())
        first = int((encoding.spans[encoding.rows(example), 1] <= prompt).sum())  # tokens that end in the prompt
        with torch.no_grad():
            logprobs = model(input_ids=torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
        assert ids[-1] == work.student_tokenizer.eos_token_id
        nats += [-float(logprobs[i - 1, ids[i]]) for i in range(first, len(ids))]
    assert made.curve("cross_entropy")[0] == pytest.approx(np.mean(nats), rel=1e-5)
    assert cell("control", settings | {"train.loss_on": "all"}).curve("cross_entropy")[0] != pytest.approx(
        np.mean(nats), rel=1e-3
    )
    assert "reasoning and answer, not the prompt" in (made.out / "model" / "README.md").read_text(encoding="utf-8")


def test_micro_batches_weigh_by_the_tokens_that_carry_loss(cell):
    settings = {"train.loss_on": "completion", "train.batching": "random", "train.steps": 12}
    whole, parts = (cell("control", settings | {"train.accumulate": n}) for n in (1, 3))
    for key in ("cross_entropy", "validation_loss", "grad_norm"):
        assert parts.curve(key) == pytest.approx(whole.curve(key), rel=1e-5), key


# ---------------------------------------------------------------- what a cell leaves
STEP_KEYS = {"step", "tokens", "learning_rate", "grad_norm", "cross_entropy", "lambda_cross_entropy"}
KV_KEYS = {"keys", "values", "lambda_keys", "lambda_values", "target_std_keys", "target_std_values", "masked_share"}
WEIGHT_KEYS = {f"weight/{task}/{teacher}" for task in ("math", "code") for teacher in ("alpha", "beta")}


def test_history_lines_have_their_keys(cell):
    control, kv = cell("control").history, cell("task").history
    for history in (control, kv):
        assert [set(line) for line in history if "validation_loss" in line] == [
            {"step", "tokens", "validation_loss"}
        ] * 3
        assert [line["step"] for line in history if "validation_loss" in line] == [0, 3, 6]
        assert [line["step"] for line in history if "cross_entropy" in line] == [1, 2, 3, 4, 5, 6]
    assert all(set(line) == STEP_KEYS for line in control if "cross_entropy" in line)
    for line in (line for line in kv if "cross_entropy" in line):
        expected = STEP_KEYS | KV_KEYS | ({"grad_ratio_keys", "grad_ratio_values"} if line["step"] % 3 == 0 else set())
        layers = {key for key in line if key.startswith("layer/")}
        assert not layers or layers == {f"layer/{kind}/{i}" for kind in ("keys", "values") for i in range(3)}
        assert expected <= set(line) - layers <= expected | WEIGHT_KEYS
        for task, weights in (("math", (0.7, 0.3)), ("code", (0.3, 0.7))):
            found = [line.get(f"weight/{task}/{teacher}") for teacher in ("alpha", "beta")]
            assert found == [None, None] or found == pytest.approx(weights, abs=0.05)
    assert any("layer/keys/0" in line for line in kv)


def test_tokens_and_cost_are_counted_from_the_batches(cell):
    made = cell("control", {"train.steps": 5, "train.accumulate": 2})
    encoding = made.work.student_encoding("train")
    batches = training.schedule(encoding.lengths, 4, 5, seed=0, by_length=True)
    counted = [int(encoding.lengths[batch].sum()) for batch in batches]
    assert made.curve("tokens")[-1] == made.cost["tokens"] == sum(counted)
    padded = sum(len(half) * int(encoding.lengths[half].max()) for b in batches for half in (b[:2], b[2:]))
    assert made.cost["padding_share"] == pytest.approx(1 - sum(counted) / padded)
    assert made.cost["steps"] == 5
    assert made.cost["restarts"] == 0
    assert made.cost["peak_memory_bytes"] > 10**7
    assert made.cost["provenance"]["arm"] == "control"
    assert made.cost["provenance"]["packages"]["torch"] == version("torch")


def test_learning_rate_rises_and_falls_as_a_cosine(cell):
    rates = cell("control", {"train.steps": 20, "train.warmup": 0.2}).curve("learning_rate")
    falling = 0.5 * (1 + torch.cos(torch.pi * torch.arange(16, dtype=torch.float64) / 16))
    assert rates == pytest.approx([3e-3 * share for share in (0.25, 0.5, 0.75, 1.0, *falling.tolist())], rel=1e-9)


@pytest.mark.parametrize("arm", ["control", "two"])
def test_the_exported_student_scores_what_the_history_says(cell, arm):
    made = cell(arm)
    validation = made.work.student_encoding("validation")
    batches = scoring_batches(validation, made.work.student_tokenizer.pad_token_id, 3)
    loss = score(load_model(made.out / "model"), validation, batches).mean_nll()
    assert loss == pytest.approx(made.curve("validation_loss")[-1], rel=1e-6)
    assert not made.checkpoints.exists()
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        p.name for p in (made.out / "model").iterdir()
    }


WITHOUT_KVPIPE = """
import sys
sys.modules["kvpipe"] = None  # importing it raises
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("What is 1 + 2?\\n", return_tensors="pt").input_ids
print(model(input_ids=ids, labels=ids).loss.item())
"""


def test_the_exported_student_needs_no_kvpipe(cell):
    folder = cell("task").out / "model"
    command = [sys.executable, "-c", WITHOUT_KVPIPE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)("What is 1 + 2?\n", return_tensors="pt").input_ids
    assert float(done.stdout) == pytest.approx(load_model(folder)(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


@pytest.mark.parametrize("arm", ["control", "two"])
def test_lora_trains_adapters_and_merges_them(cell, arm):
    made = cell(arm, {"train.lora": {"rank": 3, "alpha": 5}, "train.gradient_checkpointing": arm == "two"})
    full = cell(arm)
    own, reference = (load_file(c.out / "model" / "model.safetensors") for c in (made, full))
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in reference.items()}
    start = made.work.student(0).state_dict()
    embedding = "model.embed_tokens.weight"
    assert torch.equal(own[embedding], start[embedding]), "only the adapted layers move"
    changed = own["model.layers.1.self_attn.k_proj.weight"] - start["model.layers.1.self_attn.k_proj.weight"]
    assert 0 < torch.linalg.matrix_rank(changed, rtol=1e-3) <= 3
    assert made.curve("validation_loss")[0] == full.curve("validation_loss")[0]
    validation = made.work.student_encoding("validation")
    batches = scoring_batches(validation, made.work.student_tokenizer.pad_token_id, 3)
    loss = score(load_model(made.out / "model"), validation, batches).mean_nll()
    assert loss == pytest.approx(made.curve("validation_loss")[-1], rel=1e-5)


# ---------------------------------------------------------------- what must not be trained on
def test_nan_in_a_term_stops_with_step_and_term(cell, monkeypatch, tmp_path):
    real, calls = distill.layer_kv_losses, iter(range(1000))

    def poisoned(*args, **kwargs):
        # one call for keys and one for values in every step (those whose gradients are watched apart have more): the
        # seventh is the values' of step 4
        return real(*args, **kwargs) * (float("nan") if next(calls) == 7 else 1.0)

    monkeypatch.setattr(distill, "layer_kv_losses", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"step 4: loss term 'values' is NaN"):
        cell("two", {"train.checkpoint_every": 3, "train.eval_every": 6})
    assert sorted(p.name for p in tmp_path.glob("*/checkpoints/*")) == ["step-00000001", "step-00000003"]
    assert not list(tmp_path.glob("*/out/*"))


def test_a_gradient_that_is_not_finite_is_not_applied(cell, monkeypatch, tmp_path):
    """The loss may be finite where its gradient is not: the weights would be lost, and saved."""
    real, calls = batch_step.final_states, iter(range(1000))

    def poisoned(*args, **inputs):
        states, output = real(*args, **inputs)
        if next(calls) == 4:
            states.register_hook(lambda gradient: gradient * float("inf"))
        return states, output

    monkeypatch.setattr(batch_step, "final_states", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"step 5: .*gradient"):
        cell("control", {"train.checkpoint_every": 1})
    assert max(p.name for p in tmp_path.glob("*/checkpoints/*")) == "step-00000004"
    assert not list(tmp_path.glob("*/out/*"))
