"""A race: two runs alone, shown by the times of their own steps."""

from __future__ import annotations

import io
import json
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pyte
import pytest
from rich.console import Console

from medusa_chat.config import Message, UserError
from medusa_chat.sampling import Sampling
from medusa_chat.stats import Stats
from medusa_chat.terminal.chat.command import Chat, Scene
from medusa_chat.terminal.chat.commands import dispatch
from medusa_chat.terminal.chat.session import Session
from medusa_chat.terminal.race.columns import standing, verdict
from medusa_chat.terminal.race.lanes import Race
from medusa_chat.terminal.race.recording import record
from medusa_chat.terminal.race.screen import show_race
from tests.helpers.fake_engine import REPLY, FakeEngine, script

if TYPE_CHECKING:
    from pathlib import Path

    from medusa_chat.events import Step
    from medusa_chat.sampling import Mode

PROMPT: list[Message] = [{"role": "user", "content": "hello"}]


def finished(mode: Mode = "greedy", replies: tuple[str, ...] = (REPLY,)) -> Race:
    race = Race(FakeEngine(replies), PROMPT, Sampling(mode=mode))
    for lane in (race.medusa, race.vanilla):
        list(race.run(lane))
    return race


class Quiet(nullcontext[None]):
    """Stands for a standard input that is no terminal."""

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass


def text_of(rows: list[object]) -> str:
    return "\n".join(str(row) for row in rows)


def test_each_run_is_shown_at_its_own_speed() -> None:
    race = finished()
    plain = list(script(REPLY, mode="vanilla"))
    clock = plain[0].seconds * 5.5
    shown = text_of([*standing(race, clock, 100)])
    left = " ".join(line.partition("│")[0] for line in shown.splitlines()[2:])
    right = " ".join(line.partition("│")[2] for line in shown.splitlines()[2:])
    expected = "".join(step.text for step in plain[:5])
    assert left.split() == expected.split()
    drafted = list(script(REPLY))
    done = [step.text for number, step in enumerate(drafted) if _end(drafted, number) <= clock]
    assert right.split() == "".join(done).split()
    assert len(done) < len(drafted)
    assert "5 tokens after 0.1 s" in shown


def _end(steps: list[Step], number: int) -> float:
    return Stats.of(steps[: number + 1]).seconds


def test_the_end_shows_both_speeds_the_ratio_and_that_the_texts_are_equal() -> None:
    race = finished()
    slow = Stats.of(script(REPLY, mode="vanilla"))
    fast = Stats.of(script(REPLY))
    shown = text_of([*standing(race, 100.0, 120), verdict(race)])
    for stats in (slow, fast):
        figures = f"{stats.tokens_per_second:.1f} tokens/s · done after {stats.seconds:.2f} s"
        assert figures in shown
    assert fast.tokens_per_second
    assert slow.tokens_per_second
    ratio = fast.tokens_per_second / slow.tokens_per_second
    assert f"{ratio:.1f}x faster with heads" in shown
    assert "the same text" in shown
    assert "each ran alone, the one with heads first" in shown


def test_other_texts_are_told_apart_from_texts_that_may_differ() -> None:
    race = finished("typical", ("one two", "three four"))
    assert "typical sampling writes its own text" in str(verdict(race))
    race = finished("exact", (REPLY, REPLY + " And more."))
    assert "the texts differ from token" in str(verdict(race))


@pytest.mark.parametrize(
    ("mode", "temperature", "raced", "greedy"),
    [
        ("vanilla", 0.0, "greedy", True),
        ("vanilla", 0.7, "exact", False),
        ("exact", 0.7, "exact", False),
        ("greedy", 0.7, "greedy", True),
    ],
)
def test_both_draw_alike(mode: Mode, temperature: float, raced: str, greedy: bool) -> None:
    race = Race(FakeEngine(), PROMPT, Sampling(mode=mode, temperature=temperature, seed=7))
    assert race.medusa.sampling.mode == raced
    assert race.vanilla.sampling.mode == "vanilla"
    assert race.vanilla.sampling.greedy == race.medusa.sampling.greedy == greedy
    assert race.vanilla.sampling.seed == race.medusa.sampling.seed == 7


def test_narrow_screens_stack_the_runs() -> None:
    race = finished()
    shown = [str(row) for row in standing(race, 100.0, 59)]
    assert "│" not in "".join(shown)
    assert shown.index("without heads") < shown.index("with heads · greedy")
    assert "".join(shown).count("river") == 2
    assert max(map(len, shown)) <= 59


def test_a_race_on_a_screen_leaves_only_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medusa_chat.terminal.race.screen.QuietInput", Quiet)
    screen = pyte.Screen(90, 30)
    stream = pyte.Stream(screen)

    class Terminal(io.StringIO):
        def write(self, text: str) -> int:
            stream.feed(text.replace("\n", "\r\n"))
            return len(text)

    console = Console(
        file=Terminal(), force_terminal=True, color_system="truecolor", width=90, height=30
    )
    race = Race(FakeEngine(), PROMPT, Sampling())
    assert show_race(console, race, plain=True)
    shown = "\n".join(screen.display)
    assert shown.count("without heads") == 1
    assert shown.count("Once upon") == 2


def test_a_cast_shows_every_step_at_its_time(tmp_path: Path) -> None:
    race = finished()
    record(race, tmp_path / "race.cast")
    header, *events = map(json.loads, (tmp_path / "race.cast").read_text().splitlines())
    assert header["version"] == 2
    screen = pyte.Screen(header["width"], header["height"])
    stream = pyte.Stream(screen)
    times = [at for at, kind, _ in events if kind == "o"]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(max(lane.seconds for lane in race.lanes), abs=1e-3)
    for at, _, frame in events:
        stream.feed(frame)
        shown = "".join(line.partition("│")[0] for line in screen.display)
        for step in race.vanilla.until(at)[:-1]:
            assert step.text.strip()[:5] in shown
    assert "the same text" in "".join(screen.display)


def test_a_picture_shows_the_end(tmp_path: Path) -> None:
    record(finished(), tmp_path / "race.svg")
    picture = (tmp_path / "race.svg").read_text().replace("&#160;", " ")
    assert "done after" in picture
    assert "2c64ed" in picture  # the colour of head 1


@pytest.mark.parametrize("name", ["race.png", "nowhere/race.svg"])
def test_a_file_that_cannot_be_recorded_to_is_refused_before_the_race(
    tmp_path: Path, name: str
) -> None:
    chat = Chat(Session(FakeEngine(), Sampling()))
    with pytest.raises(UserError, match=r"recorded to FILE\.svg|there is no folder"):
        dispatch(chat, f"/race --record {tmp_path / name} hello")
    with pytest.raises(UserError, match="usage: /race"):
        dispatch(chat, "/race --record")


@pytest.mark.parametrize("suffix", ["svg", "cast"])
def test_a_recording_replaces_nothing_else(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"race.{suffix}"
    record(finished(), file)
    record(finished(), file)
    file.write_text("my own drawing")
    with pytest.raises(UserError, match="is no recording of a race; choose another name"):
        record(finished(), file)
    assert file.read_text() == "my own drawing"
    file.unlink()
    file.symlink_to(file)
    with pytest.raises(UserError, match="is no recording of a race"):
        record(finished(), file)


def test_the_conversation_stays_as_it_was(tmp_path: Path) -> None:
    engine = FakeEngine()
    session = Session(engine, Sampling())
    with pytest.raises(UserError, match="no message yet"):
        dispatch(Chat(session), "/race")
    list(session.ask("one"))
    list(session.ask("two"))
    before = (list(session.messages), session.last, session.conversation, session.answer)
    scene = dispatch(Chat(session), f'/race --record "{tmp_path / "my race.svg"}"')
    assert isinstance(scene, Scene)
    scene.show(Console(file=io.StringIO(), width=80), plain=False)
    assert before == (session.messages, session.last, session.conversation, session.answer)
    assert engine.prompts[-1] == engine.prompts[1]  # up to the last message
    assert (tmp_path / "my race.svg").exists()
    scene = dispatch(Chat(session), "/race tell me")
    assert isinstance(scene, Scene)
    scene.show(Console(file=io.StringIO(), width=80), plain=False)
    assert [each["content"] for each in engine.prompts[-1]] == [engine.system, "tell me"]
