"""The live view of a training run on standard error; plain lines if that is no terminal."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from medusa_chat.terminal.output import SafeConsole
from medusa_chat.terminal.theme import head_style
from medusa_chat.text import duration_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from medusa_chat.events import TrainStep

BAR = 24  # cells


@contextmanager
def training() -> Iterator[tuple[Callable[[TrainStep], None], Callable[[str], None]]]:
    """Yield two functions: one shows the progress of a TrainStep, the other prints a line."""
    console = SafeConsole(stderr=True)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=not console.is_terminal)

    if not console.is_terminal:
        yield (lambda step: say(training_line(step))), say
        return
    # The table is drawn when a step is logged, without a thread of its own.
    with Live(console=console, auto_refresh=False) as live:
        yield (lambda step: live.update(training_table(step), refresh=True)), say


def training_line(step: TrainStep) -> str:
    """Format a step as one line of text."""
    losses = f"loss {step.loss:.3f}"
    if step.backbone_loss is not None:
        losses += f"  backbone {step.backbone_loss:.3f}"
    heads = "  ".join(f"{share:.1%}" for share in step.top1)
    machine = "  ".join(_machine_figures(step))
    left = duration_text(step.seconds_left)
    return f"step {step.step}/{step.total}  {losses}  top-1 {heads}  {machine}  {left} left"


def training_table(step: TrainStep) -> Group:
    """Draw the progress, the time left, and a row for each head."""
    status = Table.grid(padding=(0, 2), expand=False)
    status.add_row(
        f"step {step.step:,} of {step.total:,}",
        ProgressBar(step.total, step.step, width=BAR),
        f"{duration_text(step.seconds_left)} left",
    )
    figures = [f"loss {step.loss:.3f}"]
    if step.backbone_loss is not None:
        figures.append(f"backbone {step.backbone_loss:.3f} + {step.heads_weight:.2g} x heads")
    figures += _machine_figures(step)
    return Group(status, Text("  ".join(figures)), _heads_table(step))


def _heads_table(step: TrainStep) -> Table:
    columns = ("head", "loss", "top-1", "top-5", "")
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    rows = zip(step.head_loss, step.top1, step.top5, strict=True)
    for head, (loss, top1, top5) in enumerate(rows, 1):
        solid = round(BAR * top1)
        bar = Text("█" * solid, style=head_style(head))
        bar.append("▒" * (round(BAR * top5) - solid), style="dim")
        table.add_row(str(head), f"{loss:.3f}", f"{top1:.1%}", f"{top5:.1%}", bar)
    return table


def _machine_figures(step: TrainStep) -> tuple[str, str]:
    return f"{step.tokens_per_second:,.0f} tokens/s", f"{step.memory / 2**30:.1f} GiB"
