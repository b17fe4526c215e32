"""What hub and disk refuse, in one line each that says what to do."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from typing import TYPE_CHECKING

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from medusa_chat.config import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_errors(name: str) -> Iterator[None]:
    """One line for what the disk refuses."""
    try:
        yield
    except HfHubHTTPError:
        raise
    except OSError as error:
        cache = constants.HF_HUB_CACHE
        if error.errno in _DISK_FULL:
            advice = "the disk is full; make room, or set HF_HOME to a folder on a larger disk, and run this again"
        else:
            advice = f"{error.strerror or error}; set HF_HOME to a folder that can be written"
        raise UserError(f"cannot download {name} into {cache}: {advice}") from None


def reason(error: Exception, name: str, revision: str | None) -> str:
    """What went wrong and what to do, in one line."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    hub = constants.ENDPOINT
    licence = f"accept its licence at {hub}/{name} and log in with `hf auth login`"
    if isinstance(error, GatedRepoError):
        return f"{name} is paused: {licence}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{hub} has no repository {name}, or it is private: check the name, or log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {revision!r}: see {hub}/{name}/tree/main"
    if isinstance(error, OfflineModeIsEnabled):
        cache = constants.HF_HUB_CACHE
        return f"HF_HUB_OFFLINE is set, and {cache} lacks {name} or a part of it: run once without HF_HUB_OFFLINE"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"{hub} refuses {name} ({status}): {licence}"
        if status == 429:
            return f"{hub} wants a pause (429, too many requests): try {name} later; `hf auth login` raises the limit"
        return f"{hub} answered {status} for {name}: try again later"
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    return f"cannot reach {hub} for {name} ({first}): check the network, or name a local folder"
