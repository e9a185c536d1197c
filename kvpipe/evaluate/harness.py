"""lm-evaluation-harness on a model folder: the package `lm_eval`, an optional extra, driven from the configuration."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from kvpipe.config import EvaluateConfig
from kvpipe.models.folders import load_model, load_tokenizer

SHOWN = ("alias", "name", "sample_len", "samples")
"""Entries of the harness's results that are no metrics."""


def run_tasks(folder: Path, config: EvaluateConfig, device: str, trust: bool = False) -> dict[str, Any]:
    """Metrics per task, and every item's.

    Returns `{"lm_eval": version, "limit": …, "tasks": {task: {"items": n, "metrics": {"acc,none": …}}}, "items": {task:
    [{"item": number in the task, "metrics": {…}, "target": …, "answer": …}]}}`; a metric's name is followed by the filter
    that it was taken after, as in the harness. Code in the folder runs with `trust` only.

    Raises:
        ModuleNotFoundError: `lm_eval` is not installed.
        ValueError: no tasks are configured, or one that nobody knows.
    """
    if not config.lm_eval_tasks:
        raise ValueError("evaluate.lm_eval_tasks is empty: name the tasks")
    if importlib.util.find_spec("lm_eval") is None:
        raise ModuleNotFoundError('evaluate.lm_eval_tasks needs the package lm_eval: pip install "kvpipe[lm-eval]"')
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder_of_tasks, tasks = config.lm_eval_folder, config.lm_eval_tasks
    # reading the package's thousands of task files takes longer than many a task: only where one of them is asked for
    manager = TaskManager(include_path=folder_of_tasks, include_defaults=folder_of_tasks is None)
    if folder_of_tasks is not None and not all(manager.match_tasks([task]) for task in tasks):
        manager = TaskManager(include_path=folder_of_tasks)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        place = f" or in {folder_of_tasks}" if folder_of_tasks else "; set evaluate.lm_eval_folder for your own"
        raise ValueError(
            f"evaluate.lm_eval_tasks: no task {', '.join(unknown)} in lm_eval {lm_eval.__version__}{place}"
        )
    # loaded here: the package would draw missing weights at random, and build a tokenizer by the model's type
    model = HFLM(
        pretrained=load_model(folder, dtype=torch.float32, device=device, trust=trust),
        tokenizer=load_tokenizer(folder, trust),
        batch_size=config.batch_size,
    )
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        limit=config.lm_eval_limit,
        bootstrap_iters=0,  # intervals are a matter of the statistics step, over seeds and items
        confirm_run_unsafe_code=False,
    )
    assert found is not None
    return {
        "lm_eval": lm_eval.__version__,
        "limit": config.lm_eval_limit,
        "tasks": {task: _metrics(values, found["samples"].get(task, [])) for task, values in found["results"].items()},
        "items": {task: [_item(sample) for sample in samples] for task, samples in found["samples"].items()},
    }


def _metrics(values: dict[str, Any], samples: list[dict]) -> dict[str, Any]:
    metrics = {k: v for k, v in values.items() if k not in SHOWN and "_stderr" not in k and isinstance(v, int | float)}
    return {"items": len({sample["doc_id"] for sample in samples}), "metrics": metrics}


def _item(sample: dict[str, Any]) -> dict[str, Any]:
    suffix = sample.get("filter", "none")
    return {
        "item": sample["doc_id"],
        "metrics": {f"{name},{suffix}": sample[name] for name in sample["metrics"]},
        "target": sample["target"],
        "answer": sample["filtered_resps"],
    }
