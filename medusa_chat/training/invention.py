"""User turns that the model invents: `distill --prompts self:N`. No torch here.

A model that was trained to chat writes a user's message if its prompt ends where one begins
(Magpie, Xu et al. 2024, arXiv:2406.08464).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from medusa_chat.config import UserError
from medusa_chat.training.questions import Question

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from medusa_chat.training.conversations import Conversation

TRIES = 4  # for the first turn of a conversation
TEMPERATURE = 1.0
TOKENS = 96  # of an invented turn
LETTERS = (6, 600)  # of an invented turn, at least and at most
# Rae et al. 2021 (arXiv:2112.11446, table A1): text is language if most words have a letter.
WORDS_WITH_LETTERS = 0.8
ONE_SCRIPT = 0.9  # of the letters: others mostly come from a model that lost its thread
_SELF = re.compile(r"self:(\d+)")


class Inventing(Protocol):
    """A model that invents user turns: LocalModel."""

    def invent(self, questions: Sequence[Question], attempt: int) -> list[str | None]:
        """Write the next user turn after each conversation; None for one without an end."""


def wanted_of(prompts: Sequence[Path]) -> int:
    """Return N of `self:N`; 0 for files. Raises UserError for a mixture or N = 0."""
    found = [match for path in prompts if (match := _SELF.fullmatch(str(path)))]
    if not found:
        return 0
    if len(prompts) > 1:
        raise UserError("--prompts self:N cannot be mixed with files: run distill twice")
    if not int(found[0][1]):
        raise UserError("--prompts self:N needs at least 1 conversation")
    return int(found[0][1])


@dataclass
class Inventor:
    """Adds invented turns to conversations. `seen` are the first turns of this run."""

    model: Inventing
    seen: set[str] = field(default_factory=set)

    def remember(self, conversations: Iterable[Conversation]) -> None:
        """Take the first turns of conversations that an earlier run wrote as seen."""
        self.seen |= {_plain(each.turns[0]) for each in conversations if each.turns}

    def add_turns(self, conversations: Sequence[Conversation], turn: int) -> None:
        """Add a user turn to each conversation that goes on; end those that get none."""
        waiting = [each for each in conversations if not each.ended]
        for attempt in range(TRIES if turn == 0 else 1):
            if not waiting:
                return
            questions = [Question(each.index, turn, each.messages) for each in waiting]
            texts = self.model.invent(questions, attempt)
            for each, text in zip(waiting, texts, strict=True):
                if text is not None and self._takes(text, each.turns):
                    each.turns += (text,)
            waiting = [each for each in waiting if len(each.turns) <= turn]
        for each in waiting:
            each.ended = True

    def _takes(self, text: str, before: tuple[str, ...]) -> bool:
        """Tell if a turn is language and not a repetition; remember a first one."""
        plain = _plain(text)
        known = self.seen
        if before:
            known = {_plain(turn) for turn in before}
        if plain in known or not is_language(text):
            return False
        if not before:
            self.seen.add(plain)
        return True


def is_language(text: str) -> bool:
    """Tell if a text has a usual length, words of letters, and one script."""
    letters = [character for character in text if character.isalpha()]
    if not LETTERS[0] <= len(letters) <= LETTERS[1]:
        return False
    words = text.split()
    spelled = sum(any(map(str.isalpha, word)) for word in words)
    scripts = Counter(unicodedata.name(letter, "").partition(" ")[0] for letter in letters)
    most = scripts.most_common(1)[0][1]
    return spelled >= WORDS_WITH_LETTERS * len(words) and most >= ONE_SCRIPT * len(letters)


def _plain(text: str) -> str:
    """Return the words of a text alone, so that repetitions compare equal."""
    return " ".join(re.findall(r"\w+", text.casefold()))
