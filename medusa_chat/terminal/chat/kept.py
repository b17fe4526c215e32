"""A kept conversation as records, and as rows of the database."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from medusa_chat.terminal.chat.conversation import (
    Conversation,
    Runs,
    is_message,
    readable_sampling,
    runs_of,
)
from medusa_chat.text import encodable, one_line

if TYPE_CHECKING:
    from medusa_chat.config import Message

YEAR_9000 = 221_845_392_000.0  # seconds since 1970; later ones are no dates everywhere
TITLE = 60  # characters of the first message that serve as a title


class Place(NamedTuple):
    """A model and its heads, as `--model` and `--heads` name them."""

    model: str | None = None
    heads: str | None = None

    def whole(self) -> Place:
        """Return the place with its folders and files named from the root on."""
        return Place(*map(_whole, self))


def _whole(name: str | None) -> str | None:
    return str(Path(name).resolve()) if name and Path(name).exists() else name


@dataclass(frozen=True)
class Summary:
    """A kept conversation in a list.

    Attributes:
        number: names it for good; no other one gets the same number.
        changed: seconds since 1970.
        turns: the user's messages.
        title: the beginning of the first message.
    """

    number: int
    name: str
    model: str
    changed: float
    turns: int
    title: str

    @property
    def label(self) -> str:
        """The number, with the name if there is one."""
        return f"{self.number} ({self.name})" if self.name else str(self.number)


class Kept(NamedTuple):
    """A conversation as the database holds it; `version` counts its changes."""

    number: int
    name: str
    version: int
    conversation: Conversation
    place: Place


def message_rows(conversation: Conversation) -> list[tuple[str, str, str]]:
    """Return the messages as the table holds them: role, content, heads."""
    heads = [*conversation.heads, *([()] * len(conversation.messages))]
    pairs = zip(conversation.messages, heads, strict=False)
    return [
        (message["role"], encodable(message["content"]), json.dumps(runs))
        for message, runs in pairs
    ]


def settings_columns(conversation: Conversation, place: Place) -> tuple[str, str]:
    """Return the columns `model` and `settings`."""
    settings = {
        "system": conversation.system,
        "sampling": asdict(conversation.sampling),
        "place": place._asdict(),
    }
    return encodable(conversation.model), encodable(json.dumps(settings))


def read_rows(model: str, settings: Any, turns: list[Any]) -> tuple[Conversation, Place]:
    """Read a conversation. Raises ValueError if another program has written it."""
    place = settings.get("place") or {} if isinstance(settings, dict) else None
    if not isinstance(place, dict):
        raise ValueError("its settings are damaged")
    messages: list[Message] = [{"role": role, "content": content} for role, content, _ in turns]
    if not all(map(is_message, messages)):
        raise ValueError("a message of it is damaged")
    conversation = Conversation(
        text_of(model),
        text_of(settings.get("system")),
        readable_sampling(settings.get("sampling")),
        messages,
        tuple(_runs(heads, content) for _, content, heads in turns),
    )
    return conversation, Place(
        text_of(place.get("model")) or None, text_of(place.get("heads")) or None
    )


def summary(row: tuple[Any, ...]) -> Summary:
    """Read a row of the list; a damaged value hides neither its row nor the others."""
    number, name, model, changed, turns, first = row
    moment = changed if isinstance(changed, float) and 0 <= changed < YEAR_9000 else 0.0
    return Summary(
        number, text_of(name), text_of(model), moment, turns, one_line(text_of(first), TITLE)
    )


def _runs(heads: Any, content: str) -> Runs:
    """Read the colours of a message; damaged ones are none."""
    with suppress(ValueError, TypeError, RecursionError):
        return runs_of(json.loads(heads), content)
    return ()


def text_of(value: Any) -> str:
    """Return a text of the database, where a program may have put anything; "" for others."""
    return value if isinstance(value, str) else ""
