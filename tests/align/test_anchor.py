"""Anchored time alignment: exact on what two texts share, monotone, never ahead of it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvpipe.align.anchor import anchors, warp

WORDS = st.text(alphabet="ab1+= .é", max_size=30)


def test_equal_texts_are_the_identity():
    text = "8-3=5. é und 5+1=6."
    positions = np.arange(len(text.encode()) + 1)
    assert np.array_equal(warp(positions, anchors(text, text)), positions)


def test_shared_runs_are_held_and_a_jump_is_not_read_ahead():
    src, dst = "Ann sells 2: 4-2=2. Ann buys 1: 2+1=3.", "4-2=2. 2+1=3."
    pairs = anchors(src, dst)
    read = [src[: int(position)] for position in warp(list(range(len(dst) + 1)), pairs)]
    # inside the shared equations every position is the one that has read the same equation so far
    for end in [*range(1, 7), *range(9, 14)]:
        assert read[end].endswith(dst[:end] if end < 7 else dst[7:end]), end
    # after "2. " the student has not read the second deed, nor does its target
    assert read[7].endswith("4-2=2. ") and "buys" not in read[7]
    assert read[13] == src


def test_after_a_jump_the_words_in_between_are_read():
    pairs = anchors("a bc d", "a d")
    assert warp([2], pairs).tolist() == [2] and warp([2], pairs, jump="after").tolist() == [5]


def test_no_shared_piece_is_plain_interpolation():
    assert warp([0, 1, 2, 4], anchors("xxxxxxxx", "yyyy")).tolist() == [0, 2, 4, 8]


def test_one_side_empty():
    assert warp([0, 3], anchors("", "abc")).tolist() == [0, 0]
    assert anchors("abc", "") == [(0, 0), (0, 3)]


@given(WORDS, WORDS)
def test_monotone_within_the_text(src, dst):
    positions = np.arange(len(dst.encode()) + 1)
    warped = warp(positions, anchors(src, dst))
    assert (np.diff(warped) >= -1e-9).all()
    assert (warped >= 0).all() and (warped <= len(src.encode()) + 1e-9).all()
    at, to = np.array(anchors(src, dst)).T
    assert (np.diff(at) >= 0).all() and (np.diff(to) >= 0).all()
