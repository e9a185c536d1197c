"""The configuration: one pydantic model is the single source of keys, types, defaults and their documentation.

`config/schema.json` and `config/README.md` are generated from it (`kvpipe config --write`), the shipped YAML files are
validated against it by a test, and the Snakefile validates before any job starts. Unknown keys are errors.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from kvpipe.problems import explain, nearest

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Name = Annotated[str, Field(pattern=NAME)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key's path and the nearest valid name."""


class Section(BaseModel):
    """Base of every section: unknown keys are refused and instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        # pydantic's own message for an unknown key does not say which keys there are: only the section knows
        unknown = [key for key in values if key not in cls.model_fields] if isinstance(values, dict) else []
        if unknown:
            raise PydanticCustomError(
                "unknown_keys", "unknown keys", {"keys": unknown, "valid": list(cls.model_fields)}
            )
        return values


# ---------------------------------------------------------------- data
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


# ---------------------------------------------------------------- models
class TokenizerRecipe(Section):
    """A tokenizer trained on the recipe's own corpus."""

    kind: Literal["byte_bpe", "unigram", "metaspace_bpe"] = "byte_bpe"
    """`byte_bpe`: ByteLevel BPE (GPT-2, Qwen, Llama-3); `unigram` and `metaspace_bpe`: SentencePiece style with byte
    fallback."""
    vocab_size: Annotated[int, Field(ge=260)] = 384
    """Size of the vocabulary, special tokens included."""
    split_digits: bool = True
    """Every digit a token of its own."""


class Recipe(Section):
    """How an embedded model is made: architecture, tokenizer and training from scratch."""

    architecture: dict[str, Any]
    """Fields of the transformers config class, `model_type` among them."""
    tokenizer: TokenizerRecipe = TokenizerRecipe()
    """The model's own tokenizer."""
    mixture: dict[Name, Fraction] = Field(default={})
    """Task → share of the pretraining examples; empty means all tasks of `data` alike."""
    examples: PositiveInt = 20000
    """Pretraining examples, disjoint from validation and test."""
    own_text: Fraction = 0.5
    """Share of the examples written with the teacher's longer reasoning."""
    steps: PositiveInt = 1500
    """Optimizer steps."""
    batch_size: PositiveInt = 64
    """Examples per step."""
    learning_rate: PositiveFloat = 3e-3
    """Peak learning rate of AdamW under a cosine schedule."""
    seed: int = 0
    """Seed of initialisation and data order."""


class LocalModel(Section):
    """A Hugging Face folder on disk."""

    source: Literal["local"] = "local"
    """Read from disk."""
    path: str
    """Folder with config.json, safetensors and tokenizer files."""
    recipe: Recipe | None = None
    """How the folder was made, where kvpipe made it: `make teachers` and `source: pretrain` follow it."""
    parameters: PositiveInt | None = None
    """Number of parameters, for the elastic projector's default width; counted when absent."""


class PretrainModel(Section):
    """A model trained inside the DAG by its recipe."""

    source: Literal["pretrain"] = "pretrain"
    """Trained by its recipe, inside the DAG."""
    recipe: Recipe
    """Architecture, tokenizer and training."""
    path: str | None = None
    """Where `make teachers` writes the shipped copy; not read with this source."""


class HubModel(Section):
    """A repository on the Hugging Face hub."""

    source: Literal["hub"] = "hub"
    """Downloaded."""
    repo: str
    """`owner/name`."""
    revision: str = "main"
    """Branch, tag or commit; resolved once to a commit and recorded in the manifest."""
    trust_remote_code: bool = False
    """Run code shipped in the repository. Off unless you have read it."""


class ScratchModel(Section):
    """A model with random weights, drawn anew by every seed (the student of the embedded experiment)."""

    source: Literal["scratch"] = "scratch"
    """Random weights, drawn anew by every seed."""
    architecture: dict[str, Any]
    """Fields of the transformers config class, `model_type` among them."""
    tokenizer: TokenizerRecipe = TokenizerRecipe()
    """Trained on the training split."""


class RandomModel(Section):
    """The architecture and tokenizer of another model with random weights (a null teacher)."""

    source: Literal["random"] = "random"
    """Random weights in another model's architecture."""
    like: Name
    """Name of the model to copy."""
    seed: int = 0
    """Seed of the weights."""


Model = Annotated[LocalModel | PretrainModel | HubModel | ScratchModel | RandomModel, Field(discriminator="source")]


# ---------------------------------------------------------------- arms
class TimeConfig(Section):
    """Which teacher tokens make up a student token."""

    kind: Literal["overlap", "segment", "position"] = "overlap"
    """`overlap`: byte-span overlap of the two tokenizations; `segment`: prompt, reasoning and answer matched one to
    one; `position`: token i to token i (harmful, kept as a null)."""
    mode: Literal["iou", "causal"] = "causal"
    """Weights of the byte-span overlap. `causal` uses nothing the student has not read yet."""
    differing: Literal["interpolate", "anchored"] = "anchored"
    """Segments whose texts differ (`segment`): `interpolate` linearly over normalised position, or hold the words that
    both texts share and interpolate between them."""
    text: Literal["student", "own"] = "student"
    """What the teacher reads: the student's text, or its own longer worked reasoning (needs `segment`)."""

    @model_validator(mode="after")
    def _own_text_needs_segments(self):
        if self.text == "own" and self.kind != "segment":
            raise ValueError("text: own needs kind: segment, since byte spans of different texts cannot overlap")
        return self


class LayerConfig(Section):
    """Which teacher layers make up a student layer."""

    kind: Literal["proportional", "cka", "list"] = "proportional"
    """`proportional` depth; `cka`: the k most similar teacher layers; `list`: explicit."""
    by: Literal["own", "hidden"] = "own"
    """What `cka` compares: keys for keys and values for values, or hidden states for both."""
    k: PositiveInt = 2
    """Teacher layers per student layer under `cka`."""
    temperature: PositiveFloat | None = None
    """Softmax temperature of the weights β; none clamps at 0 and normalises."""
    combine: Literal["concat", "mix"] = "concat"
    """`mix`: convex combination of the layers; `concat`: side by side, scaled by √β, before projection."""
    layers: list[int] | None = None
    """Teacher layer of each student layer under `list`."""


class ProjectorConfig(Section):
    """The map from a teacher's heads and dimension to the student's."""

    kind: Literal["linear", "heads", "elastic"] = "linear"
    """`linear`: one map over the flattened heads; `heads`: head dimension, then head mixing; `elastic`: bottleneck."""
    mlp_ratio: PositiveFloat | None = None
    """Hidden width of `elastic` as a share of its input; none follows the teacher's size."""
    dropout: Fraction = 0.0
    """Dropout inside `elastic`."""
    mode: Literal["frozen", "slow", "joint"] = "frozen"
    """`frozen` after the fit; `slow`: own learning rate; `joint`: the student's."""
    learning_rate: PositiveFloat = 1e-4
    """Learning rate under `slow`."""


class FitConfig(Section):
    """How projectors are fitted before training."""

    method: Literal["pca", "joint_pca", "procrustes", "ridge", "reconstruct", "random", "grouped"] = "pca"
    """How projectors are fitted before training; `reconstruct` trains the elastic encoder from the linear fit;
    `grouped` is the unfitted grouped average."""
    examples: PositiveInt = 500
    """Training examples whose tokens are the rows of the fit."""
    whiten: bool = False
    """Give every component unit variance."""
    steps: PositiveInt = 300
    """Optimizer steps of `reconstruct`."""
    ridge: PositiveFloat = 1e-2
    """Penalty of the closed forms, relative to the mean variance of a feature."""
    seed: int = 0
    """Seed of `random` and `reconstruct`."""


class FuseConfig(Section):
    """How several teachers become one target."""

    kind: Literal["mean", "fixed", "attention", "task", "learnable", "select"] = "mean"
    """How the projected teachers become one target."""
    weights: dict[str, list[float]] = Field(default={})
    """Weight of each teacher per task under `task` (row `default` serves unknown tasks); row `default` under
    `fixed`."""
    offsets: bool = False
    """Learn an offset to the table under `task`."""
    entropy: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy term that keeps learned weights from collapsing."""


class ScheduleConfig(Section):
    """The course of λ over training."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    """Course of λ after the warm-up."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps over which λ rises from 0."""
    final: Fraction = 0.0
    """Share of λ left at `until`."""
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the steps at which an anneal ends."""


class LossConfig(Section):
    """What is added to cross-entropy."""

    kind: Literal["none", "kv", "logit_kd", "relation"] = "none"
    """`none`: cross-entropy alone; `kv`: key and value matching; the other two are baselines."""
    lambda_k: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the key term."""
    lambda_v: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the value term."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of a baseline's term."""
    temperature: PositiveFloat = 1.0
    """Temperature of `logit_kd`."""
    relation_heads: PositiveInt = 4
    """Relation heads of `relation`."""
    distance: Literal["mse", "smooth_l1"] = "mse"
    """Distance of a residual."""
    scale: Literal["std", "none"] = "std"
    """Divide each layer's residual by the standard deviation of its target."""
    layers: list[int] | None = None
    """Student layers that are matched; none matches all."""
    skip_sink: Annotated[int, Field(ge=0)] = 0
    """First student positions left out of the key and value terms."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Course of λ over training."""


class Arm(Section):
    """One experimental condition, after `base` and `set` are resolved."""

    role: Literal["control", "experiment", "null", "baseline", "ablation"] = "ablation"
    """What the report calls it. Nulls must not beat control."""
    label: str = ""
    """One line for the report."""
    teachers: list[Name] = Field(default=[])
    """Names of models, in the order of the fusion weights."""
    content: Literal["own", "shuffled"] = "own"
    """`shuffled`: every example gets the teacher KV of another one."""
    seed_offset: int = 0
    """Added to the seed (the false-positive check runs control again under other seeds)."""
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
        if self.projector.kind == "heads" and self.fit.method not in ("grouped", "random"):
            raise ValueError("projector.kind: heads starts from fit.method grouped or random")
        if self.projector.kind == "heads" and self.layer.kind == "cka" and self.layer.combine == "concat":
            raise ValueError("projector.kind: heads keeps heads apart: set layer.combine: mix")
        if (self.fit.method == "reconstruct") != (self.projector.kind == "elastic"):
            raise ValueError("fit.method: reconstruct and projector.kind: elastic go together")
        if self.projector.mode == "frozen" and self.fit.method == "grouped" and self.loss.kind == "kv":
            raise ValueError("fit.method: grouped is an unfitted start: set projector.mode to slow or joint")
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
    """Role in the report, `ablation` if it is not said; not handed down by a base. Write `"null"` in quotes: the bare
    word is YAML for nothing."""
    label: str | None = None
    """One line for the report."""
    set: dict[str, Any] = Field(default={})
    """Dotted key → value, applied in order over the base. `loss.lambda_k: 0` changes one setting;
    `loss: {kind: kv}` replaces the section, its other settings go back to their defaults."""


# ---------------------------------------------------------------- steps
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


class Config(Section):
    """A whole experiment."""

    title: str = "kvpipe experiment"
    """Heading of the report."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    """One cell per arm and seed."""
    student: Name
    """Name of the model that is trained."""
    models: dict[Name, Model]
    """Every model, by name."""
    arms: dict[Name, ArmEntry]
    """Every arm, by name. `control` must be among them."""
    data: DataConfig
    """Records and how they become text."""
    store: StoreConfig = StoreConfig()
    """The stored caches of the teachers."""
    layer_map: LayerMapConfig = LayerMapConfig()
    """How the similarity of layers (CKA) is measured."""
    train: TrainConfig = TrainConfig()
    """Training of a cell, the same for every arm."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Generation and scoring, the same for every arm."""
    stats: StatsConfig = StatsConfig()
    """Intervals and tests."""
    audit: AuditConfig = AuditConfig()
    """The fairness audit."""

    @model_validator(mode="after")
    def _names(self):
        if "control" not in self.arms:
            raise ValueError("arms: the arm 'control' is missing; every contrast needs it")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} holds a seed twice")
        _known("student", self.student, self.models)
        for name, model in self.models.items():
            if isinstance(model, RandomModel):
                _known(f"models.{name}.like", model.like, self.models)
                if not isinstance(self.models[model.like], LocalModel | PretrainModel | HubModel):
                    raise ValueError(f"models.{name}.like: {model.like!r} has no weights of its own")
            if isinstance(model, ScratchModel) and name != self.student:
                raise ValueError(f"models.{name}: source scratch is for the student only")
        tasks = {source.task for source in self.data.sources}
        if len(tasks) != len(self.data.sources):
            raise ValueError("data.sources: a task occurs twice")
        # bases first: the arm that is named is the one that wrote the mistake, not one that inherits it
        for name in sorted(self.arms, key=lambda name: len(_chain(name, self.arms))):
            arm = self.arm(name)
            for i, teacher in enumerate(arm.teachers):
                _known(f"arms.{name}.set.teachers[{i}]", teacher, self.models)
                if teacher == self.student:
                    raise ValueError(f"arms.{name}.set.teachers[{i}]: the student cannot be its own teacher")
            if arm.fuse.kind == "task":
                missing = tasks - set(arm.fuse.weights)
                if missing and "default" not in arm.fuse.weights:
                    raise ValueError(f"arms.{name}.set.fuse.weights: no row for {sorted(missing)} and no row 'default'")
        return self

    def arm(self, name: str) -> Arm:
        """The arm with its bases and `set` applied."""
        entry = self.arms[name]
        # what the report calls an arm is not handed down
        values: dict[str, Any] = {k: v for k in ("role", "label") if (v := getattr(entry, k)) is not None}
        for link in _chain(name, self.arms):
            for dotted, value in copy.deepcopy(self.arms[link].set).items():
                try:
                    assign(values, dotted, value)
                except ConfigError as error:
                    raise ConfigError(f"arms.{link}.set.{error}") from None
        try:
            return Arm.model_validate(values)
        except ValidationError as error:
            raise ConfigError(explain(error, values, ("arms", name, "set"))) from None


def _known(path: str, name: str, valid: Iterable[str]) -> None:
    if name not in valid:
        raise ValueError(f"{path}: unknown name {name!r}{nearest(name, valid)}")


def _chain(name: str, arms: dict[str, ArmEntry]) -> list[str]:
    """The arm's bases, the first of them first, and the arm itself."""
    chain = [name]
    while (base := arms[chain[0]].base) is not None:
        _known(f"arms.{chain[0]}.base", base, arms)
        if base in chain:
            raise ValueError(f"arms.{name}.base: circular: {' ← '.join([base, *chain])}")
        chain.insert(0, base)
    return chain


def assign(values: dict, dotted: str, value: Any) -> None:
    """Set `a.b.c` in nested dictionaries, making the levels that are missing."""
    *parents, last = dotted.split(".")
    node = values
    for key in parents:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{dotted}: {key!r} holds a value, not a section")
    node[last] = value


def parse(values: dict, overrides: dict[str, Any] | None = None, origin: str = "configuration") -> Config:
    """Validate nested dictionaries, with dotted overrides applied first.

    Raises:
        ConfigError: one line per problem, each with the key's path and the nearest valid name.
    """
    values = copy.deepcopy(values)
    for dotted, value in (overrides or {}).items():
        assign(values, dotted, value)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{origin}:\n{explain(error, values)}") from None


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read and validate a YAML (or JSON) file; `overrides` are `dotted.key=value` with a YAML value."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping at the top level")
    pairs = {}
    for item in overrides or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item!r}: expected dotted.key=value")
        try:
            pairs[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {item!r}: the value is not valid YAML: {error}") from None
    return parse(values, pairs, origin=str(path))


def json_schema() -> str:
    """The JSON schema of a configuration file (with the arm's resolved keys under $defs)."""
    schema = Config.model_json_schema()
    arm = Arm.model_json_schema()
    schema["$defs"].update(arm.pop("$defs"))
    schema["$defs"]["Arm"] = arm
    return json.dumps(schema, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
