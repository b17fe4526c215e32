"""Read prompt files: MT-Bench questions, conversations or plain text. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any

from medusa_chat.config import Message, UserError
from medusa_chat.records import OBJECT, messages_of, parse, read_records

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


@dataclass(frozen=True)
class Prompt:
    """The user's turns of one conversation.

    Attributes:
        category: of the question, else the name of its source or file.
        turns: the user's messages.
        reference: all messages of the conversation, if the file has answers too.
    """

    category: str
    turns: tuple[str, ...]
    reference: tuple[Message, ...] = ()

    @property
    def system(self) -> list[Message]:
        """The system message that begins the conversation, if there is one."""
        return [message for message in self.reference[:1] if message["role"] == "system"]

    def opening(self) -> list[Message]:
        """The system message and the first user turn as a conversation."""
        return [*self.system, {"role": "user", "content": self.turns[0]}]


def read_prompts(paths: Iterable[Path], limit: int | None = None) -> list[Prompt]:
    """Read prompts from files, taking one of each file in turn, `limit` at most.

    Args:
        paths: files, and folders whose *.jsonl files are read.
        limit: prompts at most.

    Raises:
        UserError: a file or one of its lines cannot be read, or there are no prompts.
    """
    by_file = [_read_file(file) for path in paths for file in _files(path)]
    mixed = [prompt for row in zip_longest(*by_file) for prompt in row if prompt is not None]
    if not mixed:
        raise UserError(f"there are no prompts in {', '.join(map(str, paths))}")
    return list(islice(mixed, limit))


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.jsonl")) if path.is_dir() else [path]


def _read_file(file: Path) -> list[Prompt]:
    try:
        found = read_records(file)
    except OSError as error:
        raise UserError(f"cannot read the prompts {file}: {error.strerror or error}") from None
    if not isinstance(found, str):
        return [_prompt(item, place, file.stem) for place, item in found]
    lines = enumerate(found.split("\n"), 1)
    return [_line(line, f"{file}, line {n}", file.stem) for n, line in lines if line.strip()]


def _line(line: str, place: str, stem: str) -> Prompt:
    """Read a line of a plain text, where one of JSON may stand too."""
    return _prompt(parse(line, place) if OBJECT.match(line) else line, place, stem)


def _prompt(item: Any, place: str, stem: str) -> Prompt:
    if isinstance(item, str) and item.strip():
        return Prompt(stem, (item.strip(),))
    if not isinstance(item, dict) or not {"turns", "messages", "conversations"} & set(item):
        raise UserError(f"{place}: not a prompt with 'turns' or 'messages'")
    category = str(item.get("category", item.get("source", stem)))
    if "turns" in item:
        turns = item["turns"]
        turns = (turns,) if isinstance(turns, str) else turns
        reference: tuple[Message, ...] = ()
    else:
        reference = tuple(messages_of(item.get("messages", item.get("conversations")), place))
        turns = [turn["content"] for turn in reference if turn["role"] == "user"]
    if not isinstance(turns, list | tuple) or not turns or not all(map(_is_text, turns)):
        raise UserError(f"{place}: not a prompt: its user turns are not texts, or there are none")
    return Prompt(category, tuple(turns), reference)


def _is_text(turn: Any) -> bool:
    return isinstance(turn, str) and bool(turn.strip())
