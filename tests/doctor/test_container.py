"""Apptainer and the image: each finding is produced by what it warns of."""

import json
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest
from conftest import PROFILE
from tiny import config

from kvpipe.config import load
from kvpipe.doctor import Workload
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.provenance import PACKAGE
from kvpipe_cluster.container import LABEL, LOOK, check_container

EMBEDDED = PACKAGE.parent / "config" / "config.yaml"
LOCK = sha256((PACKAGE.parent / "containers" / "image.lock").read_bytes()).hexdigest()
# words that Apptainer uses where an image does not start, and a word of the fix
SYMPTOMS = [
    (
        "FATAL:   Failed to create user namespace: see /proc/sys/user/max_user_namespaces",
        "max_user_namespaces",
    ),
    ("FATAL:   while extracting: fuse: device not found, try 'modprobe fuse' first", "squashfuse"),
    ("FATAL:   while extracting image: write: no space left on device", "APPTAINER_TMPDIR"),
    ("FATAL:   image format not recognized: unexpected EOF", "make image"),
    ("FATAL:   exec /bin/bash failed: exec format error", "processor"),
    ("FATAL:   something nobody has seen", "apptainer --debug"),
]


@pytest.fixture
def image(site, tmp_path, monkeypatch):
    path = tmp_path / "kvpipe.sif"
    path.touch()
    monkeypatch.setenv("KVPIPE_IMAGE", str(path))
    site.apptainer(labels=json.dumps({LABEL: LOCK}))
    return path


def found(profile, settings=None, results=Path("results")):
    return {f.name: f for f in check_container(Workload(settings or load(EMBEDDED), Paths(results), profile))}


def test_a_sound_image(site, image, profile):
    findings = found(profile())
    assert {f.status for f in findings.values()} == {"ok"}
    assert findings["apptainer"].detail == "apptainer version 1.4.5"
    assert LOCK[:12] in findings["image and lock"].detail


def test_an_image_is_looked_for_only_where_jobs_run_in_one(site, image, profile, monkeypatch):
    assert not found(profile("executor: slurm\n"))
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert not found(profile())
    monkeypatch.delenv("SLURM_JOB_ID")
    site.without("sbatch")
    assert not found(profile())


def test_no_apptainer_on_the_login_node(site, profile):
    finding = found(profile())["apptainer"]
    assert finding.status == "would fail"
    assert finding.fix == "module load apptainer"


def test_no_image(site, image, profile):
    image.unlink()
    finding = found(profile())["image"]
    assert finding.status == "would fail"
    assert str(image) in finding.detail
    assert "make image" in finding.fix


@pytest.mark.parametrize(("said", "word"), SYMPTOMS)
def test_an_image_that_does_not_start(site, image, profile, said, word):
    site.apptainer(start=f'echo "{said}" >&2; exit 255')
    finding = found(profile())["image"]
    assert finding.status == "would fail"
    assert said in finding.detail
    assert word in finding.fix


def test_an_image_that_hangs(site, image, profile, monkeypatch):
    monkeypatch.setattr("kvpipe_cluster.container.START", 0.3)
    site.apptainer(start="exec sleep 60")
    assert "no answer within 0.3 s" in found(profile())["image"].detail


@pytest.mark.parametrize("variable", ["PYTHONPATH", "TMPDIR"])
def test_variables_of_the_login_node_that_do_harm_in_the_image(site, image, profile, variable):
    site.apptainer(start=f"echo {variable}=/apps/x", labels=json.dumps({LABEL: LOCK}))
    finding = found(profile())[f"{variable} in the image"]
    assert finding.status == "warning" and f"unset {variable}" in finding.fix


def test_what_is_asked_of_the_image_about_variables(tmp_path):
    """The lines themselves, in a shell."""
    for environment, said in (({}, ""), ({"PYTHONPATH": "/x", "TMPDIR": str(tmp_path)}, "PYTHONPATH=/x\n")):
        done = subprocess.run(["bash", "-c", LOOK], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == said
    gone = {"TMPDIR": str(tmp_path / "none")}
    assert subprocess.run(["bash", "-c", LOOK], env=gone, capture_output=True, text=True).stdout.startswith("TMPDIR=")


def test_an_image_of_another_lock(site, image, profile):
    site.apptainer(labels=json.dumps({LABEL: "0" * 64}))
    finding = found(profile())["image and lock"]
    assert finding.status == "would fail"
    assert LOCK[:12] in finding.detail
    site.apptainer(labels="{}")
    assert found(profile())["image and lock"].status == "warning"


def test_an_image_that_does_not_tell_its_labels(site, image, profile):
    site.apptainer(labels="echo 'FATAL: unknown command' >&2; exit 1")
    finding = found(profile())["image and lock"]
    assert finding.status == "warning"
    assert "FATAL: unknown command" in finding.detail


def test_an_old_apptainer(site, image, profile):
    site.apptainer(version="apptainer version 1.0.3")
    assert found(profile())["apptainer"].status == "warning"


def test_a_working_directory_with_a_space(site, image, profile, tmp_path, monkeypatch):
    folder = tmp_path / "my checkout"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert found(profile())["working directory"].status == "would fail"


def test_an_image_below_a_path_with_a_space(site, image, profile, monkeypatch):
    spaced = image.with_name("my image.sif")
    spaced.touch()
    monkeypatch.setenv("KVPIPE_IMAGE", str(spaced))
    finding = found(profile())["image"]
    assert finding.status == "would fail"
    assert "my image.sif' has a space" in finding.detail
    link = image.with_name("link.sif")
    link.symlink_to(spaced)
    monkeypatch.setenv("KVPIPE_IMAGE", str(link))
    assert found(profile())["image"].status == "would fail", "the Snakefile follows it"


# ---------------------------------------------------------------- what the image sees of the machine
# an image that shows the working directory and what is bound by --bind, and of the rest empty folders of its own
SEES = """
while [ $# -gt 0 ] && [ "$1" != stat ]; do
    case "$1" in --home|--bind) shown="$shown $2";; esac
    shift
done
for path in "${@:4}"; do
    seen=
    for folder in $shown; do case "$path" in "$folder"*) seen=1;; esac; done
    if [ "$seen" ]; then stat -c "$3" "$path"; else echo "7:7 $path"; fi
done"""


@pytest.fixture
def scratch(site, image, tmp_path, monkeypatch):
    """A checkout, and a folder beside it that is not below."""
    for name in ("checkout", "scratch"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    site.apptainer(start=SEES, labels=json.dumps({LABEL: LOCK}))
    return tmp_path / "scratch"


def test_a_cache_that_the_image_does_not_see(scratch, profile, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(scratch / "huggingface"))
    finding = found(profile())["HF_HOME in the image"]
    assert finding.status == "warning"
    assert finding.fix.startswith(f"mkdir -p {scratch}/huggingface; in the profile: apptainer-args: ")
    (scratch / "huggingface").mkdir()
    finding = found(profile(PROFILE + 'apptainer-args: "--nv"\n'))["HF_HOME in the image"]
    line = f'apptainer-args: "--nv --bind {scratch}/huggingface"'
    assert finding.fix == f"in the profile: {line}"
    assert "HF_HOME in the image" not in found(profile(f"{PROFILE}{line}\n"))


def test_results_as_a_link_to_where_the_image_does_not_see(scratch, profile):
    Path("results").symlink_to(scratch)
    finding = found(profile())["results in the image"]
    assert finding.status == "warning"
    assert str(scratch) in finding.detail
    assert "results in the image" not in found(profile(f'{PROFILE}apptainer-args: "--bind {scratch}"\n'))


def test_what_lies_in_the_working_directory_is_seen(scratch, profile, monkeypatch):
    monkeypatch.setenv("HF_HOME", "cache")
    assert {f.status for f in found(profile()).values()} == {"ok"}


def test_models_and_data_that_the_image_does_not_see(scratch, profile):
    """One line binds them all."""
    for name in ("teachers/alpha", "library", "rows"):
        (scratch / name).mkdir(parents=True)
    (scratch / "rows" / "train.jsonl").touch()
    Path("test.jsonl").symlink_to(scratch / "rows" / "train.jsonl")
    source = {"kind": "files", "task": "math", "columns": {"prompt": "q", "answer": "a"}}
    source |= {
        "train": f"{scratch}/rows/train.jsonl[:50%]",
        "validation": f"{scratch}/none/rows.jsonl",
        "test": "test.jsonl",
    }
    settings = config(
        scratch,
        {
            "data.sources": [source],
            "libraries": [f"{scratch}/library"],
            "arms.task.set.fuse.weights": {"default": [0.5, 0.5]},
        },
    )
    findings = {name: f for name, f in found(profile(), settings).items() if f.status != "ok"}
    # beta's folder and the validation file are not there: a finding of their own
    names = {
        f"library {scratch}/library in the image",
        "model alpha in the image",
        "data math, train, data math, test in the image",
    }
    assert set(findings) == names
    binds = " ".join(f"--bind {scratch}/{name}" for name in ("library", "teachers/alpha", "rows"))
    (fix,) = {f.fix for f in findings.values()}
    assert fix == f'in the profile: apptainer-args: "{binds}"'
    again = found(profile(f'{PROFILE}apptainer-args: "{binds}"\n'), settings)
    assert {f.status for f in again.values()} == {"ok"}


def test_the_cache_in_a_home_that_the_image_does_not_have(scratch, profile, monkeypatch):
    settings = config(scratch, {"models.alpha": {"source": "hub", "repo": "some/model"}})
    finding = found(profile(), settings)["HF_HOME in the image"]
    assert (finding.status, "export HF_HOME=" in finding.fix) == ("warning", True)
    assert "HF_HOME in the image" not in found(profile()), "nothing comes from the hub"
    monkeypatch.setenv("HF_HOME", "cache")
    assert "HF_HOME in the image" not in found(profile(), settings)
