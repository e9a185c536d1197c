"""Multiple choice by likelihood: how likely the model finds each choice as the answer to the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from kvpipe.config import Template
from kvpipe.data.chat import rendered
from kvpipe.data.encoding import Encoding, encode_texts
from kvpipe.data.records import Record
from kvpipe.models.likelihood import score, scoring_batches
from kvpipe.tokens.segments import Segmented

MARK = "\0"


def variants(tokenizer, records: Sequence[Record], template: Template) -> list[Segmented]:
    """Each record's choices in turn: everything the template writes before the answer as the prompt, then a choice.

    White space before a choice counts with it, as in lm-evaluation-harness; what the template writes behind it is left out.

    Raises:
        ValueError: a record has no choices; names it.
    """
    found = []
    for record in records:
        if record.choices is None:
            raise ValueError(f"record {record.id!r} has no choices, which evaluate.…scorer: choice needs")
        text = rendered(tokenizer, replace(record, reasoning="", answer=MARK), template)
        before = text.prompt + text.answer.partition(MARK)[0]
        # what all choices share must not be in their nats: divided by the bytes of each it would favour the longest
        context = before.rstrip()
        found += [Segmented(context, "", before[len(context) :] + choice) for choice in record.choices]
    return found


def choice_encoding(tokenizer, records: Sequence[Record], template: Template) -> Encoding:
    """The `variants` of some records, encoded."""
    names = [record.id for record in records for _ in record.choices or ()]
    return encode_texts(names, variants(tokenizer, records, template), tokenizer, template.chat_template)


def choice_nll(
    model, tokenizer, records: Sequence[Record], template: Template, pad_id: int, batch_size: int
) -> list[list[float]]:
    """Nats of each choice behind everything the template writes before it, per record; see `variants`."""
    if not records:
        return []
    encoding = choice_encoding(tokenizer, records, template)
    nll = iter(score(model, encoding, scoring_batches(encoding, pad_id, batch_size)).nll.tolist())
    return [[next(nll) for _ in record.choices or ()] for record in records]


def chosen(nll: Sequence[float], choices: Sequence[str], by: Literal["sum", "byte"]) -> str:
    """The likeliest choice: as a whole, or per byte of its text. Of equals the first."""
    lengths = [1 if by == "sum" else len(choice.encode()) for choice in choices]
    return choices[int(np.argmin(np.asarray(nll) / lengths))]
