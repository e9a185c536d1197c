"""Sections of the configuration: records, and how they become text."""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from kvpipe.config.presets import PresetName, merged, preset_of, with_presets
from kvpipe.config.section import NUMBER, Count, Expression, Flag, Fraction, Name, Section, Seed, inherit

FieldName = Literal[
    "id", "task", "prompt", "reasoning", "answer", "teacher_reasoning", "tests", "choices", "choice", "labels"
]


class EmbeddedData(Section):
    """Examples made by `kvpipe.data.corpus`, deterministic by seed, disjoint between splits by content."""

    kind: Literal["embedded"] = "embedded"
    """Records made by kvpipe."""
    task: Literal["math", "code", "both"]
    """`math`: word problems of several steps; `code`: traces of small programs; `both`: begun in words, ended by a program.
    Also the task's name in every table."""
    train: Count = 1000
    """Training examples."""
    validation: Count = 100
    """Validation examples: every choice (learning rate, λ, steps) is made on these."""
    test: Count = 200
    """Test examples: only what the report states is computed on these."""
    difficulty: Annotated[int, Field(ge=1, le=8), NUMBER] = 2
    """Number of chained operations in a problem."""

    @model_validator(mode="after")
    def _room_for_both(self) -> EmbeddedData:
        if self.task == "both" and self.difficulty < 2:
            raise ValueError("difficulty: 1 leaves no step for the program of task both; set 2 or more")
        return self

    @property
    def task_names(self) -> set[str]:
        """Tasks of this source's records."""
        return {self.task}


class Chat(Section):
    """A conversation column: the last answer of the assistant becomes column `answer`, all before it `prompt`."""

    column: str = "messages"
    """Column with the list of messages."""
    role: str = "role"
    """Key of a message that says who speaks."""
    content: str = "content"
    """Key of a message that holds its text."""
    assistant: str = "assistant"
    """Role whose last message is the answer."""
    turns: dict[str, str] = Field(
        default={
            "system": "{content}\n\n",
            "user": "User: {content}\n",
            "assistant": "Assistant: {content}\n",
        }
    )
    """Role → how a message of it is written in the prompt."""


class RowData(Section):
    """How rows become records; what `hub` and `files` share."""

    task: Name
    """Task name written to the records; fusion weights, templates, scoring and metrics are kept per task."""
    preset: PresetName | None = None
    """A known data set: fills in all keys below that are not given, and the task's template and scoring."""
    columns: dict[FieldName, str] = Field(
        default={"prompt": "prompt", "reasoning": "reasoning", "answer": "answer"}, min_length=1
    )
    """Record field → column (`a.b` for a key inside a column), or a text with `{column}` in it. Lists of texts are
    joined by line ends. `prompt` and `answer` must not be empty where they are mapped. `tests` is code that checks a
    program; `choices` are the answers to choose from, the right one given by `answer` (its text) or by `choice`: its
    place, from 0, or its name among `labels`."""
    split: dict[str, Expression] = Field(default={})
    """Column → regular expression that must match in it; its named groups become columns. Applied in order."""
    remove: dict[FieldName, Expression] = Field(default={})
    """Record field → regular expression; what matches is taken out of the field."""
    leave_out: dict[str, Expression] = Field(default={})
    """Column → regular expression; a row in which it is found becomes no record. `data/sources.json` counts and names
    the rows."""
    chat: Chat | None = None
    """For conversations: the column with messages."""
    tasks: dict[str, Name] = Field(default={})
    """Values of the field `task` → task name, where one data set holds several tasks; other values have `task`."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        preset = preset_of(values)
        if preset is None:
            return values
        known = {**preset["rows"], **(preset["hub"] if cls is HubData else {})}
        return merged(known, values)

    @field_validator("columns")
    @classmethod
    def _columns_are_named(cls, columns: dict[str, str]) -> dict[str, str]:
        for field, text in columns.items():
            try:
                parts = [part[1:] for part in string.Formatter().parse(text) if part[1] is not None]
            except ValueError as error:
                raise ValueError(f"{field}: {text!r}: {error}; {{column}} stands for a column") from None
            if any(not name or spec or conversion for name, spec, conversion in parts):
                raise ValueError(f"{field}: {text!r}: expected nothing but a column's name in braces")
        return columns

    @field_validator("split")
    @classmethod
    def _splits_into_columns(cls, split: dict[str, str]) -> dict[str, str]:
        for column, found in split.items():
            if not re.compile(found).groupindex:
                raise ValueError(f"{column}: {found!r} makes no column: name a group, (?P<column>…)")
        return split

    @model_validator(mode="after")
    def _fields(self):
        if bool(self.tasks) != ("task" in self.columns):
            raise ValueError("tasks and columns.task go together: the column and the names of its values")
        if "labels" in self.columns and "choice" not in self.columns:
            raise ValueError("columns.labels name the choices for columns.choice, which is not mapped")
        if "choice" in self.columns and ("answer" in self.columns or "choices" not in self.columns):
            raise ValueError("columns.choice picks the answer among columns.choices: map these two and no answer")
        return self

    @property
    def task_names(self) -> set[str]:
        """Tasks of this source's records."""
        return {self.task, *self.tasks.values()}


class HubData(RowData):
    """A data set on the Hugging Face hub, or a local folder laid out like one, read with `datasets`."""

    kind: Literal["hub"] = "hub"
    """Read with the `datasets` library: downloaded once, then from its cache (all of it offline with HF_HUB_OFFLINE)."""
    repo: str
    """`owner/name`, or the path of a local folder (then it begins with `.` or `/`)."""
    name: str | list[str] | None = None
    """Configuration of the data set (`main`, `full` …); the rows of several are put together."""
    revision: str = "main"
    """Branch, tag or commit; the commit is recorded in `data/sources.json`. Name a commit to pin the data."""
    train: str | None = "train"
    """Training split, with an optional slice: `train[:95%]`. None: this source has no training records."""
    validation: str | None = "validation"
    """Validation split, such as `train[95%:]`, or none."""
    test: str | None = "test"
    """Test split, or none."""

    @property
    def is_folder(self) -> bool:
        """Whether it is a local folder, laid out as on the hub."""
        return self.repo.startswith((".", "/"))


class FileData(RowData):
    """Records from local JSONL or Parquet files, columns mapped to prompt, reasoning, answer."""

    kind: Literal["files"] = "files"
    """Records read from files."""
    train: str | None = None
    """Path of the training file (`.jsonl`, `.parquet`), with an optional slice: `rows.jsonl[:95%]`; or none."""
    validation: str | None = None
    """Path of the validation file, or none."""
    test: str | None = None
    """Path of the test file, or none."""

    @staticmethod
    def parted(spec: str) -> tuple[Path, str | None]:
        """The path and the slice, if any, of `rows.jsonl[:95%]`."""
        found = re.fullmatch(r"(.*?)(\[[^\[\]]*\])?", spec)
        assert found is not None
        return Path(found[1]), found[2]


class TextTemplate(Section):
    """How one record becomes text: `{prompt}` in the prompt, `{reasoning}` in the reasoning, `{answer}` in the answer
    (`{{` and `}}` write braces). An empty text leaves its segment out."""

    prompt: str = "{prompt}\n"
    """Text of the prompt segment: what generation starts from."""
    reasoning: str = "{reasoning}\n"
    """Text of the reasoning segment (omitted when the record has no reasoning)."""
    answer: str = "#### {answer}\n"
    """Text of the answer segment."""

    @field_validator("prompt", "reasoning", "answer")
    @classmethod
    def _own_field(cls, text: str, info) -> str:
        own = info.field_name
        braces = rf"; {{{{ and }}}} write braces: \boxed{{{{{{{own}}}}}}}"
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}{braces}") from None
        fields = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
        if text and (not fields or any(field != (own, "", None) for field in fields)):
            raise ValueError(f"{text!r} must have {{{own}}} and no other field{braces}")
        # one `{` less than meant: format would write \boxed42
        if any(name and re.search(r"\\[A-Za-z]+$", literal) for literal, name, *_ in parts):
            raise ValueError(f"{text!r} would be written without its braces{braces}")
        return text


class Template(TextTemplate):
    """How one record becomes text; the same for every arm."""

    chat_template: Flag = False
    """Render records as conversations by each model's own chat template: the messages of the row, or the prompt (without
    white space at its ends) as one message of the user, then reasoning and answer as the assistant's. Without it, texts
    are the same for every model."""
    tasks: dict[Name, TextTemplate] = Field(default={})
    """Task → its own template. Keys that are not given there are those above."""

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, values: Any) -> Any:
        return inherit(values, TextTemplate.model_fields)

    def of(self, task: str) -> TextTemplate:
        """The template of a task."""
        return self.tasks.get(task, self)


class ShortReasoning(Section):
    """What `student_reasoning: short` leaves of a reasoning: its end, as the first steps are the ones that are best left
    out (Deng et al. 2024, From Explicit CoT to Implicit CoT)."""

    sentences: Count | None = None
    """At most so many of its last sentences."""
    share: Fraction | None = None
    """Or this share of its words, the last ones, rounded up; half of them where neither is given."""

    @model_validator(mode="after")
    def _one_measure(self):
        if self.sentences is not None and self.share is not None:
            raise ValueError("sentences and share: give one of the two")
        return self


class DataConfig(Section):
    """Records and how they become text."""

    sources: list[Annotated[EmbeddedData | HubData | FileData, Field(discriminator="kind")]] = Field(min_length=1)
    """Where the records come from, one entry per task."""
    template: Template = Template()
    """How one record becomes text; the same for every arm."""
    short: ShortReasoning = ShortReasoning()
    """What `student_reasoning: short` of an arm leaves of a record's reasoning."""
    seed: Seed = 0
    """Seed of the embedded corpora."""
    context: Literal["warn", "strict"] = "warn"
    """Texts longer than a model's `max_position_embeddings`, where its positions are rotary: `warn` says so once for each
    model and goes on, `strict` is an error before anything is computed. Models whose positions are a table (GPT-2, OPT)
    refuse them always, and evaluation reads longer texts in windows."""
    ngram: Count = 13
    """Word n-gram length of the train/test leakage audit."""
    duplicates: Literal["keep", "drop", "error"] = "keep"
    """Records whose content occurs before in the same split: kept, dropped (the first stays) or an error."""
    leakage: Literal["report", "drop", "error"] = "error"
    """Training and validation records that share their content or an n-gram with a test record: told in
    `data/sources.json` only (the audit after training then fails), dropped, or an error before anything is trained."""

    @model_validator(mode="before")
    @classmethod
    def _presets(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        template = with_presets(values.get("template"), "template", values.get("sources"))
        return {**values, "template": template} if template else values

    @model_validator(mode="after")
    def _splits(self):
        for split in ("train", "validation", "test"):
            if all(getattr(source, split) is None for source in self.sources):
                raise ValueError(f"sources: none has a {split} split")
        return self
