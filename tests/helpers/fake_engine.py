"""An engine without a model: scripted Steps, for tests of the terminal and for looking at it.

Run as a program it opens a chat: `python -m tests.helpers.fake_engine [--delay S] [--load S] ...`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_chat.config import Message, UserError
from medusa_chat.events import Candidates, Finish, Pause, Step, Token
from medusa_chat.terminal.theme import head_style

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from medusa_chat.sampling import Sampling

REPLY = (
    "Once upon a time a small fox lived under the old bridge. Every morning he counted the boats, "
    "and every evening he told the river how many he had seen."
)
DEPTHS = (3, 1, 4, 0, 2, 1)  # accepted guesses of the tree steps, in turn
VANILLA_EVERY = 3
TREE_SECONDS, VANILLA_SECONDS = 0.012, 0.010


def coloured(steps: Iterable[Step]) -> list[tuple[str, str]]:
    """Each visible character of the steps with the colour of its token's head."""
    found = []
    for step in steps:
        for token in step.tokens:
            colour = head_style(token.head).color
            name = colour.get_truecolor().hex[1:] if colour else "default"
            found += [(char, name) for char in token.text if not char.isspace()]
    return found


def pieces(text: str) -> list[str]:
    """Text cut into tokens: words with the space before them, long words in two."""
    found = []
    for word in re.findall(r"\s*\S+|\s+", text):
        middle = len(word) // 2 if len(word) > 7 else len(word)
        found += [part for part in (word[:middle], word[middle:]) if part]
    return found


def script(
    text: str,
    *,
    mode: str = "greedy",
    heads: int = 4,
    finish: Finish | None = "eos",
    paused_after: int | None = None,
) -> Iterator[Step]:
    """Yield the steps that decode `text`; every third is a vanilla step.

    With `paused_after` the heads are paused after that many steps.
    """
    parts = pieces(text)
    depths = cycle(DEPTHS)
    number = 0
    while parts:
        number += 1
        pause = None
        if paused_after is not None and number > paused_after:
            pause = Pause(0.87, 60, 256 - number)
        vanilla = mode == "vanilla" or pause is not None or number % VANILLA_EVERY == 0
        count = 1 if vanilla else min(next(depths), heads) + 1
        taken, parts = parts[:count], parts[count:]
        tokens = tuple(Token(id=7, text=part, head=index) for index, part in enumerate(taken))
        yield Step(
            tokens=tokens,
            nodes=1 if vanilla else 16,
            seconds=VANILLA_SECONDS if vanilla else TREE_SECONDS,
            kind="vanilla" if vanilla else "tree",
            depth=0 if vanilla else heads,
            finish=None if parts else finish,
            tested=() if vanilla else tuple(range(1, min(heads, count) + 1)),
            paused=pause,
        )


def _lengths(message: Message) -> list[int]:
    return [len(word) for word in message["content"].split()]


class FakeTrees:
    """Implements ChatTrees."""

    def __init__(self) -> None:
        self.current = "auto"
        self.copies = True

    def use(self, tree: str) -> None:
        if tree not in self.names():
            raise UserError(f"no tree {tree!r}")
        self.current = tree

    def use_copies(self, on: bool) -> None:
        self.copies = on

    def describe(self) -> str:
        return f"{self.current}: 9 nodes, depth 3; forecast 2.60 tokens a step"

    def names(self) -> list[str]:
        return ["auto", "chain", "vicuna-7b"]


class FakeTemplate:
    """Implements Template."""

    def __init__(self) -> None:
        self.thinking: bool | None = None
        self.opens = ""
        self.drops_thoughts = False

    def opening(self, messages: Sequence[Message]) -> str:
        assert messages
        return self.opens


class FakeEngine:
    """Implements ChatEngine. `replies` come in turn; an exception among them is raised."""

    def __init__(
        self,
        replies: Sequence[str | BaseException] = (REPLY,),
        *,
        delay: float = 0.0,
        prefill: float = 0.0,
        heads: int = 4,
        finish: Finish | None = "eos",
        fails_after: int | None = None,
    ) -> None:
        self.name = "fake"
        self.context = 1024
        self.heads = heads
        self.system = "You are a helpful assistant."
        self.raw = False
        self.trees = FakeTrees()
        self.template = FakeTemplate()
        self.notices: list[str] = []
        self.defaults: dict[str, Any] = {}
        self.prefilled = 0
        self.prefill_seconds = 0.0
        self.prompts: list[list[Message]] = []
        self.ids: list[list[int]] = []
        self.samplings: list[Sampling] = []
        self.closed = 0
        self.freed = False
        self.replies = cycle(replies)
        self._delay = delay
        self._prefill = prefill
        self._finish = finish
        self._fails_after = fails_after
        self._tokens = 0

    def encode(self, prompt: list[int] | list[Message]) -> list[int]:
        parts = [[part] if isinstance(part, int) else _lengths(part) for part in prompt]
        return [number for part in parts for number in part]

    def think(self, on: bool) -> None:
        if self.template.opens:
            raise UserError("the chat template of fake has no switch for thinking")
        self.template.thinking = on

    def count(self, text: str) -> int:
        return len(text.split())

    def generate(self, prompt: list[int] | list[Message], sampling: Sampling) -> Iterator[Step]:
        self.prompts.append([message for message in prompt if not isinstance(message, int)])
        self.ids.append([part for part in prompt if isinstance(part, int)])
        self.samplings.append(sampling)
        reply = next(self.replies)
        self._tokens = sum(len(message["content"].split()) for message in self.prompts[-1])
        self.prefilled = self._tokens
        self.prefill_seconds = 0.25
        left = self.context - len(self.encode(prompt))
        if left <= 0:
            raise UserError(f"the prompt has {self.context - left} tokens; the context of fake …")
        try:
            time.sleep(self._prefill)
            if isinstance(reply, BaseException):
                raise reply
            steps = script(reply, mode=sampling.mode, heads=self.heads, finish=self._finish)
            for number, step in enumerate(steps):
                if number == self._fails_after:
                    raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB")
                time.sleep(self._delay)
                self._tokens += len(step.tokens)
                left -= len(step.tokens)
                if left <= 0:
                    yield replace(step, finish="context")
                    return
                yield step
        finally:
            self.closed += 1

    @property
    def tokens_in_context(self) -> int:
        return self._tokens

    def close(self) -> None:
        self.freed = True

    def candidates(self) -> Candidates | None:
        if not self.prompts:
            return None
        paths = [(), (0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 0)]
        texts = (" river", " how", " that", "\n", " many", " far", "[red]", " he", "é")
        return Candidates(paths=tuple(paths), texts=texts, accepted=(0, 1, 5, 8))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--prefill", type=float, default=0.0)
    parser.add_argument("--load", type=float, default=0.0)
    parser.add_argument("--load-error")
    parser.add_argument("--notice")
    parser.add_argument("--fails-after", type=int)
    parser.add_argument("--finish", default="eos")
    parser.add_argument("--marks", action="store_true")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--view", default="both")
    parser.add_argument("--history", type=Path, default=Path("/tmp/fake-medusa-history"))
    parser.add_argument("--transcript", type=Path)
    parser.add_argument("--reply", action="append")
    parser.add_argument("--chats", type=Path)
    parser.add_argument("--resume")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--editing", default="emacs")
    parser.add_argument("--defaults", type=json.loads, default={})
    parser.add_argument("--context", type=int, default=1024)
    arguments = parser.parse_args()
    from medusa_chat.config import ChatOptions
    from medusa_chat.terminal.chat.archive import Archive
    from medusa_chat.terminal.chat.keeping import Keeper
    from medusa_chat.terminal.chat.repl import chat
    from medusa_chat.terminal.chat.start import Start

    def load(_progress: object) -> FakeEngine:
        time.sleep(arguments.load / 2)
        if arguments.load:
            print("a library warns", file=sys.stderr)
        time.sleep(arguments.load / 2)
        if arguments.load_error:
            raise UserError(arguments.load_error)
        engine = FakeEngine(
            arguments.reply or (REPLY,),
            delay=arguments.delay,
            prefill=arguments.prefill,
            fails_after=arguments.fails_after,
            finish=arguments.finish,
        )
        engine.defaults = arguments.defaults
        engine.context = arguments.context
        engine.notices += [arguments.notice] if arguments.notice else []
        return engine

    archive = Archive(arguments.chats) if arguments.chats else None
    kept = (
        archive.read(archive.find(arguments.resume).number)
        if archive and arguments.resume
        else None
    )
    options = ChatOptions(
        marks=arguments.marks,
        transcript=arguments.transcript,
        view=arguments.view,
        plain=arguments.plain,
        editing=arguments.editing,
    )
    keeper = Keeper(archive, private=arguments.private)
    return chat(
        load, Start("fake", arguments.history, options=options, keeper=keeper, resumed=kept)
    )


if __name__ == "__main__":
    sys.exit(main())
