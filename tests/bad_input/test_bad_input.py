"""Bad input ends in one line that says what, where and what to do; nothing that was computed is lost."""

import re
from pathlib import Path

import pytest
from bad_input_run import build, outcome
from bad_input_table import TABLE, messages

CASES = [case for cases in TABLE.values() for case in cases]
PAGE = Path(__file__).parents[2] / "docs" / "messages.md"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The experiment that every case is a copy of."""
    folder = tmp_path_factory.mktemp("base")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the copy is."""
    return tmp_path_factory.mktemp("copy")


@pytest.mark.parametrize("case", CASES, ids=[case.what for case in CASES])
def test_one_line(base, folder, case):
    found = outcome(case, base, folder)
    assert found.status in ((0,) if case.goes_on else (1, 2)), found
    assert re.search(case.says, found.message.replace("\n", " ")), found.message
    assert "Traceback" not in found.message + found.printed
    first, *more = found.message.splitlines()
    # what is listed has the configuration's file, or what was checked, on a line of its own
    assert not more or (first.endswith(":") and len(more) <= 2), found.message
    assert not found.lost


def test_the_cases_differ():
    assert len(CASES) >= 150 and len({case.what for case in CASES}) == len(CASES)


def test_the_page_has_every_case_with_its_message():
    """`make messages` writes it; libraries and versions of Python word their part of a message in their own way."""
    found = messages(PAGE.read_text(encoding="utf-8"))
    assert list(found) == [(" ".join(case.what.split()), f"`kvpipe {case.command}`") for case in CASES]
    for case, said in zip(CASES, found.values(), strict=True):
        assert re.search(case.says, said), (case.what, said)
