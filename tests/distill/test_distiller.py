"""The library: what it computes is what the workflow computes, in anybody's loop."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import build

import kvpipe
from kvpipe.cache.capture import Recorder
from kvpipe.data.batches import collate
from kvpipe.distill.distiller import KV, Distiller, Logits
from kvpipe.distill.terms import Student
from kvpipe.models.folders import load_model, load_tokenizer
from kvpipe.models.head import Head, final_states
from kvpipe.steps.objective import load_objective
from kvpipe.steps.train import prepare
from kvpipe.tokens.decode import decoded
from kvpipe.tokens.spans import encode

EXAMPLES = Path(__file__).parents[2] / "docs" / "library"
QUIET = lambda *_: None  # noqa: E731
CASES = {
    "keys-values": ({"keys": {}, "values": {"weight": 3.0}}, {}),
    "many": (KV() | Logits(0.5), {"fuse": {"kind": "fixed", "weights": [0.8, 0.2]}}),
    "attention": ({"values": {}}, {"fuse": {"kind": "attention"}}),
    "span": ({"keys": {}}, {"fuse": {"kind": "select", "per": "span"}}),
    "states": ({"hidden": {"layers": [1, -1]}, "final_state": {}}, {}),
    "likelihood": ({"likelihood": {"temperature": 5.0}}, {}),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Arms without cross-entropy whose student is pretrained, beside what the library is given for the same."""
    folder = tmp_path_factory.mktemp("distiller")
    build(folder)
    arms = {"control": {"role": "control"}}
    for name, (loss, more) in CASES.items():
        loss = {**loss, "cross_entropy": {"weight": 0}}
        fit = {"fit": {"method": "ridge"}} if {"keys", "values"} & loss.keys() else {}
        arms[name] = {"base": "control", "set": {"teachers": ["alpha", "beta"], "loss": loss, **fit, **more}}
    student = {"source": "local", "path": str(folder / "teachers" / "gamma")}
    given = {
        "arms": arms,
        "models.student": student,
        "store.mode": "live",
        "store.top_logits": 16,
        "train.hold_targets_gb": 0,
    }
    build(folder / "gamma", teachers=("alpha", "beta", "gamma"))
    given["models.student.path"] = str(folder / "gamma" / "teachers" / "gamma")
    work = build(folder / "again", given)
    for name in CASES:
        prepare(work, name, log=QUIET)
    return work


@pytest.fixture(scope="module")
def models(work):
    """Student, tokenizer and teachers as the library takes them."""

    def pair(name):
        folder = work.paths.model(name)
        return load_model(folder), load_tokenizer(folder)

    return *pair("student"), {name: pair(name) for name in ("alpha", "beta")}


@pytest.fixture(scope="module")
def texts(work):
    return [text.text for text in work.student_encoding("train").texts]


def batch_of(work, examples):
    """As the trainer has it."""
    return collate(work.student_encoding("train"), np.array(examples), work.student_tokenizer.pad_token_id)


def gradients(model, *more):
    found = [p.grad.clone() for m in (model, *more) for p in m.parameters() if p.grad is not None]
    for module in (model, *more):
        module.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("stored", [False, True], ids=["live", "stored"])
@pytest.mark.parametrize("name", CASES)
def test_the_library_and_the_workflow_have_one_loss(work, models, texts, tmp_path, name, stored):
    """Loss and gradients of two batches, to 1e-5; a store keeps bf16, and agrees to its precision."""
    student, tokenizer, teachers = models
    loss, more = CASES[name]
    torch.manual_seed(0)
    objective = load_objective(work, work.dag.arm(name), 0)
    torch.manual_seed(0)
    names = {"fuse": "fusion"}
    options = {names.get(key, key): value for key, value in more.items()} | ({"store": tmp_path} if stored else {})
    distiller = Distiller.fit(student, tokenizer, teachers, texts, terms=loss, batch_size=7, log=QUIET, **options)
    distiller.objective.load_state_dict(objective.state_dict())
    # projectors fitted by either are the same
    for examples in ([3, 17, 8], [26, 0]):
        batch = batch_of(work, examples)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        with Recorder(student, hidden=True) as recorder:
            head = Head.of(student)
            states, _ = final_states(student, head, **inputs, use_cache=False)
            expected = objective(batch, Student(head, states, recorder))
        expected.total.backward()
        wanted = gradients(student, objective)
        with distiller.record(student) as run:
            student(**inputs)
            found = distiller.loss(run, inputs)
        found.backward()
        tolerance = {"atol": 5e-3, "rtol": 5e-3} if stored else {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(found.detach(), expected.total.detach(), **tolerance)
        assert distiller.last.values.keys() == expected.values.keys()
        got = gradients(student, distiller)
        assert len(got) == len(wanted)
        whole = torch.cat([g.flatten() for g in wanted])
        gap = torch.cat([g.flatten() for g in got]) - whole
        assert gap.norm() <= (0.02 if stored else 1e-5) * whole.norm() + 1e-9


def test_projectors_are_fitted_as_the_workflow_fits_them(work, models, texts):
    student, tokenizer, teachers = models
    objective = load_objective(work, work.dag.arm("keys-values"), 0)
    distiller = Distiller.fit(student, tokenizer, teachers, texts, terms=CASES["keys-values"][0], log=QUIET)
    for name, tensor in objective.state_dict().items():
        # the workflow's texts end with an end-of-text token, which no teacher has a target for
        torch.testing.assert_close(distiller.objective.state_dict()[name], tensor, atol=2e-3, rtol=2e-3)


def test_a_saved_distiller_is_the_same(work, models, texts, tmp_path):
    student, tokenizer, teachers = models
    loss, _ = CASES["states"]
    distiller = Distiller.fit(
        student,
        tokenizer,
        teachers,
        texts,
        terms=loss | KV(),
        projector={"mode": "joint"},
        store=tmp_path / "s",
        log=QUIET,
    )
    assert sum(p.requires_grad for p in distiller.parameters()) == 2 * 2 + 2 * (2 + 1)
    distiller.save(tmp_path / "saved")
    assert {f.name for f in (tmp_path / "saved").iterdir()} == {"distiller.safetensors", "distiller.json"}
    again = Distiller.load(tmp_path / "saved", student, tokenizer, teachers)
    batch = tokenizer(texts[:3], return_tensors="pt", padding=True)
    losses = []
    for one in (distiller, again):
        with one.record(student) as run:
            student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            losses.append(one.loss(run, batch).item())
    assert losses[0] == losses[1] > 0
    with pytest.raises(ValueError, match="fitted for the teachers alpha, beta, in this order"):
        Distiller.load(tmp_path / "saved", student, tokenizer, dict(reversed(teachers.items())))


def test_what_it_needs_and_costs_is_said_first(models, texts):
    said = []
    student, tokenizer, teachers = models
    Distiller.fit(student, tokenizer, teachers, texts, log=said.append)
    assert "28 texts" in said[0] and "targets" in said[0]
    assert "alpha" in said[1] and "million parameters" in said[1] and "runs live" in said[1]


def test_misuse_is_told_in_a_line(models, texts, tmp_path):
    student, tokenizer, teachers = models
    fit = lambda **options: Distiller.fit(student, tokenizer, teachers, texts, log=QUIET, **options)  # noqa: E731
    with pytest.raises(ValueError, match="segment needs texts in segments"):
        fit(time={"kind": "segment"})
    with pytest.raises(ValueError, match="cka needs a layer map"):
        fit(layers={"kind": "cka"})
    with pytest.raises(ValueError, match="what a student was pruned of"):
        fit(fit={"method": "ridge", "basis": "whole"})
    with pytest.raises(ValueError, match="no effect on the terms"):
        fit(terms=Logits(), projector={"kind": "heads"})
    distiller = fit(store=tmp_path)
    with distiller.record(student) as run:
        with pytest.raises(RuntimeError, match="no forward of the student was recorded"):
            distiller.loss(run, {"input_ids": torch.ones(1, 2, dtype=torch.long)})
        batch = tokenizer([texts[0], "another text"], return_tensors="pt", padding=True)
        student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        with pytest.raises(ValueError, match="has not read the text 'another text'"):
            distiller.loss(run, batch)
        with pytest.raises(ValueError, match="padded on the left"):
            distiller.loss(run, {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"].flip(1)})


# ---------------------------------------------------------------- ids and texts
@pytest.mark.parametrize("name", ["alpha", "beta", "student"])
def test_ids_are_decoded_to_the_spans_that_they_were_encoded_with(work, name):
    tokenizer = load_tokenizer(work.paths.model(name))
    for text in ("k=8\nl=k-2\n", "What is 12 + 3? It is 15.", "naïve ≠ 愛 🙂", ""):
        tokens = encode(tokenizer, text) if text else None
        if tokens is None:
            assert decoded(tokenizer, torch.zeros(0, dtype=torch.long))[0] == ""
            continue
        found, spans = decoded(tokenizer, tokens.ids)
        assert found == text
        assert torch.equal(spans, tokens.spans)


def test_ids_that_end_inside_a_character_end_before_it(work):
    tokenizer = load_tokenizer(work.paths.model("alpha"))
    ids = encode(tokenizer, "a🙂").ids
    text, spans = decoded(tokenizer, ids[:-1])
    assert text == "a" and spans[-1, 1] == 1


# ---------------------------------------------------------------- the package
def test_the_package_exports_the_library_and_nothing_else():
    from importlib import import_module

    assert {"Distiller", "DistillationMixin", "KV", "Logits", "Store", "overlap", "kv_loss", "rebase"} <= set(
        kvpipe.__all__
    )
    for module, names in kvpipe.HOMES.items():
        for name in names:
            found = getattr(import_module(f"kvpipe.{module}"), name)
            assert found.__doc__, name
    assert (Path(kvpipe.__file__).parent / "py.typed").is_file()


@pytest.fixture(scope="module")
def folders(work, texts, tmp_path_factory):
    """A student, a teacher and texts as an outsider has them."""
    path = tmp_path_factory.mktemp("outside") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(work.paths.model("student")), str(work.paths.model("alpha")), str(path)


@pytest.mark.parametrize("name", ["plain_loop", "trainer", "sft_trainer"])
def test_an_example_runs_and_shows_its_terms(folders, tmp_path, monkeypatch, capsys, name):
    if name == "sft_trainer":
        pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    script = EXAMPLES / f"{name}.py"
    assert len(script.read_text().splitlines()) <= 34, "about twenty lines beside imports and blanks"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), *folders])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    for term in ("keys", "values", "logits"):
        assert printed.count(term) >= 8, printed
    assert "nan" not in printed
