"""Whether the packages that are needed here are installed, in a version that fits."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from kvpipe.config import Config, HubModel, LocalModel, Model
from kvpipe.doctor.asked import Asked
from kvpipe.doctor.finding import FAIL, OK, WARNING, Finding, inside_a_job
from kvpipe.experiment.provenance import PACKAGE

PLUGIN = "snakemake-executor-plugin-slurm"
LOGIN = {"snakemake", "pydantic", "pyyaml", "typer", "rich", "huggingface_hub"}
"""Packages of a login node whose jobs run in the image: the others are in there."""
SHOWN = ("snakemake", "torch", "transformers", "accelerate")


def examine_versions(config: Config, asked: Asked) -> list[Finding]:
    """Findings on packages."""
    on_login_node = shutil.which("sbatch") is not None and not inside_a_job()
    needed, plugin = _requirements()
    if on_login_node and asked.containers:
        needed = [r for r in needed if r.name in LOGIN]
    elif config.train.lora is None:
        needed = [r for r in needed if r.name != "peft"]
    found = [*_packages(needed)]
    if not (on_login_node and asked.containers):  # else they are in the image, where the run's own doctor looks
        found += _asked_for(config)
    if on_login_node and asked.settings.get("executor", "slurm") == "slurm":
        found += _packages([plugin], "slurm plugin", f'pip install "{plugin}"')
    return found


def _requirements() -> tuple[list[Requirement], Requirement]:
    """What kvpipe needs, and the executor plugin; from the checkout, which an image mounts without installing it."""
    project = PACKAGE.parent / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        texts = [*table["dependencies"], *table["optional-dependencies"]["slurm"]]
    else:
        texts = requires("kvpipe") or []
    listed = [Requirement(text.split(";")[0]) for text in texts if "extra" not in text or PLUGIN in text]
    plugin = next(requirement for requirement in listed if requirement.name == PLUGIN)
    return [requirement for requirement in listed if requirement is not plugin], plugin


def _asked_for(config: Config) -> Iterator[Finding]:
    """Packages that nobody needs but by a setting: without one of them a step would fail, hours later."""
    if config.evaluate.lm_eval_tasks and installed("lm_eval") is None:
        detail = "evaluate.lm_eval_tasks needs lm_eval, which is not installed"
        yield Finding("package lm_eval", FAIL, detail, 'pip install "kvpipe[lm-eval]"')
    quantized = [name for name, model in config.models.items() if _quantize(model) != "none"]
    if quantized and installed("bitsandbytes") is None:
        keys = ", ".join(f"models.{name}.load.quantize" for name in quantized)
        detail = f"{keys} needs bitsandbytes, which is not installed"
        yield Finding("package bitsandbytes", FAIL, detail, "pip install bitsandbytes")


def _quantize(model: Model) -> str:
    return model.load.quantize if isinstance(model, HubModel | LocalModel) else "none"


def _packages(
    needed: list[Requirement], name: str = "packages", fix: str = "pip install -r requirements.lock"
) -> Iterator[Finding]:
    there = {requirement.name: installed(requirement.name) for requirement in needed}
    missing = [package for package, found in there.items() if found is None]
    # a development build of a version counts as it
    wrong = [
        f"{r.name} {found} (needs {r.specifier})"
        for r in needed
        if (found := there[r.name]) is not None and not r.specifier.contains(found, prereleases=True)
    ]
    if missing:
        yield Finding(name, FAIL, f"not installed: {', '.join(missing)}", fix)
    if wrong:
        yield Finding(name, WARNING, f"other versions than kvpipe was tested with: {', '.join(wrong)}", fix)
    if not (missing or wrong):
        shown = [p for p in SHOWN if p in there] or list(there)
        yield Finding(name, OK, ", ".join(f"{package} {there[package]}" for package in shown))


def installed(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
