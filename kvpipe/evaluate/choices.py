"""Multiple choice by likelihood: how likely the model finds each choice as the answer to the prompt."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from kvpipe.config import Template
from kvpipe.data.batches import IGNORE
from kvpipe.data.chat import rendered
from kvpipe.data.encoding import Encoding, encode_texts
from kvpipe.data.records import Record
from kvpipe.models.likelihood import score, scoring_batches
from kvpipe.tokens.segments import Segmented

MARK = "\0"
PERTURBED = 3
"""Wrong answers beside the right one under `perturbed`."""


def perturbed(record: Record) -> Record:
    """The record with choices: its answer, and the same with other numbers in the place of its last number.

    A wrong number has as many digits and differs in one of them, in every place where the right one stands as a number of
    its own; which, follows from the record's content. The right answer comes first.

    Raises:
        ValueError: the answer has no number.
    """
    found = re.findall(r"\d+(?:\.\d+)?", record.answer.replace(",", ""))
    if not found:
        raise ValueError(f"record {record.id!r} has no number in its answer {record.answer!r}: take another scorer")
    right = found[-1]
    numbers = [
        right[:place] + digit + right[place + 1 :]
        for place, old in enumerate(right)
        for digit in "0123456789"
        if old not in (digit, ".") and (place or digit != "0" or not right[1:2].isdigit())
    ]
    drawn = random.Random(record.content_hash()).sample(numbers, PERTURBED)
    written = ",?".join(map(re.escape, right))
    alone = re.compile(rf"(?<![\d.,]){written}(?![.,]?\d)")
    return replace(record, choices=(record.answer, *(alone.sub(number, record.answer) for number in drawn)))


def variants(tokenizer, records: Sequence[Record], template: Template, worked: bool = False) -> list[Segmented]:
    """Each record's choices in turn: everything the template writes before the answer as the prompt, then a choice.

    White space before a choice counts with it, as in lm-evaluation-harness; what the template writes behind it is left out.
    The reasoning is left out too, but for `worked`.

    Raises:
        ValueError: a record has no choices; names it.
    """
    found = []
    for record in records:
        if record.choices is None:
            raise ValueError(f"record {record.id!r} has no choices, which evaluate.…scorer: choice needs")
        text = rendered(tokenizer, replace(record, reasoning=record.reasoning if worked else "", answer=MARK), template)
        before = text.prompt + text.reasoning + text.answer.partition(MARK)[0]
        # what all choices share must not be in their nats: divided by the bytes of each it would favour the longest
        context = before.rstrip()
        found += [Segmented(context, "", before[len(context) :] + choice) for choice in record.choices]
    return found


def choice_encoding(tokenizer, records: Sequence[Record], template: Template, worked: bool = False) -> Encoding:
    """The `variants` of some records, encoded."""
    names = [record.id for record in records for _ in record.choices or ()]
    return encode_texts(names, variants(tokenizer, records, template, worked), tokenizer, template.chat_template)


def choice_nll(
    model, tokenizer, records: Sequence[Record], template: Template, pad_id: int, batch_size: int, worked: bool = False
) -> list[list[float]]:
    """Nats of each choice behind everything the template writes before it, per record; see `variants`."""
    if not records:
        return []
    encoding = choice_encoding(tokenizer, records, template, worked)
    batches = scoring_batches(encoding, pad_id, batch_size)
    for batch in batches:  # no logits of what all choices share
        starts = torch.from_numpy(encoding.segments[batch.examples, 0, 1])
        batch.labels[torch.arange(batch.labels.shape[1]) < starts[:, None]] = IGNORE
    nll = iter(score(model, encoding, batches).nll.tolist())
    return [[next(nll) for _ in record.choices or ()] for record in records]


def chosen(nll: Sequence[float], choices: Sequence[str], by: Literal["sum", "byte"]) -> str:
    """The likeliest choice: as a whole, or per byte of its text. Of equals the first."""
    lengths = [1 if by == "sum" else len(choice.encode()) for choice in choices]
    return choices[int(np.argmin(np.asarray(nll) / lengths))]
