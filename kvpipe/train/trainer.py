"""Train one cell: an arm under a seed. Accelerate for devices, precision and processes; deterministic; resumable."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from kvpipe.cache.capture import Recorder
from kvpipe.config import Arm, ConfigError, TrainConfig
from kvpipe.data.batches import Batch, collate, count_predicted, schedule
from kvpipe.distill.build import Workspace
from kvpipe.distill.losses import NonFiniteLossError, check_finite, masked_sum
from kvpipe.distill.objectives import Distiller, Step, Term, Whole
from kvpipe.experiment import attempts, launch
from kvpipe.experiment.device import check_device, check_precision, meet, resolve_device, without_environment
from kvpipe.experiment.files import write_json, write_text
from kvpipe.experiment.outofmemory import explained
from kvpipe.experiment.paths import COST, HISTORY, STUDENT
from kvpipe.experiment.plan import digest
from kvpipe.experiment.provenance import describe
from kvpipe.models.folders import manifest_hash
from kvpipe.models.likelihood import score, scoring_batches, token_nll
from kvpipe.train import card, checkpoint
from kvpipe.train.export import export
from kvpipe.train.lora import adapted

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


def budget(config: TrainConfig, arm: Arm) -> TrainConfig:
    """Training of an arm's cells: the same for every arm, but for the steps where an arm says so."""
    return config.model_copy(update={"steps": max(1, round(config.steps * arm.step_factor))})


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
    launch.check_environment(os.environ)
    processes = int(os.environ.get("WORLD_SIZE") or "1")
    if config.accumulate * processes > config.batch_size:
        raise ConfigError(
            f"train.batch_size {config.batch_size} is less than train.accumulate {config.accumulate} × {processes} "
            f"processes = {config.accumulate * processes} micro-batches: raise it, or use fewer"
        )
    meet(resolve_device(config.device))


def train(work: Workspace, arm_name: str, seed: int, out: Path, checkpoints: Path, log=print) -> None:
    """Train a cell and write `model/`, `history.jsonl` and `cost.json` into `out`.

    Args:
        work: the experiment; its artefacts must be there.
        arm_name: the arm.
        seed: decides initialisation and data order, the same for every arm.
        out: the cell's folder.
        checkpoints: folder of checkpoints; emptied when the cell is done.
        log: where plain lines go.

    Raises:
        Interrupted: after SIGTERM, SIGUSR1 or SIGINT, once a checkpoint is saved.
        NonFiniteLossError: a loss term is NaN or Inf; nothing of that step is saved.
        SavedStudentDiffers: the folder scores otherwise than the model in memory; the checkpoints stay.
        OutOfMemory: the message names the setting to change.
        NoDevice: `train.device` names a GPU and torch sees none.
    """
    run = _Run(work, arm_name, seed, checkpoints, log)
    with _signals() as stop, explained("training", run.config, run.accelerator.num_processes):
        run.loop(stop)
    try:
        run.write(out)
    except BrokenPipeError:  # of the terminal, not of the disk
        raise
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{out} could not be written: {error}. Free some space and run the same command again: it goes on from the "
            f"last checkpoint in {checkpoints}"
        ) from error
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        shutil.rmtree(checkpoints, ignore_errors=True)
        attempts.record_of(checkpoints).unlink(missing_ok=True)


def _unheard(*_: object) -> None:
    """The log of all processes but the main one, which say the same."""


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
class _Part:
    """A micro-batch of this process, and what the teachers say of it."""

    batch: Batch
    read: Any


@dataclass
class _Batch:
    """A step's batch: this process's parts; predicted tokens and `whole` are those of all processes."""

    step: int
    parts: list[_Part]
    predicted: int
    logged: bool
    whole: Whole | None


class _Run:
    def __init__(self, work: Workspace, arm_name: str, seed: int, checkpoints: Path, log):
        # accelerate takes over a second to import, which the functions above do not need
        from accelerate import Accelerator

        self.work, self.arm_name, self.seed, self.checkpoints, self.log = work, arm_name, seed, checkpoints, log
        self.arm = work.dag.arm(arm_name)
        self.config = budget(work.config.train, self.arm)
        self.drawn = seed + self.arm.seed_offset
        torch.set_num_threads(self.config.threads)
        torch.use_deterministic_algorithms(True, warn_only=True)
        check_settings(self.config, log=log)
        work.check([arm_name])
        precision = "no" if self.config.precision == "fp32" else self.config.precision
        self.accelerator = Accelerator(mixed_precision=precision, cpu=resolve_device(self.config.device) == "cpu")
        self.device = self.accelerator.device
        if not self.accelerator.is_main_process:
            self.log = log = _unheard
        self.attempt = attempts.Attempt(checkpoints, str(self.device), self.accelerator.num_processes)
        self._note()
        self.encoding = work.student_encoding("train")
        self.pad_id = work.student_tokenizer.pad_token_id
        self.validation = work.student_encoding("validation")
        self.validation_batches = scoring_batches(self.validation, self.pad_id, work.config.evaluate.batch_size)
        chosen = work.training_examples(self.arm)
        self.batches = [
            chosen[batch]
            for batch in schedule(
                self.encoding.lengths[chosen],
                self.config.batch_size,
                self.config.steps,
                self.drawn,
                self.config.batching == "length",
            )
        ]
        torch.manual_seed(self.drawn)  # adapters are drawn
        self.model = self._student()
        torch.manual_seed(self.drawn)
        distiller = work.distiller(self.arm, self.drawn)
        self.distiller: Distiller | None = distiller.to(self.device) if distiller is not None else None
        torch.manual_seed(self.drawn)  # dropout, whatever the distiller has drawn
        self.optimizer = self._optimizer()
        self.counters = Counters()
        self.history: list[dict[str, Any]] = []

    # ------------------------------------------------------------ parts
    def _student(self):
        model = self.work.student(self.drawn, self.arm.init).train()
        if self.config.lora is not None:
            model = adapted(model, self.config.lora)
        if self.config.gradient_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        return model

    def _optimizer(self) -> torch.optim.Optimizer:
        decay: list[torch.Tensor] = []
        plain: list[torch.Tensor] = []
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                (decay if parameter.ndim > 1 else plain).append(parameter)
        groups = [
            {"params": decay, "weight_decay": self.config.weight_decay, "peak": self.config.learning_rate},
            {"params": plain, "weight_decay": 0.0, "peak": self.config.learning_rate},
        ]
        if self.distiller is not None:
            extra = [p for p in self.distiller.parameters() if p.requires_grad]
            slow = self.arm.projector.mode == "slow"
            peak = self.arm.projector.learning_rate if slow else self.config.learning_rate
            if extra:
                groups.append({"params": extra, "weight_decay": 0.0, "peak": peak})
        return torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=(0.9, 0.99), fused=True)

    def _spec(self) -> dict[str, Any]:
        """What must agree when a checkpoint is continued."""
        return {
            "arm": self.arm_name,
            "seed": self.seed,
            "depends": json.loads(self.work.dag.depends("train", arm=self.arm_name)),
            "data": digest(self.encoding.ids.tolist(), 16),
            "inputs": self._inputs(),
            "processes": self.accelerator.num_processes,
        }

    def _inputs(self) -> dict[str, str]:
        """Hashes of the models and projectors that the cell reads: the configuration only says where they are."""
        paths, dag = self.work.paths, self.work.dag
        found = {name: manifest_hash(paths.model(name)) for name in (self.work.config.student, *self.arm.teachers)}
        if dag.needs_fit(self.arm):
            found["projector"] = sha256(paths.projector(dag.fit_id(self.arm)).read_bytes()).hexdigest()
        return found

    # ------------------------------------------------------------ the loop
    def loop(self, stop: list[int]) -> None:
        """Train from the newest checkpoint, or from the start, to the last step."""
        modules = nn.ModuleDict({"student": self.model})
        if self.distiller is not None:
            modules["distiller"] = self.distiller
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        resumed = checkpoint.resume(self.checkpoints, modules, self.optimizer, self._spec())
        step = 0
        if resumed is not None:
            step, self.history = resumed.step, resumed.history
            scaling = resumed.counters.pop("scaling", None)
            if scaling is not None and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(scaling)
            self.counters = Counters(**resumed.counters)
            self.counters.restarts += 1
            self.log(f"continuing after step {step} of {self.config.steps}")
        else:
            self._evaluate(0)
        student = self.accelerator.unwrap_model(self.model)
        # an arm that adds nothing is not recorded: control pays for nothing it does not use
        recorder = Recorder(student) if self.distiller is not None else None
        with recorder or nullcontext():
            while step < self.config.steps:
                begun = time.perf_counter()
                line = self._step(step, recorder)
                step += 1
                self.counters.seconds += time.perf_counter() - begun
                if step % self.config.log_every == 0 or step == self.config.steps:
                    self.history.append(line)
                if step % self.config.eval_every == 0 or step == self.config.steps:
                    self._evaluate(step)
                last = step == self.config.steps
                asked = self._asked_to_stop(stop)
                if asked or (step % self.config.checkpoint_every == 0 and not last):
                    if self.accelerator.is_main_process:
                        checkpoint.save(
                            self.checkpoints,
                            step,
                            modules,
                            self.optimizer,
                            self.history,
                            self._counted(),
                            self._spec(),
                        )
                    # a launcher that sees one process end kills the others, the one that writes among them
                    self.accelerator.wait_for_everyone()
                    if asked and not last:
                        signals = ", ".join(map(str, stop)) or "to another process"
                        self.log(f"stopped by signal {signals} after step {step}; run the same command to go on")
                        raise Interrupted(EXIT_INTERRUPTED)

    def _asked_to_stop(self, stop: list[int]) -> bool:
        """Whether a signal came to any process: all must end after the same step."""
        if self.accelerator.num_processes == 1:
            return bool(stop)
        return bool(self.accelerator.reduce(torch.tensor(float(len(stop)), device=self.device)).item())

    def _counted(self) -> dict[str, Any]:
        """Counters, and under fp16 the scale of the loss, which follows from all steps so far."""
        scaler = self.accelerator.scaler
        return vars(self.counters) | ({} if scaler is None else {"scaling": scaler.state_dict()})

    def _step(self, step: int, recorder: Recorder | None) -> dict[str, Any]:
        rate = learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        examples = self.batches[step]
        processes = self.accelerator.num_processes
        micros = np.array_split(examples, processes * self.config.accumulate)
        parts = [self._part(micro) for micro in micros[self.accelerator.process_index :: processes]]
        predicted = count_predicted(self.encoding, examples, self.config.loss_on)
        logged = step + 1 == self.config.steps or (step + 1) % self.config.log_every == 0
        work = _Batch(step, parts, predicted, logged, None)
        if self.distiller is not None and recorder is not None and len(parts) > 1:
            work.whole = self._measure(work, recorder)
        # gradients of single terms cost a pass each
        watch_gradients = logged and (step + 1) % self.config.eval_every == 0
        ratios = self._gradient_ratios(work, recorder) if watch_gradients else {}
        values, weights, watched = self._pass(work, recorder)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        gradients = {"gradient": norm}
        if self.distiller is not None:
            learned = [p.grad for p in self.distiller.parameters() if p.grad is not None]
            gradients |= {"gradient of projectors and fusion": nn.utils.get_total_norm(learned)} if learned else {}
        if self.config.precision != "fp16":  # whose loss scaling skips such steps itself
            check_finite(gradients, step + 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.counters.tokens += int(self.encoding.lengths[examples].sum())
        self.counters.padded_tokens += sum(len(m) * int(self.encoding.lengths[m].max()) for m in micros)
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

    def _part(self, examples: np.ndarray) -> _Part:
        """A micro-batch; its teachers are asked here and not again."""
        batch = collate(self.encoding, examples, self.pad_id, self.config.loss_on).to(self.device)
        return _Part(batch, None if self.distiller is None else self.distiller.read(batch))

    def _whole(self, rows: list[torch.Tensor]) -> Whole:
        """What the rows that were measured of micro-batches amount to over all processes."""
        assert self.distiller is not None
        return self.distiller.whole(self.accelerator.gather(torch.stack(rows)))

    def _draw(self, step: int) -> None:
        """Begin the random numbers of a step (dropout): each process its own, and every pass over a batch the same."""
        state = np.random.SeedSequence([self.drawn, step, self.accelerator.process_index]).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]))

    @torch.no_grad()
    def _measure(self, work: _Batch, recorder: Recorder) -> Whole:
        """What the terms of micro-batches are divided by; one micro-batch measures itself in its own forward."""
        assert self.distiller is not None
        self._draw(work.step)
        rows = []
        for part in work.parts:
            hidden = self._forward(part.batch)[1] if self.distiller.reads_student else None
            rows.append(
                self.distiller.measure(part.batch, self.distiller.target(part.batch, part.read, hidden, recorder))
            )
        return self._whole(rows)

    def _pass(
        self, work: _Batch, recorder: Recorder | None, only: str | None = None
    ) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        """Gradients of a batch's loss; gives the terms, their weights λ and what is watched, all of the whole batch.

        With `only`, gradients of that weighted term alone.
        """
        self._draw(work.step)
        processes = self.accelerator.num_processes
        sums: dict[str, Any] = {}
        watched: list[dict[str, tuple[float, float]]] = []
        added = Step({}, dict)
        for number, part in enumerate(work.parts):
            last = number == len(work.parts) - 1
            with nullcontext() if last and only is None else self.accelerator.no_sync(self.model):
                cross_entropy, added = self._terms(work, part, recorder)
                terms = {"ce": Term(cross_entropy, 1.0)} | added.terms
                for name, term in terms.items():
                    sums[name] = sums.get(name, 0.0) + term.value.detach()
                wanted = [term.value * term.weight for name, term in terms.items() if only in (None, name)]
                total = sum(wanted) * processes  # which average their gradients
                if only is None:
                    self.accelerator.backward(total)
                elif total.requires_grad:
                    total.backward()
            if work.logged and only is None:
                watched.append(added.watch())
        if self.distiller is not None:
            self._average_gradients(self.distiller)  # which is not inside DDP, as the student is
        whole = self.accelerator.reduce(torch.stack(list(sums.values())), "sum")
        values = dict(zip(sums, whole, strict=True))
        check_finite(values, work.step + 1)
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
        needs_hidden = self.distiller is not None and self.distiller.needs_hidden
        output = self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
            output_hidden_states=needs_hidden,
        )
        return output.logits, torch.stack(output.hidden_states[:-1]) if needs_hidden else None

    def _terms(self, work: _Batch, part: _Part, recorder: Recorder | None) -> tuple[torch.Tensor, Step]:
        """A micro-batch's share of cross-entropy and of what the arm adds."""
        logits, hidden = self._forward(part.batch)
        cross_entropy = masked_sum(token_nll(logits, part.batch.labels), part.batch.predicted) / work.predicted
        if self.distiller is None or recorder is None:
            return cross_entropy, Step({}, dict)
        target = self.distiller.target(part.batch, part.read, hidden, recorder)
        whole = work.whole
        if whole is None:
            whole = self._whole([self.distiller.measure(part.batch, target)])
        progress = (work.step, self.config.steps)
        return cross_entropy, self.distiller.terms(part.batch, target, whole, logits, recorder, progress)

    def _gradient_ratios(self, work: _Batch, recorder: Recorder | None) -> dict[str, float]:
        """Norm of each weighted term's gradient on the student, relative to that of the cross-entropy."""
        if self.distiller is None:
            return {}

        def norm(name: str) -> tuple[float, list[str]]:
            _, weights, _ = self._pass(work, recorder, name)
            self._average_gradients(self.model)
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            found = float(sum(g.float().square().sum() for g in grads)) ** 0.5
            self.optimizer.zero_grad(set_to_none=True)
            return found, list(weights)

        base, names = norm("ce")
        return {f"grad_ratio_{name}": norm(name)[0] / max(base, 1e-12) for name in names}

    def _evaluate(self, step: int) -> None:
        with explained("scoring the validation split", self.work.config.evaluate):
            scores = score(self.accelerator.unwrap_model(self.model), self.validation, self.validation_batches)
        self._note()
        if not scores.tokens.sum():
            raise ValueError("no token of the validation split's completions is scored: give it records with an answer")
        loss = scores.mean_nll()
        if not np.isfinite(loss):
            raise NonFiniteLossError(
                f"the validation loss after step {step} is {loss}: look at the student's weights and the split (before "
                "step 1), or lower the learning rate; nothing of this step was saved"
            )
        line = {"step": step, "tokens": self.counters.tokens, "validation_loss": loss}
        self.history.append(line)
        self.log(f"step {step}/{self.config.steps}  validation loss {line['validation_loss']:.4f}")

    def _note(self) -> None:
        if self.accelerator.is_main_process:
            self.attempt.note(peak_memory(self.device))

    # ------------------------------------------------------------ results
    def write(self, out: Path) -> None:
        """Write the cell's artefacts (main process only)."""
        if not self.accelerator.is_main_process:
            return
        out.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        with explained("scoring the saved student", self.work.config.evaluate):
            saved = export(self.work, model, out / STUDENT, self.log)
        provenance = describe(
            arm=self.arm_name,
            seed=self.seed,
            config_hash=digest(self.work.config.model_dump(), 16),
            device=str(self.device),
        )
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        write_text(out / HISTORY, lines)
        self._note()
        spent = attempts.total(self.attempt.file) or {"peak_memory_bytes": peak_memory(self.device)}
        cost = {
            "train_seconds": self.counters.seconds,
            **spent,
            "steps": self.config.steps,
            "tokens": self.counters.tokens,
            "padding_share": 1 - self.counters.tokens / max(1, self.counters.padded_tokens),
            "restarts": self.counters.restarts,
            "processes": self.accelerator.num_processes,
            "model": saved,
            "settings": self.work.dag.depends("train", arm=self.arm_name),
            "provenance": provenance,
        }
        write_json(out / COST, cost)
        card.write_card(self.work.dag, self.work.paths, self.arm_name, out)


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
