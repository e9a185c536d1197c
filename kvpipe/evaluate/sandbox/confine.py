"""Run one program behind walls: the text that `kvpipe.evaluate.sandbox.run` starts in a process of its own.

Standard library only.

Reads a request (JSON) from standard input and writes lines of JSON to standard output: `started` when the walls stand,
then the verdict. Both carry a secret of the request, so that what a program prints is not taken for them. The walls:

1. namespaces (mount, network, process, IPC; user, where it is not root who starts them): a root directory that holds the
   interpreter and the system's libraries, read-only, and an empty `/tmp` of `FOLDER_MB`; no network; no other process.
   `bwrap` has built them already, or `separate` does it;
2. resource limits: address space, CPU time, no further process or thread, file size, open files, no core file;
3. no rights: no capability, none to be had by a set-user-id program, another user where root starts it, and a filter of
   system calls without new processes, new namespaces and the kernel's key rings.
"""

import ctypes
import json
import linecache
import math
import os
import resource
import signal
import struct
import sys
import types
from pathlib import Path

FOLDER_MB = 64
OPEN_FILES = 64
DETAIL = 500
DEVICES = ["/dev/null", "/dev/zero", "/dev/urandom"]
# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>, <linux/seccomp.h>
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV = 4096, 16384, 1 << 18, 2, 4
AT_FDCWD, AT_RECURSIVE, ATTR_RDONLY, SYS_MOUNT_SETATTR = -100, 0x8000, 1, 442
PDEATHSIG, SECCOMP, FILTER, NO_NEW_PRIVS = 1, 22, 2, 38
CAPABILITY_VERSION = 0x20080522
REFUSED = {
    "x86_64": (0xC000003E, (56, 57, 58, 248, 249, 250, 272, 308, 435)),
    "aarch64": (0xC00000B7, (220, 217, 218, 219, 97, 268, 435)),
}
"""Machine → its number in <linux/audit.h>, and (v)fork, clone, add_key, request_key, keyctl, unshare, setns, clone3."""


def _call(function, *arguments):
    if function(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{function.__name__}: {os.strerror(ctypes.get_errno())}")


# ---------------------------------------------------------------- namespaces
def separate(libc, root: str, shown: list[str]) -> None:
    """Leave the namespaces of the machine for a root directory that shows `shown`; raises OSError where it may not be."""
    user, group = os.getuid(), os.getgid()
    _call(libc.unshare, NEWNS | NEWNET | NEWIPC | NEWPID | (NEWUSER if user else 0))
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            Path("/proc/self", name).write_text(text)
    _call(libc.mount, None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
    own = Path(root, "tmp")
    for folder, mode in ((Path(root), "755"), (own, "1777")):
        folder.mkdir(exist_ok=True)
        options = f"size={FOLDER_MB}m,mode={mode}".encode()
        _call(libc.mount, b"tmpfs", bytes(folder), b"tmpfs", ctypes.c_ulong(MS_NOSUID | MS_NODEV), options)
    os.umask(0o022)
    for path in map(Path, shown):
        target = Path(root + str(path))
        if not path.exists() or target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.mkdir() if path.is_dir() else target.touch()
        _call(libc.mount, bytes(path), bytes(target), None, ctypes.c_ulong(MS_BIND | MS_REC), None)
    read_only(libc, Path(root))
    read_only(libc, own, 0)
    os.chroot(root)
    os.chdir("/tmp")


def read_only(libc, path: Path, on: int = 1) -> None:
    """What is mounted there, and below, can be changed by nobody; with 0 that mount alone can be again."""
    attributes = struct.pack("4Q", ATTR_RDONLY * on, ATTR_RDONLY * (1 - on), 0, 0)
    _call(libc.syscall, SYS_MOUNT_SETATTR, AT_FDCWD, bytes(path), AT_RECURSIVE * on, attributes, ctypes.c_size_t(32))


def fork(libc) -> None:
    """Go on as the first process of the new namespace; this one waits, and ends as that one does."""
    child = os.fork()
    if child == 0:
        return
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    libc.prctl(PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


# ---------------------------------------------------------------- limits
def limit(libc, user: int, seconds: float, memory_mb: int) -> None:
    """Give up rights and resources; nothing of it can be taken back."""
    cpu, memory, file = math.ceil(seconds), memory_mb << 20, FOLDER_MB << 20
    # XCPU at the limit, which says why; KILL a second later for a program that ignores it
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    limits = {"AS": memory, "FSIZE": file, "NOFILE": OPEN_FILES, "CORE": 0, "NPROC": 0}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if libc is None:
        return
    _call(libc.capset, struct.pack("Ii", CAPABILITY_VERSION, 0), bytes(24))
    _call(libc.prctl, NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0)))
    if os.uname().machine in REFUSED:
        code = seccomp(*REFUSED[os.uname().machine])
        _call(libc.prctl, SECCOMP, ctypes.c_ulong(FILTER), struct.pack("HP", len(code) // 8, _address(code)), 0, 0)
    elif user == 0:
        raise OSError("root may start processes without limit, and on this machine no filter of system calls is known")


def seccomp(machine: int, refused: tuple[int, ...]) -> bytes:
    """The filter: those system calls fail with EAGAIN, as at the limit on processes."""
    steps = [
        (0x20, 0, 0, 4),
        (0x15, 0, len(refused) + 3, machine),
        (0x20, 0, 0, 0),
    ]  # another machine's numbers: refused
    steps += [(0x35, len(refused) + 1, 0, 0x40000000)]  # x32's too
    steps += [(0x15, len(refused) - i, 0, number) for i, number in enumerate(refused)]
    steps += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x50000 | 11)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def _address(block: bytes) -> int | None:
    return ctypes.cast(ctypes.c_char_p(block), ctypes.c_void_p).value


# ---------------------------------------------------------------- the program
def run(program: str) -> tuple[str, str]:
    """Execute the program; `passed` only if it comes to its end."""
    # dataclasses, pickle, doctest, unittest and inspect look a program up where an imported or started one would be
    module = types.ModuleType("solution")
    module.__file__ = "<program>"
    sys.modules["solution"] = sys.modules["__main__"] = module
    linecache.cache["<program>"] = (len(program), None, program.splitlines(keepends=True), "<program>")
    try:
        exec(compile(program, "<program>", "exec"), module.__dict__)
    except MemoryError:
        return "failed", "MemoryError"
    except BaseException as error:  # SystemExit too: a program that ends before its tests has not passed them
        return "failed", f"{type(error).__name__}: {error}"[:DETAIL]
    return "passed", ""


def main() -> None:
    """Answer one request; what fails before the walls stand is a traceback, and no `started`."""
    request = json.loads(sys.stdin.buffer.read())
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if request["walls"] == "own":
        if libc is None:
            raise OSError("no Linux")
        separate(libc, request["folder"], request["shown"])
        fork(libc)
    elif request["walls"] == "bwrap" and os.getuid() == 0:
        for device in filter(os.path.exists, DEVICES):  # bwrap shows a device writable or not at all
            read_only(libc, Path(device))
    else:
        os.chdir(request["folder"] if request["walls"] == "none" else "/tmp")
    limit(libc, request["user"], request["seconds"], request["memory_mb"])
    answer, devnull = os.dup(1), os.open(os.devnull, os.O_RDWR)

    def tell(status: str, detail: str = "") -> None:
        said = {"secret": request["secret"], "status": status, "detail": detail}
        os.write(answer, b"\n" + json.dumps(said).encode() + b"\n")

    tell("started")
    for standard in (0, 1, 2):
        os.dup2(devnull, standard)
    tell(*run(request["program"]))
    os._exit(0)


if __name__ == "__main__":
    main()
