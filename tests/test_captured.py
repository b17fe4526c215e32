"""Recording programs, with a CUDA that only takes notes: streams, warm-ups, failures."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from medusa_chat.decoding.graphs import capture
from medusa_chat.decoding.graphs.capture import CudaGraphs

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
        self.waits: int | str = 0  # the mode of finding waits
        self.open: list[Any] = []  # pools that the allocator still takes memory from
        self.released: list[Any] = []

    class Stream:
        def __init__(self, _device: Any = None) -> None:
            self.device = SimpleNamespace(index=0)
            self.waited: list[Any] = []

        def wait_stream(self, other: Any) -> None:
            self.waited.append(other)

    class CUDAGraph:
        replayed = 0

        def replay(self) -> None:
            self.replayed += 1

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
        self.open.append(pool)
        yield
        self.open.remove(pool)
        self.seen.append("recorded")
        self.now = before

    def graph_pool_handle(self) -> Any:
        return object()

    def end(self, _device: int, pool: Any) -> None:
        if pool not in self.open:
            raise RuntimeError("not currently recording to this pool")
        self.open.remove(pool)

    def release(self, _device: int, pool: Any) -> None:
        self.released.append(pool)

    def get_sync_debug_mode(self) -> int | str:
        return self.waits

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.waits = mode

    def program(self) -> None:
        where = "usual" if self.now is self.usual else "apart"
        self.seen.append(where if self.waits == 0 else f"{where}, no waits")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Notes:
    notes = Notes()
    names = ("Stream", "CUDAGraph", "current_stream", "set_stream", "stream", "graph")
    settings = ("graph_pool_handle", "get_sync_debug_mode", "set_sync_debug_mode")
    for name in (*names, *settings):
        monkeypatch.setattr(torch.cuda, name, getattr(notes, name))
    monkeypatch.setattr(capture, "take_up_error", lambda _device: notes.seen.append("error taken"))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", notes.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", notes.release, raising=False)
    return notes


def test_a_program_is_warmed_up_on_the_stream_that_records_it(cuda: Notes) -> None:
    """The second time as in the recording, where a wait for the host would break the allocator."""
    graphs = CudaGraphs(torch.device("cpu"))
    replay = graphs(("layout",), cuda.program)
    assert cuda.seen == ["apart", "apart, no waits", "recording", "apart", "recorded"]
    apart: Any = graphs.stream
    assert apart.waited == [cuda.usual]  # what the program reads is there
    assert cuda.usual.waited == [apart]  # and what it wrote, for what follows
    assert cuda.now is cuda.usual
    replay()
    first: Any = graphs.first
    assert first is replay.__self__  # type: ignore[attr-defined]
    assert first.replayed == 1
    graphs(("forward",), cuda.program)
    assert graphs.first is first  # holds the pool
    assert cuda.pools == [graphs.pool] * 2


ENDED = [True, False]  # whether torch ends a failed recording's use of its pool by itself


@pytest.mark.parametrize("fails_at", [0, 1, 2])
@pytest.mark.parametrize("error", [RuntimeError("not permitted"), KeyboardInterrupt()])
@pytest.mark.parametrize("ended", ENDED)
def test_a_recording_that_fails_leaves_the_usual_stream_and_a_sound_allocator(
    fails_at: int, error: BaseException, ended: bool, cuda: Notes
) -> None:
    runs = []

    def program() -> None:
        runs.append(cuda.waits)
        if len(runs) > fails_at:
            if ended:
                cuda.open.clear()
            raise error
        cuda.program()

    graphs = CudaGraphs(torch.device("cpu"))
    with pytest.raises(type(error)):
        graphs(("layout",), program)
    assert cuda.now is cuda.usual
    assert cuda.waits == 0
    assert cuda.usual.waited == [graphs.stream]
    assert graphs.first is None
    assert not cuda.open
    assert ("error taken" in cuda.seen) is (fails_at == 2)
    assert cuda.released == ([] if ended or fails_at < 2 else cuda.pools)
    graphs(("layout",), cuda.program)()
    assert fails_at < 2 or cuda.pools[0] is not cuda.pools[1]
