"""From generated text to right or wrong: extract the answer, normalise it, compare."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from kvpipe.config import EvaluateConfig

LONGEST = 400
"""Numbers with more digits stay as they are written: `1e999999` need not be written out."""


def extract(text: str, config: EvaluateConfig) -> str | None:
    """The answer in a generated text: the first group of the pattern's last match; None where there is no match."""
    matches = re.findall(config.answer_pattern, text)
    return matches[-1] if matches else None


def normalise(answer: str, config: EvaluateConfig) -> str:
    """Strip white space and the configured strings; numbers in one notation (`+3`, `03.0` → `3`)."""
    for string in config.strip:
        answer = answer.replace(string, "")
    answer = answer.strip().rstrip(".")
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


def is_correct(prediction: str | None, reference: str, config: EvaluateConfig) -> bool:
    """Exact match after normalisation."""
    return prediction is not None and normalise(prediction, config) == normalise(reference, config)
