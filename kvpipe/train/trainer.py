"""Train one cell. Accelerate for devices, precision and processes; deterministic; resumable."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from kvpipe.cache.capture import Recorder
from kvpipe.config import ConfigError, TrainConfig
from kvpipe.data.batches import schedule, spread
from kvpipe.distill.losses import NonFiniteLossError, check_finite
from kvpipe.experiment import launch
from kvpipe.experiment.attempts import Attempt
from kvpipe.experiment.device import check_device, check_precision, meet, resolve_device, without_environment
from kvpipe.experiment.files import GB
from kvpipe.experiment.outofmemory import explained
from kvpipe.experiment.progress import Progress
from kvpipe.models.likelihood import score, scoring_batches
from kvpipe.train import checkpoint, tracking
from kvpipe.train import shard as sharding
from kvpipe.train.cell import Cell
from kvpipe.train.step import BatchLoss, Pull

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
    tracking.check_trackers(config.report_to)
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
    be_deterministic()


def be_deterministic() -> None:
    """Have torch choose algorithms that give the same bytes on every run.

    It would also fill all new memory, so that what is read before it is written is at least the same: 5% of a step, for
    nothing where no operation reads such memory.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@dataclass
class Stop:
    """What has asked this process to end."""

    signals: list[int] = field(default_factory=list)
    """Numbers, as they came."""
    to_save: bool = False
    """Whether this process has done a step: the loop then acts at the end of the next."""

    def receive(self, number: int, frame: FrameType | None) -> None:
        """End at once while there is nothing to save: in an image the signal has ended the file system below, too."""
        self.signals.append(number)
        # a launcher passes on what SLURM has sent as well: once is enough
        if not self.to_save and len(self.signals) == 1:
            raise Interrupted(EXIT_INTERRUPTED)

    def __str__(self) -> str:
        return ", ".join(map(str, self.signals)) or "to another process"


@contextmanager
def stoppable(log=print) -> Iterator[Stop]:
    """Signals end what happens inside by `Interrupted`, not the process."""
    stop = Stop()
    before = {s: signal.signal(s, stop.receive) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield stop
    except Interrupted:
        if not stop.to_save:
            log(f"stopped by signal {stop} before a step was done; run the same command to go on")
        raise
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
    router: dict[str, Any] | None
    """How much each teacher weighs in each layer of some training examples, where there are several."""
    device: torch.device
    processes: int
    main: bool
    """Whether this process writes what all have trained."""
    wait: Callable[[], None]
    """For all processes."""


@dataclass(frozen=True)
class Rehearsal:
    """What the first steps of a cell have cost and shown."""

    step_seconds: float
    """Mean, over batches of all lengths."""
    validation_seconds: float
    terms: dict[str, Pull]
    """Before the first step."""


def train(cell: Cell, checkpoints: Path, attempt: Attempt, stop: Stop, log=print) -> Trained:
    """Train from the newest checkpoint, or from the start, to the last step.

    Args:
        cell: what is trained, on what.
        checkpoints: their folder.
        attempt: where time and memory of this process are noted.
        stop: of `stoppable`.
        log: takes plain lines.

    Raises:
        Interrupted: after a signal, once a checkpoint is saved.
        NonFiniteLossError: a loss term is NaN or Inf; nothing of that step is saved.
        OutOfMemory: the message names the setting to change.
    """
    loop = Loop(cell, checkpoints, attempt, log)
    with explained("training", cell.config, loop.accelerator.num_processes):
        loop.run(stop)
    return Trained(
        model=loop.trained(),
        history=loop.history,
        counters=loop.counters,
        router=loop.router,
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
        self.empty = None
        if self.config.shard and self.accelerator.num_processes > 1:
            if cell.online is not None:
                raise ConfigError(
                    f"train.shard: arm {cell.name} learns from texts that the student writes (on_policy), which processes "
                    "write apart, while a sharded student is run by all of them together: leave one of the two out"
                )
            self.empty = sharding.without_weights(cell.student)
            sharding.shard(cell.student, self.accelerator)
            self.model, self.optimizer = cell.student, self.accelerator.prepare(self.create_optimizer())
        else:
            self.model, self.optimizer = self.accelerator.prepare(cell.student, self.create_optimizer())
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
        self.router: dict[str, Any] | None = None
        torch.manual_seed(cell.drawn)  # dropout, whatever was drawn before

    def create_optimizer(self) -> torch.optim.Optimizer:
        """AdamW, by groups: each with its highest learning rate as `peak`, no decay of vectors."""
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

    def trained(self) -> nn.Module:
        """The student without wrappers, in one piece; all processes call it."""
        if self.empty is not None:
            whole = sharding.whole_student(self.cell.student, self.empty, self.accelerator.is_main_process)
            return whole.to(self.accelerator.device) if self.accelerator.is_main_process else whole
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    # ------------------------------------------------------------ the loop
    def run(self, stop: Stop) -> None:
        """All steps that are left."""
        step = self._resume()
        if self.config.report_to:
            cell = self.cell
            tracking.begin(self.accelerator, self.config.report_to, cell.trackers, cell.name, cell.seed, step)
            self.log(f"{', '.join(self.config.report_to)}: {cell.trackers / cell.name / f'seed{cell.seed}'}")
        try:
            self._run(step, stop)
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _run(self, first: int, stop: Stop) -> None:
        step = first
        if step == 0:
            self.evaluate(0)
        recorder = self._recorder()
        label = f"training {self.cell.name}, seed {self.cell.seed}"
        with recorder or nullcontext(), Progress(label, self.config.steps, "steps", step) as progress:
            while step < self.config.steps:
                begun = time.perf_counter()
                line = self._step(step, recorder)
                step += 1
                stop.to_save = True
                self.counters.seconds += time.perf_counter() - begun
                last = step == self.config.steps
                if last:
                    self.router = self.loss.router(recorder)
                progress.add(1, ", ".join(f"{name} {line[name]:.3f}" for name in self.objective.terms))
                if step % self.config.log_every == 0 or last:
                    self._note(line)
                if step % self.config.eval_every == 0 or last:
                    self.evaluate(step)
                stopping = self._must_stop(stop)
                # after this process's first step too: what saving needs is then loaded before a signal takes the image away
                due = step == first + 1 or step % self.config.checkpoint_every == 0
                if stopping or (due and not last):
                    self._save(step)
                    if stopping and not last:
                        self.log(f"stopped by signal {stop} after step {step}; run the same command to go on")
                        raise Interrupted(EXIT_INTERRUPTED)

    def _recorder(self) -> Recorder | None:
        """An arm that looks at no cache is not recorded: control pays for nothing it does not use."""
        if not self.objective.records:
            return None
        unwrapped = self.accelerator.unwrap_model(self.model)
        return Recorder(unwrapped, self.objective.records_hidden, queries=self.objective.records_queries)

    def rehearse(self, number: int) -> Rehearsal:
        """So many first steps, after as many batches from all over the run have been looked at; nothing is saved."""
        recorder = self._recorder()
        with recorder or nullcontext():
            shown, chosen = [], spread(self.config.steps, number)
            self._write(0, recorder)
            for step in chosen if self.cell.online is None else chosen[:1]:
                batch = self.loss.begin(int(step), self.batches[step], recorder, False)
                shown.append(self.loss.pulls(batch, recorder))
            begun = time.perf_counter()
            for step in range(number := min(number, self.config.steps)):
                self._step(step, recorder)
            step_seconds = (time.perf_counter() - begun) / number
        begun = time.perf_counter()
        self.evaluate(number)
        terms = {name: Pull(*np.mean([one[name] for one in shown], axis=0).tolist()) for name in shown[0]}
        return Rehearsal(step_seconds, time.perf_counter() - begun, terms)

    def _step(self, step: int, recorder: Recorder | None) -> dict[str, Any]:
        """One optimizer step; gives its line of the history."""
        rate, online = learning_rate(self.config, step), self.cell.online
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        examples = self.batches[step]
        self._write(step, recorder)
        logged = step + 1 == self.config.steps or (step + 1) % self.config.log_every == 0
        batch = self.loss.begin(step, examples, recorder, logged)
        # gradients of single terms cost a pass each
        watch_gradients = logged and (step + 1) % self.config.eval_every == 0
        ratios = self.loss.gradient_ratios(batch, recorder) if watch_gradients else {}
        values, weights, watched = self.loss.gradients(batch, recorder)
        norm = sharding.gathered(self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))
        gradients = {"gradient": norm}
        learned = [p.grad for p in self.objective.parameters() if p.grad is not None]
        gradients |= {"gradient of what the objective trains": nn.utils.get_total_norm(learned)} if learned else {}
        if self.config.precision != "fp16":  # whose loss scaling skips such steps itself
            check_finite(gradients, step + 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        lengths, written = self.cell.train.lengths[examples], self.loss.written(step, examples)
        if online is not None:
            lengths = lengths.copy()
            lengths[written] = online.encoding.lengths[online.places(examples[written])]
            watched["on_policy_tokens"] = float(lengths[written].sum() / lengths.sum())
        self.counters.tokens += int(lengths.sum())
        self.counters.padded_tokens += sum(len(m) * int(m.max()) for m in self.loss.split(lengths))
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

    def _write(self, step: int, recorder: Recorder | None) -> None:
        """Have the student write the texts of the steps to come, each process some of them, where the time has come."""
        online = self.cell.online
        if online is None or not online.due(step):
            return
        from accelerate.utils import gather_object

        examples, number = online.asked(step, self.batches), self.accelerator.num_processes
        with recorder.paused() if recorder else nullcontext():
            own = online.write(
                self.accelerator.unwrap_model(self.model), step, examples[self.accelerator.process_index :: number]
            )
        texts = dict(gather_object(list(own.items()))) if number > 1 else own
        online.take({example: texts[example] for example in examples})

    def evaluate(self, step: int) -> None:
        """Append the validation loss at a step to the history."""
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
        self._note({"step": step, "tokens": self.counters.tokens, "validation_loss": loss})
        self.log(f"step {step}/{self.config.steps}  validation loss {loss:.4f}")

    def _note(self, line: dict[str, Any]) -> None:
        """A line of the history, for the trackers too."""
        self.history.append(line)
        if self.accelerator.trackers:
            measured = {name: value for name, value in line.items() if name != "step"}
            memory = {"peak_memory_gb": peak_memory(self.accelerator.device) / GB}
            self.accelerator.log(measured | memory, step=line["step"])

    # ------------------------------------------------------------ stopping and going on
    def _must_stop(self, stop: Stop) -> bool:
        """Whether a signal came to any process: all must end after the same step."""
        received = len(stop.signals)
        if self.accelerator.num_processes == 1:
            return bool(received)
        return bool(self.accelerator.reduce(torch.tensor(float(received), device=self.accelerator.device)).item())

    @property
    def _modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"student": self.cell.student, "objective": self.objective})

    @property
    def _made_from(self) -> dict[str, Any]:
        return {**self.cell.made_from, "processes": self.accelerator.num_processes}

    def _save(self, step: int) -> None:
        main = self.accelerator.is_main_process
        if main or self.empty is not None:
            scaler = self.accelerator.scaler  # fp16's, whose scale follows from all steps so far
            counted = vars(self.counters) | ({} if scaler is None else {"scaling": scaler.state_dict()})
            counted |= {} if self.cell.online is None else {"written": list(self.cell.online.texts.items())}
            optimizer, folder = self.optimizer, self.checkpoints
            checkpoint.save(folder, step, self._modules, optimizer, self.history, counted, self._made_from, main)
        # a launcher that sees one process end kills the others, the one that writes among them
        self.accelerator.wait_for_everyone()

    def _resume(self) -> int:
        """Go on from the newest checkpoint; gives the steps that are done."""
        found = checkpoint.resume(self.checkpoints, self._modules, self.optimizer, self._made_from)
        if found is None:
            return 0
        self.history = found.history
        if (written := found.counters.pop("written", None)) is not None and self.cell.online is not None:
            self.cell.online.take(dict(written))
        scaling = found.counters.pop("scaling", None)
        if scaling is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(scaling)
        self.counters = Counters(**found.counters)
        self.counters.restarts += 1
        self.log(f"continuing after step {found.step} of {self.config.steps}")
        return found.step


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` count from now: of what this process did before, another cell perhaps, nothing."""
    if device.type == "cuda" and torch.cuda.is_initialized():  # else a process of many would wake the first GPU too
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # not on Linux, or a kernel that refuses
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int:
    """Bytes: the accelerator's peak allocation, or the process's peak resident set on a CPU, since `forget_peak`.

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
