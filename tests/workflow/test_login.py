"""A login node has the packages of containers/login.txt and no others: the DAG is planned with these, and the doctor asked."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
CALLS = {
    "plan": ("snakemake", "--cores", "1", "-n", "results/report.html"),
    "doctor": ("kvpipe", "doctor"),
    "status": ("kvpipe", "status"),
}
WITHOUT = """
import runpy, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {missing} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
sys.argv = {call}
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def with_what_they_need(names: list[str]) -> set[str]:
    """The distributions, and those that they require, as installed here."""
    found: set[str] = set()
    while names:
        name = canonicalize_name(names.pop())
        if name in found:
            continue
        found.add(name)
        try:
            needed = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:
            continue
        names += [need.name for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


@pytest.mark.parametrize("what", CALLS)
def test_nothing_else_is_imported(what, tmp_path):
    lines = (ROOT / "containers" / "login.txt").read_text(encoding="utf-8").splitlines()
    there = with_what_they_need([line for line in lines if not line.startswith("#")]) | {"kvpipe", "kvpipe-cluster"}
    owners = {module: {canonicalize_name(name) for name in names} for module, names in packages_distributions().items()}
    missing = {module for module, names in owners.items() if not names & there}
    assert {"torch", "transformers", "scipy"} <= missing
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(missing=missing, call=list(CALLS[what]))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"KVPIPE_SERVER": "off", "KVPIPE_RESULTS": str(tmp_path)},
    )
    said = done.stdout + done.stderr
    assert "No module named" not in said and "Traceback" not in said, said[-3000:]
