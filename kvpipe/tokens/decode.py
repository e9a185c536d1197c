"""The text of token ids, and the bytes that each of them stands for: what `encode` gives, from the other end."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from kvpipe.tokens.spans import token_bytes

_bytes_of = lru_cache(maxsize=8)(token_bytes)


def decoded(tokenizer: Any, ids: Int64[Tensor, "time"]) -> tuple[str, Int64[Tensor, "time 2"]]:
    """The text that ids spell, and the byte span of each; special tokens have empty spans where they stand.

    >>> text, spans = decoded(tokenizer, ids)                                             # doctest: +SKIP

    A space that a tokenizer invents in front of the text is not one of its bytes. Where the ids end inside a character, the
    text ends before it.

    Raises:
        ValueError: the ids spell no text in UTF-8.
    """
    spelled, listed = _bytes_of(tokenizer), ids.tolist()
    pieces = [(spelled[token] if token < len(spelled) else None) or b"" for token in listed]
    first = next((i for i, piece in enumerate(pieces) if piece), None)
    if first is not None and pieces[first][:1] == b" ":
        shown = tokenizer.decode(listed, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        pieces[first] = pieces[first] if shown[:1] == " " else pieces[first][1:]
    whole = b"".join(pieces)
    try:
        text = whole.decode()
    except UnicodeDecodeError as error:
        if error.start < len(whole) - 3:
            name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise ValueError(f"{name}: the ids spell no UTF-8 text from byte {error.start} on") from None
        text = whole[: error.start].decode()
    length = len(text.encode())
    sizes = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
    ends = sizes.cumsum(0)
    return text, torch.stack([ends - sizes, ends], dim=1).clamp(max=length)
