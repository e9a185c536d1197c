"""What the files of a model folder say without torch: whether they are whole, fit each other, and can be distilled.

`kvpipe.models.folders` asks before it loads, the doctor before anything runs. Headers of safetensors hold every tensor's name
and shape, but no family's list of names: that every layer has the tensors of its like is found here, and what all layers
lack only by `kvpipe.models.folders.load_model`.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from kvpipe.experiment.files import read_json
from kvpipe.experiment.sizes import read_header, tensors

NEEDED = ("config.json", "tokenizer.json")
WEIGHT_INDEX = "model.safetensors.index.json"
LISTED = 3
"""Names that a message gives of many."""

# ---------------------------------------------------------------- config.json
SUPPORTED = "kvpipe distils causal language models whose layers all have full, sliding or grouped-query attention"
ATTENTION = {"attention", "full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers that have keys and values for each position and head."""
UNSUPPORTED: dict[str, list[str]] = yaml.safe_load(
    Path(__file__).with_name("unsupported.yaml").read_text(encoding="utf-8")
)
"""Model types that cannot be distilled, by what they are; where config.json says it, they need not be listed."""
OTHER_HEADS = ("ForMaskedLM", "Classification", "ForQuestionAnswering", "ForMultipleChoice", "RewardModel")
HELD = {"mxfp4", "bitsandbytes"}
"""Quantised weights that transformers itself unpacks, and those of `models.<name>.load.quantize`."""


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of a folder's config.json.

    Raises:
        ValueError: it is no JSON object; names the file.
    """
    return read_json(folder / "config.json", "copy or download it again")


def no_language_model(values: dict[str, Any]) -> str | None:
    """Why a config.json is not that of a causal language model that can be loaded here; None where it is one."""
    kind, classes = values.get("model_type"), [str(name) for name in values.get("architectures") or []]
    other = next((name for name in classes if name.endswith(OTHER_HEADS)), None)
    text = values.get("text_config")
    method = (values.get("quantization_config") or {}).get("quant_method")
    causal = causal_types()
    if not isinstance(kind, str) and "auto_map" not in values:
        return "config.json names no model_type: use the file that the model was saved with"
    if method is not None and method not in HELD:
        return (
            f"its weights are quantised by {method} (config.json: quantization_config), which is not read here: use the "
            "model before quantisation, and models.<name>.load.quantize: int8 or int4 for a smaller one"
        )
    if kind in UNSUPPORTED["encoder"] and not values.get("is_decoder"):
        return f"model type '{kind}' is an encoder: it has no next-token logits and sees what follows. {SUPPORTED}"
    if values.get("is_encoder_decoder"):
        return f"model type '{kind}' is an encoder and a decoder. {SUPPORTED}"
    if other is not None:
        return f"it holds a {other} (config.json: architectures), without a language model's head. {SUPPORTED}"
    if causal is None or kind in causal or "auto_map" in values:
        return None
    if isinstance(text, dict) or any(part in values for part in ("vision_config", "audio_config")):
        inner = text.get("model_type") if isinstance(text, dict) else None
        fix = f"; save its text part, model type '{inner}', as a folder of its own" if inner in causal else ""
        return f"model type '{kind}' is multimodal, and transformers runs it with no text alone{fix}. {SUPPORTED}"
    return f"transformers knows no causal language model of model type '{kind}'. {SUPPORTED}"


def no_cache(values: dict[str, Any]) -> str | None:
    """Why a model has no cache of keys and values by layer and head, from its config.json; None where it has one."""
    kind = values.get("model_type")
    inner = values.get("text_config")
    values = {**values, **inner} if isinstance(inner, dict) else values
    types = {kind, values.get("model_type")}
    listed = values.get("layer_types") or values.get("layers_block_type") or []
    others = [layer for layer, name in enumerate(listed) if name not in ATTENTION]
    if types & set(UNSUPPORTED["state_space"]):
        return f"model type '{kind}' has no attention, so no keys and values. {SUPPORTED}"
    if values.get("kv_lora_rank") or types & set(UNSUPPORTED["latent"]):
        return f"model type '{kind}' has latent attention (MLA), one compressed key for all heads. {SUPPORTED}"
    if others:
        names = ", ".join(sorted({str(listed[layer]) for layer in others}))
        return (
            f"model type '{kind}' is a hybrid: {len(others)} of its {len(listed)} layers ({_few(map(str, others))}) are "
            f"{names}, without keys and values to distil. {SUPPORTED}"
        )
    if types & set(UNSUPPORTED["hybrid"]) and not listed:
        return f"model type '{kind}' is a hybrid: not all of its layers are attention alone. {SUPPORTED}"
    return None


@cache
def causal_types() -> frozenset[str] | None:
    """Model types of which transformers has a causal language model, read from its source: importing it takes seconds,
    and torch. None where it is not installed."""
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "models" / "auto" / "modeling_auto.py"
    if not path.is_file():
        return None
    _, _, after = path.read_text(encoding="utf-8").partition("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = ")
    return frozenset(re.findall(r'\(\s*"([^"]+)",', after.partition("\n)")[0])) or None


# ---------------------------------------------------------------- files
def file_problems(folder: Path, needed: tuple[str, ...] = NEEDED) -> list[str]:
    """What is wrong with a model folder: files that are missing, and weights that were not written to their end."""
    missing = [name for name in needed if not (folder / name).is_file()]
    weights = sorted(folder.glob("*.safetensors"))
    index = folder / WEIGHT_INDEX
    if index.is_file():
        try:
            listed = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError):
            return [f"{WEIGHT_INDEX} cannot be read"]
        missing += [name for name in listed if not (folder / name).is_file()]
    elif (folder / "adapter_config.json").is_file() and not (folder / "model.safetensors").is_file():
        return [f"it holds an adapter (adapter_config.json) and no model: {MERGE}"]
    elif not weights:
        pickled = [path.name for path in (*folder.glob("pytorch_model*.bin"), *folder.glob("*.pt"))]
        missing.append("*.safetensors" + (f" (there is only {pickled[0]}: pickles are not loaded)" if pickled else ""))
    return [f"{name} is missing" for name in missing] + [
        f"{path.name} is cut off" for path in weights if not whole(path)
    ]


def whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says; reads the header only."""
    try:
        return read_header(path) is not None
    except (OSError, ValueError):
        return False


def bad_tokenizer(folder: Path) -> str | None:
    """Why a folder's tokenizer.json cannot be read; None where it can, is not there, or the Rust library is not."""
    path = folder / "tokenizer.json"
    if not path.is_file() or importlib.util.find_spec("tokenizers") is None:
        return None
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises nothing narrower
        return f"{path.name} is cut off or damaged ({error}): copy or download it again"
    return None


# ---------------------------------------------------------------- tensors
MERGE = "merge it into its model (peft: merge_and_unload(), then save_pretrained) and name that folder"
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel",
    "base_model.model.": "peft",
}
"""What a training program's wrappers put before every name."""
LAYER = re.compile(r"^(?P<root>(?:[A-Za-z_]\w*\.)*?)(?:layers|h|blocks|block|layer)\.(?P<index>\d+)\.(?P<rest>.+)$")
ROOTS = {"model", "transformer", "gpt_neox", "decoder", "language_model", "text_model", "backbone"}
"""Parts of names that transformers knows before a decoder's layers."""
EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in)\.weight$")
EMBEDDED = ("word_embed_proj_dim", "embedding_size", "embed_dim")
"""Fields that say another width of the embedding than `hidden_size`."""
HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output|output_projection|head)\.weight$")
SCORES = re.compile(r"(?:^|\.)(?:score|v_head|classifier)\.")
UNUSED = re.compile(
    r"(?:^|\.)(?:vision_\w+|visual|audio_\w+|multi_modal_projector|embed_vision|embed_audio|mtp)\."
    r"|(?:rotary_emb\.(?:inv_freq|cos_cached|sin_cached)|\.(?:attn|attention)\.(?:masked_)?bias)$"
)
"""Tensors that the language model of a folder does without: towers for pictures and sound, layers that predict further
tokens, tables that are computed. A head for scores (`score`, `v_head`) is not among them: its body was trained to
judge texts, and is no teacher of the next token."""


def misfit(folder: Path) -> str | None:
    """What the headers of a folder's weights show to be missing, too much or of another size than its config.json says.

    Folders with code of their own may name tensors as they like: nothing is said of them.
    """
    values, shapes = read_config(folder), tensors(folder)
    if "auto_map" in values:
        return None
    values = {**values, **(values.get("text_config") or {})}
    count = next((values[n] for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if values.get(n)), None)
    vocabulary = values.get("vocab_size")
    layers: dict[int, dict[str, tuple[int, ...]]] = defaultdict(dict)
    roots: dict[int, str] = {}
    for name, shape in shapes.items():
        found = LAYER.match(name)
        if found and not UNUSED.search(name) and set(found["root"].split(".")[:-1]) <= ROOTS:
            layers[int(found["index"])][found["rest"]] = shape
            roots[int(found["index"])] = name.removesuffix(found["rest"])
    embedding = next((name for name in shapes if EMBEDDING.search(name) and not UNUSED.search(name)), None)
    if not layers or any("lora_" in name for name in shapes):
        own = [name for name in shapes if not UNUSED.search(name)]
        return tensor_problems(
            [f"the layers of model type '{values.get('model_type')}'"] if not layers else [], own, []
        )
    missing, mismatched = _uneven(layers, roots, values)
    like = min(layers)
    for layer in set(range(count or 0)) - set(layers):
        missing += [roots[like].replace(f".{like}.", f".{layer}.") + rest for rest in layers[like]]
    extra = values.get("num_nextn_predict_layers") or 0  # of layers that predict further tokens, which are not loaded
    unexpected = [
        roots[layer] + rest
        for layer in layers
        if count is not None and layer >= count + extra
        for rest in layers[layer]
    ]
    if embedding is None:
        missing.append("the input embedding")
    elif isinstance(vocabulary, int) and shapes[embedding][0] != vocabulary:
        mismatched.append((embedding, shapes[embedding], (vocabulary, *shapes[embedding][1:])))
    elif (width := values.get("hidden_size")) not in (None, shapes[embedding][-1]) and not any(
        k in values for k in EMBEDDED
    ):
        mismatched.append((embedding, shapes[embedding], (*shapes[embedding][:1], width)))
    if values.get("tie_word_embeddings") is False and not any(HEAD.search(name) for name in shapes):
        missing.append("lm_head.weight")
        unexpected += [name for name in shapes if SCORES.search(name)]
    return tensor_problems(missing, unexpected, mismatched)


def lora_misfit(folder: Path, targets: list[str]) -> str | None:
    """Why adapters on modules of these names are refused, as far as config.json and the headers tell."""
    values, shapes = read_config(folder), tensors(folder)
    modules = {name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2}
    head = any(HEAD.search(name) for name in shapes)
    tied = bool(values.get("tie_word_embeddings")) or (bool(shapes) and not head)
    for target in targets:
        if tied and any(kind.search(f"{target}.weight") for kind in (EMBEDDING, HEAD)):
            return f"{target!r}: embedding and head of the student are one weight (tied), so no adapter on one can be saved"
        if modules and not any(f".{name}".endswith(f".{target}") for name in modules):
            known = sorted({name.rpartition(".")[2] for name in modules})
            return f"{target!r} is no module of the student; its weights are those of {', '.join(known)}"
    return None


def unembedded(folder: Path) -> tuple[str, bool] | None:
    """Ids of tokenizer.json that the embedding has no row for, in words, and whether the pad token is one of them.

    Texts without such a token are read as ever; None where every id has a row.
    """
    rows = next((shape[0] for name, shape in tensors(folder).items() if EMBEDDING.search(name)), None)
    if rows is None or not (folder / "tokenizer.json").is_file():
        return None
    read = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    words = (read.get("model") or {}).get("vocab") or {}
    ids = dict(words) if isinstance(words, dict) else {word: number for number, (word, *_) in enumerate(words)}
    ids |= {token["content"]: token["id"] for token in read.get("added_tokens") or []}
    beyond = {word: number for word, number in ids.items() if number >= rows}
    settings = folder / "tokenizer_config.json"
    pad = json.loads(settings.read_text(encoding="utf-8")).get("pad_token") if settings.is_file() else None
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if not beyond:
        return None
    shown = _few(f"{word!r} ({number})" for word, number in sorted(beyond.items(), key=lambda item: item[1]))
    return f"{len(beyond)} tokens of tokenizer.json have no row in the embedding of {rows}: {shown}", pad in beyond


Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]
"""A tensor, its shape in the file, and the shape that was expected."""


def _uneven(
    layers: dict[int, dict[str, tuple[int, ...]]], roots: dict[int, str], values: dict[str, Any]
) -> tuple[list[str], list[Mismatch]]:
    """Tensors that most layers of a kind have and one has not, or in another shape.

    Kinds: with experts or without; with a cache of their own or an earlier layer's; by settings of single layers; and,
    where full attention has sizes of its own (`global_head_dim`), by the kind of attention.
    """
    types, shared = values.get("layer_types") or [], values.get("num_kv_shared_layers") or 0
    types = types if "global_head_dim" in values else []
    settings = values.get("per_layer_config") or dict(enumerate(values.get("block_configs") or []))
    sizes = any(isinstance(values.get(n), list) for n in ("intermediate_size", "num_key_value_heads"))  # one a layer
    kinds: dict[tuple, list[int]] = defaultdict(list)
    for layer in sorted(layers):
        own = types[layer] if layer < len(types) else None, str(settings.get(str(layer), settings.get(layer)))
        sparse = any("expert" in rest for rest in layers[layer])
        kinds[own, sparse, bool(shared) and layer >= len(layers) - shared].append(layer)
    missing, mismatched = [], []
    for of in kinds.values():
        for rest, seen in Counter(rest for layer in of for rest in layers[layer]).items():
            having = [layer for layer in of if rest in layers[layer]]
            if seen >= len(of) / 2:
                missing += [roots[layer] + rest for layer in of if layer not in having]
            usual = Counter(layers[layer][rest] for layer in having).most_common()[0][0]
            other = [layer for layer in having if layers[layer][rest] != usual and not sizes]
            mismatched += [(roots[layer] + rest, layers[layer][rest], usual) for layer in other]
    return missing, mismatched


def tensor_problems(missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[Mismatch]) -> str | None:
    """One line on tensors that do not fit: a few of them, how many, the likely cause and what to do; None without any."""
    gone, more, other = sorted(missing), sorted(unexpected), sorted(mismatched)
    parts = [f"{len(gone)} missing ({_few(gone)})"] if gone else []
    parts += [f"{len(more)} unexpected ({_few(more)})"] if more else []
    if other:
        sizes = _few(f"{name} is {list(found)}, expected {list(wanted)}" for name, found, wanted in other)
        parts.append(f"{len(other)} of another shape ({sizes})")
    return f"the weights are not those of config.json: {'; '.join(parts)}. {_cause(gone, more)}" if parts else None


def _cause(missing: list[str], unexpected: list[str]) -> str:
    if any("lora_" in name or ".base_layer." in name for name in unexpected):
        return f"They hold a LoRA adapter that was not merged: {MERGE}"
    for prefix, wrapper in WRAPPERS.items():
        if any(name.startswith(prefix) for name in unexpected):
            return f"They were saved from inside {wrapper}: save the model itself, or take '{prefix}' off every name"
    if any(SCORES.search(name) for name in unexpected):
        return "They are a classifier's or a reward model's: use the language model that it was made from"
    if missing and not unexpected:
        return "A shard or a layer was not written or copied: save or download the folder again, whole"
    return "They are another architecture's, or were renamed: use the config.json that was saved with them"


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:LISTED]) + (", …" if len(listed) > LISTED else "")
