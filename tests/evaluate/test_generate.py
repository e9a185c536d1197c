"""Padded greedy generation equals transformers' `generate` one by one; rows end early, and where they end does not differ."""

import pytest
import torch
from transformers import GenerationConfig

from kvpipe.config import EvaluateConfig, Template
from kvpipe.data.records import render
from kvpipe.evaluate.generate import Stops, cut, end_tokens, generate
from kvpipe.models.folders import load_model, load_tokenizer

CONFIG = EvaluateConfig(max_new_tokens=9)


@pytest.fixture(scope="module", params=["alpha", "beta"])
def model(request, tiny):
    folder = tiny.paths.model(request.param)
    return load_model(folder), load_tokenizer(folder)


@pytest.fixture(scope="module")
def prompts(tiny):
    return [render(record, Template()).prompt for record in tiny.records("validation")]


def alone(model, tokenizer, prompt, new=9):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=new, do_sample=False, attention_mask=torch.ones_like(ids))
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_generation_is_that_of_each_prompt_alone(model, prompts):
    found = generate(*model, prompts, CONFIG, 3)
    assert found == [alone(*model, prompt) for prompt in prompts]
    assert len({len(p) for p in prompts}) > 1 and any(found)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_batch_size_does_not_matter(model, prompts, batch_size):
    assert generate(*model, prompts, CONFIG, batch_size) == generate(*model, prompts, CONFIG, 3)


def test_generation_ends_at_the_end_of_text(tiny, prompts):
    model, tokenizer = tiny.student(0), tiny.student_tokenizer
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.eos_token_id] = 1e-3 * torch.randn(24)
    texts = generate(model, tokenizer, prompts, CONFIG, 3)
    # logits are 0 but for the end's: it comes first or token 0 does, for ever
    assert set(texts) <= {"", tokenizer.decode([0]) * 9} and "" in texts


@pytest.mark.parametrize(
    "text, stop, left",
    [
        ("a\nb\nc", ["\n"], "a\n"),
        ("a;b\nc", ["\n", ";"], "a;"),
        ("abc", ["x"], "abc"),
        ("abc", [], "abc"),
        ("#### 7\n\nmore", ["\n\n"], "#### 7\n\n"),
    ],
)
def test_text_is_cut_after_the_first_stop_string(text, stop, left):
    assert cut(text, stop) == left


def steps_of(model, prompts, config, batch_size, monkeypatch):
    """Texts, and how many forward passes they took."""
    net, tokenizer = model
    count = 0
    forward = type(net).forward

    def counted(*arguments, **more):
        nonlocal count
        count += 1
        return forward(*arguments, **more)

    monkeypatch.setattr(type(net), "forward", counted)
    texts = generate(net, tokenizer, prompts, config, batch_size)
    monkeypatch.setattr(type(net), "forward", forward)
    return texts, count


@pytest.mark.parametrize("length", [1, 2, 3])
def test_stop_strings_end_a_row_and_a_batch_early(model, prompts, length, monkeypatch):
    """A stop string may be spelled by several tokens, or begin inside one."""
    long = EvaluateConfig(max_new_tokens=31)
    full, all_steps = steps_of(model, prompts, long, 64, monkeypatch)
    stop = sorted({text[1 : 1 + length] for text in full if text})
    config = long.model_copy(update={"stop": stop})
    texts, steps = steps_of(model, prompts, config, 64, monkeypatch)
    assert texts == [cut(text, stop) for text in full]
    assert texts == generate(*model, prompts, config, 1)
    ended = [text for text, whole in zip(texts, full, strict=True) if text != whole]
    assert ended and steps < all_steps == 31


def test_one_row_that_goes_on_does_not_lengthen_the_others(model, prompts):
    full = generate(*model, prompts, CONFIG, 64)
    stop = [max(full, key=len)[2]]
    config = CONFIG.model_copy(update={"stop": stop})
    assert generate(*model, prompts, config, 64) == [cut(text, stop) for text in full]


def test_stops_look_at_the_end_of_a_row_and_only_behind_the_prompt(model):
    tokenizer = model[1]
    prompt, rest = (tokenizer(t, add_special_tokens=False).input_ids for t in ("7 + 3", " is 9 or 10, no"))
    stops = Stops(tokenizer, ["3", "10"], len(prompt))
    row = torch.tensor([prompt + rest])
    found = [bool(stops(row[:, :n], None)) for n in range(len(prompt) + 1, row.shape[1] + 1)]
    texts = [tokenizer.decode(rest[:n]) for n in range(1, len(rest) + 1)]
    assert found == ["10" in text for text in texts] and any(found) and not all(found)


def test_the_models_own_generation_settings_are_not_used_but_for_its_end_tokens(tiny, prompts):
    model, tokenizer = tiny.student(0), tiny.student_tokenizer
    plain = generate(model, tokenizer, prompts, CONFIG, 3)
    own = GenerationConfig(
        repetition_penalty=1.7, no_repeat_ngram_size=1, num_beams=3, min_new_tokens=20, eos_token_id=[5, 7]
    )
    model.generation_config = own
    assert end_tokens(model, tokenizer) == sorted({5, 7, tokenizer.eos_token_id})
    model.generation_config.eos_token_id = None
    assert generate(model, tokenizer, prompts, CONFIG, 3) == plain
    assert model.generation_config is own


def test_a_prompt_that_the_model_cannot_read_is_refused(model):
    with pytest.raises(ValueError, match="exceed the 512 tokens that the model reads: 'word word"):
        generate(*model, ["word " * 600], CONFIG, 1)
