"""A step in a child of the server is the step by itself: what it sees, says and writes, and how it ends."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
from tiny import values

from kvpipe.cli import server
from kvpipe.steps.train import prepare

SCRIPT = """
import os, sys
from kvpipe.cli import server
server.LIBRARIES = sys.argv[3:]
if sys.argv[1] == "serve":
    server.serve(sys.argv[2])
elif "KVPIPE_SERVER" in os.environ:
    server.delegate(os.environ["KVPIPE_SERVER"])
import signal, time
exec(sys.argv[1])
"""
PROGRAMS = {
    "sees": "print(os.getcwd(), sys.argv, sys.path, sorted(os.environ.items()), sys.stdin.read(), os.listdir('/proc/self/fd'))",
    "says": "print('buffered'); os.write(1, b'raw\\n'); print('error', file=sys.stderr)",
    "a status": "sys.exit(3)",
    "a text": "sys.exit('why')",
    "an error": "1 / 0",
    "at exit": "import atexit; atexit.register(print, 'last'); sys.exit(4)",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "aborted": "os.abort()",
    "interrupted": "raise KeyboardInterrupt",
}
PID = "print(os.getpid(), os.getppid(), flush=True)"


class Served:
    """A server without libraries, and programs that it runs."""

    def __init__(self, folder: Path):
        self.folder, self.address, self.said = folder, folder / "of" / "socket", folder / "said"
        (folder / "script.py").write_text(SCRIPT)
        self.environment = {k: v for k, v in os.environ.items() if k != "KVPIPE_SERVER"}
        self.environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}

    def begin(self, *libraries: str) -> None:
        self.address.parent.mkdir()
        command = [sys.executable, str(self.folder / "script.py"), "serve", str(self.address), *libraries]
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stderr=said, env=self.environment, start_new_session=True
            )
        while not self.address.exists() and self.process.poll() is None:
            time.sleep(0.01)

    def popen(self, program: str, served: bool = True, **options) -> subprocess.Popen:
        address = {"KVPIPE_SERVER": str(self.address)} if served else {}
        return subprocess.Popen(
            [sys.executable, str(self.folder / "script.py"), program],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder / "of",
            **{"env": self.environment | address} | options,
        )  # fmt: skip

    def run(self, program: str, served: bool = True, **options) -> tuple[int, str, str]:
        process = self.popen(program, served, **options)
        out, err = process.communicate("asked", timeout=60)
        return process.returncode, out, err

    def end(self) -> None:
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0


@pytest.fixture(autouse=True, scope="module")
def obeyed():
    """A shell that has started the tests in the background ignores both."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGQUIT: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("server"))
    served.begin()
    yield served
    served.end()
    assert not served.address.parent.exists()


def within_a_minute(true) -> bool:
    return any(true() or time.sleep(0.01) for _ in range(6000))


def of_process(pid: int, field: str) -> str:
    """What the system says of a process, nothing once it is gone."""
    try:
        return Path(f"/proc/{pid}/status").read_text().split(f"\n{field}:")[1].split()[0]
    except OSError:
        return ""


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_child_is_the_process_that_asked(plain, name):
    alone = plain.run(PROGRAMS[name], served=False)
    code, out, err = plain.run(PROGRAMS[name])
    address = f"('KVPIPE_SERVER', '{plain.address}'), "
    assert (code, out.replace(address, ""), err) == alone
    assert (address in out) == (name == "sees")


def test_it_is_another_process(plain):
    process = plain.popen(PID)
    assert process.communicate()[0].split()[0] != str(process.pid)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1"])
@pytest.mark.parametrize("caught", [True, False])
def test_signals_are_handed_on(plain, name, caught):
    number = getattr(signal, name)
    handler = f"signal.signal({int(number)}, lambda n, _: sys.exit(f'got {{n}}')); " if caught else ""
    if name == "SIGINT" and not caught:
        handler = f"signal.signal({int(number)}, signal.SIG_DFL); "
    process = plain.popen(f"{handler}print('ready', flush=True); time.sleep(60)")
    assert process.stdout.readline() == "ready\n"
    # a signal in the first milliseconds ends the process that asks, and with it the child
    assert within_a_minute(lambda: int(of_process(process.pid, "SigCgt"), 16) >> number - 1 & 1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == ((1, f"got {int(number)}\n") if caught else (-number, ""))


def test_a_step_stops_and_goes_on(plain):
    process = plain.popen(f"{PID}; sys.stdin.readline(); print('on')")
    child, waiting = map(int, process.stdout.readline().split())
    assert waiting != os.getpid(), "it was not served"
    os.kill(waiting, signal.SIGTERM)  # as one who ends all of them by their name; the step ends as it means to

    assert within_a_minute(lambda: int(of_process(process.pid, "SigCgt"), 16) >> signal.SIGTSTP - 1 & 1)
    process.send_signal(signal.SIGTSTP)
    assert within_a_minute(lambda: of_process(child, "State") == "T")
    process.send_signal(signal.SIGCONT)
    assert within_a_minute(lambda: of_process(child, "State") == "S")
    assert process.communicate("\n")[0] == "on\n" and process.returncode == 0


@pytest.mark.parametrize("who", ["that asked", "that waits"])
def test_a_step_ends_with_the_process(plain, who):
    process = plain.popen(f"{PID}; time.sleep(60)")
    child, waiting = map(int, process.stdout.readline().split())
    assert waiting != os.getpid(), "it was not served"
    os.kill(process.pid if who == "that asked" else waiting, signal.SIGKILL)
    assert within_a_minute(lambda: of_process(child, "State") in ("", "Z"))
    _, err = process.communicate(timeout=60)
    if who == "that waits":
        assert (process.returncode, err) == (1, "kvpipe server: it was killed, and this step with it; run it again\n")


# ---------------------------------------------------------------- by itself
LESS = (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
DIFFERING = {
    "$OMP_NUM_THREADS": lambda given: {"env": given | {"OMP_NUM_THREADS": "3"}},
    "$ATEN_CPU_CAPABILITY": lambda given: {"env": given | {"ATEN_CPU_CAPABILITY": "default"}},
    "limits (ulimit)": lambda _: {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, LESS)},
    "priority and rights": lambda _: {"umask": 0o77},
    "ignored signals": lambda _: {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)},
    "processors": lambda _: {"preexec_fn": lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})},
}


@pytest.mark.parametrize("what", DIFFERING)
def test_what_a_child_cannot_be_given_is_said_once_and_the_step_runs_by_itself(plain, what):
    if what == "processors" and len(os.sched_getaffinity(0)) == 1:
        pytest.skip("one processor: none can be left out")
    options = DIFFERING[what](plain.environment | {"KVPIPE_SERVER": str(plain.address)})
    for _ in range(2):
        process = plain.popen(PID, **options)
        out, err = process.communicate()
        assert (out.split()[0], err) == (str(process.pid), "")
    said = [line for line in plain.said.read_text().splitlines() if what in line]
    assert said == [f"kvpipe server: steps import for themselves where these differ: {what}"]


def test_where_the_server_was_killed_the_first_step_says_so_and_all_run(tmp_path):
    served = Served(tmp_path)
    served.begin()
    served.process.kill()
    served.process.communicate()
    first, second = served.run("print('ran')"), served.run("print('ran')")
    assert first[:2] == (0, "ran\n") and second == (0, "ran\n", "")
    assert first[2].startswith("kvpipe server: no answer (") and len(first[2].splitlines()) == 1


def test_libraries_that_start_threads_are_not_forked(tmp_path):
    served = Served(tmp_path)
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=[1], daemon=True).start()"
    )
    served.environment["PYTHONPATH"] += f"{os.pathsep}{tmp_path}"
    served.begin("threaded")
    assert served.process.wait() == 1
    assert served.said.read_text() == "kvpipe server: none, since 1 threads run once the libraries are imported\n"
    assert served.run("print('ran')")[:2] == (0, "ran\n")


@pytest.mark.parametrize(
    ("setting", "job", "elsewhere", "begun", "said"),
    [
        ("", None, None, True, ""),
        ("off", None, None, False, ""),
        ("", "7", None, False, ""),
        ("on", "7", None, True, ""),
        ("", None, "in an image", False, ""),
        (
            "on",
            None,
            "in an image",
            False,
            "kvpipe server: none, since steps run in an image; each imports for itself\n",
        ),
    ],
)
def test_none_on_a_cluster_unless_asked(monkeypatch, capsys, tmp_path, setting, job, elsewhere, begun, said):
    started = []
    monkeypatch.setattr(server.subprocess, "Popen", lambda *args, **_: started.append(args))
    monkeypatch.setattr(server.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("KVPIPE_SERVER", setting)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    server.start(1, elsewhere)
    assert bool(started) == begun and capsys.readouterr().err == said
    assert Path(os.environ.get("KVPIPE_SERVER", "")).is_absolute() == begun


# ---------------------------------------------------------------- the steps themselves
STARTS = """
import json, os, subprocess, sys
from kvpipe.cli import server
server.start(1, None)
print(os.environ["KVPIPE_SERVER"])
sys.exit(subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode)
"""


def test_weights_are_the_same_bytes(tiny, tmp_path):
    """And the server ends with the process that started it."""
    prepare(tiny, "two", log=lambda *_: None)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(values(tiny.paths.root.parent)))
    command = [sys.executable, "-m", "kvpipe", "train", "--made", "--arm", "two", "--seed", "1", "--config", config]
    command += ["--results", tiny.paths.root, "--out"]
    one_thread = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "GOTO", "OPENBLAS", "MKL", "NUMEXPR")}
    environment = {k: v for k, v in os.environ.items() if k != "KVPIPE_SERVER"} | one_thread
    subprocess.run([*command, tmp_path / "alone"], env=environment, check=True, stdout=subprocess.DEVNULL)
    served = subprocess.run(
        [sys.executable, "-c", STARTS, *command, tmp_path / "served"],
        env=environment, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert served.stderr == "", "it was not refused"
    of = {name: (tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("alone", "served")}
    assert sha256(of["alone"]).digest() == sha256(of["served"]).digest()
    folder = Path(served.stdout.strip()).parent
    assert within_a_minute(lambda: not folder.exists())
