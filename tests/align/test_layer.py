"""CKA against published constants and its definition; the maps made from it."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpipe.align import layer as layer_module
from kvpipe.align.layer import StreamingCKA, cka_matrix, linear_cka, proportional_map, top_k_mix

DST, SRC = 3, 5


@pytest.fixture(params=["gram", "features"])
def form(request, monkeypatch):
    """Both forms of the sums, whatever the cost rule would pick, and blocks that do not divide the rows."""
    one = layer_module._by_gram if request.param == "gram" else layer_module._by_features
    monkeypatch.setattr(layer_module, "_by_gram", one)
    monkeypatch.setattr(layer_module, "_by_features", one)
    monkeypatch.setattr(layer_module, "ROW_BLOCK", 7)


def published_pair():
    np.random.seed(1337)
    x = np.random.randn(100, 10)
    return torch.from_numpy(x), torch.from_numpy(np.random.randn(100, 10) + x)


def hsic_by_definition(x, y, debiased):
    """HSIC from full Gram matrices: H K H with H = I − 1/n, or Song et al. 2012 eq. 5 for the unbiased one."""
    k, m = (np.asarray(side @ side.T) for side in (x, y))
    n = len(k)
    if not debiased:
        h = np.eye(n) - 1 / n
        return np.trace(h @ k @ h @ m) / (n - 1) ** 2
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    one = np.ones(n)
    total = (
        np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    )
    return total / (n * (n - 3))


def cka_by_definition(x, y, debiased):
    return hsic_by_definition(x, y, debiased) / np.sqrt(
        hsic_by_definition(x, x, debiased) * hsic_by_definition(y, y, debiased)
    )


@pytest.mark.usefixtures("form")
def test_published_constants():
    x, y = published_pair()
    assert float(linear_cka(x, y)) == pytest.approx(0.55761, abs=5e-6)
    assert float(linear_cka(x, y, debiased=True)) == pytest.approx(0.51346, abs=5e-6)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("n", [4, 19])
def test_all_pairs_equal_the_definition(debiased, n):
    dst, src = torch.randn(DST, n, 6) + 2, torch.randn(SRC, n, 11) - 1
    src[:DST, :, :6] += dst
    matrix = cka_matrix(dst, src, debiased=debiased)
    expected = [[cka_by_definition(d.double(), s.double(), debiased) for s in src] for d in dst]
    np.testing.assert_allclose(matrix.numpy(), np.array(expected), atol=1e-9)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_in_single_precision_equal_the_definition_to_1e6(debiased, dtype):
    n = layer_module.SINGLE_ROWS + 9
    common = torch.randn(n, 6)
    dst, src = (common @ torch.randn(layers, 6, 40) + torch.randn(layers, n, 40) + 100 for layers in (DST, SRC))
    dst[:, 3] *= 1e3  # a sink token
    dst, src = dst.to(dtype), src.to(dtype)
    expected = [[cka_by_definition(d.double(), s.double(), debiased) for s in src] for d in dst]
    np.testing.assert_allclose(cka_matrix(dst, src, debiased=debiased).numpy(), np.array(expected), atol=1e-6)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("n,p", [(4, 3), (5, 40), (50, 7), (12, 12)])
def test_a_representation_is_like_itself(n, p, debiased):
    x = torch.randn(n, p)
    assert float(linear_cka(x, x, debiased=debiased)) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("debiased", [False, True])
def test_invariant_to_rotation_scale_and_shift(debiased):
    x, y = (side.double() for side in published_pair())
    rotation = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64)).Q
    moved = 3.7 * x @ rotation + 5
    expected = linear_cka(x, y, debiased=debiased)
    torch.testing.assert_close(linear_cka(moved, y, debiased=debiased), expected)
    torch.testing.assert_close(linear_cka(y, moved, debiased=debiased), expected)
    stretched = x * torch.linspace(0.1, 5, 10)
    assert abs(linear_cka(stretched, y, debiased=debiased) - expected) > 0.01, "not invariant to uneven scale"


def test_debiased_sees_nothing_in_independent_wide_features():
    x, y = torch.randn(100, 1000), torch.randn(100, 1000)
    assert float(linear_cka(x, y)) > 0.85
    assert abs(float(linear_cka(x, y, debiased=True))) < 0.02


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 9])
def test_never_nan(n, debiased):
    constant = torch.full((2, n, 4), 0.1)
    constant[1] = 1e6 + 0.3
    src = torch.cat([constant, torch.zeros(1, n, 4), torch.randn(2, n, 4)])
    matrix = cka_matrix(src, src, debiased=debiased)
    assert torch.isfinite(matrix).all()
    assert (matrix[:3] == 0).all() and (matrix[:, :3] == 0).all()
    if n < (4 if debiased else 2):
        assert (matrix == 0).all()
    else:
        torch.testing.assert_close(matrix.diagonal()[3:], torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("debiased", [False, True])
def test_one_minibatch_of_all_rows_is_the_full_matrix(debiased):
    dst, src = torch.randn(DST, 40, 6), torch.randn(SRC, 40, 11)
    stream = StreamingCKA(debiased=debiased, batch_rows=40)
    stream.update(dst, src)
    torch.testing.assert_close(stream.compute(), cka_matrix(dst, src, debiased=debiased))


@pytest.mark.parametrize("debiased", [False, True])
def test_streaming_averages_hsic_and_does_not_depend_on_the_split(debiased):
    rows, size = 53, 12
    dst, src = torch.randn(DST, rows, 6), torch.randn(SRC, rows, 11)
    src[0, :, :6] += 2 * dst[0]
    streams = []
    for pieces in ([53], [12, 12, 12, 12, 5], [1, 30, 2, 20]):
        stream = StreamingCKA(debiased=debiased, batch_rows=size)
        for d, s in zip(dst.split(pieces, 1), src.split(pieces, 1), strict=True):
            stream.update(d, s)
        streams.append(stream.compute())
    torch.testing.assert_close(streams[0], streams[1])
    torch.testing.assert_close(streams[0], streams[2])

    def averaged(x, y):
        parts = zip(x.double().split(size), y.double().split(size), strict=True)
        return sum(len(a) * hsic_by_definition(a, b, debiased) for a, b in parts)

    expected = [[averaged(d, s) / np.sqrt(averaged(d, d) * averaged(s, s)) for s in src] for d in dst]
    np.testing.assert_allclose(streams[0].numpy(), np.array(expected), atol=1e-9)


def test_streaming_estimates_the_full_matrix():
    base = torch.randn(4000, 8)
    dst = torch.stack([base + 0.5 * torch.randn(4000, 8), torch.randn(4000, 8)])
    src = torch.stack([base, torch.randn(4000, 8), base + torch.randn(4000, 8)])
    stream = StreamingCKA(batch_rows=100)
    stream.update(dst, src)
    torch.testing.assert_close(stream.compute(), cka_matrix(dst, src), atol=0.02, rtol=0)


def test_streaming_says_which_rows_it_left_out():
    dst, src = torch.randn(DST, 11, 6), torch.randn(SRC, 11, 7)
    stream = StreamingCKA(batch_rows=8)
    with pytest.raises(ValueError, match="no rows yet"):
        stream.compute()
    stream.update(dst, src)
    torch.testing.assert_close(stream.compute(), cka_matrix(dst[:, :8], src[:, :8]))
    assert stream.rows_left_out == 3
    stream.update(dst[:, :1], src[:, :1])
    assert stream.compute().isfinite().all() and stream.rows_left_out == 0
    with pytest.raises(ValueError, match="at least 4 rows"):
        StreamingCKA(batch_rows=3)


def test_streaming_holds_no_more_than_one_minibatch():
    stream = StreamingCKA(batch_rows=16)
    for _ in range(20):
        stream.update(torch.randn(DST, 23, 6), torch.randn(SRC, 23, 7))
    assert stream._buffer[0].shape[1] < 16
    assert stream._buffer[0].untyped_storage().nbytes() <= DST * 16 * 6 * 4


@given(st.integers(1, 40), st.integers(1, 40))
def test_proportional_map_is_monotone_even_and_keeps_the_ends(src, dst):
    chosen = proportional_map(src, dst)
    assert len(chosen) == dst and chosen == sorted(chosen) and chosen[-1] == src - 1
    if dst > 1:
        assert chosen[0] == 0
        assert all(abs(layer - i * (src - 1) / (dst - 1)) <= 0.5 for i, layer in enumerate(chosen))
    if src == dst:
        assert chosen == list(range(src))


def test_proportional_map_examples():
    assert proportional_map(28, 12) == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27]
    assert proportional_map(4, 7) == [0, 1, 1, 2, 2, 3, 3]
    assert len(set(proportional_map(32, 16))) == 16
    with pytest.raises(ValueError, match="need a layer"):
        proportional_map(0, 3)


def test_top_k_mix_clamps_then_normalises():
    similarity = torch.tensor([[0.6, -0.1, 0.2, 0.3], [-0.2, 0.5, -0.3, -0.1]])
    beta = top_k_mix(similarity, 2)
    torch.testing.assert_close(beta, torch.tensor([[2 / 3, 0, 0, 1 / 3], [0, 1.0, 0, 0]]))
    torch.testing.assert_close(top_k_mix(similarity, 4).sum(1), torch.ones(2))


def test_top_k_mix_by_temperature():
    similarity = torch.tensor([[0.6, -0.1, 0.2, 0.3]])
    beta = top_k_mix(similarity, 2, temperature=0.1)
    ratio = float(beta[0, 0] / beta[0, 3])
    assert ratio == pytest.approx(np.exp(3), rel=1e-4) and beta[0, [1, 2]].sum() == 0
    torch.testing.assert_close(beta.sum(1), torch.ones(1))


def test_top_k_mix_with_nothing_similar_warns_and_takes_the_top_k_evenly():
    similarity = torch.tensor([[0.5, 0.1, 0.0], [-0.3, -0.1, -0.2]])
    with pytest.warns(UserWarning, match=r"student layers \[1\]"):
        beta = top_k_mix(similarity, 2)
    torch.testing.assert_close(beta[1], torch.tensor([0, 0.5, 0.5]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        top_k_mix(similarity[:1], 2)


def test_top_k_mix_commutes_with_a_permutation_of_teacher_layers():
    similarity, order = torch.rand(DST, SRC), torch.randperm(SRC)
    assert torch.equal(top_k_mix(similarity[:, order], 3), top_k_mix(similarity, 3)[:, order])


def test_top_k_mix_refuses_nonsense():
    similarity = torch.rand(DST, SRC)
    for arguments, message in [((0,), "between 1 and"), ((6,), "teacher's 5 layers"), ((2, 0.0), "temperature")]:
        with pytest.raises(ValueError, match=message):
            top_k_mix(similarity, *arguments)
    similarity[1, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        top_k_mix(similarity, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("debiased", [True, False])
def test_features_that_are_not_finite_are_refused_with_their_layer(bad, debiased):
    torch.manual_seed(0)
    dst, src = torch.randn(3, 9, 5), torch.randn(2, 9, 7)
    dst[1, 4, 2] = bad
    with pytest.raises(ValueError, match="layer 1 hold NaN or infinity"):
        cka_matrix(dst, src, debiased=debiased)
    stream = StreamingCKA()
    stream.update(src, dst)
    with pytest.raises(ValueError, match="layer 1 hold NaN or infinity"):
        stream.compute()
