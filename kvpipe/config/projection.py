"""Settings of the projection: the map from a teacher's heads and dimension to the student's, and how it is fitted."""

from __future__ import annotations

from typing import ClassVar, Literal

from kvpipe.config.kinds import PROJECTORS
from kvpipe.config.section import Count, Flag, Fraction, Positive, Section, Seed


class ProjectorSettings(Section):
    """What every projector has."""

    tag: ClassVar[str] = "mode"
    options: ClassVar = {"learning_rate": ("slow",)}
    fits: ClassVar[frozenset[str]] = frozenset({"pca", "joint_pca", "procrustes", "ridge", "random", "identity"})
    """Methods of the fit that it can start from."""
    keeps_heads: ClassVar[bool] = False
    """Whether it takes one layer at a time, and so no layers side by side."""
    mode: Literal["frozen", "slow", "joint"] = "frozen"
    """`frozen` after the fit; `slow`: own learning rate; `joint`: the student's."""
    learning_rate: Positive = 1e-4
    """Learning rate under `slow`."""


@PROJECTORS.register
class LinearProjectorConfig(ProjectorSettings):
    """One map over the flattened heads."""

    kind: Literal["linear"] = "linear"
    """One map over the flattened heads."""


@PROJECTORS.register
class ElasticProjectorConfig(ProjectorSettings):
    """A bottleneck."""

    fits: ClassVar[frozenset[str]] = frozenset({"reconstruct"})
    kind: Literal["elastic"] = "elastic"
    """A bottleneck, which begins at a linear map."""
    mlp_ratio: Positive | None = None
    """Hidden width as a share of the input; none follows the teacher's size."""
    dropout: Fraction = 0.0
    """Dropout inside it."""


@PROJECTORS.register
class HeadsProjectorConfig(ProjectorSettings):
    """Head dimension, then head mixing."""

    fits: ClassVar[frozenset[str]] = frozenset({"grouped", "random"})
    keeps_heads: ClassVar[bool] = True
    kind: Literal["heads"] = "heads"
    """Head dimension, then head mixing."""


SPACES = ("pca", "joint_pca", "procrustes", "reconstruct", "random")
"""Methods that make a space of their own, which all teachers of an arm share."""


class FitConfig(Section):
    """How projectors are fitted before training."""

    tag: ClassVar[str] = "method"
    options: ClassVar = {
        "basis": (*SPACES, "ridge"),
        "whiten": SPACES,
        "steps": ("reconstruct",),
        "ridge": ("joint_pca", "reconstruct", "ridge"),
        "seed": ("random", "reconstruct"),
    }
    method: Literal["pca", "joint_pca", "procrustes", "ridge", "reconstruct", "random", "identity", "grouped"] = "pca"
    """How projectors are fitted before training; `reconstruct` trains the elastic encoder from the linear fit; `identity`
    leaves the cache of a teacher with the student's heads and dimension as it is; `grouped` is the unfitted grouped
    average."""
    basis: Literal["teacher", "student", "whole"] = "teacher"
    """Axes of the space that the teachers share: their own components, or these turned, shifted and scaled onto the
    pretrained student's own KV (orthogonal Procrustes), so that the target is new content in familiar coordinates. `whole`
    goes onto the KV that a pruned student's whole model has at the kept layers. `ridge` predicts that with `whole`, else the
    student's own."""
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
