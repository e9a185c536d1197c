"""Programs that mean harm, or seem to: none passes that has not come to its end, none reaches what is not its own.

Every program runs behind both kinds of walls, bubblewrap's and kvpipe's own.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvpipe.config import ConfigError, SandboxConfig, parse
from kvpipe.evaluate.sandbox import run as sandbox
from kvpipe.evaluate.sandbox.run import WALLS, SandboxError

CONFIG = SandboxConfig(run_code=True, seconds=1, memory_mb=256)


def missing(walls):
    """Why these walls cannot be had here; nothing where they can."""
    try:
        sandbox.run("", CONFIG, walls)
    except SandboxError as error:
        return str(error)
    return ""


WHY = {walls: missing(walls) for walls in WALLS}
both = pytest.mark.parametrize(
    "walls", [pytest.param(w, marks=pytest.mark.skipif(bool(why), reason=why)) for w, why in WHY.items()]
)


@both
def test_a_program_that_comes_to_its_end_passes(walls):
    program = "def f(x):\n    return x + 1\nassert f(2) == 3\nopen('own.txt', 'w').write('x')\nimport json, tempfile\n"
    program += (
        "assert open('own.txt').read() == 'x'\ntempfile.TemporaryFile().write(b'x')\nopen('/dev/null', 'w').write('x')"
    )
    assert sandbox.run(program, CONFIG, walls) == sandbox.Outcome("passed")


VALID = {
    "a dataclass with quoted types": """
from dataclasses import dataclass
@dataclass
class Node:
    value: 'int'
    next: 'Node | None' = None
assert Node(1, Node(2)).next.value == 2""",
    "types that are texts": """from __future__ import annotations
from dataclasses import dataclass
from typing import get_type_hints
@dataclass
class Point:
    x: int
assert Point(1).x == 1 and get_type_hints(Point) == {'x': int}""",
    "asyncio": "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 3\nassert asyncio.run(f()) == 3",
    "doctest": """
def twice(x):
    '''
    >>> twice(2)
    4
    '''
    return 2 * x
import doctest
assert doctest.testmod().attempted == 1""",
    "unittest": """
import unittest
class Test(unittest.TestCase):
    def test(self):
        self.assertEqual(1, 1)
assert unittest.main(exit=False, argv=['x']).result.testsRun == 1""",
    "pickle": "import pickle\nclass A:\n    pass\npickle.loads(pickle.dumps(A()))",
    "inspect": "import inspect\ndef f():\n    return 1\nassert 'return 1' in inspect.getsource(f)",
    "inspect a class": "import inspect\nclass A:\n    x = 1\nassert 'x = 1' in inspect.getsource(A)",
    "its file's folder": "from pathlib import Path\nassert Path(__file__).resolve().parent == Path.cwd()",
    "no main part": "if __name__ == '__main__':\n    raise SystemExit(1)",
}


@both
@pytest.mark.parametrize("name", VALID)
def test_valid_programs_pass(name, walls):
    assert sandbox.run(VALID[name], CONFIG.model_copy(update={"seconds": 5}), walls) == sandbox.Outcome("passed")


ENDS = "\nraise RuntimeError('the tests ran')"
HARM = {
    "a failing test": ("assert 1 == 2, 'one is not two'", "failed", "AssertionError: one is not two"),
    "a mistake in the syntax": ("def f(:", "failed", "SyntaxError"),
    "an infinite loop": ("while True: pass", "timeout", "no end within 1 s"),
    "a loop that catches all": ("while True:\n  try:\n    while True: pass\n  except BaseException: pass", "timeout", ""),
    "sleep": ("import time\ntime.sleep(1000)", "timeout", ""),
    "signals ignored": ("import signal, time\nfor s in (2, 15, 24): signal.signal(s, 1)\nwhile True: pass", "timeout", ""),
    "a memory bomb": ("x = 'a' * 10**10", "failed", "MemoryError"),
    "a slow memory bomb": ("x = []\nwhile True: x.append('a' * 10**6)", "failed", "MemoryError"),
    "a fork bomb": ("import os\nwhile True: os.fork()", "failed", "BlockingIOError"),
    "a process": ("import subprocess\nsubprocess.run(['true'])", "failed", "BlockingIOError"),
    "a thread bomb": ("import _thread\nwhile True: _thread.start_new_thread(print, ())", "failed", "can't start new thread"),
    "waiting for input": ("input()", "failed", "EOFError"),
    "huge output": ("import sys\nwhile True: sys.stdout.write('x' * 10**6)", "timeout", ""),
    "a huge file": ("f = open('x', 'wb')\nwhile True: f.write(b'x' * 10**6)", "failed", "OSError"),
    "sys.exit(0) before the tests": ("import sys\nsys.exit(0)" + ENDS, "failed", "SystemExit: 0"),
    "os._exit(0) before the tests": ("import os\nos._exit(0)" + ENDS, "killed", "ended before its end: 0"),
    "quit() and a caught exit": ("try:\n  exit()\nexcept BaseException: pass" + ENDS, "failed", "the tests ran"),
    "killing itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\nos.abort()", "killed", "ended before its end"),
    "killing whoever started it": ("import os\nos.kill(-1, 9)\nos.kill(1, 9)\nos.kill(os.getppid(), 9)" + ENDS, None, ""),
    "leaving its group": (
        "import os, time\ntry: os.setsid()\nexcept OSError: pass\nos.closerange(0, 64)\ntime.sleep(99)",
        "timeout",
        "",
    ),
    "a printed pass": ('print(\'{"status": "passed"}\')' + ENDS, "failed", "the tests ran"),
    "a pass written to every file": (
        "import os\nfor fd in range(64):\n  try: os.write(fd, b'\\n{\"status\": \"passed\", \"secret\": \"\"}\\n')\n"
        "  except OSError: pass\nos._exit(0)",
        "killed",
        "ended before its end",
    ),
    "a flood of answers": (
        "import os\nwhile True:\n  for fd in range(3, 64):\n    try: os.write(fd, b'x' * 4096)\n    except OSError: pass",
        "killed",
        "",
    ),
}  # fmt: skip


@both
@pytest.mark.parametrize("name", list(HARM))
def test_harm_does_not_pass(name, walls):
    program, status, said = HARM[name]
    outcome = sandbox.run(program, CONFIG, walls)
    assert outcome.status in ([status] if status else ["failed", "killed"]) and said in outcome.detail, outcome


# ---------------------------------------------------------------- files
CHANGES = [
    "open(path, 'w')",
    "open(path, 'a').write('x')",
    "os.open(path, 65)",
    "os.remove(path)",
    "os.rename(path, 'own')",
    "os.rename('own', path)",
    "os.chmod(path, 0)",
    "os.truncate(path, 0)",
    "os.link(path, 'own2')",
    "os.mkfifo(path + '.new')",
    "os.mknod(path + '.new')",
    "os.symlink('x', path + '.new')",
    "os.symlink(os.path.dirname(path), 'way')\nopen('way/out.txt', 'w')",
    "import sqlite3\nsqlite3.connect(path + '.new').execute('create table t (x)')",
    "import readline\nreadline.add_history('x')\nreadline.write_history_file(path + '.new')",
    "import ctypes\nif ctypes.CDLL(None).creat(path.encode(), 0o644) < 0: raise OSError('refused')",
]
READS = [
    "open(secret).read()",
    "os.stat(secret).st_size",
    "os.listdir(os.path.dirname(secret))",
    "os.listdir('/proc')",
    "os.listdir('/root' if os.path.exists('/root') else '/home')[0] + open('/etc/passwd').read()",
    "open('/proc/self/environ').read()",
    "open(f'/proc/{os.getppid()}/environ').read()",
    "__import__('sqlite3').connect(f'file:{secret}?mode=ro', uri=True).execute('pragma schema_version').fetchall()",
    "__import__('readline').read_history_file(secret)",
]


@both
@pytest.mark.parametrize("how", CHANGES)
def test_nothing_outside_its_folder_is_changed(tmp_path, how, walls):
    target = tmp_path / "precious.txt"
    target.write_text("keep")
    # world-writable, so that being another user is not what protects it
    for path in (target, tmp_path):
        path.chmod(0o777)
    program = f"import os\npath = {str(target)!r}\nopen('own', 'w').close()\n{how}\n"
    outcome = sandbox.run(program, CONFIG, walls)
    assert outcome.status == "failed" and "ImportError" not in outcome.detail, outcome
    assert target.read_text() == "keep" and [p.name for p in tmp_path.iterdir()] == ["precious.txt"]
    assert target.stat().st_mode & 0o777 == 0o777


@both
@pytest.mark.parametrize("how", READS)
def test_nothing_outside_is_read(tmp_path, how, walls):
    secret = tmp_path / "token"
    secret.write_text("hf_invented_secret")
    for path in (secret, tmp_path):
        path.chmod(0o755)
    outcome = sandbox.run(
        f"import os\nsecret = {str(secret)!r}\nraise ValueError('read: ' + str({how}))", CONFIG, walls
    )
    assert outcome.status == "failed" and "read: " not in outcome.detail and "ImportError" not in outcome.detail, (
        outcome
    )


@both
def test_the_environment_is_empty(monkeypatch, walls):
    monkeypatch.setenv("HF_TOKEN", "hf_invented_secret")
    outcome = sandbox.run("import os\nraise ValueError(sorted(os.environ))", CONFIG, walls)
    assert set(eval(outcome.detail.removeprefix("ValueError: "))) <= {
        "PATH", "LANG", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PWD",
    }  # fmt: skip


@both
@pytest.mark.parametrize("path", [os.__file__, f"{sys.prefix}/pyvenv.cfg", "/usr/new", "/dev/new", "/new"])
def test_the_system_is_read_only(path, walls):
    before = Path(path).read_bytes() if Path(path).exists() else None
    outcome = sandbox.run(f"open({path!r}, 'a').write('x')", CONFIG, walls)
    assert outcome.status == "failed" and any(word in outcome.detail for word in ("Read-only", "denied")), outcome
    assert (Path(path).read_bytes() if Path(path).exists() else None) == before


@both
def test_its_folder_is_bounded(walls):
    program = "for i in range(9):\n  with open(str(i), 'wb') as f: f.write(bytes(16 << 20))"
    outcome = sandbox.run(program, CONFIG.model_copy(update={"seconds": 5}), walls)
    assert "No space left" in outcome.detail, outcome


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for walls in (name for name, why in WHY.items() if not why):
        for program in ("open('x', 'w').write('x')", "while True: pass"):
            sandbox.run(program, CONFIG, walls)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- processes, network, rights
@both
def test_other_processes_are_out_of_reach(walls):
    with subprocess.Popen(["sleep", "60"], user=sandbox._user(walls), stdin=subprocess.DEVNULL) as victim:
        program = f"import os, signal\nsignal.pidfd_send_signal(os.pidfd_open({victim.pid}), 9)"
        first = sandbox.run(program, CONFIG, walls)
        second = sandbox.run(f"import os\nos.kill({victim.pid}, 9)", CONFIG, walls)
        assert victim.poll() is None
        victim.send_signal(signal.SIGKILL)
    assert "ProcessLookupError" in first.detail and "ProcessLookupError" in second.detail


@both
def test_the_network_is_out_of_reach(walls):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        name = f"\0kvpipe-{os.getpid()}"
        local.bind(name)
        local.listen()
        for kind, address in (("AF_INET", server.getsockname()), ("AF_UNIX", name)):
            program = f"import socket\nsocket.socket(socket.{kind}).connect({address!r})"
            outcome = sandbox.run(program, CONFIG, walls)
            assert outcome.status == "failed" and "Error" in outcome.detail, outcome


NATIVE = {
    "mount": "libc.mount(b'x', b'/tmp', b'tmpfs', 0, None)",
    "a new namespace": "libc.unshare(0x10000000)",
    "a process": "libc.syscall(CLONE, 17, 0, 0, 0, 0)",
    "the key rings": "libc.syscall(KEYCTL, 0, -3, 1)",
    "another root": "libc.chroot(b'/tmp')",
    "another user": "libc.setuid(0) if libc.getuid() else libc.setuid(1)",
}


@both
@pytest.mark.parametrize("name", list(NATIVE))
def test_native_code_has_no_rights(name, walls):
    numbers = {"x86_64": (56, 250), "aarch64": (220, 219)}
    if os.uname().machine not in numbers:
        pytest.skip(f"no filter of system calls is known for {os.uname().machine}")
    clone, keyctl = numbers[os.uname().machine]
    program = f"import ctypes\nCLONE, KEYCTL = {clone}, {keyctl}\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    outcome = sandbox.run(program + f"assert {NATIVE[name]} == -1", CONFIG, walls)
    assert outcome.status == "passed", outcome


# ---------------------------------------------------------------- where the interpreter lies
@both
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_an_interpreter_in_a_private_folder_below_tmp(tmp_path, mask, walls):
    """As a clone below /tmp has it, with a space in its path, and nobody else may look into any of it."""
    home = tmp_path / "a private folder"
    home.mkdir(0o700)
    before = os.umask(mask)
    try:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / "venv"], check=True)
        packages = next((home / "venv").glob("lib/python3*/site-packages"))
        (packages / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    finally:
        os.umask(before)
    code = "import statistics, sys, sysconfig\nassert open(sys.prefix + '/pyvenv.cfg').read()\n"
    code += "raise ValueError(sys.prefix)"
    call = "from kvpipe.evaluate.sandbox.run import SandboxConfig, run\n"
    call += f"print(run({code!r}, SandboxConfig(run_code=True, memory_mb=256), {walls!r}).detail)"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(sandbox.__file__).parents[1])}
    done = subprocess.run([home / "venv/bin/python", "-B", "-c", call], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == f"ValueError: {home / 'venv'}", done


# ---------------------------------------------------------------- consent and several at once
def test_programs_are_not_run_without_consent():
    with pytest.raises(SandboxError, match="run_code is off"):
        sandbox.run_all(["assert True"], SandboxConfig())


def test_a_scorer_that_runs_code_needs_consent_in_the_configuration():
    minimal = {"student": "s", "models": {"s": {"source": "scratch", "architecture": {}}}, "arms": {"control": {}}}
    data = {"sources": [{"kind": "hub", "preset": "mbpp", "task": "code"}]}
    with pytest.raises(
        ConfigError, match=r"tasks\.code\.scorer: code runs programs .* set evaluate\.sandbox\.run_code: true"
    ):
        parse({**minimal, "data": data})
    assert (
        parse({**minimal, "data": data, "evaluate": {"sandbox": {"run_code": True}}}).evaluate.of("code").scorer
        == "code"
    )


def test_outcomes_keep_their_order_and_the_log_says_how_they_are_confined():
    said = []
    config = CONFIG.model_copy(update={"workers": 3})
    programs = ["assert True", "assert False", "while True: pass", "x = 1"]
    found = [outcome.status for outcome in sandbox.run_all(programs, config, said.append)]
    assert found == ["passed", "failed", "timeout", "passed"]
    assert len(said) == 1 and said[0].startswith("sandbox: ")


def test_programs_do_not_run_without_walls(monkeypatch, tmp_path):
    def refused(program, config, walls):
        raise SandboxError(f"walls by {walls}: Operation not permitted")

    mark, real = tmp_path / "ran", sandbox.run
    monkeypatch.setattr(sandbox, "run", refused)
    wanted = r"walls by bwrap: Operation .*; walls by own: Operation .* bubblewrap.*evaluate\.sandbox\.walls: none"
    with pytest.raises(SandboxError, match=wanted) as error:
        sandbox.run_all([f"open({str(mark)!r}, 'w')"], CONFIG, print)
    assert "\n" not in str(error.value) and not mark.exists()
    monkeypatch.setattr(sandbox, "run", real)
    said: list[str] = []
    without = CONFIG.model_copy(update={"walls": "none"})
    tmp_path.chmod(0o777)
    assert sandbox.run_all(["import os\nos.getcwd()"], without, said.append) == [sandbox.Outcome("passed")]
    assert "WITHOUT WALLS" in said[0]


def test_own_walls_where_there_is_no_bubblewrap(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    if WHY["own"]:
        pytest.skip(WHY["own"])
    assert sandbox.choose(CONFIG) == "own"


def test_walls_that_fall_in_the_middle_are_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(sandbox, "_command", lambda walls: ["sh", "-c", "echo no more namespaces; exit 1"])
    with pytest.raises(SandboxError, match="walls by own: no more namespaces"):
        sandbox.run("x = 1", CONFIG, "own")


def test_a_sandbox_that_does_not_work_is_an_error():
    with pytest.raises(SandboxError, match=r"evaluate\.sandbox\.memory_mb 1 enough"):
        sandbox.choose(CONFIG.model_copy(update={"memory_mb": 1}))
