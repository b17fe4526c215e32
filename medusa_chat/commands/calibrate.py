"""Measure how often each head is right, so that the fastest tree can be chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from medusa_chat.commands.flags import (
    add_fields,
    add_model,
    add_prompts,
    count,
    load_engine,
    read_fields,
)
from medusa_chat.config import LoadOptions
from medusa_chat.files import check_writable
from medusa_chat.terminal.output import say

if TYPE_CHECKING:
    import argparse


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `calibrate`."""
    add_model(parser)
    add_fields(parser, LoadOptions)
    add_prompts(parser, "--data", "--prompts", limit=200, required=True)
    parser.add_argument(
        "--max-new-tokens", type=count, default=128, help="longest reply to count in"
    )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="count all prompts; by default a fifth of them checks the forecast instead",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw the figures too; needs matplotlib"
    )


def run(options: argparse.Namespace) -> int:
    """Count, write the accuracies next to the heads, and compare their forecast with replies."""
    from medusa_chat.decoding.trees.accuracy import write_accuracy
    from medusa_chat.decoding.trees.growth import grow
    from medusa_chat.hub.fetch import accuracy_file
    from medusa_chat.hub.model_list import resolve_model
    from medusa_chat.prompts import read_prompts
    from medusa_chat.terminal.reports import charts
    from medusa_chat.terminal.reports.accuracy import show_accuracy
    from medusa_chat.terminal.reports.progress import progress_bar
    from medusa_chat.training.calibration import SIZES, calibrate, check_forecast, held_aside

    if options.plot:
        charts.check_plot(options.plot)
    prompts = read_prompts(options.prompts, options.limit)
    file = accuracy_file(resolve_model(options.model, options.heads, models=options.models))
    for written in filter(None, (file, options.plot)):
        check_writable(written)  # before the work of minutes that it is to hold
    engine = load_engine(options.model, options.heads, _settings(options))
    counted, aside = (prompts, []) if options.no_check else held_aside(prompts)
    with progress_bar("calibrating") as progress:
        accuracy = calibrate(engine, counted, options.max_new_tokens, progress)
    source = f"{len(counted)} conversations of {', '.join(path.name for path in options.prompts)}"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_accuracy(accuracy, file, source)
    with progress_bar("checking") as progress:
        found = check_forecast(engine, accuracy, aside, options.max_new_tokens, progress)
    checks = [vars(check) for check in found]
    show_accuracy(accuracy.top, accuracy.exact.top if accuracy.exact else (), checks)
    say(f"wrote {file}")
    if not checks and not options.no_check:
        say(
            "the forecast was not checked: that takes 5 prompts or more,"
            " and heads that fill a tree of 8 nodes"
        )
    if options.plot:
        forecast = grow(accuracy, max(SIZES))[1]
        charts.plot(options.plot, accuracy.top, forecast, checks, f"{engine.name}, {source}")
        say(f"wrote {options.plot}")
    return 0


def _settings(options: argparse.Namespace) -> LoadOptions:
    """Return how to load the model.

    No tree is timed, an earlier calibration is not read, and torch runs the steps: calibration
    reads what the heads say along whole replies, which the native step does not give.
    """
    settings = read_fields(options, LoadOptions, probing=False, measured=False, engine="torch")
    if settings.tree in ("auto", "retune"):
        return replace(settings, tree="chain-1")
    return settings
