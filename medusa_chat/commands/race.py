"""Answer one prompt with heads and without, in two columns, each at its true speed.

Both cannot compute at once without falsifying each other. The reply with heads runs first, alone.
The one without is shown while it runs, next to the first by the times that its steps took.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from medusa_chat.commands.flags import (
    add_decoding,
    add_fields,
    add_model,
    given_fields,
    load_engine,
    read_fields,
    sampling_for,
)
from medusa_chat.commands.prompt import check_text, messages_of, read_prompt
from medusa_chat.config import LoadOptions, UserError
from medusa_chat.sampling import Sampling
from medusa_chat.settings import make
from medusa_chat.terminal.output import SafeConsole, warn

if TYPE_CHECKING:
    import argparse


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `race`."""
    parser.add_argument("message", metavar="PROMPT", nargs="*", help="message to answer")
    add_model(parser)
    add_fields(parser, LoadOptions)
    add_decoding(parser)
    parser.add_argument("--system", help="system prompt")
    parser.add_argument(
        "--marks", action="store_true", help="mark the heads' tokens without colour too"
    )
    parser.add_argument(
        "--record",
        metavar="FILE",
        type=Path,
        help="write the race to FILE.svg (a picture of its end) or FILE.cast (for asciinema)",
    )


def run(options: argparse.Namespace) -> int:
    """Run the race; the exit status is 130 after Ctrl-C."""
    from medusa_chat.terminal.race.lanes import Race
    from medusa_chat.terminal.race.recording import check_recording, record
    from medusa_chat.terminal.race.screen import show_race

    given = given_fields(options, Sampling)
    make(Sampling, given)  # a wrong setting fails before the load
    if options.record:
        check_recording(options.record)
    check_text("--system", options.system or "")
    prompt = read_prompt(options.message, None)
    if prompt is None:
        raise UserError('race needs a prompt: medusa-chat race "Tell me a fairy tale."')
    engine = load_engine(options.model, options.heads, read_fields(options, LoadOptions))
    messages = messages_of(prompt, options.system, engine.system)
    race = Race(engine, messages, sampling_for(engine, given))
    console = SafeConsole(highlight=False)
    if not show_race(console, race, marks=options.marks):
        return 130
    if options.record:
        record(race, options.record, console.color_system)
    for notice in engine.notices:
        warn(notice)
    return 0
