"""Download one file into huggingface_hub's cache: resumed after a break, checked by its hash.

huggingface_hub drops a file whose download was cut off, and compares sizes only. So this module
writes a missing file to the place that the cache expects, blobs/HASH; `hf_hub_download` then only
links it into the snapshot.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    WeakFileLock,
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)

from medusa_chat.config import UserError

RETRIES = 2  # of a request that brought no byte
RETRY_WAIT = 0.5  # seconds before the first retry; doubled before the next
TIMEOUT = 10.0  # seconds for an answer of the hub
_CHUNK = 1 << 20

Report = Callable[[int], None]  # takes the bytes that were added; negative if a file starts again


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit.

    Attributes:
        size: in bytes.
        hash: SHA-256 of a large file, git's SHA-1 of a small one; its name in the cache.
    """

    repository: str
    commit: str
    name: str
    size: int
    hash: str

    @property
    def blob(self) -> Path:
        """The place of the content in the cache."""
        folder = repo_folder_name(repo_id=self.repository, repo_type="model")
        return Path(constants.HF_HUB_CACHE) / folder / "blobs" / self.hash

    @property
    def partial(self) -> Path:
        """The place of a content that is not complete."""
        return self.blob.with_name(f"{self.hash}.incomplete")

    @property
    def missing(self) -> int:
        """Bytes that are not on this machine yet."""
        if self.blob.exists():
            return 0
        present = self.partial.stat().st_size if self.partial.exists() else 0
        return max(self.size - present, 0)


def download(file: RemoteFile, revision: str | None, report: Report) -> None:
    """Put a file into the cache and link it into the snapshot of its commit.

    Raises:
        UserError: the connection broke too often, or the content differs from the hub's hash.
        HTTPError: the hub refuses the file.
        OSError: the disk does.
    """
    file.blob.parent.mkdir(parents=True, exist_ok=True)
    lock = file.blob.parents[2] / ".locks" / file.blob.parents[1].name / f"{file.hash}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        report(file.size - file.missing)
        if not file.blob.exists():
            _complete(file, report)
            _check(file)
            file.partial.replace(file.blob)
    hf_hub_download(file.repository, file.name, revision=revision, etag_timeout=TIMEOUT)


def _complete(file: RemoteFile, report: Report) -> None:
    """Bring the partial file to its full size; retry as long as a break follows new bytes."""
    failures = 0
    with file.partial.open("ab") as partial:
        while (start := partial.tell()) < file.size:
            try:
                _stream(file, partial, report)
            except HfHubHTTPError:
                raise
            except HTTPError as error:
                failures = 0 if partial.tell() > start else failures + 1
                if failures > RETRIES:
                    raise UserError(
                        f"the connection to {constants.ENDPOINT} broke at {partial.tell()} of"
                        f" {file.size} bytes of {file.repository}/{file.name} ({error});"
                        " the same command goes on from there"
                    ) from None
                time.sleep(RETRY_WAIT)
            else:
                return


def _stream(file: RemoteFile, partial: BinaryIO, report: Report) -> None:
    """Append what the hub sends from the end of the partial file on."""
    start = partial.tell()
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with http_stream_backoff(
        "GET",
        hf_hub_url(file.repository, file.name, revision=file.commit),
        headers=headers,
        timeout=TIMEOUT,
        max_retries=RETRIES,
        base_wait_time=RETRY_WAIT,
        retry_on_exceptions=(),
    ) as response:
        hf_raise_for_status(response)
        if start and response.status_code != 206:  # the server ignores ranges and sends all
            partial.truncate(0)
            report(-start)
        for piece in response.iter_bytes():
            partial.write(piece)
            report(len(piece))
    partial.flush()


def _check(file: RemoteFile) -> None:
    """Delete a partial file that differs from what the hub states, and raise UserError."""
    size = file.partial.stat().st_size
    if size == file.size and _hash(file.partial, file.hash) == file.hash:
        return
    file.partial.unlink()
    fault = "has another hash than"
    if size != file.size:
        fault = f"has {size} bytes, not the {file.size} that"
    raise UserError(
        f"{file.name} of {file.repository} {fault} the hub states, so it was deleted; run the"
        " same command again, and if that does not help, look at the network or proxy between"
    )


def _hash(path: Path, like: str) -> str:
    """Return the SHA-256 of a file, or git's SHA-1 if `like` is one."""
    with path.open("rb") as opened:
        if len(like) == 64:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
        while piece := opened.read(_CHUNK):
            digest.update(piece)
        return digest.hexdigest()
