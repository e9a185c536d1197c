"""What a model can read, by its config: ids that have an embedding, and positions. Checked before the first forward."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64

from kvpipe.align.rope import positions_are_a_table
from kvpipe.data.encoding import Encoding
from kvpipe.data.records import Record


@dataclass
class Limits:
    """Of one model. `table`: positions beyond the last have no embedding; rotary ones go on, untrained."""

    name: str
    vocabulary: int
    positions: int | None
    table: bool
    context: Literal["warn", "strict"] = "warn"
    _warned: bool = field(default=False, init=False)

    @classmethod
    def of(cls, name: str, hf_config: Any, context: Literal["warn", "strict"] = "warn") -> Limits:
        """The limits that a transformers config states; `name` is how messages call the model."""
        config = hf_config.get_text_config(decoder=True)
        positions = getattr(config, "max_position_embeddings", None)
        return cls(name, config.vocab_size, positions, positions_are_a_table(config), context)

    def check(
        self,
        encoding: Encoding,
        records: Sequence[Record],
        tokenizer: Any,
        reads: Int64[np.ndarray, "example"] | None = None,
    ) -> None:
        """Refuse ids without an embedding and positions without one; what else is beyond the context is warned of once.

        Args:
            encoding: the texts of `records`, in order.
            records: named in messages.
            tokenizer: of the encoding.
            reads: tokens that one forward reads of each text; all of them by default.

        Raises:
            ValueError: names the model, the record and the token.
        """
        bad = np.flatnonzero(encoding.ids >= self.vocabulary)
        if bad.size:
            example = int(np.searchsorted(encoding.offsets, bad[0], side="right")) - 1
            place = int(bad[0] - encoding.offsets[example])
            self._refuse_id(tokenizer, int(encoding.ids[bad[0]]), f"token {place} of record {records[example].id!r}")
        pad = tokenizer.pad_token_id
        if pad is not None and pad >= self.vocabulary and len(records):
            shortest = records[int(encoding.lengths.argmin())]
            self._refuse_id(tokenizer, pad, f"what record {shortest.id!r} is padded with in a batch")
        reads = encoding.lengths if reads is None else reads
        if self.positions is None or not len(reads) or reads.max() <= self.positions:
            return
        over = np.flatnonzero(reads > self.positions)
        first = records[int(over[0])]
        message = (
            f"model {self.name}: record {first.id!r} has {int(reads[over[0]])} tokens, more than the {self.positions} that "
            f"the model reads (max_position_embeddings); {len(over)} of {len(reads)} texts are longer than that"
        )
        if self.table:
            raise ValueError(f"{message}. It has no embedding for later positions: shorten or leave out these records")
        if self.context == "strict":
            raise ValueError(f"{message}. Shorten or leave out these records, or set data.context: warn")
        if not self._warned:
            self._warned = True
            warnings.warn(f"{message}, where it was not trained. data.context: strict refuses them", stacklevel=2)

    def _refuse_id(self, tokenizer: Any, token: int, what: str) -> None:
        raise ValueError(
            f"model {self.name}: {what} is {tokenizer.convert_ids_to_tokens(token)!r}, id {token}, but its embedding has "
            f"{self.vocabulary} rows (ids below {self.vocabulary}). The token was added without resizing the model: use "
            "the tokenizer that the model was trained with, resize the embedding, or keep the token out of the text"
        )
