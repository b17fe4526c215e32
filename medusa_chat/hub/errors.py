"""One line for each thing that the hub or the disk refuses, with what to do about it."""

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
from medusa_chat.text import reason_of

if TYPE_CHECKING:
    from collections.abc import Iterator


class UnavailableError(UserError):
    """The hub cannot be asked, or refuses a repository, and the cache lacks it."""


class SettingsError(Exception):
    """No request can be sent, or no answer understood, with the settings of the environment."""


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_errors(name: str) -> Iterator[None]:
    """Turn an OSError of the disk into a UserError."""
    try:
        yield
    except HfHubHTTPError:  # an OSError too
        raise
    except OSError as error:
        advice = f"{error.strerror or error}; set HF_HOME to a folder that can be written"
        if error.errno in _DISK_FULL:
            advice = (
                "the disk is full; make room, or set HF_HOME to a folder on a larger disk,"
                " and run this again"
            )
        cache = constants.HF_HUB_CACHE
        raise UserError(f"cannot download {name} into {cache}: {advice}") from None


def explain(error: Exception, name: str, revision: str | None) -> str:
    """Say in one line why a repository cannot be had, and what to do."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    hub = constants.ENDPOINT
    if isinstance(error, GatedRepoError):
        return f"{name} is gated: {_accept_licence(name)}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{hub} has no repository {name}, or it is private: check the name,"
            " or log in with `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {revision!r}: see {hub}/{name}/tree/main"
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} lacks {name} or a part of it:"
            " run once without HF_HUB_OFFLINE"
        )
    if isinstance(error, SettingsError):
        return (
            f"cannot ask {hub} for {name}: {error}; check HF_ENDPOINT, HF_TOKEN, HTTPS_PROXY and"
            " SSL_CERT_FILE, or name a local folder"
        )
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error.response.status_code, name)
    return (
        f"cannot reach {hub} for {name} ({reason_of(error)}): check the network,"
        " or name a local folder"
    )


def _explain_status(status: int, name: str) -> str:
    hub = constants.ENDPOINT
    if status in (401, 403):
        return f"{hub} refuses {name} ({status}): {_accept_licence(name)}"
    if status == 429:
        return (
            f"{hub} limits the requests for {name} (429): try later;"
            " `hf auth login` raises the limit"
        )
    return f"{hub} answered {status} for {name}: try again later"


def _accept_licence(name: str) -> str:
    return f"accept its licence at {constants.ENDPOINT}/{name} and log in with `hf auth login`"
