"""Times steps on a GPU, and waits for them."""

from __future__ import annotations

import torch


class Timer:
    """Two events on a GPU's current stream, around a step; on a CPU a step is over at its return.

    Attributes:
        running: a step was begun that nobody has waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.running = False
        self._events: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def begin(self) -> None:
        """Mark a step's beginning."""
        if self._events:
            self._events[0].record()

    def end(self) -> None:
        """Mark the end of all that was started since."""
        self.running = True
        if self._events:
            self._events[1].record()

    def wait(self) -> float:
        """Wait for the end of the step that runs; returns its seconds on the GPU, else 0.0."""
        running = self.running and bool(self._events)
        if running:
            self._events[1].synchronize()
        self.running = False
        return self._events[0].elapsed_time(self._events[1]) / 1000 if running else 0.0
