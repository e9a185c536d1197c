"""Hub models with the real client against a hub on the loopback: pinned once, found or downloaded, every byte checked."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import HubServer
from tiny import ALPHA, save_teacher, values

from kvpipe.config import HubModel, LockedFile, LockedRepo, load, lock_path, parse
from kvpipe.experiment.files import digest_of
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.plan import Dag
from kvpipe.experiment.steps import Model
from kvpipe.models import hub as hub_module
from kvpipe.models.hub import (
    HubError,
    check_room,
    fetch,
    is_model_file,
    locate,
    missing_shards,
    to_download,
    write_lock,
)
from kvpipe.models.manifest import write_manifest

REPO = "owner/alpha"
BARE = {"config.json": b"{}", "tokenizer.json": b"{}"}


def model_of(config, name: str) -> str:
    """What a model depends on."""
    return Model(Dag(config), Paths(Path("results"))).depends(model=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A real model folder, and beside its files what must not be downloaded."""
    path = tmp_path_factory.mktemp("alpha")
    save_teacher(path, "alpha", ALPHA, 0)
    (path / "README.md").write_text("---\nlicense: llama3\n---\n")
    (path / "pytorch_model.bin").write_bytes(b"a pickle")
    (path / "consolidated.safetensors").write_bytes(b"the weights once more")
    (path / "modeling_alpha.py").write_text("raise SystemExit\n")
    return path


@pytest.fixture
def hub(folder):
    with HubServer() as server:
        server.add(REPO, folder, license="llama3")
        yield server


class Place:
    """A configuration with one teacher from the hub, and a command line that talks to the hub."""

    def __init__(self, hub, tmp_path, **model):
        self.hub, self.home, self.results = hub, tmp_path / "hf", tmp_path / "results"
        self.config = tmp_path / "my.yaml"
        settings = values(tmp_path)
        settings["models"]["alpha"] = {"source": "hub", "repo": REPO, **model}
        settings["models"]["beta"] = {"source": "random", "like": "alpha"}
        self.config.write_text(yaml.safe_dump(settings))

    def run(self, *arguments, token=None, **variables):
        command = [sys.executable, "-m", "kvpipe", *arguments, "--config", self.config, "--results", self.results]
        environment = self.hub.environment(self.home, token) | {"OMP_NUM_THREADS": "1"} | variables
        return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)

    def ok(self, *arguments, **more):
        done = self.run(*arguments, **more)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout + done.stderr

    def fails(self, *arguments, **more):
        done = self.run(*arguments, **more)
        assert done.returncode == 1, done.stdout
        assert "Traceback" not in done.stderr
        return done.stderr

    @property
    def model(self) -> Path:
        return self.results / "models" / "alpha"

    def manifest(self):
        return json.loads((self.model / "MANIFEST.json").read_text())


@pytest.fixture
def place(hub, tmp_path):
    return Place(hub, tmp_path)


# ---------------------------------------------------------------- from an empty cache to a model folder
def test_a_revision_is_resolved_once(hub, place, folder):
    """Lock, move the branch, download: the model is what was locked."""
    said = place.ok("lock")
    first = hub.repos["models", REPO].refs["main"]
    assert first in said and "llama3" in said
    locked = load(place.config).lock[f"{REPO}@main"]
    assert (locked.commit, locked.license) == (first, "llama3")
    assert set(locked.files) == {"config.json", "generation_config.json", "model.safetensors", *tokenizer_files(folder)}
    moved = hub.repos["models", REPO].commit({**BARE, "model.safetensors": b"other"})
    assert moved != first
    place.ok("models")
    assert {p.name for p in place.model.iterdir()} == {*locked.files, "MANIFEST.json"}
    for name in locked.files:
        assert (place.model / name).read_bytes() == (folder / name).read_bytes()
    source = place.manifest()["source"]
    assert (source["source"], source["commit"], source["license"]) == ("hub", first, "llama3")
    assert not any("pytorch_model.bin" in r or "consolidated" in r or r.endswith(".py") for r in hub.requests)
    # nor do what was downloaded and the lock; only an update does
    place.ok("models")
    assert place.manifest()["source"]["commit"] == first
    assert first in place.ok("lock")
    place.ok("lock", "--update")
    assert load(place.config).lock[f"{REPO}@main"].commit == moved


def tokenizer_files(folder):
    return {p.name for p in folder.iterdir() if p.name.startswith(("tokenizer", "special_tokens", "vocab", "merges"))}


def test_a_connection_cut_in_a_file_goes_on_where_it_broke(hub, place, folder):
    """The client reads in blocks of 10 MB and goes on after the last whole one."""
    weights = bytes(range(256)) * 90_000
    hub.add(REPO, {**BARE, "model.safetensors": weights})
    place.ok("lock")
    hub.cut["model.safetensors"] = 15_000_000
    place.ok("models")
    assert any(r.endswith("model.safetensors bytes=10485760-") for r in hub.requests), hub.requests
    assert (place.model / "model.safetensors").read_bytes() == weights


def test_a_run_goes_on_with_the_files_it_has(hub, place):
    """A file comes damaged twice, which stops the run: the next one downloads that file and no other."""
    place.ok("lock")
    hub.corrupt["model.safetensors"] = 2
    assert "model.safetensors: is sha256:" in place.fails("models", "--name", "alpha")
    assert not (place.model / "MANIFEST.json").exists(), "a manifest stands for a complete folder"
    before = len(hub.requests)
    place.ok("models", "--name", "alpha")
    read = [r for r in hub.requests[before:] if r.startswith("GET") and "/resolve/" in r]
    assert read == [f"GET /{REPO}/resolve/{place.manifest()['source']['commit']}/model.safetensors"]


def test_a_corrupted_file_is_downloaded_again(hub, place, folder):
    place.ok("lock")
    hub.corrupt |= {"model.safetensors": 1, "tokenizer.json": 1}
    said = place.ok("models")
    assert "downloading again" in said and "model.safetensors" in said and "tokenizer.json" in said
    for name in ("model.safetensors", "tokenizer.json"):
        assert (place.model / name).read_bytes() == (folder / name).read_bytes()


# ---------------------------------------------------------------- compute nodes and shared libraries
def test_offline_takes_the_machines_cache_and_asks_nobody(hub, place):
    place.ok("lock")
    command = "from huggingface_hub import snapshot_download as s; s('owner/alpha')"
    subprocess.run([sys.executable, "-c", command], env=hub.environment(place.home), check=True, capture_output=True)
    before = len(hub.requests)
    assert f"alpha: {place.home}" in place.ok("models", HF_HUB_OFFLINE="1")
    # without its manifest the folder is made again from the files that are in it
    (place.model / "MANIFEST.json").unlink()
    shutil.rmtree(place.home)
    place.ok("models", HF_HUB_OFFLINE="1")
    assert place.manifest()["source"]["repo"] == REPO and len(hub.requests) == before


def test_offline_without_a_copy_says_where_it_looked(hub, place):
    place.ok("lock")
    before = len(hub.requests)
    said = place.fails("models", "--name", "alpha", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in said and str(place.home) in said and "kvpipe models --name alpha" in said
    assert "HF_HUB_OFFLINE" in place.fails("lock", "--update", HF_HUB_OFFLINE="1")
    assert len(hub.requests) == before


def locked_folder(folder):
    files = {
        p.name: LockedFile(
            size=p.stat().st_size, digest=digest_of(p, "sha256" if p.suffix == ".safetensors" else "git")
        )
        for p in folder.iterdir()
        if is_model_file(p.name)
    }
    return LockedRepo(commit="a" * 40, files=files)


def library_of(folder, pinned, root):
    target = root / REPO
    target.mkdir(parents=True)
    for name in pinned.files:
        (target / name).write_bytes((folder / name).read_bytes())
    return target


def test_libraries_are_searched_in_order_and_only_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_module, "own_cache", lambda: tmp_path / "no cache")
    pinned = locked_folder(folder)
    first, second = library_of(folder, pinned, tmp_path / "one"), library_of(folder, pinned, tmp_path / "two")
    libraries = [str(tmp_path / "none"), str(tmp_path / "one"), str(tmp_path / "two")]
    before = {p: p.stat().st_mtime_ns for p in first.iterdir()}
    said = []
    assert locate(REPO, pinned, libraries, said.append) == first
    assert len(said) == 1 and said[0].startswith(f"libraries: {libraries[0]} is no folder on this machine")
    (first / "config.json").write_text("{}")
    assert locate(REPO, pinned, libraries, said.append) == second
    assert "not taken" in said[-1] and "config.json" in said[-1]
    assert {p: p.stat().st_mtime_ns for p in first.iterdir()}.keys() == before.keys()
    (second / "model.safetensors").unlink()
    assert locate(REPO, pinned, libraries, said.append) is None


def test_a_library_makes_downloads_needless(hub, place, folder, tmp_path):
    place.ok("lock")
    library_of(folder, load(place.config).lock[f"{REPO}@main"], tmp_path / "shared")
    before = len(hub.requests)
    said = place.ok("models", "--set", f"libraries=[{tmp_path / 'shared'}]")
    assert len(hub.requests) == before and f"alpha: {tmp_path / 'shared' / REPO}" in said
    assert "shared" not in str(place.manifest()), "the same manifest wherever the files were found"


# ---------------------------------------------------------------- what goes wrong
def test_a_missing_repository(hub, place):
    hub.repos.clear()
    said = place.fails("lock")
    assert f"models.alpha: {REPO} does not exist, or is private" in said and "HF_TOKEN is not set" in said


def test_a_missing_revision(hub, tmp_path):
    assert "models.alpha: owner/alpha has no revision 'v9'" in Place(hub, tmp_path, revision="v9").fails("lock")


def test_a_gated_repository(hub, place):
    hub.repos["models", REPO].gated = True
    said = place.fails("lock")
    assert "gated" in said and "Accept its terms" in said and not lock_path(place.config).exists()
    place.ok("lock", token=hub.TOKEN)
    assert "gated" in place.fails("models", "--name", "alpha"), "the files are gated as well"
    place.ok("models", "--name", "alpha", token=hub.TOKEN)


def test_a_wrong_token_is_refused_and_not_shown(hub, place):
    said = place.fails("lock", token="hf_a_wrong_one")
    assert "refuses the token" in said and "hf_a_wrong_one" not in said


def test_a_token_from_a_file_is_not_used(hub, place):
    hub.repos["models", REPO].private = True
    place.home.mkdir()
    (place.home / "token").write_text(hub.TOKEN)
    assert "HF_TOKEN is not set" in place.fails("lock")
    place.ok("lock", token=hub.TOKEN)


def test_no_network(hub, place):
    said = place.fails("lock", HF_ENDPOINT="http://127.0.0.1:9")
    assert "no connection to http://127.0.0.1:9" in said and "login node" in said
    place.ok("lock")
    said = place.fails("models", "--name", "alpha", HF_ENDPOINT="http://127.0.0.1:9")
    assert "no connection" in said


def test_a_repository_without_safetensors(hub, place):
    hub.add(REPO, {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    assert "no model*.safetensors" in place.fails("lock")


def test_a_repository_without_a_tokenizer(hub, place):
    hub.add(REPO, {"config.json": b"{}", "model.safetensors": b"weights"})
    assert "models.alpha: owner/alpha has no tokenizer (tokenizer.json, " in place.fails("lock")


def test_a_repository_that_lacks_a_shard(hub, place):
    assert missing_shards(["model-00001-of-00003.safetensors", "config.json"]) == [
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]
    assert not missing_shards([f"model-0000{i}-of-00002.safetensors" for i in (1, 2)] + ["model.safetensors"])
    hub.add(REPO, {**BARE, "model-00001-of-00002.safetensors": b"weights"})
    said = place.fails("lock")
    assert "models.alpha: owner/alpha lacks model-00002-of-00002.safetensors: its upload was not finished" in said


def test_a_repositorys_manifest_is_not_taken_and_a_librarys_is_not_written_to(hub, place, folder, tmp_path):
    files = {p.name: p for p in folder.iterdir() if p.is_file()}
    hub.add(REPO, {**files, "MANIFEST.json": b'{"theirs": true}'})
    place.ok("lock")
    assert "MANIFEST.json" not in load(place.config).lock[f"{REPO}@main"].files
    place.ok("models", "--name", "alpha")
    assert "theirs" not in place.manifest()
    theirs = tmp_path / "theirs.json"
    theirs.write_text("theirs")
    (place.model / "MANIFEST.json").unlink()
    (place.model / "MANIFEST.json").symlink_to(theirs)
    write_manifest(place.model, {})
    assert theirs.read_text() == "theirs" and "tokenizer.json" in place.manifest()["files"]
    assert not any("MANIFEST" in name for name in place.manifest()["files"])
    assert not list(place.model.glob("*.partial"))


def test_a_name_that_is_none_is_said_with_its_key_and_the_other_problems(hub, place):
    settings = yaml.safe_load(place.config.read_text())
    settings["models"]["gamma"] = {"source": "hub", "repo": "a/b/c"}
    settings["models"]["delta"] = {"source": "hub", "repo": REPO, "revision": "old"}
    settings["arms"]["more"] = {"base": "two", "set": {"teachers": ["gamma", "delta"]}}
    place.config.write_text(yaml.safe_dump(settings))
    said = place.fails("lock")
    assert "models.gamma: a/b/c: not a repository's name, which is owner/name" in said
    assert "models.delta: owner/alpha has no revision" in said


def test_a_token_with_blanks_around_it_is_sent_without(hub, place):
    hub.repos["models", REPO].private = True
    place.ok("lock", token=f" {hub.TOKEN}\n")
    place.config.with_suffix(".lock.yaml").unlink()
    assert "HF_TOKEN is not set" in place.fails("lock", token=" ")


@pytest.mark.parametrize("bad", ["hf_a\nhf_b", "hf_a b", "hf_é"])
def test_a_token_that_cannot_be_sent_is_named_once_and_not_shown(hub, place, bad):
    settings = yaml.safe_load(place.config.read_text())
    settings["models"]["beta"] = {"source": "hub", "repo": "owner/beta"}
    place.config.write_text(yaml.safe_dump(settings))
    said = place.fails("lock", token=bad)
    assert said.count("HF_TOKEN holds characters that no token has") == 1
    assert "no connection" not in said and bad not in said


def test_a_library_that_is_not_there_is_named(hub, place, tmp_path):
    option = ("--set", f"libraries=[{tmp_path / 'none'}]")
    line = f"libraries: {tmp_path / 'none'} is no folder on this machine"
    assert line in place.ok("lock", *option) and line in place.ok("models", *option)


def test_all_problems_come_at_once(hub, place):
    settings = yaml.safe_load(place.config.read_text())
    settings["models"]["gamma"] = {"source": "hub", "repo": "owner/gamma"}
    settings["models"]["delta"] = {"source": "hub", "repo": REPO, "revision": "old"}
    settings["models"]["unused"] = {"source": "hub", "repo": "owner/unused"}
    settings["arms"]["more"] = {"base": "two", "set": {"teachers": ["gamma", "delta"]}}
    place.config.write_text(yaml.safe_dump(settings))
    said = place.fails("lock")
    assert "models.gamma: owner/gamma does not exist" in said and "models.delta: owner/alpha has no revision" in said
    assert "unused" not in said, "what no cell needs is not asked for"


def test_a_model_that_is_not_locked(hub, place):
    assert "is not locked to a commit. Run `kvpipe lock`" in place.fails("models", "--name", "alpha")


def test_too_small_a_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_module, "own_cache", lambda: tmp_path / "no cache")
    huge = {
        "model.safetensors": LockedFile(size=10**18, digest="sha256:00"),
        "config.json": LockedFile(size=2, digest="git:00"),
    }
    settings = values(tmp_path)
    settings["models"]["alpha"] = {"source": "hub", "repo": REPO}
    settings["lock"] = {f"{REPO}@main": LockedRepo(commit="a" * 40, files=huge).model_dump()}
    config, paths = parse(settings), Paths(tmp_path / "results")
    assert to_download(config, paths) == {"alpha": 10**18 + 2}
    with pytest.raises(HubError, match=r"1000000000\.0 GB are to be downloaded \(alpha"):
        check_room(to_download(config, paths), paths.root)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(HubError, match=r"GB free. Free some space"):
        fetch("alpha", config.models["alpha"], config, paths.model("alpha"))
    paths.model("alpha").mkdir(parents=True)
    (paths.model("alpha") / "config.json").write_bytes(b"{}")
    assert to_download(config, paths) == {"alpha": 10**18}, "what is there is not downloaded again"


# ---------------------------------------------------------------- the lock
def test_the_lock_is_part_of_the_configuration(tmp_path):
    """It is read beside the first file, a configuration's own entries win, and a model's step depends on its commit."""
    settings = values(tmp_path)
    settings["models"]["alpha"] = {"source": "hub", "repo": REPO}
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(settings))
    unlocked = model_of(load(path), "alpha")
    files = {"config.json": LockedFile(size=2, digest="git:00")}
    write_lock(lock_path(path), {f"{REPO}@main": LockedRepo(commit="b" * 40, files=files)})
    write_lock(lock_path(path), {"owner/other@main": LockedRepo(commit="c" * 40, files=files)})
    assert lock_path(path).name == "my.lock.yaml"
    config = load(path)
    assert {pin: repo.commit[0] for pin, repo in config.lock.items()} == {f"{REPO}@main": "b", "owner/other@main": "c"}
    assert model_of(config, "alpha") != unlocked
    assert model_of(config, "student") == model_of(load(path), "student")
    over = tmp_path / "over.yaml"
    over.write_text(yaml.safe_dump({"lock": {f"{REPO}@main": {"commit": "d" * 40}}}))
    assert load([path, over]).lock[f"{REPO}@main"].commit == "d" * 40


@pytest.mark.parametrize("text", ["", "{}", "lock:\n"])
def test_an_empty_lock_file_is_filled(tmp_path, text):
    path = tmp_path / "my.lock.yaml"
    path.write_text(text)
    files = {"config.json": LockedFile(size=2, digest="git:00")}
    write_lock(path, {f"{REPO}@main": LockedRepo(commit="b" * 40, files=files)})
    assert list(yaml.safe_load(path.read_text())["lock"]) == [f"{REPO}@main"]


def test_digests_are_gits_and_sha256(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"hello\n")
    assert digest_of(path, "git") == "git:ce013625030ba8dba906f756967f9e9ca394464a"
    assert digest_of(path, "sha256") == "sha256:5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"


def test_a_students_loading_is_not_chosen(tmp_path):
    settings = values(tmp_path)
    settings["models"]["student"] = {"source": "hub", "repo": REPO, "load": {"dtype": "bf16"}}
    with pytest.raises(ValueError, match=r"models\.student\.load: the student is trained"):
        parse(settings)
    assert HubModel(repo=REPO, revision="v1").pin == f"{REPO}@v1"
