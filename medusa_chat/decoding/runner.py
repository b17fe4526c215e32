"""Prefill, verify, commit: the only place that runs the backbone while decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_chat.decoding.acceptance import Rule, TreeTensors
from medusa_chat.decoding.tree import Tree
from medusa_chat.model import attention
from medusa_chat.model.backbone import Backbone
from medusa_chat.model.heads import Heads

PREFILL_ROWS = 512  # rows of one prefill forward: bounds the mask and the activations


@dataclass(frozen=True)
class Outcome:
    """What a step settled.

    Attributes:
        candidates: the token of every node, the root's first.
        rows: rows of the accepted path, root first; their keys and values are committed.
        next: the token behind the path, root of the next step.
        guesses: guesses[k - 1]: the likeliest tokens of head k, likeliest first, as wide as the tree; empty where
            no heads ran.
    """

    candidates: list[int]
    rows: tuple[int, ...]
    next: int
    guesses: list[list[int]]


class Runner:
    """Runs steps over one text and keeps what the next step needs: the cache and the last hidden state.

    `step` is the one door: today it runs the eager step, and a captured one has to give the same Outcome.

    Attributes:
        mark: called with "begin" where a step begins, and with the name of each of its parts when it is over:
            heads, forward, acceptance, commit. bench times them by it.
    """

    def __init__(self, backbone: Backbone, heads: Heads | None, capacity: int) -> None:
        self.backbone = backbone
        self.heads = heads
        self.cache = backbone.new_cache(capacity)
        self._hidden: Tensor | None = None  # [1, hidden] of the last committed row
        self._prepared: dict[Tree, _PreparedTree] = {}
        self.mark: Callable[[str], None] = _nobody_times

    @torch.inference_mode()
    def prefill(self, tokens: list[int], rule: Rule) -> int:
        """Append tokens to the text; returns the token that the rule chooses behind them."""
        for start in range(0, len(tokens), PREFILL_ROWS):
            chunk = tokens[start : start + PREFILL_ROWS]
            hidden = self.backbone.hidden(*self._chain(chunk), self.cache)
            self.cache.commit(tuple(range(len(chunk))))
        self._hidden = hidden[-1:]
        root = self._prepare(Tree())
        last = torch.tensor(tokens[-1:], device=self.backbone.device)
        return int(rule(self.backbone.logits(self._hidden), last, root.tensors, self.cache.length - 1).next)

    @torch.inference_mode()
    def step(self, root: int, tree: Tree, rule: Rule) -> Outcome:
        """Verify the tree behind `root` in one forward and commit the accepted path.

        The tree of the root alone is a vanilla step: no heads run, one row is verified.
        """
        self.mark("begin")
        prepared = self._prepare(tree)
        position = self.cache.length
        guesses = self._guesses(prepared)  # [depth, width]
        first = torch.tensor([root], device=self.backbone.device)
        candidates = torch.cat([first, guesses.flatten()[prepared.guess]])
        self.mark("heads")
        # Guesses beyond the last position can't be kept, but some position encodings change or fail there.
        positions = (prepared.tensors.depths + position).clamp(max=self.backbone.context - 1)
        hidden = self.backbone.hidden(candidates, positions, prepared.mask, self.cache)
        logits = self.backbone.logits(hidden)
        self.mark("forward")
        verdict = rule(logits, candidates, prepared.tensors, position)
        settled = torch.cat([verdict.row[None], verdict.next[None], candidates, guesses.flatten()])
        row, following, *tokens = settled.tolist()
        self.mark("acceptance")
        rows, ranked = tree.branches[row], tokens[len(tree) :]
        self._hidden = hidden[row : row + 1]
        self.cache.commit(rows)
        self.mark("commit")
        ranks = [ranked[start : start + tree.width] for start in range(0, len(ranked), max(tree.width, 1))]
        return Outcome(tokens[: len(tree)], rows, following, ranks)

    def _guesses(self, prepared: _PreparedTree) -> Tensor:
        """The likeliest tokens of each head that the tree uses, [depth, width]."""
        if self.heads is None or prepared.width == 0:
            return torch.empty(0, 0, dtype=torch.long, device=self.backbone.device)
        assert self._hidden is not None, "a step follows a prefill"
        logits = self.heads.logits(self._hidden, self.backbone.lm_head)[: prepared.depth, 0]
        return logits.topk(prepared.width).indices

    def _chain(self, tokens: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens, positions and mask of rows that follow one another."""
        device, n = self.backbone.device, len(tokens)
        positions = torch.arange(n, device=device) + self.cache.length
        mask = None
        if n > 1:
            mask = attention.additive(torch.ones(n, n, dtype=torch.bool, device=device).tril(), self.backbone.dtype)
        return torch.tensor(tokens, device=device), positions, mask

    def _prepare(self, tree: Tree) -> _PreparedTree:
        if tree not in self._prepared:
            if len(self._prepared) > 64:
                self._prepared.clear()
            self._prepared[tree] = _PreparedTree.of(tree, self.backbone)
        return self._prepared[tree]


def _nobody_times(part: str) -> None:
    """What `Runner.mark` is while nobody times the parts of a step."""


@dataclass(frozen=True)
class _PreparedTree:
    """A tree's buffers: its topology, its additive mask [n, n], and where in the flattened guesses
    [depth * width] each node's token stands."""

    tensors: TreeTensors
    mask: Tensor | None
    guess: Tensor
    depth: int
    width: int

    @classmethod
    def of(cls, tree: Tree, backbone: Backbone) -> _PreparedTree:
        tensors = TreeTensors.of(tree, backbone.device)
        guess = [(len(path) - 1) * tree.width + path[-1] for path in tree.paths[1:]]
        return cls(
            tensors,
            attention.additive(tensors.ancestors, backbone.dtype) if len(tree) > 1 else None,
            torch.tensor(guess, dtype=torch.long, device=backbone.device),
            tree.depth,
            tree.width,
        )
