"""kvpipe: distil the key/value caches of several teacher language models into one student."""

__version__ = "0.1.0"
