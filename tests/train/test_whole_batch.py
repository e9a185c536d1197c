"""The objective is the batch's: micro-batches and processes are ways to compute it, and change no term or gradient."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from processes import cells, together
from safetensors.torch import load_file
from tiny import MORE_ARMS, build, config

from kvpipe.cache.teacher import LiveRows
from kvpipe.config import ConfigError
from kvpipe.distill.losses import NonFiniteLossError
from kvpipe.experiment.device import check_precision, without_environment
from kvpipe.experiment.paths import Paths
from kvpipe.steps import train as cell_step
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.train import prepare, train_cell
from kvpipe.train import trainer as training
from kvpipe.train.step import ROUTED

SETTINGS = {
    "train.steps": 2,
    "train.batch_size": 7,
    "train.log_every": 1,
    "train.eval_every": 2,
    "train.max_grad_norm": 1e9,
    "train.batching": "random",
}
UNSCALED = {"scale": "none", "distance": "smooth_l1", "skip_sink": 2}
HEADS = {"projector": {"kind": "heads", "mode": "slow"}, "fit.method": "grouped"}
MORE = {
    "slow": {"base": "two", "set": HEADS},
    "learnable": {"base": "two", "set": {"fuse": {"kind": "learnable", "entropy": 0.1}}},
    "offsets": {
        "base": "two",
        "set": {"fuse": {"kind": "task", "weights": {"default": [0.7, 0.3]}, "offsets": True, "entropy": 0.1}},
    },
    "unscaled": {"base": "two", "set": {"loss": {"keys": UNSCALED, "values": UNSCALED}}},
    "layers": {"base": "joint", "set": {"loss.keys.layers": [2, 0], "loss.values.layers": [2, 0]}},
    "moving": {"base": "elastic", "set": {"projector.mode": "joint"}},
}
MORE |= {name: MORE_ARMS[name] for name in ("many", "states", "likelihood", "attention-outputs")}
LEARNED = ("joint", "slow", "learnable", "offsets", "states")
ARMS = (
    *LEARNED,
    "one",
    "attention",
    "select",
    "own",
    "unscaled",
    "layers",
    "moving",
    "logit",
    "relation",
    "many",
    "likelihood",
    "attention-outputs",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An experiment whose arms are prepared."""
    folder = tmp_path_factory.mktemp("objective")
    work = build(folder, overrides({}))
    for arm in ("control", *ARMS):
        prepare(work, arm, log=lambda *_: None)
    return folder


def overrides(changed: dict) -> dict:
    return SETTINGS | {f"arms.{name}": entry for name, entry in MORE.items()} | changed


def found(out: Path, arm: str) -> tuple[list[dict], list[list[torch.Tensor]]]:
    history = [json.loads(line) for line in (out / arm / "history.jsonl").read_text().splitlines()]
    return history, torch.load(out / arm / "gradients.pt")


def agree(whole: Path, parts: Path, arm: str, tolerance: float) -> None:
    """All that is logged, and the gradient of the first step as a vector."""
    (history, steps), (other, others) = found(whole, arm), found(parts, arm)
    assert len(history) == len(other) == 4
    for a, b in zip(history, other, strict=True):
        assert b == pytest.approx(a, rel=tolerance, abs=tolerance * 1e-2), arm
    # in float32 the gradient as one vector: a tensor by itself may be what is left of large numbers
    one, two = (flat(s) if tolerance > 1e-6 else [g for step in s for g in step] for s in (steps, others))
    for a, b in zip(one, two, strict=True):
        assert (a - b).norm() <= tolerance * a.norm() + 1e-12, arm


def flat(steps: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.cat([g.flatten() for g in steps[0]])]


def trained(
    number: int, folder: Path, out: Path, changed: dict, arms: tuple[str, ...], double: bool, **variables
) -> None:
    """Cells of so many processes."""
    given = {"folder": str(folder), "out": str(out), "overrides": changed, "arms": arms, "double": double}
    for process in together(number, str(Path(__file__).with_name("processes.py")), json.dumps(given), **variables):
        assert process.returncode == 0, process.stderr


@pytest.fixture(scope="module")
def whole(request, folder, tmp_path_factory):
    """Every arm with the batch in one part."""
    double = request.param == "fp64"
    out = tmp_path_factory.mktemp("whole")
    trained(1, folder, out, overrides({}), ARMS, double)
    return out, double, 1e-9 if double else 1e-5


# float64 leaves nothing to rounding; in the dtype of a run one number of parts is enough
@pytest.mark.parametrize(("whole", "accumulate"), [("fp32", 3), ("fp64", 2), ("fp64", 3)], indirect=["whole"])
def test_micro_batches_change_no_term_and_no_gradient(folder, whole, tmp_path, accumulate):
    out, double, tolerance = whole
    trained(1, folder, tmp_path, overrides({"train.accumulate": accumulate}), ARMS, double)
    for arm in ARMS:
        agree(out, tmp_path, arm, tolerance)


@pytest.mark.parametrize(("whole", "accumulate"), [("fp32", 2), ("fp64", 1), ("fp64", 3)], indirect=["whole"])
def test_two_processes_are_one(folder, whole, tmp_path, accumulate):
    out, double, tolerance = whole
    trained(2, folder, tmp_path, overrides({"train.accumulate": accumulate}), ARMS, double)
    for arm in ARMS:
        agree(out, tmp_path, arm, tolerance)
        assert not (tmp_path / f"{arm}.checkpoints").exists()
        assert json.loads((tmp_path / arm / "cost.json").read_text())["processes"] == 2
        one, two = (load_file(f / arm / "model" / "model.safetensors") for f in (out, tmp_path))
        for name, tensor in one.items():
            # one Adam step magnifies what rounding leaves of a gradient near 0
            torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-7 if double else 1e-4)


def test_a_live_teacher_reads_every_micro_batch_once(tmp_path, monkeypatch):
    live = overrides({"store.mode": "live", "train.hold_targets_gb": 0})
    work = build(tmp_path, live)
    prepare(work, "learnable", log=lambda *_: None)
    asked = []
    fetch = LiveRows.fetch
    monkeypatch.setattr(
        LiveRows,
        "fetch",
        lambda self, examples, columns: (asked.append(len(examples)), fetch(self, examples, columns))[1],
    )
    for accumulate in (1, 3):
        cells(tmp_path, tmp_path / str(accumulate), live | {"train.accumulate": accumulate}, ["learnable"], False)
        # after training the router's weights are read, one example at a time
        of_router = 2 * ROUTED
        assert asked[-of_router:] == [1] * of_router
        assert sum(asked[:-of_router]) == 2 * 2 * 7, "two teachers, two steps of 7 examples"
        asked.clear()
    agree(tmp_path / "1", tmp_path / "3", "learnable", 1e-5)


# ---------------------------------------------------------------- several processes
SCRIPT = """
import json, os, shutil, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import processes
from kvpipe.train import trainer as training

given = json.loads(sys.argv[2])
rank = int(os.environ["RANK"])
begun = []
real = training.Loop._step

def step(run, number, recorder):
    begun.append(number)
    if given["kill"] == number and rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(run, number, recorder)

removed = []
rmtree = shutil.rmtree
training.Loop._step = step
shutil.rmtree = lambda *args, **options: (removed.append(str(args[0])), rmtree(*args, **options))
try:
    processes.cells(Path(given["folder"]), Path(given["out"]), given["overrides"], given["arms"], False)
finally:
    print(json.dumps({"begun": begun, "removed": [r for r in removed if "step-" not in r]}))
"""


def pair(tmp_path, folder, out, changed, arm, kill=-1):
    """Two processes of a script that says what each did."""
    (tmp_path / "script.py").write_text(SCRIPT)
    given = {"folder": str(folder), "out": str(out), "overrides": changed, "arms": [arm], "kill": kill}
    return together(2, str(tmp_path / "script.py"), str(Path(__file__).parent), json.dumps(given))


def test_two_processes_go_on_where_a_signal_to_one_of_them_stopped_both(folder, tmp_path):
    """Dropout too: every process draws its own numbers, and the same again."""
    changed = overrides(
        {"train.steps": 4, "arms.dropped": {"base": "moving", "set": {"projector.dropout": 0.2}}, "train.batch_size": 4}
    )
    prepare(Inputs(config(folder, changed), Paths(folder / "results")), "dropped", log=lambda *_: None)
    whole = pair(tmp_path, folder, tmp_path / "whole", changed, "dropped")
    stopped = pair(tmp_path, folder, tmp_path / "parts", changed, "dropped", kill=1)
    assert [p.returncode for p in stopped] == [training.EXIT_INTERRUPTED] * 2, stopped[0].stderr
    again = pair(tmp_path, folder, tmp_path / "parts", changed, "dropped")
    for done in (whole, again):
        assert [p.returncode for p in done] == [0, 0], done[0].stderr + done[1].stderr
    said = [[json.loads(p.stdout.splitlines()[-1]) for p in done] for done in (whole, stopped, again)]
    assert [[s["begun"] for s in both] for both in said] == [[[0, 1, 2, 3]] * 2, [[0, 1]] * 2, [[2, 3]] * 2]
    kept = [[str(out / "dropped.checkpoints")] for out in (tmp_path / "whole", tmp_path / "parts")]
    assert [[r for r in s["removed"] if "checkpoints" in r] for s in said[0]] == [kept[0], []], (
        "the main process alone deletes checkpoints"
    )
    assert [[r for r in s["removed"] if "checkpoints" in r] for s in said[2]] == [kept[1], []]
    one, two = ((out / "dropped" / "model" / "model.safetensors") for out in (tmp_path / "whole", tmp_path / "parts"))
    assert one.read_bytes() == two.read_bytes()
    assert found(tmp_path / "whole", "dropped")[0] == found(tmp_path / "parts", "dropped")[0]


def test_checkpoints_are_deleted_after_the_result_is_written(folder, tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(cell_step, "write_cell", lambda *_: order.append("write"))
    monkeypatch.setattr(Accelerator, "wait_for_everyone", lambda *_: order.append("wait"))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: order.append("delete"))
    work = Inputs(config(folder, overrides({})), Paths(folder / "results"))
    train_cell(work, "control", 0, tmp_path / "out", tmp_path / "kept", log=lambda *_: None)
    assert order[-3:] == ["write", "wait", "delete"]  # before them the checkpoint of the first step


# ---------------------------------------------------------------- refused before anything is computed
def test_more_micro_batches_or_processes_than_rows_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="accumulate: 8 micro-batches of a batch of 7 examples"):
        config(folder, overrides({"train.accumulate": 8}))
    done = pair(tmp_path, folder, tmp_path / "out", overrides({"train.accumulate": 4}), "joint")
    for process in done:
        assert process.returncode != 0
        line = "train.batch_size 7 is less than train.accumulate 4 × 2 processes = 8 micro-batches"
        assert line in process.stderr
        assert json.loads(process.stdout.splitlines()[-1])["begun"] == []
    assert not list((tmp_path / "out").rglob("*.jsonl"))


def test_fp16_on_a_cpu_is_refused(folder):
    with pytest.raises(ConfigError, match="fp16 is not computed on a CPU"):
        config(folder, overrides({"train.precision": "fp16", "train.device": "cpu"}))
    with pytest.raises(ConfigError, match="fp16, which nothing computes on a CPU"):
        check_precision("fp16", "cpu")
    if not torch.cuda.is_available():
        work = Inputs(config(folder, overrides({"train.precision": "fp16"})), Paths(folder / "results"))
        with pytest.raises(ConfigError, match="fp16, which nothing computes on a CPU"):
            train_cell(work, "control", 0, folder / "fp16", folder / "fp16.checkpoints", log=lambda *_: None)


def test_accelerates_variables_have_no_effect(folder, tmp_path):
    variables = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "EAGER",
        "ACCELERATE_DOWNCAST_BF16": "1",
    }
    trained(1, folder, tmp_path / "plain", overrides({}), ("joint",), False)
    trained(1, folder, tmp_path / "set", overrides({}), ("joint",), False, **variables)
    (history, steps), (other, others) = (found(tmp_path / name, "joint") for name in ("plain", "set"))
    assert history == other
    assert torch.equal(flat(steps)[0], flat(others)[0])


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"])
def test_another_way_of_training_is_refused(monkeypatch, name):
    monkeypatch.setenv(name, "true")
    with pytest.raises(ConfigError, match=f"{name}=true in the environment asks for a way of training"):
        without_environment()


# ---------------------------------------------------------------- what is not finite
@pytest.mark.parametrize("step", [0, 2])
def test_a_validation_loss_that_is_not_finite_ends_the_cell(folder, tmp_path, monkeypatch, step):
    real, calls = training.score, iter(range(10))

    def scored(*args):
        scores = real(*args)
        scores.nll[0] = float("nan") if next(calls) == step // 2 else scores.nll[0]
        return scores

    monkeypatch.setattr(training, "score", scored)
    work = Inputs(config(folder, overrides({})), Paths(folder / "results"))
    with pytest.raises(NonFiniteLossError, match=f"the validation loss after step {step} is nan"):
        train_cell(work, "control", 0, tmp_path / "out", tmp_path / "kept", log=lambda *_: None)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "kept").glob("step-*")] == ["step-00000001"] * (step > 0)


def test_a_projectors_gradient_that_is_not_finite_is_not_applied(folder, tmp_path, monkeypatch):
    real = cell_step.load_objective

    def poisoned(*args):
        distiller = real(*args)
        next(p for p in distiller.parameters() if p.requires_grad).register_hook(lambda g: g * float("nan"))
        return distiller

    monkeypatch.setattr(cell_step, "load_objective", poisoned)
    work = Inputs(config(folder, overrides({"train.checkpoint_every": 1})), Paths(folder / "results"))
    with pytest.raises(NonFiniteLossError, match=r"step 1: .*gradient of what the objective trains"):
        train_cell(work, "joint", 0, tmp_path / "out", tmp_path / "kept", log=lambda *_: None)
    assert not list(tmp_path.glob("kept/step-*"))
