"""StaticStep: a step over buffers that never move, and that reads nothing on the host.

So a CUDA graph can record it, and the tests can on a CPU. A step is three programs, and each is
recorded at its first use, once for what its shapes depend on:

- layout, for a shape of drafts: rows, and how the nodes are found;
- forward, for a number of rows and a span of the cache;
- acceptance, for a number of rows, how deep nodes may lie, and a kind of rule, with penalties or
  without.

Rows come in BUCKETS: what a tree leaves free is filled up. Everything else is a value in a buffer:
position, root, copies, sampling numbers, a tree's topology, how likely its guesses are. So another
tree, setting or seed records nothing, and neither does a mode that was used before. A text that
outgrows its span records one forward for each number of rows in use.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import torch

from medusa_chat.decoding.draft.base import ROWS, next_size
from medusa_chat.decoding.eager import EagerStep
from medusa_chat.decoding.graphs.capture import Key, Program, Record, uncollected
from medusa_chat.decoding.graphs.programs import Buffers, Programs, SharedDraft, host_tensor
from medusa_chat.decoding.graphs.timer import Timer
from medusa_chat.decoding.noise import token_keys
from medusa_chat.decoding.report import INPUT_SIZE, PackedInput
from medusa_chat.decoding.state import StepUnavailableError
from medusa_chat.text import reason_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from torch import Tensor

    from medusa_chat.decoding.acceptance import Rule
    from medusa_chat.decoding.draft.base import Draft
    from medusa_chat.decoding.report import StepInput, StepReport
    from medusa_chat.decoding.state import State

SHORTEST_SPAN = 256  # cached positions that a forward reads at least; spans double from here on


class StaticStep:
    """Implements state.StepProgram, with steps that can be recorded.

    A step's input goes to the device in one copy. Its report comes back in another, for which the
    host waits.

    Attributes:
        record: makes programs that are replayed.
        recorded: those programs.
        started: time.perf_counter() when the last step's programs were started.
        finished: the same when a report was there. From then on the device waits for the host.
        device_seconds: time that the last step took on a GPU; 0.0 elsewhere.
    """

    shared_buffers = True
    overlaps = True

    def __init__(self, state: State, record: Record) -> None:
        self.record = record
        self.recorded: dict[Key, Program] = {}
        self.started = self.finished = self.device_seconds = 0.0
        self._state = state
        self._programs: dict[int, Programs] = {}  # by rows
        self._drafts: dict[Hashable, SharedDraft] = {}  # by shape
        self._input = torch.zeros(INPUT_SIZE, dtype=torch.float64, device=state.backbone.device)
        self._host_input = host_tensor(self._input)
        # Recorded, so none may be freed when its cache lets go of it.
        self._token_keys: list[Tensor] = []
        self._timer = Timer(state.backbone.device)
        self.prefill = EagerStep(state).prefill

    def launch(self, draft: Draft, given: StepInput, rule: Rule) -> Callable[[], StepReport]:
        """Start a step, which a GPU takes while the host does other things.

        Returns:
            A function that waits for the report and commits the path. If nobody calls it, the step
            leaves nothing but a last hidden state, which each prefill writes anew.

        Raises:
            StepUnavailableError: the step could not be recorded; nothing was done.
        """
        self._timer.wait()  # a step that nobody waited for may still read the input
        self._send(given)
        wanted = self._wanted(draft, rule)
        if not all(key in self.recorded for key in wanted):
            self._prepare(wanted)
        buffers, size = self._programs[draft.rows].buffers, draft.layout.size
        self.started = time.perf_counter()
        self._timer.begin()
        for key in wanted:
            self.recorded[key]()
        buffers.host_report[:size].copy_(buffers.report[:size], non_blocking=True)
        self._timer.end()
        return partial(self._finish, draft, buffers.host_report[:size])

    def _send(self, given: StepInput) -> None:
        values = given.pack()
        self._host_input.numpy()[: len(values)] = values
        self._input.copy_(self._host_input, non_blocking=True)

    def _finish(self, draft: Draft, on_host: Tensor) -> StepReport:
        self.device_seconds = self._timer.wait()
        self.finished = time.perf_counter()
        report = draft.layout.unpack(on_host.tolist())
        # The acceptance program has moved the accepted rows into their order already.
        self._state.cache.commit(tuple(range(len(report.rows))))
        return report

    def _wanted(self, draft: Draft, rule: Rule) -> dict[Key, Program]:
        """Name the programs of a step in their order, each as it runs without a recording."""
        programs, span = self._programs_of(draft.rows), self._span(draft.rows)
        shared = self._shared(draft)
        kind = rule.kind, rule.counts is not None  # with penalties or without
        return {
            ("layout", draft.shape): partial(programs.lay_out, shared),
            ("forward", draft.rows, span): partial(programs.forward, span),
            ("acceptance", draft.rows, draft.deepest, *kind): partial(
                programs.accept, draft.deepest, rule
            ),
        }

    def _programs_of(self, rows: int) -> Programs:
        if rows not in self._programs:
            buffers = Buffers.of(rows, self._state)
            self._programs[rows] = Programs(self._state, PackedInput(self._input), buffers)
        return self._programs[rows]

    def _shared(self, draft: Draft) -> Draft:
        """Return the draft that the layout program reads, with the values of this one."""
        if draft.shape not in self._drafts:
            self._drafts[draft.shape] = SharedDraft(draft)
        shared = self._drafts[draft.shape]
        shared.load(draft)
        return shared.draft

    def _span(self, rows: int) -> int:
        """Return how much of the cache a forward reads; the same for all up to ROWS rows."""
        cache = self._state.cache
        return min(next_size(SHORTEST_SPAN, cache.length + max(rows, ROWS)), cache.capacity)

    def _prepare(self, wanted: dict[Key, Program]) -> None:
        """Record what is missing of a step's programs.

        Recording may run a program. So all are recorded before the step, where nothing that they
        write is in use but the last hidden state. The layout runs first: what the others index by,
        another step may have left.
        """
        hidden = self._state.hidden.clone()
        keys = token_keys(self._state.backbone.vocabulary, self._state.backbone.device)
        if not any(known is keys for known in self._token_keys):
            self._token_keys.append(keys)
        try:
            with uncollected():
                for number, (key, program) in enumerate(wanted.items()):
                    self.recorded[key] = self.recorded.get(key) or self.record(key, program)
                    if number == 0:
                        self.recorded[key]()
        except Exception as error:  # any operation, kernel library or CUDA itself may refuse
            raise StepUnavailableError(
                f"steps cannot be recorded as CUDA graphs here ({reason_of(error)}), so that each"
                " operation is started by itself: that is slower, the text is the same; --eager"
                " does so from the start"
            ) from error
        finally:
            self._state.hidden.copy_(hidden)
