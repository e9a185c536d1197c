"""What an arm adds to cross-entropy: aligned teachers → projection → fusion → loss terms, behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from kvpipe.batches import Batch
from kvpipe.capture import Recorder
from kvpipe.config import Arm, ScheduleConfig
from kvpipe.fuse import Fused, Fusion, collapse_report, entropy, mean_weights
from kvpipe.fuse import Targets as TeacherCaches
from kvpipe.losses import Schedule, kv_loss, logit_kd_loss, masked_mean, relation_loss, target_std
from kvpipe.project import Projector
from kvpipe.shapes import KV
from kvpipe.teacher import AlignedTeacher


@dataclass(frozen=True)
class Term:
    """One loss term of a step and its weight λ."""

    value: Float[Tensor, ""]
    weight: float


@dataclass(frozen=True)
class Step:
    """The terms of one step and numbers worth logging (scalars on the CPU, computed only when asked for)."""

    terms: dict[str, Term]
    watch: Callable[[], dict[str, float]]


class Distiller(nn.Module):
    """Interface: one call per step, after the student's forward."""

    needs_hidden = False

    def forward(
        self, batch: Batch, logits: Tensor, hidden: Tensor | None, recorder: Recorder, progress: tuple[int, int]
    ):
        """Loss terms for a batch; `progress` is (step, steps)."""
        raise NotImplementedError


@runtime_checkable
class Targets(Protocol):
    """Where one teacher's projected cache comes from, batch by batch."""

    name: str

    def fetch(self, examples: Int64[np.ndarray, "batch"], length: int) -> tuple[KV, Bool[Tensor, "batch time"]]:
        """The cache in the student's shape, and where it has a target."""
        ...


class ProjectedTargets(nn.Module):
    """Aligned and projected anew for every batch: the projector may train, and nothing is held in memory."""

    def __init__(self, teacher: AlignedTeacher, projector: Projector):
        super().__init__()
        self.name, self.teacher, self.projector = teacher.name, teacher, projector

    def fetch(self, examples: Int64[np.ndarray, "batch"], length: int) -> tuple[KV, Bool[Tensor, "batch time"]]:
        """One batch."""
        aligned = self.teacher.aligned(examples, length)
        device = next(self.projector.parameters()).device
        return self.projector(aligned.keys.to(device), aligned.values.to(device)), aligned.mask.to(device)


class HeldTargets:
    """The same for a frozen projector, computed once for all training examples: a step only gathers rows."""

    CHUNK = 256

    @torch.no_grad()
    def __init__(self, targets: ProjectedTargets):
        self.name = targets.name
        self.offsets = targets.teacher.dst_offsets
        lengths = np.diff(self.offsets)
        geometry = targets.projector.geometry
        # the last row is what padding gathers: zeros, masked
        count = int(self.offsets[-1])
        self.rows = torch.zeros(count + 1, 2, geometry.dst_layers, geometry.dst_heads, geometry.dst_dim)
        self.masks = torch.zeros(count + 1, dtype=torch.bool)
        for start in range(0, len(lengths), self.CHUNK):
            examples = np.arange(start, min(start + self.CHUNK, len(lengths)))
            kv, mask = targets.fetch(examples, int(lengths[examples].max()))
            both = rearrange([kv.keys, kv.values], "kind layer batch head time dim -> batch time kind layer head dim")
            inside = torch.arange(both.shape[1])[None] < torch.from_numpy(lengths[examples])[:, None]
            rows = slice(int(self.offsets[start]), int(self.offsets[examples[-1] + 1]))
            self.rows[rows], self.masks[rows] = both.cpu()[inside], mask.cpu()[inside]

    @staticmethod
    def bytes(teacher: AlignedTeacher, projector: Projector) -> int:
        """Memory of the rows."""
        g = projector.geometry
        return int(teacher.dst_offsets[-1]) * 2 * g.dst_layers * g.dst_heads * g.dst_dim * 4

    def fetch(self, examples: Int64[np.ndarray, "batch"], length: int) -> tuple[KV, Bool[Tensor, "batch time"]]:
        """One batch."""
        place = np.arange(length)[None] + self.offsets[examples][:, None]
        inside = place < self.offsets[examples + 1][:, None]
        index = torch.from_numpy(np.where(inside, place, len(self.rows) - 1))
        both = rearrange(self.rows[index], "batch time kind layer head dim -> kind layer batch head time dim")
        return KV(both[0], both[1]), self.masks[index]


def build_targets(teacher: AlignedTeacher, projector: Projector, frozen: bool, room: float) -> Targets:
    """Targets of one teacher, held in memory where the projector is frozen and they fit into `room` bytes."""
    targets = ProjectedTargets(teacher, projector.requires_grad_(not frozen).train(not frozen))
    return HeldTargets(targets) if frozen and HeldTargets.bytes(teacher, projector) <= room else targets


class KVDistiller(Distiller):
    """Key and value matching against the fused, projected teachers."""

    def __init__(
        self,
        arm: Arm,
        targets: list[Targets],
        fusion: Fusion,
        tasks: np.ndarray,
        teacher_losses: Float[Tensor, "teacher example"],
    ):
        super().__init__()
        self.arm, self.targets, self.tasks, self.teacher_losses = arm, targets, tasks, teacher_losses
        self.projecting = nn.ModuleList(t for t in targets if isinstance(t, nn.Module))
        self.fusion = fusion
        self.needs_hidden = arm.fuse.kind == "learnable"

    def forward(
        self, batch: Batch, logits: Tensor, hidden: Tensor | None, recorder: Recorder, progress: tuple[int, int]
    ):
        """Terms `k` and `v`, and `entropy` where it is weighted."""
        config, device = self.arm.loss, logits.device
        fetched = [targets.fetch(batch.examples, batch.input_ids.shape[1]) for targets in self.targets]
        student = recorder.kv()
        present = torch.stack([mask for _, mask in fetched]).to(device)
        fused = self.fusion(
            TeacherCaches(
                torch.stack([kv.keys for kv, _ in fetched]).to(device),
                torch.stack([kv.values for kv, _ in fetched]).to(device),
            ),
            present=present,
            tasks=list(self.tasks[batch.examples]),
            queries=recorder.queries() if self.arm.fuse.kind == "attention" else None,
            hidden=hidden,
            teacher_losses=self.teacher_losses[:, batch.examples].to(device),
        )
        mask = batch.mask & present.any(0)
        if config.skip_sink:
            mask[:, : config.skip_sink] = False
        layers = slice(None) if config.layers is None else list(config.layers)
        scale: Literal["std"] | None = "std" if config.scale == "std" else None
        terms = {}
        for name, weight, own, target in (
            ("k", config.lambda_k, student.keys, fused.keys),
            ("v", config.lambda_v, student.values, fused.values),
        ):
            if weight > 0:
                loss = kv_loss(own[layers], target[layers], mask, config.distance, scale)
                terms[name] = Term(masked_mean(loss, mask), scheduled(weight, config.schedule, progress))
        if self.arm.fuse.entropy > 0:
            terms["entropy"] = Term(-entropy(fused.weights, present), self.arm.fuse.entropy)
        return Step(terms, lambda: self._watch(batch, fused, mask, present))

    @torch.no_grad()
    def _watch(self, batch: Batch, fused: Fused, mask: Tensor, present: Tensor) -> dict[str, float]:
        out = {
            # a falling one means that a trainable projector collapses
            "target_std_k": target_std(fused.keys, mask).mean().item(),
            "target_std_v": target_std(fused.values, mask).mean().item(),
            "masked_share": 1 - (mask.sum() / batch.mask.sum()).item(),
        }
        if len(self.targets) > 1:
            names = list(self.tasks[batch.examples])
            for task, table in sorted(mean_weights(fused.weights, names, mask).items()):
                for targets, weight in zip(self.targets, table.mean(0), strict=True):
                    out[f"weight/{task}/{targets.name}"] = weight.item()
            if self.arm.fuse.kind == "learnable":
                collapse_report(fused.weights, present)
        return out


class LogitDistiller(Distiller):
    """Next-token distributions where teacher and student have read the same bytes; weights per task."""

    def __init__(self, arm: Arm, entries: list[TopLogits], tasks: np.ndarray):
        super().__init__()
        self.arm, self.entries, self.tasks = arm, entries, tasks

    def forward(
        self, batch: Batch, logits: Tensor, hidden: Tensor | None, recorder: Recorder, progress: tuple[int, int]
    ):
        """Term `logit`."""
        table = self.arm.fuse.weights
        total = logits.new_zeros(())
        for number, entry in enumerate(self.entries):
            ids, logprobs, mask = (t.to(logits.device) for t in entry.padded(batch.examples, logits.shape[1]))
            loss = logit_kd_loss(logits, ids, logprobs, mask, self.arm.loss.temperature)
            rows = [table.get(task, table.get("default")) for task in self.tasks[batch.examples]]
            shares = loss.new_tensor([row[number] / sum(row) if row else 1 / len(self.entries) for row in rows])
            total = total + (loss * shares[:, None]).sum() / batch.mask.sum()
        return Step({"logit": Term(total, scheduled(self.arm.loss.weight, self.arm.loss.schedule, progress))}, dict)


@dataclass(frozen=True)
class TopLogits:
    """A teacher's most likely next tokens on the student's rows, as student ids (−1: no twin); masked where not aligned."""

    ids: Int64[Tensor, "dst_row top"]
    logprobs: Float[Tensor, "dst_row top"]
    mask: Tensor
    offsets: np.ndarray

    def padded(self, examples: np.ndarray, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of a batch, padded to `length`."""
        shape = (len(examples), length)
        ids = torch.full((*shape, self.ids.shape[1]), -1, dtype=torch.int64)
        logprobs = torch.zeros(*shape, self.ids.shape[1])
        mask = torch.zeros(shape, dtype=torch.bool)
        for i, example in enumerate(examples):
            rows = slice(int(self.offsets[example]), int(self.offsets[example + 1]))
            n = rows.stop - rows.start
            ids[i, :n], logprobs[i, :n], mask[i, :n] = self.ids[rows], self.logprobs[rows], self.mask[rows]
        return ids, logprobs, mask


class RelationDistiller(Distiller):
    """MiniLMv2: key-key and value-value relations of the last layer of one teacher."""

    def __init__(self, arm: Arm, teacher: AlignedTeacher):
        super().__init__()
        self.arm, self.teacher = arm, teacher

    def forward(
        self, batch: Batch, logits: Tensor, hidden: Tensor | None, recorder: Recorder, progress: tuple[int, int]
    ):
        """Terms `kk` and `vv`."""
        aligned = self.teacher.aligned(batch.examples, batch.input_ids.shape[1])
        student = recorder.kv()
        mask = batch.mask & aligned.mask.to(logits.device)
        weight = scheduled(self.arm.loss.weight, self.arm.loss.schedule, progress)
        terms = {}
        for name, own, theirs in (("kk", student.keys, aligned.keys), ("vv", student.values, aligned.values)):
            teacher = theirs[:, :, -1].transpose(1, 2).to(logits.device)
            loss = relation_loss(own[-1], teacher, mask, self.arm.loss.relation_heads)
            terms[name] = Term(masked_mean(loss, mask), weight)
        return Step(terms, dict)


def scheduled(weight: float, config: ScheduleConfig, progress: tuple[int, int]) -> float:
    """λ at a step; `final` of the config is a share of λ."""
    return Schedule(weight, config.kind, config.warmup, weight * config.final, config.until)(*progress)
