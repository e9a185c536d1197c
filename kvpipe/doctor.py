"""What would fail, said before the first job starts, with the fix."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from kvpipe.config import Config, HubModel, LocalModel
from kvpipe.dag import Paths
from kvpipe.provenance import describe

GB = 1e9
LEAST_FREE = 2 * GB


@dataclass(frozen=True)
class Finding:
    """One check: `ok`, `warning` or `would fail`, and what to do."""

    name: str
    status: str
    detail: str
    fix: str = ""


def examine(config: Config, paths: Paths) -> list[Finding]:
    """The cheap checks, in seconds: packages, disk, model folders."""
    paths.root.mkdir(parents=True, exist_ok=True)
    return [*_packages(config), _disk(paths), *_models(config)]


def _packages(config: Config) -> list[Finding]:
    found = describe()["packages"]
    missing = [name for name, version in found.items() if version is None]
    if config.train.lora is not None and importlib.util.find_spec("peft") is None:
        missing.append("peft")
    if missing:
        fix = "pip install -r requirements.lock"
        return [Finding("packages", "would fail", f"not installed: {', '.join(missing)}", fix)]
    return [Finding("packages", "ok", ", ".join(f"{name} {version}" for name, version in found.items()))]


def _disk(paths: Paths) -> Finding:
    free = shutil.disk_usage(paths.root).free
    detail = f"{free / GB:.1f} GB free under {paths.root}"
    if free < LEAST_FREE:
        return Finding("disk", "warning", detail, f"free some space: {LEAST_FREE / GB:.0f} GB is the least to expect")
    return Finding("disk", "ok", detail)


def _models(config: Config) -> list[Finding]:
    out = []
    for name, model in config.models.items():
        if isinstance(model, LocalModel):
            folder = Path(model.path)
            lacking = [
                pattern
                for pattern in ("config.json", "*.safetensors", "tokenizer.json")
                if not list(folder.glob(pattern))
            ]
            fix = "set source: pretrain" if model.recipe else f"correct models.{name}.path"
            out.append(
                Finding(f"model {name}", "would fail", f"{folder} has no {', '.join(lacking)}", fix)
                if lacking
                else Finding(f"model {name}", "ok", f"{folder} is complete")
            )
        elif isinstance(model, HubModel):
            out.append(
                Finding(f"model {name}", "ok", f"{model.repo} at {model.revision}, downloaded by the models step")
            )
    return out


def write(findings: list[Finding], out: Path) -> None:
    """The findings as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"findings": [asdict(f) for f in findings]}, indent=2) + "\n", encoding="utf-8")
