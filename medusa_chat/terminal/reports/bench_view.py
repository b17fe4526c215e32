"""The chat's view of a reply on a screen that nobody sees, to measure its cost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from medusa_chat.config import ChatOptions
from medusa_chat.stats import Stats
from medusa_chat.terminal.output import SafeConsole
from medusa_chat.terminal.panel import panel
from medusa_chat.terminal.view import ReplyView

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from medusa_chat.events import Step
    from medusa_chat.sampling import Sampling


def timed_view(sampling: Sampling) -> Callable[[Iterable[Step]], None]:
    """Return a function that draws a reply as the chat does."""
    # The file stays open as long as the function lives.
    nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    console = SafeConsole(
        file=nowhere, force_terminal=True, color_system="truecolor", width=100, height=30
    )

    def draw(steps: Iterable[Step]) -> None:
        stats = Stats()
        view = ReplyView(
            console,
            lambda width: panel(stats, stats, sampling, width),
            view=ChatOptions().view,
        )
        with view:
            for step in steps:
                stats.add(step)
                view.add(step)

    return draw
