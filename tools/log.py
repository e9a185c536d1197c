"""docs/log/README.md, the index of the log, from its entries: `make log`."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "docs" / "log"
INDEX = FOLDER / "README.md"
PARTS = ("Question", "Setup", "Result", "Consequence")
HEAD = """# Log

What was tried and measured, newest first, negative results included. An entry is a file
`YYYY-MM-DD-name.md` with a title and four parts: **Question.** **Setup.** (the command, commit and configuration
that reproduce it) **Result.** (figures with intervals, seeds and number of items) **Consequence.** An entry is
never rewritten but to shorten it: a later one corrects it. `make log` writes this index.

| date | entry | question |
|---|---|---|
"""


def index() -> str:
    """The index as it should be.

    Raises:
        ValueError: an entry lacks a part, or has them in another order.
    """
    rows = []
    for path in sorted(FOLDER.glob("20*.md"), reverse=True):
        text = path.read_text(encoding="utf-8")
        found = re.findall(rf"^\*\*({'|'.join(PARTS)})\.\*\*", text, re.MULTILINE)
        if tuple(found) != PARTS:
            raise ValueError(
                f"{path}: an entry has the parts {', '.join(PARTS)}, once and in this order; this has {found}"
            )
        title = re.match(r"# (.+)", text)
        question = re.search(r"^\*\*Question\.\*\* (.+?)\n\n", text, re.MULTILINE | re.DOTALL)
        if not title or not question:
            raise ValueError(f"{path}: it begins with a title, and its question is one paragraph")
        rows.append(f"| {path.name[:10]} | [{title[1]}]({path.name}) | {' '.join(question[1].split())} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    INDEX.write_text(index(), encoding="utf-8")
