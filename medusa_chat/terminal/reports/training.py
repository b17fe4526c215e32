"""The live view of a training run, on standard error; plain lines where that is no terminal."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from medusa_chat.terminal.theme import head_style

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from medusa_chat.events import TrainStep


@contextmanager
def training() -> Iterator[tuple[Callable[[TrainStep], None], Callable[[str], None]]]:
    """Yields (progress, say): what shows a TrainStep, and what prints a line."""
    console = Console(stderr=True)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=not console.is_terminal)

    if not console.is_terminal:
        yield (lambda step: say(training_line(step))), say
        return
    # Drawn when a step is logged, without a thread of its own.
    with Live(console=console, auto_refresh=False) as live:
        yield (lambda step: live.update(training_table(step), refresh=True)), say


def training_line(step: TrainStep) -> str:
    """A step as one line of text."""
    heads = "  ".join(f"{share:.1%}" for share in step.top1)
    backbone = "" if step.backbone_loss is None else f"  backbone {step.backbone_loss:.3f}"
    return (
        f"step {step.step}/{step.total}  loss {step.loss:.3f}{backbone}  top-1 {heads}"
        f"  {step.tokens_per_second:,.0f} tokens/s  {step.memory / 2**30:.1f} GiB  {_duration(step.seconds_left)} left"
    )


def training_table(step: TrainStep) -> Group:
    """Progress, time left, and a row for each head."""
    status = Table.grid(padding=(0, 2), expand=False)
    status.add_row(
        f"step {step.step:,} of {step.total:,}",
        ProgressBar(step.total, step.step, width=24),
        f"{_duration(step.seconds_left)} left",
    )
    figures = [f"loss {step.loss:.3f}"]
    if step.backbone_loss is not None:
        figures.append(f"backbone {step.backbone_loss:.3f} + {step.heads_weight:.2g} x heads")
    figures += [f"{step.tokens_per_second:,.0f} tokens/s", f"{step.memory / 2**30:.1f} GiB"]
    table = Table(
        "head", "loss", "top-1", "top-5", "", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for head, (loss, top1, top5) in enumerate(
        zip(step.head_loss, step.top1, step.top5, strict=True), 1
    ):
        bar = Text("█" * round(24 * top1), style=head_style(head))
        bar.append("▒" * (round(24 * top5) - round(24 * top1)), style="dim")
        table.add_row(str(head), f"{loss:.3f}", f"{top1:.1%}", f"{top5:.1%}", bar)
    return Group(status, Text("  ".join(figures)), table)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
