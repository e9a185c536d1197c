"""docs/troubleshooting.md is true: every message of ours in it is provoked here, and reads as it stands there."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROFILE
from tiny import build, config, values

from kvpipe.align.layermap import layer_plan
from kvpipe.cache import store
from kvpipe.config import EvaluateConfig, LayerConfig, StoreConfig, TrainConfig, load
from kvpipe.distill.losses import check_finite
from kvpipe.doctor import Workload as Examined
from kvpipe.doctor import gpu, show
from kvpipe.doctor.sources import check_sources
from kvpipe.doctor.storage import check_storage
from kvpipe.experiment import attempts, device, outofmemory
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.provenance import PACKAGE
from kvpipe.models.limits import Limits
from kvpipe.steps import teacher_kv
from kvpipe.steps import train as cell_step
from kvpipe.steps.encode import make_encoding
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.train import prepare, train_cell
from kvpipe.train import checkpoint, export
from kvpipe.train import trainer as training
from kvpipe_cluster.container import LABEL, check_container
from kvpipe_cluster.probing import ProbeError, probe
from kvpipe_cluster.slurm import check_slurm

DOCUMENT = PACKAGE.parent / "docs" / "troubleshooting.md"
# provoked on a real cluster (tests/cluster/test_cluster.py), where an image is asked for (tests/workflow/test_submission.py),
# and by the server of steps (tests/cli/test_server.py)
OTHERS = {"DOS line ends", "The image is not there", "Steps import for themselves"}


def entries() -> dict[str, str]:
    """Heading → message."""
    found = re.findall(
        r"^### ([^\n]+)\n\n```text\n(.+?)```", DOCUMENT.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    return dict(found)


def matches(title: str, said: str) -> bool:
    """Whether a message contains the documented one, `…` standing for anything."""
    pattern = ".*?".join(re.escape(part) for part in entries()[title].rstrip("\n").split("…"))
    return re.search(pattern, said, flags=re.DOTALL) is not None


def told(error: BaseException) -> str:
    """As the command line prints it."""
    return f"{type(error).__name__}: {error}"


def raised(call, *arguments, **options) -> str:
    """The message that a call ends in."""
    with pytest.raises(Exception) as caught:
        call(*arguments, **options)
    return told(caught.value)


# ---------------------------------------------------------------- the cluster
def cluster_messages(site, profile) -> dict[str, str]:
    """Every message about the cluster, from a site that has the fault."""

    def slurm(text=PROFILE) -> str:
        return show([*check_slurm(Examined(config(site.folder), Paths(site.folder), profile(text)))])

    def asks(**resources) -> str:
        entry = ", ".join(f"{k}: {v}" for k, v in resources.items())
        return slurm(PROFILE.replace("gpu: 1, mem_mb: 9000, runtime: 100 * attempt", entry))

    said = {
        "Nothing happens after the jobs have ended": slurm(PROFILE.replace("squeue", "sacct")),
        "The GPU type is refused": asks(gpu=1, gpu_model="v100"),
        "More CPUs than a node has": asks(cpus_per_task=64),
        "More memory than a node has": asks(mem_mb=999999),
        "More time than the partition allows": asks(runtime=3000),
        "An account where there is no accounting": slurm(PROFILE.replace("runtime=60", "runtime=60, slurm_account=a")),
    }
    said["The executor goes back to sacct by itself"] = slurm(
        PROFILE + "slurm-init-seconds-before-status-checks: 101\n"
    )
    site.change("config", "MinJobAge               = 300 sec", "MinJobAge               = 130 sec")
    said["A job's end is missed"] = slurm()
    site.change("partitions", "Default=YES", "Default=NO")
    said["No partition"] = slurm()
    site.change("partitions", "Default=NO", "Default=YES")
    line = next(x for x in (site.answers / "config").read_text().splitlines() if x.startswith("PreemptMode"))
    site.change("config", line, "PreemptMode             = CANCEL")
    site.change("partitions", "PreemptMode=OFF", "PreemptMode=CANCEL")
    said["A preempted job is waited for without end"] = slurm()
    site.program("sbatch", "echo 'sbatch: error: Batch job submission failed: Invalid account' >&2; exit 1")
    with pytest.raises(ProbeError) as error:
        probe(Examined(config(site.folder), Paths(site.folder / "results"), profile()), print)
    said["The probe is refused everywhere"] = told(error.value)
    return said


CLUSTER = {
    "Nothing happens after the jobs have ended",
    "The executor goes back to sacct by itself",
    "A job's end is missed",
    "A preempted job is waited for without end",
    "The GPU type is refused",
    "More CPUs than a node has",
    "More memory than a node has",
    "More time than the partition allows",
    "No partition",
    "An account where there is no accounting",
    "The probe is refused everywhere",
}


def test_cluster(site, profile):
    said = cluster_messages(site, profile)
    assert set(said) == CLUSTER
    for title, message in said.items():
        assert matches(title, message), (title, message)


IMAGE = {
    "A variable of the login node in the image",
    "The image does not start",
    "The image is older than the lock",
    "A space in the path of the checkout",
}


def test_image(site, profile, tmp_path, monkeypatch):
    image = tmp_path / "kvpipe.sif"
    image.touch()
    monkeypatch.setenv("KVPIPE_IMAGE", str(image))
    work = Examined(config(tmp_path), Paths(tmp_path / "results"), profile())
    site.apptainer(start="echo 'FATAL: fuse: device not found' >&2; exit 255")
    said = {"The image does not start": show([*check_container(work)])}
    site.apptainer(labels=json.dumps({LABEL: "0" * 64}))
    said["The image is older than the lock"] = show([*check_container(work)])
    site.apptainer(start="echo PYTHONPATH=/apps/python")
    said["A variable of the login node in the image"] = show([*check_container(work)])
    spaced = tmp_path / "my checkout"
    spaced.mkdir()
    monkeypatch.chdir(spaced)
    said["A space in the path of the checkout"] = show([*check_container(work)])
    assert set(said) == IMAGE
    for title, message in said.items():
        assert matches(title, message), (title, message)


# ---------------------------------------------------------------- the disk, before anything is written; Snakemake
QUOTA = {"The quota is smaller than the stores"}


def test_quota(site, saved, tmp_path):
    site.program("lfs", "echo '     /scratch 10000000* 8000000 10000000       6d       1       0       0       -'")
    said = show([*check_storage(Examined(config(saved), Paths(tmp_path)))])
    assert matches(*QUOTA, said), said


SNAKEMAKE = {"Apptainer on the login node", "The directory is locked"}


def test_snakemake(tmp_path):
    """Its own words, of the version that is installed."""
    (tmp_path / "Snakefile").write_text("container: 'no.sif'\nrule a:\n    output: 'a'\n    shell: 'touch a'\n")

    def said(*arguments: str) -> str:
        call = [sys.executable, "-m", "snakemake", "--cores", "1", *arguments]
        environment = os.environ | {"PATH": "/usr/bin:/bin"}
        done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode
        return done.stdout + done.stderr

    if shutil.which("apptainer", path="/usr/bin:/bin") is None:
        assert matches("Apptainer on the login node", said("-n", "--sdm", "apptainer"))
    locks = tmp_path / ".snakemake" / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    (locks / "0.output.lock").write_text("a\n")
    assert matches("The directory is locked", said())


# ---------------------------------------------------------------- GPUs and models
GPUS = {
    "No GPU",
    "The job has a GPU and trains on the CPU",
    "The driver is too old for the image's CUDA",
    "bf16 on a GPU that has none",
}


def test_gpus(tmp_path, monkeypatch):
    settings = config(tmp_path, {"train.precision": "bf16"})
    seen = {"name": "V100", "driver": "470.1", "capability": "7.0", "torch_cuda": "12.8", "available": False}
    judged = show([*gpu.judge_gpu(seen, settings, "in job 7")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lines = []
    for name in device.JOB_GPUS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "0")
    device.check_device("auto", lines.append)
    assert not lines
    monkeypatch.setenv("SLURM_STEP_GPUS", "0")
    device.check_device("auto", lines.append)
    said = {
        "No GPU": raised(device.check_device, "cuda"),
        "The job has a GPU and trains on the CPU": "\n".join(lines),
        "The driver is too old for the image's CUDA": judged,
        "bf16 on a GPU that has none": judged,
    }
    assert set(said) == GPUS
    for title, message in said.items():
        assert matches(title, message), (title, message)


def test_a_gpu_that_is_there_is_no_fault(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    device.check_device("cuda:1")
    assert taken == [1]
    device.check_device("cuda")
    device.check_device("cpu")
    with pytest.raises(device.NoDevice, match=r"cuda:2.* sees 2 GPUs"):
        device.check_device("cuda:2")


MODELS = {
    "A model folder is incomplete",
    "A download was cut off",
    "Offline, and the model is not there",
    "HF_HOME is shared and read-only",
    "The model is gated",  # and the next: provoked against a hub on loopback in test_sources.py
    "The hub cannot be reached",
}


def test_models(tiny, tmp_path, monkeypatch):
    weights = (tiny.paths.root.parent / "teachers" / "alpha" / "model.safetensors").read_bytes()
    folder = tmp_path / "teachers" / "alpha"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights[:-100])
    hub = {"models.beta": {"source": "hub", "repo": "some/model"}}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", "/proc/none")
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith("/proc"))
    said = show([*check_sources(Examined(config(tmp_path, hub), Paths(tmp_path / "results")))])
    for title in MODELS - {"The model is gated", "The hub cannot be reached"}:
        assert matches(title, said), (title, said)


# ---------------------------------------------------------------- disk and training
TRAINING = {
    "The store is larger than its budget",
    "Disk or quota full while a checkpoint is written",
    "Disk or quota full while a store is built",
    "Disk or quota full while results are written",
    "Out of memory",
    "Out of memory while scoring",
    "Out of memory while a teacher runs",
    "NaN",
    "A checkpoint of another configuration",
    "A damaged checkpoint",
    "The saved student differs",
    "The layer map is missing",
    "A text is too long",
    "A token has no embedding",
    "A text is longer than a model reads",
    "A key that does not exist",
}


@pytest.fixture
def cell(tmp_path, monkeypatch):
    """A cell whose artefacts are made; `go(overrides)` trains it, `at(step, error)` makes a step end in an error."""
    work = build(tmp_path, {"train.checkpoint_every": 2})
    prepare(work, "one", log=lambda _: None)

    def go(overrides=None):
        settings = config(tmp_path, {"train.checkpoint_every": 2} | (overrides or {}))
        folders = tmp_path / "out", tmp_path / "checkpoints"
        train_cell(Inputs(settings, work.paths), "one", 0, *folders, log=lambda _: None)

    def at(step, error):
        rate = training.learning_rate

        def failing(settings, number):
            if number == step:
                raise error
            return rate(settings, number)

        patch = pytest.MonkeyPatch()
        patch.setattr(training, "learning_rate", failing)
        return patch

    return work, go, at


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def file_limit(call, *arguments) -> str:
    """The message of a call while no file may have more than 100 bytes: the library's own error, no patched one."""
    return raised(limited(call), *arguments)


def limited(call):
    """The call, which may write no file of more than 100 bytes."""

    def run(*arguments):
        resource = pytest.importorskip("resource")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            return call(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return run


def test_training(cell, capsys, monkeypatch, tmp_path):
    work, go, at = cell
    said = {}
    small = Inputs(config(tmp_path, {"store.budget_gb": 1e-9}), work.paths)
    said["The store is larger than its budget"] = raised(teacher_kv.make_shard, small, "alpha", "student", "0")
    shard = work.paths.shard("alpha", "student", 0)
    before = shard.read_bytes()
    shard.unlink()
    said["Disk or quota full while a store is built"] = file_limit(teacher_kv.make_shard, work, "alpha", "student", "0")
    assert not list(shard.parent.glob("*.partial"))
    shard.write_bytes(before)

    patch = at(5, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    said["Out of memory"] = raised(go)
    patch.undo()
    assert "train.accumulate: 2 (now 1: 2 instead of 4 texts at once" in said["Out of memory"]
    assert "train.gradient_checkpointing: true, train.precision: bf16, train.lora" in said["Out of memory"]
    assert "2.00 GiB" in said["Out of memory"]

    newest = tmp_path / "checkpoints" / "step-00000004"
    said["A checkpoint of another configuration"] = raised(go, {"train.learning_rate": 1e-4})
    with monkeypatch.context() as context:
        context.setattr(checkpoint, "save_tensors", full_disk)
        said["Disk or quota full while a checkpoint is written"] = raised(go, {"train.checkpoint_every": 5})
    data = bytearray((newest / checkpoint.TENSORS).read_bytes())
    data[-3] ^= 1
    (newest / checkpoint.TENSORS).write_bytes(data)
    with monkeypatch.context() as context:  # the checkpoints before it have room
        context.setattr(cell_step, "write_cell", limited(cell_step.write_cell))
        said["Disk or quota full while results are written"] = raised(go, {"train.checkpoint_every": 100})
    assert newest.exists(), "what the run can go on from is kept"
    with monkeypatch.context() as context:
        context.setattr(export, "TOLERANCE", {torch.float32: -1.0})
        said["The saved student differs"] = raised(go, {"train.checkpoint_every": 100})
    said["A damaged checkpoint"] = capsys.readouterr().out
    go({"train.checkpoint_every": 100})
    assert (tmp_path / "out" / "cost.json").is_file()
    assert not attempts.record_of(tmp_path / "checkpoints").exists()

    monkeypatch.setattr(training, "score", lambda *a: (_ for _ in ()).throw(MemoryError()))
    said["Out of memory while scoring"] = raised(go)
    monkeypatch.setattr(
        store,
        "forward_batches",
        lambda *a: (_ for _ in ()).throw(
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        ),
    )
    shard.unlink()
    said["Out of memory while a teacher runs"] = raised(teacher_kv.make_shard, work, "alpha", "student", "0")
    said["NaN"] = raised(check_finite, {"k": torch.tensor(float("nan"))}, 7)
    said["The layer map is missing"] = raised(
        layer_plan, LayerConfig(kind="cka"), 4, 3, tmp_path / "layer_map" / "alpha.json"
    )
    long = Inputs(config(tmp_path, {"train.max_length": 5}), work.paths)
    said["A text is too long"] = raised(make_encoding, long, "student", "student")
    for title, limits in (
        ("A token has no embedding", Limits("'alpha'", 5, None, False)),
        ("A text is longer than a model reads", Limits("'alpha'", 999, 5, False, "strict")),
    ):
        texts = work.encoding("alpha", "train"), work.records("train"), work.tokenizer("alpha")
        said[title] = raised(limits.check, *texts)
    written = values(tmp_path)
    written["train"]["step"] = written["train"].pop("steps")
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(written))
    said["A key that does not exist"] = raised(load, path)
    assert set(said) == TRAINING
    for title, message in said.items():
        assert matches(title, message), (title, message)


def test_every_entry_is_provoked():
    assert set(entries()) == OTHERS | CLUSTER | IMAGE | QUOTA | SNAKEMAKE | GPUS | MODELS | TRAINING
    assert all("…" not in title for title in entries())


# ---------------------------------------------------------------- what to lower, and to what
@pytest.mark.parametrize(
    ("settings", "processes", "expected"),
    [
        ({"batch_size": 32}, 1, "Set train.accumulate: 2 (now 1: 16 instead of 32 texts"),
        ({"batch_size": 32}, 4, "Set train.accumulate: 2 (now 1: 4 instead of 8 texts"),
        ({"batch_size": 12, "accumulate": 4}, 1, "Set train.accumulate: 12 (now 4: 1 instead of 3 texts"),
        ({"batch_size": 7, "accumulate": 2}, 1, "Set train.accumulate: 4 (now 2: 2 instead of 4 texts"),
        ({"batch_size": 4, "accumulate": 4}, 1, "Set train.gradient_checkpointing: true; "),
        ({"batch_size": 1, "gradient_checkpointing": True}, 1, "Set train.precision: bf16; "),
        ({"batch_size": 1, "gradient_checkpointing": True, "precision": "bf16"}, 1, "Set train.lora: {}"),
        (
            {"batch_size": 1, "gradient_checkpointing": True, "precision": "bf16", "lora": {}, "max_length": 99},
            1,
            "Lower train.max_length (now 99)",
        ),
    ],
)
def test_advice(settings, processes, expected):
    assert outofmemory.advice(TrainConfig(**settings), processes).startswith(expected)


def test_a_batch_of_one_cannot_be_halved():
    assert "ask for more memory" in outofmemory.advice(StoreConfig(batch_size=1))


def test_other_errors_pass_unchanged():
    with (
        pytest.raises(RuntimeError, match=r"^shapes differ$") as error,
        outofmemory.explained("training", TrainConfig()),
    ):
        raise RuntimeError("shapes differ")
    assert type(error.value) is RuntimeError


def test_memory_that_the_machine_does_not_have():
    """Not a made-up error: torch asks for more than there is address space."""
    with (
        pytest.raises(outofmemory.OutOfMemory, match=r"while testing. Set evaluate.batch_size: 16.*\(.*allocate"),
        outofmemory.explained("testing", EvaluateConfig(batch_size=32)),
    ):
        torch.empty(2**50)


def test_the_document_names_no_place_of_its_own():
    assert str(Path.home()) not in DOCUMENT.read_text("utf-8")
