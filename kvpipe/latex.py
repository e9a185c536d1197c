"""Answers in LaTeX: one form for what is written in several ways (MATH, Hendrycks et al. 2021, appendix; Minerva,
Lewkowycz et al. 2022, appendix D).

No algebra is done: `x+1` and `1+x` differ. Rational numbers are compared by value.
"""

from __future__ import annotations

import re
from fractions import Fraction

_SPELLINGS = [
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:left|right|displaystyle|textstyle|limits|big|Big)(?![a-zA-Z])", ""),
    (r"\\le(?![a-zA-Z])", r"\\leq"),
    (r"\\ge(?![a-zA-Z])", r"\\geq"),
    (r"\\ne(?![a-zA-Z])", r"\\neq"),
    (r"(?<!\\)\\[()\[\]]|\\?\$", ""),
    (r"\^\{?\\circ\}?|\\degrees?(?![a-zA-Z])|°", ""),
    (r"\\?%", ""),
    (r"−", "-"),
    (r"(?<!\\)\\[!,;:> ]|\\quad(?![a-zA-Z])|~", " "),
    (r"\{,\}", ","),
]
_WORDS = r"\\(?:text|textbf|textrm|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}"
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
_GROUPED = re.compile(r"([-+]?\d{1,3}(?:,\s*\d{3})+(?:\.\d+)?)(?!\d)")
_FRACTION = re.compile(r"([-+]?)\\frac\{([-+]?\d+)\}\{([-+]?\d+)\}")
_SLASHED = re.compile(r"([-+]?\d+)/(\d+)")
_BRACKETS = {"(": ")]", "[": ")]", "{": "}"}
LONGEST = 400
"""Numbers with more characters are compared as they are written."""


def normalise(text: str) -> str:
    """One spelling: no spaces, degrees, units, percent or dollar signs; `\\frac{a}{b}`, `\\sqrt{a}` with all braces."""
    for pattern, replacement in _SPELLINGS:
        text = re.sub(pattern, replacement, text)
    text = text.strip().rstrip(".").strip()
    text = re.sub(rf"(?<=[\d}})])\s*{_WORDS}(?:\^\{{?[23]\}}?)?", "", text)  # a unit
    text = re.sub(_WORDS, r"\1", text)  # words that are the answer
    text = re.sub(r"\A([-+]?[\d.,]*\d)\s+[a-zA-Z]{2,}[a-zA-Z ]*\Z", r"\1", text.strip())
    if _GROUPED.fullmatch(text):
        text = re.sub(r",\s*", "", text)
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"\A[a-zA-Z]=(?=.)", "", text)  # "x=5"
    text = re.sub(r"\\sqrt(?!\{|\[)(\\[a-zA-Z]+|.)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac([^{\\])", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\})([^{\\])", r"\1{\2}", text)
    return _SLASHED.sub(r"\\frac{\1}{\2}", text) if _SLASHED.fullmatch(text) else text


def equal(first: str, second: str) -> bool:
    """The same after normalisation; numbers by value, tuples, intervals and sets part by part in their order."""
    first, second = normalise(first), normalise(second)
    if first == second:
        return True
    numbers = _rational(first), _rational(second)
    if None not in numbers:
        return numbers[0] == numbers[1]
    left, right = _parts(first), _parts(second)
    if left is None or right is None or left[0] != right[0] or len(left[1]) != len(right[1]):
        return False
    return all(map(equal, left[1], right[1]))


def _rational(text: str) -> Fraction | None:
    if len(text) > LONGEST:
        return None
    if re.fullmatch(_NUMBER, text):
        return Fraction(text.rstrip(".") if text.endswith(".") else text)
    match = _FRACTION.fullmatch(text)
    if match is None or int(match[3]) == 0:
        return None
    return Fraction(int(match[2]), int(match[3])) * (-1 if match[1] == "-" else 1)


def _parts(text: str) -> tuple[str, list[str]] | None:
    """The brackets of `(a, b)` and what stands between them, cut at the commas that are in no bracket."""
    text = text.replace(r"\{", "{").replace(r"\}", "}")
    if len(text) < 3 or text[-1] not in _BRACKETS.get(text[0], ""):
        return None
    parts, depth = [""], 0
    for letter in text[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if depth < 0:
            return None
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return (text[0] + text[-1], parts) if len(parts) > 1 and all(parts) else None
