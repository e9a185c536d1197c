"""Which tokens of two vocabularies stand for the same text."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

from kvpipe.tokens.spans import token_bytes


def same_tokens(src_tokenizer, dst_tokenizer) -> Int64[np.ndarray, "src_token"]:
    """For every source token id the destination id that stands for the same text, or −1.

    Same text is the same bytes, a space in front included. The two end-of-text tokens are the same, other special
    tokens have none. Where several destination tokens stand for the bytes, it is the one that is no byte-fallback token.
    """
    names = dst_tokenizer.convert_ids_to_tokens(list(range(len(dst_tokenizer))))
    by_bytes: dict[bytes, int] = {}
    for index, raw in enumerate(token_bytes(dst_tokenizer)):
        if raw and (raw not in by_bytes or names[by_bytes[raw]].startswith("<0x")):
            by_bytes[raw] = index
    out = np.array([by_bytes.get(raw, -1) if raw else -1 for raw in token_bytes(src_tokenizer)], dtype=np.int64)
    if src_tokenizer.eos_token_id is not None and dst_tokenizer.eos_token_id is not None:
        out[src_tokenizer.eos_token_id] = dst_tokenizer.eos_token_id
    return out
