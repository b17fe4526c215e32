"""Packed matrices kept in the cache folder, which are mapped the next time instead of packed."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import struct
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from platformdirs import user_cache_path

from medusa_chat.files import replacing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from torch import Tensor

MAGIC = b"medusa-chat packed 1\n"
LENGTH = struct.Struct("<Q")
SUFFIX = ".packed"
ALIGNED = 64
MOST_HEADER = 16 << 20
MOST_BYTES = 20 << 30  # of all files; the ones that were used longest ago go first


def folder() -> Path:
    """Return the folder of the files; it may not exist."""
    return user_cache_path("medusa-chat") / "packed"


def files() -> list[tuple[Path, os.stat_result]]:
    """List the files with their status, the one that was used longest ago first.

    What a killed process left half-written counts too.
    """
    found = []
    for path in folder().glob("*"):
        with suppress(OSError):  # another process may have removed it
            found.append((path, path.stat()))
    return sorted(found, key=lambda pair: pair[1].st_mtime)


class KeptMatrices:
    """The matrices of a file in order, each checked before it is used.

    A file that is missing, damaged or of another key has none.
    """

    def __init__(self, file: Path, key: Any) -> None:
        """Map `file` if it was written for `key`."""
        self._content: mmap.mmap | None = None
        self._entries: list[tuple[int, int, int]] = []  # start, bytes, checksum
        with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            self._open(file, key)

    def _open(self, file: Path, key: Any) -> None:
        with file.open("rb") as opened:
            sizes, sums, start = _header(opened, key)
            ends = _places(sizes, start)
            if ends[-1] != os.fstat(opened.fileno()).st_size:
                return
            self._content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        self._entries = list(zip(ends[:-1], sizes, sums, strict=True))[::-1]
        os.utime(file)

    def take(self, size: int) -> Tensor | None:
        """Return the next matrix if it has `size` bytes and is sound; None from a fault on."""
        if self._content is None or not self._entries:
            return None
        start, length, checksum = self._entries.pop()
        with memoryview(self._content)[start : start + length] as view:
            sound = length == size and zlib.crc32(view) == checksum
        if not sound:
            self._entries.clear()
            return None
        return torch.frombuffer(self._content, dtype=torch.uint8, count=size, offset=start)


def write(file: Path, key: Any, matrices: Sequence[Tensor]) -> None:
    """Keep packed matrices in `file`, if the disk has space for twice as much.

    A failure is no error: no cache may prevent a chat.
    """
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        total = sum(matrix.nbytes for matrix in matrices)
        if total > MOST_BYTES or shutil.disk_usage(file.parent).free < 2 * total:
            return
        with replacing(file) as temporary:
            _write(temporary, key, matrices)
        _forget_oldest()


def _write(path: Path, key: Any, matrices: Iterable[Tensor]) -> None:
    views = [matrix.numpy().data for matrix in matrices]
    sums = [zlib.crc32(view) for view in views]
    document = {"key": key, "bytes": [len(view) for view in views], "sums": sums}
    header = json.dumps(document).encode()
    header += b" " * (-(len(MAGIC) + LENGTH.size + len(header)) % ALIGNED)
    with path.open("wb") as opened:
        opened.write(MAGIC + LENGTH.pack(len(header)) + header)
        for view in views:
            opened.write(view)
            opened.write(bytes(-len(view) % ALIGNED))
        opened.flush()
        os.fsync(opened.fileno())


def _header(opened: Any, key: Any) -> tuple[list[int], list[int], int]:
    """Read sizes and checksums, and where the first matrix starts. Raises ValueError."""
    if opened.read(len(MAGIC)) != MAGIC:
        raise ValueError("another kind of file")
    (length,) = LENGTH.unpack(opened.read(LENGTH.size).ljust(LENGTH.size, b"\0"))
    if length > MOST_HEADER:
        raise ValueError("a damaged header")
    document = json.loads(opened.read(length))
    if document["key"] != key:
        raise ValueError("packed from other files, or by another version")
    return document["bytes"], document["sums"], len(MAGIC) + LENGTH.size + length


def _places(sizes: Sequence[int], start: int) -> list[int]:
    """Return where each matrix starts, and the end of the file."""
    places = [start]
    for size in sizes:
        places.append(places[-1] + size + -size % ALIGNED)
    return places


def _forget_oldest() -> None:
    found = files()
    total = sum(status.st_size for _, status in found)
    for path, status in found[:-1]:
        if total <= MOST_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= status.st_size
