"""Train one cell: an arm under a seed. Accelerate for devices, precision and processes; deterministic; resumable."""

from __future__ import annotations

import json
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

from kvpipe import attempts, card, checkpoint
from kvpipe.batches import Batch, collate, count_predicted, schedule
from kvpipe.capture import Recorder
from kvpipe.cell import Workspace
from kvpipe.config import Arm, TrainConfig
from kvpipe.dag import digest
from kvpipe.device import check_device
from kvpipe.distill import Distiller, Step
from kvpipe.export import export
from kvpipe.likelihood import score, scoring_batches
from kvpipe.lora import adapted
from kvpipe.losses import check_finite, masked_mean, token_nll
from kvpipe.models import manifest_hash
from kvpipe.outofmemory import evaluation_advice, explained, training_advice
from kvpipe.provenance import describe

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
    return config.model_copy(update={"steps": max(1, round(config.steps * arm.steps))})


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
    with _signals() as stop, explained("training", training_advice(run.config, run.accelerator.num_processes)):
        run.loop(stop)
    try:
        run.write(out)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{out} could not be written: {error}. Free some space and run the same command again: it goes on from the "
            f"last checkpoint in {checkpoints}"
        ) from error
    shutil.rmtree(checkpoints, ignore_errors=True)
    attempts.record_of(checkpoints).unlink(missing_ok=True)


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
        check_device(self.config.device, log)
        work.check([arm_name])
        precision = "no" if self.config.precision == "fp32" else self.config.precision
        self.accelerator = Accelerator(mixed_precision=precision, cpu=self.config.device == "cpu")
        self.device = self.accelerator.device
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
        parts = processes * self.config.accumulate
        share = np.array_split(examples, parts)[self.accelerator.process_index :: processes]
        whole = float(self.encoding.lengths[examples].sum())
        whole_predicted = count_predicted(self.encoding, examples, self.config.loss_on)
        logged = step + 1 == self.config.steps or (step + 1) % self.config.log_every == 0
        # gradients of single terms cost a backward pass each
        watched_step = logged and (step + 1) % self.config.eval_every == 0
        values: dict[str, float] = {}
        watched: dict[str, float] = {}
        for number, micro in enumerate(share):
            batch = collate(self.encoding, micro, self.pad_id, self.config.loss_on).to(self.device)
            # every micro-batch weighs by its tokens, in cross-entropy by those that carry it, and processes average
            # their gradients
            tokens = float(self.encoding.lengths[micro].sum())
            weight = tokens / whole * processes
            predicted = int(batch.predicted.sum()) / whole_predicted * processes
            last = number == len(share) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                cross_entropy, added = self._forward(batch, recorder, step)
                terms = {"ce": cross_entropy} | {name: term.value for name, term in added.terms.items()}
                check_finite(terms, step + 1)
                if logged and last:
                    watched = added.watch()
                if watched_step and last:
                    watched |= self._gradient_norms(cross_entropy, added)
                distilled = [term.value * term.weight * weight for term in added.terms.values()]
                self.accelerator.backward(sum(distilled, cross_entropy * predicted))
            for name, value in terms.items():
                part = (predicted if name == "ce" else weight) / processes
                values[name] = values.get(name, 0.0) + value.item() * part
            self.counters.padded_tokens += batch.input_ids.numel() * processes
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        if self.config.precision != "fp16":  # whose loss scaling skips such steps itself
            check_finite({"gradient": norm}, step + 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.counters.tokens += int(whole)
        weights = {f"lambda_{name}": term.weight for name, term in added.terms.items()}
        return {
            "step": step + 1,
            "tokens": self.counters.tokens,
            "learning_rate": rate * self.config.learning_rate,
            "grad_norm": float(norm),
            **values,
            **weights,
            **watched,
        }

    def _forward(self, batch: Batch, recorder: Recorder | None, step: int) -> tuple[torch.Tensor, Step]:
        needs_hidden = self.distiller is not None and self.distiller.needs_hidden
        output = self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
            output_hidden_states=needs_hidden,
        )
        cross_entropy = masked_mean(token_nll(output.logits, batch.labels), batch.predicted)
        if self.distiller is None or recorder is None:
            return cross_entropy, Step({}, dict)
        # the input of every layer, which its keys and values are made from
        hidden = torch.stack(output.hidden_states[:-1]) if needs_hidden else None
        return cross_entropy, self.distiller(batch, output.logits, hidden, recorder, (step, self.config.steps))

    def _gradient_norms(self, cross_entropy: torch.Tensor, added: Step) -> dict[str, float]:
        """Norm of each weighted term's gradient on the student, relative to that of the cross-entropy."""
        if not added.terms or self.accelerator.num_processes > 1:
            return {}
        parameters = [p for p in self.model.parameters() if p.requires_grad]

        def norm(value: torch.Tensor) -> float:
            grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            return float(sum(g.float().square().sum() for g in grads if g is not None)) ** 0.5

        base = norm(cross_entropy)
        return {f"grad_ratio_{n}": norm(t.value * t.weight) / max(base, 1e-12) for n, t in added.terms.items()}

    def _evaluate(self, step: int) -> None:
        with explained("scoring the validation split", evaluation_advice(self.work.config.evaluate)):
            scores = score(self.accelerator.unwrap_model(self.model), self.validation, self.validation_batches)
        self._note()
        line = {"step": step, "tokens": self.counters.tokens, "validation_loss": scores.mean_nll()}
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
        with explained("scoring the saved student", evaluation_advice(self.work.config.evaluate)):
            saved = export(self.work, model, out / "model", self.log)
        provenance = describe(
            arm=self.arm_name,
            seed=self.seed,
            config_hash=digest(self.work.config.model_dump(), 16),
            device=str(self.device),
        )
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        (out / "history.jsonl").write_text(lines, encoding="utf-8")
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
        (out / "cost.json").write_text(json.dumps(cost, indent=2) + "\n", encoding="utf-8")
        card.write(self.work.dag, self.work.paths, self.arm_name, out)


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
