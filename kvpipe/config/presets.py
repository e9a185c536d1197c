"""Known data sets: nothing but values of configuration keys, filled in by `data.sources[].preset`.

`hub` and `rows` go into the source, `template` into `data.template.tasks.<task>`, `evaluate` into
`evaluate.tasks.<task>`; whatever the configuration says itself comes first.
"""

from __future__ import annotations

from typing import Any, Literal

PresetName = Literal["gsm8k", "math", "mbpp", "mbpp_chat", "humaneval", "humaneval_chat", "arc", "chat", "text"]

# The argument of \boxed{…}, braces nested up to four deep. `++` does not go back, so an unclosed brace costs no time.
_BRACED = r"[^{}]"
for _ in range(4):
    _BRACED = rf"(?:[^{{}}]++|\{{{_BRACED}*\}})"
BOXED = rf"\\(?:boxed|fbox)\s*\{{?(?P<final>(?<=\{{){_BRACED}*(?=\}})|(?<!\{{)[^{{$\n][^$\n]*)"
# The minus of a difference (5-3) is no sign. Spellings are made one before (`kvpipe.evaluate.scorers.answers.plain`).
NUMBER = (
    r"((?:(?<![\d)])-)?[$€£]?(?:\d[\d,]* \d+/\d+|\d[\d,]*\s*/\s*\d+|(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?)"
    r"(?:\s*(?:thousand|million|billion|trillion)\b|[kKM]\b)?)"
)
TAGGED = r"(?s)<answer>\s*(.*?)\s*</answer>"
STATED = r"(?i)\banswer(?:\s+is)?\s*:?\s*"
EXPRESSION = (
    r"(?:\$+([^$\n]+)\$|\\\((.+?)\\\)|\*\*([^*\n]+)\*\*"
    r"|([^\s*$][^\n]*?)(?=\.?\s*(?:\n|\Z)|\.\s+[A-Z]|,?\s+(?:because|since)\b))"
)
BOLD = rf"\*\*\s*{NUMBER}(?:\s*[a-zA-Z%]+)?\.?\s*\*\*"
FIRST = rf"\A\s*{NUMBER}(?=,?\s+(?:because|since)\b)"

# A reply's program: its last fenced one that defines something, else its last fenced one, else all of it.
FENCED = [
    r"(?s)```(?:[Pp]ython|py)?[ \t]*\n((?:(?!```).)*?\b(?:def|class)\b.*?)(?:\n```|\Z)",
    r"(?s)```(?:[Pp]ython|py)?[ \t]*\n(.*?)(?:\n```|\Z)",
    r"(?s)\A(.*)\Z",
]

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "gsm8k": {
        "hub": {
            "repo": "openai/gsm8k",
            "name": "main",
            "train": "train[:95%]",
            "validation": "train[95%:]",
            "test": "test",
        },
        "rows": {
            "columns": {"prompt": "question", "reasoning": "rationale", "answer": "final"},
            "split": {"answer": r"(?s)\A(?P<rationale>.*?)\s*####\s*(?P<final>[^\n]+?)\s*\Z"},
            "remove": {"reasoning": r"<<[^<>]*>>"},
        },
        "template": {
            "prompt": "Question: {prompt}\nAnswer:\n",
            "reasoning": "{reasoning}\n",
            "answer": "#### {answer}\n",
        },
        "evaluate": {
            "scorer": "number",
            "max_new_tokens": 320,
            "stop": ["\nQuestion:"],
            "answer_pattern": [r"####\s*([^\n]+)", BOXED, TAGGED, rf"{STATED}[\s*$]*{NUMBER}", BOLD, FIRST, NUMBER],
        },
    },
    "math": {
        "hub": {
            "repo": "EleutherAI/hendrycks_math",
            "name": [
                "algebra",
                "counting_and_probability",
                "geometry",
                "intermediate_algebra",
                "number_theory",
                "prealgebra",
                "precalculus",
            ],
            "train": "train[:95%]",
            "validation": "train[95%:]",
            "test": "test",
        },
        "rows": {
            "columns": {"prompt": "problem", "reasoning": "solution", "answer": "final"},
            "split": {"solution": "(?s).*" + BOXED},
            "leave_out": {"solution": r"(?s)\\boxed\s*\{\s*\}(?!.*\\boxed)"},
        },
        "template": {
            "prompt": "Problem:\n{prompt}\n\nSolution:\n",
            "reasoning": "{reasoning}\n",
            "answer": "The answer is $\\boxed{{{answer}}}$.\n",
        },
        "evaluate": {
            "scorer": "math",
            "max_new_tokens": 640,
            "stop": ["\nProblem:"],
            "answer_pattern": [BOXED, TAGGED, STATED + EXPRESSION, r"\*\*([^*\n]+)\*\*"],
        },
    },
    "mbpp": {
        "hub": {
            "repo": "google-research-datasets/mbpp",
            "name": "full",
            "train": "train",
            "validation": "validation",
            "test": "test",
        },
        "rows": {
            "columns": {
                "id": "mbpp-{task_id}",
                "prompt": "{text}\nThe code must pass these tests:\n{test_list}",
                "answer": "code",
                "tests": "{test_setup_code}\n{test_list}",
            },
            "remove": {"prompt": "\r", "answer": "\r", "tests": "\r"},
        },
        "template": {"prompt": "{prompt}\n```python\n", "reasoning": "", "answer": "{answer}\n```\n"},
        "evaluate": {
            "scorer": "code",
            "max_new_tokens": 320,
            "stop": ["\n```"],
            "answer_pattern": [r"(?s)\A(.*?)(?:\n```|\Z)"],
            "program": "{answer}\n{tests}\n",
        },
    },
    "humaneval": {
        "hub": {
            "repo": "openai/openai_humaneval",
            "name": "openai_humaneval",
            "train": None,
            "validation": None,
            "test": "test",
        },
        "rows": {
            "columns": {
                "id": "task_id",
                "prompt": "prompt",
                "answer": "canonical_solution",
                "tests": "{test}\ncheck({entry_point})",
            }
        },
        "template": {"prompt": "{prompt}", "reasoning": "", "answer": "{answer}"},
        "evaluate": {
            "scorer": "code",
            "max_new_tokens": 512,
            "stop": ["\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n```"],
            "answer_pattern": [r"(?s)\A(.*?)(?=\n(?:class |def |#|if |print|```)|\Z)"],
            "program": "{prompt}{answer}\n{tests}\n",
        },
    },
    "arc": {
        "hub": {
            "repo": "allenai/ai2_arc",
            "name": "ARC-Challenge",
            "train": "train",
            "validation": "validation",
            "test": "test",
        },
        "rows": {
            "columns": {
                "id": "id",
                "prompt": "question",
                "choices": "choices.text",
                "labels": "choices.label",
                "choice": "answerKey",
            }
        },
        "template": {"prompt": "Question: {prompt}\nAnswer:", "reasoning": "", "answer": " {answer}"},
        "evaluate": {"scorer": "choice"},
    },
    "chat": {
        "hub": {},
        "rows": {"columns": {"prompt": "prompt", "answer": "answer"}, "chat": {}},
        "template": {"prompt": "{prompt}Assistant: ", "reasoning": "", "answer": "{answer}\n"},
        "evaluate": {"scorer": "none"},
    },
    "text": {
        "hub": {},
        "rows": {"columns": {"reasoning": "text"}},
        "template": {"prompt": "{prompt}", "reasoning": "{reasoning}", "answer": "{answer}"},
        "evaluate": {"scorer": "none"},
    },
}

# Chat models reply with prose around a fenced program; what the prompt defines (imports, helpers) stays above it.
for _name, _program in (("mbpp", "{answer}\n{tests}\n"), ("humaneval", "{prompt}    pass\n\n\n{answer}\n{tests}\n")):
    PRESETS[f"{_name}_chat"] = {
        **PRESETS[_name],
        "template": {"prompt": "{prompt}\n", "reasoning": "", "answer": "```python\n{answer}\n```\n"},
        "evaluate": {"scorer": "code", "max_new_tokens": 1024, "answer_pattern": FENCED, "program": _program},
    }
PRESETS["humaneval_chat"]["rows"] = {
    "columns": {**PRESETS["humaneval"]["rows"]["columns"], "answer": "{prompt}{canonical_solution}"}
}


def preset_of(source: Any) -> dict[str, dict[str, Any]] | None:
    """The preset that a source, as it is written, names; None where it names none that is known."""
    name = source.get("preset") if isinstance(source, dict) else None
    return PRESETS.get(name) if isinstance(name, str) else None


def merged(preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The preset's keys under the given ones; of a mapping, key by key."""
    out = {**preset, **given}
    for key in preset.keys() & given.keys():
        if isinstance(preset[key], dict) and isinstance(given[key], dict):
            out[key] = {**preset[key], **given[key]}
    return out
