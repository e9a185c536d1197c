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


def estimate_bytes(
    config: StoreConfig, geometry: tuple[int, int, int], layers: int, rows: int, top: int, states: int = 0
) -> int:
    """Bytes of a store: keys and values of `layers` layers for `rows` tokens, int8 scales, spans, top logits, and so many
    numbers of hidden and final states a token."""
    _, heads, dim = geometry
    per_head = dim * BYTES[config.dtype] + (2 if config.dtype == "int8" else 0)
    return rows * (2 * layers * heads * per_head + 16 + top * 6 + 2 * states)


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
    heads: int = 0
    """Query heads; 0 where they fill the hidden width."""

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
    return Shape(layers, hidden, kv_heads, head_dim, intermediate, words, parameters, heads)


# ---------------------------------------------------------------- memory
BASE = 0.55e9
"""Bytes of a process that has imported torch and transformers; what CUDA adds on the host is `CUDA_BASE`."""
CUDA_BASE = 2.5e9
SLACK = 1.1
"""What allocators keep between tensors."""
PIECE = 1 << 23
"""Logits that are held at a time: 32 MB in float32, which the allocator keeps for the next piece and a cache nearly holds."""
PIECE_BYTES = 22.0
"""Of each of them: as computed, widened, their logarithms, the gradient and its narrow copy."""
LEAST = 256
"""Rows of a piece where the head trains: its gradient is added to once a piece, which is as much work as so many rows."""
ROOM = {"cpu": 0.4e9, "cuda": 2e9}
"""Bytes for the activations and caches of a batch of the teacher pass."""
MOST = {"cpu": 2048, "cuda": 16384}
"""Tokens of such a batch, where there is room for so many: more are no faster."""
SCORED = 8192
"""Tokens, padding counted, that are scored at once where no single text is longer."""


def mixed(config: TrainConfig, gpu: bool = False) -> bool:
    """Whether a cell computes in 16 bits; of `precision: auto`, on a processor like this one."""
    return config.precision in ("bf16", "fp16") or (config.precision == "auto" and (gpu or cpu_has_bf16()))


def training_bytes(
    student: Shape, config: TrainConfig, tokens: int, matched: int = 0, gpu: bool = False, processes: int = 1
) -> float:
    """Memory of training, the process itself aside, for one micro-batch of `tokens`.

    Weights and AdamW's two moments are in float32. At the end of the forward the activations stand beside them, and under
    mixed precision a copy of the weights; at the end of the backward the gradients do. Logits are held in pieces.

    Args:
        student: its sizes.
        config: the training's.
        tokens: of a micro-batch, padding counted.
        matched: layers whose keys or values are matched: recorded, with the fused target of all layers and the gradients.
        gpu: where it trains.
        processes: of the cell; under `shard` each holds its part of weights, gradients and moments, and beside them a
            layer and the embeddings in one piece.
    """
    embedding = student.vocab * student.hidden
    trained = student.parameters - (embedding if any("embed" in name for name in config.frozen) else 0)
    if config.lora is not None:
        trained = 4 * student.layers * config.lora.rank * (student.hidden + student.intermediate)
    narrow = mixed(config, gpu)
    layer = tokens * _activations(student, narrow)
    alive = layer + student.layers * tokens * 4 * student.hidden if config.gradient_checkpointing else 0.0
    activations = alive or student.layers * layer
    caches = tokens * 4 * student.kv_heads * student.head_dim * (4 * matched + (2 * student.layers if matched else 0))
    whole = trained >= student.parameters
    head = (2 if narrow else 0) * embedding + (4 * embedding if whole else 0)
    rows = max(PIECE, LEAST * student.vocab if whole else 0)
    forward = activations + caches + head + PIECE_BYTES * min(rows, tokens * student.vocab)
    forward += 2 * (student.parameters - embedding) if narrow else 0
    backward, held = 4.0 * trained + layer, 4.0 * student.parameters + 8 * trained
    if config.shard and processes > 1:
        ends = student.parameters - (student.parameters - embedding) * (student.layers - 1) / student.layers
        held = held / processes + 4 * ends
        # micro-batches before the last add up whole gradients
        backward = (4 * trained / processes + 4 * ends if config.accumulate == 1 else 4 * trained) + layer
    return SLACK * (held + max(forward, backward))


def _activations(model: Shape, narrow: bool) -> int:
    """Bytes that a layer keeps of a token for its backward pass.

    A gated MLP (gate, its activation, up, their product), two norms (input, normalised, output), and fused attention, which
    keeps queries, output, and keys and values repeated for every query head. Under mixed precision the residual stream and
    the norms stay in float32.
    """
    attention = (model.heads or model.hidden // model.head_dim) * model.head_dim
    if narrow:
        return 20 * model.hidden + 8 * attention + 8 * model.intermediate
    return 24 * model.hidden + 16 * attention + 16 * model.intermediate


def scoring_bytes(model: Shape, tokens: int, width: float = 4.0, cached: bool = True) -> float:
    """Memory of scoring or generating, the process itself aside: weights, one layer's activations and a piece of the logits,
    and where it generates (`cached`), of so many `tokens` at once, their cache twice, since it is grown by copying."""
    alive = min(tokens, SCORED) * width * 3 * (model.hidden + model.intermediate)
    cache = 2 * tokens * width * 2 * model.layers * model.kv_heads * model.head_dim if cached else 0.0
    return SLACK * (width * model.parameters + alive + cache + 10.0 * min(PIECE, tokens * model.vocab))


DRAWN_BYTES = 56.0
"""Of each logit that a text's next token is drawn by: in float32 and scaled, sorted with its place, and as probabilities in
float64, added up."""


def writing_bytes(model: Shape, tokens: int, rows: int, width: float = 4.0) -> float:
    """Memory of drawing texts, the process itself aside: weights, the cache of so many `tokens` in `rows` texts side by side
    twice, since it is grown by copying, a layer's activations of the prompts, and the logits of the texts' last tokens."""
    cache = 2 * tokens * width * 2 * model.layers * model.kv_heads * model.head_dim
    prompts = tokens * width * 3 * (model.hidden + model.intermediate) / 2
    return SLACK * (width * model.parameters + cache + prompts + DRAWN_BYTES * rows * model.vocab)


def batch_numbers(teacher: Shape, layers: int) -> int:
    """Numbers that are alive of each token of the teacher pass: a layer's widest activations, the kept layers' caches twice."""
    return 10 * teacher.hidden + 4 * teacher.intermediate + 4 * layers * teacher.kv_heads * teacher.head_dim


def teacher_pass_bytes(
    teacher: Shape,
    layers: int,
    longest: int,
    width: float = 4.0,
    gpu: bool = False,
    read: float = 0.0,
    head: bool = True,
) -> float:
    """Memory of building a shard of any size, the process itself aside: the teacher in `width` bytes a weight, one batch and
    a piece of its logits.

    Args:
        teacher: its sizes.
        layers: that are kept.
        longest: tokens of the longest text, which is read at once.
        width: bytes of a weight, and of an activation where it is 2 or more.
        gpu: where the teacher is.
        read: bytes of a weight in its files, which are mapped while they are read.
        head: whether anything of the logits is kept.
    """
    kind, each = ("cuda" if gpu else "cpu"), max(2.0, width) * batch_numbers(teacher, layers)
    batch = max(min(ROOM[kind], MOST[kind] * each), longest * each)
    piece = PIECE_BYTES * min(PIECE, longest * teacher.vocab) if head else 0.0
    return SLACK * ((width + read) * teacher.parameters + batch + piece)


def rows_bytes(teachers: list[tuple[Shape, int]], student: Shape, rows: int) -> float:
    """Memory of aligned rows of all teachers beside the student's own, as fits and layer maps hold them: each in float32 as
    read, as gathered and as chosen, and one layer's in float64."""
    theirs = sum(2 * layers * shape.kv_heads * shape.head_dim for shape, layers in teachers)
    own = 2 * student.layers * student.kv_heads * student.head_dim
    return SLACK * (4 * student.parameters + rows * 4 * (3 * theirs + 3 * own))
