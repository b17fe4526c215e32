"""Completion of the command line by the shell; shtab writes the scripts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_chat.terminal.output import say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SHELLS = ("bash", "zsh", "fish")


class Completion(argparse.Action):
    """Prints the script for a shell and exits."""

    def __init__(
        self,
        option_strings: Sequence[str],
        dest: str,
        *,
        parser: Callable[[], argparse.ArgumentParser],
        **form: Any,
    ) -> None:
        super().__init__(option_strings, dest, choices=SHELLS, **form)
        self._parser = parser

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,  # noqa: ARG002 - the interface of argparse
        values: str | Sequence[Any] | None,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        """Print the script."""
        say(script(self._parser(), str(values)))
        parser.exit()


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the completion script of a parser for one of SHELLS."""
    import shtab

    for action in _actions(parser):
        words = str(action.metavar).split("|")
        if len(words) > 1 and action.choices is None:
            action.choices = words
        elif action.metavar == "FILE" or action.type is Path or action.dest in ("model", "heads"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(parser, shell)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _actions(each)
        else:
            yield action
