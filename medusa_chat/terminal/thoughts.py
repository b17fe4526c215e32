"""Thoughts of a model: text between <think> and </think>, told apart from the answer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rich.text import Text

from medusa_chat.terminal.theme import LABEL
from medusa_chat.terminal.wrapping import Flow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from medusa_chat.config import Message
    from medusa_chat.events import Token

KEY, COMMAND = "Ctrl+T", "/thoughts"  # they show thoughts
OPEN, CLOSE = "<think>", "</think>"


def split(reply: str) -> tuple[str, str]:
    """Split a whole reply into thoughts and answer; either may be empty."""
    text = reply.lstrip()
    if not text.startswith(OPEN):
        return "", reply
    thoughts, _, answer = text.removeprefix(OPEN).partition(CLOSE)
    return thoughts.strip(), answer.lstrip()


def answer_of(reply: str) -> str:
    """Return a reply without its thoughts; all of it if it has no answer."""
    return split(reply)[1] or reply


def without_thoughts(turns: Iterable[Message]) -> list[Message]:
    """Return the turns with the answers of the replies alone."""
    return [_answer_alone(turn) if turn["role"] == "assistant" else turn for turn in turns]


def _answer_alone(turn: Message) -> Message:
    return {"role": turn["role"], "content": answer_of(turn["content"])}


class Thoughts:
    """Takes the tokens of one reply and tells thoughts from the answer.

    Only a block that begins the reply counts: later the answer may be about such tags. A model may
    also begin inside a block, which its template opened in the prompt.

    Attributes:
        inside: the reply is in its thoughts now.
        count: tokens of the thoughts so far.
        text: the thoughts so far.
    """

    def __init__(self, begun: str = "") -> None:
        """Start after the text that the reply already has."""
        started = begun.lstrip().startswith(OPEN)
        self.inside = started and CLOSE not in begun
        self.count = 0
        self.text = ""
        self._open = not begun.strip()  # a block may still begin
        self._held: list[Token] = []  # they may be the beginning of a tag

    @property
    def ended(self) -> bool:
        """True once all thoughts were read, if there are any."""
        return bool(self.count) and not self.inside

    @property
    def over(self) -> bool:
        """True once nothing but the answer can follow."""
        return not (self.inside or self._open)

    def feed(self, token: Token) -> Iterator[tuple[Token, bool]]:
        """Yield tokens that can be shown, each with whether it is a thought; tags vanish."""
        self.count += self.inside
        if self.over:
            yield token, False
            return
        self._held.append(token)
        yield from self._released(final=False)

    def rest(self) -> Iterator[tuple[Token, bool]]:
        """Yield what is held at the end of the reply."""
        yield from self._released(final=True)

    def _released(self, *, final: bool) -> Iterator[tuple[Token, bool]]:
        text = "".join(token.text for token in self._held)
        tag = CLOSE if self.inside else OPEN
        place = text.find(tag)
        if place >= 0 and (self.inside or not text[:place].strip()):
            yield from self._taken(place, thought=self.inside)
            for _ in self._taken(len(tag), thought=False):
                pass  # the tag itself
            self._open = False
            self.inside = not self.inside
            if self.inside:
                yield from self._released(final=final)
                return
            place = len("".join(token.text for token in self._held))
        elif final or (not self.inside and not OPEN.startswith(text.strip()[: len(OPEN)])):
            place = len(text)
            self._open = False
        else:
            place = len(text) - _overlap(text, tag)
            if not self.inside:
                return  # white space before the first word, or a part of the tag
        yield from self._taken(place, thought=self.inside)

    def _taken(self, length: int, *, thought: bool) -> Iterator[tuple[Token, bool]]:
        """Take so many characters from the held tokens."""
        while self._held and length >= len(self._held[0].text):
            token = self._held.pop(0)
            length -= len(token.text)
            self.text += token.text * thought
            yield token, thought
        if length:
            first = self._held[0]
            self._held[0] = replace(first, text=first.text[length:])
            self.text += first.text[:length] * thought
            yield replace(first, text=first.text[:length]), thought


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a beginning of `tag`."""
    lengths = range(min(len(text), len(tag) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(tag[:length])), 0)


class ThoughtRows:
    """The thoughts of a reply as rows: a count, or dim text if they are shown."""

    def __init__(self, thoughts: Callable[[], Thoughts], *, shown: bool, opener: str = KEY) -> None:
        """Start a reply.

        Args:
            thoughts: called at the first token: only then it is known how the reply begins.
            shown: show the text.
            opener: shows it later, as the user types it.
        """
        self._make = thoughts
        self._thoughts: Thoughts | None = None
        self._shown = shown
        self._hint = "" if shown else f" · {opener} shows"
        self._flow = Flow()
        self._summed_up = False

    @property
    def begun(self) -> bool:
        """True if the reply has thoughts."""
        return self._thoughts is not None and bool(self._thoughts.count)

    def answer(self, tokens: Sequence[Token]) -> Sequence[Token]:
        """Take tokens; return those of the answer."""
        if self._thoughts is None:
            self._thoughts = self._make()
        if self._thoughts.over:  # for most of a reply
            return tokens
        return [each for token in tokens for each in self._sorted(self._thoughts.feed(token))]

    def rest(self) -> Iterator[Token]:
        """Yield what is left of the answer at the end of the reply."""
        if self._thoughts is not None:
            yield from self._sorted(self._thoughts.rest())

    def _sorted(self, pairs: Iterable[tuple[Token, bool]]) -> Iterator[Token]:
        for token, thought in pairs:
            if thought:
                self._flow.feed(token.text, LABEL)
            else:
                yield token

    def take(self, width: int, *, final: bool = False) -> list[Text]:
        """Return the rows that were finished since the last call."""
        if not self.begun or self._summed_up:
            return []
        assert self._thoughts
        rows = self._flow.take(width) if self._shown else []
        if self._thoughts.inside and not final:
            return rows
        self._summed_up = True
        end = Text(f"thought for {self._thoughts.count} tokens{self._hint}", LABEL)
        return [*rows, *(self._flow.rest(width) if self._shown else []), end, Text()]

    @property
    def live(self) -> list[Text]:
        """The rows that still grow, while the model thinks; call `take` first."""
        if not self._thoughts or not self._thoughts.inside or self._summed_up:
            return []
        if self._shown:
            return self._flow.live
        return [Text(f"thinking… {self._thoughts.count} tokens", LABEL)]
