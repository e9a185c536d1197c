"""Finished artefacts of an experiment, each loaded once, when it is first asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from kvpipe.align.layermap import LayerPlan, at_kept_depth, layer_plan
from kvpipe.align.timemap import build_time_map, derangement
from kvpipe.cache.capture import kv_geometry
from kvpipe.cache.store import Store, StoreKey
from kvpipe.cache.teacher import AlignedTeacher, LiveRows, StoredRows
from kvpipe.config import Arm, Config, ConfigError, Reading, ScratchModel
from kvpipe.config.terms import NATS, HiddenConfig
from kvpipe.data.encoding import Encoding, load_encoding
from kvpipe.data.records import Record, read_as, read_records
from kvpipe.distill.terms import teacher_layers
from kvpipe.experiment.device import resolve_device
from kvpipe.experiment.files import content_digest
from kvpipe.experiment.misfits import misfits
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.plan import Dag
from kvpipe.experiment.sizes import shape
from kvpipe.models.folders import (
    build_model,
    load_config,
    load_model,
    load_tokenizer,
    manifest_hash,
    random_model,
    recorded,
)
from kvpipe.steps.make import Work

CACHED = frozenset({"targets", "keys", "values"})
"""What an arm needs of a teacher's caches."""


class Inputs(Work):
    """The loaders of one experiment. What they give is shared: nobody changes it."""

    def __init__(self, config: Config, paths: Paths):
        super().__init__(config, paths)
        # kept for as long as these loaders are
        for name in ("records", "tokenizer", "model_config", "encoding", "store", "teacher_model"):
            setattr(self, name, cache(getattr(self, name)))

    # ------------------------------------------------------------ texts
    def records(self, split: str, reading: Reading = "student", model: str = "") -> list[Record]:
        """Records of a split, with the reasoning that is read, by a model where it has written it itself."""
        records = read_records(self.paths.records(model, split, reading))
        return records if reading == "written" else read_as(records, reading, self.config.data.short)

    @cached_property
    def tasks(self) -> np.ndarray:
        """The task of every training example."""
        return np.array([record.task for record in self.records("train")])

    def encoding(self, model: str, split: str, reading: str = "student") -> Encoding:
        """A split as a model's tokens; the student's end with an end-of-text token."""
        origin = self.origin_of_tokens(model, split, reading)
        return load_encoding(self.paths.encoding(model, split, reading), origin)

    def origin_of_tokens(self, model: str, split: str, reading: str) -> dict[str, Any]:
        """What a split's tokens are made from; those of something else are refused."""
        return {
            "model": manifest_hash(self.paths.model(model)),
            "data": content_digest(self.paths.records(model, split, reading)),
            **self.steps["encode"].settings(model=model, reading=reading),
        }

    def student_encoding(self, split: str, arm: Arm | None = None) -> Encoding:
        """A split as the student's tokens, of the text that it reads in an arm; by default the whole."""
        return self.encoding(self.config.student, split, "student" if arm is None else arm.reading)

    def training_examples(self, arm: Arm) -> np.ndarray:
        """Numbers of the training examples that the arm's cells see: of each task the first `examples`."""
        rank = pd.Series(self.tasks).groupby(self.tasks).cumcount().to_numpy()
        return np.flatnonzero(rank < (len(rank) if arm.examples is None else arm.examples))

    # ------------------------------------------------------------ models
    def tokenizer(self, name: str) -> Any:
        """A model's tokenizer."""
        return load_tokenizer(self.paths.model(name), self.config.trusts(name))

    @property
    def student_tokenizer(self) -> Any:
        """The student's."""
        return self.tokenizer(self.config.student)

    def model_config(self, name: str) -> Any:
        """A model's transformers config."""
        return load_config(self.paths.model(name), self.config.trusts(name))

    def student(self, seed: int, init: Literal["student", "random", "fit"] = "student") -> Any:
        """The student before training, a new one at every call: its pretrained weights, or drawn by the seed."""
        folder, trust = self.paths.model(self.config.student), self.config.trusts(self.config.student)
        source = self.config.models[self.config.student]
        if isinstance(source, ScratchModel):
            return build_model(source.architecture, self.student_tokenizer, seed)
        if init == "random":
            return random_model(folder, seed, trust=trust)
        return load_model(folder, dtype=torch.float32, trust=trust)

    def teacher_model(self, teacher: str) -> Any:
        """A teacher on the device that its steps run on, held as its `load` says."""
        device = resolve_device(self.config.train.device)
        return load_model(self.paths.model(teacher), device=device, trust=self.config.trusts(teacher))

    def whole_model(self) -> tuple[Any, list[int]]:
        """The model that a pruned student is a part of, and which of its layers the student has."""
        source = recorded(self.paths.model(self.config.student))["source"]
        return self.teacher_model(source["of"]), source["layers"]

    def check(self, arms: Iterable[str]) -> None:
        """Refuse arms that ask for what their models or the training texts do not have, before anything is computed.

        Raises:
            ConfigError: one line per setting.
        """
        names = list(arms)
        files = {name: self.paths.model(name) / "config.json" for name in self.config.models}
        found = {n: shape(json.loads(f.read_text(encoding="utf-8"))) for n, f in files.items() if f.is_file()}
        lines = misfits(self.dag, {name: one for name, one in found.items() if one is not None}, names)
        for name in names:
            arm = self.dag.arms[name]
            if (size := self.config.train.batch_size) > (count := len(self.training_examples(arm))):
                lines.append(f"train.batch_size: {size} exceeds the {count} examples of arm {name}: lower it")
            skipped = {term: n for term, settings in arm.loss.items() if (n := getattr(settings, "skip_sink", 0))}
            longest = (
                int(self.student_encoding("train", arm).lengths[self.training_examples(arm)].max()) if skipped else 0
            )
            for term, number in skipped.items():
                if number >= longest:
                    what = f"{number} leaves nothing: the longest training text has {longest} tokens"
                    lines.append(f"arms.{name}.set.loss.{term}.skip_sink: {what}")
        if lines:
            raise ConfigError("\n".join(lines))

    # ------------------------------------------------------------ teachers
    def plan(self, arm: Arm, teacher: str) -> LayerPlan:
        """Layers of a teacher for an arm, counted in the teacher's own layers."""
        src, dst = (kv_geometry(self.model_config(name)).layers for name in (teacher, self.config.student))
        source = recorded(self.paths.model(self.config.student)).get("source", {})
        return layer_plan(at_kept_depth(arm.layer, src, source), src, dst, self.paths.layer_map(teacher))

    @property
    def live(self) -> bool:
        """Whether teachers run beside the student."""
        return self.config.store.mode == "live"

    def stored_layers(self, teacher: str, reading: str) -> tuple[int, ...]:
        """Layers that a store of this teacher keeps: all, or those that some arm needs."""
        arms = [arm for arm in self.dag.readers(teacher, reading) if arm.needs & CACHED]
        if self.config.store.layers == "all" and arms:
            return tuple(range(kv_geometry(self.model_config(teacher)).layers))
        return tuple(sorted({layer for arm in arms for layer in self.needed_layers(arm, teacher)}))

    def needed_layers(self, arm: Arm, teacher: str) -> tuple[int, ...]:
        """Layers of a teacher whose caches an arm looks at."""
        last = kv_geometry(self.model_config(teacher)).layers - 1
        # relations are those of the last layer, whatever the plan
        relations = {last} if "keys" in arm.needs else set()
        planned = set(self.plan(arm, teacher).src_layers) if "targets" in arm.needs else set()
        return tuple(sorted(planned | relations))

    def hidden_layers(self, arm: Arm, teacher: str) -> tuple[int, ...]:
        """Layers of a teacher whose inputs an arm looks at."""
        src, dst = (kv_geometry(self.model_config(name)).layers for name in (teacher, self.config.student))
        terms = arm.of_kind(HiddenConfig)
        return tuple(sorted({layer for term in terms for layer in teacher_layers(term, src, dst)}))

    def stored_hidden(self, teacher: str, reading: str) -> tuple[int, ...]:
        """Layers whose inputs a store of this teacher keeps."""
        arms = self.dag.readers(teacher, reading)
        return tuple(sorted({layer for arm in arms for layer in self.hidden_layers(arm, teacher)}))

    def store_key(self, teacher: str, reading: str) -> StoreKey:
        """What a store's content depends on."""
        needs = self.dag.store_needs(teacher, reading)
        return StoreKey(
            model=manifest_hash(self.paths.model(teacher)),
            data=content_digest(self.paths.encoding(teacher, "train", reading)),
            layers=self.stored_layers(teacher, reading),
            reading=reading,
            dtype=self.config.store.dtype,
            top_logits=self.config.store.top_logits if "top_logits" in needs else 0,
            shards=self.config.store.shards,
            nll=bool(needs & NATS),
            states="states" in needs,
            hidden=self.stored_hidden(teacher, reading),
        )

    def store(self, teacher: str, reading: str) -> Store:
        """A finished store.

        Raises:
            ValueError: it was built from something else.
        """
        store = Store(self.paths.store(teacher, reading))
        expected = self.store_key(teacher, reading).as_dict()
        differing = [k for k, v in expected.items() if store.index["key"].get(k) != v]
        if differing:
            raise ValueError(f"{store.folder} was built with another {', '.join(differing)}; build it again")
        return store

    def aligned_teacher(self, arm: Arm, teacher: str, seed: int = 0) -> AlignedTeacher:
        """A teacher's cache of the training split on the student's positions, from its store or computed live."""
        src, dst = self.encoding(teacher, "train", arm.time.text), self.student_encoding("train", arm)
        if arm.time.kind == "segment" and (src.segment_hashes == dst.segment_hashes).all():
            raise ConfigError(
                f"time.kind: segment has no effect: {teacher} has no text of its own in any training example, so both "
                "read the same. Map teacher_reasoning in data.sources, set time.reasoning: written, or time: "
                "{kind: overlap, borders: keep}"
            )
        time = build_time_map(
            arm.time, src, dst, derangement(self.tasks.tolist(), seed) if arm.shuffle_teacher else None
        )
        rows: StoredRows | LiveRows
        if self.live:
            pad_id, size = self.tokenizer(teacher).pad_token_id, self.config.store.batch_size
            layers, hidden = self.needed_layers(arm, teacher), self.hidden_layers(arm, teacher)
            rows = LiveRows(self.teacher_model(teacher), src, layers, pad_id, size, hidden)
        else:
            rows = StoredRows(self.store(teacher, arm.time.text), src.offsets)
        return AlignedTeacher(teacher, rows, src, dst, time)


def trusts_folder(config: Config, paths: Paths, folder: Path) -> bool:
    """Whether a folder's code may run: one of these results' models, or a cell's, which is the student. No other is."""
    folder = folder.resolve()
    if any(folder == paths.model(name).resolve() for name in config.models if config.trusts(name)):
        return True
    cells = (paths.student(*cell) for cell in Dag(config).cells)
    return config.trusts(config.student) and any(folder == cell.resolve() for cell in cells)
