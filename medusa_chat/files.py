"""Files that are written whole or not at all. No torch here."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def write_text(file: Path, text: str) -> None:
    """Replace a file by `text` in one move.

    Raises:
        OSError: nothing was changed, and nothing half-written is left.
    """
    temporary = file.with_suffix(f".{os.getpid()}.tmp")  # another process may write the same file
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(file: Path, document: Any, *, indent: int | None = 1) -> None:
    """Replace a file by a JSON document in one move. Raises OSError like `write_text`."""
    write_text(file, json.dumps(document, ensure_ascii=False, indent=indent) + "\n")
