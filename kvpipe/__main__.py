"""`python -m kvpipe`, and the command `kvpipe`."""

import sys


def main() -> None:
    """Run the command line; an interruption is one line, also while it is imported."""
    try:
        from kvpipe.cli.app import main as run

        run()
    except KeyboardInterrupt:
        pass
    except SystemExit as end:
        if end.code != 130:  # typer's own for an interruption
            raise
    else:
        return
    print("interrupted", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":
    main()
