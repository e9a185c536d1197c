"""Settings of the alignment: which teacher tokens and layers make up a student token and layer."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from kvpipe.config.section import Count, Natural, Positive, Section

Reading = Literal["student", "short", "none", "own", "written"]
"""Which reasoning a text holds: the record's, a short part or none of it; the teacher's, as a column has it or as it has
written it itself."""


class TimeConfig(Section):
    """Which teacher tokens make up a student token."""

    options: ClassVar = {
        "mode": ("overlap", "segment"),
        "borders": ("overlap",),
        **dict.fromkeys(("differing", "reasoning"), ("segment",)),
    }
    kind: Literal["overlap", "segment", "position"] = "overlap"
    """`overlap`: the teacher reads the student's text, by byte-span overlap of the two tokenizations; `segment`: it reads
    its own longer worked reasoning, and prompt, reasoning and answer are matched one to one; `position`: token i to
    token i (harmful, kept as a null)."""
    mode: Literal["iou", "causal"] = "causal"
    """Weights of the byte-span overlap. `causal` uses nothing the student has not read yet."""
    borders: Literal["cross", "keep"] = "cross"
    """Whether a student token may learn from a teacher token of another segment, where one crosses the border."""
    reasoning: Literal["given", "written"] = "given"
    """The teacher's own reasoning: `given` by the records' `teacher_reasoning`, or `written` by the teacher itself
    (`teacher_text`)."""
    differing: Literal["interpolate", "anchored", "predictive"] = "anchored"
    """Segments whose texts differ: `interpolate` linearly over normalised position; `anchored` holds the words that both
    texts share and interpolates between them; `predictive` does so from where the teacher says the student's next word,
    having worked out what the student leaves out."""

    @property
    def text(self) -> Reading:
        """What the teacher reads."""
        return "student" if self.kind != "segment" else "own" if self.reasoning == "given" else "written"


class LayerConfig(Section):
    """Which teacher layers make up a student layer."""

    options: ClassVar = {**dict.fromkeys(("by", "k", "near", "temperature", "combine"), ("cka",)), "layers": ("list",)}
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
