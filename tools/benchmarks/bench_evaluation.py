"""Evaluation: what stop strings and batches save, and time and memory of long texts. `python …/bench_evaluation.py`

Generation: a shipped teacher on the embedded test split, with its end-of-text token taken away, as a base model that goes on
after its answer. Long texts: random weights, a vocabulary of 32,000, one text of 32,768 tokens.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import numpy as np
import torch
from measure import spent
from transformers import LlamaConfig, LlamaForCausalLM

from kvpipe.config import ScoringConfig, Template
from kvpipe.data.corpus import generate as problems
from kvpipe.data.records import render
from kvpipe.evaluate.generate import cut, generate
from kvpipe.models.folders import load_model, load_tokenizer
from kvpipe.models.likelihood import windowed_nll

ROOT = Path(__file__).parent.parent.parent
LENGTH, VOCABULARY = 32768, 32000


def generation(count: int = 100, new: int = 160) -> None:
    """Forward passes and processor time of generation with and without stop strings, side by side and one by one."""
    model, tokenizer = load_model(ROOT / "config/embedded/math"), load_tokenizer(ROOT / "config/embedded/math")
    tokenizer.eos_token = tokenizer.pad_token
    model.generation_config.eos_token_id = None
    prompts = [render(record, Template()).prompt for record in problems("math", "test", count, 2, 0)]
    passes = 0

    def counted(*_) -> None:
        nonlocal passes
        passes += 1

    model.register_forward_hook(counted)
    texts = {}
    for name, stop, batch in (("no stop", [], 100), ("stop", ["####"], 100), ("stop, one by one", ["####"], 1)):
        scoring, passes = ScoringConfig(max_new_tokens=new, stop=stop), 0
        seconds = spent(lambda: texts.update({name: generate(model, tokenizer, prompts, scoring, batch)}))  # noqa: B023
        print(f"{count} prompts, up to {new} tokens, {name}, batch {batch}: {passes} forward passes, {seconds:.1f} s")
    whole = [cut(text, ["####"]) for text in texts["no stop"]]
    print(f"the same texts: {whole == texts['stop'] == texts['stop, one by one']}")


def long_text(window: int, stride: int) -> None:
    """Processor time and peak memory of one text in windows."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **shape)).eval()
    ids = np.random.default_rng(0).integers(0, VOCABULARY, LENGTH)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = spent(lambda: windowed_nll(model, ids, window, stride))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    logits = window * VOCABULARY * 4 / 2**20
    print(
        f"{LENGTH} tokens, window {window}, stride {stride}: {seconds:.1f} s, {grown:.0f} MiB more memory "
        f"(logits of a whole window alone: {logits:.0f} MiB)"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] == ["long"]:
        long_text(LENGTH, LENGTH // 2)
    else:
        generation()
