"""A typed line as a message: several lines in quotes, words that may be meant as a command."""

from __future__ import annotations

from medusa_chat.terminal.chat.command import LEAVING

PROMPT = "› "
QUOTES = '"""'
SHOWN_WHOLE = 12  # lines; of a longer message the first and last ones are echoed
FIRST_LINES, LAST_LINES = 6, 2


def goes_on(text: str) -> bool:
    """Tell if Enter adds a line to this text: in open quotes, or after a backslash."""
    if text.startswith(QUOTES):
        return QUOTES not in text[len(QUOTES) :]
    return text.endswith("\\") and not text.endswith("\\\\")


def unquoted(text: str) -> str:
    """Return a message without the quotes around its lines, and without the doubled slash."""
    if text.startswith(QUOTES) and text.rstrip().endswith(QUOTES) and len(text.strip()) >= 6:
        return text.strip()[len(QUOTES) : -len(QUOTES)].strip("\n")
    return text.removeprefix("/") if text.startswith("//") else text


def meant_to_leave(text: str) -> bool:
    """Recognize a lone word with which other programs are left."""
    return text.strip().lower() in LEAVING


def folded(text: str) -> list[str]:
    """Return the lines of a message to echo: of many lines the first and the last ones."""
    lines = text.split("\n")
    if len(lines) <= SHOWN_WHOLE:
        return lines
    hidden = len(lines) - FIRST_LINES - LAST_LINES
    return [*lines[:FIRST_LINES], f"… {hidden} more lines …", *lines[-LAST_LINES:]]
