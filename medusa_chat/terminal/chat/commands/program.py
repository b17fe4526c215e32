"""Slash-commands on the program itself: its settings file."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from medusa_chat.settings_file import read_settings, settings_file, write_settings
from medusa_chat.terminal.chat.command import Chat, Result, in_group, one_of
from medusa_chat.terminal.chat.errors import UsageError
from medusa_chat.terminal.reports.tables import shown
from medusa_chat.terminal.theme import LABEL
from medusa_chat.terminal.wrapping import escape_controls

if TYPE_CHECKING:
    from collections.abc import Iterator

command = in_group("Keep")


@command("settings", "[save]", values=one_of("save"))
def _settings(chat: Chat, argument: str) -> Result:
    """Show the settings file, or save the present settings in it for the next chats."""
    path = settings_file()
    if argument not in ("", "save"):
        raise UsageError
    if argument:
        changed = write_settings(path, dict(_present(chat)), chat.session.engine.defaults)
        words = f"saved {', '.join(changed)}" if changed else "nothing to save: no setting differs"
        return Text(f"{words} ({path})", LABEL)
    stored = read_settings(path)
    rows = [Text(f"{name} = {escape_controls(shown(stored[name]))}") for name in stored]
    about = "flags win over it" if stored else "empty; /settings save writes the present settings"
    return Group(Text(f"{path}: {about}", LABEL), *rows)


def _present(chat: Chat) -> Iterator[tuple[str, Any]]:
    """Yield the settings that a command can change, by their keys in the file."""
    session = chat.session
    yield from asdict(session.sampling).items()
    yield "view", chat.view
    yield "marks", chat.marks
    yield "copies", session.engine.trees.copies
    yield "private", chat.keeper.private
    if session.system != session.engine.system:
        yield "system", session.system
    yield from chat.keeper.place._asdict().items()
