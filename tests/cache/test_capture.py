"""Captured keys and values against plain forward hooks and the model's own cache, on every architecture of the zoo."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from model_zoo import ARCHITECTURES, HEAD_DIM, HEADS, KV_HEADS, LAYERS, VOCAB
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import AttentionInterface

from kvpipe.align.rope import Rope
from kvpipe.cache.capture import Recorder, capture, kv_geometry, positions_from_mask

BATCH, TIME = 2, 7
transformers_dispatch = AttentionInterface.get_interface  # before any recorder is entered
INTERFACE = [name for name, architecture in ARCHITECTURES.items() if not architecture.through_cache]
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def batch(padding: str = "none") -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask; the first row is three tokens shorter when padded."""
    ids, mask = torch.randint(3, VOCAB, (BATCH, TIME)), torch.ones(BATCH, TIME, dtype=torch.long)
    if padding == "left":
        mask[0, :3] = 0
    elif padding == "right":
        mask[0, -3:] = 0
    return ids, mask


def accepted(model: torch.nn.Module, **kwargs) -> dict:
    """The arguments that the family's forward knows (ALiBi families take no positions)."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in kwargs.items() if name in known}


def is_rotary(model: transformers.PreTrainedModel) -> bool:
    return any(rope.inv_freq is not None for rope in Rope.of_layers(model.config))


def test_the_zoo_holds_at_least_fourteen_architectures():
    assert len({architecture.config for architecture in ARCHITECTURES.values()}) >= 14


@every_architecture
@pytest.mark.parametrize("padding", ["left", "right"])
def test_equals_projection_hooks(name, padding):
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    ids, mask = batch(padding)
    with architecture.hooks(model) as read:
        kv = capture(model, ids, mask)
    keys, values = read()
    close(kv.keys, keys)
    close(kv.values, values)
    assert not kv.keys.requires_grad
    layers, kv_heads, head_dim = architecture.geometry
    assert kv.keys.shape == (layers, BATCH, kv_heads, TIME, head_dim)


@every_architecture
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rotated_again_equals_the_models_own_cache(name, attention):
    architecture = ARCHITECTURES[name]
    if attention not in architecture.attention:
        pytest.skip(f"{architecture.config} has no {attention} attention")
    model = architecture.build(attention)
    ids, mask = batch("left")
    positions = positions_from_mask(mask)
    kv = capture(model, ids, mask)
    cache = DynamicCache()  # made without the config, so that sliding layers keep every token
    with torch.no_grad():
        model(
            ids, attention_mask=mask, past_key_values=cache, use_cache=True, **accepted(model, position_ids=positions)
        )
    for layer, rope in enumerate(Rope.of_layers(model.config)):
        cached_keys, cached_values = cache.layers[layer].keys, cache.layers[layer].values
        step = cached_keys.shape[1] // kv.keys.shape[2]  # Falcon repeats a KV head for each of its queries
        close(rope.rotate(kv.keys[layer], positions), cached_keys[:, ::step])
        close(kv.values[layer], cached_values[:, ::step])


@every_architecture
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_changes_nothing(name, padding):
    model = ARCHITECTURES[name].build()
    ids, mask = batch(padding)
    padded = capture(model, ids, mask)
    for row in range(BATCH):
        real = mask[row].bool()
        alone = capture(model, ids[row : row + 1, real])
        close(padded.keys[:, row][:, :, real], alone.keys[:, 0], 5e-5)
        close(padded.values[:, row][:, :, real], alone.values[:, 0], 5e-5)


@every_architecture
def test_unrotated_keys_of_a_lone_token_do_not_depend_on_its_position(name):
    """One token attends to itself only, so rotary positions cannot reach its hidden states."""
    model = ARCHITECTURES[name].build()
    if not is_rotary(model):
        pytest.skip("learned or ALiBi positions")
    ids = torch.randint(3, VOCAB, (BATCH, 1))
    recorded = []
    for position in (0, 13):
        positions = torch.full((BATCH, 1), position)
        with torch.no_grad(), Recorder(model) as recorder:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions)
        recorded.append((recorder.kv().keys, torch.stack([entry.key for entry in recorder._layers()])))
    (first, first_rotated), (second, second_rotated) = recorded
    close(second, first)
    assert (second_rotated - first_rotated).abs().max() > 0.05


@every_architecture
def test_recording_leaves_the_model_as_it_was(name):
    model = ARCHITECTURES[name].build()
    ids, mask = batch("left")
    config = model.config.to_dict()
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        with Recorder(model):
            during = model(input_ids=ids, attention_mask=mask).logits
    # not to the bit: vectorised sums follow the alignment of memory, which differs between any two forwards
    torch.testing.assert_close(during, before, atol=1e-6, rtol=1e-5)
    assert AttentionInterface.get_interface is transformers_dispatch
    assert model.config.to_dict() == config
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def embedding_gradient(model, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return model.get_input_embeddings().weight.grad.clone()


def objective(keys: torch.Tensor, values: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Different in every entry, so that a swapped axis or a missing layer shows in the gradient."""
    weights = torch.linspace(-1, 1, keys.numel()).view_as(keys)
    return (weights * keys).sum() + (weights.sin()[..., : values.shape[-1]] * values).sum() + logits.square().mean()


@every_architecture
def test_gradient_equals_that_through_plain_hooks(name):
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    ids, mask = batch("left")
    kwargs = accepted(model, position_ids=positions_from_mask(mask))
    with Recorder(model) as recorder:
        logits = model(input_ids=ids, attention_mask=mask, **kwargs).logits
    kv = recorder.kv(kwargs.get("position_ids"))
    recorded = embedding_gradient(model, objective(kv.keys, kv.values, logits))
    with architecture.hooks(model) as read:
        logits = model(input_ids=ids, attention_mask=mask, **kwargs).logits
    hooked = embedding_gradient(model, objective(*read(), logits))
    assert hooked.abs().max() > 0.1
    close(recorded, hooked, 5e-5 * float(hooked.abs().max()))


@pytest.mark.parametrize("name", INTERFACE)
def test_gradient_under_checkpointing(name):
    model = ARCHITECTURES[name].build().train()
    ids, mask = batch("left")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        assert model.is_activation_checkpointing == checkpointing
        torch.manual_seed(5)  # the same dropout
        with Recorder(model) as recorder:  # entered during backward too: recomputation must not be recorded
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            kv = recorder.kv()
            gradients.append(embedding_gradient(model, objective(kv.keys, kv.values, logits)))
            assert torch.equal(recorder.kv().keys, kv.keys)
    close(gradients[1], gradients[0], 1e-5 * float(gradients[0].abs().max()))


def test_reentrant_checkpointing_is_refused():
    model = ARCHITECTURES["llama"].build().train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with Recorder(model), pytest.raises(RuntimeError, match=r"LlamaForCausalLM.*layer 0.*use_reentrant"):
        model(input_ids=batch()[0])


def test_checkpointing_is_refused_where_only_the_cache_is_seen():
    model = ARCHITECTURES["bloom"].build().train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    with Recorder(model) as recorder:
        model(input_ids=batch()[0])
    with pytest.raises(RuntimeError, match=r"Bloom.*layers \[0, 1, 2\].*gradient checkpointing"):
        recorder.kv()


@pytest.mark.parametrize("name", ["llama", "gemma3", "glm", "phi3", "falcon_rotary"])
def test_bfloat16(name):
    architecture = ARCHITECTURES[name]
    model = architecture.build(dtype=torch.bfloat16)
    ids, mask = batch("left")
    with architecture.hooks(model) as read:
        kv = capture(model, ids, mask)
    assert kv.keys.dtype == kv.values.dtype == torch.bfloat16
    keys, values = read()
    assert torch.equal(kv.values, values)
    # the rotated key was rounded to 8 bits in the model, the unrotated one once more
    assert (kv.keys - keys).norm() < 0.01 * keys.norm()


def test_a_model_cast_as_a_whole_is_unrotated_by_its_own_rounded_frequencies():
    architecture = ARCHITECTURES["llama"]
    model = architecture.build().to(torch.bfloat16).to(torch.float32)  # rounds the rotary buffer too
    ids = torch.randint(3, VOCAB, (BATCH, 61))
    with architecture.hooks(model) as read:
        kv = capture(model, ids)
    close(kv.keys, read()[0])


def switching(rope_type: str, architecture: str = "llama") -> transformers.PreTrainedModel:
    """A model whose frequencies change beyond 32 positions (dynamic: beyond 64)."""
    settings: dict = {"factor": 4.0}
    if rope_type == "longrope":
        factors = {"short_factor": [1.0] * 6, "long_factor": [3.0] * 6, "original_max_position_embeddings": 32}
        settings.update(factors)
    parameters = {"rope_type": rope_type, "rope_theta": 1e4, **settings}
    return ARCHITECTURES[architecture].build(rope_parameters=parameters, max_position_embeddings=64)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_frequencies_are_those_of_the_forward(rope_type):
    """Unrotated keys are what the projection gave, whatever was read before and beside."""
    model = switching(rope_type)
    for lengths in ((7, 7), (91, 7), (70, 69), (33, 20), (64, 65), (7, 2)):
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        with ARCHITECTURES["llama"].hooks(model) as read:
            kv = capture(model, torch.randint(3, VOCAB, mask.shape), mask)
        inside = mask.bool()[:, None, :, None].expand(kv.keys.shape)
        close(kv.keys[inside], read()[0][inside])


@pytest.mark.parametrize("route", ["capture", "recorder", "peft"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_a_text_alone_has_the_cache_that_it_has_in_any_batch_and_after_any_call(rope_type, padding, route):
    lengths, model = [7, 91, 33, 64, 65, 20], switching(rope_type)
    if route == "peft":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    texts = [torch.randint(3, VOCAB, (1, n)) for n in lengths]

    def read(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if route == "capture":
            return capture(model, ids, mask)
        with torch.no_grad(), Recorder(model) as recorder:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        return recorder.kv()

    alone = []
    for text in texts:
        fresh = switching(rope_type)  # the oracle: transformers by itself, a new model of the same weights, one text
        with torch.no_grad():
            expected = fresh(text).logits
            alone.append(read(text, torch.ones_like(text)))
            close(model(text, attention_mask=torch.ones_like(text)).logits, expected)
    longest = max(lengths)
    ids, mask = torch.zeros(len(texts), longest, dtype=torch.long), torch.zeros(len(texts), longest, dtype=torch.long)
    place = [slice(longest - n, longest) if padding == "left" else slice(n) for n in lengths]
    for row, text in enumerate(texts):
        ids[row, place[row]], mask[row, place[row]] = text[0], 1
    together = read(ids, mask)
    for row, own in enumerate(alone):
        close(together.keys[:, row, :, place[row]], own.keys[:, 0], 1e-4)
        close(together.values[:, row, :, place[row]], own.values[:, 0], 1e-4)
    again = read(texts[0], torch.ones_like(texts[0]))
    assert torch.equal(again.keys, alone[0].keys) and torch.equal(again.values, alone[0].values)


@pytest.mark.parametrize("name, normed", [("llama", "q_proj"), ("qwen3", "q_norm")])
def test_queries_equal_projection_hooks(name, normed):
    model = ARCHITECTURES[name].build()
    ids, mask = batch("left")
    positions, seen = positions_from_mask(mask), []
    for layer in model.model.layers:
        module = getattr(layer.self_attn, normed)
        module.register_forward_hook(lambda _m, _i, output: seen.append(output.view(BATCH, TIME, HEADS, HEAD_DIM)))
    with torch.no_grad(), Recorder(model) as recorder:
        model(input_ids=ids, attention_mask=mask, position_ids=positions)
    close(recorder.queries(positions), torch.stack(seen).transpose(2, 3))
    assert torch.equal(recorder.queries(), recorder.queries(positions))
    with torch.no_grad(), Recorder(model, queries=False) as without:
        model(input_ids=ids, attention_mask=mask, position_ids=positions)
    kv = recorder.kv()
    assert torch.equal(without.keys(), kv.keys) and torch.equal(without.values(), kv.values)
    with pytest.raises(ValueError, match="no queries are kept"):
        without.queries()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_hidden_states_are_what_enters_each_layer(name, checkpointing):
    model = ARCHITECTURES[name].build().train(checkpointing)
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    decoder, entering = model.get_decoder(), []
    for layer in decoder.h if name == "bloom" else decoder.layers:
        layer.register_forward_pre_hook(lambda _m, args: entering.append(args[0]))
    with Recorder(model, hidden=True) as recorder:
        model(input_ids=batch()[0])
    assert torch.equal(recorder.hidden_states(), torch.stack(entering))
    assert recorder.hidden_states().requires_grad


def test_layers_that_share_keys_and_values_repeat_them():
    types = ["sliding_attention", "full_attention"] * 2
    model = ARCHITECTURES["gemma3n"].build(
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=types,
        intermediate_size=[40] * 4,
        activation_sparsity_pattern=[0.0] * 4,
    )
    kv = capture(model, batch()[0])
    assert kv.keys.shape[0] == 4
    assert torch.equal(kv.keys[2:], kv.keys[:2])
    assert torch.equal(kv.values[2:], kv.values[:2])
    assert not torch.allclose(kv.keys[0], kv.keys[1])


def test_a_recorder_serves_many_steps_and_may_be_entered_again():
    model = ARCHITECTURES["qwen3"].build()
    recorder = Recorder(model)
    for _ in range(2):
        with torch.no_grad(), recorder:
            for time in (TIME, 5):
                ids = torch.randint(3, VOCAB, (BATCH, time))
                model(input_ids=ids)
                assert torch.equal(recorder.kv().keys, capture(model, ids).keys)
        assert recorder.kv().keys.shape == (LAYERS, BATCH, KV_HEADS, 5, HEAD_DIM)


def test_teacher_and_student_are_recorded_side_by_side():
    teacher, student = ARCHITECTURES["glm"].build(), ARCHITECTURES["qwen2"].build()
    bystander = ARCHITECTURES["llama"].build()
    ids = batch()[0]
    with torch.no_grad(), Recorder(teacher) as of_teacher, Recorder(student) as of_student:
        for model in (student, bystander, teacher):
            model(input_ids=ids)
    close(of_teacher.kv().keys, capture(teacher, ids).keys)
    close(of_student.kv().keys, capture(student, ids).keys)


def test_positions_default_to_those_of_the_forward():
    model = ARCHITECTURES["llama"].build()
    ids, positions = batch()[0], torch.tensor([[5, 6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5, 6]])
    with torch.no_grad(), Recorder(model) as recorder:
        model(input_ids=ids, position_ids=positions)
    assert torch.equal(recorder.kv().keys, recorder.kv(positions).keys)
    assert not torch.allclose(recorder.kv(torch.arange(TIME)).keys, recorder.kv().keys)
    with torch.no_grad(), recorder:
        model(input_ids=ids)
    assert torch.equal(recorder.kv().keys, recorder.kv(torch.arange(TIME)).keys)


def test_a_peft_model_is_recorded_with_its_adapters():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        ARCHITECTURES["llama"].build(), peft.LoraConfig(target_modules=["k_proj"], init_lora_weights=False)
    ).eval()
    ids = batch()[0]
    with Recorder(model) as recorder:
        model(input_ids=ids)
    adapted = recorder.kv().keys
    adapted.sum().backward()
    close(capture(model, ids).keys, adapted.detach())
    with model.disable_adapter():
        assert not torch.allclose(capture(model, ids).keys, adapted, atol=1e-3)


@every_architecture
def test_geometry_is_that_of_the_config(name):
    architecture = ARCHITECTURES[name]
    assert kv_geometry(architecture.build_config()) == architecture.geometry


def test_positions_from_mask_are_those_of_generate():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 0, 0], [0, 1, 2, 3, 4]])
    assert torch.equal(positions_from_mask(mask), expected)
    model = ARCHITECTURES["llama"].build()
    inputs = {"attention_mask": mask, "input_ids": torch.zeros_like(mask)}
    assert torch.equal(model._prepare_position_ids_for_generation(inputs["input_ids"], inputs), expected)


def test_a_config_that_does_not_fit_the_tensors_is_refused():
    model = ARCHITECTURES["llama"].build()
    model.config.num_key_value_heads = 3
    with pytest.raises(ValueError, match=r"LlamaModel \(llama\) layer 0: keys are \(2, 2, 7, 12\).*3 KV heads"):
        capture(model, batch()[0])


def test_layers_that_differ_are_named():
    config = transformers.Gemma4TextConfig(
        num_hidden_layers=3, layer_types=["sliding_attention", "sliding_attention", "full_attention"]
    )
    with pytest.raises(ValueError, match=r"gemma4_text.*layers \[0, 1\] have.*layers \[2\] have"):
        kv_geometry(config)


def test_layers_without_attention_are_named():
    config = transformers.Qwen3NextConfig(
        vocab_size=VOCAB, hidden_size=60, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        head_dim=12, layer_types=["linear_attention", "full_attention", "linear_attention"], intermediate_size=40,
        num_experts=0,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=4, linear_value_head_dim=4,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(RuntimeError, match=r"Qwen3Next.*layers \[0, 2\] of 3.*state-space, linear"):
        capture(model, batch()[0])


def test_latent_attention_is_refused_by_name():
    config = transformers.DeepseekV3Config(vocab_size=VOCAB, hidden_size=60, num_hidden_layers=1)
    with torch.device("meta"):
        model = transformers.DeepseekV3ForCausalLM(config)
    with pytest.raises(ValueError, match=r"deepseek_v3.*MLA"):
        Recorder(model)


def test_misuse_is_named():
    model, ids = ARCHITECTURES["llama"].build(), batch()[0]
    recorder = Recorder(model)
    with pytest.raises(RuntimeError, match=r"layers \[0, 1, 2\] of 3.*Run one forward"):
        recorder.kv()
    with pytest.raises(RuntimeError, match="hidden=True"):
        recorder.hidden_states()
    with recorder, pytest.raises(RuntimeError, match="already entered"):
        recorder.__enter__()
    cache = DynamicCache()
    model(input_ids=ids, past_key_values=cache)
    with Recorder(model), pytest.raises(ValueError, match=r"layer 0: 14 keys for 7 queries.*cache"):
        model(input_ids=ids, past_key_values=cache)
    bloom = ARCHITECTURES["bloom"].build()
    with Recorder(bloom) as recorder:
        with pytest.raises(ValueError, match="past_key_values"):
            bloom(input_ids=ids, past_key_values=DynamicCache())
        bloom(input_ids=ids)
    with pytest.raises(ValueError, match=r"Bloom.*queries"):
        recorder.queries()


def test_an_error_in_the_forward_ends_the_record():
    model = ARCHITECTURES["llama"].build()
    with Recorder(model) as recorder:
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[VOCAB + 1]]))
        assert not recorder._recording
    assert AttentionInterface.get_interface is transformers_dispatch


def test_a_model_without_attention_is_refused_by_name():
    from transformers import MambaConfig

    with pytest.raises(ValueError, match="'mamba' has no attention heads"):
        kv_geometry(MambaConfig(hidden_size=8, num_hidden_layers=2))


def test_layers_on_several_devices_come_to_the_first_ones():
    """A model spread over devices; `meta` stands for a second one, since tests have a CPU alone."""
    model = ARCHITECTURES["llama"].build()
    with Recorder(model) as recorder:
        model(input_ids=torch.tensor([[3, 1, 4]]))
    first = recorder._record[0]
    recorder._record[0] = first.to(torch.device("meta"))
    assert {entry.key.device.type for entry in recorder._layers()} == {"meta"}
    recorder._record[0] = first
    assert {entry.key.device.type for entry in recorder._layers()} == {"cpu"}
