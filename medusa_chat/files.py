"""Files that are written whole or not at all. No torch here."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def replacing(file: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces `file` when the block ends.

    With `private` only the user can read it, from the first byte on (mode 0600).
    If the block raises, `file` stays as it was and the temporary file is removed.
    """
    # Another process may write the same file.
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        if private:
            temporary.unlink(missing_ok=True)  # one left by a killed program may be readable
            temporary.touch(mode=0o600, exist_ok=False)
        yield temporary
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
