"""Rows of a batch under the frequencies of their own length: against new rotary modules of transformers, row by row."""

import pytest
import torch
import transformers
from torch import nn
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama

from kvpipe.align.regime import by_own_length, positions_from_mask, switch_lengths
from kvpipe.cache.capture import Recorder
from kvpipe.config import ScoringConfig
from kvpipe.evaluate.generate import generate
from kvpipe.models.likelihood import windowed_nll

DIM, ORIGINAL, CONTEXT = 12, 16, 40
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 2.5, "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0] * 6, "long_factor": [1.5, 2.0, 3.0, 5.0, 7.0, 9.0],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}
SIZES = {"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": DIM, "num_hidden_layers": 2}


def config(parameters: dict) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        **SIZES,
        intermediate_size=20,
        vocab_size=47,
        max_position_embeddings=CONTEXT,
        rope_parameters=dict(parameters),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )


def language_model(parameters: dict) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    # large weights: what stands far back decides which token comes next
    return (
        transformers.LlamaForCausalLM(
            config({**parameters}),
        )
        .eval()
        .apply(lambda module: module.weight.data.mul_(8) if isinstance(module, nn.Linear) else None)
    )


def rows(*lengths: int) -> torch.Tensor:
    return positions_from_mask((torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long())


def test_every_row_equals_a_new_module_with_that_row_alone():
    layered = transformers.Gemma3TextConfig(
        **SIZES, layer_types=["sliding_attention", "full_attention"], max_position_embeddings=CONTEXT,
        rope_parameters={"sliding_attention": LONGROPE, "full_attention": DYNAMIC},
    )  # fmt: skip
    cases = [
        (modeling_llama.LlamaRotaryEmbedding, config(LONGROPE), ()),
        (modeling_llama.LlamaRotaryEmbedding, config(DYNAMIC), ()),
        (modeling_gemma3.Gemma3RotaryEmbedding, layered, ("sliding_attention",)),
        (modeling_gemma3.Gemma3RotaryEmbedding, layered, ("full_attention",)),
    ]
    x = torch.zeros(1)
    for family, settings, layer_type in cases:
        parent = by_own_length(nn.ModuleList([family(settings)]))
        for lengths in ((7, 61, 20), (ORIGINAL, ORIGINAL + 1, 3), (CONTEXT, CONTEXT + 1, 90), (5, 5, 5)):
            positions = rows(*lengths)
            cos, sin = parent[0](x, positions, *layer_type)
            for row in range(3):
                expected = family(settings)(x, positions[row : row + 1], *layer_type)
                assert torch.equal(cos[row], expected[0][0]) and torch.equal(sin[row], expected[1][0])


def test_only_types_that_depend_on_length_are_touched():
    assert switch_lengths(config(LONGROPE)) == [ORIGINAL] and switch_lengths(config(DYNAMIC)) == [CONTEXT]
    plain = transformers.LlamaForCausalLM(config({"rope_type": "default", "rope_theta": 1e4}))
    assert switch_lengths(plain.config) == []
    assert "forward" not in vars(by_own_length(plain).model.rotary_emb)
    twice = by_own_length(by_own_length(language_model(DYNAMIC)))
    assert len(twice.model._forward_pre_hooks) == 1


@pytest.mark.parametrize("parameters", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_a_text_read_in_chunks_has_the_nats_of_one_call(parameters):
    model, ids = language_model(parameters), torch.randint(3, 47, (61,))
    expected = torch.nn.functional.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="none")
    found = windowed_nll(language_model(parameters), ids.numpy(), window=61, stride=30, chunk=7)
    torch.testing.assert_close(torch.from_numpy(found[1:]).float(), expected.detach(), atol=1e-4, rtol=1e-4)


def test_continuations_do_not_depend_on_the_batch():
    """Also of texts that outgrow the original context: each step is what one call over the whole text says."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_letters(), pad_token="<pad>", eos_token="<end>")
    prompts = ["ab", "abcdefghijkl", "hgfedcbaabcdefg", "cabcabcabcabcabcabcab"]
    settings = ScoringConfig(max_new_tokens=11, stop=[])
    together = generate(language_model(LONGROPE), tokenizer, prompts, settings, 4)
    for prompt, found in zip(prompts, together, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(11):
            ids = torch.cat([ids, language_model(LONGROPE)(ids).logits[:, -1:].argmax(-1)], dim=1)
            if int(ids[0, -1]) == tokenizer.eos_token_id:
                break
        assert found == tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)


def _letters():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<pad>": 0, "<end>": 1} | {chr(ord("a") + i if i < 26 else ord("A") + i - 26): i + 2 for i in range(45)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


@pytest.mark.parametrize("parameters", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_gradients_reach_the_weights_as_for_texts_alone(parameters):
    model, ids = language_model(parameters), torch.randint(3, 47, (2, 61))
    mask = (torch.arange(61) < torch.tensor([61, 13])[:, None]).long()

    def gradient(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with Recorder(model) as recorder:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        loss = (recorder.kv().keys.square() * mask[None, :, None, :, None]).sum()
        return torch.autograd.grad(loss, model.model.layers[0].self_attn.k_proj.weight)[0]

    alone = gradient(ids[:1], mask[:1]) + gradient(ids[1:, :13], mask[1:, :13])
    torch.testing.assert_close(gradient(ids, mask), alone, atol=1e-3, rtol=1e-4)
