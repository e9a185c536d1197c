"""Train one cell. Accelerate for devices, precision and processes; deterministic; resumable."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kvpipe.cache.capture import Recorder
from kvpipe.config import ConfigError, TrainConfig
from kvpipe.data.batches import schedule
from kvpipe.distill.losses import NonFiniteLossError, check_finite
from kvpipe.experiment import launch
from kvpipe.experiment.attempts import Attempt
from kvpipe.experiment.device import check_device, check_precision, meet, resolve_device, without_environment
from kvpipe.experiment.outofmemory import explained
from kvpipe.models.likelihood import score, scoring_batches
from kvpipe.train import checkpoint
from kvpipe.train.cell import Cell
from kvpipe.train.step import BatchLoss

EXIT_INTERRUPTED = 75
"""Exit status after a signal: a checkpoint was saved and the same command goes on from it."""


class Interrupted(SystemExit):
    """The run was asked to stop and has saved its state."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """Share of the peak rate at a step: linear warm-up, then cosine to zero."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + float(np.cos(np.pi * (step - warmup) / max(1, config.steps - warmup))))


def check_settings(config: TrainConfig, log=print) -> None:
    """Refuse what cannot be trained here, before anything is computed, and meet the launcher's other processes.

    Raises:
        NoDevice: `train.device` names a GPU and torch sees none.
        ConfigError: fp16 on a CPU, more micro-batches over all processes than examples in a batch, a launcher's way of
            training that there is not, or its processes that do not come.
    """
    check_device(config.device, log)
    check_precision(config.precision, resolve_device(config.device))
    without_environment()
    processes = launch.group_size(os.environ)
    if config.accumulate * processes > config.batch_size:
        raise ConfigError(
            f"train.batch_size {config.batch_size} is less than train.accumulate {config.accumulate} × {processes} "
            f"processes = {config.accumulate * processes} micro-batches: raise it, or use fewer"
        )
    meet(resolve_device(config.device))


def set_up(config: TrainConfig) -> None:
    """Threads and determinism of this process: before anything is computed for a cell."""
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Signals only leave their number; the loop acts at a step's end."""
    received: list[int] = []
    handled = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {s: signal.signal(s, lambda number, frame: received.append(number)) for s in handled}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Counters:
    """What a cell has cost so far."""

    seconds: float = 0.0
    tokens: int = 0
    padded_tokens: int = 0
    restarts: int = 0


@dataclass
class Trained:
    """A cell after its last step."""

    model: nn.Module
    """Without the wrappers of devices and precision."""
    history: list[dict[str, Any]]
    counters: Counters
    device: torch.device
    processes: int
    main: bool
    """Whether this process writes what all have trained."""
    wait: Callable[[], None]
    """For all processes."""


def train(cell: Cell, checkpoints: Path, attempt: Attempt, log=print) -> Trained:
    """Train from the newest checkpoint, or from the start, to the last step.

    Args:
        cell: what is trained, on what.
        checkpoints: their folder.
        attempt: where time and memory of this process are noted.
        log: takes plain lines.

    Raises:
        Interrupted: after SIGTERM, SIGUSR1 or SIGINT, once a checkpoint is saved.
        NonFiniteLossError: a loss term is NaN or Inf; nothing of that step is saved.
        OutOfMemory: the message names the setting to change.
    """
    loop = Loop(cell, checkpoints, attempt, log)
    with _signals() as stop, explained("training", cell.config, loop.accelerator.num_processes):
        loop.run(stop)
    return Trained(
        model=loop.accelerator.unwrap_model(loop.model, keep_fp32_wrapper=False),
        history=loop.history,
        counters=loop.counters,
        device=loop.accelerator.device,
        processes=loop.accelerator.num_processes,
        main=loop.accelerator.is_main_process,
        wait=loop.accelerator.wait_for_everyone,
    )


class Loop:
    """The state of a training run between its steps."""

    def __init__(self, cell: Cell, checkpoints: Path, attempt: Attempt, log=print):
        # accelerate takes over a second to import, which the functions above do not need
        from accelerate import Accelerator

        self.cell, self.config, self.checkpoints, self.attempt = cell, cell.config, checkpoints, attempt
        precision = "no" if self.config.precision == "fp32" else self.config.precision
        self.accelerator = Accelerator(mixed_precision=precision, cpu=resolve_device(self.config.device) == "cpu")
        # all processes but the main one would say the same
        self.log = log if self.accelerator.is_main_process else lambda *_: None
        device = self.accelerator.device
        self.objective = cell.objective.to(device)
        self.model, self.optimizer = self.accelerator.prepare(cell.student, self._optimizer())
        self.loss = BatchLoss(cell, self.model, self.objective, self.accelerator)
        self.validation_batches = scoring_batches(cell.validation, cell.pad_id, cell.scoring.batch_size)
        self.batches = [
            cell.examples[batch]
            for batch in schedule(
                cell.train.lengths[cell.examples],
                self.config.batch_size,
                self.config.steps,
                cell.drawn,
                self.config.batching == "length",
            )
        ]
        self.counters = Counters()
        self.history: list[dict[str, Any]] = []
        torch.manual_seed(cell.drawn)  # dropout, whatever was drawn before

    def _optimizer(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.cell.student.parameters() if parameter.requires_grad]
        peak = self.config.learning_rate
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.config.weight_decay, "peak": peak},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, "peak": peak},
        ]
        projector = self.cell.arm.projector
        slow = projector.learning_rate if projector.mode == "slow" else peak
        for module, rate in ((self.objective.targets, slow), (self.objective.trained, peak)):
            extra = [] if module is None else [p for p in module.parameters() if p.requires_grad]
            groups += [{"params": extra, "weight_decay": 0.0, "peak": rate}] if extra else []
        return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.99), fused=True)

    # ------------------------------------------------------------ the loop
    def run(self, stop: list[int]) -> None:
        """All steps that are left; `stop` has the signals that came."""
        step = self._resume()
        if step == 0:
            self._evaluate(0)
        # an arm that looks at no cache is not recorded: control pays for nothing it does not use
        recorder = None
        if self.objective.records:
            unwrapped = self.accelerator.unwrap_model(self.model)
            recorder = Recorder(unwrapped, self.objective.records_hidden, queries=self.objective.records_queries)
        with recorder or nullcontext():
            while step < self.config.steps:
                begun = time.perf_counter()
                line = self._step(step, recorder)
                step += 1
                self.counters.seconds += time.perf_counter() - begun
                last = step == self.config.steps
                if step % self.config.log_every == 0 or last:
                    self.history.append(line)
                if step % self.config.eval_every == 0 or last:
                    self._evaluate(step)
                stopping = self._must_stop(stop)
                # after the first step too: what saving imports is loaded then, before a signal takes an image's files away
                due = step == 1 or step % self.config.checkpoint_every == 0
                if stopping or (due and not last):
                    self._save(step)
                    if stopping and not last:
                        signals = ", ".join(map(str, stop)) or "to another process"
                        self.log(f"stopped by signal {signals} after step {step}; run the same command to go on")
                        raise Interrupted(EXIT_INTERRUPTED)

    def _step(self, step: int, recorder: Recorder | None) -> dict[str, Any]:
        """One optimizer step; gives its line of the history."""
        rate = learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        examples = self.batches[step]
        logged = step + 1 == self.config.steps or (step + 1) % self.config.log_every == 0
        batch = self.loss.begin(step, examples, recorder, logged)
        # gradients of single terms cost a pass each
        watch_gradients = logged and (step + 1) % self.config.eval_every == 0
        ratios = self.loss.gradient_ratios(batch, recorder) if watch_gradients else {}
        values, weights, watched = self.loss.gradients(batch, recorder)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        gradients = {"gradient": norm}
        learned = [p.grad for p in self.objective.parameters() if p.grad is not None]
        gradients |= {"gradient of what the objective trains": nn.utils.get_total_norm(learned)} if learned else {}
        if self.config.precision != "fp16":  # whose loss scaling skips such steps itself
            check_finite(gradients, step + 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        lengths = self.cell.train.lengths
        self.counters.tokens += int(lengths[examples].sum())
        self.counters.padded_tokens += sum(len(m) * int(lengths[m].max()) for m in self.loss.split(examples))
        return {
            "step": step + 1,
            "tokens": self.counters.tokens,
            "learning_rate": rate * self.config.learning_rate,
            "grad_norm": float(norm),
            **values,
            **{f"lambda_{name}": weight for name, weight in weights.items()},
            **watched,
            **ratios,
        }

    def _evaluate(self, step: int) -> None:
        with explained("scoring the validation split", self.cell.scoring):
            scores = score(self.accelerator.unwrap_model(self.model), self.cell.validation, self.validation_batches)
        if self.accelerator.is_main_process:
            self.attempt.note(peak_memory(self.accelerator.device))
        if not scores.tokens.sum():
            raise ValueError("no token of the validation split's completions is scored: give it records with an answer")
        loss = scores.mean_nll()
        if not np.isfinite(loss):
            raise NonFiniteLossError(
                f"the validation loss after step {step} is {loss}: look at the student's weights and the split (before "
                "step 1), or lower the learning rate; nothing of this step was saved"
            )
        self.history.append({"step": step, "tokens": self.counters.tokens, "validation_loss": loss})
        self.log(f"step {step}/{self.config.steps}  validation loss {loss:.4f}")

    # ------------------------------------------------------------ stopping and going on
    def _must_stop(self, stop: list[int]) -> bool:
        """Whether a signal came to any process: all must end after the same step."""
        if self.accelerator.num_processes == 1:
            return bool(stop)
        return bool(self.accelerator.reduce(torch.tensor(float(len(stop)), device=self.accelerator.device)).item())

    @property
    def _modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"student": self.cell.student, "objective": self.objective})

    @property
    def _made_from(self) -> dict[str, Any]:
        return {**self.cell.made_from, "processes": self.accelerator.num_processes}

    def _save(self, step: int) -> None:
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler  # fp16's, whose scale follows from all steps so far
            counted = vars(self.counters) | ({} if scaler is None else {"scaling": scaler.state_dict()})
            optimizer, folder = self.optimizer, self.checkpoints
            checkpoint.save(folder, step, self._modules, optimizer, self.history, counted, self._made_from)
        # a launcher that sees one process end kills the others, the one that writes among them
        self.accelerator.wait_for_everyone()

    def _resume(self) -> int:
        """Go on from the newest checkpoint; gives the steps that are done."""
        found = checkpoint.resume(self.checkpoints, self._modules, self.optimizer, self._made_from)
        if found is None:
            return 0
        self.history = found.history
        scaling = found.counters.pop("scaling", None)
        if scaling is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(scaling)
        self.counters = Counters(**found.counters)
        self.counters.restarts += 1
        self.log(f"continuing after step {found.step} of {self.config.steps}")
        return found.step


def peak_memory(device: torch.device) -> int:
    """Bytes: the accelerator's peak allocation, or the process's peak resident set on a CPU.

    On Linux from the kernel's own high-water mark: `ru_maxrss` also remembers what a larger parent held before exec.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="ascii", errors="replace"))
        if found:
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
