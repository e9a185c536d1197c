"""Sections of the configuration: the steps of the DAG, the same for every arm."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from kvpipe.config.section import Fraction, Section


class StoreConfig(Section):
    """The stored caches of the teachers."""

    dtype: Literal["bf16", "fp16", "int8"] = "bf16"
    """Storage type; int8 keeps one scale per token and head."""
    mode: Literal["stored", "live"] = "stored"
    """`stored`: computed once and read by all cells; `live`: computed again in every training step."""
    shards: PositiveInt = 1
    """Parts of a store; several are built by separate jobs, and parts that are finished are kept."""
    layers: Literal["needed", "all"] = "needed"
    """Keep only the teacher layers that some arm uses (a change of an arm's layers may then rebuild the store), or
    all."""
    budget_gb: PositiveFloat = 10.0
    """The build stops before it starts when the estimate exceeds this many GB per teacher."""
    batch_size: PositiveInt = 64
    """Examples per teacher forward."""
    top_logits: Annotated[int, Field(ge=0)] = 32
    """Most likely next tokens kept per token, for `logit_kd`."""


class LayerMapConfig(Section):
    """How the similarity of layers (CKA) is measured."""

    examples: PositiveInt = 100
    """Validation examples."""
    warmup_steps: Annotated[int, Field(ge=0)] = 150
    """Cross-entropy steps given to a from-scratch reference student first: random layers resemble nothing."""


class LoraConfig(Section):
    """Low-rank adapters (peft)."""

    rank: PositiveInt = 16
    """Rank of an adapter."""
    alpha: PositiveInt = 32
    """An adapter's output is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout before an adapter."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an adapter."""


class TrainConfig(Section):
    """Training of a cell, the same for every arm."""

    steps: PositiveInt = 400
    """Optimizer steps, the same for every arm."""
    batch_size: PositiveInt = 32
    """Examples per optimizer step over all devices."""
    accumulate: PositiveInt = 1
    """Micro-batches per optimizer step."""
    learning_rate: PositiveFloat = 3e-3
    """Peak learning rate of AdamW under a cosine schedule."""
    warmup: Fraction = 0.05
    """Share of the steps over which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Mixed precision of the student."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, far less memory."""
    batching: Literal["length", "random"] = "length"
    """`length` groups examples of like length, so that little is padded."""
    max_length: PositiveInt = 512
    """Longest student text in tokens; a longer one is an error that names it."""
    eval_every: PositiveInt = 25
    """Steps between validation losses (the learning curve)."""
    log_every: PositiveInt = 10
    """Steps between lines of history.jsonl."""
    hold_targets_gb: Annotated[float, Field(ge=0)] = 1.0
    """Targets of frozen projectors are computed once and held when they fit into this many GB; else batch by batch."""
    checkpoint_every: PositiveInt = 200
    """Steps between checkpoints."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` …"""
    threads: PositiveInt = 1
    """CPU threads of one cell."""


class EvaluateConfig(Section):
    """Generation and scoring, the same for every arm."""

    batch_size: PositiveInt = 100
    """Examples generated side by side."""
    max_new_tokens: PositiveInt = 80
    """Generation of an example ends after this many tokens at the latest."""
    stop: list[str] = Field(default=[])
    """Generation of an example ends after any of these strings (and at the end-of-text token)."""
    answer_pattern: str = r"####\s*(.+)"
    """Regular expression whose first group, last match, is the answer."""
    strip: list[str] = Field(default=[",", "$", "%"])
    """Strings removed from both answers before they are compared."""


class StatsConfig(Section):
    """Intervals and tests."""

    resamples: PositiveInt = 1000
    """Bootstrap resamples of seeds × items."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Confidence of the intervals."""
    seed: int = 0
    """Seed of the bootstrap."""
    power: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Power at which the minimum detectable effect is stated."""


class AuditConfig(Section):
    """The fairness audit: leakage, equal steps and tokens, same items and seeds."""

    allow: list[Literal["leakage", "steps", "tokens", "items", "seeds"]] = Field(default=[])
    """Breaches that are reported but do not fail the run."""
    tolerance: Fraction = 0.01
    """Allowed relative difference in student tokens between arms."""
