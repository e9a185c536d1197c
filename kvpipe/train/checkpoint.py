"""Checkpoints: atomic, complete (weights, optimizer, random state, history, position), refused when they do not fit."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kvpipe.experiment.files import save_tensors
from kvpipe.train.shard import gathered, placed

STATE, TENSORS = "state.json", "tensors.safetensors"
KEPT = 2
"""Newest checkpoints that are kept: one may turn out to be damaged."""


class CheckpointMismatch(ValueError):
    """A checkpoint of another configuration."""


class CheckpointNotWritten(RuntimeError):
    """The disk took no further checkpoint; the ones before are as they were."""


@dataclass
class Resumed:
    """Where a run continues."""

    step: int
    history: list[dict[str, Any]]
    counters: dict[str, Any]


def save(
    folder: Path,
    step: int,
    modules: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, Any]],
    counters: dict[str, Any],
    spec: dict[str, Any],
    main: bool = True,
) -> Path:
    """Write `folder/step-<n>`; it appears whole or not at all, and the older ones stay until it does.

    Args:
        folder: the cell's checkpoint folder.
        step: optimizer steps done.
        modules: everything with weights; what is frozen is not stored.
        optimizer: its state tensors are stored by parameter number.
        history: lines of the history so far.
        counters: JSON numbers (tokens, seconds, restarts …).
        spec: what must agree when the run continues.
        main: whether this process writes; all processes of a sharded student gather it.

    Raises:
        CheckpointNotWritten: the disk is full or refuses; names the folder and what is still there.
    """
    partial, final = folder / f"partial-{os.getpid()}", folder / f"step-{step:08d}"
    parts = {f"model.{k}": v for k, v in _changing(modules).items()}
    for number, state in optimizer.state_dict()["state"].items():
        parts |= {f"optimizer.{number}.{k}": torch.as_tensor(v) for k, v in state.items()}
    tensors: dict[str, Tensor] = {}
    for name, part in parts.items():
        whole = gathered(part.detach())
        if main:
            tensors[name] = whole.cpu()
    if not main:
        return final
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for left_over in folder.glob("partial-*"):  # of a process that was killed here
        shutil.rmtree(left_over)
    try:
        partial.mkdir(parents=True)
        save_tensors(tensors, partial / TENSORS)
        _flush(partial / TENSORS)
        state = {"step": step, "history": history, "counters": counters, "spec": spec}
        state["tensors_sha256"] = sha256((partial / TENSORS).read_bytes()).hexdigest()
        state["sha256"] = _digest(state)
        with (partial / STATE).open("w", encoding="utf-8") as handle:
            json.dump(state, handle)
            handle.flush()
            os.fsync(handle.fileno())
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = sorted(path.name for path in folder.glob("step-*"))
        raise CheckpointNotWritten(
            f"no checkpoint after step {step} could be written to {folder}: {error}. Free some space there and run the "
            f"same command again: it goes on from {kept[-1] if kept else 'the start'}"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush(folder)
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)
    return final


def resume(folder: Path, modules: nn.Module, optimizer: torch.optim.Optimizer, spec: dict[str, Any]) -> Resumed | None:
    """Load the newest sound checkpoint, or return None where there is none.

    Raises:
        CheckpointMismatch: it belongs to another configuration; names the differing keys.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        state = _sound(path)
        if state is None:
            continue
        _check(path, state["spec"], spec)
        tensors = load_file(path / TENSORS)
        weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        differing = set(weights) ^ set(_changing(modules))
        if differing:
            raise CheckpointMismatch(
                f"{path}: tensors {sorted(differing)[:5]} are in one of checkpoint and run only; "
                f"delete {folder} to start again"
            )
        own_parts = modules.state_dict()
        modules.load_state_dict({k: placed(v, own_parts[k]) for k, v in weights.items()}, strict=False)
        loaded = optimizer.state_dict()
        loaded["state"] = {}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".", 2)
                like = parameters[int(number)]
                # fused optimizers walk through memory: the state must lie in it as its parameter does
                own = torch.empty_like(like, dtype=tensor.dtype).copy_(placed(tensor, like)) if tensor.ndim else tensor
                loaded["state"].setdefault(int(number), {})[key] = own
        optimizer.load_state_dict(loaded)
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        return Resumed(state["step"], state["history"], state["counters"])
    return None


def _flush(path: Path) -> None:
    """Have it on the disk: network file systems tell of a full one, or of a quota, only now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sound(path: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        whole = state.pop("sha256") == _digest(state)
        whole = whole and sha256((path / TENSORS).read_bytes()).hexdigest() == state["tensors_sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # the last two: JSON, but no mapping
        print(f"checkpoint {path} cannot be read ({error}); trying the one before")
        return None
    if not whole:
        print(f"checkpoint {path} is damaged (checksum differs); trying the one before")
        return None
    return state


def _digest(state: dict[str, Any]) -> str:
    return sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _check(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    found, expected = _flat(found), _flat(json.loads(json.dumps(expected)))
    differing = [k for k in sorted({*found, *expected}) if found.get(k) != expected.get(k)]
    if differing:
        lines = "\n".join(f"  {k}: {found.get(k)!r} there, {expected.get(k)!r} now" for k in differing)
        raise CheckpointMismatch(
            f"{path} was made with another configuration:\n{lines}\n"
            f"put the settings back, or delete {path.parent} to train from the start"
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return out


def _unshared(modules: nn.Module) -> dict[str, Tensor]:
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    names = dict(modules.named_parameters())
    for name, tensor in modules.state_dict().items():
        if hasattr(tensor, "full_tensor"):  # a part, which may be empty here: names say the same to all processes
            out |= {name: tensor} if name in names else {}
            continue
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        out[name] = tensor
    return out


def _changing(modules: nn.Module) -> dict[str, Tensor]:
    """What training changes: all but frozen parameters, each memory once."""
    frozen = {name for name, p in modules.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: tensor for name, tensor in _unshared(modules).items() if name not in frozen}
