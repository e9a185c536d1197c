"""Names: those that others rely on are where they are expected, and no name has two homes."""

import ast
import builtins
import dis
import re
from collections import defaultdict
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import CodeType

import pytest

from kvpipe.experiment import provenance

ROOT = Path(__file__).parents[1]
CONTRACT = {
    "kvpipe.tokens": ["encode(tokenizer, text)", "overlap(src_spans, dst_spans, mode)"],
    "kvpipe.align.time": [
        "safe_time_resample(x, indices, dim)",
        "segment_resample(x, src_segments, dst_segments, dim)",
    ],
    "kvpipe.align.rope": ["Rope()"],
    "kvpipe.align.layer": [
        "linear_cka(x, y, debiased)",
        "cka_matrix(dst, src, debiased)",
        "proportional_map(src_layers, dst_layers)",
        "top_k_mix(similarity, k, temperature)",
    ],
    "kvpipe.align.head": ["HeadMixer(src_heads, dst_heads)"],
    "kvpipe.align.dim": [
        "ElasticBottleneck(src_dim, dst_dim, mlp_ratio, src_params, dropout)",
        "default_mlp_ratio(n_params)",
    ],
    "kvpipe.capture": ["capture(model, input_ids, attention_mask)"],
    "kvpipe.fuse": [
        *("MeanFusion()", "AttentionFusion()", "TaskFusion()", "LearnableFusion()", "SelectFusion()"),
    ],
    "kvpipe.losses": ["kv_loss(student, target, mask, kind)"],
    "kvpipe.fit": ["ridge()"],
    "kvpipe.models": ["load_model(folder)", "load_tokenizer(folder)"],
    "kvpipe.stats": ["crossed_bootstrap(differences, n_resamples, confidence, seed)", "adjust(p_values, method)"],
}
NAMED = [(module, name) for module, names in CONTRACT.items() for name in names]


@pytest.mark.parametrize(("module", "name"), NAMED, ids=[f"{module}.{name}" for module, name in NAMED])
def test_a_name_that_others_rely_on_is_there_with_its_arguments(module, name):
    name, _, arguments = name.removesuffix(")").partition("(")
    found = getattr(import_module(module), name)
    has = list(signature(found).parameters)
    expected = [argument for argument in arguments.split(", ") if argument]
    assert [argument for argument in has if argument in expected] == expected
    others = list(signature(found).parameters.values())
    more = [p.name for p in others if p.name not in expected and p.default is p.empty and p.kind not in (2, 4)]
    assert not expected or not more, "arguments may be added with defaults"


def test_ropes_methods_are_there():
    rope = import_module("kvpipe.align.rope").Rope
    assert list(signature(rope.from_config).parameters)[:2] == ["hf_config", "layer"]
    for method in (rope.rotate, rope.unrotate):
        assert list(signature(method).parameters)[1:3] == ["k", "positions"]


def imports_of_documents() -> list[tuple[str, str, str]]:
    """(file, module, name) of every import from kvpipe that a document shows."""
    found = []
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))):
        if path.name != "LOG.md":
            for module, names in re.findall(
                r"^\s*(?:>>> )?from (kvpipe[\w.]*) import ([\w, ]+)", path.read_text(), re.M
            ):
                found += [(path.name, module, name.strip().split(" as ")[0]) for name in names.split(",")]
    return found


def test_what_documents_import_can_be_imported():
    shown = imports_of_documents()
    assert len(shown) >= 5
    for file, module, name in shown:
        assert hasattr(import_module(module), name), f"{file}: {module} has no {name}"


# ---------------------------------------------------------------- one home for each name
HOOKS = {"main"}
"""What a framework looks for under this name."""
TWICE = {
    *(
        "Cell",
        "DTYPES",
        "Geometry",
        "KV",  # the container, and the library's terms of it
        "MARK",
        "Model",
        "PATIENCE",
        "PIECE",
        "Rows",
        "SHOWN",
    ),
    *("Scores", "explained_variance", "fusion_weights", "generate"),
    *("number", "run"),
}
"""Names that still have two homes. The list may only become shorter: take off what has one home now."""


def homes() -> dict[str, list[str]]:
    """Public top-level name → the modules that define it; subcommands are named after what they call."""
    found = defaultdict(list)
    for path in sorted((ROOT / "kvpipe").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if module in ("kvpipe.cli.use", "kvpipe.cli.steps"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            for name in [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else names:
                if not name.startswith("_") and module not in found[name]:
                    found[name].append(module)
    return found


def test_no_name_stands_in_two_modules():
    steps = {"needs", "makes", "settings", "run"}  # the interface of a step's module
    twice = {
        name: modules
        for name, modules in homes().items()
        if len(modules) > 1 and name not in HOOKS
        if not (name in steps and all(module.startswith("kvpipe.steps.") for module in modules))
    }
    assert not {name: modules for name, modules in twice.items() if name not in TWICE}


def loaded_globals(code: CodeType) -> set[str]:
    """Global names that a module's functions read."""
    inner = [loaded_globals(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}.union(*inner)


def test_every_name_is_defined():
    """Shapes in annotations keep linter and type checker from looking."""
    missing = []
    for name in provenance.modules():
        if not name.endswith("__main__"):
            module = import_module(name)
            assert module.__file__
            code = compile(Path(module.__file__).read_text("utf-8"), name, "exec")
            missing += [
                f"{name}: {n}" for n in loaded_globals(code) if not hasattr(module, n) and not hasattr(builtins, n)
            ]
    assert not missing
