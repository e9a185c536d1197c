"""Two tokenizers over many texts: laws of the counts, and one case counted by hand."""

import pytest
from test_spans import ADVERSARIAL
from tokenizer_zoo import FAMILIES, build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvpipe.tokens.compare import MODES, Tallied, compare_tokenizers


def words(*vocabulary: str) -> PreTrainedTokenizerFast:
    """Cuts a text into these pieces, longest first, and knows no other."""
    ids = {"[UNK]": 0, **{word: i + 1 for i, word in enumerate(vocabulary)}}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def test_a_text_counted_by_hand():
    """abcdef: the teacher's ab|cd|ef against the student's a|bcd|ef, and the student's abcd|ef."""
    teacher = words("ab", "##cd", "##ef")
    found = compare_tokenizers(teacher, words("a", "##bcd", "##ef"), [("line 1", "abcdef")])
    (text,) = found.texts
    assert (text.src_tokens, text.dst_tokens, text.same, text.bytes, text.ties) == (3, 3, 1, 6, 0)
    assert text.iou == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)
    causal, iou, position = (found.total(mode) for mode in ("causal", "iou", "position"))
    # no teacher token has ended where a ends; bcd ends with cd, and ef with ef
    assert (causal.tokens, causal.targets, causal.sources, causal.shared, causal.ahead) == (3, 2, 2, 0, 0)
    # a lies in ab, which reads b too; bcd in ab and cd
    assert (iou.targets, iou.sources, iou.shared, iou.ahead) == (3, 4, 0, 1)
    assert (position.targets, position.ahead) == (3, 1)
    tied = compare_tokenizers(teacher, words("abcd", "##ef"), [("line 1", "abcdef")])
    assert (tied.ties, tied.same, tied.total("iou").sources) == (1, 1, 3)
    split = compare_tokenizers(words("abcd", "##ef"), words("ab", "##cd", "##ef"), [("line 1", "abcdef")])
    assert split.total("iou").shared == 2, "ab and cd both read abcd"


@pytest.mark.parametrize("name", ["gpt2", "llama2", "gemma3", "t5", "bert_cased"])
def test_a_tokenizer_lines_up_with_itself(name):
    texts = [(key, text) for key, text in ADVERSARIAL.items() if text.strip()]
    found = compare_tokenizers(build(name), build(name), texts)
    assert found.texts and found.src == found.dst
    assert all(text.iou == 1 and text.same == text.dst_tokens and not text.ties for text in found.texts)
    for mode in MODES:
        total = found.total(mode)
        assert total.targets == total.sources == total.tokens and not total.ahead and not total.shared


@pytest.mark.parametrize("name", FAMILIES)
def test_every_byte_is_covered_and_exact_families_spell_them_all(name):
    tallied = Tallied(build(name))
    for text in ADVERSARIAL.values():
        tallied.encode(text)
    tally = tallied.tally
    assert tally.covered == tally.bytes > 0
    assert (tally.spelled == tally.bytes) if FAMILIES[name].exact else (0 < tally.spelled < tally.bytes)
    assert tally.texts == len(ADVERSARIAL)


def test_causal_reads_nothing_ahead_and_iou_masks_nothing():
    texts = [(key, text) for key, text in ADVERSARIAL.items() if text.strip()]
    found = compare_tokenizers(build("llama2"), build("gpt2"), texts)
    assert found.total("causal").ahead == 0 < found.total("iou").ahead
    assert found.total("iou").targets == found.total("iou").tokens
    assert 0 < found.total("causal").targets <= found.total("causal").tokens


def test_the_worst_come_first_and_none_twice():
    texts = [("1", "abcdef"), ("2", "efabcd"), ("3", "ab"), ("4", "abcdef")]
    student = words("a", "##b", "##bcd", "##ef", "ef", "##a", "##abcd")
    found = compare_tokenizers(words("ab", "##cd", "##ef", "ef", "##ab"), student, texts)
    worst = found.worst(9)
    assert [text.iou for text in worst] == sorted(text.iou for text in worst)
    assert sorted(text.text for text in worst) == ["ab", "abcdef", "efabcd"]
    assert found.worst(1) == worst[:1]


def test_texts_that_cannot_be_followed_are_named_and_left_out():
    texts = [("line 1", " \n "), ("line 2", "ab\ud800"), ("line 3", "a cat")]
    found = compare_tokenizers(build("bert_cased"), build("gpt2"), texts)
    assert [text.place for text in found.texts] == ["line 3"]
    assert [place for place, _ in found.refused] == ["line 1", "line 2"]
    assert "nothing of it is left for the teacher" in found.refused[0][1] and "surrogate" in found.refused[1][1]
    assert found.src.empty == 1 and found.dst.empty == 0
    with pytest.raises(ValueError, match="no text to align: line 1: nothing of it is left for the teacher"):
        compare_tokenizers(build("bert_cased"), build("gpt2"), texts[:1])
