"""A conversation as rows of text: on the screen when it is resumed, and in exports."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from rich.text import Text

from medusa_chat.sampling import CHAT_DEFAULTS, Sampling
from medusa_chat.terminal.chat.message import PROMPT, folded
from medusa_chat.terminal.markdown import MarkdownFlow
from medusa_chat.terminal.reports.tables import shown
from medusa_chat.terminal.theme import LABEL, STRONG, head_mark, head_style
from medusa_chat.terminal.thoughts import answer_of
from medusa_chat.terminal.wrapping import Flow
from medusa_chat.text import sanitize

if TYPE_CHECKING:
    from collections.abc import Iterator

    from medusa_chat.config import View
    from medusa_chat.terminal.chat.conversation import Conversation, Runs

SHOWN_TURNS = 2  # of a conversation that is resumed


def message_rows(text: str, *, whole: bool = False) -> list[Text]:
    """Return a user's message as the chat echoes it: folded if it is long, unless `whole`."""
    safe = sanitize(text)
    first, *others = safe.split("\n") if whole else folded(safe)
    rows = [Text.assemble((PROMPT, STRONG), first)]
    return rows + [Text(" " * len(PROMPT) + other) for other in others]


def reply_rows(text: str, runs: Runs, view: View, width: int, marks: bool) -> list[Text]:
    """Return a reply as the chat shows it, coloured by who proposed it."""
    flow = Flow() if view == "heads" else MarkdownFlow(view)
    start = 0
    skipped = len(text) - len(answer_of(text))  # thoughts
    for head, length in runs or ((0, len(text)),):
        piece = text[max(start, skipped) : start + length]
        flow.feed(piece, head_style(head), head_mark(head) if marks else "")
        start += length
    return flow.rest(width)


def conversation_rows(
    conversation: Conversation,
    view: View,
    width: int,
    *,
    marks: bool = False,
    turns: int | None = None,
) -> Iterator[Text]:
    """Yield the rows of a conversation, with a blank one after each reply.

    Args:
        conversation: to be shown.
        view: of heads and Markdown.
        width: of the screen.
        marks: mark the heads' tokens.
        turns: the last ones to show; None shows all, and no message folded.
    """
    first = first_message(conversation, turns)
    if first:
        yield Text(f"… {first} earlier messages …", LABEL)
        yield Text()
    for index, message in enumerate(conversation.messages[first:], first):
        if message["role"] == "user":
            yield from message_rows(message["content"], whole=turns is None)
        else:
            runs = conversation.heads[index] if index < len(conversation.heads) else ()
            yield from reply_rows(message["content"], runs, view, width, marks)
            yield Text()


def first_message(conversation: Conversation, turns: int | None) -> int:
    """Return the index at which the last `turns` turns begin."""
    roles = [message["role"] for message in conversation.messages]
    begins = [index for index, role in enumerate(roles) if role == "user"]
    return begins[-turns] if turns is not None and len(begins) > turns else 0


def settings_line(conversation: Conversation) -> str:
    """Name the settings of a conversation that are not the defaults, in one line."""
    sampling, defaults = conversation.sampling, Sampling(**CHAT_DEFAULTS)
    parts = [f"mode {sampling.mode}"]
    for each in fields(Sampling):
        value = getattr(sampling, each.name)
        if each.name != "mode" and value != getattr(defaults, each.name):
            parts.append(f"{each.name} {shown(value)}")
    return ", ".join(parts)
