"""The probe against a cluster that takes some ways of asking and refuses others; it ends whatever the cluster does."""

import json

import pytest
import tiny
import yaml
from conftest import PROFILE
from site_fakes import REFUSED, TAKEN
from tiny import config
from typer.testing import CliRunner

from kvpipe.cli.app import app
from kvpipe.doctor import Workload
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.provenance import PACKAGE
from kvpipe_cluster import probing
from kvpipe_cluster.probing import ProbeError, probe

SEEN = {
    "host": "node7",
    "gpu": {
        "name": "NVIDIA A100-SXM4-80GB",
        "driver": "550.54.15",
        "capability": "8.0",
        "memory": 85899345920,
        "torch_cuda": "12.8",
        "available": True,
    },
}


@pytest.fixture
def cluster(site, monkeypatch, tmp_path):
    """`accept(pattern)`: sbatch takes what matches none of the refused patterns; a submitted job writes `SEEN` at once."""
    monkeypatch.setattr(probing, "POLL", 0.01)
    site.results = Paths(tmp_path / "results")

    def accept(*refused: str, answer: str | None = json.dumps(SEEN), states: str = "", stage: str = "") -> None:
        patterns = "|".join(f"*{pattern}*" for pattern in refused)
        no = f'case "$*" in {patterns}) echo "{REFUSED}" >&2; exit 1;; esac' if patterns else ""
        log = site.results.root / "probe" / "41.log"
        written = f"cat > {site.answers}/script; " + (
            f"mkdir -p {log.parent}; echo 'kvpipe-probe {answer}' > {log}" if answer else "true"
        )
        site.program(
            "sbatch",
            f'echo "$*" >> {site.answers}/calls\n[ "$1" = --version ] && exec cat {site.answers}/version\n{no}\n{stage}\n'
            f'case "$*" in *--test-only*) echo "{TAKEN}" >&2; exit 0;; esac\n{written}\necho 41',
        )
        site.program("squeue", states or "echo 'COMPLETED|None'")
        site.program("scancel", f'echo "$*" > {site.answers}/cancelled')

    return accept


def run(site, profile, wait=5.0, text=PROFILE):
    said = []
    work = Workload(config(site.folder), site.results, profile(text))
    shown = probe(work, said.append, wait=wait).read_text(encoding="utf-8")
    return shown, yaml.safe_load(shown), said


def test_the_plainest_syntax_that_is_taken(site, cluster, profile):
    cluster()
    shown, values, _ = run(site, profile)
    assert values["default-resources"] == ["slurm_partition=gpu", "mem_mb=8000", "runtime=60"]
    cell = {"gpu": 1, "cpus_per_gpu": 1, "mem_mb": "min(4000 * attempt, 10000)", "runtime": "min(100 * attempt, 120)"}
    assert values["set-resources"]["train"] == cell, (
        "memory is what the doctor expects: CUDA alone takes 2.5 GB of the host"
    )
    assert values["slurm-requeue"] is True
    assert "A100-SXM4-80GB, 86 GB, driver 550.54.15" in shown
    written = json.loads((site.results.root / "probe.json").read_text())
    assert written["job"] == "41"
    assert written["gpu"]["memory"] == 85899345920
    submitted = [line for line in (site.answers / "calls").read_text().splitlines() if "--test-only" not in line]
    assert len(submitted) == 1, "one job and no more"
    assert "--time=5" in submitted[0]


@pytest.mark.parametrize(
    ("refused", "expected"),
    [
        (["--gpus=1"], {"gpu": 1, "gpu_model": "a100"}),
        (["--gpus"], {"gres": "gpu:1"}),
        (["--gpus", "gpu:1"], {"gres": "gpu:a100:1"}),
    ],
)
def test_other_syntaxes(site, cluster, profile, refused, expected):
    cluster(*refused)
    shown, values, _ = run(site, profile)
    found = values["set-resources"]["train"]
    assert {key: found[key] for key in expected} == expected
    assert f"# refused: gpu: {refused[0]}" in shown
    assert REFUSED in shown


def test_limits_are_what_is_taken_not_what_is_there(site, cluster, profile):
    cluster("--cpus-per-task=2", "--mem=10000")
    shown, values, _ = run(site, profile)
    assert "at most 1 CPUs, 5000 MB and 120 minutes" in shown
    assert values["default-resources"][1] == "mem_mb=5000"
    assert values["set-resources"]["train"]["mem_mb"] == "min(4000 * attempt, 5000)"


def test_a_longer_runtime_than_the_partition_allows(site, cluster, profile):
    cluster()
    _, values, _ = run(site, profile, text=PROFILE.replace("100 * attempt", "720"))
    assert values["set-resources"]["train"]["runtime"] == 120


def test_the_shipped_profile_comes_out_whole(site, cluster, profile):
    """Ready to be profiles/site: only what jobs ask for is another."""
    cluster()
    text = (PACKAGE.parent / "profiles" / "slurm" / "config.yaml").read_text()
    before = yaml.safe_load(text)
    shown, values, _ = run(site, profile, text=text)
    asked = {"default-resources", "set-resources", "slurm-requeue"}
    assert {k: v for k, v in values.items() if k not in asked} == {k: v for k, v in before.items() if k not in asked}
    assert values["set-resources"].keys() == before["set-resources"].keys()
    assert values["set-resources"]["fit"] == {
        "gpu": 1,
        "mem_mb": "min(4000 * attempt, 10000)",
        "runtime": "min(60 * attempt, 120)",
    }
    cell = {"gpu": 1, "cpus_per_gpu": 1, "mem_mb": "min(4000 * attempt, 10000)", "runtime": 120}
    assert values["set-resources"]["train"] == cell
    assert {line for line in text.splitlines() if line.startswith("#")} <= set(shown.splitlines()), "the reasons stay"


def test_a_job_that_looks_outside_the_image_says_so(site, cluster, profile, tmp_path, monkeypatch):
    cluster()
    image = tmp_path / "kvpipe.sif"
    monkeypatch.setenv("KVPIPE_IMAGE", str(image))
    shown, _, said = run(site, profile)
    assert "looks outside the image: " in said[1]
    assert "# Seen outside the image: " in shown
    site.apptainer()
    shown, _, said = run(site, profile)
    assert f"job 41 looks outside the image: {image} does not exist" in said[1]
    assert f"# Seen outside the image: {image} does not exist (make image).\n" in shown
    image.touch()
    shown, _, said = run(site, profile)
    assert not any("outside" in line for line in [shown, *said])
    assert "exec --nv" in (site.answers / "script").read_text()


def test_what_a_rule_asks_for_besides_stays(site, cluster, profile):
    cluster()
    text = PROFILE.replace("gpu: 1, mem_mb", "gpu: 1, qos: long, mem_mb") + "retries: 2\n"
    _, values, _ = run(site, profile, text=text)
    assert values["set-resources"]["train"]["qos"] == "long"
    assert values["retries"] == 2


def test_another_partition_where_the_first_takes_nothing(site, cluster, profile):
    cluster("--partition=gpu")
    _, values, _ = run(site, profile)
    assert values["default-resources"][0] == "slurm_partition=long"


def test_no_way_of_asking_for_a_gpu_is_taken(site, cluster, profile):
    """The profile is for the jobs that need none, and says what was refused."""
    cluster("--gpus", "--gres")
    shown, values, _ = run(site, profile)
    assert values["default-resources"][0] == "slurm_partition=gpu"
    assert "gpu" not in values.get("set-resources", {}).get("train", {})
    assert shown.count("# refused: gpu: --g") == 4


def test_a_cluster_that_takes_nothing(site, cluster, profile):
    cluster("--partition")
    with pytest.raises(ProbeError, match="no partition took a job") as error:
        run(site, profile)
    assert REFUSED in str(error.value)
    assert "gpu:" in str(error.value)
    assert "long:" in str(error.value)


def test_a_job_that_never_starts_is_cancelled(site, cluster, profile):
    cluster(answer=None, states="echo 'PENDING|Resources'")
    shown, values, said = run(site, profile, wait=0.2)
    assert (site.answers / "cancelled").read_text().strip() == "41"
    assert any("pending (Resources)" in line for line in said)
    assert "no job has run" in shown
    assert values["set-resources"]["train"]["gpu"] == 1
    assert not (site.results.root / "probe.json").exists()


def test_a_job_that_fails_is_told_by_its_last_line(site, cluster, profile, tmp_path):
    log = tmp_path / "results" / "probe" / "41.log"
    text = "FATAL: could not open image"
    cluster(answer=None, states="echo 'FAILED|NonZeroExitCode'", stage=f"mkdir -p {log.parent}; echo '{text}' > {log}")
    _, _, said = run(site, profile)
    assert any(text in line and "FAILED" in line for line in said)


def test_a_submission_that_is_refused_names_the_call(site, cluster, profile):
    said = "sbatch: error: Batch job submission failed: Invalid qos specification"
    cluster(stage=f'case "$*" in *--test-only*) ;; *) echo "{said}" >&2; exit 1;; esac')
    with pytest.raises(ProbeError, match=r"sbatch --parsable .*--gpus=1: .*Invalid qos"):
        run(site, profile)


def test_the_job_runs_in_the_image(site, cluster, profile, tmp_path, monkeypatch):
    image = tmp_path / "images of mine" / "kvpipe.sif"
    image.parent.mkdir()
    image.touch()
    monkeypatch.setenv("KVPIPE_IMAGE", str(image))
    site.apptainer()
    cluster()
    run(site, profile, text=PROFILE + 'apptainer-args: "--nv --bind /scratch"\n')
    script = (site.answers / "script").read_text()
    assert script.startswith("#!/bin/bash\n")
    assert f"apptainer exec --nv --bind /scratch '{image}' python3 -c " in script
    assert "nvidia-smi" in script


def test_the_account_goes_along(site, cluster, profile):
    cluster()
    _, values, _ = run(site, profile, text=PROFILE.replace("runtime=60", "runtime=60, slurm_account=physics"))
    assert "slurm_account=physics" in values["default-resources"]
    assert all("--account=physics" in x for x in (site.answers / "calls").read_text().splitlines() if x != "--version")


def test_without_slurm(site, profile):
    site.without("sbatch")
    with pytest.raises(ProbeError, match="no sbatch on the PATH"):
        probe(Workload(config(site.folder), Paths(site.folder), profile()), print)


def test_the_script_runs_by_itself(tmp_path):
    """What the job runs needs nothing of kvpipe."""
    import subprocess
    import sys
    from pathlib import Path

    text = Path(probing.look.__file__).read_text()
    done = subprocess.run([sys.executable, "-I", "-c", text], capture_output=True, text=True, check=True, cwd=tmp_path)
    seen = json.loads(done.stdout.removeprefix("kvpipe-probe "))
    assert {"host", "gpu", "torch", "cuda_visible_devices"} <= set(seen)


def test_the_doctor_judges_the_profile_that_the_probe_wrote(site, cluster, profile, tmp_path):
    """Not the one that it was given, whose cell asks for more than a node has; what is printed can be a file."""
    cluster()
    settings = tmp_path / "c.json"
    settings.write_text(json.dumps(tiny.values(tmp_path)))
    given = profile(PROFILE.replace("mem_mb: 9000", "mem_mb: 99000"))
    options = ["--config", str(settings), "--results", str(site.results.root), "--profile", str(given)]
    before = CliRunner().invoke(app, ["doctor", *options])
    assert "would fail  requests: train: asks for 99000 MB" in before.stdout
    done = CliRunner().invoke(app, ["doctor", *options, "--probe"])
    assert yaml.safe_load(done.stdout)["set-resources"]["train"]["mem_mb"] == "min(4000 * attempt, 10000)"
    assert "ok  requests: every rule's job fits" in done.stderr
    assert "ok  GPU: NVIDIA A100-SXM4-80GB in job 41" in done.stderr
