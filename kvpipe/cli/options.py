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
from kvpipe.experiment.steps import Job, Step

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

    def run(self, step: str, light: bool = False, **job: str) -> None:
        """Run one job of a step; `light` without torch, which takes seconds to import.

        Raises:
            FileNotFoundError: an earlier step has not run; the message has the commands, in order.
        """
        from kvpipe.steps.make import Work, run

        work = Work(*self.load())
        check_needs(work.steps, step, job)
        if not light:
            from kvpipe.steps.inputs import Inputs

            work = Inputs(work.config, work.paths)
        run(work, step, **job)

    def of(self, cell: Path | None) -> tuple[Config, Paths]:
        """The experiment that a cell belongs to: one of `kvpipe train --teacher` has it in its folder."""
        from kvpipe.steps.direct import kept

        return (kept(cell, self.overrides) if cell else None) or self.load()


def check_needs(steps: dict[str, Step], step: str, job: Job) -> None:
    """Refuse a job whose inputs are not there.

    Raises:
        FileNotFoundError: the message has the commands that make them, in order.
    """
    makers = {path: (name, one) for name, s in steps.items() for one in s.jobs() for path in s.makes(**one).values()}
    missing: list[Path] = []
    commands: dict[str, None] = {}

    def look(name: str, job: Job) -> None:
        for path in steps[name].needs(**job):
            maker, one = makers.get(path, ("", {}))
            # a command without a shard makes all of them itself
            if path.exists() or not maker or maker.endswith("_shard"):
                continue
            look(maker, one)
            missing.append(path)
            commands[_command(maker, one)] = None

    look(step, job)
    if missing:
        more = " (`kvpipe prepare --arm ARM` makes all that an arm reads)" if len(commands) > 1 else ""
        raise FileNotFoundError(f"{missing[0]} is missing: run {', '.join(f'`{c}`' for c in commands)} first{more}")


def _command(step: str, job: Job) -> str:
    if step == "model":
        return f"kvpipe models --name {job['model']}"
    return " ".join([f"kvpipe {step.replace('_', '-')}", *(f"--{name} {value}" for name, value in job.items())])


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
