"""Checkpoints of a run: sealed by checksums, resumed from the last whole one."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from medusa_chat.config import ACCURACY_FILE, Recipe, UserError, out_of_memory
from medusa_chat.files import digest, read_json, write_json
from medusa_chat.hub.file_names import HEAD_FILES
from medusa_chat.text import reason_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SETTINGS_FILE = "training.json"
SUMS_FILE = "checksums.json"  # of a checkpoint's files; written last
# Signs of a failed write in the errors that safetensors and torch raise.
_WRITE_FAILED = (
    *(os.strerror(number).lower() for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)),
    "failed writing",
    "unexpected pos",
)


def seal(checkpoint: Path) -> None:
    """Write the checksums of a checkpoint's files, once all are there."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file())
    names = [str(file.relative_to(checkpoint)) for file in files if file.name != SUMS_FILE]
    write_json(checkpoint / SUMS_FILE, {name: digest(checkpoint / name) for name in names})


def fault_of(checkpoint: Path) -> str:
    """Say what is wrong with a complete checkpoint; "" if its files are as they were written.

    One without checksums counts as whole: an older version wrote it, or a run that was cut off
    right before it would have written them.
    """
    if not (checkpoint / SUMS_FILE).exists():
        return ""
    try:
        sums = dict(read_json(checkpoint / SUMS_FILE))
        wrong = [name for name, digits in sums.items() if digest(checkpoint / name) != digits]
    except (OSError, ValueError, TypeError):
        return f"{SUMS_FILE} is damaged"
    if not wrong:
        return ""
    return f"{wrong[0]} is {'damaged' if (checkpoint / wrong[0]).exists() else 'missing'}"


def checkpoints_of(run: Path) -> list[Path]:
    """All checkpoints of a run, newest first, also those that are not complete."""
    found = (path for path in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir())
    numbered = {path: path.name.rsplit("-", 1)[1] for path in found}
    known = [path for path, number in numbered.items() if number.isdecimal()]
    return sorted(known, key=lambda path: -int(numbered[path]))


def is_complete(checkpoint: Path) -> bool:
    """Tell if a checkpoint was written to its end, where Trainer writes its own state."""
    if (checkpoint / SUMS_FILE).exists():
        return True
    try:
        read_json(checkpoint / TRAINER_STATE_NAME)
    except (OSError, ValueError):
        return False
    return True


def last_whole(run: Path) -> Path | None:
    """Return the newest checkpoint that is complete and undamaged, or None."""
    complete = filter(is_complete, checkpoints_of(run))
    return next((path for path in complete if not fault_of(path)), None)


def is_last(checkpoint: Path) -> bool:
    """Tell if a whole checkpoint is that of the run's last step."""
    state = read_json(checkpoint / TRAINER_STATE_NAME)
    return bool(state["global_step"] >= state["max_steps"])


def begin(
    out: Path,
    settings: dict[str, Any],
    resume: bool,
    writes: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Path | None:
    """Prepare `out` for a run; returns the checkpoint to resume from, if there is one.

    A resumed run must have the same settings. `writes` is False if another process has prepared
    the folder. `say` gets a line on damaged checkpoints.

    Raises:
        UserError: `out` holds another run or other heads, a run with other settings or data, or
            no undamaged checkpoint.
    """
    if resume:
        _check_settings(out, settings)
        return _resumed(out / "checkpoints", writes, say)
    _check_free(out)
    if writes:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / SETTINGS_FILE, settings)
    return None


def _resumed(run: Path, writes: bool, say: Callable[[str], None]) -> Path | None:
    """Find the checkpoint to go on from, and drop those that are no use."""
    damaged = []
    useless = []
    found = None
    for path in checkpoints_of(run):
        fault = fault_of(path) if is_complete(path) else ""
        if is_complete(path) and not fault:
            found = path
            break
        useless.append(path)
        if fault:
            damaged.append(f"{path.name} is damaged ({fault})")
    if damaged and found is None:
        raise UserError(
            f"the run in {run.parent} cannot go on: {'; '.join(damaged)}, and no older one is"
            " whole; delete the folder to begin again"
        )
    if damaged and found:
        say(f"{'; '.join(damaged)}: going on from {found.name}")
    for path in useless if writes else ():
        shutil.rmtree(path)
    return found


def _check_free(out: Path) -> None:
    """Raise UserError if `out` holds what a new run would overwrite."""
    if complete := [path for path in checkpoints_of(out / "checkpoints") if is_complete(path)]:
        raise UserError(
            f"{out} holds a run already ({complete[0].name}); --resume goes on with it,"
            " or choose another --out"
        )
    names = [name for name in (*HEAD_FILES, ACCURACY_FILE) if (out / name).exists()]
    if names:
        raise UserError(
            f"{out} holds a model or heads already ({names[0]}), which a run would overwrite:"
            " choose another --out"
        )


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Raise UserError unless the run in `out` had these settings."""
    try:
        before = dict(read_json(out / SETTINGS_FILE))
        digests = dict(before.get("digests") or {})
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"there is no run to resume in {out}: {SETTINGS_FILE} is missing or damaged"
        ) from None
    older = asdict(Recipe())  # what runs did before they had a setting
    for name, value in settings.items():
        had = before.get(name, older.get(name))
        if name != "digests" and had != value:
            raise UserError(
                f"the run in {out} had {name} {had!r}, not {value!r};"
                " --resume needs the same settings"
            )
    for file, digits in settings.get("digests", {}).items():
        if digests.get(file) != digits:
            raise UserError(
                f"{file} has changed since the run in {out} began; --resume needs the same data"
            )


@contextmanager
def reported_failures(run: Path) -> Iterator[None]:
    """Turn a full disk or memory into a UserError that names the last whole checkpoint."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        kept = "there is no checkpoint yet"
        if whole := last_whole(run):
            kept = f"{whole} is whole, and --resume goes on from it"
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
