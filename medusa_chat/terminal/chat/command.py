"""What a slash-command is. `commands` fills the registry, which dispatch, `/help` and completion read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import RenderableType

from medusa_chat.terminal.chat.session import Session
from medusa_chat.terminal.theme import legend

if TYPE_CHECKING:
    from rich.text import Text

    from medusa_chat.events import Step


@dataclass
class Chat:
    """What a command works on."""

    session: Session
    marks: bool = False
    colour: bool = True

    def legend(self) -> Text:
        engine = self.session.engine
        return legend(engine.heads, marks=self.marks, colour=self.colour, copied=engine.trees.copies)


@dataclass(frozen=True)
class Reply:
    """A command's result that is to be streamed like the answer to a message."""

    steps: Generator[Step, None, None]
    note: str = ""


class Leave(Exception):
    """Raised by the command that ends the chat."""


class WrongArguments(Exception):
    """Raised by a handler whose argument does not fit its usage."""


Result = RenderableType | Reply | None
Handler = Callable[[Chat, str], Result]
Values = Callable[[Session | None, list[str]], Iterable[str]]


@dataclass(frozen=True)
class Command:
    """One slash-command.

    Attributes:
        usage: its arguments, as help and complaints show them.
        values: completions of the next argument word, given the words before it.
        takes_path: complete file names too.
    """

    name: str
    handler: Handler
    usage: str = ""
    values: Values | None = None
    takes_path: bool = False

    @property
    def help(self) -> str:
        return " ".join((self.handler.__doc__ or "").split())

    @property
    def invocation(self) -> str:
        return f"/{self.name} {self.usage}".rstrip()


REGISTRY: dict[str, Command] = {}
ALIASES = {"quit": "exit"}


def command(
    name: str, usage: str = "", *, values: Values | None = None, takes_path: bool = False
) -> Callable[[Handler], Handler]:
    """Register a handler (chat, argument text) -> what to print. Its docstring is the help."""

    def register(handler: Handler) -> Handler:
        REGISTRY[name] = Command(name, handler, usage, values, takes_path)
        return handler

    return register
