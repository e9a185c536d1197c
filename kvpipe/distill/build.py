"""Put one cell together from finished artefacts: student, batches' encodings, teachers, projectors, distiller."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvpipe.align.layermap import LayerPlan, layer_plan
from kvpipe.align.timemap import build_time_map, derangement, shared_spans
from kvpipe.cache.capture import kv_geometry
from kvpipe.cache.store import Store, StoreKey, forward_rows
from kvpipe.cache.teacher import AlignedTeacher, LiveRows, RowSource, StoredRows
from kvpipe.config import Arm, Config, ConfigError, HubModel, RandomModel, ScratchModel
from kvpipe.data.encoding import Encoding, encode_records
from kvpipe.data.records import Record, read_records
from kvpipe.distill.fusion import build_fusion
from kvpipe.distill.objectives import (
    Distiller,
    KVDistiller,
    LogitDistiller,
    RelationDistiller,
    TopLogits,
    build_targets,
)
from kvpipe.distill.projectors import Geometry, Projector, build_projector
from kvpipe.experiment.device import resolve_device
from kvpipe.experiment.files import GB, content_digest, read_json, save_tensors, verify, write_json
from kvpipe.experiment.misfits import misfits
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.plan import Dag
from kvpipe.experiment.sizes import count_parameters, shape
from kvpipe.models.folders import (
    build_model,
    load_config,
    load_model,
    load_tokenizer,
    manifest_hash,
    random_model,
)
from kvpipe.models.limits import Limits
from kvpipe.tokens.matrix import common_prefix_positions, token_bytes


@dataclass
class Workspace:
    """Finished artefacts of one configuration, loaded when asked for and kept."""

    config: Config
    paths: Paths

    def __post_init__(self) -> None:
        self.dag = Dag(self.config)
        self._encodings: dict[tuple, Encoding] = {}
        self._limits: dict[str, Limits] = {}

    # ------------------------------------------------------------ models
    def trusts(self, name: str) -> bool:
        """Whether code from a model's repository may run: the configuration's word, and no file's."""
        model = self.config.models[name]
        if isinstance(model, RandomModel):
            return self.trusts(model.like)
        return isinstance(model, HubModel) and model.trust_remote_code

    def trusts_folder(self, folder: Path) -> bool:
        """The same of a folder: one of these results' models, or a cell's, which is the student. No other is trusted."""
        folder = folder.resolve()
        if any(folder == self.paths.model(name).resolve() for name in self.config.models if self.trusts(name)):
            return True
        cells = (self.paths.student(*cell) for cell in self.dag.cells)
        return self.trusts(self.config.student) and any(folder == cell.resolve() for cell in cells)

    def tokenizer(self, name: str):
        """A model's tokenizer."""
        return load_tokenizer(self.paths.model(name), self.trusts(name))

    def model_config(self, name: str):
        """A model's transformers config."""
        return load_config(self.paths.model(name), self.trusts(name))

    # ------------------------------------------------------------ student and data
    @cached_property
    def student_tokenizer(self):
        """The student's tokenizer."""
        return self.tokenizer(self.config.student)

    def records(self, split: str) -> list[Record]:
        """Records of a split."""
        return read_records(self.paths.data(split))

    def student_encoding(self, split: str) -> Encoding:
        """The split under the student's tokenizer, each example with an end-of-text token."""
        return self._encoding(self.config.student, split, "student", end=True)

    def teacher_encoding(self, teacher: str, split: str, reading: str) -> Encoding:
        """The split under a teacher's tokenizer."""
        return self._encoding(teacher, split, reading, end=False)

    def _encoding(self, model: str, split: str, reading, end: bool) -> Encoding:
        key = (model, split, reading)
        if key not in self._encodings:
            student = model == self.config.student
            records, tokenizer = self.records(split), self.student_tokenizer if student else self.tokenizer(model)
            encoding = encode_records(
                records,
                tokenizer,
                self.config.data.template,
                reading,
                end=end,
                max_length=self.config.train.max_length if student else None,
            )
            self.limits(model).check(encoding, records, tokenizer)
            self._encodings[key] = encoding
        return self._encodings[key]

    def limits(self, model: str) -> Limits:
        """What a model can read; one object for each, which warns once."""
        if model not in self._limits:
            self._limits[model] = Limits.of(repr(model), self.model_config(model), self.config.data.context)
        return self._limits[model]

    def student(self, seed: int, init: Literal["student", "random"] = "student"):
        """The student before training: its pretrained weights, or drawn by the seed."""
        folder = self.paths.model(self.config.student)
        source = self.config.models[self.config.student]
        if isinstance(source, ScratchModel):
            return build_model(source.architecture, self.student_tokenizer, seed)
        trust = self.trusts(self.config.student)
        if init == "random":
            return random_model(folder, seed, trust=trust)
        return load_model(folder, dtype=torch.float32, trust=trust)

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
            if arm.loss.kind == "kv" and arm.loss.skip_sink:
                longest = int(self.student_encoding("train").lengths[self.training_examples(arm)].max())
                if arm.loss.skip_sink >= longest:
                    said = f"{arm.loss.skip_sink} leaves nothing: the longest training text has {longest} tokens"
                    lines.append(f"arms.{name}.set.loss.skip_sink: {said}")
        if lines:
            raise ConfigError("\n".join(lines))

    def training_examples(self, arm: Arm) -> np.ndarray:
        """Numbers of the training examples that the arm's cells see."""
        tasks = pd.Series([record.task for record in self.records("train")])
        rank = tasks.groupby(tasks).cumcount().to_numpy()
        return np.flatnonzero(rank < (len(tasks) if arm.examples is None else arm.examples))

    # ------------------------------------------------------------ teachers
    def teacher_model(self, teacher: str):
        """A teacher on the device that its steps run on, held as its `load` says."""
        device = resolve_device(self.config.train.device)
        return load_model(self.paths.model(teacher), device=device, trust=self.trusts(teacher))

    def geometry(self, teacher: str) -> Geometry:
        """Heads and dimensions of teacher and student."""
        _, src_heads, src_dim = kv_geometry(self.model_config(teacher))
        dst_layers, dst_heads, dst_dim = kv_geometry(self.model_config(self.config.student))
        return Geometry(src_heads, src_dim, dst_heads, dst_dim, dst_layers)

    def parameters(self, teacher: str) -> int:
        """Parameters of a teacher, counted from the headers of its safetensors files."""
        return count_parameters(self.paths.model(teacher))

    def plan(self, arm: Arm, teacher: str) -> LayerPlan:
        """Layers of a teacher for an arm, counted in the teacher's own layers."""
        src_layers = kv_geometry(self.model_config(teacher)).layers
        dst_layers = self.geometry(teacher).dst_layers
        return layer_plan(arm.layer, src_layers, dst_layers, self.paths.layer_map(teacher))

    def wanted_layers(self, teacher: str) -> tuple[int, ...]:
        """Layers that a store of this teacher keeps."""
        src_layers = kv_geometry(self.model_config(teacher)).layers
        if self.config.store.layers == "all":
            return tuple(range(src_layers))
        wanted: set[int] = set()
        for arm in self.dag.arms.values():
            if teacher in arm.teachers:
                # relations compare the last layers, whatever the plan
                wanted |= {src_layers - 1} if arm.loss.kind == "relation" else set(self.plan(arm, teacher).src_layers)
        return tuple(sorted(wanted))

    def store_key(self, teacher: str, reading: str) -> StoreKey:
        """What a store's content depends on."""
        data = self.paths.data("train").read_bytes() + self.config.data.template.model_dump_json().encode()
        return StoreKey(
            model=manifest_hash(self.paths.model(teacher)),
            data=sha256(data).hexdigest(),
            layers=self.wanted_layers(teacher),
            reading=reading,
            dtype=self.config.store.dtype,
            top_logits=self.config.store.top_logits,
            shards=self.config.store.shards,
        )

    def store(self, teacher: str, reading: str) -> Store:
        """A finished store; one built from something else is refused."""
        store = Store(self.paths.store(teacher, reading))
        expected = self.store_key(teacher, reading).as_dict()
        differing = [k for k, v in expected.items() if store.index["key"].get(k) != v]
        if differing:
            raise ValueError(f"{store.folder} was built with another {', '.join(differing)}; build it again")
        return store

    def _rows(self, arm: Arm, teacher: str, src: Encoding) -> RowSource:
        if self.config.store.mode == "stored":
            return StoredRows(self.store(teacher, arm.time.text), src.offsets)
        pad_id = self.tokenizer(teacher).pad_token_id
        size = self.config.store.batch_size
        return LiveRows(self.teacher_model(teacher), src, self.wanted_layers(teacher), pad_id, size)

    def aligned_teacher(self, arm: Arm, teacher: str, seed: int = 0) -> AlignedTeacher:
        """A teacher's cache of the training split on the student's positions."""
        src = self.teacher_encoding(teacher, "train", arm.time.text)
        dst = self.student_encoding("train")
        source = None
        if arm.shuffle_teacher:
            source = derangement([record.task for record in self.records("train")], seed)
        time = build_time_map(arm.time, src, dst, source)
        return AlignedTeacher(teacher, self._rows(arm, teacher, src), src.offsets, dst.offsets, time)

    # ------------------------------------------------------------ projectors
    def new_projectors(self, arm: Arm, layers: list[tuple[int, ...]]) -> list[Projector]:
        """Unfitted projectors of an arm, one per teacher, for rows that hold `layers` of each."""
        return [
            build_projector(
                arm.projector,
                self.geometry(teacher),
                self.plan(arm, teacher).within(stored),
                self.parameters(teacher),
            )
            for teacher, stored in zip(arm.teachers, layers, strict=True)
        ]

    def projectors(self, arm: Arm, layers: list[tuple[int, ...]]) -> list[Projector]:
        """Fitted projectors of an arm."""
        path = self.paths.projector(self.dag.fit_id(arm))
        document, run = path.with_suffix(".json"), f"run `kvpipe fit --fit {path.stem}`"
        for file in (path, document):
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing: {run} first")
        described = read_json(document, run)
        verify(path, described.get("sha256", ""), document, run)
        tensors = load_file(path)
        projectors = self.new_projectors(arm, layers)
        expected = {
            f"{teacher}/{name}": tensor.shape
            for teacher, projector in zip(arm.teachers, projectors, strict=True)
            for name, tensor in projector.state_dict().items()
        }
        found = {name: tensor.shape for name, tensor in tensors.items()}
        other = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if other:
            raise ValueError(f"{path} does not fit the arm {arm.teachers}: tensors {other[:3]}; {run}")
        for teacher, projector in zip(arm.teachers, projectors, strict=True):
            prefix = f"{teacher}/"
            projector.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        return projectors

    # ------------------------------------------------------------ distiller
    def distiller(self, arm: Arm, seed: int) -> Distiller | None:
        """What the arm adds to cross-entropy; None for control."""
        if arm.loss.kind == "none":
            return None
        tasks = np.array([record.task for record in self.records("train")])
        if arm.loss.kind == "logit_kd":
            return LogitDistiller(arm, [self.top_logits(arm, teacher) for teacher in arm.teachers], tasks)
        teachers = [self.aligned_teacher(arm, teacher, seed) for teacher in arm.teachers]
        if arm.loss.kind == "relation":
            return RelationDistiller(arm, teachers[0])
        options = {"weights": arm.fuse.weights, "learnable": arm.fuse.offsets} if arm.fuse.kind == "task" else {}
        if arm.fuse.kind == "fixed":
            options = {"weights": arm.fuse.weights["default"]}
        hidden_size = self.model_config(self.config.student).hidden_size
        projectors = self.projectors(arm, [teacher.layers for teacher in teachers])
        frozen, room = arm.projector.mode == "frozen", self.config.train.hold_targets_gb * GB / len(teachers)
        return KVDistiller(
            arm,
            [build_targets(t, p, frozen, room) for t, p in zip(teachers, projectors, strict=True)],
            build_fusion(arm.fuse.kind, n_teachers=len(teachers), hidden_size=hidden_size, **options),
            tasks,
            self.teacher_losses(arm),
        )

    def teacher_losses(self, arm: Arm) -> Tensor:
        """Nats per example of each teacher, (teacher, example): what `select` fusion compares."""
        out = []
        for teacher in arm.teachers:
            if self.config.store.mode != "stored":
                if arm.fuse.kind == "select":
                    raise ValueError("fuse.kind: select needs store.mode: stored, which keeps the teachers' losses")
                out.append(torch.zeros(len(self.student_encoding("train"))))
                continue
            nll = self.store(teacher, arm.time.text).rows("nll")
            lengths = torch.from_numpy(self.teacher_encoding(teacher, "train", arm.time.text).lengths)
            out.append(torch.stack([part.sum() for part in nll.split(lengths.tolist())]))
        return torch.stack(out)

    def top_logits(self, arm: Arm, teacher: str) -> TopLogits:
        """A teacher's next-token candidates on the student's rows, in student ids."""
        src, dst = self.teacher_encoding(teacher, "train", "student"), self.student_encoding("train")
        pairs = common_prefix_positions(*shared_spans(src, dst))
        if self.config.store.mode == "stored":
            store = self.store(teacher, "student")
            ids, logprobs = store.rows("top_ids"), store.rows("top_logprobs")
        else:
            pad = self.tokenizer(teacher).pad_token_id
            model = self.teacher_model(teacher)
            size, top = self.config.store.batch_size, self.config.store.top_logits
            found = forward_rows(model, src, np.arange(len(src)), (), size, pad, top)
            assert found.top_ids is not None and found.top_logprobs is not None
            ids, logprobs = found.top_ids, found.top_logprobs
        twins = torch.from_numpy(token_twins(self.tokenizer(teacher), self.student_tokenizer))
        rows = len(dst.ids)
        out = TopLogits(
            torch.full((rows, ids.shape[1]), -1),
            torch.zeros(rows, ids.shape[1]),
            torch.zeros(rows, dtype=torch.bool),
            dst.offsets,
        )
        found_ids = ids[pairs[:, 0]].long()
        # a model may have more outputs than its tokenizer has tokens: those stand for nothing
        known = found_ids < len(twins)
        out.ids[pairs[:, 1]] = torch.where(known, twins[found_ids.clamp(max=len(twins) - 1)], -1)
        out.logprobs[pairs[:, 1]] = logprobs[pairs[:, 0]].float()
        out.mask[pairs[:, 1]] = True
        return out


def token_twins(src_tokenizer, dst_tokenizer) -> np.ndarray:
    """For every source token id the destination id that stands for the same text, or −1.

    Same text is the same bytes, a space in front included. End-of-text tokens are twins, other special tokens have none.
    Where several destination tokens stand for the bytes, it is the one that is no byte-fallback token.
    """
    names = dst_tokenizer.convert_ids_to_tokens(list(range(len(dst_tokenizer))))
    by_bytes: dict[bytes, int] = {}
    for index, raw in enumerate(token_bytes(dst_tokenizer)):
        if raw and (raw not in by_bytes or names[by_bytes[raw]].startswith("<0x")):
            by_bytes[raw] = index
    out = np.array([by_bytes.get(raw, -1) if raw else -1 for raw in token_bytes(src_tokenizer)], dtype=np.int64)
    if src_tokenizer.eos_token_id is not None and dst_tokenizer.eos_token_id is not None:
        out[src_tokenizer.eos_token_id] = dst_tokenizer.eos_token_id
    return out


def save_projectors(path: Path, teachers: list[str], projectors: list[Projector], document: dict) -> None:
    """Write all projectors of a fit to one file, with the explained variance in its metadata and beside it as JSON."""
    tensors = {
        f"{teacher}/{name}": tensor.detach()
        for teacher, projector in zip(teachers, projectors, strict=True)
        for name, tensor in projector.state_dict().items()
    }
    save_tensors(tensors, path, {"fit": json.dumps(document, sort_keys=True)})
    document = {**document, "sha256": content_digest(path)}
    write_json(path.with_suffix(".json"), document, sort_keys=True)
