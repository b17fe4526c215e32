"""The step over buffers that never move, reading nothing on the host: what a CUDA graph can record, and the CPU test.

A step is three programs with buffers between them, so that each is recorded once for what its shapes depend on:

- the nodes, for a shape of plans (`plans.py`): the number of nodes and whether they are fixed, chosen, copied among;
- the forward, for a number of nodes and a span of the cache;
- the settling, for a number of nodes, how deep they may lie, and a kind of rule.

Everything else is a value in a buffer: position, root, copies, temperature, truncation, thresholds, seed, a tree's
topology, how likely its guesses are. The first step of a number of nodes behind a span of text records all kinds of
rule, and the vanilla step too; from then on another mode, temperature, truncation, seed or tree of as many nodes
records nothing. A text that outgrows its span records two forwards. What records nodes of its own besides: the first
step with copies among the guesses (and its rules, as copies lie deeper), the first dynamic tree, trees that use more
than RANKED guesses of a head, supersets of more than ROWS paths.
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

from medusa_chat.decoding.acceptance import Rule, TreeTensors, path_to, token_keys
from medusa_chat.decoding.device_rules import KINDS, NUMBERS, Kind, decide, kind_of, numbers_of
from medusa_chat.decoding.draft.copies import CHAIN
from medusa_chat.decoding.draft.plans import (
    RANKED,
    ROWS,
    DynamicDraft,
    FixedDraft,
    room,
    told_guesses,
)
from medusa_chat.decoding.trees.tree import Tree

if TYPE_CHECKING:
    from medusa_chat.model.backbone import Backbone
    from medusa_chat.model.cache import KVCache

SHORTEST_SPAN = 256  # cached positions that a forward reads at least; spans double from here on
# Programs of a sort that are kept recorded; beyond, those go that were not used for longest. Only a forward is large.
MOST = {"nodes": 64, "forward": 32, "settle": 256}

Plan = FixedDraft | DynamicDraft
Program = Callable[[], None]
Key = tuple[Hashable, ...]
# Makes of a program one that does the same at every call. It may run the program first, once or more.
Record = Callable[[Key, Program], Program]


class Unrecordable(Exception):
    """A step that could not be recorded; says why in one line. The text and its cache are as they were."""


@dataclass(frozen=True)
class Buffers:
    """What the programs of up to `rows` nodes hand on to one another, and to the host.

    Attributes:
        ancestors: [rows * rows], of which n nodes take the first n * n.
        learned: the accepted row, the token behind it, then what the nodes tell and the guesses that are told.
        told: the same on the host, where the GPU can write by itself.
    """

    candidates: Tensor
    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    hidden: Tensor
    logits: Tensor
    learned: Tensor
    told: Tensor

    @classmethod
    def of(cls, rows: int, heads: int, backbone: Backbone) -> Buffers:
        device, dtype = backbone.device, backbone.dtype
        candidates, parents, depths = torch.zeros(3, rows, dtype=torch.long, device=device)
        learned = torch.zeros(2 + 2 * rows + 1 + heads * RANKED, dtype=torch.long, device=device)
        return cls(
            candidates,
            parents,
            depths,
            torch.zeros(rows * rows, dtype=torch.bool, device=device),
            torch.zeros(rows, backbone.hidden_size, dtype=dtype, device=device),
            torch.zeros(rows, backbone.vocabulary, dtype=dtype, device=device),
            learned,
            host_tensor(learned, device),
        )

    def tree(self, nodes: int, deepest: int) -> TreeTensors:
        ancestors = self.ancestors[: nodes * nodes].view(nodes, nodes)
        return TreeTensors(self.parents[:nodes], self.depths[:nodes], ancestors, deepest)


@dataclass
class Home:
    """Where the programs of a shape of plans find their plan: `plan` never moves, and has the values of `guest`."""

    plan: Plan
    guest: Plan

    def welcome(self, guest: Plan) -> None:
        if guest is not self.guest:
            for own, theirs in zip(self.plan.buffers, guest.buffers, strict=True):
                own.copy_(theirs)
            self.guest = guest


class StaticStep:
    """Takes steps as `Runner.step` does.

    What the host tells a step goes to the device in one copy, and what it learns comes back in one, for which it waits.

    Attributes:
        started, learned: time.perf_counter() when the last step's programs were started, and when its result was there.
            Between `learned` and the next `started` the device waits for the host.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: int,
        cache: KVCache,
        hidden: Tensor,
        guesses: Callable[[Plan], tuple[Tensor, Tensor | None]],
        record: Record,
    ) -> None:
        """`hidden` [1, hidden] is that of the last committed row, which a step replaces; `guesses` reads it."""
        self._backbone, self._heads, self._cache, self._hidden = backbone, heads, cache, hidden
        self._guesses, self._record = guesses, record
        device = backbone.device
        self._root = FixedDraft(Tree(), heads, backbone)
        # Position, numbers of the sampling, root and copies; double holds each of them exactly.
        self._told = torch.zeros(
            1 + len(NUMBERS) + 1 + 2 * CHAIN, dtype=torch.float64, device=device
        )
        self._sent = host_tensor(self._told, device)
        self._to_send = self._sent.numpy()
        self._buffers: dict[int, Buffers] = {}
        self._homes: dict[Hashable, Home] = {}
        self._programs: dict[Key, Program] = {}  # the last used stand last
        self._token_keys: list[
            Tensor
        ] = []  # recorded, so none may be freed when its cache lets go of it
        self.started = self.learned = 0.0

    def step(self, sent: list[float], plan: Plan, rule: Rule) -> list[int]:
        """Verify the plan's nodes and move the accepted rows behind the text, where `commit` has to count them.

        Args:
            sent: from `plans.to_send`.

        Returns:
            the accepted row, the token behind it, the nodes' tokens, and what the plan tells, and the heads' guesses.

        Raises:
            Unrecordable: before anything was done.
        """
        told = [float(self._cache.length), *numbers_of(rule.sampling), *sent]
        self._to_send[: len(told)] = told
        self._told.copy_(self._sent, non_blocking=True)
        span = self._span(plan.size)
        keys = _nodes_key(plan), _forward_key(plan, span), _settle_key(plan, kind_of(rule))
        if not all(key in self._programs for key in keys):
            self._prepare(plan, span)
        self._homes[plan.shape].welcome(plan)
        self.started = time.perf_counter()
        for key in keys:
            self._programs[key] = program = self._programs.pop(key)
            program()
        return self._learn(plan)

    def _learn(self, plan: Plan) -> list[int]:
        buffers = self._buffers_of(plan.size)
        count = 2 + plan.tells + self._heads * min(plan.ranked, RANKED)
        learned, told = buffers.learned[:count], buffers.told[:count]
        told.copy_(learned, non_blocking=True)
        if learned.is_cuda:
            torch.cuda.current_stream(learned.device).synchronize()
        self.learned = time.perf_counter()
        settled: list[int] = told.tolist()
        return settled

    def _span(self, nodes: int) -> int:
        """How much of the cache a forward reads: the same up to ROWS nodes, so that all outgrow it at once."""
        return min(room(SHORTEST_SPAN, self._cache.length + max(nodes, ROWS)), self._cache.capacity)

    def _prepare(self, plan: Plan, span: int) -> None:
        """Record what is not recorded yet of the plan's steps and of vanilla ones, by all kinds of rule.

        To be recorded a program may have to run, so all of them run before the step, where nothing that they write is
        in use but the last hidden state.
        """
        last = self._hidden.clone()
        keys = token_keys(self._backbone.vocabulary, self._hidden.device)
        if not any(each is keys for each in self._token_keys):
            self._token_keys.append(keys)
        try:
            for each in (self._root, plan):
                self._buffers_of(each.size)  # made here, not where they would belong to a recording
                if each.shape not in self._homes:
                    self._homes[each.shape] = Home(deepcopy(each), each)
                self._keep(_nodes_key(each), partial(self._lay_out, self._homes[each.shape].plan))
                self._keep(_forward_key(each, span), partial(self._forward, each.size, span))
                for kind in KINDS:
                    self._keep(
                        _settle_key(each, kind),
                        partial(self._settle, each.size, each.deepest, kind),
                    )
        except (
            Exception
        ) as error:  # whatever an operation, a kernel's library or CUDA has against being recorded
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise Unrecordable(lines[0]) from error
        finally:
            self._hidden.copy_(last)

    def _keep(self, key: Key, program: Program) -> None:
        """Record a program that is not, and let go of the one of its sort that was not used for longest."""
        self._programs[key] = (
            self._programs.pop(key) if key in self._programs else self._record(key, program)
        )
        oldest, *others = (other for other in self._programs if other[0] == key[0])
        if len(others) >= MOST[str(key[0])]:
            del self._programs[oldest]
            if key[0] == "nodes":
                del self._homes[oldest[1]]

    def _buffers_of(self, nodes: int) -> Buffers:
        rows = room(ROWS, nodes)
        if rows not in self._buffers:
            self._buffers[rows] = Buffers.of(rows, self._heads, self._backbone)
        return self._buffers[rows]

    def _lay_out(self, plan: Plan) -> None:
        guesses, log_p = self._guesses(plan)
        nodes = plan.nodes(self._told[1 + len(NUMBERS) :], guesses, log_p)
        buffers = self._buffers_of(plan.size)
        tree = buffers.tree(plan.size, plan.deepest)
        buffers.candidates[: plan.size].copy_(nodes.candidates)
        tree.parents.copy_(nodes.tensors.parents)
        tree.depths.copy_(nodes.tensors.depths)
        tree.ancestors.copy_(nodes.tensors.ancestors)
        told = torch.cat([nodes.candidates, *nodes.told, told_guesses(guesses)])
        buffers.learned[2 : 2 + len(told)].copy_(told)

    def _forward(self, nodes: int, span: int) -> None:
        buffers = self._buffers_of(nodes)
        tree, start = buffers.tree(nodes, 0), self._told[0].long()
        positions = (tree.depths + start).clamp(max=self._backbone.context - 1)
        hidden = self._backbone.hidden_at(
            buffers.candidates[:nodes], positions, tree.ancestors, start, span, self._cache
        )
        buffers.hidden[:nodes].copy_(hidden)
        buffers.logits[:nodes].copy_(self._backbone.logits(hidden))

    def _settle(self, nodes: int, deepest: int, kind: Kind) -> None:
        buffers = self._buffers_of(nodes)
        tree, start = buffers.tree(nodes, deepest), self._told[0].long()
        numbers = self._told[1 : 1 + len(NUMBERS)]
        verdict = decide(
            kind, numbers, buffers.logits[:nodes], buffers.candidates[:nodes], tree, start
        )
        if nodes > 1:
            self._cache.move(start, path_to(verdict.row, tree))
        self._hidden.copy_(buffers.hidden[verdict.row[None]])
        buffers.learned[:2].copy_(torch.stack([verdict.row, verdict.next]))


def host_tensor(like: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host for copies from and to `like`: in memory that may not be swapped, where the GPU copies."""
    return torch.zeros(like.shape, dtype=like.dtype, pin_memory=device.type == "cuda")


def _nodes_key(plan: Plan) -> Key:
    return "nodes", plan.shape


def _forward_key(plan: Plan, span: int) -> Key:
    return "forward", plan.size, span


def _settle_key(plan: Plan, kind: Kind) -> Key:
    return "settle", plan.size, plan.deepest, kind
