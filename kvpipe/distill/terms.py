"""The terms of an arm's loss, one class each: what is measured of a batch, and a part's share of the whole's loss.

A batch comes in parts (micro-batches, processes). `measure` gives a row of sums of a part, `whole` what the rows of all
parts amount to, and the term is a part's sum over the whole's count: parts add up to the batch in one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from kvpipe.align.layer import proportional_map
from kvpipe.align.regime import positions_from_mask
from kvpipe.cache.attention import attention_logs, attention_outputs
from kvpipe.cache.capture import Recorder
from kvpipe.cache.kv import KV
from kvpipe.cache.teacher import Aligned
from kvpipe.config import TERMS
from kvpipe.config.terms import (
    AttentionKLConfig,
    AttentionTermConfig,
    CacheTermConfig,
    CrossEntropyConfig,
    FinalStateConfig,
    HiddenConfig,
    KeysConfig,
    LayerTermConfig,
    LikelihoodConfig,
    LogitsConfig,
    RelationsConfig,
    StatesTermConfig,
    TermSettings,
    ValuesConfig,
)
from kvpipe.data.batches import Batch
from kvpipe.distill.fusion import position_entropy
from kvpipe.distill.losses import (
    CrossEntropy,
    FullKL,
    Mixed,
    RowLoss,
    Schedule,
    TopKL,
    kv_loss,
    layer_kv_losses,
    masked_sum,
    pooled_std,
    relation_loss,
    row_divergence,
    row_nll,
    target_moments,
)
from kvpipe.distill.targets import FusedTarget
from kvpipe.models.head import Head
from kvpipe.models.likelihood import wide

Row = Float[Tensor, "_"]


@dataclass
class Student:
    """What a forward of the student shows: its final states and head, and what was recorded of its layers."""

    head: Head
    states: Float[Tensor, "batch time width"]
    recorder: Recorder | None = None
    progress: float = 0.0
    """Share of the steps that are done."""

    @property
    def _recorded(self) -> Recorder:
        if self.recorder is None:
            raise RuntimeError(
                "the student's forward was not recorded, and a term of the loss needs its keys and values"
            )
        return self.recorder

    @cached_property
    def keys(self) -> Float[Tensor, "layer batch head time dim"]:
        """Keys before rotation."""
        return self._recorded.keys()

    @cached_property
    def values(self) -> Float[Tensor, "layer batch head time value_dim"]:
        """Values."""
        return self._recorded.values()

    @property
    def kv(self) -> KV:
        """Both."""
        return KV(self.keys, self.values)

    @cached_property
    def queries(self) -> Float[Tensor, "layer batch query_head time dim"]:
        """Queries before rotation."""
        return self._recorded.queries()

    @cached_property
    def hidden(self) -> Float[Tensor, "layer batch time width"]:
        """What enters each layer."""
        return self._recorded.hidden_states()

    @property
    def ropes(self) -> list[Any]:
        """The rotary embedding of every layer."""
        return self._recorded.ropes


@dataclass
class Said:
    """What the teachers say of a batch."""

    rows: Sequence[Aligned | None] = ()
    """Of each teacher, the columns that some term needs."""
    top: Sequence[tuple[Tensor, Tensor, Tensor]] = ()
    """Ids, log-probabilities and mask of each teacher's candidates."""
    shares: Float[Tensor, "teacher batch"] | None = None
    """Weights of the teachers, where they are known without caches."""
    fused: FusedTarget | None = None
    """The projected, fused caches."""

    def __add__(self, other: Said) -> Said:
        """Of both batches, one below the other, padded to one length."""
        rows = [a + b if a is not None and b is not None else None for a, b in zip(self.rows, other.rows, strict=True)]
        top = [tuple(map(torch.cat, zip(a, b, strict=True))) for a, b in zip(self.top, other.top, strict=True)]
        shares = None if self.shares is None else torch.cat([self.weights, other.weights], dim=1)
        return Said(rows, top, shares)  # type: ignore[arg-type]

    def of(self, teacher: int) -> Aligned:
        """The columns of a teacher."""
        found = self.rows[teacher]
        assert found is not None
        return found

    @property
    def target(self) -> FusedTarget:
        """The fused caches."""
        assert self.fused is not None
        return self.fused

    @property
    def weights(self) -> Tensor:
        """Weights of the teachers for terms without caches."""
        assert self.shares is not None
        return self.shares


@dataclass(frozen=True)
class TeacherFacts:
    """What terms know of a teacher before any text: layers, width, which layers' inputs are kept, its head."""

    layers: int = 0
    width: int = 0
    hidden: tuple[int, ...] = ()
    head: Head | None = None


@dataclass(frozen=True)
class Facts:
    """What terms know before any text."""

    layers: int = 0
    """Of the student."""
    width: int = 0
    """Of the student's hidden state."""
    teachers: tuple[TeacherFacts, ...] = ()


class Term(nn.Module):
    """The interface; built from its settings and the models' facts."""

    def __init__(self, settings: Any, facts: Facts):
        super().__init__()
        self.settings = settings

    def weight(self, step: int, steps: int) -> float:
        """λ at a step."""
        schedule, weight = self.settings.schedule, self.settings.weight
        return Schedule(weight, schedule.kind, schedule.warmup, weight * schedule.final, schedule.until)(step, steps)

    def counted(self, batch: Batch, said: Said) -> Bool[Tensor, "batch time"]:
        """Positions that have a target."""
        return batch.mask

    def measure(self, batch: Batch, said: Said) -> Row:
        """A row of sums of a part; by default how many positions count."""
        return self.counted(batch, said).sum().float()[None]

    def whole(self, rows: Float[Tensor, "part _"]) -> Row:
        """What all parts' rows amount to."""
        return rows.sum(0)

    def forward(self, batch: Batch, said: Said, whole: Row, student: Student) -> Float[Tensor, ""]:
        """A part's share of the term."""
        raise NotImplementedError

    def watch(self, whole: Row) -> dict[str, tuple[float, float]]:
        """Numbers worth logging of the part that `forward` has seen last, each a sum and what it is divided by."""
        return {}


class HeadTerm(Term):
    """A term that is a sum over rows of the student's logits, all of which are made once, a piece at a time.

    `counted` marks the rows that predict, each the token after its own.
    """

    def row_loss(self, batch: Batch, said: Said, rows: Int64[Tensor, "row"]) -> tuple[RowLoss, Float[Tensor, "row"]]:
        """The loss of some rows of the flattened batch, and how much each counts (0: not at all)."""
        raise NotImplementedError


@TERMS.built_from(CrossEntropyConfig)
class CrossEntropyTerm(HeadTerm):
    """−log p of the text's own tokens."""

    def counted(self, batch: Batch, said: Said) -> Tensor:
        """Rows before a token that carries a label."""
        return nn.functional.pad(batch.predicted[:, 1:], (0, 1))

    def row_loss(self, batch: Batch, said: Said, rows: Tensor) -> tuple[RowLoss, Tensor]:
        """The token after each row."""
        following = nn.functional.pad(batch.input_ids[:, 1:], (0, 1)).flatten()
        return CrossEntropy(following[rows]), self.counted(batch, said).flatten()[rows].float()


class LayerTerm(Term):
    """The student's cache against the fused one, layer by layer."""

    settings: LayerTermConfig
    seen: tuple[Tensor, Tensor]
    """Losses ``(layer, batch, time)`` of the last forward, and where they count."""

    @property
    def layers(self) -> Any:
        """Index of the layers that are matched."""
        return slice(None) if self.settings.layers is None else list(self.settings.layers)

    def counted(self, batch: Batch, said: Said) -> Tensor:
        """Where some teacher has a target, the first positions left out as set."""
        mask = batch.mask & said.target.mask
        mask[:, : self.settings.skip_sink] = False
        return mask

    def added(self, losses: Float[Tensor, "layer batch time"], mask: Tensor, whole: Row, progress: float) -> Tensor:
        """A part's share of the mean over layers, each by how far it is open."""
        self.seen = losses.detach(), mask
        if self.settings.opening:
            depth = torch.arange(len(losses), device=losses.device)
            share = (len(losses) * progress / self.settings.opening - depth).clamp(0, 1)
            losses = losses * share[:, None, None]
        return masked_sum(losses.mean(0), mask) / whole[0].clamp(min=1)

    def watch(self, whole: Row) -> dict[str, tuple[float, float]]:
        """The loss of each layer."""
        losses, mask = self.seen
        sums = losses.masked_fill(~mask, 0).sum((1, 2)).tolist()
        layers = range(len(sums)) if self.settings.layers is None else self.settings.layers
        count, name = float(mask.sum()), self.settings.kind
        return {f"layer/{name}/{layer}": (total, count) for layer, total in zip(layers, sums, strict=True)}

    def mixed(self, said: Said, student: Student, batch: Batch) -> tuple[list[KV], tuple[Tensor, list[Any], Tensor]]:
        """The student's own cache and the fused one, and what reads them: queries, rotary embeddings, positions.

        Where there is no target the student's own entry, detached, stands in the fused one; queries are detached.
        """
        fused, own, chosen = said.target.fused, student.kv, self.layers
        inside = (said.target.mask & batch.mask)[None, :, None, :, None]
        pairs = ((fused.keys, own.keys), (fused.values, own.values))
        target = [torch.where(inside, there, here.detach())[chosen] for there, here in pairs]
        queries, ropes = student.queries.detach()[chosen], _chosen(student.ropes, chosen)
        read = queries, ropes, positions_from_mask(batch.attention_mask)
        return [KV(own.keys[chosen], own.values[chosen]), KV(*target)], read


class CacheTerm(LayerTerm):
    """Distance of two caches."""

    settings: CacheTermConfig

    def target(self, said: Said) -> Float[Tensor, "layer batch head time dim"]:
        """Keys or values of the layers that are matched."""
        raise NotImplementedError

    @torch.no_grad()
    def measure(self, batch: Batch, said: Said) -> Row:
        """Positions that count, and moments of every layer's target."""
        mask = self.counted(batch, said)
        moments = target_moments(self.target(said), mask).flatten()
        return torch.cat([mask.sum().to(moments)[None], moments])

    def whole(self, rows: Tensor) -> Row:
        """The count, and the target's deviation in every layer."""
        moments = rearrange(rows[:, 1:], "part (stat layer) -> part stat layer", stat=3)
        return torch.cat([rows[:, 0].sum(0, keepdim=True), pooled_std(moments)])

    def distance(self, own: Tensor, target: Tensor, mask: Tensor, whole: Row, progress: float) -> Tensor:
        """A part's share, of either side's tensors."""
        scale = whole[1:] if self.settings.scale == "std" else None
        losses = layer_kv_losses(own, target, mask, self.settings.distance, scale)
        return self.added(losses, mask, whole, progress)

    def watch(self, whole: Row) -> dict[str, tuple[float, float]]:
        """The target's deviation too: a falling one means that a trainable projector collapses."""
        return {f"target_std_{self.settings.kind}": (whole[1:].mean().item(), 1.0), **super().watch(whole)}


@TERMS.built_from(KeysConfig)
class KeysTerm(CacheTerm):
    """Keys before rotary embedding."""

    def target(self, said: Said) -> Tensor:
        """The fused keys."""
        return said.target.fused.keys[self.layers]

    def forward(self, batch: Batch, said: Said, whole: Row, student: Student) -> Tensor:
        """Against the student's."""
        mask, own = self.counted(batch, said), student.keys[self.layers]
        return self.distance(own, self.target(said), mask, whole, student.progress)


@TERMS.built_from(ValuesConfig)
class ValuesTerm(CacheTerm):
    """Values."""

    def target(self, said: Said) -> Tensor:
        """The fused values."""
        return said.target.fused.values[self.layers]

    def forward(self, batch: Batch, said: Said, whole: Row, student: Student) -> Tensor:
        """Against the student's."""
        mask, own = self.counted(batch, said), student.values[self.layers]
        return self.distance(own, self.target(said), mask, whole, student.progress)


@TERMS.built_from(AttentionTermConfig)
class AttentionTerm(ValuesTerm):
    """What the student's queries, detached, read from its own cache and from the fused one.

    Where there is no target the student's own entry stands on both sides. Scaled by the values' deviation.
    """

    def forward(self, batch: Batch, said: Said, whole: Row, student: Student) -> Tensor:
        """Distance of the two attention outputs."""
        caches, (queries, ropes, positions) = self.mixed(said, student, batch)
        own, target = (attention_outputs(queries, kv, ropes, positions) for kv in caches)
        return self.distance(own, target, self.counted(batch, said), whole, student.progress)


@TERMS.built_from(AttentionKLConfig)
class AttentionKLTerm(LayerTerm):
    """KL(fused ‖ own) of the causal attention weights that the student's queries, detached, give either side's keys.

    The mean over query heads, per position. Where there is no target the student's own key stands on both sides.
    """

    def forward(self, batch: Batch, said: Said, whole: Row, student: Student) -> Tensor:
        """Layer by layer."""
        (own, target), (queries, ropes, positions) = self.mixed(said, student, batch)
        logs = (attention_logs(queries, kv.keys, ropes, positions) for kv in (own, target))
        losses = torch.stack([row_divergence(ours, theirs).mean(1) for ours, theirs in zip(*logs, strict=True)])
        return self.added(losses, self.counted(batch, said), whole, student.progress)


@TERMS.built_from(LogitsConfig)
class LogitsTerm(HeadTerm):
    """KL from each teacher's next-token distribution, the teachers weighed by the fusion's known weights."""

    settings: LogitsConfig

    def __init__(self, settings: LogitsConfig, facts: Facts):
        super().__init__(settings, facts)
        self.heads = [teacher.head for teacher in facts.teachers]

    def masks(self, said: Said) -> list[Tensor]:
        """Of each teacher, where it predicts the student's next token."""
        if self.settings.candidates == "top":
            return [mask for _, _, mask in said.top]
        return [said.of(teacher).mask for teacher in range(len(self.heads))]

    def counted(self, batch: Batch, said: Said) -> Tensor:
        """Where some teacher predicts."""
        return torch.stack([mask.to(batch.mask.device) for mask in self.masks(said)]).any(0)

    def measure(self, batch: Batch, said: Said) -> Row:
        """All tokens: a teacher that predicts few of them says little."""
        return batch.mask.sum().float()[None]

    def row_loss(self, batch: Batch, said: Said, rows: Tensor) -> tuple[RowLoss, Tensor]:
        """The teachers' divergences, mixed."""
        device, length = batch.mask.device, batch.mask.shape[1]
        shares = said.weights.to(device).repeat_interleave(length, dim=1)[:, rows]
        parts: list[tuple[RowLoss, Tensor]] = []
        for teacher, mask in enumerate(self.masks(said)):
            share = shares[teacher] * mask.to(device).flatten()[rows]
            parts.append((self._of(teacher, said, rows, device), share))
        return Mixed(parts), torch.ones(len(rows), device=device)

    def _of(self, teacher: int, said: Said, rows: Tensor, device: torch.device) -> RowLoss:
        temperature = self.settings.temperature
        if self.settings.candidates == "top":
            ids, logprobs, mask = (x.to(device).flatten(0, 1)[rows] for x in said.top[teacher])
            return TopKL(ids, logprobs, mask, temperature)
        head = self.heads[teacher]
        if head is None or head.weight is None:
            raise ValueError(
                "loss.logits.candidates: all needs the teacher's head, and this family's is not known; use top"
            )
        weight = head.weight
        states = said.of(teacher).columns["states"].flatten(0, 1).to(device)[rows].to(weight.dtype)
        return FullKL(head, states.to(weight.device), temperature)


@TERMS.built_from(LikelihoodConfig)
class LikelihoodTerm(Term):
    """Binary KL between a teacher's and the student's probability of each piece of text (arXiv:2503.20083).

    A piece is the shortest run of student tokens that ends where a teacher's token ends, so any two tokenizers can be
    compared. Probabilities are taken to the power 1/τ.
    """

    settings: LikelihoodConfig

    def forward(self, batch: Batch, said: Said, whole: Row, student: Student) -> Tensor:
        """The teachers' divergences by their weights, per token."""
        device = student.states.device
        predicts = (batch.mask[:, 1:] & batch.mask[:, :-1]).to(device)
        states, targets = student.states[:, :-1][predicts], batch.input_ids[:, 1:][predicts]
        own = torch.zeros(batch.mask.shape, dtype=wide(states[:0]).dtype, device=device)
        own[:, 1:][predicts] = row_nll(student.head, states, targets).to(own)
        total = own.new_zeros(())
        for teacher in range(len(said.rows)):
            columns = said.of(teacher).columns
            ends = columns["ends"].to(own) * batch.mask
            # the piece of a token is told by how many have ended before it; what follows the last end is none
            piece = (ends.cumsum(1) - ends).long()
            there = piece < ends.sum(1, keepdim=True)
            sums = [
                torch.zeros_like(own).scatter_add(1, piece, nats.masked_fill(~there, 0))
                for nats in (columns["nll"].to(own) * batch.mask, own)
            ]
            pieces = ends.sum(1).long()
            number = torch.arange(own.shape[1], device=device)
            exists = (number > 0) & (
                number < pieces[:, None]
            )  # of the first, one side may have nothing to predict it from
            theirs, ours = (-x / self.settings.temperature for x in sums)
            share = said.weights.to(device)[teacher][:, None]
            total = total + (_binary_kl(theirs, ours).masked_fill(~exists, 0) * share).sum()
        return total / whole[0].clamp(min=1)


@TERMS.built_from(RelationsConfig)
class RelationsTerm(Term):
    """MiniLMv2: key-key and value-value relations of the last layer of one teacher."""

    settings: RelationsConfig

    def counted(self, batch: Batch, said: Said) -> Tensor:
        """Where the teacher has a target."""
        return batch.mask & said.of(0).mask.to(batch.mask.device)

    def forward(self, batch: Batch, said: Said, whole: Row, student: Student) -> Tensor:
        """Both relations."""
        mask, own, rows = self.counted(batch, said), student.kv, said.of(0)
        total = own.keys.new_zeros(())
        for ours, theirs in ((own.keys, rows.keys), (own.values, rows.values)):
            teacher = theirs[:, :, -1].transpose(1, 2).to(ours.device)
            total = total + masked_sum(relation_loss(ours[-1], teacher, mask, self.settings.heads), mask)
        return total / whole[0].clamp(min=1)


class StatesTerm(Term):
    """Distance of states, each through a linear map to the teacher's width where the widths differ.

    The map trains with the student. It cannot collapse: the teacher's state on the other side is fixed.
    """

    settings: StatesTermConfig

    def __init__(self, settings: StatesTermConfig, facts: Facts):
        super().__init__(settings, facts)
        self.number = len(getattr(settings, "layers", [0]))
        self.maps = nn.ModuleList(
            nn.ModuleList(self._map(facts.width, t.width) for _ in range(self.number)) for t in facts.teachers
        )

    @staticmethod
    def _map(width: int, theirs: int) -> nn.Module:
        if width == theirs:
            return nn.Identity()
        linear = nn.Linear(width, theirs, bias=False)
        nn.init.orthogonal_(linear.weight)
        return linear

    def own(self, student: Student) -> Float[Tensor, "layer batch time width"]:
        """The student's states."""
        raise NotImplementedError

    def theirs(self, said: Said, teacher: int) -> Float[Tensor, "layer batch time width"]:
        """A teacher's."""
        raise NotImplementedError

    def _masks(self, batch: Batch, said: Said) -> list[Tensor]:
        return [batch.mask & said.of(t).mask.to(batch.mask.device) for t in range(len(self.maps))]

    @torch.no_grad()
    def measure(self, batch: Batch, said: Said) -> Row:
        """Positions of all teachers, by their weights, and moments of every teacher's layers."""
        shares, device = said.weights, batch.mask.device
        masks = self._masks(batch, said)
        count = sum((mask * share[:, None].to(device)).sum() for mask, share in zip(masks, shares, strict=True))
        moments = [
            target_moments(self.theirs(said, t).to(device).double()[:, :, None], mask).flatten()
            for t, mask in enumerate(masks)
        ]
        return torch.cat([torch.as_tensor(count, device=device).to(moments[0])[None], *moments])

    def whole(self, rows: Tensor) -> Row:
        """The count, and deviations."""
        moments = rearrange(
            rows[:, 1:], "part (teacher stat layer) -> part stat (teacher layer)", stat=3, layer=self.number
        )
        return torch.cat([rows[:, 0].sum(0, keepdim=True), pooled_std(moments)])

    def forward(self, batch: Batch, said: Said, whole: Row, student: Student) -> Tensor:
        """The teachers' distances by their weights."""
        own, total = self.own(student), student.states.new_zeros((), dtype=wide(student.states[:0]).dtype)
        deviations = rearrange(whole[1:], "(teacher layer) -> teacher layer", layer=self.number)
        for teacher, mask in enumerate(self._masks(batch, said)):
            theirs = self.theirs(said, teacher).to(own.device)
            mapped = torch.stack([m(x) for m, x in zip(self.maps[teacher], own, strict=True)])  # type: ignore[call-overload]
            loss = kv_loss(mapped[:, :, None], theirs[:, :, None], mask, self.settings.distance, deviations[teacher])
            share = said.weights.to(loss)[teacher][:, None]
            total = total + masked_sum(loss * share, mask)
        return total / whole[0].clamp(min=1e-12)


@TERMS.built_from(HiddenConfig)
class HiddenTerm(StatesTerm):
    """What enters some layers, against the teachers' at the same depth."""

    settings: HiddenConfig

    def __init__(self, settings: HiddenConfig, facts: Facts):
        super().__init__(settings, facts)
        self.places = [
            [t.hidden.index(layer) for layer in teacher_layers(settings, t.layers, facts.layers)]
            for t in facts.teachers
        ]

    def own(self, student: Student) -> Tensor:
        """Of the layers that are matched."""
        return student.hidden[self.settings.layers]

    def theirs(self, said: Said, teacher: int) -> Tensor:
        """Of the layers at their depth."""
        return rearrange(
            said.of(teacher).columns["hidden"][:, :, self.places[teacher]],
            "batch time layer width -> layer batch time width",
        )


@TERMS.built_from(FinalStateConfig)
class FinalStateTerm(StatesTerm):
    """What the head is given."""

    def own(self, student: Student) -> Tensor:
        """The student's, as one layer."""
        return student.states[None]

    def theirs(self, said: Said, teacher: int) -> Tensor:
        """The teacher's."""
        return said.of(teacher).columns["states"][None]


class EntropyTerm(Term):
    """Minus the entropy of a fusion's weights where teachers are a choice: keeps learned weights from collapsing."""

    def __init__(self, weight: float):
        super().__init__(TermSettings(weight=weight), Facts())

    def measure(self, batch: Batch, said: Said) -> Row:
        """Positions with at least two teachers."""
        return (said.target.present.sum(0) >= 2).sum().float()[None]

    def forward(self, batch: Batch, said: Said, whole: Row, student: Student) -> Tensor:
        """Of the fused target's weights."""
        share, _ = position_entropy(said.target.fused.weights, said.target.present)
        return -share.sum() / whole[0].clamp(min=1)


def teacher_layers(settings: HiddenConfig, src_layers: int, dst_layers: int) -> list[int]:
    """The teacher's layers at the depth of the student layers that are matched.

    Raises:
        ValueError: the student has no such layer.
    """
    if any(not -dst_layers <= layer < dst_layers for layer in settings.layers):
        raise ValueError(
            f"loss.hidden.layers: {settings.layers}; the student's layers are 0 to {dst_layers - 1}, or −1, …"
        )
    depth = proportional_map(src_layers, dst_layers)
    return [depth[layer] for layer in settings.layers]


def _chosen(items: list[Any], index: Any) -> list[Any]:
    return items[index] if isinstance(index, slice) else [items[i] for i in index]


def _binary_kl(theirs: Tensor, ours: Tensor) -> Tensor:
    """KL(p ‖ q) of two coins from log p and log q, both kept off 0 and 1."""
    theirs, ours = (x.clamp(-50, -1e-6) for x in (theirs, ours))
    p, rest, our_rest = theirs.exp(), torch.log(-torch.expm1(theirs)), torch.log(-torch.expm1(ours))
    return p * (theirs - ours) + (1 - p) * (rest - our_rest)
