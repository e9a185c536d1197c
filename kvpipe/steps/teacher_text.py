"""Teacher-text step: each teacher's own reasoning for the training prompts, shard by shard."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

from kvpipe.config import ENGINES, ConfigError, Template
from kvpipe.data.chat import rendered
from kvpipe.data.records import Record, write_records
from kvpipe.evaluate.generate import Engine
from kvpipe.evaluate.score import judged
from kvpipe.evaluate.scorers.answers import worked
from kvpipe.experiment.device import resolve_device
from kvpipe.experiment.files import alone, content_digest, write_json, write_text
from kvpipe.experiment.plan import digest
from kvpipe.models.folders import manifest_hash
from kvpipe.steps.inputs import Inputs

MESSAGE = Template(prompt="{prompt}", chat_template=True)
"""A message of the user's, by a teacher's chat template."""


def make_texts(inputs: Inputs, teacher: str) -> None:
    """The training records with a teacher's reasoning: its first right text, else the reference.

    Raises:
        ConfigError: in a task fewer prompts were answered right than `teacher_text.min_kept` asks for; names the arms.
    """
    config, paths = inputs.config.teacher_text, inputs.paths
    for shard in range(config.shards):
        make_shard(inputs, teacher, str(shard))
    written: dict[str, dict[str, Any]] = {}
    for shard in range(config.shards):
        _, *texts = map(json.loads, paths.text_shard(teacher, shard).read_text(encoding="utf-8").splitlines())
        written |= {text["id"]: text for text in texts if text["reasoning"]}
    counts: dict[str, dict[str, Any]] = {}
    records = inputs.records("train")
    for task in _tasks(inputs, teacher):
        asked = [record for record in records if record.task == task]
        kept = [written[record.id] for record in asked if record.id in written]
        tries = Counter(text["try"] for text in kept)
        counts[task] = {
            "asked": len(asked),
            "kept": len(kept),
            "kept_at_try": [tries[number] for number in range(config.tries)],
            "mean_bytes": _mean_bytes([text["reasoning"] for text in kept]),
            "mean_bytes_of_reference": _mean_bytes([record.reasoning for record in asked if record.id in written]),
        }
        print(f"{teacher}, {task}: {len(kept)} of {len(asked)} texts kept, for the others the reference stands in")
        if len(kept) < config.min_kept * len(asked):
            arms = [n for n in inputs.dag.arms_of(teacher) if inputs.dag.arms[n].time.text == "written"]
            raise ConfigError(
                f"{teacher} answers {len(kept)} of {len(asked)} training prompts of task {task} right within "
                f"{config.tries} tries, teacher_text.min_kept is {config.min_kept:g}: the arms {', '.join(arms)} would "
                "teach the reference text. Ask otherwise (teacher_text.tasks), give more tries, or leave this teacher out"
            )
    out = [replace(r, reasoning=written.get(r.id, {"reasoning": r.reasoning})["reasoning"]) for r in records]
    write_records(paths.teacher_text(teacher), out)
    write_json(paths.text_counts(teacher), {"teacher": teacher, "tasks": counts}, indent=1)


def make_shard(inputs: Inputs, teacher: str, shard: str) -> None:
    """All texts that a teacher writes for one part of the training split, tries of one prompt until one is right.

    A line for each: id, try, text, and the reasoning where it is kept. What is written is kept from batch to batch, and a
    run goes on where another has ended; the texts are the same.
    """
    config, path = inputs.config.teacher_text, inputs.paths.text_shard(teacher, shard)
    records = [r for r in inputs.records("train")[int(shard) :: config.shards] if r.task in _tasks(inputs, teacher)]
    made_from = [manifest_hash(inputs.paths.model(teacher)), content_digest(inputs.paths.data("train")), shard]
    key = digest([*made_from, inputs.steps["teacher_text_shard"].settings(teacher=teacher, shard=shard)], 16)
    if _begins(path, key):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with alone(path.with_suffix(".lock"), f"another process writes {path}"):
        texts = _written(partial, key)
        lines, left = [], records
        engine: Engine | None = None
        with partial.open("a", encoding="utf-8") as file:
            for number in range(config.tries):
                missing = [record for record in left if (record.id, number) not in texts]
                for task in dict.fromkeys(record.task for record in missing):
                    engine = engine or _engine(inputs, teacher)
                    asked = [record for record in missing if record.task == task]
                    prompts, chat = _prompts(inputs, teacher, task, asked)
                    scoring = inputs.config.evaluate.of(task).model_copy(
                        update={"max_new_tokens": config.max_new_tokens}
                    )
                    seeds = [_seed(config.seed, teacher, record.id, number) for record in asked]
                    for i, text in engine.write(prompts, scoring, chat, seeds):
                        texts[asked[i].id, number] = text
                        file.write(json.dumps({"id": asked[i].id, "try": number, "text": text}) + "\n")
                        file.flush()
                said = [texts[record.id, number] for record in left]
                verdicts = judged(left, said, inputs.config.evaluate)
                over = []
                for record, text, verdict in zip(left, said, verdicts, strict=True):
                    kept = worked(text, inputs.config.evaluate.of(record.task)) if verdict.correct else ""
                    lines.append({"id": record.id, "try": number, "text": text, "reasoning": kept})
                    over += [] if kept else [record]
                left = over
        lines.sort(key=lambda line: (line["id"], line["try"]))
        write_text(path, "".join(json.dumps(line) + "\n" for line in ({"key": key}, *lines)))
        partial.unlink()


def _tasks(inputs: Inputs, teacher: str) -> list[str]:
    return inputs.config.teacher_text.of(teacher, dict.fromkeys(inputs.tasks.tolist()))


def _engine(inputs: Inputs, teacher: str) -> Engine:
    found = ENGINES[inputs.config.teacher_text.engine]
    if isinstance(found, str):
        module, _, name = found.partition(":")
        found = getattr(import_module(module), name)
    config = inputs.config
    device, trust = resolve_device(config.train.device), config.trusts(teacher)
    return found(inputs.paths.model(teacher), config.teacher_text, device, trust)


def _prompts(inputs: Inputs, teacher: str, task: str, records: Sequence[Record]) -> tuple[list[str], bool]:
    """What a teacher continues, and whether its chat template has written it."""
    config, tokenizer = inputs.config.teacher_text, inputs.tokenizer(teacher)
    asked, template = config.tasks[task].prompt if task in config.tasks else None, inputs.config.data.template
    if asked is None:
        return [rendered(tokenizer, record, template).prompt for record in records], template.chat_template
    texts = [asked.replace("{prompt}", record.prompt) for record in records]
    if not config.chat or getattr(tokenizer, "chat_template", None) is None:
        return texts, False
    messages = [replace(record, prompt=text, messages=None) for record, text in zip(records, texts, strict=True)]
    return [rendered(tokenizer, message, MESSAGE).prompt for message in messages], True


def _seed(*parts: Any) -> int:
    return int.from_bytes(sha256("/".join(map(str, parts)).encode()).digest()[:8], "big")


def _begins(path: Path, key: str) -> bool:
    """Whether a file of texts is there and was begun with this key."""
    if not path.is_file():
        return False
    with path.open(encoding="utf-8") as file:
        return file.readline() == json.dumps({"key": key}) + "\n"


def _written(partial: Path, key: str) -> dict[tuple[str, int], str]:
    """The texts of a run that was interrupted, without a line that was cut off; of another key nothing is left."""
    whole = partial.read_text(encoding="utf-8").splitlines(keepends=True) if _begins(partial, key) else []
    lines = [line for line in whole[1:] if line.endswith("\n")]
    partial.write_text("".join([json.dumps({"key": key}) + "\n", *lines]), encoding="utf-8")
    return {(text["id"], text["try"]): text["text"] for text in map(json.loads, lines)}


def _mean_bytes(texts: Sequence[str]) -> float:
    return sum(len(text.encode()) for text in texts) / max(1, len(texts))
