"""The beginning of a chat: what it says first, and its session once the model is loaded."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rich.text import Text

from medusa_chat.sampling import choose_settings
from medusa_chat.terminal.chat.command import Chat
from medusa_chat.terminal.chat.resuming import resume
from medusa_chat.terminal.chat.session import Session
from medusa_chat.terminal.output import SafeConsole
from medusa_chat.terminal.theme import LABEL, STRONG

if TYPE_CHECKING:
    from rich.console import Console

    from medusa_chat.terminal.chat.engine import ChatEngine
    from medusa_chat.terminal.chat.start import Start
    from medusa_chat.terminal.chat.transcript import Transcript

TRY = "try: Tell me a fairy tale. · /typical samples · /view switches Markdown · /help lists all"
NEXT = "a larger model that knows something: medusa-chat --model smollm2 (93 MB to download)"
CONTINUING = "continuing with {} messages from {}"


def open_console() -> SafeConsole:
    """Open the terminal; its real size counts, not COLUMNS and LINES of the environment."""
    stale = ("COLUMNS", "LINES")
    environment = {name: value for name, value in os.environ.items() if name not in stale}
    return SafeConsole(highlight=False, _environ=environment)


def greet(console: Console, start: Start) -> None:
    """Print the model, before it is loaded, and what to try."""
    hint = " · ".join(["", start.model, *filter(None, [start.description])])
    console.print(Text.assemble(("medusa-chat", STRONG), (hint, LABEL)))
    console.print(Text(TRY, LABEL))
    if start.model == "bundled":
        console.print(Text(NEXT, LABEL))


def begin(
    console: Console, start: Start, engine: ChatEngine, transcript: Transcript | None
) -> Chat:
    """Start the session with a loaded model; print the legend and the settings."""
    options = start.options
    sampling, lines = choose_settings(engine.defaults, start.given)
    session = Session(engine, sampling, options.system)
    keeper = start.keeper
    colour = not console.no_color
    chat = Chat(session, options.marks, colour=colour, view=options.view, keeper=keeper)
    session.names["chats"] = keeper.names
    session.names["model"] = start.models.names if start.models else list
    if start.saved and transcript:
        session.load(start.saved)
        session.sampling = sampling  # the command line's settings, not the saved ones
        session.system = start.saved.system if options.system is None else options.system
        note = CONTINUING.format(len(session.messages), transcript.path)
        console.print(Text(note, LABEL))
    if transcript:
        transcript.follow(session)
    console.print(chat.legend())
    if start.resumed:
        resume(chat, start.resumed)
        return chat
    for line in lines:
        console.print(Text(line, LABEL))
    return chat
