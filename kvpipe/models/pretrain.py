"""Train an embedded model from scratch by its recipe: tokenizer, then cross-entropy on its own corpus."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from kvpipe.config import Config, DataConfig, LocalModel, PretrainModel, Recipe, TokenizerRecipe
from kvpipe.data.batches import collate, schedule
from kvpipe.data.corpus import pretraining_records
from kvpipe.data.encoding import encode_records
from kvpipe.data.records import Record, read_as, render
from kvpipe.experiment.files import set_mode
from kvpipe.experiment.progress import track
from kvpipe.models.folders import build_model
from kvpipe.models.limits import Limits
from kvpipe.models.manifest import write_manifest
from kvpipe.models.tokenizers import train_tokenizer

WARMUP = 50


def interleaved(records: list[Record]) -> list[Record]:
    """The tasks' records in turn, so that any first part of them holds every task."""
    tasks: dict[str, list[Record]] = {}
    for record in records:
        tasks.setdefault(record.task, []).append(record)
    return [record for turn in zip_longest(*tasks.values()) for record in turn if record is not None]


def tokenizer_texts(records: list[Record], data: DataConfig) -> list[str]:
    """Both readings of records, for training a tokenizer."""
    return [
        render(read, data.template).text
        for record in records
        for read in (record, *(read_as([record], "own") if record.teacher_reasoning is not None else ()))
    ]


def student_tokenizer(recipe: TokenizerRecipe, records: list[Record], data: DataConfig):
    """A tokenizer for a from-scratch student: it sees only the student's own training text."""
    return train_tokenizer(recipe, [render(record, data.template).text for record in records])


def recipes(config: Config) -> dict[str, tuple[Recipe, Path]]:
    """Models that are made here by a recipe, and the folder of the shipped copy (`make teachers`)."""
    return {
        name: (model.recipe, Path(model.path))
        for name, model in config.models.items()
        if isinstance(model, LocalModel | PretrainModel) and model.recipe is not None and model.path is not None
    }


def pretrain_into_path(config: Config, name: str, log=print) -> None:
    """Train the model of a name by its recipe into its configured folder, with a manifest."""
    recipe, out = recipes(config)[name]
    torch.set_num_threads(config.train.threads)  # sums depend on it
    log(f"{name} → {out}")
    out.mkdir(parents=True, exist_ok=True)
    write_manifest(out, pretrain(recipe, config.data, out, log=log))


def pretrain(recipe: Recipe, data: DataConfig, out: Path, log=print) -> dict[str, Any]:
    """Train and save a model folder in bfloat16 (half the bytes); returns the manifest's `source`."""
    short, own = pretraining_records(recipe, data)
    sample = interleaved(short)[:2000] + interleaved(own)[:2000]
    tokenizer = train_tokenizer(recipe.tokenizer, tokenizer_texts(sample, data))
    parts = [records for records in (short, read_as(own, "own")) if records]
    encodings = [encode_records(records, tokenizer, data.template, end=True) for records in parts]
    model = build_model(recipe.architecture, tokenizer, recipe.seed).train()
    limits = Limits.of(repr(out.name), model.config, data.context)
    for records, encoding in zip(parts, encodings, strict=True):
        limits.check(encoding, records, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + np.cos(np.pi * min(1.0, step / recipe.steps))),
    )
    # batches alternate between the two readings in proportion to their examples, so that every batch is of one length
    ends = np.cumsum([len(encoding) for encoding in encodings])
    counts = np.diff(np.round(recipe.steps * ends / ends[-1]).astype(int), prepend=0).tolist()
    batches = [
        iter(schedule(encoding.lengths, recipe.batch_size, count, recipe.seed, by_length=True))
        for encoding, count in zip(encodings, counts, strict=True)
    ]
    order = np.random.default_rng(recipe.seed).permutation(np.repeat(np.arange(len(encodings)), counts))
    for step, reading in enumerate(track(order, "pretraining", "steps")):
        batch = collate(encodings[reading], next(batches[reading]), tokenizer.pad_token_id)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rate.step()
        if step % 100 == 0 or step == len(order) - 1:
            log(f"step {step}/{len(order)}  loss {loss.item():.4f}")
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    set_mode(*out.glob("*.safetensors"))
    return {"source": "pretrain", "recipe": recipe.model_dump()}
