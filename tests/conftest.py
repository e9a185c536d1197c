"""Shapes in signatures are executed under test; threads and seeds are fixed for every test; which files take long."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

if not os.environ.get("JAXTYPING_DISABLE"):  # where millions of calls are made (make test-real)
    install_import_hook("kvpipe", "beartype.beartype")

import pytest
import torch

torch.set_num_threads(1)


LONG = {
    "cli": "escapes server",
    "config": "extension",
    "experiment": "memory",
    "models": "hub",
    "preflight": "preflight",
    "report": "report",
    "stats": "tables",
    "steps": "cells direct swap",
    "train": "checkpoint export online shard three_teachers trainer whole_batch",
    "workflow": "submission workflow",
}
"""Folder → files that train whole cells, draw whole pages or start many processes: `make test-long`. They take two thirds of
the time of all tests."""


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    files = {here / folder / f"test_{name}.py" for folder, names in LONG.items() for name in names.split()}
    for item in items:
        if item.path in files:
            item.add_marker(pytest.mark.long)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The shared tiny experiment, see tests/tiny.py: use what is under its results folder, do not change it."""
    from tiny import build

    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def own_accelerator():
    """accelerate keeps device and precision of a process's first training; this test has its own."""
    from tiny import own_accelerator_state

    with own_accelerator_state():
        yield
