"""From a row of a data set to a record, by the mapping of the configuration (`kvpipe.config.RowData`).

In this order: the conversation becomes columns `prompt` and `answer`, regular expressions make more columns, columns
become the record's fields, and what is to be removed is taken out of them.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping
from typing import Any

from kvpipe.config import Chat, RowData
from kvpipe.data.patterns import UNSEEN, time_limit
from kvpipe.data.records import Record

LISTS = ("choices", "labels")
"""Fields that are lists of texts."""
MAY_BE_EMPTY = ("reasoning", "teacher_reasoning", "tests")
"""Fields that may be empty though they are mapped."""
ROLE_OF = {"human": "user", "gpt": "assistant", "bot": "assistant"}
"""Other names of roles."""


def to_record(row: Mapping[str, Any], source: RowData, name: str) -> Record:
    """The record of one row.

    Args:
        row: column → value.
        source: which columns are what.
        name: the record's id where none is mapped.

    Raises:
        ValueError: a column is missing, an expression does not match, a field is empty, or the answer is none of the
            choices. The message does not name the row: the caller knows its file and number.
    """
    columns = dict(row)
    messages = None
    if source.chat is not None:
        # the prompt of another column is not these turns alone
        if source.columns.get("prompt") == "prompt" and "prompt" not in source.remove:
            messages = turns(columns, source.chat)[:-1]
        columns |= conversation(columns, source.chat)
    for column, expression in source.split.items():
        columns |= _split(columns, column, expression)
    fields: dict[str, Any] = {}
    for field, spec in source.columns.items():
        if field in LISTS:
            fields[field] = _texts(lookup(columns, spec, field), spec, field)
        else:
            fields[field] = fill(spec, columns, field)
    for field, expression in source.remove.items():
        if isinstance(fields.get(field), str):
            with time_limit(f"remove: {field}: {_short(expression)}"):
                fields[field] = re.sub(expression, "", fields[field])
    if "choice" in fields:
        fields["answer"] = _chosen(fields)
    empty = [f for f, value in fields.items() if f not in MAY_BE_EMPTY and isinstance(value, str) and _is_blank(value)]
    if empty:
        raise ValueError(f"{empty[0]} is empty")
    if all(_is_blank(fields.get(field, "")) for field in ("prompt", "reasoning", "answer")):
        raise ValueError("prompt, reasoning and answer are all empty")
    choices = fields.get("choices")
    if choices is not None and any(map(_is_blank, choices)):
        raise ValueError(f"choice {[_is_blank(choice) for choice in choices].index(True)} of {choices} is empty")
    if choices is not None and len(set(choices)) < len(choices):
        raise ValueError(f"choice {max(choices, key=choices.count)!r} stands twice in {choices}")
    if choices is not None and fields.get("answer") not in choices:
        raise ValueError(f"answer {fields.get('answer')!r} is none of the choices {choices}")
    return Record(
        id=fields.get("id", name),
        task=source.tasks.get(fields.get("task", ""), source.task),
        prompt=fields.get("prompt", ""),
        reasoning=fields.get("reasoning", ""),
        answer=fields.get("answer", ""),
        teacher_reasoning=fields.get("teacher_reasoning") or None,
        tests=fields.get("tests") or None,
        choices=None if choices is None else tuple(choices),
        messages=messages or None,
    )


def _is_blank(text: str) -> bool:
    """Whether there is nothing to be seen: white space, and characters without width."""
    return not re.sub(UNSEEN, "", text).strip()


def lookup(columns: Mapping[str, Any], path: str, field: str) -> Any:
    """The value of a column, or of `a.b`: key b of column a."""
    value: Any = columns
    for key in [path] if path in columns else path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"no column {path!r} for {field} (has {sorted(columns)})")
        value = value[key]
    return value


def fill(spec: str, columns: Mapping[str, Any], field: str) -> str:
    """A column's text, or a text with `{column}` in it."""
    if "{" not in spec:
        return _text(lookup(columns, spec, field), spec)
    parts = []
    for literal, path, _, _ in string.Formatter().parse(spec):
        parts.append(literal)
        if path is not None:
            parts.append(_text(lookup(columns, path, field), path))
    return "".join(parts)


def conversation(columns: Mapping[str, Any], chat: Chat) -> dict[str, str]:
    """`prompt` and `answer` of a list of messages: the assistant's last message is the answer, what follows is left out."""
    *before, (_, answer) = turns(columns, chat, named=False)
    written = [chat.turns[role].replace("{content}", content) for role, content in before]
    return {"prompt": "".join(written), "answer": answer}


def turns(columns: Mapping[str, Any], chat: Chat, named: bool = True) -> tuple[tuple[str, str], ...]:
    """(role, text) of the messages up to the assistant's last; `named`: with the roles that chat templates know."""
    messages = lookup(columns, chat.column, "chat")
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise ValueError(f"column {chat.column!r} is no list of messages")
    roles = [_text(m.get(chat.role), f"{chat.column}.{chat.role}") for m in messages]
    last = max((i for i, role in enumerate(roles) if role == chat.assistant), default=None)
    if last is None:
        raise ValueError(f"no message of {chat.assistant!r} in column {chat.column!r} (roles {roles})")
    unknown = sorted(set(roles[:last]) - chat.turns.keys())
    if unknown:
        raise ValueError(f"role(s) {unknown} have no entry in chat.turns (has {sorted(chat.turns)})")
    if named:
        roles = ["assistant" if role == chat.assistant else ROLE_OF.get(role, role) for role in roles]
    return tuple((roles[i], _said(messages[i], chat, i + 1)) for i in range(last + 1))


def _said(message: Mapping[str, Any], chat: Chat, number: int) -> str:
    """A message's text: its content, or the texts of a list of parts `{"type": "text", "text": …}`."""
    content, where = message.get(chat.content), f"message {number} in column {chat.column!r}"
    if content is None:
        raise ValueError(
            f"{where} has no {chat.content!r} (has {sorted(message)}); leave the row out or name chat.content"
        )
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        others = sorted({str(part.get("type")) for part in content if part.get("type") != "text"})
        if others:
            raise ValueError(f"{where} has parts of type {', '.join(others)}; only text is read")
        content = [part.get("text") for part in content]
    return _text(content, f"{chat.column}.{chat.content}")


def _split(columns: Mapping[str, Any], column: str, expression: str) -> dict[str, str]:
    text = _text(lookup(columns, column, "split"), column)
    with time_limit(f"split: {column}: {_short(expression)}"):
        match = re.search(expression, text)
    if match is None:
        named = ", ".join(re.compile(expression).groupindex)
        raise ValueError(f"column {column!r} does not match {_short(expression)}, which finds {named}: {_short(text)}")
    return {name: value or "" for name, value in match.groupdict().items()}


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "…")


def _text(value: Any, column: str) -> str:
    """A value as text; None is none, and the texts of a list are joined by line ends."""
    match value:
        case None:
            return ""
        case list():
            return "\n".join(_text(item, column) for item in value)
        case float() if not math.isfinite(value):
            raise ValueError(f"column {column!r} holds {value}, which is no number; leave the row out")
        case bool() | int() | float():
            return str(value)
        case str():
            try:
                value.encode()
            except UnicodeEncodeError as error:  # half of a pair, as \ud800 in JSON
                raise ValueError(
                    f"column {column!r} holds {_short(value)}, which is no Unicode text: {error}"
                ) from None
            return value
        case Mapping():
            raise ValueError(f"column {column!r} holds keys {sorted(value)}; name one as `{column}.key`")
        case _:
            raise ValueError(f"column {column!r} holds {type(value).__name__}; text, numbers or lists of them are read")


def _texts(value: Any, column: str, field: str) -> list[str]:
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError(f"{field} is no list of at least two texts: {value!r}")
    return [_text(item, column) for item in value]


def _chosen(fields: Mapping[str, Any]) -> str:
    """The choice at a place (from 0) or with a label."""
    choice, choices = fields["choice"], fields["choices"]
    names = fields.get("labels", [str(place) for place in range(len(choices))])
    if choice not in names or len(names) != len(choices):
        raise ValueError(f"choice {choice!r} is none of {names}, which name {len(choices)} choices")
    return choices[names.index(choice)]
