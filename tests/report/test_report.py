"""The report: says what the tables say, shows what is missing, and is one self-contained, escaped, repeatable file."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from kvpipe import steps
from kvpipe.cell import Workspace
from kvpipe.config import load
from kvpipe.dag import Paths

ROOT = Path(__file__).parents[2]
METRICS = ["bits_per_byte", "log_perplexity", "accuracy", "tokens_to_control"]
COST = ["train_seconds", "peak_memory_bytes"]
CONTROL = {
    "bits_per_byte": 0.6,
    "log_perplexity": 0.9,
    "accuracy": 0.35,
    "tokens_to_control": 5e5,
    "train_seconds": 30.0,
    "peak_memory_bytes": 1.1e9,
}
EFFECT = {"experiment": -0.25, "null": 0.0, "baseline": -0.08, "control": 0.0, "ablation": -0.1}


def workspace(root: Path, overrides: tuple[str, ...] = ()) -> Workspace:
    sources = "[{kind: embedded, task: math, train: 40, validation: 9, test: 11}, {kind: embedded, task: code, train: 40, validation: 9, test: 11}]"
    settings = [f"data.sources={sources}", f"models.math.path={ROOT}/config/embedded/math", *overrides]
    settings.append(f"models.code.path={ROOT}/config/embedded/code")
    return Workspace(load(ROOT / "config/config.yaml", settings), Paths(root))


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def fake_results(work: Workspace, text: str = "Ann has 3 & buys 4.\n#### 7\n") -> None:
    """Real data and models; all later artefacts invented, in the formats of the steps that write them."""
    rng = np.random.default_rng(5)
    if not work.paths.data("train").is_file():
        steps.make_data(work)
        for name in ("student", "math", "code"):
            steps.make_model(work, name)
    for random, like in (("math-random", "math"), ("code-random", "code")):
        shutil.copytree(work.paths.model(like), work.paths.model(random), dirs_exist_ok=True)
    fake_stats(work)
    ids = {r.id: r for r in work.records("test")}
    for arm, seed in work.dag.cells:
        fake_cell(work, arm, seed, rng)
        fake_items(work.paths.items(arm, seed), ids, rng, text)
    for teacher in work.dag.teachers:
        fake_items(work.paths.teacher_quality(teacher), ids, rng, text)
        layers = {"math": 4, "code": 5}[teacher.removesuffix("-random")]
        similarity = {kind: rng.uniform(0, 0.9, (3, layers)).tolist() for kind in ("keys", "values")}
        document = {"teacher": teacher, "src_layers": layers, "dst_layers": 3, "rows": 50, "similarity": similarity}
        write_json(work.paths.layer_map(teacher), document)
        index = {"bytes_per_token": 1220.4, "rows": 1144, "attention_cosine": 0.999982, "shards": []}
        index["key"] = {"dtype": "bf16", "layers": list(range(layers))}
        write_json(work.paths.store(teacher, "student") / "index.json", index)
    for fit_id, arm in work.dag.fits.items():
        variance = {t: {k: rng.uniform(0.5, 1, 3).tolist() for k in ("keys", "values")} for t in arm.teachers}
        document = {"fit": work.dag.fit_spec(arm), "rows": 99, "explained_variance": variance}
        write_json(work.paths.projector(fit_id).parent / f"{fit_id}.json", document)
    check = {"name": "leakage", "status": "ok", "detail": "0 of 22 test items in train"}
    write_json(work.paths.root / "audit.json", {"checks": [check]})
    finding = {"name": "disk", "status": "would fail", "detail": "1 GB free", "fix": "df -h"}
    write_json(work.paths.root / "doctor.json", {"findings": [finding]})


def fake_stats(work: Workspace, effect: dict[str, float] | None = None, nan: tuple[str, str] | None = None) -> None:
    """`effect`: arm → shift of its score (negative is better); others by role. `nan`: (arm, metric) without value."""
    shift = {name: EFFECT[arm.role] for name, arm in work.dag.arms.items()} | {"untrained": 3.0} | (effect or {})
    shift |= {} if "misaligned" in (effect or {}) else {"misaligned": 0.2}
    tasks = ["all", *(source.task for source in work.config.data.sources)]
    for folder, metrics in ((work.paths.stats, METRICS), (work.paths.cost, COST)):
        arms, contrasts = [], []
        for metric in metrics:
            sign = -1 if metric == "accuracy" else 1
            for task in tasks if folder == work.paths.stats and metric != "tokens_to_control" else ["all"]:
                for arm in ["untrained", *work.dag.arms]:
                    if arm == "untrained" and metric not in METRICS[:3]:
                        continue
                    mean = CONTROL[metric] * (1 + sign * shift[arm])
                    mean = math.nan if (arm, metric) == nan else max(mean, 0.0)
                    arms.append([arm, metric, task, mean, mean * 0.96, mean * 1.04, 3, 22])
                pairs = [(a, "control") for a in work.dag.arms if a != "control"]
                pairs += [(a, "exp1") for a in ("exp2", "exp3", "exp4", "exp5", "exp6", "full")]
                for arm, reference in pairs:
                    d = sign * CONTROL[metric] * (shift[arm] - shift[reference])
                    d = math.nan if (arm, metric) == nan else d
                    w = 0.03 * CONTROL[metric]
                    p = 0.0002 if abs(d) > 1.6 * w else 0.4
                    row = [arm, reference, metric, task, d, d - w, d + w, d - 1.6 * w, d + 1.6 * w, p]
                    contrasts.append([*row, min(1, 20 * p), min(1, 14 * p), -1.2, 0.04 * CONTROL[metric], 3, 22])
        folder.mkdir(parents=True, exist_ok=True)
        columns = ["arm", "metric", "task", "mean", "low", "high", "n_seeds", "n_items"]
        pd.DataFrame(arms, columns=columns).to_csv(folder / "arms.csv", index=False)
        columns = [
            "arm",
            "reference",
            "metric",
            "task",
            "estimate",
            "low",
            "high",
            "low_corrected",
            "high_corrected",
            "p",
        ]
        columns += ["p_bonferroni", "p_holm", "effect_size", "mde", "n_seeds", "n_items"]
        pd.DataFrame(contrasts, columns=columns).to_csv(folder / "contrasts.csv", index=False)


def fake_cell(work: Workspace, arm_name: str, seed: int, rng: np.random.Generator) -> None:
    arm, folder = work.dag.arms[arm_name], work.paths.cell(arm_name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    final = 0.9 * (1 + EFFECT[arm.role] * (arm_name != "null-control")) + rng.uniform(0, 0.04)
    lines = []
    for step in range(0, 401, 25):
        loss = final + 5 * math.exp(-step / 60) + rng.uniform(0, 0.02)
        lines.append({"step": step, "tokens": 1250 * step, "validation_loss": loss})
        if step:
            weights = rng.dirichlet(np.ones(len(arm.teachers))) * 0.95 if arm.teachers else []
            weight = {
                f"weight/{t}/{m}": w for t in ("math", "code") for m, w in zip(arm.teachers, weights, strict=True)
            }
            lines.append({"step": step, "tokens": 1250 * step, "ce": loss, "grad_norm": 1.0, **weight})
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    provenance = {"git_commit": "abc123", "packages": {"torch": "2.13.0"}, "python": "3.11", "container": None}
    provenance |= {"arm": arm_name, "seed": seed, "host": "node1", "device": "cpu", "config_hash": "591f1e78"}
    cost = {"train_seconds": 30.5, "peak_memory_bytes": 1.2e9, "steps": 400, "tokens": 502598, "padding_share": 0.004}
    write_json(folder / "cost.json", {**cost, "restarts": 0, "provenance": provenance})


def fake_items(path: Path, records: dict, rng: np.random.Generator, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"id": i, "task": r.task, "nll": rng.uniform(5, 20), "tokens": 30, "bytes": 60, "correct": bool(rng.integers(2)),
         "prediction": "7", "text": text, "reference": r.answer}
        for i, r in records.items()
    ]  # fmt: skip
    pd.DataFrame(rows).to_parquet(path)
