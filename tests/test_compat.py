"""The tables of docs/method.md have a row for every entry of the zoos, and are those that the runs give."""

import pytest
from compat import LAYOUTS, architecture_row, committed, power, rope_row, table, tokenizer_row
from model_zoo import ARCHITECTURES
from rope_zoo import VARIANTS
from tokenizer_zoo import FAMILIES


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
