"""Two tokenizers over many texts: what each keeps of them, and how much of the one lines up with the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any, get_args

import numpy as np

from kvpipe.tokens.matrix import Mode, encode, overlap
from kvpipe.tokens.spans import Tokens, token_bytes

MODES: tuple[Mode, ...] = get_args(Mode)
NOTHING_LEFT = "yields no token"
"""What `encode` says of a text of which a tokenizer keeps nothing."""


@dataclass
class Tally:
    """What one tokenizer makes of texts. A text without a token counts in `empty` alone."""

    texts: int = 0
    empty: int = 0
    bytes: int = 0
    tokens: int = 0
    """Those that stand for the text, and not the template's."""
    covered: int = 0
    """Bytes that lie in a token's span."""
    spelled: int = 0
    """Bytes of tokens that spell exactly what their span holds; a normaliser changes the others."""
    added: tuple[str, ...] = ()
    """What the template adds in front and at the end."""


class Tallied:
    """A tokenizer that keeps account of what it encodes.

    Args:
        tokenizer: a fast tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.tally = tokenizer, Tally()
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        pieces = token_bytes(tokenizer)
        # a special token that stands in a text is spelled as it is written
        self._spelled = [
            (backend.id_to_token(i) or "").encode() if piece is None else piece for i, piece in enumerate(pieces)
        ]
        special = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        self.tally.added = tuple(name for name, end in (("BOS", 0), ("EOS", -1)) if special[end])

    def encode(self, text: str, **options: Any) -> Tokens | None:
        """As `kvpipe.tokens.encode`; None for a text of which nothing is left.

        Raises:
            ValueError: any other text that cannot be followed.
        """
        try:
            tokens = encode(self.tokenizer, text, **options)
        except ValueError as error:
            if NOTHING_LEFT not in str(error):
                raise
            self.tally.texts += 1
            self.tally.empty += 1
            return None
        data, tally = text.encode("utf-8"), self.tally
        tally.texts += 1
        tally.bytes += len(data)
        for token, (start, stop) in zip(tokens.ids.tolist(), tokens.spans.tolist(), strict=True):
            if stop > start:
                piece, actual = self._spelled[token], data[start:stop]
                tally.tokens += 1
                tally.covered += stop - start
                tally.spelled += (stop - start) * (piece == actual or piece == b" " + actual)
        return tokens


@dataclass
class Alignment:
    """Student tokens that stand for a text, and what one mode of `overlap` gives them; of one text or of many."""

    tokens: int = 0
    targets: int = 0
    """Student tokens with a target."""
    sources: int = 0
    """Teacher tokens in all targets together."""
    shared: int = 0
    """Targets that are, with the same weights, the target of another student token too."""
    ahead: int = 0
    """Targets with a teacher token that ends after the student's: it has read text that the student has not."""

    def __add__(self, other: Alignment) -> Alignment:
        return Alignment(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class AlignedText:
    """One text under both tokenizers."""

    place: str
    text: str
    src_tokens: int
    dst_tokens: int
    same: int
    """Student tokens whose bytes are one teacher token's too."""
    ties: int
    """Student tokens that two teacher tokens or more overlap alike, and no other one more."""
    iou: float
    """Bytes in common / bytes in the union with the teacher token that fits best; mean over the student's tokens."""
    modes: dict[str, Alignment]

    @property
    def bytes(self) -> int:
        """UTF-8."""
        return len(self.text.encode("utf-8"))


@dataclass
class Compared:
    """All texts, and both tokenizers' accounts of them."""

    src: Tally
    dst: Tally
    texts: list[AlignedText] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    """(place, why) of texts that one of the two cannot be followed on."""

    def total(self, mode: Mode) -> Alignment:
        """Over all texts."""
        return sum((text.modes[mode] for text in self.texts), Alignment())

    @property
    def same(self) -> int:
        """Student tokens whose bytes are one teacher token's too."""
        return sum(text.same for text in self.texts)

    @property
    def ties(self) -> int:
        """Student tokens that two teacher tokens or more overlap alike."""
        return sum(text.ties for text in self.texts)

    def worst(self, count: int) -> list[AlignedText]:
        """The texts whose tokens fit least; of texts that fit alike the longer ones, and no text twice."""
        ordered = sorted(self.texts, key=lambda text: (text.iou, -text.bytes))
        distinct = {text.text: text for text in reversed(ordered)}
        return [text for text in ordered if distinct[text.text] is text][:count]


def compare_tokenizers(src_tokenizer: Any, dst_tokenizer: Any, texts: Iterable[tuple[str, str]]) -> Compared:
    """Align every text.

    Args:
        src_tokenizer: the teacher's; fast.
        dst_tokenizer: the student's; fast.
        texts: (place, text); the place is what a text is called by.

    Raises:
        ValueError: there is no text, or none that both tokenizers can be followed on.
    """
    src, dst = Tallied(src_tokenizer), Tallied(dst_tokenizer)
    found = Compared(src.tally, dst.tally)
    for place, text in texts:
        try:
            of_src, of_dst = src.encode(text), dst.encode(text)
        except ValueError as error:
            found.refused.append((place, str(error)))
            continue
        if of_src is None or of_dst is None:
            side = " and ".join(name for name, of in (("the teacher", of_src), ("the student", of_dst)) if of is None)
            found.refused.append((place, f"nothing of it is left for {side}"))
            continue
        found.texts.append(_aligned(place, text, of_src, of_dst))
    if not found.texts:
        first = f": {found.refused[0][0]}: {found.refused[0][1]}" if found.refused else ""
        raise ValueError(f"no text to align{first}")
    return found


def _aligned(place: str, text: str, src: Tokens, dst: Tokens) -> AlignedText:
    src_spans, dst_spans = src.spans.numpy(), dst.spans.numpy()
    has_bytes = dst_spans[:, 1] > dst_spans[:, 0]
    tokens = int(has_bytes.sum())
    src_text = src_spans[src_spans[:, 1] > src_spans[:, 0]]
    entries = {mode: _entries(src, dst, mode) for mode in MODES}
    row, col, _ = entries["iou"]
    common = np.minimum(src_spans[col, 1], dst_spans[row, 1]) - np.maximum(src_spans[col, 0], dst_spans[row, 0])
    union = np.maximum(src_spans[col, 1], dst_spans[row, 1]) - np.minimum(src_spans[col, 0], dst_spans[row, 0])
    iou = common / union  # equal quotients of integers are equal in double precision
    best = np.zeros(len(dst_spans))
    np.maximum.at(best, row, iou)
    winners = np.bincount(row[iou == best[row]], minlength=len(dst_spans))
    return AlignedText(
        place=place,
        text=text,
        src_tokens=len(src_text),
        dst_tokens=tokens,
        same=int((best[has_bytes] == 1).sum()),
        ties=int((winners > 1).sum()),
        iou=float(best[has_bytes].mean()) if tokens else 1.0,
        modes={mode: _counted(src, dst, entries[mode], tokens) for mode in MODES},
    )


_Entries = tuple[np.ndarray, np.ndarray, np.ndarray]


def _entries(src: Tokens, dst: Tokens, mode: Mode) -> _Entries:
    """(student token, teacher token, weight) of every entry of the overlap, by student token."""
    matrix = overlap(src.spans, dst.spans, mode)
    row = np.repeat(np.arange(len(dst.ids)), np.diff(matrix.crow_indices().numpy()))
    return row, matrix.col_indices().numpy(), matrix.values().numpy()


def _counted(src: Tokens, dst: Tokens, entries: _Entries, tokens: int) -> Alignment:
    row, col, weight = entries
    src_stop, dst_stop = src.spans[:, 1].numpy(), dst.spans[:, 1].numpy()
    listed = zip(row.tolist(), col.tolist(), weight.round(6).tolist(), strict=True)
    targets = Counter(tuple(entry[1:] for entry in group) for _, group in groupby(listed, key=itemgetter(0)))
    return Alignment(
        tokens=tokens,
        targets=targets.total(),
        sources=len(row),
        shared=sum(count for count in targets.values() if count > 1),
        ahead=len(np.unique(row[src_stop[col] > dst_stop[row]])),
    )
