"""Sections of the configuration: arms and the settings that an arm may change."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kvpipe.config.section import NUMBER, Count, Flag, Fraction, Name, Natural, NotNegative, Positive, Section, Seed

SUM_TOLERANCE = 0.02
"""A row of fusion weights sums to 1 within this, so that thirds may be written as 0.33."""


class TimeConfig(Section):
    """Which teacher tokens make up a student token."""

    kind: Literal["overlap", "segment", "position"] = "overlap"
    """`overlap`: byte-span overlap of the two tokenizations; `segment`: prompt, reasoning and answer matched one to
    one; `position`: token i to token i (harmful, kept as a null)."""
    mode: Literal["iou", "causal"] = "causal"
    """Weights of the byte-span overlap. `causal` uses nothing the student has not read yet."""
    differing: Literal["interpolate", "anchored", "predictive"] = "anchored"
    """Segments whose texts differ (`segment`): `interpolate` linearly over normalised position; `anchored` holds the
    words that both texts share and interpolates between them; `predictive` does so from where the teacher says the
    student's next word, having worked out what the student leaves out."""
    text: Literal["student", "own"] = "student"
    """What the teacher reads: the student's text, or its own longer worked reasoning (needs `segment`)."""

    @model_validator(mode="after")
    def _own_text_needs_segments(self):
        if self.text == "own" and self.kind != "segment":
            raise ValueError("text: own needs kind: segment, since byte spans of different texts cannot overlap")
        return self


class LayerConfig(Section):
    """Which teacher layers make up a student layer."""

    kind: Literal["proportional", "kept", "cka", "list"] = "proportional"
    """`proportional` depth; `kept`: the depth that the layers of a pruned student had in its whole model, for which that
    is these layers themselves; `cka`: the k most similar teacher layers; `list`: explicit."""
    by: Literal["kv", "hidden"] = "kv"
    """What `cka` compares: keys for keys and values for values, or hidden states for both."""
    k: Count = 2
    """Teacher layers per student layer under `cka`."""
    near: Count | None = None
    """Under `cka`, only teacher layers at most so many from the proportional one; none: all, in whatever order."""
    temperature: Positive | None = None
    """Softmax temperature of the weights β; none clamps at 0 and normalises."""
    combine: Literal["concat", "mix"] = "concat"
    """`mix`: convex combination of the layers; `concat`: side by side, scaled by √β, before projection."""
    layers: Annotated[list[Natural], Field(min_length=1)] | None = None
    """Teacher layer of each student layer under `list`."""

    @model_validator(mode="after")
    def _enough_are_near(self) -> LayerConfig:
        if self.near is not None and self.k > self.near + 1:
            raise ValueError(
                f"layer.near: {self.near} leaves {self.near + 1} teacher layers to the first student layer, "
                f"and layer.k asks for {self.k}"
            )
        if self.kind == "list" and self.layers is None:
            raise ValueError("kind: list needs layers, one teacher layer per student layer")
        return self


class ProjectorConfig(Section):
    """The map from a teacher's heads and dimension to the student's."""

    kind: Literal["linear", "heads", "elastic"] = "linear"
    """`linear`: one map over the flattened heads; `heads`: head dimension, then head mixing; `elastic`: bottleneck."""
    mlp_ratio: Positive | None = None
    """Hidden width of `elastic` as a share of its input; none follows the teacher's size."""
    dropout: Fraction = 0.0
    """Dropout inside `elastic`."""
    mode: Literal["frozen", "slow", "joint"] = "frozen"
    """`frozen` after the fit; `slow`: own learning rate; `joint`: the student's."""
    learning_rate: Positive = 1e-4
    """Learning rate under `slow`."""


class FitConfig(Section):
    """How projectors are fitted before training."""

    method: Literal["pca", "joint_pca", "procrustes", "ridge", "reconstruct", "random", "identity", "grouped"] = "pca"
    """How projectors are fitted before training; `reconstruct` trains the elastic encoder from the linear fit; `identity`
    leaves the cache of a teacher with the student's heads and dimension as it is; `grouped` is the unfitted grouped
    average."""
    basis: Literal["teacher", "student"] = "teacher"
    """Axes of the space that the teachers share: their own components, or these turned, shifted and scaled onto the
    pretrained student's own KV (orthogonal Procrustes), so that the target is new content in familiar coordinates."""
    examples: Count = 500
    """Training examples whose tokens are the rows of the fit."""
    whiten: Flag = False
    """Give every component unit variance."""
    steps: Count = 300
    """Optimizer steps of `reconstruct`."""
    ridge: Positive = 1e-2
    """Penalty of the closed forms, relative to the mean variance of a feature."""
    seed: Seed = 0
    """Seed of `random` and `reconstruct`."""


class FuseConfig(Section):
    """How several teachers become one target."""

    kind: Literal["mean", "fixed", "attention", "task", "learnable", "select"] = "mean"
    """How the projected teachers become one target."""
    weights: dict[str, list[NotNegative]] = Field(default={})
    """Weight of each teacher per task under `task` (row `default` serves unknown tasks); row `default` under
    `fixed`. A row sums to 1."""
    offsets: Flag = False
    """Learn an offset to the table under `task`."""
    entropy: NotNegative = 0.0
    """Weight of the entropy term that keeps learned weights from collapsing: under `learnable`, or with `offsets`."""

    @model_validator(mode="after")
    def _rows(self):
        for task, row in self.weights.items():
            if row and abs(sum(row) - 1) > SUM_TOLERANCE:
                raise ValueError(f"weights.{task}: {row} sums to {sum(row):g}; the teachers' shares sum to 1")
        if self.offsets and self.kind != "task":
            raise ValueError(f"offsets: true is for kind: task, which has a table; kind is {self.kind}")
        if self.entropy and self.kind != "learnable" and not self.offsets:
            raise ValueError(
                f"entropy: is for weights that are learned (learnable, offsets: true); set it to 0 under {self.kind}"
            )
        return self


class ScheduleConfig(Section):
    """The course of λ over training."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    """Course of λ after the warm-up."""
    warmup: Annotated[float, Field(ge=0, lt=1), NUMBER] = 0.0
    """Share of the steps over which λ rises from 0."""
    final: Fraction = 0.0
    """Share of λ left at `until`."""
    until: Annotated[float, Field(gt=0, le=1), NUMBER] = 1.0
    """Share of the steps at which an anneal ends."""

    @model_validator(mode="after")
    def _rises_before_it_ends(self):
        if self.warmup >= self.until:
            raise ValueError(f"warmup: {self.warmup:g} must be below until, {self.until:g}")
        return self


class LossConfig(Section):
    """What is added to cross-entropy."""

    kind: Literal["none", "kv", "logit_kd", "relation"] = "none"
    """`none`: cross-entropy alone; `kv`: key and value matching; the other two are baselines."""
    lambda_k: NotNegative = 1.0
    """Weight of the key term."""
    lambda_v: NotNegative = 1.0
    """Weight of the value term."""
    weight: NotNegative = 1.0
    """Weight of a baseline's term."""
    temperature: Positive = 1.0
    """Temperature of `logit_kd`."""
    relation_heads: Count = 4
    """Relation heads of `relation`."""
    distance: Literal["mse", "smooth_l1"] = "mse"
    """Distance of a residual."""
    scale: Literal["std", "none"] = "std"
    """Divide each layer's residual by the standard deviation of its target."""
    layers: Annotated[list[Natural], Field(min_length=1)] | None = None
    """Student layers that are matched, counted from 0; none matches all."""
    skip_sink: Natural = 0
    """First student positions left out of the key and value terms."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Course of λ over training."""

    @model_validator(mode="after")
    def _matches_something(self):
        if self.layers is not None and len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers: {self.layers} holds a layer twice")
        if self.kind == "kv" and not self.lambda_k and not self.lambda_v:
            raise ValueError("lambda_k and lambda_v are both 0, which leaves nothing of kind: kv; give one a weight")
        if self.kind in ("logit_kd", "relation") and not self.weight:
            raise ValueError(f"weight: 0 leaves nothing of kind: {self.kind}; give it a weight")
        return self


class Arm(Section):
    """One experimental condition, after `base` and `set` are resolved."""

    role: Literal["control", "experiment", "null", "baseline", "ablation"] = "ablation"
    """What the report calls it. Nulls must not beat control."""
    label: str = ""
    """One line for the report."""
    teachers: list[Name] = Field(default=[])
    """Names of models, in the order of the fusion weights."""
    shuffle_teacher: Flag = False
    """Every example gets the teacher KV of another one."""
    seed_offset: Annotated[int, Field(gt=-(2**32), lt=2**32), NUMBER] = 0
    """Added to the seed (the false-positive check runs control again under other seeds)."""
    init: Literal["student", "random"] = "student"
    """Weights that a cell starts from: the student's own, or drawn by the seed (training from scratch)."""
    step_factor: Positive = 1.0
    """Optimizer steps as a multiple of `train.steps`; the audit compares arms of one multiple."""
    learning_rate_factor: Positive = 1.0
    """Learning rate as a multiple of `train.learning_rate`: every arm is compared at the one that was tuned for it."""
    examples: Count | None = None
    """Training examples of every task, the first ones; none takes all."""
    time: TimeConfig = TimeConfig()
    """Which teacher tokens make up a student token."""
    layer: LayerConfig = LayerConfig()
    """Which teacher layers make up a student layer."""
    projector: ProjectorConfig = ProjectorConfig()
    """The map from a teacher's heads and dimension to the student's."""
    fit: FitConfig = FitConfig()
    """How the projectors are fitted before training."""
    fuse: FuseConfig = FuseConfig()
    """How several teachers become one target."""
    loss: LossConfig = LossConfig()
    """What is added to cross-entropy."""

    @model_validator(mode="after")
    def _coherent(self):
        if (self.loss.kind == "none") != (not self.teachers):
            raise ValueError(f"loss.kind {self.loss.kind!r} with teachers {self.teachers}: both or neither")
        if self.role == "control" and self.teachers:
            raise ValueError(
                f"role: control learns alone: leave out teachers ({', '.join(self.teachers)}) and loss.kind"
            )
        twice = sorted({name for name in self.teachers if self.teachers.count(name) > 1})
        if twice:
            raise ValueError(f"teachers: {', '.join(twice)} is named twice, and would count twice")
        if self.loss.kind == "relation" and len(self.teachers) > 1:
            raise ValueError(f"loss.kind: relation has one teacher; got {', '.join(self.teachers)}")
        if self.loss.kind == "logit_kd" and self.fuse.kind not in ("mean", "fixed", "task"):
            raise ValueError(f"loss.kind: logit_kd weighs teachers by mean, fixed or task; got {self.fuse.kind}")
        if self.fuse.entropy and self.loss.kind != "kv":
            raise ValueError(f"fuse.entropy is a term of loss.kind: kv; under {self.loss.kind} set it to 0")
        if self.projector.kind == "heads" and self.fit.method not in ("grouped", "random"):
            raise ValueError("projector.kind: heads starts from fit.method grouped or random")
        if self.projector.kind == "heads" and self.layer.kind == "cka" and self.layer.combine == "concat":
            raise ValueError("projector.kind: heads keeps heads apart: set layer.combine: mix")
        if (self.fit.method == "reconstruct") != (self.projector.kind == "elastic"):
            raise ValueError("fit.method: reconstruct and projector.kind: elastic go together")
        if self.projector.mode == "frozen" and self.fit.method == "grouped" and self.loss.kind == "kv":
            raise ValueError("fit.method: grouped is an unfitted start: set projector.mode to slow or joint")
        if self.fit.basis == "student" and self.fit.method in ("ridge", "identity", "grouped"):
            raise ValueError(f"fit.basis: student has no meaning under fit.method: {self.fit.method}; leave it out")
        if self.fuse.kind == "fixed" and "default" not in self.fuse.weights:
            raise ValueError("fuse.kind: fixed needs fuse.weights.default, one weight per teacher")
        for task, row in self.fuse.weights.items():
            if len(row) != len(self.teachers):
                raise ValueError(f"fuse.weights.{task} has {len(row)} weights for {len(self.teachers)} teachers")
        return self


class ArmEntry(Section):
    """An arm as written: another arm with some settings changed."""

    base: Name | None = None
    """Arm to start from; none starts from the defaults of its settings."""
    role: Literal["control", "experiment", "null", "baseline", "ablation"] | None = None
    """Role in the report and in the statistics, `ablation` if it is not said; not handed down by a base. Write `"null"`
    in quotes: the bare word is YAML for nothing."""
    label: str | None = None
    """One line for the report."""
    set: dict[str, Any] = Field(default={})
    """Dotted key → value, applied in order over the base. `loss.lambda_k: 0` changes one setting;
    `loss: {kind: kv}` replaces the section, its other settings go back to their defaults."""
