"""Files that are read as UTF-8 and written whole or not at all. No torch here."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_BYTES = 256 << 20  # of a file of text; a device may have no end
PIECE = 1 << 20  # bytes read at once


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Make a hidden folder in `parent`, itself made if missing; remove what the block leaves."""
    parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".new-", dir=parent, ignore_cleanup_errors=True) as made:
        yield Path(made)


@contextmanager
def replacing(file: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces `file` when the block ends.

    With `private` only the user can read it, from the first byte on (mode 0600).
    If the block raises, `file` stays as it was and the temporary file is removed.
    """
    temporary = _temporary(file)
    try:
        if private:
            temporary.unlink(missing_ok=True)  # one left by a killed program may be readable
            temporary.touch(mode=0o600, exist_ok=False)
        yield temporary
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _temporary(file: Path) -> Path:
    # Another process may write the same file.
    return file.with_suffix(f".{os.getpid()}.tmp")


def check_writable(file: Path) -> None:
    """Raise OSError if `file` could not be written, before the work that it is to hold."""
    if file.is_dir():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    folder = next(folder for folder in file.absolute().parents if folder.exists())
    if not os.access(folder, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    if folder == file.absolute().parent:
        temporary = _temporary(file)
        temporary.touch()  # tells a full disk too, and a name that is too long
        temporary.unlink()


def digest(file: Path) -> str | None:
    """Return the SHA-256 of a file; None for a pipe or device, which can be read only once."""
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def expanded(place: str) -> Path:
    """Return a path with its `~` replaced, if that names a home; the path as it is if not."""
    return Path(os.path.expanduser(place))


def resolved(path: Path) -> Path:
    """Return a path from the root on, without symbolic links. Raises OSError if they go round."""
    try:
        return path.resolve()
    except RuntimeError:  # before Python 3.13
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None


def check_ends(file: Path) -> None:
    """Raise OSError for a device or a pipe, whose end may never come; /dev/null is empty."""
    found = file.stat()
    if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode):
        return
    if not os.path.samestat(found, os.stat(os.devnull)):
        raise OSError(errno.EINVAL, "it is a device or a pipe, not a file", str(file))


def read_text(file: Path, most: int = MOST_BYTES) -> str:
    """Read a text in UTF-8, with or without a byte order mark; lines end in a newline.

    Raises:
        OSError: the file cannot be read, or has more than `most` bytes; a device or pipe, more
            than MOST_BYTES.
        ValueError: it is not UTF-8; names the line.
    """
    content = bytearray()
    if not file.is_file():
        most = min(most, MOST_BYTES)
    with file.open("rb") as opened:
        while piece := opened.read(PIECE):
            content += piece
            if len(content) > most:
                raise OSError(errno.EFBIG, "the file is too large to be read", str(file))
    return decoded(bytes(content))


def decoded(content: bytes) -> str:
    """Decode UTF-8. Raises ValueError, which names the line."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: not UTF-8 ({error.reason})") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(file: Path) -> Any:
    """Read a JSON document.

    Raises:
        OSError: the file cannot be read, or is a device or a pipe.
        ValueError: it is not UTF-8, not JSON, or nested too deeply.
    """
    check_ends(file)
    try:
        return json.loads(read_text(file))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_text(file: Path, text: str, *, private: bool = False) -> None:
    """Replace a file by `text` in one move; with `private` only the user can read it.

    Raises:
        OSError: nothing was changed, and nothing half-written is left.
    """
    with replacing(file, private=private) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(file: Path, document: Any, *, indent: int | None = 1) -> None:
    """Replace a file by a JSON document in one move. Raises OSError like `write_text`."""
    write_text(file, json.dumps(document, ensure_ascii=False, indent=indent) + "\n")
