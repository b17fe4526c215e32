"""Chat in the terminal, or answer --prompt or piped text once (the default command)."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from medusa_chat.commands.flags import (
    add_fields,
    add_model,
    given_fields,
    load_engine,
    read_fields,
)
from medusa_chat.commands.prompt import check_text, messages_of, read_prompt
from medusa_chat.config import LoadOptions, Sampling, UserError
from medusa_chat.sampling import describe_defaults
from medusa_chat.settings import make
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
    add_fields(parser, Sampling, loop_guard="on")
    parser.add_argument(
        "--prompt",
        help="answer this once and exit; text piped to standard input does the same,"
        " and follows the prompt if both are given",
    )
    parser.add_argument(
        "--json", action="store_true", help="with --prompt: print one JSON object per step"
    )
    parser.add_argument("--system", help="system prompt")
    parser.add_argument(
        "--transcript", type=Path, help="keep the conversation in this file, and continue it"
    )
    parser.add_argument(
        "--marks", action="store_true", help="mark the heads' tokens without colour too"
    )
    parser.add_argument(
        "--view",
        choices=("heads", "markdown", "both"),
        default="both",
        help="colour replies by head, render their Markdown, or both",
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="redraw nothing: for screen readers and simple terminals (TERM=dumb has it on)",
    )


def run(options: argparse.Namespace) -> int:
    """Answer the prompt if there is one, else open the chat."""
    given = given_fields(options, Sampling)
    sampling = make(Sampling, given)
    load = partial(load_engine, options.model, options.heads, read_fields(options, LoadOptions))
    prompt = read_prompt(options.message, options.prompt)
    check_text("--system", options.system or "")
    for stop in sampling.stop:
        check_text("--stop", stop)
    if prompt is None and options.json:
        raise UserError("--json needs --prompt TEXT, or text piped to standard input")
    if prompt is None:
        from platformdirs import user_state_path

        from medusa_chat.hub.model_list import resolve_model
        from medusa_chat.terminal.chat.repl import chat

        spec = resolve_model(options.model, options.heads, models=options.models)
        return chat(
            load,
            model=spec.name,
            description=spec.description,
            given=given,
            system=options.system,
            marks=options.marks,
            history=user_state_path("medusa-chat") / "history",
            transcript=options.transcript,
            view=options.view,
            plain=options.plain,
        )
    engine = load()
    sampling = make(Sampling, {**engine.defaults, **given})
    for line in (describe_defaults(engine.defaults, given), sampling.unused(given)):
        if line:
            warn(line)
    messages = messages_of(prompt, options.system, engine.system)
    with closing(engine.generate(messages, sampling)) as steps:
        if options.json:
            _print_json(steps, sampling.mode)
        else:
            _print_text(steps)
    for notice in engine.notices:
        warn(notice)
    return 0


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
