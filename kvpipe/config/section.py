"""What every section of the configuration has: unknown keys are errors, instances do not change."""

from __future__ import annotations

from collections.abc import Container
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Name = Annotated[str, Field(pattern=NAME)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key's path and the nearest valid name."""


class Section(BaseModel):
    """Base of every section: unknown keys are refused and instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        # pydantic's own message for an unknown key does not say which keys there are: only the section knows
        unknown = [key for key in values if key not in cls.model_fields] if isinstance(values, dict) else []
        if unknown:
            raise PydanticCustomError(
                "unknown_keys", "unknown keys", {"keys": unknown, "valid": list(cls.model_fields)}
            )
        return values


def inherit(values: Any, keys: Container[str]) -> Any:
    """Put those of a section's own keys under each entry of its `tasks`, which overrides them."""
    if not isinstance(values, dict) or not isinstance(values.get("tasks"), dict):
        return values
    own = {key: value for key, value in values.items() if key in keys}
    tasks = {name: {**own, **entry} if isinstance(entry, dict) else entry for name, entry in values["tasks"].items()}
    return {**values, "tasks": tasks}
