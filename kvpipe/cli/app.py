"""The command line: `kvpipe <step>` (or `python -m kvpipe <step>`), and errors in one line."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from kvpipe import __version__
from kvpipe.cli import steps, use
from kvpipe.cli.options import say
from kvpipe.config import ConfigError
from kvpipe.config.errors import printable
from kvpipe.experiment import progress

# what a user can put right is told without a traceback
USER_ERRORS = (ConfigError, OSError, KeyError, ValueError, RuntimeError, ArithmeticError, ImportError, MemoryError)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _panel, _commands in (("Use", use.COMMANDS), ("Steps, called by the rules", steps.COMMANDS)):
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_panel)(_command)
app.add_typer(use.recipes, name="recipes", rich_help_panel="Use")


def _version(wanted: bool) -> bool:
    if wanted:
        say(f"kvpipe {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Distil the KV caches of several teacher models into one student, and measure whether it helped."""


def one_by_one(arguments: list[str]) -> list[str]:
    """`--config A B` as `--config A --config B`: the words that Snakemake's `--configfile` takes."""
    found: list[str] = []
    for word in arguments:
        several = found[-2:-1] == ["--config"] and word.endswith((".yaml", ".yml", ".json"))
        found += ["--config", word] if several else ["--config" if word == "--configfile" else word]
    return found


def main() -> None:
    """Entry point: errors that a user can put right are one message and exit status 1."""
    try:
        if sys.flags.optimize > 1:
            raise ValueError(
                "PYTHONOPTIMIZE=2 (python -OO) takes away docstrings, which transformers reads: unset it, or set it to 1"
            )
        app(one_by_one(sys.argv[1:]), standalone_mode=True)
    except Exception as error:
        progress.stop()
        # safetensors has an error of its own for a full disk or a damaged file; importing it here would cost every call
        users = isinstance(error, USER_ERRORS) or type(error).__name__ == "SafetensorError"
        # CPython's own import ends in a SystemError where memory runs out
        starved = isinstance(error, SystemError) or (isinstance(error, MemoryError) and not error.args)
        if os.environ.get("KVPIPE_TRACEBACK", "0") not in ("", "0") or not (users or starved):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        kind = type(error).__name__
        if starved:
            kind, message = (
                "MemoryError",
                "this process may not have more memory (ulimit -v, or the job's limit); raise it",
            )
        typer.secho(printable(f"{kind}: {message}"), fg="red", err=True)
        say("(set KVPIPE_TRACEBACK=1 for the traceback)", err=True)
        if starved:  # what Python does at its end needs memory too
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(1)
        raise SystemExit(1) from None
    finally:
        progress.stop()
