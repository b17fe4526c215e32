"""A kept conversation that goes on: its turns and settings, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from medusa_chat.terminal.chat.conversation import Conversation, split
from medusa_chat.terminal.chat.showing import (
    SHOWN_TURNS,
    conversation_rows,
    message_rows,
    settings_line,
)
from medusa_chat.terminal.theme import LABEL
from medusa_chat.terminal.wrapping import escape_controls
from medusa_chat.text import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console, ConsoleOptions

    from medusa_chat.config import View
    from medusa_chat.terminal.chat.command import Chat
    from medusa_chat.terminal.chat.kept import Kept

SYSTEM_SHOWN = 40  # characters


def resume(chat: Chat, kept: Kept) -> str:
    """Load a kept conversation into the session; return a last message without a reply."""
    answered, unanswered = split(kept.conversation)
    chat.session.load(answered)
    chat.keeper.attach(chat.session, kept)
    return unanswered


@dataclass(frozen=True)
class Resumed:
    """The last turns of a kept conversation, and a line on the settings that came with it.

    Attributes:
        marks: mark the heads' tokens.
        model: in use now; "" if it is the conversation's own.
    """

    kept: Kept
    view: View
    marks: bool = False
    model: str = ""

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Yield the rows for a screen; rows of code are as long as they are."""
        answered, unanswered = split(self.kept.conversation)
        width = options.max_width
        yield from conversation_rows(
            answered, self.view, width, marks=self.marks, turns=SHOWN_TURNS
        )
        yield Text(self._settings(answered), LABEL)
        if unanswered:
            yield from message_rows(unanswered)
            yield Text("your last message has no reply yet: send it again", LABEL)

    def _settings(self, conversation: Conversation) -> str:
        name = f" ({escape_controls(self.kept.name)})" if self.kept.name else ""
        settings = settings_line(conversation)
        if conversation.system:
            settings += f", system prompt: {one_line(conversation.system, SYSTEM_SHOWN)}"
        count = len(conversation.messages)
        line = f"chat {self.kept.number}{name}, {count} messages, with its settings: {settings}"
        if self.model in ("", conversation.model):
            return line
        held = escape_controls(conversation.model)
        return f"{line}; it was held with {held}, you now chat with {self.model}"
