"""The whole path at real shapes: `python tools/real_shapes.py FOLDER` prints its transcript and times.

A hub on the loopback serves models with random weights in the geometry of Qwen2-7B, Llama-3-8B and TinyLlama-1.1B, one
layer deep (two for the student), and GSM8K and MBPP in their schemas with invented rows. `config/hpc.yaml` runs against it
with a small overlay, from an empty cache to an evaluated and published student, every step a process of its own; the
time and the peak resident memory of each are measured. Tokenizers are trained on the spot, so the vocabularies are the
real ones in the embeddings only. Needs some 12 GB of disk and 8 GB of memory.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import data_zoo
import yaml
from hub_server import HubServer

ROOT = Path(__file__).parents[1]
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-7B-Instruct": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "meta-llama/Meta-Llama-3-8B-Instruct": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
LAYERS = {"TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": 2}
TOKENIZERS = {"Qwen": "byte_bpe", "meta-llama": "byte_bpe", "TinyLlama": "metaspace_bpe"}
LICENSES = {"Qwen": "apache-2.0", "meta-llama": "llama3", "TinyLlama": "apache-2.0"}
GATED = "meta-llama/Meta-Llama-3-8B-Instruct"
DATA = {"openai/gsm8k": "gsm8k", "google-research-datasets/mbpp": "mbpp"}
ARM = "exp6"
OVERLAY = {
    "title": "real shapes",
    "seeds": [0],
    # CKA of both layers and rows for 1,024 features a layer: all that there is
    "arms": {ARM: {"set": {"fit": {"method": "ridge", "examples": 80}}}, "exp3": {"set": {"layer": {"k": 1}}}},
    "store": {"shards": 2, "batch_size": 4},
    "train": {
        "steps": 4,
        "learning_rate": 1e-3,
        "batch_size": 4,
        "accumulate": 2,
        "eval_every": 4,
        "log_every": 1,
        "threads": 1,
    },
    "evaluate": {"batch_size": 4, "tasks": {"math": {"max_new_tokens": 8}, "code": {"max_new_tokens": 8}}},
}


def save(repo: str, folder: Path) -> None:
    """A model folder in bf16 with random weights and a tokenizer trained on the spot; shards of at most 1 GB."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from kvpipe.config import TokenizerRecipe
    from kvpipe.models.tokenizers import train_tokenizer

    texts = [str(row) for preset in DATA.values() for row in data_zoo.rows(preset, "train", 0)]
    owner = repo.split("/")[0]
    recipe = TokenizerRecipe(kind=TOKENIZERS[owner], vocab_size=700, split_digits=owner != "meta-llama")
    tokenizer = train_tokenizer(recipe, texts * 3)
    values = dict(ARCHITECTURES[repo], num_hidden_layers=LAYERS.get(repo, 1))
    config = AutoConfig.for_model(values.pop("model_type"), **values, tie_word_embeddings=False)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    # drawing a billion numbers takes minutes: a block of them, over and over, is as random to what follows
    block = torch.randn(1_000_003, generator=torch.Generator().manual_seed(len(repo))).mul_(0.02).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for start in range(0, len(flat), len(block)):
                part = flat[start : start + len(block)]
                part.copy_(block[: len(part)])
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
    model.save_pretrained(folder, max_shard_size="1GB")
    tokenizer.save_pretrained(folder)


@dataclass
class Measured:
    """One process: what it printed, its wall time and its peak resident memory."""

    command: str
    seconds: float
    gigabytes: float
    output: str
    status: int


@dataclass
class Transcript:
    """Runs commands in order and keeps what they cost."""

    folder: Path
    environment: dict[str, str]
    steps: list[Measured] = field(default_factory=list)

    def run(self, *arguments: str, expect: int = 0, **variables: str) -> Measured:
        """One command; its exit status must be the expected one."""
        out = self.folder / "output.txt"
        begun = time.perf_counter()
        with out.open("w") as handle:
            pid = os.posix_spawn(
                sys.executable,
                [sys.executable, *arguments],
                self.environment | variables,
                file_actions=[(os.POSIX_SPAWN_DUP2, handle.fileno(), 1), (os.POSIX_SPAWN_DUP2, handle.fileno(), 2)],
            )
            _, status, usage = os.wait4(pid, 0)
        shown = shlex.join(a.replace(str(self.folder) + "/", "").replace(str(ROOT) + "/", "") for a in arguments)
        text = out.read_text().replace(str(self.folder) + "/", "").replace(str(ROOT) + "/", "")
        measured = Measured(
            shown.removeprefix("-m "),
            time.perf_counter() - begun,
            usage.ru_maxrss * 1024 / 1e9,
            text,
            os.waitstatus_to_exitcode(status),
        )
        assert measured.status == expect, f"{shown}: {text}"
        self.steps.append(measured)
        return measured

    def kvpipe(self, *arguments: str, **more: Any) -> Measured:
        """One step of kvpipe with the cluster's configuration and the overlay."""
        files = [self.folder / "hpc.yaml", self.folder / "shapes.yaml"]
        options = [o for f in files for o in ("--config", str(f))] + ["--results", str(self.folder / "results")]
        return self.run("-m", "kvpipe", *arguments, *options, **more)


def go(folder: Path) -> Transcript:
    """All of it, below `folder`; raises where a step fails."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "shapes.yaml").write_text(yaml.safe_dump(OVERLAY))
    shutil.copy(ROOT / "config" / "hpc.yaml", folder)  # the lock is written beside it
    with HubServer() as hub:
        return _go(folder, hub)


def _go(folder: Path, hub: HubServer) -> Transcript:
    environment = hub.environment(folder / "hf") | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    transcript = Transcript(folder, environment)
    for repo in ARCHITECTURES:
        path = folder / "hub" / repo
        if not path.is_dir():  # of an earlier run
            transcript.run(str(Path(__file__)), "--save", repo, str(path))
        hub.add(repo, path, license=LICENSES[repo.split("/")[0]], gated=repo == GATED)
    for repo, preset in DATA.items():
        (folder / "hub" / repo).mkdir(parents=True, exist_ok=True)
        hub.add(repo, data_zoo.write(folder / "hub" / repo, preset), kind="datasets")
    step = transcript.kvpipe
    token = {"HF_TOKEN": hub.TOKEN}
    step("lock", expect=1)
    step("lock", **token)
    hub.cut["model-00002-of-00003.safetensors"] = 300_000_000
    step("models", **token)
    step("data")
    offline = {"HF_HUB_OFFLINE": "1"}
    for model in ("tinyllama", "qwen", "llama"):
        step("encode", "--model", model, **offline)
    for teacher in ("qwen", "llama"):
        step("layer-map", "--teacher", teacher, **offline)
        step("teacher-kv", "--teacher", teacher, **offline)
    step("fit", "--arm", ARM, **offline)
    step("train", "--arm", ARM, **offline)
    model, items = folder / "results/train" / ARM / "seed0/model", folder / "results/evaluate" / ARM / "seed0.parquet"
    step("evaluate", "--model", str(model), "--out", str(items), **offline)
    step("publish", "--arm", ARM, "--repo", "me/student", **token)
    return transcript


def markdown(transcript: Transcript) -> str:
    """The table of costs and the transcript."""
    lines = ["| step | seconds | peak memory |", "|---|---|---|"]
    # options that are the same in every line say nothing
    same = ("--config hpc.yaml", "--config shapes.yaml", "--results results")
    for m in transcript.steps:
        for option in same:
            m.command = m.command.replace(f" {option}", "")
        lines.append(f"| `{m.command}` | {m.seconds:.0f} | {m.gigabytes:.1f} GB |")
    lines += ["", "```"]
    for m in transcript.steps:
        lines += [f"$ {m.command}", *m.output.strip().splitlines()]
    return "\n".join([*lines, "```"])


def main() -> None:
    """`FOLDER`: the run; `--save REPO FOLDER`: one model, in a process of its own, whose memory ends with it."""
    if sys.argv[1] == "--save":
        save(sys.argv[2], Path(sys.argv[3]))
        return
    folder = Path(sys.argv[1]).resolve()
    print(markdown(go(folder)))
    index = json.loads((folder / "results/teacher_kv/llama/student/index.json").read_text())
    print(f"\nllama's store: {index['bytes_per_token']:.0f} bytes a token, fidelity {index['attention_cosine']:.5f}")
    shutil.rmtree(folder / "hub")


if __name__ == "__main__":
    main()
