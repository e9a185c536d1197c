"""What a folder's files show without torch: every family's own folder passes, and one that lacks something does not."""

import json

import pytest
import transformers
from model_zoo import ARCHITECTURES
from safetensors.torch import load_file, save_file
from tiny import ALPHA, save_teacher
from tokenizer_zoo import build as build_tokenizer

from kvpipe.models.folders import load_model, load_tokenizer
from kvpipe.models.headers import (
    LAYER,
    causal_types,
    misfit,
    no_cache,
    no_language_model,
    read_config,
    tensors,
    unembedded,
)
from kvpipe.models.tokenizers import fingerprint

DAMAGE = {
    "torch.compile": lambda t: {f"_orig_mod.{k}": v for k, v in t.items()},
    "DistributedDataParallel": lambda t: {f"module.{k}": v for k, v in t.items()},
    "inside peft": lambda t: {f"base_model.model.{k}": v for k, v in t.items()},
    "were renamed": lambda t: {f"foo.{k}": v for k, v in t.items()},
    r"\d missing .*\.1\.": lambda t: {k: v for k, v in t.items() if layer(k) != "1"},
    r"1 missing .*\.2\.": lambda t: {k: v for k, v in t.items() if k != [n for n in t if layer(n) == "2"][-1]},
    "not merged": lambda t: t | {f"{next(iter(t))}.lora_A.weight": next(iter(t.values())).clone()},
}


def layer(name):
    found = LAYER.match(name)
    return found and found["index"]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4", "gpt2", "opt", "falcon_rotary", "qwen3_moe", "mpt"])
def test_headers_show_what_is_missing_or_renamed(name, tmp_path):
    ARCHITECTURES[name].build().save_pretrained(tmp_path)
    values = read_config(tmp_path)
    assert misfit(tmp_path) is None and no_language_model(values) is None and no_cache(values) is None
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for words, damage in DAMAGE.items():
        save_file(damage(tensors), file, metadata={"format": "pt"})
        with pytest.raises(AssertionError, match=words):
            problem = misfit(tmp_path)
            raise AssertionError(problem)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), r"1 missing \(model.norm.weight\)"),
        (lambda t: [t.pop(k) for k in list(t) if "k_proj" in k], r"4 missing \(model.layers.0.self_attn.k_proj"),
        (lambda t: t.update(extra=t["model.norm.weight"].clone()), r"1 unexpected \(extra\)"),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:3].clone()}), r"is \[3\], expected \[36\]"),
    ],
)
def test_loading_names_what_headers_cannot_show(change, words, tmp_path):
    """At first these were drawn at random, or left out, with exit 0."""
    save_teacher(tmp_path, "alpha", ALPHA, 0)
    load_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "'lfm2' is a hybrid: 1 of its 2 layers"),
        ({"model_type": "qwen3_next", "full_attention_interval": 4}, "'qwen3_next' is a hybrid"),
        ({"model_type": "jamba", "attn_layer_period": 8}, "'jamba' is a hybrid"),
        ({"model_type": "falcon_h1"}, "'falcon_h1' is a hybrid"),
        ({"model_type": "recurrent_gemma"}, "'recurrent_gemma' is a hybrid"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "latent attention"),
        ({"model_type": "mamba"}, "no attention"),
        ({"model_type": "bert"}, "encoder"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "an encoder and a decoder"),
        ({"model_type": "qwen2_5_vl", "vision_config": {}}, "multimodal"),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {}}, "its text part"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "quantised by gptq"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "Classification"),
    ],
)
def test_what_cannot_be_distilled_is_named(values, words):
    assert words in (no_language_model(values) or no_cache(values) or "")


def test_the_causal_types_are_those_of_transformers():
    assert causal_types() == set(transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "llama"])
@pytest.mark.parametrize("name", ["llama3", "deepseek", "byte_level_unsplit"])
def test_the_tokenizer_is_the_one_of_the_file(kind, name, tmp_path):
    """transformers builds the tokenizer of these types anew, with the type's own splits."""
    backend = build_tokenizer(name).backend_tokenizer
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=backend.id_to_token(0))
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    settings = tmp_path / "tokenizer_config.json"
    named = {"qwen2": "Qwen2Tokenizer", "gpt2": "GPT2Tokenizer", "llama": "LlamaTokenizer"}[kind]
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": named}))
    loaded = load_tokenizer(tmp_path)
    text = "12345 don't  stop,\n\n  x = 22 日本語 e\u0301 😀"
    assert loaded(text).input_ids == backend.encode(text).ids
    assert (loaded.eos_token_id, loaded.chat_template) == (0, "{{ messages }}")


def test_another_tokenizer_than_the_manifest_s_is_refused(tmp_path):
    save_teacher(tmp_path, "alpha", ALPHA, 0)
    known = {
        "source": {},
        "files": {},
        "tokenizer": fingerprint(load_tokenizer(tmp_path)),
    }  # and no file's checksum, which would be another error
    (tmp_path / "MANIFEST.json").write_text(json.dumps(known))
    load_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    values = json.loads(file.read_text())
    values["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="no longer gives the ids"):
        load_tokenizer(tmp_path)
    (tmp_path / "MANIFEST.json").write_text("")
    with pytest.raises(ValueError, match="MANIFEST"):
        load_tokenizer(tmp_path)
    (tmp_path / "MANIFEST.json").unlink()
    file.write_text(file.read_text()[:500])
    with pytest.raises(ValueError, match="is cut off or damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("pads", [False, True])
def test_tokens_without_a_row_are_counted(pads, tmp_path):
    folder = tmp_path / "model"
    save_teacher(folder, "alpha", ALPHA, 0)
    assert unembedded(folder) is None
    rows = next(shape[0] for name, shape in tensors(folder).items() if "embed" in name)
    file = folder / "tokenizer.json"
    read = json.loads(file.read_text())
    read["added_tokens"].append({"id": rows, "content": "<new>"})
    file.write_text(json.dumps(read))
    if pads:
        settings = folder / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"pad_token": "<new>"}))
    words, padding = unembedded(folder)
    assert (words, padding) == (
        f"1 tokens of tokenizer.json have no row in the embedding of {rows}: '<new>' ({rows})",
        pads,
    )
