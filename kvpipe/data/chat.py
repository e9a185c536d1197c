"""Records as conversations, by a model's own chat template: what it writes, and which of it stands for text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from jinja2 import TemplateError

from kvpipe.config import Template
from kvpipe.data.records import Record, render
from kvpipe.tokens.matrix import Tokens, encode
from kvpipe.tokens.segments import Segmented

DATED = (
    "{%- macro strftime_now(format) -%}{{ format | replace('%Y', '2024') | replace('%m', '07') | replace('%B', 'July') | "
    "replace('%b', 'Jul') | replace('%d', '26') }}{%- endmacro +%}"
)
"""Put before every template: one that writes the date calls this day today, so that texts do not change from day to day."""
PLAIN = Template(prompt="{prompt}", reasoning="{reasoning}", answer="{answer}")
PROBE = "Kvpipe?"


def name_of(tokenizer: Any) -> str:
    """What an error calls a tokenizer: its folder."""
    return getattr(tokenizer, "name_or_path", "") or "the tokenizer"


def rendered(tokenizer: Any, record: Record, template: Template) -> Segmented:
    """The record's text for one model: by the configured template, or with `chat_template` by the model's own.

    Then the prompt is what the model generates from (`add_generation_prompt`), the answer ends with the template's end of
    turn, and special tokens are spelled out in both. Every earlier turn of the assistant is an answer of its own, after a
    prompt of its own: all that stands before it.

    Raises:
        ValueError: no chat template; one that refuses the messages, whose generation prompt does not begin the whole, or
            that changes the answer; a record without prompt. Names the model and the record.
    """
    plain = render(record, template)
    if not template.chat_template:
        return plain
    where = f"{name_of(tokenizer)}, record {record.id!r}"
    reasoning, answer = plain.reasoning.lstrip(), plain.answer
    answer = answer.rstrip() if reasoning else answer.strip()
    said = reasoning + answer if answer else reasoning.rstrip()
    turns = record.messages or (("user", plain.prompt.strip()),)
    if not said or not any(text for _, text in turns):
        raise ValueError(f"{where}: data.template.chat_template needs a prompt and an answer; plain text has none")
    messages = [{"role": role, "content": text} for role, text in turns]
    prompt = _applied(tokenizer, messages, where, add_generation_prompt=True)
    whole = _applied(tokenizer, [*messages, {"role": "assistant", "content": said}], where)
    if not whole.startswith(prompt):
        raise ValueError(
            f"{where}: the chat template's generation prompt does not begin the conversation with its answer "
            f"(…{prompt[-40:]!r}), so that it would be trained on another text than it generates from"
        )
    place = whole.find(said, len(prompt))
    if place < 0:
        raise ValueError(
            f"{where}: the chat template changes the answer {said[:60]!r} (it writes {whole[len(prompt) :][:60]!r}); "
            "take out of the records what it rewrites, such as <think>"
        )
    before, after = whole[len(prompt) : place], whole[place + len(said) :].rstrip()
    *earlier, prompt = _turns(tokenizer, messages, prompt, after, where)
    if reasoning and answer:
        return Segmented(*earlier, prompt, before + reasoning, answer + after)
    last = (before + said, after) if reasoning else ("", before + said + after)
    return Segmented(*earlier, prompt, *last)


def _turns(tokenizer: Any, messages: list[dict[str, str]], prompt: str, end: str, where: str) -> list[str]:
    """The last prompt cut at the answers in it: prompt, no reasoning, answer of every earlier turn, and what is left."""
    parts, at = [], 0
    for number, message in enumerate(messages):
        said = message["content"].strip()
        if message["role"] != "assistant" or not said:
            continue
        begun = [_applied(tokenizer, messages[:number], where, add_generation_prompt=asked) for asked in (True, False)]
        first = next((len(text) for text in begun if prompt.startswith(text)), at)
        place = prompt.find(said, max(first, at))
        if place < 0:
            raise ValueError(
                f"{where}: the chat template leaves out or changes the answer {said[:60]!r} of an earlier turn; take out of "
                "the records what it rewrites, such as <think>"
            )
        stop = place + len(said)
        stop += len(end) if prompt.startswith(end, stop) else 0
        parts += [prompt[at:place], "", prompt[place:stop]]
        at = stop
    return [*parts, prompt[at:]]


def conversation(tokenizer: Any, turns: Sequence[tuple[str, str]], where: str) -> str:
    """What a model answers in a conversation of (role, text), by its own chat template.

    Raises:
        ValueError: no chat template, or one that refuses the turns; `where` is named.
    """
    messages = [{"role": role, "content": text} for role, text in turns]
    return _applied(tokenizer, messages, where, add_generation_prompt=True)


def _applied(tokenizer: Any, messages: list[dict[str, str]], where: str, **options: bool) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"{name_of(tokenizer)} has no chat template (chat_template in its tokenizer_config.json, or "
            "chat_template.jinja), which data.template.chat_template: true needs of every model; add one or set it to false"
        )
    try:
        template = DATED + tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    except (TemplateError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"{where}: the chat template refuses the messages ({roles}): {error}") from error


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Every special token: id → what it looks like in a text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {number: token.content for number, token in added.items() if token.special}
    return special | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token with which the template ends the assistant's turn; None where it writes none."""
    template = PLAIN.model_copy(update={"chat_template": True})
    _, _, tail = rendered(tokenizer, Record("-", "", PROBE, "", PROBE), template).answer.partition(PROBE)
    special = special_tokens(tokenizer)
    return next((int(t) for t in encode(tokenizer, tail, add_special_tokens=False).ids if int(t) in special), None)


def without_special(tokenizer: Any, text: Segmented, tokens: Tokens) -> tuple[Segmented, np.ndarray]:
    """The text without the special tokens' own characters, and spans in it: theirs are empty.

    So a template's marks, which differ from model to model, are no text that one model could share with another, be given
    a target for, or be scored on.
    """
    spans = tokens.spans.numpy()
    kept = np.ones(text.boundaries[-1], dtype=bool)
    for start, stop in spans[np.isin(tokens.ids.numpy(), list(special_tokens(tokenizer)))]:
        kept[start:stop] = False
    place = np.concatenate([[0], np.cumsum(kept)])
    data, edges = np.frombuffer(text.text.encode(), dtype=np.uint8), text.boundaries
    parts = [data[a:b][kept[a:b]].tobytes().decode() for a, b in pairwise(edges)]
    return Segmented(*parts), place[spans]


def carries_special(tokenizer: Any, record: Record) -> bool:
    """Whether the record's own text holds a special token, as rows do that a template has written already."""
    expression = "|".join(map(re.escape, special_tokens(tokenizer).values()))
    texts = [record.prompt, record.reasoning, record.answer, *(text for _, text in record.messages or ())]
    return bool(expression) and re.search(expression, "\0".join(texts)) is not None
