"""The tables of docs/method/compatibility.md have a row for every entry of the zoos, and are those that the runs give."""

import re

import pytest
from compat import LAYOUTS, METHOD, architecture_row, committed, power, rope_row, table, tokenizer_row
from model_zoo import ARCHITECTURES
from rope_zoo import VARIANTS
from tokenizer_zoo import FAMILIES

from kvpipe.config import load


def rows() -> list[str]:
    return [line for line in committed()[1].splitlines() if line.startswith("| `")]


def test_every_entry_has_one_row_and_nothing_else_has():
    names = [line.split("`")[1] for line in rows()]
    assert names == [*ARCHITECTURES, *VARIANTS, *LAYOUTS, *FAMILIES]


def test_no_check_failed():
    assert "✗" not in committed()[1]


@pytest.mark.parametrize(
    "row, name",
    [
        (architecture_row, "glm"),
        (architecture_row, "bloom"),
        (rope_row, "longrope"),
        (tokenizer_row, "llama2"),
        (tokenizer_row, "t5"),
    ],
)
def test_a_row_regenerates_to_the_committed_text(row, name):
    line = table([], [row(name)]).splitlines()[-1]
    assert line in rows()


@pytest.mark.parametrize("error, text", [(0.0, "≤ 1e-6"), (3e-7, "≤ 1e-6"), (2e-6, "≤ 1e-5"), (0.4, "≤ 1e0")])
def test_errors_are_bounded_from_above(error, text):
    assert power(error) == text
    assert error <= float(text[2:])


ROOT = METHOD.parents[2]


def test_method_says_what_every_arm_adds():
    """Each arm of the embedded experiment has a line that names its base."""
    arms = load(ROOT / "config" / "config.yaml").arms
    text = (METHOD.parent / "results.md").read_text("utf-8")
    section = text.partition("## What each arm adds")[2].partition("\n## ")[0]
    lines = dict(re.findall(r"^\| `([\w-]+)` \| ([\w–-]+) \|", section, flags=re.MULTILINE))
    assert lines == {name: arm.base or "–" for name, arm in arms.items()}


def test_method_names_only_tests_and_files_that_exist():
    files = {
        path.relative_to(ROOT / "tests").as_posix(): path.read_text("utf-8") for path in ROOT.glob("tests/**/test_*.py")
    }
    pages = "".join(path.read_text("utf-8") for path in METHOD.parent.glob("*.md"))
    functions = re.findall(r"`(?:[\w/]+\.py::)?(test_\w+)`", pages)
    assert len(functions) >= 2 and not [name for name in functions if f"def {name}(" not in "".join(files.values())]
    named = re.findall(r"`((?:[\w/]+/)?test_\w+\.py)", pages)
    assert len(named) > 15 and not [
        name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)
    ]
