"""Answers: the last match counts, numbers compare as numbers."""

import pytest

from kvpipe.answers import extract, is_correct, normalise
from kvpipe.config import EvaluateConfig

CONFIG = EvaluateConfig()


@pytest.mark.parametrize(
    "text, answer",
    [
        ("3+4=7\n#### 7\n", "7"),
        ("#### 3\nno:\n#### 4", "4"),
        ("####7", "7"),
        ("#### 7 apples\nmore", "7 apples"),
        ("### 7", None),
        ("", None),
        ("####\n", None),
        ("####\n5", "5"),
    ],
)
def test_extract(text, answer):
    assert extract(text, CONFIG) == answer


@pytest.mark.parametrize(
    "answer, normal",
    [
        ("7", "7"),
        (" 7 ", "7"),
        ("+3", "3"),
        ("03.0", "3"),
        ("-0", "0"),
        ("1,234", "1234"),
        ("$5.50", "5.5"),
        ("12%", "12"),
        ("7.", "7"),
        ("1e3", "1000"),
        ("Paris.", "Paris"),
        ("a, b", "a b"),
        ("12345678901234567891", "12345678901234567891"),
        ("0.10000000000000000001", "0.10000000000000000001"),
        ("nan", "nan"),
        ("inf", "inf"),
        ("1_000", "1_000"),
        ("1e999999999", "1e999999999"),
        ("-0.50", "-0.5"),
        ("100", "100"),
        ("", ""),
    ],
)
def test_normalise(answer, normal):
    assert normalise(answer, CONFIG) == normal
    assert normalise(normal, CONFIG) == normal


@pytest.mark.parametrize(
    "prediction, reference, right",
    [("7.0", "7", True), ("07", "7", True), ("8", "7", False), (None, "7", False), ("", "7", False), ("a", "A", False)],
)
def test_is_correct(prediction, reference, right):
    assert is_correct(prediction, reference, CONFIG) is right


def test_two_long_numbers_that_a_float_cannot_tell_apart_differ():
    assert not is_correct("12345678901234567891", "12345678901234567892", CONFIG)


def test_pattern_and_stripped_strings_are_the_configurations():
    config = EvaluateConfig(answer_pattern=r"\\boxed\{([^}]*)\}", strip=["°"])
    assert extract(r"so \boxed{40°}", config) == "40°"
    assert is_correct("40°", "40", config) and not is_correct("$40", "40", config)
