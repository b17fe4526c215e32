"""Small pieces of text: sizes, durations, reasons of errors; text made safe. No torch here."""

from __future__ import annotations

import re
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

LONGEST_LINE = 500  # characters of an error, a notice or a complaint
CAUSES = 3  # of an error that are told
TAB = "    "
ESCAPE_SEQUENCE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_].*?(?:\x07|\x1b\\)|[ -/]*[0-~])", re.DOTALL
)
LINE_END = re.compile(r"\r\n|[\u2028\u2029]")
# control characters, and marks that reorder the text after them
UNSAFE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
SURROGATE = re.compile(r"[\ud800-\udfff]")  # half of a pair: no terminal takes one
PASSWORD = re.compile(r"(?<=://)[^\s/@]+@")


def size_text(count: float) -> str:
    """Format bytes as people read them, such as 13.5 GB."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}"
    return f"{count:.0f} bytes"


def duration_text(seconds: float) -> str:
    """Format seconds as 42 s, 3:05 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def sanitize(text: str, *, tab: str = TAB) -> str:
    """Remove escape sequences and control characters; keep newlines, replace tabs by `tab`."""
    if text.isprintable():  # as nearly all tokens are
        return text
    text = LINE_END.sub("\n", ESCAPE_SEQUENCE.sub("", text))
    safe = tab.join(UNSAFE.sub("", part) for part in text.split("\t"))
    return SURROGATE.sub("\N{REPLACEMENT CHARACTER}", safe)


def encodable(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can hold but no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def one_line(text: str, most: int = LONGEST_LINE) -> str:
    """Bring a message into one safe line without passwords; a long one loses its middle."""
    line = PASSWORD.sub("", " ".join(sanitize(text).split()))
    if len(line) <= most:
        return line
    end = most // 3
    return f"{line[: most - end - 1]}…{line[-end:]}"


def is_panic(error: BaseException) -> bool:
    """Tell if an error is a panic of a library in Rust, such as tokenizers: it is no Exception."""
    return type(error).__name__ == "PanicException"


def reason_of(error: BaseException, causes: int = CAUSES) -> str:
    """Say in one line why an error was raised, with the causes that it was raised from.

    A first line that ends in a colon only announces those after it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    announced = list(takewhile(lambda line: line.endswith(":"), lines))
    told = " ".join(lines[: len(announced) + 1])
    if isinstance(error, KeyError) or not told:
        told = f"{type(error).__name__} {told}".strip()
    cause = error.__cause__
    if cause is None and len(announced) == len(lines) and not error.__suppress_context__:
        cause = error.__context__
    if cause is not None and causes:
        why = reason_of(cause, causes - 1)
        told = told if why in told else f"{told.removesuffix(':')}: {why}"
    return one_line(told)


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """Count how many items two sequences share before they first differ."""
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return sum(1 for _ in equal)
