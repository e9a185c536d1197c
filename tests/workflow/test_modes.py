"""The small configurations of .test/: each is the mode that its name says, and runs to its report."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kvpipe.config import load
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.plan import Dag
from kvpipe.experiment.steps import table

ROOT = Path(__file__).parents[2]
MODES = sorted(path.stem for path in (ROOT / ".test").glob("*.yaml"))
OWN_STEPS = {
    "stored": {"teacher_kv", "teacher_kv_shard"},
    "live": set(),
    "pruned": {"teacher_kv"},
    "written": {"teacher_kv", "teacher_text"},
}
"""Steps of a mode, of those that not every mode has."""


def steps(mode: str) -> set[str]:
    """Steps with a job."""
    dag = Dag(load(ROOT / ".test" / f"{mode}.yaml"))
    return {name for name, step in table(dag, Paths(Path("results"))).items() if list(step.jobs())}


def test_every_mode_is_listed_and_run_by_the_workflow():
    assert set(MODES) == set(OWN_STEPS)
    workflow = yaml.safe_load((ROOT / ".github/workflows/main.yml").read_text("utf-8"))
    assert sorted(workflow["jobs"]["modes"]["strategy"]["matrix"]["mode"]) == MODES
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert sorted(re.search(r"\$\(or \$\(MODE\),(.*?)\)", makefile)[1].split()) == MODES
    readme = (ROOT / ".test/README.md").read_text("utf-8")
    assert sorted(re.findall(r"^\| `(\w+)\.yaml`", readme, re.MULTILINE)) == MODES


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_has_the_steps_that_it_is_there_for(mode):
    optional: set[str] = set().union(*OWN_STEPS.values())
    assert steps(mode) & optional == OWN_STEPS[mode]


def test_the_catalogues_file_names_what_the_workflow_has():
    catalogue = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text("utf-8"))["usage"]
    assert catalogue["report"] is True and list(ROOT.glob("workflow/report/*.rst"))
    assert catalogue["software-stack-deployment"] == {"conda": False, "apptainer": True}
    assert "container: IMAGE" in (ROOT / "workflow/Snakefile").read_text("utf-8")
    assert not list(ROOT.glob("workflow/envs/*"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_runs_to_its_report(mode, tmp_path):
    report = tmp_path / "report.html"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SNAKEMAKE", "KVPIPE"))}
    environment |= {"KVPIPE_RESULTS": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = ["-m", "snakemake", "--cores", "1", "--nolock", "--configfile", f".test/{mode}.yaml", "--", str(report)]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "This report is incomplete" not in report.read_text("utf-8")
