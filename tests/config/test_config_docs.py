"""One source of the configuration: what is generated agrees, what is shipped loads, a mistake is one clear error."""

import json
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from kvpipe.cache.store import estimate_bytes
from kvpipe.config import (
    FUSIONS,
    PROJECTORS,
    TERMS,
    Arm,
    Config,
    ConfigError,
    FitConfig,
    LayerConfig,
    ScheduleConfig,
    StoreConfig,
    TimeConfig,
    load,
    parse,
    read,
)
from kvpipe.config import docs as configdocs
from kvpipe.config.loading import merge
from kvpipe.config.section import Section, assign
from kvpipe.models.head import PIECE

CONFIG = Path(__file__).parents[2] / "config"
SHIPPED = [
    path
    for path in sorted(CONFIG.glob("*.yaml"))
    if {"student", "data"} <= set(yaml.safe_load(path.read_text("utf-8")))
]
EMBEDDED = yaml.safe_load((CONFIG / "config.yaml").read_text("utf-8"))


# ---------------------------------------------------------------- what is generated and shipped
@pytest.mark.parametrize("name", ["README.md", "schema.json"])
def test_generated_files_are_committed(name, tmp_path):
    configdocs.write_docs(tmp_path)
    assert (CONFIG / name).read_text("utf-8") == (tmp_path / name).read_text("utf-8"), (
        f"{name} is old: run `make config`"
    )


def test_every_section_and_key_is_described():
    schema, arm = Config.model_json_schema(), Arm.model_json_schema()
    sections = {**schema["$defs"], **arm["$defs"], "Config": schema, "Arm": arm}
    missing = [name for name, section in sections.items() if not section.get("description")]
    for name, section in sections.items():
        for key, node in section["properties"].items():
            target = sections[node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node
            if not (node.get("description") or target.get("description")):
                missing.append(f"{name}.{key}")
    assert not missing, f"no docstring under these fields of kvpipe/config/: {missing}"


def test_every_key_is_in_the_readme_with_its_default():
    text = configdocs.readme()
    rows = {line.split("|")[1].strip(" `"): line for line in text.splitlines() if line.startswith("| `")}
    flat = {
        **_flat("", Config(**EMBEDDED).model_dump(exclude={"models", "arms", "data"})),
        **_flat("", Arm().model_dump()),
    }
    assert set(flat) <= set(rows)
    assert "| `0.003` |" in rows["train.learning_rate"]
    assert "| `[0, 1, 2]` |" in rows["seeds"]
    assert "| true or false | `false` |" in rows["train.gradient_checkpointing"]
    # no default means that it must be given
    assert "| text |  |" in rows["student"]
    assert "`pruned` |  |" in rows["models.<name>.source"]


def _flat(path, value):
    """Dotted key → value of nested sections (free-form mappings are values)."""
    if not isinstance(value, dict) or path.endswith("weights"):
        return {path: value}
    return {k: v for key, part in value.items() for k, v in _flat(f"{path}.{key}".strip("."), part).items()}


def test_the_example_in_the_readme_is_true():
    example = yaml.safe_load(configdocs.readme().split("## `arms`")[1].split("```")[1].removeprefix("yaml"))
    config = parse({**EMBEDDED, "arms": {**EMBEDDED["arms"], **example["arms"]}})
    arm, base = config.arm("keys-only"), config.arm("exp1")
    assert list(arm.loss) == ["keys"] and arm.loss["keys"].weight == 3 and list(base.loss) == ["values"]
    assert (arm.role, base.role) == ("ablation", "experiment")


def test_schema_accepts_what_pydantic_accepts():
    validator = jsonschema.Draft202012Validator(json.loads(configdocs.json_schema()))
    validator.validate(EMBEDDED)
    assert not validator.is_valid({**EMBEDDED, "trian": {}})
    assert not validator.is_valid({**EMBEDDED, "train": {"steps": "many"}})


@pytest.mark.parametrize("path", sorted((CONFIG / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_lie_over_the_cluster_configuration(path):
    """Each resolves, says in its title or its comment what it is, and changes something."""
    base, config = load(CONFIG / "hpc.yaml"), load([CONFIG / "hpc.yaml", path])
    assert config != base and path.read_text("utf-8").startswith("# Over config/hpc.yaml: ")
    assert list(config.arms) == list(base.arms)
    for name in config.arms:
        config.arm(name)
    with pytest.raises(ConfigError):
        load(path)  # an overlay is no configuration of its own


@pytest.mark.parametrize("path", [None, *sorted((CONFIG / "recipes").glob("*.yaml"))], ids=lambda p: p and p.name)
def test_shipped_fits_and_scores_have_room(path):
    """What a fit gathers, fp32, if every text were the longest; weights of one teacher and a piece of its logits."""
    config = load([CONFIG / "hpc.yaml", *([path] if path else [])])
    # layers, KV heads x dimension, vocabulary, GB of weights
    shapes = {"qwen": (28, 512, 152_064, 15.2), "llama": (32, 1024, 128_256, 16.1)}
    shapes |= {"qwen-math": shapes["qwen"], "qwen-coder": shapes["qwen"], "mistral": (32, 1024, 32_768, 14.5)}
    if path and path.name == "teacher70b.yaml":
        shapes["llama"] = (80, 1024, 128_256, 141 / 2)  # one of 2 GPUs
    for name in config.arms:
        arm = config.arm(name)
        row = sum(shapes[teacher][0] * shapes[teacher][1] * 2 * 4 for teacher in arm.teachers)
        assert row * arm.fit.examples * config.train.max_length <= 100e9, name
    card = 24e9 if path and path.name == "gpu24.yaml" else 80e9
    for _, _, vocabulary, weights in shapes.values():
        assert weights * 1e9 + 3 * 4 * max(PIECE, vocabulary) < 0.95 * card


def test_the_cluster_configuration_is_what_it_says():
    """The figures in its comments that follow from shapes, and the settings of the method."""
    config = load(CONFIG / "hpc.yaml")
    shapes = {"qwen": (28, 4, 128), "llama": (32, 8, 128)}
    text = (CONFIG / "hpc.yaml").read_text("utf-8")
    for shape, said in ((shapes["qwen"], ("29,120", "57,344")), (shapes["llama"], ("66,560", "131,072"))):
        for dtype, figure in zip(("int8", "bf16"), said, strict=True):
            store = StoreConfig(dtype=dtype)
            assert f"{estimate_bytes(store, shape, shape[0], 1, 0) - 16:,}" == figure and figure in text
    assert len(config.arms) * len(config.seeds) == 24
    assert config.arm("exp6").fuse.weights == {"math": [0.7, 0.3], "code": [0.3, 0.7]}
    assert (config.store.dtype, config.train.precision, config.train.gradient_checkpointing) == ("int8", "bf16", True)
    large = load([CONFIG / "hpc.yaml", CONFIG / "recipes" / "teacher70b.yaml"])
    assert large.models["llama"].load.sharded and large.arm("full").projector.mlp_ratio == 2.0


@pytest.mark.parametrize("overlay", ["study.yaml", "study-20000.yaml", "study-compress.yaml"])
def test_the_study_lies_over_the_embedded_experiment(overlay):
    study = load([CONFIG / "config.yaml", CONFIG / overlay])
    assert set(load(CONFIG / "config.yaml").arms) <= set(study.arms)
    for name in study.arms:
        study.arm(name)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_load(path):
    config = load(path)
    for name in config.arms:
        config.arm(name)


def test_config_yaml_is_among_the_shipped():
    assert CONFIG / "config.yaml" in SHIPPED


# ---------------------------------------------------------------- mistakes
MATH = {"kind": "embedded", "task": "math"}
MISTAKES = [
    # dotted overrides of the embedded experiment, the path in the message, the nearest valid name (or what is said)
    ({"trian.steps": 5}, "trian", "'train'"),
    ({"train.step": 5}, "train.step", "'steps'"),
    ({"train.lora": {"rnak": 4}}, "train.lora.rnak", "'rank'"),
    ({"data.sources": [{**MATH, "trian": 3}]}, "data.sources[0].trian", "'train'"),
    ({"data.sources": [MATH, {"kind": "embeded", "task": "code"}]}, "data.sources[1].kind", "'embedded'"),
    ({"data.sources": [{**MATH, "task": "meth"}]}, "data.sources[0].task", "'math'"),
    ({"data.sources": [{"task": "math"}]}, "data.sources[0].kind", "missing"),
    ({"models.student.recipe.tokenizer.vocab": 300}, "models.student.recipe.tokenizer.vocab", "'vocab_size'"),
    ({"models.math.recipe.architectur": {}}, "models.math.recipe.architectur", "'architecture'"),
    ({"models.math.source": "locla"}, "models.math.source", "'local'"),
    ({"models.math-random.like": "mathh"}, "models.math-random.like", "'math'"),
    ({"student": "studnet"}, "student", "'student'"),
    ({"arms.exp1.bsae": "control"}, "arms.exp1.bsae", "'base'"),
    ({"arms.exp5.base": "exp"}, "arms.exp5.base", "'exp6'"),
    ({"arms.exp1.role": "nul"}, "arms.exp1.role", "'null'"),
    ({"arms.exp1.set.teachers": ["code", "mth"]}, "arms.exp1.set.teachers[1]", "'math'"),
    ({"arms.exp1.set.loss.valeus": {}}, "arms.exp1.set.loss.valeus", "'values'"),
    ({"arms.exp1.set.loss.values.wieght": 1}, "arms.exp1.set.loss.values.wieght", "'weight'"),
    ({"arms.exp1.set.loss.more": {"kind": "kyes"}}, "arms.exp1.set.loss.more.kind", "'keys'"),
    ({"arms.exp1.set.los": {}}, "arms.exp1.set.los", "'loss'"),
    ({"arms.exp6.set.fuse.kind": "tsk"}, "arms.exp6.set.fuse.kind", "'task'"),
    ({"arms.full.set": {"title": 1, "title.x": 1}}, "arms.full.set.title.x", "not a section"),
    ({"arms.exp1.set.time": {"differing": "predictive"}}, "arms.exp1.set.time.differing", "no effect under 'overlap'"),
    ({"arms.control.base": "full"}, "arms.control.base", "circular"),
    ({"train.steps": "many"}, "train.steps", "'many'"),
    ({"train.steps": -3}, "train.steps", "greater than 0"),
    ({"train.lora": {"target_modules": 3}}, "train.lora.target_modules", "all-linear"),
    ({"models.math.recipe.steps": "x"}, "models.math.recipe.steps", "'x'"),
    ({"seeds": [1, 1]}, "seeds", "twice"),
    # numbers that no run can use
    ({"seeds": [0, -1]}, "seeds[1]", "greater than or equal to 0"),
    ({"seeds": [2**70]}, "seeds[0]", "less than 4294967296"),
    ({"seeds": [0, True]}, "seeds[1]", "expected a number, got true"),
    ({"data.seed": -1}, "data.seed", "greater than or equal to 0"),
    ({"arms.null-control.set.seed_offset": 2**63}, "arms.null-control.set.seed_offset", "less than 4294967296"),
    ({"arms.null-control.set.seed_offset": 2**32 - 2}, "arms.null-control.set.seed_offset", "2**32 - 1"),
    ({"arms.null-control.set.seed_offset": -102}, "arms.null-control.set.seed_offset", "seeds -1 to 3"),
    ({"train.steps": 10**30}, "train.steps", "less than or equal to 1000000000"),
    ({"arms.exp1.set.step_factor": 1e9}, "arms.exp1.set.step_factor", "beyond 1,000,000,000 steps"),
    ({"train.learning_rate": float("inf")}, "train.learning_rate", "finite number"),
    ({"train.learning_rate": float("nan")}, "train.learning_rate", "finite number"),
    ({"train.learning_rate": "1e400"}, "train.learning_rate", "finite number"),
    ({"train.batch_size": True}, "train.batch_size", "expected a number, got true"),
    ({"stats.confidence": True}, "stats.confidence", "expected a number, got true"),
    (
        {"arms.exp6.set.fuse.weights.math": [0.5, True]},
        "arms.exp6.set.fuse.weights.math[1]",
        "expected a number, got true",
    ),
    ({"train.gradient_checkpointing": 1}, "train.gradient_checkpointing", "expected true or false, got 1"),
    ({"evaluate.sandbox.run_code": "yes"}, "evaluate.sandbox.run_code", "expected true or false, got 'yes'"),
    ({"train.threads": 100000}, "train.threads", "less than or equal to 1024"),
    ({"train.accumulate": 13}, "train", "accumulate: 13 micro-batches of a batch of 12"),
    ({"train.device": "gpu"}, "train.device", "'cuda'"),
    ({"train.device": "cuda:x"}, "train.device", "'cuda:0'"),
    # the arm that all others are compared with
    ({"arms.second": {"role": "control"}}, "arms.second.role", "no other arm"),
    ({"arms.control.role": "experiment"}, "arms", "no arm has role control"),
    ({"stats.headline": "fulll"}, "stats.headline", "no arm is named 'fulll'; did you mean 'full'?"),
    # the shipped statistics and other arms
    ({"arms": {"alone": {}}}, "stats.headline", "(known: alone); name one of them, or leave stats.headline out"),
    ({"stats.headline": "control"}, "stats.headline", "is the control"),
    ({"stats.contrasts": [["full", "exp9"]]}, "stats.contrasts[0]", "no arm is named 'exp9'"),
    ({"stats.contrasts": [["full", "full"]]}, "stats.contrasts[0]", "compared with itself"),
    (
        {"arms.control.set": {"teachers": ["math"], "loss": {"keys": {}, "values": {}}}},
        "arms.control.set",
        "leave out teachers (math)",
    ),
    ({"arms.control.set": {"loss": {"keys": {}, "values": {}}}}, "arms.control.set", "or neither"),
    # keys that had another name
    ({"arms.exp1.set.steps": 3}, "arms.exp1.set.steps", "is called step_factor now"),
    (
        {"arms.null-shuffled.set.content": "shuffled"},
        "arms.null-shuffled.set.content",
        "is shuffle_teacher now: true for",
    ),
    ({"arms.exp2.set.layer": {"kind": "cka", "by": "own"}}, "arms.exp2.set.layer.by", "own is called kv now"),
    ({"arms.exp1.set.loss.lambda_v": 3}, "arms.exp1.set.loss.lambda_v", "is loss.values.weight now"),
    ({"arms.exp1.set.loss": {"kind": "kv"}}, "arms.exp1.set.loss.kind", "a loss is a set of terms"),
    ({"arms.exp4.set.time.text": "own"}, "arms.exp4.set.time.text", "under segment the teacher reads its own text"),
    ({"models.math.parameters": 7000}, "models.math.parameters", "are counted; leave it out"),
    # what an arm matches
    ({"arms.exp1.set.teachers": ["math", "math"]}, "arms.exp1.set", "math is named twice"),
    ({"arms.exp1.set.loss.values.skip_sink": 512}, "arms.exp1.set.loss.values.skip_sink", "at most 512 tokens"),
    ({"arms.exp1.set.loss.values.layers": []}, "arms.exp1.set.loss.values.layers", "at least 1 item"),
    ({"arms.exp1.set.loss.values.layers": [-1]}, "arms.exp1.set.loss.values.layers[0]", "greater than or equal to 0"),
    ({"arms.exp1.set.loss.values.layers": [1, 1]}, "arms.exp1.set.loss.values", "holds a layer twice"),
    ({"arms.exp1.set.layer": {"kind": "list"}}, "arms.exp1.set.layer", "kind: list needs layers"),
    ({"arms.exp1.set.layer": {"kind": "list", "layers": []}}, "arms.exp1.set.layer.layers", "at least 1 item"),
    ({"arms.exp1.set.loss.values.weight": 0}, "arms.exp1.set.loss.values.weight", "greater than 0"),
    ({"arms.control.set.loss.cross_entropy.weight": 0}, "arms.control.set", "nothing to train on"),
    ({"arms.relation.set.teachers": ["math", "code"]}, "arms.relation.set", "loss.relations has one teacher"),
    (
        {"arms.exp1.set.loss.values.schedule": {"kind": "linear", "warmup": 0.5, "until": 0.5}},
        "arms.exp1.set.loss.values.schedule",
        "below until",
    ),
    # settings that have no effect
    ({"arms.relation.set.fit": {"method": "ridge"}}, "arms.relation.set", "fit: has no effect on the terms"),
    ({"arms.relation.set.layer": {"kind": "cka"}}, "arms.relation.set", "layer: has no effect on the terms"),
    ({"arms.control.set.time": {"mode": "iou"}}, "arms.control.set", "time: has no effect on the terms"),
    ({"arms.control.set.shuffle_teacher": True}, "arms.control.set", "no effect without teachers"),
    ({"arms.exp1.set.layer.k": 4}, "arms.exp1.set.layer.k", "no effect under 'proportional'"),
    ({"arms.exp1.set.projector.mlp_ratio": 2}, "arms.exp1.set.projector.mlp_ratio", "unknown key"),
    ({"arms.exp1.set.projector.learning_rate": 1}, "arms.exp1.set.projector.learning_rate", "no effect under 'frozen'"),
    ({"arms.exp1.set.loss.values.temperature": 7}, "arms.exp1.set.loss.values.temperature", "unknown key"),
    ({"arms.exp1.set.fit.method": "reconstruct"}, "arms.exp1.set", "cannot start projector.kind: linear"),
    ({"store.top_logits": 0, "arms.logit-kd.set.loss": {"logits": {}}}, "store.top_logits", "arm 'logit-kd'"),
    # fusion
    ({"arms.exp1.set.fuse.entropy": 0.1}, "arms.exp1.set.fuse.entropy", "unknown key"),
    ({"arms.exp6.set.fuse.entropy": 0.1}, "arms.exp6.set.fuse", "weights that are learned"),
    ({"arms.exp5.set.fuse.offsets": True}, "arms.exp5.set.fuse.offsets", "unknown key"),
    ({"arms.exp6.set.fuse.weights.math": [0, 0]}, "arms.exp6.set.fuse", "weights.math: [0.0, 0.0] sums to 0"),
    ({"arms.exp6.set.fuse.weights.math": [0.9, 0.9]}, "arms.exp6.set.fuse", "sums to 1.8"),
    (
        {"arms.exp6.set.fuse.weights.math": [-0.5, 1.5]},
        "arms.exp6.set.fuse.weights.math[0]",
        "greater than or equal to 0",
    ),
    ({"arms.exp6.set.fuse.weights.math": [float("nan"), 1]}, "arms.exp6.set.fuse.weights.math[0]", "finite number"),
    ({"arms.exp6.set.fuse.weights.math": [1.0]}, "arms.exp6.set", "1 weights for 2 teachers"),
    ({"arms.exp6.set.fuse.weights.maht": [1, 0]}, "arms.exp6.set.fuse.weights.maht", "'math'"),
    (
        {"arms.exp6.set.fuse": {"kind": "fixed", "weights": {"math": [1, 0]}}},
        "arms.exp6.set.fuse.weights",
        "valid list",
    ),
    ({"arms.logit-kd.set.fuse": {"kind": "select"}}, "arms.logit-kd.set", "weighs teachers by mean, fixed, task"),
]


@pytest.mark.parametrize(("overrides", "path", "said"), MISTAKES, ids=[f"{path}={said}" for _, path, said in MISTAKES])
def test_a_mistake_is_one_line_with_its_path_and_the_nearest_name(overrides, path, said):
    with pytest.raises(ConfigError) as caught:
        parse(EMBEDDED, overrides, origin="mine.yaml")
    first, *problems = str(caught.value).splitlines()
    assert first == "mine.yaml:"
    assert len(problems) == 1, problems
    assert problems[0].startswith(f"{path}: ")
    assert said in problems[0].split("(known")[0] if said.startswith("'") else said in problems[0]


def test_numbers_are_written_as_yaml_has_them():
    """Whole numbers for fractions, and `1e-3`, which in YAML is a text; true and false where they are meant."""
    text = "{learning_rate: 1e-3, weight_decay: 0, max_grad_norm: 1, gradient_checkpointing: yes, device: 'cuda:1'}"
    train = parse({**EMBEDDED, "train": yaml.safe_load(text)}).train
    assert (train.learning_rate, train.weight_decay, train.max_grad_norm) == (0.001, 0.0, 1.0)
    assert train.gradient_checkpointing is True and train.device == "cuda:1"
    thirds = {"kind": "fixed", "weights": [0.33, 0.67]}
    assert parse(EMBEDDED, {"arms.exp5.set.fuse": thirds}).arm("exp5").fuse.weights == [0.33, 0.67]


def test_no_number_takes_a_truth_value_and_no_truth_value_a_number():
    """Whatever field: every section of the configuration and of an arm."""
    kinds = [settings for one in (FUSIONS, PROJECTORS, TERMS) for settings in one.settings.values()]
    sections, seen = [Config, Arm, *kinds], set()
    checked = {"number": 0, "truth": 0}
    while sections:
        section = sections.pop()
        if section in seen:
            continue
        seen.add(section)
        for name, field in section.model_fields.items():
            kinds = set(_types(field.annotation))
            sections += [kind for kind in kinds if issubclass(kind, Section)]
            if kinds & {int, float, bool}:
                kind, wrong = ("truth", 1) if bool in kinds else ("number", True)
                checked[kind] += 1
                said = "expected a number, got true" if kind == "number" else "expected true or false, got 1"
                forms = wrong, [wrong], {"a": wrong}, {"a": [wrong]}  # one of them is the field's
                under = {section.tag: section.options[name][0]} if name in section.options else {}
                assert any(said in str(_refused(section, {**under, name: value})) for value in forms), (section, name)
    assert checked["number"] > 50 and checked["truth"] >= 7, checked


def _refused(section, values):
    with pytest.raises(ValidationError) as caught:
        section.model_validate(values)
    return caught.value


def _types(annotation):
    """The types that a field's annotation is made of."""
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for part in get_args(annotation):
        yield from _types(part)


def test_several_mistakes_are_told_together():
    with pytest.raises(ConfigError) as caught:
        parse(EMBEDDED, {"train.step": 5, "stats.reasmples": 3, "train.batch": 2, "store.dtype": "int9"})
    paths = {line.split(":")[0] for line in str(caught.value).splitlines()[1:]}
    assert paths == {"train.step", "train.batch", "stats.reasmples", "store.dtype"}


def test_a_base_answers_for_its_own_mistake():
    # `derived` comes first in the file and inherits the mistake
    arms = {"derived": {"base": "wrong"}, "wrong": {"base": "exp1", "set": {"loss.lambda_x": {}}}, **EMBEDDED["arms"]}
    with pytest.raises(ConfigError, match=r"arms\.wrong\.set\.loss\.lambda_x: unknown key"):
        parse({**EMBEDDED, "arms": arms})


def test_a_missing_key_is_named():
    values = {key: value for key, value in EMBEDDED.items() if key != "student"}
    assert _only_line(values) == "student: missing, and it has no default"


def _only_line(values):
    with pytest.raises(ConfigError) as caught:
        parse(values)
    (line,) = str(caught.value).splitlines()[1:]
    return line


def test_control_needs_no_role_of_its_own():
    arms = {"control": {}, "other": {"base": "control", "set": {"seed_offset": 7}}}
    for name in ("control", "alone"):
        config = parse({**EMBEDDED, "stats": {}, "arms": {name: {}, "other": {**arms["other"], "base": name}}})
        assert (config.control, config.arm(name).role, config.arm("other").role) == (name, "control", "ablation")


def test_control_must_be_there():
    arms = {"alone": {"label": "no control", "role": "ablation"}}
    assert "no arm has role control" in _only_line({**EMBEDDED, "arms": arms})


# ---------------------------------------------------------------- base and set
def test_set_changes_one_setting_or_replaces_a_section():
    arms = {
        **EMBEDDED["arms"],
        "one": {"base": "exp1", "set": {"loss.keys.weight": 7}},
        "whole": {"base": "exp1", "set": {"loss": {"keys": {"weight": 7}}}},
        "order": {"base": "exp1", "set": {"loss": {"keys": {}}, "loss.keys.weight": 5}},
        "less": {"base": "one", "set": {"loss.values": None}},
    }
    config = parse({**EMBEDDED, "arms": arms})
    weights = {name: {term: s.weight for term, s in config.arm(name).loss.items()} for name in arms}
    assert weights["exp1"] == {"values": 3} and weights["one"] == {"values": 3, "keys": 7}
    assert weights["whole"] == weights["less"] == {"keys": 7} and weights["order"] == {"keys": 5}


def test_resolving_an_arm_changes_nothing():
    config = parse(EMBEDDED)
    before = config.model_dump_json()
    first = {name: config.arm(name) for name in config.arms}
    assert {name: config.arm(name) for name in reversed(config.arms)} == first
    assert config.model_dump_json() == before
    assert parse(config.model_dump()) == config


def test_assign_makes_missing_levels_and_refuses_to_enter_a_value():
    values = {"a": {"b": 1}}
    assign(values, "a.c.d", 2)
    assert values == {"a": {"b": 1, "c": {"d": 2}}}
    with pytest.raises(ConfigError, match=r"a\.b\.c: 'b' holds a value"):
        assign(values, "a.b.c", 3)


def test_files_that_are_no_configuration(tmp_path):
    path = tmp_path / "x.yaml"
    for text, said in [
        ("- 1\n", "expected a mapping"),
        ("a: [1\n", "not valid YAML"),
        (
            "title: 2026-13-45\n",
            "line 1, column 8: not valid YAML: '2026-13-45' is no timestamp: month must be in 1..12",
        ),
        ("title: Gr\u00f6\u00dfe\n".encode("latin-1"), "byte 9 is not UTF-8 text"),
        ("title: x\n".encode("utf-16"), "byte 0 is not UTF-8 text"),
        (bytes(range(128, 256)), "byte 0 is not UTF-8 text"),
    ]:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConfigError, match=said) as caught:
            load(path)
        assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="is a folder"):
        load(tmp_path)
    with pytest.raises(ConfigError, match=r"--set 'train.steps': expected dotted.key=value"):
        load(CONFIG / "config.yaml", ["train.steps"])
    assert load(CONFIG / "config.yaml", ["train.steps=7", "seeds=[5]"]).train.steps == 7


def test_a_key_that_stands_twice_is_refused_wherever_it_stands(tmp_path):
    """YAML's own rule, which PyYAML does not keep: the last one won."""
    over = tmp_path / "over.yaml"
    for text, key, lines in [
        ("seeds: [1]\ntitle: x\nseeds: [2]\n", "seeds", (3, 1)),
        ("arms:\n  control: {role: control}\n  control: {}\n", "control", (3, 2)),
        ("arms: {exp1: {set: {loss.lambda_k: 1, loss.lambda_k: 2}}}\n", "loss.lambda_k", (1, 1)),
    ]:
        over.write_text(text)
        for paths in (over, [CONFIG / "config.yaml", over]):
            with pytest.raises(ConfigError) as caught:
                load(paths)
            (line,) = str(caught.value).splitlines()
            assert line.startswith(f"{over}, line {lines[0]}, column ")
            assert f"the key {key!r} stands there already, in line {lines[1]}" in line
    with pytest.raises(ConfigError, match=r"--set 'train=.*'steps' stands there already"):
        load(CONFIG / "config.yaml", ["train={steps: 3, steps: 4}"])
    # what an anchor brings in may be given anew
    over.write_text("train: &base {steps: 3, warmup: 0}\nother: {<<: *base, steps: 4}\n")
    assert read(over)["other"] == {"steps": 4, "warmup": 0}


def test_max_steps_is_another_name_of_steps(tmp_path):
    assert load(CONFIG / "config.yaml", ["train.max_steps=7"]).train.steps == 7, "over the file's steps"
    renamed = {**EMBEDDED, "train": {"max_steps": 9}}
    assert parse(renamed).train.steps == 9 and parse(renamed) == parse({**EMBEDDED, "train": {"steps": 9}})
    for name in ("steps", "max_steps"):
        assert parse(renamed, {f"train.{name}": 5}).train.steps == 5
    for values, overrides in (
        ({**EMBEDDED, "train": {"steps": 3, "max_steps": 3}}, {}),
        (EMBEDDED, {"train.steps": 3, "train.max_steps": 3}),
    ):
        with pytest.raises(ConfigError, match=r"train: steps and max_steps are two names of one setting; give one"):
            parse(values, overrides)
    with pytest.raises(ConfigError, match=r"train\.steps.*many"):
        parse(EMBEDDED, {"train.max_steps": "many"})


# ---------------------------------------------------------------- several files
def test_overlays_are_laid_over_in_order_as_snakemake_does(tmp_path):
    """The reference is Snakemake's own merge of several --configfile."""
    from snakemake.utils import update_config

    overlays = [
        {"seeds": [5], "train": {"steps": 7}, "arms": {"exp1": {"set": {"loss": {"keys": {"weight": 0.5}}}}}},
        {"train": {"batch_size": 3, "steps": 9}, "arms": {"more": {"base": "exp1"}}, "title": "third"},
    ]
    paths, expected = [CONFIG / "config.yaml"], parse(EMBEDDED).model_dump(exclude_unset=True)
    for number, overlay in enumerate(overlays):
        paths.append(tmp_path / f"{number}.yaml")
        paths[-1].write_text(yaml.safe_dump(overlay))
        update_config(expected, overlay)
    config = load(paths, ["train.warmup=0.25"])
    assert config.model_dump(exclude_unset=True) == parse(expected, {"train.warmup": 0.25}).model_dump(
        exclude_unset=True
    )
    assert (config.seeds, config.train.steps, config.train.batch_size, config.title) == ([5], 9, 3, "third")


def test_merge_leaves_its_arguments_alone():
    below, over = {"a": {"b": 1}, "c": 2}, {"a": {"d": 3}, "c": {"e": 4}}
    assert merge(below, over) == {"a": {"b": 1, "d": 3}, "c": {"e": 4}}
    assert (below, over) == ({"a": {"b": 1}, "c": 2}, {"a": {"d": 3}, "c": {"e": 4}})


def test_a_mistake_in_an_overlay_names_the_files(tmp_path):
    path = tmp_path / "over.yaml"
    path.write_text("train: {stepps: 3}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml, .*over\.yaml:\ntrain\.stepps: unknown key"):
        load([CONFIG / "config.yaml", path])


# ---------------------------------------------------------------- every option of every kind
@pytest.mark.parametrize("kinds", [FUSIONS, PROJECTORS, TERMS], ids=lambda kinds: kinds.what)
def test_an_option_of_another_kind_is_an_unknown_key(kinds):
    everything = {option for settings in kinds.settings.values() for option in settings.model_fields}
    refused = 0
    for kind, settings in kinds.settings.items():
        for option in sorted(everything - set(settings.model_fields)):
            with pytest.raises(ValidationError, match="unknown keys"):
                settings.model_validate({"kind": kind, option: 1})
            refused += 1
    assert refused >= 4


@pytest.mark.parametrize("section", [TimeConfig, LayerConfig, FitConfig, ScheduleConfig])
def test_an_option_without_effect_is_refused_under_every_kind_that_has_none(section):
    kinds = get_args(section.model_fields[section.tag].annotation)
    for option, allowed in section.options.items():
        assert set(allowed) <= set(kinds) and option in section.model_fields, option
        for kind in set(kinds) - set(allowed):
            with pytest.raises(ValidationError, match="idle keys"):
                section.model_validate({section.tag: kind, option: section.model_fields[option].default})
