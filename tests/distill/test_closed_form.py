"""Key and value projections in closed form: planted weights are found again, and what is right stays as it is."""

import copy

import numpy as np
import pytest
import torch
from model_zoo import ARCHITECTURES, VOCAB
from tiny import build

from kvpipe.cache.capture import capture
from kvpipe.data.batches import Batch
from kvpipe.distill.closed_form import start_from
from kvpipe.distill.fusion import Fused
from kvpipe.distill.targets import FusedTarget
from kvpipe.steps.train import load_cell, prepare

TEXTS, LENGTH = 40, 30


def model(name):
    torch.manual_seed(0)
    return ARCHITECTURES[name].build().eval()


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (TEXTS, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < torch.randint(9, LENGTH + 1, (TEXTS, 1), generator=generator)).long()
    return Batch(np.arange(TEXTS), ids, mask, ids)


def target(of, texts):
    """A model's own cache as the target, of all tokens but some."""
    kv = capture(of, texts.input_ids, texts.attention_mask)
    present = texts.mask.clone()
    present[:, 4] = False
    return FusedTarget(Fused(kv.keys, kv.values, torch.ones(1, 1, TEXTS, 1, 1)), present[None])


def projections(of):
    return {name: weight for name, weight in of.named_parameters() if "k_proj" in name or "v_proj" in name}


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_planted_projections_are_found_bottom_up(family):
    """With bias and without. A layer above finds its own only if those below give it their true outputs."""
    planted, texts = model(family), batch()
    student = copy.deepcopy(planted)
    with torch.no_grad():
        for weight in projections(student).values():
            weight += 0.3 * weight.std() * torch.randn_like(weight)
    goal = target(planted, texts)
    before = capture(student, texts.input_ids, texts.attention_mask)
    start_from(student, texts, goal, 1e-9)
    after = capture(student, texts.input_ids, texts.attention_mask)
    shown = texts.mask[None, :, None, :, None]
    for kind in ("keys", "values"):
        wanted = getattr(goal.fused, kind) * shown
        assert (getattr(before, kind) * shown - wanted).abs().max() > 1e-2
        torch.testing.assert_close(getattr(after, kind) * shown, wanted, atol=1e-3, rtol=1e-2)


def test_what_gives_the_target_stays_and_nothing_else_moves():
    student, texts = model("llama"), batch()
    before = copy.deepcopy(dict(student.named_parameters()))
    start_from(student, texts, target(student, texts))
    for name, weight in student.named_parameters():
        torch.testing.assert_close(weight, before[name], atol=1e-5, rtol=0)
    with torch.no_grad():
        projections(student)["model.layers.1.self_attn.v_proj.weight"].add_(0.1)
    changed = copy.deepcopy(dict(student.named_parameters()))
    start_from(student.train(), texts, target(model("llama"), texts))
    assert student.training
    moved = {name for name, weight in student.named_parameters() if not torch.equal(weight, changed[name])}
    assert moved <= set(projections(student)) and "model.layers.1.self_attn.v_proj.weight" in moved


def test_a_large_penalty_changes_little():
    texts, changes = batch(), []
    first, other = model("llama"), model("llama")
    with torch.no_grad():
        other.model.layers[0].self_attn.v_proj.weight.mul_(2)
    for penalty in (1e-3, 1.0, 1e3):
        student = copy.deepcopy(first)
        start_from(student, texts, target(other, texts), penalty)
        weights = (of.model.layers[0].self_attn.v_proj.weight for of in (student, first))
        changes.append(torch.dist(*weights).item())
    assert changes[0] > changes[1] > 50 * changes[2] > 0


@pytest.mark.parametrize(("family", "said"), [("qwen3", "a norm stands behind it"), ("phi3", "0 were found")])
def test_other_projections_are_refused(family, said):
    student, texts = model(family), batch()
    with pytest.raises(ValueError, match=said):
        start_from(student, texts, target(student, texts))


def test_a_cell_starts_nearer_to_its_target(tmp_path):
    """By the arm's own loss; its null, another example's cache, gets another start."""
    arms = {
        "closed": {"base": "one", "set": {"init": "fit"}},
        "closed-null": {"base": "closed", "set": {"shuffle_teacher": True}},
    }
    work = build(tmp_path, {f"arms.{name}": arm for name, arm in arms.items()})
    students = {}
    for name in ("one", *arms):
        prepare(work, name, log=lambda *_: None)
        students[name] = load_cell(work, name, 0, log=lambda *_: None).student
    own, closed, null = (projections(student) for student in students.values())
    assert all(not torch.equal(own[name], closed[name]) and not torch.equal(closed[name], null[name]) for name in own)
    cell = load_cell(work, "closed", 0, log=lambda *_: None)
    assert all(torch.equal(weight, closed[name]) for name, weight in projections(cell.student).items())
    rest = dict(students["one"].named_parameters())
    assert all(torch.equal(weight, rest[n]) for n, weight in students["closed"].named_parameters() if n not in closed)
