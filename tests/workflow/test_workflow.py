"""What Snakemake would run: on a copy of the checkout, by dry runs, from clean and after a faked complete run."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

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
        env=environment | {"PYTHONDONTWRITEBYTECODE": "1"} | variables,
    )


def snakemake(folder: Path, *arguments: str) -> str:
    done = python(folder, "-m", "snakemake", "--cores", "1", *arguments)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout + done.stderr


BLOCK = re.compile(r"^(?:local)?rule (\w+):\n((?:    .*\n)*)", re.MULTILINE)


def planned(folder: Path, *arguments: str) -> list[str]:
    """Jobs of a dry run: the rule, and its wildcards where it has some, as `train arm=exp3 seed=0`."""
    jobs = []
    for rule, body in BLOCK.findall(snakemake(folder, "-n", *arguments)):
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
    once = ("doctor", "data", "audit", "stats", "report", "untrained")
    assert {rule: count[rule] for rule in once} == dict.fromkeys(once, 1)
    # exp5 and exp6, full and null-shuffled share a fit; both teachers are mapped, for full
    assert (count["fit"], count["layer_map"], count["model"], count["teacher_quality"]) == (5, 2, 3, 2)
    assert [j for j in jobs if j.startswith("teacher_kv")] == [
        f"teacher_kv reading=student teacher={teacher}" for teacher in ("code", "math")
    ]


def test_one_cell_needs_just_its_own(copy):
    assert planned(copy, "results/evaluate/exp3/seed1.parquet") == sorted(
        [
            "doctor", "data", "evaluate arm=exp3 seed=1", "train arm=exp3 seed=1", "layer_map teacher=math",
            "model model=math", "model model=student", "teacher_kv reading=student teacher=math",
            *(j for j in planned(copy, "results/evaluate/exp3/seed0.parquet") if j.startswith("fit ")),
        ]
    )  # fmt: skip
    control = planned(copy, "results/train/control/seed0/history.jsonl")
    assert control == ["data", "doctor", "model model=student", "train arm=control seed=0"]


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
    other |= {"seeds": [7], "arms": {"control": other["arms"]["control"]}}
    (copy / "other.yaml").write_text(yaml.safe_dump(other))
    jobs = planned(copy, "results/stats/arms.csv", "--configfile", "other.yaml")
    assert [j for j in jobs if j.startswith("train ")] == ["train arm=control seed=7"]
    (copy / "other.yaml").unlink()


def test_lint_has_no_complaint(copy):
    assert "Congratulations" in snakemake(copy, "--lint")


SETTINGS = """
import sys
from snakemake.cli import parse_args
args = parse_args(sys.argv[1:])[1]
print(args.cores, args.scheduler, args.printshellcmds, args.show_failed_logs)
"""


@pytest.mark.parametrize("form", ["none", "two words", "one word", "variable"])
def test_a_named_profile_is_not_overridden_by_the_default_one(copy, form):
    profile = copy / "site"
    profile.mkdir(exist_ok=True)
    (profile / "config.yaml").write_text("cores: 1\nprintshellcmds: true\n")
    (copy / "settings.py").write_text(SETTINGS)
    options = {"none": [], "two words": ["--profile", "site"], "one word": ["--profile=site"]}.get(form, [])
    variables = {"SNAKEMAKE_PROFILE": "site"} if form == "variable" else {}
    done = python(copy, "settings.py", *options, "-n", "results/report.html", **variables)
    assert done.returncode == 0, done.stderr
    cores, scheduler, shell, failed = done.stdout.split()
    shutil.rmtree(profile)
    if form == "none":
        assert (int(cores) >= 1, scheduler, shell, failed) == (True, "greedy", "False", "True")
    else:
        assert (cores, shell, failed) == ("1", "True", "False")
        assert scheduler != "greedy"


# ---------------------------------------------------------------- after a complete run
@pytest.fixture(scope="module")
def complete(copy):
    """Every output there, empty, with what Snakemake remembers of a run."""
    summary = python(copy, "-m", "snakemake", "--cores", "1", "--summary", "results/report.html")
    assert summary.returncode == 0, summary.stderr
    for line in summary.stdout.splitlines()[1:]:
        path = copy / line.split("\t")[0]
        if path.name == "model":
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    snakemake(copy, "--touch", "--forceall", "results/report.html")
    return copy


def after(complete: Path, file: str, change) -> list[str]:
    with edited(complete / file, change):
        return planned(complete, "results/report.html")


END = ["audit", "report", "stats"]


def test_a_complete_run_has_nothing_to_do(complete):
    assert "Nothing to be done" in snakemake(complete, "-n", "results/report.html")


def test_an_arms_layers_reach_its_cells_and_its_fit(complete):
    jobs = after(complete, "config/config.yaml", setting(lambda v: v["arms"]["exp3"]["set"]["layer"].update(k=3)))
    assert [j for j in jobs if not j.startswith("fit ")] == sorted(
        ["arm arm=exp3", *END, *cells("evaluate", ["exp3"]), *cells("train", ["exp3"])]
    )
    assert len([j for j in jobs if j.startswith("fit ")]) == 1


def test_an_arms_loss_reaches_its_cells_only(complete):
    jobs = after(
        complete, "config/config.yaml", setting(lambda v: v["arms"]["exp2"]["set"].update({"loss.lambda_k": 0.5}))
    )
    assert jobs == sorted(["arm arm=exp2", *END, *cells("evaluate", ["exp2"]), *cells("train", ["exp2"])])


@pytest.mark.slow
def test_a_new_arm_runs_its_own_cells(complete):
    new = {"base": "exp1", "set": {"loss.lambda_k": 0.0}}
    jobs = after(complete, "config/config.yaml", setting(lambda v: v["arms"].update(mine=new)))
    assert jobs == sorted(["arm arm=mine", *END, *cells("evaluate", ["mine"]), *cells("train", ["mine"])])


def test_a_new_seed_runs_the_new_cells_only(complete):
    jobs = after(complete, "config/config.yaml", setting(lambda v: v["seeds"].append(5)))
    tables = [f"arm arm={arm}" for arm in ARMS]
    assert jobs == sorted([*tables, *END, *cells("evaluate", seeds=[5]), *cells("train", seeds=[5])])


def test_a_cell_removed_with_the_report_runs_again_alone(complete, tmp_path):
    removed = [complete / "results/train/exp3/seed0", complete / "results/report.html"]
    for path in removed:
        shutil.move(path, tmp_path / path.name)
    try:
        jobs = planned(complete, "results/report.html")
    finally:
        for path in removed:
            shutil.move(tmp_path / path.name, path)
    assert jobs == sorted(["arm arm=exp3", *END, *cells("evaluate", ["exp3"], [0]), *cells("train", ["exp3"], [0])])


def test_code_of_the_evaluation_retrains_nothing(complete):
    jobs = after(complete, "kvpipe/evaluate.py", lambda text: text + "\n\nCHANGED = 1\n")
    assert {j.split()[0] for j in jobs} == {"evaluate", "untrained", "teacher_quality", "arm", *END}
    assert len([j for j in jobs if j.startswith("evaluate ")]) == len(cells("evaluate"))


@pytest.mark.slow
def test_code_of_the_training_leaves_what_is_before_it(complete):
    jobs = after(complete, "kvpipe/train.py", lambda text: text + "\n\nCHANGED = 1\n")
    assert {j.split()[0] for j in jobs} == {"train", "evaluate", "arm", *END}


def test_words_in_the_code_run_nothing(complete):
    def words(text: str) -> str:
        return text.replace('"""Train one cell:', '"""Train a single cell:') + "\n# a last word\n"

    assert after(complete, "kvpipe/train.py", words) == []


# ---------------------------------------------------------------- where a checkout may lie
def test_a_rule_runs_below_a_path_with_a_space_and_results_as_a_link(copy, tmp_path):
    """Without an image. docs/troubleshooting.md says so of the path, and the doctor of the link, for a full disk."""
    checkout, scratch = tmp_path / "a b é" / "kvpipe", tmp_path / "scratch ü"
    checkout.mkdir(parents=True)
    (scratch / "results").mkdir(parents=True)
    for name in ("kvpipe", "workflow", "config"):
        shutil.copytree(copy / name, checkout / name)
    (checkout / "results").symlink_to(scratch / "results")
    assert "rule report:" in snakemake(checkout, "-n", "results/report.html")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = python(checkout, "-m", "snakemake", "--cores", "1", "results/data/train.parquet", PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (scratch / "results" / "data" / "train.parquet").stat().st_size > 1000


@pytest.mark.parametrize("file", ["kvpipe/report/wording.py", "kvpipe/report/template.html"])
def test_text_of_the_report_renders_the_report(complete, file):
    addition = "\n<!-- more -->\n" if file.endswith("html") else "\n\nCHANGED = 'more'\n"
    assert after(complete, file, lambda text: text + addition) == ["report"]


@pytest.mark.slow
def test_statistics_run_again_without_cells(complete):
    jobs = after(complete, "config/config.yaml", setting(lambda v: v["stats"].update(resamples=17)))
    assert jobs == ["report", "stats"]


@pytest.mark.slow
def test_settings_of_the_machine_run_nothing(complete):
    jobs = after(complete, "config/config.yaml", setting(lambda v: v["train"].update(checkpoint_every=3, device="cpu")))
    assert jobs == []


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
