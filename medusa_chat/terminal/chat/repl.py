"""The chat's loop: reads a message, shows the reply, until the user leaves."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from medusa_chat.config import Sampling, UserError
from medusa_chat.sampling import describe_defaults
from medusa_chat.settings import make
from medusa_chat.terminal.chat.attachments import with_files
from medusa_chat.terminal.chat.command import Chat, Draft, Scene, Stream, find, is_command
from medusa_chat.terminal.chat.commands import dispatch
from medusa_chat.terminal.chat.conversation import Conversation, read_conversation
from medusa_chat.terminal.chat.errors import LoadError, error_line
from medusa_chat.terminal.chat.keyboard import QuietInput, Signals, ending_signals
from medusa_chat.terminal.chat.loading import DownloadProgress, Loading
from medusa_chat.terminal.chat.message import folded, meant_to_leave, unquoted
from medusa_chat.terminal.chat.plain import PlainPrompt
from medusa_chat.terminal.chat.prompt import PROMPT, Prompt, open_history
from medusa_chat.terminal.chat.reply import BRING_BACK, show_reply
from medusa_chat.terminal.chat.session import Session
from medusa_chat.terminal.chat.transcript import Transcript
from medusa_chat.terminal.output import SafeConsole, warn
from medusa_chat.terminal.panel import mode_label
from medusa_chat.terminal.source import VIEWS, View
from medusa_chat.terminal.theme import ERROR, LABEL, NOTICE, STRONG
from medusa_chat.text import sanitize

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping
    from pathlib import Path
    from typing import Any

    from medusa_chat.events import Step
    from medusa_chat.terminal.chat.engine import ChatEngine

TRY = "try: Tell me a fairy tale. · /typical samples · /view switches Markdown · /help lists all"
NEXT = "a larger model that knows something: medusa-chat --model smollm2 (93 MB to download)"
CONTINUING = "continuing with {} messages from {}"
LEAVE = "/exit leaves, Ctrl+D too; type {} once more to send it as a message"


def chat(
    load: Callable[[DownloadProgress], ChatEngine],
    *,
    model: str,
    given: Mapping[str, Any],
    system: str | None = None,
    marks: bool = False,
    history: Path,
    transcript: Path | None = None,
    view: View = "both",
    plain: bool = False,
    description: str = "",
) -> int:
    """Chat in the terminal until the user leaves; return the exit status.

    Args:
        load: returns the engine, and reports downloads to its argument; runs on its own thread.
        model: name to show until the engine is loaded.
        given: settings of Sampling by name; the others are the model's or the usual ones.
        system: system prompt; None is the model's own.
        marks: mark tokens with their heads, for screens without colour.
        history: file of earlier prompts.
        transcript: file of the conversation: continued if it exists, written after each reply.
        view: of heads and Markdown.
        plain: print each row once and redraw nothing, for screen readers and simple terminals.
        description: what the model is and can do, in a few words.

    Raises:
        UserError: standard input or output is no terminal, or `transcript` is no conversation.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError("chat needs a terminal; use --prompt TEXT or pipe text to it")
    plain = plain or os.environ.get("TERM") == "dumb"
    kept = Transcript(transcript) if transcript else None
    with kept or nullcontext():
        saved = read_conversation(transcript) if transcript and transcript.exists() else None
        start = Start(model, given, system, marks, kept, saved, view, plain, description)
        loading = Loading(load, model)
        status = _run(loading, start, history)
    if not loading.done:
        # The interpreter may crash if it shuts down while the thread imports torch.
        sys.stdout.flush()
        os._exit(status)
    return status


def _run(loading: Loading, start: Start, history: Path) -> int:
    """Run the chat's loop; return the exit status."""
    try:
        with ending_signals():
            Repl(loading, start, history).run()
    except SystemExit as ending:
        return int(ending.code or 0)
    except LoadError as error:
        warn(f"error: {error_line(error.reason)}")
        return 2
    return 0


@dataclass(frozen=True)
class Start:
    """The chat's settings at its start; see `chat`."""

    model: str
    given: Mapping[str, Any]
    system: str | None
    marks: bool
    transcript: Transcript | None
    saved: Conversation | None
    view: View
    plain: bool
    description: str


def open_console() -> SafeConsole:
    """Open the terminal; its real size counts, not COLUMNS and LINES of the environment."""
    stale = ("COLUMNS", "LINES")
    environment = {name: value for name, value in os.environ.items() if name not in stale}
    return SafeConsole(highlight=False, _environ=environment)


class Repl:
    """The loop that joins prompt, session, commands and view."""

    def __init__(self, loading: Loading, start: Start, history: Path) -> None:
        self._loading = loading
        self._start = start
        self._transcript = start.transcript
        self._chat: Chat | None = None
        self._draft = Draft("")  # text that the next message begins with
        self._asked = ""  # a word that may have been meant as a command
        self._console = open_console()
        opened, notice = open_history(history)
        self._prompt: Prompt | PlainPrompt = PlainPrompt()
        if not start.plain:
            keys = (self._switch_view, self._press)
            self._prompt = Prompt(opened, self._session, self._status, *keys)
        if notice:
            self._console.print(Text(notice, NOTICE))

    def run(self) -> None:
        """Read and answer until the user leaves. Raises LoadError."""
        start = self._start
        hint = " · ".join(["", start.model, *filter(None, [start.description])])
        self._console.print(Text.assemble(("medusa-chat", STRONG), (hint, LABEL)))
        self._console.print(Text(TRY, LABEL))
        if start.model == "bundled":
            self._console.print(Text(NEXT, LABEL))
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
        before = not draft.replaces and self._start.plain
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
        if self._start.plain:  # the terminal has echoed it
            return
        first, *others = folded(sanitize(line))
        self._console.print(Text.assemble((PROMPT, STRONG), first), soft_wrap=True)
        for other in others:
            self._console.print(Text(" " * len(PROMPT) + other), soft_wrap=True)

    def _answer(self, chat: Chat, steps: Generator[Step, None, None]) -> None:
        try:
            show_reply(self._console, chat, steps, plain=self._start.plain)
        except BaseException:  # a signal that ends the program loses nothing either
            if self._transcript is not None:
                self._transcript.keep(chat.session, lambda _: False)
            raise
        self._after_change(chat.session)

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
            self._wait()
            self._greet()
        assert self._chat is not None
        return self._chat

    def _wait(self) -> None:
        """Wait for the model, with a spinner if the screen may be redrawn."""
        if self._start.plain:
            self._console.print(Text(f"loading {self._start.model}…", LABEL))
            self._loading.result()
            return
        with QuietInput() as quiet, Signals(quiet.pause, quiet.resume):
            self._loading.wait(sys.stdout, "your message is next")

    def _greet(self) -> None:
        """Start the session once the model is loaded: print the legend and the notices."""
        if self._chat is not None:
            return
        start = self._start
        engine = self._loading.result()
        sampling = make(Sampling, {**engine.defaults, **start.given})
        session = Session(engine, sampling, start.system)
        colour = not self._console.no_color
        self._chat = Chat(session, start.marks, colour=colour, view=start.view)
        transcript = self._transcript
        if start.saved and transcript:
            session.load(start.saved)
            session.sampling = sampling  # the command line's settings, not the saved ones
            session.system = start.saved.system if start.system is None else start.system
            note = CONTINUING.format(len(session.messages), transcript.path)
            self._console.print(Text(note, LABEL))
        if transcript:
            transcript.follow(session)
        self._console.print(self._chat.legend())
        for line in (describe_defaults(engine.defaults, start.given), sampling.unused(start.given)):
            if line:
                self._console.print(Text(line, LABEL))
        self._notices(session)
        self._console.print()

    def _run_command(self, chat: Chat, line: str) -> None:
        try:
            result = dispatch(chat, line)
            if isinstance(result, Scene):
                result.show(self._console, plain=self._start.plain)
                result = None
        except Exception as error:
            self._complain(error)
            return
        if isinstance(result, Stream):
            self._console.print(Text(result.note, LABEL))
            self._answer(chat, result.steps)
            return
        if isinstance(result, Draft):
            self._draft = result
            if result.note:
                self._console.print(Text(f"{result.note}\n", LABEL))
            return
        if result is not None:
            self._console.print(result)
            self._console.print()
        self._after_change(chat.session)

    def _after_change(self, session: Session) -> None:
        """Write the transcript, and print notices."""
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
