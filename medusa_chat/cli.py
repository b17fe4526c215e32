"""The `medusa-chat` command: dispatch to a sub-command, errors and exit status."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from medusa_chat.commands import COMMANDS
from medusa_chat.commands.completion import Completion
from medusa_chat.config import UserError, out_of_memory
from medusa_chat.machine.openmp import let_threads_sleep
from medusa_chat.terminal.output import open_streams, warn
from medusa_chat.version import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

OWN_FLAGS = ("-h", "--help", "--version", "--completion")  # before a sub-command
HUB_NUMBERS = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")
NEEDS_LESS = "a smaller model, --quant nf4, --quant-heads nf4 or a shorter --max-context needs less"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command and return the exit status: 2 after a mistake of the user."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    open_streams()
    let_threads_sleep()
    try:
        if not words or words[0] not in (*COMMANDS, *OWN_FLAGS):
            _check_command(words)
            words.insert(0, "chat")
        options = _parsed(words)
        _check_environment()
        status = COMMANDS[options.command].run(options)
        sys.stdout.flush()
        return status
    except UserError as error:
        return _fail(str(error))
    except BrokenPipeError:
        _drop_output()  # the reader has what it wanted
        return 0
    except KeyboardInterrupt:
        return 130
    except (MemoryError, RuntimeError, OSError) as error:
        if out_of_memory(error):
            return _fail(f"out of memory; {NEEDS_LESS}")
        if not isinstance(error, OSError):
            raise
        _drop_output()
        return _fail(f"{error.filename or 'input/output'}: {error.strerror or error}")


def _parsed(words: list[str]) -> argparse.Namespace:
    """Parse the command line. Raises SystemExit after --help, and OSError if that has no place."""
    try:
        return make_parser().parse_args(words, argparse.Namespace(words=words))
    except SystemExit:
        sys.stdout.flush()
        raise


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of all sub-commands; `command` holds the name of the one that is given."""
    parser = _Parser(
        prog="medusa-chat",
        description="Chat with a local model that decodes several tokens per step.",
    )
    parser.add_argument("--version", action="version", version=f"medusa-chat {__version__}")
    parser.add_argument(
        "--completion",
        action=Completion,
        parser=_whole_parser,
        metavar="bash|zsh|fish",
        help="print a script that lets this shell complete commands and flags",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        text = (command.__doc__ or "").splitlines()[0].removesuffix(".")
        command.add_flags(commands.add_parser(name, help=text, description=text))
    return parser


def _whole_parser() -> argparse.ArgumentParser:
    """Make the parser with the flags of `chat` also before a sub-command, where they may stand."""
    parser = make_parser()
    COMMANDS["chat"].add_flags(parser)
    return parser


def _check_command(words: Sequence[str]) -> None:
    """Raise UserError for a single word that looks like a misspelt sub-command."""
    alone = all(word.startswith("-") for word in words[1:2])
    close = difflib.get_close_matches(words[0], COMMANDS, n=1, cutoff=0.8) if words else []
    if alone and close:
        asks = f"--prompt {words[0]} asks the model"
        raise UserError(f"unknown command {words[0]}: did you mean {close[0]}? {asks}")


def _check_environment() -> None:
    """Raise UserError if files have no place, or huggingface_hub would stop at a variable."""
    for name in HUB_NUMBERS:
        value = os.environ.get(name, "0")
        try:
            int(value)
        except ValueError:
            raise UserError(f"{name} must be a whole number of seconds, not {value!r}") from None
    try:
        Path.home()
    except RuntimeError:
        raise UserError("this user has no home folder; set HOME to a folder") from None


class _Parser(argparse.ArgumentParser):
    """Reports every mistake in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _drop_output() -> None:
    """Drop what standard output could not take: Python flushes at exit, and would fail again."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        return
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> int:
    with suppress(OSError):  # the terminal may be gone
        warn(f"error: {message}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
