"""Models step: every source becomes a Hugging Face folder with a manifest; loading and saving such folders."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterable
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from kvpipe.align.regime import by_own_length
from kvpipe.config import Loading, TokenizerRecipe
from kvpipe.experiment.files import digest_of, read_json, set_mode, verify, write_json
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

# bars of "loading weights" say nothing in a log file; problems are raised, not logged
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()

END, PAD, BEGIN, UNKNOWN = "<|endoftext|>", "<|pad|>", "<s>", "<unk>"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "generation_config.json", "*.py", "LICEN[CS]E*",
)  # fmt: skip
"""Files of a model folder beside config and weights that a model made from it takes over."""
COPY_LIMIT = 1 << 30
"""Local folders below this many bytes are copied; larger ones are linked."""


# ---------------------------------------------------------------- tokenizers
def train_tokenizer(recipe: TokenizerRecipe, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a tokenizer of one of the three families on texts; deterministic."""
    return {"byte_bpe": _byte_bpe, "unigram": _unigram, "metaspace_bpe": _metaspace_bpe}[recipe.kind](recipe, texts)


def _byte_bpe(recipe: TokenizerRecipe, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(tokenizer_models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if recipe.split_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def _sentencepiece_like(tokenizer: Tokenizer, recipe: TokenizerRecipe) -> PreTrainedTokenizerFast:
    """▁ for spaces, newlines as pieces of their own, bytes as <0xNN>, <s> in front: the Llama-2 family's habits."""
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    pieces: list[Any] = [pre_tokenizers.Split(Regex("\n"), "isolated")]
    if recipe.split_digits:
        pieces.append(pre_tokenizers.Digits(individual_digits=True))
    pieces.append(pre_tokenizers.Split("▁", "merged_with_next"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, unk_token=UNKNOWN
    )


_SPECIALS = [UNKNOWN, BEGIN, END, PAD]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _marked(texts: Iterable[str], split_digits: bool) -> Iterable[str]:
    return (text.replace(" ", "▁") for text in texts)


def _unigram(recipe: TokenizerRecipe, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    room = recipe.vocab_size - len(_SPECIALS) - len(_BYTES)
    if room < 1:
        raise ValueError(f"tokenizer.vocab_size {recipe.vocab_size}: unigram with byte fallback needs more than 260")
    learner = Tokenizer(tokenizer_models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "removed"),
            pre_tokenizers.Digits(individual_digits=recipe.split_digits),
            pre_tokenizers.Split("▁", "merged_with_next"),
        ]
    )
    trainer = trainers.UnigramTrainer(vocab_size=room, show_progress=False, unk_token=UNKNOWN, special_tokens=[UNKNOWN])
    learner.train_from_iterator(_marked(texts, recipe.split_digits), trainer)
    found = [(p, round(s, 9)) for p, s in json.loads(learner.to_str())["model"]["vocab"] if p != UNKNOWN]
    # pieces of one score come in the order of a hash map, which differs from run to run
    pieces = sorted(found, key=lambda piece: (-piece[1], piece[0]))
    # byte pieces and specials carry no score of their own: they are reached by fallback or by name only
    vocab = [(token, 0.0) for token in [*_SPECIALS, *_BYTES]] + pieces[:room]
    tokenizer = Tokenizer(tokenizer_models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.add_special_tokens(_SPECIALS)
    return _sentencepiece_like(tokenizer, recipe)


def _metaspace_bpe(recipe: TokenizerRecipe, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    learner = Tokenizer(tokenizer_models.BPE(unk_token=UNKNOWN))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "removed"),
            pre_tokenizers.Digits(individual_digits=recipe.split_digits),
            pre_tokenizers.Split("▁", "merged_with_next"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size - len(_BYTES), special_tokens=_SPECIALS, show_progress=False
    )
    learner.train_from_iterator(_marked(texts, recipe.split_digits), trainer)
    learned = json.loads(learner.to_str())["model"]
    # bytes are pieces and not special tokens: those would be matched in a text, and be left out when it is decoded
    pieces = [p for p in sorted(learned["vocab"], key=learned["vocab"].__getitem__) if p not in _SPECIALS]
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*_SPECIALS, *_BYTES, *pieces]))}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(
        tokenizer_models.BPE(vocab=vocab, merges=merges, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens(_SPECIALS)
    return _sentencepiece_like(tokenizer, recipe)


# ---------------------------------------------------------------- folders
def recorded(folder: Path) -> dict[str, Any]:
    """What the folder's manifest says of its source and of loading it; empty where there is no manifest."""
    path = folder / MANIFEST
    return read_json(path, f"run `kvpipe models --name {folder.name}`") if path.is_file() else {}


def verify_files(folder: Path, weights: bool = True) -> None:
    """Compare a folder's files with its manifest, each once in a process; one without a manifest is taken as it is.

    Args:
        folder: a model folder.
        weights: read the weights too; else all other files alone.

    Raises:
        ValueError: a file is missing, damaged or was replaced.
    """
    files = recorded(folder).get("files", {})
    fix = f"run `kvpipe models --name {folder.name}`"
    for name, expected in files.items():
        if weights or not name.endswith(".safetensors"):
            verify(folder / name, expected, folder / MANIFEST, fix)


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
    tokenizer = (PreTrainedTokenizerFast if from_file else AutoTokenizer).from_pretrained(
        folder, trust_remote_code=trust
    )
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: only a slow tokenizer is there; kvpipe needs tokenizer.json for byte spans")
    if tokenizer.pad_token_id is None:  # as Llama-3 ships; padding is masked, any token will do
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"{folder}: its tokenizer has no pad token and no end-of-text token: name them in tokenizer_config.json "
                "(pad_token, eos_token)"
            )
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


FINGERPRINT = (
    "What is 17 + 25?\nIt's 42, isn't it? WE'LL see: 1234567890 3.14159 1,000,000\n#### 42",
    "  two   three    four     \t\ttabs\r\n\r\n\n\n \n trailing   ",
    "def add(x, y):\n\tif x != y:\n        return x**2 // y  # sum\n    print(f'{x:>8}', [1, 22, 333])\n",
    "Zażółć gęślą jaźń, naïve café — e\u0301 ﬁ ① ½ “quotes” … ͏ \u200b\ufeff",
    "日本語のトークン化は難しい。我们使用模型，12个。 한국어 문장입니다. مرحبا بالعالم Привет, мир! שלום",
    "😀👍🏽 👩‍👩‍👧🇩🇪 ▁▁ Ġ <0x0A> \x00\x1b",
    "camelCase snake_case SCREAMING_CASE https://a.b/c?d=e&f=%20 a@b.c \\frac{1}{2} $x^2$ <b>&amp;</b>",
    "<s></s><unk><|endoftext|><|im_start|>user\nhi<|im_end|><bos><eos><|eot_id|>[INST] x [/INST]",
)
"""Texts on which tokenizers that differ in splits, normaliser, digits, spaces, bytes or added tokens differ in ids."""


def fingerprint(tokenizer: Any) -> str:
    """Hash of the ids that a tokenizer gives to fixed texts, with and without its special tokens, and of its special ids."""
    ids = [tokenizer(list(FINGERPRINT), add_special_tokens=special)["input_ids"] for special in (True, False)]
    named = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return sha256(json.dumps([ids, named]).encode()).hexdigest()


def load_config(folder: Path, trust: bool = False) -> Any:
    """The transformers config of a model folder; `trust` as in `load_tokenizer`.

    Raises:
        ValueError: config.json is damaged, or not that of a causal language model that can be loaded.
    """
    verify_files(folder, weights=False)
    if problem := no_language_model(read_config(folder)):
        raise ValueError(f"{folder}: {problem}")
    return AutoConfig.from_pretrained(folder, trust_remote_code=trust)


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
    if "device_map" not in options:
        return by_own_length(model.to(device)).eval()
    check_placement(folder, getattr(model, "hf_device_map", {}))
    return by_own_length(model).eval()


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
            f"{folder}: load.quantize {load.quantize} needs the package bitsandbytes, which is not installed: pip install "
            "bitsandbytes, or set models.<name>.load.quantize: none"
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


def write_manifest(folder: Path, source: dict[str, Any], **how: Any) -> None:
    """`MANIFEST.json`: sha256 of every file and where they came from. The DAG's edge: it changes when a file does.

    Args:
        folder: the model's.
        source: where it came from.
        how: how it is to be held (`load`), as `load_model` reads it; and whether its code runs, which is only noted.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(MANIFEST):
            files[path.relative_to(folder).as_posix()] = digest_of(path, "sha256").removeprefix("sha256:")
    write_json(folder / MANIFEST, {"source": source, "files": files, **how}, sort_keys=True)


def manifest_hash(folder: Path) -> str:
    """Hash of the manifest: identifies the model's content."""
    recorded(folder)  # a damaged one says nothing of the model
    return sha256((folder / MANIFEST).read_bytes()).hexdigest()


def fetch_local(path: Path, out: Path) -> dict[str, Any]:
    """Copy (or, above `COPY_LIMIT`, link) a model folder; returns the manifest's `source`."""
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"models: {path} is not a model folder: it has no config.json")
    link_folder([p for p in sorted(path.iterdir()) if p.is_file() and p.name != MANIFEST], out)
    return {"source": "local", "path": path.as_posix()}


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
    counts = {"F32": 0, "BF16": 0, "F16": 0}
    for path in folder.glob("*.safetensors"):
        for entry in read_header(path)[0].values():
            if entry["dtype"] in counts:
                counts[entry["dtype"]] += prod(entry["shape"])
    most = max(counts, key=counts.__getitem__)  # of equals the first
    return {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[most]


def link_folder(files: list[Path], out: Path) -> None:
    """Copy files into a folder; above `COPY_LIMIT` together they are linked instead."""
    link = sum(p.stat().st_size for p in files) > COPY_LIMIT
    for file in files:
        target = out / file.name
        target.unlink(missing_ok=True)
        if link:
            target.symlink_to(file.resolve())
        else:
            shutil.copyfile(file, target)


def randomise(folder: Path, out: Path, seed: int, trust: bool = False) -> dict[str, Any]:
    """A model with the config and tokenizer of `folder` and random weights; `trust` as in `load_tokenizer`."""
    dtype = DTYPES[Loading.model_validate(recorded(folder).get("load", {})).dtype]
    save_model(random_model(folder, seed, dtype, trust), folder, out)
    return {"source": "random", "like": folder.name, "like_manifest": manifest_hash(folder), "seed": seed}
