"""Known data sets: `presets.yaml`, read once, and how a configuration is filled in from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml


def _filled(value: Any, parts: dict[str, str]) -> Any:
    """A value of the file with parts of patterns put in for their names."""
    match value:
        case dict():
            return {key: _filled(item, parts) for key, item in value.items()}
        case list():
            return [_filled(item, parts) for item in value]
        case str():
            return re.sub("<([A-Z]+)>", lambda name: _filled(parts[name[1]], parts), value)
    return value


_FILE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
PRESETS: dict[str, dict[str, dict[str, Any]]] = _filled(_FILE["presets"], _FILE["parts"])
"""Name → part of the configuration (`hub`, `rows`, `template`, `evaluate`) → its keys."""
PresetName = Literal["gsm8k", "math", "mbpp", "mbpp_chat", "humaneval", "humaneval_chat", "arc", "chat", "text"]


def preset_of(source: Any) -> dict[str, dict[str, Any]] | None:
    """The preset that a source, as it is written, names; None where it names none that is known."""
    name = source.get("preset") if isinstance(source, dict) else None
    return PRESETS.get(name) if isinstance(name, str) else None


def merged(preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The preset's keys under the given ones; of a mapping, key by key."""
    out = {**preset, **given}
    for key in preset.keys() & given.keys():
        if isinstance(preset[key], dict) and isinstance(given[key], dict):
            out[key] = {**preset[key], **given[key]}
    return out


def with_presets(values: Any, part: Literal["template", "evaluate"], sources: Any) -> Any:
    """A section with what the presets of the sources say about their tasks put under its `tasks`."""
    values = {} if values is None else values
    tasks = values.get("tasks", {}) if isinstance(values, dict) else None
    if not isinstance(tasks, dict) or not isinstance(sources, list):
        return values
    for source in sources:
        if preset := preset_of(source):
            names = source.get("tasks", {})
            for task in dict.fromkeys([source.get("task"), *(names.values() if isinstance(names, dict) else ())]):
                given = tasks.get(task, {})
                if isinstance(given, dict):
                    tasks = {**tasks, task: {**preset[part], **given}}
    return {**values, "tasks": tasks} if tasks else values
