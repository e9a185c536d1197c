"""The cluster, built once per cache and started once per session; the summary table."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkout import REPORT, SUMMARY, Site, check_out, compared
from cluster import HERE, Cluster, cache_folder, unavailable
from installed import write_metadata

VARIANT = "cpu"
FOREIGN = ("SNAKEMAKE", "KVPIPE", "SLURM", "OPENBLAS", "MKL", "OMP", "ATEN")
"""Variables that a job on the cluster does not inherit; the last four choose instructions or threads, and so the last bits."""
UNAVAILABLE = 69
"""build.sh's exit status where packages cannot be fetched: a reason to skip. Any other failure is one."""


@pytest.fixture(scope="session")
def cache():
    """The folder with root, base, wheels and image; built where it is not yet."""
    reason = unavailable()
    if reason:
        pytest.skip(f"no cluster here: {reason}")
    folder = cache_folder()
    built = subprocess.run(
        ["bash", str(HERE / "build.sh"), str(folder), sys.executable],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3600,
        check=False,
    )
    if built.returncode == UNAVAILABLE:
        last = built.stdout.strip().splitlines()[-1:]
        pytest.skip(f"no cluster here: its packages could not be fetched ({''.join(last)}); see {HERE / 'build.sh'}")
    assert built.returncode == 0, built.stdout[-6000:]
    return folder


@contextmanager
def running(cache, home: Path, nodes=("localhost",)) -> Iterator[Cluster]:
    """A cluster whose user has a checkout in a temporary home."""
    home.chmod(0o755)
    (home / "tmp").mkdir()
    check_out(home / "kvpipe")
    # as `make login` installs it: the doctor's extra is found
    write_metadata(home / "site-packages")
    subprocess.run(["chown", "-R", "1000:1000", str(home)], check=True)
    with Cluster(cache, home, nodes) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def cluster(cache, tmp_path_factory):
    """The running cluster of one node."""
    with running(cache, tmp_path_factory.mktemp("ann")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def image(cluster, cache):
    """The SIF, from the cache where lock and definition are as they were; else built offline by the ordinary user."""
    folder = cluster.home / "kvpipe"
    name = cluster.run(f"VARIANT={VARIANT} containers/image.sh name", folder=Path("/home/ann/kvpipe")).strip()
    kept = cache / "images" / Path(name).name
    if kept.exists():
        for path in (kept, kept.with_name(kept.name + ".sha256")):
            shutil.copy(path, folder / "containers" / path.name)
            os.chown(folder / "containers" / path.name, 1000, 1000)
    make = f"make image-offline VARIANT={VARIANT} BASE=/cache/base WHEELHOUSE=/cache/wheelhouse"
    # half of a build is compression, for a file that stays here
    said = cluster.run(
        f"APPTAINER_OPTIONS=--mksquashfs-args=-no-compression {make}", seconds=3600, folder=Path("/home/ann/kvpipe")
    )
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        for path in (folder / name, folder / f"{name}.sha256"):
            shutil.copy(path, kept.parent / path.name)
        (kept.parent / f"{kept.name}.log").write_text(said, encoding="utf-8")
    return folder / name


@pytest.fixture(scope="module")
def pair(cache, image, tmp_path_factory):
    """Another cluster, of two nodes on this machine, with the same image."""
    with running(cache, tmp_path_factory.mktemp("pair"), ("one", "two")) as cluster:
        folder = cluster.home / "kvpipe" / "containers"
        for path in (image, image.with_name(f"{image.name}.sha256")):
            os.link(path, folder / path.name)
        (folder / "kvpipe.sif").symlink_to(image.name)
        yield cluster


@pytest.fixture(scope="session")
def expected(tmp_path_factory):
    """What the same reduced experiment gives on this machine without SLURM and without a container."""
    folder = tmp_path_factory.mktemp("local")
    check_out(folder)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
    path = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "2", "--", REPORT],
        cwd=folder,
        env=environment | {"PATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    found = compared(folder)
    assert {"stats/arms.csv", "stats/contrasts.csv"} < found.keys()
    return found


@pytest.fixture(scope="session")
def user(cluster, image, expected):
    """The user's checkout, its image and the results that are expected of it."""
    return Site(cluster, expected)


@pytest.fixture
def site(user):
    """The same; a failed test leaves the queue empty and the checkout unlocked for the next one."""
    yield user
    user.settle()


def pytest_terminal_summary(terminalreporter):
    """The table of docs/log/2026-11-24-cluster-faults.md."""
    if not SUMMARY:
        return
    terminalreporter.section(f"make test-cluster, {time.strftime('%Y-%m-%d')}")
    terminalreporter.write_line("| fault | what happened | jobs | resumed | seconds | report |")
    terminalreporter.write_line("|---|---|---|---|---|---|")
    for row in SUMMARY:
        cells = (row.name, row.happened, row.jobs, row.restarts, f"{row.seconds:.0f}", row.outcome)
        terminalreporter.write_line(f"| {' | '.join(map(str, cells))} |")
