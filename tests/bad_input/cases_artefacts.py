"""Bad input: model folders, stores, checkpoints, results; damaged, of something else, or half there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_input_run import Case
from safetensors.torch import load_file, save_file

RESULTS = Path("results")
ALPHA = Path("teachers/alpha")
STORE = RESULTS / "teacher_kv/alpha/student"
CELL = RESULTS / "train/one/seed0"
MODELS = "models --name alpha"
BUILT = ("models/alpha/",)
TRAIN = "train --arm one --seed 0 --made --out again"
"""Reads what is there, damaged or not; without --made it would be made again."""


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-64:] = bytes(byte ^ 255 for byte in content[-64:])
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def edited(path: Path, change: Callable[[Any], Any]) -> Callable[[], None]:
    """A JSON file with something changed in it."""

    def do() -> None:
        document = json.loads(path.read_text())
        changed = change(document)
        path.write_text(json.dumps(document if changed is None else changed))

    return do


def tensors(path: Path, change: Callable[[dict], dict]) -> Callable[[], None]:
    """A safetensors file with other tensors."""
    return lambda: save_file(change(load_file(path)), path, metadata={"format": "pt"})


def one(pattern: str, act: Callable[[Path], object], folder: Path = RESULTS) -> Callable[[], None]:
    """Do something with the one file of a pattern."""

    def do() -> None:
        (path,) = folder.glob(pattern)
        act(path)

    return do


def config(**values: Any) -> Callable[[], None]:
    return edited(ALPHA / "config.json", lambda found: found.update(values))


def without(text: str) -> Callable[[dict], dict]:
    return lambda found: {name: tensor for name, tensor in found.items() if text not in name}


def renamed(found: dict) -> dict:
    return {f"foo.{name}": tensor for name, tensor in found.items()}


WEIGHTS = ALPHA / "model.safetensors"
TOKENIZER = ALPHA / "tokenizer.json"


def no_special_tokens() -> None:
    edited(
        ALPHA / "tokenizer_config.json", lambda d: [d.pop(key, None) for key in ("pad_token", "eos_token")] and None
    )()
    (ALPHA / "special_tokens_map.json").unlink(missing_ok=True)


def token_beyond(document: dict) -> None:
    document["added_tokens"].append({**document["added_tokens"][0], "id": 5000, "content": "Ann", "special": False})


FOLDERS = [
    Case("no such model folder", r"models: teachers/none is not a model folder", MODELS, {"models.alpha.path": "teachers/none"}, makes=BUILT),
    Case("a file in its place", r"config\.yaml is not a model folder", MODELS, {"models.alpha.path": "config.yaml"}, makes=BUILT),
    Case("no config.json", r"teachers/alpha is not a model folder: it has no config\.json", MODELS, do=(ALPHA / "config.json").unlink, makes=BUILT),
    Case("config.json cut off", r"config\.json is damaged .*(copy|download) it again", MODELS, do=lambda: cut(ALPHA / "config.json"), makes=BUILT),
    Case("config.json is a list", r"config\.json is damaged \(no JSON object\)", MODELS, do=edited(ALPHA / "config.json", lambda _: []), makes=BUILT),
    Case("no weights", r"models\.alpha: .*(weights|safetensors)", MODELS, do=WEIGHTS.unlink, makes=BUILT),
    Case("weights cut off", r"models\.alpha: model\.safetensors is .*(cut|damaged|incomplete)", MODELS, do=lambda: cut(WEIGHTS), makes=BUILT),
    Case("weights of nothing", r"models\.alpha: model\.safetensors is .*(cut|damaged|incomplete|empty)", MODELS, do=lambda: empty(WEIGHTS), makes=BUILT),
    Case("weights as a pickle", r"models\.alpha: .*safetensors", MODELS, do=lambda: WEIGHTS.rename(ALPHA / "pytorch_model.bin"), makes=BUILT),
    Case("the weights of a layer are missing", r"models\.alpha: .*layers\.2\.", MODELS, do=tensors(WEIGHTS, without("layers.2.")), makes=BUILT),
    Case("one tensor is missing", r"models\.alpha: .*layers\.1\.self_attn\.k_proj", MODELS, do=tensors(WEIGHTS, without("layers.1.self_attn.k_proj")), makes=BUILT),
    Case("the embedding is missing", r"models\.alpha: .*the input embedding", MODELS, do=tensors(WEIGHTS, without("embed_tokens")), makes=BUILT),
    Case("all tensors named otherwise", r"models\.alpha: .*foo\.", MODELS, do=tensors(WEIGHTS, renamed), makes=BUILT),
    Case("tensors of another size", r"models\.alpha: .*(shape|size|×)", MODELS, do=config(hidden_size=48), makes=BUILT),
    Case("a layer more than config.json says", r"models\.alpha: .*layers\.3", MODELS, do=config(num_hidden_layers=3), makes=BUILT),
    Case("NaN among the weights", r"results/models/alpha: 1 tensors hold NaN or infinity \(model\.norm\.weight first\)", "prepare --arm one", do=tensors(WEIGHTS, lambda d: {**d, "model.norm.weight": d["model.norm.weight"] * float("nan")}), makes=("models/", "encoding/", "layer_map/", "teacher_kv/", "projector/")),
    Case("no tokenizer", r"models/alpha: tokenizer\.json is missing", MODELS, do=TOKENIZER.unlink, makes=BUILT),
    Case("tokenizer.json cut off", r"tokenizer\.json is .*(damaged|JSON|read)", MODELS, do=lambda: cut(TOKENIZER), makes=BUILT),
    Case("a tokenizer without pad and end", r"names no pad token and no end-of-text token: name one", MODELS, do=no_special_tokens, makes=BUILT),
    Case("a token beyond the vocabulary", r"token 0 of record .* is 'Ann', id \d+, but its embedding has 330 rows", "prepare --arm one", do=lambda: (edited(TOKENIZER, token_beyond)(),), makes=("models/", "encoding/", "layer_map/", "teacher_kv/", "projector/")),
    Case("config.json with a number in letters", r"teachers/alpha: config\.json .*holds a value that transformers cannot use \(.*num_attention_heads.*\): use the file", "evaluate --model teachers/alpha --out x.parquet", do=config(num_attention_heads="four")),
    Case("config.json with an unknown function", r"teachers/alpha: config\.json .*holds a value that transformers cannot use \(KeyError: 'nope'\)", "evaluate --model teachers/alpha --out x.parquet", do=config(hidden_act="nope")),
    Case("config.json without a model type", r"teachers/alpha: config\.json names no model_type", "evaluate --model teachers/alpha --out x.parquet", do=config(model_type=None)),
    Case("generation_config.json that is a list", r"teachers/alpha: .*generation_config\.json holds a value", "evaluate --model teachers/alpha --out x.parquet", do=lambda: (ALPHA / "generation_config.json").write_text("[]")),
    Case("an end of text that is no number", r"teachers/alpha: generation_config\.json: eos_token_id is 'x', expected the number", "evaluate --model teachers/alpha --out x.parquet", do=edited(ALPHA / "generation_config.json", lambda d: d.update(eos_token_id="x"))),
    Case("a tokenizer whose end of text is a number", r"models/alpha: tokenizer_config\.json holds a value that transformers cannot use .*eos_token", MODELS, do=edited(ALPHA / "tokenizer_config.json", lambda d: d.update(eos_token=3)), makes=BUILT),
    Case("a tokenizer whose longest text is a word", r"models/alpha: tokenizer_config\.json holds a value that transformers cannot use", MODELS, do=edited(ALPHA / "tokenizer_config.json", lambda d: d.update(model_max_length="x")), makes=BUILT),
    Case("quantised by GPTQ", r"models\.alpha: its weights are quantised by gptq", MODELS, do=config(quantization_config={"quant_method": "gptq", "bits": 4}), makes=BUILT),
    Case("an encoder", r"models\.alpha: .*(BertForMaskedLM|bert)", MODELS, do=config(model_type="bert", architectures=["BertForMaskedLM"]), makes=BUILT),
    Case("a state-space model", r"models\.alpha: .*mamba", MODELS, do=config(model_type="mamba", architectures=["MambaForCausalLM"]), makes=BUILT),
    Case("an unknown type", r"models\.alpha: .*'?nonsense'?", MODELS, do=config(model_type="nonsense"), makes=BUILT),
    Case("code of its own", r"results/models/alpha: it is code of its own \(config\.json: auto_map\)", "prepare --arm one", do=config(model_type="mine", auto_map={"AutoModelForCausalLM": "modeling.Mine"}), makes=BUILT),
    Case("an adapter without its model", r"models\.alpha: .*(adapter|merge)|is not a model folder", MODELS, do=lambda: ((ALPHA / "config.json").unlink(), (ALPHA / "adapter_config.json").write_text("{}")), makes=BUILT),
    Case("a teacher whose positions end too early", r"max_position_embeddings|positions", "prepare --arm one", {"data.context": "strict"}, do=config(max_position_embeddings=9), makes=("models/", "encoding/", "layer_map/", "teacher_kv/", "projector/")),
    Case("a student without the weights of a layer", r"models\.student: .*layers\.2\.", "models --name student", {"models.student": {"source": "local", "path": "teachers/beta"}}, do=tensors(Path("teachers/beta/model.safetensors"), without("layers.2.")), makes=("models/student/",)),
    Case("evaluate a folder without a layer's weights", r"layers\.2\.", "evaluate --model teachers/alpha --out x.parquet", do=tensors(WEIGHTS, without("layers.2."))),
    Case("evaluate a folder with other names", r"foo\.", "evaluate --model teachers/alpha --out x.parquet", do=tensors(WEIGHTS, renamed)),
    Case("evaluate what is no folder", r"none.*(config\.json|not a model folder|does not exist)", "evaluate --model none --out x.parquet"),
    Case("align with what is no tokenizer", r"teachers.*tokenizer\.json", "align --src-tokenizer teachers --dst-tokenizer teachers/alpha --text x"),
    Case("an architecture without a type", r"architecture: .*model_type", "models --name student", {"models.student.architecture": {"hidden_size": 24}}, makes=("models/student/",)),
    Case("an architecture with a wrong key", r"architecture.*hiden_size", "models --name student", {"models.student.architecture.hiden_size": 24}, makes=("models/student/",)),
]  # fmt: skip


def exchange(sizes: bool) -> Callable[[], None]:
    """Two shards under each other's name."""

    def do() -> None:
        first, second = (STORE / f"shard-0000{n}.safetensors" for n in (0, 1))
        first.rename(STORE / "x")
        second.rename(first)
        (STORE / "x").rename(second)
        if sizes:
            edited(STORE / "index.json", lambda d: d["shards"].reverse())()

    return do


SHARD = "teacher_kv/alpha/student/shard-00000.safetensors"
MANIFEST = RESULTS / "models/alpha/MANIFEST.json"
ARTEFACTS = [
    Case("a manifest of nothing", r"models/alpha/MANIFEST\.json is damaged .*kvpipe models --name alpha", TRAIN, do=lambda: empty(MANIFEST)),
    Case("a manifest without files", r"models/alpha/MANIFEST\.json is damaged|MANIFEST\.json.*files", "report", do=edited(MANIFEST, lambda d: d.pop("files") and None)),
    Case("a manifest without files, read by a pass", r"models/alpha/MANIFEST\.json is damaged \(no files\)", "layer-map --teacher alpha", do=edited(MANIFEST, lambda d: d.pop("files") and None)),
    Case("weights replaced after the manifest", r"model\.safetensors is damaged or was replaced", "layer-map --teacher alpha", do=lambda: flip(RESULTS / "models/alpha/model.safetensors")),
    Case("the student's tokenizer replaced after the manifest", r"models/student/tokenizer\.json is damaged or was replaced", "encode --model student", do=lambda: flip(RESULTS / "models/student/tokenizer.json"), makes=("encoding/",)),
    Case("the tokenizer replaced after the manifest", r"tokenizer\.json is damaged or was replaced", "encode --model alpha", do=lambda: flip(RESULTS / "models/alpha/tokenizer.json")),
    Case("a file of the manifest is gone", r"models/alpha: \*\.safetensors is missing", "layer-map --teacher alpha", do=(RESULTS / "models/alpha/model.safetensors").unlink),
    Case("a model that was not made", r"models/alpha/MANIFEST\.json is missing: run `kvpipe models --name alpha` first", "teacher-kv --teacher alpha", do=MANIFEST.unlink),
    Case("a model and its tokens that were not made", r"MANIFEST\.json is missing: run `kvpipe models --name alpha`, `kvpipe encode --model alpha --reading student` first", "layer-map --teacher alpha", do=lambda: (MANIFEST.unlink(), shutil.rmtree(RESULTS / "encoding/alpha"))),
    Case("a split is gone", r"data/train\.parquet", "encode --model alpha", do=(RESULTS / "data/train.parquet").unlink),
    Case("a split cut off", r"data/train\.parquet.*(damaged|Parquet)", "encode --model alpha", do=lambda: cut(RESULTS / "data/train.parquet")),
    Case("a split of other columns", r"data/test\.parquet: column\(s\) .*missing", "evaluate --model results/models/alpha --out x.parquet", do=lambda: shutil.copy("results/evaluate/one/seed0.parquet", "results/data/test.parquet")),
    Case("tokens cut off", r"encoding/alpha/train-student\.safetensors.*(damaged|again)", "teacher-kv --teacher alpha", do=one("encoding/alpha/train-student.safetensors", cut)),
    Case("tokens of another split", r"encoding/student/.*(again|another)", TRAIN, do=lambda: shutil.copy(RESULTS / "encoding/student/validation-student.safetensors", RESULTS / "encoding/student/train-student.safetensors")),
    Case("a shard with flipped bytes", r"shard-00000\.safetensors is damaged or was replaced", TRAIN, do=one(SHARD, flip)),
    Case("a shard cut off", r"shard-00000\.safetensors is (missing or truncated|damaged)", TRAIN, do=one(SHARD, cut)),
    Case("a shard that is gone", r"shard-00000\.safetensors is missing", TRAIN, do=one(SHARD, Path.unlink)),
    Case("two shards exchanged", r"shard-0000\d\.safetensors .*(damaged|another|truncated)", TRAIN, do=exchange(sizes=False)),
    Case("two shards exchanged, in the index too", r"shard-0000\d\.safetensors .*(damaged|another|truncated)", TRAIN, do=exchange(sizes=True)),
    Case("an index of nothing", r"index\.json is damaged .*kvpipe teacher-kv --teacher alpha", TRAIN, do=one("teacher_kv/alpha/student/index.json", empty)),
    Case("an index without shards", r"index\.json is damaged \(no list of shards\)", TRAIN, do=edited(STORE / "index.json", lambda d: d.update(shards=[]))),
    Case("an index without its key", r"index\.json is damaged", TRAIN, do=edited(STORE / "index.json", lambda d: d.pop("key") and None)),
    Case("a store of another model", r"shard-00000\.safetensors is another store's shard", TRAIN, do=edited(STORE / "index.json", lambda d: d["key"].update(model="0" * 64))),
    Case("projectors cut off", r"projector/alpha.*safetensors is damaged.*kvpipe fit", TRAIN, do=one("projector/*.safetensors", cut)),
    Case("projectors of nothing", r"projector/alpha.*safetensors is damaged", TRAIN, do=one("projector/*.safetensors", empty)),
    Case("projectors with flipped bytes", r"projector/alpha.*safetensors is damaged", TRAIN, do=one("projector/*.safetensors", flip)),
    Case("projectors of another teacher", r"projector/alpha.*(damaged|does not fit)", TRAIN, do=one("projector/*.safetensors", lambda p: tensors(p, lambda d: {k.replace("alpha", "beta"): v for k, v in d.items()})())),
    Case("projectors that are gone", r"projector/alpha.*(missing|does not exist|fit)", TRAIN, do=one("projector/*.safetensors", Path.unlink)),
    Case("a layer map of nothing", r"layer_map/alpha\.json .*kvpipe layer-map --teacher alpha", TRAIN, do=lambda: empty(RESULTS / "layer_map/alpha.json")),
    Case("a layer map of one row", r"layer_map/alpha\.json .*kvpipe layer-map --teacher alpha", TRAIN, do=edited(RESULTS / "layer_map/alpha.json", lambda d: d["similarity"].update(keys=d["similarity"]["keys"][:1]))),
    Case("a layer map that is gone", r"layer_map/alpha\.json is missing", TRAIN, do=(RESULTS / "layer_map/alpha.json").unlink),
]  # fmt: skip


def scores(change: Callable) -> Callable[[], None]:
    """The scores of a cell, changed."""

    def do() -> None:
        import pandas as pd

        path = RESULTS / "evaluate/one/seed0.parquet"
        change(pd.read_parquet(path)).to_parquet(path, index=False)

    return do


def judged(table):
    table.attrs["judges"] = {"math": "math-verify 0", "code": "kvpipe, as texts"}
    return table


ITEMS = RESULTS / "evaluate/one/seed0.parquet"
FINISHED = [
    Case("cost.json of nothing", r"train/one/seed0/cost\.json is damaged", "stats", do=lambda: empty(CELL / "cost.json")),
    Case("cost.json of nothing, in the report", r"train/one/seed0/cost\.json is damaged", "report", do=lambda: empty(CELL / "cost.json")),
    Case("cost.json of nothing, in the status", r"train/one/seed0/cost\.json is damaged", "status", do=lambda: empty(CELL / "cost.json")),
    Case("cost.json without its seconds", r"train/one/seed0/cost\.json.*train_seconds", "status", do=edited(CELL / "cost.json", lambda d: d.pop("train_seconds") and None)),
    Case("cost.json of another cell", r"cost\.json: this is the cell of arm control", "stats", do=lambda: shutil.copy(RESULTS / "train/control/seed0/cost.json", CELL / "cost.json")),
    Case("a broken line in the history", r"train/one/seed0/history\.jsonl, line 2", "report", do=lambda: (CELL / "history.jsonl").write_text('{"step": 0, "validation_loss": 1.0}\n{step\n')),
    Case("a broken line in the history, for the statistics", r"train/one/seed0/history\.jsonl, line 2", "stats", do=lambda: (CELL / "history.jsonl").write_text('{"step": 0, "validation_loss": 1.0}\n{step\n')),
    Case("a history of nothing", r"train/one/seed0/history\.jsonl", "report", do=lambda: empty(CELL / "history.jsonl")),
    Case("scores cut off", r"evaluate/one/seed0\.parquet.*(damaged|Parquet|read)", "stats", do=lambda: cut(ITEMS)),
    Case("scores of another cell", r"evaluate/one/seed0\.parquet: these are the scores of arm control", "stats", do=lambda: shutil.copy(RESULTS / "evaluate/control/seed0.parquet", ITEMS)),
    Case("scores of other weights", r"evaluate/one/seed0\.parquet has the scores of a model .*evaluate the cell again", "stats", do=edited(CELL / "cost.json", lambda d: d["model"].update(digest="0" * 16))),
    Case("scores of fewer items", r"one, seed 0: its items differ .*in 1 places", "stats", do=scores(lambda d: d[1:])),
    Case("scores with NaN", r"nll of item .* is not finite \(5 items\)", "stats", do=scores(lambda d: d.assign(nll=float("nan")))),
    Case("scores without a column", r"evaluate/one/seed0\.parquet.*nll", "stats", do=scores(lambda d: d.drop(columns="nll"))),
    Case("scores by another judge", r"answers of math were judged by kvpipe, as texts and by math-verify 0", "stats", do=scores(judged)),
    Case("no cell was evaluated", r"no evaluated cell under results", "stats", do=lambda: shutil.rmtree(RESULTS / "evaluate")),
    Case("tables that are not there", r"stats/\w+\.csv is missing: run `kvpipe stats` first", "report", do=lambda: shutil.rmtree(RESULTS / "stats")),
    Case("a table of nothing", r"stats/contrasts\.csv", "report", do=lambda: empty(RESULTS / "stats/contrasts.csv")),
    Case("a table without a column", r"stats/arms\.csv: column\(s\) \['mean'\] missing", "report", do=lambda: (RESULTS / "stats/arms.csv").write_text((RESULTS / "stats/arms.csv").read_text().replace("mean", "men", 1))),
    Case("doctor.json that is no JSON", r"doctor\.json is damaged", "report", do=lambda: (RESULTS / "doctor.json").write_text("{")),
    Case("audit.json that is a list", r"audit\.json is damaged \(no JSON object\)", "report", do=lambda: (RESULTS / "audit.json").write_text("[]")),
    Case("a test split with a training question", r"the comparison between arms is not fair: leakage: 28 test items", "audit", do=lambda: shutil.copy(RESULTS / "data/train.parquet", RESULTS / "data/test.parquet"), makes=("audit.json",)),
    Case("a seed that was not evaluated", r"not fair: seeds: arms without all seeds", "audit", do=ITEMS.unlink, makes=("audit.json",)),
    Case("the card of a cell that is not trained", r"train/one/seed7/cost\.json is missing", "card --arm one --seed 7"),
]  # fmt: skip
