"""All texts of a split under one tokenizer, as flat arrays: the form in which alignment is vectorised."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b, sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvpipe.config import Template
from kvpipe.data.chat import carries_special, name_of, rendered, without_special
from kvpipe.data.records import Record
from kvpipe.experiment.files import save_tensors
from kvpipe.experiment.progress import track
from kvpipe.tokens.matrix import encode
from kvpipe.tokens.segments import Segmented, token_segments

SEGMENTS = 3
"""Of a turn."""
ARRAYS = ("ids", "spans", "offsets", "segments", "byte_segments", "segment_hashes")


@dataclass(frozen=True)
class Encoding:
    """Tokens of many examples, one after the other; a *row* is one token.

    `offsets[e] : offsets[e + 1]` are the rows of example `e`; `segments` are row ranges relative to the example,
    `byte_segments` byte ranges relative to its text: prompt, reasoning and answer of every turn, empty ones at the end where
    other examples have more turns.
    """

    ids: Int64[np.ndarray, "row"]
    spans: Int64[np.ndarray, "row 2"]
    offsets: Int64[np.ndarray, "example_plus_one"]
    segments: Int64[np.ndarray, "example segment 2"]
    byte_segments: Int64[np.ndarray, "example segment 2"]
    segment_hashes: Int64[np.ndarray, "example segment"]
    texts: tuple[Segmented, ...] = ()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int64[np.ndarray, "example"]:
        """Tokens per example."""
        return np.diff(self.offsets)

    def taken(self, examples: Int64[np.ndarray, "some"]) -> Encoding:
        """Some examples, in this order."""
        rows = concatenated_ranges(self.offsets[examples], self.offsets[examples + 1])
        return Encoding(
            ids=self.ids[rows],
            spans=self.spans[rows],
            offsets=np.concatenate([[0], np.cumsum(self.lengths[examples])]),
            segments=self.segments[examples],
            byte_segments=self.byte_segments[examples],
            segment_hashes=self.segment_hashes[examples],
            texts=tuple(self.texts[i] for i in examples) if self.texts else (),
        )

    def completion(self, example: SupportsIndex) -> Bool[np.ndarray, "some_row"]:
        """Which of an example's rows are no prompt's: reasoning, answer and what ends them, in every turn."""
        place, segments = np.arange(self.lengths[example]), self.segments[example]
        inside = place >= segments[0, 1]
        for start, stop in segments[SEGMENTS::SEGMENTS]:
            inside[start:stop] = False
        return inside

    def __add__(self, other: Encoding) -> Encoding:
        """The examples of both."""
        turns = max(side.segments.shape[1] for side in (self, other)) // SEGMENTS
        sides = [
            side if side.segments.shape[1] == turns * SEGMENTS else side._of_turns(turns) for side in (self, other)
        ]
        both = {name: np.concatenate([getattr(x, name) for x in sides]) for name in ARRAYS if name != "offsets"}
        offsets = np.concatenate([self.offsets, self.offsets[-1] + other.offsets[1:]])
        return Encoding(**both, offsets=offsets, texts=self.texts + other.texts)

    def _of_turns(self, turns: int) -> Encoding:
        """With room for so many."""
        more = turns * SEGMENTS - self.segments.shape[1]
        parts, spelled = (
            np.concatenate([x, x[:, -1:, [1, 1]].repeat(more, axis=1)], axis=1)
            for x in (self.segments, self.byte_segments)
        )
        hashes = np.pad(self.segment_hashes, ((0, 0), (0, more)), constant_values=hash_bytes(b""))
        return replace(self, segments=parts, byte_segments=spelled, segment_hashes=hashes)

    def rows(self, example: SupportsIndex) -> slice:
        """The rows of one example."""
        return slice(int(self.offsets[example]), int(self.offsets[int(example) + 1]))


def encode_records(
    records: list[Record],
    tokenizer,
    template: Template,
    end: bool = False,
    max_length: int | None = None,
) -> Encoding:
    """Tokenize the whole text of every record once.

    Args:
        records: the examples, in order.
        tokenizer: a fast tokenizer.
        template: record → text; with `chat_template` by the tokenizer's own, whose special tokens have empty spans.
        end: end every text with the end-of-text token (an empty span), so that a model learns to stop; where tokenizer
            or chat template end it themselves, nothing is added.
        max_length: longest allowed example in tokens.

    Warns, once and with counts: of texts that begin with two BOS or end with two end tokens, of prompts that are no
    beginning of their text's tokens (with `end`), and of records that a chat template has written already.

    Raises:
        ValueError: an example is longer than `max_length` (names it and its length), or `end` and the tokenizer has no
            end-of-text token.
    """
    texts = [rendered(tokenizer, record, template) for record in records]
    ids = [record.id for record in records]
    encoding = encode_texts(ids, texts, tokenizer, template.chat_template, end, max_length)
    if template.chat_template:
        written = [record.id for record in records if carries_special(tokenizer, record)]
        _warn(tokenizer, written, ids, "hold special tokens, as rows do that a template has written already", CLEAR)
    return encoding


CLEAR = "take them out of the rows, or set data.template.chat_template: false"


def encode_texts(
    names: list[str],
    texts: list[Segmented],
    tokenizer,
    chat: bool = False,
    end: bool = False,
    max_length: int | None = None,
) -> Encoding:
    """The same of texts, with a name for each; `chat`: they are written by a chat template, BOS and end included."""
    if end and tokenizer.eos_token_id is None:
        raise ValueError(f"{name_of(tokenizer)} has no end-of-text token (eos_token): name one")
    ids, spans, segments, byte_segments, hashes, stripped = [], [], [], [], [], []
    doubled: dict[str, list[str]] = {"bos": [], "eos": [], "prompt": []}
    most = max(map(len, texts), default=SEGMENTS)
    for name, whole in track(list(zip(names, texts, strict=True)), "encoding", "texts"):
        tokens, text = encode(tokenizer, whole.text, add_special_tokens=not chat), whole
        these, span = tokens.ids.numpy(), tokens.spans.numpy()
        if end:
            prompt = prompt_ids(tokenizer, whole.prompt, chat).numpy()
            if not np.array_equal(these[: len(prompt)], prompt):
                doubled["prompt"].append(name)
        if chat:
            text, span = without_special(tokenizer, whole, tokens)
        if end and not _ends(tokenizer, these, span, chat):
            these = np.append(these, tokenizer.eos_token_id)
            span = np.concatenate([span, np.full((1, 2), text.boundaries[-1])])
        for key, twice in zip(("bos", "eos"), _doubled(tokenizer, these, span, text.text.encode()), strict=True):
            if twice:
                doubled[key].append(name)
        if max_length is not None and len(these) > max_length:
            raise ValueError(f"record {name!r} has {len(these)} tokens, train.max_length is {max_length}: raise it")
        ids.append(these)
        spans.append(span)
        stripped.append(text)
        room = Segmented(*text, *[""] * (most - len(text)))
        if chat and len(whole) > SEGMENTS:  # a mark has no bytes left to say on which side of an answer's end it stands
            marked = Segmented(*whole, *[""] * (most - len(whole)))
            segments.append(token_segments(tokens.spans.numpy(), marked.boundaries))
        else:
            segments.append(token_segments(span, room.boundaries))
        byte_segments.append(list(pairwise(room.boundaries)))
        hashes.append([hash_bytes(segment.encode()) for segment in room])
    take = "the row brings one and the tokenizer or kvpipe another: take it out of the rows or of data.template"
    _warn(tokenizer, doubled["bos"], names, f"begin with {tokenizer.bos_token!r} twice", take)
    _warn(tokenizer, doubled["eos"], names, f"end with {tokenizer.eos_token!r} twice", take)
    other = "have a prompt whose own tokens are no beginning of the text's: generation starts from other tokens than trained"
    _warn(tokenizer, doubled["prompt"], names, other, "end the prompt where a token ends, as after a line end")
    lengths = np.array([len(x) for x in ids], dtype=np.int64)
    return Encoding(
        ids=np.concatenate(ids).astype(np.int64),
        spans=np.concatenate(spans).astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        segments=np.array(segments, dtype=np.int64).reshape(len(texts), most, 2),
        byte_segments=np.array(byte_segments, dtype=np.int64).reshape(len(texts), most, 2),
        segment_hashes=np.array(hashes, dtype=np.int64).reshape(len(texts), most),
        texts=tuple(stripped),
    )


def encoded_ids(rows: Sequence[Tensor], spelled: Callable[[Tensor], tuple[str, Tensor]]) -> Encoding:
    """The encoding of texts that are given by their ids; each text is one segment, the answer.

    Args:
        rows: the ids of each text.
        spelled: ids → text and spans.
    """
    texts, spans = zip(*map(spelled, rows), strict=True)
    whole = [Segmented(answer=text) for text in texts]
    return Encoding(
        ids=torch.cat(list(rows)).numpy(),
        spans=torch.cat(spans).numpy(),
        offsets=np.concatenate([[0], np.cumsum([len(row) for row in rows])]),
        segments=np.array(
            [token_segments(s.numpy(), t.boundaries) for s, t in zip(spans, whole, strict=True)], dtype=np.int64
        ),
        byte_segments=np.array([list(pairwise(text.boundaries)) for text in whole], dtype=np.int64),
        segment_hashes=np.array([[hash_bytes(part.encode()) for part in text] for text in whole], dtype=np.int64),
        texts=tuple(whole),
    )


# ---------------------------------------------------------------- on disk
def save_encoding(encoding: Encoding, path: Path, made_from: dict[str, Any]) -> None:
    """Write an encoding and its texts as safetensors, with a checksum and what it was made from, as JSON."""
    text = np.frombuffer("".join(text.text for text in encoding.texts).encode(), dtype=np.uint8)
    arrays = {name: getattr(encoding, name) for name in ARRAYS} | {"text": text}
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    save_tensors(tensors, path, {"sha256": _checksum(arrays), "made_from": json.dumps(made_from)})


def load_encoding(path: Path, made_from: dict[str, Any]) -> Encoding:
    """What `save_encoding` has written.

    Raises:
        FileNotFoundError: it was not made.
        ValueError: it is damaged, or was made from something else.
    """
    fix = f"run `kvpipe encode --model {path.parent.name} --reading {path.stem.partition('-')[2]}`"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {fix} first")
    try:
        with safe_open(path, "np") as file:
            arrays = {name: file.get_tensor(name) for name in (*ARRAYS, "text")}
            known = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): {fix}") from error
    before = json.loads(known.get("made_from", "{}"))
    if other := sorted(key for key in made_from if made_from[key] != before.get(key)):
        raise ValueError(f"{path} was made from another {', '.join(other)}: {fix}")
    if known.get("sha256") != _checksum(arrays):
        raise ValueError(f"{path} is damaged, its checksum is another: {fix}")
    raw, texts, start = arrays.pop("text").tobytes(), [], 0
    for segments in arrays["byte_segments"].tolist():
        parts = [raw[start + first : start + stop].decode() for first, stop in segments]
        while len(parts) > SEGMENTS and not any(parts[-SEGMENTS:]):  # room for other examples' turns
            del parts[-SEGMENTS:]
        texts.append(Segmented(*parts))
        start += segments[-1][1]
    return Encoding(**arrays, texts=tuple(texts))


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    return sha256(b"".join(array.tobytes() for _, array in sorted(arrays.items()))).hexdigest()


def prompt_ids(tokenizer, prompt: str, chat: bool = False) -> Int64[Tensor, "time"]:
    """The tokens that generation starts from: a prompt's, without what a tokenizer adds behind a text. `chat`: the prompt
    is written by a chat template, and the tokenizer adds nothing."""
    tokens = encode(tokenizer, prompt, add_special_tokens=not chat)
    with_text = (tokens.spans[:, 1] > tokens.spans[:, 0]).nonzero()
    if len(with_text):
        return tokens.ids[: int(with_text[-1]) + 1]
    return tokens.ids[:-1] if len(tokens.ids) and int(tokens.ids[-1]) == tokenizer.eos_token_id else tokens.ids


def _ends(tokenizer, ids: np.ndarray, spans: np.ndarray, chat: bool) -> bool:
    """Whether the tokenizer, or a chat template, has ended the text already."""
    last_is_mark = len(ids) > 0 and spans[-1, 0] == spans[-1, 1]
    return bool(last_is_mark and (chat or ids[-1] == tokenizer.eos_token_id))


def _doubled(tokenizer, ids: np.ndarray, spans: np.ndarray, text: bytes) -> tuple[bool, bool]:
    """Whether the text begins with two BOS, and ends with two end tokens, white space between them or not."""
    if max((ids == tokenizer.bos_token_id).sum(), (ids == tokenizer.eos_token_id).sum()) < 2:
        return False, False  # nearly all texts
    seen = [int(t) for t, (a, b) in zip(ids, spans, strict=True) if a == b or text[a:b].strip()]
    two = len(seen) > 1
    return two and seen[0] == seen[1] == tokenizer.bos_token_id, two and seen[-1] == seen[-2] == tokenizer.eos_token_id


def _warn(tokenizer, found: list[str], of: list[str], what: str, advice: str) -> None:
    if found:
        name = name_of(tokenizer)
        warnings.warn(f"{name}: {len(found)} of {len(of)} texts ({found[0]!r} first) {what}; {advice}", stacklevel=3)


def hash_bytes(raw: bytes) -> int:
    """A 63-bit content hash that is the same in every process."""
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "big") >> 1


def concatenated_ranges(starts: Int64[np.ndarray, "n"], stops: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "total"]:
    """`start, start + 1, …, stop - 1` of every pair, one after the other."""
    lengths = stops - starts
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
