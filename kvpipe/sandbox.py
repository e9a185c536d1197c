"""Programs that a model wrote, run in processes of their own: `kvpipe.confine` says how they are confined."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kvpipe import confine
from kvpipe.config import SandboxConfig

ANSWER = 8192
"""Longest verdict in bytes; who writes more is stopped."""
STARTED = 20.0
"""Seconds beside a program's own: starting an interpreter on a busy machine."""


class SandboxError(RuntimeError):
    """Programs cannot be run here."""


@dataclass(frozen=True)
class Outcome:
    """`passed`, `failed` (with the error), `timeout` or `killed` (it ended without coming to its end).

    `unconfined` says why namespaces could not be used; empty where they were.
    """

    status: str
    detail: str = ""
    unconfined: str = ""


def run(program: str, config: SandboxConfig, namespaces: bool = True) -> Outcome:
    """Run one program to its end; every way of not reaching it is a failure."""
    secret = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="kvpipe-program-") as folder:
        if os.getuid() == 0:
            os.chown(folder, confine.NOBODY, confine.NOBODY)
        request = {
            "program": program,
            "folder": folder,
            "seconds": config.seconds,
            "memory_mb": config.memory_mb,
            "namespaces": namespaces,
            "secret": secret,
        }
        answer = _ask(json.dumps(request).encode(), confine.CLOCK * config.seconds + STARTED)
    for line in answer.splitlines():
        try:
            verdict = json.loads(line)
        except ValueError:
            continue
        if isinstance(verdict, dict) and secrets.compare_digest(str(verdict.pop("secret", "")), secret):
            return Outcome(**verdict)
    return Outcome("killed", "the process gave no verdict")


def _ask(request: bytes, seconds: float) -> bytes:
    """What the process answers until it ends, or is stopped because it takes or writes too much."""
    # nothing of this process's environment: tokens are in it
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-I", "-B", confine.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    answer, deadline = b"", time.monotonic() + seconds
    try:
        process.stdin.write(request)
        process.stdin.close()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while len(answer) < ANSWER and selector.select(max(0.0, deadline - time.monotonic())):
                block = os.read(process.stdout.fileno(), ANSWER)
                if not block:
                    break
                answer += block
    except BrokenPipeError:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()
    return answer


def run_all(programs: Sequence[str], config: SandboxConfig, log: Callable = print) -> list[Outcome]:
    """Run programs, `config.workers` at a time, and log how they are confined.

    Raises:
        SandboxError: running programs is off, or does not work here.
    """
    if not config.run_code:
        raise SandboxError("evaluate.sandbox.run_code is off: programs that a model wrote are not run")
    log(check(config))
    with ThreadPoolExecutor(config.workers) as pool:
        return list(pool.map(lambda program: run(program, config), programs))


def check(config: SandboxConfig) -> str:
    """Try the sandbox on a program that passes; returns a sentence on how programs are confined here.

    Raises:
        SandboxError: the program does not pass.
    """
    # modules that the confining process has not loaded itself: the interpreter's folder must be readable from inside
    outcome = run("import heapq, math, random, statistics\nassert math.gcd(4, 6) == 2", config)
    if outcome.status != "passed":
        raise SandboxError(
            f"programs cannot be run here: a program that must pass ends as {outcome.status} ({outcome.detail}); "
            f"is evaluate.sandbox.memory_mb {config.memory_mb} enough, and {sys.prefix} readable by every user?"
        )
    if outcome.unconfined:
        return (
            f"sandbox: namespaces are not available here ({outcome.unconfined}): NETWORK AND FILES ARE CLOSED TO PROGRAMS BY "
            "PYTHON'S AUDIT HOOK ONLY, which native code can pass; resource limits hold"
        )
    return "sandbox: programs run without network, in a root directory of their own, under resource limits"
