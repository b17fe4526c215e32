"""The kept conversations, in a database of SQLite.

A write is one transaction that a killed program leaves whole or undone. In SQLite's WAL mode it
waits for no disk; `settle` brings the pages to the disk between two replies.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_chat.config import UserError
from medusa_chat.terminal.chat.kept import (
    Kept,
    Place,
    Summary,
    message_rows,
    read_rows,
    settings_columns,
    summary,
    text_of,
)
from medusa_chat.text import common_prefix, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from medusa_chat.terminal.chat.conversation import Conversation

VERSION = 1  # of the schema
WAIT_SECONDS = 2.0  # for another chat that writes
SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS chats (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,
    model TEXT NOT NULL,
    settings TEXT NOT NULL,
    changed REAL NOT NULL,
    version INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS messages (
    chat INTEGER NOT NULL,
    position INTEGER NOT NULL,
    role TEXT NOT NULL,
    content TEXT NOT NULL,
    heads TEXT NOT NULL,
    PRIMARY KEY (chat, position)
) WITHOUT ROWID;
PRAGMA user_version = 1;
COMMIT;
"""
SUMMARIES = """
SELECT number, name, model, changed,
    (SELECT count(*) FROM messages WHERE chat = number AND role = 'user'),
    (SELECT content FROM messages WHERE chat = number ORDER BY position LIMIT 1)
FROM chats
"""
HAS_WORD = """(instr(folded(name), ?) OR
    EXISTS (SELECT 1 FROM messages WHERE chat = number AND instr(folded(content), ?)))"""


class ChangedElsewhereError(Exception):
    """Another chat has changed this conversation."""


class ForgottenElsewhereError(Exception):
    """Another chat has deleted this conversation."""


class BusyError(UserError):
    """Another program holds the database; a later write may succeed."""


class Archive:
    """The database in a file. It is opened, and made if need be, when it is first used.

    Every method raises UserError, with the file's name, if the database cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: sqlite3.Connection | None = None

    def summaries(self, words: Sequence[str] = ()) -> list[Summary]:
        """Return the conversations that hold all words in any case, the last changed first."""
        condition = " AND ".join(HAS_WORD for _ in words) or "1"
        folded = [word.casefold() for word in words for _ in range(2)]
        with self._reading() as connection:
            query = f"{SUMMARIES} WHERE {condition} ORDER BY changed DESC, number DESC"
            return [summary(row) for row in connection.execute(query, folded)]

    def find(self, wanted: str) -> Summary:
        """Return the conversation of a number or a name. Raises UserError if there is none."""
        listed = self.summaries()
        if wanted.isascii() and wanted.isdecimal():
            found = [each for each in listed if str(each.number) == wanted.lstrip("0")]
        else:
            named = [each for each in listed if each.name]
            begun = [each for each in named if each.name.casefold().startswith(wanted.casefold())]
            found = [each for each in named if each.name == wanted] or begun
        if len(found) > 1:
            names = ", ".join(each.name for each in found[:5])
            raise UserError(f"{wanted!r} begins the names of several chats: {names}")
        if not found:
            raise UserError(f"there is no kept chat {wanted!r}; /chats lists them")
        return found[0]

    def latest(self) -> Summary:
        """Return the conversation that was changed last. Raises UserError if none is kept."""
        listed = self.summaries()
        if not listed:
            raise UserError("no chat is kept yet")
        return listed[0]

    def read(self, number: int) -> Kept:
        """Return a conversation. Raises UserError if there is none of this number."""
        with self._reading() as connection:
            query = "SELECT name, version, model, settings FROM chats WHERE number = ?"
            row = connection.execute(query, (number,)).fetchone()
            if row is None:
                raise UserError(f"there is no kept chat {number}; /chats lists them")
            query = "SELECT role, content, heads FROM messages WHERE chat = ? ORDER BY position"
            turns = connection.execute(query, (number,)).fetchall()
            name, version, model, settings = row
            try:
                conversation, place = read_rows(model, json.loads(settings), turns)
            except (TypeError, RecursionError):  # no text; lists in lists
                raise ValueError("its settings are damaged") from None
        return Kept(number, text_of(name), version, conversation, place)

    def add(self, conversation: Conversation, place: Place, name: str = "") -> Kept:
        """Keep a new conversation."""
        with self._writing() as connection:
            row = (name, *settings_columns(conversation, place), time.time(), 1)
            columns = "name, model, settings, changed, version"
            query = f"INSERT INTO chats ({columns}) VALUES (?, ?, ?, ?, ?)"
            number = connection.execute(query, row).lastrowid
            assert number
            _write_messages(connection, number, conversation, 0)
        return Kept(number, name, 1, conversation, place)

    def update(self, kept: Kept, conversation: Conversation, place: Place) -> Kept:
        """Write what has changed since `kept`.

        Raises:
            ChangedElsewhereError: another chat has written it since.
            ForgottenElsewhereError: another chat has deleted it.
        """
        same = common_prefix(message_rows(kept.conversation), message_rows(conversation))
        with self._writing() as connection:
            row = (*settings_columns(conversation, place), time.time(), kept.number, kept.version)
            _one_changed(
                connection,
                "UPDATE chats SET model = ?, settings = ?, changed = ?, version = version + 1"
                " WHERE number = ? AND version = ?",
                row,
            )
            _write_messages(connection, kept.number, conversation, same)
        return Kept(kept.number, kept.name, kept.version + 1, conversation, place)

    def rename(self, kept: Kept, name: str) -> Kept:
        """Name a conversation. Raises what `update` raises."""
        with self._writing() as connection:
            _one_changed(
                connection,
                "UPDATE chats SET name = ?, version = version + 1 WHERE number = ? AND version = ?",
                (name, kept.number, kept.version),
            )
        return kept._replace(name=name, version=kept.version + 1)

    def forget(self, number: int) -> None:
        """Delete a conversation, and wipe its text from the file."""
        with self._writing() as connection:
            connection.execute("DELETE FROM messages WHERE chat = ?", (number,))
            connection.execute("DELETE FROM chats WHERE number = ?", (number,))
        with self._reading() as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def settle(self) -> None:
        """Bring what was written to the disk, as far as no other chat reads it now."""
        with self._reading() as connection:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        try:
            yield self._open()
        except (sqlite3.Error, OSError, ValueError) as error:
            raise self._complaint(error) from None

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Run the block as one transaction."""
        with self._reading() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _complaint(self, error: Exception) -> UserError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        kind = BusyError if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) else UserError
        if kind is UserError:
            self.close()
        reason = (error.strerror if isinstance(error, OSError) else None) or one_line(str(error))
        return kind(f"{self.path}: {reason}")

    def _open(self) -> sqlite3.Connection:
        if self._opened is None:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.path.touch(mode=0o600)  # SQLite gives its other files the same rights
            self._opened = _connect(self.path)
        return self._opened


def archive_file() -> Path:
    """Return the place of the database: MEDUSA_CHAT_DATA, or the platform's data folder."""
    from platformdirs import user_data_path

    folder = os.environ.get("MEDUSA_CHAT_DATA")
    return (Path(folder) if folder else user_data_path("medusa-chat")) / "chats.db"


def _connect(path: Path) -> sqlite3.Connection:
    """Open a database, and make its tables if it is new. Raises sqlite3.Error."""
    connection = sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None)
    try:
        connection.create_function("folded", 1, lambda text: str(text).casefold())
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA wal_autocheckpoint = 0")  # `settle` does it
        connection.execute("PRAGMA secure_delete = ON")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise sqlite3.DatabaseError("it was written by a newer medusa-chat")
        if version < VERSION:
            connection.executescript(SCHEMA)
    except BaseException:
        connection.close()
        raise
    return connection


def _one_changed(connection: sqlite3.Connection, query: str, row: tuple[Any, ...]) -> None:
    """Change one row of `chats`, of a number and a version, which end `row`."""
    if connection.execute(query, row).rowcount:
        return
    number = row[-2]
    if connection.execute("SELECT 1 FROM chats WHERE number = ?", (number,)).fetchone():
        raise ChangedElsewhereError
    raise ForgottenElsewhereError


def _write_messages(
    connection: sqlite3.Connection, number: int, conversation: Conversation, first: int
) -> None:
    """Replace the messages from position `first` on."""
    connection.execute("DELETE FROM messages WHERE chat = ? AND position >= ?", (number, first))
    rows = enumerate(message_rows(conversation)[first:], first)
    connection.executemany(
        "INSERT INTO messages (chat, position, role, content, heads) VALUES (?, ?, ?, ?, ?)",
        [(number, position, *row) for position, row in rows],
    )
