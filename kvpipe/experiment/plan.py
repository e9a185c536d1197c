"""What a configuration implies: its cells, teachers, fits, and what each arm needs. No torch: Snakemake imports this."""

from __future__ import annotations

import json
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvpipe.config import Arm, Config, HubModel, PrunedModel, RandomModel


def digest(value: Any, length: int = 8) -> str:
    """Short hash of a JSON value."""
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


class Dag:
    """The artefacts of one configuration."""

    def __init__(self, config: Config):
        self.config = config

    @cached_property
    def arms(self) -> dict[str, Arm]:
        """Every arm, resolved."""
        return {name: self.config.arm(name) for name in self.config.arms}

    @property
    def cells(self) -> list[tuple[str, int]]:
        """Every (arm, seed)."""
        return [(arm, seed) for arm in self.arms for seed in self.config.seeds]

    @cached_property
    def teachers(self) -> list[str]:
        """Models that some arm learns from, in order of first use."""
        return list(dict.fromkeys(t for arm in self.arms.values() for t in arm.teachers))

    @property
    def judged_teachers(self) -> list[str]:
        """Teachers whose quality means something: not those of random weights."""
        return [name for name in self.teachers if self.config.models[name].source != "random"]

    @property
    def recorded_models(self) -> list[str]:
        """Models whose keys and values, or queries, are recorded: teachers, and the student where an arm matches them."""
        matched = any("own_kv" in arm.needs for arm in self.arms.values())
        return [*self.teachers, self.config.student] if matched else self.teachers

    def arms_of(self, teacher: str) -> list[str]:
        """Arms that learn from a model."""
        return [name for name, arm in self.arms.items() if teacher in arm.teachers]

    def readers(self, teacher: str, reading: str) -> list[Arm]:
        """Arms that read one store of a teacher, which has read the student's text or another."""
        return [arm for arm in map(self.arms.__getitem__, self.arms_of(teacher)) if arm.time.text == reading]

    def store_needs(self, teacher: str, reading: str) -> frozenset[str]:
        """What these arms need of it."""
        return frozenset().union(*(arm.needs for arm in self.readers(teacher, reading)))

    def arm(self, name: str) -> Arm:
        """A resolved arm.

        Raises:
            KeyError: no such arm; lists the known ones.
        """
        if name not in self.arms:
            raise KeyError(f"no arm {name!r}; the configuration has {', '.join(self.arms)}")
        return self.arms[name]

    def known_model(self, name: str) -> str:
        """The name of a model, if it is one.

        Raises:
            KeyError: no such model; lists the known ones.
        """
        if name not in self.config.models:
            raise KeyError(f"no model {name!r}; the configuration has {', '.join(self.config.models)}")
        return name

    @cached_property
    def extensions(self) -> dict[str, Any]:
        """A part of the settings of steps that an extension has a say in: the digest of every file; empty without any."""
        files = {name: sha256(Path(name).read_bytes()).hexdigest()[:16] for name in self.config.extensions}
        return {"extensions": files} if files else {}

    # ------------------------------------------------------------ what an arm needs
    def uses_store(self, arm: Arm) -> bool:
        """Whether cells of the arm read a store (else they read nothing, or run the teacher live)."""
        return bool(arm.teachers) and self.config.store.mode == "stored"

    def store_needs_layer_map(self, teacher: str) -> bool:
        """Whether the layers that a store keeps follow from measured similarity."""
        measured = any(teacher in arm.teachers and arm.layer.kind == "cka" for arm in self.arms.values())
        return measured and self.config.store.layers == "needed"

    def needs_layer_map(self, arm: Arm) -> bool:
        """Whether the arm chooses its teachers' layers by measured similarity."""
        return bool(arm.teachers) and arm.layer.kind == "cka"

    def needs_fit(self, arm: Arm) -> bool:
        """Whether the arm has projectors."""
        return "targets" in arm.needs

    def fit_spec(self, arm: Arm) -> dict[str, Any]:
        """All that decides the arm's fitted projectors; arms that agree in it share them."""
        return {
            "teachers": arm.teachers,
            "time": arm.time.model_dump(),
            "layer": arm.layer.model_dump(),
            "projector": arm.projector.model_dump(exclude={"mode", "learning_rate"}),
            "fit": arm.fit.model_dump(),
        } | ({} if arm.reading == "student" else {"student_reasoning": arm.reading})

    def fit_id(self, arm: Arm) -> str:
        """File name of the arm's projectors: teachers, kind, method and a hash of the rest."""
        spec = self.fit_spec(arm)
        return f"{'+'.join(arm.teachers)}.{arm.projector.kind}-{arm.fit.method}.{digest(spec)}"

    @cached_property
    def fits(self) -> dict[str, Arm]:
        """Every distinct fit and an arm that has it."""
        return {self.fit_id(arm): arm for arm in reversed(self.arms.values()) if self.needs_fit(arm)}

    def fit_arm(self, fit_id: str) -> Arm:
        """An arm with this fit."""
        if fit_id not in self.fits:
            raise KeyError(f"no arm fits {fit_id!r}; the configuration fits {', '.join(self.fits)}")
        return self.fits[fit_id]

    @property
    def mapped_teachers(self) -> list[str]:
        """Teachers some arm of which chooses layers by measured similarity."""
        return [
            t for t in self.teachers if any(t in a.teachers and self.needs_layer_map(a) for a in self.arms.values())
        ]

    def model_needs(self, name: str) -> list[str]:
        """Models that must be there before this one."""
        model = self.config.models[name]
        if isinstance(model, PrunedModel):
            return [model.of]
        return [model.like] if isinstance(model, RandomModel) else []

    def model_source(self, name: str) -> dict[str, Any]:
        """The configuration of a model; a random one includes the model it copies."""
        model = self.config.models[name]
        out = model.model_dump()
        if out.get("source") == "local":
            out.pop("recipe", None)
        if isinstance(model, HubModel) and (pinned := self.config.lock.get(model.pin)):
            out["commit"] = pinned.commit
        for needed in self.model_needs(name):
            out["like_model"] = self.model_source(needed)
        return out
