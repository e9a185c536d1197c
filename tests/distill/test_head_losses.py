"""Losses in pieces of the rows: values and gradients of the plain ones, whatever head, piece or precision."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kvpipe.distill import losses
from kvpipe.distill.losses import CrossEntropy, FullKL, TopKL, head_losses, logit_kd_loss
from kvpipe.models import head
from kvpipe.models.head import Head

ROWS, WIDTH, VOCAB, K = 13, 6, 29, 5
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0},
    "scaled": {"scale": 0.25},
    "both": {"softcap": 3.0, "scale": 2.0, "bias": True},
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(head, "PIECE", 4 * VOCAB)
    monkeypatch.setattr(losses, "LEAST", 3)


def made(frozen, bias=False, dtype=torch.float32, **form):
    weight = torch.randn(VOCAB, WIDTH, dtype=dtype).requires_grad_(not frozen)
    return Head(weight, torch.randn(VOCAB, dtype=dtype).requires_grad_(not frozen) if bias else None, **form)


def terms(dtype=torch.float32):
    """The three losses with weights per row, and the same as functions of all logits."""
    targets, mask = torch.randint(VOCAB, (ROWS,)), torch.rand(ROWS) > 0.3
    theirs, states = Head(torch.randn(VOCAB + 3, 4)), torch.randn(ROWS, 4)
    log_probs, ids = states.matmul(theirs.weight.T)[:, :VOCAB].log_softmax(-1).topk(K)
    ids[2, 1], ids[3] = ids[2, 0], -1
    row = {name: torch.rand(ROWS) for name in ("ce", "kl", "top")}
    row["ce"][4] = 0
    parts = {
        "ce": (CrossEntropy(targets), row["ce"]),
        "kl": (FullKL(theirs, states, 2.0, VOCAB), row["kl"]),
        "top": (TopKL(ids, log_probs, mask, 1.5), row["top"]),
    }

    def plain(logits):
        wide = logits.float()
        teacher = (theirs.logits(states)[:, :VOCAB] / 2).log_softmax(-1)
        full = 4 * F.kl_div((wide / 2).log_softmax(-1), teacher, log_target=True, reduction="none").sum(-1)
        each = {
            "ce": F.cross_entropy(wide, targets, reduction="none"),
            "kl": full,
            "top": logit_kd_loss(wide, ids, log_probs, mask, 1.5),
        }
        return {name: (loss * row[name]).sum() for name, loss in each.items()}

    return parts, plain


@pytest.mark.parametrize("form", HEADS)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_values_and_gradients_are_the_plain_ones(form, frozen):
    found, states = made(frozen, **HEADS[form]), torch.randn(ROWS, WIDTH, requires_grad=True)
    parts, plain = terms()
    weights = {"ce": 1.0, "kl": 0.7, "top": 0.3}
    expected = plain(found.logits(states))
    leaves = [states, *(p for p in found.parameters if p.requires_grad)]
    wanted = torch.autograd.grad(3 * sum(weights[n] * v for n, v in expected.items()), leaves)
    total, values = head_losses(found, states, parts, weights)
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name].detach(), atol=1e-5, rtol=1e-4)
        assert not value.requires_grad
    got = torch.autograd.grad(3 * total, leaves)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_term_without_weight_is_computed_and_adds_nothing():
    found, states = made(False), torch.randn(ROWS, WIDTH, requires_grad=True)
    parts, plain = terms()
    total, values = head_losses(found, states, parts, {"ce": 1.0, "kl": 0.0, "top": 0.0})
    (got,) = torch.autograd.grad(total, states)
    (wanted,) = torch.autograd.grad(plain(found.logits(states))["ce"], states)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)
    assert values["kl"] > 0 and values["top"] > 0
    total, _ = head_losses(found, states, parts, dict.fromkeys(parts, 0.0))
    assert not torch.autograd.grad(total, states)[0].any()
    with torch.no_grad():
        assert torch.equal(head_losses(found, states, parts, dict.fromkeys(parts, 1.0))[1]["kl"], values["kl"])


def test_a_tied_head_gets_the_gradient_of_both_its_uses():
    def loss(embedding, in_pieces):
        ids = torch.arange(ROWS) % VOCAB
        states = torch.tanh(embedding(ids))
        if not in_pieces:
            return F.cross_entropy(states @ embedding.weight.T, ids.roll(1), reduction="sum")
        parts = {"ce": (CrossEntropy(ids.roll(1)), torch.ones(ROWS))}
        return head_losses(Head(embedding.weight), states, parts, {"ce": 1.0})[0]

    embedding = nn.Embedding(VOCAB, WIDTH)
    (plain,), (pieces,) = (torch.autograd.grad(loss(embedding, p), embedding.weight) for p in (False, True))
    torch.testing.assert_close(pieces, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_in_bfloat16_it_is_what_autocast_computes(weight_dtype):
    """Logits in bf16, losses in float32, gradients in each leaf's dtype."""
    found, states = made(False, dtype=weight_dtype), torch.randn(ROWS, WIDTH).bfloat16().requires_grad_()
    parts, plain = terms()
    expected = plain(F.linear(states, found.weight.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        total, values = head_losses(found, states, parts, {"ce": 1.0, "kl": 1.0, "top": 0.0})
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name].detach(), atol=1e-3, rtol=1e-3)
    leaves = [states, found.weight]
    for a, b in zip(
        torch.autograd.grad(total, leaves), torch.autograd.grad(expected["ce"] + expected["kl"], leaves), strict=True
    ):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), atol=2e-2 * b.float().abs().max().item(), rtol=0.05)


def test_of_logits_no_more_than_a_piece_is_held(monkeypatch):
    seen, finished = [], Head.finished
    monkeypatch.setattr(Head, "finished", lambda self, raw: seen.append(raw.numel()) or finished(self, raw))
    found, states = made(True), torch.randn(ROWS, WIDTH, requires_grad=True)
    parts = {"ce": (CrossEntropy(torch.randint(VOCAB, (ROWS,))), torch.ones(ROWS))}
    total, _ = head_losses(found, states, parts, {"ce": 1.0})
    assert max(seen) <= head.PIECE and len(seen) == 4
    total.backward()
    with pytest.raises(RuntimeError, match="runs once"):
        total.backward()
