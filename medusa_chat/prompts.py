"""Read prompt files: MT-Bench questions, conversations or plain text. No torch here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any

from medusa_chat.config import Message, UserError

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

    def opening(self) -> list[Message]:
        """The first user turn as a conversation."""
        return [{"role": "user", "content": self.turns[0]}]


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
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts {file}: {error}") from None
    return [_prompt(line, file, number) for number, line in enumerate(lines, 1) if line.strip()]


def _prompt(line: str, file: Path, number: int) -> Prompt:
    if not line.lstrip().startswith("{"):
        return Prompt(file.stem, (line.strip(),))
    try:
        return _from_json(json.loads(line), file.stem)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{file}, line {number}: not a prompt with 'turns' or 'messages' ({error!r})"
        ) from None


def _from_json(item: dict[str, Any], stem: str) -> Prompt:
    reference: tuple[Message, ...] = ()
    if "turns" in item:
        turns = tuple(item["turns"])
    else:
        reference = tuple(
            Message(role=turn["role"], content=turn["content"]) for turn in item["messages"]
        )
        turns = tuple(turn["content"] for turn in reference if turn["role"] == "user")
    if not turns or not all(isinstance(turn, str) for turn in turns):
        raise ValueError("no user turn of text")
    return Prompt(str(item.get("category", item.get("source", stem))), turns, reference)
