"""Hold the panel's speedup against a stop-watch, over many replies of one conversation.

    python benchmarks/panel.py [--model MODEL] [--replies N] [--busy] FILE ...

Each prompt is answered with heads and by vanilla decoding, as the chat does it, by --tokens tokens;
a clock outside of the engine times both from the first step to the last. --busy keeps one core busy
meanwhile. The result is a line of JSON: the conversation's figure, that of the clock, and the
largest share by which a shown speedup exceeded its acceptance length.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import medusa_chat
from medusa_chat.prompts import read_prompts
from medusa_chat.terminal.chat.session import Session

if TYPE_CHECKING:
    from collections.abc import Iterable

    from medusa_chat.events import Step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--model")
    parser.add_argument("--replies", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--busy", action="store_true")
    options = parser.parse_args()
    with ExitStack() as stack:
        if options.busy:
            loop = [sys.executable, "-c", "while True: pass"]
            stack.callback(stack.enter_context(subprocess.Popen(loop)).kill)
        print(json.dumps({"busy": options.busy} | measure(options)))


def measure(options: argparse.Namespace) -> dict[str, float]:
    engine = medusa_chat.load(options.model)
    # Of a small model's replies some have ten tokens, too few for a clock.
    sampling = medusa_chat.Sampling(max_new_tokens=options.tokens, ignore_eos=True)
    session = Session(engine, sampling)
    baseline = Session(engine, replace(sampling, mode="vanilla"))
    heads, plain = Clock(), Clock()
    excess = []
    for prompt in read_prompts(options.files, options.replies):
        text = prompt.opening()[-1]["content"]
        heads.time(session.ask(text))
        shown = session.last.shown_speedup(session.conversation)
        if shown and session.last.acceptance_length:
            excess.append(shown.value / session.last.acceptance_length - 1)
        session.undo()
        plain.time(baseline.ask(text))
        baseline.undo()
    figure = session.conversation.speedup or 0.0
    by_clock = heads.rate / plain.rate
    return {
        "replies": options.replies,
        "acceptance_length": round(session.conversation.acceptance_length or 0.0, 3),
        "shown_speedup": round(figure, 3),
        "speedup_by_clock": round(by_clock, 3),
        "shown_over_clock": round(figure / by_clock, 3),
        "largest_excess_over_length": round(max(excess), 3),
    }


class Clock:
    """Tokens and seconds of replies behind their first step, which holds the prefill."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0

    def time(self, steps: Iterable[Step]) -> None:
        """Take in a reply."""
        moments = [(time.perf_counter(), len(step.tokens)) for step in steps]
        self.seconds += moments[-1][0] - moments[0][0]
        self.tokens += sum(count for _, count in moments[1:])

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


if __name__ == "__main__":
    main()
