"""From generated text to right or wrong: extract the answer, then compare it with the reference.

The extraction and numbers are here. Expressions in LaTeX are judged by math-verify, programs by `kvpipe.evaluate.sandbox.run`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from importlib.metadata import version

from kvpipe.config import ScoringConfig
from kvpipe.data.patterns import time_limit

LONGEST = 400
"""Numbers with more digits stay as they are written: `1e999999` need not be written out."""
SECONDS = 3
"""Longest time that math-verify gets for reading an answer, and for comparing two."""
# ---------------------------------------------------------------- numbers in prose and LaTeX
_MINUS = "[\u2212\u2012\u2013\ufe63\uff0d]"
_PLAIN: list[tuple[str, str | Callable[[re.Match], str]]] = [
    (r"\{,\}|,\\!", ","),  # 70{,}000  70,\!000
    (r"(?<=\d)\\,(?=\d{3})", "\u2009"),  # 70\,000
    (r"\\[!,;: ]|~", " "),
    (r"\\(?:text|textbf|mathbf|mathrm|mbox)\s*\{([^{}]*)\}", r" \1 "),
    (r"(?<=\d)\s*(?=\\[dtc]?frac)", " "),  # 1\frac{1}{2}
    (r"\\[dtc]?frac\s*(?:\{([^{}]+)\}\s*\{([^{}]+)\}|(\d)\s*(\d))", lambda m: f"{m[1] or m[3]}/{m[2] or m[4]}"),
    # a dash between digits is a range, 5–6; before a number it is a minus
    (rf"(?<![\d.]){_MINUS}(?=[ \u00a0]?[$.\d])", "-"),
    (r"(?<=\d)[\u00a0\u2009\u200a\u202f](?=\d{3}(?!\d))", ","),
    (r"(?<=\d)\s*(?:\\times|\\cdot|[×·*])\s*10\s*\^\s*\{?\s*([-+]?\d{1,2})\s*\}?", r"e\1"),
    (r"(?<=[a-zA-Z])\s*\^\s*\{?-?\d+\}?|[\u00b2\u00b3]", ""),  # cm^2
]
_SCALES = {"k": 3, "thousand": 3, "m": 6, "million": 6, "bn": 9, "billion": 9, "trillion": 12}
_VALUE = (
    r"(?P<whole>[-+]?\d[\d,]*)[ ]+(?P<part>\d+)\s*/\s*(?P<of>\d+)"
    r"|(?P<over>[-+]?\d[\d,]*)\s*/\s*(?P<under>\d+)"
    r"|(?P<decimal>[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,2}(?!\d))?)"
)
_NUMBER = re.compile(rf"(?:{_VALUE})(?:\s*(?P<scale>thousand|million|billion|trillion|bn)\b|(?P<letter>k|K|M)\b)?")


def plain(text: str) -> str:
    """Numbers in one spelling: `70{,}000`, `70\\,000` and thin spaces as `70,000`; a typographic minus as `-`; `\\frac{1}{2}`
    as `1/2`; `2 \\times 10^3` as `2e3`; exponents of units left out."""
    for pattern, replacement in _PLAIN:
        text = re.sub(pattern, replacement, text)
    return text


def number(answer: str, config: ScoringConfig) -> Fraction | None:
    """The one number in an answer, words and units around it ignored (`$1,234.50 a day`, `-3/4`, `1 1/2`, `18 million`).

    Of an equation it is what stands on the right. None where there is no number or more than one.
    """
    answer = plain(answer).rpartition("=")[2]
    answer = re.sub(r"\A(\s*[-+]?\$?\d{1,3})((?: \d{3})+)(?!\d| ?/)", lambda m: m[1] + m[2].replace(" ", ","), answer)
    matches = list(_NUMBER.finditer(_stripped(answer, config, keep=",")))
    if len(matches) != 1 or len(matches[0][0]) > LONGEST:
        return None
    found = {key: value and value.replace(",", "") for key, value in matches[0].groupdict().items()}
    scale = Fraction(10) ** _SCALES.get((found["scale"] or found["letter"] or "").lower(), 0)
    if found["decimal"]:
        return Fraction(found["decimal"]) * scale
    under = int(found["of"] or found["under"])
    if under == 0:
        return None
    if found["whole"] is None:
        return Fraction(int(found["over"]), under) * scale
    part = Fraction(int(found["part"]), under)
    return (int(found["whole"]) + (-part if found["whole"].startswith("-") else part)) * scale


# ---------------------------------------------------------------- extraction
def extract(text: str, config: ScoringConfig) -> str | None:
    """The answer in a generated text, or None: the first pattern that finds one decides, and its last match that is not empty.

    An empty box (`\\boxed{}`), as a text mentions it that says where the answer belongs, is no answer. Under the scorer
    `number`, patterns see numbers in one spelling (`plain`).
    """
    found = _found(plain(text) if config.scorer == "number" else text, config)
    return None if found is None else found[0]


def worked(text: str, config: ScoringConfig) -> str:
    """What a generated text says before its answer, without the sentence that states it; empty where there is nothing."""
    found = _found(text, config)
    if found is None and config.scorer == "number":  # an answer in another spelling
        text = plain(text)
        found = _found(text, config)
    before = "" if found is None else text[: found[1]]
    return re.match(r"(?s)(?:.*(?:\n|[.!?:](?=\s)))?", before)[0].strip()  # type: ignore[index]


def _found(text: str, config: ScoringConfig) -> tuple[str, int] | None:
    """The answer in a text, and where what states it begins."""
    for pattern in [config.answer_pattern] if isinstance(config.answer_pattern, str) else config.answer_pattern:
        with time_limit(f"evaluate.answer_pattern {pattern!r}"):
            matches = list(re.finditer(pattern, text))
        for match in reversed(matches):
            answer = next((group for group in match.groups() if group is not None), "")
            while inner := re.fullmatch(r"\s*\\(?:boxed|fbox)\s*\{(.*)\}\s*", answer, re.DOTALL):
                answer = inner[1]
            if answer.strip(" .$*\n\t"):
                return answer, match.start()
    return None


def normalise(answer: str, config: ScoringConfig) -> str:
    """Strip white space and the configured strings; numbers in one notation (`+3`, `03.0` → `3`)."""
    answer = _stripped(answer, config)
    try:
        value = Decimal(answer)  # exact, where a float would make long numbers equal
    except InvalidOperation:
        return answer
    if not value.is_finite() or "_" in answer or abs(value.adjusted()) > LONGEST:
        return answer
    found = f"{value:f}"
    if "." in found:
        found = found.rstrip("0").rstrip(".")
    return "0" if found == "-0" else found


def _stripped(answer: str, config: ScoringConfig, keep: str = "") -> str:
    for string in config.strip:
        if string != keep:
            answer = answer.replace(string, "")
    return answer.strip().rstrip(".")


# ---------------------------------------------------------------- the judge
def judge_of(scorer: str) -> str:
    """Who says under a scorer whether an answer is right; a package with its version."""
    if scorer == "math":
        return f"math-verify {version('math-verify')}"
    own = {"exact": "kvpipe, as texts", "number": "kvpipe, as numbers", "code": "the records' tests"}
    return own.get(scorer, "the model's likelihood")


def is_correct(prediction: str | None, reference: str, config: ScoringConfig) -> bool:
    """Whether two answers are the same to the configured scorer: `math`, `number` (texts where one has no number), `exact`."""
    if prediction is None:
        return False
    if config.scorer == "math":
        return same_expression(prediction, reference)
    if config.scorer == "number":
        numbers = number(prediction, config), number(reference, config)
        if None not in numbers:
            return numbers[0] == numbers[1]
    return normalise(prediction, config) == normalise(reference, config)


def same_expression(prediction: str, reference: str) -> bool:
    """Whether two answers in LaTeX are the same, by math-verify.

    It reads a number's base as nothing (`10_2` as 10) and gives up on braces that are not closed: such answers are compared
    as they are written, without spaces. Of more than `SECONDS` the answer is no.
    """
    prediction, reference = (_without_words(text) for text in (prediction, reference))
    written = [re.sub(r"\s+|\\[!,;: ]|\$", "", text) for text in (prediction, reference)]
    if written[0] == written[1]:
        return True
    if any(re.search(r"\d_|_\{?\d+\}?\Z", text) or text.count("{") != text.count("}") for text in written):
        return False
    from math_verify import parse, verify  # sympy takes a second to import

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    found = [parse(f"${text}$", parsing_timeout=SECONDS) for text in (reference, prediction)]
    return bool(verify(*found, timeout_seconds=SECONDS))


def _without_words(text: str) -> str:
    """Without math delimiters, and without plain words behind a number (`18 dollars`)."""
    text = text.strip().rstrip(".").strip().strip("$").removeprefix(r"\(").removesuffix(r"\)").strip()
    return re.sub(r"\A(\\?\$?[-+]?[\d.,]*\d)\s+(?!or\b|and\b)[a-zA-Z]{2,}[a-zA-Z ]*\Z", r"\1", text)
