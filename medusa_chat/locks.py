"""Locks on places that one program may write at a time. No torch here."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from medusa_chat.config import UserError
from medusa_chat.files import resolved

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def only_writer(place: Path, owner: str) -> Iterator[None]:
    """Keep other programs of medusa-chat from writing a file or folder during the block.

    The lock is a hidden file next to `place`, and ends with the program, however that ends. Where
    no such file can be made, there is no lock, and writing says what is wrong.

    Args:
        place: the file or folder, which may not exist yet.
        owner: who may be writing it already, for the message.

    Raises:
        UserError: another program writes it, or it is a loop of symbolic links.
    """
    try:
        whole = resolved(place)
    except OSError as error:
        raise UserError(f"cannot write {place}: {error.strerror}") from None
    file = whole.parent / f".{whole.name}.lock"
    lock = FileLock(file, timeout=0)
    try:
        if file.parent.is_dir():  # the lock would make one
            lock.acquire()
    except OSError as error:
        if isinstance(error, Timeout) and file.exists():
            raise UserError(
                f"{owner} is writing to {place}; wait until it ends, or choose another place"
            ) from None
        # Without a file, as in /proc, what writes there will say what is wrong.
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):
                file.unlink()
            lock.release()
