"""Fit step: projectors that carry information before training starts, for all teachers of an arm together.

A projector trained jointly with the student collapses: both ends of its loss move towards each other and nothing is
transferred. So a target is fixed first: linear maps in closed form on token-aligned rows of training examples, in float64,
and the elastic encoder trained from there to keep the teacher's KV recoverable. The outputs of all teachers share one
space, which fusion needs, and every student layer's target has unit mean variance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from kvpipe.align.dim import ElasticBottleneck
from kvpipe.align.layermap import KINDS
from kvpipe.align.regime import positions_from_mask
from kvpipe.cache.attention import output_cosine
from kvpipe.cache.capture import Recorder
from kvpipe.cache.kv import KV
from kvpipe.cache.teacher import AlignedTeacher
from kvpipe.config import FitConfig
from kvpipe.data.batches import collate, spread
from kvpipe.data.encoding import Encoding
from kvpipe.distill.projectors import ElasticProjector, HeadsProjector, Projector, select
from kvpipe.experiment.progress import track
from kvpipe.models.head import Head, final_states

Matrix = Float64[Tensor, "row feature"]
Matrices = list[Float64[Tensor, "row _"]]
"""One per teacher: the same rows, each with its own number of features."""


class Affine(NamedTuple):
    """`x ↦ x @ weight + bias`."""

    weight: Float64[Tensor, "feature out"]
    bias: Float64[Tensor, "out"]

    def __call__(self, x: Matrix) -> Float64[Tensor, "row out"]:
        return x @ self.weight + self.bias


class Rows(NamedTuple):
    """Aligned rows of one teacher: (row, src_layer, head, dim), only positions that every teacher has."""

    keys: Float[Tensor, "row layer head dim"]
    values: Float[Tensor, "row layer head dim"]


class Report(NamedTuple):
    """Explained variance `[teacher][kind][student layer]`."""

    explained_variance: list[dict[str, list[float]]]


# ---------------------------------------------------------------- linear fits
def principal_components(x: Matrix, out: int) -> Affine:
    """The `out` leading principal components; zero beyond the rank of x."""
    mean = x.mean(0)
    centred = x - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    weight = vectors.flip(1)[:, :out]
    # eigenvectors are defined up to sign; fix it so that every machine finds the same projector
    sign = torch.sign(weight.gather(0, weight.abs().argmax(0, keepdim=True)))
    weight = weight * torch.where(sign == 0, 1.0, sign)
    kept = values.flip(0)[:out] > 1e-10 * values[-1].clamp(min=1e-30)
    weight = nn.functional.pad(weight * kept, (0, out - weight.shape[1]))
    return Affine(weight, -mean @ weight)


def ridge(x: Matrix, y: Float64[Tensor, "row out"], penalty: float) -> Affine:
    """Ridge regression with intercept; `penalty` is relative to the mean variance of a feature of x."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    centred = x - x_mean
    gram = centred.T @ centred / len(x)
    gram.diagonal().add_(penalty * gram.diagonal().mean().clamp(min=1e-30))
    weight = torch.linalg.solve(gram, centred.T @ (y - y_mean) / len(x))
    return Affine(weight, y_mean - x_mean @ weight)


def rotation_onto(x: Matrix, target: Matrix) -> Float64[Tensor, "feature feature"]:
    """The orthogonal map that brings centred x nearest to the centred target (orthogonal Procrustes)."""
    u, _, v = torch.linalg.svd((x - x.mean(0)).T @ (target - target.mean(0)))
    return u @ v


def random_orthogonal(x: Matrix, out: int, seed: int) -> Affine:
    """A random map with orthonormal columns (rows, where x is narrower than `out`)."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(max(x.shape[1], out), max(x.shape[1], out), generator=generator, dtype=torch.float64)
    weight = torch.linalg.qr(square).Q[: x.shape[1], :out]
    return Affine(weight, -x.mean(0) @ weight)


def _pca(xs: Matrices, out: int, config: FitConfig) -> list[Affine]:
    return [principal_components(x, out) for x in xs]


def _joint_pca(xs: Matrices, out: int, config: FitConfig) -> list[Affine]:
    """Shared scores are the components of the teachers side by side (each of unit total variance); every teacher's map is
    the ridge regression of the scores on its own features, so that each alone predicts the one shared space."""
    if len(xs) == 1:
        return _pca(xs, out, config)
    joined = torch.cat([(x - x.mean(0)) / x.var(0).sum().sqrt().clamp(min=1e-12) for x in xs], dim=1)
    scores = principal_components(joined, out)(joined)
    return [ridge(x, scores, config.ridge) for x in xs]


def _procrustes(xs: Matrices, out: int, config: FitConfig) -> list[Affine]:
    first, *others = _pca(xs, out, config)
    target = first(xs[0])
    maps = [first]
    for x, own in zip(xs[1:], others, strict=True):
        rotation = rotation_onto(own(x), target)
        maps.append(Affine(own.weight @ rotation, own.bias @ rotation))
    return maps


def _random(xs: Matrices, out: int, config: FitConfig) -> list[Affine]:
    return [random_orthogonal(x, out, config.seed + i) for i, x in enumerate(xs)]


def _identity(xs: Matrices, out: int) -> list[Affine]:
    if other := sorted({x.shape[1] for x in xs} - {out}):
        raise ValueError(
            f"fit.method: identity needs teachers with the student's {out} numbers (heads × dimension × layers side by "
            f"side) per layer; got {', '.join(map(str, other))}. Use ridge or pca"
        )
    return [Affine(torch.eye(out, dtype=x.dtype), torch.zeros(out, dtype=x.dtype)) for x in xs]


LINEAR: dict[str, Callable[[Matrices, int, FitConfig], list[Affine]]] = {
    "pca": _pca,
    "joint_pca": _joint_pca,
    "procrustes": _procrustes,
    "random": _random,
    "reconstruct": _joint_pca,
}


def normalised(maps: list[Affine], xs: Matrices, whiten: bool) -> list[Affine]:
    """Centre and scale the maps' outputs by one common factor to unit mean variance, or each component to unit variance."""
    outputs = [m(x) for m, x in zip(maps, xs, strict=True)]
    variance = torch.stack([y.var(0, unbiased=False) for y in outputs]).mean(0)
    scale = variance.clamp(min=1e-12).rsqrt() if whiten else variance.mean().clamp(min=1e-12).rsqrt()
    if whiten:
        scale = torch.where(variance > 1e-9 * variance.max(), scale, 0.0)
    return [Affine(m.weight * scale, (m.bias - y.mean(0)) * scale) for m, y in zip(maps, outputs, strict=True)]


def onto_student(maps: list[Affine], xs: Matrices, own: Float64[Tensor, "row out"]) -> list[Affine]:
    """Turn, shift and scale the maps' shared outputs onto the student's own rows, by one similarity for all teachers.

    A rotation keeps all that the outputs tell; mean and total variance become the student's.
    """
    shared = torch.stack([m(x) for m, x in zip(maps, xs, strict=True)]).mean(0)
    turn = rotation_onto(shared, own) * (own.var(0).sum() / shared.var(0).sum().clamp(min=1e-30)).sqrt()
    shift = own.mean(0) - shared.mean(0) @ turn
    return [Affine(m.weight @ turn, m.bias @ turn + shift) for m in maps]


def explained_variance(z: Float64[Tensor, "row out"], x: Matrix, penalty: float = 1e-6) -> float:
    """Share of the variance of x that a linear map from z gives back."""
    residual = x - ridge(z, x, penalty)(z)
    return 1 - (residual.var(0).sum() / x.var(0).sum().clamp(min=1e-30)).item()


# ---------------------------------------------------------------- all teachers, from texts
class Fitted(NamedTuple):
    """What a fit was made of and how well it went, one entry per teacher."""

    rows: int
    explained_variance: list[dict[str, list[float]]]
    attention_output_cosine: list[list[float]] | None
    """Per student layer; None where the student has no weights or shows no queries."""


def fit_projectors(
    projectors: list[Projector],
    teachers: Sequence[AlignedTeacher],
    config: FitConfig,
    student: nn.Module | None,
    dst: Encoding,
    pad_id: int,
    batch_size: int,
    whole: tuple[nn.Module, Sequence[int]] | None = None,
) -> Fitted:
    """Fit the projectors of all teachers in place, on aligned rows of `config.examples` texts.

    Args:
        projectors: one per teacher, unfitted.
        teachers: their rows on the student's positions.
        config: method.
        student: pretrained; None for one from scratch.
        dst: the student's tokens.
        pad_id: of padding.
        batch_size: texts that the student reads at once.
        whole: model and layers whose keys and values are mapped onto (`fit.basis: whole`); None: the student's own.
    """
    examples = spread(len(dst), config.examples)
    batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    parts, masks = [], []
    for some in batches:
        aligned = [teacher.aligned(some, int(dst.lengths[some].max())) for teacher in teachers]
        masks.append(torch.stack([a.mask for a in aligned]).all(0))
        parts.append([Rows(a.keys[masks[-1]], a.values[masks[-1]]) for a in aligned])
    rows = [_joined(part) for part in zip(*parts, strict=True)]
    del parts
    if student is None:
        return Fitted(len(rows[0].keys), fit(projectors, rows, config).explained_variance, None)
    training = student.training
    student.eval()
    model, layers = whole or (student, None)
    read = _student_read(model, dst, batches, pad_id, layers)
    own = _joined(
        [Rows(*(x.float().cpu() for x in one.rows(mask))) for (one, _), mask in zip(read, masks, strict=True)]
    )
    report = fit(projectors, rows, config, own)
    cosines = _output_cosines(projectors, rows, _student_read(student, dst, batches, pad_id), masks)
    student.train(training)
    return Fitted(len(rows[0].keys), report.explained_variance, cosines)


def _joined(parts: Sequence[Rows]) -> Rows:
    return Rows(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _student_read(
    student: nn.Module, dst: Encoding, batches: Sequence[np.ndarray], pad_id: int, layers: Sequence[int] | None = None
) -> Iterator[tuple[Recorder, Int64[Tensor, "batch time"]]]:
    """What the student holds of a batch, and the positions: batch by batch, since the queries of all would take several times
    the memory of all else."""
    device, head = next(student.parameters()).device, Head.of(student)
    for some in track(batches, "the student's own keys and values", "examples", len):
        batch = collate(dst, some, pad_id).to(device)
        with torch.no_grad(), Recorder(student, layers=layers) as recorder:
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
            final_states(student, head, **inputs)
        yield recorder, positions_from_mask(batch.attention_mask.cpu())


def _output_cosines(
    projectors: list[Projector],
    rows: list[Rows],
    read: Iterable[tuple[Recorder, Tensor]],
    masks: Sequence[Tensor],
) -> list[list[float]] | None:
    """`[teacher][student layer]`, over all rows; None where the student shows no queries. A mask is `(batch, time)`."""
    sums, begin, number = torch.zeros(len(rows), projectors[0].geometry.dst_layers), 0, len(rows[0].keys)
    for (recorder, positions), mask in zip(read, masks, strict=True):
        if not recorder.sees_queries:
            return None
        here = slice(begin, begin := begin + int(mask.sum()))
        if not mask.any():
            continue
        queries, own = recorder.queries().float().cpu(), recorder.kv()
        own = KV(own.keys.float().cpu(), own.values.float().cpu())
        for teacher, (projector, found) in enumerate(zip(projectors, rows, strict=True)):
            with torch.no_grad():
                target = projector.eval()(found.keys[None, here], found.values[None, here])
            other = KV(*(torch.zeros_like(x) for x in (own.keys, own.values)))
            for whole, part in ((other.keys, target.keys), (other.values, target.values)):
                rearrange(whole, "layer batch head time dim -> batch time layer head dim")[mask] = rearrange(
                    part, "layer 1 head row dim -> row layer head dim"
                )
            cosines = output_cosine(queries, own, other, recorder.ropes, mask, positions)
            sums[teacher] += torch.tensor(cosines) * (here.stop - here.start) / number
    return sums.tolist()


# ---------------------------------------------------------------- all layers
def fit(
    projectors: list[Projector],
    rows: list[Rows],
    config: FitConfig,
    student: Rows | None = None,
) -> Report:
    """Fit the projectors of all teachers in place.

    Args:
        projectors: one per teacher, unfitted.
        rows: the aligned rows of each teacher, the same number for all.
        config: method.
        student: rows that `ridge` and `basis: student` map onto: the pretrained student's own, or its whole model's.

    Raises:
        ValueError: too few rows, or no student where one is needed.
    """
    geometry = projectors[0].geometry
    out = geometry.dst_heads * geometry.dst_dim
    report: list[dict[str, list[float]]] = [{kind: [] for kind in KINDS} for _ in projectors]
    if (config.method == "ridge" or config.basis != "teacher") and student is None:
        raise ValueError(
            "fit.method: ridge and fit.basis: student need a student with weights of its own (they map onto its KV)"
        )
    for number, kind in enumerate(KINDS):
        for layer in track(range(geometry.dst_layers), f"fitting {kind}", "layers"):
            xs = [features(p, r, number, layer) for p, r in zip(projectors, rows, strict=True)]
            if len(xs[0]) <= max(x.shape[1] for x in xs):
                raise ValueError(
                    f"fit: {len(xs[0])} aligned rows for {max(x.shape[1] for x in xs)} features in {kind} of student "
                    f"layer {layer}; raise fit.examples or, if the training split has no more, give more data"
                )
            if isinstance(projectors[0], HeadsProjector):
                outputs = [p(*r_batch(r)) for p, r in zip(projectors, rows, strict=True)]
                zs = [
                    rearrange((o.keys, o.values)[number][layer], "1 head time dim -> time (head dim)").double()
                    for o in outputs
                ]
            else:
                maps = _linear(xs, out, config, student, number, layer)
                for projector, affine in zip(projectors, maps, strict=True):
                    projector.set_linear(number, layer, affine.weight.float(), affine.bias.float())  # type: ignore[operator]
                zs = [m(x) for m, x in zip(maps, xs, strict=True)]
                if config.method == "reconstruct":
                    zs = _reconstruct(projectors, xs, zs, config, number, layer)
            for teacher, (z, x) in enumerate(zip(zs, xs, strict=True)):
                report[teacher][kind].append(explained_variance(z, x))
    return Report(report)


def _linear(xs, out: int, config: FitConfig, student: Rows | None, kind: int, layer: int) -> list[Affine]:
    own = None if student is None else rearrange(student[kind][:, layer], "row head dim -> row (head dim)").double()
    if config.method == "ridge":
        assert own is not None
        return [ridge(x, own, config.ridge) for x in xs]  # the student's own scale is the target's
    if config.method == "identity":
        return _identity(xs, out)
    maps = normalised(LINEAR[config.method](xs, out, config), xs, config.whiten)
    if config.basis == "teacher":
        return maps
    assert own is not None
    return onto_student(maps, xs, own)


def features(projector: Projector, rows: Rows, kind: int, layer: int) -> Matrix:
    """What the projector of one student layer sees, flattened: (row, k·head·dim), float64."""
    x = rearrange(rows[kind], "row layer head dim -> 1 row layer head dim")
    picked = select(x, projector.plan, kind)[layer, 0]
    return rearrange(picked, "row k head dim -> row (k head dim)").double()


def r_batch(rows: Rows) -> tuple[Tensor, Tensor]:
    """Rows as one long example, the form that projectors take."""
    return rows.keys[None], rows.values[None]


def _reconstruct(
    projectors: list[Projector], xs: Matrices, zs: Matrices, config: FitConfig, kind: int, layer: int
) -> Matrices:
    """Train the encoders from their linear start, each with a linear decoder that must give its teacher's KV back.

    A second term keeps each encoder's output near the linear start's shared space, in which the teachers agree.
    """
    torch.manual_seed(config.seed)
    encoders = [_encoder(p, kind, layer) for p in projectors]
    scaled = [((x - x.mean(0)) / x.var(0).mean().sqrt().clamp(min=1e-12)).float() for x in xs]
    inputs = [x.float() for x in xs]
    anchors = [z.float() for z in zs]
    spreads = [anchor.var(0).mean().clamp(min=1e-12) for anchor in anchors]
    decoders = []
    for z, x in zip(zs, scaled, strict=True):
        start = ridge(z, x.double(), 1e-6)
        decoder = nn.Linear(z.shape[1], x.shape[1])
        with torch.no_grad():
            decoder.weight.copy_(start.weight.T)
            decoder.bias.copy_(start.bias)
        decoders.append(decoder)
    modules = nn.ModuleList([*encoders, *decoders]).train()
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.steps):
        batch = torch.randint(len(xs[0]), (min(512, len(xs[0])),), generator=generator)
        loss = torch.zeros(())
        for encoder, decoder, x, target, anchor, width in zip(
            encoders, decoders, inputs, scaled, anchors, spreads, strict=True
        ):
            z = encoder(x[batch])
            drift = (z - anchor[batch]).square().mean() / width
            loss = loss + (decoder(z) - target[batch]).square().mean() + 0.1 * drift
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    modules.eval()
    with torch.no_grad():
        return [encoder(x).double() for encoder, x in zip(encoders, inputs, strict=True)]


def _encoder(projector: Projector, kind: int, layer: int) -> ElasticBottleneck:
    if not isinstance(projector, ElasticProjector):
        raise ValueError("fit.method: reconstruct trains projector.kind: elastic")
    return projector.maps[kind][layer]  # type: ignore[index,return-value]
