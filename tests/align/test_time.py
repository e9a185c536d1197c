"""Laws of the time step: constant stays constant, equal segmentations are the identity, segments never mix."""

import numpy as np
import pytest
import torch
from einops import repeat
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpipe.align.time import gather_time, safe_time_resample, segment_resample, segment_weights, weight_mask

LAYER, BATCH, HEAD, TIME, DIM = 5, 2, 3, 11, 4
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]


@st.composite
def segmentations(draw, allow_empty_source=True):
    """Matched segments of two texts, with gaps between them: (source, destination, source length, n_dst)."""
    src, dst, src_end, dst_end = [], [], 0, 0
    for _ in range(draw(st.integers(1, 4))):
        src_end, dst_end = src_end + draw(st.integers(0, 2)), dst_end + draw(st.integers(0, 2))
        n, m = draw(st.integers(0 if allow_empty_source else 1, 9)), draw(st.integers(0, 9))
        src.append((src_end, src_end + n))
        dst.append((dst_end, dst_end + m))
        src_end, dst_end = src_end + n, dst_end + m
    return src, dst, src_end + draw(st.integers(0, 2)), dst_end + draw(st.integers(0, 2))


def by_numpy(x, src_segments, dst_segments, n_dst):
    """The definition, with numpy's own interpolation; x: (time, dim)."""
    out = np.zeros((n_dst, x.shape[1]))
    for (a, b), (c, d) in zip(src_segments, dst_segments, strict=True):
        if b == a or d == c:
            continue
        where = np.linspace(0, 1, d - c) if d - c > 1 else np.ones(1)
        for column in range(x.shape[1]):
            out[c:d, column] = np.interp(where * (b - a - 1), np.arange(b - a), x[a:b, column])
    return out


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_resample_takes_any_integer_dtype(dtype):
    x = torch.randn(LAYER, BATCH, HEAD, TIME, DIM)
    picked = safe_time_resample(x, torch.tensor([3, 0, 10, 3]).to(dtype), dim=-2)
    assert torch.equal(picked, x[..., [3, 0, 10, 3], :])


def test_resample_clamps_both_ends_along_any_axis():
    x = torch.randn(BATCH, TIME, HEAD, DIM)
    assert torch.equal(safe_time_resample(x, torch.tensor([-5, 4, 99]), dim=1), x[:, [0, 4, TIME - 1]])
    huge = torch.tensor([2**64 - 1], dtype=torch.uint64)
    assert torch.equal(safe_time_resample(x, huge, dim=1), x[:, [TIME - 1]])


@pytest.mark.parametrize("lengths", [(7, 3), (3, 7), (5, 5)])
def test_resample_down_and_up(lengths):
    src, dst = lengths
    x, indices = torch.randn(HEAD, src, DIM), torch.linspace(0, src - 1, dst).round().int()
    assert torch.equal(safe_time_resample(x, indices), x[:, indices.long()])


@settings(deadline=None, max_examples=60)
@given(segmentations())
def test_segment_resample_equals_numpy_interpolation(case):
    src, dst, length, n_dst = case
    x = torch.randn(length, DIM, dtype=torch.float64)
    out = segment_resample(x, src, dst, dim=0, n_dst=n_dst)
    np.testing.assert_allclose(out.numpy(), by_numpy(x.numpy(), src, dst, n_dst), atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(segmentations())
def test_rows_are_a_partition_of_unity_or_masked(case):
    src, dst, length, n_dst = case
    index, weight = segment_weights(src, dst, n_dst)
    covered = torch.zeros(n_dst, dtype=torch.bool)
    for (a, b), (c, d) in zip(src, dst, strict=True):
        covered[c:d] = b > a
        for row in range(c, d):
            used = index[row][weight[row] > 0]
            assert ((used >= a) & (used < b)).all(), "a segment reads outside its own source segment"
    assert torch.equal(weight_mask(weight), covered)
    torch.testing.assert_close(weight.sum(1), covered.float())
    assert (weight >= 0).all()
    constant = segment_resample(torch.full((length, DIM), 2.5), src, dst, dim=0, n_dst=n_dst)
    torch.testing.assert_close(constant, 2.5 * repeat(covered.float(), "t -> t d", d=DIM))


def test_equal_segmentations_are_the_exact_identity():
    x, segments = torch.randn(LAYER, BATCH, HEAD, TIME, DIM), [(0, 4), (4, 5), (5, TIME)]
    assert torch.equal(segment_resample(x, segments, segments, dim=3), x)


def test_a_perturbed_segment_changes_only_its_own():
    src, dst = [(0, 3), (3, 8), (8, TIME)], [(0, 6), (6, 8), (8, 9)]
    x = torch.randn(TIME, DIM)
    moved = x.clone()
    moved[3:8] += 1
    change = (segment_resample(x, src, dst, dim=0) != segment_resample(moved, src, dst, dim=0)).any(1)
    assert change.tolist() == [False] * 6 + [True] * 2 + [False]


def test_ends_meet_and_a_single_token_reads_the_segments_end():
    x = torch.arange(10.0)[:, None]
    assert segment_resample(x, [(2, 9)], [(0, 4)], dim=0)[:, 0].tolist() == [2, 4, 6, 8]
    assert segment_resample(x, [(2, 9)], [(0, 1)], dim=0)[:, 0].tolist() == [8]
    assert segment_resample(x, [(3, 4)], [(0, 3)], dim=0)[:, 0].tolist() == [3, 3, 3]


def test_a_segment_missing_in_the_source_is_zero_and_masked():
    src, dst = [(0, 4), (4, 4), (4, 6)], [(0, 2), (2, 5), (5, 7)]
    out = segment_resample(torch.ones(6, DIM), src, dst, dim=0)
    assert out[2:5].abs().sum() == 0 and (out[[0, 1, 5, 6]] == 1).all()
    assert weight_mask(segment_weights(src, dst, 7)[1]).tolist() == [True, True, False, False, False, True, True]


def test_segments_that_do_not_fit_are_named():
    x = torch.randn(6, DIM)
    with pytest.raises(ValueError, match="2 source segments came with 1"):
        segment_resample(x, [(0, 2), (2, 4)], [(0, 4)], dim=0)
    with pytest.raises(ValueError, match="source segment 0 is \\(0, 7\\)"):
        segment_resample(x, [(0, 7)], [(0, 4)], dim=0)
    with pytest.raises(ValueError, match="destination segment 1 is \\(3, 6\\)"):
        segment_weights([(0, 2), (2, 4)], [(0, 4), (3, 6)], 6)
    with pytest.raises(ValueError, match="destination segment 0 is \\(0, 4\\)"):
        segment_weights([(0, 2)], [(0, 4)], 3)
    with pytest.raises(ValueError, match="source segment 0 is \\(5, 2\\)"):
        segment_weights([(5, 2)], [(0, 4)], 4)


@pytest.mark.parametrize("entries", [1, 2, 3])
@pytest.mark.parametrize("batched", [False, True])
def test_gather_time_is_the_weighted_sum(batched, entries):
    x = torch.randn(LAYER, BATCH, HEAD, TIME, DIM, dtype=torch.float64)
    shape = (BATCH, 7, entries) if batched else (7, entries)
    index, weight = torch.randint(TIME, shape), torch.rand(shape)
    out = gather_time(x, index, weight)
    for example in range(BATCH):
        rows, shares = (index[example], weight[example]) if batched else (index, weight)
        dense = torch.zeros(7, TIME, dtype=torch.float64).scatter_add_(1, rows, shares.double())
        torch.testing.assert_close(out[:, example], dense @ x[:, example])
    if batched:
        torch.testing.assert_close(gather_time(x[2], index, weight), out[2])


def test_gather_time_gradients_are_right():
    x = torch.randn(2, 3, 2, 5, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(3, 4, 2, dtype=torch.float64, requires_grad=True)
    index = torch.randint(5, (3, 4, 2))
    assert torch.autograd.gradcheck(lambda x, weight: gather_time(x, index, weight), (x, weight))


def test_gather_time_in_bfloat16_stays_near_and_non_contiguous_input_is_fine():
    x = torch.randn(LAYER, BATCH, TIME, HEAD, DIM).transpose(2, 3)
    index, weight = segment_weights([(0, TIME)], [(0, 7)], 7)
    exact = gather_time(x.contiguous(), index, weight)
    assert torch.equal(gather_time(x, index, weight), exact)
    torch.testing.assert_close(gather_time(x.bfloat16(), index, weight).float(), exact, atol=0.03, rtol=0.02)


def test_gather_time_of_nothing_and_of_a_wrong_batch():
    assert gather_time(torch.zeros(LAYER, BATCH, HEAD, 0, DIM), torch.zeros(7, 2).long(), torch.zeros(7, 2)).shape == (
        LAYER,
        BATCH,
        HEAD,
        7,
        DIM,
    )
    with pytest.raises(ValueError, match="batch 3"):
        gather_time(torch.zeros(LAYER, BATCH, HEAD, TIME, DIM), torch.zeros(3, 7, 2).long(), torch.zeros(3, 7, 2))
