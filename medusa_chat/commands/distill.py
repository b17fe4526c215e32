"""Let a model answer prompts, to train its heads on the answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from medusa_chat.commands.flags import add_fields, add_prompts, count, read_fields
from medusa_chat.config import LoadOptions
from medusa_chat.terminal.output import say

if TYPE_CHECKING:
    import argparse


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `distill`."""
    parser.add_argument(
        "--model",
        help="name, folder, GGUF file or hub id of the backbone; not loaded with --server",
    )
    more = "; or self:N, and the model invents the user turns of N conversations"
    add_prompts(parser, required=True, more=more)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="JSONL file; an interrupted run continues in it",
    )
    parser.add_argument(
        "--server",
        metavar="URL",
        help="let an OpenAI-compatible server answer; its key is OPENAI_API_KEY",
    )
    parser.add_argument(
        "--server-model", metavar="NAME", help="the server's name for the model; default: its first"
    )
    parser.add_argument(
        "--system", default="", help="system prompt of conversations that have none"
    )
    parser.add_argument(
        "--turns", type=count, default=3, help="user turns to answer in each conversation"
    )
    parser.add_argument("--batch", type=count, default=64, help="conversations answered at once")
    parser.add_argument(
        "--max-new-tokens", type=count, default=160, help="longest reply; a longer one is cut"
    )
    parser.add_argument("--temperature", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    add_fields(parser, LoadOptions, "device", "models", "template", "ignore_memory")


def run(options: argparse.Namespace) -> int:
    """Write the conversations, and print how many prompts got an answer."""
    from medusa_chat.terminal.reports.progress import progress_bar
    from medusa_chat.training.distillation import distill
    from medusa_chat.training.questions import DistillJob

    settings = read_fields(options, LoadOptions)
    plan = DistillJob(
        turns=options.turns,
        batch=options.batch,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        system=options.system,
        template=settings.template,
    )
    with progress_bar("answering") as progress:
        kept, total = distill(
            options.model,
            options.prompts,
            options.out,
            plan,
            limit=options.limit,
            server=options.server,
            server_model=options.server_model,
            device=settings.device,
            models=settings.models,
            ignore_memory=settings.ignore_memory,
            progress=progress,
        )
    line = f"wrote {options.out}: {kept} conversations"
    if kept < total:
        line += f"; {total - kept} of {total} prompts got no answer, or none that fits the context"
    say(line)
    return 0
