"""The view of a training run: a live table in a terminal, a line per step elsewhere."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from medusa_chat.events import TrainStep
from medusa_chat.terminal.reports import training as training_view
from medusa_chat.terminal.reports.training import training, training_line, training_table

STEP = TrainStep(
    step=1500,
    total=123_456,
    loss=12.3456,
    backbone_loss=1.2345,
    head_loss=(1.5, 2.25, 3.125, 4.0, 5.5),
    top1=(0.8125, 0.5, 0.25, 0.125, 0.0),
    top5=(1.0, 0.75, 0.5, 0.3, 0.011),
    heads_weight=0.01234,
    learning_rates=(2e-3, 5e-4),
    tokens_per_second=123_456.7,
    seconds_left=100_000.4,
    memory=79 * 2**30,
)


def shown(step: TrainStep, width: int) -> list[str]:
    # rich keeps a style's escape codes for the first colour system that draws it: truecolor in
    # test_view
    console = Console(
        record=True,
        width=width,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        _environ={},
    )
    console.print(training_table(step))
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_table_fits_and_shows_every_figure(width: int) -> None:
    status, figures, header, *heads = shown(STEP, width)
    assert max(cell_len(line) for line in (status, figures, header, *heads)) <= width
    assert status.startswith("step 1,500 of 123,456")
    assert status.rstrip().endswith("27:46:40 left")
    assert "loss 12.346  backbone 1.234 + 0.012 x heads  123,457 tokens/s  79.0 GiB" in figures
    assert header.split() == ["head", "loss", "top-1", "top-5"]
    assert [line.split()[:4] for line in heads] == [
        ["1", "1.500", "81.2%", "100.0%"],
        ["2", "2.250", "50.0%", "75.0%"],
        ["3", "3.125", "25.0%", "50.0%"],
        ["4", "4.000", "12.5%", "30.0%"],
        ["5", "5.500", "0.0%", "1.1%"],
    ]
    assert [(line.count("█"), line.count("▒")) for line in heads] == [
        (20, 4),
        (12, 6),
        (6, 6),
        (3, 4),
        (0, 0),
    ]


def test_a_frozen_backbone_has_no_loss_of_its_own() -> None:
    frozen = TrainStep(
        step=1, total=2, loss=3.0, head_loss=(3.0,), top1=(0.5,), top5=(1.0,), seconds_left=61
    )
    assert "backbone" not in "\n".join(shown(frozen, 80))
    assert "1:01 left" in shown(frozen, 80)[0]
    assert "backbone" not in training_line(frozen)


def test_a_line_has_the_same_figures() -> None:
    line = training_line(STEP)
    assert line.startswith(
        "step 1500/123456  loss 12.346  backbone 1.234  top-1 81.2%  50.0%  25.0%  12.5%  0.0%"
    )
    assert line.endswith("  123,457 tokens/s  79.0 GiB  27:46:40 left")


def test_without_a_terminal_each_step_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with training() as (progress, say):
        say("[bold]long[/] " + "word " * 60)
        progress(STEP)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "[bold]long[/] " + "word " * 60 + "\n" + training_line(STEP) + "\n"


def test_in_a_terminal_the_table_is_drawn_over_and_lines_stay_above(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import pyte

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    written = Terminal()
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    plain: Any = Console
    monkeypatch.setattr(
        training_view, "SafeConsole", lambda **given: plain(width=80, height=24, **given)
    )
    with training() as (progress, say):
        say("2,000 tokens in 60 rows")
        for number in (10, 20, 30):
            progress(
                TrainStep(
                    step=number,
                    total=30,
                    loss=1.0,
                    head_loss=(1.0, 2.0),
                    top1=(0.5, 0.25),
                    top5=(0.5, 0.5),
                )
            )
        say("perplexity 3 before, 3 after")
    screen = pyte.Screen(80, 24)
    pyte.Stream(screen).feed(written.getvalue().replace("\n", "\r\n"))
    lines = [line.rstrip() for line in screen.display if line.strip()]
    assert lines[:2] == ["2,000 tokens in 60 rows", "perplexity 3 before, 3 after"]
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "step 30 of 30",
        "loss 1.000",
        "head",
        "1",
        "2",
    ]
