"""The prompt of a command that answers once: from its arguments, from a pipe, or from both."""

from __future__ import annotations

import os
import stat
import sys
from typing import TYPE_CHECKING

from medusa_chat.config import Message, UserError
from medusa_chat.files import decoded
from medusa_chat.text import encodable

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_PIPED = 16 << 20  # bytes of standard input: far more than any context holds


def read_prompt(words: Sequence[str], flag: str | None) -> str | None:
    """Return the prompt's text, with piped text after a blank line; None in a terminal.

    Args:
        words: the prompt as arguments, maybe none.
        flag: the prompt as the value of --prompt, or None.

    Raises:
        UserError: the prompt is given twice, is empty, is not UTF-8, or is too long.
    """
    if words and flag is not None:
        raise UserError("the prompt is given twice: as --prompt and as an argument")
    argument = " ".join(words) if words else flag
    piped = _piped() if argument is None or _is_piped() else None
    if argument is None and piped is None:
        return None
    check_text("the prompt", argument or "")
    text = "\n\n".join(part for part in (argument, piped) if part)
    if not text.strip():
        raise UserError("the prompt is empty")
    return text


def messages_of(prompt: str, system: str | None, default: str) -> list[Message]:
    """Return the conversation; an empty `system` replaces the model's default one."""
    messages: list[Message] = [{"role": "user", "content": prompt}]
    wanted = default if system is None else system
    if wanted or default:
        messages.insert(0, {"role": "system", "content": wanted})
    return messages


def check_text(name: str, text: str) -> None:
    """Raise UserError for an argument that is not UTF-8, which Python keeps as surrogates."""
    if encodable(text) != text:
        raise UserError(f"{name} is not UTF-8 text")


def _piped() -> str | None:
    """Return the text of standard input; None if that is a terminal."""
    if sys.stdin.isatty():
        return None
    binary = getattr(sys.stdin, "buffer", None)
    content = binary.read(MOST_PIPED + 1) if binary else sys.stdin.read(MOST_PIPED + 1).encode()
    if len(content) > MOST_PIPED:
        raise UserError(f"standard input holds more than the {MOST_PIPED:,} bytes of a prompt")
    try:
        return decoded(content).strip()
    except ValueError as error:
        raise UserError(f"standard input, {error}") from None


def _is_piped() -> bool:
    """Tell if standard input is a pipe or a file, which end; other input may never come."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
