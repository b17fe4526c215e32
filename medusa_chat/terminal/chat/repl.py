"""The chat's loop: reads a message, shows the reply, until the user leaves."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.text import Text

from medusa_chat.config import VIEWS, UserError
from medusa_chat.terminal.chat.attachments import with_files
from medusa_chat.terminal.chat.command import (
    Chat,
    Draft,
    Scene,
    Stream,
    Switch,
    find,
    is_command,
)
from medusa_chat.terminal.chat.commands import dispatch
from medusa_chat.terminal.chat.conversation import read_conversation, split
from medusa_chat.terminal.chat.errors import LoadError, error_line
from medusa_chat.terminal.chat.greeting import begin, greet, open_console
from medusa_chat.terminal.chat.keyboard import QuietInput, Signals, ending_signals
from medusa_chat.terminal.chat.loading import DownloadProgress, Loading
from medusa_chat.terminal.chat.message import meant_to_leave, unquoted
from medusa_chat.terminal.chat.plain import PlainPrompt
from medusa_chat.terminal.chat.prompt import Prompt, open_history
from medusa_chat.terminal.chat.reply import BRING_BACK, show_reply
from medusa_chat.terminal.chat.resuming import Resumed
from medusa_chat.terminal.chat.showing import message_rows
from medusa_chat.terminal.chat.switching import switch
from medusa_chat.terminal.chat.transcript import Transcript
from medusa_chat.terminal.output import warn
from medusa_chat.terminal.panel import mode_label
from medusa_chat.terminal.theme import ERROR, LABEL, NOTICE

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from medusa_chat.events import Step
    from medusa_chat.terminal.chat.engine import ChatEngine
    from medusa_chat.terminal.chat.kept import Kept
    from medusa_chat.terminal.chat.session import Session
    from medusa_chat.terminal.chat.start import Start

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
    path = start.options.transcript
    plain = start.options.plain or os.environ.get("TERM") == "dumb"
    start = replace(start, options=replace(start.options, plain=plain))
    kept = Transcript(path) if path else None
    with kept or nullcontext():
        saved = read_conversation(path) if path and path.exists() else None
        loading = Loading(load, start.model)
        status = _run(loading, replace(start, saved=saved, transcript=kept))
    if not loading.done:
        # The interpreter may crash if it shuts down while the thread imports torch.
        sys.stdout.flush()
        os._exit(status)
    return status


def _run(loading: Loading, start: Start) -> int:
    """Run the chat's loop; return the exit status."""
    try:
        with ending_signals():
            Repl(loading, start).run()
    except SystemExit as ending:
        return int(ending.code or 0)
    except LoadError as error:
        warn(f"error: {error_line(error.reason)}")
        return 2
    return 0


class Repl:
    """The loop that joins prompt, session, commands and view."""

    def __init__(self, loading: Loading, start: Start) -> None:
        self._loading = loading
        self._start = start
        self._transcript = start.transcript
        self._chat: Chat | None = None
        self._draft = Draft("")  # text that the next message begins with
        self._asked = ""  # a word that may have been meant as a command
        self._console = open_console()
        keeper = start.keeper
        opened, notice = open_history(start.history, lambda: keeper.private)
        self._prompt: Prompt | PlainPrompt = PlainPrompt()
        if not start.options.plain:
            keys = (self._switch_view, self._press)
            self._prompt = Prompt(opened, self._session, self._status, *keys, start.options.editing)
        if notice:
            self._console.print(Text(notice, NOTICE))

    def run(self) -> None:
        """Read and answer until the user leaves. Raises LoadError."""
        start = self._start
        greet(self._console, start)
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
        line = self._read(draft)
        if not line.strip():
            return
        self._echo(line)
        # Neither leaving nor a misspelt command waits for the model.
        if is_command(line) and find(line).name == "exit":
            raise EOFError
        if meant_to_leave(line) and line != self._asked:
            self._asked = line
            self._console.print(Text(LEAVE.format(line.strip()) + "\n", NOTICE))
            return
        chat = self._ready()
        if is_command(line):
            self._run_command(chat, line)
        else:
            replacing = bool(draft.text) and draft.replaces and not self._prompt.cleared
            self._send(chat, unquoted(line), replacing)

    def _read(self, draft: Draft) -> str:
        """Read a line that begins with a draft; plain mode can only put a file before it."""
        before = not draft.replaces and self._start.options.plain
        line = self._prompt.read(self._loading, self._greet, "" if before else draft.text)
        return draft.text + line if before and not is_command(line) else line

    def _send(self, chat: Chat, message: str, replacing: bool) -> None:
        """Answer a message, with the files that it names. Raises UserError."""
        sent = with_files(message, chat.session.engine)
        for note in sent.notes:
            self._console.print(Text(note, LABEL))
        self._answer(chat, chat.session.ask(sent.text, replacing=replacing, typed=message))

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
        except BaseException:  # a signal that ends the program loses nothing either
            chat.keeper.write(chat.session)
            if self._transcript is not None:
                self._transcript.keep(chat.session, lambda _: False)
            raise
        self._after_change(chat)

    def _switch_view(self) -> str:
        if self._chat is None:
            return "the model is still loading"
        self._chat.view = VIEWS[(VIEWS.index(self._chat.view) + 1) % len(VIEWS)]
        return f"view: {self._chat.view}"

    def _press(self, line: str) -> None:
        if self._chat is not None:
            self._run_command(self._chat, line)

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
        transcript = self._transcript
        self._chat = begin(self._console, self._start, self._loading.result(), transcript)
        self._notices(self._chat.session)
        self._console.print()

    def _run_command(self, chat: Chat, line: str) -> None:
        try:
            result = dispatch(chat, line)
            if isinstance(result, Scene):
                result.show(self._console, plain=self._start.options.plain)
                result = None
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
        self._after_change(chat)

    def _take(self, draft: Draft) -> None:
        """Put a draft into the next prompt."""
        plain = self._start.options.plain
        if plain and isinstance(draft.note, Resumed):  # plain mode has no prompt to edit
            draft = replace(draft, text="")
        self._draft = draft
        if draft.note:
            note = Text(draft.note, LABEL) if isinstance(draft.note, str) else draft.note
            self._console.print(note, soft_wrap=True)  # rows of code stay whole
            self._console.print()

    def _resumed(self, kept: Kept) -> Draft:
        """Return what is shown of a kept conversation at the start."""
        start = self._start
        note = Resumed(kept, start.options.view, start.options.marks, start.model)
        return Draft(split(kept.conversation)[1], replaces=False, note=note)

    def _after_change(self, chat: Chat) -> None:
        """Keep what has changed, write the transcript, and print notices."""
        session = chat.session
        chat.keeper.write(session)
        if self._transcript is not None:
            line = self._transcript.keep(session, self._confirm)
            if line:
                self._console.print(Text(f"{line}\n", NOTICE))
        self._notices(session)

    def _confirm(self, question: str) -> bool:
        """Ask a question; yes is y."""
        try:
            return self._console.input(Text(question, NOTICE)).strip().lower() in ("y", "yes")
        except (EOFError, KeyboardInterrupt):
            return False

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
