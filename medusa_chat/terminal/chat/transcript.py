"""The transcript: a file that holds the conversation after every change (`--transcript`)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from medusa_chat.config import UserError
from medusa_chat.locks import only_writer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from medusa_chat.config import Message
    from medusa_chat.terminal.chat.session import Session

OWNER = "another chat"


class Transcript:
    """Context manager that keeps a conversation in a file, which no other chat writes meanwhile.

    Attributes:
        path: the file; another one follows if the user keeps an earlier conversation.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._locks = ExitStack()
        self._number = 0  # of the conversation in the file
        self._written: list[Message] = []
        self._fault = ""

    def __enter__(self) -> Transcript:
        """Lock the file. Raises UserError if another chat has it."""
        self._locks.enter_context(only_writer(self.path, OWNER))
        return self

    def __exit__(self, *_: object) -> None:
        self._locks.close()

    def follow(self, session: Session) -> None:
        """Take the session's conversation for the one in the file."""
        self._number = session.number
        self._written = list(session.messages)

    def keep(self, session: Session, replace: Callable[[str], bool]) -> str:
        """Write the conversation if it has changed; try again what failed before.

        Args:
            session: its conversation.
            replace: asks the user if another conversation in the file may be replaced.

        Returns:
            A line for the user, or "".
        """
        same = session.number == self._number
        if session.messages == self._written if same else not session.messages:
            return ""
        line = ""
        if not same and self._written:
            line = self._make_way(replace)
        try:
            session.save(self.path)
        except UserError as error:
            return self._failed(str(error))
        self.follow(session)
        if self._fault:
            self._fault = ""
            line = line or f"the transcript is written again: {self.path}"
        return line

    def _make_way(self, replace: Callable[[str], bool]) -> str:
        """Let the earlier conversation be replaced, or go on in another file."""
        question = f"{self.path} holds the conversation before this one; replace it? (y/n) "
        self._written = []  # asked once
        if replace(question):
            return ""
        earlier = self.path
        number = 2
        while (path := earlier.with_stem(f"{earlier.stem}-{number}")).exists():
            number += 1
        self._locks.enter_context(only_writer(path, OWNER))
        self.path = path
        return f"{earlier} is kept as it is; this conversation goes to {path}"

    def _failed(self, fault: str) -> str:
        """Say once what keeps the transcript from being written."""
        if fault == self._fault:
            return ""
        self._fault = fault
        return f"{fault}; the transcript is tried again after the next reply"
