"""Chat templates of checkpoints, rendered in a process with limits: they are programs.

A template may loop without an end or fill the memory. On Linux a child process renders them, and
is killed if that takes too long.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_chat.config import Message, UserError
from medusa_chat.text import reason_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection

SECONDS = 10.0  # for one text; an ordinary template takes a thousandth of one
BYTES = 1 << 30  # of memory beyond what the program holds
LONGEST = 64 << 20  # characters of a text

# template, messages, whether a reply begins, variables of the template
Request = tuple[Any, list[Message], bool, dict[str, Any]]


class Worker:
    """A process that renders with one tokenizer, and ends with it."""

    def __init__(self, tokenizer: Any) -> None:
        context = multiprocessing.get_context("fork")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(tokenizer, theirs, self._ours), daemon=True
        )
        self._process.start()
        theirs.close()

    def render(self, request: Request) -> str:
        """Render. Raises UserError with the template's complaint, or for one without an end."""
        try:
            self._ours.send(request)
            if not self._ours.poll(SECONDS):
                raise UserError(f"it takes more than {SECONDS:g} seconds")
            fault, text = self._ours.recv()
        except (EOFError, OSError):
            self.stop()
            raise UserError(
                "it ends the process that renders it, as by filling the memory"
            ) from None
        except BaseException:  # an answer may still come, to a question that nobody asks any more
            self.stop()
            raise
        if fault:
            raise UserError(fault)
        return str(text)

    @property
    def alive(self) -> bool:
        """True until `stop`."""
        return not self._ours.closed

    def stop(self) -> None:
        """End the process."""
        self._ours.close()
        self._process.kill()
        self._process.join()


_WORKERS: weakref.WeakKeyDictionary[Any, Worker] = weakref.WeakKeyDictionary()


def render(tokenizer: Any, messages: Sequence[Message], replying: bool, **variables: object) -> str:
    """Render messages with a tokenizer's own chat template, which may read `variables`.

    Raises:
        UserError: the template refuses the messages, fails, or exceeds a limit.
    """
    request = (tokenizer.chat_template, list(messages), replying, variables)
    if not sys.platform.startswith("linux"):
        fault, text = _rendered(tokenizer, request)
        if fault:
            raise UserError(fault)
        return text
    worker = _WORKERS.get(tokenizer)
    if worker is None or not worker.alive:
        worker = _WORKERS[tokenizer] = Worker(tokenizer)
        weakref.finalize(tokenizer, worker.stop)
    return worker.render(request)


def _serve(tokenizer: Any, theirs: Connection, ours: Connection) -> None:
    """Answer requests until the other end is closed."""
    import resource  # not everywhere

    ours.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + BYTES
    _, most = resource.getrlimit(resource.RLIMIT_AS)  # the user's own, as by ulimit -v
    if most != resource.RLIM_INFINITY:
        limit = min(limit, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    while True:
        try:
            request = theirs.recv()
        except (EOFError, OSError):
            return
        theirs.send(_rendered(tokenizer, request))


def _rendered(tokenizer: Any, request: Request) -> tuple[str, str]:
    """Return why a template failed, or "", and the text."""
    template, messages, replying, variables = request
    try:
        text: str = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=replying,
            **variables,
        )
    except Exception as error:  # a template is a program: it may raise anything
        return reason_of(error), ""
    if len(text) > LONGEST:
        return f"it writes more than {LONGEST:,} characters", ""
    return "", text
