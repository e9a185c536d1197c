"""The overlap of two tokenizations of one text.

`encode` (kvpipe.tokens.spans) gives every token the bytes of the UTF-8 text that it stands for; `overlap` turns two such
lists of spans into a sparse row-stochastic matrix (destination token × source token), which is what carries a
teacher's cache to a student's positions.
"""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from kvpipe.tokens.spans import Tokens, encode, token_bytes

__all__ = [
    "Mode",
    "Tokens",
    "common_prefix_positions",
    "encode",
    "gather_form",
    "overlap",
    "token_bytes",
]

Mode = Literal["iou", "causal", "position"]


def overlap(
    src_spans: Int64[Tensor, "src_time 2"],
    dst_spans: Int64[Tensor, "dst_time 2"],
    mode: Mode = "iou",
) -> Float[Tensor, "dst_time src_time"]:
    """Weights of source tokens for each destination token: sparse CSR, float32, rows sum to 1 or are empty.

    - `iou`: bytes in common / bytes in the union, each row normalised.
    - `causal`: the last source token that ends at or before the end of the destination token, so no target
      has read text that the student has not. The row is empty while no source token has ended.
    - `position`: token i for token i, whatever they stand for (the deliberately wrong alignment).

    Tokens with an empty span have empty rows and columns. Time and entries are linear in the number of tokens. Spans are
    those of `encode`, both of the same text.
    """
    src, dst = _checked(src_spans, "src_spans"), _checked(dst_spans, "dst_spans")
    src_text, dst_text = np.flatnonzero(src[:, 1] > src[:, 0]), np.flatnonzero(dst[:, 1] > dst[:, 0])
    (src_start, src_stop), (dst_start, dst_stop) = src[src_text].T, dst[dst_text].T

    if mode == "iou":
        low = np.searchsorted(src_stop, dst_start, side="right")
        high = np.searchsorted(src_start, dst_stop, side="left")
        count = np.maximum(high - low, 0)
        row = np.repeat(np.arange(len(dst_text)), count)
        col = np.arange(len(row)) + np.repeat(low - (np.cumsum(count) - count), count)
        common = np.minimum(src_stop[col], dst_stop[row]) - np.maximum(src_start[col], dst_start[row])
        union = np.maximum(src_stop[col], dst_stop[row]) - np.minimum(src_start[col], dst_start[row])
        weight = common / union
        weight = weight / np.bincount(row, weight, minlength=len(dst_text))[row]
        row, col = dst_text[row], src_text[col]
    elif mode == "causal":
        ended = np.searchsorted(src_stop, dst_stop, side="right")
        row, col = dst_text[ended > 0], src_text[ended[ended > 0] - 1]
        weight = np.ones(len(row))
    elif mode == "position":
        row = col = np.intersect1d(src_text, dst_text, assume_unique=True)
        weight = np.ones(len(row))
    else:
        raise ValueError(f"overlap mode must be one of iou, causal, position; got {mode!r}")

    return _csr(row, col, weight, len(dst), len(src))


def gather_form(
    matrix: Float[Tensor, "dst_time src_time"],
) -> tuple[Int64[Tensor, "dst_time entry"], Float[Tensor, "dst_time entry"]]:
    """A CSR matrix as padded rows `(index, weight)`, so that `A @ x == (x[index] * weight[..., None]).sum(1)`.

    `entry` is the length of the longest row; shorter ones are padded with index 0 and weight 0.
    """
    if matrix.layout != torch.sparse_csr:
        raise ValueError(f"gather_form expects a sparse CSR matrix, got layout {matrix.layout}; use `to_sparse_csr()`")
    start = matrix.crow_indices()
    count = start.diff()
    width = int(count.max()) if count.numel() else 0
    row = torch.repeat_interleave(count)
    entry = torch.arange(row.numel(), device=row.device) - start[:-1][row]
    index = torch.zeros(count.numel(), width, dtype=torch.int64, device=row.device)
    weight = torch.zeros(count.numel(), width, dtype=matrix.dtype, device=row.device)
    index[row, entry] = matrix.col_indices().to(torch.int64)
    weight[row, entry] = matrix.values()
    return index, weight


def common_prefix_positions(
    src_spans: Int64[Tensor, "src_time 2"], dst_spans: Int64[Tensor, "dst_time 2"]
) -> Int64[Tensor, "pair 2"]:
    """Pairs (source token, destination token) that end at the same byte: both models have read the same text.

    There the two next-token distributions are about the same continuation (logit distillation). Tokens with an
    empty span are left out.
    """
    src, dst = _checked(src_spans, "src_spans"), _checked(dst_spans, "dst_spans")
    src_text, dst_text = np.flatnonzero(src[:, 1] > src[:, 0]), np.flatnonzero(dst[:, 1] > dst[:, 0])
    _, i, j = np.intersect1d(src[src_text, 1], dst[dst_text, 1], assume_unique=True, return_indices=True)
    return torch.from_numpy(np.stack([src_text[i], dst_text[j]], axis=1).astype(np.int64))


def _checked(spans: Tensor, name: str) -> np.ndarray:
    """Spans as numpy, refused unless they are ordered and disjoint (which the linear algorithms rely on)."""
    array = spans.detach().cpu().numpy()
    wrong = np.flatnonzero(array[:, 1] < array[:, 0])
    if not wrong.size:
        wrong = np.flatnonzero(array[1:, 0] < array[:-1, 1]) + 1
    if wrong.size:
        i = int(wrong[0])
        raise ValueError(
            f"{name} must be ordered, disjoint (start, stop) byte ranges as `encode` gives them; token {i} has "
            f"{tuple(array[i].tolist())}" + (f" after {tuple(array[i - 1].tolist())}" if i else "")
        )
    return array


def _csr(row: np.ndarray, col: np.ndarray, weight: np.ndarray, n_dst: int, n_src: int) -> Tensor:
    """CSR from entries sorted by row and then column."""
    start = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=n_dst))])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")  # CSR is the contract
        return torch.sparse_csr_tensor(
            torch.from_numpy(start.astype(np.int64)),
            torch.from_numpy(np.asarray(col, dtype=np.int64)),
            torch.from_numpy(np.asarray(weight, dtype=np.float32)),
            size=(n_dst, n_src),
            check_invariants=True,
        )
