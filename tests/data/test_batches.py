"""Batches: every example once an epoch, the same order for every arm of a seed, little padding."""

import numpy as np
import pytest
import torch

from kvpipe.data.batches import IGNORE, collate, schedule
from kvpipe.data.encoding import Encoding, concatenated_ranges


def encoding_of(lengths, prompt=2):
    lengths = np.array(lengths, dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.arange(offsets[-1]) + 10
    zero = np.zeros((len(lengths), 3), dtype=np.int64)
    segments = np.stack([np.array([[0, prompt], [prompt, n], [n, n]]) for n in lengths])
    return Encoding(ids, np.stack([ids, ids + 1], 1), offsets, segments, segments, zero)


LENGTHS = np.random.default_rng(0).integers(3, 40, size=101)


@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 17, 31, 101, 113, 300])
def test_every_example_is_visited_equally_often_at_any_time(count, batch_size, by_length):
    if count < batch_size:
        return
    # every length once, so that a preference for short or long ones shows
    lengths = np.random.default_rng(count).permutation(count) + 3
    visits = np.zeros(count, dtype=int)
    for batch in schedule(lengths, batch_size, 7 * count // batch_size + 5, seed=5, by_length=by_length):
        assert len(batch) == len(set(batch.tolist())) == batch_size
        visits[batch] += 1
        assert visits.max() - visits.min() <= 1
    assert visits.min() >= 7


def test_what_an_epoch_leaves_over_is_of_any_length():
    # 3 of 10 examples wait for the second epoch: under every seed the longest ones, when the pool's end is cut off
    lengths = np.arange(10) + 3
    waiting = [set(range(10)) - set(np.concatenate(schedule(lengths, 7, 1, seed, True)).tolist()) for seed in range(40)]
    assert {frozenset(w) for w in waiting} == {frozenset({0, 1, 2}), frozenset({7, 8, 9})}


def test_order_depends_on_the_seed_only():
    first, again, other = (schedule(LENGTHS, 7, 30, seed, True) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_a_longer_run_begins_like_a_shorter_one():
    short, long = schedule(LENGTHS, 7, 9, 1, True), schedule(LENGTHS, 7, 50, 1, True)
    assert all((a == b).all() for a, b in zip(short, long, strict=False))


@pytest.mark.parametrize("steps", [14, 140])
def test_grouping_by_length_pads_less(steps):
    def padding(by_length):
        batches = schedule(LENGTHS, 7, steps, 0, by_length)
        return sum(len(b) * LENGTHS[b].max() - LENGTHS[b].sum() for b in batches)

    assert padding(True) < 0.5 * padding(False)


def test_too_few_examples_is_an_error():
    with pytest.raises(ValueError, match="batch_size: 7 exceeds the 3"):
        schedule(np.array([3, 4, 5]), 7, 1, 0, True)


def test_collate_places_tokens_masks_and_labels():
    encoding = encoding_of([5, 3])
    batch = collate(encoding, np.array([1, 0]), pad_id=0, loss_on="completion")
    assert batch.input_ids.tolist() == [[15, 16, 17, 0, 0], [10, 11, 12, 13, 14]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.labels.tolist() == [[IGNORE, IGNORE, 17, IGNORE, IGNORE], [IGNORE, IGNORE, 12, 13, 14]]
    assert torch.equal(collate(encoding, np.array([0]), 0).labels, batch.input_ids[1:])


@pytest.mark.parametrize("loss_on", ["all", "completion"])
def test_a_batch_marks_the_tokens_that_are_predicted(loss_on):
    # without prompt, all prompt, and a single token, which nothing predicts
    for prompt, lengths in ((2, [5, 3, 2]), (0, [4, 1]), (1, [1, 6])):
        encoding, examples = encoding_of(lengths, prompt), np.arange(len(lengths))
        batch = collate(encoding, examples, 0, loss_on)
        first = 1 if loss_on == "all" else max(prompt, 1)
        assert int(batch.predicted.sum()) == sum(max(n - first, 0) for n in lengths)


def test_concatenated_ranges():
    starts, stops = np.array([4, 9, 2]), np.array([6, 9, 5])
    assert concatenated_ranges(starts, stops).tolist() == [4, 5, 2, 3, 4]
