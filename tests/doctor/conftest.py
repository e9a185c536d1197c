"""Fixtures of a site and of profiles; the extra for clusters is found here whether it is installed or not."""

import sys
from pathlib import Path

import pytest
from installed import write_metadata
from site_fakes import VERSIONS, Site
from tiny import ALPHA, save_teacher

PROFILE = """
executor: slurm
software-deployment-method: apptainer
default-resources: [mem_mb=8000, runtime=60]
set-resources:
  train: {gpu: 1, mem_mb: 9000, runtime: 100 * attempt}
slurm-status-command: squeue
"""


@pytest.fixture(params=VERSIONS)
def site(tmp_path, monkeypatch, request):
    """A sound cluster, once for each version of Slurm."""
    return Site(tmp_path, monkeypatch, request.param)


@pytest.fixture(scope="session", autouse=True)
def extra(tmp_path_factory):
    """The extra's entry point, whether it is installed or not."""
    folder = tmp_path_factory.mktemp("site-packages")
    write_metadata(folder)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """Write a profile; one rule's resources come from the profile alone."""
    monkeypatch.setattr("kvpipe_cluster.profile._rules", lambda memory: {})

    def make(text: str = PROFILE) -> Path:
        folder = tmp_path / "profile"
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(text)
        return folder

    return make


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with both teachers complete on disk; not to be changed."""
    root = tmp_path_factory.mktemp("saved")
    for name in ("alpha", "beta"):
        save_teacher(root / "teachers" / name, name, ALPHA, 0)
    return root
