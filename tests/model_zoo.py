"""Tiny random models of many architectures, built from their config classes: no download, no two sizes alike.

Each architecture says how its keys before rotation and its values can be read by plain forward hooks: the
independent reference for `kvpipe.cache.capture`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import transformers
from einops import rearrange
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCAB, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 97, 3, 6, 2, 12
WIDTH = 60  # width / heads is 10: not the head dimension
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NO_HEAD_DIM = {"head_dim": None}  # families without the setting: 60 / 6 = 10
_MULTI_HEAD = {**_NO_HEAD_DIM, "num_key_value_heads": None}  # families without grouped-query attention

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Architecture:
    """A config class, the settings that set the family apart, and where plain hooks find its keys and values.

    `hooked` names submodules of an attention layer; `read` makes (key, value), (batch, head, time, dim), key before
    rotation, of their outputs. `geometry` is (layers, KV heads, head dimension), stated here by hand.
    """

    config: str
    settings: dict = field(default_factory=dict)
    hooked: tuple[str, ...] = ("k_proj", "v_proj")
    read: Callable[..., KeysValues] = lambda k, v: (_split(k), _split(v))
    geometry: tuple[int, int, int] = (LAYERS, KV_HEADS, HEAD_DIM)
    attention: tuple[str, ...] = ("sdpa", "eager")
    through_cache: bool = False  # the family has an attention of its own, which only its cache reveals

    def build_config(self, **overrides) -> transformers.PretrainedConfig:
        settings = {**_SIZES, **self.settings, **overrides}
        return getattr(transformers, self.config)(**{k: v for k, v in settings.items() if v is not None})

    def build(self, attention: str | None = None, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_config(
            self.build_config(**overrides), attn_implementation=attention or self.attention[0], dtype=dtype
        )
        for name, parameter in model.named_parameters():  # the default biases and norms would hide a missing one
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
        return model.eval()

    @contextmanager
    def hooks(self, model: PreTrainedModel) -> Iterator[Callable[[], KeysValues]]:
        """Inside, run one forward; the yielded function then gives (layer, batch, head, time, dim) keys and values."""
        outputs: dict[str, list[Tensor]] = {name: [] for name in self.hooked}
        handles = []
        for path, module in model.named_modules():
            name = path.split(".")[-1]
            if name in outputs:
                note = lambda _m, _i, output, to=outputs[name]: to.append(output)  # noqa: E731
                handles.append(module.register_forward_hook(note))
        yield lambda: _stack([self.read(*layer) for layer in zip(*outputs.values(), strict=True)])
        for handle in handles:
            handle.remove()


def _split(projected: Tensor, dim: int | None = None) -> Tensor:
    """(batch, time, head * dim) -> (batch, head, time, dim)."""
    dim = dim or (HEAD_DIM if projected.shape[-1] == KV_HEADS * HEAD_DIM else 10)
    return rearrange(projected, "batch time (head dim) -> batch head time dim", dim=dim)


def _stack(layers: list[KeysValues]) -> KeysValues:
    return torch.stack([k for k, _ in layers]), torch.stack([v for _, v in layers])


def _multi_head(k: Tensor, v: Tensor) -> KeysValues:
    """As many KV heads as query heads."""
    return _split(k, 10), _split(v, 10)


def _nanochat(k: Tensor, v: Tensor) -> KeysValues:
    """Its key norm follows the rotation, but has no weights: it is the same before it."""
    return torch.nn.functional.rms_norm(_split(k), (HEAD_DIM,), eps=1e-6), _split(v)


def _heads_last(k: Tensor, v: Tensor) -> KeysValues:
    """k_norm applied per head before heads are moved forward."""
    return rearrange(k, "batch time head dim -> batch head time dim"), _split(v)


def _phi3(qkv: Tensor) -> KeysValues:
    _, k, v = qkv.split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], dim=-1)
    return _split(k), _split(v)


def _head_major(qkv: Tensor) -> KeysValues:
    """GPT-NeoX, Bloom, Falcon: each head holds its query, key and value."""
    _, k, v = rearrange(qkv, "batch time (head three dim) -> three batch head time dim", three=3, dim=10)
    return k, v


def _gpt2(qkv: Tensor) -> KeysValues:
    _, k, v = rearrange(qkv, "batch time (three head dim) -> three batch head time dim", three=3, dim=10)
    return k, v


def _mpt(qkv: Tensor) -> KeysValues:
    _, k, v = qkv.chunk(3, dim=-1)
    return _split(k, 10), _split(v, 10)


def _codegen(qkv: Tensor) -> KeysValues:
    """Made for four tensor-parallel ranks: each holds query, value, key of its two heads."""
    _, v, k = rearrange(
        qkv, "batch time (rank three head dim) -> three batch (rank head) time dim", rank=4, three=3, dim=8
    )
    return k, v


def _multi_query(qkv: Tensor) -> KeysValues:
    """GPT BigCode, Falcon 7B: all queries, then the one key and the one value."""
    _, k, v = qkv.split([60, 10, 10], dim=-1)
    return _split(k, 10), _split(v, 10)


def _falcon_grouped(qkv: Tensor) -> KeysValues:
    """Each KV head holds its group's queries, then its key and its value."""
    parts = rearrange(qkv, "batch time (head part dim) -> part batch head time dim", part=HEADS // KV_HEADS + 2, dim=10)
    return parts[-2], parts[-1]


_GPT2 = {"n_embd": 60, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "head_dim": None, "hidden_size": None}
_GPT2 |= {"num_key_value_heads": None, "num_attention_heads": None, "num_hidden_layers": None}
_GPT2 |= {"max_position_embeddings": None, "intermediate_size": None}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "num_experts": 4}
_EXPERTS |= {"experts_implementation": "eager"}  # the grouped one takes no sizes this odd in bf16
_PER_TYPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
_NORMED = {"hooked": ("k_norm", "v_proj"), "read": _heads_last}
_OWN_ATTENTION = {"through_cache": True, "attention": ("eager",)}
_MHA10 = (LAYERS, HEADS, 10)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaConfig"),
    "mistral": Architecture("MistralConfig", {"sliding_window": 4}),
    "qwen2": Architecture("Qwen2Config", _NO_HEAD_DIM, geometry=(LAYERS, KV_HEADS, 10)),
    "qwen3": Architecture("Qwen3Config", **_NORMED),
    "gemma2": Architecture("Gemma2Config", {"sliding_window": 4, "layer_types": SLIDING}, attention=("eager",)),
    "gemma3": Architecture(
        "Gemma3TextConfig",
        {"sliding_window": 4, "layer_types": SLIDING, "rope_parameters": _PER_TYPE},
        hooked=("k_norm", "v_proj"),
        read=lambda k, v: (k, _split(v)),
    ),
    "gemma3n": Architecture(
        "Gemma3nTextConfig",
        {
            "sliding_window": 4,
            "layer_types": SLIDING,
            "rope_parameters": _PER_TYPE,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * LAYERS,
            "intermediate_size": [40] * LAYERS,
        },
        hooked=("k_norm", "v_norm"),
        read=lambda k, v: tuple(rearrange(x, "batch time head dim -> batch head time dim") for x in (k, v)),
    ),
    "gemma4": Architecture(
        "Gemma4TextConfig",
        {
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "global_head_dim": HEAD_DIM,
            "num_global_key_value_heads": KV_HEADS,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
        },
        hooked=("k_norm", "v_norm"),
        read=lambda k, v: tuple(rearrange(x, "batch time head dim -> batch head time dim") for x in (k, v)),
    ),
    "phi3": Architecture("Phi3Config", {"partial_rotary_factor": 0.5}, hooked=("qkv_proj",), read=_phi3),
    "phi": Architecture("PhiConfig", {**_NO_HEAD_DIM, "partial_rotary_factor": 0.4}, geometry=(LAYERS, KV_HEADS, 10)),
    "olmo2": Architecture("Olmo2Config", _NO_HEAD_DIM, hooked=("k_norm", "v_proj"), geometry=(LAYERS, KV_HEADS, 10)),
    "gpt_neox": Architecture(
        "GPTNeoXConfig",
        {**_MULTI_HEAD, "rotary_pct": 0.4},
        hooked=("query_key_value",),
        read=_head_major,
        geometry=_MHA10,
    ),
    "gpt2": Architecture("GPT2Config", _GPT2, hooked=("c_attn",), read=_gpt2, geometry=_MHA10),
    "gpt_bigcode": Architecture(
        "GPTBigCodeConfig",
        {**_GPT2, "multi_query": True},
        hooked=("c_attn",),
        read=_multi_query,
        geometry=(LAYERS, 1, 10),
    ),
    "gptj": Architecture("GPTJConfig", {**_GPT2, "rotary_dim": 4}, read=_multi_head, geometry=_MHA10, **_OWN_ATTENTION),
    "codegen": Architecture(
        "CodeGenConfig",
        {**_GPT2, "n_embd": 64, "n_head": 8, "rotary_dim": 4},
        hooked=("qkv_proj",),
        read=_codegen,
        geometry=(LAYERS, 8, 8),
        **_OWN_ATTENTION,
    ),
    "mpt": Architecture(
        "MptConfig",
        {**_MULTI_HEAD, "d_model": 60, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": 64},
        hooked=("Wqkv",),
        read=_mpt,
        geometry=_MHA10,
        **_OWN_ATTENTION,
    ),
    "bloom": Architecture(
        "BloomConfig",
        {**_MULTI_HEAD, "n_layer": LAYERS, "n_head": HEADS, "num_attention_heads": None, "num_hidden_layers": None},
        hooked=("query_key_value",),
        read=_head_major,
        geometry=_MHA10,
        **_OWN_ATTENTION,
    ),
    "falcon_alibi": Architecture(
        "FalconConfig",
        {**_MULTI_HEAD, "alibi": True, "multi_query": False},
        hooked=("query_key_value",),
        read=_head_major,
        geometry=_MHA10,
        through_cache=True,
    ),
    "falcon_multi_query": Architecture(
        "FalconConfig",
        {**_MULTI_HEAD, "multi_query": True, "new_decoder_architecture": False},
        hooked=("query_key_value",),
        read=_multi_query,
        geometry=(LAYERS, 1, 10),
        through_cache=True,
    ),
    "falcon_rotary": Architecture(
        "FalconConfig",
        {**_MULTI_HEAD, "num_kv_heads": KV_HEADS, "new_decoder_architecture": True},
        hooked=("query_key_value",),
        read=_falcon_grouped,
        geometry=(LAYERS, KV_HEADS, 10),
        through_cache=True,
    ),
    "opt": Architecture(
        "OPTConfig",
        {**_MULTI_HEAD, "ffn_dim": 40, "word_embed_proj_dim": 60, "intermediate_size": None},
        read=_multi_head,
        geometry=_MHA10,
    ),
    "stablelm": Architecture(
        "StableLmConfig", {**_NO_HEAD_DIM, "partial_rotary_factor": 0.4}, geometry=(LAYERS, KV_HEADS, 10)
    ),
    "cohere": Architecture("CohereConfig", _NO_HEAD_DIM, geometry=(LAYERS, KV_HEADS, 10)),
    "cohere2": Architecture("Cohere2Config", {"sliding_window": 4, "layer_types": SLIDING}),
    "glm": Architecture("GlmConfig", {"partial_rotary_factor": 0.5}),
    "ernie4_5": Architecture("Ernie4_5Config"),
    "nanochat": Architecture("NanoChatConfig", read=_nanochat),
    "starcoder2": Architecture("Starcoder2Config", _NO_HEAD_DIM, geometry=(LAYERS, KV_HEADS, 10)),
    "granite": Architecture("GraniteConfig", _NO_HEAD_DIM, geometry=(LAYERS, KV_HEADS, 10)),
    "smollm3": Architecture("SmolLM3Config", {"no_rope_layers": [1, 0, 1]}),
    "exaone4": Architecture(
        "Exaone4Config",
        {"sliding_window": 4, "layer_types": SLIDING},
        hooked=("k_norm", "v_proj"),
        read=lambda k, v: (k, _split(v)),
    ),
    "llama4": Architecture(
        "Llama4TextConfig",
        {**_EXPERTS, "no_rope_layers": [1, 0, 1], "use_qk_norm": False, "attention_chunk_size": 64, "moe_layers": []},
    ),
    "mixtral": Architecture("MixtralConfig", _EXPERTS),
    "qwen3_moe": Architecture("Qwen3MoeConfig", _EXPERTS, **_NORMED),
    "gpt_oss": Architecture(
        "GptOssConfig",
        {
            **_EXPERTS,
            "sliding_window": 4,
            "layer_types": SLIDING,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "truncate": False,
            },
        },
        attention=("eager",),
    ),
}
