"""From generated text to right or wrong: extract the answer, normalise it, compare.

`exact` and `number` are here, `math` is in `kvpipe.latex`; programs are run by `kvpipe.sandbox`.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from kvpipe import latex
from kvpipe.config import ScoringConfig

LONGEST = 400
"""Numbers with more digits stay as they are written: `1e999999` need not be written out."""
_NUMBER = re.compile(
    r"(?P<whole>[-+]?\d+)\s+(?P<part>\d+)\s*/\s*(?P<of>\d+)"
    r"|(?P<over>[-+]?\d+)\s*/\s*(?P<under>\d+)"
    r"|(?P<decimal>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,2}(?!\d))?)"
)


def extract(text: str, config: ScoringConfig) -> str | None:
    """The answer in a generated text: the first group of the last match of the first pattern that matches, or None."""
    patterns = [config.answer_pattern] if isinstance(config.answer_pattern, str) else config.answer_pattern
    for pattern in patterns:
        matches = list(re.finditer(pattern, text))
        if matches:
            return next((group for group in matches[-1].groups() if group is not None), "")
    return None


def normalise(answer: str, config: ScoringConfig) -> str:
    """Strip white space and the configured strings; numbers in one notation (`+3`, `03.0` → `3`)."""
    answer = _stripped(answer, config)
    try:
        number = Decimal(answer)  # exact, where a float would make long numbers equal
    except InvalidOperation:
        return answer
    if not number.is_finite() or "_" in answer or abs(number.adjusted()) > LONGEST:
        return answer
    plain = f"{number:f}"
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    return "0" if plain == "-0" else plain


def _stripped(answer: str, config: ScoringConfig) -> str:
    for string in config.strip:
        answer = answer.replace(string, "")
    return answer.strip().rstrip(".")


def number(answer: str, config: ScoringConfig) -> Fraction | None:
    """The one number in an answer, words and units around it ignored (`$1,234.50 a day`, `-3/4`, `1 1/2`, `1e3`).

    None where there is no number or more than one.
    """
    answer = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", _stripped(answer, config).replace("−", "-"))
    matches = list(_NUMBER.finditer(answer))
    if len(matches) != 1 or len(matches[0][0]) > LONGEST:
        return None
    found = matches[0].groupdict()
    if found["decimal"] is not None:
        return Fraction(found["decimal"].removesuffix("."))
    under = int(found["of"] or found["under"])
    if under == 0:
        return None
    if found["whole"] is None:
        return Fraction(int(found["over"]), under)
    part = Fraction(int(found["part"]), under)
    return int(found["whole"]) + (-part if found["whole"].startswith("-") else part)


def is_correct(prediction: str | None, reference: str, config: ScoringConfig) -> bool:
    """Whether two answers are the same to the configured scorer: `math`, `number` (texts where one has no number), `exact`."""
    if prediction is None:
        return False
    if config.scorer == "math":
        return latex.equal(prediction, reference)
    if config.scorer == "number":
        numbers = number(prediction, config), number(reference, config)
        if None not in numbers:
            return numbers[0] == numbers[1]
    return normalise(prediction, config) == normalise(reference, config)
