"""Other people's answers, programs and tokenizers: GSM8K, MBPP, HumanEval whole, and seven released tokenizers.

`make test-real` runs these. They read the folder `KVPIPE_REAL` (build/real), which `tools/real.py` fills.
"""

import ast
import contextlib
import itertools
import json
import os
import re
from pathlib import Path

import pytest
import torch
from real import CASES, FILES, FOLDER, TOKENIZERS, row_of
from test_spans import ADVERSARIAL, assert_covers
from tokenizers import Tokenizer

from kvpipe.config import PRESETS, EvaluateConfig, HubData
from kvpipe.data.leakage import leaks
from kvpipe.data.mapping import to_record
from kvpipe.evaluate.sandbox.run import run_all
from kvpipe.evaluate.score import program
from kvpipe.evaluate.scorers.answers import extract, is_correct, same_expression
from kvpipe.tokens.matrix import encode, overlap

pytestmark = pytest.mark.real


def rows(name: str) -> list[dict]:
    path = FOLDER / FILES[name]
    assert path.is_file(), f"{path} is missing: run `make test-real`, or name a folder that has it in KVPIPE_REAL"
    return [row_of(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def records(name: str, preset: str) -> list:
    source = HubData(task="t", preset=preset)
    return [to_record(row, source, f"{name}-{number}") for number, row in enumerate(rows(name))]


# ---------------------------------------------------------------- answers
def spellings(answer: str) -> dict[str, str]:
    """How people and models write the answer that GSM8K has as a plain number."""
    plain = answer.replace(",", "")
    sign, digits = ("-", plain[1:]) if plain.startswith("-") else ("", plain)
    whole, dot, part = digits.partition(".")
    grouped = {
        mark: sign + f"{int(whole):,}".replace(",", mark) + dot + part
        for mark in (",", "{,}", r"\,", r",\!", "\u2009", "\u202f")
    }
    said = {f"grouped by {mark!r}": f"#### {text}" for mark, text in grouped.items()}
    if sign:
        said |= {"a typographic minus": f"so it is \u2212{digits}", "an en dash": f"#### \u2013{digits}"}
    return said | {
        "hash": f"#### {plain}",
        "a box": rf"Thus $\boxed{{{plain}}}$.",
        "a box in a box": rf"\boxed{{\boxed{{{plain}}}}}",
        "an empty box after it": rf"The answer is {plain}. Put it into \boxed{{}}.",
        "minerva": f"The final answer is ${plain}$. I hope it is correct.",
        "final answer": f"Final answer: {plain}",
        "bold": f"So she has\n\n**{plain}**",
        "a tag": f"<answer>{plain}</answer>",
        "a sentence": f"So the answer is {plain}.",
        "an equation": f"#### 7 + 4 = {plain}",
        "dollars": f"#### {sign}${digits}",
        "a unit": f"#### {plain} apples",
        "a unit with an exponent": f"#### {plain} cm^2",
    }


@pytest.mark.parametrize("split", ["gsm8k-train", "gsm8k-test"])
def test_every_answer_of_gsm8k_in_every_spelling(split):
    scoring = EvaluateConfig(**PRESETS["gsm8k"]["evaluate"])
    wrong, count = [], 0
    for record, row in zip(records(split, "gsm8k"), rows(split), strict=True):
        texts = {"as published": row["answer"], "with its working": f"{record.reasoning}\n#### {record.answer}"}
        for how, text in (texts | spellings(record.answer)).items():
            count += 1
            if not is_correct(extract(text, scoring), record.answer, scoring):
                wrong.append((how, text[-60:], record.answer))
    print(f"{split}: {count} texts, {len(wrong)} wrong")
    assert not wrong, (len(wrong), wrong[:5])


@pytest.mark.parametrize("scorer", ["gsm8k", "math"])
def test_no_answer_of_gsm8k_passes_for_another(scorer):
    """Each with the next one's text: a judge that says yes to all would pass the test above."""
    scoring = EvaluateConfig(**PRESETS[scorer]["evaluate"])
    found = records("gsm8k-test", "gsm8k")[: 1319 if scorer == "gsm8k" else 150]
    pairs = [
        (a.answer, b.answer)
        for a, b in itertools.pairwise(found)
        if float(a.answer.replace(",", "")) != float(b.answer.replace(",", ""))
    ]
    assert not [pair for pair in pairs if is_correct(extract(rf"\boxed{{{pair[0]}}}", scoring), pair[1], scoring)]


def published(path: Path) -> list[tuple[str, str, int]]:
    """(gold, prediction, 1 or 0) of a test file of math-verify, from its parametrize lists: the file is read, not run."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", "") == "parametrize"
            and isinstance(node.args[1], ast.List)
        ):
            if [name.strip() for name in str(ast.literal_eval(node.args[0])).split(",")][:3] != [
                "gold",
                "pred",
                "expected",
            ]:
                continue
            for row in node.args[1].elts:
                with contextlib.suppress(ValueError):  # of a call
                    found.append(ast.literal_eval(row)[:3])
    return found


OTHERWISE = {
    ("1000.99", "1000,99"): "a comma before other than three digits parts a list, as in MATH",
    ("1,22", "1.22"): "the same",
    ("$x \\in [-2,7]$", "$-2 \\\\le x \\\\le 7$"): "their test allows to compare sets with relations",
    ("$(\\frac{3}{5},\\frac{8}{3}]$", "$(0.6,2.6667]$"): "their test rounds to fewer digits",
    (
        "$(\\begin{pmatrix}\\frac{1}{3}\\\\ \\frac{1}{5} \\end{pmatrix})$",
        "$\\begin{pmatrix}0.33\\\\0.2 \\end{pmatrix}$",
    ): "the same",
}
"""Published cases that are judged otherwise here, and why: all count as wrong."""
EXPRESSION = re.compile(r"\$[^$]+\$|[^$ \\]+(?: ?[%$€])?")
"""An answer without prose around it: what an extraction gives."""


def test_the_judge_agrees_with_the_published_cases_of_math_verify():
    found = [case for path in sorted(CASES.glob("test_*.py")) for case in published(path)]
    short = [case for case in found if all(EXPRESSION.fullmatch(text.strip()) for text in case[:2])]
    assert len(short) > 100, f"{CASES} has {len(found)} cases"
    other = [(gold, answer) for gold, answer, right in short if same_expression(answer, gold) != bool(right)]
    print(f"math-verify: {len(short) - len(other)} of {len(short)} cases judged alike")
    assert set(other) == set(OTHERWISE)


# ---------------------------------------------------------------- leakage
COPIES = {
    "as written": lambda text: text,
    "lower case": str.lower,
    "without punctuation": lambda text: re.sub(r"[^\w\s]", "", text),
    "one line, wide spaces": lambda text: re.sub(r"\s+", "\u00a0 ", text),
    "in a longer prompt": lambda text: f"Solve this for me, please. {text} Show your work.",
}


@pytest.mark.parametrize("where", ["prompt", "reasoning"])
@pytest.mark.parametrize("how", list(COPIES))
def test_copies_of_test_questions_are_found(how, where):
    from dataclasses import replace

    test = records("gsm8k-test", "gsm8k")
    other = records("gsm8k-train", "gsm8k")[0]
    copied = [replace(other, id=f"c{n}", **{where: COPIES[how](record.prompt)}) for n, record in enumerate(test)]
    found = {leak.train for leak in leaks(copied, test, 13)}
    missed = [record.prompt for n, record in enumerate(test) if f"c{n}" not in found]
    print(f"{how} in the {where}: {len(found)} of {len(test)}")
    assert not missed, (len(missed), missed[:3])


# ---------------------------------------------------------------- programs
def replies(body: str) -> dict[str, str]:
    return {
        "a fence": f"```python\n{body}\n```",
        "prose around it": f"Sure! Here it is:\n\n```python\n{body}\n```\n\nUse it so:\n```python\nprint(1)\n```\nDone.",
    }


@pytest.mark.parametrize(
    ("name", "preset"),
    [("mbpp", "mbpp"), ("mbpp", "mbpp_chat"), ("humaneval", "humaneval"), ("humaneval", "humaneval_chat")],
)
def test_every_program_passes_its_own_tests(name, preset):
    sandbox = {"run_code": True, "workers": os.cpu_count() or 1, "seconds": 30}
    scoring = EvaluateConfig(sandbox=sandbox, **PRESETS[preset]["evaluate"])
    found = records(name, preset)
    says = replies if preset.endswith("_chat") else lambda body: {"as it is": body}
    texts = [(record, text) for record in found for text in says(record.answer).values()]
    programs = [program(scoring.program, record, extract(text, scoring)) for record, text in texts]
    outcomes = run_all(programs, scoring.sandbox)
    failed = [(r.id, o.status, o.detail) for (r, _), o in zip(texts, outcomes, strict=True) if o.status != "passed"]
    print(f"{preset}: {len(texts)} programs, {len(failed)} failed")
    assert not failed, (len(failed), failed[:3])


# ---------------------------------------------------------------- tokenizers
def tokenizer(name: str) -> Tokenizer:
    path = FOLDER / "tokenizers" / name / "tokenizer.json"
    assert path.is_file(), f"{path} is missing: run `make test-real`"
    return Tokenizer.from_file(str(path))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [
        *ADVERSARIAL.values(),
        *(row["question"] for row in rows("gsm8k-test")[:40]),
        *(row["code"] for row in rows("mbpp")[:40]),
    ]


@pytest.fixture(scope="module")
def tokens(texts):
    loaded = {name: tokenizer(name) for name in TOKENIZERS}
    return {name: [encode(found, text) for text in texts] for name, found in loaded.items()}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_released_tokenizers_cover_every_byte_in_order(tokens, texts, name):
    for found, text in zip(tokens[name], texts, strict=True):
        assert_covers(found, text)


@pytest.mark.parametrize(("src_name", "dst_name"), list(itertools.product(TOKENIZERS, repeat=2)))
def test_the_laws_of_the_overlap_hold_for_released_tokenizers(tokens, src_name, dst_name):
    for src, dst in zip(tokens[src_name], tokens[dst_name], strict=True):
        for mode in ("iou", "causal"):
            matrix = overlap(src.spans, dst.spans, mode).to_dense()
            sums = matrix.sum(1)
            assert ((sums - 1).abs().lt(1e-5) | sums.eq(0)).all()
            row, column = matrix.nonzero(as_tuple=True)
            if mode == "causal":
                assert (src.spans[column, 1] <= dst.spans[row, 1]).all(), "nothing that the student has not read"
            elif src_name == dst_name:
                spelled = dst.spans[:, 1] > dst.spans[:, 0]
                assert torch.equal(matrix[spelled], torch.eye(len(matrix))[spelled])
            else:
                common = torch.minimum(src.spans[column, 1], dst.spans[row, 1]) - torch.maximum(
                    src.spans[column, 0], dst.spans[row, 0]
                )
                assert (common > 0).all() and int(common.sum()) == int(dst.spans[-1:, 1].sum())
