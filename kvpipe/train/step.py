"""The loss of one optimizer step and its gradients: over micro-batches and processes as over the whole batch."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from kvpipe.cache.capture import Recorder
from kvpipe.data.batches import Batch, collate, count_predicted
from kvpipe.distill.losses import check_finite, masked_sum
from kvpipe.distill.objectives import Distiller, Term, Terms, Whole
from kvpipe.models.likelihood import token_nll
from kvpipe.train.cell import Cell

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Part:
    """A micro-batch of this process, and what the teachers say of it."""

    batch: Batch
    read: Any


@dataclass
class StepBatch:
    """A step's batch: this process's parts; predicted tokens and `whole` are those of all processes."""

    step: int
    parts: list[Part]
    predicted: int
    logged: bool
    whole: Whole | None


class BatchLoss:
    """Cross-entropy and what the arm adds, of the batches of one cell.

    Args:
        cell: gives encoding, settings and seed.
        model: the student as accelerate wraps it.
        objective: what the arm adds, on its device; None for one that learns from the text alone.
        accelerator: of this process.
    """

    def __init__(self, cell: Cell, model: nn.Module, objective: Distiller | None, accelerator: Accelerator):
        self.cell, self.config, self.encoding = cell, cell.config, cell.train
        self.model, self.objective, self.accelerator = model, objective, accelerator
        self.device = accelerator.device

    def begin(self, step: int, examples: np.ndarray, recorder: Recorder | None, logged: bool) -> StepBatch:
        """A step's batch, its teachers asked and what its terms are divided by measured."""
        own = self.split(examples)[self.accelerator.process_index :: self.accelerator.num_processes]
        predicted = count_predicted(self.encoding, examples, self.config.loss_on)
        batch = StepBatch(step, [self._part(micro) for micro in own], predicted, logged, None)
        if self.objective is not None and recorder is not None and len(batch.parts) > 1:
            batch.whole = self._measure(batch, recorder)
        return batch

    def split(self, examples: np.ndarray) -> list[np.ndarray]:
        """The micro-batches of all processes."""
        return np.array_split(examples, self.accelerator.num_processes * self.config.accumulate)

    def zero_grad(self) -> None:
        """Forget the gradients of the student and of the objective."""
        for module in (self.model, self.objective):
            if module is not None:
                module.zero_grad(set_to_none=True)

    def _part(self, examples: np.ndarray) -> Part:
        """A micro-batch; its teachers are asked here and not again."""
        batch = collate(self.encoding, examples, self.cell.pad_id, self.config.loss_on).to(self.device)
        return Part(batch, None if self.objective is None else self.objective.read(batch))

    def _whole(self, rows: list[torch.Tensor]) -> Whole:
        """What the rows that were measured of micro-batches amount to over all processes."""
        assert self.objective is not None
        return self.objective.whole(self.accelerator.gather(torch.stack(rows)))

    def _draw(self, step: int) -> None:
        """Begin the random numbers of a step (dropout): each process its own, and every pass over a batch the same."""
        seeds = [self.cell.drawn, step, self.accelerator.process_index]
        state = np.random.SeedSequence(seeds).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]))

    @torch.no_grad()
    def _measure(self, batch: StepBatch, recorder: Recorder) -> Whole:
        """What the terms of micro-batches are divided by; one micro-batch measures itself in its own forward."""
        assert self.objective is not None
        self._draw(batch.step)
        rows = []
        for part in batch.parts:
            hidden = self._forward(part.batch)[1] if self.objective.reads_student else None
            rows.append(
                self.objective.measure(part.batch, self.objective.target(part.batch, part.read, hidden, recorder))
            )
        return self._whole(rows)

    def gradients(
        self, batch: StepBatch, recorder: Recorder | None, only: str | None = None
    ) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        """Gradients of a batch's loss; gives the terms, their weights λ and what is watched, all of the whole batch.

        With `only`, gradients of that weighted term alone.
        """
        self._draw(batch.step)
        processes = self.accelerator.num_processes
        sums: dict[str, Any] = {}
        watched: list[dict[str, tuple[float, float]]] = []
        added = Terms({}, dict)
        for number, part in enumerate(batch.parts):
            last = number == len(batch.parts) - 1
            with nullcontext() if last and only is None else self.accelerator.no_sync(self.model):
                cross_entropy, added = self._terms(batch, part, recorder)
                terms = {"ce": Term(cross_entropy, 1.0)} | added.terms
                for name, term in terms.items():
                    sums[name] = sums.get(name, 0.0) + term.value.detach()
                wanted = [term.value * term.weight for name, term in terms.items() if only in (None, name)]
                total = sum(wanted) * processes  # which average their gradients
                if only is None:
                    self.accelerator.backward(total)
                elif total.requires_grad:
                    total.backward()
            if batch.logged and only is None:
                watched.append(added.watch())
        if self.objective is not None:
            self._average_gradients(self.objective)  # which is not inside DDP, as the student is
        whole = self.accelerator.reduce(torch.stack(list(sums.values())), "sum")
        values = dict(zip(sums, whole, strict=True))
        check_finite(values, batch.step + 1)
        weights = {name: term.weight for name, term in added.terms.items()}
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

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The student's logits, and the input of every layer, which its keys and values are made from."""
        needs_hidden = self.objective is not None and self.objective.needs_hidden
        output = self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
            output_hidden_states=needs_hidden,
        )
        return output.logits, torch.stack(output.hidden_states[:-1]) if needs_hidden else None

    def _terms(self, batch: StepBatch, part: Part, recorder: Recorder | None) -> tuple[torch.Tensor, Terms]:
        """A micro-batch's share of cross-entropy and of what the arm adds."""
        logits, hidden = self._forward(part.batch)
        cross_entropy = masked_sum(token_nll(logits, part.batch.labels), part.batch.predicted) / batch.predicted
        if self.objective is None or recorder is None:
            return cross_entropy, Terms({}, dict)
        target = self.objective.target(part.batch, part.read, hidden, recorder)
        whole = batch.whole
        if whole is None:
            whole = self._whole([self.objective.measure(part.batch, target)])
        progress = (batch.step, self.config.steps)
        return cross_entropy, self.objective.terms(part.batch, target, whole, logits, recorder, progress)

    def gradient_ratios(self, batch: StepBatch, recorder: Recorder | None) -> dict[str, float]:
        """Norm of each weighted term's gradient on the student, relative to that of the cross-entropy."""
        if self.objective is None:
            return {}

        def norm(name: str) -> tuple[float, list[str]]:
            _, weights, _ = self.gradients(batch, recorder, name)
            self._average_gradients(self.model)
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            found = float(sum(g.float().square().sum() for g in grads)) ** 0.5
            self.zero_grad()
            return found, list(weights)

        base, names = norm("ce")
        return {f"grad_ratio_{name}": norm(name)[0] / max(base, 1e-12) for name in names}
