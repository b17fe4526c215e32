"""The three programs of a step over a number of rows, and the buffers between them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.decoding.acceptance import TreeTensors, path_to
from medusa_chat.decoding.draft.base import MOST_SHOWN
from medusa_chat.decoding.report import PackedInput, pack_verdict, report_size

if TYPE_CHECKING:
    from medusa_chat.decoding.acceptance import Rule
    from medusa_chat.decoding.draft.base import Draft
    from medusa_chat.decoding.state import State


@dataclass(frozen=True)
class Buffers:
    """Tensors that the programs over `rows` rows hand on to one another, and to the host.

    Attributes:
        candidates: [rows]
        parents: [rows]
        depths: [rows]
        ancestors: [rows, rows]
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
    def of(cls, rows: int, state: State) -> Buffers:
        """Allocate buffers for a number of rows."""
        backbone = state.backbone
        device, dtype = backbone.device, backbone.dtype
        candidates, parents, depths = torch.zeros(3, rows, dtype=torch.long, device=device)
        size = report_size(rows, 1 + rows, state.head_count * MOST_SHOWN)
        report = torch.zeros(size, dtype=torch.long, device=device)
        return cls(
            candidates,
            parents,
            depths,
            torch.zeros(rows, rows, dtype=torch.bool, device=device),
            torch.zeros(rows, backbone.hidden_size, dtype=dtype, device=device),
            torch.zeros(rows, backbone.vocabulary, dtype=dtype, device=device),
            report,
            host_tensor(report),
        )


@dataclass(frozen=True)
class Programs:
    """The parts of a step. Each reads and writes buffers alone, so a recording can replay it.

    Attributes:
        state: the model and its text.
        given: the step's input.
        buffers: of the step's rows.
    """

    state: State
    given: PackedInput
    buffers: Buffers

    def lay_out(self, draft: Draft) -> None:
        """Find the nodes and put them into the buffers."""
        candidates = self.state.candidates(draft)
        nodes = draft.nodes(self.given, candidates, self.given.numbers)
        buffers = self.buffers
        buffers.candidates.copy_(nodes.candidates)
        buffers.parents.copy_(nodes.tensors.parents)
        buffers.depths.copy_(nodes.tensors.depths)
        buffers.ancestors.copy_(nodes.tensors.ancestors)
        draft.layout.pack_nodes(nodes.reported, buffers.report)

    def forward(self, span: int) -> None:
        """Run the backbone over the rows, which reads `span` positions of the cache."""
        buffers, backbone = self.buffers, self.state.backbone
        start = self.given.position
        positions = (buffers.depths + start).clamp(0, backbone.context - 1)
        hidden = backbone.hidden_at(
            buffers.candidates, positions, buffers.ancestors, start, span, self.state.cache
        )
        buffers.hidden.copy_(hidden)
        buffers.logits.copy_(backbone.logits(hidden))

    def accept(self, deepest: int, rule: Rule) -> None:
        """Apply a rule with the input's numbers, and move the accepted rows to the text's end.

        No node lies deeper than `deepest`.
        """
        buffers, start = self.buffers, self.given.position
        tree = TreeTensors(buffers.parents, buffers.depths, buffers.ancestors, deepest)
        rule = replace(rule, numbers=self.given.numbers)
        verdict = rule(buffers.logits, buffers.candidates, tree, start)
        if len(buffers.candidates) > 1:
            self.state.cache.move(start, path_to(verdict.row, tree))
        self.state.hidden.copy_(buffers.hidden[verdict.row[None]])
        pack_verdict(verdict, buffers.report)


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


def host_tensor(like: Tensor) -> Tensor:
    """Allocate a tensor of the host for copies from and to `like`; pinned if that is on a GPU."""
    return torch.zeros(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
