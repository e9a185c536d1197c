"""kvpipe: distil the key/value caches of several teacher language models into one student.

What is exported here is the library; docs/library has its pages. Each name is imported when it is first asked for.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvpipe.align.dim import ElasticBottleneck as ElasticBottleneck
    from kvpipe.align.head import HeadMixer as HeadMixer
    from kvpipe.align.head import grouped_average as grouped_average
    from kvpipe.align.layer import cka_matrix as cka_matrix
    from kvpipe.align.layer import linear_cka as linear_cka
    from kvpipe.align.layer import proportional_map as proportional_map
    from kvpipe.align.layer import top_k_mix as top_k_mix
    from kvpipe.align.rope import Rope as Rope
    from kvpipe.align.rope import rebase as rebase
    from kvpipe.align.time import gather_time as gather_time
    from kvpipe.align.time import segment_weights as segment_weights
    from kvpipe.cache.capture import Recorder as Recorder
    from kvpipe.cache.capture import capture as capture
    from kvpipe.cache.convert import import_caches as import_caches
    from kvpipe.cache.store import Store as Store
    from kvpipe.config.kinds import FUSIONS as FUSIONS
    from kvpipe.config.kinds import PROJECTORS as PROJECTORS
    from kvpipe.config.kinds import TERMS as TERMS
    from kvpipe.distill.distiller import KV as KV
    from kvpipe.distill.distiller import DistillationMixin as DistillationMixin
    from kvpipe.distill.distiller import Distiller as Distiller
    from kvpipe.distill.distiller import Logits as Logits
    from kvpipe.distill.fusion import Fusion as Fusion
    from kvpipe.distill.fusion import build_fusion as build_fusion
    from kvpipe.distill.losses import kv_loss as kv_loss
    from kvpipe.distill.losses import logit_kd_loss as logit_kd_loss
    from kvpipe.distill.losses import relation_loss as relation_loss
    from kvpipe.distill.terms import HeadTerm as HeadTerm
    from kvpipe.distill.terms import Term as Term
    from kvpipe.distill.translate import translate_cache as translate_cache
    from kvpipe.tokens.matrix import common_prefix_positions as common_prefix_positions
    from kvpipe.tokens.matrix import overlap as overlap
    from kvpipe.tokens.spans import encode as encode
    from kvpipe.tokens.spans import token_bytes as token_bytes


def lazily(package: str, **homes: str) -> Callable[[str], Any]:
    """A package's `__getattr__` that imports the module of a name when the name is asked for: torch takes seconds."""

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return find


HOMES = {
    "align.dim": ("ElasticBottleneck",),
    "align.head": ("HeadMixer", "grouped_average"),
    "align.layer": ("cka_matrix", "linear_cka", "proportional_map", "top_k_mix"),
    "align.rope": ("Rope", "rebase"),
    "align.time": ("gather_time", "segment_weights"),
    "cache.capture": ("Recorder", "capture"),
    "cache.convert": ("import_caches",),
    "cache.store": ("Store",),
    "config.kinds": ("FUSIONS", "PROJECTORS", "TERMS"),
    "distill.distiller": ("KV", "DistillationMixin", "Distiller", "Logits"),
    "distill.fusion": ("Fusion", "build_fusion"),
    "distill.losses": ("kv_loss", "logit_kd_loss", "relation_loss"),
    "distill.terms": ("HeadTerm", "Term"),
    "distill.translate": ("translate_cache",),
    "tokens.matrix": ("common_prefix_positions", "overlap"),
    "tokens.spans": ("encode", "token_bytes"),
}
"""Module → the names of the library that it has."""
__all__ = sorted(name for names in HOMES.values() for name in names)
__getattr__ = lazily(__name__, **{name: module for module, names in HOMES.items() for name in names})
