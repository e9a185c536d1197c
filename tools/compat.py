"""The tables of docs/method/compatibility.md, from real runs: `make compat`, or python tools/compat.py [--check].

Every mark is the outcome of the test of the same subject, called here by name on one entry of a zoo: ✓ it holds, ✗ it does
not, – the family has no such thing, *refused* an error that names the family (listed below the tables). Largest errors are
rounded up to a power of ten, so that a run on another machine gives the same text. With --check nothing is written; the exit
status says whether the committed text is the one that this run gives.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import test_capture
import tokenizers
import torch
import transformers
from model_zoo import ARCHITECTURES, VOCAB, Architecture
from rope_zoo import LONG, SHORT, VARIANTS, llama_config
from test_spans import ADVERSARIAL, assert_covers
from tokenizer_zoo import CORPUS, FAMILIES, build
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kvpipe.align.rope import Rope
from kvpipe.cache.capture import Recorder, capture, kv_geometry
from kvpipe.report.pair import TALLIED, tally_cells
from kvpipe.tokens.compare import Tallied
from kvpipe.tokens.matrix import encode

METHOD = Path(__file__).parents[1] / "docs" / "method" / "compatibility.md"
BEGIN, END = "<!-- compat:begin -->\n", "<!-- compat:end -->"
LAYOUTS = ("stablelm", "cohere", "glm", "gptj", "llama4", "gpt_oss", "nanochat", "gemma3", "falcon_rotary")
RANDOM_TEXTS = 200


def power(error: float) -> str:
    """An upper bound of the error, a power of ten, not finer than single precision carries."""
    return f"≤ 1e{max(-6, math.ceil(math.log10(max(error, 1e-9))))}"


def outcome(check: Callable, *arguments: str, refused: str | None = None) -> str:
    """Runs a test; `refused` is what the error says where a refusal is the documented outcome."""
    torch.manual_seed(0)
    try:
        check(*arguments)
    except pytest.skip.Exception:
        return "–"
    except AssertionError as error:
        print(f"{check.__name__}{arguments}: {error}", file=sys.stderr)
        return "✗"
    except (RuntimeError, ValueError) as error:
        if refused is None or refused not in str(error):
            raise
        return "refused"
    return "✓"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ------------------------------------------------------------------------------------------ architectures


def oracle_error(architecture: Architecture) -> float:
    """Largest difference of captured keys before rotation, and values, from those of plain hooks."""
    torch.manual_seed(0)
    model, errors = architecture.build(), []
    for padding in ("left", "right"):
        ids, mask = test_capture.batch(padding)
        with architecture.hooks(model) as read:
            kv = capture(model, ids, mask)
        errors += [
            float((ours - theirs).abs().max()) for ours, theirs in zip((kv.keys, kv.values), read(), strict=True)
        ]
    return max(errors)


def reentrant(name: str) -> None:
    """Gradient checkpointing in its reentrant form."""
    model = ARCHITECTURES[name].build().train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with Recorder(model) as recorder:
        model(input_ids=test_capture.batch()[0], use_cache=False)
    recorder.kv()


def rope_name(architecture: Architecture) -> str:
    """Type and layout of a model's rotary embeddings; types of different layers side by side."""
    names = []
    for rope in Rope.of_layers(architecture.build_config()):
        if rope.inv_freq is None:
            names.append("none")
            continue
        name = f"{rope.rope_type}, {rope.layout}"
        if 2 * len(rope.inv_freq) < architecture.geometry[2]:
            name += ", partial"
        names.append(name + (", backwards" if rope.direction < 0 else ""))
    return " / ".join(dict.fromkeys(names))


def architecture_row(name: str) -> list[str]:
    """One architecture of tests/model_zoo.py."""
    architecture = ARCHITECTURES[name]
    _, heads, dim = architecture.geometry
    by = "own cache" if architecture.through_cache else "attention"
    refused, error = "gradient checkpointing", oracle_error(architecture)
    return [
        f"`{name}`",
        f"{heads} × {dim}",
        rope_name(architecture),
        f"{by} {outcome(test_capture.test_equals_projection_hooks, name, 'left')}",
        outcome(test_capture.test_gradient_equals_that_through_plain_hooks, name),
        *(outcome(test_capture.test_padding_changes_nothing, name, side) for side in ("left", "right")),
        outcome(test_capture.test_gradient_under_checkpointing, name, refused=refused),
        outcome(reentrant, name, refused=refused),
        outcome(test_capture.test_bfloat16, name),
        *(
            outcome(test_capture.test_rotated_again_equals_the_models_own_cache, name, attention)
            for attention in ("sdpa", "eager")
        ),
        "0" if error == 0 else power(error),
    ]


ARCHITECTURE_HEAD = ["architecture", "KV heads × dim", "rotary embedding", "capture by", "gradient", "left padding"]
ARCHITECTURE_HEAD += ["right padding", "checkpointing", "reentrant", "bf16", "sdpa", "eager", "largest error"]


# ---------------------------------------------------------------------------------------------- rotary


def rope_errors(architecture: Architecture, time: int, **settings) -> tuple[float, float, Rope]:
    """Largest |rotate(unrotate(k)) − k| and |rotate(pre) − cached| of one forward, k being transformers' cached keys."""
    torch.manual_seed(0)
    model, ids = architecture.build(**settings), torch.randint(3, VOCAB, (2, time))
    cache, positions = DynamicCache(), torch.arange(time)
    kwargs = test_capture.accepted(model, position_ids=positions.expand(2, -1))
    with torch.no_grad(), architecture.hooks(model) as read:
        model(ids, past_key_values=cache, use_cache=True, **kwargs)
    before, ropes = read()[0], Rope.of_layers(model.config)
    round_trip, rotation = 0.0, 0.0
    for rope, pre, layer in zip(ropes, before, cache.layers, strict=True):
        cached: Tensor = layer.keys[:, :: layer.keys.shape[1] // pre.shape[1]]  # Falcon repeats KV heads
        round_trip = max(
            round_trip, float((rope.rotate(rope.unrotate(cached, positions), positions) - cached).abs().max())
        )
        rotation = max(rotation, float((rope.rotate(pre, positions) - cached).abs().max()))
    return round_trip, rotation, ropes[0]


def rope_row(name: str) -> list[str]:
    """One rotary type of tests/rope_zoo.py, in a tiny Llama, inside and beyond the original context."""
    config = llama_config(VARIANTS[name])
    settings = {"rope_parameters": config.rope_parameters, "max_position_embeddings": config.max_position_embeddings}
    (inside_trip, inside, rope), (trip, beyond, _) = (
        rope_errors(ARCHITECTURES["llama"], time, **settings) for time in (SHORT, LONG)
    )
    switches = "switches" if rope.long_context is not None else "keeps"
    return [f"`{name}`", "half", power(max(inside_trip, trip)), power(inside), power(beyond), switches]


def layout_row(name: str) -> list[str]:
    """One family with a layout of its own."""
    architecture = ARCHITECTURES[name]
    trip, rotation, _ = rope_errors(architecture, SHORT)
    return [f"`{name}` (family)", rope_name(architecture), power(trip), power(rotation), "–", "–"]


ROPE_HEAD = ["rotary type", "layout", "max \\|rotate(unrotate(k)) − k\\|", "max \\|rotate(pre) − cached\\|"]
ROPE_HEAD += ["… beyond the original context", "frequencies there"]


# ------------------------------------------------------------------------------------------ tokenizers


def texts() -> list[str]:
    """The adversarial texts of the tests, the training corpus and random Unicode, the same on every machine."""
    generator = random.Random(0)
    planes = [range(0x20, 0x7F), range(0x20, 0x250), range(0x300, 0x370), range(0x590, 0x700), range(0x2000, 0x2100)]
    planes += [range(0x3040, 0xD7FF), range(0xE000, 0x10000), range(0x1F300, 0x1FAFF), range(0x10000, 0x110000)]
    drawn = [
        "".join(chr(generator.choice(generator.choice(planes))) for _ in range(generator.randrange(1, 25)))
        for _ in range(RANDOM_TEXTS)
    ]
    return [*ADVERSARIAL.values(), *dict.fromkeys(CORPUS), *drawn]


def tokenizer_row(name: str) -> list[str]:
    """One family of tests/tokenizer_zoo.py."""
    family, tallied = FAMILIES[name], Tallied(build(name))
    for text in texts():
        tokens = tallied.encode(text, lossy="error" if family.exact else "nearest")
        if tokens is not None:
            assert_covers(tokens, text)
        elif family.exact:
            raise AssertionError(f"{name} keeps nothing of {text!r}")
    return [f"`{name}`", family.kind, "exact" if family.exact else "nearest", *tally_cells(tallied.tally)]


TOKENIZER_HEAD = ["tokenizer", "kind", "spans", *TALLIED]


# -------------------------------------------------------------------------------------------- refused


def message(call: Callable[[], object]) -> str:
    """What the error says; a call that goes through is a defect of this script."""
    try:
        call()
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("expected a refusal")


def refusals() -> list[list[str]]:
    """What is refused, and the message that says so."""
    tiny = {"vocab_size": VOCAB, "hidden_size": 60, "num_hidden_layers": 3}
    unequal = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    mixed = transformers.Qwen3NextConfig(
        **tiny, num_attention_heads=6, num_key_value_heads=2, head_dim=12, intermediate_size=40, num_experts=0,
        layer_types=["linear_attention", "full_attention", "linear_attention"], linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=4, linear_value_head_dim=4,
    )  # fmt: skip
    ids = test_capture.batch()[0]
    cases: list[tuple[str, Callable[[], object]]] = [
        ("latent attention (MLA)", lambda: Rope.from_config(transformers.DeepseekV3Config())),
        (
            "layers of different shape",
            lambda: kv_geometry(transformers.Gemma4TextConfig(num_hidden_layers=3, **unequal)),
        ),
        (
            "layers without attention",
            lambda: capture(transformers.AutoModelForCausalLM.from_config(mixed).eval(), ids),
        ),
        ("reentrant checkpointing", lambda: reentrant("llama")),
        ("checkpointing, recorded through the cache", lambda: test_capture.test_gradient_under_checkpointing("bloom")),
        ("a tokenizer that is not fast", lambda: encode(object(), "a")),
        ("text without UTF-8", lambda: encode(build("gpt2"), "ab\ud800")),
        ("text of which nothing is left", lambda: encode(build("bert_cased"), " \n ")),
        ('lossy text under `lossy="error"`', lambda: encode(build("bert_uncased"), "the Cat", lossy="error")),
    ]
    return [[name, message(call).replace("|", "\\|")] for name, call in cases]


# --------------------------------------------------------------------------------------------- document


def render() -> str:
    """All tables, as they stand between the markers."""
    architectures = [architecture_row(name) for name in ARCHITECTURES]
    ropes = [*(rope_row(name) for name in VARIANTS), *(layout_row(name) for name in LAYOUTS)]
    families = [tokenizer_row(name) for name in FAMILIES]
    refused = refusals()
    return (
        f"From transformers {transformers.__version__}, tokenizers {tokenizers.__version__}, "
        f"torch {torch.__version__.split('+')[0]}, on CPU.\n\n"
        f"### Architectures ({len(architectures)})\n\n{table(ARCHITECTURE_HEAD, architectures)}\n"
        f"### Rotary embeddings ({len(ropes)})\n\n{table(ROPE_HEAD, ropes)}\n"
        f"### Tokenizers ({len(families)})\n\n{table(TOKENIZER_HEAD, families)}\n"
        f"### Refused\n\n{table(['what', 'message'], refused)}"
    )


def committed() -> tuple[str, str, str]:
    """docs/method/compatibility.md before, between and after the markers."""
    before, begin, rest = METHOD.read_text("utf-8").partition(BEGIN)
    between, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{METHOD} lacks the markers {BEGIN.strip()} and {END}, between which the tables are written")
    return before + begin, between, end + after


def main() -> None:
    """Writes the tables; exit status 1 where something that should hold does not, or differs under --check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing, say whether the committed tables are these"
    )
    check = parser.parse_args().check
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    before, old, after = committed()
    new = render()
    if not check:
        METHOD.write_text(before + new + after, "utf-8")
    if "✗" in new or (check and new != old):
        sys.exit(f"{METHOD}: a check fails (✗)" if "✗" in new else f"{METHOD}: run `make compat` and commit the tables")


if __name__ == "__main__":
    main()
