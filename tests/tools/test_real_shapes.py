"""The real geometries of config/hpc.yaml, from a hub's empty cache to an evaluated and published student."""

import json

import numpy as np
import pandas as pd
import pytest
from real_shapes import ARM, go

GEOMETRY = {"qwen": (28, 4, 152064, 1e6), "llama": (32, 8, 128256, 5e5), "tinyllama": (32, 4, 32000, 1e4)}


@pytest.mark.slow
def test_the_whole_path_at_real_shapes(tmp_path):
    """Some 12 GB of disk, 8 GB of memory and minutes."""
    transcript = go(tmp_path / "run")
    said = {number: step.output for number, step in enumerate(transcript.steps)}
    refused, locked, downloaded = [said[number] for number in sorted(said)[3:6]]
    assert "models.llama" in refused and "gated" in refused and "HF_TOKEN is not set" in refused
    assert "licence llama3" in locked and "Trying to resume download" in downloaded
    results = tmp_path / "run" / "results"
    for name, (heads, kv_heads, vocabulary, base) in GEOMETRY.items():
        config = json.loads((results / "models" / name / "config.json").read_text())
        assert (config["num_attention_heads"], config["num_key_value_heads"]) == (heads, kv_heads)
        assert (config["vocab_size"], config["rope_parameters"]["rope_theta"]) == (vocabulary, base)
    for name, (_, kv_heads, _, _) in GEOMETRY.items():
        if name != "tinyllama":
            index = json.loads((results / "teacher_kv" / name / "student" / "index.json").read_text())
            assert index["attention_cosine"] > 0.999
            # one layer in int8, 16 next tokens, nats; and what a shard's header takes
            assert index["bytes_per_token"] == pytest.approx(2 * kv_heads * (128 + 2) + 16 * 6 + 4, rel=0.02)
    items = pd.read_parquet(results / "evaluate" / ARM / "seed0.parquet")
    assert len(items) == 12 and set(items.task) == {"math", "code"} and np.isfinite(items.nll).all()
    card = (results / "train" / ARM / "seed0" / "model" / "README.md").read_text()
    assert "apache-2.0" in card and "llama3" in card and "license: other" in card
