"""What a machine shows of its GPU; run as a script, one line of JSON. Standard library only; torch if it is there.

Its text is also handed to `python3 -c` in a job, where kvpipe need not be installed.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess

MARK = "kvpipe-probe "
QUERIES = ("name,driver_version,memory.total,compute_cap", "name,driver_version,memory.total")
"""Drivers before 510 do not know compute_cap and refuse the whole question."""


def nvidia() -> dict | None:
    """The first GPU by nvidia-smi."""
    for query in QUERIES:
        try:
            command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
            out = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
            break
        except (OSError, subprocess.SubprocessError):
            continue
    else:
        return None
    columns = [part.strip() for part in (out.splitlines() or [""])[0].split(",")]
    if len(columns) < 3:  # "No devices were found", which some drivers say with exit status 0
        return None
    name, driver, memory, *capability = columns
    # a card that shares the host's memory has none of its own to tell
    size = int(memory) * 2**20 if memory.isdigit() else None
    return {"name": name, "driver": driver, "capability": capability[0] if capability else None, "memory": size}


def look() -> dict:
    """Host, GPU and torch."""
    seen: dict = {
        "host": platform.node(),
        "python": platform.python_version(),
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "gpu": nvidia(),
        "torch": None,
    }
    try:
        import torch
    except ImportError:
        return seen
    seen["torch"] = torch.__version__
    if seen["gpu"] is not None:
        seen["gpu"] |= {"torch_cuda": torch.version.cuda, "available": torch.cuda.is_available()}
    return seen


if __name__ == "__main__":
    print(MARK + json.dumps(look()))
