"""Laws of the time map: identity for equal tokenizers, rows that sum to 1 or 0, nothing from elsewhere."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import encoded

from kvpipe.align.timemap import build_time_map, derangement
from kvpipe.config import TimeConfig
from kvpipe.data.encoding import Encoding, hash_bytes
from kvpipe.tokens.matrix import overlap
from kvpipe.tokens.segments import Segmented, token_segments

OVERLAP = [TimeConfig(mode=mode) for mode in ("iou", "causal")]
SEGMENT = [TimeConfig(kind="segment", mode=mode, differing="interpolate") for mode in ("iou", "causal")]
ANCHORED = [TimeConfig(kind="segment", mode=mode, differing="anchored") for mode in ("iou", "causal")]
PREDICTIVE = TimeConfig(kind="segment", differing="predictive")
POSITION = TimeConfig(kind="position")


def encoding_of(examples):
    """From `(segments as texts, cuts, tokens before, tokens after)` per example; tokens end at the cuts."""
    ids, spans, lengths, segments, byte_segments, hashes = [], [], [], [], [], []
    for texts, cuts, before, after in examples:
        bounds = np.cumsum([0, *map(len, texts)])
        edges = np.array([0, *sorted(c for c in set(cuts) if 0 < c < bounds[-1]), bounds[-1]])
        span = [(0, 0)] * before + list(pairwise(edges)) + [(bounds[-1], bounds[-1])] * after
        span = np.array(span, dtype=np.int64)
        spans.append(span)
        ids.append(np.arange(len(span)))
        lengths.append(len(span))
        segments.append(token_segments(span, bounds.tolist()))
        byte_segments.append(np.stack([bounds[:-1], bounds[1:]], 1))
        hashes.append([hash_bytes(text.encode()) for text in texts])
    as_int = lambda x: np.array(x, dtype=np.int64)  # noqa: E731
    return Encoding(
        np.concatenate(ids),
        np.concatenate(spans),
        as_int(np.concatenate([[0], np.cumsum(lengths)])),
        as_int(segments),
        as_int(byte_segments),
        as_int(hashes),
        tuple(Segmented(*texts) for texts, *_ in examples),
    )


def letters(draw, low, high):
    return draw(st.text("ab", min_size=low, max_size=high))


@st.composite
def splits(draw, same_text):
    """Two sides of the same examples, for `encoding_of`: the same text cut in two ways, or texts that differ in some segments."""
    sides = ([], [])
    for _ in range(draw(st.integers(1, 4))):
        texts = [letters(draw, 1, 9), letters(draw, 0, 9), letters(draw, 1, 6)]
        for number, side in enumerate(sides):
            own = list(texts)
            if number == 0 and not same_text:
                own[1] = letters(draw, 0, 12)
            cuts = draw(st.lists(st.integers(1, 30), max_size=12))
            side.append((own, cuts, draw(st.integers(0, 2)), draw(st.integers(0, 1))))
    return sides


def dense(time, n_src):
    out = torch.zeros(len(time.index), n_src)
    return out.scatter_add_(1, time.index, time.weight)


def owner(encoding):
    return np.repeat(np.arange(len(encoding)), encoding.lengths)


def segment_of(encoding):
    """The segment of every row; −1 for special tokens."""
    out = np.full(len(encoding.ids), -1)
    for example in range(len(encoding)):
        for number, (start, stop) in enumerate(encoding.segments[example]):
            out[encoding.offsets[example] + start : encoding.offsets[example] + stop] = number
    empty = encoding.spans[:, 1] == encoding.spans[:, 0]
    return np.where(empty, -1, out)


def check_rows(time, src, dst):
    """What holds for every map: rows sum to 1 or 0, entries stay in the example, special tokens stay out."""
    matrix = dense(time, len(src.ids))
    total = matrix.sum(1)
    assert (time.weight >= 0).all()
    torch.testing.assert_close(total, (total > 0).float(), atol=1e-6, rtol=0)
    assert torch.equal(time.mask, total > 0)
    read = time.source[owner(dst)]
    rows, cols = matrix.nonzero().numpy().T
    assert (owner(src)[cols] == read[rows]).all()
    # padding entries point into the example too: a gather of its rows alone must not leave them
    assert ((time.index >= torch.from_numpy(src.offsets[read])[:, None]).all()) and (
        time.index < torch.from_numpy(src.offsets[read + 1])[:, None]
    ).all()
    assert not total[torch.from_numpy(dst.spans[:, 1] == dst.spans[:, 0])].any()
    return matrix


@pytest.mark.parametrize("config", [*OVERLAP, *SEGMENT, *ANCHORED, POSITION])
@settings(deadline=None, max_examples=30)
@given(splits(same_text=True))
def test_the_same_tokens_give_the_identity(config, pair):
    src = encoding_of(pair[0])
    has_text = torch.from_numpy(src.spans[:, 1] > src.spans[:, 0]).float()
    matrix = check_rows(build_time_map(config, src, src), src, src)
    torch.testing.assert_close(matrix, torch.diag(has_text))


@pytest.mark.parametrize("config", OVERLAP)
@settings(deadline=None, max_examples=60)
@given(splits(same_text=True))
def test_overlap_of_all_examples_is_the_overlap_of_each(config, pair):
    src, dst = map(encoding_of, pair)
    matrix = check_rows(build_time_map(config, src, dst), src, dst)
    expected = torch.zeros_like(matrix)
    for example in range(len(dst)):
        spans = [torch.from_numpy(e.spans[e.rows(example)]) for e in (src, dst)]
        expected[dst.rows(example), src.rows(example)] = overlap(*spans, mode=config.mode).to_dense()
    torch.testing.assert_close(matrix, expected)


@pytest.mark.parametrize("config", [OVERLAP[1], SEGMENT[1]])
@settings(deadline=None, max_examples=60)
@given(splits(same_text=True))
def test_a_causal_map_reads_nothing_that_ends_later(config, pair):
    src, dst = map(encoding_of, pair)
    rows, cols = check_rows(build_time_map(config, src, dst), src, dst).nonzero().numpy().T
    assert (src.spans[cols, 1] <= dst.spans[rows, 1]).all()


@pytest.mark.parametrize("config", SEGMENT)
@settings(deadline=None, max_examples=60)
@given(splits(same_text=False))
def test_segments_never_mix_and_each_is_aligned_alone(config, pair):
    """Equal segments by their bytes, a token that straddles an edge clipped to the segment in which it ends; segments
    that differ by interpolation; a segment that is empty on the source side is masked."""
    src, dst = map(encoding_of, pair)
    time = build_time_map(config, src, dst)
    matrix = check_rows(time, src, dst)
    rows, cols = matrix.nonzero().numpy().T
    assert (segment_of(src)[cols] == segment_of(dst)[rows]).all()
    for example in range(len(dst)):
        for number in range(3):
            (s0, s1), (d0, d1) = (e.segments[example, number] + e.offsets[example] for e in (src, dst))
            block = matrix[d0:d1, s0:s1]
            if s0 == s1 or d0 == d1:
                assert not matrix[d0:d1].any()
            elif src.segment_hashes[example, number] == dst.segment_hashes[example, number]:
                spans = []
                for e, a, b in ((src, s0, s1), (dst, d0, d1)):
                    start, stop = e.byte_segments[example, number]
                    spans.append(torch.from_numpy(e.spans[a:b].clip(start, stop) - start))
                torch.testing.assert_close(block, overlap(*spans, mode=config.mode).to_dense())
            else:
                n, m = s1 - s0, d1 - d0
                at = np.arange(m) * (n - 1) / (m - 1) if m > 1 else np.array([n - 1])
                expected = np.stack([np.interp(at, np.arange(n), row) for row in np.eye(n)], axis=1)
                torch.testing.assert_close(block, torch.from_numpy(expected).float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("config", [*ANCHORED, PREDICTIVE])
@settings(deadline=None, max_examples=60)
@given(splits(same_text=False))
def test_anchored_segments_stay_apart_in_order_and_end_together(config, pair):
    src, dst = map(encoding_of, pair)
    time = build_time_map(config, src, dst)
    matrix = check_rows(time, src, dst)
    rows, cols = matrix.nonzero().numpy().T
    assert (segment_of(src)[cols] == segment_of(dst)[rows]).all()
    plain = dense(build_time_map(config.model_copy(update={"differing": "interpolate"}), src, dst), len(src.ids))
    for example in range(len(dst)):
        for number in range(3):
            (s0, s1), (d0, d1) = (e.segments[example, number] + e.offsets[example] for e in (src, dst))
            if src.segment_hashes[example, number] == dst.segment_hashes[example, number]:
                assert torch.equal(matrix[d0:d1], plain[d0:d1])
            elif s0 < s1 and d0 < d1:
                read = matrix[d0:d1].argmax(1)[time.mask[d0:d1]]
                assert (read.diff() >= 0).all()
                # where no token straddles the segment's end, both have read all of it there
                ends = [
                    e.spans[stop - 1, 1] - e.byte_segments[example, number, 1] for e, stop in ((src, s1), (dst, d1))
                ]
                if ends == [0, 0]:
                    assert read[-1] == s1 - 1


@pytest.mark.parametrize("config", ANCHORED)
def test_anchored_words_read_the_teachers_same_words(config):
    own, short = "so 3-1=2. then 2+5=7.", "3-1=2. 2+5=7."
    src = encoding_of([(("p", own, "#"), range(1, 30), 1, 0)])  # one token per byte
    dst = encoding_of([(("p", short, "#"), range(1, 30), 0, 1)])
    time = build_time_map(config, src, dst)
    read = (time.index[1:-2, 0] - 2).tolist()  # behind BOS and the prompt
    assert "".join(own[i] for i in read) == short
    assert read == sorted(read) and time.mask.tolist() == [True] * 15 + [False]


def test_predictive_reads_up_to_the_word_that_comes_next():
    own, short = "so 3-1=2. then 2+5=7.", "2, 7."
    src = encoding_of([(("p", own, "#"), range(1, 30), 0, 0)])  # one token per byte
    dst = encoding_of([(("p", short, "#"), [1, 2, 3, 5, 6], 0, 0)])  # p|2|,| 7|.|#
    read = {}
    for config in (ANCHORED[0], PREDICTIVE):
        index = build_time_map(config, src, dst).index[1:-1, 0] - 1
        read[config.differing] = [own[: i + 1] for i in index.tolist()]
    assert read["anchored"][0].endswith("3-1=2") and read["predictive"][0].endswith("3-1=2")
    # the comma comes before the 7: the teacher has worked it out there, and not said it
    assert read["predictive"][1].endswith("2+5=") and not read["anchored"][1].endswith("2+5=")
    assert read["predictive"][2].endswith("2+5=7") and read["predictive"][3] == own


def test_a_segment_without_source_tokens_is_masked():
    src = encoding_of([(("abc", "", "xy"), [1, 2, 3, 4], 1, 0)])
    dst = encoding_of([(("abc", "def", "xy"), [2, 3, 5, 6, 7], 0, 1)])
    time = build_time_map(SEGMENT[0], src, dst)
    assert time.mask.tolist() == [True, True, False, False, True, True, False]


def test_an_equal_segment_after_one_that_differs_reads_nothing_from_before_it():
    """The student's first answer token ends before any of the teacher's: the last token that ended is the prompt's."""
    src = encoding_of([(("ab", "cccccc", "####"), [2, 5, 8], 0, 0)])
    dst = encoding_of([(("ab", "cc", "####"), [2, 3, 4, 5], 0, 0)])
    time = build_time_map(SEGMENT[1], src, dst)
    assert time.mask.tolist() == [True, True, True, False, True]
    assert time.index[4, 0].item() == 3


def test_a_straddling_token():
    """A token over the edge of prompt and reasoning: overlap gives it by bytes, segments to the one in which it ends."""
    src = encoding_of([(("abc", "def", "x"), [2, 5, 6], 0, 0)])  # ab|cde|f|x
    dst = encoding_of([(("abc", "def", "x"), [3, 6], 0, 0)])  # abc|def|x
    assert src.segments[0].tolist() == [[0, 1], [1, 3], [3, 4]]
    whole = dense(build_time_map(OVERLAP[0], src, dst), 4)
    torch.testing.assert_close(whole[0], torch.tensor([2 / 3, 1 / 5, 0, 0]) / (2 / 3 + 1 / 5))
    parts = dense(build_time_map(SEGMENT[0], src, dst), 4)
    torch.testing.assert_close(parts[:2], torch.tensor([[1.0, 0, 0, 0], [0, 2 / 3, 1 / 3, 0]]))


@settings(deadline=None, max_examples=30)
@given(splits(same_text=True))
def test_position_matches_token_index_to_token_index(pair):
    src, dst = map(encoding_of, pair)
    matrix = check_rows(build_time_map(POSITION, src, dst), src, dst)
    for example in range(len(dst)):
        block = matrix[dst.rows(example), src.rows(example)]
        has_text = dst.spans[dst.rows(example)][:, 1] > dst.spans[dst.rows(example)][:, 0]
        expected = torch.eye(*block.shape) * torch.from_numpy(has_text)[:, None]
        assert torch.equal(block, expected)


@pytest.mark.parametrize("config", [*OVERLAP, *SEGMENT, *ANCHORED])
def test_shuffled_examples_read_the_other_one_by_segments(config):
    src = encoding_of([(("abc", "de", "x"), [1, 2, 4], 1, 0), (("ghijk", "lm", "yz"), [2, 3, 5, 6], 1, 0)])
    dst = encoding_of([(("abc", "de", "x"), [2, 3], 0, 1), (("ghijk", "lm", "yz"), [1, 4, 6], 0, 1)])
    source = np.array([1, 0])
    time = build_time_map(config, src, dst, source)
    rows, cols = check_rows(time, src, dst).nonzero().numpy().T
    assert (owner(src)[cols] != owner(dst)[rows]).all()
    assert (segment_of(src)[cols] == segment_of(dst)[rows]).all()
    inside = segment_of(dst) >= 0
    if config.differing == "anchored":  # masked too where no teacher token of the segment has ended by then
        assert (inside | ~time.mask.numpy()).all() and time.mask.numpy()[inside].mean() > 0.5
    else:
        assert time.mask.tolist() == inside.tolist()


def test_equal_text_of_another_example_is_not_aligned_by_bytes():
    example = (("ab", "cd", "ef"), [1, 2, 3, 4, 5], 0, 0)
    both = encoding_of([example, (("ab", "cdcd", "ef"), [2, 6], 0, 0)])
    time = build_time_map(SEGMENT[1], both, both, np.array([1, 0]))
    # two tokens of "ab" read one: both at its only token, not masked until it has ended
    assert time.index[:2, 0].tolist() == [6, 6] and time.mask[:2].all()


def test_shuffled_positions_read_the_other_example():
    src = encoding_of([(("abc", "de", "x"), [1, 2, 4], 1, 0), (("ghijk", "lm", "yz"), [2, 3, 5, 6], 1, 0)])
    time = build_time_map(POSITION, src, src, np.array([1, 0]))
    rows, cols = check_rows(time, src, src).nonzero().numpy().T
    assert (owner(src)[cols] != owner(src)[rows]).all() and len(rows)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from("ab"), min_size=4, max_size=30), st.integers(0, 5))
def test_a_derangement_moves_everything_within_its_task(tasks, seed):
    tasks = ["a", "a", "b", "b", *tasks]
    out = derangement(tasks, seed)
    assert sorted(out.tolist()) == list(range(len(tasks)))
    assert all(i != j and tasks[i] == tasks[j] for i, j in enumerate(out))
    assert (out == derangement(tasks, seed)).all()


def test_a_lone_example_of_a_task_cannot_be_shuffled():
    with pytest.raises(ValueError, match="two training examples of task 'b'"):
        derangement(["a", "a", "b"], 0)


def test_real_tokenizers(tiny):
    """The laws again on what the trained tokenizers give, with spaces as ▁, BOS and an end token."""
    dst = tiny.student_encoding("train")
    for reading, configs in (("student", [*OVERLAP, *SEGMENT]), ("own", [*SEGMENT, *ANCHORED])):
        src = encoded(tiny, "beta", "train", reading)
        for config in configs:
            time = build_time_map(config, src, dst)
            check_rows(time, src, dst)
            share = time.mask.float().mean()
            assert share > 0.85  # what is masked: end tokens, and starts before any teacher token has ended


def test_padding_of_the_byte_groups_does_not_matter():
    """The same examples in another order give the same rows."""
    examples = [(("abc", "d" * n, "xyz"), [2, 3 + n // 2, 4 + n], 1, 0) for n in (1, 7, 3)]
    others = [(("abc", "d" * n, "xyz"), [1, 3, 5 + n], 0, 1) for n in (1, 7, 3)]
    order = [2, 0, 1]
    for config in (*OVERLAP, *SEGMENT, *ANCHORED):
        first = build_time_map(config, encoding_of(examples), encoding_of(others))
        src, dst = (encoding_of([x[i] for i in order]) for x in (examples, others))
        second = build_time_map(config, src, dst)
        one, two = dense(first, len(src.ids)), dense(second, len(src.ids))
        perm = [np.concatenate([np.arange(len(e.ids))[e.rows(order.index(i))] for i in range(3)]) for e in (dst, src)]
        torch.testing.assert_close(one, two[perm[0]][:, perm[1]])
