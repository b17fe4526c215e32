"""One file of the hub into huggingface_hub's cache: resumed after any break, checked against the hub's own hash.

huggingface_hub drops a file whose download was cut off and compares sizes only. So a missing file is put where its
cache looks for it, as blobs/HASH, and `hf_hub_download` then does the rest: it links the file into the snapshot.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (
    WeakFileLock,
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)

from medusa_chat.config import UserError

RETRIES = 2  # of what failed without bringing a byte
PAUSE = 0.5  # seconds before the first; doubled before the next
PATIENCE = 10.0  # seconds for an answer of the hub
_PIECE = 1 << 20

Report = Callable[
    [int], None
]  # takes how many more bytes there are; fewer than none where a file begins again


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit.

    Attributes:
        size: in bytes.
        hash: SHA-256 of a large file, git's SHA-1 of a small one; names it in the cache.
    """

    repository: str
    commit: str
    name: str
    size: int
    hash: str

    @property
    def blob(self) -> Path:
        """Where the cache keeps the content."""
        folder = repo_folder_name(repo_id=self.repository, repo_type="model")
        return Path(constants.HF_HUB_CACHE) / folder / "blobs" / self.hash

    @property
    def partial(self) -> Path:
        return self.blob.with_name(f"{self.hash}.incomplete")

    @property
    def missing(self) -> int:
        """Bytes that are still to come."""
        if self.blob.exists():
            return 0
        return max(self.size - (self.partial.stat().st_size if self.partial.exists() else 0), 0)


def bring(file: RemoteFile, revision: str | None, report: Report) -> None:
    """Put a file into the cache and link it into the snapshot of its commit.

    Raises:
        UserError: the connection broke too often, or the content is not what the hub says it is.
        HTTPError, OSError: from huggingface_hub, and from the disk.
    """
    file.blob.parent.mkdir(parents=True, exist_ok=True)
    lock = file.blob.parents[2] / ".locks" / file.blob.parents[1].name / f"{file.hash}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        report(file.size - file.missing)
        if not file.blob.exists():
            _download(file, report)
            _check(file)
            file.partial.replace(file.blob)
    hf_hub_download(file.repository, file.name, revision=revision, etag_timeout=PATIENCE)


def _download(file: RemoteFile, report: Report) -> None:
    """Bring the partial file to its full size; each break that brought something is followed by another try."""
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
                        f"the connection to {constants.ENDPOINT} broke at {partial.tell()} of {file.size} bytes of"
                        f" {file.repository}/{file.name} ({error}); the same command goes on from there"
                    ) from None
                time.sleep(PAUSE)
            else:
                return


def _stream(file: RemoteFile, partial: BinaryIO, report: Report) -> None:
    url = hf_hub_url(file.repository, file.name, revision=file.commit)
    start = partial.tell()
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"} | (
        {"Range": f"bytes={start}-"} if start else {}
    )
    with http_stream_backoff(
        "GET",
        url,
        headers=headers,
        timeout=PATIENCE,
        max_retries=RETRIES,
        base_wait_time=PAUSE,
        retry_on_exceptions=(),
    ) as response:
        hf_raise_for_status(response)
        if (
            start and response.status_code != 206
        ):  # the server knows no ranges: everything comes again
            partial.truncate(0)
            report(-start)
        for piece in response.iter_bytes():
            partial.write(piece)
            report(len(piece))
    partial.flush()


def _check(file: RemoteFile) -> None:
    """Delete a partial file that is not what the hub says it is, and say so."""
    size = file.partial.stat().st_size
    if size == file.size and _hash(file.partial, file.hash) == file.hash:
        return
    file.partial.unlink()
    fault = f"has {size} bytes, not the {file.size}" if size != file.size else "has not the hash"
    raise UserError(
        f"{file.name} of {file.repository} {fault} that the hub states, so it was deleted; run the same command again,"
        " and if that does not help, look at the network or proxy between"
    )


def _hash(path: Path, like: str) -> str:
    """SHA-256 or git's SHA-1 of a file, whichever `like` is."""
    with path.open("rb") as opened:
        if len(like) == 64:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
        while piece := opened.read(_PIECE):
            digest.update(piece)
        return digest.hexdigest()
