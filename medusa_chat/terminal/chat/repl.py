"""The chat's loop: reads a message, shows the reply, until the user leaves."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.text import Text

from medusa_chat.config import UserError
from medusa_chat.terminal.chat.command import Chat, Draft, Stream, Switch, find, is_command
from medusa_chat.terminal.chat.commands import dispatch
from medusa_chat.terminal.chat.conversation import read_conversation, split
from medusa_chat.terminal.chat.errors import LoadError, error_line
from medusa_chat.terminal.chat.keyboard import QuietInput, Signals, ending_signals
from medusa_chat.terminal.chat.loading import DownloadProgress, Loading
from medusa_chat.terminal.chat.message import meant_to_leave, unquoted
from medusa_chat.terminal.chat.plain import PlainPrompt
from medusa_chat.terminal.chat.prompt import Prompt, open_history
from medusa_chat.terminal.chat.reply import BRING_BACK, show_reply
from medusa_chat.terminal.chat.resuming import Resumed, resume
from medusa_chat.terminal.chat.session import Session
from medusa_chat.terminal.chat.showing import message_rows
from medusa_chat.terminal.chat.switching import switch
from medusa_chat.terminal.output import SafeConsole, warn
from medusa_chat.terminal.panel import mode_label
from medusa_chat.terminal.source import VIEWS
from medusa_chat.terminal.theme import ERROR, LABEL, NOTICE, STRONG

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from medusa_chat.events import Step
    from medusa_chat.terminal.chat.engine import ChatEngine
    from medusa_chat.terminal.chat.kept import Kept
    from medusa_chat.terminal.chat.start import Start

TRY = "try: Tell me a fairy tale. · /typical samples · /view switches Markdown · /help lists all"
LEAVE = "/exit leaves, Ctrl+D too; type {} once more to send it as a message"


def chat(load: Callable[[DownloadProgress], ChatEngine], start: Start) -> int:
    """Chat in the terminal until the user leaves; return the exit status.

    Args:
        load: returns the engine, and reports downloads to its argument; runs on its own thread.
        start: settings.

    Raises:
        UserError: standard input or output is no terminal, or the transcript is no conversation.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError("chat needs a terminal; use --prompt TEXT or pipe text to it")
    transcript = start.options.transcript
    saved = read_conversation(transcript) if transcript and transcript.exists() else None
    plain = start.options.plain or os.environ.get("TERM") == "dumb"
    loading = Loading(load, start.model)
    status = 0
    try:
        with ending_signals():
            Repl(
                loading, replace(start, saved=saved, options=replace(start.options, plain=plain))
            ).run()
    except SystemExit as ending:
        status = int(ending.code or 0)
    except LoadError as error:
        warn(f"error: {error_line(error.reason)}")
        status = 2
    if not loading.done:
        # The interpreter may crash if it shuts down while the thread imports torch.
        sys.stdout.flush()
        os._exit(status)
    return status


def open_console() -> SafeConsole:
    """Open the terminal; its real size counts, not COLUMNS and LINES of the environment."""
    stale = ("COLUMNS", "LINES")
    environment = {name: value for name, value in os.environ.items() if name not in stale}
    return SafeConsole(highlight=False, _environ=environment)


class Repl:
    """The loop that joins prompt, session, commands and view."""

    def __init__(self, loading: Loading, start: Start) -> None:
        self._loading = loading
        self._start = start
        self._transcript = start.options.transcript
        self._chat: Chat | None = None
        self._draft = Draft("")  # the last message while it is edited
        self._asked = ""  # a word that may have been meant as a command
        self._console = open_console()
        keeper = start.keeper
        opened, notice = open_history(start.history, lambda: keeper.private)
        self._prompt: Prompt | PlainPrompt = PlainPrompt()
        if not start.options.plain:
            self._prompt = Prompt(
                opened, self._session, self._status, self._switch_view, start.options.editing
            )
        if notice:
            self._console.print(Text(notice, NOTICE))

    def run(self) -> None:
        """Read and answer until the user leaves. Raises LoadError."""
        start = self._start
        hint = " · ".join(["", start.model, *filter(None, [start.description])])
        self._console.print(Text.assemble(("medusa-chat", STRONG), (hint, LABEL)))
        self._console.print(Text(TRY, LABEL))
        if start.resumed:
            self._take(self._resumed(start.resumed))
        while True:
            try:
                self._turn()
            except KeyboardInterrupt:  # while the model loads
                self._console.print(Text(f"not sent; {BRING_BACK}\n", LABEL))
            except EOFError:
                return
            except UserError as error:
                self._complain(error)

    def _turn(self) -> None:
        """Read a line and answer it. Raises EOFError if the user leaves."""
        if self._loading.done:
            self._greet()
        draft = self._draft
        self._draft = Draft("")
        line = self._prompt.read(self._loading, self._greet, draft.text)
        if not line.strip():
            return
        self._echo(line)
        # Neither leaving nor a misspelt command waits for the model.
        if is_command(line) and find(line).name == "exit":
            raise EOFError
        if meant_to_leave(line) and line != self._asked:
            self._asked = line
            self._console.print(Text(LEAVE.format(line.strip()), NOTICE))
            self._console.print()
            return
        chat = self._ready()
        if is_command(line):
            self._run_command(chat, line)
        else:
            replacing = draft.replacing and bool(draft.text) and not self._prompt.cleared
            self._answer(chat, chat.session.ask(unquoted(line), replacing=replacing))

    def _echo(self, line: str) -> None:
        """Print a message as it was typed; fold one of many lines."""
        if self._start.options.plain:  # the terminal has echoed it
            return
        for row in message_rows(line):
            self._console.print(row, soft_wrap=True)

    def _answer(self, chat: Chat, steps: Generator[Step, None, None]) -> None:
        steps = chat.keeper.watch(chat.session, steps)
        try:
            show_reply(self._console, chat, steps, plain=self._start.options.plain)
        finally:  # a signal that ends the program loses nothing either
            self._after_reply(chat)

    def _switch_view(self) -> str:
        """Switch to the next view; return a hint."""
        if self._chat is None:
            return "the model is still loading"
        self._chat.view = VIEWS[(VIEWS.index(self._chat.view) + 1) % len(VIEWS)]
        return f"view: {self._chat.view}"

    def _ready(self) -> Chat:
        """Return the chat; wait for the model if need be."""
        if self._chat is None:
            self._wait(self._loading, "your message is next")
            self._greet()
        assert self._chat is not None
        return self._chat

    def _wait(self, loading: Loading, hint: str = "Ctrl+C keeps the present one") -> ChatEngine:
        """Wait for a model, with a spinner if the screen may be redrawn."""
        if self._start.options.plain:
            self._console.print(Text(f"loading {loading.model}…", LABEL))
            return loading.result()
        with QuietInput() as quiet, Signals(quiet.pause, quiet.resume):
            return loading.wait(sys.stdout, hint)

    def _greet(self) -> None:
        """Start the session once the model is loaded: print the legend and the notices."""
        if self._chat is not None:
            return
        start = self._start
        session = Session(self._loading.result(), start.sampling, start.options.system)
        colour = not self._console.no_color
        keeper = start.keeper
        self._chat = Chat(
            session, start.options.marks, colour=colour, view=start.options.view, keeper=keeper
        )
        session.names["chats"] = keeper.names
        session.names["model"] = start.models.names if start.models else list
        if start.saved:
            session.load(start.saved)
            session.sampling = start.sampling  # the command line's settings, not the saved ones
            session.system = (
                start.saved.system if start.options.system is None else start.options.system
            )
            count = len(session.messages)
            note = f"continuing with {count} messages from {self._transcript}"
            self._console.print(Text(note, LABEL))
        if start.resumed:
            resume(self._chat, start.resumed)
        self._console.print(self._chat.legend())
        self._notices(session)
        self._console.print()

    def _run_command(self, chat: Chat, line: str) -> None:
        try:
            result = dispatch(chat, line)
            if isinstance(result, Switch):
                result = switch(chat, self._start.models, result.name, self._wait)
        except LoadError:  # neither the other model nor the present one can be loaded
            raise
        except Exception as error:
            self._complain(error)
            return
        if isinstance(result, Stream):
            self._console.print(Text(result.note, LABEL))
            self._answer(chat, result.steps)
            return
        if isinstance(result, Draft):
            self._take(result)
        elif result is not None:
            self._console.print(result)
            self._console.print()
        self._after_command(chat)

    def _take(self, draft: Draft) -> None:
        """Put a draft into the next prompt."""
        self._draft = draft
        if draft.note:
            self._console.print(draft.note, soft_wrap=True)  # rows of code stay whole
            self._console.print()

    def _resumed(self, kept: Kept) -> Draft:
        """Return what is shown of a kept conversation at the start."""
        start = self._start
        note = Resumed(kept, start.options.view, start.options.marks, start.model)
        return Draft(split(kept.conversation)[1], replacing=False, note=note)

    def _after_command(self, chat: Chat) -> None:
        """Keep what has changed, and print notices."""
        chat.keeper.write(chat.session)
        self._notices(chat.session)

    def _after_reply(self, chat: Chat) -> None:
        """Keep the conversation, print notices, write the transcript if that can be written."""
        session = chat.session
        self._after_command(chat)
        if self._transcript is None:
            return
        try:
            session.save(self._transcript)
        except UserError as error:
            self._transcript = None
            self._complain(error)

    def _session(self) -> Session | None:
        return self._chat.session if self._chat else None

    def _status(self) -> str:
        """Return the left side of the toolbar."""
        session = self._session()
        if session is None:
            return self._loading.status()
        engine = session.engine
        tokens = f"{engine.tokens_in_context}/{engine.context} tokens"
        return f"{engine.name} · {mode_label(session.sampling)} · {tokens}"

    def _notices(self, session: Session) -> None:
        while session.engine.notices:
            self._console.print(Text(session.engine.notices.pop(0), NOTICE))

    def _complain(self, error: Exception) -> None:
        self._console.print(Text(f"{error_line(error)}\n", ERROR))
