"""kvpipe and lm-evaluation-harness over the same items of one model: `python tools/agreement.py` prints docs/evaluation.md's
table.

The items are the embedded experiment's test split (its problems, four numbers to choose from, and its texts), the model a
shipped teacher. Everything is local.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from kvpipe.config import EvaluateConfig, Template
from kvpipe.data.corpus import generate
from kvpipe.data.records import Record
from kvpipe.evaluate.choices import chosen
from kvpipe.evaluate.harness import run_tasks
from kvpipe.evaluate.score import evaluate_model
from kvpipe.models.folders import load_model, load_tokenizer
from kvpipe.models.likelihood import windowed_nll

ROOT = Path(__file__).parent.parent
# A prompt must not end in white space: the harness moves that to the continuation and scores it
TEXT = {"prompt": "{prompt}", "reasoning": "\n{reasoning}", "answer": "\n#### {answer}"}
PLAIN = {"prompt": "{prompt}", "reasoning": "{reasoning}", "answer": "{answer}"}
TEMPLATE = Template(
    tasks={"solve": TEXT, "score": TEXT, "pick": {**TEXT, "reasoning": "", "answer": "\n#### {answer}"}, "text": PLAIN}
)
SETTINGS = EvaluateConfig(
    batch_size=8,
    tasks={
        "solve": {"max_new_tokens": 40, "stop": ["\n\n"]},
        "score": {"scorer": "none"},
        "pick": {"scorer": "choice"},
        "text": {"scorer": "none"},
    },
    lm_eval_tasks=["kvpipe_solve", "kvpipe_score", "kvpipe_pick", "kvpipe_text"],
)
WHOLE = "\n{{reasoning}}\n#### {{answer}}"
COMMON = {"dataset_path": "json", "test_split": "test", "target_delimiter": "", "num_fewshot": 0}
LAST_MATCH = {"function": "regex", "regex_pattern": r"####\s*(.+)", "group_select": -1}
TASKS = {
    "solve": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 40, "do_sample": False},
        "filter_list": [{"name": "answer", "filter": [LAST_MATCH, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "regexes_to_ignore": [",", "\\$", "%"]}],
    },
    "score": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": WHOLE,
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "pick": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}\n####",
        "target_delimiter": " ",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{choices.index(answer)}}",  # a text that is a number would be taken for the place
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "acc_bytes"}],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{reasoning}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    },
}  # fmt: skip


def items(count: int) -> list[Record]:
    """`count` problems of each embedded task, in four forms."""
    base = [record for task in ("math", "code") for record in generate(task, "test", count, 2, 0)]
    out = []
    for number, record in enumerate(base):
        choices = [str((int(record.answer) + 3 * i + number) % 10) for i in range(4)]
        if record.answer not in choices:
            choices[number % 4] = record.answer
        whole = f"{record.prompt}\n{record.reasoning}\n#### {record.answer}"
        out += [
            replace(record, id=f"solve-{number}", task="solve"),
            replace(record, id=f"score-{number}", task="score"),
        ]
        out.append(replace(record, id=f"pick-{number}", task="pick", choices=tuple(choices)))
        out.append(Record(f"text-{number}", "text", "", whole, ""))
    return out


def write_tasks(folder: Path, records: list[Record]) -> None:
    """Task files of the harness and their items."""
    for name, settings in TASKS.items():
        path = folder / f"{name}.jsonl"
        rows = [asdict(record) for record in records if record.task == name]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        document = {
            "task": f"kvpipe_{name}",
            **COMMON,
            "dataset_kwargs": {"data_files": {"test": str(path)}},
            **settings,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def compare(folder: Path, count: int) -> pd.DataFrame:
    """One row per comparison: what is compared, items, both figures, items that differ, the largest difference."""
    records = items(count)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ours = evaluate_model(model, tokenizer, records, TEMPLATE, SETTINGS)
    with tempfile.TemporaryDirectory() as tasks:
        write_tasks(Path(tasks), records)
        theirs = run_tasks(folder, SETTINGS.model_copy(update={"lm_eval_folder": tasks}), "cpu")
    rows = []

    def add(what: str, own, other) -> None:
        own, other = np.asarray(own, float), np.asarray(other, float)
        gap = np.abs(own - other)
        rows.append(
            {
                "compared": what,
                "items": len(own),
                "kvpipe": own.mean(),
                "lm_eval": other.mean(),
                "items that differ": int((gap > 1e-3).sum()),
                "largest difference": gap.max(),
            }
        )

    def values(task: str, metric: str) -> list:
        found = sorted(theirs["items"][f"kvpipe_{task}"], key=lambda item: item["item"])
        return [item["metrics"][metric] for item in found]

    solve, pick = ours[ours.task == "solve"], ours[ours.task == "pick"]
    add("generated answer, exact match", solve.correct, values("solve", "exact_match,answer"))
    add("multiple choice per byte (`acc_bytes`)", pick.correct, values("pick", "acc_bytes,none"))
    asked = [record for record in records if record.task == "pick"]
    best = [
        chosen(nll, record.choices or (), "sum") == record.answer
        for nll, record in zip(pick.choice_nll, asked, strict=True)
    ]
    add("multiple choice as a whole (`acc`)", best, values("pick", "acc,none"))
    score = ours[ours.task == "score"]
    add("nats of reasoning + answer", score.nll, [-value for value in values("score", "perplexity,none")])
    rolling = [-pair[0] for pair in values("text", "bits_per_byte,none")]
    add("nats of plain text behind the harness's prefix token", _after_prefix(model, tokenizer, records), rolling)
    return pd.DataFrame(rows)


def _after_prefix(model, tokenizer, records: list[Record]) -> list[float]:
    """Nats of all tokens of the texts behind BOS, or the end-of-text token where there is none: what the harness counts."""
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    texts = [record.reasoning for record in records if record.task == "text"]
    return [windowed_nll(model, np.array([prefix, *tokenizer(text).input_ids]), 512, 512).sum() for text in texts]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, nargs="+", default=[ROOT / "config/embedded/math", ROOT / "config/embedded/code"]
    )
    parser.add_argument("--items", type=int, default=100, help="items of each embedded task")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | compared | items | kvpipe | lm_eval | items that differ | largest difference |")
    print("|---|---|---|---|---|---|---|")
    for folder in arguments.model:
        for row in compare(folder, arguments.items).itertuples(index=False):
            what, count, own, other, differ, gap = row
            print(f"| {folder.name} | {what} | {count} | {own:.4f} | {other:.4f} | {differ} | {gap:.1e} |")


if __name__ == "__main__":
    main()
