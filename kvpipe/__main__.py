"""`python -m kvpipe`, and the command `kvpipe`."""

import os
import sys


def main() -> None:
    """Run the command line; an interruption is one line, also while it is imported."""
    try:
        server = os.environ.get("KVPIPE_SERVER", "")
        if sys.argv[1:2] == ["serve"]:
            from kvpipe.cli.server import serve

            serve(sys.argv[2])  # goes on in a child, with that one's command line
        elif os.sep in server:
            from kvpipe.cli.server import delegate

            delegate(server)
        try:
            from kvpipe.cli.app import main as run
        except ModuleNotFoundError as error:  # the system's Python, most often
            if (error.name or "").startswith("kvpipe"):
                raise
            print(
                f"{sys.executable} has no package {error.name}: activate the environment that kvpipe is installed in "
                "(`. .venv/bin/activate`, which `make install` makes)",
                file=sys.stderr,
            )
            sys.exit(1)
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
