"""Shapes in signatures are executed under test; threads and seeds are fixed for every test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

if not os.environ.get("JAXTYPING_DISABLE"):  # where millions of calls are made (make test-real)
    install_import_hook("kvpipe", "beartype.beartype")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The shared tiny experiment, see tests/tiny.py: use what is under its results folder, do not change it."""
    from tiny import build

    return build(tmp_path_factory.mktemp("tiny"))
