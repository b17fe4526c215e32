"""A conversation with an engine: its turns, its settings and its measurements."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from medusa_chat.config import Message, Sampling, UserError
from medusa_chat.stats import Stats
from medusa_chat.terminal.chat.conversation import Conversation, write_conversation

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from medusa_chat.events import Step
    from medusa_chat.terminal.chat.engine import ChatEngine

SEEDS = 2**32


class Session:
    """A conversation with an engine.

    Attributes:
        last: measurements of the last reply.
        conversation: measurements of all replies.
    """

    def __init__(self, engine: ChatEngine, sampling: Sampling, system: str | None = None) -> None:
        self.engine = engine
        self.sampling = sampling
        self.system = engine.system if system is None else system
        self.messages: list[Message] = []
        self.last = Stats()
        self.conversation = Stats()

    def ask(self, text: str) -> Generator[Step, None, None]:
        """Stream the reply to `text`. Raises whatever the engine raises.

        However the stream ends, its text stays in the conversation. Without any text the whole
        turn is dropped.
        """
        return self._reply([*self.messages, {"role": "user", "content": text}])

    def regen(self) -> Generator[Step, None, None]:
        """Stream a new reply to the last user turn, with the next seed if the mode samples.

        The old reply stays until the new one has text.
        """
        turns = self.messages[: self._last_user_turn("there is no reply to renew yet") + 1]
        if not self.sampling.greedy:
            self.sampling = replace(self.sampling, seed=(self.sampling.seed + 1) % SEEDS)
        return self._reply(turns)

    def _reply(self, turns: list[Message]) -> Generator[Step, None, None]:
        self.last = Stats()  # now: the panel is drawn before the first step
        return self._steps(turns)

    def _steps(self, turns: list[Message]) -> Generator[Step, None, None]:
        before = self.messages
        self.messages = turns
        text = ""
        prompt = [*self._system_message(), *turns]
        try:
            steps = cast("Generator[Step, None, None]", self.engine.generate(prompt, self.sampling))
            with closing(steps):
                for step in steps:
                    text += step.text
                    self.last.add(step)
                    self.conversation.add(step)
                    yield step
        finally:
            if text.strip():
                self.messages = [*turns, {"role": "assistant", "content": text}]
            else:
                self.messages = before

    def _system_message(self) -> list[Message]:
        # An empty one replaces the model's own.
        if self.system or self.engine.system:
            return [{"role": "system", "content": self.system}]
        return []

    def undo(self) -> str:
        """Take back the last user turn and its reply; return the turn's text."""
        index = self._last_user_turn("there is nothing to take back")
        text = self.messages[index]["content"]
        self.messages = self.messages[:index]
        return text

    def _last_user_turn(self, complaint: str) -> int:
        for index in reversed(range(len(self.messages))):
            if self.messages[index]["role"] == "user":
                return index
        raise UserError(complaint)

    def reset(self) -> None:
        """Forget all turns and measurements; keep the system prompt and the settings."""
        self.messages = []
        self.last = Stats()
        self.conversation = Stats()

    def save(self, path: Path) -> None:
        """Write the conversation to a file; overwrite only a saved conversation."""
        name = self.engine.name
        write_conversation(path, Conversation(name, self.system, self.sampling, self.messages))

    def load(self, conversation: Conversation) -> None:
        """Replace this conversation with a saved one."""
        self.reset()
        self.system = conversation.system
        self.sampling = conversation.sampling
        self.messages = list(conversation.messages)
