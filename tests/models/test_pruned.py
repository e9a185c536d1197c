"""Pruned models: the layers that are asked for, greedy by the loss, and a folder that computes what the cut model does."""

import numpy as np
import pytest
import torch
from tiny import build, config

from kvpipe.align.layermap import at_kept_depth, layer_plan
from kvpipe.cache.capture import capture
from kvpipe.config import ConfigError, LayerConfig
from kvpipe.models.folders import load_model
from kvpipe.models.pruned import Layers, even, greedy
from kvpipe.steps.make import make
from kvpipe.steps.projectors import fitted
from kvpipe.steps.train import prepare

GEMMA = {
    "model_type": "gemma3_text",
    "hidden_size": 28,
    "intermediate_size": 20,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "max_position_embeddings": 512,
}


def pruned(tmp_path, **entry):
    """The folder of a model cut from `beta` (5 layers), and the one of `beta`."""
    work = build(tmp_path, {"models.cut": {"source": "pruned", "of": "beta", **entry}, "evaluate.batch_size": 5})
    make(work, [work.paths.manifest("cut")], log=lambda *_: None)
    return work.paths.model("cut"), work.paths.model("beta"), work


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def by_hand(model, tokens, kept):
    """The whole model's forward with the other layers jumped over."""
    inner = model.model
    states = inner.embed_tokens(tokens)
    positions = torch.arange(tokens.shape[1])[None]
    turned = inner.rotary_emb(states, positions)
    with torch.no_grad():
        for layer in kept:
            states = inner.layers[layer](states, position_embeddings=turned, position_ids=positions)
        return model.lm_head(inner.norm(states))


def test_the_folder_holds_the_layers_and_all_else_of_the_whole(tmp_path):
    folder, whole, work = pruned(tmp_path, layers=[0, 2, 3])
    tokens = torch.arange(7)[None] + 20
    torch.testing.assert_close(logits(load_model(folder), tokens), by_hand(load_model(whole), tokens, [0, 2, 3]))
    assert (folder / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()
    assert (
        work.student_tokenizer is not None
        and work.tokenizer("cut")("a b").input_ids == work.tokenizer("beta")("a b").input_ids
    )


def test_greedy_takes_out_what_costs_the_least_one_after_the_other(tmp_path):
    folder, whole, work = pruned(tmp_path, keep=3, examples=7)
    # brute force: every removal, twice, by the loss that the model's own labels give
    from kvpipe.data.batches import spread
    from kvpipe.data.encoding import encode_records
    from kvpipe.experiment.files import read_json

    records = work.records("train")
    encoding = encode_records(
        [records[i] for i in spread(len(records), 7)], work.tokenizer("beta"), work.config.data.template
    )
    model = load_model(whole)

    def loss(kept):
        nats = count = 0.0
        for example in range(len(encoding)):
            ids = torch.from_numpy(encoding.ids[encoding.rows(example)])[None]
            logp = by_hand(model, ids, kept).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            spans = encoding.spans[encoding.rows(example)]
            counted = torch.from_numpy((spans[:, 1] > spans[:, 0])[1:])
            counted &= torch.arange(1, ids.shape[1]) >= int(encoding.segments[example, 0, 1])
            nats, count = nats - float(logp[counted].sum()), count + int(counted.sum())
        return nats / count

    kept, expected = list(range(5)), []
    while len(kept) > 3:
        losses = {layer: loss([i for i in kept if i != layer]) for layer in kept}
        best = min(losses, key=losses.__getitem__)
        kept.remove(best)
        expected.append((best, losses[best]))
    source = read_json(folder / "MANIFEST.json", "")["source"]
    assert source["layers"] == kept
    assert [step["layer"] for step in source["removed"]] == [layer for layer, _ in expected]
    assert [step["loss"] for step in source["removed"]] == pytest.approx([value for _, value in expected], rel=1e-4)


def test_a_model_whose_layers_are_of_several_types_keeps_each_its_type(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    values = dict(GEMMA, vocab_size=61)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).eval()
    layers = Layers(model)
    layers.keep([1, 2, 4])
    assert model.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    tokens = torch.randint(61, (1, 23))
    before = logits(model, tokens)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), tokens), before)
    layers.keep(list(range(5)))
    assert model.config.layer_types == GEMMA["layer_types"] and model.config.num_hidden_layers == 5


@pytest.mark.parametrize(
    ("count", "keep", "layers"), [(30, 6, [0, 6, 12, 17, 23, 29]), (5, 1, [0]), (4, 4, [0, 1, 2, 3])]
)
def test_even_distances(count, keep, layers):
    assert even(count, keep) == layers


def test_greedy_of_a_planted_loss_finds_the_useless_layers():
    worth = [5.0, 0.1, 2.0, 0.3, 4.0]

    class Planted(Layers):
        def __init__(self):
            self.kept = list(range(5))

        def __len__(self):
            return 5

        def keep(self, kept):
            self.kept = kept

    layers = Planted()
    kept, removed = greedy(layers, 2, lambda: 20 - sum(worth[i] for i in layers.kept))
    assert kept == [0, 4] and [step["layer"] for step in removed] == [1, 3, 2]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({}, "give either layers, or keep"),
        ({"layers": [0], "keep": 2}, "give either layers, or keep"),
        ({"layers": [2, 1]}, "do not rise"),
        ({"of": "student", "keep": 2}, "models.cut.of: 'student' has no weights of its own"),
        ({"of": "betta", "keep": 2}, "models.cut.of: unknown name 'betta'.*beta"),
    ],
)
def test_a_pruned_model_that_cannot_be_is_one_line(tmp_path, entry, said):
    with pytest.raises(ConfigError, match=said):
        config(tmp_path, {"models.cut": {"source": "pruned", "of": "beta"} | entry})


def test_more_layers_than_there_are(tmp_path):
    with pytest.raises(ValueError, match="keep asks for 9 layers of beta, which has 5"):
        pruned(tmp_path, keep=9)


def test_kept_layers_are_the_whole_models_own_and_of_others_those_at_their_depth():
    source = {"source": "pruned", "layers": [0, 2, 9], "of_layers": 10}
    kept = LayerConfig(kind="kept")
    assert at_kept_depth(kept, 10, source).layers == [0, 2, 9]
    assert at_kept_depth(kept, 28, source).layers == [0, 6, 27]
    assert layer_plan(at_kept_depth(kept, 28, source), 28, 3, None).src_layers == [0, 6, 27]
    assert at_kept_depth(LayerConfig(), 10, {}) == LayerConfig()
    with pytest.raises(ValueError, match="kept needs a student of source: pruned"):
        at_kept_depth(kept, 10, {"source": "local"})


@pytest.mark.parametrize("fit", [{"method": "identity"}, {"method": "ridge", "basis": "whole", "ridge": 1e-6}])
def test_a_whole_model_teaches_what_was_cut_from_it(tmp_path, fit):
    """The first layer's cache follows from the embedding alone: there the student has its target before any step."""
    arm = {"teachers": ["beta"], "layer.kind": "kept", "fit": fit, "loss": {"keys": {}, "values": {}}}
    entry = {"source": "pruned", "of": "beta", "layers": [0, 3, 4]}
    work = build(tmp_path, {"models.student": entry, "arms": {"control": {}, "heal": {"base": "control", "set": arm}}})
    prepare(work, "heal", log=lambda *_: None)
    teacher = work.aligned_teacher(work.dag.arm("heal"), "beta")
    (projector,) = fitted(work, work.dag.arm("heal"), [teacher.layers])
    encoding = work.student_encoding("train")
    length = int(encoding.lengths[2])
    aligned = teacher.aligned(np.array([2]), length)
    target, mask = projector(aligned.keys, aligned.values), aligned.mask[0]
    tokens = torch.from_numpy(encoding.ids[encoding.rows(2)])[None]
    own, whole = capture(work.student(0), tokens), capture(load_model(work.paths.model("beta")), tokens)
    for mine, theirs in ((own.keys, target.keys), (own.values, target.values)):
        off = (mine - theirs)[..., mask, :].square().mean((1, 2, 3, 4)) / mine[..., mask, :].square().mean((1, 2, 3, 4))
        assert off[0] < 1e-4 and off[1:].min() > 1e-2, "stored in bfloat16"
    for theirs, targets in ((whole.keys, target.keys), (whole.values, target.values)):
        torch.testing.assert_close(targets[..., mask, :], theirs[[0, 3, 4]][..., mask, :], rtol=0.05, atol=0.05)


def test_the_whole_models_basis_is_for_students_with_all_its_heads(tmp_path):
    arms = {"control": {}, "heal": {"set": {"teachers": ["beta"], "loss": {"keys": {}}, "fit.basis": "whole"}}}
    with pytest.raises(ConfigError, match=r"fit\.basis: whole is for .* that keeps all heads; student is none"):
        config(tmp_path, {"arms": arms})
    entry = {"source": "pruned", "of": "beta", "heads": 1}
    with pytest.raises(ConfigError, match="that keeps all heads; student is none"):
        config(tmp_path, {"arms": arms, "models.student": entry})


def test_kept_is_for_pruned_students(tmp_path):
    with pytest.raises(ConfigError, match=r"layer\.kind: kept is for a student of source: pruned; student is none"):
        config(tmp_path, {"arms.kept": {"base": "one", "set": {"layer.kind": "kept"}}})
