"""Answers in LaTeX: normalisation is idempotent, equality is an equivalence, and what differs stays different."""

import itertools

import pytest

from kvpipe.latex import equal, normalise

SAME = [
    [r"\frac{1}{2}", r"\dfrac{1}{2}", r"\tfrac12", r"\frac1{2}", "1/2", "0.5", ".50", r"$\frac{1}{2}$", r"\(\frac{1}{2}\)."],
    [r"-\frac{3}{4}", r"\frac{-3}{4}", r"\frac{3}{-4}", "-3/4", "-0.75", "−0.75"],
    ["10000", "10,000", r"10{,}000", r"10,\!000", "+10000", "10000.", r"\$10,000", "10,000 dollars", r"10000\text{ dollars}"],
    ["90", r"90^\circ", r"90^{\circ}", "90°", r"90\degree", "90 degrees", r"90\,^\circ"],
    ["50", r"50\%", "50%", r"50 \text{ cm}", r"50\mbox{ cm}^2", r"50\mathrm{cm}^{3}"],
    [r"\sqrt{3}", r"\sqrt3", r"\sqrt {3}", r"$\sqrt 3$"],
    [r"\frac{\sqrt{3}}{2}", r"\dfrac{\sqrt3}{2}", r"\frac{\sqrt{3}}2"],
    ["(1,2)", "(1, 2)", r"\left(1,\,2\right)", "(1.0,2)"],
    [r"(\frac{1}{2},3]", "(0.5, 3]", r"\left(\frac12, 3\right]"],
    [r"\{1,2\}", r"\{ 1, 2 \}", r"\left\{1,2\right\}"],
    [r"\text{Tuesday}", "Tuesday", r"\mbox{Tuesday}"],
    ["x=5", "5", "x = 5", "5.0"],
    [r"2\pi", r"2 \pi", r"2\,\pi"],
    [r"x \le 3", r"x \leq 3"],
    [r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"],
]  # fmt: skip


@pytest.mark.parametrize("group", SAME, ids=[group[0] for group in SAME])
def test_spellings_of_one_answer_are_equal(group):
    for first, second in itertools.product(group, group):
        assert equal(first, second), (first, second, normalise(first), normalise(second))


@pytest.mark.parametrize("text", [text for group in SAME for text in group])
def test_normalisation_is_idempotent(text):
    assert normalise(normalise(text)) == normalise(text)


def test_groups_differ_from_each_other():
    for first, second in itertools.combinations(SAME, 2):
        assert not any(equal(a, b) for a in first for b in second), (first[0], second[0])


@pytest.mark.parametrize(
    "first, second",
    [
        ("0.33", r"\frac{1}{3}"),
        ("5x", "5"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "[1,2]"),
        ("(1,2)", "(1,2,3)"),
        ("12", "1,2"),
        ("x+1", "1+x"),
        (r"\frac{1}{0}", r"\frac{2}{0}"),
        ("1e3", "1000"),
        ("", "0"),
        (r"\sqrt{2}", "2"),
        (r"\sqrt[3]{2}", r"\sqrt{2}"),
        ("-5", "5"),
        (r"y=5", r"y+5"),
        ("1" * 500, "1" * 499 + "2"),
    ],
)
def test_what_differs_stays_different(first, second):
    assert not equal(first, second) and not equal(second, first)
