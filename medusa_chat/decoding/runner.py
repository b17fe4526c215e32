"""Prefill, verify, commit: the only place that runs the backbone while decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.config import PREFILL_ROWS
from medusa_chat.decoding.draft.plans import (
    DynamicDraft,
    FixedDraft,
    Outcome,
    to_send,
    told_guesses,
)
from medusa_chat.decoding.graphs.capture import Captured, as_it_is, capturable
from medusa_chat.decoding.graphs.static_step import Plan, StaticStep, Unrecordable
from medusa_chat.decoding.trees.accuracy import PUBLISHED, Accuracy
from medusa_chat.decoding.trees.tree import AnyTree, Tree
from medusa_chat.model.attention import tree_attention as attention

if TYPE_CHECKING:
    from collections.abc import Callable

    from medusa_chat.decoding.acceptance import Rule
    from medusa_chat.decoding.draft.copies import Copied
    from medusa_chat.model.backbone import Backbone
    from medusa_chat.model.heads import Heads


class Runner:
    """Runs steps over one text and keeps what the next step needs: the cache and the last hidden state.

    `step` is the one door: behind it is the eager step, or the static one, which on a GPU is captured.

    Attributes:
        mark: called with "begin" where an eager step begins, and with the name of each of its parts when it is over:
            heads, forward, acceptance, commit. bench times them by it.
        static: the static step; None where steps are eager.
        notices: what the user should know, a line each.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: Heads | None,
        capacity: int,
        accuracy: Accuracy = PUBLISHED,
        eager: bool | None = None,
    ) -> None:
        """Start with an empty text.

        Args:
            capacity: positions of the cache.
            accuracy: tells how far dynamic trees may trust the heads, and how often guesses of a fixed one hold.
            eager: take the plain step; by default wherever a step cannot be captured.
        """
        self.backbone = backbone
        self.heads = heads
        self.cache = backbone.new_cache(capacity)
        self.accuracy = accuracy
        # [1, hidden] of the last committed row
        self._hidden = torch.zeros(
            1, backbone.hidden_size, dtype=backbone.dtype, device=backbone.device
        )
        self._count = heads.heads if heads else 0
        self._root = FixedDraft(Tree(), self._count, backbone)
        self._plans: dict[tuple[AnyTree, bool], Plan] = {}
        self.mark: Callable[[str], None] = _nobody_times
        self.notices: list[str] = []
        can_capture = capturable(backbone, heads)
        self.static: StaticStep | None = None
        if not (not can_capture if eager is None else eager):
            record = Captured(backbone.device) if can_capture else as_it_is
            self.static = StaticStep(
                backbone, self._count, self.cache, self._hidden, self._guesses, record
            )

    def trust(self, accuracy: Accuracy) -> None:
        """Take other figures for how likely the heads' guesses are."""
        self.accuracy = accuracy
        self._plans.clear()

    @torch.inference_mode()
    def prefill(self, tokens: list[int], rule: Rule) -> int:
        """Append tokens to the text; returns the token that the rule chooses behind them."""
        for start in range(0, len(tokens), PREFILL_ROWS):
            chunk = tokens[start : start + PREFILL_ROWS]
            hidden = self.backbone.hidden(*self._chain(chunk), self.cache)
            self.cache.commit(tuple(range(len(chunk))))
        self._hidden.copy_(hidden[-1:])
        last = torch.tensor(tokens[-1:], device=self.backbone.device)
        return int(
            rule(
                self.backbone.logits(self._hidden), last, self._root.tensors, self.cache.length - 1
            ).next
        )

    @torch.inference_mode()
    def step(self, root: int, tree: AnyTree, rule: Rule, copied: Copied | None = None) -> Outcome:
        """Verify the tree behind `root` in one forward and commit the accepted path.

        The tree of the root alone is a vanilla step: no heads run, one row is verified. With `copied` the copies
        compete with the heads' guesses for the tree's places.
        """
        plan, sent = self._plan(tree, copied is not None), to_send(root, copied)
        if self.static is not None:
            try:
                outcome = plan.outcome(self.static.step(sent, plan, rule))
                self.cache.commit(tuple(range(len(outcome.rows))))  # moved into their order already
                return outcome
            except Unrecordable as error:
                self._step_eagerly_from_now_on(error)
        outcome = plan.outcome(self._eager_step(sent, plan, rule))
        self.cache.commit(outcome.rows)
        self.mark("commit")
        return outcome

    def _step_eagerly_from_now_on(self, error: Unrecordable) -> None:
        """Let go of what was recorded: where one step can't be, the memory is better used for the next."""
        self.static = None
        self._plans.clear()
        self.notices.append(
            f"steps cannot be recorded as CUDA graphs here ({error}), so that each operation is started by itself:"
            " that is slower, the text is the same; --eager does so from the start"
        )

    def _eager_step(self, sent: list[float], plan: Plan, rule: Rule) -> list[int]:
        """The accepted row, the token behind it, the nodes' tokens, what the plan tells, and the heads' guesses."""
        self.mark("begin")
        guesses, log_p = self._guesses(plan)
        nodes = plan.nodes(
            torch.tensor(sent, dtype=torch.float64, device=self.backbone.device), guesses, log_p
        )
        self.mark("heads")
        position = self.cache.length
        # Guesses beyond the last position can't be kept, but some position encodings change or fail there.
        positions = (nodes.tensors.depths + position).clamp(max=self.backbone.context - 1)
        hidden = self.backbone.hidden(nodes.candidates, positions, plan.mask(nodes), self.cache)
        logits = self.backbone.logits(hidden)
        self.mark("forward")
        verdict = rule(logits, nodes.candidates, nodes.tensors, position)
        told = (
            verdict.row[None],
            verdict.next[None],
            nodes.candidates,
            *nodes.told,
            told_guesses(guesses),
        )
        settled: list[int] = torch.cat(told).tolist()
        self._hidden.copy_(hidden[settled[0]])
        self.mark("acceptance")
        return settled

    def _guesses(self, plan: Plan) -> tuple[Tensor, Tensor | None]:
        """The likeliest tokens of each head, [heads, ranked], and how likely each head says they are; a tree may use
        fewer.

        The natural logarithms of the heads' own probabilities, float32, or None where the plan does not ask for them.
        """
        if self.heads is None or plan.ranked == 0:
            return torch.empty(0, 0, dtype=torch.long, device=self.backbone.device), None
        logits = self.heads.logits(self._hidden, self.backbone.lm_head)[:, 0]
        likeliest = logits.topk(plan.ranked)
        if not plan.confident:
            return likeliest.indices, None
        log_p = likeliest.values.float() - logits.float().logsumexp(-1, keepdim=True)
        return likeliest.indices, log_p

    def _chain(self, tokens: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens, positions and mask of rows that follow one another."""
        device, n = self.backbone.device, len(tokens)
        positions = torch.arange(n, device=device) + self.cache.length
        mask = attention.chain_mask(n, self.backbone.dtype, device) if n > 1 else None
        return torch.tensor(tokens, device=device), positions, mask

    def _plan(self, tree: AnyTree, copied: bool) -> Plan:
        key = (tree, copied)
        if key not in self._plans:
            if len(self._plans) > 64:
                self._plans.clear()
            if isinstance(tree, Tree) and not copied:
                self._plans[key] = FixedDraft(tree, self._count, self.backbone)
            else:
                self._plans[key] = DynamicDraft(
                    tree,
                    copied,
                    self._count,
                    self.accuracy,
                    self.backbone,
                    roomy=self.static is not None,
                )
        return self._plans[key]


def _nobody_times(part: str) -> None:
    """What `Runner.mark` is while nobody times the parts of a step."""
