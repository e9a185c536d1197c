"""Caches of transformers' own, written by somebody else, as a store."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import ALPHA, TOKENIZERS
from transformers import AutoConfig, AutoModelForCausalLM

from kvpipe import capture
from kvpipe.cache.convert import import_caches
from kvpipe.cache.store import Store


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A model, three texts, and a folder of their `past_key_values`."""
    assert TOKENIZERS
    torch.manual_seed(0)
    architecture = {**ALPHA, "vocab_size": 50}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture)).eval()
    folder = tmp_path_factory.mktemp("caches")
    texts = [torch.randint(50, (1, n)) for n in (5, 9, 2)]
    for number, ids in enumerate(texts):
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
        tensors = {}
        for layer, entry in enumerate(cache.layers):
            tensors[f"past_key_values.{layer}.key"] = entry.keys.contiguous()
            tensors[f"past_key_values.{layer}.value"] = entry.values.contiguous()
        save_file(tensors, folder / f"text-{number}.safetensors")
    return model, texts, folder


def test_an_imported_cache_is_what_capture_sees(written, tmp_path):
    model, texts, folder = written
    store = import_caches(folder, tmp_path / "store", model.config)
    assert store.layers == (0, 1, 2, 3) and store.index["rows"] == 16
    rows = store.rows("keys"), store.rows("values")
    start = 0
    for ids in texts:
        with torch.no_grad():
            kv = capture(model, ids)
        for got, exact in zip(rows, (kv.keys, kv.values), strict=True):
            expected = exact[:, 0].permute(2, 0, 1, 3)  # time layer head dim
            found = got[start : start + ids.shape[1]]
            assert ((found - expected).abs() <= expected.abs() * 2**-8 + 1e-3).all()
        start += ids.shape[1]
    assert store.index["attention_cosine"] > 0.999


def test_the_page_of_the_format_says_what_is_in_a_store(written, tmp_path):
    """Read without kvpipe, as docs/library/store.md says."""
    model, _, folder = written
    store = import_caches(folder, tmp_path, model.config, dtype="int8")
    index = json.loads((tmp_path / "index.json").read_text())
    assert {"key", "shards", "rows", "bytes_per_token", "attention_cosine"} <= index.keys()
    got = []
    for entry in index["shards"]:
        with safe_open(tmp_path / entry["file"], "pt") as file:
            assert json.loads(file.metadata()["key"])["dtype"] == "int8"
            got.append(file.get_tensor("keys").float() * file.get_tensor("keys.scale").float()[..., None])
    torch.testing.assert_close(torch.cat(got), Store.open(tmp_path).rows("keys"))
    assert store.rows("values").shape == (16, 4, 3, 8)


def test_what_is_no_cache_is_named(written, tmp_path):
    model, _, _ = written
    with pytest.raises(ValueError, match="has no \\*\\.safetensors"):
        import_caches(tmp_path, tmp_path / "out", model.config)
    save_file({"0.key": torch.zeros(3, 2, 8)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors: no key of layers \[1, 2, 3\]"):
        import_caches(tmp_path, tmp_path / "out", model.config)
    some = {f"{n}.{kind}": torch.zeros(2, 2, 8) for n in range(4) for kind in ("key", "value")}
    save_file(some, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"key of layer 0 is \(2, 2, 8\); expected \(3, time, 8\)"):
        import_caches(tmp_path, tmp_path / "out", model.config)
