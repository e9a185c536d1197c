"""docs/status.md: every promise has a state, code and what shows it, and every link leads somewhere."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "status.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| promise")
]
STATES = ("kept", "**not so**", "open", "**declined**", "**more**")


def test_every_promise_is_a_row_with_code_and_evidence():
    assert len(ROWS) == 34
    for promise, state, where, shown in ROWS:
        assert promise and any(word in state for word in STATES), promise
        assert "](" in where, promise
        assert "](" in shown or (shown == "–" and "open" in state), promise


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)", PAGE.read_text(encoding="utf-8")))))
def test_links_lead_somewhere(link):
    assert (PAGE.parent / link).exists()
