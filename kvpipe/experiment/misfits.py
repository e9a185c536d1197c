"""What arms ask of their models that these do not have, by their shapes alone: said before any teacher reads a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from kvpipe.config import Arm
from kvpipe.config.terms import LogitsConfig, RelationsConfig
from kvpipe.experiment.plan import Dag
from kvpipe.experiment.sizes import Shape


def misfits(dag: Dag, shapes: Mapping[str, Shape], arms: Iterable[str] | None = None) -> list[str]:
    """One line per setting that does not fit: its key, what was expected and what came.

    Args:
        dag: the experiment.
        shapes: of the models that are known.
        arms: names of the arms that are looked at; all by default.
    """
    lines = []
    for name in dag.arms if arms is None else arms:
        arm = dag.arms[name]
        lines += [f"arms.{name}.set.{line}" for line in _layers(arm, dag.config.student, shapes)]
        lines += [f"arms.{name}.set.{line}" for line in _identity(arm, dag.config.student, shapes)]
        lines += [f"arms.{name}.set.{line}" for line in _relations(arm, dag.config.student, shapes)]
        if "top_logits" in arm.needs:
            lines += _tops(arm, dag.config.store.top_logits, shapes)
        if any(term.candidates == "all" for term in arm.of_kind(LogitsConfig)):
            lines += [f"arms.{name}.set.{line}" for line in _vocabularies(arm, dag.config.student, shapes)]
    return list(dict.fromkeys(lines))


def _layers(arm: Arm, student: str, shapes: Mapping[str, Shape]) -> Iterator[str]:
    """Explicit layers, against the numbers that the models have."""
    own = shapes.get(student)
    for name, term in arm.loss.items():
        beyond = [
            n for n in getattr(term, "layers", None) or [] if own is not None and not -own.layers <= n < own.layers
        ]
        if own is not None and beyond:
            yield f"loss.{name}.layers: {beyond} not in the student ({student}), whose layers are 0 to {own.layers - 1}"
    for teacher in arm.teachers if "targets" in arm.needs and arm.layer.kind == "cka" else ():
        if teacher in shapes and arm.layer.k > shapes[teacher].layers:
            yield f"layer.k: {arm.layer.k} layers of the teacher {teacher}, which has {shapes[teacher].layers}"
    listed = arm.layer.layers
    if listed is None:
        return
    if own is not None and len(listed) != own.layers:
        yield f"layer.layers: {len(listed)} numbers; expected {own.layers}, one for each layer of the student ({student})"
    for teacher in (name for name in arm.teachers if name in shapes):
        last = shapes[teacher].layers - 1
        if max(listed) > last:
            yield f"layer.layers: {max(listed)} is not in the teacher {teacher}, whose layers are 0 to {last}"


def _identity(arm: Arm, student: str, shapes: Mapping[str, Shape]) -> Iterator[str]:
    """Heads and their dimension, which a cache that is taken as it is has in common with the student's."""
    if "targets" not in arm.needs or arm.fit.method != "identity" or student not in shapes:
        return
    own = shapes[student]
    for name in (name for name in arm.teachers if name in shapes):
        if (shapes[name].kv_heads, shapes[name].head_dim) != (own.kv_heads, own.head_dim):
            theirs = f"{shapes[name].kv_heads} heads of {shapes[name].head_dim} in {name}"
            yield f"fit.method: identity: {theirs}, {own.kv_heads} of {own.head_dim} in {student}; use ridge or pca"


def _relations(arm: Arm, student: str, shapes: Mapping[str, Shape]) -> Iterator[str]:
    """Relation heads, into which keys and values are divided anew."""
    for term, settings in arm.loss.items():
        for name in (student, *arm.teachers) if isinstance(settings, RelationsConfig) else ():
            width = shapes[name].kv_heads * shapes[name].head_dim if name in shapes else 0
            if width % settings.heads:
                yield f"loss.{term}.heads: {settings.heads} does not divide the {width} numbers of {name}'s keys"


def _vocabularies(arm: Arm, student: str, shapes: Mapping[str, Shape]) -> Iterator[str]:
    """Whole distributions are compared word by word."""
    for teacher in arm.teachers:
        if teacher in shapes and student in shapes and shapes[teacher].vocab != shapes[student].vocab:
            sizes = f"{teacher} has {shapes[teacher].vocab} words and {student} {shapes[student].vocab}"
            yield f"loss.logits.candidates: all needs one vocabulary; {sizes}. Set top, or loss.likelihood across tokenizers"


def _tops(arm: Arm, top: int, shapes: Mapping[str, Shape]) -> Iterator[str]:
    """Next tokens that are kept, against the vocabulary that they are of."""
    for teacher in arm.teachers:
        if teacher in shapes and top > shapes[teacher].vocab > 0:
            yield f"store.top_logits: {top} next tokens of {teacher}, whose vocabulary has {shapes[teacher].vocab}"
