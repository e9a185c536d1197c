"""A file of texts: one a line of `.txt`, one a row of `.jsonl` or `.parquet`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvpipe.data.rows import READERS
from kvpipe.tokens.segments import NAMES

COLUMN = "text"
"""Of a row; else its record's fields, where it has any of them."""


def read_texts(path: Path) -> list[tuple[str, str]]:
    """(place, text) of every text that is not blank; of rows the column `text`, or else prompt, reasoning and answer.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read (names the line), without these columns, or without a text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of texts (.txt, .jsonl or .parquet)")
    if path.suffix == ".txt":
        found = _lines_of_text(path)
    elif path.suffix in READERS:
        rows, places = READERS[path.suffix](path)
        found = [(place, _text(row, place)) for row, place in zip(rows, places, strict=True)]
    else:
        raise ValueError(f"{path}: texts are read from .txt (one a line), .jsonl and .parquet")
    found = [(place, text) for place, text in found if text.strip()]
    if not found:
        raise ValueError(f"{path} holds no text")
    return found


def _lines_of_text(path: Path) -> list[tuple[str, str]]:
    found = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: not UTF-8: {error}; save the file as UTF-8") from None
            found.append((place, text.rstrip("\r\n")))
    return found


def _text(row: dict[str, Any], place: str) -> str:
    names = [COLUMN] if row.get(COLUMN) is not None else [name for name in NAMES if row.get(name) is not None]
    for name in names:
        if not isinstance(row[name], str):
            raise ValueError(f"{place}: {name} is {type(row[name]).__name__}, expected text")
    if not names:
        columns = ", ".join(row) or "none"
        raise ValueError(f"{place}: no column {COLUMN}, and none of {', '.join(NAMES)} (has {columns}); rename one")
    return "\n".join(row[name] for name in names)
