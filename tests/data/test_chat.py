"""Chat templates, in the rows already and applied here: no token twice, segments kept, each model its own marks."""

import json
import warnings

import numpy as np
import pytest
import tokenizer_zoo
import torch
from tiny import ALPHA, BETA, STUDENT, config
from tokenizers import AddedToken

from kvpipe.align.timemap import build_time_map, shared_spans
from kvpipe.config import ConfigError, ScoringConfig, Template, TimeConfig
from kvpipe.data import build as data
from kvpipe.data.batches import IGNORE, collate
from kvpipe.data.chat import end_of_turn, rendered
from kvpipe.data.encoding import encode_records, load_encoding, prompt_ids, save_encoding
from kvpipe.data.records import Record, read_records, write_records
from kvpipe.evaluate import dialogue
from kvpipe.evaluate.choices import choice_nll
from kvpipe.evaluate.generate import generate
from kvpipe.evaluate.score import evaluate_model
from kvpipe.experiment.paths import Paths
from kvpipe.models.folders import build_model
from kvpipe.models.likelihood import score, scoring_batches
from kvpipe.steps.evaluate import answer_questions
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.models import make_model
from kvpipe.steps.train import prepare, train_cell

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def chatml():
    tokenizer = tokenizer_zoo.build("qwen2")
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    tokenizer.chat_template = CHATML
    return tokenizer


def llama():
    tokenizer = tokenizer_zoo.build("llama3")
    names = ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", "<|pad|>"]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"}
    tokenizer.add_special_tokens(special)
    tokenizer.chat_template = LLAMA
    return tokenizer


def zephyr():
    tokenizer = tokenizer_zoo.build("llama2")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"})
    tokenizer.chat_template = ZEPHYR
    return tokenizer


MODELS = {"chatml": chatml, "llama": llama, "zephyr": zephyr}
LIVE = Template(chat_template=True, answer="= {answer}\n")
TURNS = (("system", "Be short."), ("user", "2+3?"), ("assistant", "5"), ("user", "Sure?"))
RECORDS = [
    Record("a", "math", "Ann has 3 cats, naïve 日本?", "3 + 4 = 7", "7"),
    Record("b", "math", "  How many 😀?\n", "", "12 apples"),
    Record("c", "chat", "", "", "It is 5.", messages=TURNS),
]  # fmt: skip


@pytest.fixture(params=MODELS)
def tokenizer(request):
    return MODELS[request.param]()


def quiet(*_):
    pass


# ---------------------------------------------------------------- templates that are in the rows
def stored(tokenizer, *contents: str) -> list[Record]:
    """Rows that a template has written: prompt with its marks, answer with the end of turn."""
    whole, live = [], Template(chat_template=True, reasoning="{reasoning}", answer="{answer}")
    for number, content in enumerate(contents):
        text = rendered(tokenizer, Record(str(number), "x", content, "", content[::-1]), live)
        whole.append(Record(str(number), "x", text.prompt, "", text.answer))
    return whole


ROWS = Template(prompt="{prompt}", reasoning="{reasoning}", answer="{answer}")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", "3 of 3 texts ('0' first) begin with '<|begin_of_text|>' twice"),
        ("chatml", "3 of 3 texts ('0' first) end with '<|im_end|>' twice"),
        ("zephyr", "3 of 3 texts ('0' first) end with '</s>' twice"),
    ],
)
def test_tokens_that_a_row_and_a_tokenizer_both_bring_are_counted_once(name, expected):
    tokenizer = MODELS[name]()
    records = stored(tokenizer, "Why?", "Who is it?", "When, and where?")
    with pytest.warns(UserWarning) as caught:
        encode_records(records, tokenizer, ROWS, end=True)
    said = [str(w.message) for w in caught]
    assert len(said) == 1 and expected in said[0] and "take it out of the rows" in said[0]


def test_white_space_between_two_ends_does_not_hide_them():
    tokenizer = chatml()
    records = [Record("0", "x", "a?", "", "b<|im_end|>\n"), Record("1", "x", "a?", "", "b")]
    with pytest.warns(UserWarning, match=r"1 of 2 texts \('0' first\) end with '<\|im_end\|>' twice"):
        encode_records(records, tokenizer, ROWS, end=True)


def test_an_end_that_the_tokenizer_adds_is_not_added_again():
    tokenizer = tokenizer_zoo.build("llama2_first")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    encoding = encode_records(RECORDS[:2], tokenizer, Template(), end=True)
    for number in range(2):
        assert (encoding.ids[encoding.rows(number)] == tokenizer.eos_token_id).sum() == 1


def test_prompts_that_do_not_begin_their_texts_tokens_are_counted():
    tokenizer = chatml()
    # the prompt ends inside a word: its last token is another one when the word goes on
    inside = [Record("w", "x", "The ca", "", "t sat"), Record("v", "x", "The cat", "", " sat")]
    with pytest.warns(UserWarning, match=r"1 of 2 texts \('w' first\) have a prompt .* no beginning"):
        encode_records(inside, tokenizer, ROWS, end=True)


def test_an_end_token_that_ends_a_prompt_is_generated_from():
    """A turn of the conversation may end there; only what the tokenizer itself adds is left out."""
    tokenizer = chatml()
    assert prompt_ids(tokenizer, "a<|im_end|>").tolist()[-1] == tokenizer.eos_token_id


def test_clean_rows_say_nothing(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_records(RECORDS[:2], tokenizer, Template(prompt="Q: {prompt}\n", answer="A: {answer}\n"))
        encode_records(RECORDS, tokenizer, LIVE, end=True)


def test_rows_with_marks_under_a_chat_template_are_counted():
    tokenizer = llama()
    records = [*stored(tokenizer, "Why?"), Record("plain", "x", "Who?", "", "I")]
    with pytest.warns(UserWarning, match=r"1 of 2 texts \('0' first\) hold special tokens"):
        encode_records(records, tokenizer, LIVE, end=True)


# ---------------------------------------------------------------- templates applied here
def test_ids_are_those_of_the_template_and_no_token_stands_twice(tokenizer):
    encoding = encode_records(RECORDS, tokenizer, LIVE, end=True)
    for number, record in enumerate(RECORDS):
        turns = record.messages or (("user", record.prompt.strip()),)
        answer = (f"{record.reasoning}\n" if record.reasoning else "") + f"= {record.answer}"
        messages = [{"role": role, "content": text} for role, text in (*turns, ("assistant", answer))]
        expected = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
        ids = encoding.ids[encoding.rows(number)].tolist()
        # the same but for the white space after the last end of turn, which nobody is asked
        assert ids == expected[: len(ids)] and tokenizer.decode(expected[len(ids) :]).strip() == ""
        assert ids[-1] == end_of_turn(tokenizer)
        if tokenizer.bos_token_id is not None:
            assert ids.count(tokenizer.bos_token_id) <= 1


def test_generation_starts_from_the_beginning_of_what_was_trained(tokenizer):
    encoding = encode_records(RECORDS, tokenizer, LIVE, end=True)
    for number, record in enumerate(RECORDS):
        turns = record.messages or (("user", record.prompt.strip()),)
        messages = [{"role": role, "content": text} for role, text in turns]
        prompt = prompt_ids(tokenizer, rendered(tokenizer, record, LIVE).prompt, chat=True).tolist()
        assert prompt == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert encoding.ids[encoding.rows(number)].tolist()[: len(prompt)] == prompt
        # and all that comes after it is the completion
        last = len(encoding.texts[number]) - 3
        assert encoding.segments[number, last, 1] == len(prompt)


def test_segments_hold_their_text_and_special_tokens_hold_none(tokenizer):
    encoding = encode_records(RECORDS, tokenizer, LIVE, end=True)
    special = set(tokenizer.all_special_ids) | {t for t, a in tokenizer.added_tokens_decoder.items() if a.special}
    for number, record in enumerate(RECORDS):
        text = encoding.texts[number]
        assert text.answer == f"= {record.answer}"
        assert text.reasoning == (f"{record.reasoning}\n" if record.reasoning else "")
        assert "<|im_" not in text.text and "<|eot" not in text.text and "</s>" not in text.text
        rows = encoding.rows(number)
        spans, ids = encoding.spans[rows], encoding.ids[rows]
        assert spans[0, 0] == 0 and (spans[1:, 0] == spans[:-1, 1]).all()
        assert spans[-1, 1] == len(text.text.encode()) == encoding.byte_segments[number, -1, 1]
        assert all(a == b for i, (a, b) in zip(ids, spans, strict=True) if int(i) in special)


TALK = [
    ("user", "Say Yes, not 5."),
    ("assistant", "Yes, 日本"),
    ("user", "Yes? And 5?"),
    ("assistant", "5"),
    ("user", "5!"),
]


def test_every_turn_of_the_assistant_is_trained_and_scored(tokenizer, tmp_path):
    """Beside a record of one turn; what an answer says is no answer where a user has said it before."""
    records = [RECORDS[0], Record("t", "chat", "", "", "Yes.", messages=tuple(TALK)), RECORDS[1]]
    encoding = encode_records(records, tokenizer, LIVE, end=True)
    answers, end = ["Yes, 日本", "5", "= Yes."], end_of_turn(tokenizer)
    assert encoding.segments.shape == (3, 9, 2) and list(encoding.texts[1])[1::3] == ["", "", ""]
    assert list(encoding.texts[1])[2::3] == answers and len(encoding.texts[0]) == 3
    ids = collate(encoding, np.arange(3), 0, "completion").labels
    labelled = ids[1][ids[1] != IGNORE].tolist()
    assert labelled.count(end) == 3
    parts = [[]]
    for token in labelled:
        parts = [*parts, []] if token == end else [*parts[:-1], [*parts[-1], token]]
    assert [tokenizer.decode(part).strip() for part in parts] == [*answers, ""]
    # likelihood is of the same tokens, but for those without text
    model = build_model({**STUDENT, "vocab_size": len(tokenizer)}, tokenizer, 0)
    scores = score(model, encoding, scoring_batches(encoding, 0, 2))
    assert scores.bytes[1] == sum(len(answer.encode()) for answer in answers)
    spans = encoding.spans[encoding.rows(1)]
    with_bytes = torch.from_numpy(spans[:, 1] > spans[:, 0])
    assert scores.tokens[1] == int((with_bytes & (ids[1][: len(spans)] != IGNORE)).sum())
    alone = encode_records(records[:1], tokenizer, LIVE, end=True)
    assert score(model, alone, scoring_batches(alone, 0, 2)).nll[0] == pytest.approx(scores.nll[0], rel=1e-5)
    save_encoding(encoding, tmp_path / "x", {})
    again = load_encoding(tmp_path / "x", {})
    assert again.texts == encoding.texts and (again.segment_hashes == encoding.segment_hashes).all()
    joined = alone + encoding.taken(np.array([1]))
    assert (joined.segments == encoding.segments[:2]).all() and (
        joined.segment_hashes == encoding.segment_hashes[:2]
    ).all()


def test_a_turn_that_the_template_changes_is_named():
    tokenizer = chatml()
    tokenizer.chat_template = CHATML.replace("m['content']", "m['content'] | replace('Yes', 'No')")
    with pytest.raises(ValueError, match="record 't': the chat template leaves out or changes the answer 'Yes, 日本'"):
        rendered(tokenizer, Record("t", "chat", "", "", "So.", messages=tuple(TALK)), LIVE)


def test_a_template_with_a_date_writes_the_same_one_every_day():
    tokenizer = llama()
    tokenizer.chat_template = "\n {{ strftime_now('%d %b %Y') }}\n" + LLAMA
    assert rendered(tokenizer, RECORDS[0], LIVE).prompt.startswith("\n 26 Jul 2024\n<|begin_of_text|>")


@pytest.mark.parametrize(
    ("template", "match"),
    [
        (None, "llama3 has no chat template"),
        (LLAMA.replace("assistant<|end_header_id|>\n\n", "assistant<|end_header_id|>\n\n<think>"), "generation prompt does"),
        (LLAMA.replace("| trim", "| upper"), "changes the answer"),
        ("{{ raise_exception('no system') }}", "refuses the messages .user.: no system"),
    ],
)  # fmt: skip
def test_what_a_template_cannot_do_is_refused_by_model_and_record(template, match):
    tokenizer = llama()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=match) as error:
        encode_records(RECORDS, tokenizer, LIVE)
    assert "llama3" in str(error.value) and ("record '" in str(error.value) or template is None)


def test_plain_text_is_no_conversation():
    with pytest.raises(ValueError, match=r"llama3, record 'p': .* needs a prompt and an answer"):
        encode_records([Record("p", "text", "", "Once upon a time.", "")], llama(), LIVE)


def test_models_made_here_have_no_chat_template(tmp_path):
    with pytest.raises(ConfigError, match=r"models.student is made here \(source: scratch\)"):
        config(tmp_path, {"data.template": {"chat_template": True}})


def test_messages_survive_parquet(tmp_path):
    write_records(tmp_path / "r.parquet", RECORDS)
    assert read_records(tmp_path / "r.parquet") == RECORDS


# ---------------------------------------------------------------- two templates, one conversation
def ending_at(encoding, number, end):
    """Rows of an example whose text ends there."""
    spans = encoding.spans[encoding.rows(number)]
    return np.flatnonzero((spans[:, 1] == end) & (spans[:, 0] < end)) + encoding.offsets[number]


@pytest.mark.parametrize(("src", "dst"), [("llama", "chatml"), ("chatml", "llama"), ("zephyr", "llama")])
@pytest.mark.parametrize("kind", ["overlap", "segment"])
def test_tokens_of_shared_text_meet_across_templates(src, dst, kind):
    src, dst = (encode_records(RECORDS, MODELS[n](), LIVE, end=True) for n in (src, dst))
    time = build_time_map(TimeConfig(kind=kind), src, dst)
    for number in range(len(RECORDS)):
        for row in range(dst.offsets[number], dst.offsets[number + 1]):
            start, stop = dst.spans[row]
            if start == stop:
                assert not time.mask[row], "a special token has no target"
                continue
            if not time.mask[row]:
                continue
            read = int(time.index[row][time.weight[row] > 0][-1])
            assert src.offsets[number] <= read < src.offsets[number + 1]
            assert src.spans[read, 1] > src.spans[read, 0], "nor is one read"
            segment = int((stop > dst.byte_segments[number, :, 1]).sum())
            if segment % 3:  # no prompt: the same text on both sides, and what was read is what the student has read
                ends = [
                    stop - dst.byte_segments[number, segment, 0],
                    src.spans[read, 1] - src.byte_segments[number, segment, 0],
                ]
                assert 0 < ends[1] <= ends[0]
    # the user's own words meet, whatever marks stand around them
    for number, word in ((0, "cats"), (2, "Sure")):
        texts = [e.texts[number].text.encode() for e in (src, dst)]
        ends = [text.index(word.encode()) + len(word) for text in texts]
        rows = [ending_at(e, number, end) for e, end in zip((src, dst), ends, strict=True)]
        if all(len(r) for r in rows):
            assert time.index[rows[1][0], 0] == rows[0][0] and time.weight[rows[1][0], 0] == 1


def test_next_tokens_are_compared_in_equal_segments_only():
    src, dst = (encode_records(RECORDS, MODELS[n](), LIVE, end=True) for n in ("llama", "chatml"))
    spans = [s.numpy() for s in shared_spans(src, dst)]
    for side, shifted in zip((src, dst), spans, strict=True):
        for number in range(len(RECORDS)):
            place = np.arange(side.offsets[number + 1] - side.offsets[number])
            turns = side.segments[number].reshape(-1, 3, 2)
            inside = np.any([(place >= begin) & (place < end) for begin, end in turns[:, 0]], axis=0)
            widths = np.diff(shifted[side.rows(number)])[:, 0]
            said = np.diff(side.byte_segments[number].reshape(-1, 3, 2)[:, 1:])
            assert (widths[inside] == 0).all() and widths[~inside].sum() == said.sum()


# ---------------------------------------------------------------- a cell, end to end
@pytest.fixture(scope="module")
def chat_cell(tmp_path_factory):
    """A ChatML student learns from a Llama-type and a ChatML teacher, each reading its own rendering."""
    folder = tmp_path_factory.mktemp("chat")
    for seed, (name, made, architecture) in enumerate(
        [("alpha", llama, ALPHA), ("beta", chatml, BETA), ("student", chatml, STUDENT)]
    ):
        tokenizer = made()
        build_model(architecture, tokenizer, seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    models = {f"models.{n}": {"source": "local", "path": str(folder / n)} for n in ("alpha", "beta", "student")}
    live = {"data.template": {"chat_template": True}, "train.loss_on": "completion"}
    work = Inputs(config(folder, models | live), Paths(folder / "results"))
    data.build(work.config.data, work.paths.data("train").parent)
    for name in ("alpha", "beta", "student"):
        make_model(work, name)
    prepare(work, "two", log=quiet)
    train_cell(work, "two", 0, folder / "out", folder / "checkpoints", log=quiet)
    return work, folder / "out"


def test_a_cell_trains_and_is_evaluated_under_two_templates(chat_cell):
    from kvpipe.models.folders import load_model, load_tokenizer

    work, out = chat_cell
    model, tokenizer = load_model(out / "model"), load_tokenizer(out / "model")
    assert tokenizer.chat_template == CHATML, "the student's tokenizer keeps its template"
    records = work.records("test")
    table = evaluate_model(model, tokenizer, records, work.config.data.template, work.config.evaluate, log=quiet)
    encoding = work.student_encoding("train")
    assert (encoding.ids == tokenizer.eos_token_id).sum() == 2 * len(encoding), "one end for each of the two turns"
    for row, record in zip(table.itertuples(), records, strict=True):
        said = f"{record.reasoning}\n#### {record.answer}"
        assert row.bytes == len(said.encode())
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": record.prompt.strip()}, {"role": "assistant", "content": said}]
        )["input_ids"]
        ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id) - 1]  # reasoning and answer, without the end
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        nats = [-float(logprobs[i - 1, ids[i]]) for i in range(len(ids) - row.tokens, len(ids))]
        assert row.nll == pytest.approx(sum(nats), rel=1e-5)


def test_generation_ends_at_the_templates_end_of_turn():
    """Llama's end of text is another token than its end of turn, after which the model would go on."""
    tokenizer = llama()
    model = build_model(STUDENT, tokenizer, 0)
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|eot_id|>") != tokenizer.eos_token_id
    letter = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    turn = end_of_turn(tokenizer)

    embedding = torch.zeros(len(tokenizer), STUDENT["hidden_size"])
    embedding[:, 0] = 1.0
    embedding[letter, 0], embedding[letter, 1] = 0.0, 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.zero_() if "norm" not in name else parameter.fill_(1.0)
        model.get_input_embeddings().weight.copy_(embedding)
        head = torch.zeros(len(tokenizer), STUDENT["hidden_size"])
        head[letter, 0], head[turn, 1] = 1.0, 1.0
        model.get_output_embeddings().weight = torch.nn.Parameter(head)
    prompt = rendered(tokenizer, RECORDS[0], LIVE).prompt
    settings = ScoringConfig(max_new_tokens=9, stop=[])
    assert generate(model, tokenizer, [prompt], settings, 1, chat=True) == ["a"]
    assert generate(model, tokenizer, [prompt], settings, 1) != ["a"]


def test_answers_are_those_of_mt_benchs_judge_and_follow_the_ones_before(chat_cell, tmp_path, monkeypatch):
    """Through the command; each turn is answered after the model's own answers."""
    work, out = chat_cell
    questions = tmp_path / "question.jsonl"
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["Hi?", "And 5?"]},
        {"question_id": 7, "turns": ["So."]},
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    seen = []

    def generated(model, tokenizer, prompts, *rest, chat):
        seen.append(prompts)
        return [f" said {number} " for number in range(len(prompts))]

    monkeypatch.setattr(dialogue, "generate", generated)
    line = answer_questions(work, out / "model", questions, tmp_path / "mine.jsonl")
    assert line.endswith("2 questions, 3 turns answered")
    marks = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert seen[0] == [marks.format("Hi?"), marks.format("So.")]
    assert seen[1] == [marks.format("Hi?") + "said 0<|im_end|>\n" + marks.format("And 5?")]
    one, two = (json.loads(line) for line in (tmp_path / "mine.jsonl").read_text(encoding="utf-8").splitlines())
    assert one["question_id"] == 81 and two["question_id"] == 7 and one["model_id"] == two["model_id"] == "mine"
    assert one["choices"] == [{"index": 0, "turns": ["said 0", "said 0"]}] and one["answer_id"] != two["answer_id"]
    assert {"answer_id", "tstamp"} <= one.keys() and len(two["choices"][0]["turns"]) == 1


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"question_id": 1}, "question 1: expected turns"),
        ({"question_id": 1, "turns": ["a", " "]}, "question 1: expected turns"),
        ({"turns": ["a"]}, "question 1: expected a question_id"),
    ],
)
def test_questions_that_are_none_are_refused(tmp_path, row, match):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=match):
        dialogue.read_questions(path)


def test_choices_follow_the_generation_prompt(tokenizer):
    model = build_model(STUDENT, tokenizer, 0)
    record = Record("m", "quiz", "Which?", "", "one", choices=("one", "another"))
    template = Template(answer="{answer}", chat_template=True)
    found = choice_nll(model, tokenizer, [record], template, tokenizer.pad_token_id, 2)[0]
    prompt = rendered(tokenizer, record, template).prompt
    for choice, nats in zip(record.choices, found, strict=True):
        ids = tokenizer(prompt + choice, add_special_tokens=False)["input_ids"]
        first = len(tokenizer(prompt.rstrip(), add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        assert nats == pytest.approx(-sum(float(logprobs[i - 1, ids[i]]) for i in range(first, len(ids))), rel=1e-4)
