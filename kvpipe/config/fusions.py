"""Settings of the fusions: how several teachers become one target."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from kvpipe.config.kinds import FUSIONS
from kvpipe.config.section import Flag, NotNegative, Positive, Section

SUM_TOLERANCE = 0.02
"""A row of fusion weights sums to 1 within this, so that thirds may be written as 0.33."""


class FusionSettings(Section):
    """What every fusion says of itself."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Of a batch: `tasks` (names), `own_queries` and `own_hidden` (the student's), `teacher_losses` (nats of each example),
    `span_losses` (nats of each student token's bytes), `prototypes` (a first look at the teachers' targets)."""
    known_before: ClassVar[bool] = False
    """Whether the weights follow from the example alone, so that terms without caches can use them."""


class Rows(FusionSettings):
    """Weights as given."""

    known_before: ClassVar[bool] = True

    @staticmethod
    def checked(name: str, row: list[float]) -> None:
        """Raises ValueError where shares do not sum to 1."""
        if abs(sum(row) - 1) > SUM_TOLERANCE:
            raise ValueError(f"{name}: {row} sums to {sum(row):g}; the teachers' shares sum to 1")


@FUSIONS.register
class MeanFusionConfig(FusionSettings):
    """The same weight for every teacher."""

    known_before: ClassVar[bool] = True
    kind: Literal["mean"] = "mean"
    """The same weight for every teacher."""


@FUSIONS.register
class FixedFusionConfig(Rows):
    """One given weight per teacher."""

    kind: Literal["fixed"] = "fixed"
    """One given weight per teacher."""
    weights: list[NotNegative] = Field(min_length=1)
    """They sum to 1."""

    @model_validator(mode="after")
    def _sums(self):
        self.checked("weights", self.weights)
        return self


@FUSIONS.register
class TaskFusionConfig(Rows):
    """A row of weights per task."""

    needs: ClassVar[frozenset[str]] = frozenset({"tasks"})
    kind: Literal["task"] = "task"
    """A row of weights per task."""
    weights: dict[str, list[NotNegative]] = Field(min_length=1)
    """Weight of each teacher per task; row `default` serves unknown tasks. A row sums to 1."""
    offsets: Flag = False
    """Learn an offset to the table."""
    entropy: NotNegative = 0.0
    """Weight of the entropy term that keeps learned offsets from collapsing."""

    @model_validator(mode="after")
    def _sums(self):
        for task, row in self.weights.items():
            self.checked(f"weights.{task}", row)
        if self.entropy and not self.offsets:
            raise ValueError("entropy: is for weights that are learned; set offsets: true, or leave it out")
        return self


@FUSIONS.register
class AttentionFusionConfig(FusionSettings):
    """Softmax over teachers of the student's query on their keys."""

    needs: ClassVar[frozenset[str]] = frozenset({"own_queries"})
    kind: Literal["attention"] = "attention"
    """Per layer, head and position: softmax over teachers of the student's query on their keys."""


@FUSIONS.register
class LearnableFusionConfig(FusionSettings):
    """A small network on the student's hidden state."""

    needs: ClassVar[frozenset[str]] = frozenset({"own_hidden"})
    kind: Literal["learnable"] = "learnable"
    """Per layer and position: a small network on the student's hidden state."""
    entropy: NotNegative = 0.0
    """Weight of the entropy term that keeps learned weights from collapsing."""


@FUSIONS.register
class SelectFusionConfig(FusionSettings):
    """The teacher with the lowest loss."""

    kind: Literal["select"] = "select"
    """The teacher with the lowest loss."""
    per: Literal["example", "span"] = "example"
    """On the whole example, or on the bytes of each student token."""

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The losses that are compared."""
        return frozenset({"teacher_losses" if self.per == "example" else "span_losses"})


@FUSIONS.register
class SimilarityFusionConfig(FusionSettings):
    """Teachers whose target of this example is like what they give as a rule."""

    needs: ClassVar[frozenset[str]] = frozenset({"prototypes"})
    kind: Literal["similarity"] = "similarity"
    """Softmax over teachers of the cosine of the example's projected cache to the teacher's prototype."""
    temperature: Positive = 0.1
    """Of the softmax."""


@FUSIONS.register
class AgreementFusionConfig(FusionSettings):
    """Teachers by how far their targets agree with the others'."""

    kind: Literal["agreement"] = "agreement"
    """Per layer and position: softmax over teachers of the mean cosine to the other teachers' targets."""
    temperature: Positive = 0.1
    """Of the softmax."""
