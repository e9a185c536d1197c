"""What an arm adds to cross-entropy: aligned teachers → projection → fusion → loss terms, behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from kvpipe.batches import Batch
from kvpipe.capture import Recorder
from kvpipe.config import Arm, ScheduleConfig
from kvpipe.fuse import Fusion, Targets
from kvpipe.losses import Schedule, kv_loss, logit_kd_loss, masked_mean, relation_loss, target_std
from kvpipe.project import Projector
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


class KVDistiller(Distiller):
    """Key and value matching against the fused, projected teachers."""

    def __init__(
        self,
        arm: Arm,
        teachers: list[AlignedTeacher],
        projectors: list[Projector],
        fusion: Fusion,
        tasks: np.ndarray,
        teacher_losses: Float[Tensor, "teacher example"],
    ):
        super().__init__()
        self.arm, self.teachers, self.tasks, self.teacher_losses = arm, teachers, tasks, teacher_losses
        self.projectors = nn.ModuleList(projectors)
        self.fusion = fusion
        self.needs_hidden = arm.fuse.kind == "learnable"
        self.frozen = arm.projector.mode == "frozen"
        for parameter in self.projectors.parameters():
            parameter.requires_grad_(not self.frozen)
        self.projectors.train(not self.frozen)

    def forward(
        self, batch: Batch, logits: Tensor, hidden: Tensor | None, recorder: Recorder, progress: tuple[int, int]
    ):
        """Terms `k` and `v`, and `entropy` where it is weighted."""
        config, device = self.arm.loss, logits.device
        length = batch.input_ids.shape[1]
        projected, masks = [], []
        with torch.set_grad_enabled(not self.frozen):
            for teacher, projector in zip(self.teachers, self.projectors, strict=True):
                aligned = teacher.aligned(batch.examples, length)
                projected.append(projector(aligned.keys.to(device), aligned.values.to(device)))
                masks.append(aligned.mask.to(device))
            targets = Targets(torch.stack([p.keys for p in projected]), torch.stack([p.values for p in projected]))
        student = recorder.kv()
        present = torch.stack(masks)
        fused = self.fusion(
            targets,
            present=present,
            tasks=list(self.tasks[batch.examples]),
            queries=recorder.queries() if self.arm.fuse.kind == "attention" else None,
            hidden=hidden,
            teacher_losses=self.teacher_losses[:, batch.examples].to(device),
        )
        mask = batch.mask & present.any(0)
        if config.skip_sink:
            mask = mask.clone()
            mask[:, : config.skip_sink] = False
        layers = slice(None) if config.layers is None else list(config.layers)
        scale = "std" if config.scale == "std" else None
        terms = {}
        for name, weight, own, target in (
            ("k", config.lambda_k, student.keys, fused.keys),
            ("v", config.lambda_v, student.values, fused.values),
        ):
            if weight > 0:
                loss = kv_loss(own[layers], target[layers], mask, config.distance, scale)
                terms[name] = Term(masked_mean(loss, mask), scheduled(weight, config.schedule, progress))
        if self.arm.fuse.entropy > 0:
            terms["entropy"] = Term(-weight_entropy(fused.weights), self.arm.fuse.entropy)

        def watch() -> dict[str, float]:
            with torch.no_grad():
                out = {
                    "target_std_k": target_std(fused.keys, mask).mean().item(),
                    "target_std_v": target_std(fused.values, mask).mean().item(),
                    "masked_share": 1 - (mask.sum() / batch.mask.sum()).item(),
                }
                names = self.tasks[batch.examples]
                for task in sorted(set(names)):
                    members = torch.from_numpy(names == task).to(device)
                    shape = (*fused.weights.shape[:2], len(names), *fused.weights.shape[3:])
                    chosen = fused.weights.expand(shape)[:, :, members]
                    for teacher, weight in zip(self.teachers, chosen.mean((1, 2, 3, 4)), strict=True):
                        out[f"weight/{task}/{teacher.name}"] = weight.item()
            return out

        return Step(terms, watch)


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


def weight_entropy(weights: Float[Tensor, "teacher layers batch heads times"]) -> Float[Tensor, ""]:
    """Mean entropy of the fusion weights in nats, where some teacher is present."""
    entropy = -(weights * weights.clamp(min=1e-12).log()).sum(0)
    covered = weights.sum(0) > 0
    return entropy[covered].mean()
