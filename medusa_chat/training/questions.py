"""The job of distill, and the questions and answers of those who do it. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, Protocol

from medusa_chat.config import UserError
from medusa_chat.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class DistillJob:
    """How to draw replies. The result depends on it, the model and the prompts.

    Attributes:
        turns: user turns to answer in each conversation.
        batch: conversations to answer at once.
        system: system message for conversations that have none; "" for no message.
        template: a conversation template of fastchat, in place of the model's own. A server has
            its own.
    """

    turns: int
    batch: int
    max_new_tokens: int
    temperature: float
    seed: int
    system: str = ""
    template: str = ""

    def __post_init__(self) -> None:
        # Sampling checks the values.
        Sampling(temperature=self.temperature, max_new_tokens=self.max_new_tokens, seed=self.seed)
        if not isfinite(self.temperature):
            raise UserError(f"temperature must be a finite number, not {self.temperature}")


@dataclass(frozen=True)
class Question:
    """A conversation that waits for the assistant.

    Attributes:
        index: number of its prompt.
        turn: number of its last user turn.
    """

    index: int
    turn: int
    messages: list[dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """The text of a model's answer; `cut` if it stopped at the longest length."""

    text: str
    cut: bool


class Answerer(Protocol):
    """A model that answers: LocalModel or Server."""

    name: str

    def answer(self, questions: Sequence[Question]) -> list[Answer | None]:
        """Answer questions of one turn; None for one that gets no text."""
