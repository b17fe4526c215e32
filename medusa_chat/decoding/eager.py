"""EagerStep: prefill and steps, operation by operation. It works with every model and device."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from medusa_chat.config import PREFILL_ROWS
from medusa_chat.decoding.report import PackedInput, StepInput, StepReport, pack_verdict
from medusa_chat.model.attention import tree_attention as attention

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from medusa_chat.decoding.acceptance import Rule, TreeTensors
    from medusa_chat.decoding.draft.base import Draft
    from medusa_chat.decoding.state import State


class EagerStep:
    """Implements state.StepProgram.

    Attributes:
        mark: called with "begin" where a step begins, and with the name of each of its parts when
            that is over: heads, forward, acceptance, commit. bench times them by it.
    """

    shared_buffers = False
    overlaps = False
    device_seconds = 0.0

    def __init__(self, state: State) -> None:
        self._state = state
        self.mark: Callable[[str], None] = _ignore

    def prefill(self, tokens: list[int], rule: Rule) -> int:
        """Append tokens to the text and commit them; returns the token that follows."""
        state = self._state
        for start in range(0, len(tokens), PREFILL_ROWS):
            chunk = tokens[start : start + PREFILL_ROWS]
            hidden = state.backbone.hidden(*self._chain(chunk), state.cache)
            state.cache.commit(tuple(range(len(chunk))))
        state.hidden.copy_(hidden[-1:])
        return rule.first(state.backbone.logits(state.hidden), state.cache.length - 1)

    def _chain(self, tokens: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return tokens, positions and mask of rows that follow one another."""
        backbone, n = self._state.backbone, len(tokens)
        positions = torch.arange(n, device=backbone.device) + self._state.cache.length
        mask = attention.chain_mask(n, backbone.dtype, backbone.device) if n > 1 else None
        return torch.tensor(tokens, device=backbone.device), positions, mask

    def launch(self, draft: Draft, given: StepInput, rule: Rule) -> Callable[[], StepReport]:
        """Return a function that takes the step."""
        return partial(self.step, draft, given, rule)

    def step(self, draft: Draft, given: StepInput, rule: Rule) -> StepReport:
        """Verify a draft's nodes in one forward, and commit the accepted path."""
        state = self._state
        device = state.backbone.device
        self.mark("begin")
        candidates = state.candidates(draft)
        # float32 holds every token and position; MPS has no float64. The rule has its own numbers.
        packed = PackedInput(torch.tensor(given.pack(), dtype=torch.float32, device=device))
        nodes = draft.nodes(packed, candidates, rule.numbers)
        self.mark("heads")
        positions = self._positions(nodes.tensors, given.position)
        mask = draft.mask(nodes)
        hidden = state.backbone.hidden(nodes.candidates, positions, mask, state.cache)
        logits = state.backbone.logits(hidden)
        self.mark("forward")
        verdict = rule(logits, nodes.candidates, nodes.tensors, given.position)
        result = torch.empty(draft.layout.size, dtype=torch.long, device=device)
        pack_verdict(verdict, result)
        draft.layout.pack_nodes(nodes.reported, result)
        report = draft.layout.unpack(result.tolist())
        state.hidden.copy_(hidden[report.rows[-1]])
        self.mark("acceptance")
        state.cache.commit(report.rows)
        self.mark("commit")
        return report

    def _positions(self, tree: TreeTensors, position: int) -> Tensor:
        """Return the nodes' positions in the text: [n].

        Guesses after the last position can't be kept, but some encodings change or fail there.
        """
        return (tree.depths + position).clamp(max=self._state.backbone.context - 1)


def _ignore(part: str) -> None:
    """Stand in for `mark` while nobody times the parts of a step."""
