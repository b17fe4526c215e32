"""Check that greedy replies equal vanilla ones, and exact replies equal sampled ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medusa_chat.commands.flags import (
    add_decoding,
    add_fields,
    add_model,
    add_prompts,
    count,
    load_engine,
    read_fields,
)
from medusa_chat.config import SHIPPED_PROMPTS, LoadOptions
from medusa_chat.sampling import Sampling

if TYPE_CHECKING:
    import argparse


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `verify`."""
    add_model(parser)
    add_fields(parser, LoadOptions)
    add_decoding(parser, max_new_tokens=64)
    add_prompts(parser, limit=20)
    parser.add_argument(
        "--turns", type=count, default=1, help="replies to check in each conversation"
    )


def run(options: argparse.Namespace) -> int:
    """Decode every prompt in both ways; the status is 1 if a check found a fault."""
    from medusa_chat.bench.verification import verify
    from medusa_chat.prompts import read_prompts
    from medusa_chat.terminal.output import say
    from medusa_chat.terminal.reports.checks import show_checks
    from medusa_chat.terminal.reports.progress import progress_bar

    sampling = read_fields(options, Sampling)
    settings = read_fields(options, LoadOptions, probing=False)
    prompts = read_prompts(options.prompts or [SHIPPED_PROMPTS], options.limit)
    engine = load_engine(options.model, options.heads, settings)
    with progress_bar("verifying") as progress:
        checks = verify(engine, prompts, sampling, turns=options.turns, progress=progress)
    if engine.backbone.native:
        say(f"{engine.backbone.step_name}: modes and trees are identical by construction")
    show_checks([vars(check) for check in checks])
    return int(any(check.faults for check in checks))
