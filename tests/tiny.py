"""A tiny experiment, offline and made on the fly: two teachers with random weights, a student from scratch, 28 records.

`build(folder)` gives the `Inputs` with data, models and tokens made; `kvpipe.steps.train.prepare(work, arm)` makes the
rest of an arm (layer maps, stores, projectors). All sizes are odd and distinct, so that a swapped axis cannot pass:

=========  ======  =======  ========  ==========================
model      layers  KV heads head dim  tokenizer
=========  ======  =======  ========  ==========================
`alpha`    4       3        8         byte-level BPE
`beta`     5       2        14        unigram (spaces as ▁, BOS)
`gamma`    2       5        10        BPE with spaces as ▁ (from here on: only where a test asks for it)
`delta`    6       1        16        byte-level BPE as Llama-3's: groups of digits, BOS
`epsilon`  7       4        12        byte-level BPE as DeepSeek's: splits one after another
`student`  3       2        6         byte-level BPE, own training
=========  ======  =======  ========  ==========================

The fixture `tiny` (tests/conftest.py) builds one per test session and shares it: what is made under its results folder
may be used, not changed. A test that changes artefacts or settings calls `build` on its own `tmp_path`, with dotted
overrides: `build(tmp_path, {"store.dtype": "int8", "arms.kv.set.fuse": {"kind": "mean"}})`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizer_zoo
import torch
from accelerate.state import AcceleratorState

from kvpipe.config import Config, DataConfig, Reading, TokenizerRecipe, parse
from kvpipe.data.corpus import generate
from kvpipe.data.encoding import Encoding, encode_records
from kvpipe.experiment.paths import Paths
from kvpipe.models.folders import build_model
from kvpipe.models.pretrain import tokenizer_texts
from kvpipe.models.tokenizers import train_tokenizer
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.make import make


@contextmanager
def own_accelerator_state() -> Iterator[None]:
    """accelerate keeps device and precision of a process's first training; what runs within has its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


DATA: dict[str, Any] = {
    "sources": [
        {"kind": "embedded", "task": "math", "train": 15, "validation": 5, "test": 3, "difficulty": 1},
        {"kind": "embedded", "task": "code", "train": 13, "validation": 4, "test": 2, "difficulty": 1},
    ]
}
ALPHA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 36,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
BETA: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 44,
    "intermediate_size": 28,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "max_position_embeddings": 512,
}
GAMMA: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 50,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 512,
}
DELTA: dict[str, Any] = {
    "model_type": "gemma3_text",
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
EPSILON: dict[str, Any] = {
    "model_type": "gpt_neox",
    "hidden_size": 48,
    "intermediate_size": 36,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
TEACHERS = {"alpha": ALPHA, "beta": BETA, "gamma": GAMMA, "delta": DELTA, "epsilon": EPSILON}
ZOO = {"delta": "llama3", "epsilon": "deepseek"}
"""Teachers whose tokenizer is one of tests/tokenizer_zoo.py."""
STUDENT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 512,
}
TOKENIZERS = {
    "alpha": TokenizerRecipe(kind="byte_bpe", vocab_size=330, split_digits=False),
    "beta": TokenizerRecipe(kind="unigram", vocab_size=340),
    "gamma": TokenizerRecipe(kind="metaspace_bpe", vocab_size=320),
    "student": TokenizerRecipe(kind="byte_bpe", vocab_size=300),
}
ARMS: dict[str, Any] = {
    "control": {"role": "control"},
    # one teacher and the plainest setting of everything
    "one": {
        "base": "control",
        "role": "experiment",
        "set": {"teachers": ["alpha"], "loss": {"keys": {}, "values": {}}},
    },
    # two teachers in one space
    "two": {"base": "one", "set": {"teachers": ["alpha", "beta"], "fit.method": "joint_pca"}},
    "own": {"base": "two", "set": {"time": {"kind": "segment"}}},
    "attention": {"base": "two", "set": {"fuse.kind": "attention"}},
    "task": {"base": "two", "set": {"fuse": {"kind": "task", "weights": {"math": [0.7, 0.3], "code": [0.3, 0.7]}}}},
    "select": {"base": "two", "set": {"fuse.kind": "select"}},
    "elastic": {"base": "two", "set": {"projector.kind": "elastic", "fit": {"method": "reconstruct", "steps": 5}}},
    "cka": {"base": "two", "set": {"layer": {"kind": "cka", "k": 2}}},
    "joint": {
        "base": "two",
        "set": {"projector": {"kind": "heads", "mode": "joint"}, "fit.method": "grouped"},
    },
    "shuffled": {"base": "two", "role": "null", "set": {"shuffle_teacher": True}},
    "position": {"base": "one", "role": "null", "set": {"time.kind": "position"}},
    "logit": {
        "base": "control",
        "role": "baseline",
        "set": {
            "teachers": ["alpha", "beta"],
            "loss": {"logits": {}},
            "fuse": {"kind": "task", "weights": {"default": [0.6, 0.4]}},
        },
    },
    "relation": {
        "base": "control",
        "role": "baseline",
        "set": {"teachers": ["alpha"], "loss": {"relations": {"heads": 2}}},
    },
}
MORE_ARMS: dict[str, Any] = {
    # terms beside one another, and what needs other columns of the teachers
    "many": {
        "base": "task",
        "set": {"loss.logits": {"weight": 0.5}, "loss.values.schedule": {"kind": "stop", "until": 0.5}},
    },
    "attention-outputs": {
        "base": "two",
        "set": {"loss": {"attention": {"distance": "cosine"}, "attention_kl": {"opening": 0.75, "skip_sink": 1}}},
    },
    "states": {
        "base": "control",
        "set": {
            "teachers": ["alpha", "beta"],
            "loss": {"hidden": {"layers": [0, -1]}, "final_state": {"distance": "mse"}},
        },
    },
    "likelihood": {
        "base": "control",
        "set": {
            "teachers": ["alpha", "beta"],
            "loss": {"likelihood": {"temperature": 10}, "cross_entropy": {"weight": 0}},
        },
    },
    "span": {"base": "two", "set": {"fuse": {"kind": "select", "per": "span"}}},
    "similarity": {"base": "two", "set": {"fuse.kind": "similarity"}},
    "agreement": {"base": "two", "set": {"fuse.kind": "agreement"}},
    "learnable": {"base": "two", "set": {"fuse": {"kind": "learnable", "entropy": 0.1}}},
}
"""Arms that few tests need."""


def values(folder: Path) -> dict[str, Any]:
    """The configuration as written, with teachers below `folder`."""
    return {
        "title": "tiny",
        "seeds": [0, 1],
        "student": "student",
        "data": DATA,
        "models": {
            "alpha": {"source": "local", "path": str(folder / "teachers" / "alpha")},
            "beta": {"source": "local", "path": str(folder / "teachers" / "beta")},
            "student": {
                "source": "scratch",
                "architecture": STUDENT,
                "tokenizer": TOKENIZERS["student"].model_dump(),
            },
        },
        "arms": ARMS,
        "store": {"layers": "all", "batch_size": 7, "top_logits": 5},
        "layer_map": {"examples": 5, "warmup_steps": 2},
        "train": {"steps": 6, "batch_size": 4, "eval_every": 3, "log_every": 2, "checkpoint_every": 4},
        "evaluate": {"batch_size": 3, "max_new_tokens": 5},
        "stats": {"resamples": 50},
    }


def config(folder: Path, overrides: dict[str, Any] | None = None) -> Config:
    """The configuration, validated; `overrides` are dotted keys."""
    return parse(values(folder), overrides)


def save_teacher(folder: Path, name: str, architecture: dict[str, Any], seed: int) -> None:
    """A folder with random weights and a tokenizer that is trained on the records.

    Weights are larger than at initialisation, so that attention and logits are far from uniform.
    """
    split = DataConfig.model_validate(DATA)
    records = [record for task in ("math", "code") for record in generate(task, "train", 20, 1, split.seed)]
    if name in ZOO:
        tokenizer = copy.deepcopy(tokenizer_zoo.build(ZOO[name]))  # the zoo keeps what it built
        tokenizer.add_special_tokens({"pad_token": "<|pad|>", "eos_token": "<|end|>"})
    else:
        tokenizer = train_tokenizer(TOKENIZERS[name], tokenizer_texts(records, split))
    model = build_model(architecture, tokenizer, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def encoded(work: Inputs, model: str, split: str, reading: Reading = "student") -> Encoding:
    """A split as a model's tokens, of any reading, made here and now."""
    student = model == work.config.student
    return encode_records(work.records(split, reading), work.tokenizer(model), work.config.data.template, end=student)


def build(
    folder: Path, overrides: dict[str, Any] | None = None, teachers: tuple[str, ...] = ("alpha", "beta")
) -> Inputs:
    """The loaders of an experiment under `folder` with data, models and tokens made, nothing else."""
    paths = {name: folder / "teachers" / name for name in teachers}
    for seed, (name, path) in enumerate(paths.items()):
        save_teacher(path, name, TEACHERS[name], seed)
    local = {f"models.{name}": {"source": "local", "path": str(path)} for name, path in paths.items()}
    work = Inputs(config(folder, local | (overrides or {})), Paths(folder / "results"))
    models = (*teachers, "student")
    encode = work.steps["encode"]
    texts = [file for job in encode.jobs() if job["model"] in models for file in encode.makes(**job).values()]
    make(work, [*map(work.paths.manifest, models), *texts], log=lambda *_: None)
    return work
