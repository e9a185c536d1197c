"""Settings of the loss terms: an arm's loss is a set of them, each with its own weight and schedule."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from kvpipe.config.kinds import TERMS
from kvpipe.config.section import NUMBER, Count, Fraction, Natural, NotNegative, Positive, Section


class ScheduleConfig(Section):
    """The course of a weight over training."""

    options: ClassVar = {"final": ("linear", "cosine", "stop"), "until": ("linear", "cosine", "stop")}
    kind: Literal["constant", "linear", "cosine", "stop"] = "constant"
    """Course after the warm-up; `stop` is constant until `until`."""
    warmup: Annotated[float, Field(ge=0, lt=1), NUMBER] = 0.0
    """Share of the steps over which the weight rises from 0."""
    final: Fraction = 0.0
    """Share of the weight left at `until`."""
    until: Annotated[float, Field(gt=0, le=1), NUMBER] = 1.0
    """Share of the steps at which it has fallen to `final`."""

    @model_validator(mode="after")
    def _rises_before_it_ends(self):
        if self.warmup >= self.until:
            raise ValueError(f"warmup: {self.warmup:g} must be below until, {self.until:g}")
        if self.kind == "stop" and self.until == 1:
            raise ValueError("until: 1 never stops; give the share of the steps after which it does")
        return self


NATS = frozenset({"nll", "teacher_losses", "span_losses"})
"""Needs that are the teacher's nats of every token."""


class TermSettings(Section):
    """What every term has."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Of the teachers: `targets` (projected and fused), rows of theirs on the student's positions (`keys`, `values`,
    `hidden`, `states`, `nll`), `top_logits`, `heads`. Of the student: `own_kv`, `own_queries`, `own_hidden`."""
    reads: ClassVar[frozenset[str]] = frozenset()
    """Sections of an arm that have an effect on it: `time`, `layer`, `projector`, `fit`, `fuse`."""
    one_teacher: ClassVar[bool] = False
    """Whether it is told of one teacher alone."""

    weight: Positive = 1.0
    """λ of the term."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Course of λ over training."""


@TERMS.register
class CrossEntropyConfig(TermSettings):
    """Cross-entropy on the text; every arm has it with weight 1 unless it says otherwise."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    """Cross-entropy on the text; every arm has it with weight 1 unless it says otherwise."""
    weight: NotNegative = 1.0
    """λ of the term; 0 leaves it out."""


class LayerTermConfig(TermSettings):
    """The student's own cache against the teachers' fused, projected one, layer by layer."""

    needs: ClassVar[frozenset[str]] = frozenset({"targets", "own_kv"})
    reads: ClassVar[frozenset[str]] = frozenset({"time", "layer", "projector", "fit", "fuse"})
    kind: str
    layers: Annotated[list[Natural], Field(min_length=1)] | None = None
    """Student layers that are matched, counted from 0; none matches all."""
    skip_sink: Natural = 0
    """First student positions left out."""
    opening: Fraction = 0.0
    """Share of the steps over which the layers open one after the other, shallow to deep, each from 0 to its full weight;
    0: all from the start."""

    @model_validator(mode="after")
    def _once(self):
        if self.layers is not None and len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers: {self.layers} holds a layer twice")
        return self


class CacheTermConfig(LayerTermConfig):
    """Distance of two caches."""

    distance: Literal["mse", "smooth_l1", "cosine"] = "mse"
    """Of a residual; `cosine`: 1 − cosine of each head's vectors, whatever their length."""
    scale: Literal["std", "none"] = "std"
    """Divide each layer's residual by the standard deviation of its target; a cosine has none."""


@TERMS.register
class KeysConfig(CacheTermConfig):
    """Distance of the keys."""

    kind: Literal["keys"] = "keys"
    """Keys, before rotary embedding, against the fused target."""


@TERMS.register
class ValuesConfig(CacheTermConfig):
    """Distance of the values."""

    kind: Literal["values"] = "values"
    """Values against the fused target."""


@TERMS.register
class AttentionTermConfig(CacheTermConfig):
    """Distance of what the student's queries read out of the two caches."""

    needs: ClassVar[frozenset[str]] = frozenset({"targets", "own_kv", "own_queries"})
    kind: Literal["attention"] = "attention"
    """Attention outputs: what the student's own queries read from its cache and from the fused target."""


@TERMS.register
class AttentionKLConfig(LayerTermConfig):
    """Divergence of where the student's queries look in the two caches."""

    needs: ClassVar[frozenset[str]] = frozenset({"targets", "own_kv", "own_queries"})
    kind: Literal["attention_kl"] = "attention_kl"
    """KL of attention weights: the student's own queries on the fused target's keys and on its own, causal."""


@TERMS.register
class LogitsConfig(TermSettings):
    """KL from the teachers' next-token distributions, where both have read the same bytes."""

    reads: ClassVar[frozenset[str]] = frozenset({"fuse"})
    kind: Literal["logits"] = "logits"
    """KL from the teachers' next-token distributions, where both have read the same bytes."""
    temperature: Positive = 1.0
    """Of both distributions."""
    candidates: Literal["top", "all"] = "top"
    """`top`: the teacher's likeliest tokens that the student has too, and one bucket for the rest; `all`: the whole
    vocabulary, from stored final states, where the tokenizers are the same."""

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Candidates, or final states and the heads that make logits of them."""
        return frozenset({"top_logits"} if self.candidates == "top" else {"states", "heads"})


@TERMS.register
class LikelihoodConfig(TermSettings):
    """How likely the teachers find the bytes of each piece of text, across tokenizers."""

    needs: ClassVar[frozenset[str]] = frozenset({"nll"})
    reads: ClassVar[frozenset[str]] = frozenset({"fuse"})
    kind: Literal["likelihood"] = "likelihood"
    """Binary KL between teacher's and student's probability of every piece of text that both tokenize apart."""
    temperature: Positive = 1.0
    """Of the log-likelihoods: above 1, unlikely pieces tell more apart."""


@TERMS.register
class RelationsConfig(TermSettings):
    """MiniLMv2: key-key and value-value relations of the last layer of one teacher."""

    needs: ClassVar[frozenset[str]] = frozenset({"keys", "values", "own_kv"})
    reads: ClassVar[frozenset[str]] = frozenset({"time"})
    one_teacher: ClassVar[bool] = True
    kind: Literal["relations"] = "relations"
    """MiniLMv2: key-key and value-value relations of the last layer of one teacher."""
    heads: Count = 4
    """Relation heads."""


class StatesTermConfig(TermSettings):
    """Distance of states, through a linear map from the student's to the teacher's where their widths differ."""

    reads: ClassVar[frozenset[str]] = frozenset({"time", "fuse"})
    distance: Literal["cosine", "mse"] = "cosine"
    """`cosine`: 1 − cosine; `mse`: of states divided by the target's standard deviation."""


@TERMS.register
class HiddenConfig(StatesTermConfig):
    """Hidden states of some student layers, against those of the teachers' layers at the same depth."""

    needs: ClassVar[frozenset[str]] = frozenset({"hidden", "own_hidden"})
    kind: Literal["hidden"] = "hidden"
    """What enters some student layers, against what enters the teachers' layers at the same depth."""
    layers: Annotated[list[Annotated[int, NUMBER]], Field(min_length=1)] = Field(default=[-1])
    """Student layers whose input is matched; −1 is the last one, whose input the last but one block gives."""


@TERMS.register
class FinalStateConfig(StatesTermConfig):
    """Final states, of which the head makes logits."""

    needs: ClassVar[frozenset[str]] = frozenset({"states"})
    kind: Literal["final_state"] = "final_state"
    """What the head makes logits of."""
