"""Where a result comes from: code, configuration, packages, machine; and the hash that says whether code changed."""

from __future__ import annotations

import ast
import os
import platform
import re
import subprocess
import sys
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
PACKAGES = (
    "kvpipe",
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "datasets",
    "numpy",
    "scipy",
    "pandas",
    "snakemake",
)
UNHASHED = {
    "kvpipe.config",
    "kvpipe.experiment.paths",
    "kvpipe.experiment.made",
    "kvpipe.experiment.plan",
    "kvpipe.experiment.steps",
    "kvpipe.experiment.provenance",
    "kvpipe.experiment.progress",
    "kvpipe.train.card",
    "kvpipe.steps.make",
    "kvpipe.cli.app",
    "kvpipe.cli.options",
    "kvpipe.cli.steps",
    "kvpipe.cli.use",
    "kvpipe.__main__",
    "kvpipe",
}
"""Modules whose effect on a step is in its configuration params already, or that only write words beside its result."""


def describe(**more: Any) -> dict[str, Any]:
    """Git commit, package versions, container, host and device, plus what the caller adds."""
    return {
        "git_commit": git_commit(),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "container": os.environ.get("KVPIPE_IMAGE_DIGEST") or os.environ.get("APPTAINER_CONTAINER"),
        "host": platform.node(),
        "platform": platform.platform(),
        **_arithmetic(),
        **more,
    }


def _arithmetic() -> dict[str, Any]:
    """What last bits hang on: processor type; and of torch, where it is loaded, vector instructions, BLAS and threads."""
    cpuinfo = Path("/proc/cpuinfo")
    words = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    model = re.search(r"^model name\s*: (.*)$", words, re.MULTILINE)
    found: dict[str, Any] = {"processor": model[1] if model else platform.processor() or platform.machine()}
    if torch := sys.modules.get("torch"):
        blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
        capability = torch.backends.cpu.get_cpu_capability()
        found |= {"cpu_capability": capability, "blas": blas and blas[1], "threads": torch.get_num_threads()}
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def git_commit() -> str | None:
    """Commit of kvpipe's checkout, with `+changes` where tracked files differ; None outside of one."""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, check=False)

    try:
        # an environment may lie inside a checkout of something else
        if git("ls-files", "--error-unmatch", "__init__.py").returncode != 0:
            return os.environ.get("KVPIPE_GIT_COMMIT")
        commit = git("rev-parse", "HEAD")
        if commit.returncode != 0:
            return os.environ.get("KVPIPE_GIT_COMMIT")
        dirty = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    except OSError:  # no git, or a folder of the PATH that may not be read
        return os.environ.get("KVPIPE_GIT_COMMIT")
    return commit.stdout.strip() + ("+changes" if dirty else "")


# ---------------------------------------------------------------- code hashes
@cache
def code_hash(module: str) -> str:
    """Hash of a module's code and of all of kvpipe that it imports, comments and docstrings left out.

    Snakemake sees a rule's shell command, not the package behind it: this hash among a rule's params makes a change of
    code rerun the steps it concerns, and a change of words rerun nothing.
    """
    seen = sha256()
    for name in sorted(reachable(module)):
        seen.update(f"{name}\n{_read(_source(name))[1]}\n".encode())
        for path in sorted(_path(name).parent.glob("*.html")) if name.startswith("kvpipe.report") else ():
            seen.update(path.read_bytes())
    return seen.hexdigest()[:16]


@cache
def reachable(module: str) -> frozenset[str]:
    """The module and all modules of kvpipe that it imports, directly or not, but for `UNHASHED`."""
    found: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in found or name in UNHASHED:
            continue
        found.add(name)
        todo.extend(imports(name))
    return frozenset(found)


def imports(module: str) -> frozenset[str]:
    """Modules of kvpipe that a module imports, at its top or inside functions."""
    return _read(_source(module))[0]


def modules() -> list[str]:
    """Every module of the package."""
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["kvpipe", *path.relative_to(PACKAGE).with_suffix("").parts]
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def _path(module: str) -> Path:
    base = PACKAGE.joinpath(*module.split(".")[1:])
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def _exists(module: str) -> bool:
    return _path(module).is_file()


def _source(module: str) -> str:
    return _path(module).read_text(encoding="utf-8")


@cache  # most modules are reachable from several steps
def _read(source: str) -> tuple[frozenset[str], str]:
    """Modules of kvpipe that a source imports, and the source without comments and docstrings.

    Parsed and walked once for both: of a call of Snakemake that finds nothing to do this is the longest part.
    """
    tree, found = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvpipe"):
            for alias in node.names:
                child = f"{node.module}.{alias.name}"
                found.add(child if _exists(child) else str(node.module))
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.startswith("kvpipe"))
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # strings that stand alone are documentation, of the whole or of the line above
            node.body = [s for s in node.body if not _is_string(s)] or [ast.Pass()]
    return frozenset(found), ast.unparse(tree)


def _is_string(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
