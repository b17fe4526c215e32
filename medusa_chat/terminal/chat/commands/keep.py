"""Slash-commands on kept conversations: list, name, resume, forget, export."""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from medusa_chat.config import UserError
from medusa_chat.files import expanded
from medusa_chat.terminal.chat.command import Chat, Draft, Result, in_group, one_of, switch
from medusa_chat.terminal.chat.errors import UsageError
from medusa_chat.terminal.chat.exporting import export
from medusa_chat.terminal.chat.resuming import Resumed, resume
from medusa_chat.terminal.theme import LABEL, STRONG
from medusa_chat.terminal.wrapping import escape_controls

if TYPE_CHECKING:
    from collections.abc import Iterable

    from medusa_chat.terminal.chat.kept import Summary
    from medusa_chat.terminal.chat.session import Session

command = in_group("Keep")
LISTED = 20  # conversations that /chats shows
LONGEST_NAME = 60


def _kept_names(session: Session | None, words: list[str]) -> Iterable[str]:
    names = session.names.get("chats") if session and not words else None
    return names() if names else ()


@command("chats", "[WORDS]")
def _chats(chat: Chat, argument: str) -> Result:
    """List the kept conversations, or those that hold all these words."""
    found = chat.keeper.archive.summaries(argument.split())
    if not found:
        raise UserError("no kept chat holds these words" if argument else "no chat is kept yet")
    kept = chat.keeper.kept
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for summary in found[:LISTED]:
        here = kept is not None and kept.number == summary.number
        table.add_row(*_cells(summary, "▸" if here else " "))
    rest = len(found) - LISTED
    if rest <= 0:
        return table
    return Group(table, Text(f"… {rest} older ones; /chats WORDS finds them", LABEL))


def _cells(summary: Summary, mark: str) -> list[Text]:
    name = Text(summary.name, STRONG) if summary.name else Text(escape_controls(summary.title))
    name.truncate(40, overflow="ellipsis")
    turns = f"{summary.turns} turn{'s' * (summary.turns != 1)}"
    changed = _date(summary.changed)
    return [Text(f"{mark} {summary.number}"), name, *_labels(changed, summary.model, turns)]


def _labels(*texts: str) -> list[Text]:
    return [Text(text, LABEL) for text in texts]


def _date(seconds: float) -> str:
    """Show the time of today, the date of another day."""
    moment = datetime.fromtimestamp(seconds)
    today = moment.date() == datetime.fromtimestamp(time.time()).date()
    return f"{moment:%H:%M}" if today else f"{moment:%Y-%m-%d}"


@command("name", "NAME")
def _name(chat: Chat, argument: str) -> Result:
    """Name this conversation, to find it again."""
    name = _checked(argument)
    if not name:
        raise UsageError
    chat.keeper.rename(chat.session, name)
    return Text(f"this conversation is called {escape_controls(name)}", LABEL)


def _checked(argument: str) -> str:
    """Return a name without superfluous spaces. Raises UserError for one that is no name."""
    name = " ".join(argument.split())
    if name.isdecimal() or len(name) > LONGEST_NAME:
        raise UserError(f"a name has a letter, and at most {LONGEST_NAME} characters")
    return name


@command("resume", "NUMBER|NAME", values=_kept_names, destroys=True)
def _resume(chat: Chat, argument: str) -> Result:
    """Go on with a kept conversation, with its settings."""
    if not argument:
        raise UsageError
    summary = chat.keeper.archive.find(argument)
    chat.keeper.write(chat.session)
    kept = chat.keeper.archive.read(summary.number)
    unanswered = resume(chat, kept)
    note = Resumed(kept, chat.view, chat.marks, chat.session.engine.name)
    return Draft(unanswered, replaces=False, note=note)


@command("forget", "NUMBER|NAME", values=_kept_names, destroys=True)
def _forget(chat: Chat, argument: str) -> Result:
    """Delete a kept conversation."""
    if not argument:
        raise UsageError
    summary = chat.keeper.archive.find(argument)
    chat.keeper.forget(chat.session, summary.number)
    return Text(f"forgot chat {escape_controls(summary.label)}", LABEL)


@command("private", "[on|off]", values=one_of("on", "off"))
def _private(chat: Chat, argument: str) -> Result:
    """Keep neither the conversation nor your messages from now on: on or off."""
    private = switch(argument, chat.keeper.private)
    kept = chat.keeper.keep_private(chat.session, private)
    if not private:
        return Text("this conversation is kept", LABEL)
    words = "private: nothing is kept from now on"
    if kept is not None:
        words += f"; /forget {kept.number} deletes what was kept of this conversation before"
    return Text(words, LABEL)


@command("fork", "[NAME]")
def _fork(chat: Chat, argument: str) -> Result:
    """Go on with a copy of this conversation; the original stays as it is."""
    kept = chat.keeper.fork(chat.session, _checked(argument))
    return Text(f"you go on with a copy, chat {kept.number}", LABEL)


@command("export", "FILE.md|html|svg|json", takes_path=True)
def _export(chat: Chat, argument: str) -> Result:
    """Write the conversation to a file: Markdown, HTML and SVG in the heads' colours, or JSON."""
    if not argument:
        raise UsageError
    path = expanded(argument)
    kept = chat.keeper.kept
    export(chat, path, (kept.name if kept else "") or "A conversation")
    return Text(f"wrote {len(chat.session.messages)} messages to {path}", LABEL)
