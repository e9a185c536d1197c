"""The token alignment of two tokenizers on a text, for people (`kvpipe align`) and for programs (`--json`)."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table
from rich.text import Text

from kvpipe.tokens.matrix import Mode, encode, overlap

_VISIBLE = {" ": "·", "\n": "⏎", "\r": "␍", "\t": "⇥", "\0": "␀", "\u00a0": "⍽", "\u200d": "‹ZWJ›"}


def show_alignment(
    src_tokenizer: Any, dst_tokenizer: Any, text: str, mode: Mode = "iou", as_json: bool = False
) -> str | Table:
    """Each destination token with its bytes and the source tokens it is made from.

    Returns a `rich.table.Table`, or with `as_json` the rows of `alignment_rows` as a JSON list. Raises what
    `encode` raises.
    """
    rows = alignment_rows(src_tokenizer, dst_tokenizer, text, mode)
    if as_json:
        return json.dumps(rows, ensure_ascii=False, indent=2)
    table = Table(title=f"{mode}: each destination token from source tokens", title_justify="left")
    table.add_column("#", justify="right", style="dim")
    table.add_column("destination token")
    table.add_column("bytes", justify="right")
    table.add_column("source tokens (weight)")
    for row in rows:
        table.add_row(
            str(row["position"]),
            _token_cell(row["text"], row["start"], row["stop"], row["token"], "bold cyan"),
            f"{row['start']}–{row['stop']}" if row["stop"] > row["start"] else "",
            _source_cell(row["sources"]),
        )
    return table


def alignment_rows(src_tokenizer: Any, dst_tokenizer: Any, text: str, mode: Mode = "iou") -> list[dict]:
    """One dict per destination token: position, id, token, text, start, stop (bytes), sources (with weight).

    `token` is the vocabulary's own string, `text` the piece of the text it stands for; a byte that is only part
    of a character is written `<0xNN>`.
    """
    data = text.encode("utf-8")
    src, dst = encode(src_tokenizer, text), encode(dst_tokenizer, text)
    matrix = overlap(src.spans, dst.spans, mode)
    start, col, weight = (x.tolist() for x in (matrix.crow_indices(), matrix.col_indices(), matrix.values()))
    src_rows = _described(src_tokenizer, src.ids.tolist(), src.spans.tolist(), data)
    dst_rows = _described(dst_tokenizer, dst.ids.tolist(), dst.spans.tolist(), data)
    return [
        row | {"sources": [src_rows[col[k]] | {"weight": round(weight[k], 6)} for k in range(start[i], start[i + 1])]}
        for i, row in enumerate(dst_rows)
    ]


def visible(piece: str) -> str:
    """Whitespace and control characters as signs that can be seen."""
    return "".join(_VISIBLE.get(c, c if c.isprintable() else f"‹U+{ord(c):04X}›") for c in piece)


def _described(tokenizer: Any, ids: list[int], spans: list[list[int]], data: bytes) -> list[dict]:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    return [
        {
            "position": i,
            "id": token,
            "token": backend.id_to_token(token),
            "text": _readable(data[start:stop]),
            "start": start,
            "stop": stop,
        }
        for i, (token, (start, stop)) in enumerate(zip(ids, spans, strict=True))
    ]


def _readable(piece: bytes) -> str:
    """Text of a byte range; bytes that are not whole characters as `<0xNN>`."""
    decoded = piece.decode("utf-8", errors="surrogateescape")
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in decoded)


def _token_cell(text: str, start: int, stop: int, token: str, style: str) -> Text:
    if stop > start:
        return Text(visible(text), style=style)
    return Text(f"{visible(token)} (no bytes)", style="dim")


def _source_cell(sources: list[dict]) -> Text:
    if not sources:
        return Text("none: masked", style="dim")
    cell = Text()
    for k, source in enumerate(sources):
        cell.append("  " if k else "")
        cell.append(_token_cell(source["text"], source["start"], source["stop"], source["token"], "bold magenta"))
        cell.append(f" {source['weight']:.2f}", style="dim")
    return cell
