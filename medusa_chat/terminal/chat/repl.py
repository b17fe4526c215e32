"""The chat: reads a message, streams the reply, until the user leaves."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.text import Text

from medusa_chat.config import Sampling, UserError, out_of_memory
from medusa_chat.terminal.chat.command import Chat, Leave, Reply
from medusa_chat.terminal.chat.commands import dispatch, find, is_command
from medusa_chat.terminal.chat.keyboard import Interrupt, quiet_input
from medusa_chat.terminal.chat.loading import LoadFailed, Loading, Progress
from medusa_chat.terminal.chat.prompt import Prompt, open_history
from medusa_chat.terminal.chat.session import Conversation, Session, read_conversation
from medusa_chat.terminal.panel import footer, mode_label, panel
from medusa_chat.terminal.theme import ERROR, LABEL, NOTICE, STRONG
from medusa_chat.terminal.view import ReplyView
from medusa_chat.terminal.wrapping import sanitize

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from medusa_chat.events import Step
    from medusa_chat.terminal.chat.engine import ChatEngine

LONGEST_COMPLAINT = 300
BRING_BACK = "Up brings your message back"
CONTEXT_FULL = (
    "the context is full: /undo takes the last turn back, /reset starts a new conversation"
)
WAYS_OUT = "/undo takes the last turn back, /reset starts anew, /set changes a setting"


def chat(
    load: Callable[[Progress], ChatEngine],
    *,
    model: str,
    sampling: Sampling,
    system: str | None = None,
    marks: bool = False,
    history: Path,
    transcript: Path | None = None,
) -> int:
    """Chat in the terminal until the user leaves; returns the exit status.

    Args:
        load: gives the engine; slow, so it runs on a thread of its own. Tells downloads to what it is given.
        model: name shown until the engine is there.
        system: system prompt; None is the model's own.
        marks: mark tokens by head without colour.
        history: file of the prompts that were sent.
        transcript: a file that the conversation is kept in: continued if it exists, written after each reply.

    Raises:
        UserError: standard input or output is no terminal, or `transcript` is no saved conversation.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError("chat needs a terminal; use --prompt TEXT or pipe text to it")
    opening = Opening(model, sampling, system, marks, transcript)
    kept = read_conversation(transcript) if transcript and transcript.exists() else None
    loading = Loading(load, model)
    try:
        status = Repl(loading, opening, history, kept).run()
    except LoadFailed as failure:
        print(f"medusa-chat: error: {_complaint(failure.reason or failure)}", file=sys.stderr)
        status = 2
    if not loading.done:
        # an interpreter that shuts down under a thread which imports torch may crash; nothing is left to write
        sys.stdout.flush()
        os._exit(status)
    return status


@dataclass(frozen=True)
class Opening:
    """What the chat starts with; see `chat`."""

    model: str
    sampling: Sampling
    system: str | None
    marks: bool
    transcript: Path | None


class Repl:
    """Joins prompt, session, commands and view."""

    def __init__(
        self, loading: Loading, opening: Opening, history: Path, kept: Conversation | None
    ) -> None:
        self._loading = loading
        self._opening = opening
        self._transcript = opening.transcript
        self._kept = kept
        self._chat: Chat | None = None
        self._console = Console(highlight=False, markup=False, emoji=False)
        opened, notice = open_history(history)
        self._prompt = Prompt(
            opened, lambda: self._chat.session if self._chat else None, self._status
        )
        if notice:
            self._print(Text(notice, NOTICE))

    def run(self) -> int:
        """Read and answer until the user leaves. Raises LoadFailed."""
        model = self._opening.model
        self._print(
            Text.assemble(
                ("medusa-chat", STRONG), (f" · {model} · /help lists the commands", LABEL)
            )
        )
        while True:
            try:
                if self._loading.done:
                    self._greet()
                line = self._prompt.read(self._loading, self._greet)
                if not line.strip():
                    continue
                if is_command(line) and self._answer_early(line):
                    return 0
                self._answer(self._ready(), line)
            except KeyboardInterrupt:  # while the model loads
                self._print(Text(f"not sent; {BRING_BACK}\n", LABEL))
            except UserError as error:
                self._complain(error)
            except (EOFError, Leave):
                return 0

    def _answer_early(self, line: str) -> bool:
        """Whether `line` leaves: that need not wait for the model. A misspelt command need not either."""
        return find(line).name == "exit"

    def _ready(self) -> Chat:
        """The chat, once the model is loaded."""
        if self._chat is None:
            with quiet_input():
                self._loading.wait(sys.stdout, "your message is next")
            self._greet()
        assert self._chat is not None
        return self._chat

    def _greet(self) -> None:
        """Say that the model is there: the legend, and what the engine has to say."""
        if self._chat is not None:
            return
        opening = self._opening
        session = Session(self._loading.result(), opening.sampling, opening.system)
        self._chat = Chat(session, opening.marks, colour=not self._console.no_color)
        if self._kept:
            session.load(self._kept)
            session.sampling = opening.sampling  # the command line's settings, not those of then
            session.system = self._kept.system if opening.system is None else opening.system
            self._print(
                Text(f"going on with {len(session.messages)} messages of {self._transcript}", LABEL)
            )
        self._print(self._chat.legend())
        self._notices(session)
        self._print(Text())

    def _answer(self, chat: Chat, line: str) -> None:
        if not is_command(line):
            self._reply(
                chat, chat.session.ask(line.removeprefix("/") if line.startswith("//") else line)
            )
            return
        try:
            result = dispatch(chat, line)
        except Leave:
            raise
        except Exception as error:
            self._complain(error)
            return
        if isinstance(result, Reply):
            self._print(Text(result.note, LABEL))
            self._reply(chat, result.steps)
        elif result is not None:
            self._print(result)
            self._print(Text())
        self._notices(chat.session)

    def _reply(self, chat: Chat, steps: Generator[Step, None, None]) -> None:
        """Stream one reply; whatever ends it, the chat goes on."""
        session = chat.session
        view = ReplyView(
            self._console,
            lambda width: panel(session.last, session.sampling, width),
            marks=chat.marks,
        )
        complaint = None
        try:
            with quiet_input(), Interrupt() as interrupt, view, closing(steps):
                for step in steps:
                    view.add(step)
                    interrupt.check()
        except KeyboardInterrupt:
            complaint = (
                Text(f"[stopped] before the first word; {BRING_BACK}", LABEL)
                if view.empty
                else None
            )
        except Exception as error:
            complaint = Text(f"{_complaint(error)} ({WAYS_OUT})", ERROR)
        else:
            complaint = Text(f"the model said nothing; {BRING_BACK}", LABEL) if view.empty else None
        self._close(session, view, complaint)

    def _close(self, session: Session, view: ReplyView, complaint: Text | None) -> None:
        if not view.empty:
            width = self._console.width
            self._print(footer(session.last, session.conversation, session.sampling, width))
        if complaint:
            self._print(complaint)
        if session.last.finish == "context":
            self._print(Text(CONTEXT_FULL, NOTICE))
        self._print(Text())
        self._notices(session)
        self._keep(session)

    def _keep(self, session: Session) -> None:
        """Write the transcript; one that cannot be written is given up with a notice."""
        if self._transcript is None:
            return
        try:
            session.save(self._transcript)
        except UserError as error:
            self._transcript = None
            self._complain(error)

    def _status(self) -> str:
        """The left side of the toolbar."""
        if self._chat is None:
            return self._loading.status()
        session = self._chat.session
        engine = session.engine
        return f"{engine.name} · {mode_label(session.sampling)} · {engine.tokens_in_context}/{engine.context} tokens"

    def _notices(self, session: Session) -> None:
        while session.engine.notices:
            self._print(Text(session.engine.notices.pop(0), NOTICE))

    def _complain(self, error: Exception) -> None:
        self._print(Text(f"{_complaint(error)}\n", ERROR))

    def _print(self, what: RenderableType) -> None:
        self._console.print(what)


def _complaint(error: BaseException) -> str:
    """One line on what went wrong."""
    first = (sanitize(str(error)).strip().splitlines() or [""])[0][:LONGEST_COMPLAINT]
    if isinstance(error, UserError):
        return first
    if out_of_memory(error):
        return f"out of memory: {first}" if first else "out of memory"
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
