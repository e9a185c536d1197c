"""Answers to questions of several turns, in the format that MT-Bench's judge reads (FastChat, arXiv:2306.05685)."""

from __future__ import annotations

import json
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvpipe.config import FileData, ScoringConfig
from kvpipe.data.chat import conversation
from kvpipe.data.rows import read_rows
from kvpipe.evaluate.generate import generate
from kvpipe.experiment.files import write_text


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file with `question_id` and `turns`, the user's messages one after the other.

    Raises:
        ValueError: a row without them, or an id twice; names the row.
    """
    rows = read_rows(FileData(task="questions", train=str(path)), "train").rows
    seen: set[Any] = set()
    for number, row in enumerate(rows, start=1):
        turns = row.get("turns")
        if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
            raise ValueError(f"{path}, question {number}: expected turns, a list of the user's messages; got {turns!r}")
        if row.get("question_id") is None or row["question_id"] in seen:
            raise ValueError(
                f"{path}, question {number}: expected a question_id of its own; got {row.get('question_id')!r}"
            )
        seen.add(row["question_id"])
    return rows


def answered(
    model: Any, tokenizer: Any, questions: list[dict[str, Any]], config: ScoringConfig, batch_size: int
) -> list[list[str]]:
    """A model's greedy answers to every turn, each after the model's own answers to the turns before.

    Raises:
        ValueError: the tokenizer has no chat template, or a conversation leaves no room for an answer.
    """
    said: list[list[str]] = [[] for _ in questions]
    for turn in range(max(len(question["turns"]) for question in questions)):
        asked = [i for i, question in enumerate(questions) if len(question["turns"]) > turn]
        prompts = []
        for i in asked:
            users = [("user", text) for text in questions[i]["turns"][: turn + 1]]
            turns = [
                one for pair in zip(users, [("assistant", text) for text in said[i]], strict=False) for one in pair
            ]
            prompts.append(conversation(tokenizer, [*turns, users[-1]], f"question {questions[i]['question_id']}"))
        for i, text in zip(asked, generate(model, tokenizer, prompts, config, batch_size, chat=True), strict=True):
            said[i].append(text.strip())
    return said


def write_answers(questions: list[dict[str, Any]], said: list[list[str]], out: Path) -> None:
    """`model_answer/<model>.jsonl` of FastChat: the judge takes the model's name from the file's."""
    lines = []
    for question, turns in zip(questions, said, strict=True):
        name = [out.stem, question["question_id"], turns]
        line = {
            "question_id": question["question_id"],
            "answer_id": sha256(json.dumps(name).encode()).hexdigest()[:22],
            "model_id": out.stem,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": time.time(),
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(out, "".join(lines))
