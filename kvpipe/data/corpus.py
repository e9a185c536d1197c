"""The embedded tasks: chained arithmetic as word problems (`math`), as program traces (`code`), or begun in words and ended
by a program (`both`).

Every problem has a numeric core (its start value and operations). The split a core belongs to is a hash of the core, so
that train, validation, test and any teacher's pretraining examples are disjoint by content whatever their sizes, and
paraphrases of one problem never sit on both sides.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate, takewhile
from typing import Literal

from kvpipe.config import DataConfig, EmbeddedData, Recipe
from kvpipe.data.records import Record
from kvpipe.experiment.paths import SPLITS

PEOPLE = ("Ann", "Ben", "Eva", "Ida", "Leo", "Max", "Mia", "Tom")
THINGS = ("cards", "coins", "pens", "nuts", "cups", "eggs")
GAINS = ("finds", "buys", "gets")
LOSSES = ("loses", "sells", "eats")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TrueResults = Literal["true", "random", "math", "code"]
"""Which computed numbers are true: all, none, or those of the steps that are told in words or written as a program."""
HIGHEST = 19
"""Largest value that occurs in a chain: some 300 facts of the kind 7 + 8, more than a student sees often enough."""


@dataclass(frozen=True)
class Core:
    """Start value and signed steps of a chain; every partial sum stays within 0 … `HIGHEST`."""

    start: int
    steps: tuple[int, ...]

    def values(self) -> list[int]:
        """The value after the start and after every step."""
        out = [self.start]
        for step in self.steps:
            out.append(out[-1] + step)
        return out

    def split(self) -> str:
        """The split this core belongs to: a tenth each for validation and test."""
        bucket = int.from_bytes(sha256(repr(self).encode()).digest()[:4], "big") % 10
        return {0: "test", 1: "validation"}.get(bucket, "train")


def _draw_core(rng: random.Random, operations: int) -> Core:
    start = rng.randint(1, 9)
    steps, value = [], start
    for _ in range(operations):
        choices = [s for s in range(-9, 10) if s and 0 <= value + s <= HIGHEST]
        steps.append(rng.choice(choices))
        value += steps[-1]
    return Core(start, tuple(steps))


def _equations(core: Core, values: list[int]) -> list[str]:
    return [
        f"{before}{'+' if step > 0 else '-'}{abs(step)}={after}"
        for before, step, after in zip(values, core.steps, values[1:], strict=False)
    ]


def _running(values: list[int]) -> str:
    return ", ".join(map(str, values[1:])) + "."


def _math(rng: random.Random, core: Core, values: list[int]) -> tuple[str, str, str]:
    name, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    verbs = [rng.choice(GAINS if step > 0 else LOSSES) for step in core.steps]
    deeds = " and ".join(f"{verb} {abs(step)}" for verb, step in zip(verbs, core.steps, strict=True))
    prompt = f"{name} has {core.start} {thing}, {deeds}. How many?"
    equations = _equations(core, values)
    reasoning = _running(values)
    own = f"{name} starts with {core.start} {thing}. " + " ".join(
        f"{name} {verb} {abs(step)}: {equation}."
        for verb, step, equation in zip(verbs, core.steps, equations, strict=True)
    )
    return prompt, reasoning, own


def _code(rng: random.Random, core: Core, values: list[int]) -> tuple[str, str, str]:
    # consecutive letters: copying names is no part of the difficulty
    first = rng.randrange(len(LETTERS) - len(core.steps))
    names = LETTERS[first : first + len(core.steps) + 1]
    equations = _equations(core, values)
    lines = [f"{names[0]}={core.start}"]
    own = [f"{names[0]} is {core.start}."]
    for i, step in enumerate(core.steps):
        sign = "+" if step > 0 else "-"
        lines.append(f"{names[i + 1]}={names[i]}{sign}{abs(step)}")
        own.append(f"{names[i + 1]} is {names[i]}{sign}{abs(step)}, so {equations[i]}.")
    prompt = "\n".join([*lines, f"print({names[-1]})"])
    reasoning = _running(values)
    return prompt, reasoning, " ".join(own)


def _both(rng: random.Random, core: Core, values: list[int]) -> tuple[str, str, str]:
    name, thing, told = rng.choice(PEOPLE), rng.choice(THINGS), _told("both", len(core.steps))
    first = rng.randrange(len(LETTERS) - len(core.steps))
    names = [thing, *LETTERS[first : first + len(core.steps)]]
    equations = _equations(core, values)
    deeds, own, lines = [], [f"{name} starts with {core.start} {thing}."], []
    for i, step in enumerate(core.steps):
        if i < told:
            deeds.append(f"{rng.choice(GAINS if step > 0 else LOSSES)} {abs(step)}")
            own.append(f"{name} {deeds[-1]}: {equations[i]}.")
        else:
            line, before = names[i - told + 1], names[i - told]
            lines.append(f"{line}={before}{'+' if step > 0 else '-'}{abs(step)}")
            own.append(f"{lines[-1].replace('=', ' is ')}, so {equations[i]}.")
    prompt = "\n".join([f"{name} has {core.start} {thing}, {' and '.join(deeds)}.", *lines, f"print({line})"])
    return prompt, _running(values), " ".join(own)


_WRITERS = {"math": _math, "code": _code, "both": _both}


def _told(task: str, operations: int) -> int:
    """How many of the first steps are told in words; the others are lines of a program."""
    return {"math": operations, "code": 0, "both": (operations + 1) // 2}[task]


def _values(rng: random.Random, task: str, core: Core, results: TrueResults) -> list[int]:
    """The value after the start and after every step, with those drawn anew that `results` does not keep."""
    out, told = [core.start], _told(task, len(core.steps))
    kept = [results in ("true", "math" if i < told else "code") for i in range(len(core.steps))]
    for i, step in enumerate(core.steps):
        if kept[i]:
            out.append(out[-1] + step)
            continue
        # true steps that follow start from here, and stay within the range
        following = takewhile(lambda pair: pair[1], zip(core.steps[i + 1 :], kept[i + 1 :], strict=True))
        ahead = [0, *accumulate(step for step, _ in following)]
        out.append(rng.randint(-min(ahead), HIGHEST - max(ahead)))
    return out


def generate(
    task: str,
    split: str,
    count: int,
    difficulty: int,
    seed: int,
    distinct: bool = True,
    results: TrueResults = "true",
) -> list[Record]:
    """`count` records of one task and split.

    Args:
        task: `math`, `code` or `both`.
        split: `train`, `validation` or `test`.
        count: number of records.
        difficulty: number of chained operations.
        seed: seed of the draw; the split of a problem does not depend on it.
        distinct: no two records with the same prompt.
        results: the computed numbers that are true. The others are drawn anew: the language of the task without its
            arithmetic.

    Raises:
        ValueError: the task or split is unknown, or there are fewer distinct problems than asked for.
    """
    if task not in _WRITERS or split not in SPLITS:
        raise ValueError(f"no embedded data for task {task!r}, split {split!r}")
    rng = random.Random(f"{task}/{split}/{difficulty}/{seed}")
    records: list[Record] = []
    seen: set[str] = set()
    for prompt, reasoning, own, answer in _problems(rng, task, split, difficulty, results, limit=count * 50 + 10_000):
        if distinct and prompt in seen:
            continue
        seen.add(prompt)
        records.append(Record(f"{task}-{split}-{len(records):05d}", task, prompt, reasoning, answer, own))
        if len(records) == count:
            return records
    raise ValueError(
        f"only {len(records)} distinct {task} problems of difficulty {difficulty} in split {split}, {count} asked for: "
        "raise the difficulty or lower the count"
    )


def _problems(
    rng: random.Random, task: str, split: str, difficulty: int, results: TrueResults, limit: int
) -> Iterator[tuple[str, ...]]:
    for _ in range(limit):
        core = _draw_core(rng, difficulty)
        if core.split() == split:
            values = _values(rng, task, core, results)
            yield (*_WRITERS[task](rng, core, values), str(values[-1]))


def embedded_sources(data: DataConfig) -> dict[str, EmbeddedData]:
    """The embedded tasks of a config by name.

    Raises:
        ValueError: there is none, so there is nothing to pretrain on.
    """
    sources: dict[str, EmbeddedData] = {s.task: s for s in data.sources if isinstance(s, EmbeddedData)}
    if not sources:
        raise ValueError("source: pretrain needs embedded data to train on; use source: local or hub")
    return sources


def pretraining_records(recipe: Recipe, data: DataConfig) -> tuple[list[Record], list[Record]]:
    """The recipe's examples: those with the student's reasoning and those with the teacher's own.

    All come from the training split's problems, so that none of them can be in validation or test.
    """
    sources = embedded_sources(data)
    shares = recipe.mixture or {task: 1 / len(sources) for task in sources}
    short, own = [], []
    for task, share in shares.items():
        records = generate(
            task,
            "train",
            round(recipe.examples * share),
            sources[task].difficulty,
            recipe.seed + 10_000,
            distinct=False,
            results=recipe.results,
        )
        cut = round(len(records) * recipe.own_text)
        own += records[:cut]
        short += records[cut:]
    return short, own
