"""One reply on the screen: streamed, summed up, and explained if it ended badly."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from rich.text import Text

from medusa_chat.terminal.chat.errors import error_line
from medusa_chat.terminal.chat.keyboard import QuietInput, Signals
from medusa_chat.terminal.panel import footer, panel
from medusa_chat.terminal.theme import ERROR, LABEL, NOTICE
from medusa_chat.terminal.view import PlainView, ReplyView

if TYPE_CHECKING:
    from collections.abc import Generator

    from rich.console import Console

    from medusa_chat.events import Step
    from medusa_chat.terminal.chat.command import Chat

BRING_BACK = "press Up to get your message back"
CONTEXT_FULL = (
    "the context is full: /undo takes the last turn back, /reset starts a new conversation"
)
LOOP = (
    "the reply repeated itself, so it was stopped:"
    " /continue goes on, /set loop-guard off lets replies repeat themselves"
)
DROP = ", /set overflow drop leaves out the oldest turns"
WAYS_OUT = "/undo takes the last turn back, /reset starts anew, /set changes a setting"


def show_reply(
    console: Console, chat: Chat, steps: Generator[Step, None, None], *, plain: bool = False
) -> None:
    """Stream one reply and sum it up. An error ends the reply, never the chat."""
    session = chat.session
    if plain:
        view: ReplyView | PlainView = PlainView(
            console,
            marks=chat.marks,
            thoughts=lambda: session.thoughts,
            open_thoughts=chat.open_thoughts,
        )
    else:
        view = ReplyView(
            console,
            lambda width: panel(session.last, session.conversation, session.sampling, width),
            marks=chat.marks,
            view=chat.view,
            thoughts=lambda: session.thoughts,
            open_thoughts=chat.open_thoughts,
        )
    remark = _stream(view, steps)
    if not view.empty:
        console.print(footer(session.last, session.conversation, session.sampling, console.width))
    if remark:
        console.print(remark)
    if session.last.finish == "context":
        stopped = session.sampling.overflow == "stop"
        console.print(Text(CONTEXT_FULL + DROP * stopped, NOTICE))
    if session.last.finish == "loop":
        console.print(Text(LOOP, NOTICE))
    console.print()


def _stream(view: ReplyView | PlainView, steps: Generator[Step, None, None]) -> Text | None:
    """Draw the steps; return a remark if the reply failed or has no text."""
    quiet = QuietInput()

    def suspend() -> None:
        quiet.pause()
        view.suspend()

    def resume() -> None:
        quiet.resume()
        view.resume()

    try:
        with quiet, Signals(suspend, resume) as signals, view, closing(steps):
            for step in steps:
                view.add(step)
                signals.check()
    except KeyboardInterrupt:
        if view.empty:
            return Text(f"[stopped] before the first word; {BRING_BACK}", LABEL)
    except Exception as error:
        return Text(f"{error_line(error)} ({WAYS_OUT})", ERROR)
    else:
        if view.empty:
            return Text(f"the reply is empty; {BRING_BACK}", LABEL)
    return None
