"""Subcommands for people: look, pin, train, score, and send."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from kvpipe.cli.options import Experiment, say, with_experiment, writable_file, writable_folder
from kvpipe.experiment.paths import STUDENT
from kvpipe.experiment.plan import Dag
from kvpipe.experiment.project import TemplateName

ArmName = Annotated[str, typer.Option(help="Name of the arm.")]
SeedNumber = Annotated[int, typer.Option(help="Seed of the cell.")]
CellFolder = Annotated[Path | None, typer.Option(help="Folder of the trained cell; under the results by default.")]


@with_experiment
def doctor(
    given: Experiment,
    profile: Annotated[
        Path | None, typer.Option(envvar="SNAKEMAKE_PROFILE", help="Snakemake profile of the cluster.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the findings here as JSON.", callback=writable_file)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    probe: Annotated[bool, typer.Option("--probe", help="Run a five-minute job; print a site profile.")] = False,
) -> None:
    """Say what would fail before anything starts."""
    from kvpipe import doctor
    from kvpipe.experiment.files import write_text

    work = doctor.Workload(*given.load(), profile)
    if probe:
        written = doctor.probe(work, log=lambda line: say(line, err=True))
        say(written.read_text(encoding="utf-8"))
        work = replace(work, profile=written.parent)
    findings = doctor.examine(work)
    if out is not None:
        write_text(out, doctor.as_json(findings) + "\n")
    say(doctor.as_json(findings) if as_json else doctor.show(findings), err=probe)
    if any(finding.status == doctor.FAIL for finding in findings):
        raise typer.Exit(1)


@with_experiment
def preflight(
    given: Experiment,
    arm: Annotated[list[str] | None, typer.Option(help="Arms that are measured and counted; all otherwise.")] = None,
    batches: Annotated[int, typer.Option(help="Training batches of each arm.", min=1)] = 3,
    out: Annotated[Path | None, typer.Option(help="Write what is found here as JSON.", callback=writable_file)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what the whole grid will cost, from a few batches of each arm, and how hard each term pulls."""
    import json

    import rich

    config, paths = given.load()
    for name in arm or ():
        Dag(config).arm(name)
    from kvpipe.experiment.files import write_json
    from kvpipe.preflight.rehearse import preflight
    from kvpipe.preflight.tables import as_tables

    found = preflight(config, paths, arm or (), batches, log=lambda line: say(line, err=True))
    if out is not None:
        write_json(out, found.as_dict(), indent=1)
    if as_json:
        say(json.dumps(found.as_dict(), indent=1))
    else:
        rich.print(as_tables(found))


@with_experiment
def lock(
    given: Experiment,
    update: Annotated[bool, typer.Option("--update", help="Resolve also what is locked already.")] = False,
) -> None:
    """Pin every hub model to the commit that its revision stands for now, and say what its download would meet."""
    from kvpipe.config import lock_path
    from kvpipe.models.hub import lock_into

    lock_into(lock_path(given.files[0]), *given.load(), update, log=say)


@with_experiment
def train(
    given: Experiment,
    arm: Annotated[str | None, typer.Option(help="Name of the arm; with --teacher `distil` or `control`.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the cell.", min=0, max=2**32 - 1)] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the cell; under the results by default.", callback=writable_folder)
    ] = None,
    checkpoints: Annotated[Path | None, typer.Option(help="Folder of checkpoints.")] = None,
    teacher: Annotated[
        list[str] | None, typer.Option(help="Instead of a configuration: model folders, hub ids.")
    ] = None,
    student: Annotated[str | None, typer.Option(help="With --teacher: the student's folder or hub id.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="With --teacher: a preset such as gsm8k, or JSONL or Parquet with columns prompt, answer."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="With --teacher: train control too, three seeds each, and report.")
    ] = False,
    fusion: Annotated[str | None, typer.Option(help="With --teacher: kind of fusion.")] = None,
    projector: Annotated[str | None, typer.Option(help="With --teacher: kind of projector.")] = None,
    term: Annotated[list[str] | None, typer.Option(help="With --teacher: a loss term, NAME or NAME=WEIGHT.")] = None,
    made: Annotated[bool, typer.Option("--made", help="Make nothing first: Snakemake has made it.")] = False,
) -> None:
    """Train one cell; what it needs is made first where it is not there, or was made from something else."""
    if teacher:
        from kvpipe.steps.direct import Method, train_direct

        if student is None or data is None:
            raise typer.BadParameter("--teacher goes with --student and --data")
        if compare and (arm or checkpoints or made):
            raise typer.BadParameter("--compare trains both arms: leave out --arm, --checkpoints and --made")
        out = out or Path("runs") / Path(student).name
        method = Method(fusion, projector, tuple(term or ()))
        where = (arm, seed, checkpoints, made)
        train_direct(teacher, student, data, out, *where, given.overrides, method, compare, log=say)
    elif arm is None or student or data or fusion or projector or term or compare:
        raise typer.BadParameter("give either --arm, or --teacher, --student and --data")
    else:
        inputs = given.inputs()
        from kvpipe.steps.train import make_cell

        try:
            make_cell(inputs, arm, seed, out, checkpoints, made, log=say)
        except SystemExit as stopped:  # by a signal, its state saved
            if (
                "APPTAINER_CONTAINER" in os.environ
            ):  # the signal has ended the image too: Python's own end would need its files
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(int(stopped.code or 0))
            raise


@with_experiment
def prepare(given: Experiment, arm: ArmName) -> None:
    """Make all that the cells of an arm read, where it is missing or stale."""
    inputs = given.inputs()
    from kvpipe.steps.train import prepare

    prepare(inputs, arm, log=say)


@with_experiment
def evaluate(
    given: Experiment,
    out: Annotated[Path, typer.Option(help="Parquet file, one row per item.", callback=writable_file)],
    model: Annotated[Path | None, typer.Option(help="Model folder.")] = None,
    cell: Annotated[Path | None, typer.Option(help="Instead of --model: folder of `kvpipe train --teacher`.")] = None,
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="Split that is scored.")] = "test",
) -> None:
    """Score a model folder item by item: likelihood and greedy generation."""
    from kvpipe.steps.evaluate import score_folder
    from kvpipe.steps.inputs import Inputs

    if (model is None) == (cell is None):
        raise typer.BadParameter("give either --model or --cell")
    say(score_folder(Inputs(*given.of(cell)), model or Path(cell or "") / STUDENT, split, out))


@with_experiment
def answers(
    given: Experiment,
    questions: Annotated[Path, typer.Option(help="JSONL: question_id, and turns, the user's messages.")],
    out: Annotated[Path, typer.Option(help="JSONL file, named as the model.", callback=writable_file)],
    model: Annotated[Path | None, typer.Option(help="Model folder.")] = None,
    cell: Annotated[Path | None, typer.Option(help="Instead of --model: folder of `kvpipe train --teacher`.")] = None,
) -> None:
    """Answer questions of several turns, in the format that MT-Bench's judge reads."""
    from kvpipe.steps.evaluate import answer_questions
    from kvpipe.steps.inputs import Inputs

    if (model is None) == (cell is None):
        raise typer.BadParameter("give either --model or --cell")
    say(answer_questions(Inputs(*given.of(cell)), model or Path(cell or "") / STUDENT, questions, out))


@with_experiment
def cells(
    given: Experiment,
    kept: Annotated[Path, typer.Option(help="Folder of finished cells, to be committed.", callback=writable_folder)],
    arm: Annotated[list[str] | None, typer.Option(help="Arms, in this order; all otherwise.")] = None,
    hours: Annotated[float | None, typer.Option(help="No cell begins after so many.")] = None,
    scored: Annotated[bool, typer.Option(help="Score the test split, or leave it at validation losses.")] = True,
    out: Annotated[Path | None, typer.Option(help="Only render the report of what is kept.")] = None,
    check: Annotated[Path | None, typer.Option(help="Only make one kept cell again, under these results.")] = None,
    drawn: Annotated[int | None, typer.Option(help="With --check: seed of the draw.")] = None,
) -> None:
    """Make the cells that are not kept yet and keep each as text; or report from them, or check one."""
    from kvpipe.steps.cells import KeptCells, check_cell, report_cells, run_cells

    inputs = given.inputs()
    found = KeptCells(inputs, kept)
    if out is not None:
        report_cells(found, out, log=say)
    elif check is not None:
        if not check_cell(found, check, drawn, log=say):
            raise typer.Exit(1)
    else:
        arms = [inputs.dag.arm(name) and name for name in arm or inputs.dag.arms]
        wanted = [(name, seed) for seed in inputs.config.seeds for name in arms]
        left = run_cells(found, wanted, scored, hours, log=say)
        say(f"{len(wanted) - left} of {len(wanted)} cells are kept in {kept}")


@with_experiment
def status(given: Experiment) -> None:
    """Print the grid of cells (done, running, failed, missing), what they cost, and how failed ones ended."""
    import rich

    from kvpipe.report.status import overview

    rich.print(overview(*given.plan()))


def align(
    texts: Annotated[
        Path | None, typer.Argument(help="With --report: a text in each line of .txt, each row of .jsonl or .parquet.")
    ] = None,
    src_tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id of the teacher's tokenizer.")] = None,
    dst_tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id of the student's tokenizer.")] = None,
    tokenizer: Annotated[list[str] | None, typer.Option(help="Instead of both, twice: the teacher's first.")] = None,
    text: Annotated[str | None, typer.Option(help="Text to align.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="HTML file: how the two line up over TEXTS.", callback=writable_file)
    ] = None,
    mode: Annotated[
        Literal["iou", "causal", "position"] | None,
        typer.Option(help="Weights of the overlap; iou for --text, and causal, as arms do, for --report."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how two tokenizers' tokens line up: on a text, or as a page over a file of texts."""
    pair = [name for name in (src_tokenizer, dst_tokenizer, *(tokenizer or ())) if name]
    if len(pair) != 2:
        raise typer.BadParameter("give two tokenizers, the teacher's first: --tokenizer A --tokenizer B")
    if text == "":
        raise typer.BadParameter("--text is empty: there is nothing to align")
    if (text is None) == (report is None) or (report is None) != (texts is None):
        raise typer.BadParameter("give either --text TEXT, or --report OUT.html and a file of texts")
    import rich

    from kvpipe.models.folders import load_tokenizer
    from kvpipe.models.hub import tokenizer_folder

    src, dst = (load_tokenizer(tokenizer_folder(name)) for name in pair)
    if text is not None:
        from kvpipe.tokens.show import show_alignment

        (say if as_json else rich.print)(show_alignment(src, dst, text, mode or "iou", as_json))
        return
    from kvpipe.data.texts import read_texts
    from kvpipe.experiment.progress import track
    from kvpipe.report.pair import write_pair

    found = track(read_texts(Path(texts or "")), "align", "texts")
    say(write_pair((pair[0], pair[1]), (src, dst), found, Path(report or ""), mode or "causal"))
    say(f"page: {report}")


@with_experiment
def report(
    given: Experiment, out: Annotated[Path | None, typer.Option(help="HTML file.", callback=writable_file)] = None
) -> None:
    """Render the report."""
    from kvpipe.report.render import write_report

    config, paths = given.load()
    write_report(config, paths, out or paths.report)


@with_experiment
def card(given: Experiment, arm: ArmName, seed: SeedNumber = 0, cell: CellFolder = None) -> None:
    """Write a student's model card again, with the metrics that exist by now."""
    from kvpipe.train.card import write_card

    config, paths = given.of(cell)
    say(write_card(Dag(config), paths, arm, cell or paths.cell(arm, seed)))


@with_experiment
def publish(
    given: Experiment,
    arm: ArmName,
    repo: Annotated[str, typer.Option(help="owner/name on the hub; made if it is not there.")],
    seed: SeedNumber = 0,
    cell: CellFolder = None,
    public: Annotated[bool, typer.Option("--public", help="A new repository is public; private otherwise.")] = False,
) -> None:
    """Push a student and its card to the hub, with the token in HF_TOKEN."""
    from kvpipe.train.card import publish

    config, paths = given.of(cell)
    publish(Dag(config), paths, arm, cell or paths.cell(arm, seed), repo, private=not public, log=say)


def init(
    folder: Annotated[Path, typer.Argument(help="Where it is written; made if it is not there.")],
    template: Annotated[
        TemplateName, typer.Option(help="Offline on a CPU; SmolLM2 on one machine; 7B teachers on a cluster.")
    ] = "embedded",
) -> None:
    """Write a project of your own: configuration, Snakefile, profile, README."""
    from kvpipe.experiment.project import init

    writable_folder(folder)
    written = init(folder, template)
    say(f"{folder}: {len(written)} files. Next: cd {folder}, then the commands in README.md, `kvpipe doctor` first")


recipes = typer.Typer(no_args_is_help=True, help="Overlays for other machines and sizes, to lay over a configuration.")


@recipes.command("ls")
def list_recipes() -> None:
    """List the shipped ones."""
    from kvpipe.experiment.project import shipped_recipes

    for name, text in shipped_recipes().items():
        say(f"{name:<16}{text}")


@recipes.command("cp")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="Its name, as listed by ls.")],
    out: Annotated[Path, typer.Argument(help="A file (.yaml), or a folder.")] = Path("config/recipes"),
) -> None:
    """Copy one, to use or to change."""
    from kvpipe.experiment.project import copy_recipe

    path = copy_recipe(name, out)
    say(f"{path}: lay it over a configuration by --config CONFIG {path} (--configfile in Snakemake)")


COMMANDS = {
    f.__name__: f
    for f in (
        init,
        doctor,
        preflight,
        lock,
        prepare,
        train,
        evaluate,
        answers,
        cells,
        status,
        align,
        report,
        card,
        publish,
    )
}
