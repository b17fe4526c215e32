"""List the models that --model knows by name, and which of them fit this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from medusa_chat.commands.flags import add_fields
from medusa_chat.config import LoadOptions
from medusa_chat.terminal.output import print_json

if TYPE_CHECKING:
    import argparse


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `models`."""
    add_fields(parser, LoadOptions, "models")
    parser.add_argument("--json", action="store_true", help="print a list of objects")


def run(options: argparse.Namespace) -> int:
    """Print the list."""
    from medusa_chat.commands.catalogue import catalogue
    from medusa_chat.terminal.reports.models import show_models

    listed = [asdict(model) for model in catalogue(options.models)]
    if options.json:
        print_json(listed, indent=2)
    else:
        show_models(listed)
    return 0
