"""An arm's whole loss: its terms, and what they need of the teachers, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from kvpipe.align.timemap import shared_spans
from kvpipe.cache.forward import Keep, forward_rows
from kvpipe.cache.teacher import COLUMNS, Aligned, AlignedTeacher
from kvpipe.data.batches import Batch
from kvpipe.data.encoding import Encoding
from kvpipe.distill.fusion import Fusion
from kvpipe.distill.losses import head_losses
from kvpipe.distill.targets import FusedTargets
from kvpipe.distill.terms import HeadTerm, Row, Said, Student, Term
from kvpipe.tokens.matrix import common_prefix_positions

RECORDED = frozenset({"own_kv", "own_queries", "own_hidden"})


@dataclass(frozen=True)
class Loss:
    """The loss of a part of a batch."""

    total: Float[Tensor, ""]
    """The weighted sum, with its graph."""
    values: dict[str, Float[Tensor, ""]]
    """Each term, without its weight and its graph."""
    weights: dict[str, float]
    watch: Callable[[], dict[str, tuple[float, float]]]
    """Numbers worth logging, each a sum and what it is divided by; computed only when asked for."""


class Objective(nn.Module):
    """The terms of an arm, over one interface for the trainer and for anybody's loop.

    A batch comes in parts, micro-batches and processes. `read` asks the teachers, once a part; `resolve` makes of it what
    the student is held against; `measure` gives a row of sums of each term, and `whole` what the rows of all parts amount
    to; `loss` is a part's share of the whole's. A call is all of them, for a batch in one part.

    Args:
        terms: by name.
        needs: what they and the fusion ask for.
        tasks: of every example, for weights and logs.
        teachers: their rows on the student's positions.
        targets: their caches, projected and fused.
        top: their candidates for the next token.
        fusion: knows the teachers' weights for terms without caches.
    """

    unit: Tensor

    def __init__(
        self,
        terms: Mapping[str, Term],
        needs: frozenset[str] = frozenset(),
        tasks: np.ndarray | None = None,
        teachers: Sequence[AlignedTeacher] = (),
        targets: FusedTargets | None = None,
        top: Sequence[TopLogits] = (),
        fusion: Fusion | None = None,
    ):
        super().__init__()
        # says on which device and in which precision the objective computes
        self.register_buffer("unit", torch.ones(()), persistent=False)
        # a ModuleDict takes no name that its own methods have, such as keys
        self.terms, self.trained = dict(terms), nn.ModuleList(terms.values())
        self.needs, self.tasks, self.teachers, self.targets = needs, tasks, list(teachers), targets
        # not a submodule: where it makes the targets too, it is one of theirs
        self.top, self.known = list(top), [] if fusion is None else [fusion]

    # ------------------------------------------------------------ what it asks for
    @property
    def records(self) -> bool:
        """Whether the student's keys, values, queries or hidden states are looked at."""
        return bool(self.needs & RECORDED)

    @property
    def records_hidden(self) -> bool:
        """Whether what enters the student's layers is."""
        return "own_hidden" in self.needs

    @property
    def records_queries(self) -> bool:
        """Whether its queries are."""
        return "own_queries" in self.needs

    @property
    def reads_student(self) -> bool:
        """Whether the target depends on the student's forward."""
        return self.targets is not None and self.targets.reads_student

    def columns(self, teacher: int) -> tuple[str, ...]:
        """What is read of a teacher."""
        wanted = {name for term in self.terms.values() for name in getattr(term.settings, "needs", ())}
        fused = self.targets.columns[teacher] if self.targets is not None else ()
        return tuple(name for name in COLUMNS if name in wanted or name in fused)

    # ------------------------------------------------------------ one batch
    def read(self, batch: Batch, other: OtherTexts | None = None) -> Said:
        """What the teachers say of a part, of its training texts or of others; nothing here depends on what trains."""
        length = batch.input_ids.shape[1]
        texts = other or OtherTexts(self.teachers, self.top, batch.examples)
        rows: list[Aligned | None] = []
        for number, teacher in enumerate(texts.teachers):
            columns = self.columns(number)
            rows.append(teacher.aligned(texts.places, length, columns) if columns else None)
        return self.said(batch, rows, [entry.padded(texts.places, length) for entry in texts.top])

    def settled(self, batch: Batch, said: Said) -> Said:
        """With the fused caches where nothing in them trains or looks at the student: made before there is a graph, they
        need not keep beside it what they are made of."""
        if self.targets is None or self.targets.trains or self.reads_student:
            return said
        looked = {name for term in self.terms.values() for name in getattr(term.settings, "needs", ())}
        dropped = {"keys", "values"} - looked
        fused = self.resolve(batch, said).fused
        rows = [
            None if one is None else replace(one, columns={n: x for n, x in one.columns.items() if n not in dropped})
            for one in said.rows
        ]
        return Said(rows, said.top, said.shares, fused)

    def said(
        self, batch: Batch, rows: Sequence[Aligned | None], top: Sequence[tuple[Tensor, Tensor, Tensor]] = ()
    ) -> Said:
        """The same of rows that somebody else has read."""
        return Said(rows, top, self._shares(batch))

    def resolve(self, batch: Batch, said: Said, student: Student | None = None) -> Said:
        """With the caches projected and fused, by the forward that was just recorded where the fusion looks at it."""
        if self.targets is None or said.fused is not None:
            return said

        def seen() -> Student:
            assert student is not None
            return student

        fused = self.targets(
            batch.examples,
            batch.input_ids.shape[1],
            said.rows,
            self.unit,
            self._tasks(batch),
            lambda: seen().queries,
            lambda: seen().hidden,
        )
        return Said(said.rows, said.top, said.shares, fused)

    @torch.no_grad()
    def measure(self, batch: Batch, said: Said) -> dict[str, Row]:
        """Sums of a part, a row for each term."""
        return {name: term.measure(batch, said).to(self.unit) for name, term in self.terms.items()}

    def whole(self, rows: Mapping[str, Float[Tensor, "part _"]]) -> dict[str, Row]:
        """What all parts' rows amount to, by term."""
        return {name: term.whole(rows[name]) for name, term in self.terms.items()}

    def loss(
        self,
        batch: Batch,
        said: Said,
        whole: Mapping[str, Row],
        student: Student,
        progress: tuple[int, int] = (0, 1),
        only: str | None = None,
    ) -> Loss:
        """A part's share of a batch's loss; with `only`, the total is that term alone, at weight 1.

        Args:
            batch: the part.
            said: resolved.
            whole: over all parts.
            student: the forward.
            progress: (step, steps).
            only: name of a term.
        """
        student.progress = progress[0] / max(progress[1], 1)
        weights: dict[str, float] = {name: term.weight(*progress) for name, term in self.terms.items()}
        counts = weights if only is None else {name: float(name == only) for name in weights}
        heads = {name: term for name, term in self.terms.items() if isinstance(term, HeadTerm)}
        total, values = self._of_head(batch, said, whole, student, heads, counts)
        for name, term in self.terms.items():
            if name not in heads:
                value = term(batch, said, whole[name], student)
                values[name] = value.detach()
                total = total + counts[name] * value if counts[name] else total
        return Loss(total, values, weights, lambda: self._watch(batch, said, whole))

    def _of_head(
        self,
        batch: Batch,
        said: Said,
        whole: Mapping[str, Row],
        student: Student,
        terms: Mapping[str, HeadTerm],
        weights: Mapping[str, float],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The terms on the student's logits, which are made of the rows that count and of no other."""
        if not terms:
            return self.unit.new_zeros(()), {}
        counted = torch.stack([term.counted(batch, said).flatten() for term in terms.values()]).any(0)
        rows = counted.nonzero()[:, 0]
        losses = {}
        for name, term in terms.items():
            loss, shares = term.row_loss(batch, said, rows)
            losses[name] = (loss, shares / whole[name][0].clamp(min=1))
        total, values = head_losses(student.head, student.states.flatten(0, 1)[rows], losses, weights)
        return total, dict(values)

    def forward(
        self, batch: Batch, student: Student, progress: tuple[int, int] = (0, 1), said: Said | None = None
    ) -> Loss:
        """The loss of a batch in one part; `said` where the teachers have been asked already."""
        said = self.resolve(batch, self.read(batch) if said is None else said, student)
        whole = self.whole({name: row[None] for name, row in self.measure(batch, said).items()})
        return self.loss(batch, said, whole, student, progress)

    # ------------------------------------------------------------ helpers
    def _tasks(self, batch: Batch) -> list[str]:
        return [""] * len(batch.examples) if self.tasks is None else list(self.tasks[batch.examples])

    def _shares(self, batch: Batch) -> Tensor | None:
        """Weights of the teachers for terms without caches."""
        teachers = len(self.teachers) or len(self.top)
        if teachers == 1:
            return torch.ones(1, len(batch.examples))
        if not self.known or not teachers:
            return None
        return self.known[0].prior(teachers, self._tasks(batch)).detach().softmax(0)

    @torch.no_grad()
    def _watch(self, batch: Batch, said: Said, whole: Mapping[str, Row]) -> dict[str, tuple[float, float]]:
        out = {key: value for name, term in self.terms.items() for key, value in term.watch(whole[name]).items()}
        if self.targets is not None:
            mask = batch.mask & said.target.mask
            out["masked_share"] = (float(batch.mask.sum() - mask.sum()), float(batch.mask.sum()))
            out |= self.targets.watch(said.target, mask, np.array(self._tasks(batch)))
        return out


@dataclass(frozen=True)
class OtherTexts:
    """Texts that the teachers have read in the place of a batch's own."""

    teachers: Sequence[AlignedTeacher]
    top: Sequence[TopLogits]
    places: Int64[np.ndarray, "batch"]
    """Numbers of the batch's texts among them."""


@dataclass(frozen=True)
class TopLogits:
    """A teacher's most likely next tokens on the student's rows, as student ids (−1: it has none); masked where not
    aligned."""

    ids: Int64[Tensor, "dst_row top"]
    logprobs: Float[Tensor, "dst_row top"]
    mask: Tensor
    offsets: np.ndarray

    @classmethod
    def live(
        cls,
        model: Any,
        src: Encoding,
        dst: Encoding,
        same: Int64[Tensor, "src_token"],
        top: int,
        batch_size: int,
        pad_id: int,
    ) -> TopLogits:
        """Those of a teacher that reads all texts now; see `on_student`."""
        rows = forward_rows(model, src, np.arange(len(src)), Keep(top=top), batch_size, pad_id).named()
        pairs = common_prefix_positions(*shared_spans(src, dst))
        return cls.on_student(rows["top_ids"], rows["top_logprobs"], pairs, same, dst.offsets)

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
