"""Laws of fusion, for 1 to 5 teachers and every kind."""

import math
import warnings

import pytest
import torch

from kvpipe.config import FUSIONS
from kvpipe.distill.fusion import (
    AgreementFusion,
    AttentionFusion,
    FixedFusion,
    LearnableFusion,
    MeanFusion,
    SelectFusion,
    SimilarityFusion,
    TaskFusion,
    TeacherCaches,
    build_fusion,
    collapse_report,
    entropy,
    mean_weights,
)

LAYER, BATCH, HEAD, TIME, DIM, VALUE_DIM, GROUP, HIDDEN = 5, 4, 3, 7, 6, 2, 2, 9
TASKS = ["math", "code", "math", "poetry"]
TEACHERS = [1, 2, 3, 4, 5]


def rows(n):
    """Uneven weights, different for each teacher and task."""
    return {"math": [i + 1.0 for i in range(n)], "code": [2.0 ** (n - i) for i in range(n)], "default": [1.0] * n}


SETTINGS = {
    "mean": {},
    "fixed": {},
    "task": {},
    "attention": {},
    "learnable": {},
    "select": {},
    "select-span": {"kind": "select", "per": "span"},
    "similarity": {},
    "agreement": {},
}
KINDS = list(SETTINGS)


def build(kind, n):
    options = {"kind": kind} | SETTINGS[kind]
    if kind in ("fixed", "task"):
        table = {task: [weight / sum(row) for weight in row] for task, row in rows(n).items()}
        options["weights"] = table["math"] if kind == "fixed" else table
    fusion = build_fusion(FUSIONS(**options), n, HIDDEN)
    fusion.begin(targets(n), torch.ones(n, BATCH, TIME, dtype=torch.bool))
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.normal_(std=0.3)
    return fusion


def targets(n):
    return TeacherCaches(
        torch.randn(n, LAYER, BATCH, HEAD, TIME, DIM), torch.randn(n, LAYER, BATCH, HEAD, TIME, VALUE_DIM)
    )


def context(n):
    return {
        "present": torch.ones(n, BATCH, dtype=torch.bool),
        "tasks": TASKS,
        "queries": torch.randn(LAYER, BATCH, HEAD * GROUP, TIME, DIM),
        "hidden": torch.randn(LAYER, BATCH, TIME, HIDDEN),
        "teacher_losses": torch.rand(n, BATCH),
        "span_losses": torch.rand(n, BATCH, TIME),
    }


def by_hand(caches, weights):
    wide = weights.expand(*caches.shape[:-1])
    return torch.einsum("nlbht,nlbhtd->lbhtd", wide, caches)


def permuted(fusion, order):
    """The same fusion with the parameters that belong to teachers reordered."""
    with torch.no_grad():
        if hasattr(fusion, "log_weights"):
            fusion.log_weights.copy_(fusion.log_weights[..., order])
        if isinstance(fusion, SimilarityFusion):
            fusion.prototypes = fusion.prototypes[order]
        if isinstance(fusion, LearnableFusion):
            last = fusion.router[-1]
            last.weight.copy_(last.weight[order])
            last.bias.copy_(last.bias[order])
    return fusion


@pytest.mark.parametrize("n", TEACHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_sum_to_one_and_mix_the_targets(kind, n):
    given = targets(n)
    fused = build(kind, n)(given, **context(n))
    torch.testing.assert_close(fused.weights.sum(0), torch.ones_like(fused.weights[0]))
    assert (fused.weights >= 0).all()
    torch.testing.assert_close(fused.keys, by_hand(given.keys, fused.weights))
    torch.testing.assert_close(fused.values, by_hand(given.values, fused.weights))


@pytest.mark.parametrize("kind", KINDS)
def test_one_teacher_is_the_identity(kind):
    given = targets(1)
    fused = build(kind, 1)(given, **context(1))
    assert torch.equal(fused.keys, given.keys[0]) and torch.equal(fused.values, given.values[0])


@pytest.mark.parametrize("n", TEACHERS[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_permuting_the_teachers_permutes_the_weights(kind, n):
    given, extra, order = targets(n), context(n), torch.randperm(n)
    extra["present"] = torch.rand(n, BATCH) > 0.3
    fusion = build(kind, n)
    before = fusion(given, **extra)
    extra |= {name: extra[name][order] for name in ("present", "teacher_losses", "span_losses")}
    after = permuted(fusion, order)(TeacherCaches(given.keys[order], given.values[order]), **extra)
    torch.testing.assert_close(after.weights, before.weights[order])
    torch.testing.assert_close(after.keys, before.keys)


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("n", TEACHERS[1:])
@pytest.mark.parametrize("kind", ["mean", "fixed", "task", "attention", "learnable"])
def test_a_missing_teacher_is_masked_and_the_rest_renormalised(kind, n, by_position):
    given, extra, fusion = targets(n), context(n), build(kind, n)
    full = fusion(given, **extra).weights
    shape = (n, BATCH, TIME) if by_position else (n, BATCH)
    present = torch.rand(shape) > 0.4
    present[:, 1] = False
    here = (present if by_position else present[..., None]).reshape(n, 1, BATCH, 1, -1)
    given.keys.masked_fill_(~here[..., None], torch.nan)  # whatever a missing teacher left behind
    fused = fusion(given, **(extra | {"present": present}))
    kept = full * here
    expected = kept / kept.sum(0, keepdim=True).clamp(min=1e-30)
    if kind == "attention":  # whose scores of missing teachers are NaN here: the weights come from the rest alone
        expected = torch.where(here, expected, 0.0)
    torch.testing.assert_close(fused.weights, expected.expand_as(fused.weights), atol=1e-6, rtol=1e-4)
    assert torch.isfinite(fused.keys).all()
    assert fused.keys[:, 1].abs().sum() == 0 and fused.weights[:, :, 1].abs().sum() == 0


def test_mean_is_the_mean():
    given = targets(3)
    torch.testing.assert_close(MeanFusion()(given).keys, given.keys.mean(0))


def test_fixed_and_task_weights_are_the_given_ones():
    given = targets(2)
    fixed = FixedFusion([0.2, 0.8])(given).weights
    torch.testing.assert_close(fixed.flatten(1), torch.tensor([[0.2], [0.8]]).expand(2, BATCH))
    table = {"math": [0.7, 0.3], "code": [0.3, 0.7], "default": [1, 0]}
    weights = TaskFusion(table)(given, tasks=TASKS).weights
    torch.testing.assert_close(weights[0].flatten(), torch.tensor([0.7, 0.3, 0.7, 1.0]))


def test_task_without_a_row_is_named():
    fusion = TaskFusion({"math": [0.7, 0.3], "code": [0.3, 0.7]})
    with pytest.raises(ValueError, match=r"no fusion weights for task poetry; known tasks: math, code"):
        fusion(targets(2), tasks=TASKS)
    with pytest.raises(ValueError, match="needs `tasks`"):
        fusion(targets(2))
    with pytest.raises(ValueError, match="3 tasks came for 4 examples"):
        fusion(targets(2), tasks=["math"] * 3)


def test_learnable_task_offsets_start_at_the_table_train_and_keep_zeros():
    fusion, given = TaskFusion({"math": [0.7, 0.3, 0.0], "default": [0.2, 0.3, 0.5]}, learnable=True), targets(3)
    fused = fusion(given, tasks=TASKS)
    torch.testing.assert_close(fused.weights[:, 0, 0, 0, 0], torch.tensor([0.7, 0.3, 0.0]))
    fused.keys.square().sum().backward()
    assert torch.isfinite(fusion.offsets.grad).all()
    assert fusion.offsets.grad[0, 2] == 0 and fusion.offsets.grad[0, 0] != 0
    assert [name for name, _ in TaskFusion({"math": [1, 1]}).named_parameters()] == []


def test_attention_by_definition():
    given, extra = targets(3), context(3)
    weights = AttentionFusion()(given, **extra).weights
    for layer, b, h, t in [(0, 0, 0, 0), (4, 3, 2, 6), (2, 1, 1, 3)]:
        group = extra["queries"][layer, b, h * GROUP : (h + 1) * GROUP, t]
        scores = torch.stack([(group @ key).mean() / math.sqrt(DIM) for key in given.keys[:, layer, b, h, t]])
        torch.testing.assert_close(weights[:, layer, b, h, t], scores.softmax(0))


def test_the_student_does_not_move_the_target():
    given, extra = targets(2), context(2)
    for name in ("queries", "hidden"):
        extra[name].requires_grad_()
    learnable = LearnableFusion(2, HIDDEN)
    with torch.no_grad():
        learnable.router[-1].weight.normal_()
    for fusion, name in [(AttentionFusion(), "queries"), (learnable, "hidden")]:
        keys = fusion(given, **extra).keys
        if keys.requires_grad:
            keys.square().sum().backward()
        assert extra[name].grad is None
    assert learnable.router[-1].weight.grad.abs().sum() > 0


def test_learnable_starts_from_the_mean_and_varies_by_position_once_trained():
    given, extra = targets(3), context(3)
    torch.testing.assert_close(LearnableFusion(3, HIDDEN)(given, **extra).keys, given.keys.mean(0))
    weights = build("learnable", 3)(given, **extra).weights
    assert weights.shape == (3, LAYER, BATCH, 1, TIME)
    assert weights.std(4).min() > 0 and weights.std(1).min() > 0, "it varies by position and by layer"


def test_select_takes_the_best_teacher_present_and_shares_ties():
    given = targets(3)
    losses = torch.tensor([[1.0, 0.1, 0.5, 2.0], [0.5, 0.2, 0.5, 1.0], [2.0, 0.3, 0.9, 3.0]])
    present = torch.ones(3, BATCH, dtype=torch.bool)
    present[0, 1] = False
    weights = SelectFusion()(given, present=present, teacher_losses=losses).weights
    expected = torch.tensor([[0, 0, 0.5, 0], [1, 1, 0.5, 1], [0, 0, 0, 0]])
    torch.testing.assert_close(weights.flatten(1), expected)
    losses[2, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN for a loss"):
        SelectFusion()(given, teacher_losses=losses)


def test_what_a_kind_needs_is_named():
    given = targets(2)
    for fusion, name in [(AttentionFusion(), "queries"), (SelectFusion(), "teacher_losses")]:
        with pytest.raises(ValueError, match=f"needs `{name}`"):
            fusion(given)
    with pytest.raises(ValueError, match="needs `hidden`"):
        LearnableFusion(2, HIDDEN)(given)
    with pytest.raises(ValueError, match="multiple of 3 KV heads"):
        AttentionFusion()(given, queries=torch.randn(LAYER, BATCH, 4, TIME, DIM))
    with pytest.raises(ValueError, match="built for 3 teachers; the targets have 2"):
        FixedFusion([1, 1, 1])(given)
    with pytest.raises(ValueError, match=r"present is \(3, 4\)"):
        MeanFusion()(given, present=torch.ones(3, BATCH, dtype=torch.bool))


def test_selection_per_span_chooses_position_by_position():
    given, losses = targets(2), torch.rand(2, BATCH, TIME)
    present = torch.ones(2, BATCH, TIME, dtype=torch.bool)
    present[1, :, 2] = False
    weights = SelectFusion("span")(given, present=present, span_losses=losses).weights
    expected = (losses[0] <= losses[1]) | ~present[1]
    assert torch.equal(weights[0, 0, :, 0], expected.float())
    with pytest.raises(ValueError, match="per span needs `span_losses`"):
        SelectFusion("span")(given, teacher_losses=losses[..., 0])


def test_similarity_favours_the_teacher_whose_target_is_like_its_usual_one():
    """An example that is a teacher's prototype has cosine 1 with it; what a missing teacher left behind does not count."""
    usual, present = targets(2), torch.ones(2, BATCH, TIME, dtype=torch.bool)
    present[0, 2] = False
    usual.keys[0, :, 2] = torch.nan
    fusion = SimilarityFusion(temperature=0.5)
    with pytest.raises(ValueError, match="call `begin` once"):
        fusion(usual)
    fusion.begin(usual, present)
    both = [x.movedim(3, 5).flatten(3, 4).movedim(-1, 3) for x in (usual.keys, usual.values)]
    flat = [torch.cat([b[t][:, [0, 1, 3] if t == 0 else [0, 1, 2, 3]].flatten(1, 2) for b in both], -1) for t in (0, 1)]
    assert fusion.prototypes.shape == (2, LAYER, HEAD * (DIM + VALUE_DIM))
    assert torch.isfinite(fusion.prototypes).all() and len(flat) == 2
    given = targets(2)
    given.keys[1], given.values[1] = (
        usual.keys[1].mean((1, 3), keepdim=True),
        usual.values[1].mean((1, 3), keepdim=True),
    )
    given.keys[0], given.values[0] = -given.keys[1], -given.values[1]
    weights = fusion(given).weights
    assert (weights[1] > weights[0]).all()


def test_agreement_turns_from_a_teacher_that_stands_apart():
    given = targets(3)
    given.keys[1], given.values[1] = given.keys[0], given.values[0]
    weights = AgreementFusion()(given).weights
    assert (weights[2] < weights[0]).all()
    torch.testing.assert_close(weights[0], weights[1])
    cosine = torch.cosine_similarity(
        *(torch.cat([given.keys[t, 2, 1, :, 4].flatten(), given.values[t, 2, 1, :, 4].flatten()]) for t in (0, 2)),
        dim=0,
    )
    expected = torch.stack([(1 + cosine) / 2, (1 + cosine) / 2, cosine]).div(0.1).softmax(0)
    torch.testing.assert_close(weights[:, 2, 1, 0, 4], expected, atol=1e-5, rtol=1e-4)
    present = torch.ones(3, BATCH, dtype=torch.bool)
    present[1] = False
    given.keys[1] = torch.nan
    two = AgreementFusion()(given, present=present).weights
    torch.testing.assert_close(two, torch.tensor([0.5, 0.0, 0.5]).reshape(3, 1, 1, 1, 1).expand_as(two))


def test_build_fusion_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="unknown fusion 'maen'; did you mean 'mean'"):
        FUSIONS("maen")
    with pytest.raises(ValueError, match="3 weights for 2 teachers"):
        build_fusion(FUSIONS("task", weights={"math": [0.2, 0.2, 0.6]}), 2)
    for wrong in ([-1, 2], [0, 0], [], [math.nan, 1]):
        with pytest.raises(ValueError, match="must be finite"):
            FixedFusion(wrong)
    with pytest.raises(ValueError, match="rows of length"):
        TaskFusion({"math": [1, 1], "code": [1]})


def as_weights(table):
    """(teacher, batch) → (teacher, 1, batch, 1, 1)."""
    return torch.tensor(table)[:, None, :, None, None]


def test_entropy_by_hand():
    present = torch.tensor([[True, True, True, False], [True, True, True, False], [False, True, False, True]])
    weights = as_weights([[0.5, 0.2, 1.0, 0.0], [0.5, 0.3, 0.0, 0.0], [0.0, 0.5, 0.0, 1.0]])
    three = -(0.2 * math.log(0.2) + 0.3 * math.log(0.3) + 0.5 * math.log(0.5)) / math.log(3)
    assert float(entropy(weights, present)) == pytest.approx((1 + three + 0) / 3)
    assert float(entropy(weights[:1], present[:1])) == 0
    logits = torch.zeros(3, 1, BATCH, 1, 1, requires_grad=True)
    (-entropy((logits + torch.arange(3.0).reshape(3, 1, 1, 1, 1)).softmax(0), present)).backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[2].sum() > 0, "descent lowers the strongest"


def test_collapse_report_tells_three_cases():
    present = torch.ones(2, BATCH, dtype=torch.bool)
    with pytest.warns(UserWarning, match="collapsed onto teacher 1"):
        assert collapse_report(as_weights([[0.01] * 4, [0.99] * 4]), present).state == "collapsed"
    with pytest.warns(UserWarning, match="stayed uniform"):
        assert collapse_report(as_weights([[0.5] * 4, [0.5] * 4]), present).state == "uniform"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = collapse_report(as_weights([[0.9, 0.1, 0.5, 0.5], [0.1, 0.9, 0.5, 0.5]]), present)
        assert report.state == "ok" and report.mean_weights == pytest.approx([0.5, 0.5])
        alone = torch.tensor([[True] * 4, [False] * 4])
        assert collapse_report(as_weights([[1.0] * 4, [0.0] * 4]), alone).state == "ok", "nothing to choose from"


def test_mean_weights_per_task_and_layer():
    weights = torch.rand(2, LAYER, BATCH, HEAD, TIME)
    mask = torch.rand(BATCH, TIME) > 0.3
    table = mean_weights(weights, TASKS, mask)
    assert list(table) == ["math", "code", "poetry"] and table["math"].shape == (LAYER, 2)
    picked = [weights[1, 3, b, :, t].mean() for b in (0, 2) for t in range(TIME) if mask[b, t]]
    torch.testing.assert_close(table["math"][3, 1], torch.stack(picked).mean())
    torch.testing.assert_close(mean_weights(weights[:, :1, :, :1, :1], TASKS, mask)["code"][0], weights[:, 0, 1, 0, 0])
