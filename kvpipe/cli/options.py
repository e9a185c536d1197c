"""What the subcommands share: the options that name an experiment, where outputs may be, and how they speak."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpipe.config import Config, load
from kvpipe.config.errors import printable
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.plan import Dag

CONFIG = [Path("config/config.yaml")]
RESULTS = Path("results")
ConfigFile = Annotated[
    list[Path],
    typer.Option("--config", envvar="KVPIPE_CONFIG", help="Configuration file (YAML); overlays follow it, in order."),
]
ResultsFolder = Annotated[Path, typer.Option("--results", envvar="KVPIPE_RESULTS", help="Folder of all artefacts.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value, over the file; repeatable.")]


@dataclass(frozen=True)
class Experiment:
    """What `--config`, `--results` and `--set` say; nothing is read before it is asked for."""

    files: list[Path]
    results: Path
    overrides: list[str] | None

    def load(self) -> tuple[Config, Paths]:
        """The configuration and the places of its artefacts."""
        return load(self.files, self.overrides), Paths(self.results)

    def plan(self) -> tuple[Dag, Paths]:
        """What the configuration implies, and the places."""
        config, paths = self.load()
        return Dag(config), paths

    def known_model(self, name: str) -> str:
        """The name, if the configuration has such a model."""
        return self.plan()[0].known_model(name)

    def inputs(self):
        """The loaders. torch and transformers take seconds to import: a wrong configuration is said before."""
        experiment = self.load()
        from kvpipe.steps.inputs import Inputs

        return Inputs(*experiment)

    def run(self, step: str, **job: str) -> None:
        """Run one job of a step."""
        from kvpipe.steps.make import run

        run(self.inputs(), step, **job)

    def of(self, cell: Path | None) -> tuple[Config, Paths]:
        """The experiment that a cell belongs to: one of `kvpipe train --teacher` has it in its folder."""
        from kvpipe.steps.direct import kept

        return (kept(cell, self.overrides) if cell else None) or self.load()


SHARED = {"config": (ConfigFile, CONFIG), "results": (ResultsFolder, RESULTS), "overrides": (Overrides, None)}


def with_experiment(command: Callable[..., None]) -> Callable[..., None]:
    """The options that name an experiment, after a command's own; it gets the `Experiment` as its first argument."""
    signature = inspect.signature(command, eval_str=True)
    own = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in list(signature.parameters.values())[1:]]

    @functools.wraps(command)
    def with_options(**options: Any) -> None:
        given = [options.pop(name, default) for name, (_, default) in SHARED.items()]
        command(Experiment(*given), **options)

    shared = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in SHARED.items()
    ]
    with_options.__signature__ = signature.replace(parameters=[*own, *shared])  # type: ignore[attr-defined]
    return with_options


def say(text: object, err: bool = False) -> None:
    """Print; what names and data bring along cannot command the terminal."""
    typer.echo(printable(str(text)), err=err)


def writable_file(out: Path | None) -> Path | None:
    """`--out` where a file can be: said before hours of work, not after them."""
    for path in () if out is None else out.parents:
        if path.exists() and not path.is_dir():
            raise typer.BadParameter(f"{out}: {path} is a file, not a folder")
    if out is not None and out.is_dir():
        raise typer.BadParameter(f"{out} is a folder; name a file in it")
    return out


def writable_folder(out: Path | None) -> Path | None:
    """The same of a folder."""
    if out is not None:
        writable_file(out / "file")
    return out
