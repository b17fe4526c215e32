"""Input that people and damaged disks produce, for fuzzers: pieces of files, words, damage."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

from medusa_chat.commands import COMMANDS
from medusa_chat.terminal.chat.command import REGISTRY

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

CASES = int(os.environ.get("FUZZ_CASES", "100"))  # of each kind
PATIENCE = 60  # seconds for one case; a longer one counts as hung

PIECES = [
    *(b'[{"turns": ', b'{"messages": [', b'"text"', b"}", b"]", b"[", b"{", b",", b":", b"\n"),
    *(b"\xef\xbb\xbf", b"\\ud83d", b"\xff", b"\xe2\x80\xa8", b'"role": "user"', b'"content": "x"'),
    *(b"models:\n", b" a: 1", b"&a", b"*a", b"[" * 400, b"9" * 5000, b"1e999", b"NaN", b"\0"),
    *(
        b'"weight_map": {',
        b"2001-99-99",
        b"\x1b[2J",
        b"\r",
        b'"accuracy": [[',
        b"null",
        b"!!python",
    ),
]
VALUES = [
    *("", " ", "-1", "0", "3", "1e999", "nan", "9" * 5000, "x" * 50_000, "\udcff", "é\0", "²"),
    *(
        "~",
        "~nouser/x",
        "chain-²",
        "chain-99999",
        "dynamic-0",
        "dynamic-9999",
        "[[[[",
        "{}",
        "auto",
    ),
    *(
        "owner/name",
        "owner/name@",
        "..",
        "/",
        "/dev/null",
        "/dev/zero",
        "/dev/full",
        "no/such/file",
    ),
    *("http://u:secret@127.0.0.1:9", "ftp://x", "http://", "cpu", "cuda:99", "greedy", "on", "off"),
    *("\x1b]0;title\x07", "a\nb", "'", '"', "🦑" * 40, "bundled", "10m", "-", "--", "=", "%s"),
]


def text_file(chance: random.Random) -> bytes:
    """Draw the content of a text file: pieces, random bytes, or both."""
    drawn = [chance.choice(PIECES) for _ in range(chance.randrange(12))]
    drawn.insert(chance.randrange(len(drawn) + 1), chance.randbytes(chance.randrange(20)))
    return b"".join(drawn)


def arguments(chance: random.Random, flags: dict[str, list[str]]) -> list[str]:
    """Draw an argument list of a sub-command, with its own flags and values for anything."""
    command = chance.choice([*flags])
    words = [command] if chance.random() < 0.95 else []
    for _ in range(chance.randrange(8)):
        words += [chance.choice(flags[command])]
        words += chance.choices(VALUES, k=chance.choice((0, 1, 1, 1, 2)))
    return [word.replace("\0", "") for word in words]  # no program gets one


def slash_line(chance: random.Random) -> str:
    """Draw a line that begins with a slash."""
    name = chance.choice([*REGISTRY, "nosuch", ""])
    values = chance.choices([*VALUES, "temperature", "seed", "stop", "code"], k=chance.randrange(4))
    return f"/{name}{chance.choice((' ', chr(9), '  ', chr(10)))}{' '.join(values)}"


def damaged(content: bytes, kind: str, chance: random.Random) -> bytes:
    """Truncate a file's content, or flip one of its bits."""
    place = chance.randrange(len(content))
    if kind == "truncation":
        return content[:place]
    changed = bytearray(content)
    changed[place] ^= 1 << chance.randrange(8)
    return bytes(changed)


@contextmanager
def no_hang(case: object) -> Iterator[None]:
    """Fail if the block takes longer than PATIENCE."""

    def fail(_number: int, _frame: object) -> None:
        raise AssertionError(f"hangs: {str(case)[:300]}")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def one_line(text: str) -> bool:
    """Tell if a message is one printable line of a length that people read."""
    return 0 < len(text) < 1200 and text.isprintable()


def flags_by_command() -> dict[str, list[str]]:
    """The flags of each sub-command."""
    import argparse

    found = {}
    for name, command in COMMANDS.items():
        parser = argparse.ArgumentParser()
        command.add_flags(parser)
        found[name] = [flag for action in parser._actions for flag in action.option_strings]
    return found


def files_of(folder: Path) -> list[Path]:
    """All files of a folder, in order."""
    return sorted(file for file in folder.rglob("*") if file.is_file())
