"""One process that has imported the libraries, which takes seconds, and forks a child for each step of a `snakemake` call.

The Snakefile calls `start`, every `kvpipe` whose KVPIPE_SERVER is an address `delegate`: it hands over files, folder, arguments
and environment, forwards signals, and ends as the child ended. Where what a child cannot be given differs (`fixed`), the
server says so once and the step runs by itself. Nothing heavy is imported at the top.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from select import select
from typing import Any

LIBRARIES = ("kvpipe.cli.app", "kvpipe.steps.train", "kvpipe.steps.evaluate", "kvpipe.report.render", "peft")
LATER = re.compile("KVPIPE_.*|_|PWD|OLDPWD|SHLVL|TMP|TEMP|TMPDIR|TEMPDIR|JE_ARROW_MALLOC_CONF|VECLIB_MAXIMUM_THREADS")
"""Variables that nothing reads while it is imported, on Linux."""


def fixed() -> dict[str, str]:
    """What a child takes over from the process that forks it."""
    os.umask(umask := os.umask(0o22))
    limits = [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")]
    return {
        "python": f"{sys.executable} {__file__} {sys.flags}",
        "limits (ulimit)": str(limits),
        "processors": str(sorted(os.sched_getaffinity(0))),
        "priority and rights": str([os.nice(0), umask, os.getresuid(), os.getresgid(), os.getgroups()]),
        "ignored signals": str([int(n) for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN]),
        **{f"${name}": value for name, value in os.environ.items() if not LATER.fullmatch(name)},
    }


def announce(text: str) -> None:
    """A line for people."""
    print(f"kvpipe server: {text}", file=sys.stderr, flush=True)


def start(threads: int, elsewhere: str | None) -> None:
    """Start a server for steps of so many threads, if these do not run elsewhere; its address comes into KVPIPE_SERVER."""
    wanted = os.environ.pop("KVPIPE_SERVER", "")
    if wanted == "off" or (wanted != "on" and (elsewhere or "SLURM_JOB_ID" in os.environ)):
        return
    if elsewhere or not hasattr(os, "pidfd_open"):
        announce(f"none, since steps run {elsewhere or 'on a system without pidfd_open'}; each imports for itself")
        return
    os.environ["KVPIPE_SERVER"] = address = str(Path(tempfile.mkdtemp(prefix="kvpipe-")) / "socket")
    # as Snakemake sets them for each rule; and pyarrow's allocator would start a thread
    given = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "GOTO", "OPENBLAS", "MKL", "NUMEXPR")}
    given["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    lives, _ = os.pipe()  # its other end is closed with this process
    command = [sys.executable, "-m", "kvpipe", "serve", address]
    subprocess.Popen(command, stdin=lives, env=os.environ | given, start_new_session=True)
    os.close(lives)


def delegate(address: str) -> None:
    """Run this process's command line in a child of a server and end as it does; return where that cannot be."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        server.connect(address)
        given = {"argv": sys.argv, "path": sys.path, "cwd": str(Path.cwd()), "fixed": fixed()}
        given["later"] = {name: value for name, value in os.environ.items() if LATER.fullmatch(name)}
        socket.send_fds(server, [json.dumps(given).encode()], [0, 1, 2])
        if not server.recv(1):
            return  # it has said why
    except OSError as error:  # it was killed, or the environment is too long for one message
        with suppress(OSError):
            Path(address).unlink()  # whoever can remove it is the first one
            announce(f"no answer ({error}); this step and the next ones run by themselves")
        return
    # without a terminal a process does not obey SIGTSTP
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda n, _: server.send(bytes([signal.SIGSTOP if n == signal.SIGTSTP else n])))
    if (status := int(server.recv(99) or -1)) < 0:
        sys.exit("kvpipe server: it was killed, and this step with it; run it again")
    if os.WIFSIGNALED(status):
        with suppress(OSError):  # of SIGKILL
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def serve(address: str) -> None:
    """Import the libraries and fork for each step, until standard input ends. Returns in the children alone."""
    own, told = fixed(), set[str]()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(address)
    listening.listen(1024)
    for library in LIBRARIES:
        __import__(library)
    if others := len(list(Path("/proc/self/task").iterdir())) - 1:
        sys.exit(f"kvpipe server: none, since {others} threads run once the libraries are imported")
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    while 0 not in select([0, listening.fileno()], [], [])[0]:
        connection, _ = listening.accept()
        message, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
        given = json.loads(message or "{}")
        differing = {name for name, _ in own.items() ^ given.get("fixed", own).items()}
        if differing - told:
            announce(f"steps import for themselves where these differ: {', '.join(sorted(differing - told))}")
            told |= differing
        if given and not differing and os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listening.close()
            return run(given, files, connection)
        connection.close()
        for file in files:
            os.close(file)
    shutil.rmtree(Path(address).parent)
    os._exit(0)


def run(given: dict[str, Any], files: list[int], connection: socket.socket) -> None:
    """Return in a child as the process that asked; hand it signals, and hand that one its end."""
    if child := os.fork():
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # it ends with the child
        with suppress(OSError):  # of a process that has ended; the child ends with this one
            connection.send(b"+")
            ended = os.pidfd_open(child)
            while ended not in select([ended, connection.fileno()], [], [])[0]:
                os.kill(child, (connection.recv(1) or [signal.SIGKILL])[0])
            connection.send(str(os.waitpid(child, 0)[1]).encode())
        os._exit(0)
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    connection.close()
    for i, file in enumerate(files):
        os.dup2(file, i)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    os.chdir(given["cwd"])
    for name in filter(LATER.fullmatch, list(os.environ)):
        del os.environ[name]
    os.environ.update(given["later"])
    sys.argv[:], sys.path[:], tempfile.tempdir = given["argv"], given["path"], None
