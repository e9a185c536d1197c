"""The store gives back what the teacher computed: within rounding, whatever batch, shard or padding it came from."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import encoded

from kvpipe.cache import forward, store
from kvpipe.cache.capture import capture
from kvpipe.cache.forward import Keep, forward_rows, next_tokens
from kvpipe.cache.rowfile import RowFile
from kvpipe.cache.store import Store, StoreKey, attention_cosine, pack, shard_bounds, unpack, write_index
from kvpipe.config import StoreConfig
from kvpipe.models import head
from kvpipe.models.folders import load_model

ROW, LAYER, HEAD, DIM = 11, 3, 2, 14
TOP = 5
# of the largest number of a head: half a unit in the last place of 8 and 11 bits of precision, half of one of 127 levels
ERROR = {"bf16": 2**-8, "fp16": 2**-11, "int8": 0.5 / 127}


@pytest.fixture(scope="module")
def teacher(tiny):
    """Model, encoding and pad id of `beta`."""
    folder = tiny.paths.model("beta")
    return load_model(folder), encoded(tiny, "beta", "train", "student"), tiny.student_tokenizer.pad_token_id


def key_of(dtype="bf16", shards=1, **changes):
    values = {
        "model": "m",
        "data": "d",
        "layers": (0, 2, 4),
        "reading": "student",
        "dtype": dtype,
        "top_logits": TOP,
        "nll": True,
    }
    return StoreKey(**{**values, "shards": shards, **changes})


def build(teacher, folder, key, batch_size=7):
    model, encoding, pad = teacher
    paths = [folder / f"shard-{i:05d}.safetensors" for i in range(key.shards)]
    config = StoreConfig(dtype=key.dtype, shards=key.shards, batch_size=batch_size, top_logits=key.top_logits)
    for number, path in enumerate(paths):
        store.build_shard(model, encoding, key, config, number, path, pad)
    write_index(folder, key, paths)
    return paths


@pytest.fixture(scope="module")
def live(teacher):
    model, encoding, pad = teacher
    return forward_rows(model, encoding, np.arange(len(encoding)), Keep(key_of().layers, True, TOP), 64, pad)


# ---------------------------------------------------------------- storage types
@pytest.mark.parametrize("dtype", ERROR)
def test_packing_loses_no_more_than_rounding(dtype):
    x = torch.randn(ROW, LAYER, HEAD, DIM) * torch.logspace(-2, 2, ROW)[:, None, None, None]
    packed = pack(x, dtype)
    back = unpack(packed[""], packed.get(".scale"))
    assert back.dtype == torch.float32 and back.shape == x.shape
    # int8's scale is itself rounded to fp16
    largest = x.abs().amax(-1, keepdim=True)
    assert ((back - x).abs() <= largest * (ERROR[dtype] + (2**-11 if dtype == "int8" else 0)) + 1e-7).all()
    assert ((back - x).abs() > 0).any()
    again = pack(back, dtype)
    torch.testing.assert_close(unpack(again[""], again.get(".scale")), back, rtol=2**-10, atol=1e-7)


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-6, 1e-4, 1.0, 1e4])
def test_int8_keeps_small_and_large_heads(scale):
    x = torch.randn(ROW, LAYER, HEAD, DIM) * scale
    packed = pack(x, "int8")
    back = unpack(packed[""], packed[".scale"])
    assert torch.isfinite(back).all()
    assert (back - x).abs().max() <= max(x.abs().max().item() * 0.01, 1e-7)


def test_fp16_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match=r"1e\+05.*fp16.*bf16"):
        pack(torch.full((ROW, LAYER, HEAD, DIM), 1e5), "fp16")
    with pytest.raises(ValueError, match=r"1e\+08.*int8"):
        pack(torch.full((ROW, LAYER, HEAD, DIM), 1e8), "int8")
    with pytest.raises(ValueError, match="nan"):
        pack(torch.full((ROW, LAYER, HEAD, DIM), torch.nan), "bf16")


def test_attention_cosine_is_one_for_the_same_cache_and_less_for_another():
    keys, values = torch.randn(2, ROW, LAYER, HEAD, DIM)
    assert attention_cosine(keys, values, keys, values) == pytest.approx(1, abs=1e-6)
    assert attention_cosine(keys, values, keys, -values) == pytest.approx(-1, abs=1e-6)
    coarse, fine = (attention_cosine(keys, values, keys, values + e * torch.randn_like(values)) for e in (1, 0.01))
    assert coarse < 0.9 < 0.999 < fine


def test_the_estimate_covers_what_is_written(teacher, tmp_path):
    keys = [key_of(dtype) for dtype in ERROR] + [key_of("int8", states=True, hidden=(1, 3), top_logits=0)]
    for number, key in enumerate(keys):
        (path,) = build(teacher, tmp_path / str(number), key)
        need = store.size(key, StoreConfig(dtype=key.dtype), teacher[0].config, len(teacher[1].ids))
        assert 0.8 * need < path.stat().st_size < need + 10_000


def test_the_budget_is_checked_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(RuntimeError, match=r"teacher beta.*2\.00 GB.*budget_gb is 1\.5"):
        store.check_budget(StoreConfig(budget_gb=1.5), "beta", int(2e9), tmp_path)
    with pytest.raises(RuntimeError, match="free"):
        store.check_budget(StoreConfig(budget_gb=1e12), "beta", int(1e20), tmp_path)
    store.check_budget(StoreConfig(budget_gb=1.5), "beta", int(1e6), tmp_path)


def test_the_step_writes_nothing_over_budget(tiny, tmp_path):
    from tiny import config

    from kvpipe.steps.inputs import Inputs
    from kvpipe.steps.teacher_kv import make_shard

    work = Inputs(config(tmp_path, {"store.budget_gb": 1e-6}), tiny.paths)
    path = work.paths.shard("alpha", "own", 0)
    with pytest.raises(RuntimeError, match=r"store\.budget_gb"):
        make_shard(work, "alpha", "own", "0")
    assert not path.exists()


# ---------------------------------------------------------------- rows
def test_rows_are_the_capture_of_each_example_alone(teacher, live):
    model, encoding, _ = teacher
    for example in (0, 13, len(encoding) - 1):
        rows = encoding.rows(example)
        ids = torch.from_numpy(encoding.ids[rows])[None]
        kv = capture(model, ids)
        for found, alone in ((live.keys, kv.keys), (live.values, kv.values)):
            expected = alone[[0, 2, 4], 0].permute(2, 0, 1, 3)
            torch.testing.assert_close(found[rows], expected, atol=2e-5, rtol=1e-4)
        logprobs = model(ids).logits[0].log_softmax(-1)
        nll = -logprobs[:-1].gather(-1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(live.nll[rows], torch.cat([torch.zeros(1), nll]), atol=2e-4, rtol=1e-4)
        top = logprobs.topk(TOP)
        assert (live.top_ids[rows].long() == top.indices).float().mean() > 0.99
        torch.testing.assert_close(live.top_logprobs[rows].float(), top.values, atol=1e-2, rtol=2e-3)


def test_batch_size_and_order_do_not_change_rows(teacher, live):
    model, encoding, pad = teacher
    examples = np.array([9, 2, 20, 4])
    rows = np.concatenate([np.arange(len(encoding.ids))[encoding.rows(e)] for e in examples])
    for batch_size in (1, 3):
        found = forward_rows(model, encoding, examples, Keep(key_of().layers, True), batch_size, pad)
        for name in ("keys", "values", "nll"):
            torch.testing.assert_close(getattr(found, name), getattr(live, name)[rows], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ERROR)
def test_stored_rows_are_the_live_rows(teacher, live, tmp_path, dtype):
    build(teacher, tmp_path, key_of(dtype))
    found = Store(tmp_path)
    assert found.layers == (0, 2, 4)
    for name in ("keys", "values"):
        exact = getattr(live, name)
        bound = exact.abs().amax(-1, keepdim=True) * (ERROR[dtype] + 2**-11) + 2e-4
        assert ((found.rows(name) - exact).abs() <= bound).all()
    torch.testing.assert_close(found.rows("nll"), live.nll, atol=2e-4, rtol=1e-4)
    assert 0.99 < found.index["attention_cosine"] <= 1 + 1e-6
    assert found.index["rows"] == len(teacher[1].ids)


def test_several_shards_hold_what_one_holds(teacher, tmp_path):
    build(teacher, tmp_path / "one", key_of())
    build(teacher, tmp_path / "many", key_of(shards=5))
    one, many = Store(tmp_path / "one"), Store(tmp_path / "many")
    rows = torch.randint(len(teacher[1].ids), (97,))
    for name in ("keys", "values", "nll", "top_ids", "top_logprobs"):
        everything = many.rows(name)
        if name == "top_ids":
            assert torch.equal(everything, one.rows(name))
        else:
            # bf16 may round the last bit otherwise where the batches were others
            torch.testing.assert_close(everything, one.rows(name), atol=2e-3, rtol=1e-2)
        assert torch.equal(many.rows(name, rows), everything[rows])
    assert torch.equal(many.rows("nll", torch.tensor([3])), many.rows("nll")[3:4])
    assert len(many.rows("keys", rows[:0])) == 0


@pytest.mark.parametrize("examples, shards", [(11, 3), (5, 5), (7, 1), (100, 8)])
def test_shards_are_near_equal_consecutive_parts(examples, shards):
    bounds = [shard_bounds(examples, shards, i) for i in range(shards)]
    assert bounds[0][0] == 0 and bounds[-1][1] == examples
    assert all(a[1] == b[0] for a, b in pairwise(bounds))
    sizes = [b - a for a, b in bounds]
    assert max(sizes) - min(sizes) <= 1
    with pytest.raises(ValueError, match=f"shard {shards} of {shards}"):
        shard_bounds(examples, shards, shards)


def test_more_shards_than_examples_is_an_error_that_names_both(teacher, tmp_path):
    with pytest.raises(ValueError, match=r"store.shards 29.*28 examples"):
        build(teacher, tmp_path, key_of(shards=29))


# ---------------------------------------------------------------- resuming and damage
def test_a_finished_shard_is_kept_and_one_of_another_key_built_again(teacher, tmp_path):
    first, second = build(teacher, tmp_path, key_of(shards=2))
    before = first.stat().st_mtime_ns, second.stat().st_mtime_ns
    second.unlink()
    (tmp_path / "shard-00001.safetensors.partial").write_bytes(b"what an interrupted job left")
    build(teacher, tmp_path, key_of(shards=2))
    assert first.stat().st_mtime_ns == before[0] and second.stat().st_mtime_ns != before[1]
    Store(tmp_path)
    assert not list(tmp_path.glob("*.partial"))
    build(teacher, tmp_path, key_of("int8", shards=2))
    assert load_file(first)["keys"].dtype == torch.int8


def test_an_index_refuses_a_shard_of_another_key(teacher, tmp_path):
    paths = build(teacher, tmp_path, key_of(shards=2))
    with pytest.raises(ValueError, match=r"shard-00000.*built for.*'m'.*expected.*other.*build it again"):
        write_index(tmp_path, key_of(shards=2, model="other"), paths)
    with pytest.raises(ValueError, match="shard-00001"):
        write_index(tmp_path, key_of(shards=2), paths[::-1])
    paths[1].unlink()
    with pytest.raises(ValueError, match=r"shard-00001.*None"):
        write_index(tmp_path, key_of(shards=2), paths)
    paths[1].write_bytes(paths[0].read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"shard-00001.*unreadable"):
        write_index(tmp_path, key_of(shards=2), paths)


def test_damage_is_a_clear_error(teacher, tmp_path):
    with pytest.raises(FileNotFoundError, match="kvpipe teacher-kv"):
        Store(tmp_path)
    (path,) = build(teacher, tmp_path, key_of())
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=r"shard-00000.*truncated"):
        Store(tmp_path)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"shard-00000.*damaged.*`kvpipe teacher-kv --teacher"):
        Store(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-00000.*missing"):
        Store(tmp_path)


def test_a_shard_cut_off_while_it_was_written_is_built_again(teacher, tmp_path):
    (path,) = build(teacher, tmp_path, key_of())
    path.write_bytes(path.read_bytes()[:100])
    build(teacher, tmp_path, key_of())
    Store(tmp_path)


def test_the_index_is_readable_and_names_what_is_missing(teacher, tmp_path):
    build(teacher, tmp_path, key_of(top_logits=0))
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["key"]["layers"] == [0, 2, 4] and index["bytes_per_token"] > 3 * 2 * 2 * 14 * 2
    with pytest.raises(KeyError, match=r"no top_ids.*has.*keys"):
        Store(tmp_path).rows("top_ids")


def test_next_tokens_piece_by_piece_are_those_of_the_whole(monkeypatch):
    """The oracle is one log-softmax over everything, and the text's own tokens."""
    states, ids, first = torch.randn(12, 11), torch.randint(11, (12,)), torch.tensor([0, 5, 6])
    logprobs = states.log_softmax(-1)
    expected = torch.stack([-logprobs[i - 1, ids[i]] if i not in first else torch.zeros(()) for i in range(12)])
    best = logprobs.topk(4, dim=-1)
    for piece in (1, 11, 11 * 5, 10**6):
        monkeypatch.setattr(head, "PIECE", piece)
        nll, found, values = next_tokens(head.Head(), states, ids, first, 4)
        torch.testing.assert_close(nll, expected)
        assert torch.equal(found, best.indices)
        torch.testing.assert_close(values, best.values)
        assert next_tokens(head.Head(), states, ids, first, 0)[1].shape == (12, 0)


# ---------------------------------------------------------------- what is computed
@pytest.mark.parametrize("vocab", [5 * forward.GROUP * 4, 5 * forward.GROUP * 4 + 1, 9001])
def test_the_likeliest_are_those_of_topk(vocab):
    logits = torch.randn(ROW, vocab)
    logits[0, -3:], logits[1] = torch.tensor([7.0, 9.0, 8.0]), logits[1].bfloat16().float()  # at the end; many equal
    values, ids = forward.likeliest(logits, TOP)
    expected = logits.topk(TOP)
    assert torch.equal(values, expected.values) and torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == TOP for row in ids.tolist())
    distinct = torch.arange(ROW) != 1
    assert torch.equal(ids[distinct], expected.indices[distinct])


def test_no_logits_are_made_where_nothing_of_them_is_kept(teacher, tmp_path, monkeypatch):
    def none(self, raw):
        raise AssertionError(f"logits of {len(raw)} rows")

    model = teacher[0]
    found = head.Head.of(model)
    monkeypatch.setattr(head.Head, "of", classmethod(lambda cls, model: found))
    monkeypatch.setattr(head.Head, "raw", none)
    vocab = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: vocab.append(out.numel()))
    build(teacher, tmp_path, key_of(top_logits=0, nll=False))
    hook.remove()
    assert vocab and not any(vocab)
    assert set(load_file(tmp_path / "shard-00000.safetensors")) == {"keys", "values"}
    with pytest.raises(AssertionError, match="logits"):
        build(teacher, tmp_path, key_of(top_logits=0))


def test_final_states_give_the_logits_of_the_whole_vocabulary(teacher, tmp_path):
    model, encoding, _ = teacher
    build(teacher, tmp_path, key_of(top_logits=0, states=True))
    found = Store(tmp_path)
    states = found.rows("states", torch.arange(encoding.offsets[5], encoding.offsets[6])).float()
    with torch.no_grad():
        expected = model(torch.from_numpy(encoding.ids[encoding.rows(5)])[None]).logits[0]
    divergence = torch.nn.functional.kl_div(
        head.Head.of(model).logits(states).log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert divergence.abs().max() < 1e-4, "bf16 of the states alone is between them"


def test_batches_are_sized_by_tokens(teacher, monkeypatch):
    """As many as there is room for, padding counted, and the longest texts first."""
    model, encoding, pad = teacher
    longest = int(encoding.lengths.max())
    sizes = []
    hook = model.register_forward_pre_hook(
        lambda _m, _a, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    numbers = forward.batch_tokens(model, head.Head.of(model), 3)
    assert numbers == forward.MOST["cpu"], "a tiny model has room for all that is useful"
    monkeypatch.setitem(forward.MOST, "cpu", 3 * longest)
    sizes.clear()
    list(forward.forward_batches(model, encoding, np.arange(len(encoding)), forward.Keep((0,)), 99, pad))
    hook.remove()
    sizes = sizes[1:]  # the first looks at the head
    assert sizes[0] == (3, longest) and all(rows * time <= 3 * longest for rows, time in sizes)
    assert [time for _, time in sizes] == sorted((time for _, time in sizes), reverse=True)
    monkeypatch.setitem(forward.ROOM, "cpu", 1e5)
    few, all_layers = (forward.batch_tokens(model, head.Head.of(model), n) for n in (1, 5))
    assert all_layers < few < 3 * longest
    assert forward.batch_tokens(model, head.Head(), 1) < few, "logits count where the head is unknown"


def test_a_shard_is_one_process_s(teacher, tmp_path):
    """Another that builds it is refused and leaves it whole."""
    path = tmp_path / "shard-00000.safetensors"
    with RowFile(path), pytest.raises(OSError, match=r"shard-00000.*another process"):
        build(teacher, tmp_path, key_of())
    build(teacher, tmp_path, key_of())
    assert Store(tmp_path).layers == (0, 2, 4)


def test_rows_may_be_written_in_any_order(tmp_path):
    columns = {"a": (torch.bfloat16, (7, 3)), "b": (torch.int8, (7,)), "c": (torch.float32, (7, 2, 2))}
    expected = {"a": torch.randn(7, 3).bfloat16(), "b": torch.arange(7).to(torch.int8), "c": torch.randn(7, 2, 2)}
    path = tmp_path / "rows.safetensors"
    with RowFile(path) as file:
        file.begin(columns, {"known": "before"})
        for rows in (slice(4, 7), slice(0, 1), slice(1, 4)):
            for name, tensor in expected.items():
                file.write(name, rows.start, tensor[rows])
        assert not path.exists()
        file.finish({"late": "after"})
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, expected[name])
    with safe_open(path, framework="pt") as handle:
        assert handle.metadata() == {"known": "before", "late": "after"}
    with pytest.raises(RuntimeError, match="no more"), RowFile(path):
        raise RuntimeError("no more")
    assert [p.name for p in tmp_path.iterdir()] == ["rows.safetensors"]
