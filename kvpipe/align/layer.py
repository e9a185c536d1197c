"""The layer step: which teacher layers a student layer learns from (spec 3.3).

Linear centred kernel alignment (CKA) compares two sets of features of the same rows (Kornblith et al. 2019,
arXiv:1905.00414)::

    CKA(X, Y) = HSIC(X, Y) / sqrt(HSIC(X, X) · HSIC(Y, Y))

with ``HSIC(X, Y) = ‖XᵀY‖²`` of column-centred features, or its unbiased estimate (Song et al. 2012, eq. 4), which the
debiased form uses: wide features of few rows look alike under the biased one. All pairs of layers are computed at
once.

Where CKA has no value it is 0, never NaN: features that are constant over the rows have nothing to compare, and the
debiased form needs four rows. Features that are not finite raise `ValueError`.
"""

from __future__ import annotations

import warnings

import torch
from einops import rearrange
from jaxtyping import Float, Float64
from torch import Tensor

ROW_BLOCK = 128
"""Rows and columns of the Gram matrices held at a time: bounds memory at layers · ROW_BLOCK² numbers."""

SINGLE_ROWS = 128
"""From this many rows on, matrix products of single-precision features stay in single precision (error below 1e-6)."""

LEFT_SHARE = 0.05
"""… unless the bias takes away more than all but this share of a layer's HSIC with itself."""


def linear_cka(x: Float[Tensor, "n p"], y: Float[Tensor, "n q"], debiased: bool = False) -> Float64[Tensor, ""]:
    """Linear CKA of two feature matrices with the same rows; 1 for equal representations, 0 where undefined."""
    return cka_matrix(rearrange(x, "n p -> 1 n p"), rearrange(y, "n q -> 1 n q"), debiased=debiased)[0, 0]


def cka_matrix(
    dst: Float[Tensor, "dst_layer n p"], src: Float[Tensor, "src_layer n q"], debiased: bool = True
) -> Float64[Tensor, "dst_layer src_layer"]:
    """Linear CKA of every student layer with every teacher layer on the same `n` rows (aligned tokens).

    Through the Gram matrices (cost ~ n²) or the features (cost ~ dst_layer · p · src_layer · q), whichever is cheaper;
    both give the same numbers. Sums are in double precision, products as in `_centred`.
    """
    return _ratio(*_hsic(dst, src, debiased))


class StreamingCKA:
    """`cka_matrix` over more rows than fit in memory: minibatch CKA (Nguyen, Raghu and Kornblith 2021,
    arXiv:2010.15327, eq. 3).

    HSIC is estimated on minibatches of `batch_rows` rows and averaged, then the ratio is taken. With the unbiased
    HSIC the average estimates the same quantity whatever the batch size. Rows are buffered up to a full minibatch, so
    the result does not depend on how they are split over `update` calls, and memory does not depend on their number.
    A last, shorter minibatch counts in proportion to its rows; with fewer than 4 rows the unbiased HSIC does not
    exist and they are left out (`rows_left_out` after `compute`).
    """

    def __init__(self, debiased: bool = True, batch_rows: int = 256):
        if batch_rows < 4:
            raise ValueError(f"batch_rows is {batch_rows}: the unbiased HSIC needs at least 4 rows per minibatch")
        self.debiased, self.batch_rows = debiased, batch_rows
        self.rows_left_out = 0
        self._rows = 0
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None
        self._buffer: tuple[Tensor, Tensor] | None = None

    def update(self, dst: Float[Tensor, "dst_layer n p"], src: Float[Tensor, "src_layer n q"]) -> None:
        """Takes `n` more aligned rows of every layer of both models."""
        if self._buffer is not None and self._buffer[0].shape[1]:
            dst, src = (torch.cat([old, new], dim=1) for old, new in zip(self._buffer, (dst, src), strict=True))
        full = dst.shape[1] - dst.shape[1] % self.batch_rows
        for start in range(0, full, self.batch_rows):
            rows = slice(start, start + self.batch_rows)
            self._sums = self._with(dst[:, rows], src[:, rows])
            self._rows += self.batch_rows
        self._buffer = dst[:, full:].clone(), src[:, full:].clone()

    def compute(self) -> Float64[Tensor, "dst_layer src_layer"]:
        """The matrix over all rows so far. More rows may follow."""
        if self._buffer is None:
            raise ValueError("no rows yet: call update(dst, src) first")
        left = self._buffer[0].shape[1]
        counted = left >= (4 if self.debiased else 1)
        self.rows_left_out = 0 if counted else left
        sums = self._with(*self._buffer) if counted or self._sums is None else self._sums
        return _ratio(*sums)

    def _with(self, dst: Tensor, src: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of HSIC, weighted by rows, with one minibatch more."""
        rows = dst.shape[1]
        terms = _hsic(dst, src, self.debiased)
        # The three terms come without their common factor; between minibatches of different size it matters.
        factor = rows * (rows - 3) if self.debiased else (rows - 1) ** 2
        cross, own_dst, own_src = (term * (rows / max(factor, 1)) for term in terms)
        if self._sums is None:
            return cross, own_dst, own_src
        return self._sums[0] + cross, self._sums[1] + own_dst, self._sums[2] + own_src


def proportional_map(src_layers: int, dst_layers: int) -> list[int]:
    """For each student layer the teacher layer at the same relative depth, first to first and last to last.

    ``round(i (src - 1) / (dst - 1))``, halves up. A student of one layer takes the teacher's last.
    """
    if src_layers < 1 or dst_layers < 1:
        raise ValueError(f"both models need a layer; got {src_layers} source and {dst_layers} destination layers")
    if dst_layers == 1:
        return [src_layers - 1]
    return [(2 * i * (src_layers - 1) + dst_layers - 1) // (2 * (dst_layers - 1)) for i in range(dst_layers)]


def top_k_mix(
    similarity: Float[Tensor, "dst_layer src_layer"], k: int, temperature: float | int | None = None
) -> Float[Tensor, "dst_layer src_layer"]:
    """Weights β of each student layer's `k` most similar teacher layers; every row sums to 1.

    Without a temperature: the similarities, clamped at 0, divided by their sum. With one: softmax of similarity /
    temperature over the k. Debiased CKA can be negative; a row whose top k are all ≤ 0 says nothing about which layer
    is nearer, and takes them with equal weight, with a warning.
    """
    src_layers = similarity.shape[1]
    if not 1 <= k <= src_layers:
        raise ValueError(f"k must be between 1 and the teacher's {src_layers} layers; got {k}")
    if not torch.isfinite(similarity).all():
        raise ValueError("similarity holds NaN or infinite entries; cka_matrix never returns them, check its source")
    if temperature is not None and temperature <= 0:
        raise ValueError(f"temperature must be positive; got {temperature}")
    order = similarity.sort(dim=1, descending=True, stable=True)
    best, chosen = order.values[:, :k], order.indices[:, :k]
    if temperature is not None:
        beta = (best / temperature).softmax(dim=1)
    else:
        positive = best.clamp(min=0)
        total = positive.sum(dim=1, keepdim=True)
        empty = total <= 0
        if empty.any():
            rows = empty.flatten().nonzero().flatten().tolist()
            warnings.warn(
                f"student layers {rows} have no positive similarity with any teacher layer: their top {k} are mixed "
                "with equal weights. Use more validation examples or the proportional map",
                stacklevel=2,
            )
        beta = torch.where(empty, 1 / k, positive / total.masked_fill(empty, 1))
    return torch.zeros_like(similarity).scatter(1, chosen, beta)


def _hsic(
    dst: Float[Tensor, "dst_layer n p"], src: Float[Tensor, "src_layer n q"], debiased: bool
) -> tuple[Float64[Tensor, "dst_layer src_layer"], Float64[Tensor, " dst_layer"], Float64[Tensor, " src_layer"]]:
    """HSIC of all pairs and of each layer with itself, up to a common factor.

    The unbiased estimate from centred features, with r the squared row norms (Kornblith's feature-space form)::

        ‖XᵀY‖² − n/(n−2) · r_x·r_y + ‖X‖²‖Y‖² / ((n−1)(n−2))      = n(n−3) · HSIC₁
    """
    (dst_layers, n, p), (src_layers, _, q) = dst.shape, src.shape
    if debiased and n < 4:
        nothing = torch.zeros(dst_layers, src_layers, dtype=torch.float64, device=dst.device)
        return nothing, nothing[:, 0], nothing[0]
    gram = n * n * (dst_layers * p + src_layers * q + dst_layers * src_layers)
    features = n * (dst_layers * p * src_layers * q + dst_layers * p * p + src_layers * q * q)
    (x, rows_x), (y, rows_y) = _centred(dst), _centred(src)
    cross, own_x, own_y = (_by_gram if gram < features else _by_features)(x, y)
    if not debiased:
        return cross, own_x, own_y
    size_x, size_y = rows_x.sum(-1), rows_y.sum(-1)
    a, b = n / (n - 2), 1 / ((n - 1) * (n - 2))
    unbiased_x = own_x - a * rows_x.square().sum(-1) + b * size_x.square()
    unbiased_y = own_y - a * rows_y.square().sum(-1) + b * size_y.square()
    # Where a few rows carry nearly all the norm (sink tokens), little is left of the sum: single precision is too coarse.
    cancelled = (unbiased_x < LEFT_SHARE * own_x).any() or (unbiased_y < LEFT_SHARE * own_y).any()
    if cancelled and (x.dtype == torch.float32 or y.dtype == torch.float32):
        return _hsic(dst.double(), src.double(), debiased)
    return cross - a * rows_x @ rows_y.T + b * torch.outer(size_x, size_y), unbiased_x, unbiased_y


def _centred(x: Float[Tensor, "layer n p"]) -> tuple[Float[Tensor, "layer n p"], Float64[Tensor, "layer n"]]:
    """Column-centred features, and the squared norm of every row; a layer constant up to rounding becomes exactly 0.

    In double precision, but from `SINGLE_ROWS` rows on, features that came in single precision or less are worked in
    single: their rounding averages out over n² products, and they are twice as fast.
    """
    single = x.dtype != torch.float64 and x.shape[1] >= SINGLE_ROWS
    x = x.to(torch.float32 if single else torch.float64)
    mean = x.mean(dim=1, keepdim=True)
    centred = x - mean
    rows = centred.square().sum(-1).double()
    rest, size = rows.sum(-1), x.shape[1] * mean.double().square().sum((1, 2))
    if not rest.isfinite().all():
        layers = (~rest.isfinite()).nonzero().flatten().tolist()
        raise ValueError(f"CKA: features of layer {', '.join(map(str, layers))} hold NaN or infinity, or overflow")
    constant = rest <= (8 * torch.finfo(x.dtype).eps) ** 2 * size
    if constant.any():
        centred[constant], rows[constant] = 0, 0
    return centred, rows


def _by_features(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """‖XᵀY‖² of all pairs, one student layer against all teacher layers at a time."""
    flat = rearrange(y, "layer n q -> n (layer q)").to(x.dtype)
    cross = [
        rearrange((one.T @ flat).double().square(), "p (layer q) -> layer (p q)", layer=len(y)).sum(-1) for one in x
    ]
    own = [torch.stack([(one.T @ one).double().square().sum() for one in side]) for side in (x, y)]
    return torch.stack(cross), own[0], own[1]


def _by_gram(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same as ⟨XXᵀ, YYᵀ⟩, over blocks of rows so that no n × n matrix per layer is held.

    Gram matrices are symmetric: only blocks on and right of the diagonal are computed, the latter counted twice.
    """
    n = x.shape[1]
    cross = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    own_x, own_y = cross.new_zeros(len(x)), cross.new_zeros(len(y))
    for start in range(0, n, ROW_BLOCK):
        for other in range(start, n, ROW_BLOCK):
            times = 1 if other == start else 2
            kernel_x, kernel_y = (
                (side[:, start : start + ROW_BLOCK] @ side[:, other : other + ROW_BLOCK].mT).flatten(1)
                for side in (x, y)
            )
            cross += times * (kernel_x @ kernel_y.T)
            own_x += times * torch.linalg.vecdot(kernel_x, kernel_x)
            own_y += times * torch.linalg.vecdot(kernel_y, kernel_y)
    return cross, own_x, own_y


def _ratio(cross: Tensor, own_x: Tensor, own_y: Tensor) -> Tensor:
    """HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y)), 0 where a denominator is 0."""
    scale = own_x.clamp(min=0).sqrt()[:, None] * own_y.clamp(min=0).sqrt()[None, :]
    return torch.where(scale > 0, cross / scale.masked_fill(scale <= 0, 1), 0)
