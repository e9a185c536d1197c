"""Hugging Face folders with a manifest: made from every source, loaded, saved."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from kvpipe.align.regime import by_own_length
from kvpipe.config import Loading
from kvpipe.config.errors import nearest
from kvpipe.experiment.files import read_json, set_mode, verify
from kvpipe.experiment.paths import MANIFEST
from kvpipe.experiment.sizes import read_header
from kvpipe.models.headers import (
    UNUSED,
    bad_tokenizer,
    file_problems,
    misfit,
    no_language_model,
    read_config,
    tensor_problems,
)
from kvpipe.models.tokenizers import fingerprint

# bars of "loading weights" say nothing in a log file; problems are raised, not logged
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "generation_config.json", "*.py", "LICEN[CS]E*",
)  # fmt: skip
"""Files of a model folder beside config and weights that a model made from it takes over."""
CODED = "it is code of its own (config.json: auto_map), which runs with models.<name>.trust_remote_code: true only"
OLDER_KEYS = re.compile("rope_|rotary_|partial_rotary_|_|sliding_window_pattern")
"""Beginnings of fields that transformers still reads, under other names."""


def recorded(folder: Path) -> dict[str, Any]:
    """What the folder's manifest says of its source and of loading it; empty where there is no manifest."""
    path = folder / MANIFEST
    return read_json(path, f"run `kvpipe models --name {folder.name}`", ("source", "files")) if path.is_file() else {}


def verify_files(folder: Path, weights: bool = True) -> None:
    """Compare a folder's files with its manifest, each once in a process; one without a manifest is taken as it is.

    Args:
        folder: a model folder.
        weights: read the weights too; else all other files alone.

    Raises:
        ValueError: a file is missing, damaged or was replaced.
    """
    files = recorded(folder).get("files", {})  # none in a folder that is the user's own
    fix = f"run `kvpipe models --name {folder.name}`"
    for name, expected in files.items():
        if weights or not name.endswith(".safetensors"):
            verify(folder / name, expected, folder / MANIFEST, fix)


@contextmanager
def _readable(folder: Path, files: str) -> Iterator[None]:
    """Say of what transformers makes of a value of another type, or a name that it does not know, where that stands."""
    try:
        yield
    except (TypeError, AttributeError, KeyError, ArithmeticError, StrictDataclassError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{folder}: {files} holds a value that transformers cannot use ({said}): use the file that the model was saved with"
        ) from error


def load_tokenizer(folder: Path, trust: bool = False) -> Any:
    """The tokenizer of a model folder; it must be a fast one, since spans come from it.

    It is the one of `tokenizer.json` with the settings and the chat template beside it. `AutoTokenizer` would build that
    of the model's type anew for many types (qwen2, gpt2, …), with that type's splits and normaliser, whatever the file says.

    Args:
        folder: a model folder.
        trust: run code that lies in it (`Config.trusts`). Never read from the folder, whose files come from others.

    Raises:
        ValueError: tokenizer.json is damaged, or needs code that is not trusted; it has no token to pad with; or it cuts
            texts otherwise than when the folder's manifest was written.
    """
    verify_files(folder, weights=False)
    if problem := bad_tokenizer(folder):
        raise ValueError(f"{folder}: {problem}")
    coded = has_tokenizer_code(folder)
    from_file = (folder / "tokenizer.json").is_file() and not coded
    if coded and not trust:
        raise ValueError(
            f"{folder}: its tokenizer is code of its own (tokenizer_config.json: auto_map), which runs with "
            "models.<name>.trust_remote_code: true only; without that entry it is the one of tokenizer.json"
        )
    kind = PreTrainedTokenizerFast if from_file else AutoTokenizer
    try:
        with _readable(folder, "tokenizer_config.json"):
            tokenizer = kind.from_pretrained(folder, trust_remote_code=trust)
            tokenizer("")  # looks at model_max_length
    except (OSError, ValueError):
        if (folder / "tokenizer.json").is_file():
            raise
        raise FileNotFoundError(f"{folder}: tokenizer.json is missing: copy or download it too") from None
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: only a slow tokenizer is there; kvpipe needs tokenizer.json for byte spans")
    if tokenizer.pad_token_id is None:  # as Llama-3 ships; padding is masked, any token will do
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{folder}: tokenizer_config.json names no pad token and no end-of-text token: name one")
        tokenizer.pad_token = tokenizer.eos_token
    known = recorded(folder).get("tokenizer")
    if known is not None and known != fingerprint(tokenizer):
        raise ValueError(
            f"{folder}: its tokenizer no longer gives the ids that {MANIFEST} was written with: tokenizer.json or the "
            f"package that reads it is another. Make the model again (kvpipe models --name {folder.name}), and what was built "
            "with it"
        )
    return tokenizer


def has_tokenizer_code(folder: Path) -> bool:
    """Whether a folder's tokenizer is code of its own, which runs only where the configuration trusts it."""
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and "auto_map" in read_json(settings, "copy or download it again")


def load_config(folder: Path, trust: bool = False) -> Any:
    """The transformers config of a model folder; `trust` as in `load_tokenizer`.

    Raises:
        ValueError: config.json is damaged, or not that of a causal language model that can be loaded.
    """
    verify_files(folder, weights=False)
    if problem := no_language_model(read_config(folder)):
        raise ValueError(f"{folder}: {problem}")
    try:
        with _readable(folder, "config.json"):
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    except ValueError as error:
        if trust or "auto_map" not in read_config(folder):
            raise
        raise ValueError(f"{folder}: {CODED}") from error


def load_model(
    folder: Path, dtype: torch.dtype | None = None, device: str = "cpu", trust: bool = False
) -> PreTrainedModel:
    """The model of a folder in evaluation mode. Weights come from safetensors only.

    Args:
        folder: a model folder; its manifest says how to hold the model (`models.<name>.load`).
        dtype: instead of what the manifest says; float32 where it says nothing.
        device: where to, unless the manifest says that the layers are spread over all devices.
        trust: as in `load_tokenizer`.

    Raises:
        FileNotFoundError: weights are missing or cut off.
        ValueError: they are not those of the config: transformers would draw at random what is missing.
        ModuleNotFoundError: 8 or 4 bit is asked for and bitsandbytes is not installed.
        RuntimeError: the layers do not fit into the devices together.
    """
    if problems := file_problems(folder, ("config.json",)):
        raise FileNotFoundError(f"{folder}: {', '.join(problems)}")
    if problem := no_language_model(read_config(folder)) or misfit(folder):
        raise ValueError(f"{folder}: {problem}")
    verify_files(folder)
    load = Loading.model_validate(recorded(folder).get("load", {}))
    options: dict[str, Any] = {"trust_remote_code": trust}
    if load.quantize != "none":
        options["quantization_config"] = _quantization(folder, load)
    if load.sharded or load.quantize != "none":
        options["device_map"] = "auto" if load.sharded else {"": device}
    with _readable(folder, "config.json or generation_config.json"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or DTYPES[load.dtype],
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # and named below, with all the rest
            **options,
        )
    model, found = loaded
    unexpected = [name for name in found["unexpected_keys"] if not UNUSED.search(name)]
    if problem := tensor_problems(found["missing_keys"], unexpected, found["mismatched_keys"]):
        raise ValueError(f"{folder}: {problem}")
    if bad := [name for name, tensor in model.named_parameters() if not _finite(tensor)]:
        raise ValueError(
            f"{folder}: {len(bad)} tensors hold NaN or infinity ({bad[0]} first): they were damaged, or trained to it; copy "
            "or train the model again"
        )
    if "device_map" not in options:
        return by_own_length(model.to(device)).eval()
    check_placement(folder, getattr(model, "hf_device_map", {}))
    return by_own_length(model).eval()


def _finite(tensor: torch.Tensor) -> bool:
    """Whether every number of a tensor is one; nothing is said of packed ones, or of what is not in memory."""
    if tensor.dtype not in DTYPES.values() or tensor.is_meta or not tensor.numel():
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor.detach()))


def check_placement(folder: Path, places: dict[str, Any]) -> None:
    """Refuse a device map that leaves layers on disk, or on the CPU beside accelerators: hours instead of minutes.

    Raises:
        RuntimeError: names the layers and what to do.
    """
    accelerated = any(place not in ("cpu", "disk") for place in map(str, places.values()))
    left = [module for module, place in places.items() if place == "disk" or (place == "cpu" and accelerated)]
    if left:
        raise RuntimeError(
            f"{folder}: {len(left)} of {len(places)} parts do not fit into the devices ({', '.join(left[:3])} …). Give "
            "the job more devices, or set models.<name>.load.quantize: int8 or int4"
        )


def _quantization(folder: Path, load: Loading) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            f"{folder}: load.quantize {load.quantize} needs the package bitsandbytes; or set it to none"
        )
    from transformers import BitsAndBytesConfig

    if load.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[load.dtype])


def build_model(architecture: dict[str, Any], tokenizer: Any, seed: int) -> PreTrainedModel:
    """A model with random weights; vocabulary and special ids follow the tokenizer.

    Args:
        architecture: fields of a transformers config class, `model_type` among them.
        tokenizer: decides `vocab_size`, `eos_token_id` and `pad_token_id`.
        seed: seed of the weights.
    """
    values = dict(architecture)
    if "model_type" not in values:
        raise ValueError(f"architecture: model_type is missing (has {sorted(values)})")
    known = AutoConfig.for_model(values["model_type"])
    for key in values:
        if not hasattr(known, key) and not OLDER_KEYS.match(
            key
        ):  # transformers takes any key, and reads those that it knows
            raise ValueError(
                f"architecture: {key} is no field of model type {values['model_type']!r}{nearest(key, known.to_dict())}"
            )
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return by_own_length(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()  # type: ignore[return-value]


def random_model(folder: Path, seed: int, dtype: torch.dtype = torch.float32, trust: bool = False) -> PreTrainedModel:
    """The architecture of a model folder with weights drawn by a seed; `trust` as in `load_tokenizer`."""
    torch.manual_seed(seed)
    config = load_config(folder, trust)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
    return by_own_length(model).eval()


def has_weights(folder: Path) -> bool:
    """False for a from-scratch student's folder, which holds a config and a tokenizer only."""
    return any(folder.glob("*.safetensors"))


def manifest_hash(folder: Path) -> str:
    """Hash of the manifest: identifies the model's content."""
    recorded(folder)  # a damaged one says nothing of the model
    return sha256((folder / MANIFEST).read_bytes()).hexdigest()


def save_model(model: PreTrainedModel, source: Path, out: Path) -> None:
    """A model folder with the weights and config of `model`, and all else as it lies in `source`, byte by byte.

    A tokenizer that is loaded and saved again comes out in other files, with a pad token that it did not have.
    """
    model.save_pretrained(out)
    for path in source.iterdir():
        if any(path.match(pattern) for pattern in COMPANIONS):
            shutil.copyfile(path, out / path.name)
    set_mode(*(path for path in out.iterdir() if path.is_file()))


def weights_dtype(folder: Path) -> torch.dtype:
    """The floating type that most of a folder's weights have; float32 where they have none that a student trains in."""
    types = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    counts = dict.fromkeys(types, 0)
    for path in folder.glob("*.safetensors"):
        for dtype, shape in read_header(path).values():
            if dtype in counts:
                counts[dtype] += prod(shape)
    return types[max(counts, key=counts.__getitem__)]  # of equals the first


def randomise(folder: Path, out: Path, seed: int, trust: bool = False) -> dict[str, Any]:
    """A model with the config and tokenizer of `folder` and random weights; `trust` as in `load_tokenizer`."""
    dtype = DTYPES[Loading.model_validate(recorded(folder).get("load", {})).dtype]
    save_model(random_model(folder, seed, dtype, trust), folder, out)
    return {"source": "random", "like": folder.name, "like_manifest": manifest_hash(folder), "seed": seed}
