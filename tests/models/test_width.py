"""Narrower models: what is left computes what the whole does without the rest, and what says most is left."""

import numpy as np
import pytest
import torch
from tiny import ALPHA, BETA, build
from torch import nn

from kvpipe.config import EvaluateConfig
from kvpipe.data.batches import Batch
from kvpipe.evaluate.score import evaluate
from kvpipe.models.folders import load_model
from kvpipe.models.quantized import GROUP, quantize
from kvpipe.models.width import narrow
from kvpipe.stats.metrics import METRICS
from kvpipe.steps.make import make


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.fixture
def work(tmp_path):
    entry = {"source": "pruned", "of": "beta", "layers": [0, 1, 4], "heads": 1, "channels": 17, "examples": 5}
    work = build(tmp_path, {"models.cut": entry})
    make(work, [work.paths.manifest("cut")], log=lambda *_: None)
    return work


def test_the_folder_computes_the_whole_without_the_rest(work):
    """Of `beta`: its other layers jumped over, its other heads' and channels' outputs made nothing."""
    import json

    made = json.loads(work.paths.manifest("cut").read_text(encoding="utf-8"))["source"]
    whole, cut = load_model(work.paths.model("beta")), load_model(work.paths.model("cut"))
    assert made["layers"] == [0, 1, 4] and len(made["width"]) == 3
    whole.model.layers = nn.ModuleList([whole.model.layers[i] for i in made["layers"]])
    whole.config.num_hidden_layers = 3
    group, dim = BETA["num_attention_heads"] // BETA["num_key_value_heads"], BETA["head_dim"]
    for layer, width in zip(whole.model.layers, made["width"], strict=True):
        assert len(width["heads"]) == 1 and len(width["channels"]) == 17
        for head in {0, 1} - set(width["heads"]):
            layer.self_attn.o_proj.weight.data[:, head * group * dim : (head + 1) * group * dim] = 0
        gone = sorted(set(range(BETA["intermediate_size"])) - set(width["channels"]))
        layer.mlp.down_proj.weight.data[:, gone] = 0
    ids = torch.arange(11)[None] + 20
    torch.testing.assert_close(logits(cut, ids), logits(whole, ids), atol=1e-4, rtol=1e-4)
    assert cut.config.num_key_value_heads == 1 and cut.config.head_dim == dim and cut.config.intermediate_size == 17


def test_what_says_nothing_goes_first_and_all_kept_is_the_model(work):
    ids = torch.arange(12).reshape(2, 6) + 20
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    batch = Batch(torch.arange(2).numpy(), ids, mask, ids)
    model = load_model(work.paths.model("alpha"))
    before, dim = logits(model, ids), ALPHA["head_dim"]
    narrow(model, [batch], ALPHA["num_key_value_heads"], ALPHA["intermediate_size"])
    assert torch.equal(logits(model, ids), before)
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data[dim : 2 * dim] = 0
        layer.mlp.up_proj.weight.data[[3, 8]] = 0
    planted = logits(model, ids)
    kept = narrow(model, [batch], 2, ALPHA["intermediate_size"] - 2)
    assert all(layer["heads"] == [0, 2] and not {3, 8} & set(layer["channels"]) for layer in kept)
    torch.testing.assert_close(logits(model, ids), planted, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="channels: 99 of 18"):
        narrow(model, [batch], None, 99)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("int4", 4)])
def test_weights_in_few_bits_are_the_nearest_of_their_levels(kind, bits):
    """Each row, or group of a row, has its own scale; no weight is further than half a level from what it was."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(2 * GROUP, 7, bias=False), nn.Linear(7, 5)

        def get_output_embeddings(self):
            return self.head

    model = Model()
    model.body.weight.data[3] *= 100
    before, head = model.body.weight.detach().clone(), model.head.weight.detach().clone()
    size = quantize(model, kind)
    assert torch.equal(model.head.weight, head)
    groups = before.reshape(7, -1, GROUP if kind == "int4" else 2 * GROUP)
    level = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    gap = (model.body.weight.reshape(groups.shape) - groups).abs()
    assert (gap <= 0.51 * level).all() and gap.max() > 0
    assert len(model.body.weight[0].unique()) <= 2**bits * groups.shape[1]
    assert size == 7 * 2 * GROUP * bits // 8 + groups.shape[0] * groups.shape[1] * 4 + (5 * 7 + 5) * 4


def test_int4_names_a_layer_that_does_not_divide(work):
    with pytest.raises(
        ValueError, match=r"int4 takes 32 weights at a time, and model\.layers\.0.* 36 inputs; use int8"
    ):
        quantize(load_model(work.paths.model("alpha")), "int4")


def test_scores_say_what_fewer_bits_cost(work):
    """Beside those of the student as it is; the metrics are their sums over bytes."""
    config = EvaluateConfig(variants=["int8"], scorer="none", batch_size=3)
    table = evaluate(work.paths.model("alpha"), work.records("test"), work.config.data.template, config, "cpu")
    cost = (table.nll_int8.sum() - table.nll.sum()) / np.log(2) / table.bytes.sum()
    assert 0 < abs(cost) < 0.05 * table.nll.sum() / table.bytes.sum()
    assert METRICS["loss_int8"].measure(table).mean() == pytest.approx(cost)
    size, small = (METRICS[name].measure(table).mean() for name in ("model_bytes", "model_bytes_int8"))
    assert size == sum(p.numel() * 4 for p in load_model(work.paths.model("alpha")).parameters()) and small < 0.7 * size
    assert "nll_int4" not in table
