"""Answers: the last match counts, numbers compare as numbers."""

import textwrap
from fractions import Fraction

import pytest

from kvpipe.config import PRESETS, EvaluateConfig
from kvpipe.evaluate.scorers.answers import extract, is_correct, normalise, number, same_expression

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


# ---------------------------------------------------------------- several patterns, numbers, LaTeX
def test_the_first_pattern_that_matches_decides():
    config = EvaluateConfig(answer_pattern=[r"####\s*(\S+)", r"(\d+)(?:\.\d+)?|(none)"])
    assert extract("5 then #### 6 or 7", config) == "6"
    assert extract("5 or 7", config) == "7"
    assert extract("none", config) == "none" and extract("?", config) is None


@pytest.mark.parametrize("pattern", ["[", "no group"])
def test_a_pattern_that_cannot_give_an_answer_is_refused(pattern):
    with pytest.raises(ValueError, match=r"no (regular expression|group)"):
        EvaluateConfig(answer_pattern=pattern)


NUMBER = EvaluateConfig(scorer="number")


@pytest.mark.parametrize(
    "answer, value",
    [
        ("18", 18),
        ("+18.", 18),
        ("$1,234.50 a day", Fraction("1234.5")),
        ("12 %", 12),
        ("-3", -3),
        ("−3", -3),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4 cup", Fraction(-3, 4)),
        ("1 1/2 cups", Fraction(3, 2)),
        ("-1 1/2", Fraction(-3, 2)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        ("1e3", 1000),
        (".5", Fraction(1, 2)),
        ("18 apples", 18),
        ("x = 18", 18),
        ("5 to 6", None),
        ("3:30", None),
        ("1/0", None),
        ("none", None),
        ("", None),
        ("9" * 500, None),
    ],
)
def test_number(answer, value):
    assert number(answer, NUMBER) == value


@pytest.mark.parametrize(
    "prediction, reference, right",
    [
        ("1,280 sacks", "1280", True),
        ("0.75", "3/4", True),
        ("-7", "7", False),
        ("7", "-7", False),
        ("5 to 6", "5 to 6", True),
        ("seven", "7", False),
        (None, "7", False),
        ("12345678901234567891", "12345678901234567892", False),
        ("1e99", "1e98", False),
    ],
)
def test_numbers_compare_by_value(prediction, reference, right):
    assert is_correct(prediction, reference, NUMBER) is right


def test_math_compares_by_expression():
    config = EvaluateConfig(scorer="math")
    assert is_correct(r"\dfrac{1}{2}", "0.5", config) and not is_correct("0.5", "0.51", config)


@pytest.mark.parametrize("preset", ["gsm8k", "math"])
def test_every_presets_own_answer_is_right(preset):
    """What the template writes, the pattern finds again and the scorer accepts."""
    scoring = EvaluateConfig(**PRESETS[preset]["evaluate"])
    for text in ("7", "1,280", "-3/4") if preset == "gsm8k" else (r"\frac{\sqrt{5}}{2}", r"\{1,2\}", "x^{2}"):
        written = PRESETS[preset]["template"]["answer"].format(answer=text)
        assert is_correct(extract(f"so 5.\n{written}", scoring), text, scoring)


@pytest.mark.parametrize(("text", "answer"), [("so 5-3", "3"), ("so f(x)-3", "3"), ("it is -3", "-3"), ("= $-4", "-4")])
def test_the_last_number_of_gsm8k_has_its_own_sign(text, answer):
    assert extract(text, EvaluateConfig(**PRESETS["gsm8k"]["evaluate"])) == answer


def test_an_open_brace_costs_no_time():
    """The pattern of a box is linear: a text that never closes it is refused at once."""
    scoring = EvaluateConfig(**PRESETS["math"]["evaluate"])
    assert extract(r"\boxed{" + "{a" * 3000, scoring) is None


LONG = [
    "1",
    "1,",
    "1 000 ",
    "answer is ",
    "answer to ",
    "5 because ",
    "** a ",
    "1 = ",
    "```python\n",
    "def f():\n",
    "\n \n",
]


@pytest.mark.parametrize("preset", ["gsm8k", "math", "mbpp_chat"])
@pytest.mark.parametrize("text", LONG)
def test_a_long_text_costs_no_time(monkeypatch, preset, text):
    """Patterns are near linear in what a model may repeat until its tokens end: 20,000 characters within a second of work."""
    monkeypatch.setattr("kvpipe.data.patterns.LIMIT_SECONDS", 1.0)
    extract(text * (20_000 // len(text)), EvaluateConfig(sandbox={"run_code": True}, **PRESETS[preset]["evaluate"]))


# ---------------------------------------------------------------- other people's answers
GSM8K, MATH = (EvaluateConfig(**PRESETS[name]["evaluate"]) for name in ("gsm8k", "math"))


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("#### 70{,}000", "70000"),
        (r"#### 70\,000", "70000"),
        (r"#### 70,\!000", "70000"),
        ("#### 70 000", "70000"),
        ("#### 70\u202f000", "70000"),
        ("#### 70\u2009000", "70000"),
        ("so it is −5", "-5"),
        ("it is –5", "-5"),
        ("5–6", "6"),
        ("#### 18 million", "18000000"),
        ("the cost is $1.5 million.", "1500000"),
        ("#### $18k", "18000"),
        ("#### 5 cm^2", "5"),
        ("#### 5 m²", "5"),
        (r"#### 5 \text{cm}^{2}", "5"),
        ("#### 3 + 4 = 18", "18"),
        ("it is .5", "0.5"),
        ("we get 1 1/2 cups", "1.5"),
        (r"#### 1\frac{1}{2}", "1.5"),
        (r"#### -\frac{3}{4}", "-3/4"),
        ("thus 1e3", "1000"),
        (r"thus 2 \times 10^3", "2000"),
        (r"thus $2\times10^{3}$", "2000"),
        (r"The answer is 18. Put it in \boxed{}", "18"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{18 \text{ apples}}", "18"),
        ("The final answer is $5$. I hope it is correct.", "5"),
        ("Final answer: 5", "5"),
        ("The answer is **$18**.", "18"),
        ("**5**", "5"),
        ("<answer>5</answer>", "5"),
        ("5, because 2 and 3 make it", "5"),
        ("The answer is 5, because 2 and 3.", "5"),
        ("#### 70\u2007000", "70000"),
        ("#### 70'000", "70000"),
        ("The answer is 70 000.", "70000"),
        ("the answer is: − 5", "-5"),
        ("the total is —5", "-5"),
        ("The answer is negative 5.", "-5"),
        (r"#### -\$5", "-5"),
        ("10 − 5", "5"),
        ("3 hundred", "300"),
        ("$5B", "5000000000"),
        ("a loss of $2 mn", "2000000"),
        ("5 m", "5"),
        ("5 cm**2", "5"),
        ("it has 5 m3", "5"),
        ("#### 54/3=<<54/3=18>>18", "18"),
        ("#### 18 = 3 * 6", "18"),
        ("#### 18 (3 + 15)", "18"),
        ("1½", "1.5"),
        ("1 and 1/2", "1.5"),
        ("2 × 10³", "2000"),
        ("2*10**3", "2000"),
        ("10^3", "1000"),
        (r"Write it as \boxed{answer}. So it is 18.", "18"),
        (r"We use \boxed{x} so. It is 18, in \boxed form", "18"),
        ("**Final Answer**\n\n5", "5"),
        ("The answer to the question would be 5, as 2 and 3 and 7.", "5"),
        ("5. Because 2 and 3", "5"),
        ("5 (because 2+3)", "5"),
        ("5 times as many is 15", "15"),
        ("She has 5 because she got 2. In the end it is 7.", "7"),
        ("So she has 5 apples, because she gave away 3.", "5"),
        ("#### Rs.500", "500"),
        ("3⁄4", "0.75"),
        ("2 ¾ cups", "2.75"),
        ("#### - 5", "-5"),
        ("The answer is about $18.50 per day for 3 days.", "18.5"),
        ("The answer is exactly 18, for the 2 of them.", "18"),
        ("So 18 is the answer to question 2.", "18"),
        ("<think>maybe #### 20</think>The answer is 18.", "18"),
        ("<think>It is 18.</think>", "18"),
    ],
)
def test_a_number_is_found_however_it_is_said(text, reference):
    assert is_correct(extract(text, GSM8K), reference, GSM8K), extract(text, GSM8K)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("The final answer is $5$. I hope it is correct.", "5"),
        (r"Final Answer: The final answer is $\frac{3}{2}$. I hope it is correct.", "1.5"),
        ("Final answer: 5", "5"),
        ("**5**", "5"),
        ("<answer>5</answer>", "5"),
        (r"The answer is \(x+1\), because it is.", "1+x"),
        (r"The answer goes into \boxed{}. The answer is $\frac12$.", "0.5"),
        (r"so \boxed{\boxed{5}}", "5"),
        (r"The answer is $\boxed{12\text{ and }13}$.", "12,13"),
        ("The answer is: x = 5", "5"),
        ("The answer is 18 dollars.", "18"),
        ("5, because 2+3", "5"),
        (r"$\frac{1}{2}$", "0.5"),
        ("**Final Answer**\n\n$5$", "5"),
        (r"The answer is: \[ \frac{1}{2} \]", "0.5"),
        (r"The answer is $5$. I'd write \boxed{\text{answer}}, as \boxed{...}", "5"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{x \in [1,2]}", "[1,2]"),
        (r"\boxed{1} and $\boxed{2}$", r"\{1,2\}"),
        (r"so \boxed{255} is one. The final answer is $10,455$. I hope it is correct.", "10455"),
        ("Final Answer: The largest $n$ is 34.", "34"),
        (r"Thus $x \ge 5$ is all.", r"x \geq 5"),
        ("1 000", "1000"),
        (r"Write \boxed{\_\_}. It is $7$.", "7"),
        (r"Write \boxed{\square}. It is $7$.", "7"),
        (r"Write \boxed{your answer here}, so it is $7$", "7"),
        (r"Write \boxed{<answer>}, so it is $7$", "7"),
        (r"Write \boxed{\hspace{1cm}}, so it is $7$", "7"),
        (r"so \boxed{\{\}}", r"\emptyset"),
        (r"\framebox{6}", "6"),
        ("The correct option is (C).", r"\text{(C)}"),
        (r"<think>\boxed{3}</think> The answer is 4.", "4"),
        (r"\boxed{\text{(B) } 5}", "(B)"),
        ("`5`", "5"),
    ],
)
def test_an_expression_is_found_however_it_is_said(text, reference):
    assert is_correct(extract(text, MATH), reference, MATH), extract(text, MATH)


SAME = [
    [r"\frac{1}{2}", r"\dfrac{1}{2}", r"\tfrac12", r"\frac1{2}", "1/2", "0.5", ".50", r"$\frac{1}{2}$", r"\(\frac{1}{2}\)."],
    [r"-\frac{3}{4}", r"\frac{-3}{4}", r"\frac{3}{-4}", "-3/4", "-0.75"],
    ["10000", "10,000", r"10{,}000", r"10,\!000", "+10000", r"\$10,000", "10,000 dollars", r"10000\text{ dollars}"],
    ["90", r"90^\circ", r"90^{\circ}", r"90\,^\circ"],
    [r"\sqrt{3}", r"\sqrt3", r"$\sqrt 3$"],
    [r"(\frac{1}{2},3]", "(0.5, 3]", r"\left(\frac12, 3\right]"],
    [r"\{1,2\}", r"\{ 2, 1 \}", r"\left\{1,2\right\}"],
    [r"\text{Tuesday}", "Tuesday"],
    [r"2\pi", r"2 \pi", r"2\,\pi"],
    [r"x \le 3", r"x \leq 3"],
    ["x+1", "1+x"],
    [r"12\text{ and }13", "12, 13", "13, 12"],
    [r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"],
    [r"\frac{1}{2", r"\frac{1} {2"],
    ["101_2", "101_{2}"],
    ["70000", "70 000", "70\u2009000", r"70\,000"],
    ["-5", "–5", "−5", r"-\$5"],
    [r"\frac{3}{2}", "1 1/2", r"1\frac12", "1.5"],
    ["1000", "1e3", "10^3", "1 thousand"],
    ["2000000", r"2\text{ million}", r"2 \times 10^6"],
    [r"2\pi", "2 pi", "2pi"],
    ["x=3, x=4", "3, 4", r"x=3\text{ or }x=4"],
    [r"\log_2 8", "3"],
    [r"\frac{1}{12}", "0.0833333333333333"],
    [r"\text{June 20}", "June 20"],
    [r"\text{B, D}", "B,D"],
    [r"12:00 \text{ p.m.}", "12:00 p.m."],
    [r"2\text{ hours }30\text{ minutes}", "2 hours 30 minutes"],
    [r"\emptyset", r"\varnothing"],
    [r"2\sqrt{3}", "2√3", "√12"],
    [r"\frac{2}{3}", r"0.\overline{6}", r"0.\bar6"],
    [r"\frac{1}{6}", r"0.1\overline{6}", "1/6"],
    [r"-\frac{137}{99}", r"-1.\overline{38}"],
    ["18", "18 km/h", "18 miles/hour"],
]  # fmt: skip


@pytest.mark.parametrize("group", SAME, ids=[group[0] for group in SAME])
def test_spellings_of_one_expression_are_equal(group):
    for spelling in group[1:]:
        assert same_expression(spelling, group[0]) and same_expression(group[0], spelling), spelling


def test_of_a_chain_of_equations_the_last_side_is_the_answer():
    assert same_expression(r"f(0)+f(1)=2+\frac{8}{3}=\frac{14}{3}", r"\frac{14}{3}")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (r"12\text{ and }13", "1213"),
        (r"2 \pi", "2"),
        ("10, 100", "10100"),
        ("y=5", "x=5"),
        ("10_2", "10"),
        ("1010_2", "1010_3"),
        ("5x", "5"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "[1,2]"),
        ("12", "1,2"),
        ("", "0"),
        (r"\sqrt{2}", "2"),
        (r"\sqrt[3]{2}", r"\sqrt{2}"),
        ("-5", "5"),
        ("y=5", "y+5"),
        ("1" * 500, "1" * 499 + "2"),
        (r"\frac{1}{0}", r"\frac{2}{0}"),
        (r"\frac{1}{2", "3"),
        ("2 pi", "2"),
        ("5 6", "56"),
        ("11/2", "1 1/2"),
        ("x^2+y^2=1", "1"),
        ("2x=10", "10"),
        ("1, 234", "1234"),
        (r"5.5\text{ and }7", "5.57"),
        (r"\text{July 20}", "20"),
        (r"0.\overline{6}", "0.6"),
        (r"\text{(A)}", "B) 5"),
    ],
)
def test_different_expressions_differ(first, second):
    assert not same_expression(first, second) and not same_expression(second, first)


def test_a_comparison_that_does_not_end_is_no(monkeypatch):
    monkeypatch.setattr("kvpipe.evaluate.scorers.answers.SECONDS", 1.0)
    assert not same_expression("9^{9^{9^9}}", "1")


# ---------------------------------------------------------------- programs
BODY = "def add(a, b):\n    return a + b"


@pytest.mark.parametrize(
    "reply",
    [
        f"```python\n{BODY}\n```",
        f"Sure! Here it is:\n\n```python\n{BODY}\n```\n\nIt adds. For example:\n```python\nprint(add(1, 2))\n```\nDone.",
        f"```py\n{BODY}\n```",
        f"```\n{BODY}\n```\nthat is all",
        f"```python\nadd = 3\n```\nNo, better:\n```python\n{BODY}\n```",
        f"```python\n{BODY}",
        f"``` Python3\n{BODY}\n```",
        f"~~~python\n{BODY}\n~~~",
        f"```python\n{BODY}```\nSo.",
        f"```python\r\n{BODY}\n```",
        f"1. Here:\n   ```python\n{textwrap.indent(BODY, '   ')}\n   ```\n2. Done.",
        f"```python\n{BODY}\n```\nAnd tests:\n```python\ndef test_add():\n    assert add(1, 2) == 3\n```",
        f"Here is the function.\n\n{BODY}\n\nIt adds two numbers.",
        BODY,
        f"```bash\npip install x\n```\nThen:\n```python\n{BODY}\n```",
        f"The input is\n```json\n{{}}\n```\n```\n{BODY}\n```\nIt prints\n```text\n3\n```",
        f"```python\n{BODY}\n```\nIn Java:\n```java\nclass A {{ int add(int a, int b) {{ return a + b; }} }}\n```",
        f"- ```python\n{textwrap.indent(BODY, '  ')}\n  ```\n- Done.",
        f"1. ```python\n{textwrap.indent(BODY, '   ')}\n   ```\n2. Done.",
        f"````python\n{BODY}\n````",
        f"```python3.11\n{BODY}\n```",
        f"```{{.python .numberLines}}\n{BODY}\n```",
        f"<think>\n```python\ndef add(a, b):\n    return a - b\n```\n</think>\n{BODY}",
        textwrap.indent(BODY, "    "),
    ],
)
@pytest.mark.parametrize("preset", ["mbpp_chat", "humaneval_chat"])
def test_the_program_of_a_chat_reply_is_the_fenced_one(preset, reply):
    scoring = EvaluateConfig(sandbox={"run_code": True}, **PRESETS[preset]["evaluate"])
    assert (extract(reply, scoring) or "").strip() == BODY


@pytest.mark.parametrize("preset", ["mbpp_chat", "humaneval_chat"])
def test_a_helper_in_a_fence_of_its_own_belongs_to_the_program(preset):
    scoring = EvaluateConfig(sandbox={"run_code": True}, **PRESETS[preset]["evaluate"])
    helper, caller = "def plus(a, b):\n    return a + b", "def add(a, b):\n    return plus(a, b)"
    reply = f"A helper:\n```python\n{helper}\n```\nAnd the function:\n```python\n{caller}\n```"
    scope: dict = {}
    exec(extract(reply, scoring) or "", scope)
    assert scope["add"](1, 2) == 3
    apart = f"```python\nimport math\nK = 0\n```\n```python\n{BODY.replace('a +', 'math.floor(K) + a +')}\n```"
    exec(extract(apart, scoring) or "", scope := {})
    assert scope["add"](1, 2) == 3, "imports and constants too"
    last = f"```python\ndef test_even(n):\n    return n % 2 == 0\n```\nHere:\n```python\n{BODY}\n```"
    exec(extract(last, scoring) or "", scope := {})
    assert scope["add"](1, 2) == 3 and scope["test_even"](2)
    named = "```python\nadd = lambda a, b: a + b\n```\nUse it:\n```python\nprint(add(1, 2))\n```"
    assert extract(named, scoring) == "add = lambda a, b: a + b"
    slow = f"First:\n```python\n{caller}\n```\nBroken:\n```python\ndef f(:\n```\nFaster:\n```python\n{BODY}\n```"
    assert (extract(slow, scoring) or "").strip() == BODY, "an earlier version of the same function is none of it"
