"""Checkpoints of a run: which one is whole, whether a run may go on from it, what is left of one that was cut off."""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from medusa_chat.config import UserError, out_of_memory
from medusa_chat.files import write_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SETTINGS_FILE = "training.json"
_WRITE_FAILED = (
    *(os.strerror(number).lower() for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)),
    "failed writing",
    "unexpected pos",
)


def whole_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were written to their end, oldest first: Trainer writes its state last."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _state(path) is not None]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def _state(checkpoint: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads(
            (checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8")
        )
    except (OSError, ValueError):
        return None
    return state


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_text(file, json.dumps(content, indent=1) + "\n")


def begin(out: Path, settings: dict[str, Any], resume: bool, writes: bool = True) -> Path | None:
    """Prepare `out` for a run; returns the checkpoint to go on from, if any.

    Args:
        writes: False where another process prepares it, and has.

    Raises:
        UserError: `out` holds another run, or one with other settings.
    """
    file, run = out / SETTINGS_FILE, out / "checkpoints"
    checkpoints = whole_checkpoints(run)
    if not resume:
        if checkpoints:
            raise UserError(
                f"{out} holds a run already ({checkpoints[-1].name}); --resume goes on with it, or choose another --out"
            )
        if writes:
            out.mkdir(parents=True, exist_ok=True)
            write_json(file, settings)
        return None
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"there is no run to resume in {out}: {SETTINGS_FILE} is missing or damaged"
        ) from None
    for name, value in settings.items():
        if before.get(name) != value:
            raise UserError(
                f"the run in {out} had {name} {before.get(name)!r}, not {value!r}; --resume needs the same settings"
            )
    for path in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if writes and path not in checkpoints:  # cut off while it was written
            shutil.rmtree(path)
    return checkpoints[-1] if checkpoints else None


@contextmanager
def one_line(run: Path) -> Iterator[None]:
    """Turn a full disk or memory into one line that says which checkpoint is whole.

    safetensors and torch raise errors of their own, with the system's message in their text.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        whole = whole_checkpoints(run)
        kept = (
            f"{whole[-1]} is whole, and --resume goes on from it"
            if whole
            else "there is no checkpoint yet"
        )
        if out_of_memory(error):
            remedy = "--batch-size, --length, --gradient-checkpointing and --quant nf4 need less"
            raise UserError(f"out of memory; {remedy}; {kept}") from None
        if not isinstance(error, OSError) and not any(
            sign in str(error).lower() for sign in _WRITE_FAILED
        ):
            raise
        raise UserError(f"cannot write to {run}: {_first_line(error)}; {kept}") from None


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0]
