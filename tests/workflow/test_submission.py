"""The cluster profiles: the sbatch line of every rule, and dry runs.

SLURM and Apptainer are stand-ins here that record and answer; `make test-cluster` has real ones. The golden lines are
written anew by `KVPIPE_GOLDEN=write python -m pytest tests/workflow/test_submission.py -k golden`.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from installed import PLUGIN, write_metadata
from test_workflow import ROOT, copy, python  # noqa: F401

from kvpipe.experiment.launch import command

PROFILES = sorted(path.parent.name for path in (ROOT / "profiles").glob("*/config.yaml"))
WHOLE = ("\nstudent:", "\ndata:")
CONFIGS = sorted(p.name for p in (ROOT / "config").glob("*.yaml") if all(key in p.read_text("utf-8") for key in WHOLE))
RULES = {r for f in (ROOT / "workflow/rules").glob("*.smk") for r in re.findall(r"^rule (\w+):", f.read_text(), re.M)}
GOLDEN = ROOT / "tests" / "golden" / "sbatch.txt"
SBATCH = """
while read -r output; do  # every file that the job might have to make
    mkdir -p "$(dirname "$output")"
    case $output in */model) mkdir -p "$output" ;; *) [ -e "$output" ] || : > "$output" ;; esac
done < "$RECORD.outputs"
exec 9> "$RECORD.lock"
flock 9
# the options of the submission, what it runs left out; its line number is the job's
echo "$*" | sed "s/ --wrap=.*//" >> "$RECORD"
wc -l < "$RECORD"
"""
CELLS = {
    "several GPUs": ["gpu: 4", "nodes: 1", "cpus_per_gpu: 3"],
    "several nodes": ["gres: gpu:2", "nodes: 2", "mpi: srun", "tasks: 2", "tasks_per_gpu: 0"],
}
"""Cells of docs/hpc.md: what stands in the profile in place of `gpu: 1`."""
TOOLS = {
    "apptainer": "echo 'apptainer version 1.4.5'",
    "sbatch": SBATCH,
    # every job that was submitted is done
    "squeue": 'seq "$(wc -l < "$RECORD")" | sed "s/$/|COMPLETED/"',
    "scontrol": "echo 'MinJobAge = 300 sec'",
    # the commands are there, accounting is off
    "sacct": "echo 'Slurm accounting storage is disabled' >&2; exit 1",
    "sacctmgr": "exit 1",
    "sinfo": "echo PARTITION; echo 'standard*'",
    "scancel": "true",
}


@pytest.fixture(scope="module")
def login(copy, tmp_path_factory):  # noqa: F811
    """A checkout with few arms, and Snakemake called with the stand-ins on its PATH."""
    path = copy / "config" / "config.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    arms = {name: settings["arms"][name] for name in ("control", "exp1", "exp6", "full")}
    settings |= {"seeds": [0], "arms": arms, "store": {"shards": 2}}
    settings["train"]["threads"] = 3  # another number than that of the rules that say nothing
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    (copy / "containers").mkdir()
    (copy / "containers" / "kvpipe-cuda-0123456789ab.sif").touch()
    (copy / "containers" / "kvpipe.sif").symlink_to("kvpipe-cuda-0123456789ab.sif")
    tools = tmp_path_factory.mktemp("tools")
    for name, body in TOOLS.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (tools / name).chmod(0o755)
    record = tools / "record"
    record.touch()

    def run(*arguments: str, profile: str = "slurm", **variables: str):
        where = str(ROOT / "profiles" / profile)
        variables |= {"PATH": f"{tools}:{os.environ['PATH']}", "RECORD": str(record)}
        return python(copy, "-m", "snakemake", "--profile", where, *arguments, **variables)

    return copy, run, record


def lines_by_rule(record: Path, folder: Path) -> dict[str, str]:
    """Rule → options of its sbatch line, without what differs between runs and machines."""
    found = {}
    for line in record.read_text(encoding="utf-8").splitlines():
        rule = re.search(r"--comment rule_([a-z_]+?)(?:_wildcards_\S+)?(?= )", line)
        assert rule, line
        line = re.sub(r"--job-name \S+", "--job-name RUN", line).replace(str(folder), "CHECKOUT")
        line = re.sub(r"(/rule_\w+/)\S+(/%j\.log)", r"\1CELL\2", line)
        line = re.sub(r"(_wildcards_)\S+", r"\1CELL", line)
        # one job of each rule stands for all
        found[rule[1]] = min(found.get(rule[1], line), line)
    return dict(sorted(found.items()))


def with_resources(folder: Path, *lines: str) -> None:
    """The shipped profile with other lines in place of a cell's `gpu: 1`."""
    text = (ROOT / "profiles" / "slurm" / "config.yaml").read_text(encoding="utf-8")
    assert "  train: {gpu: 1, " in text
    text = text.replace("  train: {gpu: 1, ", f"  train: {{{', '.join(lines)}, ")
    (folder / "config.yaml").write_text(text, encoding="utf-8")


def test_sbatch_lines_are_the_golden_ones(login, tmp_path):
    folder, run, record = login
    # no report asks for the second one unless evaluate.lm_eval_tasks names some
    targets = ["results/report.html", "results/lm_eval/control/seed0.json"]
    plan = run("-n", *targets)
    assert plan.returncode == 0, plan.stdout + plan.stderr
    made = re.findall(r"^    (?:output|benchmark): (.*)", plan.stdout, re.MULTILINE)
    record.with_suffix(".outputs").write_text("\n".join(", ".join(made).split(", ")) + "\n", encoding="utf-8")
    done = run("--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "1", *targets)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = lines_by_rule(record, folder)
    assert found.keys() == RULES - {"teacher_text", "teacher_text_shard"}, "no arm of it has written texts"
    for name, lines in CELLS.items():
        with_resources(tmp_path, *lines)
        record.write_text("", encoding="utf-8")
        target = "results/train/control/seed0/history.jsonl"
        quick = ["--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "1"]
        done = run(*quick, "--forcerun", "train", "--", target, profile=str(tmp_path))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        found[f"train on {name} ({', '.join(lines)})"] = lines_by_rule(record, folder)["train"]
    text = "".join(f"{rule}\n    sbatch {line}\n" for rule, line in found.items())
    if os.environ.get("KVPIPE_GOLDEN") == "write":
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CONFIGS)
def test_dry_run_of_every_shipped_configuration(login, name):
    done = login[1]("-n", "--forceall", "results/report.html", "--configfile", str(ROOT / "config" / name))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rule report:" in done.stdout


def test_the_other_profile_plans_the_same_jobs(login):
    done = login[1]("-n", "--forceall", "results/report.html", profile="slurm-test")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rule report:" in done.stdout


def test_a_cell_on_several_nodes_starts_the_image_on_each(login, tmp_path):
    """The resources of docs/hpc.md, through the profile and the rule; kvpipe/experiment/launch.py has the other cases."""
    with_resources(tmp_path, *CELLS["several nodes"])
    target = "results/train/full/seed0/history.jsonl"
    done = login[1]("-n", "-p", "--forceall", "--", target, profile=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    line = re.search(r"Shell command: (.* train .*)", done.stdout)
    assert line and line[1] == (
        "exec "
        + command(4, 2, "apptainer exec --home $PWD --nv containers/kvpipe-cuda-0123456789ab.sif")
        + " train --made --arm full --seed 0 --out results/train/full/seed0 --checkpoints results/checkpoints/full/seed0"
        " > results/logs/train/full/seed0.log 2>&1"
    )


def test_a_cell_on_several_nodes_that_would_wait_for_ever_is_refused(login):
    resources = ["train:gpu=4", "train:nodes=2"]
    done = login[1]("-n", "--set-resources", *resources, "--forceall", "--", "results/train/full/seed0/history.jsonl")
    assert done.returncode == 1
    assert "in the profile: mpi: srun, tasks: 2, tasks_per_gpu: 0" in done.stdout + done.stderr


SITE = {
    "make": "true",
    "sbatch": 'case "$*" in *--comment*) exec "$STANDINS/sbatch" "$@" ;; *) echo 41 ;; esac',
    # the probe asks for states, Snakemake for all jobs
    "squeue": 'case "$*" in *%T\\|%r*) echo "COMPLETED|None" ;; *) exec "$STANDINS/squeue" ;; esac',
    "sinfo": 'case "$*" in *%R*) echo "standard|up|64|256000|2-00:00:00|gpu:a100:4" ;; *) exec "$STANDINS/sinfo" ;; esac',
    "scontrol": 'case "$*" in *partition*) echo "PartitionName=standard Default=YES" ;; *) exec "$STANDINS/scontrol" ;; esac',
}


def test_readmes_block_runs_as_it_is_printed(login, tmp_path):
    """In one shell, from activation to the grid of cells; no line may fail. Only the waiting times are made shorter."""
    folder, run, record = login
    block = (ROOT / "README.md").read_text(encoding="utf-8").partition("## On a cluster")[2].split("```")[1]
    assert "profiles/slurm" not in block, "the profile that the probe wrote is the one in use"
    checkout = tmp_path / "kvpipe"
    shutil.copytree(folder, checkout, ignore=shutil.ignore_patterns("results", ".snakemake"), symlinks=True)
    shutil.copytree(ROOT / "profiles" / "slurm", checkout / "profiles" / "slurm")
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/activate").write_text(f"PATH=$TOOLS:{Path(sys.executable).parent}:$PATH\n", encoding="utf-8")
    for name, body in SITE.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    write_metadata(tmp_path / "site-packages")
    own = tmp_path / "record"
    own.touch()
    plan = run("-n", "--forceall", "results/report.html")
    made = re.findall(r"^    (?:output|benchmark): (.*)", plan.stdout, re.MULTILINE)
    own.with_suffix(".outputs").write_text("\n".join(", ".join(made).split(", ")) + "\n", encoding="utf-8")
    quick = (
        r"sed -i 's/status-checks: 40/status-checks: 1/; s/latency-wait: 60/latency-wait: 1/' profiles/site/config.yaml"
    )
    # what the stand-in for a job has made is empty
    lines = [
        line.replace("kvpipe status", "find results -name cost.json -delete; kvpipe status")
        for line in block.splitlines()
    ]
    lines = [f"{line}\n{quick}" if "--probe" in line else line for line in lines]
    paths = f"{checkout}:{PLUGIN}:{tmp_path / 'site-packages'}"
    variables = {"TOOLS": str(tmp_path), "STANDINS": str(record.parent), "RECORD": str(own), "PYTHONPATH": paths}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SNAKEMAKE", "KVPIPE", "SLURM"))}
    done = subprocess.run(
        ["bash", "-exc", "\n".join(lines)],
        cwd=checkout,
        env=environment | variables | {"PATH": f"{tmp_path}:{record.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    cell = next(line for line in own.read_text(encoding="utf-8").splitlines() if "--comment rule_train_" in line)
    assert "-p standard" in cell and "--gpus=1" in cell and "--cpus-per-gpu=3" in cell and "--requeue" in cell
    assert "--mem 32000" not in cell, "as much as the doctor expects"
    assert (checkout / "results" / "report.html").is_file()


def test_an_image_that_is_not_there_is_refused_before_any_job(login, tmp_path):
    done = login[1]("-n", "results/report.html", KVPIPE_IMAGE="nowhere.sif")
    assert done.returncode == 1
    entry = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").partition("### The image is not there")[2]
    message = entry.split("```")[1].splitlines()[2]
    assert message.replace("image …", "image nowhere.sif") in done.stdout + done.stderr


def test_every_line_of_the_profiles_says_why():
    for profile in PROFILES:
        lines = (ROOT / "profiles" / profile / "config.yaml").read_text(encoding="utf-8").splitlines()
        for before, line in itertools.pairwise(lines):
            top = re.match(r"[a-z]", line)
            assert not top or before.startswith("#"), f"{profile}: no reason above {line!r}"
            # one comment for both lines of a list
            told = "memory" in before and "time" in before
            assert line != "default-resources:" or told, (
                f"{profile}: above {line!r} stands the reason of something else"
            )


def test_every_rule_that_may_run_into_its_limit_has_more_time_in_the_next_attempt():
    settings = yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text(encoding="utf-8"))
    rules = {
        r: v for r, v in settings["set-resources"].items() if re.search(r"min\(\d+ \* attempt, \d+\)", v["runtime"])
    }
    assert rules.keys() == RULES
