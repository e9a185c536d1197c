"""From generated text to right or wrong: extract the answer, normalise it, compare."""

from __future__ import annotations

import re

from kvpipe.config import EvaluateConfig


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
        number = float(answer)
    except ValueError:
        return answer
    return str(int(number)) if number.is_integer() else str(number)


def is_correct(prediction: str | None, reference: str, config: EvaluateConfig) -> bool:
    """Exact match after normalisation."""
    return prediction is not None and normalise(prediction, config) == normalise(reference, config)
