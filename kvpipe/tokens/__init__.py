"""Tokenizations of one text, byte by byte."""

from kvpipe import lazily

__getattr__ = lazily(__name__, encode="spans", overlap="matrix")
