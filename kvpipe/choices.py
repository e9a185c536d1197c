"""Multiple choice by likelihood: how likely the model finds each choice as the answer to the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from kvpipe.config import Template
from kvpipe.encoding import encode_records
from kvpipe.likelihood import score, scoring_batches
from kvpipe.records import Record

MARK = "\0"
PLAIN = Template(prompt="{prompt}", reasoning="", answer="{answer}")


def variants(records: Sequence[Record], template: Template) -> list[Record]:
    """Each record's choices in turn, as records: the prompt with everything the template writes before the answer, a choice.

    White space before a choice counts with it, as in lm-evaluation-harness; what the template writes behind it is left out.

    Raises:
        ValueError: a record has no choices; names it.
    """
    found = []
    for record in records:
        if record.choices is None:
            raise ValueError(f"record {record.id!r} has no choices, which evaluate.…scorer: choice needs")
        prompt = template.of(record.task).prompt.format(prompt=record.prompt)
        lead, _, _ = template.of(record.task).answer.format(answer=MARK).partition(MARK)
        # what all choices share must not be in their nats: divided by the bytes of each it would favour the longest
        context = (prompt + lead).rstrip()
        space = (prompt + lead)[len(context) :]
        found += [Record(record.id, record.task, context, "", space + choice) for choice in record.choices]
    return found


def choice_nll(
    model, tokenizer, records: Sequence[Record], template: Template, pad_id: int, batch_size: int
) -> list[list[float]]:
    """Nats of each choice behind everything the template writes before it, per record; see `variants`."""
    of_all = variants(records, template)
    if not of_all:
        return []
    encoding = encode_records(of_all, tokenizer, PLAIN)
    nll = iter(score(model, encoding, scoring_batches(encoding, pad_id, batch_size)).nll.tolist())
    return [[next(nll) for _ in record.choices or ()] for record in records]


def chosen(nll: Sequence[float], choices: Sequence[str], by: Literal["sum", "byte"]) -> str:
    """The likeliest choice: as a whole, or per byte of its text. Of equals the first."""
    lengths = [1 if by == "sum" else len(choice.encode()) for choice in choices]
    return choices[int(np.argmin(np.asarray(nll) / lengths))]
