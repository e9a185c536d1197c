"""One tokenizer of every fast-tokenizer family, trained on the spot: `build(name)` for `name` in `FAMILIES`.

Each builder copies the pipeline (normaliser, pre-tokenizer, model, template, decoder) of a released tokenizer;
only the vocabulary is tiny. Used by the token tests and by the compatibility table.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The cat sat on the mat, and 12 cats ate 345 fish. Don't you think it's 1,000?",
    "def add(x, y):\n    return x + y  # sum\n\nprint(add(1, 22))\r\n",
    "Maria has 17 apples; she gives 5 to Tom. How many are left? 17 - 5 = 12.\n#### 12",
    "Zażółć gęślą jaźń. Où est la bibliothèque ? Straße, naïve café, ångström.",
    "日本語のトークン化は難しい。我们使用模型。 한국어 문장입니다.",
    "مرحبا بالعالم، كيف حالك؟ שלום עולם. Привет, мир! Γειά σου.",
    "😀 👍🏽 👩‍👩‍👧 🇩🇪 — “quotes” … ½ ﬁ ① ㍿",
] * 3

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")


def _train_bpe(tokenizer: Tokenizer, special: list[str], vocab: int = 700, alphabet: list[str] | None = None) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in special],
        initial_alphabet=alphabet or [],
        limit_alphabet=160 if alphabet is None else 1000,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)


def _byte_level(special: list[str], pre: object, normalizer: object = None, **model: object) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    _train_bpe(tokenizer, special, alphabet=pre_tokenizers.ByteLevel.alphabet())
    return tokenizer


def _template(tokenizer: Tokenizer, single: str, *special: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, special_tokens=[(s, tokenizer.token_to_id(s)) for s in special])


def gpt2() -> Tokenizer:
    tokenizer = _byte_level(["<|endoftext|>"], pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def roberta() -> Tokenizer:
    """Prefix space, trimmed offsets, BOS and EOS, a mask token that swallows the space before it."""
    tokenizer = _byte_level(["<s>", "</s>"], pre_tokenizers.ByteLevel(add_prefix_space=True))
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True, normalized=False)])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), add_prefix_space=True)
    return tokenizer


def llama3() -> Tokenizer:
    pre = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = _byte_level(["<|begin_of_text|>", "<|eot_id|>"], pre, ignore_merges=True)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            _template(tokenizer, "<|begin_of_text|> $A", "<|begin_of_text|>"),
        ]
    )
    return tokenizer


def qwen2() -> Tokenizer:
    """NFC, every digit alone, chat markers as added tokens, no BOS."""
    pre = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre, normalizers.NFC())
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def deepseek() -> Tokenizer:
    """Digit, punctuation and script splits one after another; special tokens outside ASCII."""
    pre = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[\r\n]"), "isolated"),
            pre_tokenizers.Split(Regex("\\s?\\p{L}+"), "isolated"),
            pre_tokenizers.Split(Regex("[一-龥ࠀ-一가-퟿]+"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bos = "<｜begin▁of▁sentence｜>"
    tokenizer = _byte_level([bos], pre)
    tokenizer.post_processor = _template(tokenizer, f"{bos} $A", bos)
    return tokenizer


def byte_level_unsplit() -> Tokenizer:
    """No pre-splitting (SuperBPE type): tokens run over spaces and line ends; offsets trimmed."""
    tokenizer = _byte_level(["</s>"], pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), _template(tokenizer, "$A </s>", "</s>")]
    )
    return tokenizer


def byte_level_nfkc() -> Tokenizer:
    return _byte_level(["</s>"], pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFKC())


def byte_level_normalizer() -> Tokenizer:
    """The byte alphabet applied by the normaliser instead of the pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    _train_bpe(tokenizer, ["</s>"], alphabet=pre_tokenizers.ByteLevel.alphabet())
    return tokenizer


def byte_level_prefixed_digits() -> Tokenizer:
    """A prefix space before every piece of a split text, so inside words too."""
    pre = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=True)])
    return _byte_level(["</s>"], pre)


def clip() -> Tokenizer:
    """NFC, runs of whitespace collapsed, lower-cased; words end in `</w>`, whitespace removed."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    collapse = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), collapse, normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"'s|'t|'re|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


BYTES = [f"<0x{b:02X}>" for b in range(256)]


def _sentencepiece_bpe(special: list[str], normalizer: object = None, pre: object = None) -> Tokenizer:
    """BPE with byte fallback over `▁` text."""
    draft = Tokenizer(models.BPE(unk_token="<unk>"))
    draft.normalizer, draft.pre_tokenizer = normalizer, pre
    _train_bpe(draft, ["<unk>", *special], vocab=500)

    state = json.loads(draft.to_str())["model"]
    vocab = dict(state["vocab"])
    for token in BYTES:
        vocab.setdefault(token, len(vocab))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in ["<unk>", *special]])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def llama2() -> Tokenizer:
    """Legacy form: the normaliser prepends `▁` to every stretch of text between added tokens."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = _sentencepiece_bpe(["<s>", "</s>"], normalizer)
    tokenizer.post_processor = _template(tokenizer, "<s> $A", "<s>")
    return tokenizer


def llama2_metaspace(scheme: str = "first") -> Tokenizer:
    pre = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    tokenizer = _sentencepiece_bpe(["<s>", "</s>"], pre=pre)
    tokenizer.post_processor = _template(tokenizer, "<s> $A </s>", "<s>", "</s>")
    return tokenizer


def gemma() -> Tokenizer:
    """Spaces replaced, none prepended, runs of spaces kept."""
    tokenizer = _sentencepiece_bpe(
        ["<bos>", "<start_of_turn>", "<end_of_turn>"],
        normalizers.Replace(" ", "▁"),
        pre_tokenizers.Split(" ", "merged_with_previous"),
    )
    tokenizer.post_processor = _template(tokenizer, "<bos> $A", "<bos>")
    return tokenizer


def gemma3() -> Tokenizer:
    """Runs of spaces, line ends and tabs are pieces of the model and added tokens too, spelled `▁▁`, `\\n\\n`."""
    normalizer, pre = normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer = _sentencepiece_bpe(["<bos>"], normalizer, pre)
    model = json.loads(tokenizer.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    runs = [character * length for character in "▁\n\t" for length in range(2, 9)]
    for run in [*"▁\n\t", *runs]:
        vocab.setdefault(run, len(vocab))
    # before all others and the longest first, so that a run ends as one piece
    merges = [(run[1:], run[0]) for run in reversed(runs)] + merges
    tokenizer.model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    plain = [AddedToken(run, special=False, normalized=False) for run in [*runs, "<table>", "[multimodal]"]]
    tokenizer.add_tokens(plain)
    tokenizer.add_tokens([AddedToken(content, normalized=True) for content in ("▁⇥", "  ⇥⇥")])
    tokenizer.add_tokens([AddedToken("▁literal", normalized=False)])
    tokenizer.post_processor = _template(tokenizer, "<bos> $A", "<bos>")
    return tokenizer


@cache
def _charsmap(rule: str) -> bytes:
    """SentencePiece's compiled normalisation table, read out of a model trained by sentencepiece itself."""
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=stream,
        vocab_size=400,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name=rule,
        minloglevel=2,
    )
    normalizer_spec = _protobuf_field(stream.getvalue(), 3)
    return _protobuf_field(normalizer_spec, 2)


def _protobuf_field(message: bytes, wanted: int) -> bytes:
    """First length-delimited field `wanted` of a protobuf message (wire types 0, 1, 2 and 5)."""

    def varint(i: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = message[i]
            value |= (byte & 0x7F) << shift
            i, shift = i + 1, shift + 7
            if byte < 0x80:
                return value, i

    i = 0
    while i < len(message):
        key, i = varint(i)
        field, wire = key >> 3, key & 7
        if wire == 2:
            length, i = varint(i)
            if field == wanted:
                return message[i : i + length]
            i += length
        elif wire == 0:
            _, i = varint(i)
        else:
            i += {1: 8, 5: 4}[wire]
    raise KeyError(f"field {wanted} is not in the message")


def _unigram(normalizer: object, pre: object, special: list[str], byte_fallback: bool = False) -> Tokenizer:
    draft = Tokenizer(models.Unigram())
    draft.normalizer, draft.pre_tokenizer = normalizer, pre
    trainer = trainers.UnigramTrainer(
        vocab_size=250, special_tokens=[*special, "<unk>"], unk_token="<unk>", show_progress=False
    )
    draft.train_from_iterator(CORPUS, trainer)

    state = json.loads(draft.to_str())["model"]
    vocab = [
        (piece, score) for piece, score in state["vocab"] if byte_fallback is False or piece.isascii() or "▁" in piece
    ]
    if byte_fallback:
        vocab += [(b, -20.0) for b in BYTES]
    unk = next(i for i, (piece, _) in enumerate(vocab) if piece == "<unk>")
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=unk, byte_fallback=byte_fallback))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in [*special, "<unk>"]])
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def t5() -> Tokenizer:
    """nmt_nfkc table, whitespace collapsed, `▁` before every word, EOS only."""
    tokenizer = _unigram(
        normalizers.Precompiled(_charsmap("nmt_nfkc")),
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]),
        ["<pad>", "</s>"],
    )
    tokenizer.post_processor = _template(tokenizer, "$A </s>", "</s>")
    return tokenizer


def xlm_roberta() -> Tokenizer:
    """nmt_nfkc table, runs of spaces replaced by one, BOS and EOS."""
    tokenizer = _unigram(
        normalizers.Sequence(
            [normalizers.Precompiled(_charsmap("nmt_nfkc")), normalizers.Replace(Regex(" {2,}"), " ")]
        ),
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        ["<s>", "</s>"],
    )
    tokenizer.post_processor = _template(tokenizer, "<s> $A </s>", "<s>", "</s>")
    return tokenizer


def albert() -> Tokenizer:
    """Quotes replaced, NFKD, accents stripped, lower-cased, outer whitespace stripped."""
    tokenizer = _unigram(
        normalizers.Sequence(
            [
                normalizers.Replace("``", '"'),
                normalizers.Replace("''", '"'),
                normalizers.NFKD(),
                normalizers.StripAccents(),
                normalizers.Lowercase(),
                normalizers.Strip(),
                normalizers.Replace(Regex(" {2,}"), " "),
            ]
        ),
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        ["[CLS]", "[SEP]"],
    )
    tokenizer.post_processor = _template(tokenizer, "[CLS] $A [SEP]", "[CLS]", "[SEP]")
    return tokenizer


def unigram_bytes() -> Tokenizer:
    """Unigram with byte fallback, whitespace kept (identity normalisation)."""
    return _unigram(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=True), ["<s>"], byte_fallback=True)


def _wordpiece(normalizer: object, pre: object) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = _template(tokenizer, "[CLS] $A [SEP]", "[CLS]", "[SEP]")
    return tokenizer


def bert_uncased() -> Tokenizer:
    return _wordpiece(normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer())


def bert_cased() -> Tokenizer:
    return _wordpiece(
        normalizers.BertNormalizer(lowercase=False, strip_accents=False), pre_tokenizers.BertPreTokenizer()
    )


def wordpiece_accents() -> Tokenizer:
    """NFD, accents stripped, lower-cased one after another; words and punctuation by `Whitespace`."""
    normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()])
    return _wordpiece(normalizer, pre_tokenizers.Whitespace())


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False))
    return tokenizer


@dataclass(frozen=True)
class Family:
    """A builder and what its pipeline does to a text."""

    build: Callable[[], Tokenizer]
    kind: str
    exact: bool
    """Tokens spell every text byte for byte (after the inverse of the `▁`/byte alphabet)."""


FAMILIES = {
    "gpt2": Family(gpt2, "ByteLevel BPE", True),
    "roberta": Family(roberta, "ByteLevel BPE, prefix space, trimmed", True),
    "llama3": Family(llama3, "ByteLevel BPE, 3-digit groups, BOS", True),
    "deepseek": Family(deepseek, "ByteLevel BPE, script splits", True),
    "byte_level_unsplit": Family(byte_level_unsplit, "ByteLevel BPE, no splits, trimmed", True),
    "byte_level_normalizer": Family(byte_level_normalizer, "ByteLevel as normaliser", True),
    "byte_level_prefixed_digits": Family(byte_level_prefixed_digits, "ByteLevel BPE, prefix space everywhere", True),
    "clip": Family(clip, "ByteLevel BPE, end-of-word suffix, lossy", False),
    "qwen2": Family(qwen2, "ByteLevel BPE, NFC, single digits", False),
    "byte_level_nfkc": Family(byte_level_nfkc, "ByteLevel BPE, NFKC", False),
    "llama2": Family(llama2, "SentencePiece BPE, byte fallback, prepend", True),
    "llama2_first": Family(llama2_metaspace, "Metaspace first, byte fallback", True),
    "llama2_always": Family(lambda: llama2_metaspace("always"), "Metaspace always, byte fallback", True),
    "llama2_never": Family(lambda: llama2_metaspace("never"), "Metaspace never, byte fallback", True),
    "gemma": Family(gemma, "SentencePiece BPE, byte fallback, no prefix", True),
    "gemma3": Family(gemma3, "SentencePiece BPE, runs of spaces added", True),
    "unigram_bytes": Family(unigram_bytes, "Unigram, byte fallback", True),
    "t5": Family(t5, "Unigram, nmt_nfkc, whitespace collapsed", False),
    "xlm_roberta": Family(xlm_roberta, "Unigram, nmt_nfkc, spaces collapsed", False),
    "albert": Family(albert, "Unigram, NFKD, lower-cased, stripped", False),
    "bert_uncased": Family(bert_uncased, "WordPiece, lower-cased, accents stripped", False),
    "bert_cased": Family(bert_cased, "WordPiece, cased", False),
    "wordpiece_accents": Family(wordpiece_accents, "WordPiece, NFD, accents stripped", False),
    "word_level": Family(word_level, "WordLevel", False),
}


@cache
def build(name: str) -> PreTrainedTokenizerFast:
    """The family's tokenizer as transformers gives it to a user."""
    return PreTrainedTokenizerFast(tokenizer_object=FAMILIES[name].build(), name_or_path=name)
