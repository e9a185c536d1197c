"""Projectors against their definitions; all sizes differ, so that no axis can be taken for another."""

import pytest
import torch

from kvpipe.align.head import grouped_average
from kvpipe.align.layermap import LayerPlan
from kvpipe.config import PROJECTORS
from kvpipe.distill.projectors import Geometry, build_projector, select

BATCH, TIME, SRC_LAYERS = 2, 7, 5
SIZES = Geometry(src_heads=3, src_dim=10, dst_heads=2, dst_dim=6, dst_layers=4)
WIDTH = SIZES.dst_heads * SIZES.dst_dim


def plan_of(k, concat):
    index = torch.stack([torch.stack([torch.randperm(SRC_LAYERS)[:k] for _ in range(4)]) for _ in range(2)])
    return LayerPlan(index, torch.rand(2, 4, k).softmax(-1), concat)


def rows():
    return torch.randn(2, BATCH, TIME, SRC_LAYERS, SIZES.src_heads, SIZES.src_dim).unbind()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("concat", [True, False])
def test_select_takes_the_plans_layers(k, concat):
    plan, (x, _) = plan_of(k, concat), rows()
    for kind in range(2):
        found = select(x, plan, kind)
        assert found.shape == (4, BATCH, TIME, k if concat else 1, 3, 10)
        for layer in range(4):
            chosen = [x[:, :, i] for i in plan.index[kind, layer]]
            beta = plan.beta[kind, layer]
            if concat:
                for place in range(k):
                    torch.testing.assert_close(found[layer, :, :, place], chosen[place] * beta[place].sqrt())
            else:
                mixed = sum(b * c for b, c in zip(beta, chosen, strict=True))
                torch.testing.assert_close(found[layer, :, :, 0], mixed)


def test_concat_shares_the_squared_norm_out_as_beta():
    plan = plan_of(3, True)
    x = torch.nn.functional.normalize(rows()[0].flatten(-2), dim=-1).unflatten(-1, (3, 10))
    norms = select(x, plan, 0).square().sum((-1, -2))  # layer batch time k
    torch.testing.assert_close(norms, plan.beta[0][:, None, None].expand_as(norms))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("kind", ["linear", "elastic"])
def test_a_linear_map_is_the_einsum(kind, k, concat):
    plan, (keys, values) = plan_of(k, concat), rows()
    projector = build_projector(PROJECTORS(kind=kind), SIZES, plan, 1000).eval()
    blocks = k if concat else 1
    weight = torch.randn(2, 4, blocks * 30, WIDTH)
    bias = torch.randn(2, 4, WIDTH)
    for number in range(2):
        for layer in range(4):
            projector.set_linear(number, layer, weight[number, layer], bias[number, layer])
    found = projector(keys, values)
    for number, (x, out) in enumerate(((keys, found.keys), (values, found.values))):
        assert out.shape == (4, BATCH, 2, TIME, 6)
        picked = select(x, plan, number)
        w = weight[number].reshape(4, blocks, 3, 10, 2, 6)
        expected = torch.einsum("lbtkhd,lkhdne->lbnte", picked, w) + bias[number].reshape(4, 1, 2, 1, 6)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_keys_and_values_of_each_layer_have_their_own_map():
    plan, (keys, values) = plan_of(1, False), rows()
    projector = build_projector(PROJECTORS(), SIZES, plan, 1000)
    projector.set_linear(1, 2, torch.randn(30, WIDTH), torch.zeros(WIDTH))
    found = projector(keys, values)
    assert not found.keys.any() and found.values[2].any() and not found.values[[0, 1, 3]].any()


def test_heads_begin_at_the_grouped_average_of_heads_and_of_dimension():
    plan, (keys, values) = plan_of(3, False), rows()
    found = build_projector(PROJECTORS(kind="heads"), SIZES, plan, 1000)(keys, values)
    heads, dims = grouped_average(3, 2), grouped_average(10, 6)
    for number, (x, out) in enumerate(((keys, found.keys), (values, found.values))):
        picked = select(x, plan, number)[:, :, :, 0]
        expected = torch.einsum("lbthd,nh,ed->lbnte", picked, heads, dims)
        torch.testing.assert_close(out, expected)
    constant = torch.ones_like(keys)
    assert torch.allclose(
        build_projector(PROJECTORS(kind="heads"), SIZES, plan, 1)(constant, constant).keys, torch.ones(())
    )


def test_heads_refuse_layers_side_by_side():
    with pytest.raises(ValueError, match=r"layer\.combine: mix"):
        build_projector(PROJECTORS(kind="heads"), SIZES, plan_of(2, True), 1000)


@pytest.mark.parametrize("kind", ["linear", "elastic", "heads"])
def test_an_example_is_projected_alone(kind):
    plan, (keys, values) = plan_of(1, False), rows()
    projector = build_projector(PROJECTORS(kind=kind), SIZES, plan, 1000).eval()
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter)
    both, alone = projector(keys, values), projector(keys[1:, 3:4], values[1:, 3:4])
    torch.testing.assert_close(both.keys[:, 1:, :, 3:4], alone.keys, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both.values[:, 1:, :, 3:4], alone.values, atol=1e-4, rtol=1e-4)
