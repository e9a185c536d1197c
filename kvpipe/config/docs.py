"""Documentation of the configuration, generated from its models: config/README.md and config/schema.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jinja2 import Template

from kvpipe.config import Arm, Config


def readme() -> str:
    """config/README.md: every key with its path, type, default and explanation."""
    schema, arm = Config.model_json_schema(), Arm.model_json_schema()
    writer = _Writer({**schema["$defs"], **arm["$defs"]})
    sections = []
    for key, node in schema["properties"].items():
        path, names, _ = writer.targets(key, node)
        if names:
            text = _joined(writer.sections(key, node, titled=path != key))
            sections.append({"key": key, "description": node["description"] if path != key else "", "text": text})
    parts = [*writer.table("", arm), *(line for item in arm["properties"].items() for line in writer.sections(*item))]
    template = Template(Path(__file__).with_suffix(".md.jinja").read_text("utf-8"), trim_blocks=True)
    return template.render(file=_joined(writer.table("", schema)), sections=sections, settings=_joined(parts)) + "\n"


def json_schema() -> str:
    """The JSON schema of a configuration file (with the arm's resolved keys under $defs)."""
    schema, arm = Config.model_json_schema(), Arm.model_json_schema()
    schema["$defs"] |= {**arm.pop("$defs"), "Arm": arm}
    return json.dumps(schema, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def write_docs(folder: Path) -> None:
    """Writes README.md and schema.json into a folder."""
    (folder / "README.md").write_text(readme(), encoding="utf-8")
    (folder / "schema.json").write_text(json_schema(), encoding="utf-8")


def _joined(lines: Iterable[str]) -> str:
    return "\n".join(lines).rstrip("\n")


class _Writer:
    """Walks a JSON schema. A section that occurs twice is written once, under the path where it comes first."""

    def __init__(self, definitions: dict[str, Any]):
        self.definitions = definitions
        self.written: dict[str, str] = {}

    def sections(self, path: str, node: dict, titled: bool = True) -> Iterator[str]:
        """All sections below a key, each before those inside it."""
        path, names, tag = self.targets(path, node)
        for name in names:
            if name in self.written:
                continue
            section = self.definitions[name]
            self.written[name] = path
            if titled:
                yield f"### `{path}`" + (f", `{tag}: {section['properties'][tag]['const']}`" if tag else "") + "\n"
            yield from (_line(section["description"]) + "\n", *self.table(path, section, tag))
            for key, child in section["properties"].items():
                yield from self.sections(f"{path}.{key}", child)

    def targets(self, path: str, node: dict) -> tuple[str, list[str], str | None]:
        """Path of an entry, the definitions that it may be, and the key that tells them apart."""
        if "$ref" in node:
            return path, [_target(node)], None
        if "items" in node:
            return self.targets(f"{path}[]", node["items"])
        entries = _values(node)
        if entries is not None:
            return self.targets(f"{path}.<name>", entries)
        names = [name for part in node.get("anyOf", []) for name in self.targets(path, part)[1]]
        if "oneOf" in node:
            names = [_target(part) for part in node["oneOf"]]
        return path, names, node.get("discriminator", {}).get("propertyName")

    def table(self, path: str, section: dict, tag: str | None = None) -> list[str]:
        """One row per key."""
        rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, node in section["properties"].items():
            required = key == tag or key in section.get("required", [])
            dotted = f"{path}.{key}" if path else key
            default = "" if required else self.default(node)
            rows.append(_row(f"`{dotted}`", self.type(node), default, self.meaning(dotted, node)))
        return [*rows, ""]

    def meaning(self, path: str, node: dict) -> str:
        """The key's description (pydantic leaves it out where it is the section's), and where its keys are written."""
        if "$ref" not in node:
            return _line(node["description"])
        name = _target(node)
        text = _line(node.get("description", self.definitions[name]["description"]))
        first = self.written.get(name, path)
        return text if first == path else f"{text} Its keys are those of `{first}`."

    def default(self, node: dict) -> str:
        """A section's default is that of its keys."""
        return "its keys'" if "$ref" in node else _yaml(node["default"])

    def type(self, node: dict) -> str:
        """The type of a key as a person would say it."""
        match node:
            case {"const": value}:
                return f"`{value}`"
            case {"enum": values}:
                return " or ".join(f"`{value}`" for value in values)
            case {"anyOf": parts}:
                return " or ".join(self.type(part) for part in parts)
            case {"oneOf": parts, "discriminator": {"propertyName": tag}}:
                return f"section, by `{tag}`"
            case {"$ref": _}:
                return "section"
            case {"type": "array", "items": items}:
                return f"list of {_plural(self.type(items))}"
            case {"type": "object"}:
                values = _values(node)
                return "names with any values" if values is None else f"name → {self.type(values)}"
        word = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "none"}
        return word[node["type"]] + _bounds(node)


def _target(node: dict) -> str:
    return node["$ref"].rsplit("/", 1)[1]


def _line(text: str) -> str:
    return " ".join(text.split())


def _values(node: dict) -> dict | None:
    """Schema of the values of a mapping; None if they may be anything (or it is no mapping)."""
    if "patternProperties" in node:
        return next(iter(node["patternProperties"].values()))
    values = node.get("additionalProperties")
    return values if isinstance(values, dict) else None


def _plural(word: str) -> str:
    return re.sub("^(text|integer|number|section)", r"\1s", word)


def _bounds(node: dict) -> str:
    limits = [("exclusiveMinimum", ">"), ("minimum", "≥"), ("exclusiveMaximum", "<"), ("maximum", "≤")]
    found = [f"{sign} {node[key]}" for key, sign in limits if key in node]
    return f" {', '.join(found)}" if found else ""


def _yaml(value: Any) -> str:
    match value:
        case None:
            return "none"
        case str():
            return "`" + value.replace("\n", "\\n") + "`" if value else "empty"
        case _:
            return f"`{json.dumps(value)}`"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
