"""Embedded tasks: right answers, disjoint splits, determinism."""

import re
from itertools import product

import pytest
from pydantic import ValidationError

from kvpipe.config import EmbeddedData
from kvpipe.data.corpus import HIGHEST, generate
from kvpipe.experiment.paths import SPLITS

TASKS = ["math", "code", "both"]


@pytest.mark.parametrize(("task", "difficulty"), [*product(TASKS, (2, 4)), ("math", 1), ("code", 1)])
def test_reasoning_computes_the_answer(task, difficulty):
    for record in generate(task, "train", 50, difficulty, seed=3):
        numbers = [int(n) for n in re.findall(r"\d+", record.reasoning)]
        assert numbers[-1] == int(record.answer)
        own = re.findall(r"(\d+)([+-])(\d+)=(\d+)", record.teacher_reasoning)
        assert len(own) == difficulty
        for left, sign, right, result in own:
            assert int(left) + (1 if sign == "+" else -1) * int(right) == int(result)
        assert 0 <= int(record.answer) <= HIGHEST
        assert len(record.teacher_reasoning) > len(record.reasoning)


def test_code_prompts_run_to_the_answer():
    for record in generate("code", "test", 40, 3, seed=0):
        printed = []
        exec(record.prompt, {"print": lambda value, sink=printed: sink.append(value)})  # our own generated program
        assert printed == [int(record.answer)]


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_numeric_core(task):
    def cores(split):
        # seeds differ: the split of a problem must not depend on the draw
        drawn = generate(task, split, 300, 2, seed=SPLITS.index(split), distinct=False)
        return {tuple(re.findall(r"\d+[+-]\d+", r.teacher_reasoning)) for r in drawn}

    train, validation, test = (cores(split) for split in SPLITS)
    assert not train & validation and not train & test and not validation & test


def test_same_seed_same_records_other_seed_others():
    first, again, other = (generate("math", "train", 20, 2, seed) for seed in (1, 1, 2))
    assert first == again
    assert [r.prompt for r in first] != [r.prompt for r in other]


def test_prompts_are_distinct_and_running_out_is_an_error():
    prompts = [r.prompt for r in generate("code", "train", 500, 2, 0)]
    assert len(set(prompts)) == len(prompts)
    with pytest.raises(ValueError, match="raise the difficulty"):
        generate("code", "test", 600, 1, 0)


@pytest.mark.parametrize("task", TASKS)
def test_random_results_keep_the_language_and_nothing_else(task):
    true, drawn = (generate(task, "train", 400, 2, 5, results=results) for results in ("true", "random"))
    shape = re.compile(r"\d+")
    assert {shape.sub("N", r.reasoning) for r in true} == {shape.sub("N", r.reasoning) for r in drawn}
    right = 0
    for record in drawn:
        own = re.findall(r"(\d+)([+-])(\d+)=(\d+)", record.teacher_reasoning)
        assert [result for *_, result in own] == re.findall(r"\d+", record.reasoning)
        assert record.answer == own[-1][3]
        right += all(int(a) + (1 if s == "+" else -1) * int(b) == int(c) for a, s, b, c in own)
    assert right < 10  # one in 400, by chance


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("results", ["math", "code"])
@pytest.mark.parametrize("difficulty", [2, 5])
def test_a_specialist_sees_its_own_kind_of_step_true_and_the_other_at_random(task, results, difficulty):
    told = {"math": difficulty, "code": 0, "both": (difficulty + 1) // 2}[task]
    true: dict[str, list[bool]] = {"math": [], "code": []}
    for record in generate(task, "train", 200, difficulty, 5, results=results):
        steps = re.findall(r"(\d+)([+-])(\d+)=(\d+)", record.teacher_reasoning)
        for i, (left, sign, right, result) in enumerate(steps):
            after = int(left) + (1 if sign == "+" else -1) * int(right)
            true["math" if i < told else "code"].append(after == int(result))
            assert 0 <= int(result) <= HIGHEST
    assert all(true.pop(results))
    other = true.popitem()[1]
    assert not other or sum(other) < 0.2 * len(other)


def test_a_problem_of_both_ends_in_a_program_that_runs():
    for record in generate("both", "test", 40, 3, seed=0):
        told, *lines = record.prompt.split("\n")
        thing = lines[0].partition("=")[2].partition("-")[0].partition("+")[0]
        assert thing in told
        scope = {thing: int(record.reasoning.split(", ")[1]), "print": lambda value: None}
        exec("\n".join(lines), scope)  # our own generated program
        assert scope[lines[-2].partition("=")[0]] == int(record.answer)


def test_both_needs_two_steps():
    with pytest.raises(ValidationError, match="set 2 or more"):
        EmbeddedData(task="both", difficulty=1)
