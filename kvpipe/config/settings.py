"""Sections of the configuration: the steps of the DAG, the same for every arm."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from kvpipe.config.errors import nearest
from kvpipe.config.section import (
    NUMBER,
    Count,
    Flag,
    Fraction,
    Name,
    Natural,
    NotNegative,
    Positive,
    Section,
    Seed,
    expression,
    inherit,
)

LossOn = Literal["all", "completion"]
"""Tokens that carry cross-entropy."""
LOSS_ON = {"all": "all tokens, the prompt's too", "completion": "reasoning and answer, not the prompt"}
"""The same in words."""


class StoreConfig(Section):
    """The stored caches of the teachers."""

    dtype: Literal["bf16", "fp16", "int8"] = "bf16"
    """Storage type; int8 keeps one scale per token and head."""
    mode: Literal["stored", "live"] = "stored"
    """`stored`: computed once and read by all cells; `live`: computed again in every training step."""
    shards: Annotated[int, Field(ge=1, lt=10**5), NUMBER] = 1
    """Parts of a store; several are built by separate jobs, and parts that are finished are kept."""
    layers: Literal["needed", "all"] = "needed"
    """Keep only the teacher layers that some arm uses (a change of an arm's layers may then rebuild the store), or
    all."""
    budget_gb: Positive = 10.0
    """The build stops before it starts when the estimate exceeds this many GB per teacher."""
    batch_size: Count = 64
    """Examples per teacher forward."""
    top_logits: Natural = 32
    """Most likely next tokens kept per token, for the term `logits`."""


GENERATED = ("exact", "number", "math", "code")
"""Scorers that read a continuation of the prompt."""


class TaskText(Section):
    """What is asked of the teachers in one task."""

    prompt: str | None = None
    """What a teacher is asked, with `{prompt}` in it; it should say how to end, as `evaluate.answer_pattern` finds the
    answer. None continues the prompt of `data.template`."""
    teachers: list[Name] | None = None
    """Teachers that write; the others read the reference reasoning. None is all of them."""

    @field_validator("prompt")
    @classmethod
    def _has_the_prompt(cls, text: str | None) -> str | None:
        if text is not None and "{prompt}" not in text:
            raise ValueError(f"{text!r} must have {{prompt}} in it")
        return text


class TeacherTextConfig(Section):
    """How teachers write their own reasoning for the training prompts (`time.reasoning: written`).

    A text is kept where the answer in it is right, by the task's scorer; else the reference reasoning stands in.
    """

    engine: str = "transformers"
    """Who writes: `transformers`, in this process, or a name that an extension adds to `ENGINES`."""
    tasks: dict[Name, TaskText] = Field(default={})
    """Task → what is asked; null takes one away. Of tasks that are not listed teachers read the reference; without any, all
    are written."""
    chat: Flag = True
    """A `prompt` of `tasks` is a message by the teacher's own chat template, where it has one."""
    tries: Count = 4
    """Texts drawn at most for a prompt."""
    temperature: Positive = 0.7
    """Of the draw."""
    top_p: Annotated[float, Field(gt=0, le=1), NUMBER] = 0.95
    """The draw is among the likeliest tokens that have this probability together."""
    max_new_tokens: Count = 512
    """Longest text in tokens."""
    batch_tokens: Count = 16384
    """Tokens side by side, prompts and what may follow together."""
    shards: Annotated[int, Field(ge=1, lt=10**5), NUMBER] = 1
    """Parts of the training split, written by separate jobs."""
    seed: Seed = 0
    """With record and try the seed of each text."""
    min_kept: Fraction = 0.5
    """Share of a task's prompts that a teacher must get right; below it the arms that read it are refused."""

    @field_validator("tasks", mode="before")
    @classmethod
    def _without_nulls(cls, tasks: Any) -> Any:
        return {name: task for name, task in tasks.items() if task is not None} if isinstance(tasks, dict) else tasks

    def of(self, teacher: str, tasks: Iterable[str]) -> list[str]:
        """The tasks that a teacher writes in."""
        listed = self.tasks or dict.fromkeys(tasks, TaskText())
        return [task for task, asked in listed.items() if asked.teachers is None or teacher in asked.teachers]


class LayerMapConfig(Section):
    """How the similarity of layers (CKA) is measured."""

    examples: Count = 100
    """Validation examples."""
    warmup_steps: Natural = 150
    """Cross-entropy steps given to a from-scratch reference student first: random layers resemble nothing."""


class LoraConfig(Section):
    """Low-rank adapters (peft)."""

    rank: Count = 16
    """Rank of an adapter."""
    alpha: Count = 32
    """An adapter's output is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout before an adapter."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an adapter; `all-linear`: every linear layer but the output's. One that the student
    does not have, or whose weight is another's too (a tied `lm_head`), is an error."""


class TrainConfig(Section):
    """Training of a cell, the same for every arm."""

    steps: Count = 400
    """Optimizer steps, the same for every arm."""
    batch_size: Count = 32
    """Examples per optimizer step over all devices."""
    accumulate: Count = 1
    """Micro-batches per optimizer step and process; all losses and gradients are those of the whole batch."""
    learning_rate: Positive = 3e-3
    """Peak learning rate of AdamW under a cosine schedule."""
    warmup: Fraction = 0.05
    """Share of the steps over which the learning rate rises."""
    weight_decay: NotNegative = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: Positive = 1.0
    """The student's gradients are clipped to this norm."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """Mixed precision of the student. `auto`: bf16 where the device computes in it (GPUs from compute capability 8.0 on,
    CPUs with avx512_bf16 or amx_bf16), else fp32; results differ with it, and `cost.json` says which it was."""
    gradient_checkpointing: Flag = False
    """Recompute activations in the backward pass: slower, far less memory."""
    loss_on: LossOn = "all"
    """Tokens that carry cross-entropy: `all`, or `completion`: reasoning, answer and the end of the text, whose first
    token is predicted from the prompt. Of a conversation, all before the last answer is prompt. Other terms of the loss,
    validation loss (always on reasoning + answer) and scores do not depend on it."""
    batching: Literal["length", "random"] = "length"
    """`length` groups examples of like length, so that little is padded."""
    max_length: Count = 512
    """Longest student text in tokens; a longer one is an error that names it."""
    eval_every: Count = 25
    """Steps between validation losses (the learning curve)."""
    log_every: Count = 10
    """Steps between lines of history.jsonl."""
    report_to: list[str] = Field(default=[])
    """Trackers that get these lines too, of those that accelerate knows: `tensorboard` writes below `results/trackers`, one
    run a cell, `wandb` and others where they are installed. No cell is trained anew for it."""
    hold_targets_gb: NotNegative = 1.0
    """Targets of frozen projectors are computed once and held when they fit into this many GB; else batch by batch."""
    checkpoint_every: Count = 200
    """Steps between checkpoints."""
    frozen: list[str] = Field(default=[])
    """Parts of names of weights that are not trained, such as `embed_tokens`: a large vocabulary's, on little text."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights."""
    shard: Flag = False
    """Where a cell has several processes, each holds a part of the student's weights, gradients and moments (FSDP), for
    students that do not fit one device. Not together with `lora`, fp16, or arms that learn from the student's own texts."""
    device: str = "auto"
    """`auto` (the GPU where there is one), `cpu`, `cuda`, or one GPU of several, as `cuda:1`."""
    threads: Annotated[int, Field(ge=1, le=1024), NUMBER] = 1
    """CPU threads of one cell."""

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
            meant = "cuda" if device.lower() == "gpu" else device
            raise ValueError(f"unknown {device!r}{nearest(meant, ('auto', 'cpu', 'cuda', 'cuda:0'))}")
        return device

    @model_validator(mode="after")
    def _micro_batches_have_rows(self):
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate: {self.accumulate} micro-batches of a batch of {self.batch_size} examples leave some empty"
            )
        if self.frozen and self.lora is not None:
            raise ValueError("frozen: under lora all weights are frozen but the adapters; leave one of the two out")
        if self.shard and (self.lora is not None or self.precision == "fp16"):
            other = "precision: fp16 (bf16 does)" if self.lora is None else "lora, whose student fits one device"
            raise ValueError(f"shard: does not go together with {other}; leave one of the two out")
        if self.precision == "fp16" and self.device == "cpu":
            raise ValueError("precision: fp16 is not computed on a CPU; set fp32 or bf16, or another device")
        return self


class ScoringConfig(Section):
    """Generation and scoring of one task."""

    scorer: Literal["exact", "number", "math", "code", "choice", "perturbed", "none"] = "exact"
    """When an answer is right. `exact`: the same text after normalisation; `number`: the same number (commas, units,
    signs, fractions); `math`: the same mathematical expression in LaTeX; `code`: the record's tests pass (see
    `evaluate.sandbox`); `choice`: the right one of the record's choices is the likeliest; `perturbed`: after prompt and
    reasoning the answer is likelier than three with another number of as many digits in the place of its last one; `none`:
    likelihood only, nothing is generated."""
    max_new_tokens: Count = 80
    """Generation of an example ends after this many tokens at the latest."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """Generation of an example ends after any of these strings (and at the end-of-text token)."""
    answer_pattern: str | Annotated[list[str], Field(min_length=1)] = r"####\s*(.+)"
    """Regular expression whose first group, last match, is the answer. Of several, the first one that matches."""
    strip: list[str] = Field(default=[",", "$", "%"])
    """Strings removed from both answers before they are compared (`exact` and `number`)."""
    program: str = "{prompt}{answer}\n{tests}\n"
    """For `code`: what is run, made of the record's prompt and tests and the answer found in the generated text."""
    choice_by: Literal["sum", "byte"] = "byte"
    """For `choice`: the likeliest choice as a whole, or per byte (long choices are not put back)."""
    window: Count | None = None
    """Longest context in tokens; the likelihood of a longer text is that of overlapping windows. By default, what the
    model's configuration says it can read."""
    stride: Count | None = None
    """Tokens from one window's start to the next; a token has at least `window - stride` before it. By default half
    the window."""

    @field_validator("answer_pattern")
    @classmethod
    def _patterns(cls, patterns: str | list[str]) -> str | list[str]:
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if not expression(pattern).groups:
                raise ValueError(f"{pattern!r} has no group: put the answer's part in parentheses")
        return patterns

    @field_validator("program")
    @classmethod
    def _has_the_answer(cls, program: str) -> str:
        if "{answer}" not in program:
            raise ValueError(f"{program!r} must have {{answer}} in it: what the model wrote would not be run")
        return program

    @model_validator(mode="after")
    def _windows(self):
        if self.stride is not None and (self.window is None or self.stride > self.window):
            raise ValueError(f"stride {self.stride} needs a window that is at least as long (window: {self.window})")
        return self


class SandboxConfig(Section):
    """How generated programs are run; `docs/evaluation.md` says what this protects from and what not."""

    run_code: Flag = False
    """Run generated programs at all. Off unless you say so: they are written by a model."""
    walls: Literal["required", "none"] = "required"
    """`required`: programs run behind walls (bubblewrap's, or namespaces that kvpipe makes), or not at all. `none`: they
    may read and change what you may; only the limits below hold."""
    seconds: Positive = 10.0
    """Longest CPU time of a program; by the clock three times as much."""
    memory_mb: Count = 1024
    """Largest address space of a program."""
    workers: Annotated[int, Field(ge=1, le=1024), NUMBER] = 1
    """Programs that are run at the same time."""


class EvaluateConfig(ScoringConfig):
    """Generation and scoring, the same for every arm."""

    batch_size: Count = 100
    """Examples generated side by side."""
    sandbox: SandboxConfig = SandboxConfig()
    """How generated programs are run."""
    tasks: dict[Name, ScoringConfig] = Field(default={})
    """Task → its own generation and scoring. Keys that are not given there are those above."""
    cache_swap: Name | None = None
    """Arm of one teacher by whose time, layers and projectors every cell's student starts from the teacher's cache of the
    prompt: as the arm has fitted them, and fitted again by ridge onto the trained student's own."""
    variants: list[Literal["int8", "int4"]] = Field(default=[])
    """Score the likelihood of every student again with its linear layers' weights in so many bits (weight only:
    `int8` a scale for each row, `int4` for each 32 weights), dequantized for the computation: what it costs, and its size."""
    lm_eval_tasks: list[str] = Field(default=[])
    """Tasks of lm-evaluation-harness that every student is scored on as well (package `lm_eval`)."""
    lm_eval_folder: str | None = None
    """Folder with task files (YAML) of your own, beside those of the package."""
    lm_eval_limit: Count | None = None
    """Only the first so many items of each of these tasks."""

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, values: Any) -> Any:
        return inherit(values, ScoringConfig.model_fields)

    @model_validator(mode="after")
    def _code_is_opted_in(self):
        if self.sandbox.run_code:
            return self
        for path, scoring in [("scorer", self), *((f"tasks.{name}.scorer", task) for name, task in self.tasks.items())]:
            if scoring.scorer == "code":
                raise ValueError(
                    f"{path}: code runs programs that a model wrote, which is off: set evaluate.sandbox.run_code: true "
                    "where they may run (docs/evaluation.md says how they are confined), or another scorer"
                )
        return self

    def of(self, task: str) -> ScoringConfig:
        """Generation and scoring of a task."""
        return self.tasks.get(task, self)


class StatsConfig(Section):
    """Intervals and tests."""

    confidence: Annotated[float, Field(gt=0.5, lt=1), NUMBER] = 0.95
    """Confidence of the intervals."""
    margin: Annotated[float, Field(gt=0), NUMBER] = 0.25
    """A null counts as no better than control where the interval of its bits per byte, as a ratio to control's, lies above
    1 / (1 + margin); as equal to it where it lies below 1 + margin too. Set it before the run."""
    resamples: Count = 1000
    """Resamples of seeds × items, of the bootstrap that stands beside the primary method."""
    seed: Seed = 0
    """Seed of the bootstrap."""
    power: Annotated[float, Field(gt=0, lt=1), NUMBER] = 0.8
    """Probability of finding an effect at which the smallest one is stated."""
    headline: Name | None = None
    """Arm that the report is about: its conclusions come first, and it is compared with every baseline. None takes the
    last experiment."""
    contrasts: list[Annotated[list[Name], Field(min_length=2, max_length=2)]] = Field(default=[])
    """Further pairs `[arm, reference]` to compare, each in the family of the arm's role with that reference. Without them:
    control with every experiment, null and baseline, every ablation (and experiment) with its base, and the headline
    with every baseline."""


class AuditConfig(Section):
    """The fairness audit: leakage, equal steps and tokens, same items and seeds."""

    allow: list[Literal["leakage", "steps", "tokens", "items", "seeds"]] = Field(default=[])
    """Breaches that are reported but do not fail the run."""
    tolerance: Fraction = 0.01
    """Allowed relative difference in student tokens between arms."""
