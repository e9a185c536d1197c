"""Continuations of many prompts, side by side with a KV cache, greedy or drawn; a row ends at the end of text or a stop
string."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, StoppingCriteriaList, TopPLogitsWarper

from kvpipe.align.regime import by_own_length, switch_lengths
from kvpipe.config import ScoringConfig, TeacherTextConfig
from kvpipe.data.chat import end_of_turn
from kvpipe.data.encoding import prompt_ids
from kvpipe.experiment.progress import track
from kvpipe.models.folders import load_model, load_tokenizer

MARGIN = 8
"""Tokens looked at beside the bytes of the longest stop string: some spell a part of a character, or nothing."""


@dataclass(frozen=True)
class Sampling:
    """How texts are drawn; with `seeds`, one for each prompt."""

    temperature: float
    top_p: float
    seeds: Sequence[int]


def generate(
    model, tokenizer, prompts: list[str], config: ScoringConfig, batch_size: int, chat: bool = False
) -> list[str]:
    """Greedy continuations, in the order of the prompts; see `continuations`."""
    found = dict(continuations(model, tokenizer, prompts, config, batch_size, chat))
    return [found[i] for i in range(len(prompts))]


@torch.no_grad()
def continuations(
    model,
    tokenizer,
    prompts: Sequence[str],
    config: ScoringConfig,
    batch_size: int,
    chat: bool = False,
    sampling: Sampling | None = None,
    batch_tokens: int | None = None,
) -> Iterator[tuple[int, str]]:
    """(prompt's number, text) as batches end: by length with left padding, cut at the end of text or the first stop string.

    The model's own generation settings (sampling, repetition penalty …) are not used, its end-of-text tokens are.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        prompts: what is continued.
        config: most tokens, and stop strings.
        batch_size: most prompts side by side.
        chat: the prompts are written by the tokenizer's chat template, whose end of turn ends the text too.
        sampling: greedy without.
        batch_tokens: most tokens side by side, those that may follow counted.

    Raises:
        ValueError: a prompt and what may follow are longer than the model can read; shows the prompt.
    """
    device = next(model.parameters()).device
    ends = end_tokens(model, tokenizer)
    if chat and (turn := end_of_turn(tokenizer)) is not None:
        ends = sorted({*(ends or ()), turn})
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    encoded = [prompt_ids(tokenizer, prompt, chat) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        check_length(model, ids, config.max_new_tokens, f"{prompt[:80]!r}…")
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    costs = [len(ids) + config.max_new_tokens for ids in encoded]
    # keys in a cache keep their rotation: a text that outgrows the frequencies it began with is read anew every step
    switches = switch_lengths(by_own_length(model).config)
    outgrows = [any(len(ids) <= n < len(ids) + config.max_new_tokens for n in switches) for ids in encoded]
    batches = [
        (members, not anew)
        for anew in (False, True)
        for members in batched([i for i in order if outgrows[i] == anew], costs, batch_size, batch_tokens)
    ]
    with _plain_generation(model):
        for members, cached in track(batches, "generating", "answers", lambda batch: len(batch[0])):
            longest = max(len(encoded[i]) for i in members)
            ids = torch.full((len(members), longest), pad)
            mask = torch.zeros(len(members), longest, dtype=torch.long)
            for row, i in enumerate(members):
                ids[row, longest - len(encoded[i]) :] = encoded[i]
                mask[row, longest - len(encoded[i]) :] = 1
            stops = [Stops(tokenizer, config.stop, longest)] if config.stop else []
            drawn = [Drawn(sampling, members, config.max_new_tokens, longest)] if sampling else []
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=config.max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=pad,
                eos_token_id=ends,
                stopping_criteria=StoppingCriteriaList(stops),
                logits_processor=drawn,
                use_cache=cached,
            )
            for i, row in zip(members, out[:, longest:], strict=True):
                yield i, cut(decode(tokenizer, row), config.stop)


def batched(order: Sequence[int], costs: Sequence[int], most: int, tokens: int | None) -> Iterator[list[int]]:
    """Consecutive parts of an order of rising costs: at most so many members, that cost together, padded, at most `tokens`;
    one that costs more is alone."""
    members: list[int] = []
    for i in order:
        if members and (len(members) == most or (tokens is not None and costs[i] * (len(members) + 1) > tokens)):
            yield members
            members = []
        members.append(i)
    if members:
        yield members


class Drawn(LogitsProcessor):
    """Each row's next token by a number of its own generator: a text is the same whatever is beside it in a batch."""

    def __init__(self, sampling: Sampling, members: Sequence[int], new: int, first: int):
        self.sampling, self.first = sampling, first
        self.nucleus = TopPLogitsWarper(sampling.top_p)
        self.numbers = torch.from_numpy(
            np.stack([np.random.default_rng(sampling.seeds[i]).random(new) for i in members])
        )

    def __call__(
        self, input_ids: Int64[Tensor, "batch time"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """Scores that leave one token to each row: that at its number of the cumulative distribution."""
        kept = self.nucleus(input_ids, scores.float() / self.sampling.temperature)
        below = kept.double().softmax(-1).cumsum(-1)
        number = self.numbers[:, input_ids.shape[1] - self.first, None].to(below.device) * below[:, -1:]
        chosen = torch.searchsorted(below, number, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


@runtime_checkable
class Engine(Protocol):
    """Who writes the teachers' texts; `kvpipe.config.kinds.ENGINES` has one by name. An extension adds its own there."""

    def __init__(self, folder: Path, config: TeacherTextConfig, device: str, trust: bool): ...

    def write(
        self, prompts: Sequence[str], scoring: ScoringConfig, chat: bool, seeds: Sequence[int]
    ) -> Iterator[tuple[int, str]]:
        """(prompt's number, text) in any order, as they are done. A text follows from its prompt and its seed alone.

        Args:
            prompts: what is continued.
            scoring: most tokens, and stop strings.
            chat: the prompts are written by the teacher's chat template, special tokens spelled out.
            seeds: of each prompt.
        """
        ...


class Transformers:
    """The teacher in this process, batched by tokens."""

    def __init__(self, folder: Path, config: TeacherTextConfig, device: str, trust: bool):
        self.config = config
        self.model, self.tokenizer = load_model(folder, device=device, trust=trust), load_tokenizer(folder, trust)

    def write(
        self, prompts: Sequence[str], scoring: ScoringConfig, chat: bool, seeds: Sequence[int]
    ) -> Iterator[tuple[int, str]]:
        """As batches end."""
        drawn, room = Sampling(self.config.temperature, self.config.top_p, seeds), self.config.batch_tokens
        return continuations(self.model, self.tokenizer, prompts, scoring, room, chat, drawn, room)


class Stops(StoppingCriteria):
    """Ends a row once its text holds a stop string, however the tokens spell it."""

    def __init__(self, tokenizer, stop: Sequence[str], prompt_length: int):
        self.tokenizer, self.stop, self.first = tokenizer, stop, prompt_length
        self.reach = max(len(string.encode()) for string in stop) + MARGIN

    def __call__(self, input_ids: Int64[Tensor, "batch time"], scores, **_) -> Bool[Tensor, "batch"]:
        """True for the rows that end here."""
        tails = input_ids[:, max(self.first, input_ids.shape[1] - self.reach) :]
        # the end of a text alone may be spelled otherwise than in the whole: the whole decides
        done = [
            self._in(tail) and (tails.shape[1] < self.reach or self._in(row[self.first :]))
            for tail, row in zip(tails, input_ids, strict=True)
        ]
        return torch.tensor(done, device=input_ids.device)

    def _in(self, ids: Tensor) -> bool:
        text = decode(self.tokenizer, ids)
        return any(string in text for string in self.stop)


def decode(tokenizer, ids: Tensor) -> str:
    """The text of generated tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def cut(text: str, stop: list[str]) -> str:
    """The text up to and including the first stop string."""
    ends = [text.index(string) + len(string) for string in stop if string in text]
    return text[: min(ends)] if ends else text


def end_tokens(model, tokenizer) -> list[int] | None:
    """Every token that ends a text: the tokenizer's, and those of the model's generation settings (chat models have more)."""
    own = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    if wrong := [token for token in found if not isinstance(token, int)]:
        raise ValueError(
            f"{model.name_or_path}: generation_config.json: eos_token_id is {wrong[0]!r}, expected the number of a token, or a "
            "list of them"
        )
    return sorted(found) or None


def context_length(model) -> int | None:
    """Tokens that the model can read, by its configuration; None where that says nothing."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_length(model, ids: Int64[Tensor, "time"], new: int, what: str) -> None:
    """Refuse a prompt that leaves no room for `new` tokens; `what` names it.

    Raises:
        ValueError: they are more than the model reads.
    """
    limit = context_length(model)
    if limit is not None and len(ids) + new > limit:
        raise ValueError(
            f"a prompt of {len(ids)} tokens and max_new_tokens {new} exceed the {limit} tokens that the model reads: "
            f"{what}; lower max_new_tokens or shorten the record"
        )


@contextmanager
def _plain_generation(model) -> Iterator[None]:
    """The model without its own generation settings: transformers fills in from them what a call leaves open."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
