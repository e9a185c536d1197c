"""What every section of the configuration has: unknown keys are errors, instances do not change."""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


def _number(value: Any) -> Any:
    # pydantic takes true for 1 and 1 for true; its strict mode would also refuse `1e-3`, which in YAML is a text
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {str(value).lower()}")
    return value


def _truth(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {value!r}")
    return value


def expression(text: str) -> re.Pattern[str]:
    """A regular expression, compiled.

    Raises:
        ValueError: the text is none.
    """
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from None


NUMBER = BeforeValidator(_number)
Expression = Annotated[str, AfterValidator(lambda text: expression(text).pattern)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"
Name = Annotated[str, Field(pattern=NAME)]
Flag = Annotated[bool, BeforeValidator(_truth)]
Fraction = Annotated[float, Field(ge=0, le=1), NUMBER]
Positive = Annotated[float, Field(gt=0), NUMBER]
NotNegative = Annotated[float, Field(ge=0), NUMBER]
Natural = Annotated[int, Field(ge=0), NUMBER]
Count = Annotated[int, Field(gt=0, le=10**9), NUMBER]
"""How many of something: beyond a thousand million it is a slip of the keyboard."""
Seed = Annotated[int, Field(ge=0, lt=2**32), NUMBER]
"""What every generator of random numbers takes."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key's path and the nearest valid name."""


class Section(BaseModel):
    """Base of every section: unknown keys are refused and instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
    tag: ClassVar[str] = "kind"
    options: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Key → values of the tag under which it has an effect; a key that has none is refused as an unknown one."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        # pydantic's own message for an unknown key does not say which keys there are: only the section knows
        unknown = [key for key in values if key not in cls.model_fields] if isinstance(values, dict) else []
        if unknown:
            raise PydanticCustomError(
                "unknown_keys", "unknown keys", {"keys": unknown, "valid": list(cls.model_fields)}
            )
        if isinstance(values, dict) and cls.options:
            kind = values.get(cls.tag, cls.model_fields[cls.tag].default)
            idle = [key for key in values if kind not in cls.options.get(key, (kind,))]
            if idle:
                valid = [key for key in cls.model_fields if kind in cls.options.get(key, (kind,))]
                raise PydanticCustomError("idle_keys", "idle keys", {"keys": idle, "valid": valid, "kind": kind})
        return values


def inherit(values: Any, keys: Container[str]) -> Any:
    """Put those of a section's own keys under each entry of its `tasks`, which overrides them."""
    if not isinstance(values, dict) or not isinstance(values.get("tasks"), dict):
        return values
    own = {key: value for key, value in values.items() if key in keys}
    tasks = {name: {**own, **entry} if isinstance(entry, dict) else entry for name, entry in values["tasks"].items()}
    return {**values, "tasks": tasks}


def assign(values: dict, dotted: str, value: Any) -> None:
    """Set `a.b.c` in nested dictionaries, making the levels that are missing."""
    *parents, last = dotted.split(".")
    node = values
    for key in parents:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{dotted}: {key!r} holds a value, not a section")
    node[last] = value
