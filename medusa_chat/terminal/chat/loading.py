"""A model that is downloaded and loaded on its own thread while the user types."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from threading import Event, Thread
from typing import TYPE_CHECKING, TextIO

from medusa_chat.terminal.chat.errors import LoadError
from medusa_chat.terminal.downloads import Download
from medusa_chat.text import sanitize

if TYPE_CHECKING:
    from medusa_chat.terminal.chat.engine import ChatEngine

DownloadProgress = Callable[[str, int, int], None]  # repository, bytes received, bytes in all

FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
FRAME_SECONDS = 0.1


class Loading:
    """An engine that is being loaded. Starts at once; `result` raises an error of the loader.

    Attributes:
        model: its name.
    """

    def __init__(self, load: Callable[[DownloadProgress], ChatEngine], model: str) -> None:
        self.model = model
        self._load = load
        self._download: Download | None = None
        self._engine: ChatEngine | None = None
        self._error: BaseException | None = None
        # Not the thread's own join: on Python 3.11 an interrupt of that marks a thread as ended.
        self._ended = Event()
        Thread(target=self._run, name="load", daemon=True).start()

    def _run(self) -> None:
        try:
            self._engine = self._load(self._downloaded)
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()

    def _downloaded(self, name: str, received: int, total: int) -> None:
        if self._download is None or self._download.name != name:
            self._download = Download(name)
        self._download.update(received, total)

    def status(self) -> str:
        """Say what is going on, after a frame of a spinner."""
        frame = FRAMES[int(time.monotonic() / FRAME_SECONDS) % len(FRAMES)]
        if self._download and not self._download.done:
            return f"{frame} downloading {self._download}"
        return f"{frame} loading {self.model}…"

    @property
    def done(self) -> bool:
        """True once loading has ended, well or badly."""
        return self._ended.is_set()

    @property
    def failure(self) -> LoadError | None:
        """The error that ended loading, or None."""
        return LoadError(self._error) if self.done and self._error is not None else None

    def result(self) -> ChatEngine:
        """Wait for the engine. Raises LoadError if it could not be loaded."""
        self._ended.wait()
        if self._error is not None:
            raise LoadError(self._error)
        assert self._engine is not None
        return self._engine

    def wait(self, out: TextIO, hint: str) -> ChatEngine:
        """Show status and hint on the current line until `result` is there.

        Text that libraries write to standard error appears afterwards.
        """
        warnings = io.StringIO()
        try:
            with redirect_stderr(warnings):
                while not self.done:
                    out.write(f"\r{self._status_line(out, hint)}\x1b[K")
                    out.flush()
                    self._ended.wait(FRAME_SECONDS)
        finally:
            out.write("\r\x1b[K")
            out.flush()
            sys.stderr.write(warnings.getvalue())
        return self.result()

    def _status_line(self, out: TextIO, hint: str) -> str:
        """Join status and hint if both fit in a row."""
        # COLUMNS may be stale, and the loading thread may have redirected sys.stdout.
        width = os.get_terminal_size(out.fileno()).columns - 1
        status = sanitize(self.status())
        line = f"{status} · {hint}"
        return line if len(line) < width else status[:width]
