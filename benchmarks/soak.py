"""Simulate a chat for hours, and write memory and tokens/s every ten minutes.

    python benchmarks/soak.py FILE [HOURS [MINUTES]]

The bundled model answers the shipped prompts with the default step: conversations of several
turns, in all modes, some replies interrupted, some renewed, with a new conversation now and then.
Each line of FILE is a JSON object of the last MINUTES (10); the last line compares the end with the
first hour, or with the first tenth of a shorter run. Growth of memory should stay below 2%.
"""

from __future__ import annotations

import json
import random
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil

import medusa_chat
from medusa_chat.config import SHIPPED_PROMPTS, UserError
from medusa_chat.prompts import read_prompts
from medusa_chat.sampling import MODES, Sampling
from medusa_chat.terminal.chat.session import Session

if TYPE_CHECKING:
    from medusa_chat.decoding.engine import Engine

DEFAULTS = ["soak.jsonl", "8", "10"]
INTERRUPTED = 0.1  # share of the replies
RENEWED = 0.1
TURNS = 6  # of the longest conversation


@dataclass
class Window:
    """Figures since the last line.

    Attributes:
        seconds: of decoding.
    """

    began: float = field(default_factory=time.monotonic)
    replies: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def line(self, started: float) -> dict[str, Any]:
        """Return a line of the result."""
        process = psutil.Process()
        memory = process.memory_full_info()
        return {
            "minutes": round((time.monotonic() - started) / 60, 1),
            "rss_mib": round(memory.rss / 2**20, 1),
            "uss_mib": round(memory.uss / 2**20, 1),
            "threads": process.num_threads(),
            "files": process.num_fds(),
            "replies": self.replies,
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens / max(self.seconds, 1e-9), 1),
        }


def main() -> None:
    given = sys.argv[1:]
    name, hours, minutes = given + DEFAULTS[len(given) :]
    engine = medusa_chat.load()
    started = time.monotonic()
    until = started + 3600 * float(hours)
    lines: list[dict[str, Any]] = []
    window = Window()
    with Path(name).open("w", encoding="utf-8") as out:
        for session in conversations(engine, until):
            add(window, session)
            if time.monotonic() - window.began >= 60 * float(minutes):
                lines.append(window.line(started))
                print(json.dumps(lines[-1]), file=out, flush=True)
                window = Window()
        if lines:
            print(json.dumps(summary(lines)), file=out)


def conversations(engine: Engine, until: float) -> Any:
    """Chat until a time; yield the session after each reply."""
    chance = random.Random(0)
    questions = [turn for prompt in read_prompts([SHIPPED_PROMPTS]) for turn in prompt.turns]
    while time.monotonic() < until:
        sampling = Sampling(mode=chance.choice(MODES), seed=chance.randrange(1000))
        session = Session(engine, sampling)
        for _ in range(chance.randrange(1, TURNS + 1)):
            try:
                reply(session, chance, chance.choice(questions))
            except UserError:  # the context is full
                break
            yield session
            if time.monotonic() >= until:
                return


def reply(session: Session, chance: random.Random, question: str) -> None:
    """Ask a question or renew the last reply, and read all of it or a part."""
    renewed = session.messages and chance.random() < RENEWED
    most = chance.randrange(1, 20) if chance.random() < INTERRUPTED else None
    with closing(session.regen() if renewed else session.ask(question)) as steps:
        for number, _ in enumerate(steps):
            if number == most:
                return


def add(window: Window, session: Session) -> None:
    window.replies += 1
    window.tokens += session.last.new_tokens
    window.seconds += session.last.seconds


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare the end of a run with its beginning."""
    count = max(1, min(6, len(lines) // 10))
    growth = {}
    for name in ("rss_mib", "uss_mib", "tokens_per_second"):
        first = median(line[name] for line in lines[:count])
        last = median(line[name] for line in lines[-count:])
        growth[name] = round(last / first - 1, 4)
    return {"growth": growth, "replies": sum(line["replies"] for line in lines)}


if __name__ == "__main__":
    main()
