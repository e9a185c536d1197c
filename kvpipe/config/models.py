"""Sections of the configuration: teachers and the student."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kvpipe.config.section import NUMBER, Count, Flag, Fraction, Name, Natural, Positive, Section, Seed


class TokenizerRecipe(Section):
    """A tokenizer trained on the recipe's own corpus."""

    kind: Literal["byte_bpe", "unigram", "metaspace_bpe"] = "byte_bpe"
    """`byte_bpe`: ByteLevel BPE (GPT-2, Qwen, Llama-3); `unigram` and `metaspace_bpe`: SentencePiece style with byte
    fallback."""
    vocab_size: Annotated[int, Field(ge=260), NUMBER] = 384
    """Size of the vocabulary, special tokens included."""
    split_digits: Flag = True
    """Every digit a token of its own."""
    split_words: Flag = True
    """`byte_bpe`: words, numbers and punctuation are cut apart before pieces are merged. Off, texts are cut before numbers
    alone: one token may hold a number, the operator after it and the next words."""


class Recipe(Section):
    """How an embedded model is made: architecture, tokenizer and training from scratch."""

    architecture: dict[str, Any]
    """Fields of the transformers config class, `model_type` among them."""
    tokenizer: TokenizerRecipe = TokenizerRecipe()
    """The model's own tokenizer."""
    mixture: dict[Name, Fraction] = Field(default={})
    """Task → share of the pretraining examples; empty means all tasks of `data` alike."""
    examples: Count = 20000
    """Pretraining examples, disjoint from validation and test."""
    results: Literal["true", "random", "math", "code"] = "true"
    """Which computed numbers of the examples are true: all, none, or those of the steps in words (`math`) or in a program
    (`code`). The others are drawn anew: a model that knows the language of the tasks, and of their arithmetic a part."""
    own_text: Fraction = 0.5
    """Share of the examples written with the teacher's longer reasoning."""
    steps: Count = 1500
    """Optimizer steps."""
    batch_size: Count = 64
    """Examples per step."""
    learning_rate: Positive = 3e-3
    """Peak learning rate of AdamW under a cosine schedule."""
    seed: Seed = 0
    """Seed of initialisation and data order."""


class Loading(Section):
    """How a teacher is held in memory. Recorded in the model's manifest, since its numbers depend on it."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the weights and of the computation."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """Linear layers in 8 or 4 bit by bitsandbytes, which must be installed."""
    sharded: Flag = False
    """Spread the layers over all visible devices (accelerate's device map): for a model too big for one."""


class LocalModel(Section):
    """A Hugging Face folder on disk."""

    source: Literal["local"] = "local"
    """Read from disk."""
    path: str
    """Folder with config.json, safetensors and tokenizer files."""
    recipe: Recipe | None = None
    """How the folder was made, where kvpipe made it: `make teachers` and `source: pretrain` follow it."""
    load: Loading = Loading()
    """How a teacher is held in memory; the student always trains from fp32 weights (`train.precision`)."""


class PretrainModel(Section):
    """A model trained inside the DAG by its recipe."""

    source: Literal["pretrain"] = "pretrain"
    """Trained by its recipe, inside the DAG."""
    recipe: Recipe
    """Architecture, tokenizer and training."""
    path: str | None = None
    """Where `make teachers` writes the shipped copy; not read with this source."""


class HubModel(Section):
    """A repository on the Hugging Face hub."""

    source: Literal["hub"] = "hub"
    """Downloaded."""
    repo: str
    """`owner/name`."""
    revision: str = "main"
    """Branch, tag or commit. `kvpipe lock` resolves it once; the model is that commit until it is locked again."""
    trust_remote_code: Flag = False
    """Run code shipped in the repository. Off unless you have read it."""
    load: Loading = Loading()
    """How a teacher is held in memory; the student always trains from fp32 weights (`train.precision`)."""

    @property
    def pin(self) -> str:
        """Key of the model in the lock."""
        return f"{self.repo}@{self.revision}"


class LockedFile(Section):
    """One file of a locked repository."""

    size: Natural
    """Bytes."""
    digest: Annotated[str, Field(pattern=r"^(sha256|git):[0-9a-f]+$")]
    """What the hub knows of the content: `sha256:…` for large files, `git:…` (a blob's SHA-1) for small ones."""


class LockedRepo(Section):
    """A hub repository at one commit, as `kvpipe lock` found it."""

    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    """Commit that the revision stood for."""
    license: str | None = None
    """Licence that the repository's card names; carried over to the students' cards."""
    files: dict[str, LockedFile]
    """The files that are downloaded: weights in safetensors, configuration, tokenizer."""


class ScratchModel(Section):
    """A student with random weights, drawn anew by every seed."""

    source: Literal["scratch"] = "scratch"
    """Random weights, drawn anew by every seed."""
    architecture: dict[str, Any]
    """Fields of the transformers config class, `model_type` among them."""
    tokenizer: TokenizerRecipe = TokenizerRecipe()
    """Trained on the training split."""


class RandomModel(Section):
    """The architecture and tokenizer of another model with random weights (a null teacher)."""

    source: Literal["random"] = "random"
    """Random weights in another model's architecture."""
    like: Name
    """Name of the model to copy."""
    seed: Seed = 0
    """Seed of the weights."""


class PrunedModel(Section):
    """Some layers, heads and channels of another model, in their order: a student that its whole model heals."""

    source: Literal["pruned"] = "pruned"
    """A part of another model."""
    of: Name
    """Name of the whole model."""
    layers: Annotated[list[Natural], Field(min_length=1)] | None = None
    """Layers that are kept, counted from 0 and rising."""
    keep: Count | None = None
    """Or how many are kept, chosen `by`."""
    by: Literal["greedy", "even"] = "greedy"
    """`even`: at even distances, first and last among them; `greedy`: one after the other the layer goes whose removal
    costs the least loss on training texts."""
    heads: Count | None = None
    """KV heads that every layer keeps, with the query heads that read them: those with the largest outputs on training
    texts; none keeps all."""
    channels: Count | None = None
    """Channels that every layer's MLP keeps: those with the largest activations on training texts; none keeps all."""
    examples: Count = 16
    """Training examples that `greedy` measures the loss on, and heads and channels are chosen by."""

    @model_validator(mode="after")
    def _one_way(self):
        depth, width = [self.layers, self.keep].count(None), [self.heads, self.channels].count(None)
        if depth == 0 or (depth == 2 and width == 2):
            raise ValueError("give either layers, or keep (how many are kept); or heads or channels")
        if self.layers is not None and self.layers != sorted(set(self.layers)):
            raise ValueError(f"layers: {self.layers} do not rise; name each once, in the order of the model")
        return self

    @property
    def reads_texts(self) -> bool:
        """Whether what is kept is chosen on training texts."""
        return (self.keep is not None and self.by == "greedy") or self.heads is not None or self.channels is not None


Model = Annotated[
    LocalModel | PretrainModel | HubModel | ScratchModel | RandomModel | PrunedModel, Field(discriminator="source")
]
