"""Progress bars that print nothing."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from medusa_chat.bench.job import Tick


def quiet(done: int, total: int) -> None:
    assert 0 < done <= total


@contextmanager
def silent(phase: str) -> Iterator[Tick]:
    assert phase
    yield quiet
