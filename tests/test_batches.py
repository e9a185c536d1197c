"""Batches: every example once an epoch, the same order for every arm of a seed, little padding."""

import numpy as np
import pytest
import torch

from kvpipe.batches import IGNORE, collate, schedule
from kvpipe.encoding import Encoding, concatenated_ranges


def encoding_of(lengths, prompt=2):
    lengths = np.array(lengths, dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.arange(offsets[-1]) + 10
    zero = np.zeros((len(lengths), 3), dtype=np.int64)
    segments = np.stack([np.array([[0, prompt], [prompt, n], [n, n]]) for n in lengths])
    return Encoding(ids, np.stack([ids, ids + 1], 1), offsets, segments, segments, zero)


LENGTHS = np.random.default_rng(0).integers(3, 40, size=101)


@pytest.mark.parametrize("by_length", [True, False])
def test_an_epoch_has_no_example_twice(by_length):
    batches = schedule(LENGTHS, 7, 14, seed=5, by_length=by_length)
    seen = np.concatenate(batches)
    assert len(seen) == len(set(seen.tolist())) == 98
    assert all(len(b) == 7 for b in batches)


def test_order_depends_on_the_seed_only():
    first, again, other = (schedule(LENGTHS, 7, 30, seed, True) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_a_longer_run_begins_like_a_shorter_one():
    short, long = schedule(LENGTHS, 7, 9, 1, True), schedule(LENGTHS, 7, 50, 1, True)
    assert all((a == b).all() for a, b in zip(short, long, strict=False))


def test_grouping_by_length_pads_less():
    def padding(by_length):
        batches = schedule(LENGTHS, 7, 14, 0, by_length)
        return sum(len(b) * LENGTHS[b].max() - LENGTHS[b].sum() for b in batches)

    assert padding(True) < 0.5 * padding(False)


def test_too_few_examples_is_an_error():
    with pytest.raises(ValueError, match="batch_size 7 exceeds the 3"):
        schedule(np.array([3, 4, 5]), 7, 1, 0, True)


def test_collate_places_tokens_masks_and_labels():
    encoding = encoding_of([5, 3])
    batch = collate(encoding, np.array([1, 0]), pad_id=0, prompt_loss=False)
    assert batch.input_ids.tolist() == [[15, 16, 17, 0, 0], [10, 11, 12, 13, 14]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.labels.tolist() == [[IGNORE, IGNORE, 17, IGNORE, IGNORE], [IGNORE, IGNORE, 12, 13, 14]]
    assert torch.equal(collate(encoding, np.array([0]), 0).labels, batch.input_ids[1:])


def test_concatenated_ranges():
    starts, stops = np.array([4, 9, 2]), np.array([6, 9, 5])
    assert concatenated_ranges(starts, stops).tolist() == [4, 5, 2, 3, 4]
