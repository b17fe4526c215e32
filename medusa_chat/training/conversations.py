"""Conversations that distill writes, and resuming in a file that holds some of them. No torch."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medusa_chat.config import UserError
from medusa_chat.text import encodable

if TYPE_CHECKING:
    from pathlib import Path

    from medusa_chat.prompts import Prompt
    from medusa_chat.training.questions import Answer

# Every line begins like this. Other text at the end of a file is not cut off.
_BEGINNING = b'{"source": "self", "index": '
_REMEDY = "choose another --out or delete it"


@dataclass
class Conversation:
    """A conversation while it is being answered.

    Attributes:
        index: number of its prompt.
        turns: its user turns.
        messages: system message, user turns and answers so far.
        ended: no more turns can be answered.
        invented: the model itself writes the user turns, one by one.
    """

    index: int
    category: str
    turns: tuple[str, ...]
    messages: list[dict[str, Any]]
    ended: bool = False
    invented: bool = False

    @classmethod
    def empty(cls, index: int, system: str) -> Conversation:
        """Make a conversation whose user turns will be invented."""
        messages = [{"role": "system", "content": encodable(system)}] if system else []
        return cls(index, "self", (), messages, invented=True)

    @classmethod
    def begin(cls, index: int, prompt: Prompt, system: str) -> Conversation:
        """Make a conversation with its own system message, or else `system`."""
        first = prompt.reference[:1]
        if first and first[0]["role"] == "system":
            system = first[0]["content"]
        messages = [{"role": "system", "content": encodable(system)}] if system else []
        turns = tuple(encodable(text) for text in prompt.turns)
        return cls(index, prompt.category, turns, messages)

    def asks(self, turns: int) -> list[dict[str, Any]]:
        """The system message and the first `turns` user turns."""
        users = [{"role": "user", "content": text} for text in self.turns[:turns]]
        return [message for message in self.messages if message["role"] == "system"] + users

    def add(self, answer: Answer | None) -> None:
        """Add the answer to the last message. Without one the conversation ends before it."""
        self.ended = answer is None or answer.cut
        text = ""
        if answer is not None:
            # A cut may leave a part of a character.
            text = encodable(answer.text.rstrip("\ufffd") if answer.cut else answer.text)
        if not text.strip():
            self.messages.pop()
            self.ended = True
            return
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self.ended:
            message["cut"] = True
        self.messages.append(message)

    def line(self, settings: dict[str, Any]) -> bytes:
        """The conversation as a line of the output; empty without an answer."""
        if not any(message["role"] == "assistant" for message in self.messages):
            return b""
        item = {
            "source": "self",
            "index": self.index,
            "category": self.category,
            "settings": settings,
            "messages": self.messages,
        }
        return json.dumps(item).encode() + b"\n"


def resume(
    out: Path, conversations: list[Conversation], batch: int, settings: dict[str, Any]
) -> tuple[int, int]:
    """Cut off what follows the last whole batch in `out`.

    A conversation without an answer has no line. So a batch is whole if its last conversation is
    there, or one of a later batch. A file that another run or program wrote is left as it is.

    Returns:
        The number of prompts that are done, and of their lines.
    """
    if not out.exists():
        return 0, 0
    if not out.is_file():
        raise UserError(f"{out} is not a file that can be gone on with; choose another --out")
    indices: list[int] = []
    ends = [0]
    with out.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{out}, line {number}"
            if line.endswith(b"\n"):
                indices.append(_check(line, place, conversations, indices[-1:], settings))
                ends.append(ends[-1] + len(line))
            elif not (line.startswith(_BEGINNING) or _BEGINNING.startswith(line)):
                raise UserError(f"{place} was not written by distill; {_REMEDY}")
    done = _done(indices[-1], batch, len(conversations)) if indices else 0
    kept = sum(index < done for index in indices)
    for each in conversations[done:]:
        each.turns = () if each.invented else each.turns
    os.truncate(out, ends[kept])
    return done, kept


def _done(last: int, batch: int, total: int) -> int:
    """Prompts in whole batches, where `last` is the last one with a line."""
    start = last // batch * batch
    stop = min(start + batch, total)
    return stop if last == stop - 1 else start


def _check(
    line: bytes,
    place: str,
    conversations: list[Conversation],
    before: list[int],
    settings: dict[str, Any],
) -> int:
    """The index of an earlier run's line. Raises UserError if this run differs from that one."""
    try:
        item = json.loads(line)
        index = int(item["index"])
        made = dict(item["settings"])
        asks = [message for message in item["messages"] if message["role"] != "assistant"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{place} was not written by distill; {_REMEDY}") from None
    for name in settings | made:
        if made.get(name) != settings.get(name):
            there = made.get(name, "none")
            here = settings.get(name, "none")
            raise UserError(
                f"{place} was made with {name} {there}, but this run has {here}; {_REMEDY}"
            )
    if 0 <= index < len(conversations) and conversations[index].invented:
        conversations[index].turns = tuple(
            message["content"] for message in asks if message["role"] == "user"
        )
    fault = ""
    if not 0 <= index < len(conversations):
        fault = f"prompt {index + 1}, but this run has {len(conversations)}"
    elif [index] <= before:
        fault = f"prompt {index + 1} again or out of turn"
    elif asks != conversations[index].asks(sum(message["role"] == "user" for message in asks)):
        fault = "another prompt than the one that this run has there"
    if fault:
        raise UserError(f"{place} answers {fault}; {_REMEDY}")
    return index
