"""The command line: `kvpipe <step>` (or `python -m kvpipe <step>`), and errors in one line."""

from __future__ import annotations

import os
import sys

import typer

from kvpipe.cli import steps, use
from kvpipe.cli.options import say
from kvpipe.config import ConfigError
from kvpipe.config.errors import printable

# what a user can put right is told without a traceback
USER_ERRORS = (ConfigError, OSError, KeyError, ValueError, RuntimeError, ArithmeticError, ImportError, MemoryError)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distil the KV caches of several teacher models into one student, and measure whether it helped.",
)
for _panel, _commands in (("Use", use.COMMANDS), ("Steps, called by the rules", steps.COMMANDS)):
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_panel)(_command)


def main() -> None:
    """Entry point: errors that a user can put right are one message and exit status 1."""
    try:
        app(standalone_mode=True)
    except Exception as error:
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
