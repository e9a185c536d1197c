"""A server on the loopback that plays the Hugging Face hub for the real client, through `HF_ENDPOINT`.

    with HubServer() as hub:
        hub.add("owner/name", {"config.json": b"{}", "model.safetensors": Path("…")})
        subprocess.run([...], env=hub.environment(tmp_path))

It keeps repositories of models and data sets in memory (large files as paths on disk), with commits, branches, gated and
private ones, and takes uploads. What can go wrong is set before a request: `hub.cut[name] = n` breaks the connection
once after n bytes of a file, `hub.corrupt[name] = times` flips a byte of it so many times. `hub.requests` says what
was asked. It speaks the plain HTTP part of the protocol: `environment` switches Xet off.
"""

from __future__ import annotations

import base64
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Content = bytes | Path
KINDS = {"models": "", "datasets": "datasets/"}
LARGE = (".safetensors", ".parquet", ".bin", ".arrow")
"""Files that the hub keeps as large objects, known by their sha256."""
BLOCK = 1 << 20


@dataclass
class Repo:
    """A repository: its files at every commit, and which commit a branch stands for."""

    kind: str
    gated: bool = False
    private: bool = False
    license: str | None = None
    commits: dict[str, dict[str, Content]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Content], branch: str = "main") -> str:
        """A new commit on a branch, its files in the place of what was there."""
        sha = sha1(json.dumps([listed(files), len(self.commits)]).encode()).hexdigest()
        self.commits[sha], self.refs[branch] = dict(files), sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch or a commit's name."""
        revision = self.refs.get(revision, revision)
        return revision if revision in self.commits else None


def size_of(content: Content) -> int:
    """Bytes."""
    return content.stat().st_size if isinstance(content, Path) else len(content)


_digests: dict[tuple, str] = {}


def digest(content: Content, kind: str) -> str:
    """`sha256` of a content, or the SHA-1 that git gives it."""
    key = (content.as_posix() if isinstance(content, Path) else content, kind)
    if key not in _digests:
        found = sha256() if kind == "sha256" else sha1(f"blob {size_of(content)}\0".encode())
        if isinstance(content, Path):
            with content.open("rb") as handle:
                while block := handle.read(BLOCK):
                    found.update(block)
        else:
            found.update(content)
        _digests[key] = found.hexdigest()
    return _digests[key]


def known(name: str, content: Content, blob: str, large: str) -> dict[str, Any]:
    """What listings tell of a file, under the names that each listing uses."""
    entry: dict[str, Any] = {"size": size_of(content)}
    if not name.endswith(LARGE):
        return entry | {blob: digest(content, "git")}
    large_object = {large: digest(content, "sha256"), "size": size_of(content), "pointerSize": 130}
    return entry | {blob: large_object[large][:40], "lfs": large_object}  # in truth the hash of the pointer


def listed(files: dict[str, Content], below: str = "", recursive: bool = True) -> list[dict[str, Any]]:
    """The files and folders of a commit, in a folder, and in all that is below it."""
    folders = {parent.as_posix() for name in files for parent in Path(name).parents} - {"."}
    entries = [{"type": "directory", "path": name, "oid": sha1(name.encode()).hexdigest()} for name in sorted(folders)]
    entries += [{"type": "file", "path": n} | known(n, files[n], "oid", "oid") for n in sorted(files)]
    start = f"{below}/" if below else ""
    inside = [entry for entry in entries if entry["path"].startswith(start)]
    return inside if recursive else [entry for entry in inside if "/" not in entry["path"].removeprefix(start)]


class HubServer:
    """The hub: `with HubServer() as hub`. Requests need a token only where a repository is gated or private."""

    TOKEN = "hf_a_good_token"

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.cut: dict[str, int] = {}
        self.corrupt: dict[str, int] = {}
        self.requests: list[str] = []
        self.uploads: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """What `HF_ENDPOINT` is to be."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The variables of a process that is to talk to this hub, with an empty cache below `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "KVPIPE", "HUGGING"))}
        mine = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        return kept | mine | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | ({"HF_TOKEN": token} if token else {})

    def add(self, name: str, files: dict[str, Content] | Path, kind: str = "models", **more: Any) -> str:
        """A repository with one commit of files (or of a folder's); its commit."""
        if isinstance(files, Path):
            folder, found = files, [p for p in files.rglob("*") if p.is_file() and p.name != "MANIFEST.json"]
            files = {p.relative_to(folder).as_posix(): p for p in found}
        repo = self.repos[kind, name] = Repo(kind, **more)
        return repo.commit(files)


class _Refused(Exception):
    """Status, the hub's own code for it, and a message."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    # ------------------------------------------------------------ replies
    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _answer(self, reply: Callable[[str], None]) -> None:
        path = unquote(urlsplit(self.path).path)
        span = f" {self.headers['Range']}" if "Range" in self.headers else ""
        self.hub.requests.append(f"{self.command} {path}{span}")
        try:
            reply(path)
        except _Refused as refused:
            status, code, message = refused.args
            self._json({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @property
    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _repo(self, kind: str, name: str, files: bool) -> Repo:
        """The repository, if this request may see it (its files)."""
        if self._token and self._token != self.hub.TOKEN:
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and not self._token):
            raise _Refused(404 if self._token else 401, "RepoNotFound", "Repository not found")
        if files and repo.gated and not self._token:
            raise _Refused(401, "GatedRepo", f"Access to {name} is restricted")
        return repo

    def _at(self, kind: str, name: str, revision: str, files: bool = False) -> tuple[Repo, str]:
        """The repository and the commit that a revision stands for."""
        repo = self._repo(kind, name, files)
        sha = repo.resolve(revision)
        if sha is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, sha

    # ------------------------------------------------------------ reading
    def do_HEAD(self) -> None:
        """As GET, without the body."""
        self._answer(self._get)

    def do_GET(self) -> None:
        """What a repository is, what it holds, and its files."""
        self._answer(self._get)

    def _get(self, path: str) -> None:
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/auth-check", path):
            self._repo(found[1], found[2], files=True)
            self._json({})
        elif found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(found[2], *self._at(found[1], found[2], found[3] or "main"))
        elif found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            repo, sha = self._at(found[1], found[2], found[3])
            self._json(listed(repo.commits[sha], found[4] or "", "recursive=true" in self.path.lower()))
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind = "datasets" if found[1] else "models"
            self._file(found[4], *self._at(kind, found[2], found[3], files=True))
        else:
            raise _Refused(404, "EntryNotFound", f"no such address {path}")

    def _info(self, name: str, repo: Repo, sha: str) -> None:
        files = repo.commits[sha]
        self._json(
            {
                "id": name,
                "sha": sha,
                "private": repo.private,
                "gated": "manual" if repo.gated else False,
                "cardData": {"license": repo.license} if repo.license else {},
                "tags": [],
                "siblings": [{"rfilename": n} | known(n, files[n], "blobId", "sha256") for n in sorted(files)],
            }
        )

    def _file(self, file: str, repo: Repo, sha: str) -> None:
        if file not in repo.commits[sha]:
            raise _Refused(404, "EntryNotFound", f"no {file}")
        content = repo.commits[sha][file]
        size = size_of(content)
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(span[1]), int(span[2] or size - 1)) if span else (0, size - 1)
        self.send_response(206 if span else 200)
        self.send_header("ETag", f'"{digest(content, "sha256" if file.endswith(LARGE) else "git")}"')
        self.send_header("X-Repo-Commit", sha)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        if span:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if self.command == "GET":
            self._send(file, content, first, last + 1)

    def _send(self, file: str, content: Content, first: int, last: int) -> None:
        if self.hub.corrupt.get(file, 0) > 0:
            self.hub.corrupt[file] -= 1
            whole = bytearray(content.read_bytes() if isinstance(content, Path) else content)
            whole[len(whole) // 2] ^= 0xFF
            content = bytes(whole)
        if file in self.hub.cut:
            last = min(last, first + self.hub.cut.pop(file))
            self.close_connection = True
        with content.open("rb") if isinstance(content, Path) else BytesIO(content) as handle:
            handle.seek(first)
            while first < last:
                block = handle.read(min(BLOCK, last - first))
                self.wfile.write(block)
                first += len(block)

    # ------------------------------------------------------------ writing
    def do_POST(self) -> None:
        """New repositories and commits, which need the token; and what is known of some paths."""
        self._answer(self._post)

    def do_PUT(self) -> None:
        """A large object, before the commit that names it."""
        self._answer(self._put)

    def _post(self, path: str) -> None:
        body = self._body()
        if self._token != self.hub.TOKEN and "/paths-info/" not in path:
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            repo, sha = self._at(found[1], found[2], found[3])
            asked = json.loads(body)["paths"]
            self._json([entry for entry in listed(repo.commits[sha]) if entry["path"] in asked])
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/(models|datasets)/[^/]+/[^/]+/preupload/[^/]+", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(LARGE) else "regular" for name in names}
            self._json({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})
        elif re.fullmatch(r"/.+\.git/info/lfs/objects/batch", path):
            asked = json.loads(body)["objects"]
            upload = [{**o, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}} for o in asked]
            self._json({"transfer": "basic", "objects": upload})
        elif found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/commit/([^/]+)", path):
            self._commit(found[1], found[2], found[3], body)
        else:
            raise _Refused(404, "EntryNotFound", f"no such address {path}")

    def _put(self, path: str) -> None:
        body, oid = self._body(), path.rsplit("/", 1)[1]
        if sha256(body).hexdigest() != oid:
            raise _Refused(400, "", "wrong sha256")
        self.hub.uploads[oid] = body
        self._json({})

    def _create(self, asked: dict[str, Any]) -> None:
        kind, name = f"{asked.get('type', 'model')}s", f"{asked['organization']}/{asked['name']}"
        there = (kind, name) in self.hub.repos
        if not there:
            self.hub.repos[kind, name] = Repo(kind, private=asked.get("visibility") == "private")
            self.hub.repos[kind, name].commit({})
        self._json({"url": f"{self.hub.url}/{KINDS[kind]}{name}", "name": name}, 409 if there else 200)

    def _commit(self, kind: str, name: str, branch: str, body: bytes) -> None:
        repo, sha = self._at(kind, name, branch, files=True)
        files = dict(repo.commits[sha])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        new = repo.commit(files, branch)
        address = f"{self.hub.url}/{KINDS[kind]}{name}/commit/{new}"
        self._json({"commitUrl": address, "commitOid": new, "pullRequestUrl": None})
