"""A conversation with an engine: its turns, its settings and its measurements."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from medusa_chat.config import Message, UserError
from medusa_chat.sampling import MAX_SEED
from medusa_chat.stats import Stats
from medusa_chat.terminal.chat.conversation import Conversation, Runs, write_conversation
from medusa_chat.terminal.chat.growing import Answer, Growing
from medusa_chat.terminal.chat.overflow import Window
from medusa_chat.terminal.thoughts import Thoughts, answer_of, without_thoughts

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence
    from pathlib import Path

    from medusa_chat.events import Step
    from medusa_chat.sampling import Sampling
    from medusa_chat.terminal.chat.engine import ChatEngine


class Session:
    """A conversation with an engine.

    Attributes:
        last: measurements of the last reply.
        conversation: measurements of all replies.
        answers: the replies to the last message, in the order in which they came.
        answer: the one of them that the conversation goes on with.
        growing: the reply that streams now, or streamed last.
        heads: who proposed the text of each reply.
        number: counts the conversations that were begun or loaded.
        names: completions that only the program knows, by the command that takes them.
        thoughts: of the last reply, which the view feeds.
    """

    def __init__(self, engine: ChatEngine, sampling: Sampling, system: str | None = None) -> None:
        self.engine = engine
        self.sampling = sampling
        self.system = engine.system if system is None else system
        self.messages: list[Message] = []
        self.growing = Growing([])
        self.heads: dict[str, Runs] = {}
        self.names: dict[str, Callable[[], Iterable[str]]] = {}
        self.number = 0
        self.last = Stats()
        self.conversation = Stats()
        self._window = Window()
        self.thoughts = Thoughts()
        self._typed: dict[str, str] = {}  # messages by their text as the model reads it
        self._forget_answers()

    def _forget_answers(self) -> None:
        self.answers: list[Answer] = []
        self.answer: Answer | None = None

    def ask(
        self, text: str, *, replacing: bool = False, typed: str = ""
    ) -> Generator[Step, None, None]:
        """Stream the reply to `text`. Raises whatever the engine raises.

        However the stream ends, its text stays in the conversation. Without any text the whole
        turn is dropped.

        Args:
            text: the user's message.
            replacing: it takes the place of the last message and its reply.
            typed: the message as the user typed it, if `text` holds more.
        """
        self._typed[text] = typed or text
        turns = self.messages
        if replacing:
            turns = turns[: self._last_user_turn("there is no message to replace yet")]
        return self._reply([*turns, {"role": "user", "content": text}])

    def regen(self) -> Generator[Step, None, None]:
        """Stream a new reply to the last user turn, with the next seed if the mode samples.

        The old reply stays until the new one has text.
        """
        turns = self.messages[: self._last_user_turn("there is no reply to renew yet") + 1]
        if not self.sampling.greedy:
            self.sampling = replace(self.sampling, seed=(self.sampling.seed + 1) % (MAX_SEED + 1))
        earlier = self.answers
        if not earlier and self.messages[len(turns) :]:  # of a conversation that was loaded
            earlier = [Answer(self.messages[-1]["content"], (), cut=False)]
        return self._reply(turns, earlier=earlier)

    def go_on(self) -> Generator[Step, None, None]:
        """Stream more of the last reply, if it was cut. The cache still holds what it said."""
        turns = self.messages[: self._last_user_turn("there is no reply to continue yet") + 1]
        answer = self.answer
        if answer is None or not answer.cut:
            raise UserError("the last reply is complete; there is nothing to continue")
        earlier = [each for each in self.answers if each is not answer]
        return self._reply(turns, earlier=earlier, begun=answer)

    def choose(self, number: int) -> None:
        """Go on with another one of `answers`, counted from 1. Raises UserError."""
        if not 1 <= number <= len(self.answers):
            raise UserError(f"there are {len(self.answers)} replies; /replies lists them")
        self.answer = self.answers[number - 1]
        turns = self.messages[: self._last_user_turn("there is no reply yet") + 1]
        self.messages = [*turns, {"role": "assistant", "content": self.answer.text}]

    def question(self, text: str = "") -> list[Message]:
        """Return the prompt up to the last message, or that of `text` alone. Raises UserError."""
        turns: list[Message] = [{"role": "user", "content": text}]
        if not text:
            turns = self.messages[
                : self._last_user_turn("there is no message yet: write one after the command") + 1
            ]
        if not text:
            return self._prompt(turns)
        return [*self._system_message(), *turns]

    def last_message(self) -> str:
        """Return the user's last message as it was typed. Raises UserError."""
        index = self._last_user_turn("there is no message to edit yet")
        content = self.messages[index]["content"]
        return self._typed.get(content, content)

    def last_reply(self) -> str:
        """Return the last reply. Raises UserError."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise UserError("there is no reply to copy yet")
        return answer_of(self.messages[-1]["content"])

    def _reply(
        self, turns: list[Message], *, earlier: Iterable[Answer] = (), begun: Answer | None = None
    ) -> Generator[Step, None, None]:
        self.last = Stats()  # now: the panel is drawn before the first step
        begun = begun or Answer("", (), cut=True)
        self.growing = Growing(turns, begun.text, [*self.heads.get(begun.text, ())])
        return self._steps(self.growing, list(earlier), begun)

    def _steps(
        self, growing: Growing, earlier: list[Answer], begun: Answer
    ) -> Generator[Step, None, None]:
        before = self.messages
        turns = self.messages = growing.turns
        ids = [*begun.ids]
        try:
            if not growing.text:
                growing.append(self.engine.template.opening(self._prompt(turns)))
            self.thoughts = Thoughts(growing.text)
            with closing(self._decoded(turns, ids)) as steps:
                for step in steps:
                    growing.add(step)
                    ids += [token.id for token in step.tokens]
                    self.last.add(step)
                    self.conversation.add(step)
                    yield step
        finally:
            if growing.said:
                self.messages = growing.messages
                self.heads[growing.text] = tuple(growing.runs)
                cut = self.last.finish in (None, "length", "context", "loop")
                self.answer = Answer(growing.text, tuple(ids), cut)
                self.answers = [*earlier, self.answer]
            else:
                self.messages = before

    def _decoded(self, turns: list[Message], begun: Sequence[int]) -> Generator[Step, None, None]:
        """Decode a reply; where the context is full, go on without the oldest turns."""
        ids = list(begun)
        sampling = self.sampling
        while True:
            full = False
            prompt: list[Message] | list[int] = self._prompt(turns, len(ids))
            if ids:
                prompt = [*self.engine.encode(prompt), *ids]
            generated = self.engine.generate(prompt, sampling)
            with closing(cast("Generator[Step, None, None]", generated)) as steps:
                for step in steps:
                    ids += [token.id for token in step.tokens]
                    full = step.finish == "context" and self._window.narrows(sampling, turns)
                    yield replace(step, finish=None) if full else step
            if not full:
                return
            left = self.sampling.max_new_tokens - (len(ids) - len(begun))
            sampling = replace(sampling, max_new_tokens=max(left, 1))

    def _prompt(self, turns: list[Message], begun: int = 0) -> list[Message]:
        if not self.engine.template.drops_thoughts:
            turns = without_thoughts(turns)
        system = self._system_message()
        return self._window.prompt(self.engine, self.sampling, system, turns, begun)

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
        self._window.widen()
        self._forget_answers()
        return text

    def _last_user_turn(self, complaint: str) -> int:
        for index in reversed(range(len(self.messages))):
            if self.messages[index]["role"] == "user":
                return index
        raise UserError(complaint)

    def reset(self) -> None:
        """Forget all turns and measurements; keep the system prompt and the settings."""
        self._forget_answers()
        self._typed = {}
        self._window.forget()
        self.messages = []
        self.growing = Growing([])
        self.heads = {}
        self.number += 1
        self.last = Stats()
        self.conversation = Stats()

    def record(self, growing: Growing | None = None) -> Conversation:
        """Return the conversation to be kept; with `growing` up to the reply that streams."""
        messages = growing.messages if growing else self.messages
        known = self.heads | ({growing.text: tuple(growing.runs)} if growing else {})
        replies = (each["content"] if each["role"] == "assistant" else "" for each in messages)
        heads = tuple(known.get(reply, ()) for reply in replies)
        return Conversation(self.engine.name, self.system, self.sampling, [*messages], heads)

    def use(self, engine: ChatEngine) -> None:
        """Go on with another model, which reads the conversation anew; figures begin anew too."""
        if self.system == self.engine.system:
            self.system = engine.system
        self.engine = engine
        self._window.forget()
        self.last = Stats()
        self.conversation = Stats()
        # Their ids are those of the other model's tokenizer.
        kept = {id(each): replace(each, ids=(), cut=False) for each in self.answers}
        self.answer = kept.get(id(self.answer))
        self.answers = [*kept.values()]

    def save(self, path: Path) -> None:
        """Write the conversation to a file; overwrite only a saved conversation."""
        write_conversation(path, self.record())

    def load(self, conversation: Conversation) -> None:
        """Replace this conversation with a saved one."""
        self.reset()
        self.system = conversation.system
        self.sampling = conversation.sampling
        self.messages = list(conversation.messages)
        pairs = zip(conversation.messages, conversation.heads, strict=False)
        self.heads = {message["content"]: runs for message, runs in pairs if runs}
