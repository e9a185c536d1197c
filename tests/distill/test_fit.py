"""Closed forms against their definitions (numpy's eigenvalues, planted maps), and what the fit promises to fusion."""

import itertools

import numpy as np
import pytest
import torch

from kvpipe.align.layermap import LayerPlan
from kvpipe.config import PROJECTORS, FitConfig
from kvpipe.distill.fit import (
    LINEAR,
    Rows,
    explained_variance,
    features,
    fit,
    fit_projectors,
    normalised,
    principal_components,
    random_orthogonal,
    ridge,
    rotation_onto,
)
from kvpipe.distill.projectors import Geometry, build_projector

ROWS, OUT = 301, 12
FIRST = Geometry(src_heads=3, src_dim=10, dst_heads=2, dst_dim=6, dst_layers=3)
SECOND = Geometry(src_heads=2, src_dim=14, dst_heads=2, dst_dim=6, dst_layers=3)
METHODS = ["pca", "joint_pca", "procrustes", "random"]


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def coloured(rows, width):
    """Rows of falling variance and a mean that is not 0."""
    return double(rows, width) @ (double(width, width) * torch.logspace(1, -1, width)) + 3 * double(width)


def shared_signal(noise=0.3):
    """Two teachers that show one signal of 8 dimensions through maps of their own, beside noise."""
    signal = double(ROWS, 8)
    return [signal @ double(8, width) + noise * double(ROWS, width) for width in (30, 28)]


def plan():
    return LayerPlan(torch.tensor([[0], [2], [3]]).expand(2, 3, 1), torch.ones(2, 3, 1), False)


def teachers(kind="linear", rows=ROWS):
    sizes = (FIRST, SECOND)
    projectors = [
        build_projector(PROJECTORS(kind, **({"mlp_ratio": 0.5} if kind == "elastic" else {})), g, plan(), 1000)
        for g in sizes
    ]
    signal = torch.randn(2, rows, 4, 8)
    data = []
    for g in sizes:
        mix = torch.randn(2, 4, 8, g.src_heads * g.src_dim)
        x = torch.einsum("nrls,nlsf->nrlf", signal, mix) + 0.3 * torch.randn(2, rows, 4, g.src_heads * g.src_dim)
        data.append(Rows(*(x * 3 + 1).unflatten(-1, (g.src_heads, g.src_dim)).unbind()))
    return projectors, data


def outputs(projector, rows):
    """(kind, layer, row, feature) as training sees them."""
    with torch.no_grad():
        kv = projector.eval()(rows.keys[None], rows.values[None])
    return torch.stack([x[:, 0].transpose(1, 2).flatten(2) for x in (kv.keys, kv.values)])


# ---------------------------------------------------------------- closed forms
def test_principal_components_are_numpys():
    x = coloured(ROWS, 30)
    found = principal_components(x, OUT)
    spectrum = np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True))[::-1]
    z = found(x)
    np.testing.assert_allclose(z.var(0, unbiased=False), spectrum[:OUT], rtol=1e-8)
    assert z.mean(0).abs().max() < 1e-8
    torch.testing.assert_close(found.weight.T @ found.weight, torch.eye(OUT, dtype=torch.float64))
    assert explained_variance(z, x, 1e-9) == pytest.approx(spectrum[:OUT].sum() / spectrum.sum(), abs=1e-6)


def test_no_other_projection_of_the_rank_explains_more():
    x = coloured(ROWS, 30)
    best = explained_variance(principal_components(x, OUT)(x), x)
    others = [explained_variance(random_orthogonal(x, OUT, seed)(x), x) for seed in range(20)]
    assert max(others) < best < 1


def test_components_beyond_the_rank_are_zero():
    x = double(ROWS, 5) @ double(5, 30)
    z = principal_components(x, OUT)(x)
    assert (z.var(0) > 1e-6).tolist() == [True] * 5 + [False] * 7
    assert not principal_components(x, OUT).weight[:, 5:].any()
    narrow = principal_components(double(ROWS, 4), OUT)
    assert narrow.weight.shape == (4, OUT) and not narrow.weight[:, 4:].any()


def test_ridge_recovers_a_planted_map_and_shrinks_with_the_penalty():
    x, weight, bias = coloured(ROWS, 9), double(9, 4), double(4)
    found = ridge(x, x @ weight + bias, 1e-12)
    torch.testing.assert_close(found.weight, weight, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.bias, bias, atol=1e-5, rtol=1e-5)
    sizes = [ridge(x, x @ weight + bias, penalty).weight.norm() for penalty in (1e-12, 0.1, 10.0, 1e6)]
    assert all(a > b for a, b in itertools.pairwise(sizes)) and sizes[-1] < 1e-3
    # the normal equations by hand
    centred = x - x.mean(0)
    gram = centred.T @ centred / ROWS
    penalty = 0.1 * gram.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    expected = torch.linalg.inv(gram + penalty) @ centred.T @ (x @ weight - (x @ weight).mean(0)) / ROWS
    torch.testing.assert_close(ridge(x, x @ weight, 0.1).weight, expected)


def test_rotation_onto_undoes_a_rotation():
    x = coloured(ROWS, 7)
    rotation = torch.linalg.qr(double(7, 7)).Q
    torch.testing.assert_close(rotation_onto(x, x @ rotation + 5), rotation)
    noisy = rotation_onto(x, x @ rotation + double(ROWS, 7))
    torch.testing.assert_close(noisy @ noisy.T, torch.eye(7, dtype=torch.float64))


def test_procrustes_is_a_rotation_of_the_own_components_nearer_to_the_first():
    xs = shared_signal()
    config = FitConfig(method="procrustes")
    own, turned = LINEAR["pca"](xs, OUT, config), LINEAR["procrustes"](xs, OUT, config)
    z = [[m(x) for m, x in zip(maps, xs, strict=True)] for maps in (own, turned)]
    torch.testing.assert_close(z[0][0], z[1][0])
    torch.testing.assert_close(z[0][1] @ z[0][1].T, z[1][1] @ z[1][1].T)
    assert (z[1][1] - z[1][0]).norm() < 0.7 * (z[0][1] - z[0][0]).norm()


@pytest.mark.parametrize("width", [5, OUT, 30])
def test_random_maps_are_orthonormal_and_follow_the_seed(width):
    x = coloured(ROWS, width)
    weight = random_orthogonal(x, OUT, 3).weight
    assert weight.shape == (width, OUT)
    gram = weight.T @ weight if width >= OUT else weight @ weight.T
    torch.testing.assert_close(gram, torch.eye(min(width, OUT), dtype=torch.float64))
    assert torch.equal(weight, random_orthogonal(x, OUT, 3).weight)
    assert not torch.allclose(weight, random_orthogonal(x, OUT, 4).weight)


def test_joint_components_of_one_teacher_twice_are_its_own():
    x = coloured(ROWS, 20)
    config = FitConfig(method="joint_pca", ridge=1e-10)
    (own,) = LINEAR["joint_pca"]([x], OUT, config)
    twice = LINEAR["joint_pca"]([x, 5 * x], OUT, config)
    for affine, scale in zip(twice, (1, 5), strict=True):
        z, expected = affine(scale * x), own(x)
        cosines = torch.nn.functional.cosine_similarity(z - z.mean(0), expected, dim=0).abs()
        torch.testing.assert_close(cosines, torch.ones(OUT, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("whiten", [True, False])
def test_normalised_outputs_have_mean_0_and_mean_variance_1(method, whiten):
    xs = shared_signal()
    maps = normalised(LINEAR[method](xs, OUT, FitConfig(method=method)), xs, whiten)
    z = [m(x) for m, x in zip(maps, xs, strict=True)]
    assert all(part.mean(0).abs().max() < 1e-8 for part in z)
    variance = torch.stack([part.var(0, unbiased=False) for part in z])
    assert variance.mean().item() == pytest.approx(1)
    if whiten:
        torch.testing.assert_close(variance.mean(0), torch.ones(OUT, dtype=torch.float64))
    else:
        plain = torch.stack(
            [
                m(x).var(0, unbiased=False)
                for m, x in zip(LINEAR[method](xs, OUT, FitConfig(method=method)), xs, strict=True)
            ]
        )
        torch.testing.assert_close(variance / variance.mean(), plain / plain.mean())


def test_whitening_leaves_empty_components_empty():
    x = double(ROWS, 5) @ double(5, 30)
    (whitened,) = normalised(LINEAR["pca"]([x], OUT, FitConfig()), [x], True)
    assert whitened(x).var(0, unbiased=False).tolist() == pytest.approx([1] * 5 + [0] * 7, abs=1e-6)


def test_teachers_agree_in_the_joint_space_and_not_in_their_own():
    xs = shared_signal()
    agreement = {}
    for method in ("pca", "joint_pca", "random"):
        maps = normalised(LINEAR[method](xs, 8, FitConfig(method=method)), xs, False)
        one, two = (m(x) for m, x in zip(maps, xs, strict=True))
        agreement[method] = torch.nn.functional.cosine_similarity(one, two).mean().item()
    assert agreement["joint_pca"] > 0.9
    assert max(abs(agreement["pca"]), abs(agreement["random"])) < 0.5


# ---------------------------------------------------------------- all layers
@pytest.mark.parametrize("method", METHODS)
def test_fit_installs_the_closed_form_of_every_layer(method):
    projectors, data = teachers()
    config = FitConfig(method=method)
    report = fit(projectors, data, config)
    z = [outputs(p, r) for p, r in zip(projectors, data, strict=True)]
    for number, kind in enumerate(("keys", "values")):
        for layer in range(3):
            xs = [features(p, r, number, layer) for p, r in zip(projectors, data, strict=True)]
            assert torch.equal(xs[0].float(), data[0][number][:, [0, 2, 3][layer]].flatten(1))
            maps = normalised(LINEAR[method](xs, OUT, config), xs, False)
            for teacher, (affine, x) in enumerate(zip(maps, xs, strict=True)):
                torch.testing.assert_close(z[teacher][number, layer].double(), affine(x), atol=1e-3, rtol=1e-3)
                share = report.explained_variance[teacher][kind][layer]
                assert share == pytest.approx(explained_variance(affine(x), x), abs=1e-6) and 0 < share < 1


def test_the_fit_is_deterministic():
    torch.manual_seed(1)
    first, data = teachers()
    fit(first, data, FitConfig(method="joint_pca"))
    second, _ = teachers()
    fit(second, data, FitConfig(method="joint_pca"))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_ridge_maps_onto_the_students_own_cache():
    projectors, data = teachers()
    planted = torch.randn(2, 3, 30, OUT)
    own = torch.stack(
        [torch.stack([data[0][n][:, [0, 2, 3][i]].flatten(1) @ planted[n, i] for i in range(3)], 1) for n in range(2)]
    )
    student = Rows(*own.unflatten(-1, (2, 6)).unbind())
    fit(projectors[:1], data[:1], FitConfig(method="ridge", ridge=1e-8), student)
    torch.testing.assert_close(outputs(projectors[0], data[0]), own.transpose(1, 2), atol=2e-2, rtol=1e-3)
    for config in (FitConfig(method="ridge"), FitConfig(basis="student")):
        with pytest.raises(ValueError, match="need a student with weights"):
            fit(projectors, data, config)


@pytest.mark.parametrize("method", ["pca", "joint_pca", "procrustes", "random"])
def test_the_students_basis_is_a_similarity_of_the_teachers_space(method):
    """Nothing is lost, mean and total variance are the student's, and no other turn comes nearer to its rows."""
    (turned, data), (plain, _) = teachers(), teachers()
    generator = torch.Generator().manual_seed(3)
    student = Rows(*(5 + 2 * torch.randn(2, len(data[0].keys), 3, 2, 6, generator=generator)))
    reports = [
        fit(projectors, data, FitConfig(method=method, basis=basis), student)
        for projectors, basis in ((turned, "student"), (plain, "teacher"))
    ]
    assert reports[0].explained_variance[0]["keys"] == pytest.approx(reports[1].explained_variance[0]["keys"], abs=1e-6)
    for kind, own in enumerate(student):
        for layer in range(3):
            mine = own[:, layer].flatten(1).double()
            after, before = (
                torch.stack([outputs(p, d)[kind][layer].double() for p, d in zip(ps, data, strict=True)]).mean(0)
                for ps in (turned, plain)
            )
            torch.testing.assert_close(after.mean(0), mine.mean(0), atol=1e-4, rtol=0)
            assert after.var(0).sum() == pytest.approx(mine.var(0).sum().item(), rel=1e-4)
            # distances between rows keep their ratios
            ratio = torch.pdist(after[:40]) / torch.pdist(before[:40])
            torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), atol=1e-4, rtol=1e-4)
            centred = after - after.mean(0)
            best = (centred * (mine - mine.mean(0))).sum()
            for _ in range(20):
                turn = torch.linalg.qr(torch.randn(OUT, OUT, generator=generator, dtype=torch.float64)).Q
                assert (centred @ turn * (mine - mine.mean(0))).sum() <= best + 1e-6


def test_too_few_rows_are_an_error():
    projectors, data = teachers(rows=30)
    with pytest.raises(
        ValueError, match=r"30 aligned rows for 30 features in keys of student layer 0.*fit\.examples.*more data"
    ):
        fit(projectors, data, FitConfig())


def test_reconstruct_explains_no_less_than_its_linear_start_and_is_deterministic():
    torch.manual_seed(2)
    projectors, data = teachers("elastic")
    state = torch.get_rng_state()
    start = fit(projectors, data, FitConfig(method="reconstruct", steps=1)).explained_variance
    trained = fit(projectors, data, FitConfig(method="reconstruct", steps=40)).explained_variance
    mean = [np.mean([x for t in report for kind in t.values() for x in kind]) for report in (start, trained)]
    assert mean[1] > mean[0] - 0.01
    z = [outputs(p, r) for p, r in zip(projectors, data, strict=True)]
    agreement = torch.nn.functional.cosine_similarity(z[0], z[1], dim=-1).mean()
    assert agreement > 0.8  # the anchor keeps the shared space
    assert z[0].var(-2).mean().item() == pytest.approx(1, abs=0.3)
    torch.manual_seed(2)
    again, data_again = teachers("elastic")
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(data[0].keys, data_again[0].keys)
    fit(again, data_again, FitConfig(method="reconstruct", steps=1))
    fit(again, data_again, FitConfig(method="reconstruct", steps=40))
    assert torch.equal(outputs(again[0], data[0]), z[0])


def test_reconstruct_trains_elastic_only():
    projectors, data = teachers()
    with pytest.raises(ValueError, match=r"projector\.kind: elastic"):
        fit(projectors, data, FitConfig(method="reconstruct"))


def test_heads_are_left_at_their_start_and_reported():
    projectors, data = teachers("heads")
    before = [p.detach().clone() for p in projectors[0].parameters()]
    report = fit(projectors, data, FitConfig(method="grouped"))
    assert all(torch.equal(a, b) for a, b in zip(before, projectors[0].parameters(), strict=True))
    z = outputs(projectors[1], data[1])[1, 2].double()
    expected = explained_variance(z, features(projectors[1], data[1], 1, 2))
    assert report.explained_variance[1]["values"][2] == pytest.approx(expected, abs=1e-6)


def test_the_step_does_not_depend_on_the_random_state_it_starts_with(tiny):
    from kvpipe.steps.fit import make_fit
    from kvpipe.steps.train import prepare

    elastic = {fit: arm for fit, arm in tiny.dag.fits.items() if arm.fit.method == "reconstruct"}
    assert elastic
    for fit_id, arm in elastic.items():
        prepare(tiny, next(name for name, other in tiny.dag.arms.items() if other == arm))
        written = []
        for state in (1, 2):
            torch.manual_seed(state)
            make_fit(tiny, fit_id)
            written.append(tiny.paths.projector(fit_id).read_bytes())
        assert written[0] == written[1], fit_id


def test_identity_is_the_teachers_own_cache_and_needs_the_students_shape():
    same = Geometry(src_heads=2, src_dim=6, dst_heads=2, dst_dim=6, dst_layers=3)
    projector = build_projector(PROJECTORS(), same, plan(), 1000)
    rows = Rows(torch.randn(57, 4, 2, 6), 9 * torch.randn(57, 4, 2, 6) + 5)
    fit([projector], [rows], FitConfig(method="identity"))
    out = projector(rows.keys[None], rows.values[None])
    kept = [0, 2, 3]  # of `plan`
    torch.testing.assert_close(out.keys[:, 0], rows.keys[:, kept].permute(1, 2, 0, 3))
    torch.testing.assert_close(out.values[:, 0], rows.values[:, kept].permute(1, 2, 0, 3))
    projectors, data = teachers()
    with pytest.raises(ValueError, match=r"identity needs teachers with the student's 12 numbers.*got 28, 30"):
        fit(projectors, data, FitConfig(method="identity"))


def test_a_fit_onto_a_pretrained_student_does_not_depend_on_the_batches_it_is_read_in(tiny):
    """Nor is the student left in another mode. Memory does: the student's queries of all texts were most of a fit's."""
    from kvpipe.steps.projectors import unfitted
    from kvpipe.steps.train import prepare

    prepare(tiny, "two")
    arm = tiny.dag.arm("two")
    config = FitConfig(method="ridge", examples=17)
    found = {}
    for size in (1, 5, 17):
        teachers = [tiny.aligned_teacher(arm, name) for name in arm.teachers]
        projectors = unfitted(tiny, arm, [teacher.layers for teacher in teachers])
        student, dst = tiny.student(0).train(), tiny.student_encoding("train", arm)
        fitted = fit_projectors(projectors, teachers, config, student, dst, tiny.student_tokenizer.pad_token_id, size)
        assert student.training
        found[size] = [p for projector in projectors for p in projector.parameters()], fitted
    for parameters, fitted in found.values():
        torch.testing.assert_close(parameters, found[17][0], rtol=1e-4, atol=1e-4)
        assert fitted.rows == found[17][1].rows
        torch.testing.assert_close(fitted.attention_output_cosine, found[17][1].attention_output_cosine)
        assert all(0.3 < cosine < 1 for teacher in fitted.attention_output_cosine for cosine in teacher)
