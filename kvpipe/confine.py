"""Run one program confined: the script that `kvpipe.sandbox` starts in a process of its own. Standard library only.

Reads a request (JSON) from standard input, writes a verdict (JSON) to standard output. What confines the program:

1. a user, mount, network, process and IPC namespace (Linux, where the kernel allows it): a root directory that holds
   nothing but the interpreter, read-only, and an empty folder of `FOLDER_MB`; no network device; no other process;
2. resource limits: address space, CPU time, no further process or thread, file size, open files, no core file;
3. another user (`nobody`), where it was started as root;
4. an audit hook, which can not be taken off: no sockets, processes or ctypes, no files beyond the interpreter and the folder.

Verdicts carry a secret of the request, so that what a program prints cannot be taken for one. The first counts: the
program's process writes it when the program has come to its end, the process that waits for it when it has not.
"""

import ctypes
import json
import math
import os
import resource
import signal
import sys
from pathlib import Path

NOBODY = 65534
FOLDER_MB = 64
OPEN_FILES = 64
DETAIL = 500
CLOCK = 3
"""A program may take so many times its CPU seconds by the clock: other work on the machine does not make it wrong."""
# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV = 4096, 16384, 1 << 18, 2, 4
AT_FDCWD, AT_RECURSIVE, ATTR_RDONLY = -100, 0x8000, 1
SYS_MOUNT_SETATTR = 442
PDEATHSIG, NO_NEW_PRIVS = 1, 38
CAPABILITY_VERSION = 0x20080522
INTERPRETER = sorted({sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix})
SYSTEM = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero", "/dev/urandom"]


def _call(function, *arguments):
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


# ---------------------------------------------------------------- namespaces
def separate(libc, folder: str) -> None:
    """Leave the namespaces of the machine and make `folder` the root directory; raises OSError where it may not be."""
    user, group = os.getuid(), os.getgid()
    flags = NEWNS | NEWNET | NEWIPC | NEWPID | (NEWUSER if user else 0)
    _call(libc.unshare, flags)
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            Path("/proc/self", name).write_text(text)
    mount = libc.mount
    _call(mount, None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
    options = f"size={FOLDER_MB}m,mode=755".encode()
    _call(mount, b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(MS_NOSUID | MS_NODEV), options)
    for path in [*SYSTEM, *INTERPRETER]:
        _show(libc, path, folder)
    Path(folder, "tmp").mkdir()
    Path(folder, "tmp").chmod(0o777)
    os.chroot(folder)
    os.chdir("/tmp")


def _show(libc, path: str, root: str) -> None:
    """Make a file or folder of the machine visible under the new root, read-only."""
    source, target = Path(path), Path(root + path)
    if not source.exists() or target.exists() or target.is_symlink():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink() and source.is_dir():
        target.symlink_to(source.readlink())
        return
    if source.is_dir():
        target.mkdir()
    else:
        target.touch()
    _call(libc.mount, path.encode(), bytes(target), None, ctypes.c_ulong(MS_BIND | MS_REC), None)
    attributes = (ctypes.c_uint64 * 4)(ATTR_RDONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    if libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, bytes(target), AT_RECURSIVE, ctypes.byref(attributes), size) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount_setattr: {os.strerror(number)}")


# ---------------------------------------------------------------- limits
def limit(libc, seconds: float, memory_mb: int) -> None:
    """Give up rights and resources; nothing of it can be taken back."""
    memory, cpu = memory_mb << 20, math.ceil(seconds)
    # XCPU at the limit, which says why; KILL a second later for a program that ignores it
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: FOLDER_MB << 20,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))
    if os.getuid() == 0:
        # root is exempt from the limit on processes
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    if libc is not None:
        header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
        _call(libc.capset, ctypes.byref(header), ctypes.byref(none))
        _call(libc.prctl, NO_NEW_PRIVS, 1, 0, 0, 0)
        _call(libc.prctl, PDEATHSIG, signal.SIGKILL, 0, 0, 0)


DENIED = (
    "socket.", "subprocess.", "ctypes.", "os.exec", "os.fork", "os.forkpty", "os.kill", "os.posix_spawn", "os.spawn",
    "os.system", "os.startfile", "pty.spawn", "gc.get_", "sys._current_frames", "sys.setprofile", "sys.settrace",
    "syslog.", "code.__new__",
)  # fmt: skip
CHANGES = (
    "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate",
    "os.utime", "os.setxattr", "os.removexattr", "os.chflags", "os.lockf", "shutil.",
)  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def watch(folder: str) -> None:
    """An audit hook that refuses what a program under test has no business with."""
    readable = [os.path.realpath(path) for path in (*INTERPRETER, *SYSTEM)]
    own = os.path.realpath(folder)
    realpath, fsdecode = os.path.realpath, os.fsdecode

    def within(path, roots) -> bool:
        real = realpath(fsdecode(path))
        return any(real == root or real.startswith(root.rstrip("/") + "/") for root in roots)

    def hook(event, arguments):
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, int) or path is None:
                return
            writes = bool((flags or 0) & WRITES) or any(letter in (mode or "") for letter in "wax+")
            if not within(path, [own] if writes else [own, *readable]):
                raise PermissionError(f"the sandbox does not let a program open {path!r}")
        elif event.startswith(DENIED):
            raise PermissionError(f"the sandbox does not let a program use {event}")
        elif event.startswith(CHANGES):
            paths = [a for a in arguments if isinstance(a, (str, bytes)) or hasattr(a, "__fspath__")]
            if not all(within(path, [own]) for path in paths):
                raise PermissionError(f"the sandbox does not let a program use {event} on {paths}")

    sys.addaudithook(hook)


# ---------------------------------------------------------------- the program
def run(program: str) -> tuple[str, str]:
    """Execute the program; `passed` only if it comes to its end."""
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "solution"})
    except MemoryError:
        return "failed", "MemoryError"
    except BaseException as error:  # SystemExit too: a program that ends before its tests has not passed them
        return "failed", f"{type(error).__name__}: {error}"[:DETAIL]
    return "passed", ""


def main() -> None:
    """Answer one request."""
    request = json.loads(sys.stdin.buffer.read())
    folder, answer = request["folder"], os.dup(1)
    devnull = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(devnull, standard)
    libc, unconfined = None, "not Linux"
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            if not request["namespaces"]:
                raise OSError("not asked for")
            separate(libc, folder)
            unconfined, folder = "", "/tmp"
        except OSError as error:
            unconfined = f"{error.strerror or error}"
            os.chdir(folder)
    seconds, secret = request["seconds"], request["secret"]

    def tell(status: str, detail: str) -> None:
        verdict = {"secret": secret, "status": status, "detail": detail, "unconfined": unconfined}
        os.write(answer, b"\n" + json.dumps(verdict).encode() + b"\n")

    child = os.fork()  # the first process of the new process namespace
    if child == 0:
        limit(libc, seconds, request["memory_mb"])
        watch(folder)
        tell(*run(request["program"]))
        os._exit(0)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, CLOCK * seconds)
    _, status, usage = os.wait4(child, 0)
    alarmed = signal.setitimer(signal.ITIMER_REAL, 0)[0] == 0
    out_of_time = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
    # the limit counts ticks, the usage does not: on a busy machine they differ
    if alarmed or out_of_time or usage.ru_utime + usage.ru_stime > 0.9 * seconds:
        tell("timeout", f"no end within {seconds:g} s")
    else:
        tell("killed", f"ended before its end: {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
