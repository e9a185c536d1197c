"""Multiple choice: the nats of each choice as transformers counts them, and the choice that follows."""

import pytest
import torch

from kvpipe.config import Template
from kvpipe.data.records import Record
from kvpipe.evaluate.choices import choice_nll, chosen
from kvpipe.models.folders import load_model, load_tokenizer

TEMPLATE = Template(prompt="Q: {prompt}\nA:", reasoning="", answer=" {answer}")
TEMPLATES = [
    TEMPLATE,
    Template(prompt="Q: {prompt}\n", answer="A: {answer}\n"),
    Template(prompt="Q: {prompt}\nA: ", answer="{answer}."),
]
RECORDS = [
    Record("a", "t", "how many pens", "", "four", choices=("one", "four", "a great many")),
    Record("b", "t", "which", "because", "x", choices=("x", "yes it is")),
]


@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("template", TEMPLATES)
def test_nats_are_those_of_each_choice_alone(tiny, name, batch_size, template):
    """Wherever the template has its own words: in the prompt or in the answer, before the choice or behind it."""
    folder = tiny.paths.model(name)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    found = choice_nll(model, tokenizer, RECORDS, template, 0, batch_size)
    assert [len(nll) for nll in found] == [3, 2]
    for record, nll in zip(RECORDS, found, strict=True):
        for choice, value in zip(record.choices, nll, strict=True):
            context = tokenizer(f"Q: {record.prompt}\nA:").input_ids
            whole = torch.tensor([tokenizer(f"Q: {record.prompt}\nA: {choice}").input_ids])
            assert whole[0, : len(context)].tolist() == context
            with torch.no_grad():
                logp = model(whole).logits.log_softmax(-1)[0, :-1].gather(1, whole[0, 1:, None])[:, 0]
            assert value == pytest.approx(-logp[len(context) - 1 :].sum().item(), rel=1e-4)


def test_the_likeliest_as_a_whole_or_per_byte():
    choices, nll = ("no", "certainly not", "ümlaut"), (3.0, 6.0, 5.9)
    assert chosen(nll, choices, "sum") == "no"
    assert chosen(nll, choices, "byte") == "certainly not"  # 1.5, 0.46, 0.84 nats per byte
    assert chosen((1.0, 1.0), ("a", "b"), "sum") == "a"


def test_a_record_without_choices_is_named(tiny):
    with pytest.raises(ValueError, match="'x' has no choices"):
        choice_nll(None, None, [Record("x", "t", "p", "", "a")], TEMPLATE, 0, 1)
