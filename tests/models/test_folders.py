"""Model folders: tokenizers that keep every byte, weights that follow the seed, manifests that follow the files."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny import STUDENT

from kvpipe.config import TokenizerRecipe
from kvpipe.models import manifest
from kvpipe.models.folders import (
    build_model,
    check_placement,
    has_weights,
    load_config,
    load_model,
    load_tokenizer,
    manifest_hash,
    randomise,
)
from kvpipe.models.manifest import fetch_local, write_manifest
from kvpipe.models.tokenizers import train_tokenizer
from kvpipe.tokens.matrix import encode, token_bytes
from kvpipe.tokens.vocabulary import same_tokens

TEXTS = [
    "Ann has 12 cats\nand 345 dogs.\n#### 357\n",
    "x = 3\nx += 4  # naïve 日本\nprint(x)\n",
    "the cat sat on the mat",
] * 5
NEW = ["Ann\n\n  12\tcats", "日本語 😀 naïve\n", "literally <0x41> and <s> and ▁", " lead and trail ", "#### 7\n"]
KINDS = ["byte_bpe", "unigram", "metaspace_bpe"]


@pytest.fixture(scope="module", params=[(kind, split) for kind in KINDS for split in (True, False)], ids=str)
def trained(request):
    kind, split = request.param
    return split, train_tokenizer(TokenizerRecipe(kind=kind, vocab_size=340, split_digits=split), TEXTS)


# ---------------------------------------------------------------- tokenizers
@pytest.mark.parametrize("text", [*TEXTS[:3], *NEW[:2], *NEW[3:]])
def test_tokenizers_keep_the_text_and_their_spans_cover_it(trained, text):
    tokenizer = trained[1]
    tokens = encode(tokenizer, text, lossy="error")
    decoded = tokenizer.decode(tokens.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert decoded == text
    spans = tokens.spans[tokens.spans[:, 1] > tokens.spans[:, 0]]
    assert spans[0, 0] == 0 and spans[-1, 1] == len(text.encode()) and (spans[1:, 0] == spans[:-1, 1]).all()
    spelled = token_bytes(tokenizer)
    assert b"".join(spelled[i] or b"" for i in tokens.ids.tolist()) == text.encode()


@pytest.mark.parametrize("kind", ["byte_bpe", "metaspace_bpe"])  # Unigram has no way to keep a piece out of texts
def test_names_of_byte_tokens_in_a_text_are_text(kind):
    tokenizer = train_tokenizer(TokenizerRecipe(kind=kind, vocab_size=340), TEXTS)
    text = "literally <0x41> so"
    ids = encode(tokenizer, text).ids
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


def test_digits_stay_alone_where_the_recipe_says_so(trained):
    split, tokenizer = trained
    with_digits = [raw for raw in token_bytes(tokenizer) if raw and any(48 <= b < 58 for b in raw)]
    longest = max(map(len, with_digits))
    assert longest == 1 or not split
    if not split and type(tokenizer.backend_tokenizer.model).__name__ == "BPE":
        assert longest > 1


def test_tokens_reach_across_words_where_the_recipe_says_so():
    texts = [f"Ann has {n} cards, finds {n + 1} and loses 2. How many?\n{n}, {n + 1}.\n#### {n}\n" for n in range(40)]
    apart, across = (
        train_tokenizer(TokenizerRecipe(vocab_size=448, split_digits=False, split_words=split), texts)
        for split in (True, False)
    )
    mixed = re.compile(rb"\w[^\w]+\w")
    assert not any(mixed.search(raw) for raw in token_bytes(apart) if raw)
    assert any(mixed.search(raw) for raw in token_bytes(across) if raw)
    assert across.decode(across(texts[0])["input_ids"]) == texts[0]


def test_a_tokenizer_is_deterministic_and_survives_saving(trained, tmp_path):
    tokenizer = trained[1]
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for text in NEW:
        assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.eos_token_id == tokenizer.eos_token_id != loaded.pad_token_id is not None
    assert len(loaded) <= 340


def test_unigram_needs_room_for_bytes():
    with pytest.raises(ValueError, match="more than 260"):
        train_tokenizer(TokenizerRecipe(kind="unigram", vocab_size=260), TEXTS)


# ---------------------------------------------------------------- twins
@pytest.fixture(scope="module")
def families():
    return {k: train_tokenizer(TokenizerRecipe(kind=k, vocab_size=360), TEXTS) for k in KINDS}


@pytest.mark.parametrize("src", KINDS)
@pytest.mark.parametrize("dst", KINDS)
def test_twins_spell_the_same_bytes(families, src, dst):
    src, dst = families[src], families[dst]
    twins = same_tokens(src, dst)
    src_bytes, dst_bytes = token_bytes(src), token_bytes(dst)
    assert twins[src.eos_token_id] == dst.eos_token_id
    for index, twin in enumerate(twins.tolist()):
        if index == src.eos_token_id:
            continue
        if src_bytes[index] is None:
            assert twin == -1
        elif twin >= 0:
            assert dst_bytes[twin] == src_bytes[index]
        else:
            assert src_bytes[index] not in dst_bytes
    # every byte has a twin in all three families
    assert (twins >= 0).sum() > 256


def test_twins_of_the_same_tokenizer_are_the_identity(families):
    for tokenizer in families.values():
        twins = same_tokens(tokenizer, tokenizer)
        for text in TEXTS[:3]:
            ids = np.array(tokenizer(text, add_special_tokens=False).input_ids)
            assert (twins[ids] == ids).all()


def test_a_twin_is_the_token_that_the_student_would_use(families):
    """`Ġcat` is `▁cat`, and `A` is the piece, not the byte <0x41>."""
    src, dst = families["byte_bpe"], families["metaspace_bpe"]
    twins = same_tokens(src, dst)
    names = {src.convert_ids_to_tokens(i): dst.convert_ids_to_tokens(int(t)) for i, t in enumerate(twins) if t >= 0}
    assert names["Ġcat"] == "▁cat" and names["A"] == "A" and names["Ċ"] == "<0x0A>" and names["Ġ"] == "▁"


# ---------------------------------------------------------------- weights
def test_a_model_follows_its_seed_and_its_tokenizer(trained):
    tokenizer = trained[1]
    torch.manual_seed(99)
    first = build_model(STUDENT, tokenizer, 5)
    torch.manual_seed(1)
    again, other = build_model(STUDENT, tokenizer, 5), build_model(STUDENT, tokenizer, 6)
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert first.config.vocab_size == len(tokenizer) == first.get_input_embeddings().weight.shape[0]
    assert (first.config.eos_token_id, first.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert not first.training and "model_type" in STUDENT
    with pytest.raises(ValueError, match="model_type is missing"):
        build_model({"hidden_size": 8}, tokenizer, 0)


def test_a_random_twin_has_the_architecture_and_other_weights(tiny, tmp_path):
    source = randomise(tiny.paths.model("beta"), tmp_path, 3)
    assert source["like"] == "beta" and source["like_manifest"] == manifest_hash(tiny.paths.model("beta"))
    own, random = load_model(tiny.paths.model("beta")), load_model(tmp_path)
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (own, random)]
    assert shapes[0] == shapes[1]
    assert not torch.allclose(own.lm_head.weight, random.lm_head.weight)
    assert load_tokenizer(tmp_path)("cat 12").input_ids == load_tokenizer(tiny.paths.model("beta"))("cat 12").input_ids
    again = tmp_path / "again"
    randomise(tiny.paths.model("beta"), again, 3)
    assert torch.equal(load_model(again).lm_head.weight, random.lm_head.weight)


def test_weights_come_from_safetensors_only(tiny, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    fetch_local(tiny.paths.model("alpha"), folder)
    assert has_weights(folder)
    model = load_model(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert not has_weights(folder)
    with pytest.raises(OSError, match="safetensors"):
        load_model(folder)


# ---------------------------------------------------------------- how a model is held
def held(tiny, folder, **load):
    """The teacher `alpha` in a folder whose manifest says how to load it."""
    fetch_local(tiny.paths.model("alpha"), folder)
    write_manifest(folder, {"source": "local"}, load=load)
    return folder


def test_a_manifest_says_how_a_model_is_held(tiny, tmp_path):
    folder = held(tiny, tmp_path, dtype="bf16")
    assert load_model(folder).dtype == torch.bfloat16
    assert load_model(folder, dtype=torch.float32).dtype == torch.float32
    other = tmp_path / "other"
    other.mkdir()
    assert manifest_hash(folder) != manifest_hash(held(tiny, other, dtype="fp32")), "its keys and values differ"


def test_a_random_twin_is_held_like_its_model(tiny, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    held(tiny, folder, dtype="bf16")
    randomise(folder, tmp_path, 3)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as handle:
        assert handle.get_tensor("model.norm.weight").dtype == torch.bfloat16


def test_layers_over_all_devices_give_the_same_logits(tiny, tmp_path):
    ids = torch.tensor([[5, 9, 301, 7]])
    plain, spread = load_model(tiny.paths.model("alpha")), load_model(held(tiny, tmp_path, sharded=True))
    assert torch.equal(plain(input_ids=ids).logits, spread(input_ids=ids).logits)


def test_layers_that_fit_nowhere_are_named(tmp_path):
    check_placement(tmp_path, {"model.embed_tokens": 0, "model.layers.0": 1, "lm_head": 1})
    check_placement(tmp_path, {"": "cpu"})
    for places in ({"model.layers.0": 0, "model.layers.1": "cpu"}, {"model.layers.0": "cpu", "model.layers.1": "disk"}):
        with pytest.raises(RuntimeError, match=r"1 of 2 parts do not fit.*model\.layers\.1.*more devices.*quantize"):
            check_placement(tmp_path, places)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantization_without_its_package_is_named(tiny, tmp_path, bits, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(ModuleNotFoundError, match=rf"load.quantize {bits} needs the package bitsandbytes"):
        load_model(held(tiny, tmp_path, quantize=bits))


def test_a_tokenizer_without_padding_pads_with_its_end(tiny, tmp_path):
    """As Llama-3 ships."""
    fetch_local(tiny.paths.model("alpha"), tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None


def test_a_saved_model_loads_as_it_was(tiny):
    model = load_model(tiny.paths.model("alpha"))
    assert not model.training and model.dtype == torch.float32
    assert load_model(tiny.paths.model("alpha"), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_config(tiny.paths.model("alpha")).num_key_value_heads == 3


# ---------------------------------------------------------------- folders
def folder_of(path, content=b"weights"):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(content)
    (path / "MANIFEST.json").write_text("of another place")
    (path / "sub").mkdir()
    return path


def test_the_manifest_changes_when_a_file_does(tmp_path):
    folder = folder_of(tmp_path / "a")
    seen = []
    for change in (
        lambda: None,
        lambda: (folder / "model.safetensors").write_bytes(b"Weights"),
        lambda: (folder / "more.txt").write_text(""),
        lambda: (folder / "sub" / "deep.json").write_text("1"),
    ):
        change()
        write_manifest(folder, {"source": "local"})
        seen.append(manifest_hash(folder))
    assert len(set(seen)) == 4
    write_manifest(folder, {"source": "local"})
    assert manifest_hash(folder) == seen[-1]
    files = json.loads((folder / "MANIFEST.json").read_text())["files"]
    assert sorted(files) == ["config.json", "model.safetensors", "more.txt", "sub/deep.json"]


def test_small_folders_are_copied_and_large_ones_linked(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "a")
    for name, limit, linked in (("copy", 1 << 30, False), ("link", 3, True)):
        monkeypatch.setattr(manifest, "COPY_LIMIT", limit)
        out = tmp_path / name
        out.mkdir()
        for _ in range(2):  # a second time over what is there
            assert fetch_local(folder, out) == {"source": "local", "path": folder.as_posix()}
        assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
        assert all(p.is_symlink() is linked for p in out.iterdir())
        assert (out / "model.safetensors").read_bytes() == b"weights"
    write_manifest(tmp_path / "copy", {})
    write_manifest(tmp_path / "link", {})
    assert manifest_hash(tmp_path / "copy") == manifest_hash(tmp_path / "link")


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.*config\.json"):
        fetch_local(tmp_path / "nothing", tmp_path)


def test_a_copied_model_does_not_follow_its_source(tmp_path):
    folder = folder_of(tmp_path / "a")
    out = tmp_path / "copy"
    out.mkdir()
    fetch_local(folder, out)
    (folder / "model.safetensors").write_bytes(b"other")
    assert (out / "model.safetensors").read_bytes() == b"weights"
