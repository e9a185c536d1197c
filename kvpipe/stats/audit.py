"""Fairness audit: is the comparison between arms one of like with like, and is no test item in train?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from kvpipe.config import Config, LocalModel, PretrainModel
from kvpipe.data.corpus import pretraining_records
from kvpipe.data.leakage import leaks
from kvpipe.data.records import read_records
from kvpipe.experiment.files import write_json
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.plan import Dag


class AuditFailure(RuntimeError):
    """A breach that the configuration does not allow."""


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    status: str
    detail: str


def audit(config: Config, paths: Paths, out: Path) -> list[Check]:
    """Run all checks and write them to a JSON file.

    Raises:
        AuditFailure: a breach not named in `audit.allow`; the file is written all the same.
    """
    dag = Dag(config)
    checks = [*_leakage(config, paths), *_budgets(config, dag, paths), *_items(dag, paths)]
    allowed = {
        check: Check(check.name, "allowed", check.detail)
        for check in checks
        if check.status == "breach" and check.name in config.audit.allow
    }
    checks = [allowed.get(check, check) for check in checks]
    write_json(out, {"checks": [asdict(c) for c in checks]})
    breaches = [check for check in checks if check.status == "breach"]
    if breaches:
        lines = "\n".join(f"  {check.name}: {check.detail}" for check in breaches)
        raise AuditFailure(
            f"the comparison between arms is not fair:\n{lines}\n"
            "correct it, or name the check in audit.allow to report it and go on"
        )
    return checks


# ---------------------------------------------------------------- leakage
def _leakage(config: Config, paths: Paths) -> Iterator[Check]:
    test = read_records(paths.data("test"))
    sources = {"the training split": read_records(paths.data("train"))}
    for name, model in config.models.items():
        if isinstance(model, LocalModel | PretrainModel) and model.recipe is not None:
            short, own = pretraining_records(model.recipe, config.data)
            sources[f"teacher {name}'s training examples"] = short + own
    for name, records in sources.items():
        found = leaks(records, test, config.data.ngram)
        detail = f"{len(test)} test items against {len(records)} of {name}: "
        if found:
            shown = ", ".join(f"{leak.test} ({leak.reason})" for leak in found[:3])
            yield Check("leakage", "breach", f"{detail}{len({leak.test for leak in found})} occur there, e.g. {shown}")
        else:
            yield Check("leakage", "ok", f"{detail}none shares its content or a {config.data.ngram}-gram")


# ---------------------------------------------------------------- equal budgets, items, seeds
def _budgets(config: Config, dag: Dag, paths: Paths) -> Iterator[Check]:
    costs = {
        (arm, seed): json.loads(paths.cost(arm, seed).read_text(encoding="utf-8"))
        for arm, seed in dag.cells
        if paths.cost(arm, seed).is_file()
    }
    # arms that ask for another budget (control given more time, or texts without reasoning) are compared among themselves
    asked = {name: (arm.step_factor, arm.student_reasoning) for name, arm in dag.arms.items()}
    groups = {b: [cost for (arm, _), cost in costs.items() if asked[arm] == b] for b in sorted(set(asked.values()))}
    steps = {b: sorted({cost["steps"] for cost in group}) for b, group in groups.items() if group}
    found = "; ".join(
        f"{found} optimizer steps in {len(groups[b])} cells"
        + (f" of {b[0]:g} times the budget" if b[0] != 1 else "")
        + (f" with {b[1]} reasoning" if b[1] != "full" else "")
        for b, found in steps.items()
    )
    yield Check("steps", "ok" if all(len(found) == 1 for found in steps.values()) else "breach", found)
    spread, own = 0.0, [name for name, arm in dag.arms.items() if arm.on_policy is not None]
    for budget in groups:
        given = [arm for arm, found in asked.items() if found == budget and arm not in own]
        tokens = pd.Series([cost["tokens"] for (arm, _), cost in costs.items() if arm in given], dtype=float)
        spread = max(spread, float((tokens.max() - tokens.min()) / tokens.median())) if len(tokens) else spread
    yield Check(
        "tokens",
        "ok" if spread <= config.audit.tolerance else "breach",
        f"student tokens per cell of one budget differ by {spread:.2%} at most (allowed {config.audit.tolerance:.0%})"
        + (f"; not compared: {', '.join(own)}, whose texts the student writes" if own else ""),
    )


def _items(dag: Dag, paths: Paths) -> Iterator[Check]:
    ids = {}
    seeds: dict[str, list[int]] = {arm: [] for arm in dag.arms}
    for arm, seed in dag.cells:
        if paths.items(arm, seed).is_file():
            ids[arm, seed] = frozenset(pd.read_parquet(paths.items(arm, seed), columns=["id"]).id)
            seeds[arm].append(seed)
    same = len(set(ids.values())) <= 1
    count = len(next(iter(ids.values()), ()))
    yield Check("items", "ok" if same else "breach", f"{len(ids)} cells scored on the same {count} items: {same}")
    uneven = {arm: found for arm, found in seeds.items() if found != dag.config.seeds}
    yield Check(
        "seeds",
        "breach" if uneven else "ok",
        f"arms without all seeds {dag.config.seeds}: {uneven}" if uneven else f"every arm has seeds {dag.config.seeds}",
    )
