"""A teacher on the student's positions: the dense overlap matrices of each example, applied one by one."""

import numpy as np
import pytest
import torch
from tiny import build, encoded

from kvpipe.align.timemap import build_time_map
from kvpipe.cache import forward
from kvpipe.cache.teacher import AlignedTeacher, LiveRows, StoredRows, nats_of_spans
from kvpipe.config import TimeConfig
from kvpipe.data.batches import spread
from kvpipe.models.folders import load_model, load_tokenizer
from kvpipe.steps.train import prepare
from kvpipe.tokens.matrix import overlap

LAYERS = (1, 3, 4)


@pytest.fixture(scope="module")
def sides(tiny):
    folder = tiny.paths.model("beta")
    src = encoded(tiny, "beta", "train", "student")
    live = LiveRows(load_model(folder), src, LAYERS, load_tokenizer(folder).pad_token_id, 4)
    return live, src, tiny.student_encoding("train")


@pytest.mark.parametrize("mode", ["iou", "causal"])
def test_aligned_is_the_dense_overlap_of_each_example(sides, mode):
    live, src, dst = sides
    time = build_time_map(TimeConfig(mode=mode), src, dst)
    teacher = AlignedTeacher("beta", live, src, dst, time)
    assert teacher.layers == LAYERS
    examples = np.array([17, 3, 3, 24])
    length = int(dst.lengths[examples].max()) + 2
    found = teacher.aligned(examples, length)
    assert found.keys.shape == (4, length, 3, 2, 14)
    for row, example in enumerate(examples):
        spans = [torch.from_numpy(e.spans[e.rows(example)]) for e in (src, dst)]
        matrix = overlap(*spans, mode=mode).to_dense()
        count = len(matrix)
        for name, rows in live.fetch(np.array([example]), ["keys", "values"]).items():
            expected = torch.einsum("ds,slhc->dlhc", matrix, rows)
            torch.testing.assert_close(found.columns[name][row, :count], expected, atol=2e-4, rtol=1e-4)
            assert not found.columns[name][row, count:].any()
        assert torch.equal(found.mask[row, :count], matrix.sum(1) > 0)
        assert not found.mask[row, count:].any()


def test_a_batch_is_its_examples(sides):
    """Neither the other examples of a batch nor the padded length have an influence."""
    live, src, dst = sides
    teacher = AlignedTeacher("beta", live, src, dst, build_time_map(TimeConfig(), src, dst))
    examples = np.arange(0, len(dst), 4)
    length = int(dst.lengths.max())
    together = teacher.aligned(examples, length)
    for row, example in enumerate(examples):
        alone = teacher.aligned(np.array([example]), length + 3)
        torch.testing.assert_close(alone.keys[0, :length], together.keys[row], atol=2e-4, rtol=1e-4)
        assert torch.equal(alone.mask[0, :length], together.mask[row])


def test_a_shuffled_example_is_the_other_ones_cache(sides):
    live, src, dst = sides
    source = np.roll(np.arange(len(dst)), 1)
    config = TimeConfig(kind="segment")
    shuffled = AlignedTeacher("beta", live, src, dst, build_time_map(config, src, dst, source))
    asked = []
    fetch = live.fetch

    class Watched(LiveRows):
        def __init__(self):
            self.layers = live.layers

        def fetch(self, examples, columns):
            asked.append(examples.tolist())
            return fetch(examples, columns)

    shuffled.source = Watched()
    found = shuffled.aligned(np.array([5, 9]), int(dst.lengths.max()))
    assert asked == [[4, 8]]
    keys = fetch(np.array([4]), ["keys"])["keys"]
    at = dst.segments[5, 0, 1] - 1  # the last prompt token reads the last prompt token
    torch.testing.assert_close(found.keys[0, at], keys[src.segments[4, 0, 1] - 1], atol=2e-4, rtol=1e-4)


def test_stored_and_live_rows_agree(tiny):
    prepare(tiny, "two", log=lambda *_: None)
    src = encoded(tiny, "alpha", "train", "student")
    folder = tiny.paths.model("alpha")
    stored = StoredRows(tiny.store("alpha", "student"), src.offsets)
    live = LiveRows(load_model(folder), src, stored.layers, load_tokenizer(folder).pad_token_id, 4)
    examples = np.array([8, 1, 20])
    both = ("keys", "values")
    for a, b in zip(*(rows.fetch(examples, both).values() for rows in (stored, live)), strict=True):
        assert a.shape == b.shape == (src.lengths[examples].sum(), 4, 3, 8)
        assert ((a - b).abs() <= b.abs() * 2**-8 + 2e-3).all()


def test_nats_are_shared_out_over_bytes():
    """What teacher tokens cost is spread over their bytes, and each student token is told the sum of its own."""
    nats = np.array([0.0, 3.0, 1.0, 4.0])
    src = np.array([[0, 0], [0, 3], [3, 4], [4, 8]])  # the first is a BOS
    dst = np.array([[0, 1], [1, 4], [4, 4], [4, 6], [6, 8]])
    assert nats_of_spans(nats, src, dst).tolist() == [1.0, 3.0, 0.0, 2.0, 2.0]
    assert nats_of_spans(nats[:1], src[:1], dst).tolist() == [0.0] * 5


def test_a_teachers_nats_on_the_students_tokens_add_up_to_its_loss(sides):
    live, src, dst = sides
    teacher = AlignedTeacher("beta", live, src, dst, build_time_map(TimeConfig(), src, dst))
    examples, length = np.array([3, 20]), int(dst.lengths.max())
    found = teacher.aligned(examples, length, ["nll"])
    torch.testing.assert_close(found.columns["nll"].sum(1), found.loss, atol=1e-3, rtol=1e-4)
    for row, example in enumerate(examples):
        ids = torch.from_numpy(src.ids[src.rows(example)])[None]
        with torch.no_grad():
            expected = live.model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
        torch.testing.assert_close(found.loss[row], expected, atol=1e-3, rtol=1e-4)
        ends = set(src.spans[src.rows(example)][:, 1].tolist())
        spans = dst.spans[dst.rows(example)].tolist()
        expected = [float(stop in ends and stop > start) for start, stop in spans]
        assert found.columns["ends"][row, : len(expected)].tolist() == expected


def test_live_rows_read_no_more_texts_at_once_than_the_store_does(tmp_path, monkeypatch):
    """A fit asks for all its examples in one call."""
    changed = {"store": {"mode": "live", "batch_size": 3}, "arms.one.set.fit": {"method": "pca", "examples": 8}}
    work = build(tmp_path, changed)
    read = []
    collate = forward.collate

    def counted(encoding, examples, pad_id):
        read.append(len(examples))
        return collate(encoding, examples, pad_id)

    monkeypatch.setattr(forward, "collate", counted)
    prepare(work, "one", log=lambda *_: None)
    assert read[-3:] == [3, 3, 2] and max(read) == 3


def test_spread_covers_both_ends_evenly():
    assert spread(100, 5).tolist() == [0, 24, 49, 74, 99]
    assert spread(3, 10).tolist() == [0, 1, 2]
    assert len(spread(2000, 500)) == 500
