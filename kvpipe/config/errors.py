"""What is wrong with a configuration, in words for the person who wrote it: pydantic's errors, one line each."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from pydantic import ValidationError

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

RENAMED = {
    "arms.*.set.steps": "is called step_factor now",
    "arms.*.set.content": "is shuffle_teacher now: true for shuffled, false for own",
    "arms.*.set.layer.by=own": "own is called kv now",
    "arms.*.set.loss.lambda_k": "is loss.keys.weight now: a loss is a set of terms",
    "arms.*.set.loss.lambda_v": "is loss.values.weight now: a loss is a set of terms",
    "arms.*.set.loss.kind": "is gone: a loss is a set of terms, such as loss: {keys: {}, values: {weight: 3}}",
    "arms.*.set.time.text": "is gone: under segment the teacher reads its own text, else the student's",
    "models.*.parameters": "is gone: parameters are counted; leave it out",
}
"""Keys, and values of keys, that had another name, and what stands for them now."""


def printable(text: str) -> str:
    """A text with its control characters escaped (all but tab and line end): what comes from data, names and logs must not
    reach a terminal as commands."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def nearest(name: Any, valid: Iterable[str]) -> str:
    """The end of a message about a wrong name: the nearest valid one, and all of them."""
    close = difflib.get_close_matches(str(name), valid, n=1)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (known: {', '.join(valid)})"


def _renamed(key: str) -> str | None:
    return next((now for old, now in RENAMED.items() if fnmatchcase(key, old)), None)


def _dotted(location: Iterable[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def explain(error: ValidationError, document: Any, prefix: tuple[str, ...] = ()) -> str:
    """One line per problem: the key's path as it is written, what is wrong with it, the nearest valid name.

    Args:
        error: what pydantic raised; a section reports its unknown keys as `unknown_keys` with what it knows.
        document: the nested dictionaries that were validated.
        prefix: where the document stands in the file.
    """
    problems: dict[str, list[str]] = {}
    for item in error.errors():
        location = (*prefix, *_location(item["loc"], document, missing=item["type"] == "missing"))
        for path, problem in _problems(item, location):
            problems.setdefault(path, []).append(problem)
    # a value that fits no member of a union comes with one error per member: one problem all the same
    return "\n".join(f"{path}: {' or '.join(texts)}" if path else "\n".join(texts) for path, texts in problems.items())


def _location(location: tuple, document: Any, missing: bool) -> list[str | int]:
    """The keys of a pydantic location: it also holds tags of unions, which are nowhere in the document."""
    keys: list[str | int] = []
    node = document
    for position, part in enumerate(location):
        inside = part in node if isinstance(node, dict) else isinstance(node, list) and isinstance(part, int)
        if inside:
            keys.append(part)
            node = node[part]
        elif missing and position == len(location) - 1:
            keys.append(part)
    return keys


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']+)'", text)


def _problems(item: Any, location: tuple) -> list[tuple[str, str]]:
    context = item.get("ctx", {})
    given = repr(item["input"])
    given = given if len(given) <= 60 else f"{given[:57]}…"
    path = _dotted(location)
    match item["type"]:
        case "unknown_keys":
            keys = {_dotted((*location, key)): nearest(key, context["valid"]) for key in context["keys"]}
            return [(key, _renamed(key) or f"unknown key{known}") for key, known in keys.items()]
        case "idle_keys":
            texts = (
                f"has no effect under {context['kind']!r} (known there: {', '.join(context['valid'])}); leave it out"
            )
            return [(_dotted((*location, key)), texts) for key in context["keys"]]
        case "value_error":
            return [(path, str(context["error"]))]
        case "missing":
            return [(path, "missing, and it has no default")]
        case "union_tag_not_found":
            return [(_dotted((*location, *_quoted(context["discriminator"]))), "missing; it says what this entry is")]
        case "union_tag_invalid":
            tag, tags = context["tag"], _quoted(context["expected_tags"])
            return [(_dotted((*location, *_quoted(context["discriminator"]))), f"unknown {tag!r}{nearest(tag, tags)}")]
        case "literal_error":
            if now := _renamed(f"{path}={item['input']}"):
                return [(path, now)]
            return [(path, f"unknown {given}{nearest(item['input'], _quoted(context['expected']))}")]
        case _:
            return [(path, f"{re.sub('^[A-Z][a-z]+ should', 'should', item['msg'])} (got {given})")]
