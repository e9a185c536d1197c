"""Layer plans: weights sum to 1, the most similar layers are taken, and counting in a store's layers changes nothing."""

import json

import pytest
import torch
from tiny import encoded

from kvpipe.align.layer import proportional_map
from kvpipe.align.layermap import MEASURED, LayerPlan, layer_plan, write_layer_map
from kvpipe.config import LayerConfig

SRC, DST = 7, 3


@pytest.fixture
def similarity():
    return {kind: torch.rand(DST, SRC) for kind in MEASURED}


@pytest.mark.parametrize("k", [1, 2, 5, SRC + 4])
@pytest.mark.parametrize("temperature", [None, 0.1])
def test_cka_takes_the_most_similar_layers(tmp_path, similarity, k, temperature):
    write_layer_map(tmp_path / "map.json", "t", similarity, 11)
    plan = layer_plan(LayerConfig(kind="cka", k=k, temperature=temperature), SRC, DST, tmp_path / "map.json")
    assert plan.k == min(k, SRC) and plan.concat
    torch.testing.assert_close(plan.beta.sum(-1), torch.ones(2, DST))
    for number, kind in enumerate(("keys", "values")):
        for layer in range(DST):
            top = similarity[kind][layer].topk(min(k, SRC))
            assert plan.index[number, layer].tolist() == top.indices.tolist()
            weight = top.values if temperature is None else (top.values / temperature).exp()
            torch.testing.assert_close(plan.beta[number, layer], weight / weight.sum())


def test_the_written_map_says_what_the_default_arm_takes(tmp_path, similarity):
    write_layer_map(tmp_path / "below" / "map.json", "t", similarity, 11)
    document = json.loads((tmp_path / "below" / "map.json").read_text())
    plan = layer_plan(LayerConfig(kind="cka"), SRC, DST, tmp_path / "below" / "map.json")
    assert (document["src_layers"], document["dst_layers"], document["rows"]) == (SRC, DST, 11)
    assert document["top_k"]["values"]["layers"] == plan.index[1].tolist()
    torch.testing.assert_close(torch.tensor(document["similarity"]["keys"]), similarity["keys"])


def test_hidden_states_can_choose_for_keys_and_values(tmp_path, similarity):
    write_layer_map(tmp_path / "map.json", "t", similarity, 11)
    plan = layer_plan(LayerConfig(kind="cka", by="hidden", k=2), SRC, DST, tmp_path / "map.json")
    assert torch.equal(plan.index[0], plan.index[1])
    assert plan.index[0].tolist() == similarity["hidden"].topk(2).indices.tolist()


@pytest.mark.parametrize("k", [1, 2])
def test_only_layers_near_the_proportional_one_are_chosen_and_of_them_the_most_similar(tmp_path, similarity, k):
    write_layer_map(tmp_path / "map.json", "t", similarity, 11)
    for temperature in (None, 0.1):
        config = LayerConfig(kind="cka", k=k, near=1, temperature=temperature)
        plan = layer_plan(config, SRC, DST, tmp_path / "map.json")
        for kind, matrix in enumerate((similarity["keys"], similarity["values"])):
            for layer, centre in enumerate(proportional_map(SRC, DST)):
                candidates = [i for i in range(SRC) if abs(i - centre) <= 1]
                best = sorted(candidates, key=lambda i: -matrix[layer, i].item())[:k]
                assert set(plan.index[kind, layer][plan.beta[kind, layer] > 0].tolist()) <= set(best)
                assert plan.index[kind, layer, 0] == best[0]
        torch.testing.assert_close(plan.beta.sum(-1), torch.ones(2, DST))


def test_more_layers_than_are_near_is_refused():
    with pytest.raises(ValueError, match=r"layer.near: 1 leaves 2 teacher layers .* layer.k asks for 3"):
        LayerConfig(kind="cka", k=3, near=1)


def test_a_missing_map_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json.*kvpipe layer-map"):
        layer_plan(LayerConfig(kind="cka"), SRC, DST, tmp_path / "none.json")


def test_proportional_depth_keeps_order_and_ends_at_the_last_layer():
    for src, dst in ((7, 3), (3, 7), (5, 5), (1, 3)):
        plan = layer_plan(LayerConfig(), src, dst, None)
        chosen = plan.index[0, :, 0].tolist()
        assert chosen == sorted(chosen) and chosen[-1] == src - 1 and len(chosen) == dst
        assert torch.equal(plan.index[0], plan.index[1]) and plan.beta.unique().tolist() == [1]
    assert layer_plan(LayerConfig(), 5, 5, None).index[0, :, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("layers", [[0, 1], [0, 1, SRC]])
def test_a_list_that_does_not_fit_is_refused(layers):
    with pytest.raises(ValueError, match=f"expected {DST} numbers between 0 and {SRC - 1}"):
        layer_plan(LayerConfig(kind="list", layers=layers), SRC, DST, None)


def test_counting_in_stored_layers_names_the_same_layers():
    plan = LayerPlan(torch.tensor([[[6, 2], [4, 5]], [[2, 4], [6, 0]]]), torch.tensor([[[0.7, 0.3], [1, 0]]] * 2), True)
    assert plan.src_layers == [2, 4, 6]  # 5 and 0 weigh nothing
    stored = (1, 2, 4, 6)
    within = plan.within(stored)
    used = plan.beta > 0
    assert torch.tensor(stored)[within.index][used].tolist() == plan.index[used].tolist()
    assert torch.equal(within.beta, plan.beta) and within.concat
    assert within.index.max() < len(stored)
    with pytest.raises(ValueError, match=r"\[4\] are not in the store \(has \[2, 6\]\)"):
        plan.within((2, 6))


def test_the_step_measures_keys_values_and_hidden_states(tiny):
    from kvpipe.align.layer import linear_cka
    from kvpipe.cache.teacher import LiveRows
    from kvpipe.data.batches import spread
    from kvpipe.steps.layer_map import make_layer_map

    teacher = tiny.dag.teachers[0]
    make_layer_map(tiny, teacher)
    document = json.loads(tiny.paths.layer_map(teacher).read_text())
    assert set(document["similarity"]) == set(MEASURED)
    shape = (document["dst_layers"], document["src_layers"])
    for matrix in document["similarity"].values():
        assert torch.tensor(matrix).shape == shape and torch.isfinite(torch.tensor(matrix)).all()

    # hidden rows are the model's own hidden states, token by token
    from kvpipe.models.folders import load_model, load_tokenizer

    folder = tiny.paths.model(teacher)
    model, encoding = load_model(folder), encoded(tiny, teacher, "validation", "student")
    examples = spread(len(encoding), 3)
    layers, pad = tuple(range(shape[1])), load_tokenizer(folder).pad_token_id
    rows = LiveRows(model, encoding, (), pad, 3, layers).fetch(examples, ["hidden"])["hidden"]
    ids = torch.from_numpy(encoding.ids[encoding.rows(examples[0])])[None]
    own = torch.stack(model(ids, output_hidden_states=True).hidden_states[:-1])[:, 0]
    torch.testing.assert_close(rows[: ids.shape[1]], own.transpose(0, 1), atol=1e-5, rtol=1e-4)
    assert linear_cka(rows[:, 0], rows[:, 0]).item() == pytest.approx(1)
