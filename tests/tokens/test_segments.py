"""Segments in bytes and tokens, and the splitter of raw text."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_zoo import build

from kvpipe.tokens.matrix import encode
from kvpipe.tokens.segments import GSM8K, THINK, Markers, Segmented, split_reasoning, token_segments

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
            spans = encode(build(name), record.text).spans
        except ValueError as error:
            assert "yields no token" in str(error)
            return
        ranges = token_segments(spans, record.boundaries)
        assert len(ranges) == 3
        assert all(start <= stop for start, stop in ranges)
        assert ranges[0][1] == ranges[1][0] and ranges[1][1] == ranges[2][0]
        with_bytes = (spans[:, 1] > spans[:, 0]).nonzero().flatten().tolist()
        inside = range(ranges[0][0], ranges[2][1])
        assert set(with_bytes) <= set(inside)
        assert not with_bytes or (inside[0], inside[-1]) == (with_bytes[0], with_bytes[-1])
        for (start, stop), low, high in zip(ranges, record.boundaries, record.boundaries[1:], strict=False):
            for i in range(start, stop):
                if i in with_bytes:
                    assert low < spans[i, 1] <= high  # the segment in which it ends

    law()


def test_straddling_token_belongs_where_it_ends():
    spans = torch.tensor([[0, 0], [0, 2], [2, 5], [5, 6], [6, 6]])
    assert token_segments(spans, (0, 3, 5, 6)) == [(1, 2), (2, 3), (3, 4)]
    assert token_segments(spans, (0, 3, 4, 6)) == [(1, 2), (2, 2), (2, 4)]  # no token ends in the second
    assert token_segments(spans, (0, 0, 6)) == [(1, 1), (1, 4)]


def test_bos_and_eos_lie_outside():
    record = Segmented("Maria has 3. ", "3 + 4", "\n#### 7")
    tokens = encode(build("xlm_roberta"), record.text)
    ranges = token_segments(tokens.spans, record.boundaries)
    assert ranges[0][0] >= 1 and ranges[-1][1] == len(tokens.ids) - 1


def test_empty_text_has_empty_ranges():
    assert token_segments(torch.tensor([[0, 0]]), (0, 0, 0, 0)) == [(0, 0)] * 3


@pytest.mark.parametrize("boundaries", [(0, 3, 5), (1, 3, 6), (0, 4, 3, 6), (0,), (0, 3, 9)])
def test_boundaries_of_another_text_are_refused(boundaries):
    with pytest.raises(ValueError, match="boundaries must rise from 0 to the 6 bytes"):
        token_segments(torch.tensor([[0, 2], [2, 6]]), boundaries)


@property_based
@given(
    st.lists(st.sampled_from(["a", " ", "<think>", "</think>", "####", "A:", "日"]), max_size=9).map("".join),
    st.sampled_from(
        [
            Markers("A:", "<think>", "</think>", "####", "answer"),
            Markers(None, "<think>", "</think>", "####", "reasoning"),
            Markers(None, None, None, "####", "answer"),
            Markers(None, None, "</think>", None, "reasoning"),
            THINK,
        ]
    ),
)
def test_parts_joined_are_the_text(text, markers):
    try:
        record = split_reasoning(text, markers)
    except ValueError as error:
        assert repr(markers.prompt_stop) in str(error) and markers.prompt_stop not in text
        return
    assert record.text == text


@pytest.mark.parametrize(
    ("text", "markers", "expected"),
    [
        ("<think>2+2=4</think>4", THINK, ("", "<think>2+2=4</think>", "4")),
        ("Q? <think>hm</think> 4", THINK, ("Q? ", "<think>hm</think>", " 4")),
        ("just 4", THINK, ("", "", "just 4")),
        ("Q? <think>cut off", THINK, ("Q? ", "<think>cut off", "")),
        ("two left.\n#### 2", GSM8K, ("", "two left.\n", "#### 2")),
        ("#### 2", GSM8K, ("", "", "#### 2")),
        ("Q\nA: so #### 1", Markers(prompt_stop="A:", answer_start="####"), ("Q\nA:", " so ", "#### 1")),
        ("A:", Markers(prompt_stop="A:", answer_start="####"), ("A:", "", "")),
        (
            "<think>a</think>b #### 3",
            Markers(reasoning_start="<think>", reasoning_stop="</think>", answer_start="####"),
            ("", "<think>a</think>b ", "#### 3"),
        ),
        ("hm</think>4", Markers(reasoning_stop="</think>"), ("", "hm</think>", "4")),
        ("x", Markers(answer_start="####", unmarked="reasoning"), ("", "x", "")),
    ],
)
def test_splits_by_hand(text, markers, expected):
    assert split_reasoning(text, markers) == expected


def test_missing_markers_are_named():
    with pytest.raises(ValueError, match=r"none of the markers \['####'\] is in the text 'no mark'"):
        split_reasoning("no mark", GSM8K)
    with pytest.raises(ValueError, match="prompt_stop 'Answer:' is not in the text"):
        split_reasoning("no mark", Markers(prompt_stop="Answer:"))
