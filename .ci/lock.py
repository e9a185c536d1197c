"""Write the locks, the exact versions of what kvpipe needs, from the running environment: requirements.lock of everything, its
extras and plugins included, and containers/image.lock of what jobs need, by which the image is named.

Run by `make lock`. Only packages that are reached from the project's requirements and its extras are listed, so a
package that happens to lie in the environment does not enter the lock.
"""

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
FIRST = "torch"
"""Its build (CPU or CUDA) depends on where it is installed: it stands first and is installed alone, before the rest."""
UNLOCKED = ("browser", "lm-eval")
"""Extras that are not installed by `make install`, and so not in the lock."""
ACCELERATOR = ("nvidia-", "cuda-", "triton", "pytorch-triton")
"""What a CUDA build of torch brings along by itself; a CPU machine must not install it."""


def requirements(jobs_only: bool) -> list[Requirement]:
    """What the project asks for; if not for jobs only, with its extras, its plugins and what builds it."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = document["project"]
    if jobs_only:
        return [Requirement(line) for line in project["dependencies"]]
    written = [
        *project["dependencies"],
        *(line for name, extra in project["optional-dependencies"].items() if name not in UNLOCKED for line in extra),
        *document["build-system"]["requires"],
    ]
    for plugin in sorted(ROOT.glob("plugins/*/pyproject.toml")):
        written += tomllib.loads(plugin.read_text(encoding="utf-8"))["project"]["dependencies"]
    return [requirement for requirement in map(Requirement, written) if requirement.name != project["name"]]


def resolve(todo: list[Requirement]) -> dict[str, str]:
    """Name → version of all that the requirements reach, as installed here."""
    versions: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen or name.startswith(ACCELERATOR):
            continue
        seen.add(key)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            sys.exit(
                f"{name} is required but not installed here: run `make install` (or pip install -e '.[dev]' -e plugins/cluster)"
            )
        versions[name] = found.version.partition("+")[0]
        for line in found.requires or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in {"", *requirement.extras}):
                todo.append(needed)
    return versions


def main() -> None:
    """Write the files."""
    for file, jobs_only, what in (
        ("requirements.lock", False, "of everything in pyproject.toml with its extras"),
        ("containers/image.lock", True, "of what jobs need"),
    ):
        versions = resolve(requirements(jobs_only))
        order = [FIRST, *sorted(set(versions) - {FIRST})]
        lines = [f"# Exact versions {what}. Written by `make lock`; do not edit."]
        lines += [f"{name}=={versions[name]}" for name in order]
        (ROOT / file).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
