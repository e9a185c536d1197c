"""Tables of the runs on real weights, from the cells under docs/real/cells: one row per arm, as Markdown.

Seconds and gigabytes are a cell's own, on whatever machine made it and beside whatever ran there.

python tools/real_tables.py docs/real/cells/tune-a docs/real/cells/a
"""

from __future__ import annotations

import json
import sys
from math import log
from pathlib import Path

import pandas as pd


def cells(folder: Path) -> pd.DataFrame:
    """One row per cell: the last validation loss, steps and rate; with scores, bits per byte from each kind of cache."""
    rows = []
    for made in sorted(folder.glob("*/seed*/made.json")):
        lines = [json.loads(line) for line in (made.parent / "history.jsonl").read_text("utf-8").splitlines()]
        losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
        row = {"arm": made.parents[1].name, "seed": int(made.parent.name.removeprefix("seed"))}
        row |= {"steps": lines[-1]["step"], "learning rate": max(x.get("learning_rate", 0) for x in lines)}
        row |= {"validation, nats": losses[-1]}
        cost = json.loads((made.parent / "cost.json").read_text("utf-8"))
        row |= {"s a step": cost["train_seconds"] / cost["steps"], "GB": cost["peak_memory_bytes"] / 1e9}
        if (made.parent / "items.csv").is_file():
            items = pd.read_csv(made.parent / "items.csv")
            nats = {name.removeprefix("nll"): items[name].sum() for name in items if name.startswith("nll")}
            row |= {"accuracy": items.correct.mean()} if items.correct.notna().all() else {}
            row["bits per byte"] = nats[""] / log(2) / items.bytes.sum()
            for name in ("_swap", "_swap_ridge", "_no_prompt"):
                if name in nats:
                    row[f"bits{name.replace('_', ' ')}"] = nats[name] / log(2) / items.bytes.sum()
            if "_swap" in nats:
                told = nats["_no_prompt"] - nats[""]
                row["kept"] = (nats["_no_prompt"] - nats["_swap"]) / told
                row["kept, ridge"] = (nats["_no_prompt"] - nats["_swap_ridge"]) / told
        rows.append(row)
    return pd.DataFrame(rows)


def main(folders: list[str]) -> None:
    """Print a table of each folder: means over seeds."""
    for folder in map(Path, folders):
        found = cells(folder)
        if not len(found):
            print(f"\n{folder}: no cells")
            continue
        seeds = found.groupby("arm").seed.apply(lambda s: ", ".join(map(str, sorted(s))))
        table = found.drop(columns="seed").groupby("arm").mean().assign(seeds=seeds).reset_index()
        print(f"\n{folder.name}\n")
        print("| " + " | ".join(table.columns) + " |\n" + "|---" * len(table.columns) + "|")
        for row in table.itertuples(index=False):
            print("| " + " | ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
