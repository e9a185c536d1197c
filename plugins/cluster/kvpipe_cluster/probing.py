"""Ask the cluster by trying: which way of asking for a GPU it accepts, and what a job in the image sees there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpipe.doctor import Workload, look
from kvpipe.doctor.finding import ask, last_line
from kvpipe.doctor.memory import job_memory
from kvpipe.experiment.files import write_json, write_text
from kvpipe_cluster.container import image_path, program
from kvpipe_cluster.profile import Profile, Request, profile_of
from kvpipe_cluster.slurm import Partition, read_partitions

MINUTES = 5
"""Time limit of the job."""
WAIT = 900.0
"""Seconds that the job may take from its submission; pending any longer it is cancelled, and the profile still printed."""
POLL = 3


class ProbeError(RuntimeError):
    """The cluster took no job; the message has its reason."""


@dataclass(frozen=True)
class Syntax:
    """A way of asking for one GPU: what sbatch is told, and what the profile says for it."""

    option: str
    profile: tuple[str, ...]


@dataclass(frozen=True)
class Site:
    """What the cluster accepted."""

    partition: Partition
    account: str | None
    syntax: Syntax | None
    per_gpu: bool
    """Whether CPUs may be asked for by the GPU."""
    cpus: int
    mem_mb: int
    minutes: int | None
    refused: tuple[str, ...]
    """Ways of asking that were refused, with the reason."""


def syntaxes(partition: Partition) -> list[Syntax]:
    """Ways of asking for a GPU, the plainest first, as the executor plugin hands them to sbatch."""
    kinds = [kind for kind in partition.gpus if kind]
    return [
        Syntax("--gpus=1", ("gpu: 1",)),
        *(Syntax(f"--gpus={kind}:1", ("gpu: 1", f"gpu_model: {kind}")) for kind in kinds),
        Syntax("--gres=gpu:1", ('gres: "gpu:1"',)),
        *(Syntax(f"--gres=gpu:{kind}:1", (f'gres: "gpu:{kind}:1"',)) for kind in kinds),
    ]


def probe(work: Workload, log: Callable[[str], None], wait: float = WAIT) -> Path:
    """Try submissions, run one short job, and write a site profile; its file, below the results.

    Raises:
        ProbeError: there is no Slurm, no partition, or none took a job.
    """
    if shutil.which("sbatch") is None:
        raise ProbeError("no sbatch on the PATH: run this on a login node (module load slurm)")
    partitions = sorted((p for p in read_partitions() if p.up), key=lambda p: (not p.gpus, not p.default))
    if not partitions:
        raise ProbeError("sinfo shows no partition that is up; ask the site which you may use")
    profile = profile_of(work)
    account = next((str(found) for r in profile.requests if (found := r.resources.get("slurm_account"))), None)
    site: Site | None = None
    complaints: list[str] = []
    for partition in partitions:
        log(f"partition {partition.name} …")
        tried = _try_partition(partition, account)
        complaints += list(tried.refused) if tried else [f"{partition.name}: {_test(partition, account)[1]}"]
        if tried is not None and (tried.syntax is not None or not partition.gpus):
            site = tried
            break
        site = site or tried  # better one without a GPU than none
    if site is None:
        raise ProbeError("no partition took a job:\n  " + "\n  ".join(complaints))
    seen = _run(site, profile, work.paths.probe, log, wait)
    written = work.paths.probe.with_suffix("") / "config.yaml"
    write_text(written, profile_text(work, site, seen, profile))
    return written


# ---------------------------------------------------------------- trying without running
def _test(partition: Partition, account: str | None, *options: str) -> tuple[bool, str]:
    """Whether sbatch would take a job with these options; `--test-only` submits nothing."""
    command = ["sbatch", "--test-only", f"--partition={partition.name}", "--ntasks=1", f"--time={_time(partition)}"]
    command += [f"--account={account}"] if account else []
    answer = ask(*command, *options, "--wrap=true")
    return answer.returncode == 0, last_line(answer)


def _time(partition: Partition) -> int:
    return min(MINUTES, partition.minutes or MINUTES)


def _try_partition(partition: Partition, account: str | None) -> Site | None:
    if not _test(partition, account)[0]:
        return None
    chosen, refused = None, []
    for syntax in syntaxes(partition) if partition.gpus else []:
        taken, said = _test(partition, account, syntax.option)
        if taken:
            chosen = syntax
            break
        refused.append(f"{partition.name}: {syntax.option}: {said}")
    gpu = (chosen.option,) if chosen else ()
    per_gpu = bool(gpu) and _test(partition, account, *gpu, "--cpus-per-gpu=1")[0]
    cpus = _most(partition.cpus, lambda n: _test(partition, account, *gpu, f"--cpus-per-task={n}")[0])
    mem = _most(partition.mem_mb, lambda n: _test(partition, account, *gpu, f"--mem={n}")[0])
    # a time over the limit passes --test-only where EnforcePartLimits is off, and then waits for ever
    return Site(partition, account, chosen, per_gpu, cpus, mem, partition.minutes, tuple(refused))


def _most(limit: int, taken: Callable[[int], bool]) -> int:
    """The limit, or the half, quarter … of it that is taken."""
    while limit > 1 and not taken(limit):
        limit //= 2
    return max(1, limit)


# ---------------------------------------------------------------- one real job
def _outside(profile: Profile) -> str | None:
    """Why the job looks outside the image that the profile's jobs run in; None where it does not."""
    if not profile.containers:
        return None
    if program() is None:
        return "outside the image: apptainer is not on the PATH (module load apptainer)"
    return None if image_path().exists() else f"outside the image: {image_path()} does not exist (make image)"


def _script(profile: Profile) -> str:
    """The job: the same call with and without an image."""
    call, command = [sys.executable], program()
    if profile.containers and command and not _outside(profile):
        options = shlex.split(str(profile.settings.get("apptainer-args", "--nv")))
        call = [command, "exec", *options, str(image_path().absolute()), "python3"]
    return f"#!/bin/bash\n{shlex.join([*call, '-c', Path(look.__file__).read_text(encoding='utf-8')])}\n"


def _run(site: Site, profile: Profile, out: Path, log: Callable[[str], None], wait: float) -> dict[str, Any] | None:
    folder = out.absolute().with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    options = [f"--partition={site.partition.name}", "--ntasks=1", f"--time={_time(site.partition)}", "--mem=2000"]
    options += [f"--account={site.account}"] if site.account else []
    options += [site.syntax.option] if site.syntax else []
    command = ["sbatch", "--parsable", "--job-name=kvpipe-probe", f"--output={folder}/%j.log", *options]
    answer = ask(*command, stdin=_script(profile))
    if answer.returncode:
        raise ProbeError(f"{shlex.join(command)}: {last_line(answer)}")
    job = answer.stdout.strip().split(";")[0]
    if reason := _outside(profile):
        log(f"job {job} looks {reason}: its Python and torch are not those of the jobs")
    log(f"job {job} submitted, {MINUTES} minutes at most: {shlex.join(options)}")
    state = _await(job, log, wait)
    output = folder / f"{job}.log"
    text = output.read_text(encoding="utf-8", errors="replace") if output.is_file() else ""
    line = next((line for line in text.splitlines() if line.startswith(look.MARK)), None)
    if line is None:
        nothing = f"no output in {output}: do the compute nodes see that folder, and may you write there?"
        last = text.strip().splitlines()[-1:] or [nothing]
        log(f"job {job} ended as {state} without an answer: {last[0]}")
        return None
    seen = {"job": job, "partition": site.partition.name, **json.loads(line.removeprefix(look.MARK))}
    write_json(out, seen)
    log(f"job {job} ran on {seen['host']}: {(seen['gpu'] or {}).get('name') or 'no GPU seen'}")
    return seen


def _await(job: str, log: Callable[[str], None], wait: float) -> str:
    """The job's last state; bounded: a job that is not done in time is cancelled."""
    end, told = time.monotonic() + wait, ("", "")
    while time.monotonic() < end:
        state, reason = _state(job)
        if state in ("", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"):
            return state or "finished"
        if (state, reason) != told:
            log(f"job {job}: {state.lower()}{f' ({reason})' if reason not in ('', 'None') else ''}")
            told = (state, reason)
        time.sleep(POLL)
    ask("scancel", job)
    log(f"job {job} was not done after {wait:g} s and was cancelled; the profile below is what sbatch accepted")
    return "CANCELLED"


def _state(job: str) -> tuple[str, str]:
    """(state, reason) by squeue; empty once the job has left it."""
    answer = ask("squeue", "--noheader", "--states=all", "--format=%T|%r", f"--jobs={job}")
    line = answer.stdout.strip().splitlines()[0] if answer.returncode == 0 and answer.stdout.strip() else ""
    state, _, reason = line.partition("|")
    return state, reason


# ---------------------------------------------------------------- the profile
def profile_text(work: Workload, site: Site, seen: dict[str, Any] | None, profile: Profile) -> str:
    """A whole site profile: the one that was read, with what jobs ask for as the cluster accepted it."""
    gpu = (seen or {}).get("gpu") or {}
    ran = f"job {seen['job']} ran on {seen['host']}" if seen else "no job has run: accepted by sbatch --test-only"
    limits = f"{site.cpus} CPUs, {site.mem_mb} MB and {site.minutes or 'none'} minutes"
    lines = [f"# What this cluster accepted ({ran}).", f"# Partition {site.partition.name}: at most {limits} a job."]
    if gpu.get("name"):
        lines.append(f"# GPU: {gpu['name']}, {(gpu.get('memory') or 0) / 1e9:.0f} GB, driver {gpu.get('driver')}.")
    if seen and (reason := _outside(profile)):
        lines.append(f"# Seen {reason}.")
    lines += [f"# refused: {complaint}" for complaint in site.refused]
    defaults: dict[str, Any] = {"slurm_partition": site.partition.name}
    defaults |= {"slurm_account": site.account} if site.account else {}
    defaults |= {"mem_mb": min(8000, site.mem_mb), "runtime": min(60, site.minutes or 60)}
    defaults |= {key: value for key, value in profile.defaults.items() if key not in defaults}
    estimates = job_memory(work, lambda rule: profile.of(rule).gpus)
    rules = []
    for request in profile.requests:
        own = profile.own.get(request.rule, {})
        threads = work.config.train.threads if request.rule == "train" and "cpus_per_task" not in own else None
        if entries := _fitted(request, own, site, estimates.get(request.rule), threads):
            rules += [f"  {request.rule}:", *(f"    {entry}" for entry in entries)]
    text = profile.file.read_text(encoding="utf-8") if profile.file else ""
    text = _replaced(text, "default-resources", [f"  - {key}={value}" for key, value in defaults.items()])
    return "\n".join(lines) + "\n\n" + _replaced(_replaced(text, "set-resources", rules), "slurm-requeue", ["true"])


def _replaced(text: str, key: str, block: list[str]) -> str:
    """A profile's text with another block under a key, or one word beside it; comments at the margin stay."""
    new = f"{key}: {block[0]}\n" if block == ["true"] else "\n".join([f"{key}:", *block]) + "\n" if block else ""
    found = re.search(rf"^{key}:.*\n?(?:[ \t-].*\n?)*", text, flags=re.MULTILINE)
    return text[: found.start()] + new + text[found.end() :] if found else text + new


def _fitted(request: Request, own: dict[str, Any], site: Site, estimate: int | None, threads: int | None) -> list[str]:
    """What the profile says of one rule, brought within the limits; empty where the defaults do.

    Args:
        estimate: MB that the doctor expects, which grow with the attempt.
        threads: CPUs of each process, where there is one for every GPU.
    """
    out = list(site.syntax.profile) if request.gpus and site.syntax else []
    by_gpu = bool(out) and site.per_gpu and threads is not None
    out += [f"cpus_per_gpu: {threads}"] if by_gpu else []
    limits = {"mem_mb": site.mem_mb, "runtime": site.minutes, "cpus_per_task": None if by_gpu else site.cpus}
    for key, limit in limits.items():
        wanted = request.cpus if key == "cpus_per_task" else request.number(key) or 0
        if key == "mem_mb" and estimate is not None:
            grown = f"min({estimate} * attempt, {site.mem_mb})"
            out.append(f"{key}: {grown if estimate < site.mem_mb else site.mem_mb}")
        elif limit is not None and wanted > limit:
            resumes = key == "runtime" and request.rule == "train"
            note = "; a cell goes on from its checkpoint in the next attempt" if resumes else ""
            out.append(f"{key}: {limit}   # of {wanted} wanted{note}")
        elif key in own:
            out.append(f"{key}: {_grown(str(own[key]), wanted, limit)}")
    written = ("gpu", "gpu_model", "gres", "cpus_per_gpu", *limits)
    return out + [f"{key}: {json.dumps(value)}" for key, value in own.items() if key not in written]


def _grown(value: str, first: int, limit: int | None) -> str:
    """A value that grows with the attempt goes on doing so, to its own cap or the cluster's limit."""
    if "attempt" not in value or limit is None:
        return value
    cap = re.search(r"min\(.*,\s*(\d+)\s*\)", value)
    return f"min({first} * attempt, {min(limit, int(cap[1])) if cap else limit})"
