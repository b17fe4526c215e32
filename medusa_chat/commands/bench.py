"""Measure acceptance length and speedup on this machine."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_chat.commands.flags import (
    add_decoding,
    add_fields,
    add_model,
    add_prompts,
    count,
    counts,
    load_engine,
    read_fields,
)
from medusa_chat.config import SHIPPED_PROMPTS, LoadOptions, UserError
from medusa_chat.files import write_text
from medusa_chat.sampling import Sampling
from medusa_chat.shapes import SHAPES
from medusa_chat.terminal.output import print_json, say, warn

if TYPE_CHECKING:
    from medusa_chat.bench.job import Consume
    from medusa_chat.bench.measure import Request
    from medusa_chat.decoding.engine import Engine


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `bench`."""
    add_model(parser)
    add_fields(parser, LoadOptions)
    add_decoding(parser, max_new_tokens=128)
    add_prompts(parser, limit=50)
    parser.add_argument(
        "--modes", default="greedy,typical", help="modes to measure, separated by commas"
    )
    parser.add_argument(
        "--rounds", type=count, default=3, help="repetitions; bench reports medians over them"
    )
    parser.add_argument(
        "--turns", type=count, default=1, help="user turns to answer in each conversation"
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="transformers|llama.cpp=FILE.gguf",
        help="measure another decoder beside it: transformers' generate(), or llama.cpp through"
        " llama-cpp-python; may be given more than once",
    )
    parser.add_argument("--view", action="store_true", help="measure the cost of the live view too")
    _add_shape_flags(parser)
    parser.add_argument(
        "--history",
        type=counts,
        metavar="N,...",
        default=(),
        help="time the first token of a second turn after conversations of these many tokens,"
        " such as 256,1024,4096",
    )
    _add_output_flags(parser)


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FOLDER",
        help="draw the figures as PNG files; needs matplotlib",
    )
    parser.add_argument(
        "--part",
        action="append",
        default=[],
        metavar="NAME",
        help="measure this part alone: replies, float32 (on a GPU) or a shape; may be given more"
        " than once",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the line of JSON to a file too, after each part",
    )


def _add_shape_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        metavar="NAME",
        help="measure step costs on random weights of known shapes: NAME or NAME:QUANT,"
        f" separated by commas; {', '.join(SHAPES)}",
    )
    parser.add_argument(
        "--shape-heads", type=count, default=5, metavar="N", help="Medusa heads of such a model"
    )
    lm_heads = parser.add_mutually_exclusive_group()
    lm_heads.add_argument(
        "--own-lm-heads",
        action="store_true",
        help="give these heads their own LM heads; by default they share the backbone's",
    )
    lm_heads.add_argument(
        "--shared-lm-heads", dest="own_lm_heads", action="store_false", help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--context",
        dest="contexts",
        type=counts,
        metavar="N,...",
        help="cached positions at which steps are timed (default: 256; with --shape 512,2048)",
    )


def run(options: argparse.Namespace) -> int:
    """Measure, print tables and charts, and print the result as one line of JSON last."""
    from medusa_chat.bench.measure import measure
    from medusa_chat.terminal.reports import bench as bench_report
    from medusa_chat.terminal.reports import bench_charts
    from medusa_chat.terminal.reports.bench_view import timed_view
    from medusa_chat.terminal.reports.progress import progress_bar

    sampling = read_fields(options, Sampling)
    bench_report.check_file(options.json)
    bench_charts.check_folder(options.plot)
    view = timed_view(sampling) if options.view else None
    result: dict[str, Any] = {}

    def keep(found: dict[str, Any]) -> None:
        """Write the result so far: a later part may fail, or be interrupted."""
        result.update(found)
        if options.json:
            write_text(options.json, json.dumps(found) + "\n")

    try:
        measure(_request(options, sampling, view), progress_bar, keep)
    except KeyboardInterrupt:
        left = f"{options.json} holds the parts before" if result and options.json else "no result"
        warn(f"bench was interrupted: {left}")
        return 130
    bench_report.show_bench(result)
    if options.plot:
        for file in bench_charts.plot_bench(result, options.plot):
            say(f"wrote {file}")
    if options.json:
        say(f"wrote {options.json}")
    print_json(result)
    return 0


def _request(options: argparse.Namespace, sampling: Sampling, view: Consume | None) -> Request:
    from medusa_chat.bench.job import BenchJob
    from medusa_chat.bench.measure import Request
    from medusa_chat.bench.peers import check_peers
    from medusa_chat.bench.random_engine import parse_shapes
    from medusa_chat.model.linear.quantization import as_quant
    from medusa_chat.prompts import read_prompts

    check_peers(options.peer)
    settings = read_fields(options, LoadOptions, probing=False)
    modes = [sampling.with_value("mode", name).mode for name in options.modes.split(",")]
    named = any((options.model, options.heads, options.prompts))
    if options.shape and not named and (options.peer or options.view):
        raise UserError(
            "--peer and --view compare replies, which random weights do not have:"
            " give --model or --prompts too"
        )
    job = BenchJob(
        prompts=read_prompts(options.prompts or [SHIPPED_PROMPTS], options.limit),
        modes=modes,
        sampling=sampling,
        rounds=options.rounds,
        turns=options.turns,
        peers=tuple(options.peer),
        view=view,
        histories=options.history,
    )
    shapes = []
    if options.shape:
        shapes = parse_shapes(
            options.shape,
            as_quant(settings.quant),
            quant_heads=as_quant(settings.quant_heads),
            heads=options.shape_heads,
            own=options.own_lm_heads,
        )

    def load(**changes: Any) -> Engine:
        return load_engine(options.model, options.heads, replace(settings, **changes))

    return Request(
        command=shlex.join(["medusa-chat", *options.words]),
        job=job,
        load=load,
        options=settings,
        named=named,
        shapes=shapes,
        contexts=options.contexts,
        parts=tuple(options.part),
    )
