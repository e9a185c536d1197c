"""`python -m kvpipe`."""

from kvpipe.cli.app import main

if __name__ == "__main__":
    main()
