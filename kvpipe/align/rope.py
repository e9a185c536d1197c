"""Rotary position embedding of any decoder in transformers, forwards and backwards.

A rotary embedding turns each pair of key components by ``position * inverse_frequency`` (Su et al., RoFormer,
2021, eq. 34) and, for YaRN and LongRoPE, scales the result (Peng et al. 2023; Ding et al. 2024). The inverse
frequencies come from the family's own rotary module and from ``ROPE_INIT_FUNCTIONS`` of transformers, so this
file holds no formula that could drift from theirs; which components form a pair is read from the family's own
``rotate_half``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

Layout = Literal["half", "interleaved"]

# Families whose modeling file has no `rotate_half` to read the pairing from.
_LAYOUTS: dict[str, Layout] = {
    "gpt_oss": "half",
    "llama4_text": "interleaved",
}
# Families that rotate only their sliding-window layers (full-attention layers have no position) -> whether they
# rotate every layer when the config sets no window.
_ROTATES_ONLY_SLIDING = {
    "afmoe": False,
    "cohere2": False,
    "cohere2_moe": False,
    "flint": False,
    "exaone4": True,
    "exaone4_5_text": True,
    "exaone_moe": True,
    "kolibri1": True,
}


@dataclass(frozen=True, eq=False)
class Rope:
    """The rotary embedding of one layer. `inv_freq` is None for a layer without one (then keys pass through).

    `scaling` multiplies cos and sin (YaRN, LongRoPE), `direction` is -1 for the one family that turns the other
    way. `long_context` is a length and, for texts that have more positions than that, the inverse frequencies by the
    length of the text (dynamic NTK, LongRoPE): each row of a batch has those of its own length.
    """

    rope_type: str
    inv_freq: Float[Tensor, " pair"] | None = None
    scaling: float = 1.0
    layout: Layout = "half"
    direction: int = 1
    long_context: tuple[int, Callable[[Tensor], Tensor]] | None = None

    @classmethod
    def from_config(cls, hf_config: PretrainedConfig, layer: int = 0, rotary: nn.Module | None = None) -> Rope:
        """The rotary embedding of `layer` of a Hugging Face model config.

        With `rotary`, the rotary module of a running model, the frequencies are the ones that it holds, which may be
        rounded by a cast of the whole model.

        Raises ValueError, naming the model type, for latent attention (MLA), whose keys are not rotated as a whole,
        and for rotary embeddings that cannot be read.
        """
        config = hf_config.get_text_config(decoder=True)
        if getattr(config, "kv_lora_rank", None):
            raise ValueError(
                f"model type '{config.model_type}' uses multi-head latent attention (MLA): one rotated key part is "
                "shared by all heads and the rest is compressed, so its keys cannot be aligned head by head. "
                "Use a teacher or student with ordinary or grouped-query attention."
            )
        if not _layer_rotates(config, layer):
            return cls("none")
        if config.model_type in ("gptj", "codegen"):
            dim = config.rotary_dim or config.n_embd // config.n_head
            inv_freq = 1.0 / (10000 ** (torch.arange(0, dim, 2, dtype=torch.int64) / dim))
            return cls("default", inv_freq, layout="interleaved")
        family = modeling_module(config)
        rotary_class = _rotary_class(config, family)
        if rotary_class is None:
            return cls("none")

        parameters, layer_type = config.rope_parameters, None
        if config.nested_rope_parameter_keys(parameters):
            layer_type = config.layer_types[layer]
            parameters = parameters.get(layer_type)
            if parameters is None:  # a layer without attention, or one without positions
                return cls("none")
        module = rotary_class(config) if rotary is None else rotary
        prefix = "" if layer_type is None else f"{layer_type}_"
        scaling = float(getattr(module, f"{prefix}attention_scaling", getattr(module, "attention_scaling", 1.0)))
        layout, direction = _pairing(config, family)
        rope_type = parameters.get("rope_type", "default")
        if config.model_type == "phimoe" and rope_type != "default":
            raise ValueError(
                f"model type 'phimoe' with rope_type '{rope_type}': its scale follows the longest text of a batch and its "
                "frequencies do not, unlike every other family's; use another teacher or student"
            )
        long_context = _long_context(config, rope_type, parameters, layer_type)
        # what the types that change with the length of a text hold now is another call's
        held = getattr(module, f"{prefix}inv_freq" if long_context is None else f"{prefix}original_inv_freq")
        inv_freq = held.detach().float().clone()
        return cls(rope_type, inv_freq, scaling, layout, direction, long_context)

    @classmethod
    def of_model(cls, model: nn.Module, hf_config: PretrainedConfig) -> list[Rope]:
        """One Rope per layer, with the frequencies that the model's own rotary module holds."""
        config = hf_config.get_text_config(decoder=True)
        rotary_class = _rotary_class(config, modeling_module(config))
        rotary = next((m for m in model.modules() if rotary_class and isinstance(m, rotary_class)), None)
        return cls.of_layers(config, rotary)

    @classmethod
    def of_layers(cls, hf_config: PretrainedConfig, rotary: nn.Module | None = None) -> list[Rope]:
        """One Rope per layer of the model; layers of one kind share one object. `rotary` as in `from_config`."""
        config = hf_config.get_text_config(decoder=True)
        shared: dict[tuple[bool, str], Rope] = {}
        ropes = []
        for layer in range(config.num_hidden_layers):
            types = getattr(config, "layer_types", None)
            kind = (_layer_rotates(config, layer), types[layer] if types else "")
            if kind not in shared:
                shared[kind] = cls.from_config(config, layer, rotary)
            ropes.append(shared[kind])
        return ropes

    def rotate(
        self, k: Float[Tensor, "batch head time dim"], positions: Int[Tensor, "*batch time"]
    ) -> Float[Tensor, "batch head time dim"]:
        """Keys (or queries) as the model's attention sees them at `positions`, (batch, time) or (time,)."""
        return self._turn(k, positions, 1, self.scaling)

    def unrotate(
        self, k: Float[Tensor, "batch head time dim"], positions: Int[Tensor, "*batch time"]
    ) -> Float[Tensor, "batch head time dim"]:
        """The exact inverse of `rotate`: keys as the model's projection made them."""
        return self._turn(k, positions, -1, 1 / self.scaling)

    def frequencies(self, positions: Int[Tensor, "*batch time"]) -> Float[Tensor, "*row pair"]:
        """Inverse frequencies, radians per position, of texts that hold these positions: of each row its own."""
        assert self.inv_freq is not None
        inv_freq = self.inv_freq.to(positions.device)
        if self.long_context is None or positions.numel() == 0:
            return inv_freq
        context, long_inv_freq = self.long_context
        lengths = positions.amax(-1, keepdim=True) + 1
        rows = [long_inv_freq(n).to(inv_freq) if n > context else inv_freq for n in lengths.flatten()]
        return torch.stack(rows).reshape(*lengths.shape, -1)

    def _turn(self, k: Tensor, positions: Tensor, sign: int, scale: float) -> Tensor:
        if self.inv_freq is None:
            return k
        rotary = 2 * len(self.inv_freq)
        if rotary > k.shape[-1]:
            raise ValueError(f"keys have {k.shape[-1]} dimensions, but the rotary embedding turns {rotary} of them")
        if positions.shape not in ((k.shape[2],), (1, k.shape[2]), (k.shape[0], k.shape[2])):
            raise ValueError(
                f"positions {tuple(positions.shape)} do not fit keys {tuple(k.shape)} (batch, head, time, dim)"
            )
        # float32 angles and products, whatever the dtype of the keys, as transformers computes its tables
        angles = positions[..., None].float() * self.frequencies(positions)
        angles = rearrange(angles, "... time pair -> ... 1 time pair")
        cos, sin = angles.cos() * scale, angles.sin() * (scale * sign * self.direction)
        split = "... (two pair) -> two ... pair" if self.layout == "half" else "... (pair two) -> two ... pair"
        first, second = rearrange(k[..., :rotary].float(), split, two=2)
        pair = (first * cos - second * sin, second * cos + first * sin)
        turned = torch.cat(pair, dim=-1) if self.layout == "half" else torch.stack(pair, dim=-1).flatten(-2)
        turned = turned.to(k.dtype)
        return turned if rotary == k.shape[-1] else torch.cat((turned, k[..., rotary:]), dim=-1)


def _layer_rotates(config: PretrainedConfig, layer: int) -> bool:
    """Whether the family turns the keys of this layer at all (NoPE layers, ALiBi)."""
    if not 0 <= layer < config.num_hidden_layers:
        raise IndexError(f"layer {layer} of a '{config.model_type}' model with {config.num_hidden_layers} layers")
    if getattr(config, "alibi", False):
        return False
    flags = getattr(config, "no_rope_layers", None)  # despite the name, 1 marks a layer *with* rotary embedding
    if flags:
        return bool(flags[layer])
    if config.model_type in _ROTATES_ONLY_SLIDING:
        if getattr(config, "sliding_window", None) is None:
            return _ROTATES_ONLY_SLIDING[config.model_type]
        dense_prefix = getattr(config, "prefix_dense_sliding_window_pattern", None) == 1  # Cohere 2 MoE
        if dense_prefix and config.mlp_layer_types[layer] == "dense":
            return True
        return config.layer_types[layer] == "sliding_attention"
    return True


def modeling_module(config: PretrainedConfig) -> ModuleType:
    """The modeling file of the config's family: the one of its causal language model, else its own."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return importlib.import_module(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__)
    name = type(config).__module__.replace("configuration_", "modeling_")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"model type '{config.model_type}': no modeling file '{name}' to read its rotary embedding from"
        ) from error


def positions_are_a_table(config: PretrainedConfig) -> bool:
    """Whether positions are looked up in a table of `max_position_embeddings` rows: learned ones, and those of GPT-J."""
    config = config.get_text_config(decoder=True)
    if config.model_type in ("gptj", "codegen"):
        return True
    try:
        family = modeling_module(config)
    except ValueError:  # code of the model's own repository
        return False
    return not getattr(config, "alibi", False) and not any(n.endswith("RotaryEmbedding") for n in vars(family))


def _rotary_class(config: PretrainedConfig, family: ModuleType) -> type | None:
    """The family's text rotary module, or None for a family without one."""
    names = [n for n in vars(family) if n.endswith("RotaryEmbedding") and "Vision" not in n and "Audio" not in n]
    if len(names) > 1:
        raise ValueError(f"model type '{config.model_type}': several rotary modules {names} in {family.__name__}")
    return getattr(family, names[0]) if names else None


def _pairing(config: PretrainedConfig, family: ModuleType) -> tuple[Layout, int]:
    """Which components form a pair, and the direction of the turn, read from the family's `rotate_half`.

    `rotate_half` maps a pair (first, second) to (-second, first); one family has the sign the other way round.
    """
    if not hasattr(family, "rotate_half"):
        if config.model_type not in _LAYOUTS:
            raise ValueError(f"model type '{config.model_type}': cannot tell how its rotary embedding pairs components")
        return _LAYOUTS[config.model_type], 1
    known: dict[tuple[float, ...], tuple[Layout, int]] = {
        (-3, -4, 1, 2): ("half", 1),
        (3, 4, -1, -2): ("half", -1),
        (-2, 1, -4, 3): ("interleaved", 1),
    }
    turned = tuple(family.rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist())
    if turned not in known:
        raise ValueError(f"model type '{config.model_type}': unknown pairing, rotate_half(1, 2, 3, 4) = {turned}")
    return known[turned]


def _long_context(
    config: PretrainedConfig, rope_type: str, parameters: dict, layer_type: str | None
) -> tuple[int, Callable[[Tensor], Tensor]] | None:
    """The number of positions beyond which the type changes its frequencies, and the frequencies it then takes."""
    kwargs = {} if layer_type is None else {"layer_type": layer_type}
    if rope_type == "longrope":
        context = parameters["original_max_position_embeddings"]
        long, _ = ROPE_INIT_FUNCTIONS[rope_type](config, None, seq_len=context + 1, **kwargs)
        return context, lambda _: long
    if rope_type == "dynamic":
        compute = ROPE_INIT_FUNCTIONS[rope_type]
        return config.max_position_embeddings, lambda length: compute(config, length.device, seq_len=length, **kwargs)[
            0
        ]
    return None


def rebase(
    k_rotated: Float[Tensor, "batch head time dim"],
    positions: Int[Tensor, "*batch time"],
    src_rope: Rope,
    dst_rope: Rope,
) -> Float[Tensor, "batch head time dim"]:
    """A rotated key moved from the teacher's rotary embedding to the student's, still rotated.

    The method's original option: the key stays rotated but as if the student's base and scaling had turned it
    (linear and NTK scaling are properties of `dst_rope`).
    """
    return dst_rope.rotate(src_rope.unrotate(k_rotated, positions), positions)
