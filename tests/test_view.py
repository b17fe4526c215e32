"""The screen while a reply streams, and the scrollback after it."""

from __future__ import annotations

import itertools
import math
import unicodedata
from typing import TYPE_CHECKING, Any

import pyte
import pytest
from rich.cells import cell_len
from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style
from rich.text import Text

from medusa_chat.events import COPIED, Step, Token
from medusa_chat.sampling import Sampling
from medusa_chat.stats import Stats
from medusa_chat.terminal.live import ERASE_BELOW, REFRESH_SECONDS
from medusa_chat.terminal.panel import faster, footer, panel
from medusa_chat.terminal.theme import COPIED_COLOUR, HEAD_COLOURS, head_mark, head_style, legend
from medusa_chat.terminal.thoughts import Thoughts
from medusa_chat.terminal.view import ReplyView
from medusa_chat.terminal.wrapping import Flow, breaks, cells
from medusa_chat.text import sanitize
from tests.helpers.fake_engine import REPLY, coloured, script

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LONG_WORD = "supercalifragilisticexpialidociousandthenfivemoreforgoodmeasure"
LONG = (
    f"A reply that is longer than the screen: {LONG_WORD} ends.\n\n"
    "- first, 你好世界，这是一个很长的句子没有空格可以断行所以要在字间断开。 Then on.\n"
    "    indented code = [1, 2]\n"
    "- an emoji 🦊🦊🦊, an accent e\u0301, and [red]no markup[/red] :smile:\n"
) * 4
REPLIES = {
    "plain": REPLY,
    "long": LONG,
    "lines": "\n\n a\n\n\nb\n",
    "spaces": "x" + " " * 130 + "y z",
}
WIDTHS = (20, 33, 80, 100)
FIGURES = "acceptance length 2.00"


class Screen:
    """A terminal emulator as a file to write to, with its scrollback."""

    encoding = "utf-8"

    def __init__(self, width: int, height: int = 12) -> None:
        self.screen = pyte.HistoryScreen(width, height, history=10_000, ratio=0.5)
        self.stream = pyte.Stream(self.screen)
        self.refreshes = 0

    def write(self, text: str) -> int:
        self.refreshes += text.startswith(ERASE_BELOW)
        self.stream.feed(text.replace("\n", "\r\n"))
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError

    @property
    def rows(self) -> list[list[Any]]:
        """Scrollback and screen as rows of characters, without the empty half of wide ones."""
        kept = [*self.screen.history.top]
        kept += [self.screen.buffer[row] for row in range(self.screen.lines)]
        columns = range(self.screen.columns)
        return [[row[column] for column in columns if row[column].data] for row in kept]

    @property
    def lines(self) -> list[str]:
        return ["".join(char.data for char in row).rstrip() for row in self.rows]


def console(screen: Screen, **options: Any) -> Console:
    settings = {"color_system": "truecolor", "highlight": False, "_environ": {}, **options}
    return Console(
        file=screen,  # type: ignore[arg-type]
        force_terminal=True,
        width=screen.screen.columns,
        height=screen.screen.lines,
        **settings,
    )


def solid(text: str) -> str:
    """Remove the white space from a text, and compose it as the emulator does."""
    return unicodedata.normalize("NFC", "".join(text.split()))


def two_rows(width: int) -> list[Text]:
    return [Text(FIGURES[:width]), Text("speedup 2.00×"[:width])]


def show(screen: Screen, steps: Iterable[Step], **options: Any) -> None:
    marks = options.pop("marks", False)
    clock = itertools.count().__next__
    with ReplyView(console(screen, **options), two_rows, marks=marks, clock=clock) as view:
        for step in steps:
            view.add(step)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", REPLIES)
def test_scrollback_is_the_whole_text_wrapped_and_coloured(name: str, width: int) -> None:
    text = REPLIES[name]
    steps = list(script(text))
    screen = Screen(width)
    show(screen, steps)
    at_once = Flow()
    at_once.feed(text, Style())
    rows = [*at_once.take(width), at_once.growing]
    wrapped = [unicodedata.normalize("NFC", row.plain) for row in rows]
    assert "\n".join(screen.lines).rstrip("\n").split("\n") == wrapped
    assert solid("".join(wrapped)) == solid(text)
    characters = itertools.chain.from_iterable(screen.rows)
    on_screen = [(char.data, char.fg) for char in characters if not char.data.isspace()]
    accents = [(char, colour) for char, colour in coloured(steps) if char != "\u0301"]
    assert [(char if char != "é" else "e", colour) for char, colour in on_screen] == accents


@pytest.mark.parametrize("width", WIDTHS)
def test_words_break_only_where_no_row_holds_them(width: int) -> None:
    flow = Flow()
    flow.feed(LONG, Style())
    words = set(LONG.split())
    rows = [*flow.take(width), flow.growing]
    assert all(cells(row.plain) <= width for row in rows)
    for word in itertools.chain.from_iterable(row.plain.split() for row in rows):
        whole = word in words
        part_of_long = any(word in other and cells(other) > width for other in words)
        assert whole or part_of_long or any(ord(char) > 0x3000 for char in word)


def test_ideographs_break_between_but_not_before_a_stop() -> None:
    assert breaks("你好世界。", 8) == [3]
    assert breaks("ab 你好", 6) == [4]


def test_rows_are_filled_to_the_last_column() -> None:
    assert breaks("ab cd", 5) == []
    assert breaks("ab cd", 4) == [3]
    assert breaks("abcdef", 3) == [3]
    assert breaks("a abcdef", 3) == [2, 5]


def test_joined_emoji_are_counted_at_their_widest() -> None:
    assert cells("👩\u200d🚀") == 4
    assert cells("❤\ufe0f") == 2
    assert breaks("👩\u200d🚀" * 3, 8) == [6]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_panel_is_shown_once_below_the_newest_text(width: int) -> None:
    screen = Screen(width)
    newest = ""
    with ReplyView(console(screen), two_rows, clock=itertools.count().__next__) as view:
        for step in script(LONG):
            view.add(step)
            newest = (newest + step.text).rstrip()
            lines = [line for line in screen.lines if line]
            assert sum(FIGURES[:width] in line for line in lines) == 1
            assert lines[-2:] == [FIGURES[:width], "speedup 2.00×"]
            assert solid("".join(lines[:-2])).endswith(solid(newest)[-8:])
    assert FIGURES[:width] not in "\n".join(screen.lines)


def test_the_rows_above_the_reply_stay() -> None:
    screen = Screen(40, 6)
    screen.write("one\ntwo\n")
    show(screen, script(LONG))
    assert screen.lines[:3] == ["one", "two", "A reply that is longer than the screen:"]


def test_a_wider_terminal_in_mid_reply() -> None:
    screen = Screen(30)
    terminal = console(screen)
    steps = list(script(LONG))
    with ReplyView(terminal, two_rows, clock=itertools.count().__next__) as view:
        for number, step in enumerate(steps):
            if number == 9:
                screen.screen.resize(columns=70)
                terminal.width = 70
            view.add(step)
            assert sum(FIGURES in line for line in screen.lines) == 1
    assert solid("".join(screen.lines)) == solid(LONG)
    assert max(map(cell_len, screen.lines)) > 60


def test_a_narrower_terminal_in_mid_reply() -> None:
    screen = Screen(70)
    terminal = console(screen)
    steps = list(script(REPLY))
    before = "".join(step.text for step in steps[:9])
    with ReplyView(terminal, two_rows, clock=itertools.count().__next__) as view:
        for number, step in enumerate(steps):
            if number == 9:  # the emulator cuts wide rows, so the text begins a new one there
                view.add(Step((Token(0, "\n", 0),), 1, 0.1, "vanilla"))
                screen.screen.resize(columns=24)
                terminal.width = 24
            view.add(step)
            assert sum(FIGURES in line for line in screen.lines) == 1
    after = " ".join(REPLY[len(before) :].split())
    assert " ".join(" ".join(screen.lines).split()).endswith(after)


def test_a_screen_of_three_rows_shows_the_text() -> None:
    screen = Screen(40, 3)
    show(screen, script(LONG))
    assert solid("".join(screen.lines)) == solid(LONG)


def test_refreshes_keep_their_distance() -> None:
    screen = Screen(80)
    now = 100.0
    with ReplyView(console(screen), two_rows, clock=lambda: now) as view:
        before = screen.refreshes
        steps = list(itertools.islice(itertools.cycle(script(REPLY)), 200))
        for step in steps:
            now += REFRESH_SECONDS / 10
            view.add(step)
        assert 18 <= screen.refreshes - before <= 21
    assert screen.lines[0].startswith("Once upon a time")


def test_the_cursor_comes_back() -> None:
    screen = Screen(80)
    with pytest.raises(RuntimeError):
        show(screen, failing())
    assert not screen.screen.cursor.hidden
    assert screen.lines[0] == "Once upon a time"
    assert (screen.screen.cursor.y, screen.screen.cursor.x) == (1, 0)


def failing() -> Iterator[Step]:
    yield next(script(REPLY))
    raise RuntimeError


def test_a_stopped_reply_says_so() -> None:
    screen = Screen(80)
    with pytest.raises(KeyboardInterrupt):
        show(screen, stopping())
    assert screen.lines[0] == "Once upon a time [stopped]"


def stopping() -> Iterator[Step]:
    yield next(script(REPLY))
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("raw", "safe"),
    [
        ("a\x1b[31mb\x1b[0m", "ab"),
        ("a\x1b]0;title\x07b\x1b]8;;http://x\x1b\\c", "abc"),
        ("\x1b[2J\x1b[Ha", "a"),
        ("a\x9b31mb\x00\x08\x7f", "a31mb"),
        ("a\r\nb\rc", "a\nbc"),
        ("\ta", "    a"),
        ("a\u2028b", "a\nb"),
        ("\u202eevil", "evil"),
        ("\ud83e", "\N{REPLACEMENT CHARACTER}"),
        ("\x1b", ""),
        ("naïve 你 👩\u200d🚀", "naïve 你 👩\u200d🚀"),
    ],
)
def test_model_text_is_data(raw: str, safe: str) -> None:
    assert sanitize(raw) == safe


def test_an_escape_sequence_over_two_tokens_does_nothing() -> None:
    screen = Screen(40)
    tokens = (Token(0, "good \x1b", 0), Token(1, "[2Jbye [bold]x[/bold]", 1))
    show(screen, [Step(tokens, 4, 0.1, "tree", 4)])
    assert screen.lines[0] == "good [2Jbye [bold]x[/bold]"


def test_marks_follow_their_tokens() -> None:
    screen = Screen(100)
    texts = ("Hel", "lo", " world\n", "\n")
    tokens = [Token(head, text, head) for head, text in enumerate(texts)]
    tokens.append(Token(4, "!", COPIED))
    show(screen, [Step(tuple(tokens), 5, 0.1, "tree", 4)], marks=True)
    assert screen.lines[:3] == ["Hello¹ world²", "", "!ᶜ"]
    assert head_mark(12) == "¹²"
    assert head_mark(0) == ""


def test_marked_text_without_its_marks_is_the_text() -> None:
    screen = Screen(33)
    show(screen, script(LONG), marks=True)
    shown = solid("".join(screen.lines)).translate(dict.fromkeys(map(ord, "¹²³⁴")))
    assert shown == solid(LONG)


def test_no_colour() -> None:
    screen = Screen(80)
    show(screen, script(REPLY), _environ={"NO_COLOR": "1"})
    assert all(char.fg == "default" for row in screen.rows for char in row)
    assert screen.lines[0].startswith("Once upon a time a small fox")
    assert "/marks on" in legend(4, colour=False).plain
    assert "/marks on" not in legend(4, colour=False, marks=True).plain


# ---- the panel ----


@pytest.mark.parametrize("width", range(10, 130, 3))
def test_the_panel_fits(width: int) -> None:
    stats = Stats()
    for step in script(LONG):
        for sampling in (Sampling(), Sampling("typical"), Sampling("vanilla")):
            assert all(row.cell_len <= width for row in panel(stats, stats, sampling, width))
            assert footer(stats, stats, sampling, width).cell_len <= width
        stats.add(step)


def test_the_panel_shows_the_figures_of_stats() -> None:
    stats = Stats.of(script(REPLY))
    shown = "\n".join(row.plain for row in panel(stats, stats, Sampling("typical"), 130))
    for figure in (
        "typical 0.7",
        f"{stats.new_tokens} tokens",
        f"{stats.tokens_per_second:.1f} tokens/s",
        f"{stats.acceptance_length:.1f} tokens per step",
        f"{stats.speedup:.1f}x faster than without heads (5 comparisons in this conversation)",
        *(f"{rate:.0%}" for rate in stats.head_acceptance().values()),
    ):
        assert figure in shown
    row = panel(stats, stats, Sampling(), 130)[1]
    styles = [span.style for span in row.spans if isinstance(span.style, Style)]
    assert {style.color.name for style in styles if style.color} == set(HEAD_COLOURS[:4])


@pytest.mark.parametrize(("replies", "scope"), [(1, "conversation"), (2, "reply")])
def test_a_reply_has_an_overhead_of_its_own_once_it_was_compared_often(
    replies: int, scope: str
) -> None:
    last = Stats.of(list(script(REPLY, finish=None)) * replies)
    conversation = Stats.of(list(script(LONG)))
    source = last if scope == "reply" else conversation
    assert last.acceptance_length
    assert source.overhead
    words = f"{last.acceptance_length / source.overhead:.1f}x faster than without heads"
    scope = f"({source.comparisons} comparisons in this {scope})"
    for row in (panel(last, conversation, Sampling(), 130)[1], footer_row(last, conversation)):
        assert f"{words} {scope}" in row.plain
    assert last.comparisons == 5 * replies


def footer_row(last: Stats, conversation: Stats) -> Text:
    return footer(last, conversation, Sampling(), 130)


def test_slow_heads_are_not_called_faster() -> None:
    assert [faster(value) for value in (2.04, 1.05, 1.04, 0.87)] == [
        "2.0x faster",
        "1.1x faster",
        "1.04x as fast",
        "0.87x as fast",
    ]


def test_the_panel_never_assumes_a_speedup() -> None:
    assert "reading the prompt" in panel(Stats(), Stats(), Sampling(), 80)[0].plain
    one_tree_step = Stats.of(list(script(REPLY))[:1])
    shown = panel(one_tree_step, one_tree_step, Sampling(), 80)[1].plain
    assert "measuring the speedup…" in shown
    assert "faster" not in shown
    assert "speedup" not in panel(one_tree_step, one_tree_step, Sampling(), 80)[0].plain
    baseline = Stats.of(script(REPLY, mode="vanilla"))
    vanilla = panel(baseline, baseline, Sampling("vanilla"), 80)
    assert "baseline" in vanilla[1].plain
    assert "acceptance" not in vanilla[0].plain


@pytest.mark.parametrize("width", range(10, 130, 3))
@pytest.mark.parametrize("paused_after", [0, 5])
def test_the_panel_of_paused_heads_fits(width: int, paused_after: int) -> None:
    stats = Stats.of(script(LONG, paused_after=paused_after))
    assert all(row.cell_len <= width for row in panel(stats, stats, Sampling(), width))
    assert footer(stats, stats, Sampling(), width).cell_len <= width


def test_the_panel_says_that_the_heads_are_paused_and_why() -> None:
    stats = Stats.of(list(script(REPLY, paused_after=4))[:6])
    headline, reason = (row.plain for row in panel(stats, stats, Sampling(), 110))
    assert "tokens/s" in headline
    assert "accept" not in headline
    assert reason == str(stats.paused)
    for shown in ("heads", "0.87x", "250 tokens"):
        assert shown in reason
    assert panel(stats, stats, Sampling(), 30)[1].plain == "heads paused: 0.87x"
    summary = footer(stats, stats, Sampling(), 80).plain
    assert summary.endswith(" tokens/s · heads paused: slower here (0.87x)")
    stats.add(next(script(REPLY)))
    assert "speedup" in panel(stats, stats, Sampling(), 80)[1].plain  # the heads are in use again
    assert "tokens per step" in footer(stats, stats, Sampling(), 100).plain


def test_the_footer() -> None:
    stats = Stats.of(script(REPLY, finish="context"))
    row = footer(stats, stats, Sampling(), 200).plain
    assert f"{stats.acceptance_length:.1f} tokens per step · {stats.speedup:.1f}x faster" in row
    assert row.endswith(" · context is full")
    assert "context is full" in footer(stats, stats, Sampling(), 80).plain
    assert "context is full" in footer(stats, stats, Sampling(), 20).plain
    limited = Stats.of(script(REPLY, finish="length"))
    assert "length limit" in footer(limited, stats, Sampling(), 80).plain
    short = Stats.of(list(script(REPLY))[:1])
    assert "(5 comparisons in this conversation)" in footer(short, stats, Sampling(), 130).plain
    too_short = footer(short, short, Sampling(), 100).plain
    assert "too short to measure the speedup" in too_short


# ---- the palette ----

# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB
DEFICIENCIES = {
    "none": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protan": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deutan": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritan": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}
LUMINANCE = (0.2126, 0.7152, 0.0722)
Vector = tuple[float, ...]


def linear(colour: str) -> Vector:
    parts = (int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5))
    return tuple(map(_linear_part, parts))


def _linear_part(part: float) -> float:
    return part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4


def dot(one: Vector, other: Vector) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def lab(colour: str, deficiency: str) -> Vector:
    seen = tuple(min(max(dot(row, linear(colour)), 0), 1) for row in DEFICIENCIES[deficiency])
    rows = ((0.4124, 0.3576, 0.1805), LUMINANCE, (0.0193, 0.1192, 0.9505))
    ratios = (
        dot(row, seen) / white for row, white in zip(rows, (0.95047, 1, 1.08883), strict=True)
    )
    x, y, z = (
        ratio ** (1 / 3) if ratio > 0.008856 else 7.787 * ratio + 16 / 116 for ratio in ratios
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("background", ["#ffffff", "#1e1e1e", "#000000"])
@pytest.mark.parametrize("colour", [*HEAD_COLOURS, COPIED_COLOUR])
def test_colours_are_readable_on_light_and_dark(colour: str, background: str) -> None:
    darker, lighter = sorted((dot(LUMINANCE, linear(colour)), dot(LUMINANCE, linear(background))))
    assert (lighter + 0.05) / (darker + 0.05) >= 3


def test_copied_tokens_are_cyan_where_there_are_16_colours() -> None:
    colour = head_style(COPIED).color
    assert colour
    assert colour.downgrade(ColorSystem.STANDARD).number == 6  # no grey, black or white


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_colour_blind_users_can_tell_the_heads_apart(deficiency: str) -> None:
    for one, other in itertools.combinations(HEAD_COLOURS, 2):
        distance = math.dist(lab(one, deficiency), lab(other, deficiency))
        assert distance >= 15, (one, other)


def test_heads_beyond_the_palette_differ_too() -> None:
    styles = [head_style(head) for head in range(1, 2 * len(HEAD_COLOURS) + 1)]
    assert len(set(styles)) == len(styles)
    assert [style.color.name for style in styles if style.color] == [*HEAD_COLOURS, *HEAD_COLOURS]
    assert head_style(0) == Style.null()


def test_the_view_of_heads_never_wraps_code() -> None:
    line = "value = compute(first, second, third)  # a long line of code"
    text = f"Look at this long line:\n```python\n{line}\n```\nAnd prose that is wrapped again."
    flow = Flow()
    rows: list[Text] = []
    for char in text:
        flow.feed(char, Style())
        rows += flow.take(20, room=3)
        assert len(flow.live) <= 3
        assert all(row.cell_len <= 20 for row in flow.live)  # the panel stays in its place
    rows += flow.rest(20)
    shown = [row.plain for row in rows]
    assert shown[:5] == ["Look at this long", "line:", "```python", line, "```"]
    assert shown[5:] == ["And prose that is", "wrapped again."]


@pytest.mark.parametrize("shown", [False, True])
def test_thoughts_come_before_the_answer(shown: bool) -> None:
    screen = Screen(40)
    thoughts = Thoughts()
    clock = itertools.count().__next__
    with ReplyView(
        console(screen),
        two_rows,
        view="both",
        thoughts=lambda: thoughts,
        open_thoughts=shown,
        clock=clock,
    ) as view:
        for step in script("<think>A fox, a red one.</think>\n\nThe fox was **red**."):
            view.add(step)
    hint = "" if shown else " · Ctrl+T shows"
    expected = [f"thought for 5 tokens{hint}", "", "The fox was red."]
    assert screen.lines[: 3 + shown] == ["A fox, a red one."] * shown + expected


def test_the_legend_of_five_heads_and_copies_fits_a_line() -> None:
    assert cell_len(legend(5, copied=True).plain) <= 80
