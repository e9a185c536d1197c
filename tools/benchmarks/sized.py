"""An experiment of any size, made on the spot: random weights in the sizes of real models, random letters as texts.

Time and memory depend on sizes alone. One letter is one token, so that texts have exactly the length that is asked for.
By itself, `sized.py ROOT ARM STEPS` prints what a fresh process measured of a cell: processor seconds of a step, and peak
resident bytes of the steps and with the setup before them.
"""

from __future__ import annotations

import json
import string
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import high_water, spent
from transformers import AutoConfig, AutoModelForCausalLM

from kvpipe.cache.capture import Recorder
from kvpipe.config import TokenizerRecipe, parse
from kvpipe.experiment.attempts import Attempt
from kvpipe.experiment.paths import Paths
from kvpipe.models.tokenizers import train_tokenizer
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.train import load_cell
from kvpipe.train.trainer import Loop, be_deterministic

Architecture = dict[str, Any]

SMOLLM2: Architecture = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}  # fmt: skip
GEMMA3: Architecture = {
    "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
    "max_position_embeddings": 32768,
}  # fmt: skip
QWEN2: Architecture = {
    "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768,
}  # fmt: skip
QWEN2_WIDE: Architecture = {**QWEN2, "num_hidden_layers": 2}
TINY: Architecture = {
    "model_type": "llama", "vocab_size": 384, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
    "max_position_embeddings": 65536,
}  # fmt: skip
"""SmolLM2-135M, Gemma 3 270M, Qwen2-7B and two layers of it, and the embedded student."""


@dataclass
class Sizes:
    """What decides time and memory."""

    student: Architecture
    teachers: list[Architecture] = field(default_factory=list)
    tokens: int = 144
    """Of every text."""
    texts: int = 40
    arms: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted keys of the configuration."""
    test: int | None = None
    """Texts of the test split; none takes a tenth of `texts`."""


def save(folder: Path, architecture: Architecture, seed: int) -> None:
    """A model folder with random weights, whose tokenizer knows bytes and no word longer than one."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(TokenizerRecipe(kind="byte_bpe", vocab_size=260, split_digits=False), ["a b"])
    options = {**architecture, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    dtype = torch.float32 if seed == 0 else torch.bfloat16
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def values(root: Path, sizes: Sizes) -> dict[str, Any]:
    """The configuration of an experiment, as written."""
    names = [f"t{number}" for number in range(len(sizes.teachers))]
    local = {name: {"source": "local", "path": str(root / name), "load": {"dtype": "bf16"}} for name in names}
    return {
        "title": "sized",
        "seeds": [0],
        "student": "student",
        "models": {**local, "student": {"source": "local", "path": str(root / "student")}},
        "data": {
            "sources": [{"kind": "files", "task": "letters", **{s: str(root / f"{s}.jsonl") for s in PARTS}}],
            "template": {"prompt": "{prompt}", "reasoning": "{reasoning}", "answer": "{answer}"},
        },
        "arms": {"control": {"role": "control"}, **sizes.arms},
        "store": {"budget_gb": 40},
        "train": {"steps": 1000, "batch_size": 8, "precision": "auto", "max_length": sizes.tokens + 2, "log_every": 1000,
                  "eval_every": 1000, "checkpoint_every": 1000},
        "evaluate": {"scorer": "none"},
    }  # fmt: skip


PARTS = ("train", "validation", "test")


def made(root: Path, sizes: Sizes) -> Inputs:
    """The experiment's models and texts in a folder; what an arm reads is made by `prepare`."""
    root.mkdir(parents=True, exist_ok=True)
    for seed, (name, architecture) in enumerate(
        [("student", sizes.student), *((f"t{n}", a) for n, a in enumerate(sizes.teachers))]
    ):
        save(root / name, architecture, seed)
    rng = np.random.default_rng(0)
    few = max(2, sizes.texts // 10)
    for part, texts in zip(PARTS, (sizes.texts, few, sizes.test or few), strict=True):
        lines = []
        for _ in range(texts):
            letters = "".join(rng.choice(list(string.ascii_lowercase), sizes.tokens))
            cut = sizes.tokens // 8
            lines.append({"prompt": letters[:cut], "reasoning": letters[cut:-cut], "answer": letters[-cut:]})
        (root / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (root / "config.json").write_text(json.dumps([values(root, sizes), sizes.settings]), encoding="utf-8")
    return opened(root)


def opened(root: Path) -> Inputs:
    """The experiment in a folder."""
    values, settings = json.loads((root / "config.json").read_text(encoding="utf-8"))
    return Inputs(parse(values, settings), Paths(root / "results"))


class Cell:
    """A cell's own training loop, step by step."""

    def __init__(self, work: Inputs, arm: str):
        unused = work.paths.root / "unused"
        self.run = Loop(load_cell(work, arm, 0, log=lambda *_: None), unused, Attempt(unused, "cpu", 1))
        self.recorder = None
        if self.run.objective.records:  # as the loop itself decides
            model = self.run.accelerator.unwrap_model(self.run.model)
            self.recorder = Recorder(
                model, self.run.objective.records_hidden, queries=self.run.objective.records_queries
            )
        self.step = 0

    def steps(self, number: int) -> None:
        """Takes the next steps."""
        be_deterministic()
        if self.recorder is not None:
            self.recorder.__enter__()
        for _ in range(number):
            self.run._step(self.step, self.recorder)
            self.step += 1
        if self.recorder is not None:
            self.recorder.__exit__()

    @property
    def tokens(self) -> tuple[int, int]:
        """Real and padded tokens so far."""
        return self.run.counters.tokens, self.run.counters.padded_tokens


def measured(root: Path, arm: str, steps: int) -> dict[str, float]:
    """What a fresh process measures of a cell."""
    command = [sys.executable, __file__, str(root), arm, str(steps)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main(root: Path, arm: str, steps: int) -> None:
    """Prints the measurements of a cell in this process."""
    torch.set_num_threads(1)
    cell = Cell(opened(root), arm)
    cell.steps(1)
    setup, reset = high_water(), Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    seconds = [spent(lambda: cell.steps(1)) for _ in range(steps)]
    found = {"seconds": float(np.median(seconds)), "peak": high_water(), "setup": max(setup, high_water())}
    print(json.dumps(found | {"tokens": cell.tokens[1] / cell.step}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
