"""Tokenizers trained here, for embedded models and from-scratch students; and what a tokenizer is recognised by."""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import sha256
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kvpipe.config import TokenizerRecipe

END, PAD, BEGIN, UNKNOWN = "<|endoftext|>", "<|pad|>", "<s>", "<unk>"
_SPECIALS = [UNKNOWN, BEGIN, END, PAD]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def train_tokenizer(recipe: TokenizerRecipe, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a tokenizer of one of the three families on texts; deterministic.

    Raises:
        ValueError: the vocabulary has no room for bytes.
    """
    if recipe.kind == "byte_bpe":
        return _byte_bpe(recipe, texts)
    return _sentencepiece_like((_unigram if recipe.kind == "unigram" else _bpe)(recipe, texts), recipe)


def _byte_bpe(recipe: TokenizerRecipe, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    digits = [pre_tokenizers.Digits(individual_digits=True)] if recipe.split_digits else []
    cuts = [] if recipe.split_words else [pre_tokenizers.Split(Regex(r"\s?\d+"), "merged_with_next")]
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=recipe.split_words)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, *cuts, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def _sentencepiece_like(model: Any, recipe: TokenizerRecipe) -> PreTrainedTokenizerFast:
    """▁ for spaces, newlines as pieces of their own, bytes as <0xNN>, <s> in front: the Llama-2 family's habits."""
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(_SPECIALS)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    digits = [pre_tokenizers.Digits(individual_digits=True)] if recipe.split_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("\n"), "isolated"), *digits, pre_tokenizers.Split("▁", "merged_with_next")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, unk_token=UNKNOWN
    )


def _learned(model: Any, trainer: Any, recipe: TokenizerRecipe, texts: Iterable[str]) -> dict[str, Any]:
    """The model that a trainer makes of texts whose spaces are ▁, as in tokenizer.json."""
    learner = Tokenizer(model)
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "removed"),
            pre_tokenizers.Digits(individual_digits=recipe.split_digits),
            pre_tokenizers.Split("▁", "merged_with_next"),
        ]
    )
    learner.train_from_iterator((text.replace(" ", "▁") for text in texts), trainer)
    return json.loads(learner.to_str())["model"]


def _unigram(recipe: TokenizerRecipe, texts: Iterable[str]) -> Any:
    room = recipe.vocab_size - len(_SPECIALS) - len(_BYTES)
    if room < 1:
        raise ValueError(f"tokenizer.vocab_size {recipe.vocab_size}: unigram with byte fallback needs more than 260")
    trainer = trainers.UnigramTrainer(vocab_size=room, show_progress=False, unk_token=UNKNOWN, special_tokens=[UNKNOWN])
    learned = _learned(models.Unigram(), trainer, recipe, texts)["vocab"]
    # pieces of one score come in the order of a hash map, which differs from run to run
    pieces = sorted(((p, round(s, 9)) for p, s in learned if p != UNKNOWN), key=lambda piece: (-piece[1], piece[0]))
    # byte pieces and specials carry no score of their own: they are reached by fallback or by name only
    vocab = [(token, 0.0) for token in [*_SPECIALS, *_BYTES]] + pieces[:room]
    return models.Unigram(vocab, unk_id=0, byte_fallback=True)


def _bpe(recipe: TokenizerRecipe, texts: Iterable[str]) -> Any:
    size = recipe.vocab_size - len(_BYTES)
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=_SPECIALS, show_progress=False)
    learned = _learned(models.BPE(unk_token=UNKNOWN), trainer, recipe, texts)
    # bytes are pieces and not special tokens: those would be matched in a text, and be left out when it is decoded
    pieces = [p for p in sorted(learned["vocab"], key=learned["vocab"].__getitem__) if p not in _SPECIALS]
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*_SPECIALS, *_BYTES, *pieces]))}
    merges = [tuple(merge) for merge in learned["merges"]]
    return models.BPE(vocab=vocab, merges=merges, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True)


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
