"""The student's model card, from what lies in the results; and its way to the hub.

A card is written when the cell is trained and has no metrics then: those exist after the statistics. `kvpipe card` writes
it again, and `kvpipe publish` sends the card as it is at that moment. Scores carry the digest of the model that they are
of; a card shows those of exactly its own.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from kvpipe.config import LOSS_ON, Arm, HubData
from kvpipe.config.errors import printable
from kvpipe.experiment.files import GB, folder_digest, write_text
from kvpipe.experiment.paths import ARMS, CONTRASTS, COST, SPLITS, STUDENT, Paths
from kvpipe.experiment.plan import Dag
from kvpipe.experiment.steps import Train
from kvpipe.models import hub

METRICS = {
    "bits_per_byte": "bits per byte",
    "log_perplexity": "log perplexity (nats per token)",
    "accuracy": "accuracy",
}
"""Metrics of `stats/arms.csv` that a card shows: those of the model, not of its training."""
SEVERAL = "licences-of-student-and-teachers"


_MARKS = re.compile(r"[\\`*_\[\]<>|~#!&$]")


def escaped(text: object) -> str:
    """Text in Markdown that means itself: names and data can bring neither marks nor HTML, and stay on their line."""
    return _MARKS.sub(r"\\\g<0>", printable(" ".join(str(text).splitlines())))


# ---------------------------------------------------------------- what is known of a model
def _manifest(paths: Paths, name: str) -> dict[str, Any]:
    path = paths.manifest(name)
    return json.loads(path.read_text(encoding="utf-8"))["source"] if path.is_file() else {}


def origin(dag: Dag, paths: Paths, name: str) -> str:
    """Where a model is from, in words; folders by their last name only, a card is for other machines."""
    source = _manifest(paths, name)
    match source.get("source"):
        case "hub":
            return f"{source['repo']} at {source['commit']}"
        case "local":
            return f"local folder {Path(source['path']).name}"
        case "random":
            return f"random weights in the architecture of {source['like']}"
        case "pretrain":
            return "pretrained by kvpipe"
        case _:
            return f"source {dag.config.models[name].source}"


def license_of(dag: Dag, paths: Paths, name: str) -> str | None:
    """The licence that a model's repository, or the card in its folder, names; None for one that kvpipe made."""
    source = _manifest(paths, name)
    if source.get("source") == "random":
        return license_of(dag, paths, source["like"])
    card = paths.model(name) / "README.md"
    if "license" in source or not card.is_file():
        return source.get("license")
    from huggingface_hub import metadata_load

    return (metadata_load(card) or {}).get("license")


def _licences(dag: Dag, paths: Paths, arm: Arm) -> dict[str, str | None]:
    """Model → licence, of the teachers and of a student with weights of its own."""
    made_here = dag.config.models[dag.config.student].source in ("scratch", "pretrain")
    return {n: license_of(dag, paths, n) for n in ([] if made_here else [dag.config.student]) + arm.teachers}


# ---------------------------------------------------------------- the card
def card(dag: Dag, paths: Paths, arm_name: str, cell: Path) -> str:
    """The README.md of a trained cell's model.

    Args:
        dag: the experiment.
        paths: its results: manifests of the models, splits, and statistics where they exist.
        arm_name: the arm.
        cell: folder of the cell, with its `cost.json`.

    Raises:
        ValueError: the cell was trained under another arm, whose teachers and licences are not those of `arm_name`, or
            under other settings than the configuration has now.
    """
    arm = dag.arm(arm_name)
    cost = json.loads((cell / COST).read_text(encoding="utf-8"))
    provenance = cost["provenance"]
    if provenance["arm"] != arm_name:
        raise ValueError(f"{cell} was trained under the arm {provenance['arm']!r}: --arm {provenance['arm']}")
    settings = cost.get("settings")
    if settings is not None and settings != Train(dag, paths).depends(arm=arm_name):
        raise ValueError(
            f"{cell} was trained under other settings than the configuration has now for the arm {arm_name!r}: give the "
            "configuration that it was trained with, or train it again"
        )
    digest = folder_digest(cell / STUDENT)
    licences = _licences(dag, paths, arm)
    parts = [
        _front_matter(dag, paths, arm, licences),
        f"# {arm_name}, seed {provenance['seed']}\n",
        f"A student trained by kvpipe under the arm `{arm_name}`{f': {escaped(arm.label)}' if arm.label else ''}. It loads with "
        "`AutoModelForCausalLM.from_pretrained` and needs nothing of kvpipe.\n",
        "## Models\n",
        _models(dag, paths, arm, licences),
        "## Training data\n",
        _data(dag, paths),
        "## Training\n",
        f"{cost['steps']} steps, {cost['tokens']:,} student tokens. Settings of the arm:\n",
        f"```yaml\n{yaml.safe_dump(arm.model_dump(exclude={'role', 'label'}), sort_keys=False)}```\n",
        "## Results\n",
        _results(paths, arm, dag.config.control, provenance, digest),
        "## Provenance\n",
        _provenance(provenance, digest, cost.get("model", {})),
    ]
    return "\n".join(parts)


def write_card(dag: Dag, paths: Paths, arm_name: str, cell: Path) -> Path:
    """Write the card into the cell's model folder."""
    path = cell / STUDENT / "README.md"
    write_text(path, card(dag, paths, arm_name, cell))
    return path


def _front_matter(dag: Dag, paths: Paths, arm: Arm, licences: dict[str, str | None]) -> str:
    from huggingface_hub import ModelCardData

    known = {licence for licence in licences.values() if licence}
    student = _manifest(paths, dag.config.student)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=student.get("repo"),
        license="other" if len(known) > 1 else next(iter(known), None),
        license_name=SEVERAL if len(known) > 1 else None,
        datasets=[repo for source in dag.config.data.sources if (repo := _repo(source))] or None,
        tags=["kvpipe", "knowledge-distillation"] if arm.teachers else ["kvpipe"],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _models(dag: Dag, paths: Paths, arm: Arm, licences: dict[str, str | None]) -> str:
    names = {"student": dag.config.student} | {f"teacher {i + 1}": name for i, name in enumerate(arm.teachers)}
    rows = [
        f"| {role} | {escaped(name)} | {escaped(origin(dag, paths, name))} | {escaped(licences.get(name) or 'not stated')} |"
        for role, name in names.items()
    ]
    table = "| | name | origin | licence |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    if any(licences.values()):
        table += "\nThe terms of every licence in the table carry over to this model.\n"
    return table


def _repo(source: Any) -> str | None:
    """The data set's repository, for a source that has one and is no folder of this machine."""
    return source.repo if isinstance(source, HubData) and not source.is_folder else None


def _data(dag: Dag, paths: Paths) -> str:
    commits = _commits(paths)
    sources = "\n".join(
        f"- {escaped(source.task)}: {escaped(_repo(source) or source.kind)}{escaped(commits.get(source.task, ''))}"
        for source in dag.config.data.sources
    )
    counts = []
    for split in SPLITS:
        if paths.data(split).is_file():
            tasks = pd.read_parquet(paths.data(split), columns=["task"]).task.value_counts(sort=False)
            counts.append(f"| {split} | " + ", ".join(f"{n:,} {escaped(task)}" for task, n in tasks.items()) + " |")
    sources += f"\n- cross-entropy on {LOSS_ON[dag.config.train.loss_on]}"
    return f"{sources}\n\n| split | records |\n|---|---|\n" + "\n".join(counts) + "\n"


def _commits(paths: Paths) -> dict[str, str]:
    """Task → the commits of its data set, as the data step found them; files and embedded tasks have none."""
    path = paths.sources
    found: dict[str, list[str]] = {}
    for origin in json.loads(path.read_text(encoding="utf-8"))["sources"] if path.is_file() else []:
        if "commit" in origin and origin["commit"] not in found.setdefault(origin["task"], []):
            found[origin["task"]].append(origin["commit"])
    return {task: f" at {', '.join(commits)}" for task, commits in found.items()}


def _results(paths: Paths, arm: Arm, control: str, provenance: dict[str, Any], digest: str) -> str:
    """Scores of this very model, and of its arm where it was one of those that the statistics are of."""
    name, seed = provenance["arm"], provenance["seed"]
    own, means = _read(paths.arm_table(name), "model"), _read(paths.stats / ARMS, "models")
    scored = len(own[own.seed == seed]) + len(means[means.arm == name]) > 0
    own = own[(own.seed == seed) & (own.model == digest)].set_index("task")
    means = means[(means.arm == name) & means.metric.isin(list(METRICS)) & means.models.str.contains(digest, na=False)]
    means = means.set_index(["metric", "task"])
    if own.empty and means.empty:
        again = f" The scores in the results are of other weights than these ({digest})." if scored else ""
        return f"Not evaluated yet.{again}\n"
    rows = dict.fromkeys([*means.index, *((metric, task) for metric in METRICS for task in own.index)])
    lines = []
    for metric, task in rows:
        value = own[metric].get(task, np.nan)
        found = f"{value:.4g}" if np.isfinite(value) else "–"
        if (metric, task) in means.index:
            mean = means.loc[metric, task]
            lines.append(
                f"| {METRICS[metric]} | {escaped(task)} | {found} | {mean['mean']:.4g} ({mean.low:.4g}, {mean.high:.4g}) |"
            )
        elif found != "–":
            lines.append(f"| {METRICS[metric]} | {escaped(task)} | {found} | – |")
    text = "On held-out items: this model"
    if not means.empty:
        count = f"{int(means.n_seeds.max())} seeds (this model is one of them) and {int(means.n_items.max()):,} items"
        text += f", and mean and interval of its arm over {count}"
    text += ":\n\n| metric | task | this model | arm (interval) |\n|---|---|---|---|\n" + "\n".join(lines) + "\n"
    path = paths.stats / CONTRASTS
    if arm.teachers and path.is_file() and not means.empty:
        text += _against(control, pd.read_csv(path), name)
    return text


def _read(path: Path, models: str) -> pd.DataFrame:
    """A table with the digests of the models that it is of; without a row where it is not there."""
    columns = ["arm", "seed", "task", "metric", *METRICS, models]
    table = pd.read_csv(path, dtype={models: str}) if path.is_file() else pd.DataFrame(columns=columns)
    return table if models in table else table.assign(**{models: ""})


def _against(control: str, contrasts: pd.DataFrame, arm_name: str) -> str:
    kept = (contrasts.arm == arm_name) & (contrasts.reference == control) & contrasts.metric.isin(list(METRICS))
    lines = [
        f"| {METRICS[row.metric]} | {escaped(row.task)} | {row.estimate:+.4g} ({row.low:+.4g}, {row.high:+.4g}) "
        f"| {row.p_holm:.3g} |"
        for row in contrasts[kept].itertuples()
    ]
    if not lines:
        return ""
    head = "| metric | task | difference | p (Holm) |\n|---|---|---|---|\n"
    return f"\nAgainst {control}, the same student without teachers:\n\n" + head + "\n".join(lines) + "\n"


def _provenance(provenance: dict[str, Any], digest: str, trained: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in provenance["packages"].items() if version)
    said = f", in {trained['dtype']}" if trained else ""
    if trained and trained["digest"] != digest:
        said += f". **Its files were changed after training**, which wrote {trained['digest']}"
    return (
        f"- Model: {digest} (digest of weights, config and tokenizer){said}\n"
        f"- Code: kvpipe, commit {provenance['git_commit']}\n- Configuration: {provenance['config_hash']}\n"
        f"- Packages: {packages}; Python {provenance['python']}\n- Container: {provenance['container'] or 'none'}\n"
    )


# ---------------------------------------------------------------- the hub
def publish(dag: Dag, paths: Paths, arm_name: str, cell: Path, repo: str, private: bool = True, log=print) -> str:
    """Push a trained cell's model to the hub in one commit, with its card as of now; returns the commit's address.

    The folder itself is left as it is. The token comes from HF_TOKEN and must be allowed to write.

    Raises:
        FileNotFoundError: the cell is not trained.
        HubError: no token, no network, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = cell / STUDENT
    if not (folder / "config.json").is_file() or not (cell / COST).is_file():
        raise FileNotFoundError(f"{cell}: no trained model there; train it first (kvpipe train --arm {arm_name})")
    if hub.offline():
        raise hub.HubError(f"publish: HF_HUB_OFFLINE is set. Run this {hub.NETWORK}")
    if not hub.token():
        raise hub.HubError("publish: set HF_TOKEN to a token that may write")
    text = card(dag, paths, arm_name, cell)
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != "README.md"]
    files = [path for path in files if not path.name.startswith(".")]  # Snakemake's time stamp
    operations = [CommitOperationAdd("README.md", text.encode())]
    operations += [CommitOperationAdd(path.name, path) for path in files]
    api = HfApi(token=hub.token())
    with hub.hub_errors("publish", repo, "main"):
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.create_commit(repo, operations, commit_message=f"{arm_name}, trained by kvpipe")
    log(f"{len(operations)} files to {repo}, {sum(p.stat().st_size for p in files) / GB:.2f} GB: {done.commit_url}")
    return str(done.commit_url)
