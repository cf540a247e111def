"""A Hub on loopback: what huggingface_hub 2.4 asks of one when it creates, uploads, downloads.

Repositories live in memory as commits of whole trees. Safetensors go through LFS. `fail` maps the
beginning of a request ("PUT /lfs") to the status that it is answered with, once per listed time.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_" + "fake" * 8
SHA_EMPTY = "0" * 40


@dataclass
class Repository:
    """A repository: its visibility and its commits, each a whole tree of files."""

    private: bool = True
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=lambda: [(SHA_EMPTY, {})])
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def sha(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        """Return commit and tree of a revision: a commit's id, else the newest."""
        return next((c for c in self.commits if c[0] == revision), self.commits[-1])

    def commit(self, changes: dict[str, bytes], gone: frozenset[str] = frozenset()) -> str:
        tree = {name: d for name, d in {**self.files, **changes}.items() if name not in gone}
        listing = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in tree.items())
        sha = hashlib.sha1(json.dumps([len(self.commits), listing]).encode()).hexdigest()
        self.commits.append((sha, tree))
        return sha


class FakeHub:
    """The server's state; `url` is what HF_ENDPOINT is set to."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.fail: dict[str, list[int]] = {}
        self.readonly_owners: set[str] = set()
        self.url = ""

    def status(self, line: str) -> int | None:
        """Return the status that this request must fail with, if any."""
        for start, codes in self.fail.items():
            if line.startswith(start) and codes:
                return codes.pop(0)
        return None

    def add(self, name: str, files: dict[str, bytes]) -> str:
        """Put a public repository on the Hub and return its commit."""
        repository = self.repositories.setdefault(name, Repository(private=False))
        return repository.commit(files)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve a Hub on loopback for the length of the block."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(monkeypatch: Any, hub: FakeHub, cache: Any, token: str | None = TOKEN) -> None:
    """Point this process's huggingface_hub at `hub`, with a cache of its own, and LFS, not Xet."""
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_TOKEN_PATH": str(cache / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", False)


class Handler(BaseHTTPRequestHandler):
    """One request; the routes are those that huggingface_hub uses."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self) -> None:
        method, path = self.command, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = self.read_chunks()
        line = f"{method} {path}"
        self.hub.requests.append(line)
        anybody = path.startswith("/lfs/") or path == "/api/validate-yaml"
        if failure := self.hub.status(line):
            self.reply(failure, {"error": "as the test wants"})
        elif (
            anybody
            or method in ("GET", "HEAD")
            or self.headers.get("Authorization") == f"Bearer {TOKEN}"
        ):
            self.route(path, body)
        else:
            self.reply(401, {"error": "Invalid credentials in Authorization header"})

    do_HEAD = do_GET = do_PUT = do_POST = answer

    def read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def reply(
        self, status: int, content: Any = None, headers: dict[str, str] | None = None
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def route(self, path: str, body: bytes) -> None:
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            self.validate(**json.loads(body))
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif parts[0] == "lfs":
            self.store_lfs(parts[1], body)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.batch(json.loads(body))
        elif parts[:2] == ["api", "models"] and len(parts) >= 4:
            self.repository("/".join(parts[2:4]), parts[4:], body)
        elif parts[:2] == ["api", "datasets"] and len(parts) >= 4:
            self.repository("/".join(parts[1:4]), parts[4:], body)
        elif len(parts) >= 5 and parts[2] == "resolve":
            self.download("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.reply(404, {"error": f"no route for {self.command} {path}"})

    def validate(self, content: str, repoType: str) -> None:
        errors = []
        try:
            data: dict[str, Any] = yaml.safe_load(content.split("---\n")[1]) or {}
            base = data.get("base_model", "")
            if repoType == "model" and (len(base.split("/")) != 2 or base.startswith("/")):
                errors.append({"message": '"base_model" must be a model id'})
        except (yaml.YAMLError, IndexError, AttributeError) as error:
            errors.append({"message": str(error)})
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if name.split("/")[0] in self.hub.readonly_owners:
            self.reply(
                403, {"error": "You don't have the rights to create a model under this namespace"}
            )
            return
        name = f"datasets/{name}" if wanted.get("type") == "dataset" else name
        status = 409 if name in self.hub.repositories else 200
        private = wanted.get("visibility", "public") == "private" or bool(wanted.get("private"))
        self.hub.repositories.setdefault(name, Repository(private=private))
        self.reply(status, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def repository(self, name: str, rest: list[str], body: bytes) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["preupload"]:
            self.preupload(repository, json.loads(body)["files"])
        elif rest[:1] == ["commit"]:
            self.commit(name, repository, [json.loads(line) for line in body.splitlines()])
        elif rest[:1] == ["refs"]:
            tags = [
                {"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": sha}
                for tag, sha in repository.tags.items()
            ]
            self.reply(200, {"branches": [], "converts": [], "tags": tags})
        elif rest[:1] == ["tag"]:
            repository.tags[json.loads(body)["tag"]] = rest[1]
            self.reply(200)
        elif rest[:1] == ["settings"]:
            repository.private = json.loads(body)["visibility"] == "private"
            self.reply(200)
        elif rest[:1] == ["tree"] and rest[2:]:
            self.reply(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
        elif rest[:1] == ["tree"]:
            rows = [
                {"type": "file", "path": path, "size": len(data), "oid": oid_of(data, False)}
                for path, data in sorted(repository.at(rest[1])[1].items())
            ]
            self.reply(200, rows)
        else:
            sha, files = repository.at(rest[1] if rest[:1] == ["revision"] else "main")
            siblings = [{"rfilename": path} for path in sorted(files)]
            described = {"id": name, "sha": sha, "private": repository.private}
            self.reply(200, {**described, "siblings": siblings})

    def preupload(self, repository: Repository, files: list[dict[str, Any]]) -> None:
        rows = []
        for file in files:
            large, content = (
                file["path"].endswith((".safetensors", ".gguf")),
                repository.files.get(file["path"]),
            )
            rows.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": None if content is None else oid_of(content, large),
                }
            )
        self.reply(200, {"files": rows})

    def batch(self, wanted: dict[str, Any]) -> None:
        rows = [{"oid": item["oid"], "size": item["size"]} for item in wanted["objects"]]
        for row in rows:
            if row["oid"] not in self.hub.lfs:
                row["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{row['oid']}"}}
        self.reply(200, {"transfer": "basic", "objects": rows})

    def store_lfs(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self.reply(400, {"error": "the content does not have this oid"})
            return
        self.hub.lfs[oid] = body
        self.reply(200)

    def commit(self, name: str, repository: Repository, rows: list[dict[str, Any]]) -> None:
        changes, gone = {}, set()
        for row in rows[1:]:
            value = row["value"]
            if row["key"] == "deletedFile":
                gone.add(value["path"])
            elif row["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    self.reply(400, {"error": "LFS object missing"})
                    return
                changes[value["path"]] = self.hub.lfs[value["oid"]]
            else:
                changes[value["path"]] = base64.b64decode(value["content"])
        sha = repository.commit(changes, frozenset(gone))
        url = f"{self.hub.url}/{name}/commit/{sha}"
        self.reply(200, {"commitUrl": url, "commitOid": sha, "pullRequestUrl": None})

    def download(self, name: str, revision: str, path: str) -> None:
        repository = self.hub.repositories.get(name)
        sha, files = repository.at(revision) if repository else ("", {})
        if path not in files:
            code = "EntryNotFound" if repository else "RepoNotFound"
            self.reply(404, {"error": "not found"}, {"X-Error-Code": code})
            return
        headers = {"X-Repo-Commit": sha, "ETag": f'"{oid_of(files[path], True)}"'}
        self.reply(200, files[path], headers)


def oid_of(data: bytes, large: bool) -> str:
    """Return the id that the Hub gives a file: its SHA-256 in LFS, else that of its git blob."""
    if large:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
