"""A local server that speaks the hub's protocol, with faults on request."""

from __future__ import annotations

import hashlib
import json
import re
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from tests.helpers.local_server import local_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

LARGE = (".safetensors", ".bin", ".pt", ".model", ".gguf")  # these are in LFS, as on the hub
PIECE = 1 << 12


@dataclass
class Fault:
    """A fault in the answers to requests whose path matches.

    Attributes:
        times: requests that it affects; below 0 all of them.
        method: GET or HEAD; "" is both.
        error: the X-Error-Code that goes with `status`.
        drop: cut the connection after this many bytes of content.
        pace: bytes per second.
    """

    pattern: str
    times: int = -1
    method: str = ""
    status: int = 0
    error: str = ""
    drop: int | None = None
    corrupt: bool = False
    shorten: bool = False
    pace: float = 0.0
    ignore_ranges: bool = False


@dataclass
class HubServer:
    """Repositories by id: revision -> file name -> content.

    `requests` holds the method, the path and the range of each request.
    """

    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    url: str = ""

    def add(
        self, repository: str, files: Mapping[str, bytes] | Path, revision: str = "main"
    ) -> None:
        if isinstance(files, Path):
            files = {
                str(p.relative_to(files)): p.read_bytes()
                for p in sorted(files.rglob("*"))
                if p.is_file()
            }
        self.repositories.setdefault(repository, {})[revision] = dict(files)

    def fault(self, pattern: str, **details: Any) -> None:
        self.faults.append(Fault(pattern, **details))

    def fault_for(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, path) and fault.method in ("", method):
                fault.times -= 1
                return fault
        return None

    def fetched(self, method: str = "GET") -> list[str]:
        """Return the names of the files whose content was requested, in order."""
        return [
            path.rsplit("/", 1)[1]
            for asked, path, _ in self.requests
            if asked == method and "/cdn/" in path
        ]

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Return the environment of a client whose cache is in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "",
            "XDG_DATA_HOME": str(home / "data"),
            "NO_PROXY": "127.0.0.1",
        } | more


@contextmanager
def hub_server() -> Iterator[HubServer]:
    hub = HubServer()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with local_server(handler) as hub.url:
        yield hub


def commit_of(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(f"{name} {blob_id(files[name])}\n".encode())
    return digest.hexdigest()


def blob_id(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    sent_fault: Fault
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *ignored: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        fault = self.hub.fault_for(self.command, path)
        if fault and fault.status:
            self._refuse(fault.status, fault.error)
            return
        self.sent_fault = fault or Fault("")
        for pattern, answer in _ROUTES:
            if found := re.fullmatch(pattern, path):
                answer(self, *found.groups())
                return
        self._refuse(404, "")

    def _info(self, repository: str, revision: str | None) -> None:
        if files := self._files(repository, revision or "main"):
            siblings = [
                {"rfilename": name, **_described(name, content, "sha256")}
                for name, content in files.items()
            ]
            document = {
                "id": repository,
                "modelId": repository,
                "sha": commit_of(files),
                "private": False,
            }
            self._json(
                document | {"tags": [], "downloads": 0, "gated": False, "siblings": siblings}
            )

    def _tree(self, repository: str, revision: str) -> None:
        if files := self._files(repository, revision):
            entries = [(name, _described(name, content, "oid")) for name, content in files.items()]
            self._json(
                [
                    {"type": "file", "path": name, "oid": each.pop("blobId"), **each}
                    for name, each in entries
                ]
            )

    def _resolve(self, repository: str, revision: str, name: str) -> None:
        """Send a small file, or the place of a large one, as the hub does."""
        files = self._files(repository, revision)
        if not files:
            return
        if name not in files:
            self._refuse(404, "EntryNotFound")
            return
        if not name.endswith(LARGE):
            self._content(repository, revision, name)
            return
        content = files[name]
        commit = commit_of(files)
        self.send_response(302)
        self._headers(
            {
                "Location": f"/cdn/{repository}/resolve/{commit}/{name}",
                "X-Repo-Commit": commit,
                "Content-Length": 0,
                "X-Linked-Size": len(content),
                "X-Linked-Etag": f'"{sha256(content)}"',
            }
        )

    def _content(self, repository: str, revision: str, name: str) -> None:
        files = self._files(repository, revision) or {}
        content = files[name]
        fault = self.sent_fault
        etag = sha256(content) if name.endswith(LARGE) else blob_id(content)
        sent = bytes(byte ^ 1 for byte in content) if fault.corrupt else content
        sent = sent[: len(sent) // 2] if fault.shorten else sent
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and not fault.ignore_ranges else 0
        if start >= len(sent) > 0:
            self._refuse(416, "")
            return
        self.send_response(206 if start else 200)
        ranges = {"Content-Range": f"bytes {start}-{len(sent) - 1}/{len(sent)}"} if start else {}
        common = {"ETag": f'"{etag}"', "X-Repo-Commit": commit_of(files), "Accept-Ranges": "bytes"}
        self._headers({"Content-Length": len(sent) - start} | common | ranges)
        if self.command == "GET":
            self._send(sent[start:])

    def _send(self, content: bytes) -> None:
        fault = self.sent_fault
        whole = len(content) if fault.drop is None else min(fault.drop, len(content))
        for place in range(0, whole, PIECE):
            piece = content[place : min(place + PIECE, whole)]
            self.wfile.write(piece)
            if fault.pace:
                time.sleep(len(piece) / fault.pace)
        self.close_connection = whole < len(content)

    def _files(self, repository: str, revision: str) -> dict[str, bytes] | None:
        revisions = self.hub.repositories.get(repository)
        if revisions is None:
            self._refuse(401, "RepoNotFound")  # as the hub answers without a login
            return None
        commits = {commit_of(files): files for files in revisions.values()}
        found = revisions.get(revision) or commits.get(revision)
        if found is None:
            self._refuse(404, "RevisionNotFound")
        return found

    def _refuse(self, status: int, error: str) -> None:
        body = json.dumps({"error": error}).encode()
        self.send_response(status)
        self._headers({"Content-Length": len(body)} | ({"X-Error-Code": error} if error else {}))
        if self.command == "GET":
            self.wfile.write(body)

    def _json(self, document: Any) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self._headers({"Content-Type": "application/json", "Content-Length": len(body)})
        self.wfile.write(body)

    def _headers(self, headers: Mapping[str, Any]) -> None:
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()


def _described(name: str, content: bytes, hash_key: str) -> dict[str, Any]:
    """Return a file's entry in a listing of its repository."""
    described: dict[str, Any] = {"size": len(content), "blobId": blob_id(content)}
    if name.endswith(LARGE):
        described["lfs"] = {hash_key: sha256(content), "size": len(content), "pointerSize": 134}
    return described


_ROUTES = (
    (r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", _Handler._info),
    (r"/api/models/([^/]+/[^/]+)/tree/(.+)", _Handler._tree),
    (r"/cdn/([^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.+)", _Handler._content),
    (r"/([^/]+/[^/]+)/resolve/((?:refs/\w+/)?[^/]+)/(.+)", _Handler._resolve),
)
