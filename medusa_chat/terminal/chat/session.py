"""A conversation with an engine: what was said, how replies are decoded, and what was measured."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from medusa_chat.config import Message, Sampling, UserError
from medusa_chat.stats import Stats

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from medusa_chat.events import Step
    from medusa_chat.terminal.chat.engine import ChatEngine

SEEDS = 2**32


@dataclass(frozen=True)
class Conversation:
    """What `/save` writes and `/load` reads."""

    model: str
    system: str
    sampling: Sampling
    messages: list[Message]


class Session:
    """The turns of a conversation, and the measurements of its last reply (`last`) and of all (`conversation`)."""

    def __init__(self, engine: ChatEngine, sampling: Sampling, system: str | None = None) -> None:
        self.engine = engine
        self.sampling = sampling
        self.system = engine.system if system is None else system
        self.messages: list[Message] = []
        self.last = Stats()
        self.conversation = Stats()

    def ask(self, text: str) -> Generator[Step, None, None]:
        """Stream the reply to `text`. What was said stays in the conversation however the stream ends; if nothing
        was said, the turn is dropped too. Raises whatever the engine raises.
        """
        yield from self._reply([*self.messages, {"role": "user", "content": text}])

    def regen(self) -> Generator[Step, None, None]:
        """Stream a new reply to the last user turn, with another seed
        where one matters; the old one goes once the new one speaks.
        """
        turns = self.messages[: self._last_user_turn("there is no reply to renew yet") + 1]
        if not self.sampling.greedy:
            self.sampling = replace(self.sampling, seed=(self.sampling.seed + 1) % SEEDS)
        return self._reply(turns)

    def _reply(self, turns: list[Message]) -> Generator[Step, None, None]:
        before = self.messages
        self.messages = turns
        self.last = Stats()
        said: list[str] = []
        try:
            prompt = [*self._system_message(), *turns]
            steps = cast("Generator[Step, None, None]", self.engine.generate(prompt, self.sampling))
            with closing(steps):
                for step in steps:
                    said.append(step.text)
                    self.last.add(step)
                    self.conversation.add(step)
                    yield step
        finally:
            text = "".join(said)
            self.messages = (
                [*turns, {"role": "assistant", "content": text}] if text.strip() else before
            )

    def _system_message(self) -> Iterator[Message]:
        if self.system or self.engine.system:  # an empty one takes the model's own away
            yield {"role": "system", "content": self.system}

    def undo(self) -> str:
        """Take back the last user turn and its reply; returns the turn's text."""
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
        """Forget all turns and measurements; system prompt and settings stay."""
        self.messages = []
        self.last = Stats()
        self.conversation = Stats()

    def save(self, path: Path) -> None:
        """Write the conversation to `path`. Overwrites only a file that is a saved conversation itself."""
        if path.exists():
            read_conversation(path)
        write_conversation(
            path, Conversation(self.engine.name, self.system, self.sampling, self.messages)
        )

    def load(self, conversation: Conversation) -> None:
        """Go on with a saved conversation in place of this one."""
        self.reset()
        self.system = conversation.system
        self.sampling = conversation.sampling
        self.messages = list(conversation.messages)


def write_conversation(path: Path, conversation: Conversation) -> None:
    """Write all or nothing: a temporary file beside `path` takes its place when it is complete."""
    path = path.resolve()
    text = json.dumps(asdict(conversation), ensure_ascii=False, indent=2) + "\n"
    temporary = None
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def read_conversation(path: Path) -> Conversation:
    """Read what `write_conversation` wrote; anything else is a UserError that names the file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} is not a saved conversation: {error}") from None
    try:
        return _conversation(document)
    except UserError as error:
        raise UserError(f"{path} is not a saved conversation: {error}") from None


def _conversation(document: Any) -> Conversation:
    if not isinstance(document, dict) or set(document) != {
        field.name for field in fields(Conversation)
    }:
        raise UserError("it must hold model, system, sampling and messages")
    if not isinstance(document["model"], str) or not isinstance(document["system"], str):
        raise UserError("model and system must be text")
    messages = document["messages"]
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise UserError("a message holds a role (user or assistant) and content, both text")
    return Conversation(
        document["model"], document["system"], _sampling(document["sampling"]), messages
    )


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and message["role"] in ("user", "assistant")
        and isinstance(message["content"], str)
    )


def _sampling(settings: Any) -> Sampling:
    defaults = asdict(Sampling())
    if not isinstance(settings, dict):
        raise UserError("sampling must be a mapping")
    for name, value in settings.items():
        if name not in defaults:
            raise UserError(f"there is no setting {name!r}")
        if not _like(value, defaults[name]):
            raise UserError(f"setting {name} cannot be {value!r}")
    stop = tuple(settings.get("stop", ()))
    return Sampling(**{**settings, "stop": stop})


def _like(value: Any, default: Any) -> bool:
    """Whether a value of JSON may stand where `default` stands."""
    if isinstance(default, tuple):
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)
