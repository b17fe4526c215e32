"""A finished race as a picture (SVG) or an asciinema cast, made from the times of its steps."""

from __future__ import annotations

import io
import json
import os
import re
from typing import TYPE_CHECKING

from rich.text import Text

from medusa_chat.config import UserError
from medusa_chat.files import read_text, resolved, write_text
from medusa_chat.terminal.live import rendered
from medusa_chat.terminal.output import SafeConsole
from medusa_chat.terminal.race.columns import standing, verdict
from medusa_chat.terminal.wrapping import wrapped

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rich.console import Console

    from medusa_chat.terminal.race.lanes import Race

WIDTH = 100  # cells of a recording
TEXT_ROWS = 14
FRAMES_PER_SECOND = 20
SUFFIXES = (".svg", ".cast")
TITLE = "medusa-chat race"  # in every recording
TITLED = re.compile(re.escape(TITLE).replace(r"\ ", "(?: |&#160;)"))  # as a picture writes it


def check_recording(file: Path) -> None:
    """Raise UserError for a file that cannot be written to, or holds no recording."""
    if file.suffix not in SUFFIXES:
        raise UserError(f"a race is recorded to FILE.svg or FILE.cast, not to {file}")
    if not file.absolute().parent.is_dir():
        raise UserError(f"cannot write {file}: there is no folder {file.absolute().parent}")
    if os.path.lexists(file) and not _is_recording(file):
        raise UserError(f"{file} is no recording of a race; choose another name")


def _is_recording(file: Path) -> bool:
    """Tell if a file is a recording, which another one may replace."""
    try:
        return file.is_file() and bool(TITLED.search(read_text(file)))
    except (OSError, ValueError):
        return False


def record(race: Race, file: Path, colours: str | None = None) -> None:
    """Write a finished race to a file. Raises UserError.

    Args:
        race: both runs have ended.
        file: FILE.svg or FILE.cast.
        colours: of the terminal, as rich names them: rich remembers the codes of a style, so that
            one program cannot use two systems. None if nothing was coloured.
    """
    check_recording(file)
    console = SafeConsole(
        file=io.StringIO(),
        record=True,
        width=WIDTH,
        force_terminal=True,
        color_system=colours or "truecolor",
        highlight=False,
        no_color=False,
        legacy_windows=False,
    )
    text = _svg(race, console) if file.suffix == ".svg" else _cast(race, console)
    try:
        write_text(resolved(file), text)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from None


def _end(race: Race) -> float:
    return max(lane.seconds for lane in race.lanes)


def _rows(race: Race, clock: float) -> list[Text]:
    rows = standing(race, clock, WIDTH, TEXT_ROWS)
    if clock >= _end(race):
        rows += [Text(), *wrapped(verdict(race), WIDTH)]
    return rows


def _svg(race: Race, console: Console) -> str:
    for row in _rows(race, _end(race)):
        console.print(row, soft_wrap=True)
    return console.export_svg(title=TITLE)


def _cast(race: Race, console: Console) -> str:
    height = len(_rows(race, _end(race))) + 1
    header = {"version": 2, "width": WIDTH, "height": height, "title": TITLE}
    lines = [header, *([round(at, 3), "o", frame] for at, frame in _frames(race, console))]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _frames(race: Race, console: Console) -> Iterator[tuple[float, str]]:
    """Yield the screen at each moment at which it is another one than before."""
    end = _end(race)
    count = int(end * FRAMES_PER_SECOND) + 1
    clocks = [number / FRAMES_PER_SECOND for number in range(count)]
    before = ""
    for clock in [*clocks, end]:
        frame = rendered(console, _rows(race, clock))
        if frame != before:
            yield clock, "\x1b[H" + frame.replace("\n", "\x1b[K\r\n") + "\x1b[J"
            before = frame
