"""The time step: teacher positions onto student positions (spec 3.2).

Every alignment of time, segment interpolation here and the token overlap of `kvpipe.tokens.matrix`, is a sparse matrix
``(n_dst, n_src)`` with few entries per row. It is kept in *gather form*: for each student position ``m`` source
positions and their weights. `gather_time` applies it; that is the only place where the caches are touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index as as_int
from typing import SupportsIndex

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float32, Int64, Integer
from torch import Tensor
from torch.nn.functional import embedding_bag

Segments = Sequence[Sequence[SupportsIndex]]
"""``[(start, stop), …]``, token positions, half open, in order and without overlap; a segment may be empty."""


def safe_time_resample(x: Float[Tensor, ...], indices: Integer[Tensor, " n"], dim: int = -2) -> Float[Tensor, ...]:
    """`x` at `indices` of axis `dim`, whatever the indices are.

    Indices may have any integer dtype and device; those outside ``[0, T)`` are clamped to the nearest end, so a
    single position (T = 1) is repeated. With T = 0 there is nothing to take: the result is zeros of the requested
    length.
    """
    length = x.shape[dim]
    wide = indices.to(device=x.device, dtype=torch.int64)
    if indices.dtype == torch.uint64:  # above 2**63 the cast wraps to a negative number
        wide = torch.where(wide < 0, torch.iinfo(torch.int64).max, wide)
    if length == 0:
        shape = list(x.shape)
        shape[dim] = len(wide)
        return x.new_zeros(shape)
    return x.index_select(dim, wide.clamp(0, length - 1))


def segment_weights(
    src_segments: Segments, dst_segments: Segments, n_dst: int
) -> tuple[Int64[Tensor, "n_dst 2"], Float32[Tensor, "n_dst 2"]]:
    """Linear interpolation over normalised position inside each segment, in gather form.

    Position ``j`` of a destination segment of ``m`` tokens stands at ``j / (m - 1)`` of its segment, and reads the
    source segment of ``n`` tokens at ``j (n - 1) / (m - 1)``: first token to first token, last to last, and exactly
    the identity for ``m == n``. A destination segment of one token reads the last source token, which has seen the
    whole segment.

    Rows outside every destination segment, and rows whose source segment is empty, have weight zero: they are masked
    (`weight_mask`). All other rows sum to 1.

    Raises `ValueError` when the two sides differ in number of segments, or when segments run backwards, overlap on
    the destination side or leave ``[0, n_dst)``.
    """
    src, dst = _checked(src_segments, "source"), _checked(dst_segments, "destination")
    if len(src) != len(dst):
        raise ValueError(
            f"segments are matched one to one: {len(src)} source segments came with {len(dst)} destination segments; "
            "give an empty segment (start == stop) where one side has none"
        )
    (src_start, src_stop), (start, stop) = (
        torch.tensor(side, dtype=torch.int64).reshape(-1, 2).T for side in (src, dst)
    )
    n, m = src_stop - src_start, stop - start
    filled = m.nonzero().flatten()
    ends = torch.cat([stop.new_zeros(1), stop[filled]])  # before each segment that has tokens, and after the last
    wrong = ((start[filled] < ends[:-1]) | (ends[1:] > n_dst)).nonzero().flatten()
    if len(wrong):
        number = int(filled[wrong[0]])
        raise ValueError(
            f"destination segment {number} is {dst[number]}: segments must be in order, without overlap and "
            f"inside 0..{n_dst} (the one before ends at {int(ends[wrong[0]])})"
        )
    # One row per destination token whose segment has source tokens: its segment, and its place j in it.
    segment = filled[n[filled] > 0]
    first = m[segment].cumsum(0) - m[segment]
    place = torch.arange(int(m[segment].sum())) - first.repeat_interleave(m[segment])
    segment = segment.repeat_interleave(m[segment])
    last = n[segment] - 1
    # Integer arithmetic: equal segmentations give exact positions, hence the exact identity.
    numerator = torch.where(m[segment] > 1, place * last, last)
    steps = (m[segment] - 1).clamp(min=1)
    low = numerator // steps
    share = (numerator % steps).to(torch.float64) / steps
    row = start[segment] + place
    index = torch.zeros(n_dst, 2, dtype=torch.int64)
    weight = torch.zeros(n_dst, 2, dtype=torch.float32)
    index[row] = src_start[segment, None] + torch.stack([low, torch.minimum(low + 1, last)], dim=1)
    weight[row] = torch.stack([1 - share, share], dim=1).float()
    return index, weight


def weight_mask(weight: Float[Tensor, "*batch n_dst m"]) -> Bool[Tensor, "*batch n_dst"]:
    """True where a student position has a target: some source position carries weight."""
    return (weight != 0).any(-1)


def segment_resample(
    x: Float[Tensor, ...], src_segments: Segments, dst_segments: Segments, dim: int = -2, n_dst: int | None = None
) -> Float[Tensor, ...]:
    """`x` with axis `dim` resampled segment to segment (see `segment_weights`).

    The result has `n_dst` positions, by default up to the last destination stop. Positions without a source are
    zeros; ``weight_mask(segment_weights(src_segments, dst_segments, n_dst)[1])`` says which.
    """
    length = x.shape[dim]
    for number, (start, stop) in enumerate(_checked(src_segments, "source")):
        if stop > length:
            raise ValueError(f"source segment {number} is ({start}, {stop}) but axis {dim} of x has {length} positions")
    if n_dst is None:
        n_dst = max((stop for _, stop in _checked(dst_segments, "destination")), default=0)
    index, weight = segment_weights(src_segments, dst_segments, n_dst)
    moved = x.movedim(dim, 0)
    rows = moved.reshape(length, moved.shape[1:].numel())
    out = gather_time(rows, index, weight)
    return out.reshape(n_dst, *moved.shape[1:]).movedim(0, dim)


def gather_time(
    x: Float[Tensor, "*lead time dim"],
    index: Integer[Tensor, "*batch n_dst m"],
    weight: Float[Tensor, "*batch n_dst m"],
) -> Float[Tensor, "*lead n_dst dim"]:
    """``out[…, j, :] = Σ_m weight[j, m] · x[…, index[j, m], :]``.

    `index` and `weight` are ``(n_dst, m)``, the same for everything, or ``(batch, n_dst, m)`` with x ``(layer, batch,
    head, time, dim)`` or ``(batch, head, time, dim)``. Differentiable in `x` and in `weight`. Rows of zero weight are
    zeros.
    """
    *lead, length, dim = x.shape
    n_dst, m = index.shape[-2:]
    if length == 0 or n_dst == 0 or dim == 0 or m == 0 or 0 in lead:
        return x.new_zeros(*lead, n_dst, dim)
    index, weight = index.to(x.device, torch.int64), weight.to(x.device, x.dtype)
    if index.ndim == 3:
        if x.ndim < 4 or x.shape[-4] != len(index):
            raise ValueError(
                f"index is batched {tuple(index.shape)} (batch, n_dst, m), so x must be (…, batch, head, time, dim) "
                f"with batch {len(index)}; got {tuple(x.shape)}"
            )
        index, weight = rearrange(index, "b n m -> b 1 n m"), rearrange(weight, "b n m -> b 1 n m")
    # One fused gather-and-sum over the rows of the flattened cache: no (…, n_dst, m, dim) tensor is ever made.
    block = torch.arange(0, x.shape[:-1].numel(), length, device=x.device).reshape(*lead, 1, 1)
    rows = (block + index).reshape(-1, m)
    shares = weight.expand(*lead, n_dst, m).reshape(-1, m)
    out = embedding_bag(rows, x.reshape(-1, dim), per_sample_weights=shares, mode="sum")
    return out.reshape(*lead, n_dst, dim)


def _checked(segments: Segments, side: str) -> list[tuple[int, int]]:
    pairs = []
    for number, segment in enumerate(segments):
        start, stop = (as_int(edge) for edge in segment)
        if not 0 <= start <= stop:
            raise ValueError(f"{side} segment {number} is ({start}, {stop}); expected 0 <= start <= stop")
        pairs.append((start, stop))
    return pairs
