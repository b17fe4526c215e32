"""A conversation that outgrows the context: whole oldest turns are left out of the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medusa_chat.config import Message
    from medusa_chat.sampling import Sampling
    from medusa_chat.terminal.chat.engine import ChatEngine

# Turns are left out when a reply would have less than the first share of the context, and so many
# of them that it has the second: else the cache would be read anew at each message.
LEAST, AFTERWARDS = 1 / 8, 3 / 8
LEFT_OUT = (
    "the context is full: the model no longer reads the oldest turns of this conversation"
    " (/set overflow stop keeps them, and then no reply fits)"
)


class Window:
    """The turns that the model still reads. The system prompt and the last turn always stay."""

    def __init__(self) -> None:
        self._first = 0  # message that the model reads first
        self._announced = False

    def forget(self) -> None:
        """Start anew, for another conversation."""
        self._first = 0
        self._announced = False

    def widen(self) -> None:
        """Read all turns again, as after a turn was taken back."""
        self._first = 0

    def prompt(
        self,
        engine: ChatEngine,
        sampling: Sampling,
        system: Sequence[Message],
        turns: Sequence[Message],
        begun: int = 0,
    ) -> list[Message]:
        """Return the messages that the model reads; leave out more turns if they do not fit.

        Args:
            engine: its context counts, and its notices get a line the first time.
            sampling: its `overflow` may forbid to leave out turns, and it limits the reply.
            system: the system prompt, maybe none.
            turns: all messages of the conversation, which end with one of the user.
            begun: tokens of the reply that are there already.
        """
        if sampling.overflow == "stop":
            return [*system, *turns]
        starts = _user_turns(turns)
        self._first = min(self._first, starts[-1])
        messages = [*system, *turns[self._first :]]
        if self._fits(engine, sampling, messages, begun, LEAST):
            return messages
        for start in (start for start in starts if start > self._first):
            self._first = start
            messages = [*system, *turns[start:]]
            if self._fits(engine, sampling, messages, begun, AFTERWARDS):
                break
        if self._first and not self._announced:
            self._announced = True
            engine.notices.append(LEFT_OUT)
        return messages

    def narrows(self, sampling: Sampling, turns: Sequence[Message]) -> bool:
        """Tell if there are turns that can still be left out."""
        return sampling.overflow == "drop" and self._first < _user_turns(turns)[-1]

    def _fits(
        self,
        engine: ChatEngine,
        sampling: Sampling,
        messages: list[Message],
        begun: int,
        share: float,
    ) -> bool:
        reply = min(sampling.max_new_tokens, int(engine.context * share))
        return len(engine.encode(messages)) + begun + reply <= engine.context


def _user_turns(turns: Sequence[Message]) -> list[int]:
    return [place for place, each in enumerate(turns) if each["role"] == "user"]
