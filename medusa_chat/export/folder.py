"""The folder of an export, which is replaced as a whole or left as it was."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from medusa_chat.config import UserError
from medusa_chat.files import resolved
from medusa_chat.model.layouts.config import read_config

if TYPE_CHECKING:
    from collections.abc import Iterator

# A later export may replace a folder that holds this file with a layout.
RECORD_FILE = "medusa_chat_export.json"


def check_folder(folder: Path, sources: set[Path], overwrite: bool) -> None:
    """Refuse a folder that an export must not replace.

    Args:
        folder: the folder to write.
        sources: folders that the export reads.
        overwrite: also replace a folder that is no earlier export.

    Raises:
        UserError: the folder is a file, holds a source or the user's own files.
    """
    out = resolved(folder)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {folder} is a file; it has to be a folder")
    kept = {*sources, Path.cwd(), Path.home()}
    if any(place.resolve().is_relative_to(out) for place in kept):
        raise UserError(
            f"--out {folder} holds the model, or the folder that you are in; choose another one"
        )
    if overwrite or not out.is_dir() or not any(out.iterdir()):
        return
    if "layout" not in read_config(out / RECORD_FILE):
        raise UserError(f"--out {folder} holds other files; --overwrite replaces the folder")


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder` at the end, or is removed after an error."""
    out = resolved(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        new = work / "new"
        new.mkdir()  # with the usual permissions, unlike `work`
        yield new
        _replace(out, new, work / "old")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace(out: Path, new: Path, old: Path) -> None:
    try:
        if out.exists():
            os.rename(out, old)
        os.rename(new, out)
    except BaseException:
        if old.exists() and not out.exists():
            os.rename(old, out)
        raise
