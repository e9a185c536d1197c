"""Multiple choice: the nats of each choice as transformers counts them, and the choice that follows."""

import pytest
import torch

from kvpipe.config import Template
from kvpipe.data.records import Record
from kvpipe.evaluate.choices import PERTURBED, choice_nll, chosen, perturbed
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


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("18 every day.\n#### 18", "18"),
        ("1,180 in all, of 3,118 and 0.118 and 1181.\n#### 1,180", "1180"),
        ("7\n", "7"),
        ("$0.50 each, not 50.\n#### 0.50", "0.50"),
    ],
)
def test_wrong_answers_differ_in_one_digit_of_the_last_number_wherever_it_stands_alone(answer, number):
    record = Record("a", "math", "What?", "2 * 9 = ", answer)
    choices = perturbed(record).choices
    assert choices == perturbed(record).choices and choices[0] == answer and len(set(choices)) == PERTURBED + 1
    for wrong in choices[1:]:
        new = wrong.replace(",", "").split()[-1]
        assert len(new) == len(number) and sum(a != b for a, b in zip(new, number, strict=True)) == 1
        assert not (len(new) > 1 and new[0] == "0" and number[0] != "0")
        # what else is said stays, and the right number stands nowhere alone
        plain = [text.replace(",", "") for text in (wrong, answer)]
        assert plain[0].count(number) == plain[1].count(number) - plain[1].split().count(number) - answer.count(
            f"${number}"
        )


def test_perturbed_answers_follow_the_reasoning(tiny):
    from kvpipe.config import EvaluateConfig
    from kvpipe.evaluate.score import evaluate_model

    folder, template = tiny.paths.model("alpha"), Template()
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    records = [
        Record("a", "math", "Add 3 and 4.", "3 + 4 = ", "7 in all\n#### 7"),
        Record("b", "math", "x", "y = ", "61"),
    ]
    table = evaluate_model(model, tokenizer, records, template, EvaluateConfig(scorer="perturbed"))
    for record, row in zip(records, table.itertuples(), strict=True):
        choices = perturbed(record).choices
        context = f"{record.prompt}\n{record.reasoning}\n####"
        for choice, nll in zip(choices, row.choice_nll, strict=True):
            before, whole = (
                tokenizer(text, return_tensors="pt").input_ids for text in (context, f"{context} {choice}")
            )
            with torch.no_grad():
                logp = model(input_ids=whole).logits.log_softmax(-1)[0, :-1].gather(1, whole[0, 1:, None])[:, 0]
            assert nll == pytest.approx(-float(logp[before.shape[1] - 1 :].sum()), rel=1e-4)
        best = min(range(4), key=lambda i: row.choice_nll[i])
        assert row.prediction == choices[best] and row.correct == (best == 0)


def test_an_answer_without_a_number_is_named():
    with pytest.raises(ValueError, match="record 'a' has no number in its answer 'yes'"):
        perturbed(Record("a", "math", "x", "", "yes"))
