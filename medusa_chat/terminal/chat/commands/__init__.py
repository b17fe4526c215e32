"""The slash-commands. Each handler returns what to print; its docstring is the help.

talk.py      the conversation: take back, renew, go on, copy, save
keep.py      kept conversations: list, name, resume, forget, export
program.py   the settings file
looks.py     figures, and how replies look
decoding.py  how replies are decoded
race.py      with heads against without
"""

from __future__ import annotations

from medusa_chat.terminal.chat.command import Chat, Result, find

# Importing them fills the registry.
from medusa_chat.terminal.chat.commands import (  # noqa: F401
    decoding,
    keep,
    looks,
    program,
    race,
    talk,
)


def dispatch(chat: Chat, line: str) -> Result:
    """Run the command in a line. Raises UserError for a wrong one, EOFError for `/exit`."""
    _, *argument = line.split(None, 1)
    return find(line).run(chat, argument[0].strip() if argument else "")
