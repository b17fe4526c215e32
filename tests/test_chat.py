"""The whole program with the bundled model, as the README's first command opens it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

import medusa_chat
from medusa_chat.sampling import Sampling
from medusa_chat.stats import Stats
from tests.helpers.pseudo_terminal import CTRL_C, Terminal, assert_colours

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from medusa_chat.config import Message
    from medusa_chat.events import Step

SETTINGS = ("--dtype", "float32", "--tree", "mc_sim_7b_63")
QUESTION = "Tell me a fairy tale."


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    command = ("-m", "medusa_chat.cli", *SETTINGS)
    home = {"XDG_STATE_HOME": str(tmp_path)}
    opened = Terminal(*command, columns=100, rows=40, environment=home)
    yield opened
    opened.child.close(force=True)


def expected_steps() -> list[Step]:
    """Decode the same reply with the engine itself; greedy steps depend on the model only."""
    engine = medusa_chat.load(dtype="float32", tree="mc_sim_7b_63")
    prompt: list[Message] = [{"role": "user", "content": QUESTION}]
    return list(engine.generate(prompt, Sampling()))


def figures(text: str) -> dict[str, list[str]]:
    """Read the /stats table on the screen: name -> [this reply, conversation]."""
    rows = [line.split("  ") for line in text.splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    return {row[0]: row[1:] for row in cells if len(row) == 3}


def lines_below_cursor(terminal: Terminal) -> list[str]:
    """Lines of the screen; none while the panel is half drawn, with the cursor at its end."""
    display: list[str] = terminal.screen.display
    return display[terminal.screen.cursor.y + 1 :]


def test_a_conversation_as_a_user_has_it(terminal: Terminal, tmp_path: Path) -> None:
    steps = expected_steps()
    stats = Stats.of(steps)
    terminal.say(QUESTION)  # typed while the model loads
    terminal.see("■ 4 ahead")
    terminal.replies(1)
    first_words = "".join(step.text for step in steps)[:30]
    row = next(row for row in range(40) if terminal.screen.display[row].startswith(first_words))
    assert_colours(terminal, row, steps)
    terminal.say("/stats")
    shown = figures(terminal.see("prefill time"))
    assert shown["new tokens"] == [str(stats.new_tokens)] * 2
    assert shown["steps"][0] == str(stats.steps)
    assert shown["acceptance length"][0] == f"{stats.acceptance_length:.2f}"
    footer = next(line for line in terminal.text.splitlines() if "tokens per step · " in line)
    assert footer.startswith(f"{stats.acceptance_length:.1f} tokens per step")
    assert shown["tokens/s"][0] in footer

    terminal.say("/typical")
    terminal.see("typical · temperature 0.7")
    terminal.say("What is the capital of France?")
    terminal.replies(2)

    terminal.say("/set max_new_tokens 900")
    terminal.say("/set ignore_eos on")
    terminal.say("Tell me a long story.")
    terminal.see(lambda _: "tokens/s" in "".join(lines_below_cursor(terminal)[1:2]))
    terminal.send(CTRL_C)
    terminal.see("[stopped]")
    terminal.see(lambda _: terminal.at_prompt)
    terminal.say(f"/save {tmp_path / 'talk.json'}")
    terminal.see("saved 6 messages")
    terminal.say("/heads")
    terminal.see("head 1")
    terminal.say("/tree")
    terminal.see("mc_sim_7b_63: 64 nodes")
    terminal.say("/exit")
    assert terminal.status() == 0
    assert len(json.loads((tmp_path / "talk.json").read_text())["messages"]) == 6
