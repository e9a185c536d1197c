"""Likelihood: transformers' own loss on one example, whatever batch the example is in."""

import numpy as np
import pytest
import torch
from tiny import encoded

from kvpipe.config import Template
from kvpipe.data.encoding import encode_records
from kvpipe.data.records import Record
from kvpipe.models import head, likelihood
from kvpipe.models.folders import load_model
from kvpipe.models.head import Head
from kvpipe.models.likelihood import empty_scores, groups, score, score_long, scoring_batches, windowed_nll


@pytest.fixture(scope="module")
def side(tiny):
    return load_model(tiny.paths.model("beta")), encoded(tiny, "beta", "validation", "student")


def transformers_nll(model, ids, first):
    """Summed loss of the tokens from `first` on, as transformers computes it for a single text."""
    labels = torch.from_numpy(ids.copy())[None]
    labels[:, :first] = -100
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(ids)[None], labels=labels)
    return out.loss.item() * int((labels[0, 1:] != -100).sum())


def test_each_example_is_transformers_own_loss(side):
    model, encoding = side
    scores = score(model, encoding, scoring_batches(encoding, 0, 4))
    for example in range(len(encoding)):
        ids = encoding.ids[encoding.rows(example)]
        first = int(encoding.segments[example, 0, 1])
        assert scores.nll[example] == pytest.approx(transformers_nll(model, ids, first), rel=1e-4)
        assert scores.tokens[example] == len(ids) - first
        # BOS spells no byte: the first token with bytes is predicted from it
        assert scores.nll_all[example] == pytest.approx(transformers_nll(model, ids, 0), rel=1e-4)
        assert scores.tokens_all[example] == len(ids) - 1
    starts, ends = encoding.byte_segments[:, 0, 1], encoding.byte_segments[:, 2, 1]
    assert (scores.bytes == ends - starts).all() and (scores.bytes_all == ends).all()
    assert scores.mean_nll() == pytest.approx(scores.nll.sum() / scores.tokens.sum())


def test_batch_size_does_not_matter_and_every_example_is_scored_once(side):
    model, encoding = side
    one, many = (score(model, encoding, scoring_batches(encoding, 0, size)) for size in (1, 64))
    for name in ("nll", "nll_all"):
        np.testing.assert_allclose(getattr(one, name), getattr(many, name), rtol=1e-5)
    for name in ("tokens", "bytes", "tokens_all", "bytes_all"):
        assert (getattr(one, name) == getattr(many, name)).all()
    seen = np.concatenate([b.examples for b in scoring_batches(encoding, 0, 4)])
    assert sorted(seen) == list(range(len(encoding)))


@pytest.mark.parametrize("known", [True, False])
def test_scores_hold_a_piece_of_the_logits(side, monkeypatch, known):
    """And are the same numbers, whatever its size, and where the family's head is not known."""
    model, encoding = side
    batches = scoring_batches(encoding, 0, 4)
    whole, seen, finished = score(model, encoding, batches), [], Head.finished

    def watched(self, raw):
        seen.append(raw.numel())
        return finished(self, raw)

    monkeypatch.setattr(head, "PIECE", 5 * model.config.vocab_size)
    monkeypatch.setattr(Head, "finished", watched)
    if not known:
        monkeypatch.setattr(Head, "of", classmethod(lambda cls, model: cls()))
    pieces = score(model, encoding, batches)
    assert max(seen) <= head.PIECE and len(seen) > 2 * len(batches)
    for name in ("nll", "nll_all"):
        np.testing.assert_allclose(getattr(pieces, name), getattr(whole, name), rtol=1e-5)


def test_no_batch_is_larger_than_its_tokens(side, monkeypatch):
    """But for one of a single text; each text once, the likest in length together."""
    _, encoding = side
    longest = int(encoding.lengths.max())
    monkeypatch.setattr(likelihood, "SCORED", 2 * longest)
    batches = scoring_batches(encoding, 0, 64)
    assert all(batch.input_ids.numel() <= 2 * longest for batch in batches)
    assert sorted(np.concatenate([b.examples for b in batches])) == list(range(len(encoding)))
    assert {len(group) for group in groups(encoding.lengths, 64, 1)} == {1}
    for longest_first in (False, True):
        found = groups(np.array([3, 9, 4, 9, 1, 8]), 2, 18, longest_first)
        assert max(len(group) for group in found) == 2 and sum(map(len, found)) == 6
        lengths = np.concatenate([np.array([3, 9, 4, 9, 1, 8])[group] for group in found])
        assert (np.diff(lengths if not longest_first else lengths[::-1]) >= 0).all()


def test_the_end_token_is_not_counted(tiny):
    model = tiny.student(3)
    ended = tiny.student_encoding("validation")
    plain = type(ended)(
        ended.ids[ended.spans[:, 1] > ended.spans[:, 0]],
        ended.spans[ended.spans[:, 1] > ended.spans[:, 0]],
        ended.offsets - np.arange(len(ended.offsets)),
        ended.segments,
        ended.byte_segments,
        ended.segment_hashes,
    )
    assert (ended.lengths == plain.lengths + 1).all()
    with_end, without = (score(model, e, scoring_batches(e, 0, 5)) for e in (ended, plain))
    np.testing.assert_allclose(with_end.nll, without.nll, rtol=1e-5)
    assert (with_end.tokens == without.tokens).all() and (with_end.tokens_all == without.tokens_all).all()
    # without BOS nothing predicts the first token, and its bytes are not counted
    first = ended.spans[ended.offsets[:-1], 1]
    assert (with_end.bytes_all == ended.byte_segments[:, 2, 1] - first).all() and (first > 0).all()
    assert (with_end.tokens_all == plain.lengths - 1).all()


def test_the_models_mode_is_put_back(side):
    model, encoding = side
    batches = scoring_batches(encoding, 0, 5)
    assert not model.training
    score(model, encoding, batches)
    assert not model.training
    model.train()
    score(model, encoding, batches)
    assert model.training
    model.eval()


# ---------------------------------------------------------------- long texts
def brute_windows(model, ids, window, stride):
    """Each token from its own context, by the definition: a forward pass per token."""
    out = [0.0]
    for t in range(1, len(ids)):
        start = stride * max(0, -(-(t - window) // stride))  # the first window that reads up to t - 1
        with torch.no_grad():
            logits = model(torch.from_numpy(ids[start:t].copy())[None]).logits[0, -1]
        out.append(-logits.log_softmax(-1)[ids[t]].item())
    return np.array(out)


@pytest.mark.parametrize(("window", "stride"), [(7, 7), (7, 3), (7, 1), (13, 5), (41, 41), (60, 9)])
@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_windows_are_the_definition(side, window, stride, chunk):
    model, _ = side
    ids = np.random.default_rng(3).integers(5, 300, 41)
    expected = brute_windows(model, ids, window, stride)
    found = windowed_nll(model, ids, window, stride, chunk)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5)
    assert found[0] == 0 and (found[1:] > 0).all()


def test_a_window_that_holds_the_text_is_plain_likelihood(side):
    model, encoding = side
    plain = score(model, encoding, scoring_batches(encoding, 0, 4))
    windows = empty_scores(encoding)
    for example in range(len(encoding)):
        score_long(model, encoding, windows, example, window=500, stride=250)
    for name in ("nll", "nll_all"):
        np.testing.assert_allclose(getattr(windows, name), getattr(plain, name), rtol=1e-4)
    for name in ("tokens", "bytes", "tokens_all", "bytes_all"):
        assert (getattr(windows, name) == getattr(plain, name)).all()


@pytest.mark.parametrize(("window", "stride"), [(3, 4), (3, 0)])
def test_a_stride_that_leaves_tokens_out_is_refused(side, window, stride):
    with pytest.raises(ValueError, match=f"stride of {stride} needs"):
        windowed_nll(side[0], np.arange(9), window, stride)


def test_only_the_given_examples_are_scored(side):
    model, encoding = side
    some = np.array([0, 3])
    scores = score(model, encoding, scoring_batches(encoding, 0, 5, some))
    assert (scores.nll[some] > 0).all() and (np.delete(scores.nll, some) == 0).all()


def test_plain_text_counts_the_bytes_that_are_predicted(tiny):
    """Without a prompt and without BOS nothing predicts the first token: its bytes are in no count."""
    records = [Record("t", "wiki", "", "Ann has 4 pens and Ben has 5.", "")]
    template = Template(prompt="{prompt}", reasoning="{reasoning}", answer="{answer}")
    tokenizer = tiny.student_tokenizer
    encoding = encode_records(records, tokenizer, template)
    scores = score(tiny.student(0), encoding, scoring_batches(encoding, 0, 1))
    first = len(tokenizer.decode(encoding.ids[:1]))
    assert scores.nll[0] == scores.nll_all[0] > 0 and scores.tokens[0] == len(encoding.ids) - 1
    assert scores.bytes[0] == scores.bytes_all[0] == len(records[0].reasoning) - first
