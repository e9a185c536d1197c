"""The log's entries have their four parts, and the index is that of the entries."""

import pytest

from tools import log


def test_the_index_is_that_of_the_entries():
    assert log.INDEX.read_text("utf-8") == log.index(), "run make log"


def test_an_entry_without_a_part_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "FOLDER", tmp_path)
    (tmp_path / "2026-01-01-x.md").write_text("# X\n\n**Question.** Why?\n\n**Result.** 1\n")
    with pytest.raises(ValueError, match=r"2026-01-01-x\.md: an entry has the parts Question, Setup"):
        log.index()
