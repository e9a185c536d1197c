"""What the jobs ask for: the rules' resources with a Snakemake profile laid over them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from kvpipe.doctor.finding import inside_a_job
from kvpipe.provenance import PACKAGE

RULES = PACKAGE.parent / "workflow" / "rules"
PROFILES = (Path(), Path("~/.config/snakemake").expanduser(), Path("/etc/xdg/snakemake"))
"""Where Snakemake looks for a profile."""


@dataclass(frozen=True)
class Request:
    """What one rule's job asks for, at its first attempt."""

    rule: str
    resources: dict[str, Any]

    def number(self, key: str) -> int | None:
        """A resource as a number; of an expression like `min(720 * attempt, 1440)` what the first attempt has."""
        found = re.match(r"\s*(?:min\()?\s*(\d+)", str(self.resources.get(key, "")))
        return int(found[1]) if found else None

    @property
    def cpus(self) -> int:
        """CPUs on one node."""
        return self.number("cpus_per_task") or self.number("threads") or 1

    @property
    def gpus(self) -> int:
        """GPUs, in whichever way they are asked for."""
        return self.number("gpu") or sum(parse_gpus(self._gres).values()) or int(self.gpu_model is not None)

    @property
    def gpu_model(self) -> str | None:
        """Type of GPU, where one is named."""
        return self.resources.get("gpu_model") or next(filter(None, parse_gpus(self._gres)), None)

    @property
    def _gres(self) -> str:
        return str(self.resources.get("gres", ""))


@dataclass(frozen=True)
class Asked:
    """A profile's settings and the requests that follow."""

    profile: Path | None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        """The profile's resources for rules that say nothing."""
        return _resources(self.settings.get("default-resources"))

    @property
    def own(self) -> dict[str, dict[str, Any]]:
        """Rule → the resources that the profile sets for it."""
        return {rule: _resources(values) for rule, values in (self.settings.get("set-resources") or {}).items()}

    @cached_property
    def requests(self) -> list[Request]:
        """One request per rule of the workflow."""
        defaults = self.defaults
        threads = self.settings.get("set-threads") or {}
        found = {rule: {**defaults, **values} for rule, values in _rules().items()}
        for rule, values in self.own.items():
            found[rule] = {**found.get(rule, defaults), **values}
        for rule, count in threads.items():
            found[rule] = {**found.get(rule, defaults), "threads": count}
        return [Request(rule, values) for rule, values in found.items()]

    def of(self, rule: str) -> Request:
        """The request of one rule; an empty one where the rule is unknown."""
        return next((request for request in self.requests if request.rule == rule), Request(rule, {}))

    @property
    def containers(self) -> bool:
        """Whether jobs run in an image."""
        method = self.settings.get("software-deployment-method") or self.settings.get("sdm") or ()
        return "apptainer" in ([method] if isinstance(method, str) else method)


def read_profile(profile: Path | None) -> Asked:
    """The profile in a folder, or of a name as Snakemake finds it (or none; none inside an image that has not got it).

    Raises:
        FileNotFoundError: there is no config.yaml.
        ValueError: it is not a YAML mapping.
    """
    if profile is None:
        return Asked(None)
    folders = [folder / profile for folder in PROFILES]
    files = [f for folder in folders for f in (*sorted(folder.glob("config.v*.yaml"))[-1:], folder / "config.yaml")]
    files = [file for file in files if file.is_file()]
    if not files and inside_a_job():
        return Asked(None)
    if not files:
        raise FileNotFoundError(f"profile {profile}: no config.yaml there; name a folder like profiles/slurm")
    try:
        values = yaml.safe_load(files[0].read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{files[0]}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{files[0]}: expected a mapping at the top level")
    return Asked(files[0], values)


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


def _resources(values: Any) -> dict[str, Any]:
    """Resources as a mapping, however the profile writes them: a mapping, or a list or string of `name=value`."""
    if isinstance(values, dict):
        return values
    listed = values.split() if isinstance(values, str) else values or []
    return dict(item.split("=", 1) for item in listed)


def _rules() -> dict[str, dict[str, Any]]:
    """Rule → its resources and threads as written; empty where the checkout has no workflow."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(RULES.glob("*.smk")):
        for block in re.split(r"^(?=rule )", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            named = re.match(r"rule (\w+):", block)
            if named:
                section = re.search(r"^ {4}resources:\n((?: {8}.*\n)+)", block, flags=re.MULTILINE)
                pairs = re.findall(r"(\w+)\s*=\s*([^,\n]+)", section[1]) if section else []
                threads = re.findall(r"^ {4}threads:\s*(\d+)", block, flags=re.MULTILINE)
                found[named[1]] = {**dict(pairs), **({"threads": threads[0]} if threads else {})}
    return found
