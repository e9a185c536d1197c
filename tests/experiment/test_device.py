"""On a CPU freed memory is kept, unless the user has said how; `precision: auto` is what the device computes in."""

import ctypes
import subprocess
import sys

import pytest

from kvpipe.experiment import device, sizes


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


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_tile", "bf16"),
        ("flags\t\t: fpu avx2 amx_bf16", "bf16"),
        ("Features\t: fp asimd i8mm bf16", "bf16"),
        ("model name\t: Xeon bf16less\nflags\t\t: fpu avx2 avx512f avx512_fp16", "fp32"),
        (None, "fp32"),
    ],
)
def test_auto_is_bf16_where_the_processor_has_it(flags, precision, tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "CPU_INFO", tmp_path / "cpuinfo")
    if flags is not None:
        sizes.CPU_INFO.write_text(flags + "\n", encoding="utf-8")
    assert device.resolve_precision("auto", "cpu") == precision
    assert {device.resolve_precision(named, "cpu") for named in ("fp32", "bf16")} == {"fp32", "bf16"}


def test_auto_on_a_gpu_takes_no_emulated_bf16(monkeypatch):
    for native in (True, False):
        monkeypatch.setattr(
            device.torch.cuda, "is_bf16_supported", lambda including_emulation, n=native: n or including_emulation
        )
        assert device.resolve_precision("auto", "cuda:0") == ("bf16" if native else "fp32")
