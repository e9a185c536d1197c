"""The caches that an arm holds the student against: aligned, projected, fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from kvpipe.cache.kv import KV
from kvpipe.cache.teacher import Aligned, AlignedTeacher
from kvpipe.config import FusionSettings
from kvpipe.data.batches import spread
from kvpipe.distill.fusion import Fused, Fusion, TeacherCaches, collapse_report, mean_weights
from kvpipe.distill.projectors import Projector

FIRST_LOOK = 64
"""Training examples from which a fusion takes its prototypes."""

Projected = tuple[KV, Bool[Tensor, "batch time"]]
"""A cache in the student's shape, and where it has a target."""


class ProjectedTargets(nn.Module):
    """Projected anew for every batch: the projector may train, and nothing is held in memory."""

    def __init__(self, teacher: AlignedTeacher, projector: Projector):
        super().__init__()
        self.name, self.teacher, self.projector = teacher.name, teacher, projector

    def project(self, aligned: Aligned) -> Projected:
        """What was read of the teacher, through the projector as it is now."""
        like = next(self.projector.parameters())
        return self.projector(aligned.keys.to(like), aligned.values.to(like)), aligned.mask.to(like.device)

    def fetch(self, examples: Int64[np.ndarray, "batch"], length: int) -> Projected:
        """One batch."""
        return self.project(self.teacher.aligned(examples, length))


class HeldTargets:
    """The same for a frozen projector, computed once for all training examples: a step only gathers rows."""

    CHUNK = 256

    @torch.no_grad()
    def __init__(self, targets: ProjectedTargets):
        self.name = targets.name
        self.offsets = targets.teacher.dst.offsets
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
        return int(teacher.dst.offsets[-1]) * 2 * g.dst_layers * g.dst_heads * g.dst_dim * 4

    def fetch(self, examples: Int64[np.ndarray, "batch"], length: int) -> Projected:
        """One batch."""
        place = np.arange(length)[None] + self.offsets[examples][:, None]
        inside = place < self.offsets[examples + 1][:, None]
        index = torch.from_numpy(np.where(inside, place, len(self.rows) - 1))
        both = rearrange(self.rows[index], "batch time kind layer head dim -> kind layer batch head time dim")
        return KV(both[0], both[1]), self.masks[index]


Targets = ProjectedTargets | HeldTargets
"""Where one teacher's projected cache comes from, batch by batch."""


def build_targets(teacher: AlignedTeacher, projector: Projector, frozen: bool, room: float) -> Targets:
    """Targets of one teacher, held in memory where the projector is frozen and they fit into `room` bytes."""
    targets = ProjectedTargets(teacher, projector.requires_grad_(not frozen).train(not frozen))
    return HeldTargets(targets) if frozen and HeldTargets.bytes(teacher, projector) <= room else targets


@dataclass(frozen=True)
class FusedTarget:
    """The fused caches of all student layers, and which positions have a target."""

    fused: Fused
    present: Bool[Tensor, "teacher batch time"]

    @property
    def mask(self) -> Bool[Tensor, "batch time"]:
        """Where any teacher has one."""
        return self.present.any(0)


class FusedTargets(nn.Module):
    """All teachers of an arm, projected and fused.

    Args:
        targets: of each teacher.
        fusion: makes one of them.
        settings: the fusion's, which say what it needs.
    """

    def __init__(self, targets: Sequence[Targets], fusion: Fusion, settings: FusionSettings):
        super().__init__()
        self.targets, self.fusion, self.needs = list(targets), fusion, settings.needs
        self.projecting = nn.ModuleList(t for t in targets if isinstance(t, nn.Module))
        if "prototypes" in self.needs:
            self._look()

    @property
    def columns(self) -> list[tuple[str, ...]]:
        """What is read of each teacher for it, held targets aside."""
        losses = ("nll",) if self.needs & {"teacher_losses", "span_losses"} else ()
        return [(() if isinstance(t, HeldTargets) else ("keys", "values")) + losses for t in self.targets]

    @property
    def reads_student(self) -> bool:
        """Whether the target depends on the student's forward."""
        return bool(self.needs & {"own_queries", "own_hidden"})

    @property
    def trains(self) -> bool:
        """Whether it changes from step to step."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @torch.no_grad()
    def _look(self) -> None:
        """Show the fusion some training examples."""
        offsets = [t.offsets if isinstance(t, HeldTargets) else t.teacher.dst.offsets for t in self.targets]
        lengths = np.diff(offsets[0])
        examples = spread(len(lengths), FIRST_LOOK)
        self.fusion.begin(*self._stacked([t.fetch(examples, int(lengths[examples].max())) for t in self.targets], None))

    def _stacked(self, projected: Sequence[Projected], like: Tensor | None) -> tuple[TeacherCaches, Tensor]:
        place = () if like is None else (like.device, like.dtype)
        keys, values = (
            torch.stack([getattr(kv, kind) for kv, _ in projected]).to(*place) for kind in ("keys", "values")
        )
        return TeacherCaches(keys, values), torch.stack([mask for _, mask in projected]).to(keys.device)

    def forward(
        self,
        examples: Int64[np.ndarray, "batch"],
        length: int,
        read: Sequence[Aligned | None],
        like: Float[Tensor, ""],
        tasks: Sequence[str],
        queries: Callable[[], Tensor],
        hidden: Callable[[], Tensor],
    ) -> FusedTarget:
        """The target of a batch.

        Args:
            examples: the batch.
            length: its padded length.
            read: of each teacher, as `columns` say.
            like: device and dtype of the result.
            tasks: of each example.
            queries: the student's, asked only if the fusion needs them.
            hidden: what enters its layers; the same.
        """
        projected = [
            t.fetch(examples, length) if isinstance(t, HeldTargets) else t.project(_there(one))
            for t, one in zip(self.targets, read, strict=True)
        ]
        caches, present = self._stacked(projected, like)
        nats = {"teacher_losses": lambda a: a.loss, "span_losses": lambda a: a.columns["nll"]}
        losses = {
            name: torch.stack([of(_there(one)) for one in read]).to(like)
            for name, of in nats.items()
            if name in self.needs
        }
        fused = self.fusion(
            caches,
            present=present,
            tasks=tasks,
            queries=queries() if "own_queries" in self.needs else None,
            hidden=hidden() if "own_hidden" in self.needs else None,
            **losses,
        )
        return FusedTarget(fused, present)

    @torch.no_grad()
    def watch(
        self, target: FusedTarget, mask: Bool[Tensor, "batch time"], tasks: np.ndarray
    ) -> dict[str, tuple[float, float]]:
        """Mean weight of each teacher per task, as sums and counts."""
        out: dict[str, tuple[float, float]] = {}
        if len(self.targets) == 1:
            return out
        weights = target.fused.weights
        for task, table in sorted(mean_weights(weights, list(tasks), mask).items()):
            shown = float(mask[torch.from_numpy(tasks == task)].sum())
            for targets, weight in zip(self.targets, table.mean(0), strict=True):
                out[f"weight/{task}/{targets.name}"] = (weight.item() * shown, shown)
        if any(parameter.requires_grad for parameter in self.fusion.parameters()) and "own_hidden" in self.needs:
            collapse_report(weights, target.present)
        return out


def _there(read: Aligned | None) -> Aligned:
    assert read is not None
    return read
