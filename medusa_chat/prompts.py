"""Prompts for benchmarks, verification, calibration and distillation: MT-Bench, messages or plain text. No torch."""

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
        reference: the conversation's own messages where the file has them, with the answers of others.
    """

    category: str
    turns: tuple[str, ...]
    reference: tuple[Message, ...] = ()

    def opening(self) -> list[Message]:
        """The first user turn as a conversation."""
        return [{"role": "user", "content": self.turns[0]}]


def read_prompts(paths: Iterable[Path], limit: int | None = None) -> list[Prompt]:
    """Prompts of files and of the *.jsonl files of folders, taken in turn from each file, `limit` at most.

    Raises UserError with the file and line of what cannot be read.
    """
    files = [
        file
        for path in paths
        for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])
    ]
    by_file = [_read_file(file) for file in files]
    mixed = [prompt for row in zip_longest(*by_file) for prompt in row if prompt is not None]
    if not mixed:
        raise UserError(f"there are no prompts in {', '.join(map(str, paths))}")
    return list(islice(mixed, limit))


def _read_file(file: Path) -> list[Prompt]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts {file}: {error}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    return [_prompt(line, file, number) for number, line in numbered]


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
    if "turns" in item:
        turns = tuple(item["turns"])
        reference: tuple[Message, ...] = ()
    else:
        reference = tuple(
            Message(role=turn["role"], content=turn["content"]) for turn in item["messages"]
        )
        turns = tuple(turn["content"] for turn in reference if turn["role"] == "user")
    if not turns or not all(isinstance(turn, str) for turn in turns):
        raise ValueError("no user turn of text")
    return Prompt(str(item.get("category", item.get("source", stem))), turns, reference)
