"""The loss of one optimizer step and its gradients: over micro-batches and processes as over the whole batch."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from kvpipe.cache.capture import Recorder
from kvpipe.config.arms import CROSS_ENTROPY
from kvpipe.data.batches import IGNORE, Batch, collate, spread
from kvpipe.distill.fusion import mean_weights
from kvpipe.distill.losses import check_finite
from kvpipe.distill.objective import Loss, Objective, OtherTexts
from kvpipe.distill.terms import Row, Said, Student
from kvpipe.models.head import Head, final_states
from kvpipe.train.cell import Cell
from kvpipe.train.shard import gathered, is_sharded, unreduced

if TYPE_CHECKING:
    from accelerate import Accelerator

ROUTED = 24
"""Training examples whose fusion weights are noted at the end."""


@dataclass
class Part:
    """A micro-batch of this process, and what the teachers say of it."""

    batch: Batch
    said: Said


@dataclass
class StepBatch:
    """A step's batch: this process's parts; `whole` is what all parts of all processes amount to."""

    step: int
    parts: list[Part]
    logged: bool
    whole: dict[str, Row] | None


class Pull(NamedTuple):
    """A term of a batch's loss before its weight: its value, its weight λ, the norm of its gradient on the student."""

    value: float
    weight: float
    norm: float


class BatchLoss:
    """The loss of the batches of one cell.

    Args:
        cell: gives encoding, settings and seed.
        model: the student as accelerate wraps it.
        objective: the arm's terms, on its device.
        accelerator: of this process.
    """

    def __init__(self, cell: Cell, model: nn.Module, objective: Objective, accelerator: Accelerator):
        self.cell, self.config, self.encoding = cell, cell.config, cell.train
        self.model, self.objective, self.accelerator = model, objective, accelerator
        self.device, self.sharded = accelerator.device, is_sharded(model)
        self.head = Head.of(accelerator.unwrap_model(model))

    def begin(self, step: int, examples: np.ndarray, recorder: Recorder | None, logged: bool) -> StepBatch:
        """A step's batch, its teachers asked and what its terms are divided by measured."""
        marked = np.stack([examples, self.written(step, examples)], axis=1)
        own = self.split(marked)[self.accelerator.process_index :: self.accelerator.num_processes]
        batch = StepBatch(step, [self._part(*micro.T) for micro in own], logged, None)
        if len(batch.parts) > 1:
            batch.whole = self._measure(batch, recorder)
        return batch

    def written(self, step: int, examples: np.ndarray) -> np.ndarray:
        """Which of a step's examples have a text of the student's own."""
        online = self.cell.online
        return np.zeros(len(examples), dtype=bool) if online is None else online.chosen(step, examples)

    def split(self, examples: np.ndarray) -> list[np.ndarray]:
        """The micro-batches of all processes."""
        return np.array_split(examples, self.accelerator.num_processes * self.config.accumulate)

    def zero_grad(self) -> None:
        """Forget the gradients of the student and of the objective."""
        for module in (self.model, self.objective):
            module.zero_grad(set_to_none=True)

    def _part(self, examples: np.ndarray, written: np.ndarray) -> Part:
        """A micro-batch; its teachers are asked here and not again. Texts of the student's own come last, without labels."""
        online, given = self.cell.online, examples[written == 0]
        if online is None or len(given) == len(examples):
            batch = collate(self.encoding, examples, self.cell.pad_id, self.config.loss_on).to(self.device)
            return Part(batch, self.objective.settled(batch, self.objective.read(batch)))
        own = examples[written == 1]
        places = online.places(own)
        both = self.encoding.taken(given) + online.encoding.taken(places)
        batch = collate(both, np.arange(len(both)), self.cell.pad_id, self.config.loss_on)
        batch = replace(batch, examples=np.concatenate([given, own])).to(self.device)
        batch.labels[len(given) :] = IGNORE
        said = self.objective.read(batch[len(given) :], OtherTexts(online.aligned, online.candidates, places))
        said = self.objective.read(batch[: len(given)]) + said if len(given) else said
        return Part(batch, self.objective.settled(batch, said))

    def _whole(self, rows: list[dict[str, Row]]) -> dict[str, Row]:
        """What the rows that were measured of micro-batches amount to over all processes."""
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return self.objective.whole({name: self.accelerator.gather(row) for name, row in stacked.items()})

    def _draw(self, step: int) -> None:
        """Begin the random numbers of a step (dropout): each process its own, and every pass over a batch the same."""
        seeds = [self.cell.drawn, step, self.accelerator.process_index]
        state = np.random.SeedSequence(seeds).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]))

    @torch.no_grad()
    def _measure(self, batch: StepBatch, recorder: Recorder | None) -> dict[str, Row]:
        """What the terms of micro-batches are divided by; one micro-batch measures itself in its own forward."""
        self._draw(batch.step)
        rows = []
        for part in batch.parts:
            student = self._forward(part.batch, recorder) if self.objective.reads_student else None
            rows.append(self.objective.measure(part.batch, self.objective.resolve(part.batch, part.said, student)))
        return self._whole(rows)

    def gradients(
        self, batch: StepBatch, recorder: Recorder | None, only: str | None = None
    ) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        """Gradients of a batch's loss; gives the terms, their weights λ and what is watched, all of the whole batch.

        With `only`, gradients of that term alone, at weight 1.
        """
        self._draw(batch.step)
        processes = self.accelerator.num_processes
        sums: dict[str, Any] = {}
        watched: list[dict[str, tuple[float, float]]] = []
        weights: dict[str, float] = {}
        for number, part in enumerate(batch.parts):
            last = number == len(batch.parts) - 1
            reduced = last and (only is None or self.sharded)
            with nullcontext() if reduced else unreduced(self.model, self.accelerator):
                loss = self._loss(batch, part, recorder, only)
                for name, value in loss.values.items():
                    sums[name] = sums.get(name, 0.0) + value
                weights, total = loss.weights, loss.total * processes  # which average their gradients
                if only is None:
                    self.accelerator.backward(total)
                elif total.requires_grad:
                    total.backward()
            if batch.logged and only is None:
                watched.append(loss.watch())
        self._average_gradients(self.objective)  # which is not inside DDP, as the student is
        whole = self.accelerator.reduce(torch.stack(list(sums.values())), "sum")
        values = dict(zip(sums, whole, strict=True))
        check_finite(values, batch.step + 1)
        return {name: value.item() for name, value in values.items()}, weights, self._watched(watched)

    def _average_gradients(self, module: nn.Module) -> None:
        """Over processes."""
        if self.accelerator.num_processes > 1:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    parameter.grad = self.accelerator.reduce(own, "mean")

    def _watched(self, parts: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
        """Sums over all parts of all processes, divided."""
        if self.accelerator.num_processes > 1 and parts:
            from accelerate.utils import gather_object

            parts = gather_object(parts)
        names = dict.fromkeys(name for part in parts for name in part)
        totals = {name: np.sum([part[name] for part in parts if name in part], axis=0).tolist() for name in names}
        return {name: above / below for name, (above, below) in totals.items() if below}

    @torch.no_grad()
    def router(self, recorder: Recorder | None) -> dict[str, Any] | None:
        """Mean weight of each teacher in each layer, `(example, layer, teacher)`, on training examples from all over the
        split; None where there are not several teachers' caches. All processes compute the same."""
        targets = self.objective.targets
        if targets is None or len(targets.targets) == 1:
            return None
        examples, weights = self.cell.examples[spread(len(self.cell.examples), ROUTED)], []
        for example in examples:
            part = self._part(np.array([example]), np.zeros(1, dtype=bool))
            student = self._forward(part.batch, recorder) if self.objective.reads_student else None
            target = self.objective.resolve(part.batch, part.said, student).target
            shown = mean_weights(target.fused.weights, [""], part.batch.mask & target.mask)[""]
            weights.append([[round(weight, 4) for weight in layer] for layer in shown.tolist()])
        return {"examples": examples.tolist(), "teachers": [t.name for t in targets.targets], "weights": weights}

    def _forward(self, batch: Batch, recorder: Recorder | None) -> Student:
        """The student's forward, without logits."""
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        states, _ = final_states(self.model, self.head, **inputs)
        return Student(self.head, states, recorder)

    def _loss(self, batch: StepBatch, part: Part, recorder: Recorder | None, only: str | None) -> Loss:
        """A micro-batch's share of the loss."""
        student = self._forward(part.batch, recorder)
        said, whole = self.objective.resolve(part.batch, part.said, student), batch.whole
        if whole is None:
            whole = self._whole([self.objective.measure(part.batch, said)])
        return self.objective.loss(part.batch, said, whole, student, (batch.step, self.config.steps), only)

    def pulls(self, batch: StepBatch, recorder: Recorder | None) -> dict[str, Pull]:
        """How hard each term pulls at the student."""
        found = {}
        for name in self.objective.terms:
            values, weights, _ = self.gradients(batch, recorder, name)
            if not self.sharded:
                self._average_gradients(self.model)
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            squares = sum((g.float().square().sum() for g in grads), torch.zeros(()))
            norm = float(gathered(squares)) ** 0.5
            found[name] = Pull(values[name], weights[name], norm)
            self.zero_grad()
        return found

    def gradient_ratios(self, batch: StepBatch, recorder: Recorder | None) -> dict[str, float]:
        """Norm of each weighted term's gradient on the student, relative to that of the cross-entropy."""
        names = [name for name in self.objective.terms if name != CROSS_ENTROPY]
        if len(names) == len(self.objective.terms) or not names:
            return {}
        weighted = {name: pull.weight * pull.norm for name, pull in self.pulls(batch, recorder).items()}
        return {f"grad_ratio_{name}": weighted[name] / max(weighted[CROSS_ENTROPY], 1e-12) for name in names}
