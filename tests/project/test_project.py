"""A project of one's own, from an installed wheel: what `kvpipe init` writes is a workflow that runs."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from kvpipe import __version__
from kvpipe.cli import app as cli
from kvpipe.cli.app import one_by_one
from kvpipe.config import load
from kvpipe.experiment.project import CONFIGURATIONS, SHIPPED, copy_recipe, init, shipped_recipes

ROOT = Path(__file__).parents[2]


def run(command: list, folder: Path, **variables: str) -> str:
    """Without this checkout on the path: what is imported is what was installed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SNAKEMAKE", "KVPIPE", "PYTHONPATH"))}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False, env=environment | variables
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# ---------------------------------------------------------------- what is written
@pytest.mark.parametrize("template", CONFIGURATIONS)
def test_a_project_is_the_shipped_experiment(tmp_path, template):
    files = init(tmp_path / "mine", template)
    assert all((tmp_path / "mine" / file).is_file() for file in files)
    ours, theirs = load(tmp_path / "mine/config/config.yaml"), load(ROOT / "config" / CONFIGURATIONS[template])
    assert ours == theirs
    readme = (tmp_path / "mine/README.md").read_text()
    assert readme.startswith("# mine\n") and f"--template {template}" in readme and __version__ in readme
    named = re.findall(r"^\| `([\w./-]+)`", readme, re.MULTILINE)
    assert len(named) > 4 and all((tmp_path / "mine" / name).exists() for name in named if name != "results/")
    assert f"config/{CONFIGURATIONS[template]}" not in (tmp_path / "mine/config/config.yaml").read_text() or (
        template == "embedded"
    )


def test_the_readmes_arm_fits_each_configuration(tmp_path):
    for template in CONFIGURATIONS:
        init(tmp_path / template, template)
        (snippet,) = re.findall(r"```yaml\n(.*?)```", (tmp_path / template / "README.md").read_text(), re.DOTALL)
        (tmp_path / "over.yaml").write_text(snippet)
        config = load([tmp_path / template / "config/config.yaml", tmp_path / "over.yaml"])
        assert config.arm("keys-only").loss["keys"].weight == 3


def test_the_profile_of_a_cluster_names_no_image(tmp_path):
    init(tmp_path, "hpc")
    profile = yaml.safe_load((tmp_path / "profiles/slurm/config.yaml").read_text())
    shipped = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())
    assert set(shipped) - set(profile) == {"software-deployment-method", "apptainer-args"}


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"README.md: there already, and nothing was written"):
        init(tmp_path, "embedded")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


# ---------------------------------------------------------------- recipes, overlays
def test_recipes_are_listed_and_copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = CliRunner().invoke(cli.app, ["recipes", "ls"]).output.splitlines()
    assert [line.split()[0] for line in listed] == sorted(p.stem for p in (ROOT / "config/recipes").glob("*.yaml"))
    assert all(text.startswith("Over config/") for text in shipped_recipes().values())
    done = CliRunner().invoke(cli.app, ["recipes", "cp", "gpu24"])
    assert done.exit_code == 0, repr(done.exception)
    assert Path("config/recipes/gpu24.yaml").read_text() == (ROOT / "config/recipes/gpu24.yaml").read_text()
    with pytest.raises(FileExistsError, match=r"gpu24.yaml: there already"):
        copy_recipe("gpu24", Path("config/recipes"))
    with pytest.raises(ValueError, match=r"no recipe 'gpu25'; did you mean 'gpu24'\?"):
        copy_recipe("gpu25", tmp_path)


def test_an_overlay_alone_says_what_it_is():
    with pytest.raises(ValueError, match=r"gpu24.yaml: this is an overlay.*give the experiment first"):
        load(ROOT / "config/recipes/gpu24.yaml")
    assert load([ROOT / "config/hpc.yaml", ROOT / "config/recipes/gpu24.yaml"]).train.accumulate == 16


def test_configurations_are_named_as_in_snakemake():
    words = ["status", "--configfile", "a.yaml", "b.yaml", "--results", "c.yaml"]
    assert one_by_one(words) == ["status", "--config", "a.yaml", "--config", "b.yaml", "--results", "c.yaml"]
    assert one_by_one(["init", "--config", "a.yaml", "folder"]) == ["init", "--config", "a.yaml", "folder"]


def test_the_version():
    assert CliRunner().invoke(cli.app, ["--version"]).output == f"kvpipe {__version__}\n"


# ---------------------------------------------------------------- the workflow as a module
def reduced(project: Path) -> Path:
    """Two arms of two seeds, three steps."""
    path = project / "config/config.yaml"
    values = yaml.safe_load(path.read_text())
    for source in values["data"]["sources"]:
        source |= {"train": 40, "validation": 10, "test": 8}
    values |= {"seeds": [0, 1], "arms": {name: values["arms"][name] for name in ("control", "exp1")}, "stats": {}}
    values["audit"] = {"allow": ["tokens"]}  # in three steps two seeds read texts of other lengths
    path.write_text(yaml.safe_dump(values | {"train": values["train"] | {"steps": 3}}))
    return project


def test_a_projects_snakefile_uses_the_workflow_and_has_rules_of_its_own(tmp_path):
    init(tmp_path / "mine", "embedded")
    project = reduced(tmp_path / "mine")
    with (project / "workflow/Snakefile").open("a") as snakefile:
        snakefile.write(
            '\n\nrule mine:\n    input: "results/arms/exp1.csv"\n    output: "mine.csv"\n    shell: "cp {input} {output}"\n'
        )
    planned = run(
        [sys.executable, "-m", "snakemake", "-n", "mine.csv", "results/report.html"], project, PYTHONPATH=str(ROOT)
    )
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", planned, re.MULTILINE))
    assert jobs["train"] == "4" and {"mine", "report"} <= jobs.keys()


# ---------------------------------------------------------------- the wheel
@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """`bin/` of an environment that has the wheel, and everything else of this one by a .pth file."""
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", ROOT], folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], folder)
    (site,) = (folder / "venv/lib").glob("python3*/site-packages")
    # that environment lists the cluster's doctor, whose own .pth file counts there alone
    (site / "here.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT / 'plugins/cluster'}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "venv/bin/python"]
    pip += ["install", "--no-index", "--constraint", ROOT / "requirements.lock"]
    # without --no-deps: every requirement must be met by what the lock names
    run([*pip, "--dry-run", "--no-build-isolation", wheel], folder)
    run([*pip, "--no-deps", "--ignore-installed", wheel], folder)
    # scripts of Snakemake belong to the environment that has them
    (folder / "venv/bin/snakemake").write_text(f"#!{folder}/venv/bin/python\nfrom snakemake.cli import main\nmain()\n")
    (folder / "venv/bin/snakemake").chmod(0o755)
    return folder / "venv/bin"


@pytest.mark.slow
def test_the_wheel_carries_what_a_project_needs(installed):
    code = "from kvpipe.experiment import project; print(project.SHIPPED, project.__file__)"
    shipped, module = run([installed / "python", "-c", code], installed).split()
    assert Path(module).is_relative_to(installed.parent), "the installed package, not this checkout"
    expected = {p.relative_to(SHIPPED) for name in ("workflow", "config", "profiles", "project") for p in files(name)}
    assert {
        p.relative_to(shipped)
        for name in ("workflow", "config", "profiles", "project")
        for p in files(name, Path(shipped))
    } == (expected)
    assert run([installed / "kvpipe", "--version"], installed) == f"kvpipe {__version__}\n"


def files(name: str, under: Path = SHIPPED) -> list[Path]:
    return [path for path in (under / name).rglob("*") if path.is_file()]


@pytest.mark.slow
def test_a_project_runs_three_steps_from_the_wheel(installed, tmp_path):
    """One cell by `kvpipe train`; then the report by Snakemake, which finds `python` in no activated environment."""
    run([installed / "kvpipe", "init", "mine"], tmp_path)
    project = reduced(tmp_path / "mine")
    said = run([installed / "kvpipe", "train", "--arm", "exp1"], project)
    assert "step 3/3  validation loss" in said
    run([installed / "snakemake", "--cores", "1"], project, PATH="/usr/bin:/bin")
    assert (project / "results/report.html").read_text().rstrip().endswith("</html>")
    assert (project / "results/doctor.json").is_file(), "the doctor ran before the first job"
