"""The command line: `kvpipe <step>` (or `python -m kvpipe <step>`), one subcommand per step of the DAG."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from kvpipe.config import Config, ConfigError, load, lock_path
from kvpipe.config.errors import printable
from kvpipe.experiment.paths import STUDENT, Paths
from kvpipe.experiment.plan import Dag

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distil the KV caches of several teacher models into one student, and measure whether it helped.",
)

ConfigFile = Annotated[
    list[Path],
    typer.Option("--config", envvar="KVPIPE_CONFIG", help="Configuration file (YAML); overlays follow it, in order."),
]
Results = Annotated[Path, typer.Option("--results", envvar="KVPIPE_RESULTS", help="Folder of all artefacts.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value, over the file; repeatable.")]
CONFIG = [Path("config/config.yaml")]
RESULTS = Path("results")
PROFILE = Path("profiles/slurm")
# what a user can mend is told without a traceback
USER_ERRORS = (ConfigError, OSError, KeyError, ValueError, RuntimeError, ArithmeticError, ImportError, MemoryError)


def _say(text: object, err: bool = False) -> None:
    """Print; what names and data bring along cannot command the terminal."""
    typer.echo(printable(str(text)), err=err)


def _writable_file(out: Path | None) -> Path | None:
    """`--out` where a file can be: said before hours of work, not after them."""
    for path in () if out is None else out.parents:
        if path.exists() and not path.is_dir():
            raise typer.BadParameter(f"{out}: {path} is a file, not a folder")
    return out


def _writable_folder(out: Path | None) -> Path | None:
    if out is not None:
        _writable_file(out / "file")
    return out


def _workspace(config: list[Path], results: Path, overrides: list[str] | None):
    # torch and transformers take seconds to import: only steps that compute pay for them
    from kvpipe.distill.build import Workspace

    return Workspace(load(config, overrides), Paths(results))


def _experiment(config: list[Path], results: Path, overrides: list[str] | None) -> tuple[Config, Paths]:
    return load(config, overrides), Paths(results)


def _device(config: Config) -> str:
    from kvpipe.experiment.device import resolve_device

    return resolve_device(config.train.device)


def _known_model(work, name: str) -> str:
    if name not in work.config.models:
        raise KeyError(f"no model {name!r}; the configuration has {', '.join(work.config.models)}")
    return name


@app.command()
def doctor(
    config: ConfigFile = CONFIG,
    results: Results = RESULTS,
    overrides: Overrides = None,
    profile: Annotated[
        Path | None, typer.Option(envvar="SNAKEMAKE_PROFILE", help="Snakemake profile of the cluster.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the findings here as JSON.", callback=_writable_file)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    probe: Annotated[bool, typer.Option("--probe", help="Run a five-minute job; print a site profile.")] = False,
) -> None:
    """Say what would fail before anything starts."""
    from kvpipe import doctor as ward

    settings, paths = _experiment(config, results, overrides)
    if profile is None and PROFILE.is_dir():
        profile = PROFILE
    asked = ward.read_profile(profile)
    if probe:
        from kvpipe.doctor.probe import probe as try_cluster

        _say(try_cluster(asked, paths, log=lambda line: _say(line, err=True)))
    findings = ward.examine(settings, paths, asked)
    if out is not None:
        ward.write(findings, out)
    _say(ward.as_json(findings) if as_json else ward.show(findings), err=probe)
    if any(finding.status == ward.FAIL for finding in findings):
        raise typer.Exit(1)


@app.command()
def data(config: ConfigFile = CONFIG, results: Results = RESULTS, overrides: Overrides = None) -> None:
    """Write the train, validation and test splits."""
    from kvpipe.data.build import build
    from kvpipe.experiment.made import note

    settings, paths = _experiment(config, results, overrides)
    build(settings.data, paths.data("train").parent)
    note(Dag(settings), paths, "data")


@app.command()
def lock(
    update: Annotated[bool, typer.Option("--update", help="Resolve also what is locked already.")] = False,
    config: ConfigFile = CONFIG,
    results: Results = RESULTS,
    overrides: Overrides = None,
) -> None:
    """Pin every hub model to the commit that its revision stands for now, and say what its download would meet."""
    from kvpipe.models.hub import GB, absent, check_room, hub_models, lock, to_download, write_lock

    settings, paths = _experiment(config, results, overrides)
    found = lock(settings, update)
    if not found:
        _say("nothing to lock: no cell needs a model of the hub (source: hub)")
        return
    path = lock_path(config[0])
    write_lock(path, found)
    missing = to_download(settings.model_copy(update={"lock": found}), paths)
    for name, model in hub_models(settings).items():
        pinned = found[model.pin]
        size = sum(file.size for file in pinned.files.values())
        _say(
            f"{name}: {model.pin} is {pinned.commit}, licence {pinned.license or 'not stated'}, "
            f"{size / GB:.2f} GB, {missing.get(name, 0) / GB:.2f} GB of them to download"
        )
    for line in absent(settings.libraries):
        _say(line)
    _say(f"written to {path}")
    check_room(missing, paths.root)


@app.command()
def models(
    name: Annotated[
        str | None, typer.Option(help="Name of the model in the configuration; all hub models if absent.")
    ] = None,
    config: ConfigFile = CONFIG,
    results: Results = RESULTS,
    overrides: Overrides = None,
) -> None:
    """Bring a model into its folder, with a manifest: on a login node, which reaches the hub."""
    from kvpipe.models.hub import check_room, hub_models, to_download
    from kvpipe.steps.models import make_model

    work = _workspace(config, results, overrides)
    if name is None:
        check_room(to_download(work.config, work.paths), work.paths.root)
    for each in hub_models(work.config) if name is None else [_known_model(work, name)]:
        make_model(work, each)


@app.command()
def pretrain(
    config: ConfigFile = CONFIG,
    only: Annotated[str | None, typer.Option(help="One model; all with a recipe and a path otherwise.")] = None,
    overrides: Overrides = None,
) -> None:
    """Train the embedded teachers by their recipes and write them to the configured paths (`make teachers`)."""
    import torch

    from kvpipe.models.folders import write_manifest
    from kvpipe.models.pretrain import pretrain as train_teacher

    settings = load(config, overrides)
    made = [n for n, m in settings.models.items() if getattr(m, "recipe", None) and getattr(m, "path", None)]
    if only is not None and only not in made:
        raise typer.BadParameter(f"--only {only}: no such model with a recipe and a path (there are {', '.join(made)})")
    torch.set_num_threads(settings.train.threads)  # sums depend on it
    for name, model in settings.models.items():
        recipe, path = getattr(model, "recipe", None), getattr(model, "path", None)
        if recipe is None or path is None or only not in (None, name):
            continue
        _say(f"{name} → {path}")
        out = Path(path)
        out.mkdir(parents=True, exist_ok=True)
        write_manifest(out, train_teacher(recipe, settings.data, out, log=_say))


@app.command("layer-map")
def layer_map(
    teacher: Annotated[str, typer.Option(help="Name of the teacher.")],
    config: ConfigFile = CONFIG,
    results: Results = RESULTS,
    overrides: Overrides = None,
) -> None:
    """Measure the similarity (CKA) of the student's and a teacher's layers."""
    from kvpipe.steps.layer_map import make_layer_map

    work = _workspace(config, results, overrides)
    make_layer_map(work, _known_model(work, teacher))


@app.command("teacher-kv")
def teacher_kv(
    teacher: Annotated[str, typer.Option(help="Name of the teacher.")],
    reading: Annotated[
        Literal["student", "own"], typer.Option(help="student: the student's text; own: the teacher's longer one.")
    ] = "student",
    shard: Annotated[int | None, typer.Option(help="One shard; all of them and the index otherwise.")] = None,
    index: Annotated[bool, typer.Option("--index", help="Only check the shards and write the index.")] = False,
    config: ConfigFile = CONFIG,
    results: Results = RESULTS,
    overrides: Overrides = None,
) -> None:
    """Compute and store a teacher's KV on the training split."""
    from kvpipe.steps.teacher_kv import make_shard, make_store_index

    work = _workspace(config, results, overrides)
    _known_model(work, teacher)
    if not index:
        for number in range(work.config.store.shards) if shard is None else [shard]:
            make_shard(work, teacher, reading, number)
    if index or shard is None:
        make_store_index(work, teacher, reading)


@app.command()
def fit(
    arm: Annotated[str | None, typer.Option(help="The arm whose projectors are fitted.")] = None,
    fit_id: Annotated[
        str | None, typer.Option("--fit", help="Or the name of the fit, as in results/projector/.")
    ] = None,
    config: ConfigFile = CONFIG,
    results: Results = RESULTS,
    overrides: Overrides = None,
) -> None:
    """Fit the projectors of an arm, before training."""
    from kvpipe.steps.fit import make_fit

    work = _workspace(config, results, overrides)
    if arm is not None and fit_id is None:
        fit_id = work.dag.fit_id(work.dag.arm(arm))
    elif arm is not None or fit_id is None:
        raise typer.BadParameter("give either --arm or --fit")
    make_fit(work, fit_id)


@app.command()
def train(
    arm: Annotated[str | None, typer.Option(help="Name of the arm; with --teacher `distil` or `control`.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the cell.", min=0, max=2**32 - 1)] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the cell; under the results by default.", callback=_writable_folder)
    ] = None,
    checkpoints: Annotated[Path | None, typer.Option(help="Folder of checkpoints.")] = None,
    teacher: Annotated[list[Path] | None, typer.Option(help="Instead of a configuration: model folder(s).")] = None,
    student: Annotated[Path | None, typer.Option(help="With --teacher: the student's model folder.")] = None,
    data: Annotated[Path | None, typer.Option(help="With --teacher: JSONL or Parquet; columns prompt, answer.")] = None,
    made: Annotated[bool, typer.Option("--made", help="Make nothing first: Snakemake has made it.")] = False,
    config: ConfigFile = CONFIG,
    results: Results = RESULTS,
    overrides: Overrides = None,
) -> None:
    """Train one cell; what it needs is made first where it is not there, or was made from something else."""
    from kvpipe.steps.direct import keep
    from kvpipe.steps.prepare import prepare
    from kvpipe.train.trainer import check_settings
    from kvpipe.train.trainer import train as train_cell

    if teacher:
        work, arm = _direct(teacher, student, data, out, arm, overrides)
    elif arm is None or student or data:
        raise typer.BadParameter("give either --arm, or --teacher, --student, --data and --out")
    else:
        work = _workspace(config, results, overrides)
    check_settings(work.config.train, log=lambda *_: None)  # its notes come when the cell begins
    if not made:
        prepare(work, arm, log=_say)
    folder = out or work.paths.cell(arm, seed)
    kept = checkpoints or (folder.with_name(folder.name + ".checkpoints") if out else work.paths.checkpoints(arm, seed))
    train_cell(work, arm, seed, folder, kept, log=_say)
    if teacher:
        keep(work.config, work.paths, folder)


def _direct(teacher, student, data, out, arm, overrides):
    from kvpipe.distill.build import Workspace
    from kvpipe.steps.direct import ARM, experiment

    if student is None or data is None or out is None:
        raise typer.BadParameter("--teacher goes with --student, --data and --out")
    return Workspace(*experiment(teacher, student, data, out, overrides)), arm or ARM


@app.command()
def evaluate(
    out: Annotated[Path, typer.Option(help="Parquet file, one row per item.", callback=_writable_file)],
    model: Annotated[Path | None, typer.Option(help="Model folder.")] = None,
    cell: Annotated[Path | None, typer.Option(help="Instead of --model: folder of `kvpipe train --teacher`.")] = None,
    split: Annotated[str, typer.Option(help="Split that is scored.")] = "test",
    config: ConfigFile = CONFIG,
    results: Results = RESULTS,
    overrides: Overrides = None,
) -> None:
    """Score a model folder item by item: likelihood and greedy generation."""
    import torch

    from kvpipe.distill.build import Workspace
    from kvpipe.evaluate.score import evaluate as run
    from kvpipe.experiment.outofmemory import evaluation_advice, explained
    from kvpipe.stats.tables import CELL, cell_of

    if (model is None) == (cell is None):
        raise typer.BadParameter("give either --model or --cell")
    folder = model or Path(cell or "") / STUDENT
    work = Workspace(*_trained(cell, config, results, overrides))
    settings, records, trust = work.config, work.records(split), work.trusts_folder(folder)
    torch.set_num_threads(settings.train.threads)
    with explained("scoring", evaluation_advice(settings.evaluate)):
        table = run(
            folder,
            records,
            settings.data.template,
            settings.evaluate,
            _device(settings),
            trust=trust,
            context=settings.data.context,
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    table.attrs[CELL] = cell_of(folder)
    table.to_parquet(out, index=False)
    bits, judged = table.nll.sum() / math.log(2) / table.bytes.sum(), table.correct.dropna()
    right = f", {judged.astype(float).mean():.1%} of {len(judged)} answers right" if len(judged) else ""
    _say(f"{split}: {len(table)} items, {bits:.4f} bits per byte of reasoning and answer{right}")


@app.command("lm-eval")
def lm_eval(
    model: Annotated[Path, typer.Option(help="Model folder.")],
    out: Annotated[Path, typer.Option(help="JSON file: metrics per task, and every item's.", callback=_writable_file)],
    config: ConfigFile = CONFIG,
    results: Results = RESULTS,
    overrides: Overrides = None,
) -> None:
    """Score a model folder with lm-evaluation-harness on `evaluate.lm_eval_tasks`."""
    import torch

    from kvpipe.evaluate.harness import run_tasks, write

    work = _workspace(config, results, overrides)
    settings = work.config
    torch.set_num_threads(settings.train.threads)
    result = run_tasks(model, settings.evaluate, _device(settings), work.trusts_folder(model))
    write(result, out)
    for task, found in result["tasks"].items():
        _say(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in found["metrics"].items()))


@app.command()
def untrained(
    out: Annotated[Path, typer.Option(help="Parquet file, one row per item.", callback=_writable_file)],
    config: ConfigFile = CONFIG,
    results: Results = RESULTS,
    overrides: Overrides = None,
) -> None:
    """Score the student before training (first seed): a row of the report's table."""
    import torch

    from kvpipe.evaluate.score import evaluate_model
    from kvpipe.experiment.outofmemory import evaluation_advice, explained
    from kvpipe.stats.tables import CELL

    work = _workspace(config, results, overrides)
    torch.set_num_threads(work.config.train.threads)
    student = work.student(work.config.seeds[0]).to(_device(work.config)).eval()
    with explained("scoring", evaluation_advice(work.config.evaluate)):
        table = evaluate_model(
            student,
            work.student_tokenizer,
            work.records("test"),
            work.config.data.template,
            work.config.evaluate,
            context=work.config.data.context,
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    table.attrs[CELL] = None
    table.to_parquet(out, index=False)


@app.command("arm")
def arm_table(
    arm: Annotated[str, typer.Option(help="Name of the arm.")],
    config: ConfigFile = CONFIG,
    results: Results = RESULTS,
    overrides: Overrides = None,
) -> None:
    """Put an arm's seeds into one table."""
    from kvpipe.stats.tables import arm_table as build

    settings, paths = _experiment(config, results, overrides)
    dag = Dag(settings)
    dag.arm(arm)
    out = paths.arm_table(arm)
    out.parent.mkdir(parents=True, exist_ok=True)
    build(dag, paths, arm).to_csv(out, index=False)


@app.command()
def audit(config: ConfigFile = CONFIG, results: Results = RESULTS, overrides: Overrides = None) -> None:
    """Check that arms are compared like with like and that no test item is in train."""
    from kvpipe.stats.audit import audit as check

    settings, paths = _experiment(config, results, overrides)
    for found in check(settings, paths, paths.audit):
        _say(f"{found.status:>8}  {found.name}: {found.detail}")


@app.command()
def stats(
    config: ConfigFile = CONFIG,
    results: Results = RESULTS,
    overrides: Overrides = None,
    untrained: Annotated[Path | None, typer.Option(help="Scores of the student before training.")] = None,
) -> None:
    """Intervals, paired contrasts and corrections from the per-item scores."""
    from kvpipe.stats.tables import write_stats

    settings, paths = _experiment(config, results, overrides)
    write_stats(Dag(settings), paths, untrained)


@app.command()
def report(
    config: ConfigFile = CONFIG,
    results: Results = RESULTS,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="HTML file.", callback=_writable_file)] = None,
) -> None:
    """Render the report."""
    from kvpipe.report.render import write_report

    work = _workspace(config, results, overrides)
    write_report(work, out or work.paths.report)


Cell = Annotated[Path | None, typer.Option(help="Folder of the trained cell; under the results by default.")]


def _trained(cell: Path | None, config: list[Path], results: Path, overrides: list[str] | None) -> tuple[Config, Paths]:
    """The experiment that a cell belongs to: one of `kvpipe train --teacher` has it in its folder."""
    from kvpipe.steps.direct import kept

    return (kept(cell, overrides) if cell else None) or _experiment(config, results, overrides)


@app.command("card")
def model_card(
    arm: Annotated[str, typer.Option(help="Name of the arm.")],
    seed: Annotated[int, typer.Option(help="Seed of the cell.")] = 0,
    cell: Cell = None,
    config: ConfigFile = CONFIG,
    results: Results = RESULTS,
    overrides: Overrides = None,
) -> None:
    """Write a student's model card again, with the metrics that exist by now."""
    from kvpipe.models.card import write

    settings, paths = _trained(cell, config, results, overrides)
    _say(write(Dag(settings), paths, arm, cell or paths.cell(arm, seed)))


@app.command()
def publish(
    arm: Annotated[str, typer.Option(help="Name of the arm.")],
    repo: Annotated[str, typer.Option(help="owner/name on the hub; made if it is not there.")],
    seed: Annotated[int, typer.Option(help="Seed of the cell.")] = 0,
    cell: Cell = None,
    public: Annotated[bool, typer.Option("--public", help="A new repository is public; private otherwise.")] = False,
    config: ConfigFile = CONFIG,
    results: Results = RESULTS,
    overrides: Overrides = None,
) -> None:
    """Push a student and its card to the hub, with the token in HF_TOKEN."""
    from kvpipe.models.card import publish

    settings, paths = _trained(cell, config, results, overrides)
    publish(Dag(settings), paths, arm, cell or paths.cell(arm, seed), repo, private=not public, log=_say)


@app.command()
def align(
    src_tokenizer: Annotated[str, typer.Option(help="Folder of the teacher's tokenizer.")],
    dst_tokenizer: Annotated[str, typer.Option(help="Folder of the student's tokenizer.")],
    text: Annotated[str, typer.Option(help="Text to align.")],
    mode: Annotated[Literal["iou", "causal", "position"], typer.Option(help="Weights of the overlap.")] = "iou",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how two tokenizers' tokens line up on a text."""
    import rich

    from kvpipe.models.folders import load_tokenizer
    from kvpipe.tokens.show import show_alignment

    shown = show_alignment(
        load_tokenizer(Path(src_tokenizer)), load_tokenizer(Path(dst_tokenizer)), text, mode, as_json
    )
    if as_json:
        _say(shown)
    else:
        rich.print(shown)


@app.command()
def status(config: ConfigFile = CONFIG, results: Results = RESULTS, overrides: Overrides = None) -> None:
    """Print the grid of cells (done, running, failed, missing), what they cost, and how failed ones ended."""
    import rich

    from kvpipe.experiment.status import overview

    settings, paths = _experiment(config, results, overrides)
    rich.print(overview(Dag(settings), paths))


@app.command("config")
def config_docs(
    folder: Annotated[Path, typer.Option(help="Where config/README.md and schema.json are written.")] = Path("config"),
) -> None:
    """Generate the configuration's documentation and JSON schema."""
    from kvpipe.config.docs import write

    write(folder)


def main() -> None:
    """Entry point: errors that a user can mend are one message and exit status 1."""
    try:
        app(standalone_mode=True)
    except Exception as error:
        # safetensors has an error of its own for a full disk or a damaged file; importing it here would cost every call
        mendable = isinstance(error, USER_ERRORS) or type(error).__name__ == "SafetensorError"
        if os.environ.get("KVPIPE_TRACEBACK", "0") not in ("", "0") or not mendable:
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        if isinstance(error, MemoryError) and not error.args:
            message = "this process may not have more memory (ulimit -v, or the job's limit); raise it"
        typer.secho(printable(f"{type(error).__name__}: {message}"), fg="red", err=True)
        _say("(set KVPIPE_TRACEBACK=1 for the traceback)", err=True)
        raise SystemExit(1) from None
