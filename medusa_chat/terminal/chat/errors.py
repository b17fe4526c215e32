"""The chat's exceptions, and any error as the one line that a user sees."""

from __future__ import annotations

from medusa_chat.config import UserError, out_of_memory
from medusa_chat.text import reason_of


class UsageError(Exception):
    """A command's argument does not fit its usage."""


class LoadError(Exception):
    """The model could not be loaded; `reason` is the error that the loader raised."""

    def __init__(self, reason: BaseException) -> None:
        super().__init__(str(reason))
        self.reason = reason


def error_line(error: BaseException) -> str:
    """Say in one line what went wrong."""
    kind = type(error).__name__
    line = reason_of(error)
    if isinstance(error, UserError):
        return line
    if out_of_memory(error):
        kind = "out of memory"
    return f"{kind}: {line}" if str(error).strip() else kind
