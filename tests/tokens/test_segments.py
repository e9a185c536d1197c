"""Segments in bytes and tokens, and the splitter of raw text."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_zoo import build

from kvpipe.tokens.matrix import encode
from kvpipe.tokens.segments import Segmented, token_segments

part = st.lists(st.sampled_from(["the cat", " ", "日本", "é", "👩‍👩‍👧", "12", "\n", "<think>"]), max_size=4).map(
    "".join
)
property_based = settings(
    max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_boundaries_are_bytes():
    record = Segmented("é?", "日本", "")
    assert record.text == "é?日本" and record.boundaries == (0, 3, 9, 9)


@pytest.mark.parametrize("name", ["llama3", "llama2", "xlm_roberta", "gpt2", "byte_level_unsplit"])
def test_ranges_partition_the_tokens_that_have_bytes(name):
    @property_based
    @given(part, part, part)
    def law(prompt, reasoning, answer):
        record = Segmented(prompt, reasoning, answer)
        try:
            spans = encode(build(name), record.text).spans.numpy()
        except ValueError as error:
            assert "yields no token" in str(error)
            return
        ranges = token_segments(spans, record.boundaries)
        assert len(ranges) == 3
        assert all(start <= stop for start, stop in ranges)
        assert ranges[0][1] == ranges[1][0] and ranges[1][1] == ranges[2][0]
        with_bytes = np.flatnonzero(spans[:, 1] > spans[:, 0]).tolist()
        inside = range(ranges[0][0], ranges[2][1])
        assert set(with_bytes) <= set(inside)
        assert not with_bytes or (inside[0], inside[-1]) == (with_bytes[0], with_bytes[-1])
        for (start, stop), low, high in zip(ranges, record.boundaries, record.boundaries[1:], strict=False):
            for i in range(start, stop):
                if i in with_bytes:
                    assert low < spans[i, 1] <= high  # the segment in which it ends

    law()


def test_straddling_token_belongs_where_it_ends():
    spans = np.array([[0, 0], [0, 2], [2, 5], [5, 6], [6, 6]])
    assert token_segments(spans, (0, 3, 5, 6)) == [(1, 2), (2, 3), (3, 4)]
    assert token_segments(spans, (0, 3, 4, 6)) == [(1, 2), (2, 2), (2, 4)]  # no token ends in the second
    assert token_segments(spans, (0, 0, 6)) == [(1, 1), (1, 4)]


def test_bos_and_eos_lie_outside():
    record = Segmented("Maria has 3. ", "3 + 4", "\n#### 7")
    tokens = encode(build("xlm_roberta"), record.text)
    ranges = token_segments(tokens.spans.numpy(), record.boundaries)
    assert ranges[0][0] >= 1 and ranges[-1][1] == len(tokens.ids) - 1


def test_empty_text_has_empty_ranges():
    assert token_segments(np.array([[0, 0]]), (0, 0, 0, 0)) == [(0, 0)] * 3


@pytest.mark.parametrize("boundaries", [(0, 3, 5), (1, 3, 6), (0, 4, 3, 6), (0,), (0, 3, 9)])
def test_boundaries_of_another_text_are_refused(boundaries):
    with pytest.raises(ValueError, match="boundaries must rise from 0 to the 6 bytes"):
        token_segments(np.array([[0, 2], [2, 6]]), boundaries)
