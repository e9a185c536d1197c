"""Invented rows in the schemas of known data sets, and folders laid out like their repositories.

`write(folder, "gsm8k")` makes a folder that `datasets` reads as it reads the repository: a README.md that names
configurations and splits, and Parquet files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml


def gsm8k(number: int) -> dict[str, Any]:
    """question | worked solution with calculator annotations, `#### answer`."""
    total = 1200 + 2 * number
    return {
        "question": f"Mill {number} grinds {600 + number} sacks each week. How many sacks does mill {number} grind in 2 weeks?",
        "answer": f"In two weeks it is 2*{600 + number} = <<2*{600 + number}={total}>>{total} sacks.\n#### {total:,}",
    }


def hendrycks(number: int) -> dict[str, Any]:
    """problem | level | type | solution with a boxed answer, braces nested."""
    return {
        "problem": f"What is half of the root of ${2 * number + 3}$?",
        "level": f"Level {number % 5 + 1}",
        "type": "Algebra",
        "solution": f"Not $\\boxed{{0}}$: it is $\\boxed{{\\frac{{\\sqrt{{{2 * number + 3}}}}}{{2}}}}$.",
    }


def mbpp(number: int) -> dict[str, Any]:
    """text | code | test_list | test_setup_code, with the line ends of the original."""
    return {
        "task_id": number + 11,
        "text": f"Write a function that adds {number} to a number.",
        "code": f"def add{number}(x):\r\n  return x + {number}",
        "test_list": [f"assert add{number}(1) == {number + 1}", f"assert add{number}(-{number}) == 0"],
        "test_setup_code": "",
        "challenge_test_list": [],
    }


def humaneval(number: int) -> dict[str, Any]:
    """A signature with a docstring, its body, `check`, and the function's name."""
    name = f"times{number}"
    return {
        "task_id": f"Invented/{number}",
        "prompt": f'def {name}(x):\n    """The {number}-fold of x."""\n',
        "canonical_solution": f"    return {number} * x\n",
        "test": f"def check(candidate):\n    assert candidate(3) == {3 * number}\n",
        "entry_point": name,
    }


def arc(number: int) -> dict[str, Any]:
    """question | choices with labels | the right label."""
    texts = [f"{number} stones", f"{number + 1} stones", f"a heap of {number}", "none"]
    return {
        "id": f"Invented_{number}",
        "question": f"Which of these is one more than {number}?",
        "choices": {"text": texts, "label": ["1", "2", "3", "4"] if number % 2 else ["A", "B", "C", "D"]},
        "answerKey": "2" if number % 2 else "B",
    }


def chat(number: int) -> dict[str, Any]:
    """A conversation of three turns."""
    said = [("system", "Be brief."), ("user", f"Name number {number}."), ("assistant", f"It is {number}.")]
    said += [("user", "And the next?"), ("assistant", f"{number + 1}.")]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def text(number: int) -> dict[str, Any]:
    """Plain text."""
    return {"text": f"Entry {number}. " + " ".join(f"word{number * 31 + i}" for i in range(23))}


ROWS = {"gsm8k": gsm8k, "math": hendrycks, "mbpp": mbpp, "humaneval": humaneval, "arc": arc, "chat": chat, "text": text}
ROWS |= {"mbpp_chat": mbpp, "humaneval_chat": humaneval}
SPLITS = {
    "gsm8k": {"train": 40, "test": 7},
    "math": {"train": 20, "test": 3},
    "mbpp": {"train": 9, "validation": 2, "test": 5},
    "humaneval": {"test": 4},
    "arc": {"train": 9, "validation": 2, "test": 5},
    "chat": {"train": 9, "validation": 2, "test": 3},
    "text": {"train": 9, "validation": 2, "test": 3},
}
CONFIGURATIONS = {
    "gsm8k": ["main", "socratic"],
    "math": ["algebra", "geometry"],
    "mbpp": ["full"],
    "humaneval": ["openai_humaneval"],
    "arc": ["ARC-Challenge"],
}
for _name in ("mbpp", "humaneval"):
    SPLITS[f"{_name}_chat"], CONFIGURATIONS[f"{_name}_chat"] = SPLITS[_name], CONFIGURATIONS[_name]


def rows(preset: str, split: str, offset: int = 0) -> list[dict[str, Any]]:
    """Rows of a split; those of different splits differ."""
    sizes = SPLITS[preset]
    start = offset + sum(size for name, size in sizes.items() if list(sizes).index(name) < list(sizes).index(split))
    return [ROWS[preset](start + i) for i in range(sizes[split])]


def write(folder: Path, preset: str) -> Path:
    """A folder laid out like the data set's repository."""
    configurations = []
    for place, name in enumerate(CONFIGURATIONS.get(preset, ["default"])):
        files = []
        for split in SPLITS[preset]:
            path = folder / name / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows(preset, split, 1000 * place)), path)
            files.append({"split": split, "path": f"{name}/{split}-*"})
        configurations.append({"config_name": name, "data_files": files})
    header = yaml.safe_dump({"configs": configurations}, sort_keys=False)
    (folder / "README.md").write_text(f"---\n{header}---\n", encoding="utf-8")
    return folder
