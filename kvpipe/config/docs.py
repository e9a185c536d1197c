"""Documentation of the configuration, generated from its models: config/README.md and config/schema.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from kvpipe.config import PRESETS, Arm, Config, json_schema

INTRODUCTION = """\
# Configuration

<!-- Written by `make config` from kvpipe/config/; a test fails when they differ. Edit the docstrings there. -->

One YAML (or JSON) file is one experiment: `config.yaml` here is the embedded one. `kvpipe <step> --config FILE` and the
Snakefile validate the whole file before anything starts; an unknown key, a wrong type or an unknown name is an error
that gives the key's path and the nearest valid name. Without editing the file, `--set key=value` changes one key, for
example `--set train.steps=100`.

In the tables a key is written with its whole path: `<name>` is a name of your own, `[]` an entry of a list. A key
without a default must be given. Sections and keys that are left out have their defaults. Editors that know
JSON schemas check the file as you write it, if it begins with `# yaml-language-server: $schema=schema.json`.
"""
ARMS = """\
An arm is another arm (`base`) with some settings changed (`set`), so an ablation of your own needs no code:

```yaml
arms:
  keys-only:
    base: exp1
    label: exp1, keys alone
    set: {loss.lambda_k: 3, loss.lambda_v: 0}
```

Its cells, statistics and rows in the report follow by themselves. One arm, and no other, is the control. A dotted key
changes one setting of the base; a whole section, as in `set: {layer: {kind: cka}}`, replaces the base's section. A
mistake in an arm is reported at the arm that wrote it, not at those that inherit it.
"""
SETTINGS = """\
What `set` may change, and the defaults that an arm without a base starts from. In the file these keys stand under
`arms.<name>.set`.
"""
PRESETS_TEXT = """\
What `preset` fills in. `hub` and `rows` are keys of the source, `template` those of `data.template.tasks.<task>`,
`evaluate` those of `evaluate.tasks.<task>`; a key that the configuration gives itself comes first (of `columns`, `split` and
`remove`, each entry by itself). docs/evaluation.md says what the scorers do.
"""


class _OneLine(yaml.SafeDumper):
    """Writes line ends inside a text as `\\n`."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_OneLine.add_representer(str, _text)


def presets() -> Iterator[str]:
    """Every preset as the YAML that it stands for."""
    for name, preset in PRESETS.items():
        text = yaml.dump(preset, Dumper=_OneLine, sort_keys=False, allow_unicode=True, width=1000)
        yield f"#### `preset: {name}`\n\n```yaml\n{text}```\n"


def readme() -> str:
    """config/README.md: every key with its path, type, default and explanation."""
    schema, arm = Config.model_json_schema(), Arm.model_json_schema()
    writer = _Writer({**schema["$defs"], **arm["$defs"]})
    lines = [INTRODUCTION, "## The file\n", *writer.table("", schema)]
    for key, node in schema["properties"].items():
        path, sections, _ = writer.targets(key, node)
        if not sections:
            continue
        lines.append(f"## `{key}`\n")
        if path != key:
            lines.append(ARMS if key == "arms" else node["description"] + "\n")
        lines += writer.sections(key, node, titled=path != key)
        if key == "data":
            lines += ["### Presets\n", PRESETS_TEXT, *presets()]
        if key == "arms":
            lines += ["### Settings of an arm\n", SETTINGS, *writer.table("", arm)]
            for setting, part in arm["properties"].items():
                lines += writer.sections(setting, part)
    return "\n".join(lines).rstrip("\n") + "\n"


def write_docs(folder: Path) -> None:
    """Writes README.md and schema.json into a folder."""
    (folder / "README.md").write_text(readme(), encoding="utf-8")
    (folder / "schema.json").write_text(json_schema(), encoding="utf-8")


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
