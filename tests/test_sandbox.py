"""Programs that mean harm, or seem to: none passes that has not come to its end, none reaches what is not its own.

Every program runs twice: in namespaces of its own, and without them, as on machines that do not offer them. The last
tests take the audit hook away, so that the kernel alone has to hold.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvpipe import confine, sandbox
from kvpipe.config import ConfigError, SandboxConfig, parse

CONFIG = SandboxConfig(run_code=True, seconds=1, memory_mb=256)
WHY = sandbox.run("", CONFIG).unconfined
NAMESPACES = [
    pytest.param(True, id="namespaces", marks=pytest.mark.skipif(bool(WHY), reason=f"no namespaces here: {WHY}")),
    pytest.param(False, id="without"),
]
both = pytest.mark.parametrize("namespaces", NAMESPACES)


@both
def test_a_program_that_comes_to_its_end_passes(namespaces):
    outcome = sandbox.run(
        "def f(x):\n    return x + 1\nassert f(2) == 3\nopen('own.txt', 'w').write('x')", CONFIG, namespaces
    )
    assert outcome.status == "passed" and bool(outcome.unconfined) is not namespaces


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
    "a fork bomb": ("import os\nwhile True: os.fork()", "failed", "os.fork"),
    "a process": ("import os\nos.system('true')", "failed", "os.system"),
    "a thread bomb": ("import _thread\nwhile True: _thread.start_new_thread(print, ())", "failed", "can't start new thread"),
    "waiting for input": ("input()", "failed", "EOFError"),
    "huge output": ("import sys\nwhile True: sys.stdout.write('x' * 10**6)", "timeout", ""),
    "a huge file": ("f = open('x', 'wb')\nwhile True: f.write(b'x' * 10**6)", "failed", "OSError"),
    "sys.exit(0) before the tests": ("import sys\nsys.exit(0)" + ENDS, "failed", "SystemExit: 0"),
    "os._exit(0) before the tests": ("import os\nos._exit(0)" + ENDS, "killed", "ended before its end: 0"),
    "quit() and a caught exit": ("try:\n  exit()\nexcept BaseException: pass" + ENDS, "failed", "the tests ran"),
    "killing itself": ("import os\nos.kill(os.getpid(), 9)", "failed", "os.kill"),
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
    "a network connection": ("import _socket\n_socket.socket()", "failed", ""),
    "native code": ("import _ctypes\n_ctypes.dlopen('libc.so.6', 2)", "failed", ""),
}  # fmt: skip


@both
@pytest.mark.parametrize("name", list(HARM))
def test_harm_does_not_pass(name, namespaces):
    program, status, said = HARM[name]
    started = time.monotonic()
    outcome = sandbox.run(program, CONFIG, namespaces)
    assert outcome.status == status and said in outcome.detail, outcome
    assert time.monotonic() - started < confine.CLOCK * CONFIG.seconds + sandbox.STARTED + 60


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
]
SECRETS = [
    "str(dict(os.environ))",
    "open('/proc/self/environ').read()",
    "open(f'/proc/{os.getppid()}/environ').read()",
    "open(secret).read()",
]


@both
@pytest.mark.parametrize("how", CHANGES)
def test_nothing_outside_its_folder_is_changed(tmp_path, how, namespaces):
    target = tmp_path / "precious.txt"
    target.write_text("keep")
    # world-writable, so that being another user is not what protects it
    for path in (target, tmp_path):
        path.chmod(0o777)
    program = f"import os\npath = {str(target)!r}\nopen('own', 'w').close()\n{how}\n"
    outcome = sandbox.run(program, CONFIG, namespaces)
    assert outcome.status == "failed", outcome
    assert target.read_text() == "keep" and [p.name for p in tmp_path.iterdir()] == ["precious.txt"]
    assert target.stat().st_mode & 0o777 == 0o777


@both
def test_the_way_out_by_a_link_is_closed(tmp_path, namespaces):
    tmp_path.chmod(0o777)
    program = f"import os\nos.symlink({str(tmp_path)!r}, 'way')\nopen('way/out.txt', 'w')"
    assert sandbox.run(program, CONFIG, namespaces).status == "failed" and not list(tmp_path.iterdir())


@both
@pytest.mark.parametrize("how", SECRETS)
def test_secrets_are_not_read(tmp_path, monkeypatch, how, namespaces):
    monkeypatch.setenv("HF_TOKEN", "hf_invented_secret")
    secret = tmp_path / "token"
    secret.write_text("hf_invented_secret")
    secret.chmod(0o644)
    program = f"import os\nsecret = {str(secret)!r}\nraise ValueError('read: ' + {how})"
    outcome = sandbox.run(program, CONFIG, namespaces)
    assert outcome.status == "failed" and "hf_invented_secret" not in outcome.detail
    assert "read: " in outcome.detail if "environ)" in how else "read: " not in outcome.detail


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for program in ("open('x', 'w').write('x')", "while True: pass"):
        sandbox.run(program, CONFIG)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the kernel alone
def without_the_hook(program, folder, namespaces=True):
    """The verdict on a program when no audit hook watches it."""
    if os.getuid() == 0:
        os.chown(folder, confine.NOBODY, confine.NOBODY)
    request = {
        "program": program,
        "folder": str(folder),
        "seconds": 1,
        "memory_mb": 256,
        "namespaces": namespaces,
        "secret": "s",
    }
    code = f"import runpy, sys\nsys.path.insert(0, {str(Path(confine.__file__).parent)!r})\nimport confine\n"
    code += "confine.watch = lambda folder: None\nconfine.main()"
    done = subprocess.run(
        [sys.executable, "-I", "-B", "-c", code], input=json.dumps(request).encode(), capture_output=True
    )
    verdict = json.loads(done.stdout.splitlines()[1])
    return verdict["status"], verdict["detail"]


KERNEL = {
    "processes": ("import os\nos.fork()", "BlockingIOError"),
    "the network": ("import socket\nsocket.create_connection(('127.0.0.1', 9), 1)", "Network is unreachable"),
    "files of the machine": ("open('/etc/passwd')", "FileNotFoundError"),
    "the home folder": ("import os\nos.listdir('/proc')", "FileNotFoundError"),
    "the interpreter": ("import os\nopen(os.__file__, 'a')", "Read-only file system|Permission denied"),
    "other processes": ("import os\nassert os.getpid() == 1, os.getpid()\nraise OSError('alone')", "alone"),
    "rights": ("import os\nos.chroot('/tmp')", "Operation not permitted"),
    "mounts": (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.mount(b'x', b'/tmp', b'tmpfs', 0, None) == -1\nassert libc.unshare(0x20000) == -1\nraise OSError('refused')",
        "refused",
    ),
}  # fmt: skip


@pytest.mark.skipif(bool(WHY), reason=f"no namespaces here: {WHY}")
@pytest.mark.parametrize("name", list(KERNEL))
def test_without_the_hook_the_kernel_holds(tmp_path, name):
    program, said = KERNEL[name]
    status, detail = without_the_hook(program, tmp_path)
    assert status == "failed" and re.search(said, detail), detail


# ---------------------------------------------------------------- consent and several at once
def test_programs_are_not_run_without_consent():
    with pytest.raises(sandbox.SandboxError, match="run_code is off"):
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


def test_no_namespaces_is_said_loudly(monkeypatch):
    monkeypatch.setattr(sandbox, "run", lambda *_: sandbox.Outcome("passed", "", "Operation not permitted"))
    assert "namespaces are not available here (Operation not permitted)" in sandbox.check(CONFIG)
    assert "AUDIT HOOK ONLY" in sandbox.check(CONFIG)


def test_a_sandbox_that_does_not_work_is_an_error():
    with pytest.raises(sandbox.SandboxError, match="a program that must pass ends as"):
        sandbox.check(CONFIG.model_copy(update={"memory_mb": 1}))
