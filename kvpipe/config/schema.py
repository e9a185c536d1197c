"""A whole experiment: the sections together, and what they must agree on."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from pydantic import Field, ValidationError, model_validator

from kvpipe.config.arms import Arm, ArmEntry
from kvpipe.config.data import DataConfig
from kvpipe.config.errors import explain, nearest
from kvpipe.config.kinds import ENGINES, extend
from kvpipe.config.models import (
    HubModel,
    Loading,
    LocalModel,
    LockedRepo,
    Model,
    PretrainModel,
    PrunedModel,
    RandomModel,
    ScratchModel,
)
from kvpipe.config.presets import with_presets
from kvpipe.config.section import ConfigError, Name, Section, Seed, assign
from kvpipe.config.settings import (
    GENERATED,
    AuditConfig,
    EvaluateConfig,
    LayerMapConfig,
    StatsConfig,
    StoreConfig,
    TeacherTextConfig,
    TrainConfig,
)


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
    extensions: list[str] = Field(default=[])
    """Python files of your own that register fusions, projectors, loss terms or metrics. They run as part of kvpipe: name
    only files that you trust."""
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
    teacher_text: TeacherTextConfig = TeacherTextConfig()
    """How teachers write their own reasoning (`time.reasoning: written`)."""
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
    def _extensions(cls, values: Any) -> Any:
        given = values.get("extensions") if isinstance(values, dict) else None
        if isinstance(given, list) and all(isinstance(name, str) for name in given):
            extend(given)
        return values

    @model_validator(mode="before")
    @classmethod
    def _presets(cls, values: Any) -> Any:
        data = values.get("data") if isinstance(values, dict) else None
        if not isinstance(data, dict):
            return values
        evaluate = with_presets(values.get("evaluate"), "evaluate", data.get("sources"))
        return {**values, "evaluate": evaluate} if evaluate else values

    @model_validator(mode="after")
    def _comparisons(self):
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} holds a seed twice")
        if not self._controls():
            raise ValueError("arms: no arm has role control, which every contrast needs: name the one without teachers")
        control, *others = self._controls()
        for name in others:
            raise ValueError(f"arms.{name}.role: control; {control!r} has role control, and no other arm has it")
        swap = self.evaluate.cache_swap
        if swap is not None and swap in self.arms:
            arm = self.arm(swap)
            if (
                len(arm.teachers) != 1
                or not {"keys", "values"} <= {term.kind for term in arm.loss.values()}
                or {arm.time.text, arm.reading} != {"student"}
            ):
                raise ValueError(
                    f"evaluate.cache_swap: {swap!r} must match keys and values of one teacher, and both read the record's text"
                )
        named = {"evaluate.cache_swap": [swap] if swap else []}
        named |= {"stats.headline": [self.stats.headline] if self.stats.headline else []}
        named |= {f"stats.contrasts[{i}]": pair for i, pair in enumerate(self.stats.contrasts)}
        for path, names in named.items():
            for name in names:
                if name not in self.arms:
                    fix = f"name one of them, or leave {path.partition('[')[0]} out"
                    raise ValueError(f"{path}: no arm is named {name!r}{nearest(name, self.arms)}; {fix}")
            if len(names) == 2 and names[0] == names[1]:
                raise ValueError(f"{path}: {names[0]} is compared with itself; name two arms")
        if self.stats.headline == control:
            raise ValueError(f"stats.headline: {control} is the control, which the headline is compared with")
        return self

    @model_validator(mode="after")
    def _models(self):
        _known("student", self.student, self.models)
        for name, model in self.models.items():
            path, student = f"models.{name}", name == self.student
            if isinstance(model, RandomModel):
                _known(f"{path}.like", model.like, self.models)
                if not isinstance(self.models[model.like], LocalModel | PretrainModel | HubModel):
                    raise ValueError(f"{path}.like: {model.like!r} has no weights of its own")
            if isinstance(model, PrunedModel):
                _known(f"{path}.of", model.of, self.models)
                if not isinstance(self.models[model.of], LocalModel | PretrainModel | HubModel):
                    raise ValueError(f"{path}.of: {model.of!r} has no weights of its own")
            if student and isinstance(model, LocalModel | HubModel) and model.load != Loading():
                raise ValueError(f"{path}.load: the student is trained, from fp32 weights; set train.precision")
            if self.data.template.chat_template and isinstance(model, PretrainModel | ScratchModel):
                made = f"{path} is made here (source: {model.source}) and has no chat template"
                raise ValueError(f"data.template.chat_template: {made}")
            if isinstance(model, ScratchModel) and not student:
                raise ValueError(f"{path}: source scratch is for the student only")
        return self

    @model_validator(mode="after")
    def _tasks(self):
        tasks = [task for source in self.data.sources for task in sorted(source.task_names)]
        if len(set(tasks)) != len(tasks):
            raise ValueError("data.sources: a task occurs twice")
        for path, section in (
            ("data.template", self.data.template),
            ("evaluate", self.evaluate),
            ("teacher_text", self.teacher_text),
        ):
            for task in section.tasks:
                _known(f"{path}.tasks.{task}", task, sorted(tasks))
        for number, source in enumerate(self.data.sources):
            for task in sorted(source.task_names):
                scorer = self.evaluate.of(task).scorer
                field = {"code": "tests", "choice": "choices"}.get(scorer)
                if field is not None and field not in getattr(source, "columns", {}):
                    raise ValueError(
                        f"evaluate.tasks.{task}.scorer: {scorer} needs the field {field}: map it in "
                        f"data.sources[{number}].columns, or choose another scorer"
                    )
        _known("teacher_text.engine", self.teacher_text.engine, ENGINES)
        for task, asked in self.teacher_text.tasks.items():
            for name in asked.teachers or ():
                _known(f"teacher_text.tasks.{task}.teachers", name, self.models)
        # bases first: the arm that is named is the one that wrote the mistake, not one that inherits it
        for name in sorted(self.arms, key=lambda name: len(_chain(name, self.arms))):
            self._fits_the_rest(name, self.arm(name), sorted(tasks))
        return self

    def _fits_the_rest(self, name: str, arm: Arm, tasks: list[str]) -> None:
        path = f"arms.{name}.set"
        for i, teacher in enumerate(arm.teachers):
            _known(f"{path}.teachers[{i}]", teacher, self.models)
            if teacher == self.student:
                raise ValueError(f"{path}.teachers[{i}]: the student cannot be its own teacher")
        for teacher in arm.teachers if arm.time.text == "written" else ():
            written = self.teacher_text.of(teacher, tasks)
            unread = [task for task in written if self.evaluate.of(task).scorer not in GENERATED]
            if unread or not written:
                scorer = f"evaluate.tasks.{unread[0]}.scorer: {self.evaluate.of(unread[0]).scorer}" if unread else ""
                what = f"{scorer} finds no answer in a text" if unread else f"{teacher} writes in none"
                raise ValueError(f"{path}.time.reasoning: written: {what}; list the tasks in teacher_text.tasks")
        first, last = (seed + arm.seed_offset for seed in (min(self.seeds), max(self.seeds)))
        if not 0 <= first <= last < 2**32:
            raise ValueError(
                f"{path}.seed_offset: {arm.seed_offset} makes seeds {first} to {last}, not in 0 to 2**32 - 1"
            )
        if self.train.steps * arm.step_factor > 10**9:
            raise ValueError(f"{path}.step_factor: {arm.step_factor:g} times train.steps is beyond 1,000,000,000 steps")
        longest = self.train.max_length
        for term, settings in arm.loss.items():
            if (skipped := getattr(settings, "skip_sink", 0)) >= longest:
                raise ValueError(f"{path}.loss.{term}.skip_sink: {skipped} leaves nothing of at most {longest} tokens")
        student = self.models[self.student]
        if arm.layer.kind == "kept" and not isinstance(student, PrunedModel):
            raise ValueError(f"{path}.layer.kind: kept is for a student of source: pruned; {self.student} is none")
        if arm.fit.basis == "whole" and not (isinstance(student, PrunedModel) and student.heads is None):
            what = "a student of source: pruned that keeps all heads"
            raise ValueError(f"{path}.fit.basis: whole is for {what}; {self.student} is none")
        if "top_logits" in arm.needs and not self.store.top_logits:
            raise ValueError(f"store.top_logits: 0 keeps nothing for arm {name!r} (loss.logits); set 1 or more")
        if arm.fuse.kind == "task":
            for task in arm.fuse.weights:
                _known(f"{path}.fuse.weights.{task}", task, [*tasks, "default"])
            missing = [task for task in tasks if task not in arm.fuse.weights]
            if missing and "default" not in arm.fuse.weights:
                raise ValueError(f"{path}.fuse.weights: no row for {missing} and no row 'default'")

    def trusts(self, name: str) -> bool:
        """Whether code from a model's repository may run: only the configuration can say so, no file of the model's."""
        model = self.models[name]
        if isinstance(model, RandomModel | PrunedModel):
            return self.trusts(model.like if isinstance(model, RandomModel) else model.of)
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
