"""The slash-command that races decoding with heads against decoding without."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rich.text import Text

from medusa_chat.files import expanded
from medusa_chat.terminal.chat.command import Chat, Result, Scene, in_group
from medusa_chat.terminal.chat.errors import UsageError
from medusa_chat.terminal.race.lanes import Race
from medusa_chat.terminal.race.recording import check_recording, record
from medusa_chat.terminal.race.screen import show_race
from medusa_chat.terminal.theme import LABEL

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

command = in_group("Look")


@command("race", "[--record FILE] [PROMPT]")
def _race(chat: Chat, argument: str) -> Result:
    """Answer your last message, or PROMPT, with heads and without, in two columns."""
    file, prompt = _split(argument)
    if file is not None:
        check_recording(file)
    race = Race(chat.session.engine, chat.session.question(prompt), chat.session.sampling)

    def show(console: Console, *, plain: bool) -> None:
        done = show_race(console, race, marks=chat.marks, plain=plain)
        if done and file is not None:
            record(race, file, console.color_system)
            console.print(Text(f"recorded to {file}", LABEL))
        console.print()

    return Scene(show)


def _split(argument: str) -> tuple[Path | None, str]:
    """Split the argument into the file to record to, if one is given, and the prompt."""
    first, _, rest = argument.partition(" ")
    if first != "--record":
        return None, argument
    try:
        name, *_ = shlex.split(rest)
    except ValueError:  # no name, or an open quote
        raise UsageError from None
    quoted = rest.lstrip()[:1] in ("'", '"')
    used = len(name) + 2 if quoted else len(name)
    return expanded(name), rest.lstrip()[used:].strip()
