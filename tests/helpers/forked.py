"""A command in a child of this process, which need not import torch again, to be cut off."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from medusa_chat.cli import main

PATIENCE = 60
# Torch's pool of threads does not always survive a fork. The program itself never forks.
LOST_POOL = "Invalid thread pool!"
TRIES = 3


@dataclass(frozen=True)
class Ended:
    """The end of a command.

    Attributes:
        status: exit status; the negative number of a signal that ended it.
        seconds: time that it took.
    """

    status: int
    stdout: str
    stderr: str
    seconds: float


def run(
    words: list[str],
    number: int | None = None,
    after: float = 0,
    *,
    memory: int | None = None,
    stdout: str = "",
) -> Ended:
    """Run a command in a child; again if torch's threads did not survive the fork.

    Args:
        words: its arguments.
        number: a signal to send.
        after: seconds before that.
        memory: bytes of address space that the child may add.
        stdout: a file for its output; a temporary one by default.
    """
    for _ in range(TRIES):
        ended = _run(words, number, after, memory, stdout)
        if LOST_POOL not in ended.stderr:
            break
    return ended


def _run(
    words: list[str], number: int | None, after: float, memory: int | None, stdout: str
) -> Ended:
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(stdout or f"{place}/out"), Path(place, "err")
        started = time.monotonic()
        child = os.fork()
        if not child:
            _child(words, out, err, memory)
        if number is not None:
            time.sleep(after)
            os.kill(child, number)
        status = _wait(child)
        seconds = time.monotonic() - started
        text = "" if stdout else out.read_text(errors="replace")
        return Ended(status, text, err.read_text(errors="replace"), seconds)


def _wait(child: int) -> int:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the command hangs")


def _child(words: list[str], out: Path, err: Path, memory: int | None) -> None:
    status = 99
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _redirect(os.devnull, 0, os.O_RDONLY)
        _redirect(out, 1, os.O_WRONLY | os.O_CREAT)
        _redirect(err, 2, os.O_WRONLY | os.O_CREAT)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", 1, closefd=False)
        if memory is not None:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
        status = main(words)
        sys.stdout.flush()
    except SystemExit as ending:
        status = int(ending.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _redirect(file: Path | str, number: int, flags: int) -> None:
    opened = os.open(file, flags, 0o600)
    os.dup2(opened, number)
    os.close(opened)
