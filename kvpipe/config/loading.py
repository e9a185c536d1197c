"""Configuration files read, laid over each other, changed by `--set`, and validated."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kvpipe.config.errors import explain
from kvpipe.config.schema import Config
from kvpipe.config.section import ConfigError, assign


def parse(values: dict, overrides: dict[str, Any] | None = None, origin: str = "configuration") -> Config:
    """Validate nested dictionaries, with dotted overrides applied first.

    Raises:
        ConfigError: one line per problem, each with the key's path and the nearest valid name.
    """
    values, overrides = copy.deepcopy(values), overrides or {}
    names = ("steps", "max_steps")  # of one setting; the second is what other trainers call it
    train = values.get("train")
    if isinstance(train, dict) and any(f"train.{name}" in overrides for name in names):
        # an override takes the place of the file's value, whichever of its names that has
        values["train"] = {key: value for key, value in train.items() if key not in names}
    for dotted, value in overrides.items():
        assign(values, dotted, value)
    train = values.get("train")
    if isinstance(train, dict) and "max_steps" in train:
        if "steps" in train:
            raise ConfigError(f"{origin}:\ntrain: steps and max_steps are two names of one setting; give one of them")
        values["train"] = {"steps" if key == "max_steps" else key: value for key, value in train.items()}
    if values.keys() & Config.model_fields.keys() and not values.keys() & {"student", "data"}:
        raise ConfigError(
            f"{origin}: this is an overlay, without a student and data of its own; give the experiment first: --config "
            f"EXPERIMENT {origin} (Snakemake: --configfile)"
        )
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{origin}:\n{explain(error, values)}") from None


def merge(values: dict, over: dict) -> dict:
    """Lay one nested dictionary over another, key by key; everything that is no mapping is replaced. As Snakemake does
    with several `--configfile`."""
    out = dict(values)
    for key, value in over.items():
        if isinstance(value, dict):
            below = out.get(key)
            value = merge(below if isinstance(below, dict) else {}, value)
        out[key] = value
    return out


ENTRIES = 100_000
"""Most entries of a document, every alias written out."""


def entries(node: Any, counted: dict[int, float] | None = None) -> float:
    """How many entries a document (nodes of YAML, or dictionaries and lists) has when every alias is written out; infinite
    where it contains itself."""
    counted = {} if counted is None else counted
    node = node.value if isinstance(node, yaml.Node) else node
    if not isinstance(node, dict | list | tuple):
        return 1.0
    if id(node) not in counted:
        counted[id(node)] = math.inf
        parts = node.values() if isinstance(node, dict) else node
        counted[id(node)] = 1.0 + sum(entries(part, counted) for part in parts)
    return counted[id(node)]


def _bounded(node: Any) -> None:
    if entries(node) > ENTRIES:
        raise ValueError(
            f"more than {ENTRIES:,} entries with all aliases (*name) written out; expected a configuration"
        )


class _OneOfEach(yaml.SafeLoader):
    """YAML in which a key stands once in its mapping, YAML's own rule, and aliases do not multiply; PyYAML keeps neither."""

    def get_single_node(self) -> yaml.Node | None:
        """The document, if it stays one when its aliases are written out."""
        node = super().get_single_node()
        _bounded(node)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; what PyYAML says of one that is no date, number or truth value names no line."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError) as error:
            kind, value = node.tag.rpartition(":")[2], str(node.value)
            value = value if len(value) <= 60 else f"{value[:57]}…"
            problem = f"{value!r} is no {kind}" + (f": {error}" if isinstance(error, ValueError) else "")
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """The mapping; what `<<` brings in may be given anew."""
        seen: dict[Any, yaml.Node] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
                continue
            name = self.construct_object(key)
            if name in seen:
                line = seen[name].start_mark.line + 1
                problem = f"the key {name!r} stands there already, in line {line}: keep one of the two"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen[name] = key
        return super().construct_mapping(node, deep)


def _yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_OneOfEach)
    except RecursionError:
        raise ConfigError(f"{origin}: nested too deeply; expected a configuration of a few levels") from None
    except (yaml.YAMLError, ValueError) as error:  # a date or a number that is none is a plain ValueError
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        said = getattr(error, "problem", None) or " ".join(str(error).split())
        if isinstance(error, yaml.reader.ReaderError):
            where = f", line {text.count(chr(10), 0, error.position) + 1}"
            code = ord(error.character) if isinstance(error.character, str) else error.character
            said = f"the character U+{code:04X} may not stand in it"
        raise ConfigError(f"{origin}{where}: not valid YAML: {said}") from None


def read(path: str | Path) -> dict:
    """The mapping in a configuration file, as written.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: it is a folder, no text in UTF-8, no YAML, or has a key twice; with the file and the line.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; expected a configuration file (YAML)")
    try:
        values = _yaml(path.read_bytes().decode(), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8 text; save it as UTF-8") from None
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such configuration file; name yours with --config, or run this in kvpipe's own folder, where "
            "config/config.yaml is the embedded experiment"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping at the top level")
    return values


def lock_path(path: str | Path) -> Path:
    """The lock file of a configuration: beside it, `hpc.yaml` → `hpc.lock.yaml`."""
    return Path(path).with_suffix(".lock.yaml")


def with_lock(values: dict, paths: Sequence[str | Path]) -> dict:
    """The merged values of configuration files, laid over the lock beside the first of them."""
    path = lock_path(paths[0]) if paths else None
    try:
        _bounded(values)  # Snakemake has read them by a loader of its own
    except ValueError as error:
        raise ConfigError(f"{', '.join(map(str, paths))}: {error}") from None
    return merge(read(path), values) if path is not None and path.is_file() else values


def load(paths: str | Path | Sequence[str | Path], overrides: list[str] | None = None) -> Config:
    """Read and validate YAML (or JSON) files.

    Args:
        paths: one file, or a base and overlays, each laid over those before it.
        overrides: `dotted.key=value` with a YAML value, over all of them.
    """
    files = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    values: dict = {}
    for path in files:
        values = merge(values, read(path))
    return parse(with_lock(values, files), overridden(overrides), origin=", ".join(map(str, files)))


def overridden(overrides: Sequence[str] | None) -> dict[str, Any]:
    """Dotted key → value of `dotted.key=value` texts, the values read as YAML."""
    pairs = {}
    for item in overrides or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item!r}: expected dotted.key=value")
        pairs[key] = _yaml(value, f"--set {item if len(item) <= 80 else item[:77] + '…'!r}")
    return pairs
