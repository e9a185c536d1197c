"""Bad input: checkpoints, full disks, the command line, the environment, and what the doctor says before anything runs."""

import shutil
from collections.abc import Callable
from pathlib import Path

from bad_input_run import Case
from cases_artefacts import RESULTS, WEIGHTS, config, cut, edited, flip, renamed, tensors, without
from cases_data import GOOD, lines

from kvpipe.experiment.files import lock_file

NEXT = "train --arm one --seed 0 --made --out results/train/one/seed0 --checkpoints results/checkpoints/one/seed0"
CHECKPOINTS = RESULTS / "checkpoints/one/seed0"


def full(name: str) -> Callable[[], None]:
    """A disk that takes nothing more of a file: what is written to its partial one ends in ENOSPC."""

    def do() -> None:
        path = RESULTS / f"{name}.partial"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to("/dev/full")

    return do


HELD = []


def held(path: Path) -> None:
    """Another run's lock."""
    HELD.append(path.open("ab"))
    assert lock_file(HELD[-1].fileno())


def state(**values) -> Callable[[], None]:
    """The newest checkpoint's state with something else in it."""
    return edited(CHECKPOINTS / "step-00000001/state.json", lambda found: found.update(values))


FAULTS = [
    Case("checkpoints where a file is", r"checkpoints/one/seed0", NEXT, do=lambda: (shutil.rmtree(CHECKPOINTS), CHECKPOINTS.write_text("")), makes=("checkpoints/",)),
    Case("two runs of one cell", r"another process is training one, seed 0 \(.*is locked\): wait for it, or stop it", NEXT, do=lambda: held(CHECKPOINTS.with_name("seed0.lock"))),
    Case("a checkpoint of other settings", r"step-00000001 was made with another configuration: .*learning_rate.* there, .* now .*put the settings back, or delete", NEXT, {"train.learning_rate": 0.5}),
    Case("no room for the splits", r"results/data/train\.parquet could not be written: .*No space left", "data", do=full("data/train.parquet")),
    Case("no room for the sources", r"results/data/sources\.json could not be written: .*No space left", "data", do=full("data/sources.json")),
    Case("no room for a layer map", r"layer_map/alpha\.json could not be written: .*No space left", "layer-map --teacher alpha", do=full("layer_map/alpha.json")),
    Case("no room for the scores", r"new\.parquet could not be written: .*No space left", "evaluate --model results/train/one/seed0/model --out results/new.parquet", do=full("new.parquet")),
    Case("no room for a cell's table", r"results/arms/one\.csv could not be written: .*No space left", "arm --arm one", do=full("arms/one.csv")),
    Case("no room for the statistics", r"results/stats/arms\.csv could not be written: .*No space left", "stats", do=full("stats/arms.csv")),
    Case("no room for the audit", r"results/audit\.json could not be written: .*No space left", "audit", do=full("audit.json")),
    Case("no room for the page", r"results/report\.html could not be written: .*No space left", "report", do=full("report.html")),
    Case("no room for the card", r"README\.md could not be written: .*No space left", "card --arm one", do=full("train/one/seed0/model/README.md")),
    Case("the results are a file", r"config\.yaml/x/data/.*could not be written: (Not a directory|File exists)", "data --results config.yaml/x"),
]  # fmt: skip
COMMANDS = [
    Case("an unknown command", r"No such command 'trian'", "trian"),
    Case("an unknown option", r"No such option.*--sed", "train --sed 3"),
    Case("an unknown arm", r"no arm 'exp9'; the configuration has control, one", "train --arm exp9"),
    Case("an unknown arm to fit", r"no arm 'exp9'", "fit --arm exp9"),
    Case("an unknown fit", r"no arm fits 'nix'; the configuration fits alpha\.", "fit --fit nix"),
    Case("an arm and a fit", r"give either --arm or --fit", "fit --arm one --fit x"),
    Case("an unknown teacher", r"'gamma'.*alpha", "teacher-kv --teacher gamma"),
    Case("an unknown model", r"'gamma'.*alpha", "models --name gamma"),
    Case("an unknown reading", r"--reading.*'nonsense'.*student.*own", "teacher-kv --teacher alpha --reading nonsense"),
    Case("a reading outside of the folder", r"--reading.*'\.\./\.\./x'", "teacher-kv --teacher alpha --reading ../../x"),
    Case("a shard of none", r"shard 7 of 2: count from 0", "teacher-kv --teacher alpha --shard 7"),
    Case("a shard that is no number", r"--shard': .*integer", "teacher-kv --teacher alpha --shard x"),
    Case("pretrain of an unknown model", r"--only nix: no such model with a recipe and a path", "pretrain --only nix"),
    Case("pretrain without a recipe", r"no model of the configuration has a recipe and a path", "pretrain"),
    Case("a negative seed of a cell", r"--seed': .*greater than or equal to 0", "train --arm one --seed -1"),
    Case("a seed of a cell of 70 bits", r"--seed': .*(range|less than)", f"train --arm one --seed {2**70}"),
    Case("a seed of words", r"--seed': .*integer", "train --arm one --seed one"),
    Case("an arm's name with a path", r"no arm '\.\./x'", "arm --arm ../x"),
    Case("neither an arm nor a teacher", r"give either --arm, or --teacher", "train"),
    Case("a teacher without a student", r"--teacher goes with --student and --data", "train --teacher teachers/alpha"),
    Case("a teacher that is no folder", r"teachers/none is neither a model folder nor a hub id", "train --teacher ./teachers/none --student teachers/beta --data r.jsonl --out o", do=lambda: Path("r.jsonl").write_text(lines(GOOD))),
    Case("rows that are too few", r"r\.jsonl has 3 rows; .*give 20 or more", "train --teacher teachers/alpha --student teachers/beta --data r.jsonl --out o", do=lambda: Path("r.jsonl").write_text('{"prompt": "q", "answer": "a"}\n' * 3)),
    Case("rows without an answer", r"r\.jsonl: no column answer \(has prompt, reply\)", "train --teacher teachers/alpha --student teachers/beta --data r.jsonl --out o", do=lambda: Path("r.jsonl").write_text('{"prompt": "q", "reply": "a"}\n' * 30)),
    Case("a model and a cell", r"give either --model or --cell", "evaluate --out x.parquet"),
    Case("a split that is none", r"--split.*'tset'|split.*tset", "evaluate --model teachers/alpha --split tset --out x.parquet"),
    Case("an output below a file", r"config\.yaml is a file, not a folder", "report --out config.yaml/x.html"),
    Case("an output that is a folder", r"--out.*results is a folder; name a file in it", "report --out results"),
    Case("a text of nothing to align", r"--text is empty", "align --src-tokenizer teachers/alpha --dst-tokenizer teachers/beta --text ''"),
    Case("one tokenizer to align", r"give two tokenizers, the teacher's first", "align --tokenizer teachers/alpha --text x"),
    Case("a page without texts", r"give either --text TEXT, or --report OUT\.html and a file of texts", "align --tokenizer teachers/alpha --tokenizer teachers/beta --report x.html"),
    Case("texts that are not there", r"texts\.txt: no such file of texts", "align --tokenizer teachers/alpha --tokenizer teachers/beta --report x.html texts.txt"),
    Case("a tokenizer that is no folder", r"no folder of this name, so a hub id: teachers/none: no connection", "align --tokenizer teachers/none --tokenizer teachers/beta --text x"),
    Case("publish without a network", r"HF_HUB_OFFLINE is set", "publish --arm one --repo a/b"),
    Case("lm-eval without tasks", r"evaluate\.lm_eval_tasks", "lm-eval --model teachers/alpha --out x.json"),
]  # fmt: skip
ENVIRONMENT = [
    Case("variables of another job's launcher", r"RANK=1.*another job's launcher.*env -u", "train --arm one --made --out o", environment={"RANK": "1", "WORLD_SIZE": "4"}),
    Case("WORLD_SIZE that is no number", r"WORLD_SIZE=two.*WORLD_SIZE is no number", "train --arm one --made --out o", environment={"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}),
    Case("KVPIPE_CONFIG of nothing", r"nope\.yaml: no such configuration file", "status", environment={"KVPIPE_CONFIG": "nope.yaml"}),
    Case("KVPIPE_TRACEBACK of 0 is off", r"nope\.yaml: no such configuration file", "status --config nope.yaml", environment={"KVPIPE_TRACEBACK": "0"}),
]  # fmt: skip


PROGRAMS = {
    "data.sources": [
        {"kind": "files", "task": "math", **dict.fromkeys(("train", "validation", "test"), "r.jsonl")}
        | {"columns": {"prompt": "prompt", "answer": "answer", "tests": "why"}}
    ]
}


def doctor(what: str, says: str, **case) -> Case:
    return Case(what, says, "doctor", **case)


DOCTOR = [
    doctor("a teacher without the weights of a layer", r"alpha.*layers\.2\.", do=tensors(WEIGHTS, without("layers.2."))),
    doctor("a teacher with other names", r"alpha.*foo\.", do=tensors(WEIGHTS, renamed)),
    doctor("a teacher that is quantised", r"alpha.*quantised by gptq", do=config(quantization_config={"quant_method": "gptq"})),
    doctor("a teacher that is an encoder", r"alpha.*bert", do=config(model_type="bert", architectures=["BertForMaskedLM"])),
    doctor("negative weights", r"weights.*greater than or equal to 0", arm={"fuse": {"kind": "fixed", "weights": [-1]}}),
    doctor("an arm with a list beyond the teacher's layers", r"layer\.layers: 9 is not in the teacher alpha", arm={"layer": {"kind": "list", "layers": [0, 1, 9]}}),
    doctor("data that are not there", r"none\.jsonl", set={"data.sources": [{"kind": "files", "task": "math", "train": "none.jsonl", "validation": "none.jsonl", "test": "none.jsonl"}]}, do=(RESULTS / "data/train.parquet").unlink),
    doctor("a teacher's folder that is not there", r"teachers/none", set={"models.alpha.path": "teachers/none"}),
    doctor("walls that no program passes", r"memory_mb 1 enough", set={**PROGRAMS, "evaluate.tasks": {"math": {"scorer": "code"}}, "evaluate.sandbox": {"run_code": True, "memory_mb": 1}}, do=lambda: Path("r.jsonl").write_text(lines(GOOD))),
]  # fmt: skip
AGAIN = ("encoding/", "models/", "data/", "teacher_kv/", "layer_map/", "projector/", "checkpoints/", "train/")


def repaired(what: str, says: str, command: str = "prepare --arm one", **case) -> Case:
    return Case(what, says, command, makes=AGAIN, goes_on=True, **case)


REPAIRED = [
    repaired("data of other settings", r"^data … \(again: changed since it was made: settings", set={"data.seed": 5}),
    repaired("a model of another path", r"^model alpha … \(again: changed", set={"models.alpha.path": "teachers/again"}, do=lambda: shutil.copytree("teachers/alpha", "teachers/again")),
    repaired("a student of other settings", r"^model student … \(again: changed since it was made: settings", set={"models.student.architecture.intermediate_size": 44}),
    repaired("a checkpoint's step edited", r"step-00000001 is damaged \(checksum differs\); trying the one before", NEXT, do=state(step=100_000)),
    repaired("a checkpoint without its settings", r"step-00000001 is damaged \(checksum differs\); trying the one before", NEXT, do=state(spec=None)),
    repaired("a checkpoint with flipped bytes", r"step-00000001 is damaged \(checksum differs\); trying the one before", NEXT, do=lambda: flip(CHECKPOINTS / "step-00000001/tensors.safetensors")),
    repaired("a checkpoint that is cut off", r"step-00000001 cannot be read .*; trying the one before", NEXT, do=lambda: cut(CHECKPOINTS / "step-00000001/state.json")),
    repaired("scores of weights that were trained again", r"│ one +│ trained", "status", do=edited(RESULTS / "train/one/seed0/cost.json", lambda d: d["model"].update(digest="0" * 16))),
]  # fmt: skip
