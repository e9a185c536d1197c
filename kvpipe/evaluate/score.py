"""Evaluate a model on the test split: likelihood and greedy generation, one row per item."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from kvpipe.config import GENERATED, EvaluateConfig, Template
from kvpipe.data.chat import rendered
from kvpipe.data.encoding import encode_records, prompt_ids
from kvpipe.data.records import Record
from kvpipe.evaluate.choices import choice_encoding, choice_nll, chosen, perturbed
from kvpipe.evaluate.generate import check_length, context_length, generate
from kvpipe.evaluate.sandbox.run import Outcome, run_all
from kvpipe.evaluate.scorers.answers import extract, is_correct, judge_of
from kvpipe.experiment.files import folder_digest
from kvpipe.models.folders import load_model, load_tokenizer
from kvpipe.models.likelihood import Scores, score, score_long, scoring_batches
from kvpipe.models.limits import Limits
from kvpipe.models.quantized import quantize


def evaluate(
    folder: Path,
    records: list[Record],
    template: Template,
    config: EvaluateConfig,
    device: str,
    log: Callable = print,
    trust: bool = False,
    context: Literal["warn", "strict"] = "warn",
) -> pd.DataFrame:
    """Scores of the model in a folder, whose code runs with `trust` only; see `evaluate_model`.

    With `config.variants` also, for each, nats (`nll_int8`) and bytes of its weights (`model_bytes_int8`; `model_bytes` as it
    is). The folder's digest is in `attrs["model"]`, which Parquet keeps: scores say which weights they are of.
    """
    model, tokenizer = load_model(folder, device=device, trust=trust), load_tokenizer(folder, trust)
    table = evaluate_model(model, tokenizer, records, template, config, log, context)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if config.variants:
        table["model_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    for kind in config.variants:
        other = load_model(folder, device=device, trust=trust)
        table[f"model_bytes_{kind}"] = quantize(other, kind)
        table[f"nll_{kind}"] = likelihoods(other, tokenizer, records, template, config, pad).nll
    table.attrs["model"] = folder_digest(folder)
    return table


@dataclass
class Verdict:
    """What the scorer of an item's task found. `correct` is None where answers are not scored."""

    correct: bool | None = None
    prediction: str | None = None
    text: str | None = None
    choice_nll: list[float] | None = None
    outcome: Outcome | None = None


def evaluate_model(
    model,
    tokenizer,
    records: list[Record],
    template: Template,
    config: EvaluateConfig,
    log: Callable = print,
    context: Literal["warn", "strict"] = "warn",
) -> pd.DataFrame:
    """One row per record.

    Columns: id, task, nll (nats, reasoning + answer), tokens, bytes, nll_all, tokens_all, bytes_all (all text), correct
    (None under scorer none), prediction (the extracted answer, the chosen choice, or None), reference, text (what was
    generated). Where a task is multiple choice: choice_nll (nats of each choice); where one is code: outcome (passed, failed,
    timeout or killed) and outcome_detail. `attrs["judges"]`, which Parquet keeps: task → who judged its answers.

    Raises:
        ValueError: something that the model cannot read, or (`context` strict) was not trained to; before any forward.
    """
    check(model, tokenizer, records, template, config, context)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    scores = likelihoods(model, tokenizer, records, template, config, pad)
    verdicts = [Verdict() for _ in records]
    _generate(model, tokenizer, records, template, config, verdicts)
    _choose(model, tokenizer, records, template, config, verdicts, pad)
    _run(records, config, verdicts, log)
    columns = {
        "id": [record.id for record in records],
        "task": [record.task for record in records],
        "nll": scores.nll,
        "tokens": scores.tokens,
        "bytes": scores.bytes,
        "nll_all": scores.nll_all,
        "tokens_all": scores.tokens_all,
        "bytes_all": scores.bytes_all,
        "correct": [verdict.correct for verdict in verdicts],
        "prediction": [verdict.prediction for verdict in verdicts],
        "reference": [record.answer for record in records],
        "text": [verdict.text for verdict in verdicts],
    }
    if any(verdict.choice_nll is not None for verdict in verdicts):
        columns["choice_nll"] = [verdict.choice_nll for verdict in verdicts]
    if any(verdict.outcome is not None for verdict in verdicts):
        columns["outcome"] = [verdict.outcome and verdict.outcome.status for verdict in verdicts]
        columns["outcome_detail"] = [verdict.outcome and verdict.outcome.detail for verdict in verdicts]
    table = pd.DataFrame(columns)
    scorers = {record.task: config.of(record.task).scorer for record in records}
    table.attrs["judges"] = {task: judge_of(scorer) for task, scorer in scorers.items() if scorer != "none"}
    return table


def check(model, tokenizer, records, template: Template, config: EvaluateConfig, context: Literal["warn", "strict"]):
    """Refuse ids and positions that the model cannot read, in all that will be scored or continued.

    Raises:
        ValueError: names the model, the record and the token.
    """
    name = repr(tokenizer.name_or_path or model.config.model_type)
    limits, most = Limits.of(name, model.config, context), context_length(model)
    encoding = encode_records(records, tokenizer, template)
    windows = [config.of(record.task).window or most or n for record, n in zip(records, encoding.lengths, strict=True)]
    limits.check(encoding, records, tokenizer, np.minimum(encoding.lengths, windows))
    for scorer, worked in (("choice", False), ("perturbed", True)):
        asked = [perturbed(records[i]) if worked else records[i] for i in _of(records, config, scorer)]
        if asked:
            of_all = choice_encoding(tokenizer, asked, template, worked)
            limits.check(of_all, [record for record in asked for _ in record.choices or ()], tokenizer)
    for record in (records[i] for i in _of(records, config, *GENERATED)):
        ids = prompt_ids(tokenizer, rendered(tokenizer, record, template).prompt, template.chat_template)
        check_length(model, ids, config.of(record.task).max_new_tokens, f"model {name}: record {record.id!r}")


def likelihoods(model, tokenizer, records, template: Template, config: EvaluateConfig, pad: int) -> Scores:
    """Nats of every record; texts longer than the window of their task are read in windows."""
    encoding = encode_records(records, tokenizer, template)
    reads = context_length(model)
    windows = [config.of(record.task).window or reads for record in records]
    fits = np.array([window is None or n <= window for n, window in zip(encoding.lengths, windows, strict=True)], bool)
    scores = score(model, encoding, scoring_batches(encoding, pad, config.batch_size, np.flatnonzero(fits)))
    for example in np.flatnonzero(~fits):
        window = windows[example]
        assert window is not None
        stride = config.of(records[example].task).stride or max(1, window // 2)
        score_long(model, encoding, scores, int(example), window, stride)
    return scores


def _of(records: list[Record], config: EvaluateConfig, *scorers: str) -> list[int]:
    return [i for i, record in enumerate(records) if config.of(record.task).scorer in scorers]


def _generate(model, tokenizer, records, template, config: EvaluateConfig, verdicts: list[Verdict]) -> None:
    """Texts and the answers in them. Tasks that generate alike are batched together."""
    alike: dict[tuple, list[int]] = {}
    for i in _of(records, config, *GENERATED):
        scoring = config.of(records[i].task)
        alike.setdefault((scoring.max_new_tokens, *scoring.stop), []).append(i)
    for members in alike.values():
        prompts = [rendered(tokenizer, records[i], template).prompt for i in members]
        scoring = config.of(records[members[0]].task)
        options = {"chat": True} if template.chat_template else {}
        texts = generate(model, tokenizer, prompts, scoring, config.batch_size, **options)
        for i, text in zip(members, texts, strict=True):
            verdicts[i] = _judged(records[i], text, config)


def _judged(record: Record, text: str, config: EvaluateConfig) -> Verdict:
    found, scoring = Verdict(text=text), config.of(record.task)
    found.prediction = extract(text, scoring)
    found.correct = is_correct(found.prediction, record.answer, scoring)
    return found


def judged(records: list[Record], texts: Sequence[str], config: EvaluateConfig, log: Callable = print) -> list[Verdict]:
    """What the tasks' scorers say of texts that somebody has written."""
    verdicts = [_judged(record, text, config) for record, text in zip(records, texts, strict=True)]
    _run(records, config, verdicts, log)
    return verdicts


def _choose(model, tokenizer, records, template, config, verdicts: list[Verdict], pad: int) -> None:
    """The likeliest of the choices."""
    for scorer in ("choice", "perturbed"):
        members, worked = _of(records, config, scorer), scorer == "perturbed"
        asked = [perturbed(records[i]) if worked else records[i] for i in members]
        found = choice_nll(model, tokenizer, asked, template, pad, config.batch_size, worked)
        for i, record, nll in zip(members, asked, found, strict=True):
            by: Literal["sum", "byte"] = "sum" if worked else config.of(record.task).choice_by
            verdicts[i].choice_nll, verdicts[i].prediction = nll, chosen(nll, record.choices or (), by)
            verdicts[i].correct = verdicts[i].prediction == record.answer


def _run(records, config: EvaluateConfig, verdicts: list[Verdict], log: Callable) -> None:
    """The tests of generated programs."""
    members = _of(records, config, "code")
    for i in members:
        if records[i].tests is None:
            raise ValueError(f"record {records[i].id!r} has no tests, which evaluate.…scorer: code needs")
    if not members:
        return
    programs = [program(config.of(records[i].task).program, records[i], verdicts[i].prediction) for i in members]
    outcomes = run_all(programs, config.sandbox, log)
    for i, outcome in zip(members, outcomes, strict=True):
        verdicts[i].outcome, verdicts[i].correct = outcome, outcome.status == "passed"


def program(template: str, record: Record, answer: str | None) -> str:
    """What is run: the template with the record's prompt and tests and the answer in it."""
    parts = {"prompt": record.prompt, "tests": record.tests or "", "answer": answer or ""}
    return re.sub(r"\{(prompt|tests|answer)\}", lambda match: parts[match[1]], template)
