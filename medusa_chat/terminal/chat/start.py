"""The settings with which a chat starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from medusa_chat.config import ChatOptions
from medusa_chat.terminal.chat.keeping import Keeper

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

    from medusa_chat.terminal.chat.conversation import Conversation
    from medusa_chat.terminal.chat.kept import Kept
    from medusa_chat.terminal.chat.switching import Models
    from medusa_chat.terminal.chat.transcript import Transcript


@dataclass(frozen=True)
class Start:
    """The chat's settings at its start.

    Attributes:
        model: name to show until the engine is loaded.
        history: file of earlier prompts.
        given: settings of Sampling by name; the others are the model's or the usual ones.
        options: of the chat.
        description: what the model is and can do, in a few words.
        keeper: keeps the conversation.
        resumed: a kept conversation to go on with.
        transcript: file of the conversation, written after each change.
        saved: the conversation of that file, to go on with.
        models: other models to change to.
    """

    model: str
    history: Path
    given: Mapping[str, Any] = field(default_factory=dict)
    options: ChatOptions = field(default_factory=ChatOptions)
    description: str = ""
    keeper: Keeper = field(default_factory=Keeper)
    resumed: Kept | None = None
    transcript: Transcript | None = None
    saved: Conversation | None = None
    models: Models | None = None
