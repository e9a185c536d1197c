"""What every section of the configuration has: unknown keys are errors, instances do not change."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Name = Annotated[str, Field(pattern=NAME)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0, le=10**9)]
"""How many of something: beyond a thousand million it is a slip of the keyboard."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What every generator of random numbers takes."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key's path and the nearest valid name."""


class Section(BaseModel):
    """Base of every section: unknown keys are refused and instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _keys_and_kinds(cls, values: Any) -> Any:
        # pydantic's own message for an unknown key does not say which keys there are: only the section knows
        unknown = [key for key in values if key not in cls.model_fields] if isinstance(values, dict) else []
        if unknown:
            raise PydanticCustomError(
                "unknown_keys", "unknown keys", {"keys": unknown, "valid": list(cls.model_fields)}
            )
        given = values.items() if isinstance(values, dict) else ()
        mistyped = {key: said for key, value in given if (said := _mistyped(value, cls.model_fields[key].annotation))}
        if mistyped:
            raise PydanticCustomError("mistyped", "mistyped", {"keys": mistyped})
        return values


def _mistyped(value: Any, annotation: Any) -> str | None:
    """What is wrong with a truth value for a number, or a number for a truth value: pydantic takes true for 1 and 1 for
    true. Its strict mode would also refuse `1e-3`, which in YAML is a text."""
    kinds = set(_types(annotation))
    for given in _scalars(value) if kinds & {int, float, bool} else ():
        if isinstance(given, bool) and bool not in kinds:
            return f"expected a number, got {str(given).lower()}"
        if kinds <= {bool, type(None)} and not isinstance(given, bool | None):
            return f"expected true or false, got {given!r}"
    return None


def _types(annotation: Any) -> Iterator[type]:
    """The types that a field's annotation is made of."""
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for part in get_args(annotation):
        yield from _types(part)


def _scalars(value: Any, depth: int = 2) -> Iterator[Any]:
    """What stands in a value, in its lists and mappings, as deep as any field has them."""
    if depth and isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _scalars(part, depth - 1)
    else:
        yield value


def inherit(values: Any, keys: Container[str]) -> Any:
    """Put those of a section's own keys under each entry of its `tasks`, which overrides them."""
    if not isinstance(values, dict) or not isinstance(values.get("tasks"), dict):
        return values
    own = {key: value for key, value in values.items() if key in keys}
    tasks = {name: {**own, **entry} if isinstance(entry, dict) else entry for name, entry in values["tasks"].items()}
    return {**values, "tasks": tasks}
