"""What the sub-commands besides chat print: progress on standard error, tables on standard output."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from medusa_chat.config import ModelSpec, Sampling
from medusa_chat.events import Stats, Step, TrainStep
from medusa_chat.terminal.panel import panel
from medusa_chat.terminal.view import ReplyView

_BENCH_ROWS = (
    ("acceptance_length", "acceptance length", "{:.2f} tokens/step"),
    ("overhead", "overhead", "{:.2f} vanilla steps"),
    ("speedup", "speedup over vanilla", "{:.2f}x"),
    ("tokens_per_second", "tokens/s", "{:.1f}"),
    ("vanilla_tokens_per_second", "tokens/s, vanilla", "{:.1f}"),
    ("wall_tokens_per_second", "tokens/s, prefill included", "{:.1f}"),
    ("step_ms", "step", "{:.2f} ms"),
    ("vanilla_step_ms", "step, vanilla", "{:.2f} ms"),
    ("time_to_first_token_ms", "time to first token", "{:.1f} ms"),
)


@contextmanager
def progress(text: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; call what is yielded with (done, total)."""
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # No refresh thread: it would take time from what is being measured.
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task(text, total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, refresh=True)

        yield show


def timed_view(sampling: Sampling) -> Callable[[Iterable[Step]], None]:
    """A consumer that draws a reply as chat does, on a terminal that nobody sees."""
    nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - open as long as the consumer lives
    console = Console(file=nowhere, force_terminal=True, color_system="truecolor", width=100, height=30)

    def draw(steps: Iterable[Step]) -> None:
        stats = Stats()
        with ReplyView(console, lambda width: panel(stats, sampling, width)) as view:
            for step in steps:
                stats.add(step)
                view.add(step)

    return draw


@contextmanager
def training() -> Iterator[Callable[[TrainStep], None]]:
    """A live table of a training run on standard error; plain lines where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda step: console.print(_training_line(step), highlight=False, soft_wrap=True)
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda step: live.update(_training_table(step), refresh=True)


def _training_line(step: TrainStep) -> str:
    heads = "  ".join(f"{100 * accuracy:.1f}%" for accuracy in step.head_accuracy)
    return f"step {step.step}/{step.total}  loss {step.loss:.3f}  top-1 {heads}  {step.tokens_per_second:.0f} tokens/s"


def _training_table(step: TrainStep) -> Table:
    table = Table("head", "loss", "top-1", title=f"step {step.step}/{step.total}, loss {step.loss:.3f}",
                  caption=f"{step.tokens_per_second:.0f} tokens/s")  # fmt: skip
    for head, (loss, accuracy) in enumerate(zip(step.head_loss, step.head_accuracy, strict=True), 1):
        table.add_row(str(head), f"{loss:.3f}", f"{100 * accuracy:.1f}%")
    return table


def show_bench(result: dict[str, Any]) -> None:
    """The result of bench.bench as a table."""
    modes = result["modes"]
    title = (
        f"{result['model']} on {result['device']}, {result['dtype']}; {result['prompts']} prompts x {result['rounds']}"
    )
    table = Table("", *modes, title=title, caption=f"tree {result['tree']}")
    for key, name, form in _BENCH_ROWS:
        table.add_row(name, *(form.format(mode[key]) if key in mode else "-" for mode in modes.values()))
    heads = sorted({head for mode in modes.values() for head in mode["head_acceptance"]}, key=int)
    for head in heads:
        rates = (mode["head_acceptance"].get(head) for mode in modes.values())
        table.add_row(f"head {head} accepted when tested", *("-" if rate is None else f"{rate:.0%}" for rate in rates))
    for name, peer in result["peers"].items():
        table.add_section()
        table.add_row(f"{name}, tokens/s, prefill included", f"{peer['tokens_per_second']:.1f}")
        table.add_row(f"times {name}", *(f"{peer['ratio'][mode]:.2f}x" for mode in modes))
        table.add_row(f"our vanilla, times {name}", f"{peer['vanilla_ratio']:.2f}x")
    if "view" in result:
        table.add_row("tokens/s kept with the live view", f"{result['view']['share_of_tokens_per_second']:.1%}")
    Console().print(table)


def show_checks(checks: Sequence[dict[str, Any]]) -> None:
    """The result of verify as a table, and what the first fault of each check was."""
    table = Table("check", "replies", "equal", "near-ties", "faults", "largest gap")
    for check in checks:
        style = "bold red" if check["faults"] else ""
        numbers = (str(check[key]) for key in ("replies", "equal", "near_ties", "faults"))
        table.add_row(check["name"], *numbers, f"{check['largest_gap']:.2g}", style=style)
    console = Console()
    console.print(table)
    for check in checks:
        if check["first_fault"]:
            console.print(f"{check['name']}: {check['first_fault']}", markup=False)


def show_accuracy(accuracy: Sequence[Sequence[float]]) -> None:
    """Top-i accuracy of each head, with a bar for its top-1."""
    ranks = [rank for rank in (1, 2, 3, 5, 10, 20) if rank <= len(accuracy[0])]
    table = Table("head", *(f"top-{rank}" for rank in ranks), "")
    for head, row in enumerate(accuracy, 1):
        table.add_row(str(head), *(f"{row[rank - 1]:.1%}" for rank in ranks), "█" * round(30 * row[0]))
    Console().print(table)


def show_models(specs: Sequence[ModelSpec]) -> None:
    """The models that --model knows by name."""
    table = Table("model", "backbone", "licence", "description")
    for spec in specs:
        table.add_row(spec.name, spec.backbone, spec.licence, spec.description)
    Console().print(table)
