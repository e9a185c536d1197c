"""Evaluate a model on the test split: likelihood and greedy generation, one row per item."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch

from kvpipe.answers import extract, is_correct
from kvpipe.config import EvaluateConfig, Template
from kvpipe.encoding import encode_records
from kvpipe.likelihood import score, scoring_batches
from kvpipe.models import load_model, load_tokenizer
from kvpipe.records import Record, render
from kvpipe.tokens import encode


def evaluate(
    folder: Path, records: list[Record], template: Template, config: EvaluateConfig, device: str
) -> pd.DataFrame:
    """Scores of the model in a folder; see `evaluate_model`."""
    return evaluate_model(load_model(folder, device=device), load_tokenizer(folder), records, template, config)


def evaluate_model(model, tokenizer, records: list[Record], template: Template, config: EvaluateConfig) -> pd.DataFrame:
    """One row per record.

    Columns: id, task, nll (nats, reasoning + answer), tokens, bytes, nll_all, tokens_all, bytes_all (all text), correct,
    prediction (the extracted answer or None), reference, text (what was generated).
    """
    encoding = encode_records(records, tokenizer, template)
    scores = score(model, encoding, scoring_batches(encoding, tokenizer.pad_token_id, config.batch_size))
    texts = generate(model, tokenizer, [render(record, template).prompt for record in records], config)
    predictions = [extract(text, config) for text in texts]
    return pd.DataFrame(
        {
            "id": [record.id for record in records],
            "task": [record.task for record in records],
            "nll": scores.nll,
            "tokens": scores.tokens,
            "bytes": scores.bytes,
            "nll_all": scores.nll_all,
            "tokens_all": scores.tokens_all,
            "bytes_all": scores.bytes_all,
            "correct": [is_correct(p, r.answer, config) for p, r in zip(predictions, records, strict=True)],
            "prediction": predictions,
            "reference": [record.answer for record in records],
            "text": texts,
        }
    )


@torch.no_grad()
def generate(model, tokenizer, prompts: list[str], config: EvaluateConfig) -> list[str]:
    """Greedy continuations, batched by length with left padding, cut at the end of text or the first stop string."""
    device = next(model.parameters()).device
    encoded = [encode(tokenizer, prompt).ids for prompt in prompts]
    # a template that appends an end-of-text token would end the text before it begins
    encoded = [ids[:-1] if len(ids) and int(ids[-1]) == tokenizer.eos_token_id else ids for ids in encoded]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), config.batch_size):
        members = order[start : start + config.batch_size]
        longest = max(len(encoded[i]) for i in members)
        ids = torch.full((len(members), longest), tokenizer.pad_token_id)
        mask = torch.zeros(len(members), longest, dtype=torch.long)
        for row, i in enumerate(members):
            ids[row, longest - len(encoded[i]) :] = encoded[i]
            mask[row, longest - len(encoded[i]) :] = 1
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=config.max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        for i, row in zip(members, out[:, longest:], strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            texts[i] = cut(text, config.stop)
    return texts


def cut(text: str, stop: list[str]) -> str:
    """The text up to and including the first stop string."""
    ends = [text.index(string) + len(string) for string in stop if string in text]
    return text[: min(ends)] if ends else text
