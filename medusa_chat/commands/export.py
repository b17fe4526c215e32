"""Write the heads in the layout of another program, such as TGI, vLLM or TensorRT-LLM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from medusa_chat.commands.flags import add_fields, add_model
from medusa_chat.config import LAYOUTS, LoadOptions, UserError
from medusa_chat.terminal.output import say, warn

if TYPE_CHECKING:
    import argparse


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `export`."""
    add_model(parser)
    add_fields(parser, LoadOptions, "models")
    parser.add_argument(
        "--layout", choices=LAYOUTS, required=True, help="the program or version that will read it"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", required=True, help="new, or an earlier export"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="number format of the heads (default: that of their file)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out whatever it holds")
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload it to this repository of the Hugging Face hub"
    )
    parser.add_argument(
        "--private", action="store_true", help="with --push: make a new repository private"
    )


def run(options: argparse.Namespace) -> int:
    """Export, and upload if asked to."""
    from medusa_chat.export.writing import Export, export
    from medusa_chat.hub.model_list import resolve_model

    if options.private and not options.push:
        raise UserError("--private needs --push")
    job = Export(
        layout=options.layout,
        out=options.out,
        dtype=options.dtype,
        push=options.push,
        private=options.private,
        overwrite=options.overwrite,
    )
    spec = resolve_model(options.model, options.heads, models=options.models)
    for notice in export(spec, job):
        warn(notice)
    uploaded = f" and uploaded it to {options.push}" if options.push else ""
    say(f"wrote {options.out}{uploaded}")
    return 0
