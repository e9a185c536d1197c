"""What Snakemake would run: on a copy of the checkout, by dry runs, from clean and after a faked complete run."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SEEDS = (0, 1)
ARMS = ("control", "exp1", "exp2", "exp3", "exp5", "exp6", "full", "null-shuffled")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The files that git knows or would add, with fewer arms and seeds; `results/` is empty."""
    folder = tmp_path_factory.mktemp("checkout")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--"]
    parts = ["kvpipe", "workflow", "config"]
    names = subprocess.run([*listing, *parts], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    path = folder / "config" / "config.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings |= {"seeds": list(SEEDS), "arms": {name: settings["arms"][name] for name in ARMS}}
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return folder


def python(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SNAKEMAKE", "KVPIPE", "PYTHONPATH"))}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"PYTHONDONTWRITEBYTECODE": "1", "KVPIPE_SERVER": "off"} | variables,
    )


def snakemake(folder: Path, *arguments: str, **variables: str) -> str:
    done = python(folder, "-m", "snakemake", "--cores", "1", *arguments, **variables)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout + done.stderr


BLOCK = re.compile(r"^(?:local)?rule (\w+):\n((?:    .*\n)*)", re.MULTILINE)


def planned(folder: Path, *arguments: str) -> list[str]:
    """Jobs of a dry run."""
    return jobs_of(snakemake(folder, "-n", *arguments))


def jobs_of(said: str) -> list[str]:
    """Jobs that a dry run lists: the rule, and its wildcards where it has some, as `train arm=exp3 seed=0`."""
    jobs = []
    for rule, body in BLOCK.findall(said):
        wildcards = re.search(r"wildcards: (.*)", body)
        jobs.append(" ".join([rule, *sorted(wildcards[1].split(", "))]) if wildcards else rule)
    return sorted(jobs)


def cells(rule: str, arms=ARMS, seeds=SEEDS) -> list[str]:
    return [f"{rule} arm={arm} seed={seed}" for arm in arms for seed in seeds]


@contextmanager
def edited(path: Path, change):
    """A file with another content, put back afterwards."""
    before = path.read_text(encoding="utf-8")
    after = change(before)
    assert after != before
    path.write_text(after, encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(before, encoding="utf-8")


def setting(change):
    """An edit of a YAML file by a function of its dictionary."""

    def edit(text: str) -> str:
        values = yaml.safe_load(text)
        change(values)
        return yaml.safe_dump(values, sort_keys=False)

    return edit


# ---------------------------------------------------------------- from clean
def test_the_whole_dag_has_one_job_per_cell(copy):
    jobs = planned(copy, "results/report.html")
    assert [j for j in jobs if j.startswith("train ")] == sorted(cells("train"))
    assert [j for j in jobs if j.startswith("evaluate ")] == sorted(cells("evaluate"))
    assert [j for j in jobs if j.startswith("arm ")] == sorted(f"arm arm={arm}" for arm in ARMS)
    count = Counter(job.split()[0] for job in jobs)
    once = ("data", "audit", "stats", "report", "untrained")
    assert {rule: count[rule] for rule in once} == dict.fromkeys(once, 1)
    # exp5 and exp6, full and null-shuffled share a fit; both teachers are mapped, for full
    assert (count["fit"], count["layer_map"], count["model"], count["teacher_quality"]) == (5, 2, 3, 2)
    assert [j for j in jobs if j.startswith("teacher_kv")] == [
        f"teacher_kv reading=student teacher={teacher}" for teacher in ("code", "math")
    ]


def test_no_wildcard_is_left_in_a_command(copy):
    """Snakemake fills in texts among the params, and leaves a `Path` as it is: all cells would share a folder."""
    said = snakemake(copy, "-n", "-p", "results/report.html")
    commands = re.findall(r"^Shell command: (.*)$", said, re.MULTILINE)
    assert len(commands) > 20 and not [command for command in commands if "{" in command]
    checkpoints = [found[1] for command in commands if (found := re.search(r"--checkpoints (\S+)", command))]
    assert len(set(checkpoints)) == len(ARMS) * len(SEEDS)
    # by the sizes of the models: a student of 0.2 million parameters takes what Python and torch take
    asked = [
        int(mb) for rule, block in BLOCK.findall(said) if rule == "train" for mb in re.findall(r"mem_mb=(\d+)", block)
    ]
    assert len(asked) == len(checkpoints) and set(asked) == {1000}


def test_one_cell_needs_just_its_own(copy):
    jobs = planned(copy, "results/evaluate/exp3/seed1.parquet")
    (fit,) = (job for job in jobs if job.startswith("fit "))
    assert jobs == sorted(
        [
            "data", *(f"encode model={model} reading=student" for model in ("math", "student")),
            "evaluate arm=exp3 seed=1", "train arm=exp3 seed=1", "layer_map teacher=math",
            "model model=math", "model model=student", "teacher_kv reading=student teacher=math", fit,
        ]
    )  # fmt: skip
    control = planned(copy, "results/train/control/seed0/history.jsonl")
    encode = "encode model=student reading=student"
    assert control == ["data", encode, "model model=student", "train arm=control seed=0"]


def test_one_arm_needs_its_cells(copy):
    jobs = planned(copy, "results/arms/exp1.csv")
    assert [j for j in jobs if j.split()[0] in ("train", "evaluate")] == [
        *cells("evaluate", ["exp1"]),
        *cells("train", ["exp1"]),
    ]
    assert "arm arm=exp1" in jobs
    assert not {"report", "stats", "layer_map teacher=math"} & set(jobs)


def test_a_wrong_configuration_is_one_message_with_the_keys_path(copy):
    with edited(copy / "config" / "config.yaml", setting(lambda v: v["train"].update(stepps=3))):
        done = python(copy, "-m", "snakemake", "--cores", "1", "-n", "results/report.html")
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert "train.stepps: unknown key; did you mean 'steps'?" in said
    assert "Traceback" not in said
    assert len(said.splitlines()) < 10, said


@pytest.mark.slow
def test_a_file_given_by_name_takes_the_place_of_the_shipped_one(copy):
    other = yaml.safe_load((copy / "config" / "config.yaml").read_text())
    other |= {"seeds": [7], "arms": {"control": other["arms"]["control"]}, "stats": {}}
    (copy / "other.yaml").write_text(yaml.safe_dump(other))
    jobs = planned(copy, "results/stats/arms.csv", "--configfile", "other.yaml")
    assert [j for j in jobs if j.startswith("train ")] == ["train arm=control seed=7"]
    (copy / "other.yaml").unlink()


SETTINGS = """
import os, sys
from snakemake.cli import parse_args
for form in ("", "--profile site", "--profile=site", "variable"):
    if form == "variable":
        os.environ["SNAKEMAKE_PROFILE"] = "site"
    sys.argv[1:] = [*(form.split() if form != "variable" else ()), "-n", "results/report.html"]
    args = parse_args(sys.argv[1:])[1]
    print(args.cores, args.scheduler, args.printshellcmds, args.show_failed_logs)
"""


def test_a_named_profile_is_not_overridden_by_the_default_one(copy):
    profile = copy / "site"
    profile.mkdir()
    (profile / "config.yaml").write_text("cores: 1\nprintshellcmds: true\n")
    done = python(copy, "-c", SETTINGS)
    shutil.rmtree(profile)
    assert done.returncode == 0, done.stderr
    default, *named = map(str.split, done.stdout.splitlines())
    assert int(default[0]) >= 1 and default[1:] == ["greedy", "False", "True"]
    assert len(named) == 3
    for cores, scheduler, shell, failed in named:
        assert (cores, shell, failed) == ("1", "True", "False")
        assert scheduler != "greedy"


# ---------------------------------------------------------------- after a complete run
IN_IMAGE = ("--software-deployment-method", "apptainer")
"""As on a cluster, so that the image is among what may change; apptainer itself is a stand-in."""


@pytest.fixture(scope="module")
def complete(copy):
    """Every output there, empty, with what Snakemake remembers of a run; gives the plan of the next one."""
    tools = copy / "tools"
    tools.mkdir()
    (tools / "apptainer").write_text("#!/bin/sh\necho apptainer version 1.4.5\n", encoding="utf-8")
    (tools / "apptainer").chmod(0o755)
    (copy / "containers").mkdir()
    for name in ("kvpipe.sif", "other.sif"):
        (copy / "containers" / name).touch()
    summary = python(copy, "-m", "snakemake", "--cores", "1", "--summary", "results/report.html")
    assert summary.returncode == 0, summary.stderr
    for line in summary.stdout.splitlines()[1:]:
        path = copy / line.split("\t")[0]
        if path.name == "model":
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    path = f"{tools}:{os.environ['PATH']}"

    def run(*arguments: str, **variables: str) -> str:
        return snakemake(copy, *IN_IMAGE, *arguments, "--", "results/report.html", PATH=path, **variables)

    run("--touch", "--forceall")
    run.folder, run.plans = copy, {}
    run.all = set(jobs_of(run("-n", "--forceall")))
    assert len(run.all) > 50
    return run


def after(complete, *names: str) -> set[str]:
    """The plan once the named changes are made, each plan computed once."""
    if names not in complete.plans:
        variables: dict[str, str] = {}
        with ExitStack() as stack:
            for name in names:
                for file, change in CHANGES[name].edits.items():
                    if file == "image":
                        variables["KVPIPE_IMAGE"] = change
                    else:
                        stack.enter_context(edited(complete.folder / file, change))
            complete.plans[names] = set(jobs_of(complete("-n", **variables)))
    return complete.plans[names]


END = {"audit", "report", "stats"}
TRAINED = {"train", "evaluate", "lm_eval", "arm", *END}
SCORED = {"evaluate", "untrained", "teacher_quality", "arm", *END}


class Change(NamedTuple):
    """A change of files, or of the image; and the jobs that it reaches, as rules or as single jobs without their fits."""

    edits: dict[str, Any]
    reaches: set[str]
    quick: bool = False

    def expected(self, jobs: set[str]) -> set[str]:
        return {job for job in jobs if {job, job.split()[0], " ".join(job.split()[:2])} & self.reaches}


def yaml_change(change) -> dict[str, Any]:
    return {"config/config.yaml": setting(change)}


def code_change(file: str, text: str = "\n\nCHANGED = 1\n") -> dict[str, Any]:
    return {file: lambda before: before + text}


def arm_jobs(*arms: str) -> set[str]:
    return {f"{rule} arm={arm}" for arm in arms for rule in ("arm", "train", "evaluate")} | END


def said_otherwise(text: str) -> str:
    return text.replace('"""Train one cell:', '"""Train a single cell:') + "\n# a last word\n"


BELOW_DATA = {"encode", "layer_map", "teacher_kv", "fit", "untrained", "teacher_quality"} | TRAINED
LORA = {"rank": 2, "alpha": 4, "target_modules": ["q_proj"]}
LAYERS = {"kind": "cka", "k": 3}
CHANGES = {
    # what the doctor alone looks at, and what says nothing of the results
    "a model that no arm uses": Change(
        yaml_change(lambda v: v["models"].update(spare={"source": "random", "like": "math", "seed": 9})), set()
    ),
    "code of the doctor": Change(code_change("kvpipe/doctor/__init__.py"), set()),
    "words in the code": Change({"kvpipe/train/trainer.py": said_otherwise}, set(), True),
    "settings of the machine": Change(
        yaml_change(lambda v: v["train"].update(checkpoint_every=3, device="cpu", threads=1)), set()
    ),
    # what the doctor looks at too
    "LoRA": Change(yaml_change(lambda v: v["train"].update(lora=LORA)), TRAINED),
    "code of hub.py, the doctor's too": Change(code_change("kvpipe/models/hub.py"), {"model"} | BELOW_DATA),
    "code of sizes.py, the doctor's too": Change(code_change("kvpipe/experiment/sizes.py"), {"model"} | BELOW_DATA),
    "the image": Change({"image": "containers/other.sif"}, {"data", "model"} | BELOW_DATA, True),
    # arms and seeds
    "an arm's loss": Change(
        yaml_change(lambda v: v["arms"]["exp2"]["set"].update({"loss.keys.weight": 0.5})), arm_jobs("exp2"), True
    ),
    "an arm's layers": Change(yaml_change(lambda v: v["arms"]["exp3"]["set"].update(layer=LAYERS)), arm_jobs("exp3")),
    "a new arm": Change(
        yaml_change(lambda v: v["arms"].update(mine={"base": "exp1", "set": {"loss.keys.weight": 0.1}})),
        arm_jobs("mine"),
    ),
    "a new seed": Change(
        yaml_change(lambda v: v["seeds"].append(5)),
        {"arm", *END, *(f"{rule} arm={arm} seed=5" for rule in ("train", "evaluate") for arm in ARMS)},
        True,
    ),
    # steps for all
    "the learning rate": Change(
        yaml_change(lambda v: v["train"].update(learning_rate=0.004)),
        # the layer map's reference student is trained
        {"layer_map"} | TRAINED,
    ),
    "the steps": Change(yaml_change(lambda v: v["train"].update(steps=801)), TRAINED),
    "the data": Change(yaml_change(lambda v: v["data"]["sources"][0].update(difficulty=1)), {"data"} | BELOW_DATA),
    "n-grams": Change(yaml_change(lambda v: v["data"].update(ngram=9)), {"audit", "report"}),
    "the template": Change(
        yaml_change(lambda v: v["data"].update(template={"answer": "{answer} ."})),
        BELOW_DATA,
    ),
    "the store's type": Change(
        yaml_change(lambda v: v["store"].update(dtype="int8")),
        {"teacher_kv", "fit", *(j for arm in ARMS if arm != "control" for j in arm_jobs(arm))},
    ),
    "generation": Change(yaml_change(lambda v: v["evaluate"].update(max_new_tokens=41)), SCORED),
    "code of the evaluation": Change(code_change("kvpipe/evaluate/score.py"), SCORED),
    "code of the training": Change(code_change("kvpipe/train/trainer.py"), TRAINED),
    # statistics and report
    "resamples": Change(yaml_change(lambda v: v["stats"].update(resamples=17)), {"stats", "report"}),
    "the title": Change(yaml_change(lambda v: v.update(title="other")), {"report"}),
    "code of the report": Change(code_change("kvpipe/report/wording.py"), {"report"}, True),
    "the report's page": Change(code_change("kvpipe/report/template.html", "\n<!-- more -->\n"), {"report"}),
}
# each pair once; in the quick ones something is changed that is behind another change in the order of the jobs
PAIRS = [*combinations(CHANGES, 2)]
QUICK = {
    ("a model that no arm uses", "the image"),
    ("code of hub.py, the doctor's too", "an arm's loss"),
}
assert set(PAIRS) >= QUICK


def test_a_complete_run_has_nothing_to_do(complete):
    assert "Nothing to be done" in complete("-n")


@pytest.mark.parametrize(
    "name", [n if c.quick else pytest.param(n, marks=pytest.mark.slow) for n, c in CHANGES.items()]
)
def test_a_change_reaches_its_jobs_and_no_other(complete, name):
    found, change = after(complete, name), CHANGES[name]
    if name in ("a new seed", "a new arm", "an arm's layers"):  # jobs that were not there before
        rest = {job for job in found if not job.startswith("fit ")}
        expected = change.expected(complete.all | found) - {j for j in found if j.startswith("fit ")}
        assert rest == expected
        assert len(found) - len(rest) == (name == "an arm's layers")
        return
    expected = change.expected(complete.all)
    if name == "the learning rate":  # fits of arms that choose layers by similarity
        measured = {job for job in found if job.startswith("fit ")}
        assert 0 < len(measured) < len([job for job in complete.all if job.startswith("fit ")])
        expected |= measured
    assert found == expected


@pytest.mark.parametrize(
    "pair", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in PAIRS], ids=" and ".join
)
def test_two_changes_reach_what_each_of_them_reaches(complete, pair):
    """Snakemake does not look at jobs below one that runs again: they must all follow from it."""
    one, other = (after(complete, name) for name in pair)
    assert after(complete, *pair) >= one | other


def test_a_cell_removed_with_the_report_runs_again_alone(complete, tmp_path):
    removed = [complete.folder / "results/train/exp3/seed0", complete.folder / "results/report.html"]
    for path in removed:
        shutil.move(path, tmp_path / path.name)
    try:
        jobs = jobs_of(complete("-n"))
    finally:
        for path in removed:
            shutil.move(tmp_path / path.name, path)
    assert jobs == sorted(["arm arm=exp3", *END, *cells("evaluate", ["exp3"], [0]), *cells("train", ["exp3"], [0])])


# ---------------------------------------------------------------- the doctor, before the first job; where a checkout may lie
def test_what_would_fail_is_said_before_anything_starts_and_then_it_runs(copy, tmp_path):
    """Below a path with a space, `results` a link, without an image: docs/troubleshooting.md says so of the path, and
    the doctor of the link, for a full disk."""
    checkout, scratch = tmp_path / "a b é" / "kvpipe", tmp_path / "scratch ü"
    checkout.mkdir(parents=True)
    (scratch / "results").mkdir(parents=True)
    for name in ("kvpipe", "workflow", "config"):
        shutil.copytree(copy / name, checkout / name)
    results = checkout / "results"
    results.symlink_to(scratch / "results")
    run = ("-m", "snakemake", "--cores", "1", "results/data/train.parquet")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with edited(checkout / "config/config.yaml", setting(lambda v: v["models"]["math"].update(path="nowhere"))):
        refused = python(checkout, *run, PATH=path)
        assert refused.returncode == 1 and "Traceback" not in refused.stderr
        assert "nowhere: config.json is missing" in refused.stderr and "nothing was started" in refused.stderr
        assert not (results / "data").exists() and not list(results.glob("logs/data*"))
        assert any(f["status"] == "would fail" for f in json.loads((results / "doctor.json").read_text())["findings"])
        assert "rule report:" in snakemake(checkout, "-n", "results/report.html"), "a dry run starts nothing anyway"
    done = python(checkout, *run, PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (scratch / "results" / "data" / "train.parquet").stat().st_size > 1000
    assert not any(f["status"] == "would fail" for f in json.loads((results / "doctor.json").read_text())["findings"])


def test_another_results_folder_needs_no_link(copy, complete):
    """Every file of the plan is below the folder that KVPIPE_RESULTS names, and nothing is written elsewhere."""
    before = {path.name for path in copy.iterdir()}
    said = snakemake(copy, "-n", "elsewhere/report.html", KVPIPE_RESULTS="elsewhere")
    shutil.rmtree(copy / "elsewhere")
    assert set(jobs_of(said)) == complete.all
    files = re.findall(r"^    (?:input|output|log|benchmark): (.*)$", said, re.MULTILINE)
    assert files and all("results/" not in line for line in files)
    assert {path.name for path in copy.iterdir()} - before <= {".snakemake", "results"}


@pytest.mark.slow
def test_the_cluster_configuration_plans_offline(copy):
    """No network, no lock and no model yet: all 24 cells are planned; with a recipe over it too."""
    base = ["results/report.html", "--configfile", "config/hpc.yaml"]
    jobs = planned(copy, *base)
    count = Counter(job.split()[0] for job in jobs)
    assert (count["train"], count["evaluate"], count["model"], count["teacher_kv_shard"]) == (24, 24, 3, 128)
    five = Counter(job.split()[0] for job in planned(copy, *base, "config/recipes/five-teachers.yaml"))
    assert (five["train"], five["model"], five["teacher_kv_shard"]) == (24, 6, 320)


@pytest.mark.slow
def test_a_lock_beside_the_configuration_is_part_of_it(copy):
    lock = copy / "config" / "hpc.lock.yaml"
    entry = {"commit": "no commit", "files": {"config.json": {"size": 2, "digest": "git:00"}}}
    lock.write_text(yaml.safe_dump({"lock": {"Qwen/Qwen2-7B-Instruct@main": entry}}))
    try:
        done = python(copy, "-m", "snakemake", "--cores", "1", "-n", "--configfile", "config/hpc.yaml")
    finally:
        lock.unlink()
    assert done.returncode == 1 and "lock.Qwen/Qwen2-7B-Instruct@main.commit" in done.stdout + done.stderr
