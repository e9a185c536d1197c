"""On a CPU freed memory is kept, unless the user has said how; a job on a GPU leaves the allocator alone."""

import ctypes
import subprocess
import sys

import pytest

from kvpipe.experiment import device

FAULTS = """
import resource, sys, torch
from kvpipe.experiment.device import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(64 << 20, dtype=torch.uint8)
before = count()
for _ in range(5):
    torch.ones(64 << 20, dtype=torch.uint8)
print(count() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc's allocator")
def test_a_large_tensor_costs_its_pages_once():
    environment = {"PYTHONPATH": ":".join(sys.path)}
    given, kept = (
        int(
            subprocess.run([sys.executable, "-c", FAULTS, how], env=environment, capture_output=True, check=True).stdout
        )
        for how in ("plain", "keep")
    )
    assert kept < given / 5 or given < 100, "where the system hands out huge pages, there are few faults anyway"


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
