"""On a CPU freed memory is kept, unless the user has said how; a job on a GPU leaves the allocator alone."""

import ctypes
import subprocess
import sys

import pytest

from kvpipe.experiment import device


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc's allocator")
def test_glibc_takes_the_thresholds():
    """In a process of its own. What it saves is measured in docs, not here: it depends on glibc's version and the kernel."""
    code = "from kvpipe.experiment import device; assert device.resolve_device('cpu') and device.keep_freed_memory()"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=True)


@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "LD_PRELOAD"])
def test_what_the_user_has_set_stays(name, monkeypatch):
    monkeypatch.setenv(name, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "LD_PRELOAD": "libjemalloc.so.2"}[name])
    assert device.keep_freed_memory.__wrapped__() is False


def test_only_a_cpu_keeps(monkeypatch):
    asked = []
    monkeypatch.setattr(device, "keep_freed_memory", lambda: asked.append(1))
    assert device.resolve_device("cuda:0") == "cuda:0" and not asked
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: False)
    assert device.resolve_device("auto") == "cpu" and asked
