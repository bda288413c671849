"""A hub on loopback: the routes that huggingface_hub and datasets use, over an in-memory store."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "s3cret" * 5


@dataclass
class Commit:
    message: str
    files: dict[str, bytes]
    sha: str = ""

    def __post_init__(self) -> None:
        content = repr((self.message, sorted(self.files.items()))).encode()
        self.sha = hashlib.sha1(content).hexdigest()


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit("new", {})]})

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = (commit for branch in self.branches.values() for commit in branch)
        return next((commit for commit in commits if commit.sha == revision), None)


@dataclass
class Seen:
    """A request as it came in."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


class FakeHub:
    """Repositories by ``models/org/name``, what was asked, and answers to give instead.

    ``failures`` maps a piece of a path to the statuses of its next answers. The token may write to
    the organisation ``me`` alone.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.seen: list[Seen] = []
        self.failures: dict[str, list[int]] = {}
        self.blobs: dict[str, bytes] = {}
        self.url = ""

    def commit(self, name: str, files: Mapping[str, bytes], message: str = "c") -> str:
        """Adds a commit to a (perhaps new) repository; returns its id."""
        repo = self.repos.setdefault(name, Repo(private=False))
        repo.branches["main"].append(Commit(message, dict(files)))
        return repo.branches["main"][-1].sha


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that answers until the end of the block."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        self.hub.seen.append(Seen(self.command, self.path, dict(self.headers), body))
        for piece, statuses in self.hub.failures.items():
            if piece in path and statuses:
                self._error(statuses.pop(0), "told to fail")
                return
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            self._api(parts[1:], body)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif parts[0] == "lfs":
            digest = hashlib.sha256(body).hexdigest()
            assert digest == parts[1], "the bytes are those that were announced"
            self.hub.blobs[digest] = body
            self._json({})
        elif "resolve" in parts:
            self._resolve(parts)
        else:
            self._error(404, "no such route", "RepoNotFound")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _api(self, parts: list[str], body: bytes) -> None:
        match parts:
            case ["validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["repos", "create"]:
                self._create(json.loads(body))
            case [kind, org, name, *rest] if f"{kind}/{org}/{name}" in self.hub.repos:
                self._repo(f"{kind}/{org}/{name}", rest, body)
            case _:
                self._error(404, "Repository not found", "RepoNotFound")

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"models/{asked['organization']}/{asked['name']}"
        if not self._may_write(asked["organization"]):
            return
        url = {"url": f"{self.hub.url}/{asked['organization']}/{asked['name']}"}
        if name in self.hub.repos:
            self._json(url, 409)
            return
        self.hub.repos[name] = Repo(private=asked.get("visibility") == "private")
        self._json(url)

    def _may_write(self, organisation: str) -> bool:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._error(401, "Invalid credentials in Authorization header")
        elif organisation != "me":
            self._error(403, "You don't have the rights")
        else:
            return True
        return False

    def _repo(self, name: str, rest: list[str], body: bytes) -> None:
        repo = self.hub.repos[name]
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repo.at(revision)
        match rest:
            case ["branch", branch]:
                taken = branch in repo.branches
                if not taken:
                    repo.branches[branch] = list(repo.branches["main"])
                self._json({}, 409 if taken else 200)
            case _ if commit is None:
                self._error(404, "no such revision", "RevisionNotFound")
            case [] | ["revision", _]:
                identity = name.partition("/")[2]
                siblings = [{"rfilename": file} for file in commit.files]
                info = {"id": identity, "sha": commit.sha, "private": repo.private, "tags": []}
                self._json({**info, "downloads": 0, "likes": 0, "siblings": siblings})
            case ["tree", _, *folder]:
                prefix = "".join(f"{part}/" for part in folder)
                files = {p: d for p, d in commit.files.items() if p.startswith(prefix)}
                self._json([_described(path, data) for path, data in files.items()])
            case ["paths-info", _]:
                form = parse_qs(body.decode())
                paths = json.loads(body)["paths"] if body.startswith(b"{") else form["paths"]
                found = [path for path in paths if path in commit.files]
                self._json([_described(path, commit.files[path]) for path in found])
            case ["preupload", _]:
                self._preupload(json.loads(body)["files"])
            case ["commit", branch]:
                self._commit(repo, branch, name.partition("/")[2], body)
            case _:
                self._error(404, "no such route", "EntryNotFound")

    def _preupload(self, files: list[dict[str, Any]]) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        self._json({"files": modes})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}}
            for item in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repo: Repo, branch: str, identity: str, body: bytes) -> None:
        if not self._may_write(identity.partition("/")[0]):
            return
        operations = [json.loads(line) for line in body.splitlines()]
        files = dict(repo.branches[branch][-1].files)
        for operation in operations:
            value = operation["value"]
            match operation["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        repo.branches[branch].append(Commit(operations[0]["value"]["summary"], files))
        sha = repo.branches[branch][-1].sha
        self._json({"commitUrl": f"{self.hub.url}/{identity}/commit/{sha}", "commitOid": sha})

    def _resolve(self, parts: list[str]) -> None:
        kind = "datasets" if parts[0] == "datasets" else "models"
        org, name, _, revision, *path = parts[1:] if kind == "datasets" else parts
        repo = self.hub.repos.get(f"{kind}/{org}/{name}")
        commit = repo.at(revision) if repo else None
        if commit is None:
            self._error(404, "not found", "RevisionNotFound" if repo else "RepoNotFound")
            return
        data = commit.files.get("/".join(path))
        if data is None:
            self._error(404, "no such file", "EntryNotFound", commit.sha)
            return
        begin, _, end = (
            (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
        )
        part = data[int(begin) : int(end) + 1 if end else None]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit.sha}
        if "Range" in self.headers:
            headers["Content-Range"] = f"bytes {begin}-{int(begin) + len(part) - 1}/{len(data)}"
        self._send(206 if "Range" in self.headers else 200, part, headers)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, message: str, code: str = "", commit: str = "") -> None:
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        headers = {name: value for name, value in headers.items() if value}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _described(path: str, data: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(data).hexdigest()
    return {"type": "file", "path": path, "size": len(data), "oid": oid}
