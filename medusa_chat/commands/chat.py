"""Chat in the terminal, or answer --prompt or piped text once (the default command)."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import closing
from typing import TYPE_CHECKING

from medusa_chat.commands.flags import (
    add_fields,
    add_model,
    given_fields,
    load_engine,
    read_fields,
)
from medusa_chat.config import ChatOptions, LoadOptions, Message, Sampling, UserError
from medusa_chat.files import decoded
from medusa_chat.settings_file import read_settings, settings_file
from medusa_chat.terminal.output import print_json, say, warn
from medusa_chat.text import encodable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from medusa_chat.config import Mode
    from medusa_chat.events import Step


MOST_PIPED = 16 << 20  # bytes of standard input: far more than any context holds


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `chat`."""
    add_model(parser)
    add_fields(parser, LoadOptions)
    add_fields(parser, Sampling)
    parser.add_argument(
        "--prompt",
        help="answer this once and exit; text piped to standard input does the same,"
        " and follows --prompt if both are given",
    )
    parser.add_argument(
        "--json", action="store_true", help="with --prompt: print one JSON object per step"
    )
    parser.add_argument(
        "--continue",
        dest="latest",
        action="store_true",
        help="go on with the conversation of last time",
    )
    parser.add_argument(
        "--resume", metavar="NAME", help="go on with a kept conversation, by name or number"
    )
    add_fields(parser, ChatOptions)


def run(options: argparse.Namespace) -> int:
    """Answer the prompt if there is one, else open the chat."""
    given = given_fields(options, Sampling) | _given_system(options)
    _fill(options)
    sampling = read_fields(options, Sampling)
    load_options = read_fields(options, LoadOptions)
    chosen = read_fields(options, ChatOptions)
    prompt = _prompt(options.prompt)
    _check_text("--system", chosen.system or "")
    for stop in sampling.stop:
        _check_text("--stop", stop)
    if prompt is None and options.json:
        raise UserError("--json needs --prompt TEXT, or text piped to standard input")
    if prompt is None:
        from medusa_chat.commands.open_chat import open_chat

        return open_chat(options, chosen, sampling, load_options, given)
    if options.latest or options.resume:
        raise UserError("--continue and --resume open the chat: leave --prompt and pipes out")
    engine = load_engine(options.model, options.heads, load_options)
    messages = _messages(prompt, chosen.system, engine.system)
    with closing(engine.generate(messages, sampling)) as steps:
        if options.json:
            _print_json(steps, sampling.mode)
        else:
            _print_text(steps)
    for notice in engine.notices:
        warn(notice)
    return 0


def _fill(options: argparse.Namespace) -> None:
    """Take from the settings file what the command line does not give."""
    # The heads of one model do not fit another one, and a kept chat names its own model.
    named = options.model or options.heads or options.latest or options.resume
    for name, value in read_settings(settings_file()).items():
        if name in ("model", "heads") and named:
            continue
        if getattr(options, name) is None:
            setattr(options, name, value)


def _given_system(options: argparse.Namespace) -> dict[str, str]:
    return {} if options.system is None else {"system": options.system}


def _prompt(argument: str | None) -> str | None:
    """Return --prompt, piped text, or both joined by a blank line; None in a terminal.

    Raises:
        UserError: there is no text, or it is not UTF-8 or too long.
    """
    piped = _piped() if argument is None or _is_piped() else None
    if argument is None and piped is None:
        return None
    _check_text("--prompt", argument or "")
    text = "\n\n".join(part for part in (argument, piped) if part)
    if not text.strip():
        raise UserError("the prompt is empty")
    return text


def _piped() -> str | None:
    """Return the text of standard input; None if that is a terminal."""
    if sys.stdin.isatty():
        return None
    binary = getattr(sys.stdin, "buffer", None)
    content = binary.read(MOST_PIPED + 1) if binary else sys.stdin.read(MOST_PIPED + 1).encode()
    if len(content) > MOST_PIPED:
        raise UserError(f"standard input holds more than the {MOST_PIPED:,} bytes of a prompt")
    try:
        return decoded(content).strip()
    except ValueError as error:
        raise UserError(f"standard input, {error}") from None


def _is_piped() -> bool:
    """Tell if standard input is a pipe or a file, which end; other input may never come."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _check_text(flag: str, text: str) -> None:
    """Raise UserError for an argument that is not UTF-8, which Python keeps as surrogates."""
    if encodable(text) != text:
        raise UserError(f"{flag} is not UTF-8 text")


def _messages(prompt: str, system: str | None, default: str) -> list[Message]:
    """Return the conversation; an empty `system` replaces the model's default one."""
    messages: list[Message] = [{"role": "user", "content": prompt}]
    wanted = default if system is None else system
    if wanted or default:
        messages.insert(0, {"role": "system", "content": wanted})
    return messages


def _print_text(steps: Iterable[Step]) -> None:
    for step in steps:
        say(step.text, end="")
    say("")


def _print_json(steps: Iterable[Step], mode: Mode) -> None:
    """Print a line per step and a summary."""
    from medusa_chat.stats import Stats

    stats = Stats()
    ids: list[int] = []
    text = ""
    for step in steps:
        stats.add(step)
        ids += [token.id for token in step.tokens]
        text += step.text
        print_json(step.as_json())
    summary = {"type": "summary", "text": text, "ids": ids, "mode": mode, **stats.as_json()}
    print_json(summary)
