"""The registry of slash-commands, which dispatch, `/help` and completion read."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import RenderableType

from medusa_chat.config import UserError
from medusa_chat.terminal.chat.errors import UsageError
from medusa_chat.terminal.chat.keeping import Keeper
from medusa_chat.terminal.chat.session import Session
from medusa_chat.terminal.theme import legend

if TYPE_CHECKING:
    from rich.text import Text

    from medusa_chat.config import View
    from medusa_chat.events import Step


@dataclass
class Chat:
    """A session and how it is shown: the object that commands work on.

    Attributes:
        explained: settings of which the user has read that the mode does not use them.
    """

    session: Session
    marks: bool = False
    colour: bool = True
    view: View = "both"
    keeper: Keeper = field(default_factory=Keeper)
    explained: set[str] = field(default_factory=set)
    open_thoughts: bool = False

    def legend(self) -> Text:
        """Explain the colours of this model's heads."""
        engine = self.session.engine
        copied = engine.trees.copies
        return legend(engine.heads, marks=self.marks, colour=self.colour, copied=copied)


@dataclass(frozen=True)
class Stream:
    """The result of a command whose steps are streamed like the reply to a message."""

    steps: Generator[Step, None, None]
    note: str


@dataclass(frozen=True)
class Draft:
    """The result of a command that puts text into the prompt.

    Attributes:
        replaces: the message takes the place of the last one.
        note: printed above it.
    """

    text: str
    replaces: bool = True
    note: RenderableType = ""


@dataclass(frozen=True)
class Switch:
    """The result of a command that changes the model."""

    name: str


@dataclass(frozen=True)
class Scene:
    """The result of a command that draws by itself.

    Attributes:
        show: takes the console and `plain`, which forbids to redraw.
    """

    show: Callable[..., None]


Result = RenderableType | Stream | Draft | Switch | Scene | None
Handler = Callable[..., Result]
Values = Callable[[Session | None, list[str]], Iterable[str]]

GROUPS = {  # with examples
    "Talk": "/edit · /regen · /copy code · /file notes.txt · /save talk.json",
    "Keep": "/chats fox · /resume 3 · /name fox tale · /export tale.html",
    "Look": "/view heads · /marks on · /stats · /race Tell me a fairy tale.",
    "Decode": "/typical · /set temperature 0.3 · /tree chain-4",
}


@dataclass(frozen=True)
class Command:
    """One slash-command.

    Attributes:
        handler: takes (chat, argument text), or only the chat if there is no usage.
        usage: the arguments, as help and error messages show them.
        values: completions of the next argument word, given the words before it.
        takes_path: complete file names too.
        group: its heading in `/help`.
        destroys: loses something that was said, and so is never proposed for a misspelt name.
    """

    name: str
    handler: Handler
    usage: str = ""
    values: Values | None = None
    takes_path: bool = False
    group: str = ""
    destroys: bool = False

    @property
    def described(self) -> str:
        """The help, with the command's other names."""
        others = ", ".join(f"/{alias}" for alias, name in ALIASES.items() if name == self.name)
        return f"{self.help} Also {others}." if others else self.help

    @property
    def help(self) -> str:
        """The handler's docstring in one line."""
        return " ".join((self.handler.__doc__ or "").split())

    @property
    def invocation(self) -> str:
        """The command as it is typed, with its arguments."""
        return f"/{self.name} {self.usage}".rstrip()

    def run(self, chat: Chat, argument: str) -> Result:
        """Call the handler. Raises UserError for an argument that the command does not take."""
        if not self.usage:
            if argument:
                raise UserError(f"{self.invocation} takes no argument")
            return self.handler(chat)
        try:
            return self.handler(chat, argument)
        except UsageError:
            raise UserError(f"usage: {self.invocation}") from None


REGISTRY: dict[str, Command] = {}
ALIASES = {
    "?": "help",
    "bye": "exit",
    "clear": "reset",
    "new": "reset",
    "q": "exit",
    "quit": "exit",
    "retry": "regen",
}
LEAVING = ("bye", "exit", "quit")  # words that alone may be meant as a command


def in_group(group: str) -> Callable[..., Callable[[Handler], Handler]]:
    """Return a decorator that registers the handlers of a group of commands."""

    def command(
        name: str,
        usage: str = "",
        *,
        values: Values | None = None,
        takes_path: bool = False,
        destroys: bool = False,
    ) -> Callable[[Handler], Handler]:
        """Register a handler, which returns what to print. Its docstring is the help."""

        def register(handler: Handler) -> Handler:
            entry = Command(name, handler, usage, values, takes_path, group, destroys)
            REGISTRY[name] = entry
            return handler

        return register

    return command


def one_of(*values: str) -> Values:
    """Complete one of these words."""
    return lambda _session, words: () if words else values


def switch(argument: str, current: bool) -> bool:
    """Read on or off; without an argument flip the switch."""
    if argument not in ("", "on", "off"):
        raise UsageError
    return argument == "on" if argument else not current


def is_command(line: str) -> bool:
    """Tell a command from a message, which doubles a slash that it begins with."""
    return line.startswith("/") and not line.startswith("//")


def find(line: str) -> Command:
    """Return the command that a line names. Raises UserError with the closest match."""
    name = line[1:].split(None, 1)[0] if line[1:].strip() else ""
    found = REGISTRY.get(ALIASES.get(name, name))
    if found:
        return found
    hint = "/help lists all; // sends a message that begins with /"
    names = REGISTRY | {alias: REGISTRY[command] for alias, command in ALIASES.items()}
    safe = [each for each, entry in names.items() if not entry.destroys]
    close = difflib.get_close_matches(name, safe, n=1)
    if close:
        hint = f"did you mean /{close[0]}?"
    raise UserError(f"unknown command /{name}: {hint}")
