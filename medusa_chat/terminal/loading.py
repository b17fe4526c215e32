"""The model loads on a thread of its own while the user may already type."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from threading import Thread
from typing import TextIO

from medusa_chat.events import ChatEngine

FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
FRAME_SECONDS = 0.1


def frame() -> str:
    """The picture of the spinner now."""
    return FRAMES[int(time.monotonic() / FRAME_SECONDS) % len(FRAMES)]


class Loading:
    """An engine on its way. Starts on construction; a failure waits here until `result` raises it."""

    def __init__(self, load: Callable[[], ChatEngine]) -> None:
        self._load = load
        self._engine: ChatEngine | None = None
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="load", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._engine = self._load()
        except BaseException as error:
            self._error = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    @property
    def failure(self) -> LoadFailed | None:
        """Why there will be no engine; None while it loads and once it is there."""
        return LoadFailed(self._error) if self.done and self._error is not None else None

    def result(self) -> ChatEngine:
        """Wait for the engine. Raises LoadFailed if it could not be loaded."""
        self._thread.join()
        if self._engine is None:
            raise LoadFailed(self._error)
        return self._engine

    def wait(self, out: TextIO, text: str) -> ChatEngine:
        """Like `result`, with a spinner on the current line meanwhile; what goes to standard error waits until then."""
        said = io.StringIO()
        try:
            with redirect_stderr(said):
                while not self.done:
                    out.write(f"\r{frame()} {text}\x1b[K")
                    out.flush()
                    self._thread.join(FRAME_SECONDS)
        finally:
            out.write("\r\x1b[K")
            out.flush()
            sys.stderr.write(said.getvalue())
        return self.result()


class LoadFailed(Exception):
    """The model could not be loaded; carries the reason."""

    def __init__(self, reason: BaseException | None) -> None:
        super().__init__(str(reason))
        self.reason = reason
