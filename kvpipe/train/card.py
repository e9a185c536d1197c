"""The student's model card, from what lies in the results; and its way to the hub.

A card is written when the cell is trained and has no metrics then: those exist after the statistics. `kvpipe card` writes
it again, and `kvpipe publish` sends the card as it is at that moment. Scores carry the digest of the model that they are
of; a card shows those of exactly its own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from jinja2 import Environment

from kvpipe.config import LOSS_ON, Arm, HubData
from kvpipe.config.errors import printable
from kvpipe.experiment.files import GB, folder_digest, read_json, write_text
from kvpipe.experiment.paths import ARMS, CONTRASTS, COST, SPLITS, STUDENT, Paths
from kvpipe.experiment.plan import Dag
from kvpipe.experiment.steps import Train
from kvpipe.models import hub
from kvpipe.stats.metrics import METRICS

ON_CARD = {name: metric for name, metric in METRICS.items() if metric.main}
"""What a card shows of the tables: metrics of the model, not of its training."""
SEVERAL = "licences-of-student-and-teachers"


_MARKS = re.compile(r"[\\`*_\[\]<>|~#!&$]")


def escaped(text: object) -> str:
    """Text in Markdown that means itself: names and data can bring neither marks nor HTML, and stay on their line."""
    return _MARKS.sub(r"\\\g<0>", printable(" ".join(str(text).splitlines())))


# ---------------------------------------------------------------- what is known of a model
def _manifest(paths: Paths, name: str) -> dict[str, Any]:
    path = paths.manifest(name)
    return read_json(path, f"run `kvpipe models --name {name}`")["source"] if path.is_file() else {}


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
        case "pruned":
            return f"layers {', '.join(map(str, source['layers']))} of {source['of']}"
        case "pretrain":
            return "pretrained by kvpipe"
        case _:
            return f"source {dag.config.models[name].source}"


def license_of(dag: Dag, paths: Paths, name: str) -> str | None:
    """The licence that a model's repository, or the card in its folder, names; None for one that kvpipe made."""
    source = _manifest(paths, name)
    if source.get("source") in ("random", "pruned"):
        return license_of(dag, paths, source["like" if source["source"] == "random" else "of"])
    card = paths.model(name) / "README.md"
    if "license" in source or not card.is_file():
        return source.get("license")
    from huggingface_hub import metadata_load

    return (metadata_load(card) or {}).get("license")


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
    arm, student = dag.arm(arm_name), dag.config.student
    cost = read_json(cell / COST, "train the cell again")
    provenance = cost["provenance"]
    if provenance["arm"] != arm_name:
        raise ValueError(f"{cell} was trained under the arm {provenance['arm']!r}: --arm {provenance['arm']}")
    if cost.get("settings") not in (None, Train(dag, paths).depends(arm=arm_name)):
        raise ValueError(
            f"{cell} was trained under other settings than the configuration has now for the arm {arm_name!r}: give the "
            "configuration that it was trained with, or train it again"
        )
    digest = folder_digest(cell / STUDENT)
    roles = {"student": student} | {f"teacher {i + 1}": name for i, name in enumerate(arm.teachers)}
    # a student without weights of its own brings no licence
    bare = dag.config.models[student].source in ("scratch", "pretrain")
    licences = {n: license_of(dag, paths, n) for n in roles.values() if not (n == student and bare)}
    commits = _commits(paths)
    environment = Environment(trim_blocks=True, keep_trailing_newline=True)
    template = environment.from_string(Path(__file__).with_suffix(".md.jinja").read_text(encoding="utf-8"))
    return template.render(
        e=escaped,
        front=_front_matter(dag, paths, arm, {licence for licence in licences.values() if licence}),
        arm_name=arm_name,
        label=arm.label,
        seed=provenance["seed"],
        models=[(role, n, origin(dag, paths, n), licences.get(n)) for role, n in roles.items()],
        licensed=any(licences.values()),
        sources=[(s.task, _repo(s) or s.kind, commits.get(s.task)) for s in dag.config.data.sources],
        loss_on=LOSS_ON[dag.config.train.loss_on],
        splits={split: _counts(paths.data(split)) for split in SPLITS if paths.data(split).is_file()},
        settings=yaml.safe_dump(arm.model_dump(exclude={"role", "label"}), sort_keys=False),
        cost=cost,
        digest=digest,
        provenance=provenance,
        packages=", ".join(f"{name} {version}" for name, version in provenance["packages"].items() if version),
        control=dag.config.control,
        **_results(dag, paths, arm, provenance, digest),
    )


def write_card(dag: Dag, paths: Paths, arm_name: str, cell: Path) -> Path:
    """Write the card into the cell's model folder."""
    path = cell / STUDENT / "README.md"
    write_text(path, card(dag, paths, arm_name, cell))
    return path


def _front_matter(dag: Dag, paths: Paths, arm: Arm, licences: set[str]) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=_manifest(paths, dag.config.student).get("repo"),
        license="other" if len(licences) > 1 else next(iter(licences), None),
        license_name=SEVERAL if len(licences) > 1 else None,
        datasets=[repo for source in dag.config.data.sources if (repo := _repo(source))] or None,
        tags=["kvpipe", "knowledge-distillation"] if arm.teachers else ["kvpipe"],
    )
    return data.to_yaml()


def _repo(source: Any) -> str | None:
    """The data set's repository, for a source that has one and is no folder of this machine."""
    return source.repo if isinstance(source, HubData) and not source.is_folder else None


def _counts(path: Path) -> dict[str, int]:
    """Task → records of a split."""
    return pd.read_parquet(path, columns=["task"]).task.value_counts(sort=False).to_dict()


def _commits(paths: Paths) -> dict[str, str]:
    """Task → the commits of its data set, as the data step found them; files and embedded tasks have none."""
    found: dict[str, list[str]] = {}
    for source in read_json(paths.sources, "run `kvpipe data`")["sources"] if paths.sources.is_file() else []:
        if "commit" in source:
            found.setdefault(source["task"], []).append(source["commit"])
    return {task: ", ".join(dict.fromkeys(commits)) for task, commits in found.items()}


def _results(dag: Dag, paths: Paths, arm: Arm, provenance: dict[str, Any], digest: str) -> dict[str, Any]:
    """Scores of this very model, and of its arm where it was one of those that the statistics are of."""
    name, seed = provenance["arm"], provenance["seed"]
    own, means = _read(paths.arm_table(name), "model"), _read(paths.stats / ARMS, "models")
    own, means = own[own.seed == seed], means[(means.arm == name) & means.metric.isin(list(ON_CARD))]
    scored = len(own) + len(means) > 0
    own = own[own.model == digest].set_index("task")
    means = means[means.models.str.contains(digest, na=False)].set_index(["metric", "task"])
    scores = []
    for metric, task in dict.fromkeys([*means.index, *((name, task) for name in ON_CARD for task in own.index)]):
        value, show = own[metric].get(task, np.nan), ON_CARD[metric].shown
        here, of_arm = f"{show(value):.4g}" if np.isfinite(value) else "–", "–"
        if (metric, task) in means.index:
            mean, low, high = (show(means.loc[metric, task][key]) for key in ("mean", "low", "high"))
            of_arm = f"{mean:.4g} ({low:.4g}, {high:.4g})"
        if (here, of_arm) != ("–", "–"):
            scores.append((ON_CARD[metric].title, task, here, of_arm))
    count, contrasts = "", []
    if len(means):
        count = f"{int(means.n_seeds.max())} seeds (this model is one of them) and {int(means.n_items.max()):,} items"
    path = paths.stats / CONTRASTS
    if arm.teachers and len(means) and path.is_file():
        table = pd.read_csv(path)
        of = (table.arm == name) & (table.reference == dag.config.control) & table.metric.isin(list(ON_CARD))
        for row in table[of].itertuples():
            metric = ON_CARD[row.metric]
            change, low, high = (metric.factor * x for x in (row.estimate, row.difference_low, row.difference_high))
            difference = f"{change:+.4g} ({low:+.4g}, {high:+.4g})"
            if metric.scale == "logged":
                difference = f"{row.ratio:.4g} × ({row.ratio_low:.4g}, {row.ratio_high:.4g})"
            tested = np.isfinite(row.p_dunnett)
            contrasts.append((metric.title, row.task, *((difference, f"{row.p_dunnett:.3g}") if tested else "––")))
    return {"scores": scores, "scored": scored, "count": count, "contrasts": contrasts}


def _read(path: Path, models: str) -> pd.DataFrame:
    """A table with the digests of the models that it is of; without a row where it is not there."""
    columns = ["arm", "seed", "task", "metric", *ON_CARD, models]
    table = pd.read_csv(path, dtype={models: str}) if path.is_file() else pd.DataFrame(columns=columns)
    return table if models in table else table.assign(**{models: ""})


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
