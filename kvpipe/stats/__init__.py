"""Metrics, intervals, contrasts, tables, audit."""

from importlib import import_module

# imported when asked for: torch takes seconds
_HOME = {
    "crossed_bootstrap": "kvpipe.stats.bootstrap",
    "adjust": "kvpipe.stats.bootstrap",
}


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
