"""The student's folder: what was scored, in the form that the student came in; a fault on the way there is an error."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import ALPHA, DATA, STUDENT, TOKENIZERS, build
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from kvpipe.config import DataConfig, Recipe
from kvpipe.data.corpus import generate
from kvpipe.data.records import render
from kvpipe.doctor import FAIL, Workload
from kvpipe.doctor.settings import check_arms
from kvpipe.models import folders as models
from kvpipe.models.folders import build_model, load_model
from kvpipe.models.pretrain import pretrain, tokenizer_texts
from kvpipe.models.tokenizers import train_tokenizer
from kvpipe.steps import train as cell_step
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.layer_map import make_layer_map
from kvpipe.steps.models import make_model
from kvpipe.steps.train import prepare, train_cell
from kvpipe.train import export
from kvpipe.train.export import SavedStudentDiffers

STEPS = {"train.steps": 3, "train.eval_every": 3, "train.checkpoint_every": 2, "train.learning_rate": 3e-2}


def save_student(folder: Path, dtype: torch.dtype, tied: bool, pad: bool) -> None:
    """A pretrained student: larger weights than drawn ones, a chat template, generation settings, and files around it."""
    split = DataConfig.model_validate(DATA)
    records = [record for task in ("math", "code") for record in generate(task, "train", 20, 1, split.seed)]
    tokenizer = train_tokenizer(TOKENIZERS["student"], tokenizer_texts(records, split))
    model = build_model(STUDENT | {"tie_word_embeddings": tied}, tokenizer, seed=5)
    if not pad:
        tokenizer.pad_token = None
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.add_tokens(["<extra>"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config = GenerationConfig(eos_token_id=0, max_new_tokens=7)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE.txt").write_text("as it is\n")
    (folder / "notes.txt").write_text("private\n")


def experiment(folder: Path, dtype=torch.float32, tied=True, pad=True, **overrides) -> Inputs:
    save_student(folder / "mine", dtype, tied, pad)
    student = {"models.student": {"source": "local", "path": str(folder / "mine")}}
    return build(folder, STEPS | student | overrides)


def run(work: Inputs, folder: Path, arm: str = "control", seed: int = 0) -> Path:
    prepare(work, arm, log=lambda line: None)
    train_cell(work, arm, seed, folder / "out", folder / "checkpoints", log=lambda line: None)
    return folder / "out"


# ---------------------------------------------------------------- the form that it came in
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_have_the_type_of_the_students_folder(tmp_path, dtype, lora):
    settings = {"train.lora": {"rank": 3}} if lora else {}
    cell = run(experiment(tmp_path, dtype, **settings), tmp_path)
    tensors = load_file(cell / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert set(tensors) == set(load_file(tmp_path / "mine" / "model.safetensors")), "tied weights are saved once"
    assert json.loads((cell / "cost.json").read_text())["model"]["dtype"] == str(dtype).removeprefix("torch.")
    plain = AutoModelForCausalLM.from_pretrained(cell / "model")
    assert plain.dtype == dtype
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_but_weights_is_as_it_came(tmp_path, checkpointing):
    source = tmp_path / "mine"
    cell = run(experiment(tmp_path, pad=False, **{"train.gradient_checkpointing": checkpointing}), tmp_path)
    model = cell / "model"
    kept = {path.name for path in source.iterdir()} - {"config.json", "model.safetensors", "notes.txt"}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} < kept
    for name in kept:
        assert (model / name).read_bytes() == (source / name).read_bytes(), name
    assert {p.name for p in model.iterdir()} == kept | {"config.json", "model.safetensors", "README.md"}
    assert json.loads((model / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.pad_token is None and tokenizer.convert_tokens_to_ids("<extra>") == 300
    assert GenerationConfig.from_pretrained(model).max_new_tokens == 7


def test_random_weights_have_the_files_of_their_model(tmp_path):
    work = experiment(tmp_path, pad=False, **{"models.noise": {"source": "random", "like": "student"}})
    make_model(work, "noise")
    assert AutoTokenizer.from_pretrained(work.paths.model("noise")).pad_token is None
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (work.paths.model("noise") / name).read_bytes() == (tmp_path / "mine" / name).read_bytes()


def test_an_older_student_leaves_nothing(tmp_path):
    work = experiment(tmp_path)
    (tmp_path / "out" / "model").mkdir(parents=True)
    for name in ("adapter_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / "out" / "model" / name).write_text("{}")
    cell = run(work, tmp_path)
    found = {path.name for path in (cell / "model").iterdir()}
    assert "model.safetensors" in found and not [name for name in found if "adapter" in name or "00" in name]


# ---------------------------------------------------------------- what is saved is what was scored
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_saved_folder_is_scored_again(own_accelerator, tmp_path, precision):
    work = experiment(tmp_path, **{"train.precision": precision})
    cost = json.loads((run(work, tmp_path) / "cost.json").read_text())
    assert cost["model"]["nats_saved"] == pytest.approx(cost["model"]["nats_in_memory"], abs=1e-6)
    model = load_model(tmp_path / "out" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    chosen = [work.records("validation")[i] for i in (0, 1, 2, 3, 4, 5, 6, 8)]  # eight of nine, spread
    nll, tokens = 0.0, 0
    for record in chosen:
        ids = tokenizer(render(record, work.config.data.template).text, return_tensors="pt").input_ids
        with torch.no_grad():
            nll += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert cost["model"]["nats_saved"] == pytest.approx(nll / tokens, rel=1e-5)


def spoil(change):
    """`save_model`, after which something of the folder is not what it was."""

    def save(model, source, out):
        models.save_model(model, source, out)
        change(out)

    return save


def add_noise(folder: Path, share: float = 0.5) -> None:
    from safetensors.torch import save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name] * (1 + share)
    save_file(tensors, path, metadata={"format": "pt"})


def not_a_number(folder: Path) -> None:
    add_noise(folder, float("nan"))


def another_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))


def another_tokenizer(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["merges"] = document["model"]["merges"][:-15]
    (folder / "tokenizer.json").write_text(json.dumps(document))


@pytest.mark.parametrize("change", [add_noise, not_a_number, another_config, another_tokenizer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_that_differs_is_an_error_and_nothing_is_lost(tmp_path, monkeypatch, dtype, change):
    work = experiment(tmp_path, dtype)
    monkeypatch.setattr(export, "save_model", spoil(change))
    with pytest.raises(SavedStudentDiffers, match=r"model\.unchecked: ") as error:
        run(work, tmp_path)
    if change is not another_tokenizer:
        says = (
            "NaN or infinity" if change is not_a_number else "nats per token on 8 validation records, the one in memory"
        )
        assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert (tmp_path / "checkpoints" / "step-00000002").is_dir()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.unchecked"}
    monkeypatch.undo()
    run(work, tmp_path)
    assert not (tmp_path / "out" / "model.unchecked").exists() and not (tmp_path / "checkpoints").exists()


def test_the_check_finds_adapters_on_tied_weights(tmp_path, monkeypatch):
    """What `train.lora` refuses at the start would be found at the end, too."""

    def unchecked(model, config):
        return get_peft_model(model, LoraConfig(r=4, lora_alpha=64, target_modules=["lm_head"], task_type="CAUSAL_LM"))

    work = experiment(tmp_path, **{"train.lora": {"rank": 4}})
    monkeypatch.setattr(cell_step, "adapted", unchecked)
    with pytest.raises(SavedStudentDiffers):
        run(work, tmp_path)


# ---------------------------------------------------------------- adapters
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["q_proj", "lm_head"], ["model.embed_tokens"]])
def test_adapters_on_tied_weights_are_refused(tmp_path, targets):
    work = experiment(tmp_path, **{"train.lora": {"target_modules": targets}})
    with pytest.raises(ValueError, match=r"train\.lora\.target_modules: .*embed_tokens.*lm_head.*tied") as error:
        run(work, tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["lm_head", "no_such_proj"])
def test_adapters_that_are_refused_are_refused_before_a_teacher_reads(tmp_path, target):
    work = experiment(tmp_path, **{"train.lora": {"target_modules": [target]}})
    with pytest.raises(ValueError, match=r"train\.lora\.target_modules"):
        prepare(work, "one", log=lambda *_: None)
    assert not list(work.paths.root.glob("teacher_kv*/**/*.safetensors"))
    (finding,) = [f for f in check_arms(Workload(work.config, work.paths)) if f.status == FAIL]
    assert "train.lora.target_modules" in finding.detail and target in finding.detail


@pytest.mark.parametrize(
    "targets", [["lm_head", "v_proj"], ["embed_tokens"], ["embed_tokens", "lm_head"], "all-linear"]
)
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_elsewhere_are_saved_as_they_were_scored(tmp_path, targets, tied):
    if tied and targets != "all-linear":
        targets = ["k_proj", "down_proj"]
    settings = {"train.lora": {"rank": 3, "alpha": 40, "target_modules": targets, "dropout": 0.1}}
    cell = run(experiment(tmp_path, tied=tied, **settings), tmp_path)
    losses = [json.loads(line) for line in (cell / "history.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in losses if "validation_loss" in line]
    assert abs(losses[-1] - losses[0]) > 0.01, "the adapters do something"
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "mine", cell / "model"))
    moved = {name.removesuffix(".weight").rpartition(".")[2] for name in before if not before[name].equal(after[name])}
    attention, mlp = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    assert moved == (attention | mlp if targets == "all-linear" else set(targets))


@pytest.mark.parametrize(
    ("targets", "what"),
    [
        (["nope"], "'nope' is no module of the student"),
        (["q_proj", "nope"], "'nope' is no module of the student"),
        (["proj"], "'proj' is no module of the student"),
        (["self_attn"], "'self_attn' is no linear layer or embedding"),
        (["input_layernorm"], "'input_layernorm' is no linear layer or embedding"),
    ],
)
def test_a_module_that_is_not_there_is_named_with_those_that_are(tmp_path, targets, what):
    work = experiment(tmp_path, **{"train.lora": {"target_modules": targets}})
    with pytest.raises(ValueError, match=what) as error:
        run(work, tmp_path)
    assert "down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in str(error.value)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- drawn after the seed
@pytest.mark.parametrize("arm", ["control", "attention"])
def test_one_command_gives_one_student(tmp_path, arm):
    """Adapters and their dropout too, whatever was drawn in the process before."""
    work = experiment(tmp_path, **{"train.lora": {"rank": 3, "dropout": 0.2}})
    weights = []
    for before in (1, 22, 333):
        torch.manual_seed(before), np.random.seed(before), random.seed(before)
        cell = run(Inputs(work.config, work.paths), tmp_path / str(before), arm)
        weights.append((cell / "model" / "model.safetensors").read_bytes())
    assert len(set(weights)) == 1
    assert (run(work, tmp_path / "other", arm, seed=1) / "model" / "model.safetensors").read_bytes() != weights[0]


def test_dropout_is_that_of_control_whatever_an_arm_draws(tmp_path):
    """An arm of next to no weight is control, with learned fusion (which is drawn) and dropout too."""
    zero = {"base": "attention", "set": {"loss": {"values": {"weight": 1e-30}}}}
    work = experiment(tmp_path, **{"arms.zero": zero, "train.lora": {"rank": 3, "dropout": 0.3}})
    found, control = (
        load_file(run(work, tmp_path / arm, arm) / "model" / "model.safetensors") for arm in ("zero", "control")
    )
    for name, tensor in control.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("init", ["student", "random"])
def test_every_step_draws_after_its_seed(tmp_path, init):
    """Layer map (with dropout in the student's warm-up), projectors, students and teachers: the same bytes."""
    made = []
    for before in (1, 22):
        torch.manual_seed(before), np.random.seed(before), random.seed(before)
        folder = tmp_path / str(before)
        dropping = STUDENT | {"attention_dropout": 0.3}
        arm = {"base": "elastic", "set": {"projector.dropout": 0.2, "init": init}}
        work = build(
            folder,
            STEPS
            | {"models.noise": {"source": "random", "like": "alpha"}, "arms.drawn": arm}
            | {"models.student.architecture": dropping},
        )
        torch.manual_seed(before + 1)
        make_model(work, "noise")
        make_layer_map(work, "alpha")
        torch.manual_seed(before + 2)
        cell = run(work, folder, "drawn")
        recipe = {"architecture": ALPHA | {"attention_dropout": 0.3}, "tokenizer": TOKENIZERS["alpha"].model_dump()}
        recipe |= {"examples": 20, "steps": 3, "batch_size": 3}
        pretrain(Recipe.model_validate(recipe), work.config.data, folder / "trained", log=lambda line: None)
        files = [
            work.paths.model("noise") / "model.safetensors",
            work.paths.layer_map("alpha"),
            *work.paths.projector("x").parent.glob("*.safetensors"),
            cell / "model" / "model.safetensors",
            folder / "trained" / "model.safetensors",
        ]
        assert len(files) == 5
        made.append([path.read_bytes() for path in files])
    assert made[0] == made[1]
