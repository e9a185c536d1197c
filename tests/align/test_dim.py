"""The elastic bottleneck: its definition, its width, and the warm start that equals a linear map."""

import pytest
import torch
from torch.nn import functional as F

from kvpipe.align.dim import ElasticBottleneck, default_mlp_ratio

SRC, DST = 11, 6


@pytest.mark.parametrize(
    "params,ratio", [(5e8, 0.5), (6.99e9, 0.5), (7e9, 1.0), (29.9e9, 1.0), (30e9, 2.0), (70e9, 2.0)]
)
def test_default_ratio_by_teacher_size(params, ratio):
    assert default_mlp_ratio(params) == ratio
    assert ElasticBottleneck(128, 64, src_params=params).hidden_dim == 128 * ratio


def test_an_explicit_ratio_wins_and_nonsense_is_refused():
    assert ElasticBottleneck(10, 4, mlp_ratio=0.3, src_params=70e9).hidden_dim == 3
    assert ElasticBottleneck(10, 4).hidden_dim == 10
    with pytest.raises(ValueError, match="mlp_ratio"):
        ElasticBottleneck(10, 4, mlp_ratio=0.0)
    with pytest.raises(ValueError, match="n_params"):
        default_mlp_ratio(0)


def test_forward_is_the_definition():
    module, x = ElasticBottleneck(SRC, DST, mlp_ratio=1.5), torch.randn(5, 2, 3, 7, SRC)
    with torch.no_grad():
        module.norm.weight.normal_()
        module.norm.bias.normal_()
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    inner = F.linear(normed * module.norm.weight + module.norm.bias, module.inner.weight, module.inner.bias)
    expected = F.linear(inner * torch.sigmoid(inner), module.outer.weight, module.outer.bias)
    torch.testing.assert_close(module(x), expected)


def test_dropout_acts_in_training_only():
    module, x = ElasticBottleneck(SRC, DST, mlp_ratio=4, dropout=0.5), torch.randn(3, SRC)
    assert not torch.equal(module.train()(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


@pytest.mark.parametrize("with_bias", [True, False])
def test_warm_start_equals_the_linear_map_exactly_then_learns(with_bias):
    module = ElasticBottleneck(SRC, DST, dropout=0.3)
    weight, bias = torch.randn(DST, SRC), torch.randn(DST) if with_bias else None
    x = torch.randn(2, 3, 7, SRC)
    assert module.warm_start(weight, bias) is module
    assert torch.equal(module(x), F.linear(x, weight, bias))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for _ in range(2):  # the inner Linear moves once the outer one is no longer 0
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    still = [name for name, value in module.state_dict().items() if torch.equal(value, before[name])]
    assert still == []


def test_without_warm_start_the_skip_path_stays_zero():
    module = ElasticBottleneck(SRC, DST)
    assert not any(p.requires_grad for p in module.skip.parameters())
    assert module.skip.weight.abs().sum() == 0 == module.skip.bias.abs().sum()


def test_a_saved_module_comes_back():
    module, x = ElasticBottleneck(SRC, DST).warm_start(torch.randn(DST, SRC)), torch.randn(3, SRC)
    other = ElasticBottleneck(SRC, DST)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="last axis \\(dim\\) must be 11"):
        ElasticBottleneck(SRC, DST)(torch.randn(2, DST))
    with pytest.raises(ValueError, match=r"weight \(dst_dim, src_dim\) \(6, 11\)"):
        ElasticBottleneck(SRC, DST).warm_start(torch.randn(SRC, DST))
