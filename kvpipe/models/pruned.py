"""A model of some layers of another: chosen one by one by the loss that their removal costs, or at even distances; its
width is cut by `width`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from kvpipe.config import Config, PrunedModel
from kvpipe.data.batches import Batch, spread
from kvpipe.data.encoding import Encoding, encode_records
from kvpipe.data.records import Record
from kvpipe.experiment.device import resolve_precision
from kvpipe.models.folders import load_model, load_tokenizer, manifest_hash, save_model, weights_dtype
from kvpipe.models.likelihood import score, scoring_batches
from kvpipe.models.width import narrow

PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")
"""Fields of a config with one entry for each layer."""


def prune(entry: PrunedModel, whole: Path, texts: list[Record], config: Config, out: Path) -> dict[str, Any]:
    """Write a model folder with some layers, heads and channels of another; all else of it stays as it is.

    Args:
        entry: which layers, or how many and by what.
        whole: folder of the other model.
        texts: training records, for `by: greedy`.
        config: the experiment.
        out: where to.

    Returns:
        The manifest's `source`: the layers, under `greedy` the loss before and after each removal, and of a narrower model
        the heads and channels of every layer.

    Raises:
        ValueError: the model has fewer layers, or none that can be taken out one by one.
    """
    trust = config.trusts(entry.of)
    model = load_model(whole, dtype=weights_dtype(whole), trust=trust)
    layers = Layers(model)
    asked = entry.keep if entry.keep is not None else max(entry.layers or [0]) + 1
    if asked > len(layers):
        key = "layers" if entry.keep is None else "keep"
        raise ValueError(f"models: {key} asks for {asked} layers of {entry.of}, which has {len(layers)}")
    source: dict[str, Any] = {"source": "pruned", "of": entry.of, "of_manifest": manifest_hash(whole)}
    source["of_layers"] = len(layers)
    if entry.keep is None:
        kept = entry.layers or list(range(len(layers)))
    elif entry.by == "even":
        kept = even(len(layers), asked)
    else:
        kept, source["removed"] = greedy(
            layers, asked, _loss(entry, model, load_tokenizer(whole, trust), texts, config)
        )
    layers.keep(kept)
    if entry.heads is not None or entry.channels is not None:
        _, batches = _scored(entry, load_tokenizer(whole, trust), texts, config)
        source["width"] = narrow(model, batches, entry.heads, entry.channels)
    save_model(model, whole, out)
    return source | {"layers": kept}


def _loss(entry: PrunedModel, model, tokenizer, texts: list[Record], config: Config) -> Callable[[], float]:
    """Nats per token of reasoning and answer of some training texts, in the precision of the training."""
    encoding, batches = _scored(entry, tokenizer, texts, config)
    torch.set_num_threads(config.train.threads)

    def loss() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=resolve_precision(config.train.precision, "cpu") == "bf16"):
            return score(model, encoding, batches).mean_nll()

    return loss


def _scored(entry: PrunedModel, tokenizer, texts: list[Record], config: Config) -> tuple[Encoding, list[Batch]]:
    """The training texts that decide."""
    chosen = [texts[i] for i in spread(len(texts), entry.examples)]
    encoding = encode_records(chosen, tokenizer, config.data.template)
    return encoding, scoring_batches(encoding, tokenizer.pad_token_id, config.evaluate.batch_size)


class Layers:
    """The layers of a causal language model, of which some can be left.

    Raises:
        ValueError: it has no list of as many modules as its config has layers.
    """

    def __init__(self, model: PreTrainedModel):
        self.config = model.config.get_text_config(decoder=True)
        lists = (module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList))
        found = next((modules for modules in lists if len(modules) == self.config.num_hidden_layers), None)
        if found is None:
            count = self.config.num_hidden_layers
            raise ValueError(f"model type {self.config.model_type!r}: no list of {count} layers to take some out of")
        self.modules, self.whole = found, list(found)
        self.fields = {name: value for name in PER_LAYER if isinstance(value := getattr(self.config, name, None), list)}

    def __len__(self) -> int:
        return len(self.whole)

    def keep(self, kept: list[int]) -> None:
        """Leave the model the layers of these numbers, counted in the whole one; its config says so too."""
        del self.modules[:]
        self.modules.extend([self.whole[i] for i in kept])
        self.config.num_hidden_layers = len(kept)
        for name, values in self.fields.items():
            setattr(self.config, name, [values[i] for i in kept])


def even(count: int, keep: int) -> list[int]:
    """`keep` of `count` layers at even distances, the first and (of two or more) the last among them."""
    return np.linspace(0, count - 1, keep).round().astype(int).tolist()


def greedy(layers: Layers, keep: int, loss: Callable[[], float]) -> tuple[list[int], list[dict[str, Any]]]:
    """Take out, one after the other, the layer whose removal leaves the least loss, until `keep` are left.

    Args:
        layers: of the model, which is cut as it goes.
        keep: how many stay.
        loss: of the model as it then is, nats per token.

    Returns:
        The layers that stay; and what went: `layer` and the `loss` without it, in this order.
    """
    kept, removed = list(range(len(layers))), []
    while len(kept) > keep:
        losses = []
        for layer in kept:
            layers.keep([i for i in kept if i != layer])
            losses.append(loss())
        best = int(np.argmin(losses))
        removed.append({"layer": kept.pop(best), "loss": losses[best]})
    return kept, removed
