"""Checkpoints: a run that is killed anywhere and continued is the run that was not killed, bit for bit."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from tiny import build, config
from torch import nn

from kvpipe.experiment.files import content_digest
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.train import prepare, train_cell
from kvpipe.train import checkpoint
from kvpipe.train import trainer as training

STEPS = 17
# dropout draws random numbers, `joint` trains projectors beside the student: both must go on where they were
SETTINGS = {
    "train.steps": STEPS,
    "train.checkpoint_every": 4,
    "train.eval_every": 5,
    "models.student.architecture": {
        "model_type": "llama",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 512,
        "attention_dropout": 0.1,
    },
}
ARM, SEED = "joint", 3
CHOICE = random.Random(int(os.environ.get("KVPIPE_KILL_SEED", 20240607)))
# name → (signal, where it arrives, the how manieth); three kills at random steps, one while the third checkpoint is
# written, and three at any function call between start and end: in a forward pass, a checkpoint, the final write …
# Signals that ask: where there is nothing to save yet, after the first step, between two checkpoints, right after one.
JOBS = {
    "whole": (0, "step", -1),
    **{f"kill{i}": (signal.SIGKILL, "step", step) for i, step in enumerate(CHOICE.sample(range(1, STEPS), 3))},
    "loading": (signal.SIGTERM, "load", 0),
    "first step": (signal.SIGTERM, "step", 0),
    "term": (signal.SIGTERM, "step", 1),
    "usr1": (signal.SIGUSR1, "step", CHOICE.randrange(2, STEPS - 1)),
    "int": (signal.SIGINT, "step", 8),
    "saving": (signal.SIGKILL, "save", 2),
    **{f"anywhere{i}": (signal.SIGKILL, "call", CHOICE.uniform(0.01, 0.99)) for i in range(3)},
}
NOTHING_DONE = {"loading", "first step"}

# One process imports and forks a job for each kill: a fork is a process of its own, and importing torch takes seconds.
DRIVER = """
import errno, json, os, signal, sys, traceback
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tiny
from kvpipe.steps import train as steps
from kvpipe.train import checkpoint
from kvpipe.train import trainer as train
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.train import train_cell
from kvpipe.experiment.paths import Paths

root, settings, arm, seed, jobs = Path(sys.argv[2]), *json.loads(sys.argv[3])
statuses = {}

def vanish(event, arguments):
    '''No file outside the run's own folder, and no further module: what TERM leaves of an image under Apptainer.'''
    path = str(arguments[0])
    own = isinstance(arguments[0], int) or path.startswith((str(root), "/proc/", "/dev/"))
    if event in ("import", "ctypes.dlopen") or (event in ("open", "os.listdir", "os.scandir") and not own):
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected", path)

def deadly(function, number, when):
    '''The function, whose call `when` (from 0) sends the process a signal, and takes the files away.'''
    calls = iter(range(10**6))
    def called(*arguments):
        result = function(*arguments)
        if next(calls) == when:
            if number != signal.SIGKILL:
                sys.addaudithook(vanish)
            os.kill(os.getpid(), number)
        return result
    return called

def count_calls(number, limit):
    '''Send the signal at a number of function calls; returns where the count is kept.'''
    count = [0]
    def profile(frame, event, argument):
        count[0] += 1
        if count[0] == limit:
            os.kill(os.getpid(), number)
    sys.setprofile(profile)
    return count

def run(name, number, where, when):
    total = root / "calls"  # of the run that nothing interrupts
    if where == "call" or name == "whole":
        count = count_calls(number, int(when * int(total.read_text())) if where == "call" else -1)
    # called before the first step, at the beginning of every step, amidst the writing of a checkpoint
    places = {"load": (steps, "budget"), "step": (train, "learning_rate"), "save": (checkpoint, "save_tensors")}
    if where != "call":
        module, function = places[where]
        setattr(module, function, deadly(getattr(module, function), number, when))
    work = Inputs(tiny.config(root, settings), Paths(root / "results"))
    train_cell(work, arm, seed, root / name / "out", root / name / "checkpoints", log=lambda line: None)
    sys.setprofile(None)
    if name == "whole":
        total.write_text(str(count[0]))

def forked(*job):
    child = os.fork()
    if child == 0:
        try:
            run(*job)
        except SystemExit as stopped:
            os._exit(stopped.code)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

for name, *job in jobs:
    first = forked(name, *job)
    left, there = sorted(p.name for p in (root / name / "checkpoints").glob("*")), (root / name / "out").exists()
    statuses[name] = first, left, there, name == "whole" or forked(name, 0, "step", -1)
print(json.dumps(statuses))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Every job stopped, then run again without a signal: exit statuses (negative: the signal that killed it), what was
    among its checkpoints in between, and whether its results were there."""
    root = tmp_path_factory.mktemp("killed")
    prepare(build(root, SETTINGS), ARM, log=lambda _: None)
    jobs = [(name, int(number), where, when) for name, (number, where, when) in JOBS.items()]
    arguments = [str(Path(__file__).parents[1]), str(root), json.dumps([SETTINGS, ARM, SEED, jobs])]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=3600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    statuses = json.loads(done.stdout.splitlines()[-1])
    first, left, unfinished, second = ({name: found[i] for name, found in statuses.items()} for i in range(4))
    return root, first, left, unfinished, second


def test_the_jobs_were_stopped_as_meant(killed):
    _, first, left, unfinished, second = killed
    assert first["whole"] == 0
    for name, (number, _, step) in JOBS.items():
        if number == signal.SIGKILL:
            assert first[name] == -signal.SIGKILL
        elif number:
            assert first[name] == training.EXIT_INTERRUPTED == 75
            # the step during which the signal came is finished and saved, unless there is none before it
            steps = [entry for entry in left[name] if entry.startswith("step-")]
            assert steps[-1:] == ([] if name in NOTHING_DONE else [f"step-{step + 1:08d}"])
        # one that lands anywhere may land in the writing of the results
        assert name == "whole" or number == 0 or name.startswith("anywhere") or not unfinished[name]
        assert len([entry for entry in left[name] if entry.startswith("step-")]) <= checkpoint.KEPT
    assert second.pop("whole") is True and set(second.values()) == {0}


def test_a_kill_while_saving_leaves_the_checkpoint_before(killed):
    root, _, left, _, _ = killed
    steps = [entry for entry in left["saving"] if entry.startswith("step-")]
    partial = [entry for entry in left["saving"] if entry.startswith("partial-")]
    assert steps == ["step-00000001", "step-00000004"]
    assert len(partial) == 1
    assert not (root / "saving" / "checkpoints").exists(), "what was left over is cleared away at the end"


@pytest.mark.parametrize("name", [name for name in JOBS if name != "whole"])
def test_a_continued_run_is_the_uninterrupted_one(killed, name):
    root = killed[0]
    whole, found = root / "whole" / "out", root / name / "out"
    for file in ("model/model.safetensors", "history.jsonl", "model/config.json", "model/tokenizer.json"):
        assert (found / file).read_bytes() == (whole / file).read_bytes(), file
    costs = [json.loads((folder / "cost.json").read_text()) for folder in (found, whole)]
    assert costs[0]["tokens"] == costs[1]["tokens"]
    assert costs[0]["padding_share"] == costs[1]["padding_share"]
    if not name.startswith("anywhere"):
        caught = JOBS[name][0] != signal.SIGKILL
        resumes = name not in NOTHING_DONE and (caught or name == "saving" or JOBS[name][2] >= 1)
        assert [cost["restarts"] for cost in costs] == [int(resumes), 0]
        assert [cost["attempts"] for cost in costs] == [1 + (name != "loading"), 1]
    assert not list((root / name).glob("*.attempts.jsonl")), "the record ends in cost.json"


# ---------------------------------------------------------------- what is on disk may be wrong
@contextmanager
def interrupted(monkeypatch, when: int):
    """Training that ends without warning at the beginning of a step."""
    rate = training.learning_rate

    def raising(config, step):
        if step == when:
            raise KeyboardInterrupt
        return rate(config, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "learning_rate", raising)
        yield


@pytest.fixture
def stopped(tiny, tmp_path, monkeypatch):
    """A cell with two checkpoints, after steps 2 and 4 of 6; `go(overrides)` continues it."""

    def go(overrides=None, arm="two", seed=0, log=lambda _: None):
        settings = {"train.checkpoint_every": 2} | (overrides or {})
        work = Inputs(config(tiny.paths.root.parent, settings), tiny.paths)
        prepare(work, arm, log=lambda _: None)
        train_cell(work, arm, seed, tmp_path / "out", tmp_path / "checkpoints", log=log)
        return tmp_path / "out"

    with interrupted(monkeypatch, 5):
        go()
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000002", "step-00000004"]
    return folder, go


def test_a_run_that_goes_on_saves_after_its_own_first_step(stopped, monkeypatch):
    """What saving needs is loaded in this process, too, before a signal can take an image's files away."""
    folder, go = stopped
    with interrupted(monkeypatch, 5):
        go()
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize("file", [checkpoint.TENSORS, checkpoint.STATE])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_is_passed_over_aloud(stopped, capsys, file, damage):
    folder, go = stopped
    path = folder / "step-00000004" / file
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif file == checkpoint.TENSORS:
        data[-5] ^= 1
        path.write_bytes(data)
    else:
        path.write_text(json.dumps({"step": 4}))
    lines = []
    out = go(log=lines.append)
    said = capsys.readouterr().out
    assert str(path.parent) in said
    assert "trying the one before" in said
    assert lines[0] == "continuing after step 2 of 6"
    weights = (out / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(out)
    go()  # no checkpoints are left: from the start
    assert (out / "model" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("state", ["{", "[]"])
def test_without_a_sound_checkpoint_the_run_begins_again(stopped, state):
    folder, go = stopped
    for path in folder.glob("*/" + checkpoint.STATE):
        path.write_text(state)
    lines = []
    go(log=lines.append)
    assert lines[0].startswith("step 0/6")


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ({"train.learning_rate": 1e-4}, ["depends.train.learning_rate: 0.003 there, 0.0001 now"]),
        ({"train.steps": 9, "train.warmup": 0.3}, ["depends.train.steps", "depends.train.warmup"]),
        ({"arms.two.set": {"teachers": ["alpha", "beta"]}}, ["depends.arm.fit.method: 'joint_pca' there, 'pca' now"]),
    ],
)
def test_another_configuration_is_refused_by_its_keys(stopped, overrides, keys):
    folder, go = stopped
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(checkpoint.CheckpointMismatch) as error:
        go(overrides)
    for key in keys:
        assert key in str(error.value)
    assert f"delete {folder}" in str(error.value)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_another_seed_or_arm_is_refused(stopped):
    _, go = stopped
    with pytest.raises(checkpoint.CheckpointMismatch, match="seed: 0 there, 1 now"):
        go(seed=1)
    with pytest.raises(checkpoint.CheckpointMismatch, match="arm: 'two' there, 'one' now"):
        go(arm="one")


def test_settings_that_change_no_result_may_change(stopped):
    _, go = stopped
    lines = []
    go({"train.checkpoint_every": 5, "train.hold_targets_gb": 0.0, "title": "other"}, log=lines.append)
    assert lines[0] == "continuing after step 4 of 6"


def test_another_teacher_is_refused(tmp_path, monkeypatch):
    """The configuration names a folder: what is in it may have changed."""
    work = build(tmp_path, {"train.checkpoint_every": 2})
    prepare(work, "one", log=lambda _: None)
    folders = tmp_path / "out", tmp_path / "checkpoints"
    with interrupted(monkeypatch, 3):
        train_cell(work, "one", 0, *folders, log=lambda _: None)
    projector = work.paths.projector(work.dag.fit_id(work.dag.arm("one")))
    save_file({k: v + 1 for k, v in load_file(projector).items()}, projector)
    document = projector.with_suffix(".json")  # fitted again, from another teacher
    refitted = json.loads(document.read_text()) | {"sha256": content_digest(projector)}
    document.write_text(json.dumps(refitted))
    with pytest.raises(checkpoint.CheckpointMismatch, match="projector"):
        train_cell(work, "one", 0, *folders, log=lambda _: None)


def test_the_loss_scale_of_fp16_goes_on_where_it_was(stopped, monkeypatch, tmp_path):
    """It follows from all steps before; a CPU has no fp16 training, but its scaler works."""
    folder, go = stopped
    shutil.rmtree(folder)
    made, prepared = [], Accelerator.prepare

    def scaled(accelerator, *arguments):
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        made.append(accelerator.scaler)
        return prepared(accelerator, *arguments)

    monkeypatch.setattr(Accelerator, "prepare", scaled)
    with interrupted(monkeypatch, 5):
        go()
    go()
    assert made[1].get_scale() == made[0].get_scale() * 2, "twice doubled before the kill, once more after it"
    weights = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out")
    go()
    assert (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == weights
    assert made[2].get_scale() == made[1].get_scale()


# ---------------------------------------------------------------- the module by itself
def parts(width: int = 5):
    torch.manual_seed(1)
    modules = nn.ModuleDict({"a": nn.Linear(3, width), "b": nn.Linear(width, 3, bias=False)})
    modules["c"] = nn.Linear(width, 3, bias=False)
    modules["c"].weight = modules["b"].weight  # tied, as embeddings are
    optimizer = torch.optim.AdamW(modules.parameters(), lr=0.1)
    return modules, optimizer


def advance(modules, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(7, 3)
        hidden = modules["a"](x)
        (modules["b"](hidden) + modules["c"](hidden) - x).square().mean().backward()
        optimizer.step()


def save(folder, step, modules, optimizer, **spec):
    return checkpoint.save(folder, step, modules, optimizer, [{"step": step}], {"tokens": step}, {"x": 1, **spec})


def test_round_trip_of_weights_optimizer_and_random_state(tmp_path):
    modules, optimizer = parts()
    advance(modules, optimizer, 3)
    save(tmp_path, 3, modules, optimizer)
    advance(modules, optimizer, 2)
    again, optimizer_again = parts()
    torch.manual_seed(99)
    resumed = checkpoint.resume(tmp_path, again, optimizer_again, {"x": 1})
    assert (resumed.step, resumed.history, resumed.counters) == (3, [{"step": 3}], {"tokens": 3})
    advance(again, optimizer_again, 2)
    for name, tensor in modules.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again["b"].weight is again["c"].weight


@pytest.mark.parametrize("fused", [True, False])
def test_parameters_that_are_not_contiguous_go_on_too(tmp_path, fused):
    """Fused optimizers walk through memory and take the state's layout for the parameter's."""

    def made():
        module = nn.Module()
        module.weight = nn.Parameter(torch.arange(15.0).reshape(3, 5).T)
        assert not module.weight.is_contiguous()
        return module, torch.optim.AdamW(module.parameters(), lr=0.1, fused=fused)

    def step(module, optimizer):
        optimizer.zero_grad()
        (module.weight.T * torch.arange(15.0).reshape(3, 5)).square().sum().backward()
        optimizer.step()

    module, optimizer = made()
    step(module, optimizer)
    save(tmp_path, 1, module, optimizer)
    step(module, optimizer)
    again, optimizer_again = made()
    checkpoint.resume(tmp_path, again, optimizer_again, {"x": 1})
    step(again, optimizer_again)
    assert torch.equal(again.weight, module.weight)


def test_frozen_parameters_are_not_stored(tmp_path):
    modules, optimizer = parts()
    modules["a"].requires_grad_(False)
    stored = (save(tmp_path, 1, modules, optimizer) / checkpoint.TENSORS).stat().st_size
    modules["a"].requires_grad_(True)
    assert stored < (save(tmp_path, 2, modules, optimizer) / checkpoint.TENSORS).stat().st_size
    with pytest.raises(checkpoint.CheckpointMismatch, match=r"a\.bias"):
        shutil.rmtree(tmp_path / "step-00000002")
        checkpoint.resume(tmp_path, modules, optimizer, {"x": 1})


def test_nothing_to_resume(tmp_path):
    assert checkpoint.resume(tmp_path / "absent", *parts(), {}) is None


def test_only_the_newest_two_are_kept(tmp_path):
    modules, optimizer = parts()
    for step in (8, 9, 10, 11):
        save(tmp_path, step, modules, optimizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]


def test_left_overs_of_killed_writers_are_cleared(tmp_path):
    (tmp_path / "partial-1").mkdir(parents=True)
    (tmp_path / "partial-1" / checkpoint.TENSORS).write_bytes(b"half")
    save(tmp_path, 1, *parts())
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def full_disk(tensors, path):
    path.write_bytes(b"some of it")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["save_tensors", "json", "rename"])
def test_a_full_disk_leaves_the_old_checkpoint_and_says_where(tmp_path, monkeypatch, where):
    modules, optimizer = parts()
    save(tmp_path, 1, modules, optimizer)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    advance(modules, optimizer)
    if where == "save_tensors":
        monkeypatch.setattr(checkpoint, "save_tensors", full_disk)
    elif where == "rename":  # a quota counts folders too
        monkeypatch.setattr(Path, "rename", lambda path, to: full_disk(None, path / "x"))
    else:
        monkeypatch.setattr(checkpoint.os, "fsync", lambda handle: full_disk(None, tmp_path / "step-00000001" / "x"))
    with pytest.raises(checkpoint.CheckpointNotWritten) as error:
        save(tmp_path, 2, modules, optimizer)
    assert str(tmp_path) in str(error.value)
    assert "No space left" in str(error.value)
    assert "step-00000001" in str(error.value), "from where the run will go on"
    found = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "x"}
    assert found == before


def test_a_write_that_the_system_refuses(tmp_path):
    """safetensors raises an error of its own, which is no OSError."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # bytes of a file
    try:
        with pytest.raises(checkpoint.CheckpointNotWritten, match="File too large"):
            save(tmp_path, 1, *parts())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
