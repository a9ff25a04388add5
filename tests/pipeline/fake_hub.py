"""A hub on this machine: the part of the Hugging Face hub's HTTP interface that transfers need.

POST /api/repos/create                    POST /api/models/ID/preupload/main
GET  /api/models/ID[/revision/main]       POST /api/models/ID/commit/main
GET  /api/models/ID/tree/main             GET, HEAD /ID/resolve/REVISION/FILE
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_of_the_fake_hub"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class FakeHub:
    repositories: dict[str, Repository] = field(default_factory=dict)

    requests: list[str] = field(default_factory=list)
    answers: dict[str, int] = field(default_factory=dict)  # status instead of the answer, by path
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *arguments: Any) -> None:
        pass

    def handle_one(self) -> None:
        path = self.path.split("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self._chunks())
        status = next((s for part, s in self.hub.answers.items() if part in path), None)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 401
        if status is not None:
            return self._answer({"error": f"refused with {status}"}, status)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":  # as the client does before it commits a README.md
            return self._answer({"errors": [], "warnings": []})

        for pattern, method in self.ROUTES:
            if match := re.fullmatch(pattern, path):
                repository = self.hub.repositories.get(match[1])
                if repository is None:
                    return self._answer({"error": "Repository not found"}, 404)
                return method(self, repository, match, body)
        raise AssertionError(f"{self.command} {path}")

    do_GET = do_POST = do_PUT = do_HEAD = handle_one  # noqa: N815

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            url = f"{self.hub.url}/{name}"
            return self._answer({"error": "You already created this repo", "url": url}, 409)
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.repositories[name] = Repository(private)
        return self._answer({"url": f"{self.hub.url}/{name}"})

    def _info(self, repository: Repository, match: re.Match[str], body: bytes) -> None:
        siblings = [{"rfilename": name} for name in repository.files]
        sha = repository.commits[-1] if repository.commits else "0" * 40
        info = {"id": match[1], "private": repository.private, "sha": sha}
        self._answer(info | {"siblings": siblings})

    def _tree(self, repository: Repository, match: re.Match[str], body: bytes) -> None:
        files = repository.files.items()
        known = {"type": "file", "oid": "0" * 40}
        self._answer([known | {"path": name, "size": len(data)} for name, data in files])

    def _preupload(self, repository: Repository, match: re.Match[str], body: bytes) -> None:
        files = json.loads(body)["files"]
        regular = {"uploadMode": "regular", "shouldIgnore": False}
        self._answer({"files": [file | regular for file in files]})

    def _commit(self, repository: Repository, match: re.Match[str], body: bytes) -> None:
        files = dict(repository.files)
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        repository.files = files
        sha = hashlib.sha1(body).hexdigest()
        repository.commits.append(sha)
        url = f"{self.hub.url}/{match[1]}/commit/{sha}"
        self._answer({"commitUrl": url, "commitOid": sha})

    def _file(self, repository: Repository, match: re.Match[str], body: bytes) -> None:
        data = repository.files.get(match[2])
        if data is None:
            return self._answer({}, 404, X_Error_Code="EntryNotFound")
        return self._answer(
            data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=repository.commits[-1]
        )

    _ID = r"([\w.-]+/[\w.-]+)"
    ROUTES = (
        (rf"/api/models/{_ID}", _info),
        (rf"/api/models/{_ID}/revision/\w+", _info),
        (rf"/api/models/{_ID}/tree/\w+", _tree),
        (rf"/api/models/{_ID}/preupload/main", _preupload),
        (rf"/api/models/{_ID}/commit/main", _commit),
        (rf"/{_ID}/resolve/\w+/(.+)", _file),
    )


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that runs while the block does; set `HF_ENDPOINT` to its `url`."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
