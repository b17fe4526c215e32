"""Files in a message: `@notes.txt` is sent as the text of that file, in a frame with its name."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medusa_chat.config import UserError
from medusa_chat.files import check_ends, expanded, read_text
from medusa_chat.text import size_text

if TYPE_CHECKING:
    from pathlib import Path

    from medusa_chat.terminal.chat.engine import ChatEngine

REFERENCE = re.compile(r'(?<!\S)@(?:"(?P<quoted>[^"\n]+)"|(?P<plain>[^\s"]+))')
SENTENCE_END = ".,;:!?)]}'"
LOOKS_LIKE_A_PATH = re.compile(r"/|\\|\.\w{1,5}$")
MOST_BYTES_PER_TOKEN = 64  # more bytes a token than this are no text that fits
BACKTICKS = re.compile(r"`{3,}")


@dataclass(frozen=True)
class Sent:
    """A message with its files.

    Attributes:
        text: as the model reads it.
        notes: a line for each file, and for each word that looks like a file but is none.
    """

    text: str
    notes: tuple[str, ...] = ()


def with_files(message: str, engine: ChatEngine) -> Sent:
    """Add the text of each file that a message names after an `@`.

    Raises:
        UserError: a file is no text, cannot be read, or is too large for the context.
    """
    notes: list[str] = []
    frames: dict[str, str] = {}  # by name

    def named(match: re.Match[str]) -> str:
        path, rest = _file_of(match)
        name = str(path)
        if path is None:
            word = match["quoted"] or match["plain"].rstrip(SENTENCE_END)
            if match["quoted"] or LOOKS_LIKE_A_PATH.search(word):
                notes.append(f"there is no file {word}: sent as text")
            return match.group()
        if name not in frames:
            content = read_file(path, engine)
            frames[name] = _framed(name, content)
            notes.append(f"{name} · {engine.count(content):,} tokens")
        return name + rest

    text = REFERENCE.sub(named, message)
    return Sent("\n\n".join([text, *frames.values()]), tuple(notes))


def reference(path: Path) -> str:
    """Write a path as a message names it."""
    quoted = f'"{path}"' if re.search(r"\s", str(path)) else str(path)
    return f"@{quoted}"


def read_file(path: Path, engine: ChatEngine) -> str:
    """Read a file of text that fits into the context. Raises UserError."""
    most = engine.context * MOST_BYTES_PER_TOKEN
    too_large = f"is too large for the context of {engine.name} ({engine.context:,} tokens)"
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a file in it")
        check_ends(path)
        size = path.stat().st_size
        if size > most:
            raise UserError(f"{path} ({size_text(size)}) {too_large}")
        content = read_text(path, most)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} is no text: {error}") from None
    if "\0" in content:
        raise UserError(f"{path} is no text: it holds zero bytes")
    count = engine.count(content)
    if count >= engine.context:
        raise UserError(f"{path} ({count:,} tokens) {too_large}")
    return content


def _file_of(match: re.Match[str]) -> tuple[Path | None, str]:
    """Return the file that a reference names, and the end of a sentence after it."""
    if match["quoted"]:
        path = expanded(match["quoted"])
        return (path if _exists(path) else None), ""
    word = match["plain"]
    for name in (word, word.rstrip(SENTENCE_END)):
        if name and _exists(expanded(name)):
            return expanded(name), word[len(name) :]
    return None, ""


def _exists(path: Path) -> bool:
    """Tell if there is such a file; a name that is too long is none."""
    try:
        return os.path.lexists(path)
    except ValueError:
        return False


def _framed(name: str, content: str) -> str:
    """Put a file's text into a fence that is longer than any in it."""
    longest = max(map(len, BACKTICKS.findall(content)), default=2)
    fence = "`" * (longest + 1)
    return f"File {name}:\n{fence}\n{content.rstrip(chr(10))}\n{fence}"
