"""A cluster made of fakes: sbatch, squeue, sinfo, scontrol, sacct, scancel and apptainer as small scripts on the PATH.

What they print is what Slurm 22.05.8 and 24.11.5 printed (tests/doctor/slurm/, one node, two fake GPUs, no accounting) and
Apptainer 1.4.5; a test changes a word of it, or gives a program another answer.
"""

import os
import stat
from pathlib import Path

import pytest

OUTPUTS = Path(__file__).parent / "slurm"
VERSIONS = ("22.05", "24.11")
REFUSED = "allocation failure: Requested node configuration is not available"
TAKEN = "sbatch: Job 5 to start at 2026-11-24T05:42:29 using 1 processors on nodes localhost in partition gpu"


class Site:
    """Fakes in a folder that stands in front of the PATH; nothing else of a cluster is on it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, version: str = "24.11"):
        self.folder, self.answers, self.monkeypatch = folder / "bin", folder / "answers", monkeypatch
        self.folder.mkdir()
        self.answers.mkdir()
        for name in ("config", "partitions", "sinfo", "version"):
            (self.answers / name).write_text((OUTPUTS / version / f"{name}.txt").read_text())
        for name in (
            "SLURM_JOB_ID",
            "APPTAINER_CONTAINER",
            "SINGULARITY_CONTAINER",
            "KVPIPE_IMAGE",
            "HF_HUB_OFFLINE",
            "HF_HOME",
            "HF_HUB_CACHE",
            "HF_DATASETS_CACHE",
        ):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", f"{self.folder}:/usr/bin:/bin")
        self.program("sinfo", f"cat {self.answers}/sinfo")
        self.program("squeue", "true")
        self.program("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
        self.program(
            "scontrol",
            f'case "$*" in "show config") cat {self.answers}/config;; *) cat {self.answers}/partitions;; esac',
        )
        self.program("sbatch", f'[ "$1" = --version ] && cat {self.answers}/version')

    def program(self, name: str, body: str) -> None:
        """A program of this name on the PATH."""
        path = self.folder / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def without(self, *names: str) -> None:
        """Take programs away."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def change(self, name: str, before: str, after: str) -> None:
        """Replace a word in what a program prints."""
        text = (self.answers / name).read_text()
        assert before in text, f"{before!r} is not in {name}"
        (self.answers / name).write_text(text.replace(before, after))

    def nodes(self, *lines: str) -> None:
        """What sinfo prints: partition|state|CPUs|MB|time limit|GRES."""
        (self.answers / "sinfo").write_text("".join(f"{line}\n" for line in lines))

    def apptainer(self, start: str = "exit 0", labels: str = "{}", version: str = "apptainer version 1.4.5") -> None:
        """An Apptainer whose image starts with the shell command `start`, and that prints `labels` or runs them."""
        shown = f'{{"data": {{"attributes": {{"labels": {labels}}}}}, "type": "container"}}'
        inspect = f"echo '{shown}'" if labels.startswith("{") else labels
        body = f"case \"$1\" in --version) echo '{version}';; exec) {start};; inspect) {inspect};; esac"
        self.program("apptainer", body)


def environment_without_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop: no program of a cluster on the PATH, no job around."""
    for name in ("SLURM_JOB_ID", "APPTAINER_CONTAINER", "SINGULARITY_CONTAINER", "SNAKEMAKE_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    # a folder of somebody else may not be looked into
    folders = [f for f in os.environ["PATH"].split(":") if not os.access(Path(f) / "sbatch", os.F_OK)]
    monkeypatch.setenv("PATH", ":".join(folders))
