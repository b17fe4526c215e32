"""Rules that decide which candidates a step keeps and which token follows.

Every rule is a pure function of tensors on one device. It copies nothing to the host (indexing by a
tensor [] would), and its shapes depend on nothing but the tree's. The sampling's numbers and the
position may be tensors [] of the device, so that a recorded step can be replayed with others.
Shapes: n nodes, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from medusa_chat.decoding.noise import gumbel
from medusa_chat.decoding.numbers import Number, Numbers, integer, single
from medusa_chat.decoding.penalties import penalize, penalize_paths
from medusa_chat.decoding.trees.tree import Tree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medusa_chat.sampling import Sampling

# The rules differ in their operations. Truncation is apart because it sorts the scores.
Kind = Literal["greedy", "typical", "exact", "typical-truncated", "exact-truncated"]
KINDS: tuple[Kind, ...] = ("greedy", "typical", "exact", "typical-truncated", "exact-truncated")
Coupling = Literal["none", "noise", "truncated"]
FILLER_DEPTH = -1  # of rows that fill a step up: no rule takes them for the root or a guess
NOTHING = float("-inf")  # the score of a token that may not follow


@dataclass(frozen=True)
class TreeTensors:
    """A tree's topology on a device.

    Attributes:
        parents: [n], the row of each node's parent; the root is its own.
        depths: [n]
        ancestors: bool [n, n]; each node is its own ancestor too.
        depth: no node lies deeper; known without a look at the device.
    """

    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    depth: int

    @classmethod
    def of(cls, tree: Tree, device: torch.device) -> TreeTensors:
        """Put a tree on a device."""
        parents = torch.tensor(tree.parents, device=device)
        depths = torch.tensor(tree.depths, device=device)
        return cls(parents, depths, ancestors_of(tree, len(tree)).to(device), tree.depth)

    @classmethod
    def from_parents(cls, parents: Sequence[int]) -> TreeTensors:
        """Put a tree on the CPU: the row of each node's parent, which lies above it."""
        ancestors = torch.eye(len(parents), dtype=torch.bool)
        for row, parent in enumerate(parents):
            ancestors[row] |= ancestors[parent]
        depths = ancestors.sum(1) - 1
        return cls(torch.tensor(parents), depths, ancestors, int(depths.max()))


def ancestors_of(tree: Tree, rows: int) -> Tensor:
    """Return a bool matrix [rows, rows] on the CPU, with the ancestors of the tree's nodes."""
    ancestors = torch.zeros(rows, rows, dtype=torch.bool)
    for row, branch in enumerate(tree.branches):
        ancestors[row, list(branch)] = True
    return ancestors


@dataclass(frozen=True)
class Verdict:
    """The decision of a step.

    Attributes:
        row: [], the deepest accepted node.
        next: [], the token that follows it.
    """

    row: Tensor
    next: Tensor


@dataclass(frozen=True)
class Rule:
    """A rule of acceptance and its numbers.

    Attributes:
        counts: of the text so far, as `penalties` keeps them; None without penalties.
    """

    kind: Kind
    numbers: Numbers
    counts: Tensor | None = None

    @property
    def plain_greedy(self) -> bool:
        """True if the argmax of the logits as they are decides."""
        return self.kind == "greedy" and self.counts is None

    @property
    def coupling(self) -> Coupling:
        """The noise that a guess may be ranked with: that of its target's draw."""
        if not self.kind.startswith("exact"):
            return "none"
        return "truncated" if self.kind.endswith("truncated") else "noise"

    def first(self, logits: Tensor, position: int) -> int:
        """Choose the token that follows a prompt.

        Args:
            logits: [1, V], of the backbone at the prompt's last token.
            position: of that token.
        """
        scores = logits.float()
        if self.counts is not None:
            scores = penalize(scores, self.counts, self.numbers)
        root = TreeTensors.of(Tree(), logits.device)
        return int(self._decide(scores, torch.zeros_like(root.depths), root, position).next)

    def __call__(
        self, logits: Tensor, candidates: Tensor, tree: TreeTensors, position: int | Tensor
    ) -> Verdict:
        """Decide a step.

        Args:
            logits: [n, V], of the backbone at each node.
            candidates: [n], the token of each node.
            tree: the topology of the nodes.
            position: of the root in the text.
        """
        scores = logits.float()  # the CPU's argmax over 16 bits is five times as slow
        if self.counts is not None:
            scores = penalize_paths(scores, self.counts, self.numbers, candidates, tree.ancestors)
        return self._decide(scores, candidates, tree, position)

    def _decide(
        self, logits: Tensor, candidates: Tensor, tree: TreeTensors, position: int | Tensor
    ) -> Verdict:
        if self.kind == "greedy":
            return greedy(logits, candidates, tree)
        scores = temper(logits, self.numbers.temperature)
        if self.kind.endswith("truncated"):
            scores = truncate(scores, *self.numbers[1:4])
        if self.kind.startswith("typical"):
            return typical(scores, candidates, tree, position, self.numbers)
        return exact(scores, candidates, tree, position, self.numbers.seed)


def make_rule(sampling: Sampling, counts: Tensor | None = None) -> Rule:
    """Return the rule of a mode; at temperature 0 each is greedy.

    `counts` are those of the text that penalties read, if the sampling has any.
    """
    return Rule(_kind_of(sampling), Numbers.of(sampling), counts)


def _kind_of(sampling: Sampling) -> Kind:
    if sampling.greedy:
        return "greedy"
    truncated = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    if sampling.mode == "typical":
        return "typical-truncated" if truncated else "typical"
    return "exact-truncated" if truncated else "exact"


def greedy(logits: Tensor, candidates: Tensor, tree: TreeTensors) -> Verdict:
    """Keep a candidate while it is the argmax after its parent: greedy decoding's text."""
    return _matching(logits.argmax(-1), candidates, tree)


def exact(
    scores: Tensor, candidates: Tensor, tree: TreeTensors, position: Number, seed: Number
) -> Verdict:
    """Sample without loss: draw a token after every node, and keep a child that is that token.

    The noise is keyed by (seed, position, token), so a draw does not depend on the tree: the text
    is that of vanilla sampling with the same seed.

    `scores` are float32 [n, V], tempered and truncated; the rest is as a Rule takes it.
    """
    positions = torch.arange(1, tree.depth + 2, device=scores.device) + position
    noise = gumbel(integer(seed), positions, scores.shape[-1])
    # Nodes of one depth share their noise.
    return _matching((scores + noise[tree.depths]).argmax(-1), candidates, tree)


def typical(
    scores: Tensor, candidates: Tensor, tree: TreeTensors, position: Number, numbers: Numbers
) -> Verdict:
    """Typical acceptance (paper, section 2.3.1): keep x if p(x) > min(epsilon, delta * exp(-H(p))).

    The longest accepted path wins, ties by summed log-likelihood. The next token is drawn from
    what the same rule leaves of the distribution.

    `scores` are float32 [n, V], tempered and truncated; the rest is as a Rule takes it.
    """
    log_p = scores.log_softmax(-1)
    p = log_p.exp()
    # The clamp makes 0 * log 0 nothing; no sum notices it otherwise.
    entropy = -torch.linalg.vecdot(p, log_p.clamp(min=-1e4))
    threshold = single(numbers.delta) * torch.exp(-entropy)
    threshold = threshold.clamp(max=single(numbers.epsilon))  # [n]
    candidate_log_p = log_p[tree.parents, candidates]
    kept = candidate_log_p.exp() > threshold[tree.parents]
    row = _deepest(kept, tree, candidate_log_p)
    last = row[None]
    p = p[last]  # [1, V]
    # The likeliest token always stays, so that a delta above 1 can't leave nothing to draw from.
    allowed = (p > threshold[last]) | (p == p.max())
    left = log_p[last].masked_fill(~allowed, NOTHING)
    noise = gumbel(integer(numbers.seed), tree.depths[last] + position + 1, left.shape[-1])
    return Verdict(row, (left + noise).argmax())


def temper(logits: Tensor, temperature: Number) -> Tensor:
    """Divide logits [n, V] by the temperature; returns float32 scores [n, V]."""
    return logits.float() / single(temperature)


def truncate(scores: Tensor, top_k: Number, top_p: Number, min_p: Number) -> Tensor:
    """Apply top-k, then top-p, then min-p, as transformers does; 0, 1 and 0 switch them off.

    Scores are float32 [n, V]; they become -inf where a token is cut off. The numbers are floats, or
    tensors [] of the device in double.
    """
    if _used(top_k, off=0):
        scores = scores.masked_fill(scores < _least(scores, top_k), NOTHING)
    if _used(top_p, off=1):
        # Sorted again as transformers does: of equal scores at the edge, the same ones have to go.
        rising, order = scores.sort()
        off = (rising.softmax(-1).cumsum(-1) <= 1 - top_p) & (top_p < 1)
        off[:, -1].zero_()  # the likeliest stays
        scores = scores.masked_fill(off.scatter(-1, order, off), NOTHING)
    if _used(min_p, off=0):
        p = scores.softmax(-1)
        scores = scores.masked_fill(p < single(min_p) * p.amax(-1, keepdim=True), NOTHING)
    return scores


def _used(number: Number, off: float) -> bool:
    """Tell if a number may have an effect; one of the device is not read, so it may."""
    return isinstance(number, Tensor) or number != off


def _least(scores: Tensor, top_k: Number) -> Tensor:
    """Return the score of the k-th likeliest token: [n, V] -> [n, 1]."""
    vocabulary = scores.shape[-1]
    if not isinstance(top_k, Tensor):
        return scores.topk(min(int(top_k), vocabulary)).values[:, -1:]
    k = top_k.masked_fill(top_k == 0, vocabulary).long().clamp(max=vocabulary)
    return scores.sort(descending=True).values.index_select(-1, k[None] - 1)


def _matching(chosen: Tensor, candidates: Tensor, tree: TreeTensors) -> Verdict:
    """Keep the path on which every candidate is the token chosen after its parent. chosen: [n]."""
    row = _deepest(candidates == chosen[tree.parents], tree, None)
    return Verdict(row, chosen[row[None]][0])


def _deepest(kept: Tensor, tree: TreeTensors, log_p: Tensor | None) -> Tensor:
    """Find the deepest node whose whole path is kept; ties by summed log_p. kept: [n] -> []."""
    off = ~kept & (tree.depths > 0)  # the backbone itself chose the root
    alive = ~(tree.ancestors & off).any(-1)
    depth = tree.depths.masked_fill(~alive, -1)
    if log_p is None:
        return depth.argmax()
    guesses = tree.ancestors & (tree.depths > 0)
    likelihood = log_p.expand(len(depth), -1).masked_fill(~guesses, 0.0).sum(-1)
    return likelihood.masked_fill(depth < depth.max(), NOTHING).argmax()


def path_to(row: Tensor, tree: TreeTensors) -> Tensor:
    """List the rows from the root to node `row` []; after the path's end the root is repeated.

    Returns:
        [min(depth + 1, n)]
    """
    levels = torch.arange(min(tree.depth + 1, len(tree.depths)), device=row.device)
    return (tree.ancestors[row[None]] & (tree.depths == levels[:, None])).int().argmax(-1)
