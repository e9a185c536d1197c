"""The teacher pass against the bare decoder, and losses over a large vocabulary in pieces against the plain ones.

Parts of `run.py`. By itself, `bench_teacher.py [MODEL FOLDER]` prints its lines; without a folder the model has SmolLM2-135M's
sizes and random weights, which cost the same. `bench_teacher.py FOLDER|- TOKENS` prints the memory that a fresh process has
loaded the model with, and its peak after a shard of so many tokens with all layers, nats and likeliest tokens.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from measure import Row, high_water, spent
from torch.nn import functional as F

from kvpipe.cache.forward import batch_tokens
from kvpipe.cache.store import StoreKey, build_shard, write_index
from kvpipe.config import StoreConfig
from kvpipe.data.batches import collate
from kvpipe.data.encoding import Encoding
from kvpipe.distill.losses import CrossEntropy, FullKL, head_losses
from kvpipe.models.head import Head
from kvpipe.models.likelihood import groups

SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "head_dim": 64,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
ROWS = 1152  # tokens of a training step in the study: 8 texts of GSM8K


def teacher(folder: str | None) -> transformers.PreTrainedModel:
    """In bf16, as a teacher is held on a CPU that has it."""
    if folder in (None, "-"):
        config = transformers.LlamaConfig(**SMOLLM2, dtype=torch.bfloat16)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def texts(tokens: int, vocabulary: int, seed: int = 0) -> Encoding:
    """Random ids in texts as long as those of GSM8K: about 190 tokens, a tenth over 290."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(int(np.clip(rng.lognormal(5.17, 0.38), 60, 600)))
    return of_lengths(lengths, vocabulary, rng)


def equal_texts(count: int, length: int, vocabulary: int) -> Encoding:
    """Random ids in so many texts of one length."""
    return of_lengths([length] * count, vocabulary, np.random.default_rng(0))


def of_lengths(lengths: list[int], vocabulary: int, rng: np.random.Generator) -> Encoding:
    """Random ids in texts of given lengths."""
    count, total = len(lengths), sum(lengths)
    return Encoding(
        ids=rng.integers(3, vocabulary, total),
        spans=np.zeros((total, 2), np.int64),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        segments=np.zeros((count, 3, 2), np.int64),
        byte_segments=np.zeros((count, 3, 2), np.int64),
        segment_hashes=np.zeros((count, 3), np.int64),
    )


def store_of(
    model, encoding: Encoding, folder: Path, layers: tuple[int, ...], top: int, nll: bool, dtype: str = "bf16"
) -> Path:
    """One shard and its index."""
    key = StoreKey("m", "d", layers, "student", dtype, top, 1, nll)
    path = folder / "shard-00000.safetensors"
    path.unlink(missing_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        build_shard(model, encoding, key, StoreConfig.model_validate({"dtype": dtype, "top_logits": top}), 0, path, 0)
    write_index(folder, key, [path])
    return path


@torch.no_grad()
def bare(model, encoding: Encoding, head: bool) -> None:
    """The decoder alone over the same batches; with `head`, every token's logits too, as the model makes them."""
    size = batch_tokens(model, Head.of(model), model.config.num_hidden_layers)
    for members in groups(encoding.lengths, 64, size, longest_first=True):
        batch = collate(encoding, members, 0).to(model.device)
        part = model if head else model.get_decoder()
        part(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


def pass_against_decoder(folder: str | None, repeats: int, tokens: int) -> list[Row]:
    """Three kinds of store, each timed in turn with the bare decoder."""
    model = teacher(folder)
    encoding = texts(tokens, model.config.vocab_size)
    count = model.config.num_hidden_layers
    six = tuple(sorted({round(i * (count - 1) / 5) for i in range(6)}))
    kinds = {
        f"6 of {count} layers, nothing of the logits": (six, 0, False, False),
        f"all {count} layers, nothing of the logits": (tuple(range(count)), 0, False, False),
        f"all {count} layers, nats and 32 likeliest tokens, against decoder and head": (
            tuple(range(count)),
            32,
            True,
            True,
        ),
    }
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for what, (layers, top, nll, head) in kinds.items():
            plain, passed = [], []
            for _ in range(repeats):
                plain.append(spent(lambda h=head: bare(model, encoding, h)))
                passed.append(spent(lambda a=layers, t=top, n=nll: store_of(model, encoding, Path(temporary), a, t, n)))
            share = statistics.median(p / t for p, t in zip(plain, passed, strict=True))
            rate = len(encoding.ids) / statistics.median(passed)
            rows.append(
                Row(
                    f"teacher pass, {model.config.model_type} of {model.num_parameters() / 1e6:.0f}M in bf16, {what}: "
                    "tokens per second of the bare decoder's",
                    f"{share:.0%} ({rate:,.0f} tokens/s)",
                    "≥ 80%",
                    share >= 0.8,
                )
            )
    return rows


def print_memory(folder: str, tokens: int) -> None:
    """Resident bytes with the model loaded, and the peak after a shard."""
    model, reset = teacher(folder), Path("/proc/self/clear_refs")
    if reset.exists():  # reading the weights takes more than holding them
        reset.write_text("5")
    loaded = high_water()
    with tempfile.TemporaryDirectory() as temporary:
        layers = tuple(range(model.config.num_hidden_layers))
        path = store_of(model, texts(tokens, model.config.vocab_size), Path(temporary), layers, 32, True)
        print(loaded, high_water(), path.stat().st_size)


def memory(folder: str | None, sizes: tuple[int, ...]) -> list[Row]:
    """Peak memory over that of the loaded model, of fresh processes, for stores of several sizes."""
    found = []
    for tokens in sizes:
        command = [sys.executable, __file__, folder or "-", str(tokens)]
        last = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        found.append(tuple(map(int, last.split())))
    said = ", ".join(f"{(peak - loaded) / 1e9:.2f} GB ({size / 1e9:.2f} GB on disk)" for loaded, peak, size in found)
    worst = max(peak - loaded for loaded, peak, _ in found)
    what = f"… peak memory over the loaded model, stores of {', '.join(f'{t:,}' for t in sizes)} tokens"
    return [Row(what, said, "≤ 1 GB", worst <= 1e9)]


def losses_in_pieces(repeats: int) -> list[Row]:
    """Cross-entropy, and with it KL to a teacher of the same vocabulary, forward and backward, against the plain ones."""
    torch.manual_seed(0)
    vocabulary, width = SMOLLM2["vocab_size"], SMOLLM2["hidden_size"]
    states, theirs = torch.randn(2, ROWS, width).bfloat16()
    weight, other = (torch.randn(2, vocabulary, width) * 0.05).bfloat16()
    targets, ones = torch.randint(vocabulary, (ROWS,)), torch.full((ROWS,), 1 / ROWS)

    def pieces(names: str, trained: bool) -> None:
        leaf, head = states.clone().requires_grad_(), Head(weight.clone().requires_grad_(trained))
        parts = {"ce": (CrossEntropy(targets), ones), "kl": (FullKL(Head(other), theirs), ones)}
        head_losses(head, leaf, {n: parts[n] for n in names.split("+")}, {"ce": 1.0, "kl": 1.0})[0].backward()

    def plain(names: str, trained: bool) -> None:
        leaf, head = states.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        logits = F.linear(leaf, head).float()
        loss = F.cross_entropy(logits, targets)
        if "kl" in names:
            teacher = F.linear(theirs, other).float().log_softmax(-1)
            loss = loss + F.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="batchmean")
        loss.backward()

    rows = []
    for names, trained in (("ce", False), ("ce", True), ("ce+kl", False)):
        plain(names, trained)
        ratios = [
            spent(lambda n=names, t=trained: pieces(n, t)) / spent(lambda n=names, t=trained: plain(n, t))
            for _ in range(repeats)
        ]
        what = {"ce": "cross-entropy", "ce+kl": "cross-entropy and KL from final states"}[names]
        kind = "trained" if trained else "frozen"
        rows.append(
            Row(
                f"{what} over {vocabulary:,} words, {ROWS:,} tokens, {kind} head, in pieces against plain, forward and backward",
                f"{statistics.median(ratios):.2f}×",
                "≤ 1×",
                statistics.median(ratios) <= 1,
            )
        )
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = sys.argv[1] if len(sys.argv) > 1 else None
    if len(sys.argv) > 2:
        print_memory(sys.argv[1], int(sys.argv[2]))
    else:
        for part in (
            losses_in_pieces(3), pass_against_decoder(folder, 3, 4000), memory(folder, (1500, 4500, 9000))
        ):  # fmt: skip
            for row in part:
                print(f"{row.what}: {row.measured} (bar {row.bar})", flush=True)
