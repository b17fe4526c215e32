"""Completion of commands and their arguments, from the registry of commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from medusa_chat.terminal.chat.command import ALIASES, REGISTRY, is_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from medusa_chat.terminal.chat.session import Session


class CommandCompleter(Completer):
    """Completes a line that begins with a slash; `session` gives None until the model is loaded."""

    def __init__(self, session: Callable[[], Session | None]) -> None:
        self._session = session
        self._paths = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        """Complete the name of a command, or the argument before the cursor."""
        text = document.text_before_cursor
        if not is_command(text) or "\n" in text:
            return
        name, space, argument = text[1:].partition(" ")
        if not space:
            yield from _names(name)
            return
        entry = REGISTRY.get(ALIASES.get(name, name))
        if entry is None:
            return
        *before, word = argument.split(" ")
        if entry.values:
            values = entry.values(self._session(), before)
            yield from (Completion(value, -len(word)) for value in values if value.startswith(word))
        if entry.takes_path:
            yield from self._paths.get_completions(Document(argument.lstrip()), complete_event)


def _names(start: str) -> Iterable[Completion]:
    for name, entry in REGISTRY.items():
        if name.startswith(start):
            meta = entry.help.partition(":")[0]
            yield Completion(name, -len(start), display=f"/{name}", display_meta=meta)
