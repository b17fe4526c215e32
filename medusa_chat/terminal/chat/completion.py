"""Completion of commands and their arguments, from the registry of commands."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from medusa_chat.terminal.chat.command import ALIASES, REGISTRY, is_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from medusa_chat.terminal.chat.session import Session

REFERENCE_START = re.compile(r'(?<!\S)@(?P<quote>"?)(?P<name>(?<=")[^"\n]*|(?<=@)[^\s"]*)$')


class CommandCompleter(Completer):
    """Completes commands, and files after an `@`.

    `session` gives None until the model is loaded.
    """

    def __init__(self, session: Callable[[], Session | None]) -> None:
        self._session = session
        self._paths = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        """Complete the name of a command, or the argument before the cursor."""
        text = document.text_before_cursor
        if not is_command(text):
            yield from self._files(text, complete_event)
            return
        if "\n" in text:
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

    def _files(self, text: str, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Complete the file after an `@` that ends a message; a name with spaces gets quotes."""
        found = REFERENCE_START.search(text)
        if found is None:
            return
        word = found["name"]
        for each in self._paths.get_completions(Document(word), complete_event):
            whole = word[: len(word) + each.start_position] + each.text
            if " " in whole and not found["quote"]:
                yield Completion(f'"{whole}"', -len(word), display=each.display)
            else:
                yield each


def _names(start: str) -> Iterable[Completion]:
    for name, entry in REGISTRY.items():
        if name.startswith(start):
            meta = entry.help.partition(":")[0]
            yield Completion(name, -len(start), display=f"/{name}", display_meta=meta)
