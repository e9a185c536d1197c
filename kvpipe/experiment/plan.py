"""Which artefacts a configuration implies, and which part of the configuration each depends on.

The Snakefile asks here and nowhere else, so that a change of a setting reruns what depends on it and nothing more.
No torch: this is imported while Snakemake parses.
"""

from __future__ import annotations

import json
from functools import cached_property
from hashlib import sha256
from typing import Any

from kvpipe.config import Arm, Config, HubModel, RandomModel

LM_EVAL = ("lm_eval_tasks", "lm_eval_folder", "lm_eval_limit")
"""Keys of `evaluate` that only the step `lm_eval` reads."""


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
    def recorded_models(self) -> list[str]:
        """Models whose keys and values, or queries, are recorded: teachers, and the student where an arm matches them."""
        matched = any(arm.loss.kind in ("kv", "relation") for arm in self.arms.values())
        return [*self.teachers, self.config.student] if matched else self.teachers

    def arms_of(self, teacher: str) -> list[str]:
        """Arms that learn from a model."""
        return [name for name, arm in self.arms.items() if teacher in arm.teachers]

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
        return arm.loss.kind == "kv"

    def fit_spec(self, arm: Arm) -> dict[str, Any]:
        """All that decides the arm's fitted projectors; arms that agree in it share them."""
        return {
            "teachers": arm.teachers,
            "time": arm.time.model_dump(),
            "layer": arm.layer.model_dump(),
            "projector": arm.projector.model_dump(include={"kind", "mlp_ratio", "dropout"}),
            "fit": arm.fit.model_dump(),
        }

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
        return [model.like] if isinstance(model, RandomModel) else []

    def model_reads_data(self, name: str) -> bool:
        """Whether making the model reads the training split (a from-scratch student's tokenizer)."""
        return self.config.models[name].source == "scratch"

    def model_source(self, name: str) -> dict[str, Any]:
        """The configuration of a model; a random one includes the model it copies."""
        model = self.config.models[name]
        out = model.model_dump()
        if out.get("source") == "local":
            out.pop("recipe", None)
        if isinstance(model, HubModel) and (pinned := self.config.lock.get(model.pin)):
            out["commit"] = pinned.commit
        if isinstance(model, RandomModel):
            out["like_model"] = self.model_source(model.like)
        return out

    # ------------------------------------------------------------ what each step depends on
    def depends(self, step: str, **wildcards: Any) -> str:
        """The part of the configuration that a step depends on, as JSON: a Snakemake param.

        Inputs of a step (models, data, …) are its file dependencies and are not repeated here.
        """
        return json.dumps(getattr(self, f"_depends_{step}")(**wildcards), sort_keys=True)

    def _depends_models(self, model: str) -> dict:
        source = self.model_source(model)
        # a scratch student's tokenizer reads the training split rendered by the template
        data = {"pretrain": self._depends_data(), "scratch": self.config.data.template.model_dump()}
        return {"source": source, "data": data.get(source["source"])}

    def _depends_data(self) -> dict:
        # n-grams decide what is dropped; where they only refuse, the audit counts them again
        unread = {"template", "context"} | (set() if self.config.data.leakage == "drop" else {"ngram"})
        return self.config.data.model_dump(exclude=unread)

    def _depends_teacher_kv(self, teacher: str) -> dict:
        store = self.config.store.model_dump(exclude={"budget_gb", "batch_size", "mode"})
        return {
            "store": store,
            "template": self.config.data.template.model_dump(),
            # the layers follow from the arms' layer settings and the layer map (an input)
            "layers": sorted({a.layer.model_dump_json() for a in self.arms.values() if teacher in a.teachers})
            if self.config.store.layers == "needed"
            else "all",
        }

    def _depends_layer_map(self) -> dict:
        return {
            "layer_map": self.config.layer_map.model_dump(),
            "template": self.config.data.template.model_dump(),
            "train": self.config.train.model_dump(include={"batch_size", "learning_rate", "loss_on"}),
        }

    def _depends_fit(self, fit: str) -> dict:
        return {**self.fit_spec(self.fit_arm(fit)), "template": self.config.data.template.model_dump()}

    def _depends_train(self, arm: str) -> dict:
        train = self.config.train.model_dump(exclude={"device", "threads", "checkpoint_every", "hold_targets_gb"})
        resolved = self.arm(arm)
        return {
            "arm": resolved.model_dump(exclude={"role", "label"}),
            "train": train,
            "template": self.config.data.template.model_dump(),
            "store_mode": self.config.store.mode if resolved.teachers else None,
        }

    def _depends_evaluate(self) -> dict:
        return {
            "evaluate": self.config.evaluate.model_dump(
                exclude={"batch_size": True, "sandbox": {"workers"}, **dict.fromkeys(LM_EVAL, True)}
            ),
            "template": self.config.data.template.model_dump(),
        }

    def _depends_lm_eval(self) -> dict:
        return self.config.evaluate.model_dump(include=set(LM_EVAL))

    def _depends_untrained(self) -> dict:
        return {**self._depends_evaluate(), "seed": self.config.seeds[0]}

    def _depends_arm(self) -> dict:
        return {"seeds": self.config.seeds}

    def _depends_stats(self) -> dict:
        return {
            "stats": self.config.stats.model_dump(),
            "roles": {name: arm.role for name, arm in self.arms.items()},
            "bases": {name: self.config.arms[name].base for name in self.arms},
            "seeds": self.config.seeds,
        }

    def _depends_audit(self) -> dict:
        return {"audit": self.config.audit.model_dump(), "ngram": self.config.data.ngram, "seeds": self.config.seeds}

    def _depends_report(self) -> dict:
        return {
            "title": self.config.title,
            "arms": {name: arm.model_dump() for name, arm in self.arms.items()},
            "seeds": self.config.seeds,
        }
