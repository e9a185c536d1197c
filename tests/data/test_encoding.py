"""Flat encodings: every row belongs to one example and every byte of its text to one row."""

import copy

import numpy as np
import pytest
import tokenizer_zoo

from kvpipe.config import Template
from kvpipe.data.encoding import concatenated_ranges, encode_records, hash_bytes
from kvpipe.data.records import Record, read_as, render
from kvpipe.tokens.matrix import encode

RECORDS = [
    Record("a", "math", "Ann has 3 cats, naïve 日本", "3+4=7", "7", "first 3 and then 4 more, 3+4=7"),
    Record("b", "math", "x", "", "12", "twelve"),
    Record("c", "code", "def f(x):\n    return x  # 😀", "f(2)=2", "2", "line by line: 2"),
]


@pytest.fixture(scope="module", params=["gpt2", "llama2", "deepseek"])
def tokenizer(request):
    tokenizer = copy.deepcopy(tokenizer_zoo.build(request.param))  # the zoo keeps what it built
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    return tokenizer


@pytest.mark.parametrize("reading", ["student", "own", "none"])
def test_rows_are_each_text_tokenized_alone(tokenizer, reading):
    records = read_as(RECORDS, reading)
    encoding = encode_records(records, tokenizer, Template())
    assert len(encoding) == len(RECORDS) and encoding.offsets[-1] == len(encoding.ids) == encoding.lengths.sum()
    for number, record in enumerate(records):
        text = render(record, Template())
        alone = encode(tokenizer, text.text)
        rows = encoding.rows(number)
        assert (encoding.ids[rows] == alone.ids.numpy()).all()
        assert (encoding.spans[rows] == alone.spans.numpy()).all()
        assert encoding.byte_segments[number].tolist() == [
            [text.boundaries[i], text.boundaries[i + 1]] for i in range(3)
        ]


def test_a_row_lies_in_the_segment_in_which_it_ends(tokenizer):
    encoding = encode_records(RECORDS, tokenizer, Template(), end=True)
    for number in range(len(encoding)):
        spans = encoding.spans[encoding.rows(number)]
        with_bytes = np.flatnonzero(spans[:, 1] > spans[:, 0])
        found = {row: [s for s, (a, b) in enumerate(encoding.segments[number]) if a <= row < b] for row in with_bytes}
        for row, segments in found.items():
            start, stop = encoding.byte_segments[number][segments[0]]
            assert len(segments) == 1 and start < spans[row, 1] <= stop


def test_the_end_token_is_an_empty_span_outside_all_segments(tokenizer):
    plain, ended = (encode_records(RECORDS, tokenizer, Template(), end=end) for end in (False, True))
    assert (ended.lengths == plain.lengths + 1).all()
    for number in range(len(ended)):
        rows = ended.rows(number)
        stop = ended.byte_segments[number, -1, 1]
        assert ended.ids[rows][-1] == tokenizer.eos_token_id
        assert ended.spans[rows][-1].tolist() == [stop, stop]
        assert (ended.ids[rows][:-1] == plain.ids[plain.rows(number)]).all()
    assert (ended.segments == plain.segments).all()


def test_equal_segment_hashes_mean_equal_text(tokenizer):
    student, own = (encode_records(read_as(RECORDS, reading), tokenizer, Template()) for reading in ("student", "own"))
    same = student.segment_hashes == own.segment_hashes
    assert same.tolist() == [[True, False, True]] * len(RECORDS)
    assert len(set(student.segment_hashes[:, 0].tolist())) == len(RECORDS)


def test_the_content_hash_is_the_same_in_every_process():
    # blake2b of b"abc" at 8 bytes, without the last bit
    assert hash_bytes(b"abc") == 0xD8BB14D833D59559 >> 1
    assert hash_bytes(b"") != hash_bytes(b" ") and 0 <= hash_bytes(b"abc") < 2**63


def test_a_record_that_is_too_long_is_named(tokenizer):
    lengths = encode_records(RECORDS, tokenizer, Template(), end=True).lengths
    longest = int(lengths.max())
    encode_records(RECORDS, tokenizer, Template(), end=True, max_length=longest)
    name = RECORDS[int(lengths.argmax())].id
    with pytest.raises(ValueError, match=f"record '{name}' has {longest} tokens, train.max_length is {longest - 1}"):
        encode_records(RECORDS, tokenizer, Template(), end=True, max_length=longest - 1)


def test_a_tokenizer_without_an_end_token_cannot_end_a_text():
    with pytest.raises(ValueError, match="no end-of-text token"):
        encode_records(RECORDS, tokenizer_zoo.build("gpt2"), Template(), end=True)


def test_concatenated_ranges():
    starts, stops = np.array([5, 2, 9, 0]), np.array([8, 2, 11, 1])
    expected = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
    assert (concatenated_ranges(starts, stops) == expected).all()
    assert len(concatenated_ranges(starts[:0], stops[:0])) == 0
