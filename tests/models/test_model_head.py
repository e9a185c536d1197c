"""The head: a family's own logits of its final states, in pieces; what is not known is left to the family."""

import pytest
import torch
from model_zoo import ARCHITECTURES
from torch import nn

from kvpipe.models import head
from kvpipe.models.head import Head, final_states

IDS = torch.tensor([[3, 9, 4, 20, 7], [5, 6, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
INPUTS = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    torch.manual_seed(0)
    return ARCHITECTURES[request.param].build().eval()


@torch.no_grad()
def test_the_head_of_the_final_states_gives_the_familys_own_logits(model):
    found = Head.of(model)
    assert found.weight is model.get_output_embeddings().weight, "every family here has a head of the known form"
    expected = model(**INPUTS).logits
    states, output = final_states(model, found, **INPUTS)
    assert output.logits.shape == (2, 0, expected.shape[2])
    torch.testing.assert_close(found.logits(states), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(model(**INPUTS).logits, expected), "nothing of the model is changed"
    own, _ = final_states(model, Head(), **INPUTS)
    assert torch.equal(Head().logits(own), expected)


def architecture(name, **settings):
    torch.manual_seed(0)
    return ARCHITECTURES[name].build(**settings).eval()


@pytest.mark.parametrize(
    ("name", "scale", "softcap"),
    [("gemma2", 1, 30), ("cohere", 0.0625, None), ("granite", 1, None), ("llama", 1, None)],
)
def test_scale_and_cap_are_read(name, scale, softcap):
    found = Head.of(architecture(name))
    assert (found.scale, found.softcap) == (scale, softcap)
    assert Head.of(architecture("granite", logits_scaling=4.0)).scale == 0.25


def test_a_head_of_another_form_is_not_taken_for_a_known_one():
    model = architecture("gemma2")
    model.config.final_logit_softcapping = None
    assert Head.of(model).weight is not None
    plain = architecture("llama")
    handle = plain.get_output_embeddings().register_forward_hook(lambda _m, _i, out: out.clamp(max=3))
    assert Head.of(plain).weight is None, "a cap that two tokens' own logits do not reach shows all the same"
    handle.remove()
    plain.set_output_embeddings(nn.Sequential(plain.get_output_embeddings()))
    assert Head.of(plain).weight is None


def test_states_carry_their_graph_and_autocast_its_dtype():
    model = architecture("llama")
    found = Head.of(model)
    states, _ = final_states(model, found, **INPUTS)
    found.logits(states).square().sum().backward()
    own = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(**INPUTS).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(own[name], parameter.grad)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(**INPUTS).logits
        states, _ = final_states(model, found, **INPUTS)
    assert states.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found.cast(states.dtype).logits(states), expected)


def test_a_model_that_accelerate_wraps_in_autocast_is_known(own_accelerator):
    from accelerate import Accelerator

    model = architecture("gemma2")
    wrapped = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    found = Head.of(wrapped)
    assert found.weight is model.get_output_embeddings().weight and found.softcap == 30
    with torch.no_grad():
        states, _ = final_states(wrapped, found, **INPUTS)
        assert states.dtype == torch.bfloat16
        torch.testing.assert_close(found.cast(states.dtype).logits(states).float(), wrapped(**INPUTS).logits)


def test_pieces_cover_the_rows_once(monkeypatch):
    monkeypatch.setattr(head, "PIECE", 40)
    found = Head(torch.randn(11, 3))
    rows = [torch.arange(17)[piece] for piece in found.pieces(torch.randn(17, 3))]
    assert torch.equal(torch.cat(rows), torch.arange(17)) and max(map(len, rows)) == 3
    assert max(len(range(17)[piece]) for piece in found.pieces(torch.randn(17, 3), least=5)) == 5
    assert [len(range(17)[piece]) for piece in Head().pieces(torch.randn(17, 50))] == [1] * 17
    assert not list(found.pieces(torch.randn(0, 3)))
