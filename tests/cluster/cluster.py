"""A SLURM cluster in namespaces of its own: started, commands run in it, stopped without a trace."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
HOME = Path("/home/ann")
"""Home of the ordinary user, inside."""
TOOLS = ("debootstrap", "unshare", "nsenter", "setpriv", "pivot_root")


def cache_folder() -> Path:
    """Where root, base, wheels and image are kept: KVPIPE_CLUSTER_CACHE, or a folder of the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvpipe-cluster"
    # build.sh changes into it, and names files in it afterwards
    return Path(os.environ.get("KVPIPE_CLUSTER_CACHE", default)).expanduser().absolute()


def unavailable() -> str | None:
    """Why there can be no cluster here; None where there can."""
    if os.geteuid() != 0:
        return "needs root, to mount and to make an ordinary user"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)} (packages debootstrap and util-linux)"
    if not Path("/dev/fuse").exists():
        return "needs /dev/fuse, by which Apptainer mounts an image"
    probe = ["unshare", "--mount", "--pid", "--net", "--uts", "--fork", "true"]
    if subprocess.run(probe, capture_output=True, check=False, timeout=30).returncode != 0:
        return "needs new mount, process and network namespaces, which are refused here"
    return None


class TimeUp(AssertionError):
    """Something did not happen in time."""


def wait_for(what: str, condition: Callable[[], object], seconds: float, every: float = 0.5, tell=lambda: ""):
    """Wait until a condition holds and return what it gave.

    Raises:
        TimeUp: it did not within `seconds`; the message says what was waited for and `tell()`.
    """
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > end:
            raise TimeUp(f"waited {seconds:.0f} s in vain: {what}\n{tell()}")
        time.sleep(every)


class Cluster:
    """The cluster; a context manager. `home` on this machine is `HOME` inside."""

    def __init__(self, cache: Path, home: Path, nodes: tuple[str, ...] = ("localhost",)):
        self.cache, self.home, self.nodes = cache, home, nodes
        self._process: subprocess.Popen | None = None
        self._pid = 0

    def __enter__(self) -> Cluster:
        os.chown(self.home, 1000, 1000)
        namespaces = ["--mount", "--propagation", "private", "--pid", "--net", "--uts", "--fork", "--kill-child"]
        self._process = subprocess.Popen(
            ["unshare", *namespaces, "bash", str(HERE / "init.sh"), str(self.cache), str(self.home), *self.nodes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert self._process.stdout is not None
            readable, _, _ = select.select([self._process.stdout], [], [], 120)
            line = self._process.stdout.readline() if readable else "nothing within 120 s"
            if line.strip() != "ready":
                raise RuntimeError(f"the cluster did not start: {line!r} (its own messages are above)")
            self._pid = psutil.Process(self._process.pid).children()[0].pid
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        """Kill the first process of the namespace, and with it all the others."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(timeout=30)
        wait_for("the end of the cluster's processes", lambda: not psutil.pid_exists(self._pid), 30)

    def seen(self, path: Path) -> Path:
        """A path inside, for this machine."""
        return Path(f"/proc/{self._pid}/root") / path.relative_to("/")

    # ------------------------------------------------------------ commands
    def _inside(self, command: str, user: str, folder: Path) -> list[str]:
        enter = ["nsenter", "--target", str(self._pid), "--mount", "--pid", "--net", "--uts"]
        who = ["--reuid", user, "--regid", user, "--init-groups", "--reset-env"]
        setting = (
            f"export PYTHONPATH=/cache/login:{HOME}/site-packages:{HOME}/kvpipe/plugins/cluster OMP_NUM_THREADS=1 "
            f"MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 APPTAINER_CACHEDIR={HOME}/.apptainer APPTAINER_TMPDIR={HOME}/tmp"
        )
        return [*enter, "setpriv", *who, "bash", "-c", f"{setting}; cd {folder} && {command}"]

    def start(self, command: str, log: Path, folder: Path = HOME) -> subprocess.Popen:
        """Start a command of the ordinary user, its output going to a file."""
        with log.open("w", encoding="utf-8") as handle:
            return subprocess.Popen(
                self._inside(command, "ann", folder), stdin=subprocess.DEVNULL, stdout=handle, stderr=subprocess.STDOUT
            )

    def run(self, command: str, seconds: float = 60, user: str = "ann", folder: Path = HOME) -> str:
        """Run a command to its end and return what it printed.

        Raises:
            AssertionError: it failed, or took longer than `seconds`; with its output.
        """
        try:
            done = subprocess.run(
                self._inside(command, user, folder if user == "ann" else Path("/")),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as expired:
            raise TimeUp(f"{command!r} took longer than {seconds:.0f} s\n{expired.output}") from None
        assert done.returncode == 0, f"{command!r} gave {done.returncode}:\n{done.stdout}"
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """Everything that runs inside, as this machine sees it."""
        return psutil.Process(self._pid).children(recursive=True)

    # ------------------------------------------------------------ SLURM
    def jobs(self) -> dict[str, str]:
        """Id → state of every job that the controller remembers."""
        lines = self.run("squeue --noheader --states=all --format '%i %T'").splitlines()
        return dict(line.split() for line in lines if line.strip())

    def control(self, command: str) -> str:
        """A command of root, for example `scontrol update …`."""
        return self.run(command, user="root")

    def stop_daemon(self, name: str) -> None:
        """Stop slurmctld or slurmd by its own pid file."""
        self.control(f"kill $(cat /run/{name}.pid)")
        wait_for(f"{name} to stop", lambda: not self._alive(name), 60)

    def start_daemon(self, name: str) -> None:
        """Start it again."""
        self.control(name)
        wait_for("the controller to answer", lambda: "UP" in self.run("scontrol ping || true"), 60)

    def restore(self) -> None:
        """Controller running and node in service, where a test has left them otherwise."""
        if not self._alive("slurmctld"):
            self.start_daemon("slurmctld")
        if "down" in self.run("sinfo --noheader --format %T"):
            self.control(f"scontrol update nodename={','.join(self.nodes)} state=resume")

    def _alive(self, name: str) -> bool:
        return self.control(f"kill -0 $(cat /run/{name}.pid) 2> /dev/null && echo alive || true").strip() == "alive"
