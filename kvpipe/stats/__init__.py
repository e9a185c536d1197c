"""Metrics, intervals, contrasts, tables, audit."""

from kvpipe import lazily

__getattr__ = lazily(__name__, crossed_bootstrap="bootstrap", adjust="bootstrap")
