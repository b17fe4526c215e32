"""The step over buffers that never move, reading nothing on the host: what a CUDA graph can record, and the CPU test.

A step is three programs with buffers between them, so that each is recorded once for what it depends on: the nodes
for a tree, the forward for a number of nodes and a span of the cache, the settling for a kind of sampling. So another
mode, temperature, truncation, seed or tree never records the forward again, which is nearly all of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial

import torch
from torch import Tensor

from medusa_chat.decoding.acceptance import Rule, TreeTensors, path_to, token_keys
from medusa_chat.decoding.copying import CHAIN
from medusa_chat.decoding.device_rules import NUMBERS, Kind, decide, kind_of, numbers_of
from medusa_chat.decoding.plans import ChosenPlan, FixedPlan
from medusa_chat.model.backbone import Backbone
from medusa_chat.model.cache import KVCache

SHORTEST_SPAN = 256  # cached positions that a forward reads at least; spans double from here on

Plan = FixedPlan | ChosenPlan
Program = Callable[[], None]
# Runs a program, or what was recorded of the last one with this key.
Run = Callable[[Hashable, Program], None]


class StaticStep:
    """Takes steps as `Runner.step` does.

    What the host tells a step goes to the device in one tensor, and what it learns comes back in one.
    """

    def __init__(
        self, backbone: Backbone, cache: KVCache, hidden: Tensor,
        guesses: Callable[[Plan], tuple[Tensor, Tensor | None]], run: Run,
    ) -> None:  # fmt: skip
        """`hidden` [1, hidden] is that of the last committed row, which a step replaces; `guesses` reads it."""
        self._backbone, self._cache, self._hidden, self._guesses, self._run = backbone, cache, hidden, guesses, run
        device = backbone.device
        # Position, numbers of the sampling, root and copies; double holds each of them exactly.
        self._told = torch.zeros(1 + len(NUMBERS) + 1 + 2 * CHAIN, dtype=torch.float64, device=device)
        self._kept: dict[Hashable, Tensor] = {}
        self._token_keys = token_keys(backbone.vocabulary, device)  # recorded, so it may not be freed

    def step(self, sent: list[float], plan: Plan, rule: Rule) -> list[int]:
        """Verify the plan's nodes and move the accepted rows behind the text, where `commit` has to count them.

        Args:
            sent: from `plans.to_send`.

        Returns:
            the accepted row, the token behind it, the nodes' tokens, and what the plan tells, and the heads' guesses.
        """
        told = [float(self._cache.length), *numbers_of(rule.sampling), *sent]
        self._told[: len(told)].copy_(torch.tensor(told, dtype=torch.float64))
        nodes, span, kind = plan.size, self._span(plan.size), kind_of(rule)
        self._run(("nodes", plan), partial(self._lay_out, plan))
        self._run(("forward", nodes, span), partial(self._forward, nodes, span))
        self._run(("settle", nodes, plan.deepest, kind), partial(self._settle, nodes, plan.deepest, kind))
        learned = torch.cat([self._kept["verdict"], self._kept["candidates", nodes], self._kept["told", plan]])
        settled: list[int] = learned.tolist()
        return settled

    def _span(self, nodes: int) -> int:
        """How much of the cache a forward over `nodes` rows reads."""
        span, needed = SHORTEST_SPAN, self._cache.length + nodes
        while span < needed:
            span *= 2
        return min(span, self._cache.capacity)

    def _lay_out(self, plan: Plan) -> None:
        guesses, log_p = self._guesses(plan)
        nodes = plan.nodes(self._told[1 + len(NUMBERS) :], guesses, log_p)
        self._keep(("candidates", plan.size), nodes.candidates)
        self._keep(("parents", plan.size), nodes.tensors.parents)
        self._keep(("depths", plan.size), nodes.tensors.depths)
        self._keep(("ancestors", plan.size), nodes.tensors.ancestors)
        self._keep(("told", plan), torch.cat([*nodes.told, guesses.flatten()]))

    def _forward(self, nodes: int, span: int) -> None:
        candidates, depths, ancestors = (self._kept[name, nodes] for name in ("candidates", "depths", "ancestors"))
        start = self._told[0].long()
        positions = (depths + start).clamp(max=self._backbone.context - 1)
        hidden = self._backbone.hidden_at(candidates, positions, ancestors, start, span, self._cache)
        self._keep(("hidden", nodes), hidden)
        self._keep(("logits", nodes), self._backbone.logits(hidden))

    def _settle(self, nodes: int, deepest: int, kind: Kind) -> None:
        parents, depths, ancestors, candidates, logits, hidden = (
            self._kept[name, nodes] for name in ("parents", "depths", "ancestors", "candidates", "logits", "hidden")
        )
        tree, start = TreeTensors(parents, depths, ancestors, deepest), self._told[0].long()
        verdict = decide(kind, self._told[1 : 1 + len(NUMBERS)], logits, candidates, tree, start)
        if nodes > 1:
            self._cache.move(start, path_to(verdict.row, tree))
        self._hidden.copy_(hidden[verdict.row[None]])
        self._keep("verdict", torch.stack([verdict.row, verdict.next]))

    def _keep(self, name: Hashable, value: Tensor) -> None:
        """Copy into the buffer of this name, which the first value makes."""
        if name in self._kept:
            self._kept[name].copy_(value)
        else:
            self._kept[name] = value.clone()
