"""The settings with which a chat starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from medusa_chat.config import ChatOptions, Sampling
from medusa_chat.terminal.chat.keeping import Keeper

if TYPE_CHECKING:
    from pathlib import Path

    from medusa_chat.terminal.chat.conversation import Conversation
    from medusa_chat.terminal.chat.kept import Kept
    from medusa_chat.terminal.chat.switching import Models


@dataclass(frozen=True)
class Start:
    """The chat's settings at its start.

    Attributes:
        model: name to show until the engine is loaded.
        history: file of earlier prompts.
        sampling: how replies are decoded.
        options: of the chat.
        description: what the model is and can do, in a few words.
        keeper: keeps the conversation.
        resumed: a kept conversation to go on with.
        saved: the conversation of the transcript, to go on with.
        models: other models to change to.
    """

    model: str
    history: Path
    sampling: Sampling = field(default_factory=Sampling)
    options: ChatOptions = field(default_factory=ChatOptions)
    description: str = ""
    keeper: Keeper = field(default_factory=Keeper)
    resumed: Kept | None = None
    saved: Conversation | None = None
    models: Models | None = None
