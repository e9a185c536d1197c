"""kvpipe/README.md is true: it has every module once, and a module imports only from modules above it."""

import ast
import re
from collections import Counter

import pytest

from kvpipe.provenance import PACKAGE, imports, modules

MAP = PACKAGE / "README.md"


def map_lines() -> dict[str, int]:
    """Module → number of its line in the map."""
    found = {}
    for number, line in enumerate(MAP.read_text("utf-8").splitlines(), start=1):
        if entry := re.match(r"\| `([\w.]+)` \|", line):
            found[_full(entry[1])] = number
    return found


def _full(name: str) -> str:
    return name if name == "kvpipe" else f"kvpipe.{name}"


def too_low(order: dict[str, int], imported: dict[str, frozenset[str]]) -> list[str]:
    """What to move: imports that point down the map."""
    return [
        f"{module} (line {order[module]}) imports {other} (line {order[other]}): move {other} above {module}, or "
        f"{module} below {other}; if neither is possible, the import goes the wrong way"
        for module in sorted(order, key=order.__getitem__)
        for other in sorted(imported.get(module, ()))
        if other in order and order[other] >= order[module]
    ]


def test_every_module_is_in_the_map_once():
    missing = sorted(set(modules()) - set(map_lines()))
    assert not missing, f"{MAP} has no line for {missing}: add one below everything that the module imports"
    gone = sorted(set(map_lines()) - set(modules()))
    assert not gone, f"{MAP} has lines for {gone}, which are no modules (any more): take them out"
    entries = re.findall(r"^\| `([\w.]+)` \|", MAP.read_text("utf-8"), flags=re.MULTILINE)
    twice = [name for name, count in Counter(entries).items() if count > 1]
    assert not twice, f"{MAP} has more than one line for {twice}"


def test_every_line_says_what_is_read_and_given():
    for line in MAP.read_text("utf-8").splitlines():
        if line.startswith("| `"):
            assert len([cell for cell in line.strip("|").split(" | ") if cell.strip()]) == 3, line


def test_modules_import_only_from_above():
    wrong = too_low(map_lines(), {module: imports(module) for module in modules()})
    assert not wrong, f"in {MAP}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("module", modules())
def test_imports_are_absolute(module):
    """`imports` reads absolute imports only: a relative one would pass the law unseen."""
    parts = module.split(".")[1:]
    path = PACKAGE.joinpath(*parts)
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    relative = [node.lineno for node in ast.walk(ast.parse(path.read_text("utf-8"))) if getattr(node, "level", None)]
    assert not relative, f"{path}: relative imports in lines {relative}; write `from kvpipe.… import`"


def test_the_law_finds_an_import_from_below():
    order = {"kvpipe.a": 5, "kvpipe.b": 7, "kvpipe.c": 9}
    fine = {"kvpipe.a": frozenset(), "kvpipe.b": frozenset({"kvpipe.a"}), "kvpipe.c": frozenset({"kvpipe.b"})}
    assert too_low(order, fine) == []
    (message,) = too_low(order, {**fine, "kvpipe.a": frozenset({"kvpipe.c"})})
    assert "kvpipe.a (line 5) imports kvpipe.c (line 9)" in message


def test_imports_inside_functions_count():
    """`__main__` imports its steps only when they are called."""
    assert {"kvpipe.train", "kvpipe.evaluate"} <= imports("kvpipe.__main__")
