"""Byte spans of tokens: which bytes of the UTF-8 text each token of one tokenization stands for.

A text is tokenized once, whole, by each model's own fast tokenizer, never piece by piece, which would change the
tokenization.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tokenizers
import torch
from jaxtyping import Int64
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

# GPT-2's alphabet: 256 printable characters, one for each byte (`bytes_to_unicode` in openai/gpt-2, encoder.py).
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_CHARACTERS = frozenset(ByteLevel.alphabet())
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {
    chr(0x100 + i): b for i, b in enumerate(b for b in range(0x100) if b not in _PRINTABLE)
}
# by code point; beyond the ideographic space (U+3000) there is none, and the last entry stands for all of that
_IS_WHITESPACE = np.array([chr(c).isspace() for c in range(0x3002)])


@dataclass(frozen=True)
class Tokens:
    """One tokenization. `spans` are half-open byte ranges; together they cover the text once and in order.

    Tokens that a template adds (BOS, EOS, [CLS] …) have an empty span where they stand.
    """

    ids: Int64[Tensor, "time"]
    spans: Int64[Tensor, "time 2"]


def encode(
    tokenizer: Any,
    text: str,
    add_special_tokens: bool = True,
    lossy: Literal["nearest", "error"] = "nearest",
) -> Tokens:
    """Tokenize `text` whole and give every token its byte span.

    `tokenizer` is a fast tokenizer of transformers or a `tokenizers.Tokenizer`. The spans of the tokens that
    the template did not add cover every byte exactly once and in order. A fast tokenizer reports *character*
    ranges, which may overlap, leave gaps or hide bytes; three rules make byte spans of them:

    1. Tokens that share a character (byte-level and byte-fallback tokens; one character that a normaliser
       expands) divide it by the number of bytes that each of them spells. This is exact unless a normaliser
       changed the character; then the boundary is the proportional one, so a token may come out empty.
    2. Bytes that no token reports are given away: whitespace, and all that comes after it in the same gap, to
       the following token; what stands before the first whitespace (combining marks, control characters) to
       the preceding token. At the start of the text all go to the first token, at its end to the last one.
    3. A prefix space that the tokenizer invented stands for no byte: a lone `▁` then has an empty span.

    With `lossy="error"` a text that the tokens do not spell byte for byte (lower-cased, accents stripped,
    whitespace dropped, unknown token) is refused by tokenizer and first byte instead.

    The backend's truncation, padding and template are set aside during the call and put back, so one tokenizer
    must not be used by two threads at once (as in transformers).

    Raises `TypeError` for a tokenizer that is not fast and `ValueError` for a text with lone surrogates, for one
    that yields no token although it has bytes, and for a post-processor that drops tokens.
    """
    backend = _backend(tokenizer)
    name = getattr(tokenizer, "name_or_path", "") or f"{type(backend.model).__name__} tokenizer"
    try:
        data = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: character {error.start} of the text is a lone surrogate, which has no UTF-8 form; "
            "remove or replace it before tokenizing"
        ) from error

    with _whole_text(backend) as (run, finish):
        raw = run(text)
        full = finish(raw, add_special_tokens)
    ids = np.array(full.ids, dtype=np.int64)
    is_text = np.array(full.special_tokens_mask, dtype=bool) == 0
    if data.size and not is_text.any():
        raise ValueError(
            f"{name} yields no token for a text of {data.size} bytes (from byte 0 on, {text[:10]!r}), so nothing can "
            "stand for them; leave such texts out or use a tokenizer that keeps them"
        )

    if int(is_text.sum()) != len(raw.ids):
        raise ValueError(
            f"{name}: its template marks {int(is_text.sum())} of {len(ids)} tokens as text where the text has "
            f"{len(raw.ids)}; its post-processor drops or disguises tokens, which byte spans cannot follow"
        )

    # what tokens spell is only needed where some share a character: most short texts do without
    spelled = functools.cache(lambda: _spelled(backend, raw))
    bounds = _boundaries(text, np.array(raw.offsets, dtype=np.int64).reshape(-1, 2), spelled)
    if lossy == "error":
        _refuse_lossy(name, data, bounds, *spelled())

    # A template's token stands at the end of the text token before it.
    ends = bounds[np.cumsum(is_text)]
    starts = np.where(is_text, np.concatenate([[0], ends[:-1]])[: len(ids)], ends)
    return Tokens(torch.from_numpy(ids), torch.from_numpy(np.stack([starts, ends], axis=1)))


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The bytes that every token id spells, a space in front included (`Ġcat` and `▁cat` are both b" cat").

    None for special tokens and for ids that stand for nothing. Raises `TypeError` for a tokenizer that is not fast.
    """
    backend = _backend(tokenizer)
    spell, size = _speller(backend), backend.get_vocab_size(with_added_tokens=True)
    special = {token for token, added in backend.get_added_tokens_decoder().items() if added.special}
    special |= set(getattr(tokenizer, "all_special_ids", []))
    strings = {token: string for string, token in backend.get_vocab(with_added_tokens=True).items()}
    return [
        spell(token, strings[token]) if token in strings and token not in special else None
        for token in range(max([size, *(token + 1 for token in strings)]))
    ]


def _backend(tokenizer: Any) -> tokenizers.Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise TypeError(
            f"byte spans need a fast tokenizer (transformers' PreTrainedTokenizerFast or tokenizers.Tokenizer), "
            f"got {type(tokenizer).__name__}; load or convert it as a fast one"
        )
    return backend


@contextmanager
def _whole_text(backend: tokenizers.Tokenizer) -> Iterator[tuple]:
    """`(run, finish)`: tokenize without truncation, padding and trimmed offsets, then add the template's tokens.

    Trimmed offsets lose where a byte-level token began, so the post-processor is only run afterwards.
    """
    truncation, padding, template = backend.truncation, backend.padding, backend.post_processor

    def run(text: str) -> tokenizers.Encoding:
        backend.post_processor = None
        return backend.encode(text, add_special_tokens=False)

    def finish(raw: tokenizers.Encoding, add_special_tokens: bool) -> tokenizers.Encoding:
        backend.post_processor = template
        return backend.post_process(raw, add_special_tokens=add_special_tokens)

    try:
        backend.no_truncation()
        backend.no_padding()
        yield run, finish
    finally:
        backend.post_processor = template
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def _speller(backend: tokenizers.Tokenizer) -> Callable[[int, str], bytes]:
    """`(id, string) -> bytes` that a token of the vocabulary spells."""
    components = b"".join(
        part.__getstate__() for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder) if part is not None
    )
    byte_level = b'"ByteLevel"' in components
    metaspace = "▁".encode() in components
    # BPE says whether it falls back to bytes; Unigram does not tell Python, but needs all 256 of them.
    byte_fallback = getattr(backend.model, "byte_fallback", None)
    if byte_fallback is None:
        byte_fallback = all(backend.token_to_id(f"<0x{b:02X}>") is not None for b in range(256))
    prefix = getattr(backend.model, "continuing_subword_prefix", None) or ""  # WordPiece's ##
    suffix = getattr(backend.model, "end_of_word_suffix", None) or ""  # CLIP's </w>
    added = backend.get_added_tokens_decoder()
    normalize = backend.normalizer.normalize_str if backend.normalizer is not None else str
    marks_spaces = "▁" in normalize(" ")

    def spell(token: int, string: str) -> bytes:
        # An added token is found in the text as it stands; a `normalized` one, itself normalised, in the normalised
        # text. One of the model's own vocabulary (Gemma's runs of spaces) is what the model makes of normalised text.
        if token in added and backend.model.token_to_id(added[token].content) is None:
            content = added[token].content
            found_normalized = added[token].normalized and marks_spaces
            return (normalize(content).replace("▁", " ") if found_normalized else content).encode()
        string = string.removeprefix(prefix).removesuffix(suffix)
        if byte_level and _BYTE_CHARACTERS.issuperset(string):
            return bytes(_BYTE_OF[c] for c in string)
        if byte_fallback and len(string) == 6 and string.startswith("<0x"):
            return bytes([int(string[3:5], 16)])
        return (string.replace("▁", " ") if metaspace else string).encode()

    return spell


def _spelled(backend: tokenizers.Tokenizer, raw: tokenizers.Encoding) -> tuple[list[bytes], np.ndarray]:
    """The bytes that each distinct token spells, and which of them each token is."""
    spell = _speller(backend)
    _, first, piece_of = np.unique(np.array(raw.ids, dtype=np.int64), return_index=True, return_inverse=True)
    ids, strings = raw.ids, raw.tokens
    return [spell(ids[i], strings[i]) for i in first], piece_of


def _boundaries(
    text: str, offsets: np.ndarray, spelled_pieces: Callable[[], tuple[list[bytes], np.ndarray]]
) -> np.ndarray:
    """Byte positions `b` (n + 1) with token i on [b[i], b[i+1]), from character ranges (n, 2) and spelled bytes."""
    codepoints = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    width = 1 + (codepoints >= 0x80) + (codepoints >= 0x800) + (codepoints >= 0x10000)
    byte_of = np.concatenate([[0], np.cumsum(width)])  # byte position of every character, and the text's length
    is_space = _IS_WHITESPACE[np.minimum(codepoints, len(_IS_WHITESPACE) - 1)]
    n = len(offsets)
    if n == 0:
        return np.zeros(1, dtype=np.int64)

    # Ranges are monotone in every tokenizer seen; where one were not, order wins over its report.
    start = np.minimum.accumulate(offsets[::-1, 0])[::-1]
    stop = np.maximum.accumulate(offsets[:, 1])
    end, begin = stop[:-1], start[1:]  # of each neighbouring pair
    shared = end > begin

    # Gap rule: up to the first whitespace the characters belong to the token before.
    position = np.arange(len(codepoints))
    next_space = np.append(np.where(is_space, position, len(codepoints)), len(codepoints))
    next_space = np.minimum.accumulate(next_space[::-1])[::-1]
    inner = byte_of[np.where(shared, end, np.minimum(next_space[end], np.maximum(begin, end)))]
    bounds = np.concatenate([[0], inner, [byte_of[-1]]])
    if not shared.any():
        return bounds

    # Groups of tokens chained by shared characters, divided by the bytes that their tokens spell.
    pieces, piece_of = spelled_pieces()
    opens = np.flatnonzero(np.concatenate([[True], ~shared]))
    closes = np.append(opens[1:], n)
    group = np.repeat(np.arange(len(opens)), closes - opens)[: n - 1]
    group_start = byte_of[start[opens]]  # what the tokens report; bytes of a gap before it are spelled by none
    group_length = byte_of[stop[closes - 1]] - group_start
    spelled = np.array([len(p) for p in pieces])[piece_of]

    # An invented prefix space, always first in its group, spells no byte of the text.
    leads_with_space = np.array([p[:1] == b" " for p in pieces])[piece_of[opens]]
    at_space = np.append(is_space, False)[start[opens]]
    invented = leads_with_space & (~at_space | (np.add.reduceat(spelled, opens) == group_length + 1))
    spelled[opens] -= invented

    total = np.concatenate([[0], np.cumsum(spelled)])
    group_spelled = np.maximum(total[closes] - total[opens], 1)
    cut = group_start[group] + (total[1:n] - total[opens][group]) * group_length[group] // group_spelled[group]
    cut = np.clip(cut, byte_of[begin], byte_of[end])  # nowhere but inside the shared characters
    bounds[1:n] = np.where(shared, cut, bounds[1:n])
    return np.maximum.accumulate(bounds)


def _refuse_lossy(name: str, data: np.ndarray, bounds: np.ndarray, pieces: list[bytes], piece_of: np.ndarray) -> None:
    """Raise at the first token that does not spell the bytes of its span."""
    text = data.tobytes()
    for i, piece in enumerate(piece_of):
        start, stop = int(bounds[i]), int(bounds[i + 1])
        spelled, actual = pieces[piece], text[start:stop]
        if spelled != actual and not (spelled[:1] == b" " and spelled[1:] == actual):
            raise ValueError(
                f"{name} does not keep the text: token {i} spells {spelled!r} for bytes {start} to {stop}, {actual!r}; "
                'use lossy="nearest" to accept the nearest spans, or a tokenizer without lossy normalisation'
            )
