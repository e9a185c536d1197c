"""What the cluster says of itself, and whether the jobs that the profile asks for can run on it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from kvpipe.doctor import FAIL, OK, WARNING, Finding, Workload
from kvpipe.doctor.finding import ask, last_line
from kvpipe.experiment.launch import in_job
from kvpipe_cluster.profile import Profile, Request, parse_gpus, profile_of

POLL = 40
"""Seconds before the executor's first status check, if the profile does not say."""
LONGEST_POLL = 180
"""Seconds to which the executor's interval grows, by ten after every check that found no job ended."""
MARGIN = 60
"""Seconds that a check may be late: squeue's own time, and the controller's while it is busy."""
SQUEUE_LINE = "slurm-status-command: squeue"


@dataclass(frozen=True)
class Partition:
    """One partition; sizes are those of its largest node."""

    name: str
    up: bool
    cpus: int
    mem_mb: int
    minutes: int | None
    """Time limit; None is none."""
    gpus: dict[str, int] = field(default_factory=dict)
    """Type → GPUs of a node; the type is empty where the site names none."""
    default: bool = False
    preempt_mode: str = "OFF"


def check_slurm(work: Workload) -> Iterator[Finding]:
    """Findings on the cluster; one of them, ok, where there is none."""
    if in_job():
        yield Finding("slurm", OK, "inside a job or an image: the cluster is examined from the login node only")
        return
    version, config = ask("sbatch", "--version"), ask("scontrol", "show", "config")
    if version.returncode == 127:
        yield Finding("slurm", OK, "no sbatch on the PATH: jobs run on this machine")
    elif config.returncode:
        detail = f"{version.stdout.strip()}, but the controller does not answer: {last_line(config)}"
        yield Finding("slurm", FAIL, detail, "module load slurm, or ask the site: `scontrol ping` must say UP")
    else:
        settings, partitions, profile = parse_config(config.stdout), read_partitions(), profile_of(work)
        yield from _programs(version.stdout.strip())
        yield from _status_command(settings, profile)
        yield from _account(settings, profile)
        yield from _preemption(settings, partitions, profile)
        yield from _partitions(partitions, profile)
        yield from _requests(partitions, profile)


# ---------------------------------------------------------------- reading
def parse_config(text: str) -> dict[str, str]:
    """`scontrol show config` as a mapping."""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def read_partitions() -> list[Partition]:
    """Partitions from sinfo (nodes) and scontrol (default, preemption)."""
    # one line per partition and kind of node: %R without the default's asterisk
    nodes = ask("sinfo", "--noheader", "--format", "%R|%a|%c|%m|%l|%G")
    described = ask("scontrol", "--oneliner", "show", "partition")
    more: dict[str, dict[str, str]] = {}
    for line in described.stdout.splitlines():
        pairs = dict(item.split("=", 1) for item in line.split() if "=" in item)
        more[pairs.get("PartitionName", "")] = pairs
    found: dict[str, Partition] = {}
    for line in (line for line in nodes.stdout.splitlines() if line.count("|") == 5):
        name, up, cpus, memory, limit, gres = line.strip().split("|")
        said = more.get(name, {})
        seen = found.get(name) or Partition(name, up == "up", 0, 0, parse_minutes(limit))
        gpus = {kind: max(count, seen.gpus.get(kind, 0)) for kind, count in parse_gpus(gres).items()}
        found[name] = replace(
            seen,
            cpus=max(_count(cpus), seen.cpus),
            mem_mb=max(_count(memory), seen.mem_mb),
            gpus=seen.gpus | gpus,
            default=said.get("Default") == "YES",
            preempt_mode=said.get("PreemptMode", "OFF"),
        )
    return list(found.values())


def _count(text: str) -> int:
    """`16`, or `16+` where nodes differ."""
    return int(re.sub(r"\D.*", "", text) or 0)


def parse_minutes(limit: str) -> int | None:
    """`1-12:00:00`, `2:00:00`, `30:00`, `infinite` → minutes, None without a limit."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit.strip())
    if not found:
        return None
    days, hours, minutes = (int(part or 0) for part in found.groups()[:3])
    return days * 1440 + hours * 60 + minutes


# ---------------------------------------------------------------- findings
def _programs(version: str) -> Iterator[Finding]:
    queue = ask("squeue", "--noheader", "--me")
    if queue.returncode:
        detail = f"{version}; squeue: {last_line(queue)}"
        yield Finding("slurm", FAIL, detail, "load the module that has the Slurm commands")
    else:
        yield Finding("slurm", OK, f"{version}, {len(queue.stdout.splitlines())} jobs of yours in the queue")


def _status_command(config: dict[str, str], profile: Profile) -> Iterator[Finding]:
    """Whether the executor learns that a job has ended; where it does not, it waits for ever."""
    # without slurmdbd it is accounting_storage/none, since Slurm 23 shown as (null)
    accounting = config.get("AccountingStorageType", "(null)") not in ("accounting_storage/none", "(null)", "none")
    has_sacct = shutil.which("sacct") is not None
    # without it the executor takes squeue, whatever the profile says
    command = profile.settings.get("slurm-status-command", "sacct") if has_sacct else "squeue"
    state = "accounting is on" if accounting else "accounting is off"
    if command == "sacct":
        if not accounting:
            detail = "accounting is off, but the executor would ask sacct: it would lose its jobs and wait for ever"
            yield Finding("accounting", FAIL, detail, f"in the profile: {SQUEUE_LINE}")
        else:
            detail = f"{state}, the executor asks sacct, by which `CANCELLED by <user>` is a job that still runs"
            yield Finding("accounting", WARNING, detail, f"in the profile: {SQUEUE_LINE}")
        return
    yield Finding("accounting", OK, f"{state}, the executor asks squeue")
    yield _min_job_age(_count(config.get("MinJobAge", "0")), profile, has_sacct, accounting)


def _min_job_age(age: int, profile: Profile, has_sacct: bool, accounting: bool) -> Finding:
    """Whether the executor, by squeue, still finds a job that has ended: one that is not there counts as running."""
    poll = int(profile.settings.get("slurm-init-seconds-before-status-checks", POLL))
    apart = max(poll, LONGEST_POLL)
    least = apart + MARGIN
    falls_back = has_sacct and age < 3 * poll  # the executor's own rule, by which it prefers sacct
    first = f"{age} s is less than 3 × {poll} s, the first status check: the executor"
    use_sacct = "in the profile: slurm-status-command: sacct"
    # 0: nothing is ever forgotten
    if not falls_back and (age == 0 or age >= least):
        detail = f"{age} s, status checks begin after {poll} s and are {apart} s apart at most"
        return Finding("MinJobAge", OK, detail)
    if falls_back and accounting:
        return Finding("MinJobAge", WARNING, f"{first} asks sacct all the same", use_sacct)
    if falls_back and age >= LONGEST_POLL + MARGIN:
        line = f"in the profile: slurm-init-seconds-before-status-checks: {age // 3}"
        return Finding("MinJobAge", FAIL, f"{first} would fall back on sacct, which is off, and wait for ever", line)
    detail = f"finished jobs leave squeue after {age} s, status checks are up to {apart} s apart: the executor would "
    site = (
        f"ask the site for MinJobAge = 300, or for accounting (slurmdbd): no line of the profile helps below {least} s"
    )
    fix = use_sacct if accounting and has_sacct else site
    return Finding("MinJobAge", FAIL, f"{detail}miss a job's end and wait for ever", fix)


def _account(config: dict[str, str], profile: Profile) -> Iterator[Finding]:
    named = {r.resources["slurm_account"] for r in profile.requests if r.resources.get("slurm_account")}
    accounting = "slurmdbd" in config.get("AccountingStorageType", "")
    if named and not accounting:
        detail = f"the profile names slurm_account {', '.join(sorted(map(str, named)))}, which no slurmdbd knows here"
        yield Finding("account", FAIL, detail, "take slurm_account out of the profile")


def _preemption(config: dict[str, str], partitions: list[Partition], profile: Profile) -> Iterator[Finding]:
    wanted = {str(r.resources.get("slurm_partition", "")) for r in profile.requests} - {""}
    used = [p for p in partitions if (p.name in wanted if wanted else p.default)]
    modes = {p.name: p.preempt_mode.upper() for p in used}
    overall = config.get("PreemptMode", "OFF").upper()
    # GANG may stand beside each of them
    deadly = [name for name, mode in modes.items() if "CANCEL" in mode.split(",")]
    requeued = any("REQUEUE" in mode.split(",") for mode in modes.values() or [overall])
    requeue = profile.settings.get("slurm-requeue")
    shown = ", ".join(f"{name} {mode}" for name, mode in modes.items()) or overall
    if overall == "OFF":
        yield Finding("preemption", OK, "jobs are not preempted")
    elif deadly or ("CANCEL" in overall.split(",") and not modes):
        detail = f"PreemptMode CANCEL ({', '.join(deadly) or 'everywhere'}): the executor waits for ever for such a job"
        fix = "in the profile: slurm_partition=… one that is not preempted, or ask the site for PreemptMode=REQUEUE"
        yield Finding("preemption", FAIL, detail, fix)
    elif requeued and config.get("JobRequeue", "1") == "0" and not requeue:
        detail = f"JobRequeue = 0: a preempted job ({shown}) is cancelled, and the executor waits for ever for it"
        yield Finding("preemption", FAIL, detail, "in the profile: slurm-requeue: true")
    else:
        detail = f"jobs may be preempted ({shown}); a requeued cell goes on from its checkpoint"
        yield Finding(
            "preemption", OK if requeue else WARNING, detail, "" if requeue else "in the profile: slurm-requeue: true"
        )


def _partitions(partitions: list[Partition], profile: Profile) -> Iterator[Finding]:
    if not partitions:
        yield Finding("partitions", FAIL, "sinfo shows none", "ask the site which partitions you may use")
        return
    shown = "; ".join(map(show, partitions))
    if any(r.gpus for r in profile.requests) and not any(p.gpus for p in partitions):
        fix = "take gpu out of the profile's set-resources, or ask the site for a partition with GPUs"
        yield Finding("partitions", FAIL, f"none has GPUs, which the profile asks for: {shown}", fix)
    else:
        yield Finding("partitions", OK, shown)


def show(partition: Partition) -> str:
    """One partition in words."""
    gpus = ", ".join(f"{count} GPU{f' {kind}' if kind else ''}" for kind, count in partition.gpus.items())
    limit = "no time limit" if partition.minutes is None else f"{partition.minutes / 60:g} h"
    marks = f"{' (default)' if partition.default else ''}{'' if partition.up else ' (down)'}"
    return f"{partition.name}{marks}: {partition.cpus} CPUs, {partition.mem_mb} MB, {gpus or 'no GPU'}, {limit}"


def _requests(partitions: list[Partition], profile: Profile) -> Iterator[Finding]:
    refused: dict[tuple[str, str], list[str]] = {}
    for request in profile.requests:
        problem = refusal(request, partitions, profile.attempts)
        if problem:
            refused.setdefault(problem, []).append(request.rule)
    for (detail, fix), rules in refused.items():
        yield Finding("requests", FAIL, f"{', '.join(rules)}: {detail}", fix)
    unread = {f"{r.rule} {key}: {value}" for r in profile.requests for key, value in r.unread.items()}
    if unread:
        detail = (
            f"{'; '.join(sorted(unread))}: not known before the job is submitted, so not compared with the partitions"
        )
        yield Finding("requests", WARNING, detail, "numbers, or expressions of `attempt` and `threads`, can be")
    if profile.requests and partitions and not refused and not unread:
        yield Finding("requests", OK, f"every rule's job fits into its partition ({len(profile.requests)} rules)")


def refusal(request: Request, partitions: list[Partition], attempts: Iterable[int] = (1,)) -> tuple[str, str] | None:
    """Why Slurm would refuse the job at one of its attempts or leave it pending, and the fix; None where it fits."""
    if not partitions:
        return None
    name = request.resources.get("slurm_partition")
    names = str(name).split(",") if name else []
    found = [p for p in partitions if (p.name in names if names else p.default)]
    if not found:
        known = ", ".join(p.name for p in partitions)
        what = f"no partition {name}" if name else "no partition is the default and the profile names none"
        return what, f"in the profile under default-resources: slurm_partition={partitions[0].name}   # of: {known}"
    for attempt in attempts:
        problems = [_unfit(request.at(attempt), partition) for partition in found]
        if problems[0] is not None and None not in problems:
            detail, fix = problems[0]
            return f"{detail}{f' (attempt {attempt})' if attempt > 1 else ''}", fix
    return None


def _unfit(request: Request, partition: Partition) -> tuple[str, str] | None:
    mem, minutes = request.number("mem_mb") or 0, request.number("runtime") or 0
    where = f"partition {partition.name}"
    if not partition.up:
        return f"{where} is down", "name another: slurm_partition=…"
    problem = _unfit_gpus(request, partition, where)
    if problem:
        return problem
    if request.cpus > partition.cpus:
        fix = f"cpus_per_task: {partition.cpus} in the profile, or fewer train.threads"
        return f"asks for {request.cpus} CPUs, a node of {where} has {partition.cpus}", fix
    if mem > partition.mem_mb:
        fix = f"in the profile: {_capped(request, 'mem_mb', partition.mem_mb)}"
        return f"asks for {mem} MB, a node of {where} has {partition.mem_mb}", fix
    if partition.minutes is not None and minutes > partition.minutes:
        note = "   # a cell goes on from its checkpoint in the next attempt" if request.rule == "train" else ""
        fix = f"in the profile: {_capped(request, 'runtime', partition.minutes)}{note}"
        return f"asks for {minutes} min, {where} allows {partition.minutes}", fix
    return None


def _unfit_gpus(request: Request, partition: Partition, where: str) -> tuple[str, str] | None:
    try:
        if request.rule == "train":  # the only one that several processes start
            _ = request.processes
    except ValueError as error:
        return str(error), "in the profile, under set-resources: train"
    kind, nodes = request.gpu_model, request.number("nodes") or 1
    room = sum(partition.gpus.values()) if kind is None else partition.gpus.get(kind, 0)
    if request.gpus and not partition.gpus:
        return f"{where} has no GPU", "in the profile: slurm_partition=… one that has (see partitions)"
    if request.gpus and not room:
        types = ", ".join(kind for kind in partition.gpus if kind) or "no names of types"
        fix = (
            f"in the profile: gpu_model: {next(iter(partition.gpus))}" if any(partition.gpus) else "take gpu_model out"
        )
        return f"GPU type {kind} is not in {where} (has {types})", fix
    if request.gpus > room * nodes:
        # gres counts those of a node, gpu those of all
        line = f'gres: "gpu:{f"{kind}:" if kind else ""}{room}"' if request.gres else f"gpu: {room * nodes}"
        each = f" on {nodes} nodes" if nodes > 1 else ""
        return f"asks for {request.gpus} GPUs{each}, a node of {where} has {room}", f"in the profile: {line}"
    return None


def _capped(request: Request, key: str, limit: int) -> str:
    """The profile's line for a resource that grows with the attempt up to a limit, or is the limit from the first on."""
    first = request.at(1).number(key) or limit
    return f"{key}: {limit}" if first >= limit else f"{key}: min({first} * attempt, {limit})"
