"""Chat in the terminal, or answer --prompt or piped text once (the default command)."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from medusa_chat.commands.flags import (
    add_fields,
    add_model,
    given_fields,
    load_engine,
    read_fields,
    sampling_for,
)
from medusa_chat.commands.prompt import check_text, messages_of, read_prompt
from medusa_chat.config import ChatOptions, LoadOptions, UserError
from medusa_chat.sampling import CHAT_DEFAULTS, Sampling
from medusa_chat.settings import make
from medusa_chat.settings_file import read_settings, settings_file
from medusa_chat.terminal.output import print_json, say, warn

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from medusa_chat.events import Step
    from medusa_chat.sampling import Mode


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `chat`."""
    parser.add_argument(
        "message", metavar="PROMPT", nargs="*", help="answer this once and exit, as --prompt does"
    )
    add_model(parser)
    add_fields(parser, LoadOptions)
    add_fields(parser, Sampling, **CHAT_DEFAULTS)
    parser.set_defaults(**dict.fromkeys(CHAT_DEFAULTS))  # the settings file comes first
    parser.add_argument(
        "--prompt",
        help="answer this once and exit; text piped to standard input does the same,"
        " and follows the prompt if both are given",
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
    flags = given_fields(options, Sampling) | _given_system(options)
    # Asked before the settings file is read, which may name a transcript for chats.
    opens_chat = options.latest or options.resume or options.transcript
    _fill(options)
    given = CHAT_DEFAULTS | given_fields(options, Sampling)
    sampling = make(Sampling, given)
    load_options = read_fields(options, LoadOptions)
    chosen = read_fields(options, ChatOptions)
    prompt = read_prompt(options.message, options.prompt)
    check_text("--system", chosen.system or "")
    for stop in sampling.stop:
        check_text("--stop", stop)
    if prompt is None and options.json:
        raise UserError("--json needs --prompt TEXT, or text piped to standard input")
    if prompt is None:
        from medusa_chat.commands.open_chat import open_chat

        return open_chat(options, chosen, load_options, given, flags)
    if opens_chat:
        wanted = "--continue, --resume and --transcript"
        raise UserError(f"{wanted} open the chat: leave --prompt and pipes out")
    engine = load_engine(options.model, options.heads, load_options)
    sampling = sampling_for(engine, given)
    messages = messages_of(prompt, chosen.system, engine.system)
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


def _print_text(steps: Iterable[Step]) -> None:
    finish = None
    for step in steps:
        say(step.text, end="")
        finish = step.finish
    say("")
    if finish == "loop":
        warn("the reply repeated itself, so it was stopped; --loop-guard off lets it go on")


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
