"""Model folders: where they come from, how they are loaded, what they say of a text."""

from importlib import import_module

# imported when asked for: torch takes seconds
_HOME = {
    "load_model": "kvpipe.models.folders",
    "load_tokenizer": "kvpipe.models.folders",
}


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
