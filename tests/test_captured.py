"""Recording programs, with a CUDA that only takes notes: streams, warm-ups, failures."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from medusa_chat.decoding.graphs.capture import WARM_UPS, CudaGraphs

if TYPE_CHECKING:
    from collections.abc import Iterator


class Notes:
    """Stands in for torch.cuda and notes on which stream things happen.

    As torch does, it leaves the recording's stream in place if a recording does not end well.
    """

    def __init__(self) -> None:
        self.now = self.usual = self.Stream()
        self.seen: list[str] = []
        self.pools: list[Any] = []

    class Stream:
        def __init__(self, device: Any = None) -> None:
            self.device = device
            self.waited: list[Any] = []

        def wait_stream(self, other: Any) -> None:
            self.waited.append(other)

    class CUDAGraph:
        replayed = 0

        def replay(self) -> None:
            self.replayed += 1

        def pool(self) -> Any:
            return self

    def current_stream(self, _device: Any) -> Any:
        return self.now

    def set_stream(self, stream: Any) -> None:
        self.now = stream

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def graph(self, _graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.pools.append(pool)
        before, self.now = self.now, stream
        self.seen.append("recording")
        yield
        self.seen.append("recorded")
        self.now = before

    def program(self) -> None:
        self.seen.append("usual" if self.now is self.usual else "apart")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Notes:
    notes = Notes()
    for name in ("Stream", "CUDAGraph", "current_stream", "set_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(notes, name))
    return notes


def test_a_program_is_warmed_up_on_the_stream_that_records_it(cuda: Notes) -> None:
    graphs = CudaGraphs(torch.device("cpu"))
    replay = graphs(("layout",), cuda.program)
    assert cuda.seen == [*["apart"] * WARM_UPS, "recording", "apart", "recorded"]
    apart: Any = graphs.stream
    assert apart.waited == [cuda.usual]  # what the program reads is there
    assert cuda.usual.waited == [apart]  # and what it wrote, for what follows
    assert cuda.now is cuda.usual
    replay()
    graphs(("forward",), cuda.program)
    first: Any = graphs.first
    assert first is replay.__self__  # type: ignore[attr-defined]
    assert first.replayed == 1
    graphs(("acceptance",), cuda.program)
    assert cuda.pools == [None, first, first]


@pytest.mark.parametrize("fails_at", [0, WARM_UPS])
@pytest.mark.parametrize("error", [RuntimeError("not permitted"), KeyboardInterrupt()])
def test_a_recording_that_fails_leaves_the_usual_stream(
    fails_at: int, error: BaseException, cuda: Notes
) -> None:
    def program() -> None:
        if len(cuda.seen) >= fails_at:
            raise error
        cuda.program()

    graphs = CudaGraphs(torch.device("cpu"))
    with pytest.raises(type(error)):
        graphs(("layout",), program)
    assert cuda.now is cuda.usual
    assert cuda.usual.waited == [graphs.stream]
    assert graphs.first is None
    graphs(("layout",), cuda.program)()
