"""Attention outputs: those of transformers, and the laws of their cosine."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvpipe.cache.attention import attention_outputs, output_cosine
from kvpipe.cache.capture import Recorder
from kvpipe.cache.kv import KV

B, T, L, HEADS, KV_HEADS, D = 3, 7, 2, 6, 2, 4


@pytest.fixture(scope="module")
def recorded():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=23,
            hidden_size=24,
            intermediate_size=20,
            num_hidden_layers=L,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=D,
        )
    ).eval()
    found = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    ids = torch.randint(23, (B, T))
    with torch.no_grad(), Recorder(model) as recorder:
        model(input_ids=ids, use_cache=False)
    return recorder.queries(), recorder.kv(), recorder.ropes, torch.stack(found)


def test_outputs_are_those_of_transformers(recorded):
    queries, kv, ropes, expected = recorded
    found = attention_outputs(queries, kv, ropes).transpose(2, 3).flatten(3)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_cosine_is_one_for_the_same_cache_and_for_scaled_values_and_minus_one_for_turned_ones(recorded):
    queries, kv, ropes, _ = recorded
    mask = torch.ones(B, T, dtype=torch.bool)
    for factor, expected in ((1.0, 1.0), (3.0, 1.0), (-1.0, -1.0)):
        found = output_cosine(queries, kv, KV(kv.keys, factor * kv.values), ropes, mask)
        assert found == pytest.approx([expected] * L, abs=1e-5)


def test_masked_positions_keep_their_own_entry_and_are_not_counted(recorded):
    queries, kv, ropes, _ = recorded
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[:, 2] = True
    torch.manual_seed(1)
    other = KV(kv.keys.clone(), kv.values.clone())
    other.keys[:, :, :, 3:], other.values[:, :, :, :2] = torch.nan, torch.nan
    assert output_cosine(queries, kv, other, ropes, mask) == pytest.approx([1.0] * L, abs=1e-5)
    other.values[:, :, :, 2] = -kv.values[:, :, :, 2]
    assert all(cosine < 0.999 for cosine in output_cosine(queries, kv, other, ropes, mask))
