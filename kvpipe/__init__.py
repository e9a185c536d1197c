"""kvpipe: distil the key/value caches of several teacher language models into one student."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def lazily(package: str, **homes: str) -> Callable[[str], Any]:
    """A package's `__getattr__` that imports the module of a name when the name is asked for: torch takes seconds."""

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return find
