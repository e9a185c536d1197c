"""Encode step: the splits as a model's tokens, which every later step reads."""

from __future__ import annotations

from kvpipe.config import Reading
from kvpipe.data.encoding import encode_records, save_encoding
from kvpipe.experiment.steps import ENCODED
from kvpipe.models.limits import Limits
from kvpipe.steps.inputs import Inputs


def make_encoding(inputs: Inputs, model: str, reading: Reading) -> None:
    """The training and the validation split under a model's tokenizer, of one reading.

    Raises:
        ValueError: a text is longer than `train.max_length`, or has what the model has no embedding for.
    """
    config, tokenizer = inputs.config, inputs.tokenizer(model)
    student = model == config.student
    limits = Limits.of(repr(model), inputs.model_config(model), config.data.context)
    for split in ENCODED:
        records = inputs.records(split, reading, model)
        encoding = encode_records(
            records,
            tokenizer,
            config.data.template,
            end=student,
            max_length=config.train.max_length if student else None,
        )
        limits.check(encoding, records, tokenizer)
        origin = inputs.origin_of_tokens(model, split, reading)
        save_encoding(encoding, inputs.paths.encoding(model, split, reading), origin)
