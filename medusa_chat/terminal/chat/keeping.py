"""Keeping the conversation while it goes on: each message, and a growing reply once a second."""

from __future__ import annotations

import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from medusa_chat.config import UserError
from medusa_chat.terminal.chat.archive import (
    Archive,
    BusyError,
    ChangedElsewhereError,
    ForgottenElsewhereError,
)
from medusa_chat.terminal.chat.conversation import Conversation, split
from medusa_chat.terminal.chat.kept import Kept, Place

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from medusa_chat.events import Step
    from medusa_chat.terminal.chat.growing import Growing
    from medusa_chat.terminal.chat.session import Session

EVERY = 1.0  # seconds between two writes of a growing reply
NONE = -1  # no number of a conversation
NOT_KEPT = "this conversation is not kept; /private off keeps it"
ELSEWHERE = "another chat goes on with this conversation too: yours is kept"
FORGOTTEN = "this conversation was forgotten in another chat: it is no longer kept here either"


class Keeper:
    """Writes a session's conversation to the archive. A failure is a notice, once.

    Attributes:
        private: nothing is kept.
        place: the model in use, as `--model` and `--heads` name it.
        kept: what the archive holds of the present conversation, if it is kept.
    """

    def __init__(
        self,
        archive: Archive | None = None,
        place: Place | None = None,
        *,
        private: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.private = private
        self.place = place or Place()
        self.kept: Kept | None = None
        self._archive = archive
        self._clock = clock
        self._name = ""  # of a conversation that is not written yet
        self._number = NONE  # of the session's conversation
        self._unkept = NONE  # the number of one that was forgotten
        self._failed = False

    @property
    def archive(self) -> Archive:
        """The kept conversations. Raises UserError if this chat has none."""
        if self._archive is None:
            raise UserError("this chat keeps no conversations")
        return self._archive

    def watch(
        self, session: Session, steps: Generator[Step, None, None]
    ) -> Generator[Step, None, None]:
        """Write the message now, and the reply as it grows; return its steps."""
        self._grow(session, session.growing)
        return self._watched(session, session.growing, steps)

    def _watched(
        self, session: Session, growing: Growing, steps: Generator[Step, None, None]
    ) -> Generator[Step, None, None]:
        with closing(steps):
            due = self._clock() + EVERY
            for step in steps:
                if self._clock() >= due:
                    self._grow(session, growing)
                    due = self._clock() + EVERY
                yield step

    def write(self, session: Session) -> None:
        """Write what has changed since the last write, and bring it to the disk."""
        if self._keep(session) and self._archive:
            with suppress(UserError):
                self._archive.settle()

    def names(self) -> list[str]:
        """Return the names of the kept conversations, to be completed."""
        with suppress(UserError):
            return [each.name for each in self.archive.summaries() if each.name]
        return []

    def rename(self, session: Session, name: str) -> None:
        """Name the present conversation. Raises UserError for a name that is taken."""
        self._follow(session)
        self._check(session)
        taken = [each for each in self.archive.summaries() if each.name == name]
        if taken and (self.kept is None or taken[0].number != self.kept.number):
            raise UserError(f"chat {taken[0].number} has this name; choose another one")
        self._name = name
        if self.kept is None:
            return
        try:
            self.kept = self.archive.rename(self.kept, name)
        except ChangedElsewhereError:
            raise UserError("another chat goes on with this conversation; /fork first") from None
        except ForgottenElsewhereError:
            raise UserError(FORGOTTEN) from None

    def attach(self, session: Session, kept: Kept) -> None:
        """Go on with a kept conversation, which the session has loaded."""
        self._number = session.number
        self.kept = kept
        self._name = kept.name

    def fork(self, session: Session, name: str) -> Kept:
        """Keep a copy of the conversation and go on with that. Raises UserError."""
        self._follow(session)
        self._check(session)
        record = session.record()
        if not record.messages:
            raise UserError("there is nothing to copy yet")
        if any(each.name == name for each in self.archive.summaries() if name):
            raise UserError(f"another chat is called {name}; choose another name")
        self.attach(session, self.archive.add(record, self.place, name))
        assert self.kept
        return self.kept

    def forget(self, session: Session, number: int) -> None:
        """Delete a conversation; the present one is not kept any more."""
        self._follow(session)
        self.archive.forget(number)
        if self.kept is not None and self.kept.number == number:
            self.kept = None
            self._unkept = session.number

    def keep_private(self, session: Session, on: bool) -> Kept | None:
        """Keep nothing from now on, or all of the conversation again.

        Returns:
            what is kept of the present conversation.
        """
        self._follow(session)
        self.private = on
        if not on:
            self._unkept = NONE
            self.write(session)
        return self.kept

    def _check(self, session: Session) -> None:
        """Raise UserError if the conversation is not kept."""
        if self.private or session.number == self._unkept:
            raise UserError(NOT_KEPT)

    def _follow(self, session: Session) -> None:
        """Let go of a conversation that is not the session's any more."""
        if session.number != self._number:
            self._number = session.number
            self.kept = None
            self._name = ""

    def _grow(self, session: Session, growing: Growing) -> None:
        if not self._failed:
            self._keep(session, growing)

    def _keep(self, session: Session, growing: Growing | None = None) -> bool:
        """Write the conversation; return True if something had changed and is written."""
        self._follow(session)
        if self._archive is None or self.private or session.number == self._unkept:
            return False
        try:
            changed = self._write(self._archive, session, session.record(growing))
        except BusyError:
            return False  # the next write catches up
        except UserError as error:
            if not self._failed:
                session.engine.notices.append(f"this conversation is not kept: {error}")
            self._failed = True
            return False
        self._failed = False
        return changed

    def _write(self, archive: Archive, session: Session, record: Conversation) -> bool:
        kept = self.kept
        if kept is None:
            if record.messages:
                self.kept = archive.add(record, self.place, self._name)
            return bool(record.messages)
        answered, unanswered = split(kept.conversation)
        if unanswered and answered.messages == record.messages:
            return False  # the message comes back when the chat is resumed
        if not record.messages:  # all was taken back
            self.kept = None
            archive.forget(kept.number)
            return True
        if (kept.conversation, kept.place) == (record, self.place):
            return False
        try:
            self.kept = archive.update(kept, record, self.place)
        except ChangedElsewhereError:
            self.kept = archive.add(record, self.place)
            number = self.kept.number
            session.engine.notices.append(f"{ELSEWHERE} as chat {number}")
        except ForgottenElsewhereError:
            self.kept = None
            self._unkept = session.number
            session.engine.notices.append(FORGOTTEN)
        return True
