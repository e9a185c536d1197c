"""The configuration: one pydantic model is the single source of keys, types, defaults and their documentation.

`config/schema.json` and `config/README.md` are generated from it (`kvpipe config --write`), the shipped YAML files are
validated against it by a test, and the Snakefile validates before any job starts. Unknown keys are errors.
"""

from __future__ import annotations

import copy
import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Name = Annotated[str, Field(pattern=NAME)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key's path and the nearest valid name."""


class Section(BaseModel):
    """Base of every section: unknown keys are refused and instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


# ---------------------------------------------------------------- data
class EmbeddedData(Section):
    """Examples made by `kvpipe.corpus`, deterministic by seed, disjoint between splits by content."""

    kind: Literal["embedded"] = "embedded"
    task: Literal["math", "code"]
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
    task: Name
    """Task name written to every record; fusion weights and metrics are kept per task."""
    train: str
    """Path of the training file."""
    validation: str
    """Path of the validation file."""
    test: str
    """Path of the test file."""
    columns: dict[str, str] = Field(
        default_factory=lambda: {"prompt": "prompt", "reasoning": "reasoning", "answer": "answer"}
    )
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
    sources: list[Annotated[EmbeddedData | FileData, Field(discriminator="kind")]] = Field(min_length=1)
    """Where the records come from, one entry per task."""
    template: Template = Template()
    """Record → text."""
    seed: int = 0
    """Seed of the embedded corpora."""
    ngram: PositiveInt = 13
    """Word n-gram length of the train/test leakage audit."""


# ---------------------------------------------------------------- models
class TokenizerRecipe(Section):
    """A tokenizer trained on the recipe's own corpus."""

    kind: Literal["byte_bpe", "unigram", "metaspace_bpe"] = "byte_bpe"
    """`byte_bpe`: ByteLevel BPE (GPT-2, Qwen, Llama-3); `unigram` and `metaspace_bpe`: SentencePiece style with byte fallback."""
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
    mixture: dict[Name, Fraction] = Field(default_factory=dict)
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
    path: str
    """Folder with config.json, safetensors and tokenizer files."""
    recipe: Recipe | None = None
    """How the folder was made, where kvpipe made it: `make teachers` and `source: pretrain` follow it."""
    parameters: PositiveInt | None = None
    """Number of parameters, for the elastic projector's default width; counted when absent."""


class PretrainModel(Section):
    """A model trained inside the DAG by its recipe."""

    source: Literal["pretrain"] = "pretrain"
    recipe: Recipe
    """Architecture, tokenizer and training."""
    path: str | None = None
    """Where `make teachers` writes the shipped copy; not read with this source."""


class HubModel(Section):
    """A repository on the Hugging Face hub."""

    source: Literal["hub"] = "hub"
    repo: str
    """`owner/name`."""
    revision: str = "main"
    """Branch, tag or commit; resolved once to a commit and recorded in the manifest."""
    trust_remote_code: bool = False
    """Run code shipped in the repository. Off unless you have read it."""


class ScratchModel(Section):
    """A model with random weights, drawn anew by every seed (the student of the embedded experiment)."""

    source: Literal["scratch"] = "scratch"
    architecture: dict[str, Any]
    """Fields of the transformers config class, `model_type` among them."""
    tokenizer: TokenizerRecipe = TokenizerRecipe()
    """Trained on the training split."""


class RandomModel(Section):
    """The architecture and tokenizer of another model with random weights (a null teacher)."""

    source: Literal["random"] = "random"
    like: Name
    """Name of the model to copy."""
    seed: int = 0
    """Seed of the weights."""


Model = Annotated[LocalModel | PretrainModel | HubModel | ScratchModel | RandomModel, Field(discriminator="source")]


# ---------------------------------------------------------------- arms
class TimeConfig(Section):
    kind: Literal["overlap", "segment", "position"] = "overlap"
    """`overlap`: byte-span overlap of the two tokenizations; `segment`: prompt, reasoning and answer matched one to one;
    `position`: token i to token i (harmful, kept as a null)."""
    mode: Literal["iou", "causal"] = "causal"
    """Weights of the byte-span overlap. `causal` uses nothing the student has not read yet."""
    text: Literal["student", "own"] = "student"
    """What the teacher reads: the student's text, or its own longer worked reasoning (needs `segment`)."""

    @model_validator(mode="after")
    def _own_text_needs_segments(self):
        if self.text == "own" and self.kind != "segment":
            raise ValueError("text: own needs kind: segment, since byte spans of different texts cannot overlap")
        return self


class LayerConfig(Section):
    kind: Literal["proportional", "cka", "list"] = "proportional"
    """`proportional` depth; `cka`: the k most similar teacher layers; `list`: explicit."""
    k: PositiveInt = 2
    """Teacher layers per student layer under `cka`."""
    temperature: PositiveFloat | None = None
    """Softmax temperature of the weights β; none clamps at 0 and normalises."""
    combine: Literal["concat", "mix"] = "concat"
    """`mix`: convex combination of the layers; `concat`: side by side, scaled by √β, before projection."""
    layers: list[int] | None = None
    """Teacher layer of each student layer under `list`."""


class ProjectorConfig(Section):
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
    kind: Literal["mean", "fixed", "attention", "task", "learnable", "select"] = "mean"
    """How the projected teachers become one target."""
    weights: dict[str, list[float]] = Field(default_factory=dict)
    """Weight of each teacher per task under `task` (row `default` serves unknown tasks); row `default` under `fixed`."""
    offsets: bool = False
    """Learn an offset to the table under `task`."""
    entropy: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy term that keeps learned weights from collapsing."""


class ScheduleConfig(Section):
    kind: Literal["constant", "linear", "cosine"] = "constant"
    """Course of λ after the warm-up."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps over which λ rises from 0."""
    final: Fraction = 0.0
    """Share of λ left at `until`."""
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the steps at which an anneal ends."""


class LossConfig(Section):
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
    teachers: list[Name] = Field(default_factory=list)
    """Names of models, in the order of the fusion weights."""
    content: Literal["own", "shuffled"] = "own"
    """`shuffled`: every example gets the teacher KV of another one."""
    seed_offset: int = 0
    """Added to the seed (the false-positive check runs control again under other seeds)."""
    time: TimeConfig = TimeConfig()
    layer: LayerConfig = LayerConfig()
    projector: ProjectorConfig = ProjectorConfig()
    fit: FitConfig = FitConfig()
    fuse: FuseConfig = FuseConfig()
    loss: LossConfig = LossConfig()

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
        for task, row in self.fuse.weights.items():
            if len(row) != len(self.teachers):
                raise ValueError(f"fuse.weights.{task} has {len(row)} weights for {len(self.teachers)} teachers")
        return self


class ArmEntry(Section):
    """An arm as written: another arm with some settings changed."""

    base: Name | None = None
    """Arm to start from; none starts from the defaults of `Arm`."""
    role: Literal["control", "experiment", "null", "baseline", "ablation"] | None = None
    """Role in the report; an arm with a base is an `ablation` unless it says otherwise."""
    label: str | None = None
    """One line for the report."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted key of `Arm` → value."""


# ---------------------------------------------------------------- steps
class StoreConfig(Section):
    dtype: Literal["bf16", "fp16", "int8"] = "bf16"
    """Storage type; int8 keeps one scale per token and head."""
    mode: Literal["stored", "live"] = "stored"
    """`stored`: computed once and read by all cells; `live`: computed again in every training step."""
    shard_examples: PositiveInt = 2000
    """Examples per shard; shards are built by separate jobs and can be resumed."""
    layers: Literal["needed", "all"] = "needed"
    """Keep only the teacher layers that some arm uses (a change of an arm's layers may then rebuild the store), or all."""
    budget_gb: PositiveFloat = 10.0
    """The build stops before it starts when the estimate exceeds this many GB per teacher."""
    batch_size: PositiveInt = 64
    """Examples per teacher forward."""
    top_logits: Annotated[int, Field(ge=0)] = 32
    """Most likely next tokens kept per token, for `logit_kd`."""


class LayerMapConfig(Section):
    examples: PositiveInt = 100
    """Validation examples."""
    warmup_steps: Annotated[int, Field(ge=0)] = 150
    """Cross-entropy steps given to a from-scratch reference student first: random layers resemble nothing."""


class LoraConfig(Section):
    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Fraction = 0.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"


class TrainConfig(Section):
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
    max_grad_norm: PositiveFloat = 1.0
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
    checkpoint_every: PositiveInt = 200
    """Steps between checkpoints."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` …"""
    threads: PositiveInt = 1
    """CPU threads of one cell."""


class EvaluateConfig(Section):
    batch_size: PositiveInt = 100
    max_new_tokens: PositiveInt = 80
    stop: list[str] = Field(default_factory=list)
    """Generation of an example ends after any of these strings (and at the end-of-text token)."""
    answer_pattern: str = r"####\s*(.+)"
    """Regular expression whose first group, last match, is the answer."""
    strip: list[str] = Field(default_factory=lambda: [",", "$", "%"])
    """Strings removed from both answers before they are compared."""


class StatsConfig(Section):
    resamples: PositiveInt = 1000
    """Bootstrap resamples of seeds × items."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    seed: int = 0
    power: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Power at which the minimum detectable effect is stated."""


class AuditConfig(Section):
    allow: list[Literal["leakage", "steps", "tokens", "items", "seeds"]] = Field(default_factory=list)
    """Breaches that are reported but do not fail the run."""
    tolerance: Fraction = 0.01
    """Allowed relative difference in student tokens between arms."""


class Config(Section):
    """A whole experiment."""

    title: str = "kvpipe experiment"
    """Heading of the report."""
    seeds: list[int] = Field(default_factory=lambda: [0, 1, 2], min_length=1)
    """One cell per arm and seed."""
    student: Name
    """Name of the model that is trained."""
    models: dict[Name, Model]
    """Every model, by name."""
    arms: dict[Name, ArmEntry]
    """Every arm, by name. `control` must be among them."""
    data: DataConfig
    store: StoreConfig = StoreConfig()
    layer_map: LayerMapConfig = LayerMapConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    stats: StatsConfig = StatsConfig()
    audit: AuditConfig = AuditConfig()

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
        for name in self.arms:
            arm = self.arm(name)
            for i, teacher in enumerate(arm.teachers):
                _known(f"arms.{name}.teachers[{i}]", teacher, self.models)
                if teacher == self.student:
                    raise ValueError(f"arms.{name}.teachers[{i}]: the student cannot be its own teacher")
            if arm.fuse.kind == "task":
                missing = tasks - set(arm.fuse.weights)
                if missing and "default" not in arm.fuse.weights:
                    raise ValueError(f"arms.{name}.fuse.weights: no row for {sorted(missing)} and no row 'default'")
        return self

    def arm(self, name: str) -> Arm:
        """The arm with its bases and `set` applied."""
        values = _resolve(name, self.arms, ())
        try:
            return Arm.model_validate(values)
        except ValidationError as error:
            raise ConfigError(_explain(error, f"arms.{name}.")) from None


def _known(path: str, name: str, valid) -> None:
    if name not in valid:
        close = difflib.get_close_matches(name, list(valid), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{path}: unknown name {name!r}{hint} (known: {', '.join(sorted(valid))})")


def _resolve(name: str, arms: dict[str, ArmEntry], seen: tuple[str, ...]) -> dict:
    if name in seen:
        raise ValueError(f"arms.{seen[0]}.base: circular: {' → '.join((*seen, name))}")
    entry = arms[name]
    values: dict[str, Any] = {}
    if entry.base is not None:
        _known(f"arms.{name}.base", entry.base, arms)
        values = copy.deepcopy(_resolve(entry.base, arms, (*seen, name)))
        values.pop("role", None)
        values.pop("label", None)
    for dotted, value in entry.set.items():
        assign(values, dotted, value)
    if entry.role is not None:
        values["role"] = entry.role
    if entry.label is not None:
        values["label"] = entry.label
    return values


def assign(values: dict, dotted: str, value: Any) -> None:
    """Set `a.b.c` in nested dictionaries, making the levels that are missing."""
    *parents, last = dotted.split(".")
    node = values
    for key in parents:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{dotted}: {key!r} holds a value, not a section")
    node[last] = value


def _fields_at(location: tuple) -> list[str]:
    """Valid keys of the section at a location of the schema (for the nearest-name hint)."""
    schema = Config.model_json_schema()
    arm = Arm.model_json_schema()
    definitions = {**schema["$defs"], **arm["$defs"], "Arm": arm}

    def step(node: dict, key) -> list[dict]:
        nodes = [node]
        out = []
        while nodes:
            item = nodes.pop()
            if "$ref" in item:
                nodes.append(definitions[item["$ref"].rsplit("/", 1)[1]])
                continue
            nodes.extend(item.get("anyOf", []) + item.get("oneOf", []) + item.get("allOf", []))
            if key in item.get("properties", {}):
                out.append(item["properties"][key])
            elif isinstance(key, int) and "items" in item:
                out.append(item["items"])
            elif isinstance(item.get("additionalProperties"), dict):
                out.append(item["additionalProperties"])
            elif "patternProperties" in item:
                out.extend(item["patternProperties"].values())
        return out

    for start in (schema, arm):
        current = [start]
        for key in location:
            following = [n for node in current for n in step(node, key)]
            # pydantic puts the tag of a union into the location: it is not a key of the document
            current = following or current
        names: list[str] = []
        while current:
            item = current.pop()
            if "$ref" in item:
                current.append(definitions[item["$ref"].rsplit("/", 1)[1]])
                continue
            current.extend(item.get("anyOf", []) + item.get("oneOf", []))
            names.extend(item.get("properties", {}))
        if names:
            return names
    return []


def _explain(error: ValidationError, prefix: str = "") -> str:
    lines = []
    for item in error.errors():
        location = tuple(item["loc"])
        path = prefix + ".".join(str(part) for part in location)
        if item["type"] == "extra_forbidden":
            valid = [k for start in (location[:-1],) for k in (_arm_fields(start) if prefix else _fields_at(start))]
            close = difflib.get_close_matches(str(location[-1]), valid, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            lines.append(f"{path}: unknown key{hint} (known: {', '.join(sorted(set(valid)))})")
        elif item["type"] == "value_error":
            lines.append(f"{path}: {item['ctx']['error']}" if path else str(item["ctx"]["error"]))
        else:
            lines.append(f"{path}: {item['msg']} (got {item['input']!r})")
    return "\n".join(lines)


def _arm_fields(location: tuple) -> list[str]:
    model: Any = Arm
    for key in location:
        model = model.model_fields[key].annotation
    return list(model.model_fields)


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
        raise ConfigError(f"{origin}: {len(error.errors())} problem(s)\n{_explain(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{origin}:\n{error}") from None


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
        pairs[key] = yaml.safe_load(value)
    return parse(values, pairs, origin=str(path))


def json_schema() -> str:
    """The JSON schema of a configuration file (with the arm's resolved keys under $defs)."""
    schema = Config.model_json_schema()
    arm = Arm.model_json_schema()
    schema["$defs"].update(arm.pop("$defs"))
    schema["$defs"]["Arm"] = arm
    return json.dumps(schema, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
