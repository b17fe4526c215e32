"""Checkpoints of a run: begin anew, resume from the last whole one, and report failures."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from medusa_chat.config import UserError, out_of_memory
from medusa_chat.files import read_json, write_json
from medusa_chat.text import reason_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SETTINGS_FILE = "training.json"
# Signs of a failed write in the errors that safetensors and torch raise.
_WRITE_FAILED = (
    *(os.strerror(number).lower() for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)),
    "failed writing",
    "unexpected pos",
)


def whole_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. Trainer writes the state of a checkpoint last."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _is_whole(path)]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def _is_whole(checkpoint: Path) -> bool:
    try:
        read_json(checkpoint / TRAINER_STATE_NAME)
    except (OSError, ValueError):
        return False
    return True


def begin(out: Path, settings: dict[str, Any], resume: bool, writes: bool = True) -> Path | None:
    """Prepare `out` for a run; returns the checkpoint to resume from, if there is one.

    A resumed run must have the same settings. `writes` is False if another process has prepared
    the folder.

    Raises:
        UserError: `out` holds another run, or one with other settings.
    """
    run = out / "checkpoints"
    checkpoints = whole_checkpoints(run)
    if resume:
        _check_settings(out, settings)
        for path in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if writes and path not in checkpoints:
                shutil.rmtree(path)
        return checkpoints[-1] if checkpoints else None
    if checkpoints:
        raise UserError(
            f"{out} holds a run already ({checkpoints[-1].name}); --resume goes on with it,"
            " or choose another --out"
        )
    if writes:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / SETTINGS_FILE, settings)
    return None


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Raise UserError unless the run in `out` had these settings."""
    try:
        before = read_json(out / SETTINGS_FILE)
    except (OSError, ValueError):
        raise UserError(
            f"there is no run to resume in {out}: {SETTINGS_FILE} is missing or damaged"
        ) from None
    for name, value in settings.items():
        if before.get(name) != value:
            raise UserError(
                f"the run in {out} had {name} {before.get(name)!r}, not {value!r};"
                " --resume needs the same settings"
            )


@contextmanager
def reported_failures(run: Path) -> Iterator[None]:
    """Turn a full disk or memory into a UserError that names the last whole checkpoint."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        whole = whole_checkpoints(run)
        kept = "there is no checkpoint yet"
        if whole:
            kept = f"{whole[-1]} is whole, and --resume goes on from it"
        if out_of_memory(error):
            remedy = "--batch-size, --length, --gradient-checkpointing and --quant nf4 need less"
            raise UserError(f"out of memory; {remedy}; {kept}") from None
        if not _is_failed_write(error):
            raise
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise UserError(f"cannot write to {run}: {reason}; {kept}") from None


def _is_failed_write(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, OSError) or any(sign in text for sign in _WRITE_FAILED)
