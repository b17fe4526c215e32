"""StaticStep: a step over buffers that never move, and that reads nothing on the host.

So a CUDA graph can record it, and the tests can on a CPU. A step is three programs with buffers
between them, and each is recorded once for what its shapes depend on:

- layout, for a shape of drafts: the number of nodes, and how they are found;
- forward, for a number of nodes and a span of the cache;
- acceptance, for a number of nodes, how deep they may lie, and a kind of rule.

Everything else is a value in a buffer: position, root, copies, temperature, truncation, thresholds,
seed, a tree's topology, how likely its guesses are. The first step of a number of nodes over a
span of text records all kinds of rule, and the vanilla step too. From then on another mode,
temperature, truncation, seed or tree of as many nodes records nothing. Penalties record their
rules when they are first used. A text that outgrows its
span records two forwards. These record layouts of their own: the first step with copies among the
guesses (and its rules, as copies lie deeper), the first dynamic tree, trees that use more than
RANKED guesses of a head, supersets of more than ROWS paths.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.decoding.acceptance import KINDS, Kind, Rule, TreeTensors, path_to
from medusa_chat.decoding.draft.base import RANKED, ROWS, Draft, next_size
from medusa_chat.decoding.draft.fixed import FixedDraft
from medusa_chat.decoding.eager import EagerStep
from medusa_chat.decoding.noise import token_keys
from medusa_chat.decoding.report import (
    INPUT_SIZE,
    PackedInput,
    StepInput,
    StepReport,
    pack_verdict,
    report_size,
)
from medusa_chat.decoding.state import State, StepUnavailableError
from medusa_chat.decoding.trees.tree import Tree
from medusa_chat.text import reason_of

if TYPE_CHECKING:
    from medusa_chat.model.backbone import Backbone

SHORTEST_SPAN = 256  # cached positions that a forward reads at least; spans double from here on
# Programs of a sort that are kept; then the one unused for longest goes. Only a forward is large.
MOST = {"layout": 64, "forward": 32, "acceptance": 256}

Program = Callable[[], None]
Key = tuple[Hashable, ...]
# Makes of a program one that does the same at every call. It may run the program first.
Record = Callable[[Key, Program], Program]


@dataclass(frozen=True)
class Buffers:
    """Tensors that the programs of up to `rows` nodes hand on to one another, and to the host.

    Attributes:
        candidates: [rows]
        parents: [rows]
        depths: [rows]
        ancestors: [rows * rows], of which n nodes take the first n * n.
        hidden: [rows, hidden]
        logits: [rows, V]
        report: a step's report, as its ReportLayout has it.
        host_report: the same on the host, where the GPU can write by itself.
    """

    candidates: Tensor
    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    hidden: Tensor
    logits: Tensor
    report: Tensor
    host_report: Tensor

    @classmethod
    def of(cls, rows: int, heads: int, backbone: Backbone) -> Buffers:
        """Allocate buffers for up to `rows` nodes."""
        device, dtype = backbone.device, backbone.dtype
        candidates, parents, depths = torch.zeros(3, rows, dtype=torch.long, device=device)
        size = report_size(rows, 1 + rows, heads * RANKED)
        report = torch.zeros(size, dtype=torch.long, device=device)
        return cls(
            candidates,
            parents,
            depths,
            torch.zeros(rows * rows, dtype=torch.bool, device=device),
            torch.zeros(rows, backbone.hidden_size, dtype=dtype, device=device),
            torch.zeros(rows, backbone.vocabulary, dtype=dtype, device=device),
            report,
            host_tensor(report),
        )

    def tree(self, nodes: int, deepest: int) -> TreeTensors:
        """Return the topology of the first nodes, none of which lies deeper than `deepest`."""
        ancestors = self.ancestors[: nodes * nodes].view(nodes, nodes)
        return TreeTensors(self.parents[:nodes], self.depths[:nodes], ancestors, deepest)


class SharedDraft:
    """The draft that a layout program reads, for all drafts of one shape.

    Attributes:
        draft: its buffers never move; `load` fills them.
    """

    def __init__(self, draft: Draft) -> None:
        self.draft = deepcopy(draft)
        self._loaded = draft

    def load(self, draft: Draft) -> None:
        """Copy the values of another draft of this shape, unless they are there already."""
        if draft is self._loaded:
            return
        for own, other in zip(self.draft.buffers, draft.buffers, strict=True):
            own.copy_(other)
        self._loaded = draft


class StaticStep:
    """Implements state.StepProgram, with steps that can be recorded.

    A step's input goes to the device in one copy. Its report comes back in another, for which the
    host waits.

    Attributes:
        record: makes programs that are replayed.
        programs: the recorded ones, the last used at the end.
        drafts: of the layout programs, by shape.
        buffers: of the programs, by the number of nodes that they hold.
        started: time.perf_counter() when the last step's programs were started.
        finished: the same when its report was there. From then on the device waits for the host.
    """

    shared_buffers = True

    def __init__(self, state: State, record: Record) -> None:
        self.record = record
        self.programs: dict[Key, Program] = {}
        self.drafts: dict[Hashable, SharedDraft] = {}
        self.buffers: dict[int, Buffers] = {}
        self.started = self.finished = 0.0
        self._state = state
        self._root = FixedDraft(Tree(), state.head_count, state.backbone)
        self._input = torch.zeros(INPUT_SIZE, dtype=torch.float64, device=state.backbone.device)
        self._host_input = host_tensor(self._input)
        # Recorded, so none may be freed when its cache lets go of it.
        self._token_keys: list[Tensor] = []
        self.prefill = EagerStep(state).prefill

    def step(self, draft: Draft, given: StepInput, rule: Rule) -> StepReport:
        """Verify a draft's nodes in one forward, and commit the accepted path.

        Raises:
            StepUnavailableError: the step could not be recorded; nothing was done.
        """
        values = given.pack()
        self._host_input.numpy()[: len(values)] = values
        self._input.copy_(self._host_input, non_blocking=True)
        span = self._span(draft.size)
        counts = rule.counts
        accept = _acceptance_key(draft, rule.kind, counts)
        keys = (_layout_key(draft), _forward_key(draft, span), accept)
        if not all(key in self.programs for key in keys):
            self._prepare(draft, span, counts)
        self.drafts[draft.shape].load(draft)
        self.started = time.perf_counter()
        for key in keys:
            self.programs[key] = program = self.programs.pop(key)
            program()
        report = self._report(draft)
        # The acceptance program has moved the accepted rows into their order already.
        self._state.cache.commit(tuple(range(len(report.rows))))
        return report

    def _report(self, draft: Draft) -> StepReport:
        buffers = self._buffers_of(draft.size)
        on_device = buffers.report[: draft.layout.size]
        on_host = buffers.host_report[: draft.layout.size]
        on_host.copy_(on_device, non_blocking=True)
        if on_device.is_cuda:
            torch.cuda.current_stream(on_device.device).synchronize()
        self.finished = time.perf_counter()
        return draft.layout.unpack(on_host.tolist())

    def _span(self, nodes: int) -> int:
        """Return how much of the cache a forward reads; the same for all up to ROWS nodes."""
        cache = self._state.cache
        return min(next_size(SHORTEST_SPAN, cache.length + max(nodes, ROWS)), cache.capacity)

    def _prepare(self, draft: Draft, span: int, counts: Tensor | None) -> None:
        """Record what is missing of the draft's steps and of vanilla ones, for all kinds of rule.

        Rules with penalties, which read `counts`, are recorded only where one is used.

        Recording may run a program. So all are recorded before the step, where nothing that they
        write is in use but the last hidden state.
        """
        hidden = self._state.hidden.clone()
        keys = token_keys(self._state.backbone.vocabulary, self._state.backbone.device)
        if not any(known is keys for known in self._token_keys):
            self._token_keys.append(keys)
        try:
            self._record_all(self._root, span, counts)
            self._record_all(draft, span, counts)
        except Exception as error:  # any operation, kernel library or CUDA itself may refuse
            raise StepUnavailableError(
                f"steps cannot be recorded as CUDA graphs here ({reason_of(error)}), so that each"
                " operation is started by itself: that is slower, the text is the same; --eager"
                " does so from the start"
            ) from error
        finally:
            self._state.hidden.copy_(hidden)

    def _record_all(self, draft: Draft, span: int, counts: Tensor | None) -> None:
        self._buffers_of(draft.size)  # made here, or they would belong to a recording
        if draft.shape not in self.drafts:
            self.drafts[draft.shape] = SharedDraft(draft)
        shared = self.drafts[draft.shape].draft
        self._keep(_layout_key(draft), partial(self._lay_out, shared))
        self._keep(_forward_key(draft, span), partial(self._forward, draft.size, span))
        for kind in KINDS:
            accept = partial(self._accept, draft.size, draft.deepest, kind, counts)
            self._keep(_acceptance_key(draft, kind, counts), accept)

    def _keep(self, key: Key, program: Program) -> None:
        """Record a program if it is new; then drop the one of its sort unused for longest."""
        known = self.programs.pop(key, None)
        self.programs[key] = known or self.record(key, program)
        oldest, *others = (other for other in self.programs if other[0] == key[0])
        if len(others) >= MOST[str(key[0])]:
            del self.programs[oldest]
            if key[0] == "layout":
                del self.drafts[oldest[1]]

    def _buffers_of(self, nodes: int) -> Buffers:
        rows = next_size(ROWS, nodes)
        if rows not in self.buffers:
            self.buffers[rows] = Buffers.of(rows, self._state.head_count, self._state.backbone)
        return self.buffers[rows]

    def _lay_out(self, draft: Draft) -> None:
        """Find the nodes and put them into the buffers."""
        guesses, log_p = self._state.guesses(draft)
        nodes = draft.nodes(PackedInput(self._input), guesses, log_p)
        buffers = self._buffers_of(draft.size)
        tree = buffers.tree(draft.size, draft.deepest)
        buffers.candidates[: draft.size].copy_(nodes.candidates)
        tree.parents.copy_(nodes.tensors.parents)
        tree.depths.copy_(nodes.tensors.depths)
        tree.ancestors.copy_(nodes.tensors.ancestors)
        draft.layout.pack_nodes(nodes.candidates, nodes.selection, guesses, buffers.report)

    def _forward(self, nodes: int, span: int) -> None:
        """Run the backbone over the nodes, which reads `span` positions of the cache."""
        buffers, backbone = self._buffers_of(nodes), self._state.backbone
        tree = buffers.tree(nodes, 0)
        start = PackedInput(self._input).position
        positions = (tree.depths + start).clamp(max=backbone.context - 1)
        hidden = backbone.hidden_at(
            buffers.candidates[:nodes], positions, tree.ancestors, start, span, self._state.cache
        )
        buffers.hidden[:nodes].copy_(hidden)
        buffers.logits[:nodes].copy_(backbone.logits(hidden))

    def _accept(self, nodes: int, deepest: int, kind: Kind, counts: Tensor | None) -> None:
        """Apply a rule, and move the accepted rows to the text's end."""
        buffers, given = self._buffers_of(nodes), PackedInput(self._input)
        tree, start = buffers.tree(nodes, deepest), given.position
        rule = Rule(kind, given.numbers, counts)
        verdict = rule(buffers.logits[:nodes], buffers.candidates[:nodes], tree, start)
        if nodes > 1:
            self._state.cache.move(start, path_to(verdict.row, tree))
        self._state.hidden.copy_(buffers.hidden[verdict.row[None]])
        pack_verdict(verdict, buffers.report)


def host_tensor(like: Tensor) -> Tensor:
    """Allocate a tensor of the host for copies from and to `like`; pinned if that is on a GPU."""
    return torch.zeros(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)


def _layout_key(draft: Draft) -> Key:
    return "layout", draft.shape


def _forward_key(draft: Draft, span: int) -> Key:
    return "forward", draft.size, span


def _acceptance_key(draft: Draft, kind: Kind, counts: Tensor | None) -> Key:
    return "acceptance", draft.size, draft.deepest, kind, counts is not None
