"""Sections of the configuration: records, and how they become text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from kvpipe.config.section import Name, Section


class EmbeddedData(Section):
    """Examples made by `kvpipe.corpus`, deterministic by seed, disjoint between splits by content."""

    kind: Literal["embedded"] = "embedded"
    """Records made by kvpipe."""
    task: Literal["math", "code"]
    """`math`: word problems of several steps; `code`: traces of small programs. Also the task's name in every table."""
    train: PositiveInt = 1000
    """Training examples."""
    validation: PositiveInt = 100
    """Validation examples: every choice (learning rate, λ, steps) is made on these."""
    test: PositiveInt = 200
    """Test examples: only what the report states is computed on these."""
    difficulty: Annotated[int, Field(ge=1, le=8)] = 2
    """Number of chained operations in a problem."""


class FileData(Section):
    """Records from local JSONL or Parquet files, columns mapped to prompt, reasoning, answer."""

    kind: Literal["files"] = "files"
    """Records read from files."""
    task: Name
    """Task name written to every record; fusion weights and metrics are kept per task."""
    train: str
    """Path of the training file."""
    validation: str
    """Path of the validation file."""
    test: str
    """Path of the test file."""
    columns: dict[str, str] = Field(default={"prompt": "prompt", "reasoning": "reasoning", "answer": "answer"})
    """Record field → column of the file. `reasoning`, `teacher_reasoning` and `id` are optional."""


class Template(Section):
    """How one record becomes text; the same for every arm."""

    prompt: str = "{prompt}\n"
    """Text of the prompt segment."""
    reasoning: str = "{reasoning}\n"
    """Text of the reasoning segment (omitted when the record has no reasoning)."""
    answer: str = "#### {answer}\n"
    """Text of the answer segment."""


class DataConfig(Section):
    """Records and how they become text."""

    sources: list[Annotated[EmbeddedData | FileData, Field(discriminator="kind")]] = Field(min_length=1)
    """Where the records come from, one entry per task."""
    template: Template = Template()
    """How one record becomes text; the same for every arm."""
    seed: int = 0
    """Seed of the embedded corpora."""
    ngram: PositiveInt = 13
    """Word n-gram length of the train/test leakage audit."""
