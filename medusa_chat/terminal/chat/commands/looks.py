"""Slash-commands that show figures, and choose how replies look."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from medusa_chat.config import VIEWS
from medusa_chat.terminal.chat.command import (
    GROUPS,
    REGISTRY,
    Chat,
    Result,
    in_group,
    one_of,
    switch,
)
from medusa_chat.terminal.chat.errors import UsageError
from medusa_chat.terminal.reports import tables
from medusa_chat.terminal.theme import LABEL, STRONG
from medusa_chat.text import sanitize

if TYPE_CHECKING:
    from rich.console import RenderableType

command = in_group("Look")
KEYS = (
    "Enter sends · Alt+Enter or Ctrl+J adds a line · Ctrl+R searches · Alt+V switches the view · "
    "Ctrl+T shows thoughts · "
    'Ctrl+X Ctrl+E opens an editor · Ctrl+C stops a reply · """ begins and ends several lines'
)
VIEW_WORDS = {
    "heads": "heads: the text as the model writes it, coloured by head",
    "markdown": "markdown: finished blocks are rendered, without the heads' colours",
    "both": "both: finished blocks are rendered, and all colours are those of the heads",
}


@command("help")
def _help(chat: Chat) -> Result:
    """List the commands."""
    parts: list[RenderableType] = []
    for group, examples in GROUPS.items():
        entries = [entry for entry in REGISTRY.values() if entry.group == group]
        rows = [(entry.invocation, entry.described) for entry in entries]
        parts += [Text(group, STRONG), tables.help_table(rows)]
        parts += [Text(f"for example: {examples}", LABEL), Text()]
    return Group(*parts, Text(KEYS, LABEL), Text(), chat.legend())


@command("view", "[heads|markdown|both]", values=one_of(*VIEWS))
def _view(chat: Chat, argument: str) -> Result:
    """Choose how replies look: coloured by head, rendered Markdown, or both."""
    if argument and argument not in VIEWS:
        raise UsageError
    for view in VIEWS:
        if view == argument:
            chat.view = view
    return Text(VIEW_WORDS[chat.view], LABEL)


@command("thoughts", "[show|fold]", values=one_of("show", "fold"))
def _thoughts(chat: Chat, argument: str) -> Result:
    """Show a thinking model's thoughts, those of the last reply too, or fold them. Ctrl+T."""
    if argument not in ("", "show", "fold"):
        raise UsageError
    chat.open_thoughts = argument == "show" if argument else not chat.open_thoughts
    if not chat.open_thoughts:
        return Text("thoughts are folded", LABEL)
    text = sanitize(chat.session.thoughts.text.strip())
    return Text(text or "thoughts are shown as they come", LABEL)


@command("marks", "[on|off]", values=one_of("on", "off"))
def _marks(chat: Chat, argument: str) -> Result:
    """Mark each guessed token with its head's number, for screens without colour: on or off."""
    chat.marks = switch(argument, chat.marks)
    return chat.legend() if chat.marks else Text("marks off", LABEL)


@command("stats")
def _stats(chat: Chat) -> Result:
    """Show the figures of the last reply and of the conversation."""
    session = chat.session
    return tables.stats_table(session.last, session.conversation, session.engine)


@command("heads")
def _heads(chat: Chat) -> Result:
    """Show how many guesses of each head were accepted in this conversation."""
    stats = chat.session.conversation
    if not stats.reached:
        return Group(chat.legend(), Text("no guess was tested yet", LABEL))
    return tables.heads_table(stats)
