"""On-policy distillation (GKD, arXiv:2306.13649): at intervals the student writes what its live teachers then read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64

from kvpipe.align.timemap import build_time_map
from kvpipe.cache.teacher import AlignedTeacher, LiveRows
from kvpipe.config import Arm, OnPolicyConfig, ScoringConfig
from kvpipe.data.encoding import Encoding, encode_texts
from kvpipe.distill.objective import TopLogits
from kvpipe.evaluate.generate import Sampling, continuations
from kvpipe.tokens.segments import Segmented
from kvpipe.tokens.vocabulary import same_tokens


@dataclass(frozen=True)
class Reader:
    """A model that reads what the student has written."""

    name: str
    tokenizer: Any
    prompts: Sequence[str]
    """Of every training example, as this model reads it."""
    model: Any = None
    """A teacher's; the student's is handed over when it writes."""
    layers: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()

    def encoding(self, texts: dict[int, str], chat: bool) -> Encoding:
        """The prompts with completions behind them, as its tokens."""
        whole = [Segmented(self.prompts[example], "", text) for example, text in texts.items()]
        return encode_texts([str(example) for example in texts], whole, self.tokenizer, chat)


@dataclass
class OnPolicy:
    """The texts of the current interval, and the teachers that have them before them.

    All follows from the seed, the step and the student's weights: a text is drawn by a seed of its own, whatever is beside
    it in a batch.
    """

    arm: Arm
    student: Reader
    teachers: Sequence[Reader]
    chat: bool
    """Prompts are written by chat templates."""
    top: int
    """Next-token candidates that are kept of each teacher."""
    batch_size: int
    """Texts that are written, and read by a teacher, side by side."""
    seed: int
    texts: dict[int, str] = field(default_factory=dict)
    """Training example → what the student has written for its prompt."""

    @property
    def settings(self) -> OnPolicyConfig:
        """The arm's."""
        assert self.arm.on_policy is not None
        return self.arm.on_policy

    def due(self, step: int) -> bool:
        """Whether the student writes before this step."""
        return step % self.settings.every == 0

    def chosen(self, step: int, examples: Int64[np.ndarray, "batch"]) -> Bool[np.ndarray, "batch"]:
        """Which examples of a step's whole batch have the student's text in the place of their own."""
        count = max(1, round(self.settings.share * len(examples)))
        found = np.zeros(len(examples), dtype=bool)
        found[np.random.default_rng([self.seed, step]).permutation(len(examples))[:count]] = True
        return found

    def asked(self, step: int, batches: Sequence[np.ndarray]) -> list[int]:
        """Examples whose texts the interval from this step on needs."""
        following = range(step, min(step + self.settings.every, len(batches)))
        return sorted({int(e) for s in following for e in batches[s][self.chosen(s, batches[s])]})

    def write(self, model: Any, step: int, examples: Sequence[int]) -> dict[int, str]:
        """What the student says to some training prompts, drawn at temperature 1.

        Raises:
            ValueError: a prompt and `max_new_tokens` are longer than the student reads.
        """
        prompts = [self.student.prompts[example] for example in examples]
        scoring = ScoringConfig(max_new_tokens=self.settings.max_new_tokens)
        seeds = [int(np.random.SeedSequence([self.seed, step, e]).generate_state(1)[0]) for e in examples]
        drawn, tokenizer = Sampling(1.0, 1.0, seeds), self.student.tokenizer
        training = model.training
        found = dict(continuations(model.eval(), tokenizer, prompts, scoring, self.batch_size, self.chat, drawn))
        model.train(training)
        return {example: found[number] for number, example in enumerate(examples)}

    def take(self, texts: dict[int, str]) -> None:
        """Lay the texts of an interval before the teachers, each as its own tokens aligned with the student's."""
        self.texts, self._place = texts, {example: number for number, example in enumerate(texts)}
        self.encoding = self.student.encoding(texts, self.chat)
        self.aligned: list[AlignedTeacher] = []
        self.candidates: list[TopLogits] = []
        for teacher in self.teachers:
            src, pad_id = teacher.encoding(texts, self.chat), teacher.tokenizer.pad_token_id
            rows = LiveRows(teacher.model, src, teacher.layers, pad_id, self.batch_size, teacher.hidden)
            time = build_time_map(self.arm.time, src, self.encoding)
            self.aligned.append(AlignedTeacher(teacher.name, rows, src, self.encoding, time))
            if "top_logits" in self.arm.needs:
                same = torch.from_numpy(same_tokens(teacher.tokenizer, self.student.tokenizer))
                self.candidates.append(
                    TopLogits.live(teacher.model, src, self.encoding, same, self.top, self.batch_size, pad_id)
                )

    def places(self, examples: Int64[np.ndarray, "some"]) -> Int64[np.ndarray, "some"]:
        """Their numbers among the texts of the interval."""
        return np.array([self._place[int(example)] for example in examples], dtype=np.int64)
