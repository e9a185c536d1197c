"""Components that come in kinds which anybody can add to: fusions, projectors, loss terms.

A kind is two classes: its settings, a `Section` whose field `kind` is its name, and what is built from them. An extension
has both in one file and registers them by the two decorators of a `Kinds`; a configuration names it under `extensions`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union

from pydantic import BaseModel, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema

from kvpipe.config.errors import nearest
from kvpipe.config.section import Section

S = TypeVar("S", bound=Section)
C = TypeVar("C", bound=type)


class Kinds:
    """The kinds of one component.

    Args:
        what: the component, in messages.
        default: the kind where a configuration names none.
    """

    def __init__(self, what: str, default: str | None = None):
        self.what, self.default = what, default
        self.settings: dict[str, type[Section]] = {}
        self.classes: dict[type[Section], type] = {}
        self._fields: list[type[BaseModel]] = []

    def register(self, settings: type[S]) -> type[S]:
        """Decorator of a kind's settings.

        Raises:
            ValueError: another class has its name.
        """
        name = str(settings.model_fields["kind"].default)
        taken = self.settings.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (settings.__module__, settings.__qualname__):
            raise ValueError(f"{self.what} {name!r} is taken by {taken.__module__}.{taken.__qualname__}: rename yours")
        self.settings[name] = settings
        for model in self._fields:
            model.model_rebuild(force=True)
        return settings

    def built_from(self, settings: type[Section]) -> Callable[[C], C]:
        """Decorator of what is built from a kind's settings."""

        def note(cls: C) -> C:
            self.classes[settings] = cls
            return cls

        return note

    def of(self, settings: Section) -> Any:
        """The class that is built from some settings.

        Raises:
            TypeError: nothing is.
        """
        if type(settings) not in self.classes:
            raise TypeError(f"{self.what} {settings.kind!r}: no class is built from {type(settings).__name__}")  # type: ignore[attr-defined]
        return self.classes[type(settings)]

    def __call__(self, kind: str | None = None, **options: Any) -> Any:
        """Settings of a kind.

        Raises:
            ValueError: no such kind, or not with these options.
        """
        kind = kind or self.default
        if kind not in self.settings:
            raise ValueError(f"unknown {self.what} {kind!r}{nearest(kind, self.settings)}")
        return self.settings[kind](**options)

    def extends(self, model: type[BaseModel]) -> None:
        """Have a model validated anew whenever a kind is added."""
        self._fields.append(model)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """As an annotation: a union told apart by `kind`."""
        return handler.generate_schema(Annotated[Union[tuple(self.settings.values())], Field(discriminator="kind")])  # noqa: UP007

    def tagged(self, value: Any) -> Any:
        """Settings as written, with the default kind where none is named."""
        return {"kind": self.default, **value} if isinstance(value, dict) else value


def extend(files: list[str]) -> None:
    """Import the files of extensions, which register their kinds; each once in a process.

    Raises:
        ValueError: there is no such file, or it cannot be imported.
    """
    for file in files:
        path = Path(file)
        if path.suffix != ".py" or not path.is_file():
            raise ValueError(f"extensions: {file} is no Python file; give its path from where the command runs")
        name = f"kvpipe_extension_{path.stem}_{sha256(path.read_bytes()).hexdigest()[:8]}"
        if name in sys.modules:
            continue
        spec = spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise ValueError(f"extensions: {file} cannot be imported: {type(error).__name__}: {error}") from error


FUSIONS = Kinds("fusion", "mean")
PROJECTORS = Kinds("projector", "linear")
TERMS = Kinds("loss term")
ENGINES: dict[str, Any] = {"transformers": "kvpipe.evaluate.generate:Transformers"}
"""Name → who writes the teachers' texts: a class like `kvpipe.evaluate.generate.Engine`, or `module:class`."""
