"""What an arm adds to cross-entropy: aligned teachers → projection → fusion → loss terms, behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from kvpipe.cache.capture import Recorder
from kvpipe.cache.kv import KV
from kvpipe.cache.teacher import Aligned, AlignedTeacher
from kvpipe.config import Arm, ScheduleConfig
from kvpipe.data.batches import Batch
from kvpipe.distill.fusion import Fused, Fusion, collapse_report, mean_weights, position_entropy
from kvpipe.distill.fusion import Targets as TeacherCaches
from kvpipe.distill.losses import (
    Schedule,
    kv_loss,
    logit_kd_loss,
    masked_sum,
    pooled_std,
    relation_loss,
    target_moments,
)
from kvpipe.distill.projectors import Projector


@dataclass(frozen=True)
class Term:
    """One loss term and its weight λ. The values of all parts of a batch add up to the batch's."""

    value: Float[Tensor, ""]
    weight: float


@dataclass(frozen=True)
class Terms:
    """The terms of one step, and numbers worth logging, computed only when asked for.

    Each is a sum and what it is divided by (on the CPU): those of a batch's parts are added before the division.
    """

    terms: dict[str, Term]
    watch: Callable[[], dict[str, tuple[float, float]]]


Whole = dict[str, Tensor]
"""What a term is divided by, over the whole batch: counts of positions, and under `scale: std` deviations per layer."""


class Distiller(nn.Module):
    """Interface: what the teachers say of a batch, what is measured of it, and the loss against it.

    A batch comes in parts, micro-batches and processes. `read` asks the teachers, once a part; `target` makes of it
    what the student is held against; `measure` gives a row of sums of it, and `whole` what the rows of all parts
    amount to; `terms` are a part's share of the whole's loss. A call is all of them, for a batch in one part.
    """

    needs_hidden = False
    reads_student = False
    """Whether the target depends on the student's forward."""
    unit: Tensor

    def __init__(self) -> None:
        super().__init__()
        # says on which device and in which precision the distiller computes
        self.register_buffer("unit", torch.ones(()), persistent=False)

    def read(self, batch: Batch) -> Any:
        """What the teachers say of a part; nothing here depends on what trains."""
        raise NotImplementedError

    def target(self, batch: Batch, read: Any, hidden: Tensor | None, recorder: Recorder | None) -> Any:
        """The target; with `reads_student`, of the forward that was just recorded."""
        return read

    def measure(self, batch: Batch, target: Any) -> Float[Tensor, "sum"]:
        """A row of sums of a part."""
        raise NotImplementedError

    def whole(self, rows: Float[Tensor, "part sum"]) -> Whole:
        """What all parts' rows amount to."""
        raise NotImplementedError

    def terms(
        self, batch: Batch, target: Any, whole: Whole, logits: Tensor, recorder: Recorder, progress: tuple[int, int]
    ) -> Terms:
        """A part's share of the loss terms of a batch; `progress` is (step, steps)."""
        raise NotImplementedError

    def forward(
        self, batch: Batch, logits: Tensor, hidden: Tensor | None, recorder: Recorder, progress: tuple[int, int]
    ) -> Terms:
        """The loss terms of a batch in one part."""
        target = self.target(batch, self.read(batch), hidden, recorder)
        whole = self.whole(self.measure(batch, target)[None])
        return self.terms(batch, target, whole, logits, recorder, progress)


Projected = tuple[KV, Bool[Tensor, "batch time"]]
"""A cache in the student's shape, and where it has a target."""


@runtime_checkable
class Targets(Protocol):
    """Where one teacher's projected cache comes from, batch by batch."""

    name: str

    def read(self, examples: Int64[np.ndarray, "batch"], length: int) -> Callable[[], Projected]:
        """Ask the teacher for a batch; what is returned projects it, any number of times."""
        ...

    def fetch(self, examples: Int64[np.ndarray, "batch"], length: int) -> Projected:
        """Both at once."""
        ...


class ProjectedTargets(nn.Module):
    """Aligned and projected anew for every batch: the projector may train, and nothing is held in memory."""

    def __init__(self, teacher: AlignedTeacher, projector: Projector):
        super().__init__()
        self.name, self.teacher, self.projector = teacher.name, teacher, projector

    def read(self, examples: Int64[np.ndarray, "batch"], length: int) -> Callable[[], Projected]:
        """Aligned now, projected when called."""
        aligned = self.teacher.aligned(examples, length)

        def project() -> Projected:
            like = next(self.projector.parameters())
            return self.projector(aligned.keys.to(like), aligned.values.to(like)), aligned.mask.to(like.device)

        return project

    def fetch(self, examples: Int64[np.ndarray, "batch"], length: int) -> Projected:
        """One batch."""
        return self.read(examples, length)()


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

    def read(self, examples: Int64[np.ndarray, "batch"], length: int) -> Callable[[], Projected]:
        """Gathered when called."""
        return lambda: self.fetch(examples, length)

    def fetch(self, examples: Int64[np.ndarray, "batch"], length: int) -> Projected:
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


@dataclass(frozen=True)
class FusedTarget:
    """Fused keys (`k`) and values (`v`) of the layers that are matched, and which positions count in them."""

    caches: dict[str, Float[Tensor, "layer batch head time dim"]]
    fused: Fused
    present: Bool[Tensor, "teacher batch time"]
    mask: Bool[Tensor, "batch time"]


class KVDistiller(Distiller):
    """Key and value matching against the fused, projected teachers."""

    def __init__(
        self,
        arm: Arm,
        targets: list[Targets],
        fusion: Fusion,
        tasks: np.ndarray,
        teacher_losses: Float[Tensor, "teacher example"] | None = None,
    ):
        super().__init__()
        self.arm, self.targets, self.tasks, self.teacher_losses = arm, targets, tasks, teacher_losses
        self.projecting = nn.ModuleList(t for t in targets if isinstance(t, nn.Module))
        self.fusion = fusion
        self.needs_hidden = arm.fuse.kind == "learnable"
        self.reads_student = arm.fuse.kind in ("learnable", "attention")
        self.layers = slice(None) if arm.loss.layers is None else list(arm.loss.layers)
        weights = {"k": arm.loss.lambda_k, "v": arm.loss.lambda_v}
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}

    def read(self, batch: Batch) -> list[Callable[[], Projected]]:
        """Every teacher's cache, not projected yet: a trainable projector moves between steps."""
        return [targets.read(batch.examples, batch.input_ids.shape[1]) for targets in self.targets]

    def target(self, batch: Batch, read: Any, hidden: Tensor | None, recorder: Recorder | None) -> FusedTarget:
        """The fused caches and where they count."""
        device = batch.input_ids.device
        projected = [project() for project in read]
        present = torch.stack([mask for _, mask in projected]).to(device)
        caches = TeacherCaches(
            torch.stack([kv.keys for kv, _ in projected]).to(device, self.unit.dtype),
            torch.stack([kv.values for kv, _ in projected]).to(device, self.unit.dtype),
        )
        fused = self.fusion(
            caches,
            present=present,
            tasks=list(self.tasks[batch.examples]),
            queries=recorder.queries() if self.arm.fuse.kind == "attention" and recorder is not None else None,
            hidden=hidden,
            teacher_losses=None
            if self.teacher_losses is None
            else self.teacher_losses[:, batch.examples].to(device, self.unit.dtype),
        )
        mask = batch.mask & present.any(0)
        mask[:, : self.arm.loss.skip_sink] = False
        return FusedTarget({"k": fused.keys[self.layers], "v": fused.values[self.layers]}, fused, present, mask)

    @torch.no_grad()
    def measure(self, batch: Batch, target: FusedTarget) -> Float[Tensor, "sum"]:
        """Positions, those that count, those where the teachers' weights are a choice; moments of every layer."""
        choice = (target.present.sum(0) >= 2).sum()
        counts = [batch.mask.sum(), target.mask.sum(), choice]
        moments = [target_moments(target.caches[name], target.mask).flatten() for name in ("k", "v")]
        return torch.cat([torch.stack(counts).to(moments[0]), *moments])

    def whole(self, rows: Float[Tensor, "part sum"]) -> Whole:
        """The counts added up, and the deviations of keys and of values."""
        moments = rearrange(rows[:, 3:], "part (kind stat layer) -> kind part stat layer", kind=2, stat=3)
        counts = dict(zip(("tokens", "counted", "choice"), rows[:, :3].sum(0), strict=True))
        return counts | {"k": pooled_std(moments[0]), "v": pooled_std(moments[1])}

    def terms(
        self,
        batch: Batch,
        target: FusedTarget,
        whole: Whole,
        logits: Tensor,
        recorder: Recorder,
        progress: tuple[int, int],
    ) -> Terms:
        """Terms `k` and `v`, and `entropy` where it is weighted."""
        config, student = self.arm.loss, recorder.kv()
        own = {"k": student.keys, "v": student.values}
        terms = {}
        for name, weight in self.weights.items():
            scale = whole[name] if config.scale == "std" else None
            loss = kv_loss(own[name][self.layers], target.caches[name], target.mask, config.distance, scale)
            value = masked_sum(loss, target.mask) / whole["counted"].clamp(min=1)
            terms[name] = Term(value, scheduled(weight, config.schedule, progress))
        if self.arm.fuse.entropy > 0:
            share, _ = position_entropy(target.fused.weights, target.present)
            terms["entropy"] = Term(-share.sum() / whole["choice"].clamp(min=1), self.arm.fuse.entropy)
        return Terms(terms, lambda: self._watch(batch, target, whole))

    @torch.no_grad()
    def _watch(self, batch: Batch, target: FusedTarget, whole: Whole) -> dict[str, tuple[float, float]]:
        out = {
            # a falling one means that a trainable projector collapses
            "target_std_k": (whole["k"].mean().item(), 1.0),
            "target_std_v": (whole["v"].mean().item(), 1.0),
            "masked_share": (1 - (whole["counted"] / whole["tokens"]).item(), 1.0),
        }
        if len(self.targets) > 1:
            names = self.tasks[batch.examples]
            for task, table in sorted(mean_weights(target.fused.weights, list(names), target.mask).items()):
                shown = target.mask[torch.from_numpy(names == task)].sum().item()
                for targets, weight in zip(self.targets, table.mean(0), strict=True):
                    out[f"weight/{task}/{targets.name}"] = (weight.item() * shown, shown)
            if self.arm.fuse.kind == "learnable":
                collapse_report(target.fused.weights, target.present)
        return out


class LogitDistiller(Distiller):
    """Next-token distributions where teacher and student have read the same bytes; weights per task."""

    def __init__(self, arm: Arm, entries: list[TopLogits], tasks: np.ndarray):
        super().__init__()
        self.arm, self.entries, self.tasks = arm, entries, tasks

    def read(self, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Ids, log-probabilities and mask of every teacher."""
        return [entry.padded(batch.examples, batch.input_ids.shape[1]) for entry in self.entries]

    def measure(self, batch: Batch, target: Any) -> Float[Tensor, "sum"]:
        """The tokens."""
        return batch.mask.sum().to(self.unit.dtype)[None]

    def whole(self, rows: Float[Tensor, "part sum"]) -> Whole:
        """The tokens of all parts."""
        return {"tokens": rows.sum()}

    def terms(
        self, batch: Batch, target: Any, whole: Whole, logits: Tensor, recorder: Recorder, progress: tuple[int, int]
    ) -> Terms:
        """Term `logit`."""
        table = self.arm.fuse.weights
        total = logits.new_zeros(())
        for number, entry in enumerate(target):
            ids, logprobs, mask = (t.to(logits.device) for t in entry)
            loss = logit_kd_loss(logits, ids, logprobs, mask, self.arm.loss.temperature)
            rows = [table.get(task, table.get("default")) for task in self.tasks[batch.examples]]
            shares = loss.new_tensor([row[number] / sum(row) if row else 1 / len(self.entries) for row in rows])
            total = total + (loss * shares[:, None]).sum() / whole["tokens"]
        return Terms({"logit": Term(total, scheduled(self.arm.loss.weight, self.arm.loss.schedule, progress))}, dict)


@dataclass(frozen=True)
class TopLogits:
    """A teacher's most likely next tokens on the student's rows, as student ids (−1: it has none); masked where not
    aligned."""

    ids: Int64[Tensor, "dst_row top"]
    logprobs: Float[Tensor, "dst_row top"]
    mask: Tensor
    offsets: np.ndarray

    @classmethod
    def on_student(
        cls, ids: Tensor, logprobs: Tensor, pairs: Tensor, same: Int64[Tensor, "src_token"], offsets: np.ndarray
    ) -> TopLogits:
        """Carry a teacher's candidates to the student's rows.

        Args:
            ids: candidates of every teacher row, `(src_row, top)`.
            logprobs: theirs.
            pairs: (teacher row, student row) that have read the same bytes, `(pair, 2)`.
            same: the student's id for each of the teacher's, or −1.
            offsets: the student's examples.
        """
        src, dst = pairs[:, 0], pairs[:, 1]
        rows, top = int(offsets[-1]), ids.shape[1]
        out = cls(torch.full((rows, top), -1), torch.zeros(rows, top), torch.zeros(rows, dtype=torch.bool), offsets)
        # a model may have more outputs than its tokenizer has tokens: those stand for nothing
        found = ids[src].long()
        out.ids[dst] = torch.where(found < len(same), same[found.clamp(max=len(same) - 1)], -1)
        out.logprobs[dst] = logprobs[src].float()
        out.mask[dst] = True
        return out

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

    def read(self, batch: Batch) -> Aligned:
        """The teacher's cache."""
        return self.teacher.aligned(batch.examples, batch.input_ids.shape[1])

    def measure(self, batch: Batch, target: Aligned) -> Float[Tensor, "sum"]:
        """The positions that have a target."""
        return (batch.mask & target.mask.to(batch.mask.device)).sum().to(self.unit.dtype)[None]

    def whole(self, rows: Float[Tensor, "part sum"]) -> Whole:
        """Those of all parts."""
        return {"counted": rows.sum()}

    def terms(
        self, batch: Batch, target: Aligned, whole: Whole, logits: Tensor, recorder: Recorder, progress: tuple[int, int]
    ) -> Terms:
        """Terms `kk` and `vv`."""
        student = recorder.kv()
        mask = batch.mask & target.mask.to(logits.device)
        weight = scheduled(self.arm.loss.weight, self.arm.loss.schedule, progress)
        terms = {}
        for name, own, theirs in (("kk", student.keys, target.keys), ("vv", student.values, target.values)):
            teacher = theirs[:, :, -1].transpose(1, 2).to(logits.device, self.unit.dtype)
            loss = relation_loss(own[-1], teacher, mask, self.arm.loss.relation_heads)
            terms[name] = Term(masked_sum(loss, mask) / whole["counted"].clamp(min=1), weight)
        return Terms(terms, dict)


def scheduled(weight: float, config: ScheduleConfig, progress: tuple[int, int]) -> float:
    """λ at a step; `final` of the config is a share of λ."""
    return Schedule(weight, config.kind, config.warmup, weight * config.final, config.until)(*progress)
