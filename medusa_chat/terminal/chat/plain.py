"""The prompt of plain mode: lines as the terminal itself edits them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medusa_chat.terminal.chat.message import goes_on
from medusa_chat.terminal.output import say

if TYPE_CHECKING:
    from collections.abc import Callable

    from medusa_chat.terminal.chat.loading import Loading

PROMPT = "> "
MORE = "... "


class PlainPrompt:
    """Reads messages line by line and draws nothing."""

    cleared = False

    def read(self, loading: Loading, when_loaded: Callable[[], None], draft: str = "") -> str:
        """Read a message or command, as `Prompt.read` does; `draft` can only be shown."""
        if draft:
            say(f"your last message, to be typed again or replaced:\n{draft}")
        text = _line(PROMPT)
        while goes_on(text):
            text = text.removesuffix("\\") + "\n" + _line(MORE)
        if loading.done:
            when_loaded()
        return text


def _line(prompt: str) -> str:
    """Read a line. Ctrl-C drops it."""
    while True:
        try:
            return input(prompt)
        except KeyboardInterrupt:
            say("")
