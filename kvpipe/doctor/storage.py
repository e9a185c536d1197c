"""Whether there is room: free disk, quota, and the stores' estimated size against both and against the budget."""

from __future__ import annotations

import getpass
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from kvpipe.doctor.finding import FAIL, OK, WARNING, Finding, ask
from kvpipe.doctor.workload import Workload
from kvpipe.experiment.files import GB

LEAST_FREE = 2 * GB
# not snakemake --directory: configuration, image and kvpipe are looked for below the working directory
ELSEWHERE = (
    "have the results on scratch: mv results <scratch>/results && ln -s <scratch>/results results   "
    "(where jobs run in an image, also --bind <scratch>)"
)
SMALLER = "set store.dtype: int8, store.layers: needed, or store.mode: live"


def check_storage(work: Workload) -> Iterator[Finding]:
    """Findings on disk, quota and stores."""
    sizes = {pair: work.store_bytes(*pair) for pair in work.missing_stores}
    need = float(sum(size or 0 for size in sizes.values()))
    root = work.paths.root.absolute()
    folder = next(path for path in (root, *root.parents) if path.exists())
    if work.unread:
        detail = (
            f"{', '.join(work.unread)}: size not known before the data step; stores and memory are estimated without"
        )
        yield Finding("data", WARNING, detail, "run the data step (docs/hpc.md), then the doctor again")
    free, left = float(shutil.disk_usage(folder).free), quota_left(folder)
    stores = f"stores to make take about {need / GB:.2f} GB"
    unknown = None in sizes.values() or bool(work.unread)
    detail = (
        f"{free / GB:.1f} GB free under {folder}, {'the size of the stores is not known yet' if unknown else stores}"
    )
    yield _room("disk", free, need, detail)
    if left is not None:
        yield _room("quota", left, need, f"{left / GB:.1f} GB of your quota are left there, {stores}")
    yield from _budget(work.config.store.budget_gb, sizes)


def _room(name: str, room: float, need: float, detail: str) -> Finding:
    if room >= need + LEAST_FREE:
        return Finding(name, OK, detail)
    if room >= need:
        return Finding(name, WARNING, detail, f"free some space: {LEAST_FREE / GB:.0f} GB beside the stores at least")
    return Finding(name, FAIL, detail, f"free some space, {SMALLER}, or {ELSEWHERE}")


def quota_left(folder: Path) -> float | None:
    """Bytes until the hard limit by `lfs quota` or `quota`; None where neither knows of one."""
    user = getpass.getuser()
    device = ask("df", "--output=source", str(folder)).stdout.split()[-1:]
    # both print filesystem, used, quota, limit in kB, `*` behind what is over its quota; -p: every column is there
    for command in (("lfs", "quota", "-q", "-u", user, str(folder)), ("quota", "-w", "-p", "-u", user)):
        # lfs breaks the line behind a mount point of more than 15 characters
        text = re.sub(r"^([ \t]*/\S+)[ \t]*\n", r"\1 ", ask(*command).stdout, flags=re.MULTILINE)
        for line in text.splitlines():
            name, *columns = line.replace("*", "").split() or [""]
            holds = command[0] == "lfs" or [name] == device
            if holds and len(columns) > 2 and all(column.isdigit() for column in columns[:3]):
                used, soft, hard = (int(column) * 1024 for column in columns[:3])
                if hard or soft:
                    return float(max(0, (hard or soft) - used))
    return None


def _budget(budget: float, sizes: dict[tuple[str, Reading], int | None]) -> Iterator[Finding]:
    """One finding for each store over the budget, one for all others."""
    known = {"/".join(pair): size for pair, size in sizes.items() if size is not None}
    for name, size in known.items():
        if size > budget * GB:
            fix = f"store.budget_gb: {round(1.2 * size / GB + 0.5)}, or {SMALLER}"
            yield Finding(f"store {name}", FAIL, f"about {size / GB:.2f} GB, store.budget_gb is {budget:g}", fix)
    if known and max(known.values()) <= budget * GB:
        largest = max(known, key=known.__getitem__)
        detail = f"{len(known)} to make, the largest ({largest}) about {known[largest] / GB:.2f} of store.budget_gb {budget:g}"
        yield Finding("stores", OK, detail)
    if unknown := ["/".join(pair) for pair, size in sizes.items() if size is None]:
        detail = f"size of {', '.join(unknown)} known once models and data are here; the build checks it first"
        yield Finding("stores", OK, detail)
