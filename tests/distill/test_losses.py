"""Each loss from its definition by loops at an interior point; masks hide everything; gradients flow."""

import math

import numpy as np
import pytest
import torch

from kvpipe.distill.losses import (
    NonFiniteLossError,
    Schedule,
    check_finite,
    kv_loss,
    logit_kd_loss,
    masked_mean,
    relation_loss,
    target_std,
)
from kvpipe.models.likelihood import token_nll

LAYER, BATCH, HEAD, TIME, DIM, VOCAB = 5, 2, 3, 7, 4, 13


def caches():
    scale = torch.logspace(-2, 2, LAYER).reshape(-1, 1, 1, 1, 1)
    return torch.randn(LAYER, BATCH, HEAD, TIME, DIM), scale * torch.randn(LAYER, BATCH, HEAD, TIME, DIM) + 1


def ragged_mask():
    mask = torch.ones(BATCH, TIME, dtype=torch.bool)
    mask[0, 4:], mask[1, 0] = False, False
    return mask


def pointwise(residual, kind):
    if kind == "mse":
        return residual**2
    return 0.5 * residual**2 if abs(residual) < 1 else abs(residual) - 0.5


@pytest.mark.parametrize("kind", ["mse", "smooth_l1"])
@pytest.mark.parametrize("scale", [None, "std"])
def test_kv_loss_by_definition(kind, scale):
    student, target = caches()
    mask = ragged_mask()
    loss = kv_loss(student, target, mask, kind=kind, scale=scale)
    assert loss.shape == (BATCH, TIME)
    for b in range(BATCH):
        for t in range(TIME):
            total = 0.0
            for layer in range(LAYER):
                shown = [target[layer, i, :, j] for i in range(BATCH) for j in range(TIME) if mask[i, j]]
                std = float(np.std(torch.stack(shown).numpy())) if scale == "std" else 1.0
                for h in range(HEAD):
                    for d in range(DIM):
                        total += pointwise(float(student[layer, b, h, t, d] - target[layer, b, h, t, d]) / std, kind)
            expected = total / (LAYER * HEAD * DIM) if mask[b, t] else 0.0
            assert float(loss[b, t]) == pytest.approx(expected, rel=1e-4)


def test_kv_loss_is_the_mean_of_its_layers_and_takes_one_layer():
    student, target = caches()
    mask = ragged_mask()
    per_layer = torch.stack([kv_loss(*both, mask, scale="std") for both in zip(student, target, strict=True)])
    torch.testing.assert_close(kv_loss(student, target, mask, scale="std"), per_layer.mean(0))


def test_cosine_distance_looks_at_directions_alone():
    student, target = caches()
    mask = ragged_mask()
    loss = kv_loss(student, target, mask, "cosine")
    rows = torch.stack([(a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)) for a, b in [(student, target)]])
    torch.testing.assert_close(loss, torch.where(mask, (1 - rows[0]).mean((0, 2)), 0.0))
    torch.testing.assert_close(kv_loss(student * 5, target / 7, mask, "cosine"), loss)
    torch.testing.assert_close(kv_loss(target, -target, mask, "cosine"), 2.0 * mask)
    student[:, 0, :, 4:], target[:, 1, :, 0] = torch.inf, torch.nan
    student.requires_grad_()
    again = kv_loss(student, target, mask, "cosine")
    again.sum().backward()
    assert torch.equal(again, loss) and torch.isfinite(student.grad).all() and not student.grad[:, 0, :, 4:].any()


def test_scaled_loss_does_not_depend_on_the_unit_of_a_layer():
    student, target = caches()
    unit = torch.logspace(-3, 3, LAYER).reshape(-1, 1, 1, 1, 1)
    plain, scaled = (
        kv_loss(a, b, ragged_mask(), scale="std") for a, b in [(student, target), (student * unit, target * unit)]
    )
    torch.testing.assert_close(plain, scaled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mse", "smooth_l1"])
@pytest.mark.parametrize("scale", [None, "std"])
def test_masked_positions_have_no_say(kind, scale):
    student, target = caches()
    mask = ragged_mask()
    clean = kv_loss(student, target, mask, kind, scale)
    student[:, 0, :, 4:], target[:, 1, :, 0] = torch.inf, torch.nan
    student.requires_grad_()
    loss = kv_loss(student, target, mask, kind, scale)
    assert torch.equal(loss, clean)
    loss.sum().backward()
    assert torch.isfinite(student.grad).all()
    assert student.grad[:, 0, :, 4:].abs().sum() == 0 and student.grad[:, 0, :, :4].abs().min() > 0


def test_gradient_with_scale_treats_the_deviation_as_a_constant():
    student, target = (side.requires_grad_() for side in caches())
    mask = torch.ones(BATCH, TIME)
    kv_loss(student, target, mask, scale="std").sum().backward()
    torch.testing.assert_close(target.grad, -student.grad)


@pytest.mark.parametrize("kind", ["mse", "smooth_l1"])
@pytest.mark.parametrize("scale", [None, "std"])
def test_the_gradient_of_kv_loss_is_that_of_differences(kind, scale):
    student, target = (side.double() for side in caches())
    mask = ragged_mask()
    scale = target_std(target, mask) if scale else None
    assert torch.autograd.gradcheck(
        lambda a, b: kv_loss(a, b, mask, kind, scale), (student.requires_grad_(), target.requires_grad_())
    )


def test_a_constant_target_is_left_unscaled():
    student, target = torch.randn(LAYER, BATCH, HEAD, TIME, DIM), torch.full((LAYER, BATCH, HEAD, TIME, DIM), 0.1)
    mask = ragged_mask()
    assert (target_std(target, mask) == 0).all()
    assert torch.equal(kv_loss(student, target, mask, scale="std"), kv_loss(student, target, mask))


def test_bfloat16_is_computed_in_float32():
    student, target = (side.bfloat16() for side in caches())
    loss = kv_loss(student, target, ragged_mask(), scale="std")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, kv_loss(student.float(), target.float(), ragged_mask(), scale="std"))


def test_masked_mean_is_over_tokens():
    values, mask = torch.arange(14.0).reshape(BATCH, TIME), ragged_mask()
    values[0, 5] = torch.nan
    assert float(masked_mean(values, mask)) == pytest.approx((0 + 1 + 2 + 3 + sum(range(8, 14))) / 10)
    assert float(masked_mean(values, torch.zeros_like(mask))) == 0.0


def test_token_nll_scores_each_token_by_the_logits_before_it():
    logits, labels = torch.randn(BATCH, TIME, VOCAB), torch.randint(VOCAB, (BATCH, TIME))
    labels[1, 3] = -100
    nll = token_nll(logits, labels)
    for b in range(BATCH):
        for t in range(TIME):
            if t == 0 or labels[b, t] == -100:
                assert nll[b, t] == 0
            else:
                row = logits[b, t - 1].double()
                expected = math.log(sum(math.exp(v) for v in row)) - float(row[labels[b, t]])
                assert float(nll[b, t]) == pytest.approx(expected, rel=1e-5)


def test_token_nll_mean_is_the_loss_of_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(VOCAB, (BATCH, TIME))
    labels = ids.clone()
    labels[0, 4:] = -100
    with torch.no_grad():
        out = model(input_ids=ids, labels=labels)
    nll = token_nll(out.logits, labels)
    torch.testing.assert_close(nll.sum() / (labels[:, 1:] != -100).sum(), out.loss)


def relation_by_definition(student, teacher, mask, heads):
    def rows(x, b, q, r):
        flat = np.asarray(x[b].permute(1, 0, 2).reshape(TIME, -1).double())
        width = flat.shape[1] // heads
        part = flat[:, r * width : (r + 1) * width]
        keys = [k for k in range(q + 1) if mask[b, k]]
        scores = np.array([part[q] @ part[k] for k in keys]) / math.sqrt(width)
        scores = np.exp(scores - scores.max())
        return scores / scores.sum()

    out = np.zeros((BATCH, TIME))
    for b in range(BATCH):
        for q in range(TIME):
            if mask[b, q]:
                pairs = [(rows(teacher, b, q, r), rows(student, b, q, r)) for r in range(heads)]
                out[b, q] = np.mean([np.sum(t * np.log(t / s)) for t, s in pairs])
    return out


def test_relation_loss_by_definition_between_different_heads_and_dims():
    student, teacher = torch.randn(BATCH, 3, TIME, 4), torch.randn(BATCH, 5, TIME, 6)
    mask = ragged_mask()
    for heads in (1, 2, 6):
        loss = relation_loss(student, teacher, mask, heads)
        np.testing.assert_allclose(loss.numpy(), relation_by_definition(student, teacher, mask, heads), atol=1e-5)
    with pytest.raises(ValueError, match="teacher: 5 heads of 6"):
        relation_loss(student, teacher, mask, 4)


def test_relation_loss_is_zero_for_equal_relations_and_masked_content_has_no_say():
    student = torch.randn(BATCH, HEAD, TIME, DIM)
    mask = ragged_mask()
    turn = torch.linalg.qr(torch.randn(DIM * HEAD, DIM * HEAD)).Q
    turned = (student.permute(0, 2, 1, 3).flatten(2) @ turn).reshape(BATCH, TIME, HEAD, DIM).permute(0, 2, 1, 3)
    torch.testing.assert_close(relation_loss(student, turned, mask, 1), torch.zeros(BATCH, TIME), atol=1e-5, rtol=0)
    teacher = torch.randn(BATCH, HEAD, TIME, DIM)
    clean = relation_loss(student, teacher, mask, 2)
    student[0, :, 4:], teacher[1, :, 0] = torch.nan, torch.nan
    student.requires_grad_()
    loss = relation_loss(student, teacher, mask, 2)
    assert torch.equal(loss, clean)
    loss.sum().backward()
    assert torch.isfinite(student.grad).all() and student.grad.abs().sum() > 0


def kd_by_definition(logits, ids, log_probs, temperature):
    q = np.exp(np.asarray(logits.double()) - np.log(np.exp(np.asarray(logits.double())).sum()))
    groups: dict[int, float] = {}
    for token, log_prob in zip(ids.tolist(), log_probs.tolist(), strict=True):
        if token >= 0:
            groups[token] = groups.get(token, 0.0) + math.exp(log_prob)
    teacher = np.array([*groups.values(), 1 - sum(groups.values())]) ** (1 / temperature)
    student = np.array([*(q[token] for token in groups), 1 - sum(q[token] for token in groups)]) ** (1 / temperature)
    teacher, student = teacher / teacher.sum(), student / student.sum()
    return temperature**2 * np.sum(teacher * np.log(teacher / student))


def kd_inputs(k=4):
    logits = torch.randn(BATCH, TIME, VOCAB)
    ids = torch.rand(BATCH, TIME, VOCAB).argsort(-1)[..., :k]
    ids[0, 1, 2], ids[1, 5], ids[1, 2, 3] = -1, -1, ids[1, 2, 0]  # no twin; none at all; two tokens with one twin
    log_probs = torch.randn(BATCH, TIME, VOCAB).log_softmax(-1)[..., :k]
    return logits, ids, log_probs


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_logit_kd_by_definition(temperature):
    logits, ids, log_probs = kd_inputs()
    mask = ragged_mask()
    loss = logit_kd_loss(logits, ids, log_probs, mask, temperature)
    for b in range(BATCH):
        for t in range(TIME):
            expected = kd_by_definition(logits[b, t], ids[b, t], log_probs[b, t], temperature) if mask[b, t] else 0.0
            assert float(loss[b, t]) == pytest.approx(expected, abs=2e-5)
    assert loss[1, 5] == 0, "nothing matched: both sides are all rest"


def test_logit_kd_of_the_whole_vocabulary_is_the_full_divergence():
    logits, teacher = torch.randn(BATCH, TIME, VOCAB), torch.randn(BATCH, TIME, VOCAB)
    ids = torch.rand(BATCH, TIME, VOCAB).argsort(-1)
    mask = torch.ones(BATCH, TIME)
    loss = logit_kd_loss(logits, ids, teacher.log_softmax(-1).gather(-1, ids), mask, 2.0)
    full = torch.nn.functional.kl_div(
        (logits / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    # Both sides of the empty rest bucket are floored at 1e-7, 3e-4 of the mass at temperature 2.
    torch.testing.assert_close(loss, 4 * full, atol=5e-3, rtol=1e-3)


def test_logit_kd_gradients_are_finite_and_vanish_at_the_teacher():
    logits, ids, _ = kd_inputs()
    ids[1, 2, 3] = -1
    own = logits.log_softmax(-1).gather(-1, ids.clamp(min=0))
    logits.requires_grad_()
    loss = logit_kd_loss(logits, ids, own, torch.ones(BATCH, TIME))
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-6, rtol=0)
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-6, rtol=0)
    logits.grad = None
    logit_kd_loss(logits, ids, torch.full_like(own, -40.0), torch.ones(BATCH, TIME), 3.0).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_schedule_warms_up_and_anneals():
    assert [Schedule(value=3)(step, 10) for step in (0, 5, 9)] == [3, 3, 3]
    warm = Schedule(value=2, warmup=0.4)
    assert [warm(step, 10) for step in (0, 1, 2, 3, 4, 9)] == pytest.approx([0, 0.5, 1, 1.5, 2, 2])
    linear = Schedule(value=2, kind="linear", warmup=0.2, final=0.5, until=0.7)
    assert [linear(step, 10) for step in (2, 7, 9)] == pytest.approx([2, 0.5, 0.5])
    assert linear(45, 100) == pytest.approx(1.25)
    cosine = Schedule(value=2, kind="cosine")
    assert [cosine(step, 100) for step in (0, 25, 50, 100)] == pytest.approx([2, 1 + math.cos(math.pi / 4), 1, 0])
    for wrong in ({"warmup": 1.0}, {"warmup": 0.5, "until": 0.4}, {"until": 1.2}):
        with pytest.raises(ValueError, match="schedule"):
            Schedule(**wrong)


def test_check_finite_names_step_layer_and_term():
    keys = torch.ones(LAYER, BATCH, TIME)
    check_finite({"ce": torch.tensor(1.0), "keys": keys}, step=7)
    keys[3, 1, 2] = torch.nan
    with pytest.raises(NonFiniteLossError, match="step 7: loss term 'keys' is NaN in layer 3"):
        check_finite({"ce": torch.tensor(1.0), "keys": keys}, step=7)
    with pytest.raises(NonFiniteLossError, match="step 8: loss term 'values' is Inf in layer 1, 4"):
        check_finite({"values": torch.tensor([0.0, math.inf, 0, 0, -math.inf])}, step=8)
    with pytest.raises(NonFiniteLossError, match="term 'ce' is Inf\\."):
        check_finite({"ce": torch.tensor(math.inf)}, step=0)
