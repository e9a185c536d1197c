"""The seven cases by which the method was first broken; each checks values, not only shapes."""

import torch
from einops import rearrange, reduce
from torch import nn

from kvpipe.align.dim import ElasticBottleneck
from kvpipe.align.head import HeadMixer
from kvpipe.align.time import safe_time_resample, segment_resample

LAYER, BATCH, TIME = 3, 2, 7


def test_12_heads_to_2():
    x = torch.randn(LAYER, BATCH, 12, TIME, 5)
    by_hand = reduce(x, "layer batch (dst six) time dim -> layer batch dst time dim", "mean", six=6)
    torch.testing.assert_close(HeadMixer(12, 2)(x), by_hand)


def test_28_heads_to_2_with_dim_128_to_64():
    x = torch.randn(LAYER, BATCH, 28, TIME, 128)
    weight = nn.init.orthogonal_(torch.empty(64, 128))
    out = HeadMixer(28, 2)(ElasticBottleneck(128, 64, src_params=7e9).warm_start(weight)(x))
    assert out.shape == (LAYER, BATCH, 2, TIME, 64)
    by_hand = reduce(x @ weight.T, "layer batch (dst g) time dim -> layer batch dst time dim", "mean", g=14)
    torch.testing.assert_close(out, by_hand, atol=1e-5, rtol=1e-5)


def test_resample_80_to_50_with_an_index_81_in_it():
    x = torch.randn(LAYER, BATCH, 3, 80, 5)
    indices = torch.linspace(0, 79, 50).round().int()
    indices[17] = 81
    out = safe_time_resample(x, indices, dim=3)
    assert out.shape == (LAYER, BATCH, 3, 50, 5)
    assert torch.equal(out[..., 17, :], x[..., 79, :])
    assert torch.equal(out[..., 18, :], x[..., indices[18], :])


def test_one_position_is_repeated():
    x = torch.randn(LAYER, BATCH, 3, 1, 5)
    out = safe_time_resample(x, torch.tensor([0, 4, 9]), dim=-2)
    assert torch.equal(out, x.expand(-1, -1, -1, 3, -1))
    assert torch.equal(segment_resample(x, [(0, 1)], [(0, 3)], dim=-2), out)


def test_no_position_gives_zeros_of_the_requested_length():
    x = torch.randn(LAYER, BATCH, 3, 0, 5)
    out = safe_time_resample(x, torch.tensor([0, 4, 9]), dim=-2)
    assert torch.equal(out, torch.zeros(LAYER, BATCH, 3, 3, 5))
    assert torch.equal(segment_resample(x, [(0, 0)], [(0, 3)], dim=-2), out)
    assert safe_time_resample(torch.randn(2, 4, 5), torch.tensor([], dtype=torch.int64), dim=1).shape == (2, 0, 5)


def test_segment_resampling():
    """Prompt of equal length, reasoning 40 → 20, answer 10 → 5: segment by segment, nothing cut off."""
    x = rearrange(torch.arange(80.0), "time -> 1 1 1 time 1")
    out = segment_resample(x, [(0, 30), (30, 70), (70, 80)], [(0, 30), (30, 50), (50, 55)], dim=3).flatten()
    torch.testing.assert_close(out[:30], torch.arange(30.0))
    torch.testing.assert_close(out[30:50], torch.linspace(30, 69, 20))
    torch.testing.assert_close(out[50:], torch.linspace(70, 79, 5))


def test_heads_and_resampling_together():
    """Both steps are linear on different axes, so their order does not matter."""
    x = torch.randn(LAYER, BATCH, 12, 80, 5)
    mixer, src, dst = HeadMixer(12, 2), [(0, 30), (30, 80)], [(0, 20), (20, 50)]
    out = mixer(segment_resample(x, src, dst, dim=3))
    assert out.shape == (LAYER, BATCH, 2, 50, 5)
    torch.testing.assert_close(out, segment_resample(mixer(x), src, dst, dim=3), atol=1e-6, rtol=1e-5)
    means = reduce(x, "layer batch (dst six) time dim -> layer batch dst time dim", "mean", six=6)
    torch.testing.assert_close(out[..., [0, 19, 20, 49], :], means[..., [0, 29, 30, 79], :], atol=1e-6, rtol=1e-5)
