"""Sections of the configuration: arms."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from kvpipe.config.alignment import LayerConfig, Reading, TimeConfig
from kvpipe.config.fusions import MeanFusionConfig
from kvpipe.config.kinds import FUSIONS, PROJECTORS, TERMS
from kvpipe.config.projection import FitConfig, LinearProjectorConfig
from kvpipe.config.section import NUMBER, Count, Flag, Name, Positive, Section
from kvpipe.config.terms import CrossEntropyConfig, TermSettings

Role = Literal["control", "experiment", "null", "baseline", "ablation"]
CROSS_ENTROPY = "cross_entropy"


def _terms(value: Any) -> Any:
    """Terms as written: each has its name for kind unless it says otherwise; an empty one is taken out."""
    if not isinstance(value, dict):
        return value
    terms = {name: term for name, term in value.items() if term is not None}
    unknown = [name for name, term in terms.items() if not isinstance(term, Section) and not _named(name, term)]
    if unknown:
        raise PydanticCustomError("unknown_keys", "unknown terms", {"keys": unknown, "valid": list(TERMS.settings)})
    return {name: {"kind": name, **term} if isinstance(term, dict) else term for name, term in terms.items()}


def _named(name: str, term: Any) -> bool:
    """Whether it is clear which term is meant; a kind that there is not is the union's error."""
    return name in TERMS.settings or (isinstance(term, dict) and "kind" in term)


class OnPolicyConfig(Section):
    """Texts that the student writes itself, and its teachers then read live (GKD, arXiv:2306.13649)."""

    share: Annotated[float, Field(gt=0, le=1), NUMBER] = 0.5
    """Share of every batch's examples whose text after the prompt the student has written. From these it learns by its
    teachers alone: cross-entropy on one's own words teaches nothing."""
    every: Count = 50
    """The student writes anew after so many steps, with the weights that it then has."""
    max_new_tokens: Count = 64
    """Most tokens of a completion, which is drawn at temperature 1."""


class Arm(Section):
    """One experimental condition, after `base` and `set` are resolved."""

    role: Role = "ablation"
    """What the report calls it. Nulls must not beat control."""
    label: str = ""
    """One line for the report."""
    teachers: list[Name] = Field(default=[])
    """Names of models, in the order of the fusion weights."""
    shuffle_teacher: Flag = False
    """Every example gets the teacher KV of another one."""
    seed_offset: Annotated[int, Field(gt=-(2**32), lt=2**32), NUMBER] = 0
    """Added to the seed (the false-positive check runs control again under other seeds)."""
    init: Literal["student", "random", "fit"] = "student"
    """Weights that a cell starts from: the student's own; `random`: drawn by the seed (training from scratch); `fit`: its own,
    but for key and value projections, which ridge regression sets so that its own inputs give the fused target."""
    step_factor: Positive = 1.0
    """Optimizer steps as a multiple of `train.steps`; the audit compares arms of one multiple."""
    learning_rate_factor: Positive = 1.0
    """Learning rate as a multiple of `train.learning_rate`: every arm is compared at the one that was tuned for it."""
    student_reasoning: Literal["full", "short", "none"] = "full"
    """How much of a record's reasoning the student's texts hold, in training and when it is scored: all of it, what
    `data.short` leaves, or nothing. The teachers read all of it, as only caches can carry (privileged information). Bits per
    byte are those of other texts then: compare such arms with one another."""
    examples: Count | None = None
    """Training examples of every task, the first ones; none takes all."""
    on_policy: OnPolicyConfig | None = None
    """Training on texts of the student's own; without it on the training texts alone."""
    time: TimeConfig = TimeConfig()
    """Which teacher tokens make up a student token."""
    layer: LayerConfig = LayerConfig()
    """Which teacher layers make up a student layer."""
    projector: Annotated[Any, PROJECTORS, BeforeValidator(PROJECTORS.tagged)] = LinearProjectorConfig()
    """The map from a teacher's heads and dimension to the student's."""
    fit: FitConfig = FitConfig()
    """How the projectors are fitted before training."""
    fuse: Annotated[Any, FUSIONS, BeforeValidator(FUSIONS.tagged)] = MeanFusionConfig()
    """How several teachers become one target."""
    loss: Annotated[dict[Name, Annotated[Any, TERMS]], BeforeValidator(_terms)] = Field(default={})
    """The terms of the loss by name; cross-entropy is there unless its weight is 0."""

    @property
    def terms(self) -> dict[str, TermSettings]:
        """All terms, cross-entropy first."""
        return {CROSS_ENTROPY: CrossEntropyConfig(), **self.loss}

    @property
    def reading(self) -> Reading:
        """What the student reads."""
        return "student" if self.student_reasoning == "full" else self.student_reasoning

    @property
    def needs(self) -> frozenset[str]:
        """What the arm's terms and its fusion ask for."""
        terms = frozenset().union(*(term.needs for term in self.loss.values()))
        return terms | (self.fuse.needs if "targets" in terms else frozenset())

    def of_kind(self, *settings: type[TermSettings]) -> list[Any]:
        """The terms of some kinds."""
        return [term for term in self.loss.values() if isinstance(term, settings)]

    @model_validator(mode="after")
    def _coherent(self):
        learns = [name for name, term in self.loss.items() if not isinstance(term, CrossEntropyConfig)]
        if bool(learns) != bool(self.teachers):
            what = f"teachers {self.teachers} with the terms {list(self.terms)}"
            raise ValueError(f"loss: {what}: name teachers and what is learnt from them, or neither")
        if self.role == "control" and self.teachers:
            raise ValueError(
                f"role: control learns alone: leave out teachers ({', '.join(self.teachers)}) and the terms of loss"
            )
        if all(term.weight == 0 for term in self.terms.values()):
            raise ValueError("loss.cross_entropy.weight: 0 leaves nothing to train on; give it a weight, or add a term")
        if self.on_policy is not None and (self.shuffle_teacher or not self.teachers):
            raise ValueError(
                "on_policy: the student's own texts are read by teachers, each its own: name teachers and leave "
                "out shuffle_teacher"
            )
        twice = sorted({name for name in self.teachers if self.teachers.count(name) > 1})
        if twice:
            raise ValueError(f"teachers: {', '.join(twice)} is named twice, and would count twice")
        for name, term in self.loss.items():
            if term.one_teacher and len(self.teachers) > 1:
                raise ValueError(f"loss.{name} has one teacher; got {', '.join(self.teachers)}")
            weighed = "fuse" in term.reads and "targets" not in term.needs
            if weighed and len(self.teachers) > 1 and not self.fuse.known_before:
                known = [kind for kind, one in FUSIONS.settings.items() if getattr(one, "known_before", False)]
                raise ValueError(f"loss.{name} weighs teachers by {', '.join(known)}; got fuse.kind: {self.fuse.kind}")
        self._all_has_an_effect()
        if "targets" in self.needs:
            self._projects()
        rows = getattr(self.fuse, "weights", {})
        for task, row in rows.items() if isinstance(rows, dict) else [("", rows)]:
            if len(row) != len(self.teachers):
                path = f"fuse.weights.{task}".rstrip(".")
                raise ValueError(f"{path} has {len(row)} weights for {len(self.teachers)} teachers")
        return self

    def _all_has_an_effect(self) -> None:
        """Refuse sections that no term of the loss reads."""
        read = frozenset().union(*(term.reads for term in self.loss.values()))
        for name in ("time", "layer", "projector", "fit", "fuse"):
            if name not in read and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: has no effect on the terms {', '.join(self.terms)}; leave it out")
        if self.shuffle_teacher and not self.teachers:
            raise ValueError("shuffle_teacher: has no effect without teachers; leave it out")
        if getattr(self.fuse, "entropy", 0) and "targets" not in self.needs:
            raise ValueError("fuse.entropy is a term beside keys or values, whose weights it keeps apart; leave it out")
        if self.init == "fit" and ("targets" not in self.needs or self.fuse.needs & {"own_queries", "own_hidden"}):
            raise ValueError(
                "init: fit needs a target that is there before the student reads: a term on caches, and a fusion that "
                f"does not look at the student; got the terms {', '.join(self.terms)} and fuse.kind: {self.fuse.kind}"
            )
        if "span_losses" in self.needs and (self.time.kind != "overlap" or self.reading != "student"):
            got = f"time.kind: {self.time.kind} and student_reasoning: {self.student_reasoning}"
            raise ValueError(f"fuse.per: span needs both to read one text; got {got}")
        if self.reading != "student" and self.teachers:
            blind = [name for name, term in self.loss.items() if "time" not in term.reads and term.reads]
            if blind or self.time.kind == "position":
                what = f"loss.{blind[0]}" if blind else "time.kind: position"
                raise ValueError(
                    f"student_reasoning: {self.reading} needs two texts to be aligned, which {what} does not"
                )

    def _projects(self) -> None:
        projector, method = self.projector, self.fit.method
        if method not in projector.fits:
            allowed = ", ".join(sorted(projector.fits))
            raise ValueError(f"fit.method: {method} cannot start projector.kind: {projector.kind}; one of {allowed}")
        if projector.keeps_heads and self.layer.kind == "cka" and self.layer.combine == "concat":
            raise ValueError(f"projector.kind: {projector.kind} keeps heads apart: set layer.combine: mix")
        if projector.mode == "frozen" and method == "grouped":
            raise ValueError("fit.method: grouped is an unfitted start: set projector.mode to slow or joint")


for _kinds in (PROJECTORS, FUSIONS, TERMS):
    _kinds.extends(Arm)


class ArmEntry(Section):
    """An arm as written: another arm with some settings changed."""

    base: Name | None = None
    """Arm to start from; none starts from the defaults of its settings."""
    role: Role | None = None
    """Role in the report and in the statistics, `ablation` if it is not said; not handed down by a base. Write `"null"`
    in quotes: the bare word is YAML for nothing."""
    label: str | None = None
    """One line for the report."""
    set: dict[str, Any] = Field(default={})
    """Dotted key → value, applied in order over the base. `loss.keys.weight: 0.3` changes one setting or adds a term,
    `loss.keys: null` takes one away; `loss: {values: {}}` replaces the section, its other terms go."""
