"""Replies of a session: one that streams, and those that have ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from medusa_chat.terminal.chat.conversation import extend
from medusa_chat.terminal.thoughts import OPEN

if TYPE_CHECKING:
    from medusa_chat.config import Message
    from medusa_chat.events import Step


@dataclass(frozen=True)
class Answer:
    """One reply to the last message.

    Attributes:
        ids: its tokens, all that the engine decoded.
        cut: it can go on: it ended by a limit, the context, the loop guard, or an interrupt.
    """

    text: str
    ids: tuple[int, ...]
    cut: bool


@dataclass
class Growing:
    """A reply that streams, and the turns that it answers.

    Attributes:
        runs: who proposed its text.
    """

    turns: list[Message]
    text: str = ""
    runs: list[tuple[int, int]] = field(default_factory=list)

    def add(self, step: Step) -> None:
        """Append the tokens of a step."""
        for token in step.tokens:
            self.append(token.text, token.head)

    def append(self, text: str, head: int = 0) -> None:
        """Append text that a head has proposed, or the template."""
        self.text += text
        extend(self.runs, head, len(text))

    @property
    def said(self) -> bool:
        """True once the reply has text of its own."""
        return bool(self.text.removeprefix(OPEN).strip())

    @property
    def messages(self) -> list[Message]:
        """The turns with the reply, as far as it has come."""
        if not self.said:
            return self.turns
        return [*self.turns, {"role": "assistant", "content": self.text}]
