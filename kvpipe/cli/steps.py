"""Subcommands that the rules call: one per step of the DAG, and what `make` generates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpipe.cli.options import CONFIG, ConfigFile, Experiment, Overrides, say, with_experiment, writable_file
from kvpipe.config import Reading as Readings

Reading = Annotated[
    Readings,
    typer.Option(
        help="student: the records' text; short, none: with less of its reasoning; own: with the teacher's, as given; "
        "written: as it has written it."
    ),
]
Teacher = Annotated[str, typer.Option(help="Name of the teacher.")]
Items = Annotated[Path, typer.Option(help="Parquet file, one row per item.", callback=writable_file)]


@with_experiment
def data(given: Experiment) -> None:
    """Write the train, validation and test splits."""
    given.run("data", light=True)


@with_experiment
def models(
    given: Experiment,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in the configuration; all hub models if absent.")
    ] = None,
) -> None:
    """Bring a model into its folder, with a manifest: on a login node, which reaches the hub."""
    if name is None:
        from kvpipe.steps.make import Work
        from kvpipe.steps.models import make_hub_models

        make_hub_models(Work(*given.load()))
    else:
        given.run("model", light=True, model=given.known_model(name))


@with_experiment
def encode(
    given: Experiment,
    model: Annotated[str, typer.Option(help="Name of the model.")],
    reading: Reading = "student",
) -> None:
    """Write the training and validation splits as a model's tokens."""
    given.run("encode", model=given.known_model(model), reading=reading)


def pretrain(
    config: ConfigFile = CONFIG,
    only: Annotated[str | None, typer.Option(help="One model; all with a recipe and a path otherwise.")] = None,
    overrides: Overrides = None,
) -> None:
    """Train the embedded teachers by their recipes and write them to the configured paths (`make teachers`)."""
    from kvpipe.config import load
    from kvpipe.models.pretrain import pretrain_into_path, recipes

    settings = load(config, overrides)
    made = recipes(settings)
    if not made or only not in (None, *made):
        which = "no model of the configuration has" if only is None else f"--only {only}: no such model with"
        raise typer.BadParameter(f"{which} a recipe and a path (there are {', '.join(made) or 'none'})")
    for name in made if only is None else [only]:
        pretrain_into_path(settings, name, log=say)


@with_experiment
def layer_map(given: Experiment, teacher: Teacher) -> None:
    """Measure the similarity (CKA) of the student's and a teacher's layers."""
    given.run("layer_map", teacher=given.known_model(teacher))


@with_experiment
def teacher_text(
    given: Experiment,
    teacher: Teacher,
    shard: Annotated[int | None, typer.Option(help="One shard; all of them and the records otherwise.")] = None,
) -> None:
    """Have a teacher write its own reasoning for the training prompts; finished texts are kept."""
    name = given.known_model(teacher)
    if shard is None:
        given.run("teacher_text", teacher=name)
    else:
        given.run("teacher_text_shard", teacher=name, shard=str(shard))


@with_experiment
def teacher_kv(
    given: Experiment,
    teacher: Teacher,
    reading: Reading = "student",
    shard: Annotated[int | None, typer.Option(help="One shard; all of them and the index otherwise.")] = None,
) -> None:
    """Compute and store a teacher's KV on the training split; finished shards are kept."""
    known = given.known_model(teacher)
    if shard is None:
        given.run("teacher_kv", teacher=known, reading=reading)
    else:
        given.run("teacher_kv_shard", teacher=known, reading=reading, shard=str(shard))


@with_experiment
def fit(
    given: Experiment,
    arm: Annotated[str | None, typer.Option(help="The arm whose projectors are fitted.")] = None,
    fit_id: Annotated[
        str | None, typer.Option("--fit", help="Or the name of the fit, as in results/projector/.")
    ] = None,
) -> None:
    """Fit the projectors of an arm, before training."""
    if (arm is None) == (fit_id is None):
        raise typer.BadParameter("give either --arm or --fit")
    dag, _ = given.plan()
    given.run("fit", fit=fit_id or dag.fit_id(dag.arm(arm or "")))


@with_experiment
def lm_eval(
    given: Experiment,
    model: Annotated[Path, typer.Option(help="Model folder.")],
    out: Annotated[Path, typer.Option(help="JSON file: metrics per task, and every item's.", callback=writable_file)],
) -> None:
    """Score a model folder with lm-evaluation-harness on `evaluate.lm_eval_tasks`."""
    from kvpipe.steps.evaluate import score_tasks

    for line in score_tasks(given.inputs(), model, out):
        say(line)


@with_experiment
def untrained(given: Experiment, out: Items) -> None:
    """Score the student before training (first seed): a row of the report's table."""
    from kvpipe.steps.evaluate import score_untrained

    score_untrained(given.inputs(), out)


@with_experiment
def arm(given: Experiment, arm: Annotated[str, typer.Option(help="Name of the arm.")]) -> None:
    """Put an arm's seeds into one table."""
    from kvpipe.stats.tables import write_arm_table

    write_arm_table(*given.plan(), arm)


@with_experiment
def audit(given: Experiment) -> None:
    """Check that arms are compared like with like and that no test item is in train."""
    from kvpipe.stats.audit import audit

    config, paths = given.load()
    for found in audit(config, paths, paths.audit):
        say(f"{found.status:>8}  {found.name}: {found.detail}")


@with_experiment
def stats(
    given: Experiment,
    untrained: Annotated[Path | None, typer.Option(help="Scores of the student before training.")] = None,
) -> None:
    """Intervals, paired contrasts and corrections from the per-item scores."""
    from kvpipe.stats.tables import write_stats

    write_stats(*given.plan(), untrained)


def config(
    folder: Annotated[Path, typer.Option(help="Where config/README.md and schema.json are written.")] = Path("config"),
) -> None:
    """Generate the configuration's documentation and JSON schema."""
    from kvpipe.config.docs import write_docs

    write_docs(folder)


_ALL = (
    data,
    models,
    teacher_text,
    encode,
    layer_map,
    teacher_kv,
    fit,
    lm_eval,
    untrained,
    arm,
    audit,
    stats,
    pretrain,
    config,
)
COMMANDS = {command.__name__.replace("_", "-"): command for command in _ALL}
