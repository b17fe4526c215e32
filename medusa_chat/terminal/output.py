"""The way out: all text that a command prints is made safe here, JSON excepted."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from rich.console import Console
from rich.segment import Segment

from medusa_chat.text import one_line, sanitize

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import ConsoleOptions, RenderableType


class SafeConsole(Console):
    """A console of rich whose texts are data: no markup, no escape sequences but rich's own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **settings})

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render, and sanitize all text that is no control code of rich."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(sanitize(segment.text), segment.style)

    def on_broken_pipe(self) -> NoReturn:
        """Leave the end to the command: rich would exit with status 1 and say nothing."""
        raise BrokenPipeError


def open_streams() -> None:
    """Replace closed standard streams, and let no character stop the output."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # Open as long as the program runs, as the stream that it replaces.
            setattr(sys, name, open("/dev/null", mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")


def say(text: str, *, end: str = "\n") -> None:
    """Print text on standard output."""
    print(sanitize(text), end=end, flush=True)


def warn(text: str) -> None:
    """Print a notice or an error as one line on standard error."""
    print(f"medusa-chat: {one_line(text)}", file=sys.stderr)


def print_json(document: Any, *, indent: int | None = None, file: TextIO | None = None) -> None:
    """Print a JSON document; its escapes make it safe, and its reader gets the text as it is."""
    print(json.dumps(document, indent=indent), file=file, flush=True)
