"""Programs that a model wrote, run in processes of their own: `kvpipe.evaluate.sandbox.confine` says behind which walls."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kvpipe.config import SandboxConfig
from kvpipe.evaluate.sandbox import confine

ANSWER = 8192
"""Longest answer in bytes; who writes more is stopped."""
STARTED = 20.0
"""Seconds beside a program's own: starting an interpreter on a busy machine."""
CLOCK = 3
"""A program may take so many times its CPU seconds by the clock: other work on the machine does not make it wrong."""
WALLS = ("bwrap", "own")
"""Who builds them, best first: the command of bubblewrap, or `kvpipe.evaluate.sandbox.confine` by itself."""
DESCRIPTION = {
    "bwrap": "programs run behind bubblewrap's walls, without network, in a root directory of their own, with limits",
    "own": "programs run behind kvpipe's own walls, without network, in a root directory of their own, with limits",
    "none": "WITHOUT WALLS (evaluate.sandbox.walls: none): programs may read and change what you may; limits hold",
}
NOBODY = 65534
PREFIXES = (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix)
INTERPRETER = sorted({*PREFIXES, *map(os.path.realpath, PREFIXES)})
SYSTEM = ["/usr", "/lib", "/lib64", "/nix/store", "/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime"]
PATIENCE = 5.0
"""Seconds that a process has for ending what it has started."""


class SandboxError(RuntimeError):
    """Programs cannot be run here."""


@dataclass(frozen=True)
class Outcome:
    """`passed`, `failed` (with the error), `timeout` or `killed` (it ended without coming to its end)."""

    status: str
    detail: str = ""


def run(program: str, config: SandboxConfig, walls: str) -> Outcome:
    """Run one program to its end; every way of not reaching it is a failure.

    Args:
        program: its text.
        config: its limits.
        walls: `bwrap`, `own` or `none`.

    Raises:
        SandboxError: the walls could not be built, and so the program did not run.
    """
    secret, user = secrets.token_hex(16), _user(walls)
    with tempfile.TemporaryDirectory(prefix="kvpipe-program-") as folder:
        if os.getuid() == 0:
            os.chown(folder, user, user)
        shown = [*SYSTEM, *confine.DEVICES, *INTERPRETER]
        limits = {"seconds": config.seconds, "memory_mb": config.memory_mb, "user": user}
        request = {"program": program, "secret": secret, "walls": walls, "folder": folder, "shown": shown, **limits}
        answer, fate = _ask(walls, json.dumps(request).encode(), config)
    said = [line for line in answer.splitlines() if line.strip()]
    verdicts = [verdict for line in said if (verdict := _verdict(line, secret)) is not None]
    if verdicts[:1] != [Outcome("started")]:
        raise SandboxError(f"walls by {walls}: {said[-1].decode(errors='replace') if said else fate.detail}")
    return verdicts[1] if len(verdicts) > 1 else fate


def _verdict(line: bytes, secret: str) -> Outcome | None:
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        verdict = json.loads(line)
        if secrets.compare_digest(str(verdict.pop("secret", "")), secret):
            return Outcome(**verdict)
    return None


def _user(walls: str) -> int:
    """Whom a program runs as, where root starts it: nobody, or the interpreter's owner where nobody else can read it."""
    if os.getuid() != 0:
        return os.getuid()
    read = [Path(path) for path in (*INTERPRETER, os.__file__)]
    read += [parent for path in read for parent in path.parents if walls == "none"]
    found = [path.stat() for path in read]
    return next((entry.st_uid for entry in found if not entry.st_mode & 0o004), NOBODY)


def _command(walls: str) -> list[str]:
    """The interpreter on the text of `kvpipe.evaluate.sandbox.confine`, which need not be readable from inside."""
    interpreter = [sys.executable, "-I", "-B", "-c", Path(confine.__file__).read_text(encoding="utf-8")]
    if walls != "bwrap":
        return interpreter
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxError("walls by bwrap: no such command")
    # as root without a user namespace: only so can it become a user who may not start processes
    apart = ["--unshare-all"] if os.getuid() else [f"--unshare-{kind}" for kind in ("ipc", "pid", "net", "uts")]
    options = [*apart, "--die-with-parent", "--new-session", "--size", str(confine.FOLDER_MB << 20), "--perms", "1777"]
    options += ["--tmpfs", "/tmp"]
    for option, paths in (("--ro-bind-try", [*SYSTEM, *INTERPRETER]), ("--dev-bind-try", confine.DEVICES)):
        for path in paths:
            # the folders on the way there are made by bwrap, for their owner alone if it is not told
            options += ["--dir", str(Path(path).parent), option, path, path]
    return [found, *options, "--remount-ro", "/", "--chdir", "/tmp", "--", *interpreter]


def _ask(walls: str, request: bytes, config: SandboxConfig) -> tuple[bytes, Outcome]:
    """What the process answers until it ends or is stopped, and what that end is worth without a verdict."""
    # nothing of this process's environment: tokens are in it
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        _command(walls),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    answer, started, late = b"", time.monotonic(), Outcome("timeout", f"no end within {config.seconds:g} s")
    deadline = started + STARTED
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(request)
            process.stdin.close()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while selector.select(max(0.0, deadline - time.monotonic())):
                block = os.read(process.stdout.fileno(), ANSWER)
                if not answer:  # it has started
                    started = time.monotonic()
                    deadline = started + CLOCK * config.seconds
                answer += block
                if len(answer) > ANSWER:
                    return answer, Outcome("killed", f"stopped: it wrote more than {ANSWER} bytes")
                if not block:
                    break
        code = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return answer, late
    finally:
        _stop(process)
    signalled = -code if code < 0 else code - 128
    # a program that ignores XCPU is killed a second later
    if signalled == signal.SIGXCPU or (signalled == signal.SIGKILL and time.monotonic() - started > config.seconds):
        return answer, late
    return answer, Outcome("killed", f"ended before its end: {-signalled if signalled > 0 else code}")


def _stop(process: subprocess.Popen) -> None:
    """End a process and what it has started: each of both kinds of walls does it when it is asked to."""
    for ask in (process.terminate, process.kill):
        with contextlib.suppress(subprocess.TimeoutExpired):
            if process.poll() is None:
                ask()
                process.wait(PATIENCE)
    assert process.stdout is not None
    process.stdout.close()


def run_all(programs: Sequence[str], config: SandboxConfig, log: Callable = print) -> list[Outcome]:
    """Run programs, `config.workers` at a time, and log behind which walls.

    Raises:
        SandboxError: running programs is off, or the walls that the configuration requires cannot be had here.
    """
    if not config.run_code:
        raise SandboxError("evaluate.sandbox.run_code is off: programs that a model wrote are not run")
    walls = choose(config)
    log(f"sandbox: {DESCRIPTION[walls]}")
    with ThreadPoolExecutor(config.workers) as pool:
        return list(pool.map(lambda program: run(program, config, walls), programs))


def choose(config: SandboxConfig) -> str:
    """The walls that stand here, tried on a program that passes; `none` only where the configuration says so.

    Raises:
        SandboxError: says what is missing, and what to do.
    """
    complaints = []
    for walls in ("none",) if config.walls == "none" else WALLS:
        try:
            # modules that the interpreter has not loaded itself: its folder must be readable from inside
            outcome = run("import heapq, math, random, statistics\nassert math.gcd(4, 6) == 2", config, walls)
        except (SandboxError, OSError) as error:
            complaints.append(str(error))
            continue
        if outcome.status == "passed":
            return walls
        complaints.append(
            f"walls by {walls}: a program that must pass ends as {outcome.status} ({outcome.detail}); is "
            f"evaluate.sandbox.memory_mb {config.memory_mb} enough?"
        )
    raise SandboxError(
        f"programs cannot be run here: {'; '.join(complaints)}. Install bubblewrap, or run where user namespaces are "
        "allowed; evaluate.sandbox.walls: none runs programs without walls, with all that you may read and change"
    )
