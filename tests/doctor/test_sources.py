"""Models: folders that lack something, and a hub (on loopback) that answers in every way it may."""

import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
from tiny import config

from kvpipe.doctor import Workload
from kvpipe.doctor.sources import check_sources, file_problems
from kvpipe.experiment.paths import Paths


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of them that a test may damage."""
    subprocess.run(["cp", "-r", str(saved / "teachers"), str(tmp_path)], check=True)
    return tmp_path


def examine(folder, overrides=None):
    return {f.name: f for f in check_sources(Workload(config(folder, overrides), Paths(folder / "results")))}


def test_complete_folders(folder):
    assert {f.status for f in examine(folder).values()} == {"ok"}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_model_folder(folder, name):
    (folder / "teachers" / "beta" / name).unlink()
    found = examine(folder)
    assert found["model alpha"].status == "ok"
    assert found["model beta"].status == "would fail"
    assert name.replace("model.", "*.") in found["model beta"].detail
    assert found["model beta"].fix == "correct models.beta.path"


def test_a_missing_folder_with_a_recipe_can_be_made(folder):
    subprocess.run(["rm", "-r", str(folder / "teachers" / "beta")], check=True)
    found = examine(folder, {"models.beta.recipe": {"architecture": {"model_type": "llama"}}})
    assert found["model beta"].status == "would fail"
    assert "source: pretrain" in found["model beta"].fix


def test_a_download_that_was_cut_off(folder):
    weights = folder / "teachers" / "beta" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    finding = examine(folder)["model beta"]
    assert finding.status == "would fail"
    assert "has no the end of model.safetensors" not in finding.detail, "reads like English"
    assert "model.safetensors is cut off" in finding.detail
    weights.write_bytes(b"\x03")
    assert "model.safetensors is cut off" in examine(folder)["model beta"].detail


def test_a_shard_that_is_missing(folder):
    beta = folder / "teachers" / "beta"
    (beta / "model.safetensors").rename(beta / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (beta / "model.safetensors.index.json").write_text(json.dumps(index))
    assert file_problems(beta) == ["model-00002-of-00002.safetensors is missing"]
    (beta / "model.safetensors.index.json").write_text("{")
    assert file_problems(beta) == ["model.safetensors.index.json cannot be read"]


def test_pickled_weights_only(folder):
    beta = folder / "teachers" / "beta"
    (beta / "model.safetensors").rename(beta / "pytorch_model.bin")
    assert "pickles are not loaded" in examine(folder)["model beta"].detail


# ---------------------------------------------------------------- data
def data(task="math", **source):
    columns = {"prompt": "q", "reasoning": "r", "answer": "a"}
    sources = [{"task": task, "columns": columns} | source]
    return {"data.sources": sources, "arms.task.set.fuse.weights": {"default": [0.5, 0.5]}}


def test_data_files_that_do_not_exist(folder):
    """The data step, hours later, would say FileNotFoundError."""
    here = folder / "rows[1].jsonl"
    here.touch()
    gone = folder / "none.jsonl"
    settings = data(kind="files", train=f"{here}[:95%]", validation=f"{gone}[95%:]", test=str(here))
    finding = examine(folder, settings)["data math"]
    assert (finding.status, finding.detail) == ("would fail", f"validation file {gone} does not exist")
    gone.touch()
    assert "data math" not in examine(folder, settings)
    gone.unlink()
    for split in ("train", "validation", "test"):
        written = Paths(folder / "results").data(split)
        written.parent.mkdir(parents=True, exist_ok=True)
        written.touch()
    assert "data math" not in examine(folder, settings), "the data step is done"


def test_a_data_folder_that_does_not_exist(folder):
    assert examine(folder, data(kind="hub", repo=f"{folder}/none"))["data math"].status == "would fail"
    assert "data math" not in examine(folder, data(kind="hub", repo=str(folder)))


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_data_of_the_hub_offline(folder, monkeypatch, variable):
    monkeypatch.setenv("HF_HOME", str(folder / "cache"))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    settings = data(kind="hub", repo="some/TheData")
    assert "data math" not in examine(folder, settings)
    monkeypatch.setenv(variable, "1")
    finding = examine(folder, settings)["data math"]
    assert finding.status == "would fail"
    assert finding.detail == f"some/TheData is not downloaded, and {variable}=1 forbids it"
    (folder / "cache" / "datasets" / "some___the_data" / "default" / "0.0.0" / "0123").mkdir(parents=True)
    assert "data math" not in examine(folder, settings)


# ---------------------------------------------------------------- the hub
def hub_model(folder, revision="main"):
    return {"models.alpha": {"source": "hub", "repo": "some/model", "revision": revision}}


def test_a_hub_model_that_was_downloaded_is_checked_on_disk(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = folder / "results" / "models" / "alpha"
    made.parent.mkdir(parents=True)
    (folder / "teachers" / "alpha").rename(made)
    (made / "MANIFEST.json").write_text("{}")
    assert examine(folder, hub_model(folder))["model alpha"].status == "ok"
    (made / "tokenizer.json").unlink()
    assert examine(folder, hub_model(folder))["model alpha"].status == "would fail"


def test_offline_and_not_downloaded(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    finding = examine(folder, hub_model(folder))["model alpha"]
    assert finding.status == "would fail"
    assert "HF_HUB_OFFLINE=1 forbids it" in finding.detail
    assert "kvpipe models --name alpha" in finding.fix


@pytest.mark.parametrize("place", ["some/model", f"models--some--model/snapshots/{'a' * 40}"])
@pytest.mark.parametrize("client", [True, False])
def test_a_locked_model_in_a_library_needs_no_hub(folder, monkeypatch, place, client):
    """Nor the hub's client, which a login node may lack; a file that is cut off there is no copy."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def cache():
        if not client:
            raise ModuleNotFoundError("huggingface_hub")
        return folder / "no cache"

    monkeypatch.setattr("kvpipe.models.hub.own_cache", cache)
    copy = folder / "shared" / place
    copy.parent.mkdir(parents=True)
    (folder / "teachers" / "alpha").rename(copy)
    files = {p.name: {"size": p.stat().st_size, "digest": "git:00"} for p in copy.iterdir()}
    locked = {"lock": {"some/model@main": {"commit": "a" * 40, "files": files}}, "libraries": [str(folder / "shared")]}
    found = examine(folder, hub_model(folder) | locked)
    assert found["model alpha"].status == found["lock"].status == "ok"
    assert str(copy) in found["model alpha"].detail
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "HF_HUB_OFFLINE=1 forbids it" in examine(folder, hub_model(folder) | locked)["model alpha"].detail


def test_a_hub_model_that_no_cell_needs_fails_nothing(folder):
    """As `kvpipe lock`, which does not ask for it."""
    unused = {"source": "hub", "repo": "some/other"}
    assert examine(folder, {"models.unused": unused}) == examine(folder)


def test_a_library_that_is_not_there(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    libraries = {"libraries": [str(folder), str(folder / "none")]}
    finding = examine(folder, hub_model(folder) | libraries)["libraries"]
    assert finding.status == "warning" and f"{folder / 'none'} is no folder" in finding.detail
    assert "libraries" not in examine(folder, libraries), "nothing is looked for in them"


@pytest.mark.parametrize(
    ("repo", "token", "words"),
    [("a/b/c", "", "a/b/c: not a repository's name"), ("some/model", "hf_a b", "HF_TOKEN holds characters")],
)
def test_a_name_or_a_token_that_cannot_be_sent(folder, monkeypatch, repo, token, words):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", token)
    finding = examine(folder, {"models.alpha": {"source": "hub", "repo": repo}})["model alpha"]
    assert finding.status == "would fail" and words in finding.detail


def test_a_hf_home_that_cannot_be_written(folder, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/proc/none")
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith("/proc"))
    finding = examine(folder, hub_model(folder))["HF_HOME"]
    assert finding.status == "warning"
    assert "export HF_HOME=" in finding.fix


# ---------------------------------------------------------------- the hub
FILE = {"blobId": "0123abcd", "size": 7}
INFO = {
    "id": "some/model",
    "sha": "0123456789abcdef0123456789abcdef01234567",
    "gated": False,
    "private": False,
    "tags": [],
    "siblings": [FILE | {"rfilename": name} for name in ("model.safetensors", "tokenizer.json", "config.json")],
}
GATED = INFO | {"gated": "auto"}
SLOW = INFO | {"siblings": [*INFO["siblings"][::2], FILE | {"rfilename": "tokenizer.model"}]}
# name → (model_info: status, error code, body), (auth check: status, error code), finding's status, words of it
ANSWERS = {
    "open": ((200, "", INFO), (200, ""), "ok", "can be downloaded (0123456789abcdef"),
    "gated, and open to you": ((200, "", GATED), (200, ""), "ok", "can be downloaded"),
    "gated": (
        (200, "", GATED),
        (403, "GatedRepo"),
        "would fail",
        "is gated and needs an account, and HF_TOKEN is not set",
    ),
    "absent": (
        (404, "RepoNotFound", {}),
        (200, ""),
        "would fail",
        "does not exist, or is private (HF_TOKEN is not set)",
    ),
    "no such revision": ((404, "RevisionNotFound", {}), (200, ""), "would fail", "has no revision 'main'"),
    "broken": ((500, "", {}), (200, ""), "would fail", "the hub answers"),
    "pickles": (
        (200, "", INFO | {"siblings": [FILE | {"rfilename": "pytorch_model.bin"}]}),
        (200, ""),
        "would fail",
        "no model*.safetensors",
    ),
    "slow tokenizer": ((200, "", SLOW), (200, ""), "warning", "no tokenizer.json"),
}
EXAMINE = """
import json, sys
from kvpipe.config import HubModel
from kvpipe.doctor.sources import online
finding = online("alpha", HubModel(repo="some/model"))
assert "torch" not in sys.modules
print(json.dumps(vars(finding)))
"""


def ask_hub(endpoint: str, tmp_path) -> dict:
    """The finding, from a process of its own: the hub's address is read when its library is imported.

    There is a token in a file, which counts no more than for `kvpipe lock`."""
    (tmp_path / "token").write_text("hf_from_a_file")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS", "SLURM"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "no_proxy": "*"}
    command = [sys.executable, "-c", EXAMINE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ANSWERS)
def test_the_hub(name, tmp_path):
    info, auth, status, words = ANSWERS[name]
    sent: list[str | None] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            sent.append(self.headers["Authorization"])
            code, error, body = (*auth, {}) if "auth-check" in self.path else info
            data = json.dumps(body).encode()
            self.send_response(code)
            if error:
                self.send_header("X-Error-Code", error)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        finding = ask_hub(f"http://127.0.0.1:{server.server_port}", tmp_path)
        server.shutdown()
    assert set(sent) == {None}
    assert (finding["status"], words in finding["detail"]) == (status, True), finding


def test_no_hub_at_all(tmp_path):
    finding = ask_hub("http://127.0.0.1:9", tmp_path)
    assert finding["status"] == "would fail"
    assert "no connection to http://127.0.0.1:9" in finding["detail"]
    assert "on a machine that reaches the hub" in finding["detail"]
