"""Whether there is room: free disk, quota, and the stores' estimated size against both and against the budget."""

from __future__ import annotations

import getpass
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from kvpipe.config import Config
from kvpipe.doctor.finding import FAIL, OK, WARNING, Finding, ask
from kvpipe.doctor.workload import Workload
from kvpipe.experiment.files import GB
from kvpipe.experiment.paths import Paths

LEAST_FREE = 2 * GB
# not snakemake --directory: configuration, image and kvpipe are looked for below the working directory
ELSEWHERE = (
    "have the results on scratch: mv results <scratch>/results && ln -s <scratch>/results results   "
    "(and --bind <scratch> in the profile's apptainer-args)"
)
SMALLER = "set store.dtype: int8, store.layers: needed, or store.mode: live"


def examine_storage(config: Config, paths: Paths) -> list[Finding]:
    """Findings on disk, quota and stores."""
    work = Workload(config, paths)
    unmade = [pair for pair in work.stores if not paths.store_index(*pair).is_file()]
    sizes = {pair: work.store_bytes(*pair) for pair in unmade}
    need = float(sum(size or 0 for size in sizes.values()))
    nearest = next(path for path in (paths.root.absolute(), *paths.root.absolute().parents) if path.exists())
    known = None not in sizes.values() and not work.unread
    return [*_data(work), *_disk(nearest, need, known), *_quota(nearest, need), *_budget(config, sizes)]


def _data(work: Workload) -> Iterator[Finding]:
    if work.unread:
        detail = (
            f"{', '.join(work.unread)}: size not known before the data step; stores and memory are estimated without"
        )
        yield Finding("data", WARNING, detail, "run the data step (docs/hpc.md), then the doctor again")


def _disk(folder: Path, need: float, known: bool) -> Iterator[Finding]:
    free = shutil.disk_usage(folder).free
    stores = f"stores to make take about {need / GB:.2f} GB" if known else "the size of the stores is not known yet"
    detail = f"{free / GB:.1f} GB free under {folder}, {stores}"
    if need > free:
        yield Finding("disk", FAIL, detail, f"free some space, {SMALLER}, or {ELSEWHERE}")
    elif free < need + LEAST_FREE:
        yield Finding(
            "disk",
            WARNING,
            detail,
            f"free some space: {LEAST_FREE / GB:.0f} GB beside the stores at least",
        )
    else:
        yield Finding("disk", OK, detail)


def _quota(folder: Path, need: float) -> Iterator[Finding]:
    left = quota_left(folder)
    if left is None:
        return
    detail = f"{left / GB:.1f} GB of your quota are left there"
    if left < need + LEAST_FREE:
        fix = f"{SMALLER}, or {ELSEWHERE}"
        yield Finding("quota", FAIL if left < need else WARNING, f"{detail}, stores take about {need / GB:.2f} GB", fix)
    else:
        yield Finding("quota", OK, detail)


def quota_left(folder: Path) -> float | None:
    """Bytes until the hard limit by `lfs quota` or `quota`; None where neither knows of one."""
    user = getpass.getuser()
    # both print filesystem, used, quota, limit in kB, `*` behind what is over its quota; -p: every column is there
    for command in (("lfs", "quota", "-q", "-u", user, str(folder)), ("quota", "-w", "-p", "-u", user)):
        answer = ask(*command)
        if answer is None:
            continue
        # lfs breaks the line behind a mount point of more than 15 characters
        text = re.sub(r"^([ \t]*/\S+)[ \t]*\n", r"\1 ", answer.out, flags=re.MULTILINE)
        for line in text.splitlines():
            columns = line.replace("*", "").split()
            mounted = columns and _holds(columns[0], folder, command[0])
            if mounted and len(columns) > 3 and all(column.isdigit() for column in columns[1:4]):
                used, soft, hard = (int(column) * 1024 for column in columns[1:4])
                if hard or soft:
                    return float(max(0, (hard or soft) - used))
    return None


def _holds(name: str, folder: Path, program: str) -> bool:
    """Whether a line of the quota program is about the filesystem of a folder."""
    if program == "lfs":
        return True
    answer = ask("df", "--output=source", str(folder))
    return answer is not None and answer.out.split()[-1:] == [name]


def _budget(config: Config, sizes: dict[tuple[str, str], int | None]) -> Iterator[Finding]:
    """One finding for each store over the budget, one for all others."""
    budget = config.store.budget_gb
    known = {f"{teacher}/{reading}": size for (teacher, reading), size in sizes.items() if size is not None}
    for name, size in known.items():
        if size > budget * GB:
            fix = f"store.budget_gb: {round(1.2 * size / GB + 0.5)}, or {SMALLER}"
            yield Finding(f"store {name}", FAIL, f"about {size / GB:.2f} GB, store.budget_gb is {budget:g}", fix)
    if known and max(known.values()) <= budget * GB:
        largest = max(known, key=known.__getitem__)
        detail = f"{len(known)} to make, the largest ({largest}) about {known[largest] / GB:.2f} of store.budget_gb {budget:g}"
        yield Finding("stores", OK, detail)
    unknown = [f"{teacher}/{reading}" for (teacher, reading), size in sizes.items() if size is None]
    if unknown:
        yield Finding(
            "stores", OK, f"size of {', '.join(unknown)} known once models and data are here; the build checks it first"
        )
