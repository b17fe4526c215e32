"""Train Medusa heads for a model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from medusa_chat.commands.flags import add_fields, given_fields
from medusa_chat.config import LoadOptions, Recipe, UserError, make_recipe
from medusa_chat.terminal.output import say

if TYPE_CHECKING:
    import argparse

    from medusa_chat.training.trainer import Run


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `train`."""
    parser.add_argument("--model", required=True, help="name, folder or hub id of the backbone")
    parser.add_argument(
        "--heads-from", metavar="HEADS", help="heads to start from: file, folder or hub id"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        nargs="+",
        required=True,
        help="messages or ShareGPT JSON, or plain text",
    )
    parser.add_argument(
        "--held-out",
        type=Path,
        metavar="FILE",
        nargs="+",
        default=(),
        help="text to measure the backbone's perplexity on (default: a fiftieth of the data)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        required=True,
        help="folder for heads, model, log and checkpoints",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in --out"
    )
    add_fields(parser, LoadOptions, "models", "template", "ignore_memory")
    add_fields(parser, Recipe)


def run(options: argparse.Namespace) -> int:
    """Train, and print the commands that use the result."""
    from medusa_chat.terminal.reports.training import training

    recipe = make_recipe(**given_fields(options, Recipe))
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns while it is imported
    try:
        from medusa_chat.training.trainer import Run, train
    except ModuleNotFoundError as error:
        raise UserError(f"training needs {error.name}: pip install 'medusa-chat[train]'") from None
    job = Run(
        model=options.model,
        data=tuple(options.data),
        out=options.out,
        recipe=recipe,
        heads=options.heads_from,
        held_out=tuple(options.held_out),
        resume=options.resume,
        models=options.models,
        ignore_memory=bool(options.ignore_memory),
        template=options.template or "",
    )
    with training() as (progress, report):
        wrote = train(job, progress, report)
    if wrote:
        made = _flags_of_result(job)
        say(
            f"wrote {job.out}; next: medusa-chat calibrate {made} --data FILE,"
            f" then medusa-chat {made}"
        )
    return 0


def _flags_of_result(job: Run) -> str:
    """Return the flags that load what a run has trained."""
    from medusa_chat.hub.model_list import resolve_model

    flags = f"--model {job.model} --heads {job.out}"
    if job.recipe.joint:
        flags = f"--model {job.out}"
    spec = resolve_model(job.model, models=job.models, template=job.template)
    return f"{flags} --template {spec.template}" if spec.template else flags
