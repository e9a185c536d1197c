"""Bad input: the configuration, alone and followed into a run."""

import os
from pathlib import Path

from bad_input_run import Case

CONFIG = Path("config.yaml")


def written(text: str | bytes):
    """The configuration file with this content."""
    return lambda: CONFIG.write_bytes(text.encode() if isinstance(text, str) else text)


def added(text: str):
    """Lines at its end."""
    return lambda: CONFIG.write_text(CONFIG.read_text(encoding="utf-8") + text, encoding="utf-8")


def folder():
    """A folder in its place."""
    CONFIG.unlink()
    CONFIG.mkdir()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)
)
TRAIN = "train --arm x"

FILES = [
    Case("random bytes", r"config\.yaml: byte \d+ is not UTF-8 text; save it as UTF-8", do=written(bytes(range(256)))),
    Case("Latin-1", r"config\.yaml: byte 7 is not UTF-8 text", do=written("title: é".encode("latin-1"))),
    Case("UTF-16", r"config\.yaml: byte 0 is not UTF-8 text", do=written("title: x".encode("utf-16"))),
    Case("empty", r"config\.yaml: expected a mapping at the top level", do=written("")),
    Case("a list", r"config\.yaml: expected a mapping at the top level", do=written("- a\n- b\n")),
    Case("tabs", r"config\.yaml, line 2, column 1: not valid YAML: .*", do=written("train:\n\tsteps: 3\n")),
    Case("two documents", r"config\.yaml, line 2, column 1: not valid YAML", do=written("a: 1\n---\nb: 2\n")),
    Case("an object of Python", r"config\.yaml, line 1.*not valid YAML", do=written("!!python/object/apply:os.getcwd []")),
    Case("a date that is none", r"config\.yaml, line 1, column 8: not valid YAML: '2024-99-99' is no timestamp: month must be", do=written("title: 2024-99-99\n")),
    Case("a truth value that is none", r"config\.yaml, line 1, column 8: not valid YAML: 'x' is no bool", do=written("title: !!bool x\n")),
    Case("a number of 6,000 digits", r"config\.yaml, line 1, column 8: not valid YAML: '9+…' is no int", do=written("seeds: " + "9" * 6000)),
    Case("a control character", r"config\.yaml, line 2: not valid YAML: the character U\+001B may not stand in it", do=written("seeds: [1]\ntitle: a\x1bb\n")),
    Case("a key twice at the top", r"the key 'seeds' stands there already, in line \d+: keep one", do=added("seeds: [1]\n")),
    Case("an arm twice", r"the key 'control' stands there already", do=written("arms:\n  control: {}\n  control: {}\n")),
    Case("an alias bomb", r"more than 100,000 entries with all aliases", do=written(BOMB)),
    Case("an alias of itself", r"more than 100,000 entries", do=written("seeds: &a [*a]\n")),
    Case("10,000 levels", r"config\.yaml: nested too deeply", do=written("seeds: " + "[" * 10_000 + "]" * 10_000)),
    Case("a folder", r"config\.yaml is a folder; expected a configuration file", do=folder),
    Case("not there", r"none\.yaml: no such configuration file; name yours with --config", "status --config none.yaml"),
    Case("may not be read", r"config\.yaml.*(Permission denied|is a folder)", do=folder if os.getuid() == 0 else lambda: CONFIG.chmod(0)),
    Case("--set without a value", r"--set 'train\.steps': expected dotted\.key=value", "status --set train.steps"),
    Case("--set that is no YAML", r"--set 'seeds=\[1'.*not valid YAML", "status --set seeds=[1"),
    Case("--set below a value", r"train\.steps\.x: 'steps' holds a value, not a section", "status --set train.steps.x=1"),
]  # fmt: skip
KEYS = [
    Case("an unknown key", r"trian: unknown key; did you mean 'train'\?", set={"trian": {"steps": 3}}),
    Case("an unknown key of a section", r"train\.stepps: unknown key; did you mean 'steps'\?", set={"train.stepps": 3}),
    Case("a section that is a number", r"train: .*valid dictionary.*got 3", set={"train": 3}),
    Case("no student", r"student: missing, and it has no default", do=lambda: CONFIG.write_text(CONFIG.read_text().replace("student: student\n", ""))),
    Case("no source", r"data\.sources: .*at least 1 item", set={"data.sources": []}),
    Case("no arm", r"arms: .*", set={"arms": {}}),
    Case("no seed", r"seeds: .*at least 1 item", set={"seeds": []}),
    Case("a seed twice", r"seeds: .*twice", set={"seeds": [1, 1]}),
    Case("a negative seed", r"seeds\[0\]: .*greater than or equal to 0", set={"seeds": [-1]}),
    Case("a seed of 70 bits", r"seeds\[0\]: .*less than 4294967296", set={"seeds": [2**70]}),
    Case("a seed that is true", r"seeds\[0\]: expected a number, got true", set={"seeds": [True]}),
    Case("a seed that is a fraction", r"seeds\[0\]: .*integer", set={"seeds": [0.5]}),
    Case("seed_offset 2**63", r"seed_offset: .*less than 4294967296", arm={"seed_offset": 2**63}),
    Case("seed_offset below 0", r"seed_offset: -1 makes seeds -1 to -1", arm={"seed_offset": -1}),
    Case("steps as words", r"train\.steps: .*got 'many'", set={"train.steps": "many"}),
    Case("10**30 steps", r"train\.steps: .*less than or equal to 1000000000", set={"train.steps": 10**30}),
    Case("no steps", r"train\.steps: .*greater than 0", set={"train.steps": 0}),
    Case("both names of the steps", r"steps and max_steps are two names", set={"train.max_steps": 3}),
    Case("a rate of infinity", r"learning_rate: .*finite number", set={"train.learning_rate": float("inf")}),
    Case("a rate of NaN", r"learning_rate: .*finite number", set={"train.learning_rate": float("nan")}),
    Case("a batch size of true", r"batch_size: expected a number, got true", set={"train.batch_size": True}),
    Case("a truth value of 1", r"gradient_checkpointing: expected true or false, got 1", set={"train.gradient_checkpointing": 1}),
    Case("device gpu", r"train\.device: .*'gpu'.*'cuda'", set={"train.device": "gpu"}),
    Case("device cuda:x", r"train\.device: .*'cuda:x'.*'cuda:0'", set={"train.device": "cuda:x"}),
    Case("100,000 threads", r"train\.threads: .*less than or equal to 1024", set={"train.threads": 100_000}),
    Case("more micro-batches than examples", r"accumulate: 8 micro-batches of a batch of 4", set={"train.accumulate": 8}),
    Case("fp16 on a CPU", r"precision: fp16 is not computed on a CPU", set={"train.precision": "fp16", "train.device": "cpu"}),
    Case("no arm is the control", r"arms: no arm has role control", set={"arms.control.role": "experiment"}),
    Case("two controls", r"arms\.two\.role: .*no other arm", set={"arms.two": {"role": "control"}}),
    Case("a control with teachers", r"leave out teachers", set={"arms.control.set": {"teachers": ["alpha"], "loss": {"keys": {}, "values": {}}}}),
    Case("a base that is not there", r"arms\.one\.base: unknown name 'controll'.*'control'", set={"arms.one.base": "controll"}),
    Case("bases in a circle", r"circular", set={"arms.control.base": "one"}),
    Case("an arm's name with a slash", r"arms\.a/x: .*match pattern", set={"arms.a/x": {"base": "one"}}),
    Case("an arm's name of 300 letters", r"arms\.a+: .*match pattern", set={f"arms.{'a' * 300}": {"base": "one"}}),
    Case("a teacher that is no model", r"teachers\[0\]: unknown name 'alfa'.*'alpha'", arm={"teachers": ["alfa"]}),
    Case("the student as its teacher", r"the student cannot be its own teacher", arm={"teachers": ["student"]}),
    Case("a teacher twice", r"teachers: alpha is named twice", arm={"teachers": ["alpha", "alpha"]}),
    Case("a loss without teachers", r"name teachers and what is learnt from them, or neither", arm={"teachers": []}),
    Case("weights for another number of teachers", r"fuse\.weights has 1 weights for 2 teachers", arm={"teachers": ["alpha", "beta"], "fuse": {"kind": "fixed", "weights": [1]}}),
    Case("task weights, too many", r"fuse\.weights\.math has 3 weights for 2 teachers", arm={"teachers": ["alpha", "beta"], "fuse": {"kind": "task", "weights": {"math": [0.2, 0.2, 0.6], "default": [1, 0]}}}),
    Case("a negative weight", r"weights\[0\]: .*greater than or equal to 0", arm={"fuse": {"kind": "fixed", "weights": [-1]}}),
    Case("a weight of NaN", r"weights\[0\]: .*finite number", arm={"fuse": {"kind": "fixed", "weights": [float("nan")]}}),
    Case("weights 0.9 and 0.9", r"sums to 1\.8", arm={"teachers": ["alpha", "beta"], "fuse": {"kind": "fixed", "weights": [0.9, 0.9]}}),
    Case("fixed without weights", r"fuse\.weights: missing", arm={"fuse": {"kind": "fixed"}}),
    Case("weights for a task that is not there", r"fuse\.weights\.maht: unknown name 'maht'.*'math'", arm={"fuse": {"kind": "task", "weights": {"maht": [1], "default": [1]}}}),
    Case("task weights without a default", r"fuse\.weights.*default", arm={"fuse": {"kind": "task", "weights": {"math": [1]}}}),
    Case("all weights of 0", r"weight: should be greater than 0", arm={"loss.keys.weight": 0, "loss.values.weight": 0}),
    Case("a list of layers without layers", r"kind: list needs layers", arm={"layer": {"kind": "list"}}),
    Case("no layer is matched", r"loss\.keys\.layers: .*at least 1 item", arm={"loss.keys.layers": []}),
    Case("layer -1", r"loss\.keys\.layers\[0\]: .*greater than or equal to 0", arm={"loss.keys.layers": [-1]}),
    Case("a weight of 0", r"weight: should be greater than 0", arm={"loss.keys.weight": 0}),
    Case("nothing left of the texts", r"skip_sink: 100000 leaves nothing", arm={"loss.keys.skip_sink": 100_000}),
    Case("a task that is not there", r"evaluate\.tasks\.meth: unknown name 'meth'.*'math'", set={"evaluate.tasks": {"meth": {}}}),
    Case("a task twice", r"data\.sources: a task occurs twice", set={"data.sources": [{"kind": "embedded", "task": "math"}] * 2}),
    Case("a template without its field", r"must have \{answer\}", set={"data.template.answer": "answer"}),
    Case("a template with an open brace", r"write braces", set={"data.template.answer": "{answer"}),
    Case("a pattern that is none", r"answer_pattern.*no regular expression", set={"evaluate.answer_pattern": "("}),
    Case("no pattern", r"answer_pattern: .*at least 1 item", set={"evaluate.answer_pattern": []}),
    Case("a program without the answer", r"evaluate\.program: .*must have \{answer\} in it", set={"evaluate.program": "{tests}"}),
    Case("a pattern without a group", r"answer_pattern.*no group", set={"evaluate.answer_pattern": "x"}),
    Case("code without consent", r"evaluate\.sandbox\.run_code: true", set={"evaluate.tasks": {"math": {"scorer": "code"}}}),
    Case("choice without choices", r"needs the field choices", set={"evaluate.tasks": {"math": {"scorer": "choice"}}}),
    Case("a confidence of 95", r"stats\.confidence: .*less than 1", set={"stats.confidence": 95}),
    Case("a contrast with itself", r"stats\.contrasts\[0\].*itself", set={"stats.contrasts": [["one", "one"]]}),
    Case("an unknown preset", r"preset: unknown 'gsmk8'.*'gsm8k'", set={"data.sources": [{"kind": "hub", "repo": "a/b", "preset": "gsmk8", "task": "math"}]}),
    Case("an unknown source of a model", r"models\.alpha\.source: unknown 'locl'.*'local'", set={"models.alpha.source": "locl"}),
    Case("teacher KV in float8", r"store\.dtype: unknown 'fp8'", set={"store.dtype": "fp8"}),
]  # fmt: skip
FOLLOWED = [
    Case("an unknown module of LoRA", r"train\.lora\.target_modules.*nope.*(has|known|q_proj)", TRAIN, {"train.lora": {"target_modules": ["nope"]}}, arm={"loss.keys.weight": 2}),
    Case("more logits than words", r"store\.top_logits: 100000 .*(vocabulary|words)", TRAIN, {"store.top_logits": 100_000}, arm={"layer": {}, "loss": {"logits": {}}}),
    Case("a list of too few layers", r"layer\.layers.*1.*3", TRAIN, arm={"layer": {"kind": "list", "layers": [0]}}),
    Case("a list beyond the teacher's layers", r"layer\.layers: 9 is not in the teacher alpha, whose layers are 0 to 3", TRAIN, arm={"layer": {"kind": "list", "layers": [0, 1, 9]}}),
    Case("a student layer that is not there", r"loss\.keys\.layers: \[7\] not in the student \(student\), whose layers are 0 to 2", TRAIN, arm={"loss.keys.layers": [7]}),
    Case("skip_sink beyond the longest text", r"skip_sink: 400 leaves nothing: the longest training text has", TRAIN, arm={"loss.keys.skip_sink": 400}),
    Case("more similar layers than there are", r"layer\.k: 99 layers of the teacher alpha, which has 4", TRAIN, arm={"layer": {"kind": "cka", "k": 99}}),
    Case("more relation heads than the cache divides by", r"loss\.relations\.heads: 8 does not divide the 12 numbers of student", TRAIN, arm={"layer": {}, "loss": {"relations": {"heads": 8}}}),
    Case("texts longer than max_length", r"max_length", TRAIN, {"train.max_length": 3}, arm={"loss.keys.weight": 2}),
    Case("a batch larger than the data", r"batch_size", TRAIN, {"train.batch_size": 1000}, arm={"loss.keys.weight": 2}),
    Case("a store beyond its budget", r"store\.budget_gb is 1e-06", TRAIN, {"store.budget_gb": 1e-6, "store.dtype": "int8"}, arm={"loss.keys.weight": 2}, makes=("teacher_kv/", "projector/")),
    Case("more shards than examples", r"store\.shards 99 for 28 examples", TRAIN, {"store.shards": 99}, arm={"loss.keys.weight": 2}, makes=("teacher_kv/", "projector/")),
]  # fmt: skip
