"""The configuration: one pydantic model is the single source of keys, types, defaults and their documentation.

The sections are in `kvpipe.config.{data,models,arms,steps}`. `config/schema.json` and `config/README.md` are generated
from them (`make config`), the shipped YAML files are validated against them by a test, and the Snakefile validates
before any job starts.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from kvpipe.config.arms import (
    Arm,
    ArmEntry,
    FitConfig,
    FuseConfig,
    LayerConfig,
    LossConfig,
    ProjectorConfig,
    ScheduleConfig,
    TimeConfig,
)
from kvpipe.config.data import (
    Chat,
    DataConfig,
    EmbeddedData,
    FileData,
    HubData,
    RowData,
    Template,
    TextTemplate,
    with_presets,
)
from kvpipe.config.errors import explain, nearest
from kvpipe.config.models import (
    HubModel,
    Loading,
    LocalModel,
    LockedFile,
    LockedRepo,
    Model,
    PretrainModel,
    RandomModel,
    Recipe,
    ScratchModel,
    TokenizerRecipe,
)
from kvpipe.config.presets import PRESETS
from kvpipe.config.section import ConfigError, Name, Section, Seed
from kvpipe.config.settings import (
    LOSS_ON,
    AuditConfig,
    EvaluateConfig,
    LayerMapConfig,
    LoraConfig,
    LossOn,
    SandboxConfig,
    ScoringConfig,
    StatsConfig,
    StoreConfig,
    TrainConfig,
)

__all__ = [
    "LOSS_ON",
    "PRESETS",
    "Arm",
    "ArmEntry",
    "AuditConfig",
    "Chat",
    "Config",
    "ConfigError",
    "DataConfig",
    "EmbeddedData",
    "EvaluateConfig",
    "FileData",
    "FitConfig",
    "FuseConfig",
    "HubData",
    "HubModel",
    "LayerConfig",
    "LayerMapConfig",
    "Loading",
    "LocalModel",
    "LockedFile",
    "LockedRepo",
    "LoraConfig",
    "LossConfig",
    "LossOn",
    "Model",
    "Name",
    "PretrainModel",
    "ProjectorConfig",
    "RandomModel",
    "Recipe",
    "RowData",
    "SandboxConfig",
    "ScheduleConfig",
    "ScoringConfig",
    "ScratchModel",
    "Section",
    "StatsConfig",
    "StoreConfig",
    "Template",
    "TextTemplate",
    "TimeConfig",
    "TokenizerRecipe",
    "TrainConfig",
    "assign",
    "json_schema",
    "load",
    "lock_path",
    "merge",
    "overridden",
    "parse",
    "read",
    "with_lock",
]


class Config(Section):
    """A whole experiment."""

    title: str = "kvpipe experiment"
    """Heading of the report."""
    seeds: list[Seed] = Field(default=[0, 1, 2], min_length=1)
    """One cell per arm and seed."""
    student: Name
    """Name of the model that is trained."""
    models: dict[Name, Model]
    """Every model, by name."""
    libraries: list[str] = Field(default=[])
    """Folders of shared models that are searched before anything is downloaded, and only read: Hugging Face caches
    (`models--owner--name/snapshots/<commit>`) or plain folders (`owner/name`). The machine's own cache comes last."""
    lock: dict[str, LockedRepo] = Field(default={})
    """`repo@revision` → commit and files of every hub repository. Written by `kvpipe lock` to `<config>.lock.yaml` beside
    the (first) configuration file, and read from there."""
    arms: dict[Name, ArmEntry]
    """Every arm, by name. One of them has `role: control`, and no other: every contrast needs it. Where none says so it is
    the first that has neither a role nor a base."""
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

    @model_validator(mode="before")
    @classmethod
    def _presets(cls, values: Any) -> Any:
        data = values.get("data") if isinstance(values, dict) else None
        if not isinstance(data, dict):
            return values
        evaluate = with_presets(values.get("evaluate"), "evaluate", data.get("sources"))
        return {**values, "evaluate": evaluate} if evaluate else values

    @model_validator(mode="after")
    def _names(self):
        controls = self._controls()
        if not controls:
            raise ValueError(
                "arms: no arm has role control, which every contrast needs: name the one that learns alone"
            )
        for name in controls[1:]:
            raise ValueError(
                f"arms.{name}.role: control; {controls[0]!r} has role control, and no other arm: every contrast is "
                "against it"
            )
        named = {"stats.headline": [self.stats.headline] if self.stats.headline else []}
        named |= {f"stats.contrasts[{i}]": pair for i, pair in enumerate(self.stats.contrasts)}
        for path, names in named.items():
            for name in names:
                if name not in self.arms:
                    raise ValueError(
                        f"{path}: no arm is named {name!r}{nearest(name, self.arms)}; name one of them, or leave "
                        f"{path.partition('[')[0]} out"
                    )
            if len(names) == 2 and names[0] == names[1]:
                raise ValueError(f"{path}: {names[0]} is compared with itself; name two arms")
        if self.stats.headline == controls[0]:
            raise ValueError(f"stats.headline: {controls[0]} is the control, which the headline is compared with")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} holds a seed twice")
        _known("student", self.student, self.models)
        for name, model in self.models.items():
            if isinstance(model, RandomModel):
                _known(f"models.{name}.like", model.like, self.models)
                if not isinstance(self.models[model.like], LocalModel | PretrainModel | HubModel):
                    raise ValueError(f"models.{name}.like: {model.like!r} has no weights of its own")
            if name == self.student and isinstance(model, LocalModel | HubModel) and model.load != Loading():
                raise ValueError(f"models.{name}.load: the student is trained, from fp32 weights; set train.precision")
            if self.data.template.chat_template and isinstance(model, PretrainModel | ScratchModel):
                raise ValueError(
                    f"data.template.chat_template: models.{name} is made here (source: {model.source}) and has no chat template"
                )
            if isinstance(model, ScratchModel) and name != self.student:
                raise ValueError(f"models.{name}: source scratch is for the student only")
        tasks = {task for source in self.data.sources for task in source.task_names}
        if len(tasks) != sum(len(source.task_names) for source in self.data.sources):
            raise ValueError("data.sources: a task occurs twice")
        for path, section in (("data.template", self.data.template), ("evaluate", self.evaluate)):
            for task in section.tasks:
                _known(f"{path}.tasks.{task}", task, sorted(tasks))
        longest = self.train.max_length
        # bases first: the arm that is named is the one that wrote the mistake, not one that inherits it
        for name in sorted(self.arms, key=lambda name: len(_chain(name, self.arms))):
            arm = self.arm(name)
            for i, teacher in enumerate(arm.teachers):
                _known(f"arms.{name}.set.teachers[{i}]", teacher, self.models)
                if teacher == self.student:
                    raise ValueError(f"arms.{name}.set.teachers[{i}]: the student cannot be its own teacher")
            drawn = [seed + arm.seed_offset for seed in (min(self.seeds), max(self.seeds))]
            if not 0 <= drawn[0] <= drawn[1] < 2**32:
                raise ValueError(
                    f"arms.{name}.set.seed_offset: {arm.seed_offset} makes seeds {drawn[0]} to {drawn[1]}; they lie "
                    "between 0 and 2**32 - 1"
                )
            if self.train.steps * arm.step_factor > 10**9:
                raise ValueError(
                    f"arms.{name}.set.step_factor: {arm.step_factor:g} times train.steps is beyond 1,000,000,000 steps"
                )
            if arm.loss.skip_sink >= longest:
                raise ValueError(
                    f"arms.{name}.set.loss.skip_sink: {arm.loss.skip_sink} leaves nothing of a text of at most "
                    f"{longest} tokens (train.max_length)"
                )
            if arm.loss.kind == "logit_kd" and not self.store.top_logits:
                raise ValueError(
                    f"store.top_logits: 0 keeps none of the next tokens that arm {name!r} (loss.kind: logit_kd) "
                    "learns from; set 1 or more"
                )
            for task in arm.fuse.weights:
                _known(f"arms.{name}.set.fuse.weights.{task}", task, [*sorted(tasks), "default"])
            if arm.fuse.kind == "task":
                missing = tasks - set(arm.fuse.weights)
                if missing and "default" not in arm.fuse.weights:
                    raise ValueError(f"arms.{name}.set.fuse.weights: no row for {sorted(missing)} and no row 'default'")
        return self

    @model_validator(mode="after")
    def _scorers(self):
        for number, source in enumerate(self.data.sources):
            for task in sorted(source.task_names):
                scorer = self.evaluate.of(task).scorer
                field = {"code": "tests", "choice": "choices"}.get(scorer)
                if field is not None and field not in getattr(source, "columns", {}):
                    raise ValueError(
                        f"evaluate.tasks.{task}.scorer: {scorer} needs the field {field}: map it in "
                        f"data.sources[{number}].columns, or choose another scorer"
                    )
        return self

    def trusts(self, name: str) -> bool:
        """Whether code from a model's repository may run: only the configuration can say so, no file of the model's."""
        model = self.models[name]
        if isinstance(model, RandomModel):
            return self.trusts(model.like)
        return isinstance(model, HubModel) and model.trust_remote_code

    @property
    def control(self) -> str:
        """Name of the arm of role control; where none says so, of the first that has neither a role nor a base."""
        return self._controls()[0]

    def _controls(self) -> list[str]:
        said = [name for name, arm in self.arms.items() if arm.role == "control"]
        return said or [name for name, arm in self.arms.items() if arm.role is None and arm.base is None][:1]

    @property
    def headline(self) -> str | None:
        """Name of the arm that the report is about; None where there is no experiment."""
        experiments = [name for name, arm in self.arms.items() if arm.role == "experiment"]
        return self.stats.headline or (experiments[-1] if experiments else None)

    def arm(self, name: str) -> Arm:
        """The arm with its bases and `set` applied."""
        entry = self.arms[name]
        # what the report calls an arm is not handed down
        values: dict[str, Any] = {k: v for k in ("role", "label") if (v := getattr(entry, k)) is not None}
        if name in self._controls():
            values["role"] = "control"
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
    values, overrides = copy.deepcopy(values), overrides or {}
    names = ("steps", "max_steps")  # of one setting; the second is what other trainers call it
    train = values.get("train")
    if isinstance(train, dict) and any(f"train.{name}" in overrides for name in names):
        # an override takes the place of the file's value, whichever of its names that has
        values["train"] = {key: value for key, value in train.items() if key not in names}
    for dotted, value in overrides.items():
        assign(values, dotted, value)
    train = values.get("train")
    if isinstance(train, dict) and "max_steps" in train:
        if "steps" in train:
            raise ConfigError(f"{origin}:\ntrain: steps and max_steps are two names of one setting; give one of them")
        values["train"] = {"steps" if key == "max_steps" else key: value for key, value in train.items()}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{origin}:\n{explain(error, values)}") from None


def merge(values: dict, over: dict) -> dict:
    """Lay one nested dictionary over another, key by key; everything that is no mapping is replaced. As Snakemake does
    with several `--configfile`."""
    out = dict(values)
    for key, value in over.items():
        if isinstance(value, dict):
            below = out.get(key)
            value = merge(below if isinstance(below, dict) else {}, value)
        out[key] = value
    return out


ENTRIES = 100_000
"""Most entries of a document, every alias written out."""


def entries(node: Any, counted: dict[int, float] | None = None) -> float:
    """How many entries a document (nodes of YAML, or dictionaries and lists) has when every alias is written out; infinite
    where it contains itself."""
    counted = {} if counted is None else counted
    node = node.value if isinstance(node, yaml.Node) else node
    if not isinstance(node, dict | list | tuple):
        return 1.0
    if id(node) not in counted:
        counted[id(node)] = math.inf
        parts = node.values() if isinstance(node, dict) else node
        counted[id(node)] = 1.0 + sum(entries(part, counted) for part in parts)
    return counted[id(node)]


def _bounded(node: Any) -> None:
    if entries(node) > ENTRIES:
        raise ValueError(
            f"it has more than {ENTRIES:,} entries when its aliases (*name) are written out; expected a configuration"
        )


class _OneOfEach(yaml.SafeLoader):
    """YAML in which a key stands once in its mapping, YAML's own rule, and aliases do not multiply; PyYAML keeps neither."""

    def get_single_node(self) -> yaml.Node | None:
        """The document, if it stays one when its aliases are written out."""
        node = super().get_single_node()
        _bounded(node)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """The mapping; what `<<` brings in may be given anew."""
        seen: dict[Any, yaml.Node] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
                continue
            name = self.construct_object(key)
            if name in seen:
                line = seen[name].start_mark.line + 1
                problem = f"the key {name!r} stands there already, in line {line}: keep one of the two"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen[name] = key
        return super().construct_mapping(node, deep)


def _yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_OneOfEach)
    except RecursionError:
        raise ConfigError(f"{origin}: nested too deeply; expected a configuration of a few levels") from None
    except (yaml.YAMLError, ValueError) as error:  # a date or a number that is none is a plain ValueError
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        said = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{origin}{where}: not valid YAML: {said}") from None


def read(path: str | Path) -> dict:
    """The mapping in a configuration file, as written.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: it is a folder, no text in UTF-8, no YAML, or has a key twice; with the file and the line.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; expected a configuration file (YAML)")
    try:
        values = _yaml(path.read_bytes().decode(), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} is not UTF-8 text; expected YAML in UTF-8: save it so, or name another file"
        ) from None
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such configuration file; name yours with --config, or run this in kvpipe's own folder, where "
            "config/config.yaml is the embedded experiment"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping at the top level")
    return values


def lock_path(path: str | Path) -> Path:
    """The lock file of a configuration: beside it, `hpc.yaml` → `hpc.lock.yaml`."""
    return Path(path).with_suffix(".lock.yaml")


def with_lock(values: dict, paths: Sequence[str | Path]) -> dict:
    """The merged values of configuration files, laid over the lock beside the first of them."""
    path = lock_path(paths[0]) if paths else None
    try:
        _bounded(values)  # Snakemake has read them by a loader of its own
    except ValueError as error:
        raise ConfigError(f"{', '.join(map(str, paths))}: {error}") from None
    return merge(read(path), values) if path is not None and path.is_file() else values


def load(paths: str | Path | Sequence[str | Path], overrides: list[str] | None = None) -> Config:
    """Read and validate YAML (or JSON) files.

    Args:
        paths: one file, or a base and overlays, each laid over those before it.
        overrides: `dotted.key=value` with a YAML value, over all of them.
    """
    files = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    values: dict = {}
    for path in files:
        values = merge(values, read(path))
    return parse(with_lock(values, files), overridden(overrides), origin=", ".join(map(str, files)))


def overridden(overrides: Sequence[str] | None) -> dict[str, Any]:
    """Dotted key → value of `dotted.key=value` texts, the values read as YAML."""
    pairs = {}
    for item in overrides or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item!r}: expected dotted.key=value")
        pairs[key] = _yaml(value, f"--set {item!r}")
    return pairs


def json_schema() -> str:
    """The JSON schema of a configuration file (with the arm's resolved keys under $defs)."""
    schema = Config.model_json_schema()
    arm = Arm.model_json_schema()
    schema["$defs"].update(arm.pop("$defs"))
    schema["$defs"]["Arm"] = arm
    return json.dumps(schema, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
