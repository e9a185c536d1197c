"""The doctor as a whole: fast, without torch, right on a laptop; versions, storage, memory and GPUs."""

import json
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from conftest import PROFILE
from site_fakes import environment_without_cluster
from tiny import build, config, encoded

from kvpipe import doctor
from kvpipe.config import TrainConfig
from kvpipe.config import load as load_config
from kvpipe.data.records import Record, write_records
from kvpipe.doctor import Workload, gpu, look, memory, settings, storage
from kvpipe.evaluate.sandbox.run import SandboxError
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.provenance import PACKAGE
from kvpipe.experiment.sizes import Shape, training_bytes, writing_bytes
from kvpipe_cluster import jobs
from kvpipe_cluster.profile import Request, read_profile

ROOT = PACKAGE.parent
Usage = namedtuple("Usage", "total used free")
Memory = namedtuple("Memory", "total")


@pytest.fixture
def laptop(monkeypatch):
    environment_without_cluster(monkeypatch)


def by_name(findings):
    return {f.name: f for f in findings}


def found_by(check, settings, results, profile=None):
    """Name → finding of one check."""
    return by_name(check(Workload(settings, Paths(results), profile)))


# ---------------------------------------------------------------- the whole
def test_a_sound_experiment_on_a_laptop(saved, laptop, tmp_path):
    found = found_by(doctor.examine, config(saved), tmp_path / "results", ROOT / "profiles" / "slurm")
    assert {f.status for f in found.values()} <= {"ok", "warning"}
    assert {"packages", "slurm", "disk", "stores", "memory of training", "model alpha", "model beta"} <= set(found)
    assert "torch" in found["packages"].detail


def test_no_torch_is_imported():
    """It would take longer than all the checks."""
    code = (
        "import sys; from kvpipe.cli.app import app\n"
        "try: app(['doctor', '--results', sys.argv[1]])\n"
        "except SystemExit: pass\n"
        "found = {'torch', 'transformers', 'pandas'} & set(sys.modules)\n"
        "assert not found, found"
    )
    results = str(Path(sys.executable).parent / "none")
    done = subprocess.run([sys.executable, "-c", code, results], capture_output=True, text=True, check=False, cwd=ROOT)
    Path(results).rmdir()
    assert done.returncode == 0, done.stderr
    assert "would fail" in done.stdout


@pytest.mark.parametrize("inside", [False, True])
def test_without_the_extra_a_profile_is_said_not_to_be_checked(saved, laptop, tmp_path, monkeypatch, inside):
    """One line, and how to install it; not in the image, which has none: the login node has looked."""
    monkeypatch.setattr(doctor, "extras", list)
    if inside:
        monkeypatch.setenv("APPTAINER_CONTAINER", "kvpipe.sif")
    found = found_by(doctor.examine, config(saved), tmp_path / "results", Path("profiles/site"))
    assert ("profile" in found) is not inside
    if not inside:
        assert "profiles/site asks for are not checked" in found["profile"].detail
        assert (found["profile"].status, found["profile"].fix[:30]) == ("warning", "pip install -e plugins/cluster")
    assert not {"slurm", "image"} & set(found)
    assert "profile" not in found_by(doctor.examine, config(saved), tmp_path / "results")
    with pytest.raises(ImportError, match=r"--probe needs kvpipe-cluster.*pip install"):
        doctor.probe(Workload(config(saved), Paths(tmp_path)), print)


def test_the_core_names_no_cluster():
    for path in sorted((ROOT / "kvpipe" / "doctor").glob("*.py")):
        assert not re.search(r"slurm|sbatch|apptainer|kvpipe_cluster", path.read_text("utf-8"), re.IGNORECASE), path


def test_findings_are_shown_with_their_fix_and_counted():
    shown = doctor.show([doctor.Finding("a", "ok", "fine"), doctor.Finding("b", "would fail", "not", "do this")])
    assert shown.splitlines() == [
        "        ok  a: fine",
        "would fail  b: not",
        "            → do this",
        "1 ok, 0 warning, 1 would fail",
    ]


def test_findings_are_json_too():
    findings = [doctor.Finding("a", "warning", "so", "do this")]
    assert json.loads(doctor.as_json(findings)) == {"findings": [vars(findings[0])]}


def test_damaged_files_are_findings_and_stop_no_other_check(saved, laptop, tmp_path):
    subprocess.run(["cp", "-r", str(saved / "teachers"), str(tmp_path)], check=True)
    weights = tmp_path / "teachers" / "alpha" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (tmp_path / "teachers" / "beta" / "config.json").write_text("{")
    (tmp_path / "teachers" / "beta" / "tokenizer.json").write_text("{")
    weights.with_name("model-2.safetensors").write_bytes(b"12345")
    found = found_by(doctor.examine, config(tmp_path), tmp_path / "results")
    assert found["model alpha"].status == "would fail"
    assert {"disk", "memory of training"} <= set(found)


# ---------------------------------------------------------------- profiles
def test_the_shipped_profile_and_rules_are_read():
    asked = read_profile(ROOT / "profiles" / "slurm")
    train = asked.of("train")
    assert train.gpus == 1
    assert train.number("mem_mb") > 1000
    assert train.number("runtime") > 60
    assert {"data", "models", "fit", "evaluate", "stats", "report"} - {r.rule for r in asked.requests} <= {"models"}
    assert asked.containers


def test_a_profile_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "config.yaml").write_text("jobs: 7")
    monkeypatch.setattr("kvpipe_cluster.profile.PROFILES", (Path(), tmp_path))
    assert read_profile(Path("site")).settings == {"jobs": 7}


def test_a_profile_that_is_not_there(tmp_path, laptop, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no config\.yaml there"):
        read_profile(tmp_path)
    monkeypatch.setenv("APPTAINER_CONTAINER", "kvpipe.sif")
    assert read_profile(tmp_path).file is None, "an image sees less of the machine; the doctor goes on there"
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"config\.yaml: not valid YAML"):
        read_profile(tmp_path)


@pytest.mark.parametrize(
    ("resources", "gpus", "model"),
    [
        ({}, 0, None),
        ({"gpu": 4}, 4, None),
        ({"gpu": "2", "gpu_model": "a100"}, 2, "a100"),
        ({"gpu_model": "a100"}, 1, "a100"),
        ({"gres": "gpu:3"}, 3, None),
        ({"gres": "gpu:a100:2"}, 2, "a100"),
        ({"gres": "shard:2"}, 0, None),
        ({"gres": "gpu:4", "nodes": 2}, 8, None),
        ({"gpu": 4, "nodes": 2}, 4, None),
    ],
)
def test_gpus_of_a_request(resources, gpus, model):
    request = Request("train", resources)
    assert (request.gpus, request.gpu_model) == (gpus, model)


LISTS = """
default-resources: ["mem=2GB", "runtime=1h"]
set-resources: ["train:gpu=1", "train:mem=500GB", "train:runtime=attempt * 1440", "fit:mem_mib=1000 * attempt"]
set-threads: ["train=8"]
"""
MAPPINGS = """
default-resources: {mem: 2GB, runtime: 1h}
set-resources: {train: {gpu: 1, mem: 500GB, runtime: attempt * 1440}, fit: {mem_mib: 1000 * attempt}}
set-threads: {train: 8}
"""


@pytest.mark.parametrize("text", [LISTS, MAPPINGS])
def test_resources_as_snakemake_reads_them(text, tmp_path, monkeypatch):
    """Units and expressions; a profile's memory takes the place of the rule's, in whichever unit."""
    monkeypatch.setattr(
        "kvpipe_cluster.profile._rules", lambda memory: {"train": {"mem_mb": "4000"}, "fit": {"mem_mb": "4000"}}
    )
    (tmp_path / "config.yaml").write_text(text)
    asked = read_profile(tmp_path)
    train, fit = asked.of("train").at(2), asked.of("fit").at(2)
    assert train.values == {"gpu": 1, "mem_mb": 500000, "runtime": 2880, "threads": 8}
    assert train.cpus == 8
    assert fit.values == {"mem_mb": 2097, "runtime": 60}


@pytest.mark.parametrize("entry", ["set-resources: [gpu=1]", "set-threads: [train]", "default-resources: 5"])
def test_resources_that_snakemake_refuses(entry, tmp_path):
    (tmp_path / "config.yaml").write_text(entry)
    with pytest.raises(ValueError, match=r"config\.yaml: the profile has .*NAME=VALUE"):
        read_profile(tmp_path)


def test_plain_numbers_are_read_without_snakemake(monkeypatch):
    monkeypatch.setitem(sys.modules, "snakemake.resources", None)
    request = Request("train", {"mem_mb": " 9000", "gpu": 2, "runtime": "60 * attempt"})
    assert (request.number("mem_mb"), request.gpus, request.number("runtime")) == (9000, 2, None)


# ---------------------------------------------------------------- versions
@pytest.mark.parametrize(
    ("package", "setting", "key", "line"),
    [
        (
            "lm_eval",
            {"evaluate.lm_eval_tasks": ["arc_easy"]},
            "evaluate.lm_eval_tasks",
            'pip install "kvpipe[lm-eval]"',
        ),
        (
            "bitsandbytes",
            {"models.beta.load": {"quantize": "int4"}},
            "models.beta.load.quantize",
            "pip install bitsandbytes",
        ),
    ],
)
def test_a_package_that_a_setting_asks_for(saved, laptop, monkeypatch, package, setting, key, line):
    def findings(version, overrides=None):
        monkeypatch.setattr(settings, "installed", lambda name: version if name == package else real(name))
        return found_by(settings.check_packages, config(saved, overrides), saved)

    real, name = settings.installed, f"package {package}"
    finding = findings(None, setting)[name]
    assert (finding.status, finding.fix) == ("would fail", line) and key in finding.detail
    assert name not in findings("1.0", setting) and name not in findings(None)


def test_missing_and_other_versions(saved, laptop, monkeypatch):
    real = settings.installed
    monkeypatch.setattr(settings, "installed", lambda name: {"snakemake": None}.get(name, real(name)))
    (finding,) = settings.check_packages(Workload(config(saved), Paths(saved)))
    assert (finding.status, finding.detail) == ("would fail", "not installed: snakemake")
    monkeypatch.setattr(settings, "installed", lambda name: {"snakemake": "8.1.0"}.get(name, real(name)))
    (finding,) = settings.check_packages(Workload(config(saved), Paths(saved)))
    assert finding.status == "warning"
    assert "snakemake 8.1.0 (needs" in finding.detail


def test_peft_is_needed_for_lora_only(saved, laptop, monkeypatch):
    real = settings.installed
    monkeypatch.setattr(settings, "installed", lambda name: None if name == "peft" else real(name))
    assert found_by(settings.check_packages, config(saved), saved)["packages"].status == "ok"
    lora = found_by(settings.check_packages, config(saved, {"train.lora": {}}), saved)
    assert lora["packages"].detail == "not installed: peft"


def test_a_login_node_needs_snakemake_and_the_plugin_but_no_torch(saved, site, profile, monkeypatch):
    real = settings.installed
    monkeypatch.setattr(settings, "installed", lambda name: None if name in ("torch", "scipy") else real(name))
    found = found_by(jobs.check_packages, config(saved), saved, profile())
    assert found["packages"].status == "ok"
    monkeypatch.setattr(settings, "installed", lambda name: None if "plugin" in name else real(name))
    plugin = found_by(jobs.check_packages, config(saved), saved, profile())["slurm plugin"]
    assert plugin.status == "would fail"
    assert plugin.fix.startswith('pip install "snakemake-executor-plugin-slurm')


def test_make_login_installs_what_the_doctor_looks_for_on_a_login_node():
    lines = (ROOT / "containers" / "login.txt").read_text(encoding="utf-8").splitlines()
    installed = {line for line in lines if not line.startswith("#")}
    assert jobs.LOGIN | {"snakemake-executor-plugin-slurm"} <= installed
    assert "huggingface_hub" in jobs.LOGIN, "kvpipe lock asks the hub, from the login node"


# ---------------------------------------------------------------- storage
@pytest.mark.parametrize(("free", "status"), [(5e9, "ok"), (1e9, "warning"), (10.0, "would fail")])
def test_free_disk_against_the_stores(saved, laptop, tmp_path, monkeypatch, free, status):
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: Usage(9e9, 9e9 - free, free))
    finding = found_by(storage.check_storage, config(saved), tmp_path / "a" / "b")["disk"]
    assert finding.status == status
    assert str(tmp_path) in finding.detail


def test_the_results_move_to_scratch_as_a_full_disk_is_told(saved, laptop, tmp_path, monkeypatch):
    """The commands of the fix, run; tests/workflow/test_workflow.py runs a rule where results/ is such a link."""
    monkeypatch.chdir(tmp_path)
    for name in ("results/models", "scratch"):
        Path(name).mkdir(parents=True)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: Usage(9e9, 9e9, 10.0))
    fix = found_by(storage.check_storage, config(saved), Path("results"))["disk"].fix
    assert "--directory" not in fix and "--bind <scratch>" in fix
    commands = fix.partition("on scratch: ")[2].partition("   (")[0].replace("<scratch>", str(tmp_path / "scratch"))
    subprocess.run(["bash", "-ec", commands], check=True)
    assert Path("results/models").resolve() == tmp_path / "scratch" / "results" / "models"


def test_a_store_over_its_budget(saved, laptop, tmp_path):
    small = {"store.budget_gb": 1e-5}
    found = found_by(storage.check_storage, config(saved, small), tmp_path)
    assert found["store alpha/student"].status == "would fail"
    assert "store.budget_gb: 1" in found["store alpha/student"].fix
    assert found_by(storage.check_storage, config(saved), tmp_path)["stores"].status == "ok"


QUOTAS = {  # what the programs print: used, soft and hard limit in kB
    "lfs": "     /scratch 9000000* 8000000 10000000       6d       1       0       0       -\n",
    "lfs, of a mount point that takes a line": (
        "/lustre/scratch/projects\n     9000000* 8000000 10000000       6d       1       0       0       -\n"
    ),
    "quota": (
        "Disk quotas for user ann (uid 1000): \n"
        "     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace\n"
        "     /dev/other       0       1       1       0       1       0       0       0\n"
        "     {device} 9000000 8000000 10000000       0       1       0       0       0\n"
    ),
}


@pytest.mark.parametrize("program", QUOTAS)
def test_quota(saved, site, tmp_path, program):
    device = subprocess.run(["df", "--output=source", str(tmp_path)], capture_output=True, text=True, check=True)
    text = QUOTAS[program].format(device=device.stdout.split()[-1])
    site.program(program.split(",")[0], f"cat <<'END'\n{text}END")
    assert storage.quota_left(tmp_path) == 1000000 * 1024
    assert found_by(storage.check_storage, config(saved), tmp_path)["quota"].status == "warning"


def test_no_quota(site, tmp_path):
    assert storage.quota_left(tmp_path) is None
    site.program("quota", "echo 'quota: Cannot resolve mountpoint path' >&2; exit 1")
    assert storage.quota_left(tmp_path) is None


def test_store_sizes_are_about_those_of_the_stores(tmp_path):
    """On the embedded tasks, from constants: within a factor of 1.6 of what the build counts."""
    work = build(tmp_path)
    guessed = Workload(work.config, Paths(tmp_path / "nothing"))
    for teacher in ("alpha", "beta"):
        for reading in ("student", "own"):
            rows = len(encoded(work, teacher, "train", reading).ids)
            assert rows / 1.6 < guessed.tokens(teacher, reading) < rows * 1.6


def test_tokens_of_files_are_counted_by_the_tokenizer(tmp_path, saved):
    rows = [{"q": f"What is {i} + {i}?", "r": "so", "a": str(2 * i)} for i in range(250)]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "q", "reasoning": "r", "answer": "a"}
    source = {"kind": "files", "task": "math", "columns": columns} | dict.fromkeys(
        ("train", "validation", "test"), str(file)
    )
    settings = {"data.sources": [source], "arms.task.set.fuse.weights": {"default": [0.5, 0.5]}}
    work = Workload(config(saved, settings), Paths(tmp_path))
    assert work.examples == 250
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(saved / "teachers" / "alpha" / "tokenizer.json"))
    exact = sum(len(tokenizer.encode(f"{r['q']}\n{r['r']}\n#### {r['a']}\n").ids) for r in rows)
    assert exact * 0.9 < work.tokens("alpha") < exact * 1.1


HUB_DATA = {
    "data.sources": [{"kind": "hub", "task": "math", "preset": "gsm8k"}],
    "arms.task.set.fuse.weights": {"default": [0.5, 0.5]},
}


def test_data_of_the_hub_is_unknown_until_it_is_written(tmp_path, saved, laptop):
    settings, paths = config(saved, HUB_DATA), Paths(tmp_path)
    found = by_name(storage.check_storage(Workload(settings, paths)))
    assert found["data"].status == "warning"
    assert "openai/gsm8k" in found["data"].detail
    assert "not known yet" in found["disk"].detail
    short = [Record(str(i), "math", "1 + 1?", "", "2") for i in range(150)]
    long = [Record(f"long {i}", "code", "1 + 1? " * 90, "", "2") for i in range(150)]
    write_records(paths.data("train"), short + long)
    work = Workload(settings, paths)
    assert work.examples == 300
    exact = sum(len(record.prompt) for record in short + long)
    assert exact / 4 < work.tokens("alpha") < exact, "both tasks are in the mean"
    found = by_name(storage.check_storage(Workload(settings, paths)))
    assert "data" not in found
    assert "stores to make take about" in found["disk"].detail


def test_lines_are_counted_where_pyarrow_is_missing(tmp_path, saved, monkeypatch):
    """As on a login node; the mean of the texts is then the constants'."""
    (tmp_path / "train.jsonl").write_text('{"q": "a"}\n' * 120)
    files = dict.fromkeys(("train", "validation", "test"), str(tmp_path / "train.jsonl"))
    source = {"kind": "files", "task": "math", "columns": {"prompt": "q", "answer": "q"}} | files
    settings = config(saved, HUB_DATA | {"data.sources": [source]})
    monkeypatch.setitem(sys.modules, "kvpipe.data.mapping", None)
    assert Workload(settings, Paths(tmp_path)).examples == 120


# ---------------------------------------------------------------- memory
LARGE = {
    "models.student.architecture": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 512,
    },
    "models.student.tokenizer.vocab_size": 32000,
}


def test_parameters_of_a_known_model(saved, tmp_path):
    """TinyLlama-1.1B has 1,100,048,384 parameters."""
    found = Workload(config(saved, LARGE), Paths(tmp_path)).shape("student")
    assert found.parameters == pytest.approx(1_100_048_384, rel=1e-4)


def test_counted_parameters_are_those_of_the_file(saved, tmp_path):
    from kvpipe.models.folders import load_model

    work = Workload(config(saved), Paths(tmp_path))
    model = load_model(saved / "teachers" / "alpha")
    assert work.shape("alpha").parameters == sum(p.numel() for p in model.parameters())
    assert work.shape("alpha").geometry == (4, 3, 8)


def test_more_memory_than_the_machine_has(saved, laptop, tmp_path, monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: Memory(8e9))
    finding = found_by(memory.check_memory, config(saved, LARGE), tmp_path)["memory of training"]
    assert finding.status == "would fail"
    assert "1.1e+03 million parameters" in finding.detail
    assert "8.0 GB" in finding.detail


def test_memory_against_what_the_rule_asks_for(saved, site, profile, tmp_path):
    text = PROFILE.replace("gpu: 1, mem_mb: 9000", "mem_mb: 2000")
    found = found_by(jobs.check_memory, config(saved, LARGE), tmp_path, profile(text))["memory of training"]
    assert found.status == "would fail"
    asked = int(found.fix.split("mem_mb: ")[1].rstrip("}"))
    again = profile(text.replace("2000", str(asked)))
    assert found_by(jobs.check_memory, config(saved, LARGE), tmp_path, again)["memory of training"].status == "ok"


def test_gpu_memory_by_what_a_probe_saw(saved, site, profile, tmp_path):
    (tmp_path / "probe.json").write_text(json.dumps({"gpu": {"memory": 16e9}}))
    finding = found_by(jobs.check_memory, config(saved, LARGE), tmp_path, profile())["GPU memory of training"]
    assert finding.status in ("warning", "would fail")
    assert "train.accumulate × 2" in finding.fix
    (tmp_path / "probe.json").write_text(json.dumps({"gpu": {"memory": 80e9}}))
    found = found_by(jobs.check_memory, config(saved, LARGE), tmp_path, profile())
    assert found["GPU memory of training"].status == "ok"


def test_gpu_memory_of_a_teacher(saved, site, profile, tmp_path, monkeypatch):
    """A teacher of 8 billion parameters in bf16 takes 16 GB on the GPU, in int4 a quarter; no shard is kept there."""
    monkeypatch.setattr(Workload, "shape", lambda self, name: Shape(32, 4096, 8, 128, 14336, 32000, 8_000_000_000))
    text = f"{PROFILE}  teacher_kv: {{gpu: 1}}\n".replace("slurm-status-command: squeue\n", "")
    (tmp_path / "probe.json").write_text(json.dumps({"gpu": {"memory": 12e9}}))

    def findings(load, text=text):
        settings = config(saved, {f"models.{name}.load": load for name in ("alpha", "beta")})
        return found_by(jobs.check_memory, settings, tmp_path, profile(text))

    finding = findings({"dtype": "bf16"})["GPU memory of teacher KV"]
    assert (finding.status, "a GPU has 12.0 GB" in finding.detail) == ("would fail", True)
    assert "load: {dtype: bf16} or {quantize: int8}" in finding.fix
    assert findings({"quantize": "int4"})["GPU memory of teacher KV"].status == "ok"
    assert "GPU memory of teacher KV" not in findings({"dtype": "bf16"}, PROFILE), "its rule asks for no GPU"


def test_jobs_ask_for_what_the_sizes_say(saved, tmp_path):
    small, large = (memory.job_memory(Workload(config(saved, o), Paths(tmp_path))) for o in (None, LARGE))
    assert {"train", "teacher_kv", "fit", "evaluate", "untrained"} <= set(small)
    assert large["train"] >= 16 * 1.1e9 / 1e6 > small["train"], "16 bytes for each of 1.1 billion parameters"
    assert max(small.values()) <= 2000, "a tiny model takes what Python and torch take"


def test_jobs_that_write_texts_ask_for_what_the_sizes_say(saved, tmp_path):
    written = {"base": "two", "set": {"time": {"kind": "segment", "reasoning": "written"}}}

    def asked(**settings):
        changed = {f"teacher_text.{name}": value for name, value in settings.items()}
        return memory.job_memory(Workload(config(saved, {"arms.written": written} | changed), Paths(tmp_path)))

    assert "teacher_text" not in memory.job_memory(Workload(config(saved), Paths(tmp_path)))
    assert asked()["teacher_text"] <= 2000
    both = asked(shards=3)
    assert both["teacher_text"] == both["teacher_text_shard"] <= 2000
    model = Shape(32, 4096, 8, 128, 14336, 128256, 8_030_261_248)
    need = {tokens: writing_bytes(model, tokens, tokens // 1000, 2.0) for tokens in (16_000, 64_000)}
    assert 16e9 < need[16_000] < 24e9, "weights in bf16, and 2.1 GB of cache twice"
    cache = 2 * 48_000 * 2 * 2 * 32 * 8 * 128
    assert need[64_000] - need[16_000] == pytest.approx(1.1 * cache, rel=0.3)


def test_a_sharded_student_takes_a_part_of_the_memory():
    student = Shape(22, 2048, 4, 64, 5632, 32000, 1_100_000_000)
    settings = TrainConfig(shard=True, gradient_checkpointing=True)
    one, four = (training_bytes(student, settings, 1024, gpu=True, processes=n) for n in (1, 4))
    assert one == training_bytes(student, TrainConfig(gradient_checkpointing=True), 1024, gpu=True)
    assert one / 4 < four < one / 2, "weights, gradients and moments in four parts, beside embeddings in one piece"
    apart = training_bytes(student, settings.model_copy(update={"accumulate": 2}), 1024, gpu=True, processes=4)
    assert apart > four, "micro-batches add up whole gradients"


def test_what_the_estimate_says_of_the_advice():
    """Every setting that the advice names makes the estimate smaller."""
    student = Shape(22, 2048, 4, 64, 5632, 32000, 1_100_000_000)

    def need(tokens=4096, **settings):
        return training_bytes(student, TrainConfig(**settings), tokens)

    assert need(tokens=2048) < need()
    assert need(gradient_checkpointing=True) < need()
    assert need(precision="bf16") < need()
    assert need(lora={}) < need()
    assert need() > 16 * student.parameters


# ---------------------------------------------------------------- GPUs
SEEN = {"name": "Tesla V100", "driver": "470.82.01", "capability": "7.0", "memory": 16e9, "torch_cuda": "11.8"}


def judged(saved, overrides=None, **changes):
    return {f.name: f for f in gpu.judge_gpu(SEEN | changes, config(saved, overrides), "here")}


def test_a_gpu_that_fits(saved):
    assert {f.status for f in judged(saved).values()} == {"ok"}


def test_a_driver_older_than_the_images_cuda(saved):
    finding = judged(saved, torch_cuda="12.8")["GPU"]
    assert finding.status == "warning", "device: auto trains on the CPU"
    assert judged(saved, {"train.device": "cuda"}, torch_cuda="12.8")["GPU"].status == "would fail"
    assert "driver 470.82.01, torch for CUDA 12.8, which needs driver 525" in finding.detail
    assert judged(saved, torch_cuda="12.8", driver="525.60.13")["GPU"].status == "ok"
    assert "make image" not in finding.fix, "torch for CUDA 11 is older than the lock"
    finding = judged(saved, torch_cuda="13.0", driver="575.1")["GPU"]
    assert "VARIANT=cu126 TORCH_INDEX=<torch's index for CUDA 12.6> make image" in finding.fix


def test_a_cpu_build_where_there_is_a_gpu(saved):
    assert "would train on the CPU" in judged(saved, torch_cuda=None)["GPU"].detail
    assert judged(saved, torch_cuda=None)["GPU"].status == "warning", "device: auto trains all the same"
    assert judged(saved, {"train.device": "cuda"}, torch_cuda=None)["GPU"].status == "would fail"


def test_bf16_on_a_gpu_without_it(saved):
    finding = judged(saved, {"train.precision": "bf16"})["precision"]
    assert (finding.status, finding.fix) == ("warning", "train.precision: fp16")
    assert "precision" not in judged(saved, {"train.precision": "bf16"}, capability="8.0")
    assert "precision" not in judged(saved, {"train.precision": "fp16"})


def test_no_gpu_where_the_settings_want_one(saved, laptop, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "nvidia", lambda: None)
    (finding,) = gpu.check_gpu(Workload(config(saved, {"train.device": "cuda"}), Paths(tmp_path)))
    assert finding.status == "would fail"
    assert "train.device is cuda" in finding.detail
    assert not [*gpu.check_gpu(Workload(config(saved), Paths(tmp_path)))]


def test_a_login_node_without_a_gpu_is_no_fault(saved, site, profile, tmp_path):
    def finding(device="auto"):
        (found,) = jobs.check_gpu(Workload(config(saved, {"train.device": device}), Paths(tmp_path), profile()))
        return found

    assert (finding("cuda").status, finding("cuda").fix) == ("ok", "kvpipe doctor --probe")
    (tmp_path / "probe.json").write_text(json.dumps({"job": "41", "gpu": SEEN | {"available": True}}))
    assert "Tesla V100 in job 41" in finding().detail
    for gpu_seen in (None, SEEN | {"available": False}):
        (tmp_path / "probe.json").write_text(json.dumps({"job": "41", "gpu": gpu_seen}))
        assert (finding("cuda").status, finding().status) == ("would fail", "warning"), "auto trains on the CPU"
        assert "apptainer-args: --nv" in finding().fix


def test_a_cell_on_several_nodes_without_the_lines_for_srun(saved, site, profile, tmp_path):
    text = PROFILE.replace("gpu: 1", "gpu: 2, nodes: 2")
    lines = "mpi: srun, tasks: 2, tasks_per_gpu: 0"
    finding = found_by(jobs.check_gpu, config(saved), tmp_path, profile(text))["nodes"]
    assert (finding.status, finding.fix) == ("would fail", f"in the profile under set-resources, train: {lines}")
    text = text.replace("nodes: 2", f"nodes: 2, {lines}")
    assert "nodes" not in found_by(jobs.check_gpu, config(saved), tmp_path, profile(text))


def test_drivers_that_do_not_know_the_compute_capability(site):
    site.program("nvidia-smi", "case \"$*\" in *compute_cap*) exit 2;; esac; echo 'Tesla V100, 450.51.06, 16160'")
    seen = look.nvidia()
    assert (seen["name"], seen["driver"], seen["capability"]) == ("Tesla V100", "450.51.06", None)
    assert seen["memory"] == 16160 * 2**20
    site.program("nvidia-smi", "echo 'NVIDIA H100, 550.1, 81559, 9.0'")
    assert look.nvidia()["capability"] == "9.0"
    site.program("nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    assert look.nvidia() is None


@pytest.mark.parametrize("said", ["true", "echo", "echo 'No devices were found'"])
def test_an_nvidia_smi_that_shows_no_gpu(site, said):
    """Some drivers end with exit status 0 all the same."""
    site.program("nvidia-smi", said)
    assert look.nvidia() is None


def test_the_shipped_experiment_is_sound(laptop, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = doctor.examine(Workload(load_config("config/config.yaml"), Paths(tmp_path / "results")))
    assert not [f for f in found if f.status == "would fail"]


# ---------------------------------------------------------------- walls around programs
@pytest.mark.parametrize("walls", ["bwrap", "own"])
def test_the_walls_of_this_machine(saved, tmp_path, monkeypatch, walls):
    monkeypatch.setattr(settings, "choose", lambda config: walls)
    assert not found_by(settings.check_sandbox, config(saved), tmp_path), "no program runs"
    run_code = {"evaluate": {"sandbox": {"run_code": True}}}
    finding = found_by(settings.check_sandbox, config(saved, run_code), tmp_path)["sandbox"]
    assert finding.status == "ok" and ("bubblewrap's" if walls == "bwrap" else "kvpipe's own") in finding.detail


def test_no_walls_are_a_failure_unless_the_configuration_says_so(saved, site, profile, tmp_path, monkeypatch):
    def refused(config):
        raise SandboxError("programs cannot be run here")

    monkeypatch.setattr(settings, "choose", refused)
    run_code = {"evaluate": {"sandbox": {"run_code": True}}}
    finding = found_by(settings.check_sandbox, config(saved, run_code), tmp_path)["sandbox"]
    assert (finding.status, finding.detail) == ("would fail", "on this machine programs cannot be run here")
    found = found_by(jobs.check_sandbox, config(saved, run_code), tmp_path, profile())
    assert found["sandbox"].status == "warning", "jobs run in the image, whose walls count"
    monkeypatch.undo()
    run_code["evaluate"]["sandbox"]["walls"] = "none"
    assert found_by(settings.check_sandbox, config(saved, run_code), tmp_path)["sandbox"].status == "warning"
