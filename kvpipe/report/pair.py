"""The page of two tokenizers over a file of texts: `kvpipe align --report`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvpipe.experiment.files import write_text
from kvpipe.report.alignment import draw_alignment
from kvpipe.report.html import filled
from kvpipe.report.style import inline
from kvpipe.report.table import Cell, Column, Table
from kvpipe.tokens.compare import MODES, AlignedText, Compared, Tally, compare_tokenizers
from kvpipe.tokens.matrix import Mode
from kvpipe.tokens.show import visible

WORST = 10
"""Texts in the table of those that line up least."""
SHOWN_TEXT = 240
"""Characters of a text in a table."""
TALLIED = (
    *("texts", "tokens", "bytes per token", "bytes covered", "bytes spelled", "texts without a token"),
    "template adds",
)
MODE_TEXTS = {
    "iou": "every teacher token that overlaps, by its share of the bytes",
    "causal": "the last teacher token that has ended by the end of the student’s",
    "position": "token i for token i: the wrong alignment, as a comparison",
}


def write_pair(
    names: tuple[str, str],
    tokenizers: tuple[Any, Any],
    texts: Iterable[tuple[str, str]],
    out: Path,
    mode: Mode = "causal",
) -> str:
    """Compare two tokenizers and write the page; return its first sentence.

    Args:
        names: what the teacher's and the student's are called.
        tokenizers: both, fast.
        texts: (place, text).
        out: the HTML file; everything is inside it, nothing is loaded from elsewhere.
        mode: whose targets the first sentence, the worst texts and the picture show.

    Raises:
        ValueError: no text, or none that both tokenizers can be followed on.
    """
    found = compare_tokenizers(*tokenizers, texts)
    worst, answer = found.worst(WORST), first_sentence(found, mode)
    shown = {
        "title": f"{names[0]} and {names[1]}",
        "sections": {"answer": "The answer", "targets": "Targets", "tokenizers": "Tokenizers", "worst": "Worst texts"},
        "roles": [],
        "names": names,
        "mode": mode,
        "answer": answer,
        "example": worst[0],
        "figures": {"alignment": inline(draw_alignment(*tokenizers, worst[0].text, mode), "Tokens of one text")},
        "tables": {
            "targets": targets(found),
            "tokenizers": tokenizers_table(names, found),
            "worst": worst_texts(worst, mode),
            "refused": refused(found),
        },
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, filled("pair.html", shown))
    return answer


def first_sentence(found: Compared, mode: Mode) -> str:
    """What the page says first."""
    total = found.total(mode)
    return (
        f"Under {mode}, {percent(total.targets, total.tokens)} of the student’s {total.tokens:,} tokens have a target. "
        f"{percent(found.same, total.tokens)} of them are one teacher token, byte for byte; "
        f"{percent(found.ties, total.tokens)} are ties: two teacher tokens overlap them alike."
    )


def percent(part: int, whole: int) -> str:
    """A share that is not rounded to all or to nothing."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.05:
        return "< 0.1%"
    return "> 99.9%" if 99.95 <= share < 100 else f"{share:.1f}%"


def targets(found: Compared) -> Table:
    """A row for each mode."""
    heads = [Column("tokens with a target"), Column("teacher tokens", "per target"), Column("shared"), Column("ahead")]
    table = Table("What each mode gives the student’s tokens that stand for the text, over all texts.", "mode", heads)
    for mode in MODES:
        total = found.total(mode)
        parts = [percent(count, total.targets) for count in (total.shared, total.ahead)]
        mean = f"{total.sources / total.targets:.2f}" if total.targets else "–"
        table.add(mode, percent(total.targets, total.tokens), mean, *parts, label=MODE_TEXTS[mode])
    return table


def tokenizers_table(names: tuple[str, str], found: Compared) -> Table:
    """Coverage of each of the two; the columns are those of docs/method/compatibility.md."""
    *heads, added = TALLIED
    table = Table("Both tokenizers over the texts.", "tokenizer", [*map(Column, heads), Column(added, number=False)])
    for name, side, tally in zip(names, ("teacher", "student"), (found.src, found.dst), strict=True):
        table.add(name, *tally_cells(tally), label=side)
    return table


def tally_cells(tally: Tally) -> list[str]:
    """A tokenizer's account as text, under the heads of `TALLIED`."""
    return [
        f"{tally.texts:,}",
        f"{tally.tokens:,}",
        f"{tally.bytes / tally.tokens:.2f}" if tally.tokens else "–",
        percent(tally.covered, tally.bytes),
        percent(tally.spelled, tally.bytes),
        str(tally.empty),
        " + ".join(tally.added) or "none",
    ]


def worst_texts(worst: list[AlignedText], mode: Mode) -> Table:
    """The texts whose tokens fit least."""
    heads = ["overlap", "tokens alike", "with a target", "ties", "teacher tokens", "student tokens"]
    table = Table(
        f"The {len(worst)} texts whose tokens overlap least; targets under {mode}.",
        "text",
        [Column("begins", number=False), *map(Column, heads)],
    )
    for text in worst:
        found = text.modes[mode]
        table.add(
            text.place,
            Cell(visible(beginning(text.text)), css="wrap text"),
            f"{text.iou:.2f}",
            percent(text.same, text.dst_tokens),
            percent(found.targets, found.tokens),
            percent(text.ties, text.dst_tokens),
            str(text.src_tokens),
            str(text.dst_tokens),
        )
    return table


def refused(found: Compared) -> Table:
    """Texts that are left out, the first of them."""
    table = Table(
        f"Left out, since a tokenizer cannot be followed on them: {len(found.refused):,}"
        + (f", of which the first {WORST} are here." if len(found.refused) > WORST else "."),
        "text",
        [Column("reason", number=False)],
    )
    for place, why in found.refused[:WORST]:
        table.add(place, Cell(beginning(why), css="wrap text"))
    return table


def beginning(text: str) -> str:
    """Its beginning."""
    return text if len(text) <= SHOWN_TEXT else text[: SHOWN_TEXT - 1] + "…"
