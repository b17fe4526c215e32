"""Files that are written whole or not at all. No torch here."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Write `text` beside `file` and then put it in its place; raises OSError and leaves nothing half-written."""
    temporary = file.with_suffix(f".{os.getpid()}.tmp")  # of our own: another chat may write at the same time
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    except OSError:
        if temporary.is_file():
            temporary.unlink()
        raise
