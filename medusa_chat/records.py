"""The one reader of files of text: told by their content as JSON lines, a JSON list or plain text.

No torch here.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from medusa_chat.config import Message, UserError
from medusa_chat.files import MOST_BYTES, read_text
from medusa_chat.text import encodable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Item = tuple[str, Any]  # its place, for error messages, and its value

JSON_LINES = (".jsonl", ".ndjson")
LIST = re.compile(r'\s*\[\s*[{"\]]')
OBJECT = re.compile(r'\s*\{\s*["}]')
HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
# ShareGPT itself has "gpt" and "human"; collections made from it have the others.
ROLES = {
    "human": "user",
    "user": "user",
    "system": "system",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}


def read_records(file: Path, most: int = MOST_BYTES) -> Iterator[Item] | str:
    """Read a file of at most `most` bytes.

    Returns:
        The items of JSON lines or of a JSON list; the text itself if it is plain.

    Raises:
        OSError: the file cannot be read.
        UserError: it is not UTF-8, or, while the items are taken, one is not JSON. The message
            names the line.
    """
    try:
        text = read_text(file, most)
    except ValueError as error:
        raise UserError(f"cannot read {file}, {error}") from None
    suffix = file.suffix.lower()
    if LIST.match(text):
        return _list(file, text)
    if OBJECT.match(text) or suffix in JSON_LINES:
        return _lines(file, text)
    return _list(file, text) if suffix == ".json" else text


def parse(text: str, place: str) -> Any:
    """Parse JSON. Raises UserError that names the place, and the line if there are several."""
    try:
        value = json.loads(text)
        return _encodable(value) if HALF_PAIR.search(text) else value
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text else ""
        raise UserError(f"{place}{line}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError):  # a number of many digits; a list in a list in a list
        raise UserError(f"{place}: not JSON that can be read (nested or long numbers)") from None


def messages_of(turns: Any, place: str) -> list[Message]:
    """Read the turns of a conversation, OpenAI's or ShareGPT's. Raises UserError for others."""
    if not isinstance(turns, list):
        raise UserError(f"{place}: no 'messages', no ShareGPT 'conversations' and no 'text'")
    return [_message(turn, place) for turn in turns]


def _message(turn: Any, place: str) -> Message:
    fields = turn if isinstance(turn, dict) else {}
    role = ROLES.get(str(fields.get("role", fields.get("from"))))
    content = fields.get("content", fields.get("value"))
    if role is None or not isinstance(content, str):
        raise UserError(f"{place}: a turn needs a known role and text content")
    return {"role": role, "content": content}


def _list(file: Path, text: str) -> Iterator[Item]:
    value = parse(text, str(file))
    if not isinstance(value, list):
        raise UserError(f"cannot read {file}: it holds no list and no lines of JSON objects")
    for number, item in enumerate(value, 1):
        yield f"{file}, item {number}", item


def _lines(file: Path, text: str) -> Iterator[Item]:
    """Items of JSON lines, or the only one of a file that holds an object over several lines."""
    # No other character than these ends a line: U+2028 may stand inside a string.
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(lines) > 1 and lines[0][1].strip() == "{":
        yield str(file), parse(text, str(file))
        return
    for number, line in lines:
        place = f"{file}, line {number}"
        yield place, parse(line, place)


def _encodable(value: Any) -> Any:
    """Replace halves of surrogate pairs in all strings of a JSON value."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    if isinstance(value, dict):
        return {encodable(key): _encodable(item) for key, item in value.items()}
    return value
