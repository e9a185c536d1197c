"""What a model cannot read is said before its first forward, with the model, the record and the token."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny import build
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvpipe.config import EvaluateConfig, Template
from kvpipe.data.encoding import encode_records
from kvpipe.data.records import Record
from kvpipe.evaluate.score import evaluate
from kvpipe.models.folders import recorded
from kvpipe.models.limits import Limits
from kvpipe.models.manifest import write_manifest
from kvpipe.steps.encode import make_encoding
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.teacher_kv import make_shard
from kvpipe.steps.train import load_cell

RECORDS = [Record("r0", "math", "2 + 2", "", "4"), Record("r1", "math", "1 + 2 + 3 + 4", "so 10", "10")]
SETTINGS = EvaluateConfig(batch_size=3, max_new_tokens=5)


@pytest.fixture
def no_forward(monkeypatch):
    """A forward is an error."""

    def refused(*_, **__):
        raise AssertionError("a model ran")

    monkeypatch.setattr(nn.Embedding, "forward", refused)


def folder(tmp_path, tiny, config, added: str | None = None, pad: str | None = None):
    """A model with the tokenizer of `alpha`, to which tokens were added and the model not resized."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.paths.model("alpha"))
    config.vocab_size = len(tokenizer)
    if added is not None:
        tokenizer.add_tokens([added])
    if pad is not None:
        tokenizer.add_special_tokens({"pad_token": pad})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def llama(context: int = 512) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=6, max_position_embeddings=context, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip


TABLES = {
    "gpt2": lambda n: transformers.GPT2Config(n_embd=24, n_layer=2, n_head=4, n_positions=n, eos_token_id=0),
    "opt": lambda n: transformers.OPTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, ffn_dim=20, max_position_embeddings=n,
        word_embed_proj_dim=24, eos_token_id=0,
    ),
    "gptj": lambda n: transformers.GPTJConfig(n_embd=24, n_layer=2, n_head=4, rotary_dim=4, n_positions=n),
}  # fmt: skip


def lengths(tokenizer, records=RECORDS) -> np.ndarray:
    return encode_records(records, tokenizer, Template()).lengths


@pytest.mark.parametrize("what", ["scored", "choice", "pad"])
def test_evaluation_refuses_ids_without_an_embedding(tmp_path, tiny, no_forward, what):
    records = list(RECORDS)
    settings = SETTINGS
    if what == "choice":  # only in a wrong choice
        records = [Record("r0", "math", "x", "", "4", choices=("4", "5")), records[1]]
        records[1] = Record("r1", "math", "x", "", "10", choices=("10", "<image>"))
        settings = EvaluateConfig(batch_size=3, scorer="choice")
    elif what == "scored":
        records[1] = Record("r1", "math", "an <image> of 5", "", "10")
    path = folder(tmp_path, tiny, llama(), *((None, "<padding>") if what == "pad" else ("<image>",)))
    size = json.loads((path / "config.json").read_text())["vocab_size"]
    token, record = ("<padding>", "r0") if what == "pad" else ("<image>", "r1")
    with pytest.raises(
        ValueError, match=rf"model .*: .*record '{record}' .*'{token}', id {size}, but its embedding has {size}"
    ):
        evaluate(path, records, Template(), settings, "cpu")


@pytest.mark.parametrize("family", TABLES)
def test_positions_beyond_a_table_are_refused_and_the_last_one_is_read(tmp_path, tiny, family):
    tokenizer = tiny.tokenizer("alpha")
    most = int(lengths(tokenizer).max())
    path = folder(tmp_path, tiny, TABLES[family](most))
    model = AutoModelForCausalLM.from_pretrained(path)
    limits = Limits.of("'m'", model.config)
    encoding = encode_records(RECORDS, tokenizer, Template())
    limits.check(encoding, RECORDS, tokenizer)
    with torch.no_grad():
        model(torch.zeros(1, most, dtype=torch.long))
        with pytest.raises((IndexError, RuntimeError)):  # what the check is for
            model(torch.zeros(1, most + 1, dtype=torch.long))
    short = Limits.of("'m'", TABLES[family](most - 1))
    with pytest.raises(ValueError, match=f"model 'm': record 'r1' has {most} tokens, more than the {most - 1} that"):
        short.check(encoding, RECORDS, tokenizer)


@pytest.mark.parametrize(
    "config",
    [transformers.BloomConfig(hidden_size=24, n_layer=2, n_head=4), transformers.FalconConfig(alibi=True)],
    ids=lambda config: config.model_type,
)
def test_alibi_has_no_table(config):
    limits = Limits.of("m", config)
    assert limits.positions is None or not limits.table


def test_rotary_models_past_their_context_warn_once_or_refuse(tiny):
    tokenizer = tiny.tokenizer("alpha")
    encoding = encode_records(RECORDS, tokenizer, Template())
    most = int(encoding.lengths.max())
    config = llama(most - 1)
    config.vocab_size = len(tokenizer)
    limits = Limits.of("'m'", config)
    with pytest.warns(
        UserWarning, match=f"model 'm': record 'r1' has {most} tokens, more than the {most - 1} .* 1 of 2"
    ):
        limits.check(encoding, RECORDS, tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        limits.check(encoding, RECORDS, tokenizer)
        limits.check(encoding, RECORDS, tokenizer, np.minimum(encoding.lengths, most - 1))
    with pytest.raises(ValueError, match=r"record 'r1' .* data.context: warn"):
        Limits.of("'m'", config, "strict").check(encoding, RECORDS, tokenizer)


def test_prompts_that_leave_no_room_are_named_before_anything_is_scored(tmp_path, tiny, no_forward):
    most = int(lengths(tiny.tokenizer("alpha")).max())
    path = folder(tmp_path, tiny, llama(most))
    with pytest.raises(ValueError, match=r"exceed the \d+ tokens that the model reads: model .*: record 'r\d'"):
        evaluate(path, RECORDS, Template(), EvaluateConfig(max_new_tokens=most - 4), "cpu")


def changed(folder: Path, **values) -> None:
    """Other values in a model's config, and a manifest that says so."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    write_manifest(folder, recorded(folder)["source"])


@pytest.mark.parametrize("model", ["alpha", "student"])
def test_ids_without_an_embedding_are_refused_before_anything_reads_them(tmp_path, model, no_forward):
    """As in a published folder whose tokenizer grew: the model's rows end before a token of the data."""
    work = build(tmp_path)
    config = json.loads((work.paths.model(model) / "config.json").read_text())
    changed(work.paths.model(model), vocab_size=config["vocab_size"] - 40)
    work = Inputs(work.config, work.paths)
    with pytest.raises(
        ValueError, match=rf"model '{model}': token \d+ of record '.+' is '.+', id \d+, but its embedding has"
    ):
        make_encoding(work, model, "student")
    # and the tokens that were made before belong to another model
    steps = [lambda: load_cell(work, "one", 0)]
    steps += [lambda: make_shard(work, "alpha", "student", "0")] if model == "alpha" else []
    for step in steps:
        with pytest.raises(ValueError, match=rf"encoding/{model}/\w+-student.safetensors was made from another model"):
            step()


@pytest.mark.parametrize("context", ["warn", "strict"])
def test_a_teacher_that_reads_past_its_context(tmp_path, context):
    work = build(tmp_path, {"data.context": context})
    changed(work.paths.model("alpha"), max_position_embeddings=5)
    work = Inputs(work.config, work.paths)
    if context == "strict":
        with pytest.raises(ValueError, match=r"model 'alpha': record '.+' has .* more than the 5 .* data.context"):
            make_encoding(work, "alpha", "student")
        return
    with pytest.warns(UserWarning, match="model 'alpha': .* more than the 5") as said:
        make_encoding(work, "alpha", "student")
    assert len([w for w in said if "model 'alpha'" in str(w.message)]) == 1
