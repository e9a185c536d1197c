"""What settings need that is not here: packages, shapes of models, walls around programs."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from kvpipe.doctor.finding import FAIL, OK, WARNING, Finding
from kvpipe.doctor.workload import Workload
from kvpipe.evaluate.sandbox.run import DESCRIPTION, SandboxError, choose
from kvpipe.experiment.misfits import misfits
from kvpipe.experiment.provenance import PACKAGE
from kvpipe.models.headers import lora_misfit

SHOWN = ("snakemake", "torch", "transformers", "accelerate")


# ---------------------------------------------------------------- packages
def check_packages(work: Workload) -> Iterator[Finding]:
    """Those of pyproject.toml, and those that only a setting needs: a step would fail without, hours later."""
    lora = work.config.train.lora is not None
    yield from packages(r for r in requirements() if r.name != "peft" or lora)
    if work.config.evaluate.lm_eval_tasks and installed("lm_eval") is None:
        detail = "evaluate.lm_eval_tasks needs lm_eval, which is not installed"
        yield Finding("package lm_eval", FAIL, detail, 'pip install "kvpipe[lm-eval]"')
    quantized = [name for name in work.config.models if work.loading(name).quantize != "none"]
    if quantized and installed("bitsandbytes") is None:
        keys = ", ".join(f"models.{name}.load.quantize" for name in quantized)
        detail = f"{keys} needs bitsandbytes, which is not installed"
        yield Finding("package bitsandbytes", FAIL, detail, "pip install bitsandbytes")


def requirements() -> list[Requirement]:
    """What kvpipe needs; from the checkout, which a job may run without having it installed."""
    project = PACKAGE.parent / "pyproject.toml"
    if project.is_file():
        texts = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        texts = [text for text in requires("kvpipe") or [] if "extra" not in text]
    return [Requirement(text) for text in texts]


def packages(
    needed: Iterable[Requirement], name: str = "packages", fix: str = "pip install -r requirements.lock"
) -> Iterator[Finding]:
    """Whether packages are installed, in a version that fits."""
    there = {r: installed(r.name) for r in needed}
    missing = [r.name for r, found in there.items() if found is None]
    # a development build of a version counts as it
    wrong = [
        f"{r.name} {found} (needs {r.specifier})"
        for r, found in there.items()
        if found is not None and not r.specifier.contains(found, prereleases=True)
    ]
    if missing:
        yield Finding(name, FAIL, f"not installed: {', '.join(missing)}", fix)
    if wrong:
        yield Finding(name, WARNING, f"other versions than kvpipe was tested with: {', '.join(wrong)}", fix)
    if not (missing or wrong):
        versions = {r.name: found for r, found in there.items()}
        shown = [package for package in SHOWN if package in versions] or versions
        yield Finding(name, OK, ", ".join(f"{package} {versions[package]}" for package in shown))


def installed(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# ---------------------------------------------------------------- models and programs
def check_arms(work: Workload) -> Iterator[Finding]:
    """One finding per setting that does not fit a model whose config.json is on this machine."""
    shapes = {name: shape for name in work.config.models if (shape := work.shape(name)) is not None}
    found = misfits(work.dag, shapes)
    lora, folder = work.config.train.lora, work.folder(work.config.student)
    if lora is not None and folder is not None and lora.target_modules != "all-linear":
        try:
            problem = lora_misfit(folder, list(lora.target_modules))
        except (OSError, ValueError):  # damaged: a finding of its own
            problem = None
        found += [f"train.lora.target_modules: {problem}"] if problem else []
    for line in found:
        yield Finding("arms", FAIL, line, "correct this key of the configuration")
    if not found:
        yield Finding("arms", OK, f"{len(work.dag.arms)} arms fit the shapes of {len(shapes)} models")


def check_sandbox(work: Workload) -> Iterator[Finding]:
    """Which walls programs that a model wrote would have here."""
    sandbox = work.config.evaluate.sandbox
    if not sandbox.run_code:
        return
    try:
        walls = choose(sandbox)
        yield Finding("sandbox", WARNING if walls == "none" else OK, DESCRIPTION[walls])
    except SandboxError as error:
        yield Finding("sandbox", FAIL, f"on this machine {error}", "install bubblewrap")
