"""How much disk and memory things take, from numbers alone: no torch, so that a doctor can ask before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kvpipe.config import StoreConfig, TrainConfig

BYTES = {"bf16": 2, "fp16": 2, "int8": 1}


def estimate_bytes(config: StoreConfig, geometry: tuple[int, int, int], layers: int, rows: int, top: int) -> int:
    """Bytes of a store: keys and values of `layers` layers for `rows` tokens, int8 scales, spans and top logits."""
    _, heads, dim = geometry
    per_head = dim * BYTES[config.dtype] + (2 if config.dtype == "int8" else 0)
    return rows * (2 * layers * heads * per_head + 16 + top * 6)


CPU_INFO = Path("/proc/cpuinfo")
"""Where Linux says what its processors can."""


def cpu_has_bf16() -> bool:
    """Whether this machine's processors multiply bf16 by instructions of their own (x86's AVX-512 or AMX, Arm's bf16).

    Without them torch computes bf16 by way of fp32, slower than fp32 itself.
    """
    words = set(CPU_INFO.read_text(encoding="utf-8").split()) if CPU_INFO.is_file() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that decide its memory."""

    layers: int
    hidden: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    parameters: int

    @property
    def geometry(self) -> tuple[int, int, int]:
        """Layers, KV heads, head dimension."""
        return self.layers, self.kv_heads, self.head_dim


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → dtype (`BF16`) and shape of the tensors in a safetensors file; no tensor is read.

    Raises:
        ValueError: it is none, or shorter or longer than its header says.
    """
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off, or no safetensors file ({error}): copy or download it again") from None


def tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of a model folder, from the headers of its safetensors files."""
    files = sorted(folder.glob("model*.safetensors"))
    return {name: shape for path in files for name, (_, shape) in read_header(path).items()}


def count_parameters(folder: Path) -> int:
    """Parameters of a model folder; 0 without weights."""
    return sum(map(prod, tensors(folder).values()))


def kv_heads_and_dim(get: Callable[[str], Any]) -> tuple[int, int] | None:
    """KV heads and head dimension of a layer, under the names that families give them; None without attention heads.

    Args:
        get: a setting of the model's config, or None.
    """
    heads = get("num_attention_heads") or get("n_head") or get("n_heads")
    if not heads:
        return None
    nested = get("attn_config") or {}  # DBRX nests its attention settings
    inner = nested.get if isinstance(nested, dict) else lambda name: getattr(nested, name, None)
    named = [source(name) for source in (inner, get) for name in ("kv_n_heads", "num_kv_heads", "num_key_value_heads")]
    # Falcon and GPT BigCode: the number in the config does not count under multi_query
    one = get("multi_query") and not get("new_decoder_architecture")
    kv_heads = 1 if one else next(filter(None, named), heads)
    hidden = get("hidden_size") or get("n_embd") or get("d_model") or 0
    return int(kv_heads), int(get("head_dim") or hidden // heads)


def shape(values: dict[str, Any], vocab: int | None = None, parameters: int = 0) -> Shape | None:
    """The shape that a config.json promises, under the names that families give their sizes; None where it lacks one.

    Args:
        values: the fields of the transformers config class.
        vocab: size of the vocabulary, where the tokenizer decides it.
        parameters: counted ones; 0 derives them from the sizes (a gated MLP is assumed).
    """
    values = {**values, **values.get("text_config", {})}

    def first(*names: str) -> int:
        return next((int(values[name]) for name in names if values.get(name)), 0)

    layers, hidden = first("num_hidden_layers", "n_layer", "n_layers"), first("hidden_size", "n_embd", "d_model")
    heads, cached = first("num_attention_heads", "n_head", "n_heads"), kv_heads_and_dim(values.get)
    if not (layers and hidden and cached):
        return None
    kv_heads, head_dim = cached
    intermediate, words = first("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden, vocab or first("vocab_size")
    if not parameters:
        attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
        embeddings = words * hidden * (1 if values.get("tie_word_embeddings") else 2)
        parameters = embeddings + layers * (attention + 3 * hidden * intermediate + 2 * hidden)
    return Shape(layers, hidden, kv_heads, head_dim, intermediate, words, parameters)


def training_bytes(student: Shape, config: TrainConfig, tokens: int) -> int:
    """Memory of a training process for one micro-batch of `tokens`: weights, gradients, AdamW and activations.

    Weights stay in float32 under mixed precision (16 bytes per trained parameter with gradient and AdamW's two moments).
    Activations of a layer follow Korthikanti et al. (arXiv:2205.05198, eq. 1) without the attention matrix, which fused
    attention does not keep, and with a gated MLP; with checkpointing one layer's are alive beside every layer's input.
    Logits count thrice: as computed, their logarithms and their gradient.
    """
    trained = student.parameters
    if config.lora is not None:
        trained = 4 * student.layers * config.lora.rank * (student.hidden + student.intermediate)
    number = 4 if config.precision == "fp32" else 2
    layer = tokens * number * (10 * student.hidden + 3 * student.intermediate + 2 * student.kv_heads * student.head_dim)
    alive = layer + student.layers * tokens * number * student.hidden
    activations = alive if config.gradient_checkpointing else student.layers * layer
    logits = 3 * 4 * tokens * student.vocab
    return 4 * student.parameters + 12 * trained + activations + logits


def teacher_pass_bytes(teacher: Shape, layers: int, rows: int, tokens: int, width: float = 4.0) -> int:
    """Memory of building a shard: the teacher in `width` bytes a weight, the shard's rows (float32) and what is packed of
    them, and the logits of one batch of `tokens`."""
    cache = rows * 2 * layers * teacher.kv_heads * teacher.head_dim * (4 + 2)
    return round(width * teacher.parameters) + cache + 2 * 4 * tokens * teacher.vocab
