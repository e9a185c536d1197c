"""From generated text to right or wrong: extract the answer, then compare it with the reference.

The extraction and numbers are here. Expressions in LaTeX are judged by math-verify, programs by `kvpipe.evaluate.sandbox.run`.
"""

from __future__ import annotations

import ast
import logging
import re
import textwrap
import unicodedata
import warnings
from collections.abc import Callable
from decimal import Decimal, InvalidOperation, localcontext
from fractions import Fraction
from importlib.metadata import version

from kvpipe.config import ScoringConfig
from kvpipe.data.patterns import UNSEEN, processor_time, time_limit

LONGEST = 400
"""Numbers with more digits stay as they are written: `1e999999` need not be written out."""
SECONDS = 3.0
"""Longest time that math-verify gets for reading an answer, and for comparing two."""
# ---------------------------------------------------------------- numbers in prose and LaTeX
_MINUS = "[\u2212\u2012\u2013\ufe63\uff0d]"
_SPACE = "[\u00a0\u2000-\u200a\u202f\u205f]"
_POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_LETTERS = {"k": " thousand", "m": " million", "b": " billion"}
_TEXT = r"\\(?:text|textbf|mathbf|mathrm|mbox)\s*\{([^{}]*)\}"
_PLAIN: list[tuple[str, str | Callable[[re.Match], str]]] = [
    (f"{UNSEEN}|<<[^<>]*>>", ""),  # nothing to be seen; GSM8K's calculations
    (r"\\([$%])", r"\1"),
    (r"\{,\}|,\\!", ","),  # 70{,}000  70,\!000
    (r"(?<=\d)\\[,;: ](?=\d{3})", "\u2009"),  # 70\,000
    (r"\\[!,;: ]|~", " "),
    (_TEXT, r" \1 "),
    (r"(?<=\d)\s*(?=\\[dtc]?frac)", " "),  # 1\frac{1}{2}
    (r"\\[dtc]?frac\s*(?:\{([^{}]+)\}\s*\{([^{}]+)\}|(\d)\s*(\d))", lambda m: f"{m[1] or m[3]}/{m[2] or m[4]}"),
    ("(?<=\\d)\u2044(?=\\d)", "/"),
    ("\\s*[¼½¾⅐-⅞]", lambda m: " " + unicodedata.normalize("NFKC", m[0]).strip().replace("\u2044", "/")),
    (r"(?<=\d) and (?=\d+/\d)", " "),
    (r"(?<=\d) and a half\b", " 1/2"),
    # a dash between digits is a range, 5–6, and between spaces a difference; before a number it is a minus
    (rf"(?<![\d.]){_MINUS}\u00a0?(?=[$.\d])|(?<=[=:#]) *(?:-|{_MINUS}) (?=[$.\d])|(?<![^\s$(])\u2014(?=[$.\d])", "-"),
    (r"(?i)\bnegative (?=[$.\d])|(?:(?<=\bis )|(?<=[=:] )|\A)minus (?=[$.\d])", "-"),
    (rf"(?<=\d)(?:{_SPACE}|['’_])(?=\d{{3}}(?!\d))", ","),
    (r"(?<![\d.,])\d{1,3}(?:(?: \d{3}){2,}| 000)(?! ?[\d/])", lambda m: m[0].replace(" ", ",")),
    (r"(?<=\b10)[⁺⁻⁰¹²³⁴-⁹]+", lambda m: "^" + m[0].translate(_POWERS)),
    (r"(?<=\d)\s*(?:\\times|\\cdot|[x×·*])\s*10(?:\s*\^\s*|\*\*)\{?\s*([-+]?\d{1,2})\s*\}?", r"e\1"),
    (r"(?<![\w.])10(?:\s*\^\s*|\*\*)\{?(-\d{1,2})\}?", r"1e\1"),
    (r"(?<![\w.])(\d{1,4})(?:\s*\^\s*|\*\*)\{?(\d{1,2})\}?(?![\d*])", lambda m: str(int(m[1]) ** int(m[2]))),
    (
        r"(?<=[a-zA-Z])(?:\s*\^\s*\{?-?\d+\}?|\*\*\d(?![\d*]))|[²³]|(?:(?<=[\d ][cdkm]m)|(?<=[\d ]m)|(?<=[\d ]ft))[23]\b",
        "",
    ),  # cm^2
    (r"(?i)([$€£]\s?\d[\d.,]*)\s?(k|mn?|bn?)\b", lambda m: m[1] + _LETTERS[m[2][0].lower()]),
    (r"(\d)\s?((?i:mn|bn)|(?<! )[kKM])\b", lambda m: m[1] + _LETTERS[m[2][0].lower()]),
]
_VALUE = (
    r"(?P<whole>[-+]?\d[\d,]*)[ ]+(?P<part>\d+)\s*/\s*(?P<of>\d+)"
    r"|(?P<over>[-+]?\d[\d,]*)\s*/\s*(?P<under>\d+)"
    r"|(?P<decimal>[-+]?(?:\d[\d,]*(?:\.\d+)?|(?<![a-zA-Z])\.\d+)(?:[eE][-+]?\d{1,2}(?!\d))?)"
)
_NUMBER = re.compile(rf"(?:{_VALUE})(?:\s*(?P<scale>{'|'.join(_SCALES)})s?\b)?")


def plain(text: str) -> str:
    """Numbers in one spelling: `70{,}000`, `70\\,000` and thin spaces as `70,000`; a typographic minus as `-`; `\\frac{1}{2}`
    and `½` as `1/2`; `2 \\times 10^3` as `2e3`; `$18k` as `$18 thousand`; exponents of units left out."""
    for pattern, replacement in _PLAIN:
        text = re.sub(pattern, replacement, text)
    return text


def number(answer: str, config: ScoringConfig) -> Fraction | None:
    """The one number in an answer, words and units around it ignored (`$1,234.50 a day`, `-3/4`, `1 1/2`, `18 million`).

    Of an equation it is what stands on the right, or else a side of nothing but one number. None where there is no number or
    more than one.
    """
    right, *others = reversed(re.sub(r"(?<=\S) +\([^()]*\)\.?\s*\Z", "", plain(answer)).split("="))
    sides = [right, *(side for side in others if not re.search("[a-zA-Z]", side))]
    return next((value for side in sides if (value := _one_number(side, config)) is not None), None)


def _one_number(text: str, config: ScoringConfig) -> Fraction | None:
    text = re.sub(r"\A(\s*[-+]?\$?\d{1,3})((?: \d{3})+)(?!\d| ?/)", lambda m: m[1] + m[2].replace(" ", ","), text)
    matches = list(_NUMBER.finditer(_stripped(text, config, keep=",")))
    if len(matches) != 1 or len(matches[0][0]) > LONGEST:
        return None
    found = {key: value and value.replace(",", "") for key, value in matches[0].groupdict().items()}
    scale = Fraction(10) ** _SCALES.get(found["scale"] or "", 0)
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
_NOTHING = (
    r"(?:[\s.$*…?~_\-\u2013\u2014()\[\]{}]|\\[_,;:! ]|\\(?:q?quad|square|Box|[lc]?dots|cdot|text\w*|math\w+|mbox)\b"
    r"|\\[vh]?phantom\s*\{[^{}]*\}|\\[hv]space\*?\s*\{[^{}]*\}|<(?:[\w ]+ )?answer>"
    r"|\b(?:your|the|final|correct|numerical|answer|result|number|value|solution|here|goes)\b)*"
)
"""What stands in a box that is only mentioned: blanks, punctuation, `your answer here`."""
_MENTIONED = re.compile(rf"(?i){_NOTHING}")
_EMPTY_BOX = re.compile(rf"(?i)(\\(?:boxed|fbox|framebox)\s*\{{)({_NOTHING})(?=\}})")


_BOX = r"\\boxed\s*\{(?:[^{}]++|\{(?:[^{}]++|\{[^{}]*+\})*+\})++\}"
_AND = r"(?:\\quad|(?:and|or)\b|\\text\s*\{\s*(?:and|or)\s*\})"
_BETWEEN = rf"[$.\s]*(?:[,;]|{_AND})(?:[$,\s]|{_AND})*"


def _one_box(boxes: re.Match) -> str:
    """`\\boxed{1} and \\boxed{2}` as `\\boxed{1, 2}`."""
    return rf"\boxed{{{', '.join(box.partition('{')[2][:-1] for box in re.findall(_BOX, boxes[0]))}}}"


def extract(text: str, config: ScoringConfig) -> str | None:
    """The answer in a generated text, or None: the first pattern that finds one decides, and its last match that is not empty.

    A box of nothing (`\\boxed{}`, `\\boxed{answer}`), as a text mentions it that says where the answer belongs, is no answer.
    Under the scorer `number`, patterns see numbers in one spelling (`plain`), and a box without one is none either.
    """
    if config.scorer == "number":
        text = plain(text)
    elif config.scorer == "math":
        text = re.sub(rf"{_BOX}(?:{_BETWEEN}{_BOX})+", _one_box, text)
    found = _found(text, config)
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
    """The answer in a text, and where what states it begins. What a chat model thinks (`</think>` ends it) is only asked where
    it says nothing after it."""
    thought, mark, said = text.rpartition("</think>")
    if mark and (found := _found(said, config)) is not None:
        return found[0], found[1] + len(thought) + len(mark)
    text = _EMPTY_BOX.sub(lambda box: box[1] + " " * len(box[2]), text)
    for pattern in [config.answer_pattern] if isinstance(config.answer_pattern, str) else config.answer_pattern:
        with time_limit(f"evaluate.answer_pattern {pattern!r}"):
            matches = list(re.finditer(pattern, text))
        for match in reversed(matches):
            named = match.groupdict()
            answer = next(filter(None, match.groups()), "")
            if "program" in named:
                answer = _with_helpers(matches[: matches.index(match) + 1]) if named["program"] else ""
            while inner := re.fullmatch(r"\s*\\(?:boxed|fbox|framebox)\s*\{(.*)\}\s*", answer, re.DOTALL):
                answer = inner[1]
            # a box is the group of that name
            wordless = config.scorer == "number" and "final" in named and not re.search(r"\d", answer)
            if not wordless and not _MENTIONED.fullmatch(answer):
                return answer, match.start()
    return None


def _with_helpers(matches: list[re.Match]) -> str:
    """The last program of a reply, below what earlier fences define and it does not: helpers, imports and constants in a fence
    of their own. An earlier version of the same function is left out."""
    *earlier, last = (textwrap.dedent(found["program"] or found.groupdict().get("beside") or "") for found in matches)
    own = _defined(last)
    helpers = [part for part in earlier if (names := _defined(part)) and not names & own]
    return "\n".join([*helpers, last])


def _defined(program: str) -> set[str]:
    """The functions and classes of a program's top level, and what one of nothing but imports and constants names; nothing of
    one that cannot be read."""
    try:
        with warnings.catch_warnings(action="ignore"):
            body = ast.parse(program).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    names = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    if all(isinstance(node, ast.Import | ast.ImportFrom) or _is_constant(node) for node in body):
        names |= {node.id for node in ast.walk(ast.Module(body, [])) if isinstance(node, ast.Name)}
        names |= {alias.asname or alias.name for node in body for alias in getattr(node, "names", ())}
    return names


def _is_constant(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)


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
    """Whether two answers in LaTeX are the same, by math-verify; numbers that people write otherwise are made plain before.

    It reads a number's base as nothing (`10_2` as 10), digits apart as one number, and gives up on braces that are not closed:
    such answers are compared as they are written, without spaces. Of an equation with more than a name on the left it takes the
    right side for an answer: so it is asked only if both are equations. Of more than `SECONDS` of processor time the answer
    is no.
    """
    found = [_in_latex(text) for text in (reference, prediction)]
    written = [re.sub(r"(?<!\d)\s+|\s+(?!\d)|\\[!,;: ]|\$", "", re.sub(r"_\{(\w+)\}", r"_\1", text)) for text in found]
    in_words = [re.sub(_TEXT, r"\1", text).rstrip(".") for text in written]  # \text{June 20} and June 20
    choice, chosen = re.fullmatch(_CHOICE, in_words[0]), re.match(_CHOSEN, in_words[1])
    if in_words[0] == in_words[1] or (choice and chosen and choice[1] == chosen[1]):
        return True
    if any(re.search(r"[\dA-F]_\d|\d_|(?<!_)\d\s+\d", text) or text.count("{") != text.count("}") for text in written):
        return False
    left, equals, _ = written[1].replace("^{-1}", "").rpartition("=")
    if equals and "=" not in written[0] + left and _EQUATION.search(left):
        return False
    from math_verify import parse, verify  # sympy takes a second to import
    from math_verify.errors import TimeoutException

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    try:
        with processor_time(SECONDS, TimeoutException()):
            return bool(verify(*(parse(f"${text}$", parsing_timeout=None) for text in found), timeout_seconds=None))
    except TimeoutException:
        return False


_CHOICE, _CHOSEN = r"\(?([A-J])\)?", r"\(?([A-J])[).:]"
"""A letter among choices, and an answer that begins with one: `C) 5`."""
_EQUATION = re.compile(r"[a-zA-Z].*[-+^*/]|[-+^*/].*[a-zA-Z]|\d[a-zA-Z]|\\frac")
"""More than a name."""
_NAMES = "pi|sqrt|theta|alpha|beta|phi|infty"
_WORDS = rf"(?:\s+(?!(?:or|and|to|by|mod|{_NAMES}|sin|cos|tan|cot|sec|csc|ln|log|exp)\b)[a-zA-Z]{{2,}}(?:/[a-zA-Z]+)?)*"
_PLAIN_NUMBER = re.compile(
    r"([-+]?)\$?((?:(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?(?: ?\d+/\d+|/\d+)?" + _WORDS + ")"
)


def _in_latex(text: str) -> str:
    """Without math delimiters; a number as people write it (`18 dollars`, `1 1/2`, `1e3`, `18 million`) as digits or a
    fraction, names of LaTeX with their backslash."""
    text = text.strip().strip("`").rstrip(".").strip().strip("$").strip()
    for start, end in ((r"\(", r"\)"), (r"\[", r"\]")):
        text = text.removeprefix(start).removesuffix(end).strip()
    text = re.sub(_MINUS, "-", text).replace(r"\varnothing", r"\emptyset")
    text = re.sub(r"√\s*(?:\(([^()]*)\)|(\d+|[a-zA-Z]))", lambda root: rf"\sqrt{{{root[1] or root[2]}}}", text)
    if repeating := re.fullmatch(r"(-?)(\d*)\.(\d*)\\(?:overline|bar)\s*(?:\{(\d+)\}|(\d))", text):
        return _repeating(*repeating.groups(""))
    text = re.sub(r"\A[a-zA-Z]\s*\\in\s*(?=\\left|\\mathbb|\\\{|[\[(])", "", text)
    if (said := _PLAIN_NUMBER.fullmatch(plain(text).strip())) and (
        value := number(said[1] + said[2], _AS_IT_IS)
    ) is not None:
        if "/" in said[2]:
            return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
        with localcontext(prec=2 * LONGEST):
            return f"{Decimal(value.numerator) / value.denominator:f}"
    text = re.sub(r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    return re.sub(rf"(?<![\\a-zA-Z])({_NAMES})(?![a-zA-Z])", r"\\\1 ", text)


def _repeating(minus: str, whole: str, once: str, period: str, digit: str) -> str:
    r"""`0.1\overline{6}` as a fraction, of which math-verify makes none."""
    again = period or digit
    digits = Fraction(int(once + again) - int(once or "0"), 10 ** len(once) * (10 ** len(again) - 1))
    value = int(whole or "0") + digits
    return rf"{minus}\frac{{{value.numerator}}}{{{value.denominator}}}"


_AS_IT_IS = ScoringConfig(scorer="number")
