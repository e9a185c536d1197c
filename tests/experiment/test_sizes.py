"""Sizes from a config.json alone are those of the model that transformers makes of it."""

import pytest
import transformers

from kvpipe.cache.capture import kv_geometry
from kvpipe.experiment.sizes import count_parameters, read_header, shape

CONFIGS = {
    "grouped": transformers.LlamaConfig(
        num_hidden_layers=5, hidden_size=60, num_attention_heads=6, num_key_value_heads=2
    ),
    "own head dimension": transformers.Qwen3Config(
        num_hidden_layers=3, hidden_size=60, num_attention_heads=6, num_key_value_heads=3, head_dim=14
    ),
    "one head for all": transformers.FalconConfig(
        num_hidden_layers=3, hidden_size=60, num_attention_heads=6, multi_query=True, new_decoder_architecture=False
    ),
    "GPT BigCode": transformers.GPTBigCodeConfig(n_layer=3, n_embd=60, n_head=6, multi_query=True),
    "other names": transformers.GPT2Config(n_layer=3, n_embd=60, n_head=5),
    "nested": transformers.DbrxConfig(
        n_layers=3, d_model=60, n_heads=6, attn_config={"kv_n_heads": 2}, ffn_config={"ffn_hidden_size": 32}
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_and_values_take_what_the_model_has(name):
    config = CONFIGS[name]
    found = shape(config.to_dict())
    assert found is not None and found.geometry == tuple(kv_geometry(config))


def test_parameters_are_counted_from_the_headers(tiny):
    folder = tiny.paths.model("alpha")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    entries = read_header(folder / "model.safetensors")
    assert "__metadata__" not in entries
    assert count_parameters(folder) == sum(p.numel() for p in model.parameters())


def test_a_header_that_is_no_mapping_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((4).to_bytes(8, "little") + b"[1] " + bytes(8))
    with pytest.raises(ValueError, match=r"model.safetensors is cut off, or no safetensors file"):
        read_header(path)
