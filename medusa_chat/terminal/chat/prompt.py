"""The prompt: history, completion, several lines, keys and toolbar."""

from __future__ import annotations

import asyncio
import os
from contextlib import redirect_stderr, suppress
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.application import Application, get_app, run_in_terminal
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import emacs_mode, has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.patch_stdout import StdoutProxy
from prompt_toolkit.styles import Style

from medusa_chat.terminal.chat.completion import CommandCompleter
from medusa_chat.terminal.chat.loading import FRAME_SECONDS, Loading
from medusa_chat.terminal.chat.message import PROMPT, goes_on

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from prompt_toolkit.formatted_text import StyleAndTextTuples

    from medusa_chat.config import Editing
    from medusa_chat.terminal.chat.session import Session

KEYS = {"emacs": "Alt+Enter new line · /help", "vi": "vi keys · Ctrl+J new line · /help"}
LEAVE_HINT = "Ctrl+D or /exit leaves"
STYLE = Style.from_dict(
    {"prompt": "bold", "bottom-toolbar": "noreverse dim", "bottom-toolbar.hint": "nodim bold"}
)


class Prompt:
    """Reads messages and erases them: the chat echoes them as it likes.

    `status` returns the left side of the toolbar at each redraw, `switch_view` a hint about the
    next view, and `run` runs a command whose key is pressed.
    """

    def __init__(
        self,
        history: History,
        session: Callable[[], Session | None],
        status: Callable[[], str],
        switch_view: Callable[[], str],
        run: Callable[[str], None],
        editing: Editing = "emacs",
    ) -> None:
        self.cleared = False  # by Ctrl-C, since `read` was called
        self._status = status
        self._switch_view = switch_view
        self._run = run
        self._hint = ""
        self._help = KEYS[editing]
        self._prompt: PromptSession[str] = PromptSession(
            [("class:prompt", PROMPT)],
            multiline=True,
            prompt_continuation=lambda width, *_: " " * width,
            history=history,
            completer=CommandCompleter(session),
            complete_while_typing=True,
            vi_mode=editing == "vi",
            key_bindings=self._keys(),
            bottom_toolbar=self._toolbar,
            enable_open_in_editor=True,
            enable_suspend=True,
            erase_when_done=True,
            tempfile_suffix=".md",
            style=STYLE,
            reserve_space_for_menu=6,
        )
        self._prompt.default_buffer.on_text_changed += lambda _: self._set_hint("")

    def read(self, loading: Loading, when_loaded: Callable[[], None], draft: str = "") -> str:
        """Read a message or command; call `when_loaded` above the prompt if the model is loaded.

        Args:
            loading: the model.
            when_loaded: called once.
            draft: text to begin with.

        Raises:
            EOFError: on Ctrl-D.
            LoadError: the model cannot be loaded.
        """
        self.cleared = False

        def watch() -> None:
            app = get_app()
            app.create_background_task(_watch(app, loading, when_loaded))

        if loading.done:
            return self._prompt.prompt(default=draft)
        # Libraries write to standard error while the model loads: it belongs above the prompt.
        with StdoutProxy(raw=True) as above, redirect_stderr(above):
            return self._prompt.prompt(pre_run=watch, default=draft)

    def _set_hint(self, hint: str) -> None:
        self._hint = hint

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()
        typing = has_focus(DEFAULT_BUFFER)  # not while searching the history

        @keys.add("enter", filter=typing)
        def send(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if not goes_on(buffer.text):
                buffer.validate_and_handle()
                return
            buffer.cursor_position = len(buffer.text)
            buffer.delete_before_cursor(int(buffer.text.endswith("\\")))
            buffer.insert_text("\n")

        @keys.add("escape", "enter", filter=typing & emacs_mode)
        @keys.add("c-j", filter=typing)
        def new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-c", filter=typing)
        def clear(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.current_buffer.reset(append_to_history=True)
                self.cleared = True
            else:
                self._set_hint(LEAVE_HINT)

        @keys.add("escape", "v", filter=typing & emacs_mode)
        def switch_view(_event: KeyPressEvent) -> None:
            self._set_hint(self._switch_view())

        @keys.add("c-t", filter=typing)
        def show_thoughts(_event: KeyPressEvent) -> None:
            run_in_terminal(lambda: self._run("/thoughts"))

        return keys

    def _toolbar(self) -> StyleAndTextTuples:
        left = self._status()
        if self._hint:
            return [("", f"{left}  "), ("class:bottom-toolbar.hint", self._hint)]
        space = get_app().output.get_size().columns - len(left) - len(self._help)
        return [("", left + " " * space + self._help if space > 1 else left)]


async def _watch(app: Application[str], loading: Loading, when_loaded: Callable[[], None]) -> None:
    while not loading.done:
        app.invalidate()
        await asyncio.sleep(FRAME_SECONDS)
    failure = loading.failure
    if failure is None:
        await run_in_terminal(when_loaded)
    elif app.is_running and not app.is_done:
        app.exit(exception=failure)


class KeptHistory(FileHistory):
    """A history in a file. Once that cannot be written, messages stay in memory without a word.

    While `private` is true none is written.
    """

    def __init__(self, path: Path, private: Callable[[], bool]) -> None:
        super().__init__(str(path))
        self._private = private

    def store_string(self, string: str) -> None:
        """Append a message to the file, in a folder that may have been removed."""
        if self._private():
            return
        with suppress(OSError):
            os.makedirs(os.path.dirname(self.filename), exist_ok=True)
            super().store_string(string)

    def load_history_strings(self) -> Iterable[str]:
        """Yield earlier messages, the latest first; none if the file cannot be read."""
        with suppress(OSError):
            yield from super().load_history_strings()


def open_history(path: Path, private: Callable[[], bool]) -> tuple[History, str]:
    """Open the history in a file; if that cannot be written, one in memory, with a notice."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("ab"):
            return KeptHistory(path, private), ""
    except OSError as error:
        notice = f"the prompt history is not saved: {path}: {error.strerror or error}"
        return InMemoryHistory(), notice
