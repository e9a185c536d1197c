"""Teachers write their own reasoning: what is kept, what stands in, and that a run which was stopped goes on alike."""

import json
from itertools import chain

import numpy as np
import pytest
import torch
from tiny import ARMS, DATA, build

from kvpipe.config import ENGINES, ConfigError, ScoringConfig
from kvpipe.data.corpus import generate
from kvpipe.evaluate.generate import Drawn, Sampling, batched, continuations
from kvpipe.evaluate.scorers.answers import worked
from kvpipe.experiment.paths import Paths
from kvpipe.steps.teacher_text import make_shard

ARM = {"base": "two", "set": {"time": {"kind": "segment", "reasoning": "written"}}}


# ---------------------------------------------------------------- the draw
def drawn(scores, seeds, temperature=1.0, top_p=1.0):
    draw = Drawn(Sampling(temperature, top_p, seeds), range(len(seeds)), 3, first=2)
    left = draw(torch.zeros(len(seeds), 3, dtype=torch.long), scores.expand(len(seeds), -1))
    assert (left.isfinite().sum(1) == 1).all()
    return left.argmax(1)


def test_frequencies_are_the_models_probabilities():
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.9, -0.2]])
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        expected = (scores[0] / temperature).softmax(-1)
        if top_p < 1:  # 2.0 and 0.9 have 0.77 of it together: 0.3 completes them
            expected[[1, 4]] = 0
            expected /= expected.sum()
        found = torch.bincount(drawn(scores, range(4000), temperature, top_p), minlength=5) / 4000
        torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


def test_a_cold_draw_is_greedy():
    scores = torch.randn(1, 11)
    assert (drawn(scores, range(50), temperature=1e-3) == scores.argmax()).all()


def test_batches_hold_at_most_their_tokens():
    costs = sorted(np.random.default_rng(0).integers(1, 40, 57).tolist())
    found = list(batched(range(57), costs, 9, 100))
    assert list(chain(*found)) == list(range(57)) and max(map(len, found)) == 9
    assert all(len(m) == 1 or costs[m[-1]] * len(m) <= 100 for m in found)
    assert list(batched(range(3), [200, 201, 202], 9, 100)) == [[0], [1], [2]]


def test_a_text_follows_from_its_prompt_and_seed_alone(tiny):
    model, tokenizer = tiny.teacher_model("beta"), tiny.tokenizer("beta")
    prompts = [record.prompt + "\n" for record in tiny.records("train")[:9]]
    config = ScoringConfig(max_new_tokens=7)

    def texts(members, tokens):
        given = [prompts[i] for i in members], config, 100
        sampling = Sampling(0.9, 0.95, [50 + i for i in members])
        found = dict(continuations(model, tokenizer, *given, sampling=sampling, batch_tokens=tokens))
        return {members[i]: text for i, text in found.items()}

    together, alone = texts(range(9), None), texts(range(9), 1)
    assert together == alone and len(set(together.values())) > 5
    assert texts([4, 2], 90) == {i: together[i] for i in (4, 2)}


# ---------------------------------------------------------------- what is kept of a text
@pytest.mark.parametrize(
    "text, scorer, before",
    [
        ("3+4=7.\n#### 7\nMore", "exact", "3+4=7."),
        ("First 3. Then 4: 7. So #### 7", "exact", "First 3. Then 4: 7."),
        ("#### 7", "exact", ""),
        ("no answer", "exact", ""),
        ("One.\nTwo 1.5 and\nit is #### 7", "number", "One.\nTwo 1.5 and"),
    ],
)
def test_reasoning_is_what_stands_before_the_sentence_of_the_answer(text, scorer, before):
    assert worked(text, ScoringConfig(scorer=scorer)) == before


# ---------------------------------------------------------------- the step
class Scripted:
    """Right from the first, second … try on, or never, by the number of the record; counts what it is asked."""

    asked = 0
    stop_after = 10**9

    def __init__(self, folder, config, device, trust):
        self.name = folder.name

    def write(self, prompts, scoring, chat, seeds):
        for i, (prompt, seed) in reversed(list(enumerate(zip(prompts, seeds, strict=True)))):
            if Scripted.asked == Scripted.stop_after:
                raise KeyboardInterrupt
            Scripted.asked += 1
            yield i, f"{self.name} {seed % 1000} on {prompt.strip()}\n#### {self.said(prompt, seed)}\n"

    right = staticmethod(lambda prompt, seed: True)

    def said(self, prompt, seed):
        return ANSWERS[prompt.strip().removeprefix("Do ")] if self.right(prompt, seed) else "wrong"


ANSWERS = {
    record.prompt: record.answer
    for source in DATA["sources"]
    for record in generate(source["task"], "train", source["train"], source["difficulty"], 0)
}


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setitem(ENGINES, "scripted", Scripted)
    for name, value in {"asked": 0, "stop_after": 10**9, "right": staticmethod(lambda *_: True)}.items():
        monkeypatch.setattr(Scripted, name, value)
    return Scripted


def experiment(folder, **settings):
    given = {f"teacher_text.{key}": value for key, value in {"engine": "scripted", **settings}.items()}
    return build(folder, {"arms": {**ARMS, "written": ARM}, **given})  # texts are encoded, and so written


def test_each_teacher_reads_its_own_text_and_the_reference_stands_in(tmp_path, scripted):
    # by the seed: some at once, some later, some never
    scripted.right = staticmethod(lambda prompt, seed: seed % 3 == 0)
    work = experiment(tmp_path, tries=3, shards=2, min_kept=0.3)
    for teacher in ("alpha", "beta"):
        counts = json.loads(work.paths.text_counts(teacher).read_text())["tasks"]
        records, plain = work.records("train", "written", teacher), work.records("train")
        own = [r.reasoning != p.reasoning for r, p in zip(records, plain, strict=True)]
        assert 0 < sum(own) < len(plain)
        assert (
            sum(c["kept"] for c in counts.values()) == sum(own) == sum(sum(c["kept_at_try"]) for c in counts.values())
        )
        assert all(len(c["kept_at_try"]) == 3 and c["kept_at_try"][1] for c in counts.values())
        lines = [
            json.loads(line) for i in range(2) for line in work.paths.text_shard(teacher, i).read_text().splitlines()
        ]
        texts = {(line["id"], line["try"]): line for line in lines if "id" in line}
        for record, before, changed in zip(records, plain, own, strict=True):
            tries = [texts[record.id, i]["reasoning"] for i in range(3) if (record.id, i) in texts]
            assert (record.prompt, record.answer) == (before.prompt, before.answer)
            if changed:  # the first that is right, and then no more
                assert record.reasoning == tries[-1] and record.reasoning.startswith(f"{teacher} ")
                assert not any(tries[:-1])
            else:
                assert tries == [""] * 3
        src, dst = work.encoding(teacher, "train", "written"), work.student_encoding("train")
        assert ((src.segment_hashes != dst.segment_hashes) == np.array([[False, o, False] for o in own])).all()


def test_a_run_that_was_stopped_goes_on_and_writes_the_same(tmp_path, scripted):
    scripted.right = staticmethod(lambda prompt, seed: seed % 2 == 0)
    work = experiment(tmp_path, tries=2, min_kept=0.3)
    path = work.paths.text_shard("alpha", 0)
    whole, scripted.asked = path.read_text(), 0
    make_shard(work, "alpha", "0")
    assert scripted.asked == 0  # a finished one is kept
    asked = len(whole.splitlines()) - 1
    assert asked > 35
    path.unlink()
    scripted.stop_after = 31
    with pytest.raises(KeyboardInterrupt):
        make_shard(work, "alpha", "0")
    assert not path.exists()
    with path.with_suffix(".partial").open("a") as file:
        file.write('{"id": "math-train-0000')  # cut off
    scripted.stop_after = 10**9
    make_shard(work, "alpha", "0")
    assert path.read_text() == whole and scripted.asked == asked
    assert not path.with_suffix(".partial").exists()


def test_below_half_the_arms_are_refused(tmp_path, scripted):
    scripted.right = staticmethod(lambda prompt, seed: False)
    message = r"alpha answers 0 of 13 .* task code .*min_kept is 0.5: the arms written would"
    with pytest.raises(ConfigError, match=message):
        experiment(tmp_path, tries=1, tasks={"code": {}})
    assert not Paths(tmp_path / "results").teacher_text("alpha").exists()


def test_only_the_listed_tasks_and_teachers_write(tmp_path, scripted):
    tasks = {"code": {"prompt": "Do {prompt}", "teachers": ["beta"]}, "math": {}}
    work = experiment(tmp_path, tasks=tasks)
    for teacher, written in (("alpha", {"math"}), ("beta", {"math", "code"})):
        pairs = zip(work.records("train", "written", teacher), work.records("train"), strict=True)
        assert {r.task for r, plain in pairs if r.reasoning != plain.reasoning} == written


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"engine": "vlm"}, r"teacher_text.engine: unknown name 'vlm'"),
        ({"tasks": {"maths": {}}}, r"teacher_text.tasks.maths: unknown name 'maths'; did you mean 'math'"),
        ({"tasks": {"math": {"teachers": ["alfa"]}}}, r"teacher_text.tasks.math.teachers: unknown name 'alfa'"),
        ({"tasks": {"math": {"teachers": ["alpha"]}}}, r"arms.written.*beta writes in none; list the tasks"),
        ({"tasks": {"math": {"prompt": "Do it"}}}, r"must have \{prompt\} in it"),
    ],
)
def test_what_cannot_be_written_is_said_before(tmp_path, scripted, settings, message):
    with pytest.raises(ConfigError, match=message):
        experiment(tmp_path, **settings)


def test_a_task_without_answers_cannot_be_written(tmp_path, scripted):
    with pytest.raises(ConfigError, match=r"written: evaluate.tasks.math.scorer: none finds no answer in a text"):
        build(tmp_path, {"arms": {**ARMS, "written": ARM}, "evaluate.tasks": {"math": {"scorer": "none"}}})
