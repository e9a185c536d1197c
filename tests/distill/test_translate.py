"""A translated cache: the student's own where the teacher is its twin, and one that `generate` goes on from."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from kvpipe.align.layermap import LayerPlan
from kvpipe.config import PROJECTORS
from kvpipe.distill.projectors import Geometry, build_projector
from kvpipe.distill.translate import translate_cache

LAYERS, HEADS, DIM = 3, 2, 10
TOKENS = torch.arange(14).reshape(2, 7) + 3


def model(seed=0, kind="llama", base=10000.0, **more):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind, vocab_size=61, hidden_size=40, intermediate_size=28, num_attention_heads=4,
        num_key_value_heads=HEADS, head_dim=DIM, max_position_embeddings=128, pad_token_id=0, eos_token_id=2,
        **{"num_hidden_layers": LAYERS, "rope_parameters": {"rope_type": "default", "rope_theta": base}} | more,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def identity(layers=range(LAYERS)):
    """A projector that takes these rows' layers as they are."""
    index = torch.tensor(list(layers))[None, :, None].expand(2, -1, 1)
    plan = LayerPlan(index, torch.ones(2, len(index[0]), 1), False)
    projector = build_projector(PROJECTORS(), Geometry(HEADS, DIM, HEADS, DIM, len(index[0])), plan, 1)
    for kind in range(2):
        for layer in range(len(index[0])):
            projector.set_linear(kind, layer, torch.eye(HEADS * DIM), torch.zeros(HEADS * DIM))
    return projector


def prefill(model, tokens=TOKENS):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=True).past_key_values


def test_of_a_twin_it_is_the_students_own():
    twin = model()
    translated = translate_cache(prefill(twin), twin, twin, identity(), range(LAYERS))
    assert isinstance(translated, DynamicCache) and translated.get_seq_length() == TOKENS.shape[1]
    for mine, theirs in zip(translated.layers, prefill(twin).layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys)
        torch.testing.assert_close(mine.values, theirs.values)


def test_half_precision_is_rounded_once():
    twin = model().to(torch.bfloat16)
    translated = translate_cache(prefill(twin), twin, twin, identity(), range(LAYERS))
    same = [torch.equal(a.keys, b.keys) for a, b in zip(translated.layers, prefill(twin).layers, strict=True)]
    assert all(same) and translated.layers[0].keys.dtype == torch.bfloat16


def test_generate_goes_on_from_it_as_from_a_prefill_of_its_own():
    twin = model(1)
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    expected = twin.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **settings)
    cache = translate_cache(prefill(twin, TOKENS[:, :-1]), twin, twin, identity(), range(LAYERS))
    found = twin.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), past_key_values=cache, **settings)
    assert torch.equal(found, expected)
    # and it is the cache that it goes on from
    other = translate_cache(prefill(model(2), TOKENS[:, :-1]), model(2), twin, identity(), range(LAYERS))
    assert not torch.equal(
        twin.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), past_key_values=other, **settings), expected
    )


def test_keys_are_turned_by_the_students_own_rotary_embedding():
    """The first layer's keys before rotation are the same of any base."""
    teacher, student = model(3, base=10000.0), model(3, base=500.0)
    student.load_state_dict(teacher.state_dict())
    translated = translate_cache(prefill(teacher), teacher, student, identity(), range(LAYERS)).layers[0]
    own = prefill(student).layers[0]
    torch.testing.assert_close(translated.keys, own.keys)
    assert (prefill(teacher).layers[0].keys - own.keys).abs().max() > 0.01


def test_layers_are_those_that_were_kept():
    teacher = model(4)
    student = model(4, num_hidden_layers=2)
    translated = translate_cache(prefill(teacher), teacher, student, identity([0, 1]), [0, 2])
    for mine, layer in zip(translated.layers, (0, 2), strict=True):
        torch.testing.assert_close(mine.keys, prefill(teacher).layers[layer].keys)


def test_tokens_take_what_the_overlap_says_and_the_first_where_it_says_nothing():
    teacher = model(5)
    index, weight = torch.tensor([[0, 0], [1, 3], [6, 0]]), torch.tensor([[0.0, 0.0], [0.25, 0.75], [1.0, 0.0]])
    translated = translate_cache(prefill(teacher), teacher, teacher, identity(), range(LAYERS), (index, weight))
    whole = [layer.values for layer in prefill(teacher).layers]
    for layer, values in zip(translated.layers, whole, strict=True):
        expected = torch.stack([values[:, :, 0], 0.25 * values[:, :, 1] + 0.75 * values[:, :, 3], values[:, :, 6]], 2)
        torch.testing.assert_close(layer.values, expected)


def test_a_cache_that_has_dropped_tokens_is_refused():
    types = ["full_attention", "sliding_attention", "full_attention"]
    teacher = model(6, "gemma3_text", sliding_window=5, layer_types=types, rope_parameters=None)
    with pytest.raises(ValueError, match=r"layers \[1\] of the teacher's cache hold fewer than the 7 tokens"):
        translate_cache(prefill(teacher), teacher, model(6), identity(), range(LAYERS))
    with pytest.raises(ValueError, match="has 3 layers, 7 is asked for"):
        translate_cache(prefill(teacher), teacher, model(6), identity(), [0, 1, 7])
