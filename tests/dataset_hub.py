"""A hub of data sets on the loopback device: as much of its API as `datasets` asks for, with one commit per repository."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TAG = "v1"


def commit_of(folder: Path) -> str:
    """A commit name that follows from the files."""
    parts = [
        p.relative_to(folder).as_posix().encode() + p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    ]
    return sha1(b"\0".join(parts)).hexdigest()


@contextmanager
def serve(repos: dict[str, Path]):
    """Serve folders as `owner/name`; yields the endpoint and the list of requests so far."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def reply(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            requests.append(f"{self.command} {path}")
            if "Authorization" in self.headers:
                requests.append(self.headers["Authorization"])
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = path.removeprefix("/api").strip("/").split("/")
            repo = "/".join(parts[1:3])
            if parts[0] != "datasets" or repo not in repos:
                return self.reply(404, b"{}", X_Error_Code="RepoNotFound")
            folder, commit = repos[repo], commit_of(repos[repo])
            kind, revision, rest = parts[3], parts[4] if len(parts) > 4 else "main", "/".join(parts[5:])
            if revision not in ("main", TAG, commit):
                return self.reply(404, b"{}", X_Error_Code="RevisionNotFound")
            files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
            if kind == "resolve":
                if not (folder / rest).is_file():
                    return self.reply(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
                content = (folder / rest).read_bytes()
                return self.reply(200, content, X_Repo_Commit=commit, ETag=f'"{sha1(content).hexdigest()}"')
            if kind == "revision":
                listed = [{"rfilename": p.relative_to(folder).as_posix()} for p in files]
                return self.json({"id": repo, "sha": commit, "siblings": listed, "private": False, "tags": []})
            entries = [self.entry(folder, p) for p in files]
            entries += [self.entry(folder, p) for p in sorted(folder.rglob("*")) if p.is_dir()]
            if kind == "paths-info":
                wanted = json.loads(body)["paths"] if body[:1] == b"{" else []
                return self.json([e for e in entries if e["path"] in wanted])
            if kind == "tree":
                return self.json([e for e in entries if not rest or e["path"].startswith(f"{rest}/")])
            return self.reply(404, b"{}")

        def entry(self, folder: Path, path: Path) -> dict:
            name = path.relative_to(folder).as_posix()
            oid = sha1(path.read_bytes() if path.is_file() else name.encode()).hexdigest()
            if path.is_dir():
                return {"type": "directory", "path": name, "oid": oid, "size": 0}
            return {"type": "file", "path": name, "oid": oid, "size": path.stat().st_size}

        def json(self, value) -> None:
            self.reply(200, json.dumps(value).encode(), Content_Type="application/json")

        do_GET = do_HEAD = do_POST = answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
