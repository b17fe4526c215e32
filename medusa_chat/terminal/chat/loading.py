"""The model is downloaded and loaded on a thread of its own while the user may already type."""

from __future__ import annotations

import io
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from threading import Thread
from typing import TYPE_CHECKING, TextIO

from medusa_chat.terminal.downloads import Download

if TYPE_CHECKING:
    from medusa_chat.terminal.chat.engine import ChatEngine

Progress = Callable[[str, int, int], None]  # what is downloaded, bytes there, bytes in all

FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
FRAME_SECONDS = 0.1


class Loading:
    """An engine on its way. Starts on construction; a failure waits here until `result` raises it."""

    def __init__(self, load: Callable[[Progress], ChatEngine], model: str) -> None:
        self._load, self._model = load, model
        self._download: Download | None = None
        self._engine: ChatEngine | None = None
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="load", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._engine = self._load(self._downloaded)
        except BaseException as error:
            self._error = error

    def _downloaded(self, name: str, there: int, total: int) -> None:
        if self._download is None or self._download.name != name:
            self._download = Download(name)
        self._download.update(there, total)

    def status(self) -> str:
        """What is going on now, behind the picture of a spinner."""
        frame = FRAMES[int(time.monotonic() / FRAME_SECONDS) % len(FRAMES)]
        if self._download and not self._download.done:
            return f"{frame} downloading {self._download}"
        return f"{frame} loading {self._model}…"

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

    def wait(self, out: TextIO, hint: str) -> ChatEngine:
        """Like `result`, with status and hint on the current line; what goes to standard error waits until then."""
        said = io.StringIO()
        try:
            with redirect_stderr(said):
                while not self.done:
                    room, status = shutil.get_terminal_size().columns - 1, self.status()
                    line = (
                        f"{status} · {hint}"
                        if len(status) + len(hint) + 3 < room
                        else status[:room]
                    )
                    out.write(f"\r{line}\x1b[K")
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
