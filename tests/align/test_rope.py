"""Rotary embeddings against transformers' own modules, for every type it ships, and their laws."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from rope_zoo import CONTEXT, DIM, HEAD, LONG, ORIGINAL, ROPE_TYPES, SHORT, VARIANTS, llama_config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.glm import modeling_glm
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.llama4 import modeling_llama4
from transformers.models.nanochat import modeling_nanochat
from transformers.models.stablelm import modeling_stablelm

from kvpipe.align.rope import Rope, rebase

BATCH = 2


def keys(time: int, dim: int = DIM, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(BATCH, HEAD, time, dim, dtype=dtype)


def scattered(time: int) -> torch.Tensor:
    """Positions that differ between rows, are not in order and include the last of `time`."""
    return torch.stack([torch.randperm(time) for _ in range(BATCH)])


def reference(family, rotary: torch.nn.Module, k: torch.Tensor, positions: torch.Tensor, *layer_type) -> torch.Tensor:
    """The key as the family's own modules rotate it."""
    cos, sin = rotary(k, positions, *layer_type)
    return family.apply_rotary_pos_emb(k, k, cos, sin)[1]


def test_every_shipped_type_is_tested():
    assert set(ROPE_TYPES) == set(ROPE_INIT_FUNCTIONS) | {"default"}


@pytest.mark.parametrize("time", [SHORT, ORIGINAL, ORIGINAL + 1, CONTEXT, LONG])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_type_equals_transformers(variant, time):
    config = llama_config(VARIANTS[variant])
    rope = Rope.from_config(config)
    k, positions = keys(time), scattered(time)
    expected = reference(modeling_llama, modeling_llama.LlamaRotaryEmbedding(config), k, positions)
    torch.testing.assert_close(rope.rotate(k, positions), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rope.unrotate(expected, positions), k, atol=1e-5, rtol=1e-5)
    assert (expected - k).abs().max() > 0.5


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_switching_types_do_switch(rope_type):
    rope = Rope.from_config(llama_config(VARIANTS[rope_type]))
    k, positions = keys(LONG), torch.arange(LONG)
    assert not torch.allclose(rope.rotate(k, positions)[:, :, :SHORT], rope.rotate(k[:, :, :SHORT], positions[:SHORT]))


@pytest.mark.parametrize("rope_type", ["yarn", "longrope"])
def test_attention_scaling_is_in_the_norm(rope_type):
    rope = Rope.from_config(llama_config(VARIANTS[rope_type]))
    k = keys(SHORT)
    assert rope.scaling > 1.01
    rotated = rope.rotate(k, torch.arange(SHORT))
    torch.testing.assert_close(rotated.norm(dim=-1), rope.scaling * k.norm(dim=-1))


FAMILIES = {
    "half, partial (StableLM)": ("StableLmConfig", modeling_stablelm, "StableLmRotaryEmbedding"),
    "interleaved (Cohere)": ("CohereConfig", modeling_cohere, "CohereRotaryEmbedding"),
    "interleaved, partial (GLM)": ("GlmConfig", modeling_glm, "GlmRotaryEmbedding"),
    "half, no rotate_half (GPT-OSS)": ("GptOssConfig", modeling_gpt_oss, "GptOssRotaryEmbedding"),
    "half, other direction (nanochat)": ("NanoChatConfig", modeling_nanochat, "NanoChatRotaryEmbedding"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_layouts_equal_transformers(name):
    config_class, family, rotary_class = FAMILIES[name]
    sizes = {"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": HEAD, "num_hidden_layers": 3}
    partial = {"partial_rotary_factor": 0.5} if "partial" in name else {}
    config = getattr(transformers, config_class)(**sizes, head_dim=DIM, **partial)
    k, positions = keys(SHORT), scattered(SHORT)
    cos, sin = getattr(family, rotary_class)(config)(k, positions)
    if config_class == "StableLmConfig":  # its attention splits the key itself
        turned = family.apply_rotary_pos_emb(k[..., : DIM // 2], k[..., : DIM // 2], cos, sin)[1]
        expected = torch.cat((turned, k[..., DIM // 2 :]), dim=-1)
    else:
        expected = family.apply_rotary_pos_emb(k, k, cos, sin)[1]
    rope = Rope.from_config(config)
    torch.testing.assert_close(rope.rotate(k, positions), expected, atol=1e-5, rtol=1e-5)
    if partial:
        assert torch.equal(rope.rotate(k, positions)[..., DIM // 2 :], k[..., DIM // 2 :])


def test_gptj_equals_transformers():
    config = transformers.GPTJConfig(n_embd=72, n_layer=3, n_head=6, rotary_dim=8)
    k, positions = keys(SHORT), torch.arange(SHORT)
    sin, cos = modeling_gptj.create_sinusoidal_positions(SHORT, 8).chunk(2, dim=-1)
    time_first = k[..., :8].transpose(1, 2)
    turned = modeling_gptj.apply_rotary_pos_emb(time_first, sin[None], cos[None]).transpose(1, 2)
    expected = torch.cat((turned, k[..., 8:]), dim=-1)
    torch.testing.assert_close(Rope.from_config(config).rotate(k, positions), expected, atol=1e-5, rtol=1e-5)


def test_llama4_complex_rotation_and_nope_layers():
    config = transformers.Llama4TextConfig(
        hidden_size=72, num_attention_heads=6, num_key_value_heads=HEAD, head_dim=DIM, num_hidden_layers=3,
        no_rope_layers=[1, 0, 1], rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )  # fmt: skip
    k, positions = keys(SHORT), scattered(SHORT)
    time_first = k.transpose(1, 2)
    turned = modeling_llama4.Llama4TextRotaryEmbedding(config)(k, positions)
    expected = modeling_llama4.apply_rotary_emb(time_first, time_first, turned)[1].transpose(1, 2)
    torch.testing.assert_close(Rope.from_config(config, 0).rotate(k, positions), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(Rope.from_config(config, 1).rotate(k, positions), k)


def test_each_layer_type_has_its_own_embedding():
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(
        hidden_size=72, num_attention_heads=6, num_key_value_heads=HEAD, head_dim=DIM, num_hidden_layers=3,
        layer_types=types, max_position_embeddings=CONTEXT,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e6},
        },
    )  # fmt: skip
    ropes = Rope.of_layers(config)
    assert ropes[0] is ropes[2]
    assert ropes[0] is not ropes[1]
    for time in (SHORT, LONG):
        rotary = modeling_gemma3.Gemma3RotaryEmbedding(config)
        k, positions = keys(time), scattered(time)
        for layer, layer_type in enumerate(types):
            expected = reference(modeling_gemma3, rotary, k, positions, layer_type)
            torch.testing.assert_close(ropes[layer].rotate(k, positions), expected, atol=1e-5, rtol=1e-5)
            alone = Rope.from_config(config, layer).rotate(k, positions)
            assert torch.equal(alone, ropes[layer].rotate(k, positions))


@pytest.mark.parametrize(
    "config",
    [
        transformers.GPT2Config(n_embd=60, n_layer=3, n_head=6),
        transformers.BloomConfig(hidden_size=60, n_layer=3, n_head=6),
        transformers.FalconConfig(hidden_size=60, num_hidden_layers=3, num_attention_heads=6, alibi=True),
        transformers.OPTConfig(hidden_size=60, num_hidden_layers=3, num_attention_heads=6, ffn_dim=40),
    ],
    ids=lambda config: config.model_type,
)
def test_models_without_rotary_embedding_pass_through(config):
    k = keys(SHORT)
    rope = Rope.from_config(config, layer=2)
    assert rope.rotate(k, torch.arange(SHORT)) is k
    assert rope.unrotate(k, torch.arange(SHORT)) is k


@pytest.mark.parametrize("window, rotated", [(4, [True, False, True]), (None, [True, True, True])])
def test_exaone4_full_attention_layers_have_no_position(window, rotated):
    types = ["sliding_attention", "full_attention", "sliding_attention"] if window else ["full_attention"] * 3
    config = transformers.Exaone4Config(
        hidden_size=72, num_attention_heads=6, num_key_value_heads=HEAD, num_hidden_layers=3,
        sliding_window=window, layer_types=types,
    )  # fmt: skip
    assert [rope.inv_freq is not None for rope in Rope.of_layers(config)] == rotated


@given(
    variant=st.sampled_from(sorted(VARIANTS)),
    layout=st.sampled_from(["half", "interleaved"]),
    length=st.integers(1, 120),
    extra=st.integers(0, 5),
)
def test_round_trip_for_any_positions(variant, layout, length, extra):
    fitted = Rope.from_config(llama_config(VARIANTS[variant]))
    rope = Rope(fitted.rope_type, fitted.inv_freq, fitted.scaling, layout, 1, fitted.long_context)
    k, positions = keys(length, DIM + extra), scattered(length)
    torch.testing.assert_close(rope.unrotate(rope.rotate(k, positions), positions), k, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rope.rotate(rope.unrotate(k, positions), positions), k, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rope.rotate(k, positions)[..., DIM:], k[..., DIM:], atol=0, rtol=0)


@given(shift=st.integers(0, 30))
def test_scores_depend_on_distance_only(shift):
    rope = Rope.from_config(llama_config(VARIANTS["llama3"]))
    q, k, positions = keys(SHORT), keys(SHORT), torch.arange(SHORT)
    scores = rope.rotate(q, positions) @ rope.rotate(k, positions).mT
    shifted = rope.rotate(q, positions + shift) @ rope.rotate(k, positions + shift).mT
    torch.testing.assert_close(shifted, scores, atol=1e-4, rtol=1e-4)


def test_rows_and_shared_positions_agree():
    rope = Rope.from_config(llama_config({"rope_type": "default"}))
    k, positions = keys(SHORT), torch.tensor([4, 0, 11, 3, 3, 60, 1])
    assert torch.equal(rope.rotate(k, positions), rope.rotate(k, positions.expand(BATCH, -1)))


def test_gradient_of_unrotate_is_its_transpose():
    rope = Rope.from_config(llama_config(VARIANTS["yarn"]))
    k, upstream, positions = keys(SHORT).requires_grad_(), keys(SHORT), scattered(SHORT)
    rope.unrotate(k, positions).backward(upstream)
    # the inverse of a scaled rotation is its transpose over the scaling squared
    torch.testing.assert_close(k.grad, rope.rotate(upstream, positions) / rope.scaling**2, atol=1e-5, rtol=1e-5)


def test_half_precision_keys_keep_dtype_and_float32_angles():
    rope = Rope.from_config(llama_config({"rope_type": "default"}))
    k, positions = keys(LONG, dtype=torch.bfloat16), torch.arange(LONG) + 30_000
    rotated = rope.rotate(k, positions)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, rope.rotate(k.float(), positions).bfloat16())


def test_rebase_gives_the_students_rotation():
    teacher = Rope.from_config(llama_config({"rope_type": "default", "rope_theta": 1e6}))
    student = Rope.from_config(llama_config(VARIANTS["yarn"]))
    k, positions = keys(SHORT), scattered(SHORT)
    moved = rebase(teacher.rotate(k, positions), positions, teacher, student)
    torch.testing.assert_close(moved, student.rotate(k, positions), atol=1e-5, rtol=1e-5)
    assert torch.allclose(rebase(k, positions, student, student), k, atol=1e-5)


def test_latent_attention_is_refused_by_name():
    with pytest.raises(ValueError, match=r"deepseek_v3.*MLA"):
        Rope.from_config(transformers.DeepseekV3Config())


def test_errors_name_what_is_wrong():
    config = llama_config({"rope_type": "default"})
    with pytest.raises(IndexError, match=r"layer 3 of a 'llama' model with 3 layers"):
        Rope.from_config(config, layer=3)
    with pytest.raises(ValueError, match=r"10 dimensions.*turns 12"):
        Rope.from_config(config).rotate(keys(SHORT, 10), torch.arange(SHORT))
    for wrong in (torch.arange(1), torch.arange(SHORT).expand(3, -1)):
        with pytest.raises(ValueError, match="do not fit keys"):  # below the shape annotations of `rotate`
            Rope.from_config(config)._turn(keys(SHORT), wrong, 1, 1.0)
