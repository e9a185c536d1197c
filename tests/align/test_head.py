"""Head mixing: the grouped average by hand, for every pair, learnable."""

import pytest
import torch
from einops import reduce, repeat

from kvpipe.align.head import HeadMixer, grouped_average

PAIRS = [(12, 2), (28, 4), (32, 8), (28, 2), (2, 8), (7, 3), (3, 7), (1, 5), (5, 1), (4, 4)]


@pytest.mark.parametrize("src,dst", PAIRS)
def test_rows_sum_to_one_and_every_teacher_head_counts_the_same(src, dst):
    weight = grouped_average(src, dst)
    torch.testing.assert_close(weight.sum(1), torch.ones(dst))
    torch.testing.assert_close(weight.sum(0), torch.full((src,), dst / src))
    assert (weight >= 0).all()


@pytest.mark.parametrize("src,dst", PAIRS)
def test_interval_overlap_equals_the_average_of_a_common_refinement(src, dst):
    """Each head repeated dst times lies on a grid that divides both sides: the mean over src cells is the overlap."""
    x = torch.randn(2, src, 5, 4)
    fine = repeat(x, "b h t d -> b (h r) t d", r=dst)
    by_hand = reduce(fine, "b (g r) t d -> b g t d", "mean", r=src)
    torch.testing.assert_close(HeadMixer(src, dst)(x), by_hand)


def test_equal_heads_are_the_identity():
    x = torch.randn(5, 2, 3, 7, 4)
    torch.testing.assert_close(HeadMixer(3, 3)(x), x)


def test_seven_to_three_by_hand():
    expected = torch.tensor([[3, 3, 1, 0, 0, 0, 0], [0, 0, 2, 3, 2, 0, 0], [0, 0, 0, 0, 1, 3, 3]]) / 7
    torch.testing.assert_close(grouped_average(7, 3), expected)


def test_the_mix_learns():
    mixer, x = HeadMixer(7, 3), torch.randn(2, 7, 5, 4)
    mixer(x)[:, 1].sum().backward()
    assert mixer.weight.grad[1].abs().min() > 0 and mixer.weight.grad[[0, 2]].abs().sum() == 0


def test_wrong_heads_are_named():
    with pytest.raises(ValueError, match="must be 7 KV heads"):
        HeadMixer(7, 3)(torch.randn(2, 6, 5, 4))
    with pytest.raises(ValueError, match="got 0 source"):
        grouped_average(0, 3)
