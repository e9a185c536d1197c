"""A Snakemake profile, and what the jobs ask for: the rules' resources with the profile's laid over them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml

from kvpipe.doctor import Workload
from kvpipe.doctor.memory import job_memory
from kvpipe.experiment.launch import in_job, processes
from kvpipe.experiment.provenance import PACKAGE

RULES = PACKAGE.parent / "workflow" / "rules"
THREADS = "PLAN.config.train.threads"
"""Threads of a rule, as it is written there."""
DEFAULT = Path("profiles/slurm")
"""Read where no profile is named."""
PROFILES = (Path(), Path("~/.config/snakemake").expanduser(), Path("/etc/xdg/snakemake"))
"""Where Snakemake looks for a profile."""
NUMBERS = ("gpu", "nodes", "threads", "cpus_per_task", "cpus_per_gpu", "mem_mb", "runtime")
"""Resources that are compared with what a partition has."""


@dataclass(frozen=True)
class Request:
    """What one rule's job asks for, at one of its attempts."""

    rule: str
    resources: dict[str, Any]
    """As written: a value may be an expression, `min(720 * attempt, 1440)`."""
    attempt: int = 1

    def at(self, attempt: int) -> Request:
        """The same job at another attempt."""
        return replace(self, attempt=attempt)

    @cached_property
    def values(self) -> dict[str, Any]:
        """The resources as Snakemake reads them."""
        return evaluate(self.resources, self.attempt)

    def number(self, key: str) -> int | None:
        """A resource as a number; None where it is not set, or not known before the job is submitted."""
        value = self.values.get(key)
        # an explicit string in a profile, "16000"
        value = int(value) if isinstance(value, str) and value.isdecimal() else value
        return value if isinstance(value, int) else None

    @property
    def unread(self) -> dict[str, Any]:
        """What is written and cannot be compared with a limit: it depends on the job's input, or is no number."""
        written = {key: self.resources[key] for key in NUMBERS if self.resources.get(key) is not None}
        return {key: value for key, value in written.items() if self.number(key) is None}

    @property
    def cpus(self) -> int:
        """CPUs on one node."""
        by_gpu = (self.number("cpus_per_gpu") or 0) * (self.gpus // (self.number("nodes") or 1))
        return self.number("cpus_per_task") or by_gpu or self.number("threads") or 1

    @property
    def processes(self) -> tuple[int, int]:
        """GPUs over all nodes, and nodes, as a cell's launcher counts them.

        Raises:
            ValueError: it cannot start on them.
        """
        return processes(self.values | {key: self.number(key) for key in ("gpu", "nodes")})

    @property
    def gpus(self) -> int:
        """GPUs over all nodes, in whichever way they are asked for."""
        try:
            return self.processes[0] or int(self.gpu_model is not None)
        except ValueError:  # a finding of its own
            return self.number("gpu") or 0

    @property
    def gpu_model(self) -> str | None:
        """Type of GPU, where one is named."""
        return self.values.get("gpu_model") or next(filter(None, parse_gpus(self.gres)), None)

    @property
    def gres(self) -> str:
        """Generic resources of every node."""
        return str(self.values.get("gres") or "")


@dataclass(frozen=True)
class Profile:
    """A profile's settings and the requests that follow."""

    file: Path | None
    settings: dict[str, Any] = field(default_factory=dict)
    threads: int = 1
    """Of the rules that compute, which have the configuration's: train.threads."""
    memory: dict[str, int] = field(default_factory=dict)
    """Rule → MB, of the rules that ask for what the experiment's sizes say."""

    @property
    def attempts(self) -> range:
        """Numbers of a job's attempts: `retries` come after the first."""
        return range(1, 2 + int(self.settings.get("retries") or self.settings.get("restart-times") or 0))

    @property
    def defaults(self) -> dict[str, Any]:
        """The profile's resources for rules that say nothing."""
        return _resources(self.settings.get("default-resources"))

    @property
    def own(self) -> dict[str, dict[str, Any]]:
        """Rule → the resources that the profile sets for it."""
        written = self.settings.get("set-resources")
        if isinstance(written, dict):
            return {rule: _resources(values) for rule, values in written.items()}
        listed: dict[str, list[str]] = {}
        for rule, assignment in _pairs(written, ":"):
            listed.setdefault(rule, []).append(assignment)
        return {rule: _resources(assignments) for rule, assignments in listed.items()}

    @cached_property
    def requests(self) -> list[Request]:
        """One request per rule of the workflow."""
        defaults = self.defaults
        found = {rule: {**defaults, **values} for rule, values in _rules(self.memory).items()}
        for rule, values in self.own.items():
            found[rule] = {**found.get(rule, defaults), **values}
        for rule, count in _mapping(self.settings.get("set-threads")).items():
            found[rule] = {**found.get(rule, defaults), "threads": count}
        for values in found.values():
            if values.get("threads") == THREADS:
                values["threads"] = self.threads
        return [Request(rule, values) for rule, values in found.items()]

    def of(self, rule: str) -> Request:
        """The request of one rule; an empty one where the rule is unknown."""
        return next((request for request in self.requests if request.rule == rule), Request(rule, {}))

    @property
    def containers(self) -> bool:
        """Whether jobs run in an image."""
        method = self.settings.get("software-deployment-method") or self.settings.get("sdm") or ()
        return "apptainer" in ([method] if isinstance(method, str) else method)


def profile_of(work: Workload) -> Profile:
    """The profile that the experiment's jobs run by; the shipped one where none is named."""
    profile = read_profile(DEFAULT if work.profile is None and DEFAULT.is_dir() else work.profile)
    memory = job_memory(work, lambda rule: profile.of(rule).gpus)
    return replace(profile, threads=work.config.train.threads, memory=memory)


def read_profile(named: Path | None) -> Profile:
    """The profile in a folder, or of a name as Snakemake finds it (or none; none inside an image that has not got it).

    Raises:
        FileNotFoundError: there is no config.yaml.
        ValueError: it is not a YAML mapping.
    """
    if named is None:
        return Profile(None)
    folders = [folder / named for folder in PROFILES]
    files = [f for folder in folders for f in (*sorted(folder.glob("config.v*.yaml"))[-1:], folder / "config.yaml")]
    file = next((file for file in files if file.is_file()), None)
    if file is None and in_job():
        return Profile(None)
    if file is None:
        raise FileNotFoundError(f"profile {named}: no config.yaml there; name a folder like profiles/slurm")
    return _parsed(file, file.read_text(encoding="utf-8"))


@lru_cache(maxsize=4)
def _parsed(file: Path, text: str) -> Profile:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a mapping at the top level")
    profile = Profile(file, values)
    try:
        profile.requests, profile.attempts  # noqa: B018 - read here, so that the message names the file
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return profile


def parse_gpus(gres: str) -> dict[str, int]:
    """`gpu:a100:4(S:0-1),gpu:2` → {"a100": 4, "": 2}."""
    out: dict[str, int] = {}
    for item in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = item.strip().split(":")
        count = int(rest.pop()) if rest and rest[-1].isdigit() else 1
        if name == "gpu":
            kind = ":".join(rest)
            out[kind] = out.get(kind, 0) + count
    return out


def evaluate(resources: Mapping[str, Any], attempt: int) -> dict[str, Any]:
    """Resource → its value at an attempt, by Snakemake's own reading: units (`2d`, `500GB`) and Python expressions. None
    where that fails, as it does for an expression of the job's input."""
    try:
        from snakemake.exceptions import WorkflowError
        from snakemake.resources import Resources
    except ImportError:  # a finding of its own; plain numbers can be read all the same
        return {key: int(value) if str(value).strip().isdecimal() else value for key, value in resources.items()}
    out: dict[str, Any] = {}
    # threads first: the others may be expressions of them
    for key, value in sorted(resources.items(), key=lambda item: item[0] != "threads"):
        try:
            ((name, parsed),) = Resources.parse([f"{key}={value}"], allow_expressions=True).items()
            given = {"input": (), "attempt": attempt, "threads": out.get("threads") or 1, "async_run": None}
            out[name] = parsed.evaluate(None, **given, rulename="").value
        except (WorkflowError, TypeError):
            out[key] = None
    return out


def _pairs(values: Any, sign: str) -> list[tuple[str, str]]:
    """`left<sign>right` of a list, or of a string with spaces between."""
    items = values.split() if isinstance(values, str) else values or []
    out = []
    for item in items if isinstance(items, list) else [items]:
        left, found, right = str(item).partition(sign)
        if not found:
            raise ValueError(f"the profile has {item!r}; Snakemake expects {'RULE:' if sign == ':' else ''}NAME=VALUE")
        out.append((left, right))
    return out


def _mapping(values: Any) -> dict[str, Any]:
    """A mapping, however the profile writes it: as one, or as a list or string of `name=value`."""
    return values if isinstance(values, dict) else dict(_pairs(values, "="))


def _resources(values: Any) -> dict[str, Any]:
    """Resources as written, but every memory as mem_mb: what the profile sets replaces what the rule says in another unit."""
    out = {}
    for name, value in _mapping(values).items():
        if name in ("mem", "mem_mib"):
            read = evaluate({name: value}, 1).get("mem_mb")
            times = "" if name == "mem" else "1.048576 * "
            # an expression stays one, with its attempt
            name, value = "mem_mb", f"round({times}({value}))" if "attempt" in str(value) else read or value
        out[name] = value
    return out


def _rules(memory: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Rule → its resources and threads as written, but for `memory(rule, otherwise)`; empty where the checkout has no
    workflow."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(RULES.glob("*.smk")):
        for block in re.split(r"^(?=rule )", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            named = re.match(r"rule (\w+):", block)
            if named:
                section = re.search(r"^ {4}resources:\n((?: {8}.*\n)+)", block, flags=re.MULTILINE)
                text = re.sub(r'memory\("(\w+)", (\d+)\)', _of(memory), section[1]) if section else ""
                pairs = re.findall(r"(\w+)\s*=\s*([^,\n]+)", text)
                threads = re.findall(r"^ {4}threads:\s*(\S+)", block, flags=re.MULTILINE)
                found[named[1]] = {**_resources(dict(pairs)), **({"threads": threads[0]} if threads else {})}
    return found


def _of(memory: Mapping[str, int]) -> Callable[[re.Match[str]], str]:
    return lambda written: f"{memory.get(written[1], int(written[2]))} * attempt"
